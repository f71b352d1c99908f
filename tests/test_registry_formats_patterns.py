"""Regular expressions of strangers: what is vouched for is fast, what people use is vouched for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import MachineError, UnsafeFile
from registry.formats import patterns
from registry.formats.adapter_config import AdapterConfig
from registry.formats.patterns import _FORMS, PatternTable, find_costly, find_slow, is_cheap

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|"
    r"attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r".*(audio_tower|vision_tower|embed_vision|embed_audio).*",
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r"^(?!.*(vision|audio)).*layers\.(\d|1\d|2[0-7])\.(self_attn|mlp)\..*_proj$",
        r"(.*)(self_attn|mlp)\.(.*)_proj",
        r"model\.layers\.(?:[0-9]|[1-9][0-9])\.mlp\.experts\.\d{1,3}\.(?:gate|up|down)_proj",
        "all-linear",
        "model.layers.0.self_attn.q_proj",
        "",
    ],
)
def test_what_people_use_is_vouched_for(pattern: str) -> None:
    for field in ("target_modules", "exclude_modules"):
        assert find_costly([(field, pattern)]) is None


@pytest.mark.parametrize("field", _FORMS)
@pytest.mark.parametrize(
    "name", ["layers", "model.layers.0.self_attn.q_proj", r".*q_proj", r"(layers|h)", "score", r"layers\.\d+\.mlp"]
)
def test_names_with_what_peft_puts_around_them_are_vouched_for(field: str, name: str) -> None:
    assert find_costly([(field, name)]) is None


EVIL = {
    "optionals in a row": ".?" * 60 + "#",
    "optionals, repeated": "(?:.?){60}#",
    "optional words": "(?:a|b)?" * 40 + "#",
    "optional groups": "(?:proj)?" * 40 + "#",
    "alternatives in a row": "(?:a|aa)" * 40 + "#",
    "alternatives of one length": "(?:ab|[ab]b)" * 40 + "#",
    "alternatives before a word": "(?:(?:ab|[ab]b){12})?word" + ".*x" * 2,
    "nested stars": "(.*)*#",
    "nested bounded": r"(?:\w{0,9}){0,9}#",
    "bounded in a row": r"\w{0,50}" * 6 + "#",
    "lazy in a row": ".*?" * 5 + "#",
    "letters between": ".*a.*a.*a.*a.*a#",
    "dots between": r".*\..*\..*\..*\..*#",
    "nothing, four billion times": "(?:){4294967290}",
    "nothing within, a billion times": "(?:a{0}){1000000000}",
    "a lookahead, a billion times": "(?:(?=a)){1000000000}",
    "an optional, a million times": "(?:a?){1000000}",
    "within a lookahead": "(?=(.*)*#)",
    "within a negative lookbehind": "(?!(a|a)*#)",
    "a reference": r"(.*)(.*)\1\2#",
    "a condition": r"(a)?(?(1)(.*)*#|b)",
    "long": "a" * 3000,
    "deep": "(" * 900 + ")" * 900,
    "broken": "(",
    "closes what PEFT opens": r")(.*)*(",
}


@pytest.mark.parametrize("case", EVIL)
def test_what_could_take_forever_is_not_vouched_for(case: str) -> None:
    started = time.perf_counter()
    for field in ("target_modules", *_FORMS):
        assert find_costly([(field, EVIL[case])]) is not None
    assert time.perf_counter() - started < 2


FIELDS: dict[str, Any] = {
    "target_modules": "{}", "exclude_modules": "{}", "layers_pattern": ["{}"], "modules_to_save": ["{}"],
    "rank_pattern": {"{}": 4}, "alpha_pattern": {"{}": 4},
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("case", ["optionals in a row", "optionals, repeated", "nested stars"])
def test_every_field_that_peft_matches_is_filtered(field: str, case: str) -> None:
    text = json.dumps(FIELDS[field]).replace("{}", EVIL[case])
    values = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], field: json.loads(text)}
    with pytest.raises(UnsafeFile, match=f"{field} has the expression .* forever"):
        AdapterConfig.parse(json.dumps(values).encode())


def test_expressions_count_together() -> None:
    one = r".*\..*\..*"
    assert is_cheap(one)
    assert find_costly([("rank_pattern", one)] * 10_000) is not None
    names = [("rank_pattern", f"model.layers.{layer}.self_attn.q_proj") for layer in range(2000)]
    assert find_costly(names) is None


MANY = [
    f"model.language_model.layers.{i}.{'expert' * 12}.{j}.gate_up_proj_and_more" for i in range(60) for j in range(100)
]


@pytest.mark.parametrize("field", ["target_modules", *_FORMS])
def test_names_and_what_people_use_are_quick_on_a_large_model(field: str) -> None:
    used = [UNSLOTH, r".*\.(q_proj|v_proj)"] if field == "target_modules" else ["q_proj", r"layers\.\d+\.mlp"] * 20
    assert find_slow([(field, pattern) for pattern in used], MANY) is None


@pytest.mark.parametrize(
    "pattern",
    [".{0,60}.{0,60}.{0,60}(?=#)", ".{0,60}.{0,60}.{0,60}(?:#|%)", r".{0,77}.{0,76}(?:.?.?.?.?)[#]"],
)
def test_what_is_vouched_for_and_slow_on_a_large_model_is_found_in_bounded_time(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_CPU_SECONDS", 1)
    assert find_costly([("target_modules", pattern)]) is None
    found = find_slow([("target_modules", "all-linear"), ("exclude_modules", pattern)], MANY)
    assert found == ("exclude_modules", pattern)


def test_a_small_model_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert find_slow([("target_modules", r".*\.(q|k|v|o)_proj")], MANY[:200]) is None


def test_a_machine_without_processes_to_spare_is_no_fault_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MachineError, match="No process can be started"):
        find_slow([("target_modules", UNSLOTH)], MANY)


def find_as_peft(table: dict[str, Any], name: str) -> Any:
    """As peft.utils.other.get_pattern_key looks up a key."""
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", name)), None)


TABLES: dict[str, list[str]] = {
    "names": ["model.layers.1.self_attn.q_proj", "layers.0.self_attn.q_proj", "q_proj", "self_attn.q_proj"],
    "the last one first": ["q_proj", "layers.0.self_attn.q_proj", "0.self_attn.q_proj"],
    "dots that match anything": ["layers.0.self.attn.q_proj", "q.proj", "self_attn...proj", "mlp.up.proj"],
    "names and expressions": [r"layers\.[01]\.mlp\.up_proj", "up_proj", ".*attn.q_proj", "layers.0.self_attn.q_proj"],
    "expressions first": [".*_proj", "model.layers.0.self_attn.q_proj"],
    "ends and beginnings": ["proj", "_proj", "model", "model.layers", ".q_proj", "q_proj.", "..q_proj"],
    "alternatives": ["q_proj|up_proj", "self_attn.q_proj", "(?:mlp|self_attn).up_proj"],
    "capitals and digits": ["Model.layers.0.self_attn.q_proj", "1.mlp.up_proj", "layers.1.mlp.up_proj"],
    "nothing": [],
}
FEW = [f"{top}layers.{layer}.{name}" for top in ("model.", "xmodel.", "") for layer in (0, 1, 10)
       for name in ("self_attn.q_proj", "mlp.up_proj", "self_attn", "selfXattnXXXproj")]  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_a_table_is_looked_up_as_peft_does_it(case: str) -> None:
    table = {key: number for number, key in enumerate(TABLES[case], start=1)}
    found = PatternTable(table)
    grouped = found.group(FEW)
    for name in FEW:
        assert found.find(name) == find_as_peft(table, name)
        assert find_as_peft(grouped, name) == find_as_peft(table, name)


def test_a_table_of_many_names_needs_no_comparison_and_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    many = {name: 4 + number % 3 for number, name in enumerate(MANY)}
    assert find_slow([("rank_pattern", name) for name in many], MANY) is None
    assert find_slow([("alpha_pattern", name) for name in many], MANY) is None
    table = PatternTable(many)
    assert [table.find(name) for name in MANY] == list(many.values())
    assert table.find("model.language_model.layers.0.norm", 7) == 7
    assert sorted(table.group(MANY).values()) == [4, 5, 6]


NAMES = [
    "base_model.model.model.language_model.layers.26.self_attn.q_proj",
    "model.vision_tower.vision_model.encoder.layers.11.mlp.fc1",
    "model.layers.12.mlp.experts.127.down_proj",
    "transformer.h.0.attn.c_attn",
]
_ATOM = st.sampled_from(
    [r".*", r".*?", r"\w+", r"\d*", ".?", "a", "proj", r"\.", "_", "(?:a|b|ab)", "(?:attn|mlp)?", "[a-z]{1,9}",
     "(?:o|e)*", "(?:.?){9}", r"(?:\.\w+)+", "layers", "(?=.*a)", "#"]
)  # fmt: skip


@given(st.lists(_ATOM, max_size=8).map("".join))
@settings(max_examples=300, deadline=None)
def test_what_is_vouched_for_is_fast(pattern: str) -> None:
    """Against Python's own matcher; half a second for four names is ten times the bound on a slow machine."""
    if not is_cheap(pattern):
        return
    compiled, started = re.compile(pattern), time.thread_time()
    for name in NAMES:
        compiled.fullmatch(name)
    assert time.thread_time() - started < 0.5
