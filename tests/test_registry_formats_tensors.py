"""Names, shapes and values that an adapter's tensors must have, each refused by its own message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from registry.checks.adapter_files import AdapterFiles
from registry.checks.table import check_weights, enforce
from registry.errors import InvalidAdapter
from registry.formats.adapter_config import AdapterConfig
from registry.formats.records import TensorRecord
from registry.formats.tensors import counted, labels_of, lora_modules, other_tensors, vocabulary_of
from registry.formats.weights import Header, Values

PRE = "base_model.model."
Q = f"{PRE}model.layers.0.self_attn.q_proj"
GOOD: dict[str, tuple[int, ...]] = {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (8, 2)}
EMBEDDING = f"{PRE}model.embed_tokens"
HEAD, EMBED, NORM = f"{PRE}lm_head.weight", f"{EMBEDDING}.weight", f"{PRE}model.norm.weight"


def config(**fields: Any) -> AdapterConfig:
    return AdapterConfig({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **fields})


def records(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorRecord]:
    return {name: TensorRecord("F32", shape) for name, shape in shapes.items()}


def check(shapes: dict[str, tuple[int, ...]], **fields: Any) -> None:
    known = {"config": config(**fields), "header": Header(records(shapes), {}, {})}
    enforce(AdapterFiles(Path(), given=known), "pull", ("configuration", "header"))


def check_trained(tensors: dict[str, TensorRecord], zeros: set[str]) -> None:
    known = {"header": Header(tensors, {}, {}), "values": Values(frozenset(zeros))}
    enforce(AdapterFiles(Path(), given=known), "push", ("header", "values"))


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({}, {}),
        ({f"{Q}.lora_magnitude_vector.weight": (8,)}, {"use_dora": True}),
        ({f"{Q}.base_layer.bias": (8,)}, {"bias": "all"}),
        ({NORM: (8,)}, {"modules_to_save": ["norm"]}),
        ({f"{PRE}pre_classifier.dense.weight": (8, 8)}, {"modules_to_save": ["classifier"]}),
        ({f"{PRE}score.weight": (3, 8)}, {"task_type": "SEQ_CLS"}),
        ({f"{PRE}qa_outputs.bias": (2,)}, {"task_type": "QUESTION_ANS"}),
        ({f"{PRE}classifier.bias": (2,)}, {"task_type": "TOKEN_CLS"}),
        ({HEAD: (96, 8)}, {}),
        ({EMBED: (96, 8)}, {}),
        ({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, 8)}, {"trainable_token_indices": [1, 2]}),
        ({f"{EMBEDDING}.lora_embedding_A": (2, 96), f"{EMBEDDING}.lora_embedding_B": (8, 2)}, {}),
        ({f"{PRE}m.lora_A.weight": (4, 8), f"{PRE}m.lora_B.weight": (8, 4)}, {"rank_pattern": {"m": 4}}),
        ({f"{PRE}m.lora_A.weight": (6, 8), f"{PRE}m.lora_B.weight": (8, 6)}, {"target_parameters": ["m.up"]}),
        ({f"{PRE}c.lora_A.weight": (2, 3, 3, 3), f"{PRE}c.lora_B.weight": (8, 2, 1, 1)}, {}),
    ],
)  # fmt: skip
def test_what_peft_saves_passes(more: dict[str, tuple[int, ...]], fields: dict[str, Any]) -> None:
    check({**GOOD, **more}, **fields)


@pytest.mark.parametrize(
    ("shapes", "fields", "says"),
    [
        ({}, {}, "The adapter is empty"),
        ({HEAD: (96, 8)}, {}, "The adapter is empty"),
        ({f"{PRE}_orig_mod.m.lora_A.weight": (2, 8), f"{PRE}_orig_mod.m.lora_B.weight": (8, 2)}, {}, "compiled model"),
        ({**GOOD, "model.x.lora_A.weight": (2, 8), "model.x.lora_B.weight": (8, 2)}, {}, "begin with base_model.model"),
        ({**GOOD, NORM: (8,)}, {}, "weights of the base model"),
        ({**GOOD, f"{Q}.base_layer.weight": (8, 8)}, {}, "weights of the base model"),
        ({**GOOD, f"{PRE}model.layers.0.mlp.up_proj.weight": (8, 8)}, {}, "weights of the base model"),
        ({**GOOD, f"{Q}.base_layer.bias": (8,)}, {}, "weights of the base model"),
        ({**GOOD, f"{Q}.base_layer.weight": (8, 8)}, {"bias": "all"}, "weights of the base model"),
        ({**GOOD, f"{PRE}lm_head.bias": (96,)}, {}, "weights of the base model"),
        ({**GOOD, f"{PRE}score.bias": (3,)}, {}, "weights of the base model"),
        ({**GOOD, f"{PRE}score.bias": (3,)}, {"task_type": "CAUSAL_LM"}, "weights of the base model"),
        ({**GOOD, f"{PRE}x.trainable_tokens_delta": (2, 8)}, {}, "weights of the base model"),
        ({**GOOD, f"{PRE}x.weight": (2, 8)}, {"trainable_token_indices": [1]}, "weights of the base model"),
        ({**GOOD, NORM: (8,)}, {"modules_to_save": ["score"]}, "weights of the base model"),
        ({f"{Q}.lora_A.weight": (2, 8)}, {}, "has a LoRA A and no B"),
        ({f"{Q}.lora_B.weight": (8, 2)}, {}, "has a LoRA B and no A"),
        ({**GOOD, f"{Q}.lora_A": (2, 8)}, {}, "more than one LoRA A or B"),
        ({**GOOD, f"{Q}.lora_embedding_B": (8, 2)}, {}, "more than one LoRA A or B"),
        ({f"{Q}.lora_embedding_A": (2, 8), f"{Q}.lora_B.weight": (8, 2)}, {}, "more than one LoRA A or B"),
        ({f"{Q}.lora_A.weight": (2,), f"{Q}.lora_B.weight": (2,)}, {}, "without rows"),
        ({f"{Q}.lora_A.weight": (2, 8, 1), f"{Q}.lora_B.weight": (8, 2)}, {}, "without rows"),
        ({f"{Q}.lora_A.weight": (2, 0), f"{Q}.lora_B.weight": (8, 2)}, {}, "without rows"),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (0, 2)}, {}, "without rows"),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (8, 4)}, {}, "LoRA A of rank 2 and a B of rank 4"),
        ({f"{Q}.lora_A.weight": (4, 8), f"{Q}.lora_B.weight": (8, 4)}, {}, "has rank 4, and adapter_config.json says"),
        ({f"{Q}.lora_A.weight": (4, 8), f"{Q}.lora_B.weight": (8, 4)}, {"rank_pattern": {"k": 8}}, "says 2, 8"),
        ({f"{Q}.lora_A.weight": (5, 8), f"{Q}.lora_B.weight": (8, 5)}, {"target_parameters": ["x"]}, "has rank 5"),
    ],
)  # fmt: skip
def test_what_peft_does_not_save_is_refused(shapes: dict[str, tuple[int, ...]], fields: Any, says: str) -> None:
    with pytest.raises(InvalidAdapter, match=says):
        check(shapes, **fields)


def test_modules_and_the_rest_are_told_apart() -> None:
    more = {f"{Q}.lora_magnitude_vector.weight": (8,), HEAD: (96, 8)}
    found = lora_modules(records({**GOOD, **more}))
    assert list(found) == [Q]
    assert (found[Q].first, found[Q].second) == (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")
    assert found[Q].more == [f"{Q}.lora_magnitude_vector.weight"]
    # In whatever order they are saved, a magnitude is not a B, and a second A or B is kept as what it is.
    shuffled = {f"{Q}.lora_magnitude_vector": (8,), **GOOD}
    assert (found := lora_modules(records(shuffled))[Q]).second == f"{Q}.lora_B.weight"
    assert found.more == [f"{Q}.lora_magnitude_vector"]
    twice = lora_modules(records({**GOOD, f"{Q}.lora_A": (2, 8), f"{Q}.lora_B": (8, 2)}))[Q]
    assert (twice.first, twice.second) == tuple(GOOD)
    assert twice.more == [f"{Q}.lora_A", f"{Q}.lora_B"]
    bias = lora_modules(records({f"{Q}.lora_A.bias": (2,), f"{Q}.lora_B.bias": (8,)}))[Q]
    assert (bias.first, bias.second) == (None, None)
    assert other_tensors([*GOOD, *more]) == [HEAD]


def test_an_adapter_of_zeros_is_untrained_and_any_other_value_is_training() -> None:
    a, b = GOOD
    tensors = records(GOOD)
    for zeros in ({a}, {b}, {a, b}):
        with pytest.raises(InvalidAdapter, match="All 1 LoRA modules are zero"):
            check_trained(tensors, zeros)
    check_trained(tensors, set())
    headed = records({**GOOD, HEAD: (96, 8)})
    check_trained(headed, {a})
    with pytest.raises(InvalidAdapter):
        check_trained(headed, {a, HEAD})
    two = records({**GOOD, f"{PRE}m.lora_A.weight": (2, 8), f"{PRE}m.lora_B.weight": (8, 2)})
    check_trained(two, {a})


def save(path: Path, **changed: Any) -> Path:
    arrays = {"lora_A": numpy.ones((2, 8), "f4"), "lora_B": numpy.ones((8, 2), "f4"), **changed}
    save_file({f"{Q}.{name}.weight": array for name, array in arrays.items()}, path / "adapter_model.safetensors")
    return path / "adapter_model.safetensors"


def test_a_file_is_checked_by_names_and_by_values(tmp_path: Path) -> None:
    assert check_weights(save(tmp_path), config()).warnings == ()
    [told] = check_weights(save(tmp_path, lora_B=numpy.zeros((8, 2), "f4")), config()).warnings
    assert "All 1 LoRA modules are zero" in told
    [told] = check_weights(save(tmp_path, lora_A=numpy.ones((2, 8), "f8")), config()).warnings
    assert f"1 tensors, first {Q}.lora_A.weight, have dtype F64" in told
    for bad in (numpy.full((2, 8), numpy.inf, "f4"), numpy.full((2, 8), 1e38, "f4"), numpy.ones((2, 8), "i8")):
        with pytest.raises(InvalidAdapter):
            check_weights(save(tmp_path, lora_A=bad), config())
    with pytest.raises(InvalidAdapter, match="rank"):
        check_weights(save(tmp_path), config(r=4))


def test_modules_are_counted_by_kind() -> None:
    shapes = {**GOOD, f"{PRE}model.layers.1.self_attn.q_proj.lora_A.weight": (2, 8), HEAD: (96, 8)}
    shapes |= {f"{PRE}model.layers.0.mlp.base_layer.lora_A.weight": (2, 8)}
    assert list(counted(records(shapes))) == [("lm_head", 1, 768), ("mlp", 1, 16), ("q_proj", 3, 48)]
    assert list(counted(records({f"{PRE}0.lora_A.weight": (2, 8)}))) == [("0", 1, 16)]  # of a model that is a sequence


@pytest.mark.parametrize(
    ("shapes", "task", "labels"),
    [
        ({f"{PRE}score.weight": (3, 8)}, "SEQ_CLS", 3),
        ({f"{PRE}classifier.dense.weight": (8, 8), f"{PRE}classifier.out.weight": (3, 8)}, "SEQ_CLS", 3),
        ({f"{PRE}classifier.weight": (8, 8)}, "TOKEN_CLS", 8),
        ({f"{PRE}classifier.bias": (3,)}, "TOKEN_CLS", None),
        ({f"{PRE}score.weight": (3, 8), f"{PRE}other.weight": (4, 8)}, "SEQ_CLS", None),
        ({f"{PRE}score.weight": (3, 8), EMBED: (96, 8)}, "SEQ_CLS", 3),
        ({f"{PRE}score.weight": (3, 8), f"{PRE}x.trainable_tokens_delta": (5, 8)}, "SEQ_CLS", 3),
        ({f"{PRE}score.weight": (3, 8)}, "CAUSAL_LM", None),
        ({}, "SEQ_CLS", None),
    ],
)
def test_labels_follow_from_the_head(shapes: dict[str, tuple[int, ...]], task: str, labels: int | None) -> None:
    assert labels_of(records({**GOOD, **shapes}), config(task_type=task)) == labels


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        ({}, None),
        ({EMBED: (96, 8)}, 96),
        ({EMBED: (96, 8), HEAD: (98, 8)}, 98),
        ({f"{EMBEDDING}.lora_embedding_A": (2, 97), f"{EMBEDDING}.lora_embedding_B": (8, 2)}, 97),
        ({f"{PRE}lm_head.lora_A.weight": (2, 8), f"{PRE}lm_head.lora_B.weight": (500, 2)}, None),
        ({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, 8)}, None),
        ({f"{PRE}lm_head.bias": (96,)}, None),
        ({f"{PRE}score.weight": (3, 8)}, None),
    ],
)  # fmt: skip
def test_the_vocabulary_follows_from_embeddings_and_heads(shapes: dict[str, tuple[int, ...]], rows: int | None) -> None:
    assert vocabulary_of(records({**GOOD, **shapes})) == rows
