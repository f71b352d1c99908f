"""The base model that a check is made against, in whatever form it is given."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.base.contract import CheckResult, check
from registry.base.files import BaseFiles, LiveTensors
from registry.base.fingerprint import TensorSource, config_values
from registry.errors import CommitNotFound, UnknownBase
from registry.formats.adapter_config import AdapterConfig
from registry.formats.fields import COMMIT
from registry.formats.manifest import BASE_ID, Manifest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from registry.hubs.protocol import Hub

__all__ = ["Base", "described", "is_folder"]


@dataclass(frozen=True)
class Base:
    """A base model to check against.

    Attributes:
        title: What messages call it.
        empty: The model without weights.
        values: Its configuration, the part that defines the computation.
        tensors: Where single tensors can be read, if they can.
    """

    title: str
    empty: nn.Module
    values: Mapping[str, object]
    tensors: TensorSource | None

    def check(self, manifest: Manifest, config: AdapterConfig) -> CheckResult:
        """See `registry.base.contract.check`."""
        return check(manifest, config, self.empty, self.values, self.tensors, title=self.title)


def is_folder(base: object) -> bool:
    """Whether a folder is meant: what exists on disk decides nothing."""
    if isinstance(base, str):
        return os.path.isabs(base) or base.startswith((".", "~"))
    return isinstance(base, os.PathLike)


def described(base: Any, manifest: Manifest, hub: Hub | str | None, token: str | bool | None) -> Base:
    """What has to be known of a base, given as model, folder, configuration or id.

    Raises:
        UnknownBase: It is none of these.
        HubError: The hub doesn't give it.
    """
    from torch import nn

    if isinstance(base, nn.Module):
        return _live(base)
    if is_folder(base):
        folder = Path(os.fspath(base)).expanduser()
        if not folder.is_dir():
            raise UnknownBase(f"There is no folder {folder}")
        return _files(BaseFiles.in_folder(folder), f"the model in {folder}", manifest)
    if isinstance(base, str):
        return _on_hub(base, manifest, hub, token)
    if hasattr(base, "to_dict"):
        return Base(
            f"a {base.model_type} of this configuration", _empty(copy.deepcopy(base), manifest), _values(base), None
        )
    raise UnknownBase(f"{base!r} is no base model: give a model, a folder, a configuration or an id")


def _live(model: nn.Module) -> Base:
    from registry.base.skeleton import skeleton

    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    title = f"this {type(model).__name__}" + (f" ({name})" if name else "")
    return Base(title, skeleton(model), _values(config), LiveTensors(model))


def _on_hub(text: str, manifest: Manifest, hub: Hub | str | None, token: str | bool | None) -> Base:
    from registry.hubs import open_hub
    from registry.hubs.huggingface import HuggingFaceHub

    name, _, revision = text.partition("@")
    if BASE_ID.fullmatch(name) is None:
        raise UnknownBase(f"{text!r} is no base model: give an id such as org/base, or a folder as path object")
    # LORA_REGISTRY says where adapters are, not where base models are.
    where: Hub = HuggingFaceHub(token=token) if hub is None else open_hub(hub, token)
    recorded = manifest.base.commit if name == manifest.base.id else None
    commit = _commit(where, name, revision or recorded or "main")
    return _files(BaseFiles.on_hub(where, name, commit), f"{name} at commit {commit[:12]}", manifest)


def _commit(hub: Hub, name: str, revision: str) -> str:
    if COMMIT.fullmatch(revision):
        return revision
    refs = hub.refs(name)
    commit = refs.branches.get(revision) or refs.tags.get(revision)
    if commit is None:
        raise CommitNotFound(f"{name} has no branch or tag {revision!r}")
    return commit


def _files(files: BaseFiles, title: str, manifest: Manifest) -> Base:
    config = files.config()
    return Base(title, _empty(config, manifest), _values(config), files)


def _empty(config: PretrainedConfig, manifest: Manifest) -> nn.Module:
    from registry.base.classes import empty_model

    kind = manifest.architecture
    task = manifest.config.get("task_type")
    if kind.num_labels is not None and task in ("SEQ_CLS", "TOKEN_CLS"):
        # The head comes with the adapter.
        config.num_labels = kind.num_labels
    return empty_model(config, kind.class_name, task if isinstance(task, str) else None)


def _values(config: Any) -> Mapping[str, object]:
    return config_values(config.to_dict()) if hasattr(config, "to_dict") else {}
