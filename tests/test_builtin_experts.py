"""Every type with experts: quantized, adapted, saved and merged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from versions import needs

from lora_plugins import dequantize_model, plan, prepare_model
from lora_plugins.adapters.report import make_report
from lora_plugins.errors import PreparationError, UnmatchedTargets
from lora_plugins.models.experts import list_expert_stacks
from lora_plugins.quantization.request import parse_quantization
from lora_plugins.quantization.stacks import QuantizedStack

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import architecture_coverage  # noqa: E402
import small_models  # noqa: E402
from small_models import (  # noqa: E402
    EXPERTS_AS_LAYERS,
    EXPERTS_IN_FLOAT,
    EXPERTS_NOT_ADAPTED,
    NOT_TRAINED,
    Case,
)

CASES = small_models.first_cases()

#: What the report says of the types whose stacks stay in float.
SAID = {
    "jetmoe": "stay in float: never touched in this architecture",
    "inkling_text": "InklingSharedExperts computes its experts in a way of its own",
    "inkling_mm_model": "InklingSharedExperts computes its experts in a way of its own",
}

#: The types that hold stacked experts, by the committed table.
COMMITTED = json.loads(architecture_coverage.SNAPSHOT.read_text(encoding="utf-8"))
TYPES = sorted(
    {name for entry in COMMITTED["tasks"].values() for name in entry["experts"]} - set(NOT_TRAINED) - {"dbrx"}
)
of_the_table = pytest.mark.skipif(
    transformers.__version__ != COMMITTED["transformers"],
    reason=f"the table of types is of transformers {COMMITTED['transformers']}",
)


def fresh(case: Case) -> Any:
    return small_models.build(case, "cpu", small_only=True).eval()


def output(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    value: torch.Tensor = small_models.objective(model(**batch))
    return value


def check_type(case: Case, backend: str, folder: Path) -> float:
    """Go through the whole life of an adapter; return the share of the experts' bytes that was quantized."""
    base = fresh(case)
    batch = small_models.inputs(base)
    model: Any = prepare_model(base, quantization=backend, experts="routed", r=2, lora_dropout=0.0)
    share = measure_share(model)
    if share < 1:
        assert SAID[case.model_type] in " ".join(make_report(model).notes)
    train(model, batch)
    check_files(case, model, backend, batch, folder)
    return share


def measure_share(model: Any) -> float:
    """The share of the weights in stacked experts that is quantized."""
    stacks = [stack for *_, stack in list_expert_stacks(model)]
    return sum(s.numel() for s in stacks if isinstance(s, QuantizedStack)) / sum(s.numel() for s in stacks)


def train(model: Any, batch: dict[str, Any]) -> None:
    """Two steps; the first must reach B of an adapter on the experts, the second A."""
    for step in range(2):
        output(model, batch).backward()
        part = "lora_A" if step else "lora_B"
        routed = [p for name, p in model.named_parameters() if "expert" in name and part in name]
        assert routed, "no adapter on the experts"
        assert any(p.grad is not None and p.grad.any() for p in routed), f"no {part} of an expert gets a gradient"
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.zero_grad()


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


@needs("transformers", "5.23", "its router of DBRX takes only experts whose inner size is the hidden size")
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
    assert [name for name in (*EXPERTS_IN_FLOAT, *EXPERTS_NOT_ADAPTED) if f"`{name}`" not in listed] == []


def test_the_table_of_types_says_for_each_whether_its_experts_are_quantized_and_adapted() -> None:
    page = architecture_coverage.PAGE.read_text(encoding="utf-8").partition("## Experts")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    found = {name: row[:2] for row in rows for name in row[3].split(", ")}
    assert set(TYPES) <= set(found)
    expected = {"mixtral": ["yes", "yes"], "jetmoe": ["no", "yes"], "mistral_large4": ["yes", "refused by name"]}
    assert {name: found[name] for name in expected} == expected
    assert {*EXPERTS_IN_FLOAT, *EXPERTS_NOT_ADAPTED, *EXPERTS_AS_LAYERS} <= set(found)


@of_the_table
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["int8", "nf4"])
@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in EXPERTS_NOT_ADAPTED])
def test_experts_of_every_type_are_quantized_and_adapted(model_type: str, backend: str, tmp_path: Path) -> None:
    share = check_type(CASES[model_type], backend, tmp_path)
    print(f"{model_type} {backend}: {share:.0%} of the experts' bytes quantized")
    assert share == 1 or model_type in EXPERTS_IN_FLOAT


@of_the_table
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["int8", "nf4"])
@pytest.mark.parametrize("model_type", [name for name in TYPES if name in EXPERTS_NOT_ADAPTED])
def test_experts_that_cannot_be_adapted_are_quantized_and_refused_by_name(model_type: str, backend: str) -> None:
    assert measure_share(prepare_model(fresh(CASES[model_type]), quantization=backend, experts="none", r=2)) == 1
    with pytest.raises(PreparationError, match="PEFT"):
        prepare_model(fresh(CASES[model_type]), quantization=backend, experts="routed", r=2)


@of_the_table
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["int8", "nf4"])
@pytest.mark.parametrize("model_type", sorted(EXPERTS_AS_LAYERS))
def test_experts_that_are_layers_are_quantized_and_adapted_as_such(
    model_type: str, backend: str, tmp_path: Path
) -> None:
    base = fresh(CASES[model_type])
    batch = small_models.inputs(base)
    model: Any = prepare_model(base, quantization=backend, experts="routed", r=2, lora_dropout=0.0)
    quantizer = parse_quantization(backend).quantizer  # type: ignore[union-attr]
    layers = {path: module for path, module in model.named_modules() if ".experts." in path and is_layer(path, module)}
    assert layers
    left = [path for path, module in layers.items() if not quantizer.owns(module)]
    listed = backend == "nf4" and "4 bits" in EXPERTS_AS_LAYERS[model_type]
    assert left == ([path for path in layers if path.endswith(".wo.base_layer")] if listed else [])
    notes = " ".join(make_report(model).notes)
    assert ("casts its input to the dtype of its weight, which is uint8" in notes) == listed
    train(model, batch)
    check_files(CASES[model_type], model, backend, batch, tmp_path)


def is_layer(path: str, module: Any) -> bool:
    """Whether a module is a linear layer of the base, quantized or not."""
    return isinstance(module, torch.nn.Linear) and "lora_" not in path
