"""Publish the adapter after a run; ``--push`` is checked before it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_plugins.errors import ArgumentsError
from registry import check_push, push_adapter

__all__ = ["Publication"]


_REFERENCE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<version>[\w.+!-]+)")


@dataclass(frozen=True)
class Publication:
    """Name and version under which the adapter is published.

    Attributes:
        name: ``org/name`` in the registry.
        version: A version, or ``patch``, ``minor`` or ``major`` to increment the newest.
        base_model: Id of the base model on the Hub, where it was loaded from a folder.
    """

    name: str
    version: str
    base_model: str | None = None

    @classmethod
    def of(cls, reference: str | None, base_model: str | None = None) -> Publication | None:
        """Read ``--push`` and ``--push_base_model``.

        Raises:
            ArgumentsError: It is not ``org/name@version``.
        """
        if reference is None:
            return None
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise ArgumentsError(f"--push must be org/name@1.2.0, @patch, @minor or @major, not {reference!r}")
        return cls(match["name"], match["version"], base_model)

    def check(self, model: Any) -> None:
        """Check before the training that the adapter can be published after it.

        Raises:
            RegistryError: The version or the base model cannot be published.
        """
        check_push(model, self.name, version=self.version, base_model=self.base_model)

    def push(self, trainer: Any, adapter: Path, quantization: str | dict[str, Any] | None) -> str:
        """Publish the adapter of a Trainer that has finished.

        Args:
            trainer: The Trainer.
            adapter: Folder of the saved adapter, which is published if no process holds the whole model.
            quantization: Backend of the base, by name or with its options.

        Returns:
            A sentence for the terminal.
        """
        spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        facts = {} if quantization is None else {"quantization": quantization}
        release = push_adapter(
            adapter if spread else trainer,
            self.name,
            version=self.version,
            base_model=self.base_model,
            training=facts,
        )
        return f"Published {release} ({release.commit[:12]})"
