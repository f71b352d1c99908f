"""Test the architectures and quantization backends of a plugin."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lora_plugins.adapters.prepare import prepare_model
from lora_plugins.errors import QuantizationError
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.counting import tensor_bytes
from lora_plugins.quantization.request import Quantization, with_compute_dtype
from lora_plugins.quantization.selftest import check_usable, check_usable_for_experts
from lora_plugins.quantization.stacks import dequantize_stack, quantize_stack
from lora_plugins.targets.records import TargetPlan
from lora_plugins.targets.resolution import resolve_targets

__all__ = ["check_architecture", "check_quantizer"]


def check_architecture(
    make_model: Callable[[], nn.Module],
    batch: Mapping[str, torch.Tensor] | None = None,
    *,
    host: PluginHost | None = None,
    **lora: Any,
) -> TargetPlan:
    """Assert that a model's architecture is registered, trains, saves and reloads.

    The default targets must come from a record and reach every repeated block. Then adapters are trained for one step
    on a small model: every ``lora_B`` must get a gradient at once, every ``lora_A`` after that step. The saved adapter
    on a fresh base must give equal outputs, and switching it off must change them.

    Args:
        make_model: Makes a small model with random weights; called several times, each time with the same seed.
        batch: What its forward takes, with labels if it has a loss; two rows of eight tokens by default.
        host: Where the architecture is looked up; default is the process's plugin host.
        **lora: Arguments of `prepare_model`, such as ``target_modules="mlp"`` for another scope than the default.

    Returns:
        The resolved targets, for further assertions.

    Raises:
        AssertionError: A check fails; the message says which.
    """
    host = host or plugin_host()
    base = _make_fresh(make_model)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    assert host.architecture(str(model_type)) is not None, (
        f"no plugin registers the model type {model_type!r}; is the package installed, with its entry point in the "
        "group 'lora_plugins'?"
    )
    plan = resolve_targets(base, lora.get("target_modules"), host=host)
    assert plan.source.startswith(("the registered", "scope", "the names", "the pattern")), (
        f"the record of {model_type!r} names nothing that is in the model: targets came from {plan.source}"
    )
    missed = {kind: pair for kind, pair in plan.coverage.items() if pair[0] < pair[1]}
    assert not missed, f"some blocks get no adapter (adapted, all): {missed}"
    inputs = dict(batch) if batch is not None else _make_default_batch(base)
    _check_training(make_model, base, inputs, {**lora, "target_modules": _list_names(plan)}, plan)
    return plan


def check_quantizer(
    quantizer: Quantizer, options: Mapping[str, Any] | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Assert that a backend runs on this machine's CPU, can be trained on, and states its sizes correctly.

    If it has a format for stacked experts, or its layers can be divided among processes, that is checked as well.

    Args:
        quantizer: The backend.
        options: Options for it.
        dtype: Dtype of the activations; float32 by default.

    Raises:
        AssertionError: It cannot run here, fails the training that every backend must pass, or a size is wrong.
    """
    dtype = dtype or torch.float32
    asked = Quantization(quantizer, {"skip_modules": [], **(options or {})})
    try:
        check_usable(asked, torch.device("cpu"), dtype)
    except QuantizationError as error:
        raise AssertionError(str(error)) from error
    rows, columns = 192, 256
    linear = nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
    layer = asked.quantize(linear)
    assert not any(parameter.requires_grad for parameter in layer.parameters()), "the quantized layer is not frozen"
    weight = quantizer.dequantize(layer)
    assert tuple(weight.shape) == (rows, columns), f"dequantize() gives the shape {tuple(weight.shape)}"
    said = quantizer.layer_bytes(columns, rows, dtype, asked.options)
    found = tensor_bytes(layer).total
    assert said is None or said == found, f"layer_bytes() says {said} bytes and the layer has {found}"
    _check_dtypes(asked, dtype)
    _check_zeros(asked, dtype)
    _check_division(asked, layer, weight)
    if quantizer.expert_format(asked.options) is not None:
        _check_experts(asked, dtype)


def _check_zeros(quantization: Quantization, dtype: torch.dtype) -> None:
    """Assert that rows of zeros, which have no scale, are zeros again: layers added to a model may begin so."""
    for rows in (slice(3, 4), slice(None)):
        linear = nn.Linear(256, 192, bias=False, dtype=dtype).requires_grad_(False)
        linear.weight[rows] = 0
        found = quantization.quantizer.dequantize(quantization.quantize(linear))
        assert bool(found.isfinite().all()), "a weight with a row of zeros is not finite when it is dequantized"
        assert not found[rows].any(), "a row of zeros is dequantized to other values"


def _check_division(quantization: Quantization, layer: nn.Module, weight: torch.Tensor) -> None:
    """Assert that a layer that can be divided is one flat parameter then, of the size that the plan takes, and back."""
    quantizer = quantization.quantizer
    rows, columns = weight.shape
    said = quantizer.divided_bytes(columns, rows, quantization.options)
    if not quantizer.divide(layer):
        assert said is None, f"divided_bytes() says {said} bytes and divide() does nothing"
        return
    flat = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    assert len(flat) == 1, f"divide() leaves {len(flat)} parameters besides the bias, not one"
    assert flat[0].dim() == 1, f"the divided parameter has the shape {tuple(flat[0].shape)}, not a flat one"
    assert not flat[0].is_floating_point(), f"the divided parameter is in {flat[0].dtype}, which mixed precision casts"
    assert said == flat[0].nbytes, f"divided_bytes() says {said} bytes and the parameter has {flat[0].nbytes}"
    assert torch.equal(quantizer.dequantize(layer), weight), "a divided layer has another weight"
    quantizer.undivide(layer)
    assert torch.equal(quantizer.dequantize(layer), weight), "undivide() gives another weight back"


def _check_experts(quantization: Quantization, dtype: torch.dtype) -> None:
    """Assert that stacked experts can be trained through, and that their bytes are stated correctly."""
    try:
        check_usable_for_experts(quantization, torch.device("cpu"), dtype)
    except QuantizationError as error:
        raise AssertionError(str(error)) from error
    rows, columns = 192, 256
    stack = quantize_stack(torch.randn(2, rows, columns, dtype=dtype), quantization)
    assert tuple(stack.read_expert(1).shape) == (rows, columns), "unpack() gives another shape than pack() took"
    said = stack.form.bytes(columns, rows, dtype)
    found = sum(part.nbytes for part in stack.list_tensors())
    assert said is None or 2 * said == found, f"bytes() says {said} for an expert and two have {found}"
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for wanted in (dtype, other):
        same = torch.equal(stack.read_expert(1, wanted), stack.read_expert(1).to(wanted))
        assert same, f"unpack_as() gives another weight in {wanted} than unpack()"
    again = copy.deepcopy(stack)
    assert torch.equal(dequantize_stack(again), dequantize_stack(stack)), "a copied expert has other weights"


def _check_dtypes(quantization: Quantization, dtype: torch.dtype) -> None:
    """Assert that a layer whose bias keeps its dtype takes activations of another dtype, as layers of a base must."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    told = with_compute_dtype(quantization, other)
    layer = told.quantize(nn.Linear(256, 64, dtype=dtype).requires_grad_(False)).train()
    try:
        output = layer(torch.ones(2, 256, dtype=other))
    except RuntimeError as error:
        raise AssertionError(f"a layer made from {dtype} does not take {other} activations: {error}") from error
    assert output.dtype == other, f"a layer made from {dtype} turns {other} activations into {output.dtype}"


def _make_fresh(make_model: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model().eval()


def _make_default_batch(base: Any) -> dict[str, torch.Tensor]:
    size = int(getattr(base.config, "vocab_size", 100))
    ids = torch.randint(0, size, (2, 8), generator=torch.Generator().manual_seed(0))
    return {name: ids for name in ("input_ids", "labels") if name in inspect.signature(base.forward).parameters}


def _list_names(plan: TargetPlan) -> list[str] | str:
    # The resolved names: the process's own host, which may not know the plugin, must not resolve them again.
    return list(plan.target_modules)


def _check_training(
    make_model: Callable[[], nn.Module], base: Any, inputs: dict[str, Any], lora: dict[str, Any], plan: TargetPlan
) -> None:
    model: Any = prepare_model(base, **{"r": 2, "lora_dropout": 0.0, **lora})
    dead = _find_without_gradient(model, inputs, "lora_B", plan.unreached)
    assert not dead, f"no gradient reaches {', '.join(dead[:3])}: the model does not call these layers"
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    dead = _find_without_gradient(model, inputs, "lora_A", plan.unreached)
    assert not dead, f"no gradient reaches {', '.join(dead[:3])} after a step"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again: Any = PeftModel.from_pretrained(_make_fresh(make_model), folder)
        trained, loaded = _compute_output(model, inputs), _compute_output(again.eval(), inputs)
        with model.disable_adapter():
            plain = _compute_output(model, inputs)
    assert torch.equal(trained, loaded), (
        "the reloaded adapter gives another output; does make_model() draw other weights?"
    )
    assert not torch.equal(trained, plain), "the trained adapter changes nothing about the output"


def _compute_output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    found = model(**inputs)
    output: torch.Tensor = found.logits if getattr(found, "logits", None) is not None else found[0]
    return output


def _find_without_gradient(model: Any, inputs: dict[str, Any], part: str, unreached: tuple[str, ...]) -> list[str]:
    """Run forward and backward; return the names of the adapters' tensors that got no gradient."""
    model.zero_grad()
    found = model(**inputs)
    loss = getattr(found, "loss", None)
    loss = loss if loss is not None else _compute_output(model, inputs).float().pow(2).mean()
    if loss.requires_grad:
        loss.backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if part in name
        and not set(unreached) & set(name.split("."))
        and (parameter.grad is None or not parameter.grad.any())
    ]
