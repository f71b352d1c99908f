"""Versioned, verified LoRA adapters on the Hugging Face Hub or in folders.

Importing this package loads neither torch nor huggingface_hub; the modules that need them are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.adopting.adopt import Adopted as Adopted
    from registry.adopting.adopt import adopt as adopt
    from registry.base.contract import CheckResult as CheckResult
    from registry.base.contract import check_contract as check_contract
    from registry.base.places import shorten_tables as shorten_tables
    from registry.base.restoring import lora_tensors as lora_tensors
    from registry.base.restoring import put_back as put_back
    from registry.catalog.aliases import Comparison as Comparison
    from registry.catalog.aliases import aliases as aliases
    from registry.catalog.aliases import move_if_better as move_if_better
    from registry.catalog.aliases import remove_alias as remove_alias
    from registry.catalog.aliases import set_alias as set_alias
    from registry.catalog.index import Release as Release
    from registry.catalog.listing import foreign_tags as foreign_tags
    from registry.catalog.listing import list_adapters as list_adapters
    from registry.catalog.listing import show as show
    from registry.catalog.listing import versions as versions
    from registry.catalog.notes import annotate as annotate
    from registry.catalog.withdrawal import unyank as unyank
    from registry.catalog.withdrawal import yank as yank
    from registry.checks.configuration import changes_base as changes_base
    from registry.checks.lineage import LINEAGE_FILE as LINEAGE_FILE
    from registry.checks.lineage import LINEAGE_WEIGHTS as LINEAGE_WEIGHTS
    from registry.checks.lineage import clean_lineage as clean_lineage
    from registry.checks.lineage import list_lineage as list_lineage
    from registry.checks.lineage import read_lineage as read_lineage
    from registry.checks.record import Check as Check
    from registry.checks.record import Finding as Finding
    from registry.errors import BaseMismatch as BaseMismatch
    from registry.errors import HubUnavailable as HubUnavailable
    from registry.errors import InvalidAdapter as InvalidAdapter
    from registry.errors import InvalidReference as InvalidReference
    from registry.errors import PageError as PageError
    from registry.errors import RegistryError as RegistryError
    from registry.errors import RepositoryNotFound as RepositoryNotFound
    from registry.errors import VersionNotFound as VersionNotFound
    from registry.formats.manifest import Manifest as Manifest
    from registry.formats.paths import MANIFEST_FILE as MANIFEST_FILE
    from registry.formats.paths import TOKENIZER_FILES as TOKENIZER_FILES
    from registry.formats.patterns import is_cheap as is_cheap
    from registry.formats.references import Reference as Reference
    from registry.formats.references import expand_path as expand_path
    from registry.formats.references import is_path as is_path
    from registry.health.doctor import Diagnosis as Diagnosis
    from registry.health.doctor import diagnose as diagnose
    from registry.health.source import read_base_config as read_base_config
    from registry.hubs import open_hub as open_hub
    from registry.hubs.folder import FolderHub as FolderHub
    from registry.hubs.huggingface import HuggingFaceHub as HuggingFaceHub
    from registry.hubs.protocol import Hub as Hub
    from registry.pages.charts import make_bar as make_bar
    from registry.pages.charts import make_heat_map as make_heat_map
    from registry.pages.charts import make_line_chart as make_line_chart
    from registry.pages.environment import load_template as load_template
    from registry.pages.output import write_page as write_page
    from registry.publishing.callback import PushToRegistryCallback as PushToRegistryCallback
    from registry.publishing.changes import Changes as Changes
    from registry.publishing.folder_card import write_card as write_card
    from registry.publishing.initialization import make_plain as make_plain
    from registry.publishing.publish import Published as Published
    from registry.publishing.push import check_push as check_push
    from registry.publishing.push import push_adapter as push_adapter
    from registry.pulling.adapter import Adapter as Adapter
    from registry.pulling.pull import lock_adapters as lock_adapters
    from registry.pulling.pull import pull_adapter as pull_adapter
    from registry.signing.keys import SigningKey as SigningKey
    from registry.text import visible_lines as visible_lines
    from registry.upkeep.cleanup import Garbage as Garbage
    from registry.upkeep.cleanup import collect_garbage as collect_garbage
    from registry.upkeep.diff import compare_adapters as compare_adapters
    from registry.upkeep.diff import compare_layers as compare_layers
    from registry.upkeep.mirroring import mirror as mirror
    from registry.upkeep.verification import Verification as Verification
    from registry.upkeep.verification import verify as verify
    from registry.web.difference import render_difference as render_difference
    from registry.web.export import export_pages as export_pages
    from registry.web.server import open_server as open_server

_LAZY = {
    "Adapter": "registry.pulling.adapter",
    "Adopted": "registry.adopting.adopt",
    "BaseMismatch": "registry.errors",
    "Changes": "registry.publishing.changes",
    "Check": "registry.checks.record",
    "CheckResult": "registry.base.contract",
    "Comparison": "registry.catalog.aliases",
    "Diagnosis": "registry.health.doctor",
    "Finding": "registry.checks.record",
    "FolderHub": "registry.hubs.folder",
    "Garbage": "registry.upkeep.cleanup",
    "Hub": "registry.hubs.protocol",
    "HubUnavailable": "registry.errors",
    "HuggingFaceHub": "registry.hubs.huggingface",
    "InvalidAdapter": "registry.errors",
    "InvalidReference": "registry.errors",
    "LINEAGE_FILE": "registry.checks.lineage",
    "LINEAGE_WEIGHTS": "registry.checks.lineage",
    "MANIFEST_FILE": "registry.formats.paths",
    "Manifest": "registry.formats.manifest",
    "PageError": "registry.errors",
    "Published": "registry.publishing.publish",
    "PushToRegistryCallback": "registry.publishing.callback",
    "Reference": "registry.formats.references",
    "RegistryError": "registry.errors",
    "Release": "registry.catalog.index",
    "RepositoryNotFound": "registry.errors",
    "SigningKey": "registry.signing.keys",
    "TOKENIZER_FILES": "registry.formats.paths",
    "Verification": "registry.upkeep.verification",
    "VersionNotFound": "registry.errors",
    "adopt": "registry.adopting.adopt",
    "aliases": "registry.catalog.aliases",
    "annotate": "registry.catalog.notes",
    "changes_base": "registry.checks.configuration",
    "check_contract": "registry.base.contract",
    "check_push": "registry.publishing.push",
    "clean_lineage": "registry.checks.lineage",
    "collect_garbage": "registry.upkeep.cleanup",
    "compare_adapters": "registry.upkeep.diff",
    "compare_layers": "registry.upkeep.diff",
    "diagnose": "registry.health.doctor",
    "expand_path": "registry.formats.references",
    "export_pages": "registry.web.export",
    "foreign_tags": "registry.catalog.listing",
    "is_cheap": "registry.formats.patterns",
    "is_path": "registry.formats.references",
    "list_adapters": "registry.catalog.listing",
    "list_lineage": "registry.checks.lineage",
    "load_template": "registry.pages.environment",
    "lock_adapters": "registry.pulling.pull",
    "lora_tensors": "registry.base.restoring",
    "make_bar": "registry.pages.charts",
    "make_heat_map": "registry.pages.charts",
    "make_line_chart": "registry.pages.charts",
    "make_plain": "registry.publishing.initialization",
    "mirror": "registry.upkeep.mirroring",
    "move_if_better": "registry.catalog.aliases",
    "open_hub": "registry.hubs",
    "open_server": "registry.web.server",
    "pull_adapter": "registry.pulling.pull",
    "push_adapter": "registry.publishing.push",
    "put_back": "registry.base.restoring",
    "read_base_config": "registry.health.source",
    "read_lineage": "registry.checks.lineage",
    "remove_alias": "registry.catalog.aliases",
    "render_difference": "registry.web.difference",
    "set_alias": "registry.catalog.aliases",
    "shorten_tables": "registry.base.places",
    "show": "registry.catalog.listing",
    "unyank": "registry.catalog.withdrawal",
    "verify": "registry.upkeep.verification",
    "versions": "registry.catalog.listing",
    "visible_lines": "registry.text",
    "write_card": "registry.publishing.folder_card",
    "write_page": "registry.pages.output",
    "yank": "registry.catalog.withdrawal",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'registry' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
