"""Packed examples that don't see each other: the way is measured, and losses are those of the examples alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from lora_plugins import best_fit_collator, prepare_model
from lora_plugins.errors import UnsupportedPacking
from lora_plugins.models.isolation import Isolation, find_isolation
from lora_plugins.recipe.best_fit.batches import BestFitCollator

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(
        vocab_size=tiny.VOCABULARY, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, **sizes
    )
    return OPTForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL)),
    "bloom": tiny.bloom,
    "opt": opt,
}
#: Model, attention implementation, and the way that it has to be.
WAYS = [
    *(
        (name, attention, "positions")
        for name in ("llama", "gpt2", "qwen3", "gemma")
        for attention in ("eager", "sdpa")
    ),
    ("bloom", "eager", "masks"),
    *(("opt", attention, "masks") for attention in ("eager", "sdpa")),
]
#: Examples of two packed rows.
ROWS = [[[5, 9, 3, 7, 8, 2], [11, 4, 6], [1, 2]], [[7, 7, 30, 41], [9, 8, 7, 6, 50]]]


def make(name: str, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    # Larger weights, so that what an example is told by another one cannot be overlooked.
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2:
                value.mul_(4)
    model.set_attn_implementation(attention)
    return model


def alone(model: nn.Module, example: list[int]) -> float:
    ids = torch.tensor([example])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def packed(model: nn.Module, collate: Any) -> list[float]:
    """Return the loss of each example of both rows."""
    batch = collate([{"input_ids": row} for row in ROWS])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    losses = []
    for number, row in enumerate(ROWS):
        begin = 0
        for example in row:
            end = begin + len(example)
            assert labels[number, begin] == -100
            losses.append(float(cross_entropy(logits[number, begin : end - 1], labels[number, begin + 1 : end])))
            begin = end
        assert (labels[number, begin:] == -100).all()
    return losses


@pytest.mark.parametrize(("name", "attention", "way"), WAYS)
def test_the_loss_of_each_packed_example_is_the_one_it_has_alone(name: str, attention: str, way: str) -> None:
    model = make(name, attention).eval()
    collate = best_fit_collator(model)
    assert collate.isolation.way == way
    wanted = [alone(model, example) for row in ROWS for example in row]
    assert packed(model, collate) == pytest.approx(wanted, abs=1e-5)
    # What it would be if they saw each other: the comparison above can tell.
    mixed = BestFitCollator(Isolation("positions", takes_positions=False, takes_cache=True))
    assert packed(model, mixed) != pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mask_does_as_well_as_position_ids(name: str) -> None:
    for attention in ("eager", "sdpa"):
        model = make(name, attention).eval()
        masks = Isolation("masks", takes_positions=True, takes_cache=True, bool_mask=attention == "sdpa")
        wanted = [alone(model, example) for row in ROWS for example in row]
        assert packed(model, BestFitCollator(masks)) == pytest.approx(wanted, abs=1e-5)


def test_bloom_with_adapters_in_int8_keeps_examples_apart() -> None:
    """The mask goes through whatever the callback makes of the model, in training and with checkpointing."""
    model = prepare_model(make("bloom"), quantization="int8")
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    collate = best_fit_collator(model)
    model.eval()
    wanted = [alone(model, example) for row in ROWS for example in row]
    assert packed(model, collate) == pytest.approx(wanted, abs=1e-5)
    model.train()
    model(**collate([{"input_ids": ROWS[0]}])).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_bloom_can_be_copied_and_pickled_after_the_probe() -> None:
    model = make("bloom").eval()
    collate = best_fit_collator(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert packed(twin, collate) == packed(model, collate)


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_recurrent_models_are_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    model: Any
    if name == "mamba":
        model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4))
    else:
        model = RwkvForCausalLM(
            RwkvConfig(vocab_size=96, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
        )
    with pytest.raises(
        UnsupportedPacking, match=f"(?i){name}ForCausalLM cannot keep packed examples apart: .*--packing none"
    ):
        find_isolation(model)


# -- models that would be taken for sound ones by their class or their arguments -------------------


def _drop(model: nn.Module, *names: str) -> nn.Module:
    """Let a model take arguments and ignore them, as models with ``**kwargs`` do."""
    forward = model.forward

    def ignoring(input_ids: Any = None, position_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        given = {"position_ids": position_ids, "attention_mask": attention_mask}
        given = {name: value for name, value in given.items() if value is not None and name not in names}
        return forward(input_ids=input_ids, **given, **kwargs)

    model.forward = ignoring  # type: ignore[method-assign]
    return model


def test_a_model_that_ignores_everything_is_refused() -> None:
    with pytest.raises(
        UnsupportedPacking, match=r"with position ids, a change in one example moves .*; with a mask, a ch"
    ):
        find_isolation(_drop(make("llama"), "position_ids", "attention_mask"))


def test_a_model_that_ignores_position_ids_gets_masks_only_if_places_do_not_matter() -> None:
    """Rotary embeddings know distances only; learned ones know places, and they would be another example's."""
    assert find_isolation(_drop(make("llama"), "position_ids")).way == "masks"
    with pytest.raises(UnsupportedPacking, match=r"with a mask, the logits of an example differ by .* from those"):
        find_isolation(_drop(make("gpt2"), "position_ids"))


def test_layers_with_a_window_get_no_mask_for_all() -> None:
    model = _drop(make("llama"), "position_ids")
    model.config.sliding_window = 4  # type: ignore[union-attr]
    with pytest.raises(UnsupportedPacking, match="with position ids, a change"):
        find_isolation(model)


def test_a_model_without_numbers_is_refused() -> None:
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedPacking, match="its logits are not finite"):
        find_isolation(model)


def test_a_model_that_shows_nothing_is_refused() -> None:
    """Attention that gives nothing yet hides whether examples see each other."""
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(UnsupportedPacking, match="does not show in its outputs"):
        find_isolation(model)


def test_a_model_without_weights_cannot_be_tried() -> None:
    with torch.device("meta"):
        model = tiny.llama()
    with pytest.raises(UnsupportedPacking, match="no weights in memory"):
        find_isolation(model)


def test_flash_attention_gets_one_row_without_padding() -> None:
    """Found by the name of the attention implementation; it runs on a GPU only."""
    isolation = Isolation("positions", takes_positions=True, takes_cache=True, one_row=True)
    batch = BestFitCollator(isolation)([{"input_ids": row} for row in ROWS])
    assert batch["input_ids"].tolist() == [[token for row in ROWS for example in row for token in example]]
    assert batch["position_ids"].tolist() == [
        [place for row in ROWS for example in row for place in range(len(example))]
    ]


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = make("gpt2").train()
    model.transformer.h[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    find_isolation(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_half_precision_is_judged_alike(name: str) -> None:
    assert find_isolation(make(name).bfloat16()).way == find_isolation(make(name)).way
