"""The one check that an adapter fits a base model."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.base.choice import describe_base
from registry.base.fitting import Findings, fit_base
from registry.base.identity import Identity, compare_identity
from registry.base.peft_fields import read_peft_config
from registry.base.stored import StoredAdapter
from registry.base.target import Base
from registry.checks.table import enforce
from registry.errors import BaseMismatch, IdentityWarning
from registry.formats.records import BaseRecord

if TYPE_CHECKING:
    from registry.hubs.protocol import Hub

__all__ = ["CheckResult", "check_contract", "describe_record"]


@dataclass(frozen=True)
class CheckResult:
    """Result of a passed check.

    Attributes:
        tensors: Number of the adapter's tensors.
        identity: ``"verified"`` if the commit or tensors of the base were compared with those of the training base,
            ``"unverified"`` if only names, shapes and configuration were.
        compared: What was compared.
        not_compared: What could not be compared, with the reason.
        ignored: Configuration fields that another trainer wrote and that PEFT rightly ignores.
        copies: Tensors that repeat an embedding or a head of the base, and are not needed.
    """

    tensors: int
    identity: str
    compared: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = "the base is the one it was trained on" if self.identity == "verified" else "identity not verified"
        return f"compatible, {told}: {self.tensors} tensors"

    @property
    def details(self) -> str:
        """What was compared and what could not be, as one line."""
        parts = [f"compared: {', '.join(self.compared)}" if self.compared else ""]
        parts += [f"not compared: {', '.join(self.not_compared)}" if self.not_compared else ""]
        parts += [f"fields that PEFT ignores: {', '.join(self.ignored)}" if self.ignored else ""]
        return "; ".join(part for part in parts if part)


def check_contract(
    source: Any,
    base: Any,
    *,
    base_hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    warn: bool = False,
) -> CheckResult:
    """Check that an adapter belongs to a base model, before any weight is loaded.

    Everything that puts a release or a plain adapter folder on a model runs this check: ``load``, ``check``,
    ``LoraCallback(adapter=)``, ``prepare_model(adapter=)``, merging and planning.

    It compares the names and shapes of all tensors with those that PEFT creates for the configuration on this base;
    configuration fields that change the computation; the vocabulary; embedding rows that the adapter carries; and the
    base itself: configuration, commit, and tensors that no adapter changes. For a plain folder without a manifest, the
    result says what was not recorded.

    Args:
        source: A pulled `Adapter`, or an adapter folder.
        base: A model in memory (quantized or not, with adapters or not), a folder (a path, or a string that begins with
            ``/``, ``.`` or ``~``), a transformers configuration, or an id on a hub, optionally with ``@revision``.
        base_hub: The hub of the base models; the Hugging Face Hub by default.
        token: Token for that hub.
        warn: Whether to warn if the base of a release fits but cannot be distinguished from others of its shape.

    Raises:
        BaseMismatch: It was trained on another base, or does not fit this one; the error lists all differences.
        InvalidAdapter: Its tensors are not those of a LoRA adapter.
        IntegrityError: Manifest and configuration of a release do not agree.
        UnsafeFile: A file is malformed.
        UnknownBase: ``base`` is not a base model.
        HubError: The hub does not provide the base.
    """
    adapter = StoredAdapter.read(source)
    hub = os.fspath(base_hub) if isinstance(base_hub, os.PathLike) else base_hub
    result = _check(adapter, describe_base(base, adapter, hub, token), hub, token)
    if warn and adapter.manifest is not None and result.identity != "verified":
        warnings.warn(
            f"{adapter.title} fits this base by names, shapes and configuration; whether it is the one it was trained "
            f"on ({adapter.base.id or 'known by fingerprint'}) could not be verified: {result.details}",
            IdentityWarning,
            stacklevel=3,
        )
    return result


def _check(adapter: StoredAdapter, base: Base, hub: Any, token: str | bool | None) -> CheckResult:
    enforce(adapter.files, "load", ("files", "configuration", "manifest", "header"))
    _, ignored = read_peft_config(adapter)
    identity = compare_identity(adapter.base, base, hub, token)
    _, findings = fit_base(adapter, base.candidates(), base)
    problems = [*findings.problems, identity.configuration]
    # Differing weights say nothing more if shapes or configuration differ already.
    if not any(problems):
        problems.append(identity.weights)
    told = [problem for problem in problems if problem]
    if told:
        mismatch = BaseMismatch(_describe_mismatch(adapter, base, told))
        mismatch.rename = findings.rename
        raise mismatch
    return _make_result(adapter, identity, findings, ignored)


def _make_result(
    adapter: StoredAdapter, identity: Identity, findings: Findings, ignored: tuple[str, ...]
) -> CheckResult:
    return CheckResult(
        len(adapter.tensors),
        "verified" if identity.verified else "unverified",
        ("names and shapes", *identity.compared),
        (*identity.not_compared, *findings.not_compared),
        ignored,
        tuple(findings.copies),
    )


def _describe_mismatch(adapter: StoredAdapter, base: Base, problems: list[str]) -> str:
    trained = describe_record(adapter.base, adapter.class_name)
    return (
        f"{adapter.title} was trained on {trained} and does not fit {base.title}: {'; '.join(problems)}. Nothing was "
        "loaded."
    )


def describe_record(base: BaseRecord, class_name: str | None) -> str:
    """Return a description of the base that an adapter was trained on."""
    at = f" at commit {base.commit[:12]}" if base.commit else ""
    kind = f" ({class_name})" if class_name else ""
    unnamed = "a base known by its fingerprint" if base.fingerprint else "a base that is not recorded"
    return f"{base.id or unnamed}{at}{kind}"
