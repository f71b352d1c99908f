"""Manifest and configuration of a release are two tellings of one thing; where they differ, nothing is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from releases import CONFIG, draft

from registry.errors import IntegrityError
from registry.formats.adapter_config import AdapterConfig
from registry.formats.agreement import check_agreement
from registry.formats.manifest import Manifest
from registry.formats.records import BaseRecord


def manifest(*, base: BaseRecord | None = None, **config: Any) -> Manifest:
    made = draft("1.0.0").manifest
    fields = {key: value for key, value in {**made.config, **config}.items() if value is not ...}
    return dataclasses.replace(made, config=fields, base=base or made.base)


def config(**fields: Any) -> AdapterConfig:
    return AdapterConfig({key: value for key, value in {**CONFIG, **fields}.items() if value is not ...})


@pytest.mark.parametrize(
    ("fields", "recorded"),
    [
        ({}, {}),
        ({"base_model_name_or_path": None}, {}),
        ({"base_model_name_or_path": "org/mine"}, {"base": BaseRecord(None, "b" * 40)}),
        ({"revision": "b" * 40}, {}),
        ({"revision": None}, {}),
        ({"revision": "c" * 40}, {"base": BaseRecord("org/base", None)}),
        ({"r": 8}, {"r": ...}),
        ({"r": ...}, {"r": 8}),
        ({"target_modules": ["v_proj", "q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"target_parameters": []}, {}),
        ({"rank_pattern": {}, "task_type": None}, {}),
        ({"use_dora": False, "use_rslora": False}, {}),
        ({"use_dora": True, "task_type": "CAUSAL_LM"}, {"use_dora": True, "task_type": "CAUSAL_LM"}),
    ],
)
def test_what_says_the_same_in_two_ways_agrees(fields: dict[str, Any], recorded: dict[str, Any]) -> None:
    check_agreement(manifest(**recorded), config(**fields))


@pytest.mark.parametrize(
    ("fields", "recorded", "says"),
    [
        ({"base_model_name_or_path": "evil/remote-code"}, {}, "is 'evil/remote-code', and 'org/base'"),
        ({"base_model_name_or_path": "/etc"}, {}, "base_model_name_or_path"),
        ({"revision": "c" * 40}, {}, "revision"),
        ({"revision": "main"}, {}, "revision"),
        ({"r": 4}, {}, "r is 4, and 2 by the manifest"),
        ({"r": ...}, {}, "r is 8"),
        ({"r": 4}, {"r": ...}, "r is 4, and 8"),
        ({"task_type": "CAUSAL_LM"}, {}, "task_type"),
        ({}, {"task_type": "CAUSAL_LM"}, "task_type"),
        ({"target_modules": "all-linear"}, {}, "target_modules"),
        ({"target_modules": ["q_proj", "v_proj"]}, {}, "target_modules"),
        ({}, {"target_modules": ["q_proj", "v_proj"]}, "target_modules"),
        ({"target_parameters": ["experts.up"]}, {}, "target_parameters"),
        ({}, {"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"rank_pattern": {"q_proj": 4}}, {}, "rank_pattern"),
        ({}, {"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"use_dora": True}, {}, "use_dora"),
        ({}, {"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, {}, "use_rslora"),
        ({}, {"use_rslora": True}, "use_rslora"),
    ],
)  # fmt: skip
def test_what_differs_is_refused_by_name(fields: dict[str, Any], recorded: dict[str, Any], says: str) -> None:
    with pytest.raises(IntegrityError, match=f"do not agree: .*{says}"):
        check_agreement(manifest(**recorded), config(**fields))
