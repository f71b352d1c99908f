"""What transformers finds on a model that was quantized by a backend it does not know."""

from __future__ import annotations

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class QuantizedInPlace(HfQuantizer):  # type: ignore[misc]
    """A quantizer that has done its work: the model can be trained under adapters, and not be saved as it is.

    transformers would write such a base without complaint and read it back with new random weights.
    """

    def __init__(self, name: str) -> None:
        super().__init__(QuantizationConfigMixin(quant_method=name), pre_quantized=False)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
