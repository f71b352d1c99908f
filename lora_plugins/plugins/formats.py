"""The record of a storage format: how a checkpoint comes quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Format", "FormatTraining"]


#: How adapters are trained on a base of a format.
FormatTraining = Literal["stored", "float", "untried", "no"]


@dataclass(frozen=True, slots=True)
class Format:
    """How checkpoints of one ``quant_method`` are stored, and what can be done with such a base.

    Attributes:
        method: ``quant_method`` in the checkpoint's ``config.json``, as transformers maps it.
        title: Name of the format as people write it.
        trains: ``"stored"``: adapters train over the stored weights, by the backends named in ``backends``.
            ``"float"``: transformers dequantizes the weights while loading, and adapters train over those; the method
            must be in its table of quantizers (`register_quantization_config` adds one), as it skips any other.
            ``"untried"``: PEFT has a layer for it that was never run here; such a base is refused unless the user
            names the format in ``allow_format``. ``"no"``: its layers pass no gradient; refused likewise.
        layers: The classes of its layers, each as top-level package and class name: ``"transformers.FP8Linear"``.
            A module of such a class, or of one derived from it, is never taken for float.
        backends: Names of the backends that own its layers.
        merges: How an adapter gets into such a base, or why it cannot.
        needs: Device, library and version that loading it needs.
        evidence: How all this is known: run in the tests, or read in the release of a library.
        reason: Why it is refused, a sentence without a full stop; also why a base that stays packed is refused where
            ``trains`` is ``"float"``.
        instead: What to load instead, a sentence without a full stop.
    """

    method: str
    title: str
    trains: FormatTraining
    layers: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    merges: str = ""
    needs: str = ""
    evidence: str = ""
    reason: str = ""
    instead: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise TypeError(f"Format.method must be a non-empty string, not {self.method!r}")
        if self.trains not in get_args(FormatTraining):
            known = ", ".join(map(repr, get_args(FormatTraining)))
            raise ValueError(f"Format({self.method!r}).trains must be one of {known}, not {self.trains!r}")
        for name in ("layers", "backends"):
            value = getattr(self, name)
            # A bare string would be read letter by letter.
            if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
                raise TypeError(f"Format({self.method!r}).{name} must be a tuple of names, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.trains == "stored" and not self.backends:
            raise ValueError(f"Format({self.method!r}) trains as stored, so it must name its backends")
        if self.trains in ("untried", "no") and not (self.reason and self.instead):
            raise ValueError(f"Format({self.method!r}) is refused, so it must say why and what to load instead")
