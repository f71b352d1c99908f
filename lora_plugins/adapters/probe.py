"""How far two models are apart: their logits on a text, compared token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

__all__ = ["PROBE_TEXT", "Distance", "compare_logits", "probe_logits"]


#: Everyday English with names, numbers and punctuation.
PROBE_TEXT = (
    "Summarize the chat dialogue:\nMia: Are we still meeting at 6:30?\nNoah: Sorry, the train is 20 minutes late. "
    "Can we say seven?\nMia: Fine, I'll order for both of us. The usual?\nNoah: Yes please!\n---\nSummary:\n"
    "Noah's train is late, so he and Mia meet at seven instead of half past six. Mia orders for both."
)

#: Tokens of the text that are looked at.
_LENGTH = 128


@dataclass(frozen=True)
class Distance:
    """The difference between the predictions of two models, over the tokens of a text.

    Attributes:
        divergence: Mean Kullback-Leibler divergence of the second's prediction from the first's, in nats a token.
        largest: Largest difference of a logit.
        relative: Norm of the difference of the logits over the norm of the first's, each centred.
        agreement: Share of tokens for which both have the same favourite.
        tokens: Tokens compared.
    """

    divergence: float
    largest: float
    relative: float
    agreement: float
    tokens: int

    def line(self) -> str:
        """The distance as a sentence."""
        return (
            f"logits differ by {self.relative:.2%} ({self.largest:.3f} at most), KL divergence {self.divergence:.2e} "
            f"nats a token, same favourite in {self.agreement:.1%} of {self.tokens} tokens"
        )


def probe_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return a model's logits on a text, float32 on the CPU, shape ``[tokens, vocabulary]``."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :_LENGTH]
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids.to(device)).logits[0]
    return logits.float().cpu()


def compare_logits(first: torch.Tensor, second: torch.Tensor) -> Distance:
    """Compare two models' logits on the same tokens, each of shape ``[tokens, vocabulary]``."""
    # A constant added to all logits of a token changes no prediction.
    a, b = (logits - logits.mean(-1, keepdim=True) for logits in (first, second))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return Distance(
        divergence=max(0.0, float(divergence)),
        largest=float((a - b).abs().max()),
        relative=float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)),
        agreement=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        tokens=len(a),
    )
