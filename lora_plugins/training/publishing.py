"""Publishing the adapter after a run: what ``--push`` says is checked before it begins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lora_plugins.errors import ArgumentsError

_REFERENCE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<version>[\w.+!-]+)")


@dataclass(frozen=True)
class Publication:
    """Where the adapter goes.

    Attributes:
        name: ``org/name`` in the registry.
        version: A version, or ``patch``, ``minor``, ``major`` after the newest.
    """

    name: str
    version: str

    @classmethod
    def of(cls, reference: str | None) -> Publication | None:
        """Read ``--push``, and make sure that the registry is there.

        Raises:
            ArgumentsError: It is not ``org/name@version``.
        """
        if reference is None:
            return None
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise ArgumentsError(f"--push must be org/name@1.2.0, @patch, @minor or @major, not {reference!r}")
        return cls(match["name"], match["version"])

    def push(self, model: Any) -> str:
        """Publish the model's adapter.

        Returns:
            A sentence for the terminal.
        """
        from registry import push_adapter

        release = push_adapter(model, self.name, version=self.version)
        return f"Published {self.name} as {getattr(release, 'version', self.version)}"
