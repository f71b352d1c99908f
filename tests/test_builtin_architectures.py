"""Every architecture: what its default reaches, and that it trains, saves and reloads, on small random models."""

# ruff: noqa: SIM905 - names separated by white space stay readable

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from versions import needs

from lora_plugins import prepare_model
from lora_plugins.adapters.prepare import preparation_of
from lora_plugins.errors import TargetError
from lora_plugins.plugins.host import PluginHost
from lora_plugins.trainer.liveness import MovementWatch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import architecture_coverage  # noqa: E402
import small_models  # noqa: E402
from small_models import NOT_MERGED, NOT_PUBLISHED, NOT_TRAINED, Case  # noqa: E402

#: One or more types of every family of names.
SPREAD = """
llama mistral gemma3_text qwen3 phi phi3 bloom falcon gpt2 gpt_neo gpt_neox gptj codegen mpt opt ctrl xlnet glm4 mixtral
qwen2_moe qwen3_moe gpt_oss phimoe jetmoe deepseek_v3 qwen3_next qwen3_5_text minimax lfm2 recurrent_gemma mamba mamba2
jamba bamba zamba2 nemotron_h bert albert deberta deberta-v2 distilbert modernbert funnel fnet canine bart led t5 longt5
switch_transformers nllb-moe encoder-decoder llava qwen2_vl gemma3 paligemma vision-encoder-decoder vit swinv2 convnext
reformer poolformer regnet hgnet_v2 whisper speecht5
""".split()


#: Types that older releases of transformers cannot compute.
NEWER = {
    "encoder-decoder": needs("transformers", "5.23", "it cannot build the configuration of a small one"),
    "qwen2_vl": needs("transformers", "5.23", "it cannot build the configuration of a small one"),
    "vision-encoder-decoder": needs("transformers", "5.23", "it cannot build the configuration of a small one"),
    "vit": needs("transformers", "5.23", "its modules have other names, and the structure is read instead"),
    "zamba2": needs("transformers", "5.23", "it chooses the wrong one of a shared block's adapters"),
}

CASES = small_models.first_cases()
REST = [name for name in CASES if name not in SPREAD and name not in NOT_TRAINED]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster so, and other runs on the machine are not slowed down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh(case: Case) -> Any:
    """A small model with the same random weights each time, whose normalisation has no memory of batches."""
    model = small_models.build(case, "cpu", small_only=True)
    small_models.measure_statistics(model)
    small_models.settle(model, case.model_type)
    return model


def dead(model: Any, batch: dict[str, Any], part: str, unreached: tuple[str, ...]) -> list[str]:
    """Run forward and backward; names of the LoRA tensors that got no gradient."""
    model.zero_grad()
    small_models.objective(model(**batch)).backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if part in name
        and not set(unreached) & set(name.split("."))
        and (parameter.grad is None or not parameter.grad.any())
    ]


def train_and_reload(case: Case, folder: Path) -> None:
    """Adapters at the default: gradients everywhere, and the same output after saving and loading."""
    base = fresh(case)
    batch = small_models.inputs(base)
    model: Any = prepare_model(base, r=2, lora_dropout=0.0)
    record = preparation_of(model)
    assert record is not None
    assert record.plan is not None
    assert "registered" in record.plan.source, record.plan.source
    modes = {name: module.training for name, module in model.named_modules()}
    assert dead(model, batch, "lora_B", record.plan.unreached) == []
    # A step of the same size for every model, however steep its loss is.
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    assert dead(model, batch, "lora_A", record.plan.unreached) == []
    model.save_pretrained(folder)
    # Trainable as the first one: torch multiplies by a frozen matrix in another order.
    again: Any = PeftModel.from_pretrained(fresh(case), folder, is_trainable=True)
    for name, module in again.named_modules():
        module.training = modes.get(name, module.training)
    with torch.no_grad():
        torch.manual_seed(0)
        trained = small_models.objective(model(**batch))
        torch.manual_seed(0)
        loaded = small_models.objective(again(**batch))
        with model.disable_adapter():
            torch.manual_seed(0)
            plain = small_models.objective(model(**batch))
    assert torch.equal(trained, loaded)
    assert not torch.equal(trained, plain), "the adapter changes nothing"


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=NEWER.get(name, ())) for name in SPREAD])
def test_default_trains_and_reloads(model_type: str, tmp_path: Path) -> None:
    train_and_reload(CASES[model_type], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REST)
def test_every_default_trains_and_reloads(model_type: str, tmp_path: Path) -> None:
    train_and_reload(CASES[model_type], tmp_path)


def test_all_of_longformer_is_reached_where_every_word_is_read() -> None:
    base = fresh(Case("token classification", "longformer", "LongformerForTokenClassification"))
    batch = small_models.inputs(base)
    model = prepare_model(base, r=2, lora_dropout=0.0)
    assert len([name for name, _ in model.named_parameters() if "_global.lora_B" in name]) == 8
    assert dead(model, batch, "lora_B", ()) == []


@pytest.mark.parametrize("model_type", ["longformer", "pi0"])
def test_liveness_knows_what_no_batch_reaches(model_type: str) -> None:
    """A head on the first word, or actions that read keys and values, leave out some queries of the last layer."""
    base = fresh(CASES[model_type])
    batch = small_models.inputs(base)
    model = prepare_model(base, r=2, lora_dropout=0.0)
    record = preparation_of(model)
    assert record is not None
    assert record.plan is not None
    assert dead(model, batch, "lora_B", ()) != []
    watch = MovementWatch.over(model, record.plan.unreached)
    watch.before_step(0.1)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    watch.after_step(skipped=False)
    assert watch.counted == 1


#: Release of transformers that the table was made with. An older one lacks types, a newer one has more.
COMMITTED = json.loads(architecture_coverage.SNAPSHOT.read_text(encoding="utf-8"))["transformers"]
of_the_table = pytest.mark.skipif(
    transformers.__version__ != COMMITTED, reason=f"the table of types is of transformers {COMMITTED}"
)


def test_table_is_of_the_release_that_is_tested() -> None:
    """So that the tests of the table are skipped with other releases alone."""
    assert f"transformers=={COMMITTED}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()


@of_the_table
def test_lists_name_types_that_exist() -> None:
    assert set(SPREAD) <= set(CASES)
    assert set(NOT_TRAINED) <= set(CASES)
    assert not set(SPREAD) & set(NOT_TRAINED)


# -- coverage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin_host() -> PluginHost:
    return PluginHost(block=[info.distribution for info in PluginHost().plugins if not info.builtin])


@pytest.fixture(scope="module")
def snapshot() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(architecture_coverage.SNAPSHOT.read_text(encoding="utf-8"))
    return loaded


@of_the_table
def test_spread_is_covered_as_committed(builtin_host: PluginHost, snapshot: dict[str, Any]) -> None:
    coverage = architecture_coverage.measure(builtin_host, only=SPREAD)
    for task, entry in coverage.items():
        committed = [name for name in snapshot["tasks"][task]["resolved"] if name in SPREAD]
        assert sorted(entry.resolved) == sorted(committed), entry.unresolved


def test_lost_type_fails_the_check(builtin_host: PluginHost, snapshot: dict[str, Any]) -> None:
    coverage = architecture_coverage.measure(builtin_host, only=["llama", "phi3"])
    before = copy.deepcopy(snapshot)
    for task, entry in before["tasks"].items():
        entry["resolved"] = list(coverage[task].resolved)
        entry |= {part: list(getattr(coverage[task], part)) for part in ("trained", "published", "merged", "experts")}
    assert architecture_coverage.losses(coverage, before) == []
    coverage["causal LM"].resolved.remove("phi3")
    coverage["causal LM"].unresolved["phi3"] = "no reason"
    assert architecture_coverage.losses(coverage, before) == ["causal LM: phi3: no reason"]
    before["tasks"]["causal LM"]["experts"].append("llama")
    assert "causal LM: llama: no experts" in architecture_coverage.losses(coverage, before)


def test_type_that_is_not_trained_any_more_fails_the_check(
    builtin_host: PluginHost, snapshot: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(snapshot)
    for entry in before["tasks"].values():
        for part in ("resolved", "trained", "published", "merged"):
            entry[part] = [name for name in entry[part] if name == "phi3"]
    for reasons, part in (("NOT_MERGED", "merged"), ("NOT_PUBLISHED", "published"), ("NOT_TRAINED", "trained")):
        monkeypatch.setitem(getattr(small_models, reasons), "phi3", f"never {part}")
        lost = architecture_coverage.losses(architecture_coverage.measure(builtin_host, only=["phi3"]), before)
        assert f"causal LM: phi3: not {part}: never {part}" in lost


@of_the_table
def test_types_are_trained_as_committed(snapshot: dict[str, Any]) -> None:
    """What the tests train is what the table says; a type leaves the table only when the snapshot is renewed."""
    trained = {name for entry in snapshot["tasks"].values() for name in entry["trained"]}
    assert trained == {*SPREAD, *REST}
    reasons = {name: why for entry in snapshot["tasks"].values() for name, why in entry["untrained"].items()}
    assert reasons == NOT_TRAINED
    published = {name for entry in snapshot["tasks"].values() for name in entry["published"]}
    assert published == {*SPREAD, *REST} - set(NOT_PUBLISHED)
    reasons = {name: why for entry in snapshot["tasks"].values() for name, why in entry["unpublished"].items()}
    assert reasons == NOT_PUBLISHED
    merged = {name for entry in snapshot["tasks"].values() for name in entry["merged"]}
    assert merged == {*SPREAD, *REST} - set(NOT_MERGED)
    reasons = {name: why for entry in snapshot["tasks"].values() for name, why in entry["unmerged"].items()}
    assert reasons == NOT_MERGED


def test_model_without_record_is_not_resolved() -> None:
    bare = PluginHost(block=["architectures"])
    model = small_models.build(CASES["llama"])
    assert "not registered" in (architecture_coverage.shortcoming(model, bare) or "")


def test_peft_figures_are_those_of_its_own_table(snapshot: dict[str, Any]) -> None:
    figures = {task: len(entry["peft"]) for task, entry in snapshot["tasks"].items()}
    assert figures["causal LM"] == 29
    assert figures["seq2seq LM"] == 3
    assert all(len(entry["resolved"]) > figures[task] for task, entry in snapshot["tasks"].items())


@pytest.mark.slow
def test_no_figure_drops() -> None:
    assert architecture_coverage.main(["--check"]) == 0


def test_records_load_without_torch() -> None:
    code = (
        "import lora_plugins.builtin.architectures as a, sys; a.register_architectures(); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_records_name_each_type_once(builtin_host: PluginHost) -> None:
    info = next(info for info in builtin_host.plugins if info.name == "architectures")
    assert info.disabled is None
    assert len(info.architectures) > 400


def test_layers_whose_weights_are_read_without_a_call_get_no_adapter() -> None:
    """WavLM's attention hands its weights to a function of torch: an adapter there is never computed."""
    model = fresh(Case("", "wavlm", "WavLMForCTC"))
    batch = small_models.inputs(model)
    adapted = prepare_model(model, r=2, lora_dropout=0.0)
    assert dead(adapted, batch, "lora_B", ()) == []
    with pytest.raises(TargetError, match="q_proj"):
        prepare_model(fresh(Case("", "wavlm", "WavLMForCTC")), target_modules=["q_proj", "v_proj"])
