"""Hubs that store adapters, and how one is chosen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.hubs.protocol import Hub

__all__ = ["VARIABLE", "open_hub"]

#: The registry that is meant where a call names none.
VARIABLE = "LORA_REGISTRY"


def open_hub(hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None) -> Hub:
    """The registry that is meant: ``hub``, else ``LORA_REGISTRY``, else the Hugging Face Hub.

    ``file:///srv/adapters`` and path objects are folders, ``https://…`` (or ``http://…``) is a hub that speaks the
    protocol of the Hugging Face Hub, and an object that has the methods of ``registry.hubs.protocol.Hub`` is itself.
    Any other text is refused: what happens to exist on disk decides nothing.

    Args:
        hub: Which registry.
        token: For a hub on the network; ``None`` is the one that the user logged in with, ``False`` none.

    Raises:
        InvalidReference: ``hub`` is none of these.
    """
    meant = os.environ.get(VARIABLE) or None if hub is None else hub
    if isinstance(meant, os.PathLike) or (isinstance(meant, str) and meant.startswith("file:")):
        from registry.hubs.folder import FolderHub

        return FolderHub(meant)
    if meant is None or (isinstance(meant, str) and meant.startswith(("http://", "https://"))):
        from registry.hubs.huggingface import HuggingFaceHub

        return HuggingFaceHub(meant, token)
    if isinstance(meant, str):
        from registry.errors import InvalidReference

        raise InvalidReference(
            f"{meant[:200]!r} is not a registry: give https://… or file:///… (a pathlib.Path is a folder, too), "
            f"as hub= or in {VARIABLE}"
        )
    return meant
