"""Find layers whose input a model casts to the dtype of their weight."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import nn

from lora_plugins.models.wrapping import plain_path

__all__ = ["find_cast_inputs"]

#: ``hidden_states.to(self.wo.weight.dtype)``, as in T5 and its relatives; also by keyword or beside a device.
_CAST = re.compile(r"\.to\([^()]*?self\.([\w.]+)\.weight\.dtype\b")
#: ``self.wo.weight.dtype != torch.int8``, which keeps that cast away from layers of bitsandbytes.
_EXEMPT = re.compile(r"self\.([\w.]+)\.weight\.dtype\s*!=\s*torch\.(\w+)")


def find_cast_inputs(model: nn.Module) -> dict[str, frozenset[str]]:
    """Return the layers whose input is cast to the dtype of their weight, and the dtypes for which it is not.

    The dtype of a quantized weight may be that of its integers; the cast then destroys the activations and their
    gradient without an error. Read from the source of the modules around the layers, so that it holds for every type.

    Returns:
        Names of dtypes, such as ``int8``, by plain path of the layer.
    """
    found: dict[str, frozenset[str]] = {}
    for path, module in model.named_modules():
        prefix = plain_path(path)
        # TorchScript's modules have no forward of their own class, and a class may have any callable object as its own.
        forward = getattr(type(module), "forward", None)
        casts = _read_casts(forward) if inspect.isfunction(forward) else {}
        for child, exempt in casts.items():
            found[f"{prefix}.{child}" if prefix else child] = exempt
    return found


@functools.lru_cache(maxsize=4096)
def _read_casts(forward: Any) -> dict[str, frozenset[str]]:
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError, ValueError):
        return {}  # without source, as in a notebook that is gone
    exempt: dict[str, set[str]] = {}
    for child, dtype in _EXEMPT.findall(source):
        exempt.setdefault(child, set()).add(dtype)
    return {child: frozenset(exempt.get(child, ())) for child in _CAST.findall(source)}
