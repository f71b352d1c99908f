"""A decoder whose blocks hang under ``pond.waves`` and whose layers are called ask, seek, give, blend, rise, fall."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RippleConfig(PreTrainedConfig):
    """Sizes of a ripple.

    Attributes:
        vocab_size: Words.
        hidden_size: Width.
        waves: Blocks.
        heads: Parts of the width that attend on their own.
    """

    model_type = "ripple"

    vocab_size: int = 256
    hidden_size: int = 64
    waves: int = 4
    heads: int = 4


class Stir(nn.Module):
    """Attention to what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(width, width, bias=False)
        self.seek = nn.Linear(width, width, bias=False)
        self.give = nn.Linear(width, width, bias=False)
        self.blend = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return ``[batch, length, width]``."""
        batch, length, width = x.shape
        parts = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.ask, self.seek, self.give)
        )
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.blend(mixed.transpose(1, 2).reshape(batch, length, width))


class Wave(nn.Module):
    """One block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.calm = nn.LayerNorm(width)
        self.stir = Stir(width, heads)
        self.still = nn.LayerNorm(width)
        self.rise = nn.Linear(width, 4 * width)
        self.fall = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return ``[batch, length, width]``."""
        x = x + self.stir(self.calm(x))
        return x + self.fall(nn.functional.gelu(self.rise(self.still(x))))


class Pond(nn.Module):
    """Embedding and blocks."""

    def __init__(self, config: RippleConfig) -> None:
        super().__init__()
        self.drops = nn.Embedding(config.vocab_size, config.hidden_size)
        self.waves = nn.ModuleList([Wave(config.hidden_size, config.heads) for _ in range(config.waves)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Take ids ``[batch, length]``, return ``[batch, length, width]``."""
        x = self.drops(ids)
        for wave in self.waves:
            x = wave(x)
        return x


class RippleForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that the Trainer takes."""

    config_class = RippleConfig
    base_model_prefix = "pond"

    def __init__(self, config: RippleConfig) -> None:
        super().__init__(config)
        self.pond = Pond(config)
        self.shore = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of the ids."""
        return self.pond.drops

    def get_output_embeddings(self) -> nn.Linear:
        """The layer that gives the logits; PEFT and quantization leave it alone."""
        return self.shore

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> CausalLMOutput:
        """Take ids and labels ``[batch, length]``; the loss is that of the next word."""
        logits = self.shore(self.pond(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
