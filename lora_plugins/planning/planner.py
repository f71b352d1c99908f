"""`plan`: trainable parameters and memory of a run, without weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn

from lora_plugins.adapters.files import adapter_folder, check_base, load_config
from lora_plugins.adapters.prepare import choose_targets
from lora_plugins.adapters.report import TargetRow, list_adapters, list_hits
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import LoraPluginsError, PlanError
from lora_plugins.models.wrapping import base_of
from lora_plugins.planning.advice import AUTO, Scenario, choose_backend, nearest_change
from lora_plugins.planning.amounts import USABLE, Memory, available_memory, fits, parse_memory, present_memory
from lora_plugins.planning.optimizer import optimizer_bytes
from lora_plugins.planning.records import Row
from lora_plugins.planning.result import Plan
from lora_plugins.planning.sharing import per_device
from lora_plugins.planning.source import find_base, meta_model, read_config, read_stored
from lora_plugins.planning.stacks import list_planned
from lora_plugins.planning.variants import Workbench
from lora_plugins.plugins.host import plugin_host
from lora_plugins.plugins.traits import check_servers, judge
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.formats import check_format
from lora_plugins.quantization.request import Quantization
from lora_plugins.quantization.selftest import why_unavailable
from lora_plugins.text import dtype_name, one_line

__all__ = ["plan"]

#: Strategies under which training refuses quantized stacks of experts, which they cannot divide.
_REFUSE_EXPERTS = ("zero2", "zero3", "fsdp")

#: Task of PEFT that adds a head to the base -> name of the task here.
_TASKS = {
    "QUESTION_ANS": "question-answering",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
}


def plan(
    model_or_name: Any,
    *,
    quantization: str | Mapping[str, Any] | Quantizer | None = None,
    peft_config: peft.LoraConfig | None = None,
    adapter: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    length: int = 1024,
    gradient_checkpointing: bool = False,
    optim: str = "adamw_torch_fused",
    strategy: str | None = None,
    devices: int = 1,
    memory: str | int | None = None,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compute_dtype: str | torch.dtype = "auto",
    upcast: str = "none",
    experts: str = "default",
    strict: bool = True,
    chunked_loss: bool = True,
    serve: str | Iterable[str] | None = None,
    recipe: str | None = None,
    **lora: Any,
) -> Plan:
    """Say what a LoRA run would train and how much memory it would take, without loading or creating weights.

    The model is built on the meta device, prepared as by `prepare_model`, and takes one training step there,
    in which the bytes of everything alive are counted. Counts, weights, gradients, optimizer state and the adapter's
    file are exact; activations are those of the step. Meanwhile ``scaled_dot_product_attention``,
    ``torch.autocast`` and ``torch.is_autocast_enabled`` are patched for the whole process; for tensors on other
    devices than the meta device they behave as before.

    Args:
        model_or_name: A live model (which stays as it is), a configuration, a mapping, a ``config.json``, a folder, or
            a Hub id.
        quantization: Backend of the base; the others are listed for comparison. ``"auto"`` takes the least lossy one
            that fits into ``memory`` and says why in the notes.
        peft_config: A ready configuration, instead of LoRA arguments.
        adapter: An adapter folder or registry reference to train on, instead of LoRA arguments. It must fit the model
            by `registry.check_contract`, as for `prepare_model`.
        batch_size: Examples per device.
        length: Tokens per example.
        gradient_checkpointing: Whether blocks are recomputed in the backward pass; both cases are listed.
        optim: Name of the optimizer, as in ``TrainingArguments``.
        strategy: How devices share the work: ``"single"``, ``"ddp"``, ``"zero2"``, ``"zero3"``, ``"fsdp"``; by default
            ``"single"`` for one device and ``"ddp"`` for more.
        devices: Number of devices.
        memory: Memory of one device, such as ``"24GiB"``; by default that of the current GPU, and for
            ``quantization="auto"`` without one the main memory that is available.
        task: What the model is for, such as ``"causal-lm"`` or ``"sequence-classification"``; by default what the
            configuration says.
        dtype: Dtype of the base's weights; by default the configuration's, else float32.
        device: Device of the run, on which backends' behavior depends; by default the GPU if there is one.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Whether code that comes with the model may run.
        compute_dtype: As in `prepare_model`.
        upcast: As in `prepare_model`.
        experts: As in `prepare_model`.
        strict: As in `prepare_model`.
        chunked_loss: As in `LoraCallback`; with ``"fsdp"`` and ZeRO the loss is not computed in chunks.
        serve: Servers that the adapter is for, such as ``"vllm"``, which the plan asks; by default all that are known.
        recipe: Name of fields that are known together, such as ``"bloomz-2023"``: what the recipe of that year trains,
            whatever the defaults are. Fields that are passed as well win.
        **lora: Any field of ``peft.LoraConfig``; defaults are ``r=8, lora_alpha=32, lora_dropout=0.05``.

    Returns:
        The plan; it prints as tables, and can be saved as JSON and drawn as a chart.

    Raises:
        PlanError: The model cannot be found or built, or an argument is invalid.
        AdapterMismatch: The adapter was trained on another base, or does not fit this one.
        TargetError: Targets match nothing, or cover the blocks unevenly.
        QuantizationError: The backend is unknown.
        UnknownServer: ``serve`` has a name that is not that of a server.
    """
    servers = None if serve is None else check_servers(serve)
    automatic = isinstance(quantization, str) and quantization == AUTO
    settings = LoraSettings.from_arguments(
        quantization=None if automatic else quantization,
        peft_config=peft_config,
        adapter=adapter,
        compute_dtype=compute_dtype,
        upcast=upcast,
        experts=experts,
        strict=strict,
        recipe=recipe,
        **lora,
    )
    if batch_size < 1 or length < 2:
        raise PlanError(f"batch_size={batch_size} and length={length} make no batch.")
    strategy = strategy or ("ddp" if devices > 1 else "single")
    limit = parse_memory(memory) if memory is not None else present_memory()
    limit = available_memory(devices) if automatic and limit is None else limit
    with _translate_errors(model_or_name):
        bench = _make_workbench(
            model_or_name, settings, _choose_device(device), task, dtype, revision, trust_remote_code
        )
        bench.chunked = chunked_loss and strategy in ("single", "ddp")
        # A base whose files are quantized brings its backend.
        wanted = bench.settings.quantization
        name = wanted.name if wanted is not None else ""
        chosen = Scenario(name, batch_size, length, gradient_checkpointing, optim, strategy, devices)
        return _Planner(bench, chosen, limit, automatic=automatic and not name, servers=servers).run()


@contextlib.contextmanager
def _translate_errors(source: Any) -> Iterator[None]:
    """Turn any error about a model built from a configuration, which may be invalid, into a `PlanError`."""
    try:
        yield
    except LoraPluginsError:
        raise
    except Exception as error:
        if isinstance(source, nn.Module):
            raise
        raise PlanError(
            f"The model of this configuration cannot be planned: {type(error).__name__}: {one_line(error)}"
        ) from error


def _choose_device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _make_workbench(
    source: Any,
    settings: Any,
    device: torch.device,
    task: str | None,
    dtype: str | torch.dtype | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Workbench:
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    stored, note = None, ""
    if settings.adapter is not None and not isinstance(source, PeftModel):
        folder = adapter_folder(settings.adapter)
        base = find_base(source, revision=revision, trust_remote_code=trust_remote_code)
        note = f"adapter and base are {check_base(folder, base, warn=False)}"
        stored = load_config(folder)
        task = task or (None if isinstance(source, nn.Module) else _TASKS.get(str(stored.task_type or "")))
    stored_notes: list[str] = []
    comes_quantized = False
    if isinstance(source, nn.Module):
        stored_notes = check_format(source, settings.allow_format)
    else:
        source = read_config(source, revision=revision, trust_remote_code=trust_remote_code)
        asked = settings.quantization
        settings, stored_notes = read_stored(source, settings)
        comes_quantized = settings.quantization is not asked
    model = meta_model(source, task=task, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    if isinstance(model, PeftModel):
        if settings.lora or settings.peft_config is not None or settings.adapter is not None:
            raise PlanError("The model has its adapters already: leave the LoRA arguments out, or pass the base model.")
        return Workbench(model, settings, None, device)

    targets = choose_targets(model, settings, stored)
    bench = Workbench(model, settings, targets, device, config=stored)
    bench.comes_quantized = comes_quantized
    bench.notes += [*([note] if note else []), *stored_notes]
    return bench


class _Planner:
    """Builds one plan."""

    def __init__(
        self,
        bench: Workbench,
        chosen: Scenario,
        limit: int | None,
        *,
        automatic: bool = False,
        servers: tuple[str, ...] | None = None,
    ) -> None:
        self.bench = bench
        self.servers = servers
        self.chosen = chosen
        self.limit = limit
        self.automatic = automatic
        self.notes: list[str] = []
        self.backends = {"": None, **self._list_backends()}
        self.gradients = sum(p.numel() * p.element_size() for p in bench.trained)

    def run(self) -> Plan:
        rows = self._make_rows()
        if self.automatic and not self.bench.arrived:
            self._choose(rows)
        bench, chosen = self.bench, self.chosen
        asked = next((row for row in rows if self._is_chosen(row)), None)
        if asked is None:
            raise PlanError("This model has no gradient checkpointing; leave gradient_checkpointing out.")
        count = bench.count()
        verdicts = judge(bench.traits(), self.servers)
        targets = bench.targets
        base: Any = base_of(bench.base)
        return Plan(
            model=type(base).__name__,
            model_type=str(getattr(getattr(base, "config", None), "model_type", "")),
            dtype=_find_main_dtype(base),
            trainable=count.trainable,
            total=count.total,
            adapter_bytes=bench.file_bytes(),
            targets=self._list_targets(),
            source=targets.source if targets else "the model's own adapters",
            bare=dict(targets.bare) if targets else {},
            coverage={kind: list(pair) for kind, pair in targets.coverage.items()} if targets else {},
            heads=list(bench.heads()),
            expert_share=bench.structure.expert_share(),
            batch_size=chosen.batch_size,
            length=chosen.length,
            optim=chosen.optim,
            strategy=chosen.strategy,
            devices=chosen.devices,
            memory_limit=self.limit,
            chosen=asked,
            rows=rows,
            advice=self._find_advice(asked),
            notes=[
                *bench.notes,
                *(targets.notes if targets else []),
                *self._write_precision_notes(),
                *self._write_expert_notes(),
                *(str(one) for one in verdicts if self.servers is not None and not one.served),
                *dict.fromkeys(self.notes),
            ],
            float_experts=self._find_float_experts(),
            serves_on=[f"{one.server} {one.version}" for one in verdicts if one.served],
        )

    def _choose(self, rows: list[Row]) -> None:
        """Set the backend of the requested run to the least lossy that fits."""
        alike = [row for row in rows if row.checkpointing == self.chosen.checkpointing]
        if alike and self.limit is not None:
            choice = choose_backend(alike, self.backends, self.limit)
            self.chosen = replace(self.chosen, quantization=choice.quantization)
            self.notes.append(choice.reason)

    def _find_float_experts(self) -> dict[str, str]:
        """Return the backends that leave stacked experts in float, with the reason."""
        reasons = {name: self.bench.leaves_experts(one) for name, one in self.backends.items() if one is not None}
        return {name: reason for name, reason in reasons.items() if reason}

    def _write_expert_notes(self) -> list[str]:
        """State what is assumed of the experts that a batch reaches, and why a backend leaves them in float."""
        structure = self.bench.structure
        if not (structure.expert_parameters or structure.flat_experts):
            return []
        asked = self._find_float_experts().get(self.chosen.quantization, "")
        packed = list_planned(self.bench.whole(self.backends[self.chosen.quantization]))
        refused = self.chosen.strategy if packed and self.chosen.strategy in _REFUSE_EXPERTS else ""
        return [
            "activations assume that a batch reaches every routed expert, each with equally many tokens",
            *([f"stacked experts stay in float: {asked}"] if asked else []),
            *(
                [f"{refused} cannot train over experts that are stored quantized, first {packed[0][0]}"]
                if refused
                else []
            ),
        ]

    def _write_precision_notes(self) -> list[str]:
        """Return a note if the device makes weights count in another dtype than the checkpoint's."""
        stored = _find_main_dtype(base_of(self.bench.base))
        held = [self.bench.compute_dtype(quantization) for quantization in self.backends.values() if quantization]
        if stored not in ("float16", "bfloat16") or torch.float32 not in held or not self.bench.by_hardware:
            return []
        return [
            f"embeddings, norms and head of a quantized base are counted in float32: this CPU is slow at {stored}. "
            "For a run elsewhere give the device, such as 'cuda'"
        ]

    def _make_rows(self) -> list[Row]:
        rows = [self._make_row(name, checkpointing) for name in self.backends for checkpointing in (False, True)]
        return [row for row in rows if row is not None]

    def _is_chosen(self, row: Row) -> bool:
        wanted = (self.chosen.quantization, self.chosen.checkpointing)
        if self.bench.arrived:
            # A base that arrived quantized is trained as it is.
            return row.checkpointing == self.chosen.checkpointing
        return (row.quantization, row.checkpointing) == wanted

    def _list_backends(self) -> dict[str, Quantization]:
        """Return every backend by name, those with more bits first; the requested one has its options."""
        asked = self.bench.settings.quantization
        found = {asked.name: asked} if asked is not None else {}
        if self.bench.arrived or self.bench.comes_quantized:
            # Its layers cannot be quantized again.
            return found
        for quantizer in (one for one in plugin_host().quantizers() if one.offered):
            found.setdefault(quantizer.name, Quantization(quantizer, self._read_common_options()))
        return dict(sorted(found.items(), key=lambda item: (-item[1].quantizer.bits, -item[1].quantizer.priority)))

    def _read_common_options(self) -> dict[str, Any]:
        asked = self.bench.settings.quantization
        return {"skip_modules": asked.options.get("skip_modules", []) if asked is not None else []}

    def _make_row(self, name: str, checkpointing: bool) -> Row | None:
        scenario = self._make_scenario(name, checkpointing)
        memory = self._measure_memory(scenario)
        if memory is None:
            return None
        quantization = self.backends[name]
        return Row(
            name,
            checkpointing,
            memory,
            self.bench.quantized_share(quantization),
            fits(memory, self.limit),
            self._explain_unavailable(quantization),
        )

    def _make_scenario(self, name: str, checkpointing: bool) -> Scenario:
        now = self.chosen
        return Scenario(name, now.batch_size, now.length, checkpointing, now.optim, now.strategy, now.devices)

    def _explain_unavailable(self, quantization: Quantization | None) -> str:
        if quantization is None:
            return ""
        return why_unavailable(quantization, self.bench.device, torch.bfloat16) or ""

    def _measure_memory(self, scenario: Scenario, activations: int | None = None) -> Memory | None:
        """Return the bytes on each device, ``None`` if the model does not support checkpointing."""
        quantization = self.backends[scenario.quantization]
        if activations is None:
            estimate = self.bench.activations(
                quantization, scenario.batch_size, scenario.length, scenario.checkpointing
            )
            if estimate is None:
                return None
            if estimate.note:
                self.notes.append(estimate.note)
            activations = estimate.size
        weights = self.bench.weight_bytes(quantization)
        optimizer = optimizer_bytes(scenario.optim, self.bench.trained)
        alone = Memory(weights, self.gradients, optimizer, activations)
        parts = self.bench.parts(quantization, alone, scenario.optim, scenario.strategy)
        return per_device(parts, scenario.strategy, scenario.devices)

    # -- advice --------------------------------------------------------------------------------

    def _find_advice(self, asked: Row) -> str:
        if self.limit is None or asked.fits:
            return ""
        usable = [name for name in self.backends if name and not self._explain_unavailable(self.backends[name])]
        return nearest_change(self.chosen, usable, self._measure_size, USABLE * self.limit)

    def _measure_size(self, scenario: Scenario) -> int | None:
        """Return the bytes on each device: scaled from the simulated step, and simulated itself where that fits."""
        base = self._measure_memory(self._make_scenario(scenario.quantization, scenario.checkpointing))
        if base is None:
            return None
        tokens = scenario.batch_size * scenario.length / (self.chosen.batch_size * self.chosen.length)
        rough = self._measure_memory(scenario, round(base.activations * tokens))
        if rough is None or not fits(rough, self.limit):
            return rough.total if rough else None
        exact = self._measure_memory(scenario)
        return exact.total if exact else None

    # -- the hit table -------------------------------------------------------------------------

    def _list_targets(self) -> list[TargetRow]:
        if self.bench.targets is None:
            return list_adapters(self.bench.base)
        return list_hits(self.bench.targets.hits)


def _find_main_dtype(model: Any) -> str:
    """Return the dtype of most of a model's float weights."""
    sizes: dict[str, int] = {}
    for parameter in _iterate_floats(model):
        name = dtype_name(parameter.dtype)
        sizes[name] = sizes.get(name, 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name], default="")


def _iterate_floats(model: Any) -> Iterator[Any]:
    return (p for p in model.parameters() if p.is_floating_point())
