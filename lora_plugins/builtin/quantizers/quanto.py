"""The optimum-quanto backends: ``int8-quanto`` and ``int4-quanto``."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_plugins import Quantizer, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Int4Quanto", "Int8Quanto", "Quanto", "register_quantizers", "wait_for_build"]


#: Seconds without any change after which a build counts as dead.
_BUILD_IS_DEAD = 300.0


class Quanto(Quantizer):
    """Weights as optimum-quanto's tensors in its linear layer; activations stay in float.

    Options: ``compute_dtype``, the dtype of the matrix products, by default that of the activations.

    Attributes:
        kind: optimum-quanto's name for the type of the weights.
        loaded_kind: transformers' name for it.
    """

    kind: str
    loaded_kind: str
    requires = ("optimum-quanto>=0.2.7",)
    options = ("compute_dtype",)
    # DoRA reads the float weight, which PEFT 0.21.2 cannot get from these tensors.
    unsupported = ("use_dora",)
    # Engines that replace the data of parameters, as DeepSpeed 0.19 does, cannot handle tensor subclasses.
    engines = ("ddp", "fsdp2")

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        import torch

        from lora_plugins.builtin.quantizers.quanto_layer import QuantoLinear

        dtype = options.get("compute_dtype") or linear.weight.dtype
        layer = QuantoLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            dtype=dtype,
            device="meta",
            weights=self.kind,
        )
        linear.to(dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.input_scale = torch.ones_like(layer.input_scale, device=linear.weight.device)
        layer.output_scale = torch.ones_like(layer.output_scale, device=linear.weight.device)
        layer.freeze()
        return layer

    def owns(self, module: Any) -> bool:
        # A model can only hold these layers once somebody has imported optimum.quanto.
        layer = getattr(sys.modules.get("optimum.quanto"), "QLinear", None)
        return layer is not None and isinstance(module, layer) and module.frozen and self._is_ours(module.weight_qtype)

    def _is_ours(self, kind: Any) -> bool:
        return kind is not None and kind.name == self.kind

    def dequantize(self, module: Any) -> torch.Tensor:
        return module.weight.dequantize().detach()

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        found = self.parts(in_features, out_features)
        if found is None:
            return None
        # Beside the scales of the weight there are those of input and output, which stay at one.
        packed, numbers = found
        return packed + (numbers + 2) * int((options.get("compute_dtype") or dtype).itemsize)

    @abstractmethod
    def parts(self, in_features: int, out_features: int) -> tuple[int, int] | None:
        """Return the bytes of a packed weight and its number of scales and shifts; ``None`` if unknown."""

    def load_config(self, options: Mapping[str, Any]) -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=self.loaded_kind, modules_to_not_convert=options.get("skip_modules"))

    def reads(self, config: Any) -> bool:
        return getattr(config, "weights", None) == f"int{self.bits}"

    def loaded_options(self, config: Any) -> Mapping[str, Any] | None:
        if not hasattr(config, "weights"):
            return None
        skip = getattr(config, "modules_to_not_convert", None)
        return {"skip_modules": skip} if skip else {}

    def after_quantize(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        from optimum.quanto import QLinear

        from lora_plugins.builtin.quantizers.quanto_layer import QuantoLinear

        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is QLinear:
                    setattr(module, name, QuantoLinear.around(child))


class Int8Quanto(Quanto):
    """One int8 weight per value with a scale per output row."""

    name = "int8-quanto"
    bits = 8
    kind, loaded_kind = "qint8", "int8"

    def parts(self, in_features: int, out_features: int) -> tuple[int, int] | None:
        return in_features * out_features, out_features

    def unsuitable(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> str | None:
        # torch 2.13's bfloat16 kernel on CPUs reads whole vectors of 16 weights, past the end into other memory, NaN or
        # unmapped. A single output feature has no scale per row, which the kernel does not expect either.
        if in_features % 16:
            return f"{in_features} input features are not a multiple of 16, as its bfloat16 kernel needs"
        if out_features == 1:
            return "a single output feature, which its bfloat16 kernel cannot take"
        return None


class Int4Quanto(Quanto):
    """4 bits a weight in groups of up to 128 that divide the rows, with a scale and a shift each.

    At its first use in an installation optimum-quanto compiles a C++ extension, which takes a minute or two.
    """

    name = "int4-quanto"
    bits = 4
    kind, loaded_kind = "qint4", "int4"

    def parts(self, in_features: int, out_features: int) -> tuple[int, int] | None:
        size = next((size for size in (128, 96, 64, 32) if in_features % size == 0), None)
        if size is None:
            return None
        groups = in_features // size * out_features
        return -(-groups // 2) * size, 2 * groups

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return _explain_not_compiled() if device.type == "cpu" else None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        if linear.weight.device.type == "cpu":
            _compile()
        return super().quantize_linear(linear, options)


def _build_folder() -> Path:
    """Return the folder of optimum-quanto's compiled extension."""
    spec = importlib.util.find_spec("optimum.quanto")
    assert spec is not None, "only asked where optimum-quanto is installed"  # noqa: S101 - narrows a type
    assert spec.origin is not None, "optimum.quanto is a package with an __init__"  # noqa: S101 - narrows a type
    return Path(spec.origin).parent / "library" / "extensions" / "cpp" / "build"


def _explain_not_compiled() -> str | None:
    """Return why the extension cannot be compiled here, ``None`` if it can or already is."""
    folder = _build_folder()
    if any(folder.glob("quanto_cpp*.so")):
        return None
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return (
            f"optimum-quanto compiles a C++ extension at its first use on a CPU and the compiler {compiler!r} is not "
            "installed; install one, for example with `apt-get install g++`, or name another in CXX"
        )
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return (
            "optimum-quanto compiles a C++ extension at its first use on a CPU and needs the program ninja for it; "
            "run `pip install ninja`"
        )
    return None


@functools.lru_cache(maxsize=1)
def _compile() -> None:
    """Compile optimum-quanto's extension, or load it if it is compiled already."""
    import optimum.quanto  # noqa: F401 - registers the operator
    import torch

    wait_for_build(_build_folder())
    path = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        # ninja comes with optimum-quanto, but the environment may not be activated.
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, path])
    try:
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8), 4)
    finally:
        os.environ["PATH"] = path


def wait_for_build(folder: Path, patience: float = _BUILD_IS_DEAD) -> None:
    """Wait while another process compiles, and remove the lock of a process that was killed.

    torch 2.13 waits for such a lock forever: https://github.com/pytorch/pytorch/issues/189245

    Args:
        folder: Where the extension is compiled.
        patience: Seconds without any change in the folder after which the build counts as dead.
    """
    lock = folder / "lock"
    while lock.exists():
        changed = max(_read_change_time(path) for path in (folder, *folder.iterdir()))
        if time.time() - changed > patience:
            lock.unlink(missing_ok=True)
            return
        time.sleep(0.5)


def _read_change_time(path: Path) -> float:
    """Return when a file was last written, 0 for one that has disappeared."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@hookimpl
def register_quantizers() -> list[Quantizer]:
    return [Int8Quanto(), Int4Quanto()]
