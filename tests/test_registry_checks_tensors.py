"""What each check of an adapter's tensors finds, by itself: what it names, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry.checks import tensors as module
from registry.checks.adapter_files import AdapterFiles
from registry.checks.tensors import CHECKS, LARGE, describe_large
from registry.formats.adapter_config import AdapterConfig
from registry.formats.records import TensorRecord
from registry.formats.weights import Header, Values

PRE = "base_model.model."
Q, V = f"{PRE}model.layers.0.self_attn.q_proj", f"{PRE}model.layers.0.self_attn.v_proj"
EMBED, HEAD = f"{PRE}model.embed_tokens.weight", f"{PRE}lm_head.weight"
Shapes = dict[str, tuple[int, ...]]


def lora(module: str, first: tuple[int, ...] = (2, 8), second: tuple[int, ...] = (8, 2)) -> Shapes:
    return {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second}


def find(
    name: str, shapes: Shapes, *, dtype: str = "F32", zeros: Any = (), problems: Any = None, **fields: Any
) -> list[str]:
    return [finding.message for finding in examine(name, shapes, dtype, zeros, problems, **fields)]


def examine(
    name: str, shapes: Shapes, dtype: str = "F32", zeros: Any = (), problems: Any = None, **fields: Any
) -> list[Any]:
    [check] = [each for each in CHECKS if each.name == name]
    options = {key: fields.pop(key) for key in ("allow", "base") if key in fields}
    config = AdapterConfig({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **fields})
    records = {tensor: TensorRecord(dtype, shape) for tensor, shape in shapes.items()}
    known = {"config": config, "header": Header(records, {}, {}), "values": Values(frozenset(zeros), problems or {})}
    return check.examine(AdapterFiles(Path(), given=known, **options))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    [check] = [each for each in CHECKS if each.name == "weights"]
    assert [finding.message for finding in check.examine(AdapterFiles(tmp_path))] != []
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 20)
    [told] = check.examine(AdapterFiles(tmp_path))
    assert "adapter_model.safetensors is not a safetensors file" in told.message
    assert examine("weights", lora(Q)) == []


def test_tensors_without_values_are_told() -> None:
    assert find("empty-tensors", lora(Q)) == []
    [told] = find("empty-tensors", {**lora(Q, (2, 0)), **lora(V, (0,), (8, 2))})
    assert told.startswith(f"2 tensors have no values, first {Q}.lora_A.weight of shape (2, 0)")


def test_base_weights_are_told_and_left_out_by_fix() -> None:
    norm = f"{PRE}model.norm.weight"
    assert examine("base-weights", {**lora(Q), EMBED: (96, 8)}) == []
    [found] = examine("base-weights", {**lora(Q), norm: (8,), EMBED: (96, 8)})
    assert found.message.startswith(f"1 tensors, first {norm}, are weights of the base model")
    assert found.changes.drop == (norm,)
    assert examine("base-weights", {**lora(Q), norm: (8,)}, modules_to_save=["norm"]) == []


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (lora(Q), []),
        ({f"{Q}.lora_A.weight": (2, 8)}, ["has a LoRA A and no B"]),
        ({f"{Q}.lora_B.weight": (8, 2)}, ["has a LoRA B and no A"]),
        ({**lora(Q), f"{V}.lora_B.weight": (8, 2)}, ["has a LoRA B and no A"]),
    ],
)
def test_half_a_module_is_told(shapes: Shapes, told: list[str]) -> None:
    assert [says.split(" ", 1)[1].partition(":")[0] for says in find("half-module", shapes)] == told
    assert find("double-module", shapes) == find("shape", shapes) == find("uneven-rank", shapes) == []


def test_two_matrices_for_one_are_told() -> None:
    assert find("double-module", lora(Q)) == []
    assert find("double-module", {**lora(Q), f"{Q}.lora_magnitude_vector.weight": (8,)}) == []
    embedding = f"{PRE}model.embed_tokens"
    pair = {f"{embedding}.lora_embedding_A": (2, 96), f"{embedding}.lora_embedding_B": (8, 2)}
    assert find("double-module", pair) == []
    for more in ({f"{Q}.lora_A": (2, 8)}, {f"{Q}.lora_embedding_B": (8, 2)}):
        [told] = find("double-module", {**lora(Q), **more})
        assert f"more than one LoRA A or B: {Q}.lora_A.weight, {Q}.lora_B.weight, {next(iter(more))}" in told
    for mixed in (("embedding_A", "B.weight"), ("A.weight", "embedding_B")):
        assert len(find("double-module", {f"{Q}.lora_{mixed[0]}": (2, 8), f"{Q}.lora_{mixed[1]}": (8, 2)})) == 1


@pytest.mark.parametrize(
    ("first", "second", "sound"),
    [
        ((2, 8), (8, 2), True),
        ((2, 3, 3, 3), (8, 2, 1, 1), True),
        ((2,), (2,), False),
        ((16,), (8, 2), False),
        ((2, 8, 1), (8, 2), False),
        ((4, 8, 1), (8, 2), False),
        ((0, 8), (8, 2), False),
        ((2, 8), (8, 0), False),
    ],
)
def test_shapes_that_are_no_pair_are_told_once(first: tuple[int, ...], second: tuple[int, ...], sound: bool) -> None:
    shapes = lora(Q, first, second)
    told = find("shape", shapes)
    assert told == [] if sound else told[0].startswith(f"{Q} has a LoRA A of shape {first} and B of shape {second}.")
    assert find("uneven-rank", shapes) == find("other-rank", shapes) == []  # shapes that are no pair have no rank


def test_ranks_that_do_not_fit_each_other_are_told() -> None:
    assert find("uneven-rank", lora(Q)) == []
    assert find("uneven-rank", lora(Q, (2, 8), (8, 4))) == [f"{Q} has a LoRA A of rank 2 and a B of rank 4"]
    blocks = lora(Q, (8, 8), (8, 2))  # of a block-diagonal B, whose four blocks stand on top of each other
    assert find("uneven-rank", blocks, use_bdlora={"nblocks": 4}) == []
    assert find("uneven-rank", lora(Q), use_bdlora={"nblocks": 4}) == []
    assert len(find("uneven-rank", blocks, use_bdlora={"nblocks": 2})) == len(find("uneven-rank", blocks)) == 1


def test_ranks_that_the_configuration_does_not_have_are_told() -> None:
    four = lora(Q, (4, 8), (8, 4))
    assert find("other-rank", lora(Q)) == find("other-rank", four, rank_pattern={"q_proj": 4}) == []
    [told] = find("other-rank", four, rank_pattern={"v_proj": 16})
    assert told.startswith(f"{Q} has rank 4, and adapter_config.json says 2, 16: ")
    # Experts stack their ranks.
    assert find("other-rank", four, target_parameters=["mlp.up"]) == []
    assert len(find("other-rank", lora(Q, (5, 8), (8, 5)), target_parameters=["mlp.up"])) == 1
    assert len(find("other-rank", four, target_parameters=[])) == 1


def test_dtypes_and_values_that_are_none_are_told() -> None:
    assert find("dtype", lora(Q)) == find("dtype", lora(Q), dtype="F64") == find("not-finite", lora(Q)) == []
    told = find("dtype", lora(Q), dtype="I8")
    assert [says.partition(".")[0] for says in told] == ["base_model", "base_model"]
    assert "has dtype I8" in told[0]
    assert find("not-finite", lora(Q), problems={"a": "a holds NaN", "b": "b too"}) == ["a holds NaN", "b too"]


def test_modules_of_zeros_are_told() -> None:
    both = {**lora(Q), **lora(V)}
    half = {f"{Q}.lora_B.weight"}
    assert find("zero-modules", both) == find("untrained", both) == []
    [told] = find("zero-modules", both, zeros=half)
    assert told == f"1 of 2 LoRA modules are zero (A or B), first {Q}: they change nothing"
    assert find("untrained", both, zeros=half) == []
    for zeros in ({f"{Q}.lora_B.weight", f"{V}.lora_A.weight"}, set(both)):
        assert find("zero-modules", both, zeros=zeros) == []
        [told] = find("untrained", both, zeros=zeros)
        assert told.startswith("All 2 LoRA modules are zero")
    headed = {**lora(Q), HEAD: (96, 8)}
    assert find("untrained", headed, zeros=half) == []
    assert len(find("untrained", headed, zeros={*half, HEAD})) == 1


def test_double_precision_is_told_and_converted_by_fix() -> None:
    assert examine("double-precision", lora(Q)) == []
    [found] = examine("double-precision", lora(Q), "F64")
    assert found.message.startswith(f"2 tensors, first {Q}.lora_A.weight, have dtype F64")
    assert found.changes.single == tuple(lora(Q))


# -- tensors that are not LoRA's -----------------------------------------------------------------------------------


def test_large_tensors_are_told_unless_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 96 * 8 * 2)
    shapes = {**lora(Q), HEAD: (96, 8)}
    assert find("large-tensors", shapes, dtype="BF16") == []
    [told] = find("large-tensors", shapes)
    assert f"tensors that are not LoRA's: {HEAD} (0.0 MB)" in told
    assert "allow=['lm_head']" in told
    assert find("large-tensors", shapes, allow=["lm_head"]) == []
    assert len(find("large-tensors", shapes, allow=["head"])) == 1


def test_the_largest_five_are_named() -> None:
    assert describe_large({}, (), 0) is None
    assert describe_large({"a.weight": LARGE}, (), LARGE) is None
    assert describe_large({"a.weight": LARGE + 1}, ("a",), LARGE) is None
    sizes = {f"m.part{number}.weight": number * 10_000_000 for number in range(8)}
    told = str(describe_large(sizes, ["m.part7"], 300_000_000))
    assert told.startswith("210.0 of 300.0 MB are tensors that are not LoRA's: m.part6.weight (60.0 MB), m.part5")
    assert "allow=['part2', 'part3', 'part4', 'part5', 'part6']" in told


@pytest.mark.parametrize(
    ("shapes", "fields", "told"),
    [
        ({EMBED: (96, 8)}, {}, True),
        ({HEAD: (96, 8)}, {}, True),
        ({f"{PRE}lm_head.base_layer.weight": (96, 8)}, {}, True),
        ({f"{PRE}lm_head.bias": (96,)}, {}, False),
        ({f"{PRE}lm_head.scales": (96, 8)}, {}, False),
        ({f"{PRE}lm_head.weight": (96,)}, {}, False),
        ({f"{PRE}score.weight": (3, 8)}, {}, False),
        ({f"{PRE}my_lm_head.weight": (96, 8)}, {}, False),
        ({HEAD: (96, 8)}, {"modules_to_save": ["lm_head"]}, False),
        ({HEAD: (96, 8)}, {"modules_to_save": ["score"]}, True),
        ({EMBED: (96, 8)}, {"target_modules": ["embed_tokens"]}, False),
        ({EMBED: (96, 8)}, {"target_modules": ["q_proj"]}, True),
        ({EMBED: (96, 8)}, {"target_modules": ".*q_proj"}, True),
        ({f"{PRE}model.embed_tokens.base_layer.weight": (96, 8)}, {"target_modules": ".*embed_tokens"}, False),
        ({EMBED: (96, 8)}, {"target_modules": None}, True),
        ({EMBED: (96, 8)}, {"base": "org/base"}, False),
    ],
)
def test_whole_embeddings_are_told(shapes: Shapes, fields: dict[str, Any], told: bool) -> None:
    found = find("whole-embeddings", {**lora(Q), **shapes}, **fields)
    assert len(found) == told
    if told:
        assert found[0].startswith(f"1 tensors, first {next(iter(shapes))}, are whole embeddings or heads (0.0 MB)")


@pytest.mark.parametrize(
    ("more", "fields", "told"),
    [
        ({}, {}, None),
        ({}, {"use_dora": True}, "use_dora is true, and the file holds no magnitudes"),
        ({f"{Q}.lora_magnitude_vector.weight": (8,)}, {"use_dora": True}, None),
        ({}, {"use_dora": False}, None),
        ({}, {"trainable_token_indices": [1]}, "trainable_token_indices names tokens, and the file does not hold"),
        ({f"{PRE}e.token_adapter.trainable_tokens_delta": (1, 8)}, {"trainable_token_indices": [1]}, None),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, and the file holds no tensor of it"),
        ({}, {"modules_to_save": ["x", "y"]}, "modules_to_save names x, y, and the file holds no tensor of them"),
        ({HEAD: (96, 8)}, {"modules_to_save": ["lm_head"]}, None),
        ({HEAD: (96, 8)}, {"modules_to_save": ["lm_head", "x"]}, "modules_to_save names x, and"),
        ({f"{PRE}classifier.out.weight": (3, 8)}, {"modules_to_save": ["classifier", "score"]}, None),
        ({f"{PRE}score.weight": (3, 8)}, {"modules_to_save": ["score", "norm"]}, "modules_to_save names norm, and"),
        ({}, {"modules_to_save": ["classifier", "score"]}, "modules_to_save names classifier, score, and"),
        ({f"{PRE}lm_head.lora_A.weight": (2, 8)}, {"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
    ],
)
def test_what_the_configuration_promises_and_the_file_lacks_is_told(
    more: Shapes, fields: dict[str, Any], told: str | None
) -> None:
    found = find("missing-tensors", {**lora(Q), **more}, **fields)
    assert [message[: len(told or "")] for message in found] == ([told] if told else [])


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_proj"], None),
        (["self_attn.q_proj", "v_proj"], None),
        (["q_proj", "k_proj"], "target_modules names 'k_proj', and the file holds no LoRA of it"),
        (["proj", "k_proj"], "target_modules names 'proj', 'k_proj', and the file holds no LoRA of them"),
        (list("abcdefg"), "target_modules names 'a', 'b', 'c', 'd', 'e', and the file"),
        ([], None),
        (None, None),
        (".*k_proj", None),
    ],
)
def test_targets_that_match_nothing_are_told(targets: Any, told: str | None) -> None:
    found = find("unused-targets", {**lora(Q), **lora(V)}, target_modules=targets)
    assert [message[: len(told or "")] for message in found] == ([told] if told else [])
    assert find("unused-targets", {HEAD: (96, 8)}, target_modules=targets) == []


def test_an_adapter_without_lora_is_told() -> None:
    assert find("no-lora", lora(Q)) == []
    for shapes in ({}, {HEAD: (96, 8)}):
        [told] = find("no-lora", shapes)
        assert told.startswith("The adapter is empty: its file holds no LoRA tensors")
