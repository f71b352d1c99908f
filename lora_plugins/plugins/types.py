"""The records that plugins return: `Architecture` and `Quantizer`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["AdapterCheck", "Architecture", "ExpertFormat", "ExpertPolicy", "ExpertsAsLayers", "Quantizer"]


#: How the routed experts of mixture-of-experts blocks are adapted.
ExpertPolicy = Literal["none", "routed", "shared"]


@runtime_checkable
class AdapterCheck(Protocol):
    """A check of adapters: ``registry.Check``, or anything with its attributes."""

    @property
    def name(self) -> str:
        """Its name, of lower-case words joined by hyphens."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The parts of an adapter that it needs."""

    def examine(self, files: Any) -> list[Any]:
        """Return its findings in an adapter."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where LoRA adapters go in models of one ``model_type``.

    The shortest useful record is ``Architecture("mytype", ("q", "v"))``; every other field has a
    default. A *name* matches a module when it equals the module's dotted path or a dotted suffix of it,
    as in ``peft.LoraConfig.target_modules``: ``"q"`` matches ``blocks.0.mix.q`` and not ``blocks.0.mix.pq``.

    Attributes:
        model_type: ``config.model_type`` of the models that this record describes.
        targets: Names of the modules that get adapters by default.
        scopes: Names by scope, for ``target_modules="attention"``, ``"mlp"``, or your own scope.
            ``"all-linear"`` needs no entry: it means every linear layer inside the blocks.
        experts: Names of the routed-expert parameters (fused 3-D tensors) or expert modules.
        expert_policy: What ``experts="default"`` means for this type.
        text: Prefixes of the language part in a multimodal model; empty when there is only one part.
        vision: Prefixes of the vision, audio or other encoders; adapted only with the scope ``"vision"``.
        never: Names that must not get an adapter in any scope: routers, weights read as raw tensors, …
        heads: Names of the newly initialized task heads; trained and saved in full.
        optional: Former name of ``unreached``.
        inner: Attributes of the configuration that hold the configurations of inner models, such as
            ``"text_config"``. If an inner model's type is registered, its record defines the targets,
            scopes and experts; ``targets`` is for inner models whose type is not registered.
        input_gradients: Whether the input of the blocks must require a gradient: reversible blocks compute
            the gradients of their weights only then. The model needs transformers' ``enable_input_require_grads``.
        unreached: Names of parts that an ordinary batch may not reach, such as cross-attention to images; they
            may get adapters, and no error is raised if those do not change.
    """

    model_type: str
    targets: tuple[str, ...]
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    expert_policy: ExpertPolicy = "none"
    text: tuple[str, ...] = ()
    vision: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("score", "classifier", "qa_outputs")
    optional: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    input_gradients: bool = False
    unreached: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model_type, str) or not self.model_type:
            raise TypeError(f"Architecture.model_type must be a non-empty string, not {self.model_type!r}")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("model_type", "scopes", "expert_policy", "input_gradients"):
                continue
            object.__setattr__(self, item.name, _check_names(f"Architecture.{item.name}", value))
        if not self.targets:
            raise ValueError(f"Architecture({self.model_type!r}) must name targets")
        if set(self.optional) - set(self.unreached):
            warnings.warn("Architecture.optional is called unreached", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "unreached", tuple(dict.fromkeys((*self.unreached, *self.optional))))
        object.__setattr__(self, "optional", self.unreached)
        if self.expert_policy not in ("none", "routed", "shared"):
            raise ValueError(
                f"Architecture.expert_policy must be 'none', 'routed' or 'shared', not {self.expert_policy!r}"
            )
        scopes = {name: _check_names(f"Architecture.scopes[{name!r}]", names) for name, names in self.scopes.items()}
        object.__setattr__(self, "scopes", scopes)


def _check_names(where: str, value: Any) -> tuple[str, ...]:
    # A bare string is iterable: it would silently register the names "q", "_", "p", …
    if isinstance(value, str):
        raise TypeError(f"{where} must be a sequence of names, not the string {value!r}; write ({value!r},)")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{where} must hold non-empty strings, not {name!r}")
    return names


class ExpertFormat(ABC):
    """How a backend stores one expert of a stack; `Quantizer.expert_format` returns it.

    A packed expert is whatever the backend likes: a module, a tensor, or a tuple of tensors. The core keeps one for
    each expert in place of the float parameter, and dequantizes one at a time.
    """

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> Any:
        """Return one expert's weight in stored form, on the same device.

        Args:
            weight: Float weight of shape ``[out_features, in_features]``. It must not be modified.
        """

    @abstractmethod
    def unpack(self, packed: Any) -> torch.Tensor:
        """Return the float weight of a stored expert, shape ``[out_features, in_features]``; change nothing."""

    def unpack_as(self, packed: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of `unpack` in a dtype, to the bit.

        Override it where `unpack` computes in another dtype than the model's: a step then holds one float expert at a
        time, and not a second one in the other dtype.

        Args:
            packed: What `pack` returned.
            dtype: Float dtype of the result.
        """
        return self.unpack(packed).to(dtype)

    @abstractmethod
    def tensors(self, packed: Any) -> Iterable[torch.Tensor]:
        """Return the tensors that a stored expert holds, for counting bytes."""

    @abstractmethod
    def bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int | None:
        """Return the bytes of one stored expert, for `plan`; with ``None`` the core measures a small one.

        Args:
            in_features: Columns of the weight.
            out_features: Rows of the weight.
            dtype: Dtype of the float weight.
        """


class ExpertsAsLayers(ExpertFormat):
    """Stores every expert as the backend stores a linear layer: `quantize_linear`, `dequantize`, `layer_bytes`.

    Exact where a layer's stored form depends on its own weight alone.

    Args:
        quantizer: The backend.
        options: Options the user gave.
    """

    def __init__(self, quantizer: Quantizer, options: Mapping[str, Any]) -> None:
        self.quantizer = quantizer
        self.options = options

    def pack(self, weight: torch.Tensor) -> Any:
        from torch import nn

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        # Backends may change the layer that they get.
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return self.quantizer.quantize_linear(linear, self.options).requires_grad_(False)

    def unpack(self, packed: Any) -> torch.Tensor:
        return self.quantizer.dequantize(packed).detach()

    def tensors(self, packed: Any) -> Iterable[torch.Tensor]:
        return [*packed.parameters(), *packed.buffers(), *self.quantizer.extra_tensors(packed)]

    def bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int | None:
        return self.quantizer.layer_bytes(in_features, out_features, dtype, self.options)


class Quantizer(ABC):
    """A format that stores the frozen linear layers of a base model in fewer bits.

    Subclass it, set `name`, implement the four required methods, and return an instance from
    ``register_quantizers``. The core does everything else (the walk over the model, which layers to skip, tagging
    the model as transformers does, freezing, LoRA dispatch, logical counts, merging). Before it uses a backend, it
    runs a short training self-test on a small layer.

    Attributes:
        name: What users write in ``quantization="…"``.
        bits: Bits per weight, without scales; below 8, merging in place is refused.
        requires: Distributions that it needs besides torch, as ``pip install`` takes them: ``("hqq>=0.2.8",)``. If one
            is missing, the core refuses the backend with the install command before it calls ``available``.
            ``lora-plugins plugins`` lists their installed versions without importing anything.
        options: Names of the options that `quantize_linear` understands. A backend that lists
            ``"compute_dtype"`` gets the dtype of the activations in it, unless the user passed one.
        unsupported: Fields of ``peft.LoraConfig`` that PEFT does not support over layers of this backend.
        loss_note: How to read logged losses where training and evaluation use different kernels.
        keeps_input: Whether a layer on a GPU holds its input until the backward pass as an attribute instead of a
            saved tensor, so that gradient checkpointing cannot free it. `plan` counts those bytes.
        copies_weight: Whether a layer holds a second copy of its weight outside its parameters; an engine that
            shards parameters leaves that copy whole on every process.
        replaces_weight: Whether PEFT (0.21) puts a new parameter into a layer on a CPU after reading its weight for
            DoRA; the new one is unknown to an engine that keeps notes on parameters.
        engines: Distributed engines that its layers work under: ``"ddp"``, ``"fsdp2"``, ``"deepspeed"``.
        offered: Whether `plan` lists it beside others and ``quantization="auto"`` may choose it; false for a form that
            only checkpoints come in.
        priority: Order among backends with the same bits in tables and advice; higher comes first.
        loggers: Names of its libraries' loggers that report on kernels and optional parts; commands and the
            self-test silence them below level ERROR, and in other runs each of their messages is shown once.
    """

    name: str
    bits: float
    requires: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    loss_note: str = ""
    keeps_input: bool = False
    copies_weight: bool = False
    replaces_weight: bool = False
    engines: tuple[str, ...] = ("ddp", "fsdp2", "deepspeed")
    offered: bool = True
    priority: int = 0
    loggers: tuple[str, ...] = ()

    @abstractmethod
    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        """Return why this backend cannot run here, ``None`` if it can.

        Must not raise, and must not import heavy packages needlessly. The packages in ``requires`` are installed when
        this is called; check devices, compilers and options here.

        Args:
            device: Where the quantized layers will live.
            dtype: Dtype of the activations.
            options: Options the user gave.

        Returns:
            ``None`` if it can run, else the reason and how to install what is missing.
        """

    @abstractmethod
    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        """Return the quantized, frozen form of one layer, on the same device.

        Args:
            linear: A float layer with a weight of shape ``[out_features, in_features]``. It is not used
                afterwards, so it may be modified and returned.
            options: Options the user gave.

        Returns:
            A module with ``in_features`` and ``out_features`` whose forward maps ``[..., in_features]`` to
            ``[..., out_features]`` and passes gradients to its input.
        """

    @abstractmethod
    def owns(self, module: nn.Module) -> bool:
        """Whether this backend made a module."""

    @abstractmethod
    def dequantize(self, module: nn.Module) -> torch.Tensor:
        """Return the float weight of a module of this backend, shape ``[out_features, in_features]``.

        It must leave the module unchanged: some libraries drop their quantization state when they dequantize. Of a
        module that FSDP2 divides, every process calls this, and it gathers what it needs.
        """

    def load_config(self, options: Mapping[str, Any]) -> Any | None:
        """Return transformers' quantization config for ``from_pretrained``, or ``None`` if there is none."""
        return None

    def reads(self, config: Any) -> bool:
        """Whether a checkpoint with this config of transformers is loaded into layers of this backend.

        `plan` asks this of a base that it does not load. By default no.

        Args:
            config: Object of transformers' quantization config class.
        """
        return False

    def unready(self, module: nn.Module) -> str | None:
        """Return why a module of this backend cannot be trained in the state it is in, ``None`` if it can.

        Asked of every module of a base that arrives quantized, before anything is changed.
        """
        return None

    def loaded_options(self, config: Any) -> Mapping[str, Any] | None:
        """Return the options that a model was loaded with; the inverse of `load_config`.

        They are recorded for a base that was loaded quantized, so that it can be quantized the same way again.

        Args:
            config: ``model.config.quantization_config`` of a model with layers of this backend.

        Returns:
            Options as users write them, or ``None`` if the config does not contain all of them.
        """
        return None

    def unsuitable(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> str | None:
        """Return why a layer of this shape stays in float, ``None`` if it can be quantized.

        Called before the layer is changed, for example to reject a group size that does not divide it.
        """
        return None

    def expert_format(self, options: Mapping[str, Any]) -> ExpertFormat | None:
        """Return how the stacked experts of mixture-of-experts models are stored, ``None`` to leave them in float.

        Most backends can ``return ExpertsAsLayers(self, options)``, which stores every expert like a linear layer.

        Args:
            options: Options the user gave.
        """
        return None

    def lora_layer(self, module: nn.Module) -> type[nn.Module] | None:
        """Return your own LoRA layer class for a module, ``None`` for the default.

        The default is ``peft.tuners.lora.Linear``, merging through `dequantize` and `quantize_linear`.
        """
        return None

    def extra_tensors(self, module: nn.Module) -> Iterable[torch.Tensor]:
        """Return the tensors that a module stores outside its parameters and buffers, for counting bytes."""
        return ()

    def divide(self, module: nn.Module) -> bool:
        """Put all that a module stores into one flat, frozen parameter, in place; return whether that was done.

        FSDP2 and ZeRO-3 divide parameters among processes and gather them for a module's forward and backward pass. A
        module that is not divided stays whole under FSDP2, and what it holds beside parameters under ZeRO-3 too. The
        parameter must hold integers: mixed precision casts float ones. Called on a module that is divided already, this
        changes nothing.
        """
        return False

    def undivide(self, module: nn.Module) -> None:  # noqa: B027 - optional
        """Undo `divide`, in place, for a module whose parameter an engine has made whole again."""

    def divided_bytes(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> int | None:
        """Return the bytes of the parameter that `divide` makes, ``None`` if layers are not divided; for `plan`.

        Args:
            in_features: Columns of the weight.
            out_features: Rows of the weight.
            options: Options the user gave.
        """
        return None

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        """Return the bytes of one quantized weight with its scales and tables, without the bias, for `plan`.

        With ``None`` the core quantizes two small layers and extrapolates, which is exact if every row of the
        weight is stored the same way.

        Args:
            in_features: Columns of the weight.
            out_features: Rows of the weight.
            dtype: Dtype of the float weight.
            options: Options the user gave.
        """
        return None

    def after_quantize(self, model: nn.Module, options: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Set the flags that this backend's libraries expect on a model with its layers.

        Called after the walk, and also for a model that was loaded quantized.
        """
