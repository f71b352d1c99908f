"""Read the shape of the images that a model takes as input."""

from __future__ import annotations

from typing import Any

__all__ = ["read_image_shape"]


def read_image_shape(config: Any) -> tuple[int, int, int]:
    """Return an image's channels, height and width in pixels; 3, 224 and 224 where the configuration has no value."""
    part = next((getattr(config, name) for name in ("vision_config", "encoder") if hasattr(config, name)), config)
    size = getattr(part, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(part, "num_channels", None) or 3, height, width
