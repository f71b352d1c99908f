"""Every type with experts: quantized, adapted, saved and merged."""

# ruff: noqa: SIM905 - names separated by white space stay readable

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_plugins import dequantize_model, plan, prepare_model
from lora_plugins.adapters.report import make_report
from lora_plugins.errors import UnmatchedTargets
from lora_plugins.models.experts import list_expert_stacks
from lora_plugins.quantization.stacks import QuantizedStack

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import small_models  # noqa: E402
from small_models import NOT_TRAINED, Case  # noqa: E402

CASES = small_models.first_cases()

#: Types whose experts are linear layers, which every backend quantizes as such.
AS_LAYERS = "switch_transformers nllb-moe".split()

#: Types whose stacks stay in float, with what the report says of it.
IN_FLOAT = {
    "jetmoe": "stay in float: never touched in this architecture",
    "inkling_text": "InklingSharedExperts computes its experts in a way of its own",
    "inkling_mm_model": "InklingSharedExperts computes its experts in a way of its own",
}


#: Types that do not go through the whole check yet, and what is known of it.
LISTED = {
    "mistral_large4": "PEFT renames the adapter's tensors, which is refused by name",
}


def fresh(case: Case) -> Any:
    return small_models.build(case, "cpu", small_only=True).eval()


def find_types() -> list[str]:
    """The types that hold stacked experts."""
    found = []
    for name, case in CASES.items():
        try:
            model = small_models.build(case, "meta", small_only=True)
        except small_models.CannotBuild:
            continue
        if next(list_expert_stacks(model), None) is not None and name not in NOT_TRAINED:
            found.append(name)
    return found


def output(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    value: torch.Tensor = small_models.objective(model(**batch))
    return value


def check_type(case: Case, backend: str, folder: Path) -> float:
    """Go through the whole life of an adapter; return the share of the experts' bytes that was quantized."""
    base = fresh(case)
    batch = small_models.inputs(base)
    model: Any = prepare_model(base, quantization=backend, experts="routed", r=2, lora_dropout=0.0)
    stacks = [stack for *_, stack in list_expert_stacks(model)]
    share = sum(s.numel() for s in stacks if isinstance(s, QuantizedStack)) / sum(s.numel() for s in stacks)
    if share < 1:
        assert IN_FLOAT[case.model_type] in " ".join(make_report(model).notes)
    for step in range(2):
        output(model, batch).backward()
        part = "lora_A" if step else "lora_B"
        routed = [p for name, p in model.named_parameters() if "expert" in name and part in name]
        assert routed, "no adapter on the experts"
        assert any(p.grad is not None and p.grad.any() for p in routed), f"no {part} of an expert gets a gradient"
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.zero_grad()
    check_files(case, model, backend, batch, folder)
    return share


def check_files(case: Case, model: Any, backend: str, batch: dict[str, Any], folder: Path) -> None:
    """Save; reload by plain PEFT onto a float base and by us onto a quantized one; merge into float."""
    model.save_pretrained(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    plain: Any = PeftModel.from_pretrained(fresh(case), folder, is_trainable=True)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert len(trained) == len(saved)
    assert all(any(torch.equal(p, value) for value in saved.values()) for p in trained.values()), "PEFT lost a tensor"
    again: Any = prepare_model(fresh(case), quantization=backend, adapter=folder)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in again.named_modules():
        module.training = modes.get(name, module.training)
    with torch.no_grad():
        expected = output(model, batch)
        assert torch.isfinite(output(plain, batch))
        assert torch.equal(output(again, batch), expected)
        dequantize_model(model)
        merged = output(model.merge_and_unload(), batch)
    assert torch.allclose(merged, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
def test_experts_of_a_type_are_quantized_and_adapted(model_type: str, tmp_path: Path) -> None:
    assert check_type(CASES[model_type], "nf4", tmp_path) == 1


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_experts_that_are_rows_of_one_matrix_stay_in_float_and_that_is_said(backend: str) -> None:
    """DBRX's: report and plan give the reason, a request for adapters on them is refused by it, and the rest trains."""
    case, reason = CASES["dbrx"], "stay in float: its experts are rows of one matrix"
    expected = plan(fresh(case), quantization=backend)
    assert reason in " ".join(expected.notes)
    with pytest.raises(UnmatchedTargets, match=r"experts of DbrxForCausalLM are rows of one matrix \(transformer\."):
        prepare_model(fresh(case), experts="routed")
    base = fresh(case)
    batch, model = small_models.inputs(base), prepare_model(base, quantization=backend, r=2)
    report = make_report(model)
    assert f"12 stacked expert weights {reason}" in " ".join(report.notes)
    assert report.quantized_share < 0.2
    output(model, batch).backward()
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_the_documentation_lists_the_types_that_are_not_wholly_quantized_or_adapted() -> None:
    rows = [line for line in (ROOT / "docs" / "quantization.md").read_text().splitlines() if line.startswith("| `")]
    listed = " ".join(row.split("|")[1] for row in rows)
    assert [name for name in (*IN_FLOAT, *LISTED, "dbrx") if f"`{name}`" not in listed] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_experts_of_every_type_are_quantized_and_adapted(backend: str, tmp_path: Path) -> None:
    """One table for all types, printed: the share of the experts' bytes, or what went wrong."""
    table = {}
    for name in find_types():
        folder = tmp_path / name
        try:
            table[name] = f"{check_type(CASES[name], backend, folder):.0%}"
        except Exception as error:
            table[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    for name, result in table.items():
        print(f"{name:28} {result}", flush=True)
    assert {name: result for name, result in table.items() if name not in LISTED and not holds(name, result)} == {}


def holds(name: str, result: str) -> bool:
    """Whether all experts were quantized, or all but those that are said to stay in float."""
    return result == "100%" or (name in IN_FLOAT and result.endswith("%"))
