from careful.plugin import Rounded
from transformers import GPT2Config, GPT2LMHeadModel

from lora_plugins import prepare_model
from lora_plugins.testing import check_architecture, check_quantizer


def make_model():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def test_default_trains_saves_and_reloads():
    plan = check_architecture(make_model)
    assert {hit.name for hit in plan.hits} == {"c_attn", "attn.c_proj"}


def test_backend():
    check_quantizer(Rounded())


def test_backend_by_name():
    model = prepare_model(make_model(), quantization="rounded")
    assert any(type(module).__name__ == "RoundedLinear" for module in model.modules())
