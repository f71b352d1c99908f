from ripple import RippleConfig, RippleForCausalLM

from lora_plugins.testing import check_architecture


def make_model():
    return RippleForCausalLM(RippleConfig(vocab_size=64, hidden_size=32, waves=3))


def test_default_trains_saves_and_reloads():
    plan = check_architecture(make_model)
    assert {hit.name: len(hit.modules) for hit in plan.hits} == {"ask": 3, "give": 3}


def test_scope():
    plan = check_architecture(make_model, target_modules="mlp")
    assert {hit.name for hit in plan.hits} == {"rise", "fall"}
