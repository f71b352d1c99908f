"""Versioned, verified LoRA adapters on the Hugging Face Hub or in a plain folder.

Importing this package loads neither torch nor huggingface_hub; what needs them is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.adapter import Adapter as Adapter
    from registry.callback import PushToRegistryCallback as PushToRegistryCallback
    from registry.cleanup import Garbage as Garbage
    from registry.cleanup import collect_garbage as collect_garbage
    from registry.diff import compare_adapters as compare_adapters
    from registry.hubs import open_hub as open_hub
    from registry.hubs.folder import FolderHub as FolderHub
    from registry.hubs.protocol import Hub as Hub
    from registry.hubs.remote import HuggingFaceHub as HuggingFaceHub
    from registry.listing import list_adapters as list_adapters
    from registry.listing import show as show
    from registry.listing import versions as versions
    from registry.manifest import Manifest as Manifest
    from registry.mirroring import mirror as mirror
    from registry.naming import aliases as aliases
    from registry.naming import remove_alias as remove_alias
    from registry.naming import set_alias as set_alias
    from registry.publish import Published as Published
    from registry.pull import lock_adapters as lock_adapters
    from registry.pull import pull_adapter as pull_adapter
    from registry.push import check_push as check_push
    from registry.push import push_adapter as push_adapter
    from registry.references import Reference as Reference
    from registry.releases import Release as Release
    from registry.verification import Verification as Verification
    from registry.verification import verify as verify
    from registry.withdrawal import unyank as unyank
    from registry.withdrawal import yank as yank

_LAZY = {
    "Adapter": "registry.adapter",
    "FolderHub": "registry.hubs.folder",
    "Garbage": "registry.cleanup",
    "Hub": "registry.hubs.protocol",
    "HuggingFaceHub": "registry.hubs.remote",
    "Manifest": "registry.manifest",
    "Published": "registry.publish",
    "PushToRegistryCallback": "registry.callback",
    "Reference": "registry.references",
    "Release": "registry.releases",
    "Verification": "registry.verification",
    "aliases": "registry.naming",
    "check_push": "registry.push",
    "collect_garbage": "registry.cleanup",
    "compare_adapters": "registry.diff",
    "list_adapters": "registry.listing",
    "lock_adapters": "registry.pull",
    "mirror": "registry.mirroring",
    "open_hub": "registry.hubs",
    "pull_adapter": "registry.pull",
    "push_adapter": "registry.push",
    "remove_alias": "registry.naming",
    "set_alias": "registry.naming",
    "show": "registry.listing",
    "unyank": "registry.withdrawal",
    "verify": "registry.verification",
    "versions": "registry.listing",
    "yank": "registry.withdrawal",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'registry' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
