"""Where the keys of an adapter differ from those of a base only by a prefix: which rename would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["rename_hint"]


def rename_hint(
    extra: Sequence[str],
    missing: Sequence[str],
    stored: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> str | None:
    """Say which prefix to replace so that all stored tensors find a place of their shape; ``None`` if none would.

    Args:
        extra: Stored tensors without a place.
        missing: Places without a tensor.
        stored: Shapes of the stored tensors.
        expected: Shapes of the places.
    """
    if not extra or len(extra) != len(missing):
        return None
    candidates = sorted({_prefixes(extra[0], place) for place in missing}, key=lambda pair: len(pair[0] + pair[1]))
    free = set(missing)
    for old, new in candidates:
        renamed = {name: new + name.removeprefix(old) for name in extra if name.startswith(old)}
        fits = all(expected.get(to) == stored[name] for name, to in renamed.items())
        if len(renamed) == len(extra) and fits and set(renamed.values()) == free:
            return f"only a prefix differs: rename {old!r} to {new!r} in its keys and all {len(extra)} find their place"
    return None


def _prefixes(name: str, place: str) -> tuple[str, str]:
    """What is left of two names without their common end, cut at dots."""
    one, other = name.split("."), place.split(".")
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return ".".join(one[: len(one) - same]), ".".join(other[: len(other) - same])
