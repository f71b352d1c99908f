"""Hubs that store adapters, and how to choose one."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from registry.errors import InvalidReference
from registry.formats.references import expand_path, is_path
from registry.hubs.objects import ObjectHub

if TYPE_CHECKING:
    from registry.hubs.protocol import Hub

__all__ = ["VARIABLE", "open_hub"]

#: Environment variable that names the registry for calls without ``hub=``.
VARIABLE = "LORA_REGISTRY"
#: ``.hidden`` and ``~somebody`` are more likely mistyped than meant.
_NAME = re.compile(r"(?:\.(?!\.?$)|~[^/\\])[^/\\]*$")


def open_hub(hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None) -> Hub:
    """Open a registry: ``hub``, else ``LORA_REGISTRY``, else the Hugging Face Hub.

    ``file:///srv/adapters`` and what is visibly a path (`registry.is_path`: a path object, ``/srv/adapters``,
    ``./adapters``, ``../adapters``, ``~/adapters``) are folders, ``https://…`` (or ``http://…``) is a hub that speaks
    the protocol of the Hugging Face Hub, ``s3://bucket/prefix`` is an object store, and an object with the methods of
    ``registry.hubs.protocol.Hub`` is returned as it is. Any other string is refused, whatever exists on disk:
    ``adapters`` may be meant as an organization.

    Args:
        hub: The registry.
        token: Token for a hub on the network; ``None`` is the one that the user logged in with, ``False`` is none.

    Raises:
        InvalidReference: ``hub`` is none of these.
        MachineError: The home folder in it is not known.
        ObjectStoreNotInstalled: The package for object stores is not installed.
    """
    meant = os.environ.get(VARIABLE) or None if hub is None else hub
    if isinstance(meant, str) and is_path(meant) and _NAME.match(meant) is None:
        meant = expand_path(meant)
    if isinstance(meant, os.PathLike) or (isinstance(meant, str) and meant.startswith("file:")):
        from registry.hubs.folder import FolderHub

        return FolderHub(meant)
    if isinstance(meant, str) and meant.startswith("s3:"):
        return ObjectHub(meant)
    if meant is None or (isinstance(meant, str) and meant.startswith(("http://", "https://"))):
        from registry.hubs.huggingface import HuggingFaceHub

        return HuggingFaceHub(meant, token)
    if isinstance(meant, str):
        hint = f". Did you mean the folder './{meant[:200]}'?" if os.path.isdir(meant) else ""
        raise InvalidReference(
            f"{meant[:200]!r} is not a registry: give https://…, s3://…, or a folder as file:///…, /… or ./…, "
            f"with hub= or in {VARIABLE}{hint}"
        )
    return meant
