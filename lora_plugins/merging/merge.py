"""Merge a stored adapter into its base model and measure the result."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_plugins.adapters.files import check_base
from lora_plugins.adapters.prepare import prepare_model
from lora_plugins.errors import MergeError
from lora_plugins.merging.base import is_quantized, load_base, read_config, trained_tokens
from lora_plugins.merging.inputs import PROBE_TEXT, Batch, make_batches
from lora_plugins.merging.job import AS_TRAINED, RECIPE_FILE, Job, MergeDtype, read_job
from lora_plugins.merging.output import check_output, partial_folder, publish, write
from lora_plugins.merging.probe import (
    Distance,
    Reading,
    compare_readings,
    count_calls,
    in_float32,
    read_outputs,
    usable_batches,
    worst_row,
)
from lora_plugins.merging.weights import Wrapped, adapter_layers, choose_values, merge_layers, round_layers, wrap
from lora_plugins.models.wrapping import plain_path
from lora_plugins.quantization.request import owner_of
from lora_plugins.text import dtype_name
from registry import expand_path

__all__ = ["MergeResult", "merge_and_save"]


#: Largest accepted relative distance of the merged model from base and adapter, both computed in float32, by dtype of
#: the weights: about ten times the effect of rounding the weights once in a model of 30 layers.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE_FLOAT32 = 1e-3


@dataclass(frozen=True)
class MergeResult:
    """Result of a merge.

    Attributes:
        output: Folder of the merged model.
        base: Base model that the adapter was merged into.
        dtype: Dtype of the merged weights.
        into: Description of the weights that the adapter was added to.
        bytes: Bytes of the merged weights.
        distance: Distance of the merged model from the trained one, ``None`` if it was not measured.
        as_trained: Whether the base's quantization in training is known. If not, ``distance`` is measured from the
            adapter on the float base.
        class_name: Class of the merged model.
        effect: Relative change of the base's outputs by the adapter; ``None`` if it was not measured.
        error: Relative distance of the written files from base and adapter, both computed in float32; ``None`` if it
            was not measured.
        notes: Limits of the measurement and other remarks.
    """

    output: Path
    base: str
    dtype: str
    into: str
    bytes: int
    distance: Distance | None
    as_trained: bool = True
    class_name: str = ""
    effect: float | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the result as a few sentences."""
        text = f"Merged model in {self.output}: {self.dtype}, {self.bytes:,} bytes, into {self.into}."
        if self.distance is not None and self.as_trained:
            text += f" Against the trained model: {self.distance.line()}"
        elif self.distance is not None:
            text += (
                f" Against the adapter on the float base: {self.distance.line()}. Whether it was trained on a "
                "quantized one is not known; --quantization says it."
            )
        return " ".join([text, *(f"{note}." for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
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

    The base is loaded in the class that has a module for each of the adapter's tensors: a causal, masked or
    sequence-to-sequence language model, a classifier, an image or audio model. Peak memory is about one copy of the
    model: the base is loaded once in the output's dtype, and layers are merged in float32 one at a time. Only the
    probe takes more, because it needs the trained model and computes in float32; it can be skipped.

    Args:
        adapter: Adapter folder, or a registry reference.
        output: Folder for the merged model, its tokenizer and the adapter's ``recipe.json``.
        dtype: ``"fp16"`` or ``"bf16"`` merges into the base in that dtype; ``"same"`` into the dequantized
            weights that the adapter was trained on, in the base's stored dtype.
        base: Base model; default is the one that the adapter names.
        revision: Branch, tag or commit of the base model; default is the one that the adapter names.
        quantization: Backend that the adapter was trained on, ``None`` or ``"none"`` for a float base; default is
            the one in ``recipe.json`` beside the adapter, or in the manifest of a release.
        probe: Text on which the merged model's outputs are compared with the trained model's; ``None``
            skips the comparison.
        overwrite: Whether a model that is already in ``output`` may be replaced.
        max_shard_size: Maximum size of a weight file.

    Raises:
        MergeError: ``dtype`` is unknown, the base is unknown or cannot be loaded, ``output`` holds an adapter or a
            model that must not be replaced, weights overflow the dtype, or the written files differ from base and
            adapter by more than rounding explains. Nothing is written to ``output`` then.
        AdapterMismatch: The adapter was trained on another base, or does not fit this one.
        QuantizationError: The backend is unknown or cannot be used here.
    """
    if dtype not in get_args(MergeDtype):
        raise MergeError(f"dtype must be {', '.join(map(repr, get_args(MergeDtype)))}, not {dtype!r}")
    target = expand_path(output)
    job = read_job(adapter, base, revision, quantization)
    check_output(target, overwrite=overwrite)
    return _Merge(job, target, dtype, probe).run(max_shard_size)


class _Merge:
    """The steps of one merge, in order; one model is in memory at a time."""

    def __init__(self, job: Job, target: Path, dtype: str, probe: str | None) -> None:
        self.job = job
        self.target = target
        self.dtype: torch.dtype | str = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, "auto")
        self.same = dtype == "same"
        self.probe = probe
        self.stored_quantized = is_quantized(read_config(job))
        self.as_trained = job.as_trained or self.stored_quantized
        self.notes: list[str] = []
        self.batches: list[Batch] = []
        self.fresh: frozenset[str] = frozenset()

    def run(self, max_shard_size: str) -> MergeResult:
        """Run all steps."""
        job = self.job
        if self.same and not self.as_trained:
            raise MergeError(_explain_unknown_quantization(job))
        tokenizer = load_tokenizer(job)
        loaded = load_base(job, self.dtype)
        self.notes += loaded.notes
        self.fresh = loaded.fresh
        check_base(job.folder, loaded.model)
        wrapped = wrap(loaded.model, job)
        if self.same and job.quantization is not None:
            choose_values(wrapped, job.quantization, experts_only=self.stored_quantized)
        reference, effect = self._read_reference(wrapped, tokenizer)
        merged = merge_layers(wrapped, job)
        del wrapped, loaded
        _check_finite(merged)
        made, size, dtype = type(merged), _count_bytes(merged), dtype_name(merged.dtype)
        with partial_folder(self.target) as partial:
            write(merged, tokenizer, job, partial, max_shard_size)
            del merged
            gc.collect()
            error, distance = self._measure(made, partial, reference)
            publish(partial, self.target)
        return MergeResult(
            output=self.target,
            base=job.base,
            dtype=dtype,
            into=self._name_weights(),
            bytes=size,
            distance=distance,
            as_trained=self.as_trained,
            class_name=made.__name__,
            effect=effect,
            error=error,
            notes=tuple(self.notes),
        )

    def _name_weights(self) -> str:
        if self.stored_quantized:
            return f"the dequantized weights of {self.job.base}"
        if self.same and self.job.quantization is not None:
            return f"the weights dequantized from {self.job.quantization.name}"
        return f"the float weights of {self.job.base}"

    def _read_reference(
        self, wrapped: Wrapped, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[list[Reading], float | None]:
        """Return the float32 outputs of base and adapter before the merge, and the relative effect of the adapter."""
        if self.probe is None:
            return [], None
        round_layers(wrapped)
        model = wrapped.model.get_base_model()
        layers = adapter_layers(wrapped.model)
        with in_float32(model):
            batches = make_batches(model, tokenizer, self.probe, trained_tokens(self.job))
            self.batches, reason = usable_batches(model, batches)
            if not self.batches:
                self.notes.append(f"The merge was not measured: the model takes none of the inputs tried ({reason})")
                return [], None
            with count_calls(layers) as called:
                reference = read_outputs(model, self.batches)
            with wrapped.model.disable_adapter():
                bare = read_outputs(model, self.batches)
        unreached = [name for name in layers if name not in called]
        if unreached:
            self.notes.append(
                f"The probe reached {len(called)} of {len(layers)} adapted modules; not measured, first "
                f"{plain_path(unreached[0])}"
            )
        effect = worst_row(reference, bare)
        if effect <= _find_tolerance(self._find_dtype(wrapped)):
            self.notes.append(
                f"The probe cannot tell whether the adapter is in: it moves the outputs of the base by {effect:.2%}, "
                "no more than rounding does"
            )
        return reference, effect

    def _find_dtype(self, wrapped: Wrapped) -> torch.dtype:
        floats = [dtype for dtype in wrapped.dtypes.values() if dtype.is_floating_point]
        return self.dtype if isinstance(self.dtype, torch.dtype) else next(iter(floats), torch.float32)

    def _measure(
        self, made: type[PreTrainedModel], partial: Path, reference: list[Reading]
    ) -> tuple[float | None, Distance | None]:
        """Load the written files and compare their outputs with base and adapter, and with the trained model.

        Raises:
            MergeError: The files lack weights, or differ from base and adapter by more than rounding explains.
        """
        if not reference:
            return None, None
        trained = self._read_trained() or reference
        model, info = made.from_pretrained(partial, dtype="auto", output_loading_info=True)
        lacking = sorted(set(info["missing_keys"]) - self.fresh)
        if lacking:
            raise MergeError(f"The merged {made.__name__} would lack {len(lacking)} weights, first {lacking[0]}")
        model.eval()
        with in_float32(model):
            error = worst_row(reference, read_outputs(model, self.batches))
        allowed = _find_tolerance(model.dtype)
        if not error <= allowed:
            raise MergeError(
                f"The merged model is not base and adapter: on {_name_all(self.batches)} its outputs differ by "
                f"{error:.2%}, and rounding to {dtype_name(model.dtype)} explains {allowed:.2%}. "
                "Nothing was written; use the adapter on its base, and report this."
            )
        return error, compare_readings(trained, read_outputs(model, self.batches))

    def _read_trained(self) -> list[Reading]:
        """Return the trained model's outputs, computed in float32; empty if they equal the reference."""
        job = self.job
        if job.quantization is not None or self.stored_quantized:
            return self._read_quantized()
        if self.dtype == "auto":
            return []
        wrapped = wrap(load_base(job, "auto").model, job)
        with in_float32(wrapped.model):
            return read_outputs(wrapped.model.get_base_model(), self.batches)

    def _read_quantized(self) -> list[Reading]:
        job = self.job
        options = None
        if job.quantization is not None and not self.stored_quantized:
            options = {**job.quantization.options, "name": job.quantization.name}
        model = load_base(job, "auto", dequantize=False).model
        trained = prepare_model(model, adapter=job.folder, quantization=options, compute_dtype="float32")
        trained.eval()
        for module in trained.modules():
            # In evaluation some backends also round activations; only the weights are to be compared.
            if owner_of(module) is not None:
                module.train()
        return read_outputs(trained.get_base_model(), self.batches)


def _name_all(batches: list[Batch]) -> str:
    return " and ".join(batch.name for batch in batches)


def _find_tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, _TOLERANCE_FLOAT32)


def _explain_unknown_quantization(job: Job) -> str:
    recorded = f"has no {RECIPE_FILE} that says it"
    if job.recorded is not None:
        recorded = f"says {job.recorded!r}, which is not the name of a backend here"
    return (
        f"dtype='same' needs to know how the base was quantized in training, and {job.folder} {recorded}. Pass "
        "quantization= (--quantization): a backend's name, or 'none'."
    )


def load_tokenizer(job: Job) -> PreTrainedTokenizerBase | None:
    """Load the merged model's tokenizer: the adapter's own, else the base's; ``None`` if there is none."""
    own = any((job.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    try:
        if own:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(job.folder))
        else:
            tokenizer = AutoTokenizer.from_pretrained(job.base, revision=job.revision or "main")
        # A tokenizer made from a configuration alone has special tokens at most, or raises when it is called.
        words = set(tokenizer(PROBE_TEXT)["input_ids"]) - set(tokenizer.all_special_ids)
    except Exception:
        # Image models and some stored bases have no tokenizer, and each kind of tokenizer raises its own error.
        return None
    return tokenizer if words else None


def _check_finite(model: PreTrainedModel) -> None:
    """Raise `MergeError` if a weight is not finite in the output's dtype."""
    for name, parameter in model.named_parameters():
        # In chunks, because isfinite() makes copies.
        for part in parameter.detach().flatten().split(1 << 20):
            if part.is_floating_point() and not bool(part.isfinite().all()):
                raise MergeError(
                    f"{name} is not finite in {dtype_name(parameter.dtype)}. "
                    "Merge with dtype='bf16', which has the range of float32, or look at the adapter."
                )


def _count_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters; shared ones count once."""
    return sum({parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}.values())
