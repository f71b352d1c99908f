"""Which value of a metric is better."""

from __future__ import annotations

import re

from registry.errors import InvalidReference

__all__ = ["find_direction"]

#: Words in the names of metrics of which the lower, or the higher value is better.
_LOWER = frozenset({
    "bpb", "brier", "cer", "ece", "entropy", "err", "error", "fid", "latency", "loss", "mae", "mape", "mse", "nll",
    "perplexity", "ppl", "rmse", "ter", "toxicity", "wer",
})  # fmt: skip
_HIGHER = frozenset({
    "acc", "accuracies", "accuracy", "auc", "auroc", "bleu", "chrf", "comet", "correlation", "dice", "em", "exact",
    "f1", "iou", "map", "margins", "match", "matthews", "mcc", "meteor", "mrr", "ndcg", "pass", "pearson", "pearsonr",
    "precision", "r2", "recall", "reward", "rewards", "roc", "rouge", "rouge1", "rouge2", "rougel", "rougelsum",
    "sacrebleu", "spearman", "spearmanr", "winrate",
})  # fmt: skip


def find_direction(metric: str, better: str | None = None) -> str:
    """Return whether the ``"lower"`` or the ``"higher"`` value of a metric is better.

    Raises:
        InvalidReference: Its name does not say so, and ``better`` is not given.
    """
    if better is not None:
        if better not in ("lower", "higher"):
            raise InvalidReference(f"better={better!r} is not valid: it must be 'lower' or 'higher'")
        return better
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    lower, higher = words & _LOWER, words & _HIGHER
    if bool(lower) == bool(higher):
        raise InvalidReference(
            f"Whether a lower or a higher {metric!r} is better does not follow from its name: say better='lower' or "
            "better='higher' (--better)"
        )
    return "lower" if lower else "higher"
