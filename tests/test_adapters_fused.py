"""The fused LoRA branch against PEFT's own forward and backward; where it steps aside; what PEFT still does with it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_plugins import Int8PreparationCallback, LoraCallback, prepare_model
from lora_plugins.adapters.fused import LoraBranch, draw_mask, fuse_adapters
from lora_plugins.adapters.report import make_report
from lora_plugins.errors import PreparationError
from lora_plugins.quantization.request import owner_of

SHAPE = (3, 5, 16)


def wrapped(*, dtype: torch.dtype = torch.float64, bias: bool = True, **config: Any) -> Any:
    """A PeftModel over one linear layer ``q``, with adapters that are not zero; not fused."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(16, 12, bias=bias)}).to(dtype)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "init_lora_weights": False, **config}
    return peft.get_peft_model(model, peft.LoraConfig(**fields), autocast_adapter_dtype=False)


def layer_of(model: Any) -> Any:
    return model.base_model.model["q"]


class SameDropout(nn.Dropout):
    """Drops what the fused branch drops, for PEFT's own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask, kept = draw_mask(x, self.p, x.dtype)
        return x * mask.view(x.shape) / kept


def drop_the_same(model: nn.Module) -> int:
    """Give PEFT's layers the masks of the fused branch; returns how many layers."""
    dropouts = [m.lora_dropout for m in model.modules() if isinstance(m, LoraLayer)]
    for dropout in dropouts:
        for name, module in dropout.items():
            if type(module) is nn.Dropout and module.p < 1:
                dropout[name] = SameDropout(module.p)
    return len(dropouts)


def run(model: Any, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Output and gradients of one pass whose random numbers are always the same."""
    x = x.detach().clone().requires_grad_(True)
    model.zero_grad()
    torch.manual_seed(5)
    output = layer_of(model)(x, **kwargs)
    torch.manual_seed(6)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(output.dtype))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "x": x.grad, "output": output.detach()}


def is_fused(model: Any, x: torch.Tensor, **kwargs: Any) -> bool:
    """Whether the branch was computed by ``LoraBranch``."""
    function = layer_of(model)(x.detach().clone().requires_grad_(True), **kwargs).grad_fn
    return function is not None and type(function).__name__ == "LoraBranchBackward"


def compare(model: Any, x: torch.Tensor, *, fused: bool = True, tolerance: float = 1e-13) -> None:
    plain = copy.deepcopy(model)
    assert drop_the_same(plain) == 1
    assert fuse_adapters(model) == 1
    assert is_fused(model, x) is fused
    expected, found = run(plain, x), run(model, x)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def rows(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


# -- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_rslora": True, "lora_dropout": 0.5}])
def test_equals_peft_in_float64(config: dict[str, Any], bias: bool) -> None:
    compare(wrapped(bias=bias, **config), rows())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_can_be_changed_in_place(dtype: torch.dtype) -> None:
    """Some models scale their queries so; autograd forbids it for views that come out of a function."""
    model = wrapped(dtype=dtype)
    fuse_adapters(model)
    output = layer_of(model)(rows(dtype).requires_grad_(True))
    assert type(output.grad_fn).__name__ == "LoraBranchBackward"
    output /= 2.0
    output.sum().backward()


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(rate: float) -> None:
    def branch(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return LoraBranch.apply(*tensors, 2.0, rate, torch.float64)

    torch.manual_seed(0)
    shapes = [(2, 3, 6), (2, 3, 5), (4, 5), (6, 4)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(branch, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_over_a_16_bit_base(dtype: torch.dtype) -> None:
    model = wrapped(dtype=torch.float32, lora_dropout=0.3)
    layer_of(model).base_layer.to(dtype)
    compare(model, rows(dtype), tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(dtype: torch.dtype) -> None:
    model = wrapped(dtype=torch.float32, lora_dropout=0.3)
    layer_of(model).base_layer.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(model, rows(torch.float32), tolerance=4e-2)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_mask_drops_each_value_with_its_rate(rate: float) -> None:
    torch.manual_seed(0)
    masks = torch.stack([draw_mask(torch.empty(100, 64), rate, torch.float32)[0] for _ in range(400)])
    kept = draw_mask(torch.empty(1, 1), rate, torch.float32)[1]
    assert abs(kept - (1 - rate)) <= 2**-16
    # Five standard deviations of the share of all, and of the most and least often kept place of 6,400.
    spread = (rate * (1 - rate) / masks.numel()) ** 0.5
    assert abs(masks.float().mean().item() - kept) < 5 * spread
    spread = (rate * (1 - rate) / len(masks)) ** 0.5
    assert (masks.float().mean(0) - kept).abs().max() < 5 * spread
    # Neither neighbours in a row, nor the same place in two draws, depend on each other.
    centred = masks.double() - kept
    pairs = (centred[:, :, 1:] * centred[:, :, :-1], centred[1:] * centred[:-1])
    for product in pairs:
        assert abs(product.mean().item()) < 5 * rate * (1 - rate) / product.numel() ** 0.5


def test_mask_follows_torchs_seed() -> None:
    def draw() -> list[torch.Tensor]:
        return [draw_mask(torch.empty(7, 33), 0.3, torch.float32)[0] for _ in range(2)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw()
    torch.set_rng_state(state)
    again, later = draw(), draw()
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], later[0])
    assert first[0].dtype is torch.bool
    assert first[0].shape == (7, 33)


@pytest.mark.parametrize("rate", [1e-9, 1 - 1e-9])
def test_extreme_rates_stay_unbiased(rate: float) -> None:
    """Rounded to none or all, a rate would drop nothing or divide by zero."""
    torch.manual_seed(0)
    mask, kept = draw_mask(torch.empty(1000, 1000), rate, torch.float32)
    assert 0 < kept < 1
    rare = ~mask if rate < 0.5 else mask
    assert 0 < int(rare.sum()) < 60, "fifteen of a million are expected"


def test_fake_tensors_can_pass() -> None:
    """Memory estimators run a model on tensors without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = wrapped(lora_dropout=0.3)
    fuse_adapters(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = layer_of(model)(mode.from_tensor(rows()).requires_grad_(True))
    assert output.shape == (*SHAPE[:-1], 12)
    assert type(output.grad_fn).__name__ == "LoraBranchBackward"


def test_empty_input() -> None:
    model = wrapped(lora_dropout=0.3)
    fuse_adapters(model)
    x = rows()[:0].requires_grad_(True)
    output = layer_of(model)(x)
    assert output.shape == (0, 5, 12)
    assert type(output.grad_fn).__name__ == "LoraBranchBackward"
    output.sum().backward()
    assert x.grad is not None


def test_frozen_parts_get_no_gradient() -> None:
    model = wrapped()
    layer_of(model).lora_A["default"].weight.requires_grad_(False)
    compare(model, rows())
    assert fuse_adapters(model) == 0, "twice would be once too often"


def test_input_without_gradient() -> None:
    model = wrapped(lora_dropout=0.3)
    fuse_adapters(model)
    layer_of(model)(rows()).sum().backward()
    assert layer_of(model).lora_B["default"].weight.grad is not None


def test_keeps_less_for_the_backward_pass() -> None:
    def kept(model: Any) -> int:
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer_of(model)(x)
        return sum(found.values())

    model = wrapped(dtype=torch.float32, lora_dropout=0.1)
    layer_of(model).base_layer.to(torch.bfloat16)
    before = kept(model)
    fuse_adapters(model)
    assert kept(model) < before / 2


# -- where PEFT's own forward is used ----------------------------------------------------------


def two_adapters() -> Any:
    model = wrapped()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    model.double()
    model.base_model.set_adapter(["default", "second"])
    return model


def hooked() -> Any:
    model = wrapped()
    layer_of(model).lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)
    return model


def disabled() -> Any:
    model = wrapped()
    layer_of(model).enable_adapters(False)
    return model


def merged() -> Any:
    model = wrapped()
    layer_of(model).merge()
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: wrapped(use_dora=True),
        lambda: wrapped(lora_bias=True),
        lambda: wrapped(lora_dropout=1.0),
        lambda: wrapped().eval(),
        two_adapters,
        hooked,
        disabled,
        merged,
    ],
    ids=["dora", "lora_bias", "all dropped", "eval", "two adapters", "hooked", "disabled", "merged"],
)
def test_anything_else_is_left_to_peft(make: Callable[[], Any]) -> None:
    compare(make(), rows(), fused=False, tolerance=0)


def test_mixed_batch_is_left_to_peft() -> None:
    model = two_adapters()
    model.base_model.set_adapter("default")
    model.eval()
    plain = copy.deepcopy(model)
    fuse_adapters(model)
    names = ["second", "__base__", "default"]
    expected, found = (run(m, rows(), adapter_names=names)["output"] for m in (plain, model))
    assert torch.equal(expected, found)
    model.train()
    with pytest.raises(ValueError, match="adapter_names"):
        layer_of(model)(rows(), adapter_names=["default"])


def test_switching_adapters_switches_the_branch() -> None:
    model = two_adapters()
    plain = copy.deepcopy(model)
    fuse_adapters(model)
    for name in ("second", "default"):
        for each in (plain, model):
            each.base_model.set_adapter(name)
        torch.testing.assert_close(run(model, rows())["output"], run(plain, rows())["output"])


def test_forward_that_somebody_put_over_a_layer_stays() -> None:
    model = wrapped()
    layer_of(model).forward = lambda x: x
    assert fuse_adapters(model) == 0


# -- what PEFT does with a layer ---------------------------------------------------------------


def test_copies_pickles_and_unloading() -> None:
    model = wrapped(lora_dropout=0.3)
    keys = list(model.state_dict())
    fuse_adapters(model)
    assert type(layer_of(model)) is LoraLinear
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert layer_of(twin).forward.__self__ is layer_of(twin)
    assert is_fused(twin, rows())
    thawed = pickle.loads(pickle.dumps(model))
    assert not is_fused(thawed, rows())
    drop_the_same(thawed)
    for other in (twin, thawed):
        for name, tensor in run(model, rows()).items():
            torch.testing.assert_close(run(other, rows())[name], tensor)
    expected = layer_of(copy.deepcopy(model).eval())(rows())
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()["q"](rows()), expected)
    assert type(model.unload()["q"]) is nn.Linear


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_gives_the_losses_of_peft(
    tmp_path: Path, quantization: str | None, checkpointing: bool | None
) -> None:
    """With dropout and the same seed; ``checkpointing`` is its ``use_reentrant``."""
    losses = []
    for fused in (True, False):
        options: dict[str, Any] = {} if checkpointing is None else {"gradient_checkpointing": True}
        if checkpointing is not None:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
        callback = LoraCallback(r=4, lora_dropout=0.3, quantization=quantization, compute_dtype="float32")
        trainer = tiny.trainer(tmp_path, callbacks=[callback], **options)
        layers = [m for m in trainer.model.modules() if "forward" in vars(m) and hasattr(m, "lora_A")]
        assert len(layers) == 4
        if not fused:
            for layer in layers:
                del layer.forward
            assert drop_the_same(trainer.model) == 4
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 4


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_prepared_models_are_fused(quantization: str | None) -> None:
    model = prepare_model(tiny.llama(), r=4, quantization=quantization).train()
    seen = []
    model.base_model.model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: seen.append(type(output.grad_fn).__name__)
    )
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen == ["LoraBranchBackward"]


# -- second derivatives ------------------------------------------------------------------------


def penalty_gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a gradient penalty: those of the squared gradients of the first loss."""
    x = x.detach().clone().requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    loss = layer_of(model)(x).square().mean()
    first = torch.autograd.grad(loss, [x, *trained], create_graph=True)
    sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]
    return {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "config", [{}, {"lora_dropout": 0.3}, {"use_rslora": True, "r": 2}, {"lora_dropout": 0.5, "lora_alpha": 64}]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_gradient_penalty_has_the_gradients_of_peft(config: dict[str, Any], bias: bool) -> None:
    model = wrapped(bias=bias, **config)
    plain = copy.deepcopy(model)
    drop_the_same(plain)
    fuse_adapters(model)
    expected, found = penalty_gradients(plain, rows()), penalty_gradients(model, rows())
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("quantization", [None, "int8", "nf4", "int8-hqq"])
def test_prepared_models_differentiate_twice(quantization: str | None) -> None:
    grads = []
    for fused in (True, False):
        model = prepare_model(
            tiny.llama(), quantization=quantization, compute_dtype="float32", fused=fused, lora_dropout=0.0
        )
        model.config._attn_implementation = "eager"
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(2))
        embeddings = model.get_input_embeddings()(torch.arange(1, 9)[None]).detach().requires_grad_(True)
        loss = model.train()(inputs_embeds=embeddings, labels=torch.arange(1, 9)[None]).loss
        (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        gradient.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(bool(gradient.any()) for name, gradient in grads[0].items())
    for name, gradient in grads[1].items():
        torch.testing.assert_close(grads[0][name], gradient, rtol=1e-4, atol=1e-8)


# -- other methods and classes keep their own forward ------------------------------------------


class Doubling(LoraLinear):
    """A user's LoRA layer whose branch counts twice."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.base_layer(x)
        return base + 2 * (super().forward(x, *args, **kwargs) - base)


class CastingInDouble(LoraLinear):
    """A user's LoRA layer that inherits the forward pass and changes what it calls."""

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        return super()._cast_input_dtype(x, dtype) * 2


@pytest.mark.parametrize("kind", [Doubling, CastingInDouble])
def test_a_subclass_of_the_lora_layer_keeps_its_own_forward(kind: type[LoraLinear]) -> None:
    model = wrapped()
    layer_of(model).__class__ = kind
    expected = run(copy.deepcopy(model), rows())
    assert fuse_adapters(model) == 0
    for name, tensor in run(model, rows()).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("kind", [Doubling, CastingInDouble])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_subclass_keeps_its_class_when_its_base_is_quantized(kind: type[LoraLinear], quantization: str) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({nn.Linear: kind})
    model: Any = peft.get_peft_model(tiny.llama(), config)
    prepare_model(model, quantization=quantization)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert {type(m) for m in layers} == {kind}
    assert not any("forward" in vars(m) for m in layers)


METHODS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10, init_r=4, target_r=2),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj", "v_proj"], r=4),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj", "v_proj"], r=4),
}
#: These read the shape of the base's weight, which four bits pack.
PACKED = [("loha", "nf4"), ("lokr", "nf4")]


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_a_method_that_fails_over_packed_weights_is_refused_by_name(method: str) -> None:
    config = METHODS[method]()
    model: Any = peft.get_peft_model(tiny.llama(), config)
    with pytest.raises(PreparationError, match=r"of PEFT \(model\.layers\.0\.self_attn\.q_proj\) fails over .*'nf4'"):
        prepare_model(model, quantization="nf4")


@pytest.mark.parametrize(
    ("method", "quantization"),
    [(method, name) for method in METHODS for name in ("int8", "nf4") if (method, name) not in PACKED],
)
def test_other_methods_train_over_a_quantized_base(tmp_path: Path, method: str, quantization: str) -> None:
    config = METHODS[method]()
    config.task_type = "CAUSAL_LM"
    model: Any = peft.get_peft_model(tiny.llama(), config)
    kinds = [type(m) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    trainer = tiny.trainer(tmp_path, model, [Int8PreparationCallback(quantization)], max_steps=2)
    trainer.train()
    layers = [m for m in trainer.model.modules() if isinstance(m, BaseTunerLayer)]
    assert [type(m) for m in layers] == kinds
    assert not any("forward" in vars(m) for m in layers)
    assert all(owner_of(m.get_base_layer()) is not None for m in layers)


# -- the switch --------------------------------------------------------------------------------


def test_the_fused_branch_can_be_switched_off(tmp_path: Path) -> None:
    for model in (
        prepare_model(tiny.llama(), fused=False),
        tiny.trainer(tmp_path, callbacks=[LoraCallback(fused=False, quantization="int8")]).model,
    ):
        assert not any("forward" in vars(m) for m in model.modules())
        assert any("fused=False" in note for note in make_report(model).notes)
    assert not any("fused" in note for note in make_report(prepare_model(tiny.llama())).notes)
