"""A pulled adapter, checked against a base model before it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import BaseMismatch, UnknownBase
from registry.formats.adapter_config import AdapterConfig
from registry.formats.manifest import Manifest
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.references import Reference, expand_path, is_path
from registry.text import html_table

if TYPE_CHECKING:
    from peft import PeftModel

    from registry.base.contract import CheckResult
    from registry.hubs.protocol import Hub

__all__ = ["Adapter"]


@dataclass(frozen=True, repr=False)
class Adapter(os.PathLike[str]):
    """A release of an adapter, or an unversioned adapter, verified and on this machine.

    It can be used wherever an adapter folder can: ``PeftModel.from_pretrained(base, adapter)``.

    Attributes:
        name: ``org/name``.
        commit: The commit that holds the release.
        manifest: Its manifest.
        path: The folder, as a string for functions that do not accept path objects.
        folder: Where an unversioned adapter is in its repository; empty at the top, where every release is.
    """

    name: str
    commit: str
    manifest: Manifest
    path: str
    folder: str = ""

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        if self.unversioned:
            return str(Reference(self.name, commit=self.commit, folder=self.folder))
        return f"{self.name}@{self.version}"

    def __repr__(self) -> str:
        return f"<Adapter {self} in {self.path}>"

    def _repr_html_(self) -> str:
        return html_table(str(self), (("folder", self.path), ("commit", self.commit), *self.manifest.list_facts()))

    @property
    def version(self) -> str:
        """The version of the release; ``0+g<commit>`` for an unversioned adapter."""
        return self.manifest.version

    @property
    def unversioned(self) -> bool:
        """Whether nobody published it as a version; the identity of its base is then not recorded."""
        return self.manifest.unversioned

    @property
    def config(self) -> AdapterConfig:
        """Its configuration, read from the folder on each access."""
        return AdapterConfig.parse(Path(self.path, ADAPTER_CONFIG).read_bytes())

    def check(self, base: Any, *, base_hub: Hub | str | None = None, token: str | bool | None = None) -> CheckResult:
        """Compare the adapter with a base model without loading weights. See `registry.check_contract`.

        Args:
            base: A model in memory, a folder (a path, or a string that begins with ``/``, ``.`` or ``~``), a
                transformers configuration, or an id on a hub, with ``@revision`` if it is not the manifest's commit.
            base_hub: The hub of the base models; the Hugging Face Hub by default.
            token: Token for that hub.

        Raises:
            BaseMismatch: It was trained on another base; the error lists all differences.
        """
        from registry.base.contract import check_contract

        return check_contract(self, base, base_hub=base_hub, token=token)

    def load(
        self,
        base: Any = None,
        *,
        is_trainable: bool = False,
        adapter_name: str = "default",
        base_token: str | bool | None = None,
        trust_identity: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the adapter onto its base model, after `check`.

        Args:
            base: A model in memory, or a folder or id to load one from. By default the base of the manifest, at its
                commit.
            is_trainable: Whether the adapter will be trained further.
            adapter_name: Name of the adapter in the model.
            base_token: Token for a private or gated base.
            trust_identity: Don't warn if the base cannot be distinguished from others of its shape.
            **kwargs: For ``from_pretrained`` of the base's class: ``dtype``, ``device_map``, ``quantization_config``,
                ``cache_dir``, ``local_files_only``, …

        Raises:
            UnknownBase: The manifest names no base, and none was given.
            BaseMismatch: It was trained on another base.
        """
        from peft import PeftConfig, PeftModel
        from safetensors.torch import load_file
        from torch import nn

        from registry.base.contract import check_contract
        from registry.base.places import shorten_tables
        from registry.base.restoring import put_back

        if isinstance(base, nn.Module):
            if kwargs:
                raise TypeError(f"{', '.join(kwargs)}: for loading the base, and a loaded one was given")
            model = base
        else:
            model = self._load_base(base, base_token, kwargs)
        result = check_contract(self, model, token=base_token, warn=not trust_identity)
        self._check_alias(base, model, result)
        config = PeftConfig.from_pretrained(self.path)
        with shorten_tables(config, model):
            loaded = PeftModel.from_pretrained(model, self.path, adapter_name, is_trainable, config)
        put_back(loaded, load_file(Path(self.path, ADAPTER_WEIGHTS)), adapter_name)
        return loaded

    def _load_base(self, base: Any, token: str | bool | None, kwargs: dict[str, Any]) -> Any:
        """Load the base model from a folder or a hub, at the commit of the manifest, with the adapter's vocabulary."""
        from registry.base.choice import find_candidates
        from registry.base.classes import rows_of_embedding
        from registry.base.fitting import choose_candidate
        from registry.base.stored import StoredAdapter

        place, config, told = self._find_config(base, token, kwargs)
        stored = StoredAdapter.read(self)
        chosen = choose_candidate(stored, find_candidates(config, stored))
        if chosen.config is not None and chosen.config.num_labels != config.num_labels:
            # The adapter brings its own head; the base's has another number of labels.
            kwargs = {"ignore_mismatched_sizes": True, **kwargs}
        model = chosen.model_class.from_pretrained(place, config=chosen.config, **{**told, **kwargs})
        rows = rows_of_embedding(model)
        wanted = max(stored.vocabulary or 0, stored.config.trained_tokens)
        if rows is not None and (rows < wanted or (stored.carries_vocabulary and rows != wanted)):
            # The adapter brings the values of the added rows.
            model.resize_token_embeddings(wanted, mean_resizing=False)
        return model

    def _check_alias(self, base: Any, model: Any, result: CheckResult) -> None:
        """Check that a base found under another id than the recorded one is verified.

        Raises:
            BaseMismatch: It cannot be verified.
        """
        found = getattr(getattr(model, "config", None), "_name_or_path", None)
        if base is None and found != self.manifest.base.id and result.identity != "verified":
            raise BaseMismatch(
                f"The base {self.manifest.base.id} of {self} is gone, and whether {found} is the same cannot be "
                f"verified ({result.details}). Give it, if you trust it: adapter.load({found!r})"
            )

    def _find_config(
        self, base: Any, token: str | bool | None, kwargs: Mapping[str, Any]
    ) -> tuple[str, Any, dict[str, Any]]:
        """Return the base's location, its configuration, and the arguments it was loaded with.

        Raises:
            UnknownBase: It is neither at its location nor under one of the manifest's aliases.
        """
        from transformers import AutoConfig

        reason = ""
        for place, revision in self._list_places(base):
            # trust_remote_code is the caller's decision; a manifest cannot set it.
            told = {"revision": revision, "token": token, **{k: kwargs[k] for k in _CONFIG_TOO if k in kwargs}}
            told = {key: value for key, value in told.items() if value is not None}
            try:
                return place, AutoConfig.from_pretrained(place, **told), told
            except (OSError, ValueError) as error:
                reason = reason or f"{place}: {' '.join(str(error).split())[:300]}"
        raise UnknownBase(
            f"The base model of {self} cannot be loaded ({reason}). If it was moved or renamed, say where it is now: "
            'adapter.load("org/name"), or a folder; its configuration and weights are compared with those recorded.'
        )

    def _list_places(self, base: Any) -> list[tuple[str, str | None]]:
        """Return the locations to try for the base: the caller's or the manifest's, then the manifest's aliases."""
        others = self.manifest.base.aliases or () if base is None else ()
        return [self._find_place(base), *((name, None) for name in others)]

    def _find_place(self, base: Any) -> tuple[str, str | None]:
        recorded = self.manifest.base
        if base is None:
            if recorded.id is None:
                known = "not recorded" if recorded.fingerprint is None else "known by its fingerprint only"
                raise UnknownBase(
                    f"{self} was trained on a model that is {known}, so it cannot be loaded from "
                    "anywhere: give it, adapter.load(model) or adapter.load('/folder/of/the/base')"
                )
            return recorded.id, recorded.commit or self._find_revision()
        text = os.fspath(base)
        if is_path(base):
            return str(expand_path(text)), None
        name, _, revision = text.partition("@")
        return name, revision or (recorded.commit if name == recorded.id else None)

    def _find_revision(self) -> str | None:
        """Return the branch of the base that the configuration of an unversioned adapter names."""
        revision = self.config.fields.get("revision") if self.unversioned else None
        return revision if isinstance(revision, str) else None


#: Arguments of ``from_pretrained`` that loading the configuration needs too.
_CONFIG_TOO = ("cache_dir", "local_files_only", "trust_remote_code", "subfolder", "proxies")
