"""Checks of an adapter's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from registry.checks.adapter_files import AdapterFiles
from registry.checks.peft_fields import read_known_fields, read_peft_version
from registry.checks.record import Check, Finding
from registry.errors import BaseMismatch, IntegrityError, InvalidAdapter, RegistryError, UnsafeFile
from registry.formats.adapter_config import AdapterConfig
from registry.formats.agreement import check_agreement
from registry.formats.fields import COMMIT
from registry.formats.manifest import BASE_ID, Manifest
from registry.formats.paths import ADAPTER_CONFIG

__all__ = ["CHECKS", "LOST_INITIALIZATION", "UNKNOWN_FIELDS", "changes_base", "describe_lost", "list_unknown"]

#: Fields of early PEFT releases that changed the computation; no later release knows them.
_REMOVED = ("enable_lora",)
#: Values of ``init_lora_weights`` that do not change the base.
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")
#: Values that change the base's weights, and that PEFT repeats with the same result when it loads the adapter.
_REPEATED = ("pissa", "olora")
_CHANGING = (*_REPEATED, "pissa_niter_", "corda", "lora_ga", "loftq")
#: Scalings by which updates are usually multiplied: alpha from a hundredth of the rank to a hundred times the rank.
_USUAL_SCALING = (0.01, 100.0)
#: Beyond this rank, LoRA saves little; PEFT's default is 8.
_USUAL_RANK = 2048


def changes_base(init: object) -> bool:
    """Whether a LoRA initialization changes the weights of the base."""
    return isinstance(init, str) and init.lower().startswith(_CHANGING)


def describe_lost(init: object) -> str | None:
    """Return why an adapter with this ``init_lora_weights`` cannot be loaded; ``None`` if it can."""
    name = init.lower() if isinstance(init, str) else init
    if name in _PLAIN or name in _REPEATED:
        return None
    return (
        f"it was initialised with {init!r}, which changes the base's weights in a way that cannot be repeated when the "
        "adapter is loaded. Publish it again from the model that was trained: push_adapter makes a plain LoRA of it"
    )


def list_unknown(config: AdapterConfig, manifest: Manifest | None) -> tuple[list[str], list[str]]:
    """Return the non-default fields that the installed PEFT does not know: those that count, and those that do not.

    A field counts if dropping it may change the computation; another trainer's fields do not.
    """
    known, installed = read_known_fields(), _parse_version(read_peft_version())
    if known is None or installed is None:
        return [], []
    fields = config.fields
    unknown = [key for key in sorted(fields) if key not in known and fields[key] not in (None, {}, [], False)]
    needed = [key for key in unknown if _is_needed(key, config, manifest, installed)]
    return needed, [key for key in unknown if key not in needed]


def _is_needed(key: str, config: AdapterConfig, manifest: Manifest | None, installed: Version) -> bool:
    if key in _REMOVED:
        return True
    writer = _parse_version(config.peft_version)
    if writer is None or writer <= installed:
        # The PEFT release that wrote the file did not know the field either: another trainer added it.
        return False
    # A manifest lists only fields with non-default values in the PEFT release that wrote them.
    return manifest is None or manifest.peft_version != config.peft_release or key in manifest.config


def _parse_version(text: str | None) -> Version | None:
    try:
        return Version(text.partition("@")[0]) if text else None
    except InvalidVersion:
        return None


def _find_malformed(files: AdapterFiles) -> Iterator[str]:
    try:
        _ = files.config
    except UnsafeFile as reason:
        yield str(reason)


def _find_disagreement(files: AdapterFiles) -> Iterator[str]:
    try:
        if files.manifest is not None:
            check_agreement(files.manifest, files.config)
    except RegistryError as reason:
        yield str(reason)


def _find_unknown(files: AdapterFiles) -> Iterator[str]:
    unknown, _ = list_unknown(files.config, files.manifest)
    if not unknown:
        return
    fields = files.config.fields
    told = ", ".join(f"{key}={fields[key]!r}" for key in unknown)
    cure = "Update PEFT: pip install -U peft"
    if any(key in _REMOVED for key in unknown):
        cure = "No release of PEFT since 0.3 knows them: convert the adapter first"
    yield (
        f"{files.title} was saved by PEFT {files.config.peft_version or 'of another release'} with {told}, which "
        f"PEFT {read_peft_version()} does not know and would ignore. {cure}"
    )


def _find_lost(files: AdapterFiles) -> Iterator[str]:
    lost = describe_lost(files.config.fields.get("init_lora_weights", True))
    if lost:
        yield f"{files.title}: {lost}"


def _find_repeated(files: AdapterFiles) -> Iterator[str]:
    init = files.config.fields.get("init_lora_weights", True)
    if changes_base(init) and describe_lost(init) is None:
        yield (
            f"init_lora_weights={init!r} takes a part out of the base's weights each time the adapter is loaded. The "
            "result is right on exactly the base of the training, and no other adapter can be loaded beside it"
        )


def _find_router(files: AdapterFiles) -> Iterator[str]:
    if files.config.fields.get("arrow_config"):
        yield (
            "arrow_config makes it a router between other adapters of the model, which a release cannot hold. Publish "
            "those adapters; PEFT's create_arrow_model makes the router of them"
        )


def _find_zero_alpha(files: AdapterFiles) -> Iterator[str]:
    patterns = files.config.fields.get("alpha_pattern") or {}
    if files.config.fields.get("lora_alpha", 8) == 0 and not any(patterns.values()):
        yield (
            "lora_alpha is 0, by which every update is multiplied: the adapter changes nothing. Set it to what the "
            "adapter was trained with; PEFT's default is 8"
        )


def _find_odd_scaling(files: AdapterFiles) -> Iterator[str]:
    low, high = _USUAL_SCALING
    for where, scaling in _list_scalings(files.config):
        if scaling != 0 and not low <= scaling <= high:
            yield f"{where} multiplies updates by {scaling:g}; usual is {low:g} to {high:g}"


def _list_scalings(config: AdapterConfig) -> Iterator[tuple[str, float]]:
    """Yield what decides the scaling, in words, and the scaling."""
    fields = config.fields
    alpha, ranks = fields.get("lora_alpha", 8), fields.get("rank_pattern") or {}
    alphas: Mapping[str, Any] = fields.get("alpha_pattern") or {}
    power = 0.5 if fields.get("use_rslora") else 1.0
    yield f"lora_alpha={alpha} with r={config.rank}", alpha / config.rank**power
    for name in sorted({*ranks, *alphas}):
        own, rank = alphas.get(name, alpha), ranks.get(name, config.rank)
        yield f"alpha {own} with rank {rank} of {name!r}", own / rank**power


def _find_odd_rank(files: AdapterFiles) -> Iterator[str]:
    largest = max(files.config.ranks)
    if largest > _USUAL_RANK:
        yield f"The rank is {largest:,}; above {_USUAL_RANK:,}, an adapter is about as large as the weights it adapts"


def _find_local_base(files: AdapterFiles) -> Iterator[str]:
    name = files.config.base_id
    if name is not None and (BASE_ID.fullmatch(name) is None or Path(name).is_dir()):
        yield f"base_model_name_or_path is {name!r}, a folder of the machine that trained it"


def _find_no_base(files: AdapterFiles) -> Iterator[str]:
    if files.config.base_id is None:
        yield "base_model_name_or_path is empty: nothing says which model it belongs to"


def _find_no_revision(files: AdapterFiles) -> Iterator[Finding]:
    revision = files.config.fields.get("revision")
    if files.config.base_id is None or (isinstance(revision, str) and COMMIT.fullmatch(revision)):
        return
    what = f"revision is {revision!r}, which may move" if revision else "revision is empty"
    yield Finding(f"{what}: the base may have changed since the training")


_BASE = (
    "Say which: lora-plugins push … --base-model org/base@<commit>, or doctor --fix OUT --base-model org/base@<commit>"
)
_CORRECT = f"Correct {ADAPTER_CONFIG}, or save the adapter again with PEFT's save_pretrained"

UNKNOWN_FIELDS = Check(
    "unknown-fields", "error", ("configuration", "manifest"), _find_unknown, refused={"load": BaseMismatch}
)
LOST_INITIALIZATION = Check(
    "lost-initialization",
    "error",
    ("configuration",),
    _find_lost,
    refused={"folder": InvalidAdapter, "load": BaseMismatch},
)

CHECKS = (
    Check(
        "configuration", "error", ("files",), _find_malformed, _CORRECT,
        refused=dict.fromkeys(("folder", "push", "pull", "load"), UnsafeFile),
    ),
    Check(
        "manifest-agreement", "error", ("configuration", "manifest"), _find_disagreement,
        refused={"pull": IntegrityError, "load": IntegrityError},
    ),
    UNKNOWN_FIELDS,
    LOST_INITIALIZATION,
    Check(
        "changing-initialization", "warning", ("configuration",), _find_repeated,
        "Push the trained model: push_adapter makes a plain LoRA of it. PEFT's "
        "save_pretrained(path_initial_model_for_weight_conversion=…) does so, too",
    ),
    Check("arrow-router", "error", ("configuration",), _find_router, refused={"push": InvalidAdapter}),
    Check("zero-alpha", "error", ("configuration",), _find_zero_alpha, refused={"push": InvalidAdapter}),
    Check(
        "odd-scaling", "warning", ("configuration",), _find_odd_scaling,
        "Compare lora_alpha, r and use_rslora with those of the training",
    ),
    Check("odd-rank", "warning", ("configuration",), _find_odd_rank, "Compare r with that of the training"),
    Check("no-base", "warning", ("configuration",), _find_no_base, _BASE),
    Check("local-base", "warning", ("configuration",), _find_local_base, _BASE),
    Check("no-revision", "note", ("configuration",), _find_no_revision, _BASE),
)  # fmt: skip
