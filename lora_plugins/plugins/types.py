"""The records that plugins return: `Architecture` and `Quantizer`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Architecture", "ExpertPolicy", "Quantizer"]


#: What happens to the routed experts of mixture-of-experts blocks.
ExpertPolicy = Literal["none", "routed", "shared"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where LoRA adapters go in models of one ``model_type``.

    The shortest useful record is ``Architecture("mytype", ("q", "v"))``; every other field has a
    default. A *name* matches a module when it is the module's dotted path or the end of it at a dot,
    as in ``peft.LoraConfig.target_modules``: ``"q"`` matches ``blocks.0.mix.q`` and not ``blocks.0.mix.pq``.

    Attributes:
        model_type: ``config.model_type`` of the models this record is for.
        targets: Names of the modules that get adapters by default.
        scopes: Names by scope, for ``target_modules="attention"``, ``"mlp"``, or a scope of your own.
            ``"all-linear"`` needs no entry: it is every linear layer inside the blocks.
        experts: Names of the routed-expert parameters (fused 3-D tensors) or expert modules.
        expert_policy: What ``experts="default"`` means for this type.
        text: Prefixes of the language part in a multimodal model; empty when there is only one part.
        vision: Prefixes of the vision, audio or other encoders; never adapted unless the scope
            ``"vision"`` is asked for.
        never: Names that must not get an adapter in any scope: routers, weights read as raw tensors, …
        heads: Names of the heads made new for a task; trained and saved whole.
        optional: Former name of ``unreached``.
        inner: Attributes of the configuration that hold the configurations of inner models, such as
            ``"text_config"``. Where an inner model's type is registered, its record names the targets,
            scopes and experts; ``targets`` is for inner models that nobody registered.
        input_gradients: Whether the input of the blocks has to ask for a gradient: reversible blocks compute
            those of their own weights only then. The model needs transformers' ``enable_input_require_grads``.
        unreached: Names of parts that an ordinary batch may not reach, such as cross-attention to images; they
            may get adapters, and nobody is alarmed when those do not move.
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
            object.__setattr__(self, item.name, _names(f"Architecture.{item.name}", value))
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
        scopes = {name: _names(f"Architecture.scopes[{name!r}]", names) for name, names in self.scopes.items()}
        object.__setattr__(self, "scopes", scopes)


def _names(where: str, value: Any) -> tuple[str, ...]:
    # A bare string is iterable letter by letter, which would register "q", "_", "p", … without a word.
    if isinstance(value, str):
        raise TypeError(f"{where} must be a sequence of names, not the string {value!r}; write ({value!r},)")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{where} must hold non-empty strings, not {name!r}")
    return names


class Quantizer(ABC):
    """One way of storing the frozen linear layers of a base model in fewer bits.

    Subclass it, set `name`, implement the four required methods, and return an instance from
    ``register_quantizers``. Everything else (the walk over the model, which layers to skip, tagging the
    model as transformers does, freezing, LoRA dispatch, logical counts, merging) is derived by the core,
    which also runs a short training self-test on a small layer before it trusts a backend.

    Attributes:
        name: What users write in ``quantization="…"``.
        bits: Bits that one weight takes, scales apart; below 8, merging in place is refused.
        requires: Distributions that it needs beside torch, as ``pip install`` takes them: ``("hqq>=0.2.8",)``. The
            core refuses the backend with the command where one is missing, before ``available`` is asked, and
            ``lora-plugins plugins`` lists what is installed of them without importing anything.
        options: Names of the options that `quantize_linear` understands. A backend that lists
            ``"compute_dtype"`` is told the dtype of the activations in it, unless the user gave one.
        unsupported: Fields of ``peft.LoraConfig`` that PEFT can't do over layers of this backend.
        loss_note: What the losses in a log mean where training and evaluation use different kernels.
        keeps_input: Whether a layer on a GPU holds its input until its backward pass where gradient checkpointing
            can't free it: as an attribute instead of a saved tensor. `plan` counts those bytes.
        copies_weight: Whether a layer holds its weight a second time outside of its parameters, which an engine that
            divides parameters then leaves whole on every process.
        engines: Distributed engines that its layers work under: ``"ddp"``, ``"fsdp2"``, ``"deepspeed"``.
        priority: Which of several backends with the same bits comes first in tables and advice; higher is earlier.
        loggers: Names of the loggers of its libraries that speak of their own kernels and optional parts; commands
            and the self-test silence them below an error.
    """

    name: str
    bits: float
    requires: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    loss_note: str = ""
    keeps_input: bool = False
    copies_weight: bool = False
    engines: tuple[str, ...] = ("ddp", "fsdp2", "deepspeed")
    priority: int = 0
    loggers: tuple[str, ...] = ()

    @abstractmethod
    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        """Say whether this backend can run; must not raise and must not import heavy packages needlessly.

        What it requires is installed when this is called; here is the place for devices, compilers and options.

        Args:
            device: Where the quantized layers will live.
            dtype: Dtype of the activations.
            options: Options the user gave.

        Returns:
            ``None`` when it can run, else the reason and how to install what is missing.
        """

    @abstractmethod
    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        """Return the quantized, frozen form of one layer, on the same device.

        Args:
            linear: A float layer with weight of shape ``[out_features, in_features]``. It is not used
                afterwards, so it may be changed and returned.
            options: Options the user gave.

        Returns:
            A module with ``in_features`` and ``out_features`` whose forward takes
            ``[..., in_features]`` and gives ``[..., out_features]`` and lets gradients through to its input.
        """

    @abstractmethod
    def owns(self, module: nn.Module) -> bool:
        """Whether a module is one that this backend made."""

    @abstractmethod
    def dequantize(self, module: nn.Module) -> torch.Tensor:
        """Return the float weight of a module of ours, shape ``[out_features, in_features]``.

        The module must not change: some libraries drop their quantization state here.
        """

    def load_config(self, options: Mapping[str, Any]) -> Any | None:
        """Return transformers' quantization config for ``from_pretrained``, or ``None`` if there is none."""
        return None

    def loaded_options(self, config: Any) -> Mapping[str, Any] | None:
        """Return the options that a model was loaded with: what `load_config` makes a config from, read back.

        The base of a model that arrives quantized is recorded with them, and can be quantized alike again.

        Args:
            config: ``model.config.quantization_config`` of a model with layers of ours.

        Returns:
            Options as users write them, or ``None`` where the config does not say them all.
        """
        return None

    def unsuitable(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> str | None:
        """Return why a layer of this shape stays in float, ``None`` when it can be quantized.

        Group sizes that do not divide a layer are told here, before anything is done to it.
        """
        return None

    def lora_layer(self, module: nn.Module) -> type[nn.Module] | None:
        """Return a LoRA layer class of your own for a module, ``None`` for the one that fits every backend.

        That one is ``peft.tuners.lora.Linear`` with a merge by way of `dequantize` and `quantize_linear`.
        """
        return None

    def extra_tensors(self, module: nn.Module) -> Iterable[torch.Tensor]:
        """Return what a module of ours stores outside its parameters and buffers, for counting bytes."""
        return ()

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        """Return the bytes of one quantized weight with its scales and tables, for `plan`; the bias is not part of it.

        ``None`` lets the core quantize two small layers and go on from there, which is exact where every row
        of the weight is stored alike.

        Args:
            in_features: Columns of the weight.
            out_features: Rows of the weight.
            dtype: Dtype of the float weight.
            options: Options the user gave.
        """
        return None

    def after_quantize(self, model: nn.Module, options: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Set flags that this backend's libraries look for on a model with layers of ours.

        Called after the walk, and also for a model that was loaded already quantized.
        """
