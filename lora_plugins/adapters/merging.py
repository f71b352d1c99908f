"""Merging an adapter into its base model, layer by layer, and measuring how far the result is from what was trained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_plugins.adapters import files as adapters
from lora_plugins.adapters.prepare import prepare_model
from lora_plugins.adapters.probe import PROBE_TEXT, Distance, compare_logits, probe_logits
from lora_plugins.errors import MergeError
from lora_plugins.models.wrapping import adapter_modules, base_of
from lora_plugins.quantization.request import Quantization, owner_of, parse_quantization
from lora_plugins.quantization.selftest import check_usable
from lora_plugins.quantization.walk import layers_to_quantize
from lora_plugins.text import dtype_name, one_line
from registry import put_back

#: ``fp16`` and ``bf16``: into the base reloaded in that dtype. ``same``: into the dequantized weights that the adapter
#: was trained against, in the dtype that the base is stored in.
MergeDtype = Literal["fp16", "bf16", "same"]

#: Written beside an adapter by ``lora-plugins train``: its base, template and quantization.
RECIPE_FILE = "recipe.json"

#: Written by the registry; its "training" has the facts of the run.
_MANIFEST_FILE = "adapter_manifest.json"

#: Marks "as it was trained", which ``None`` (in float) is not.
AS_TRAINED = "as trained"

#: Collects the files until all of them are there.
_PARTIAL = ".merging"


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        output: Folder of the merged model.
        base: Base model that was merged into.
        dtype: Dtype of the merged weights.
        into: What the adapter was added to, in words.
        bytes: Bytes of the merged weights.
        distance: How far the merged model is from the trained one, ``None`` when it was not measured.
        as_trained: Whether it is known how the base was quantized in training. If not, the distance is that from
            the adapter on the float base.
    """

    output: Path
    base: str
    dtype: str
    into: str
    bytes: int
    distance: Distance | None
    as_trained: bool = True

    def line(self) -> str:
        """The result as a sentence or two."""
        text = f"Merged model in {self.output}: {self.dtype}, {self.bytes:,} bytes, into {self.into}."
        if self.distance is None:
            return text
        if self.as_trained:
            return f"{text} Against the trained model: {self.distance.line()}"
        return (
            f"{text} Against the adapter on the float base: {self.distance.line()}. Whether it was trained on a "
            "quantized one is not known; --quantization says it."
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**asdict(self), "output": str(self.output)}


def merge_and_save(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: MergeDtype | str = "fp16",
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    quantization: str | Mapping[str, Any] | None = AS_TRAINED,
    probe: str | None = PROBE_TEXT,
    overwrite: bool = False,
    max_shard_size: str = "2GB",
) -> MergeResult:
    """Merge a stored LoRA adapter into its base and write a model that plain transformers loads.

    Memory peaks near one copy of the model: the base is loaded once in the output's dtype, and each layer is
    merged in float32 alone. Only the probe, which needs the trained model, takes more, and can be left out.

    Args:
        adapter: Adapter folder, or a registry reference.
        output: Folder for the merged model, its tokenizer and the adapter's ``recipe.json``.
        dtype: ``"fp16"`` or ``"bf16"`` merges into the base in that dtype; ``"same"`` into the dequantized
            weights that the adapter was trained against, in the dtype that the base is stored in.
        base: Base model; default is the one that the adapter names.
        revision: Branch, tag or commit of the base model; default is the one that the adapter names.
        quantization: Backend that the adapter was trained on, ``None`` or ``"none"`` for a float base; default is
            what ``recipe.json`` beside the adapter, or the manifest of a release, says.
        probe: Text on which the merged model's logits are compared with the trained model's; ``None``
            leaves that out.
        overwrite: Whether a model that is already in ``output`` may be replaced.
        max_shard_size: Largest file of weights.

    Raises:
        MergeError: ``dtype`` is unknown, the base can't be told or loaded, the output is taken or holds an
            adapter, or weights overflow the dtype.
        AdapterMismatch: The adapter does not fit the base.
        QuantizationError: The backend is unknown or can't be used here.
    """
    if dtype not in get_args(MergeDtype):
        raise MergeError(f"dtype must be {', '.join(map(repr, get_args(MergeDtype)))}, not {dtype!r}")
    job = _Job.make(adapter, base, revision, quantization, same=dtype == "same")
    target = Path(output)
    _check_output(target, overwrite=overwrite)
    tokenizer = job.tokenizer()
    trained = _trained_logits(job, tokenizer, probe) if probe else None
    model = job.load(_torch_dtype(dtype))
    merged = _merge(model, job, same=dtype == "same")
    _check_finite(merged)
    distance = None
    if trained is not None and probe:
        distance = compare_logits(trained, probe_logits(merged, tokenizer, probe))
    _save(merged, tokenizer, job.folder, target, max_shard_size)
    return MergeResult(
        output=target,
        base=job.base,
        dtype=dtype_name(merged.dtype),
        into=_into(job, same=dtype == "same"),
        bytes=sum(tensor.nbytes for tensor in _unique_tensors(merged)),
        distance=distance,
        as_trained=job.as_trained,
    )


def _check_output(target: Path, *, overwrite: bool) -> None:
    if (target / adapters.ADAPTER_CONFIG).is_file():
        # transformers would load the merged model and put the adapter on it a second time.
        raise MergeError(f"{target} holds an adapter. The merged model needs a folder of its own.")
    if (target / "config.json").is_file() and not overwrite:
        raise MergeError(
            f"{target} already holds a model. Choose another folder, or pass overwrite=True (--overwrite)."
        )


def unquantized_layers(model: nn.Module) -> list[str]:
    """Names of a trained model's linear layers that were left in float, as ``skip_modules`` takes them.

    Args:
        model: A quantized model, wrapped or not.
    """
    ours = adapter_modules(model)
    return [
        name.replace(".base_layer", "")
        for name, module in base_of(model).named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in ours and owner_of(module) is None
    ]


@dataclass(frozen=True)
class _Job:
    """What to merge into what.

    Attributes:
        folder: The adapter.
        base: Its base model.
        revision: The base model's revision.
        quantization: What the adapter was trained on, ``None`` for a float base.
        as_trained: Whether that is known.
    """

    folder: Path
    base: str
    revision: str | None
    quantization: Quantization | None
    as_trained: bool

    @classmethod
    def make(
        cls,
        adapter: str | os.PathLike[str],
        base: str | os.PathLike[str] | None,
        revision: str | None,
        quantization: str | Mapping[str, Any] | None,
        *,
        same: bool,
    ) -> _Job:
        folder = adapters.adapter_folder(adapter)
        config = adapters.load_config(folder)
        recipe = _read_recipe(folder)
        named = os.fspath(base) if base is not None else recipe.get("base") or config.base_model_name_or_path
        if not named:
            raise MergeError(f"The adapter in {folder} does not say which base model it is for. Pass base= (--base).")
        if revision is not None and Path(named).exists():
            raise MergeError(
                f"revision={revision!r} was given, and the base model {named} is a folder, which has none."
            )
        known = quantization != AS_TRAINED or "quantization" in recipe
        if quantization == AS_TRAINED:
            if same and not known:
                raise MergeError(
                    f"dtype='same' needs to know how the base was quantized in training, and {folder} has no "
                    f"{RECIPE_FILE} that says it. Pass quantization= (--quantization): a backend's name, or 'none'."
                )
            quantization = recipe.get("quantization")
        backend = parse_quantization(None if quantization == "none" else quantization)
        return cls(folder, named, revision or recipe.get("revision") or config.revision, backend, known)

    def load(self, dtype: torch.dtype | str) -> PreTrainedModel:
        """Load the base in a dtype, ``"auto"`` for the one it is stored in."""
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self.base, revision=self.revision or "main", dtype=dtype
            )
        except (OSError, ValueError, KeyError) as error:
            text = one_line(error)
            raise MergeError(f"The base model {self.base} can't be loaded: {text}") from error
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the base's tokenizer, which goes with the merged model."""
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.base, revision=self.revision or "main"
            )
        except (OSError, ValueError, KeyError) as error:
            text = one_line(error)
            raise MergeError(f"The base model {self.base} has no tokenizer that can be loaded: {text}") from error
        return tokenizer


def _read_recipe(folder: Path) -> dict[str, Any]:
    """What is known of the training: from the train command, else from the manifest of a release."""
    recipe = _read_object(folder / RECIPE_FILE)
    if recipe is not None:
        return recipe
    training = (_read_object(folder / _MANIFEST_FILE) or {}).get("training")
    if not isinstance(training, dict) or "quantization" not in training:
        return {}
    return {"quantization": training["quantization"]}


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise MergeError(f"{file} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _torch_dtype(dtype: str) -> torch.dtype | str:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, "auto")


def _into(job: _Job, *, same: bool) -> str:
    if same and job.quantization is not None:
        return f"the weights dequantized from {job.quantization.name}"
    return f"the float weights of {job.base}"


def _trained_logits(job: _Job, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The logits of the model as it was trained: quantized base, adapter, activations in float32."""
    model = job.load("auto")
    options = {**job.quantization.options, "name": job.quantization.name} if job.quantization else None
    trained = prepare_model(model, adapter=job.folder, quantization=options, compute_dtype="float32")
    trained.eval()
    for module in trained.modules():
        # Evaluation rounds activations too in some backends; the weights are what is merged.
        if owner_of(module) is not None:
            module.train()
    return probe_logits(trained, tokenizer, text)


def _merge(model: PreTrainedModel, job: _Job, *, same: bool) -> PreTrainedModel:
    """Add the adapter to the weights, one layer at a time; the model comes back without adapter layers."""
    dtype = model.dtype
    quantization = job.quantization if same else None
    wrapped = _wrap(model, job.folder)
    rounded = _layers_to_round(wrapped, quantization)
    lora = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for layer in lora:
            base = layer.get_base_layer()
            if not isinstance(getattr(base, "weight", None), torch.nn.Parameter):
                # Fused expert parameters are merged in their own dtype.
                layer.merge()
                continue
            _untie(base, model)
            if quantization is not None and base in rounded:
                rounded.discard(base)
                base.weight.data = _rounded(base, quantization)
            # The update is in float32, and so is the sum until it is stored in the weight's own dtype.
            layer.merge()
            base.weight.data = base.weight.data.to(dtype)
        for base in rounded:
            assert quantization is not None, "nothing is rounded without a backend"
            base.weight.data = _rounded(base, quantization).to(dtype)
        merged: PreTrainedModel = wrapped.unload()
    return _cleaned(merged, dtype)


def _wrap(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter into the base; every tensor of it must have a place there."""
    wrapped = PeftModel.from_pretrained(model, str(folder))
    file = adapters.find_adapter_file(folder, "default")
    if file is None:
        raise MergeError(f"The folder {folder} has no {adapters.ADAPTER_FILE}.")
    stored = load_file(str(file), device="cpu")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    adapters.check_same_tensors(shapes, adapters.adapter_shapes(wrapped, "default"), file)
    # PEFT warns of what it lost and goes on.
    put_back(wrapped, stored, "default")
    return wrapped


def _cleaned(merged: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Freeze the result, and untie the head where training has made it another one."""
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        merged.config.tie_word_embeddings = False
    merged.config.dtype = dtype
    merged.eval()
    return merged


def _untie(layer: Any, model: PreTrainedModel) -> None:
    """Give a head or embeddings that share their weight one of its own: the adapter was trained for this place alone.

    Raises:
        MergeError: Another layer shares its weight: transformers would tie the two again when it loads the model.
    """
    weight = layer.weight
    # A wrapper's `weight` is its layer's: only parameters of a module's own count.
    sharing = [name for name, module in model.named_modules() if module._parameters.get("weight") is weight]
    if len(sharing) <= 1:
        return
    ends = [end for end in (model.get_output_embeddings(), model.get_input_embeddings()) if end is not None]
    if not any(layer is end or layer is getattr(end, "base_layer", None) for end in ends):
        names = " and ".join(name.replace(".base_layer", "") for name in sharing)
        raise MergeError(
            f"{names} share one weight and the adapter changes them differently: a merged model can't hold both. Use "
            "the adapter on its base."
        )
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _layers_to_round(model: nn.Module, quantization: Quantization | None) -> set[nn.Module]:
    """The layers that were quantized in training."""
    if quantization is None:
        return set()
    layers, _ = layers_to_quantize(model, quantization, ())
    first = next(iter(layers.values()), None)
    if first is not None:
        check_usable(quantization, first.weight.device, first.weight.dtype)
    return set(layers.values())


def _rounded(layer: Any, quantization: Quantization) -> torch.Tensor:
    """A layer's weight after quantizing and dequantizing it, in float32 and the layer's own orientation."""
    transposed = not isinstance(layer, nn.Linear)
    weight = layer.weight.data.T.contiguous() if transposed else layer.weight.data
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    made = quantization.quantizer.quantize_linear(linear, quantization.options)
    values = quantization.quantizer.dequantize(made).float()
    return values.T.contiguous() if transposed else values


def _check_finite(model: PreTrainedModel) -> None:
    """Raise where a weight has no finite value in the output's dtype; bfloat16 reaches further than float16."""
    for name, parameter in model.named_parameters():
        # In parts, because the test makes copies.
        for part in parameter.detach().flatten().split(1 << 20):
            if part.is_floating_point() and not bool(part.isfinite().all()):
                raise MergeError(
                    f"{name} is not finite in {str(parameter.dtype).removeprefix('torch.')}. "
                    "Merge with dtype='bf16', which has the range of float32, or look at the adapter."
                )


def _unique_tensors(model: nn.Module) -> list[torch.Tensor]:
    return list({parameter.data_ptr(): parameter for parameter in model.parameters()}.values())


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path, target: Path, max_shard_size: str
) -> None:
    """Write the model beside its final place and move it there, the configuration last: without it nothing loads."""
    partial = target / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(partial)
    if (adapter / RECIPE_FILE).is_file():
        shutil.copy2(adapter / RECIPE_FILE, partial / RECIPE_FILE)
    for stale in (target / "config.json", *target.glob("model*.safetensors"), *target.glob("model*.index.json")):
        stale.unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    partial.rmdir()


__all__ = ["AS_TRAINED", "RECIPE_FILE", "MergeResult", "merge_and_save", "unquantized_layers"]
