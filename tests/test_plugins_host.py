"""The plugin host with fake distributions: broken plugins are named and disabled, and never fatal."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from lora_plugins.errors import (
    ArchitectureConflict,
    BrokenBuiltin,
    PluginError,
    PluginWarning,
    QuantizerConflict,
    UnknownQuantizer,
)
from lora_plugins.plugins import host as manager
from lora_plugins.plugins.host import PluginHost, PluginInfo

PLUGINS = Path(__file__).parent / "plugins"

MakeHost = Callable[..., PluginHost]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put fake distributions on the path, in the given order."""
    monkeypatch.delenv(manager.BLOCK_VARIABLE, raising=False)
    monkeypatch.delenv(manager.TRACE_VARIABLE, raising=False)

    def add(*cases: str) -> None:
        for case in reversed(cases):
            assert (PLUGINS / case).is_dir()
            monkeypatch.syspath_prepend(PLUGINS / case)

    return add


@pytest.fixture
def host_with(install: Callable[..., None]) -> MakeHost:
    """Make a fresh host that finds these fake distributions, and one plugin that works beside them."""

    def make(*cases: str, **options: object) -> PluginHost:
        install("working", *cases)
        return PluginHost(**options)

    return make


@pytest.fixture
def app() -> typer.Typer:
    """A program with options of its own and no commands."""
    program = typer.Typer(add_completion=False, rich_markup_mode=None)

    @program.callback()
    def options(own: bool = False) -> None:
        """Own help."""

    return program


def plugin(host: PluginHost, name: str) -> PluginInfo:
    [info] = [info for info in host.plugins if info.name == name]
    return info


def test_a_plugin_that_works_is_listed_with_what_it_provides(host_with: MakeHost, app: typer.Typer) -> None:
    host = host_with()
    host.build_program(app)

    assert plugin(host, "working") == PluginInfo(
        "working",
        "fake-working",
        "1.2.3",
        False,
        ["working"],
        ["halves"],
        ["say-hello"],
        requires={"halves": ["pluggy>=1", "no-such-thing>=1.2"]},
    )
    assert host.architecture("working").targets == ("q", "v")
    assert "working" in host.model_types()
    assert host.quantizer("halves").bits == 16
    assert "halves" in host.quantizer_names()
    assert host.architecture("nobody-registered-this") is None


BROKEN = {
    "bare_requirement": "its backend 'bare' must have a tuple of strings in `requires`, not 'hqq'",
    "import_error": "it raised RuntimeError: no licence found in the usual place",
    "system_exit": "it raised SystemExit: this machine is not supported",
    "panic": "it raised PanicException: called `Option::unwrap()` on a `None` value",
    "missing_dependency": "missing dependency: No module named 'package_that_is_not_installed'; "
    "try `pip install package_that_is_not_installed`",
    "wrong_signature": "wrong signature: Plugin 'fake-wrong-signature:wrong-signature' for hook "
    "'register_architectures' hookimpl definition: register_architectures(model) Argument(s) {'model'} ",
    "misspelt_hook": "it implements the hook 'register_quantisers', which does not exist. "
    "Did you mean 'register_quantizers'?",
    "raising_hook": "it raised KeyError: 'calibration table'",
    "no_hooks": "it implements no hook; mark its functions with @lora_plugins.hookimpl",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_disabled(case: str, host_with: MakeHost) -> None:
    name = case.replace("_", "-")
    with pytest.warns(PluginWarning) as caught:
        host = host_with(case)

    info = plugin(host, name)
    assert info.disabled.startswith(BROKEN[case])
    assert "\n" not in info.disabled
    [warning] = caught
    assert str(warning.message) == f"Plugin {name} (fake-{name} 1.0) is disabled: {info.disabled}"
    # Nothing of it is left, and what stands beside it works.
    assert not {case, "misspelt"} & set(host.model_types())
    assert (info.architectures, info.quantizers, info.commands) == ([], [], [])
    assert plugin(host, "working").disabled is None
    assert host.architecture("working") is not None


def test_all_broken_plugins_together_disable_only_themselves(host_with: MakeHost) -> None:
    with pytest.warns(PluginWarning) as caught:
        host = host_with(*BROKEN)

    assert len(caught) == len(BROKEN)
    assert [info.name for info in host.plugins if info.disabled] == sorted(case.replace("_", "-") for case in BROKEN)
    assert host.quantizer("halves").name == "halves"


def test_interrupting_the_user_is_not_a_failure_of_a_plugin(
    host_with: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.metadata.EntryPoint.load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        host_with()


WRONG_RETURNS = {
    "returns-none": "register_architectures must return a list of Architecture, not None",
    "returns-text": "register_architectures must return a list of Architecture, not 'text'",
    "returns-record": "register_architectures must return a list of Architecture, not Architecture(",
    "returns-class": "register_quantizers must return a list of Quantizer; it holds <class ",
    "returns-twice": "it registers the architecture 'twice' twice",
    "returns-unnamed": "its backend Backend must have a `name` that is a string, not None",
    "returns-letters": "it raised TypeError: Architecture.targets must be a sequence of names, not the string 'q_proj'",
}


def test_wrong_return_values_are_refused_by_name(host_with: MakeHost) -> None:
    with pytest.warns(PluginWarning):
        host = host_with("wrong_returns")

    reasons = {info.name: info.disabled for info in host.plugins if info.disabled}
    assert set(reasons) == set(WRONG_RETURNS)
    for name, reason in WRONG_RETURNS.items():
        assert reasons[name].startswith(reason)


def test_entry_points_that_name_no_plugin(host_with: MakeHost) -> None:
    with pytest.warns(PluginWarning):
        host = host_with("not_a_plugin")

    assert plugin(host, "text").disabled.startswith("its entry point names 'fake', which is neither")
    assert "has no attribute 'absent'" in plugin(host, "absent").disabled
    assert plugin(host, "malformed").disabled


def test_one_object_behind_two_entry_points_counts_once(host_with: MakeHost) -> None:
    with pytest.warns(PluginWarning, match="names the same object as first"):
        host = host_with("same_object")

    assert host.architecture("same_object").targets == ("q",)
    assert plugin(host, "second").disabled == "its entry point names the same object as first (fake-same-object 1.0)"


def test_a_plugin_that_can_not_be_hashed_works_and_harms_nobody(host_with: MakeHost) -> None:
    host = host_with("unhashable")

    assert host.architecture("unhashable") is not None
    assert host.architecture("working") is not None


def test_a_package_with_unreadable_metadata_does_not_hide_the_others(host_with: MakeHost) -> None:
    with pytest.warns(PluginWarning, match="has metadata that cannot be read"):
        host = host_with("broken_metadata")

    assert plugin(host, "working").version == "1.2.3"
    assert host.architecture("working") is not None


def test_a_package_without_name_still_provides(host_with: MakeHost) -> None:
    host = host_with("nameless")

    assert host.architecture("nameless") is not None
    assert plugin(host, "nameless").disabled is None


def test_importing_torch_when_loaded_is_noted(host_with: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fake_heavy_import", raising=False)
    monkeypatch.setattr(manager, "_HEAVY", ("fake_heavy_import",))

    host = host_with("heavy_import")

    assert plugin(host, "heavy-import").notes == [
        "imports fake_heavy_import when it is loaded, which delays every command"
    ]
    assert plugin(host, "working").notes == []


# -- clashes and overrides ---------------------------------------------------------------------


def test_two_third_parties_for_one_name_is_an_error_that_names_both_and_the_way_out(host_with: MakeHost) -> None:
    host = host_with("clash_one", "clash_two")
    both = (
        "is registered by clash-one (fake-clash-one 1.0) and by clash-two (fake-clash-two 1.0). Uninstall one of "
        "them, or switch one off with LORA_PLUGINS_BLOCK=clash-one or LORA_PLUGINS_BLOCK=clash-two."
    )

    with pytest.raises(ArchitectureConflict) as architecture:
        host.architecture("contested")
    with pytest.raises(QuantizerConflict) as quantizer:
        host.quantizer("contested")

    assert str(architecture.value) == f"The architecture 'contested' {both}"
    assert str(quantizer.value) == f"The quantization backend 'contested' {both}"
    for name in ("clash-one", "clash-two"):
        assert f"clash: The architecture 'contested' {both}" in plugin(host, name).notes
        assert f"clash: The quantization backend 'contested' {both}" in plugin(host, name).notes
    # What only one of them registers is not affected.
    assert host.architecture("clash_one").targets == ("q",)
    assert host.architecture("clash_two").targets == ("q",)


def test_blocking_one_side_settles_a_clash(host_with: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PLUGINS_BLOCK", "clash-two")
    host = host_with("clash_one", "clash_two")

    assert host.architecture("contested").targets == ("q",)
    assert plugin(host, "clash-one").notes == []


def test_plugins_of_equal_name_are_told_apart_by_their_distribution() -> None:
    table: manager.Table[str] = manager.Table("architecture", ArchitectureConflict)
    table.add("mine", PluginInfo("plugin", "package-a", "1", builtin=False), "a")
    table.add("mine", PluginInfo("plugin", "package-b", "2", builtin=False), "b")

    with pytest.raises(ArchitectureConflict, match=r"BLOCK=package-a or LORA_PLUGINS_BLOCK=package-b\.$"):
        table.get("mine")


def test_a_third_party_beats_a_built_in(host_with: MakeHost) -> None:
    builtin = PluginHost()
    assert builtin.architecture("bloom").targets == ("query_key_value",)

    host = host_with("overriding")

    assert host.architecture("bloom").targets == ("own",)
    assert type(host.quantizer("int8")).__name__ == "OwnInt8"
    assert plugin(host, "overriding").notes == [
        "overrides the built-in architecture 'bloom'",
        "overrides the built-in quantization backend 'int8'",
    ]
    assert type(builtin.quantizer("int8")).__name__ == "Int8"


def test_an_unknown_backend_names_near_misses_and_disabled_plugins(host_with: MakeHost) -> None:
    with pytest.warns(PluginWarning):
        host = host_with("import_error")

    with pytest.raises(UnknownQuantizer) as error:
        host.quantizer("in8")

    assert "No quantization backend 'in8'. Did you mean 'int8'?" in str(error.value)
    assert f"Known: {', '.join(host.quantizer_names())}." in str(error.value)
    assert "Disabled plugins: import-error (fake-import-error 1.0)" in str(error.value)


# -- commands ----------------------------------------------------------------------------------


def test_commands_of_a_plugin_run(host_with: MakeHost, app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    host_with().build_program(app).main(["say-hello"], standalone_mode=False)

    assert capsys.readouterr().out == "hello from a plugin\n"


def test_commands_that_fail_leave_nothing_behind(host_with: MakeHost, app: typer.Typer) -> None:
    host = host_with("commands_fail")
    with pytest.warns(PluginWarning) as caught:
        program = host.build_program(app)

    assert [str(warning.message) for warning in caught] == [
        "Plugin callback (fake-commands-fail 1.0) is disabled: register_commands: "
        "it sets a callback on `app`, which would replace the program's own options",
        "Plugin raises-late (fake-commands-fail 1.0) is disabled: register_commands: "
        "it raised OSError: configuration not found",
        f"Plugin unbuildable (fake-commands-fail 1.0) is disabled: {plugin(host, 'unbuildable').disabled}",
    ]
    assert plugin(host, "unbuildable").disabled.startswith("register_commands: it raised ")
    assert "say-hello" in program.commands
    assert not {"half-done", "unbuildable"} & set(program.commands)
    assert program.help == "Own help."
    assert plugin(host, "raises-late").commands == []


def test_a_command_claimed_twice_says_so_when_it_is_called(host_with: MakeHost, app: typer.Typer) -> None:
    host = host_with("clash_one", "clash_two")
    program = host.build_program(app)

    with pytest.raises(PluginError, match=r"The command 'contested' is registered by clash-one .* and by clash-two"):
        program.main(["contested", "someone", "--option"], standalone_mode=False)
    assert any("The command 'contested'" in note for note in plugin(host, "clash-one").notes)
    assert "say-hello" in program.commands


def test_a_command_of_a_third_party_beats_a_built_in(
    host_with: MakeHost, app: typer.Typer, capsys: pytest.CaptureFixture[str]
) -> None:
    host = host_with("overriding")
    program = host.build_program(app)

    program.main(["demo"], standalone_mode=False)

    assert capsys.readouterr().out == "another demo\n"
    assert "overrides the built-in command 'demo'" in plugin(host, "overriding").notes


def test_a_command_that_is_called_is_built_without_the_others(host_with: MakeHost, app: typer.Typer) -> None:
    host = host_with()
    everything = set(host.build_program(app).commands)
    listed = {name for info in host.plugins for name in info.commands}
    built = set(host_with().build_program(app, "doctor").commands)
    assert built == {"doctor", "say-hello"}  # a third party's are all built, so that its mistakes are found
    for called in ("say-hello", "nothing", "", None):
        again = host_with()
        assert set(again.build_program(app, called).commands) == everything
    only = host_with()
    only.build_program(app, "plugins")
    assert {name for info in only.plugins for name in info.commands} == listed >= everything


# -- switches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["working", "fake-working", "Fake_Working", " other, fake.working ,"])
def test_block_takes_names_of_plugins_and_of_distributions(
    block: str, host_with: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_PLUGINS_BLOCK", block)
    monkeypatch.delitem(sys.modules, "fake_working", raising=False)

    host = host_with()

    assert plugin(host, "working").disabled == "blocked by LORA_PLUGINS_BLOCK or block="
    assert host.architecture("working") is None
    assert "fake_working" not in sys.modules
    assert host.unknown_blocks() == (["other"] if "other" in block else [])


def test_block_as_an_argument_and_of_a_built_in(host_with: MakeHost) -> None:
    host = host_with(block=["bitsandbytes", "lora-plugins"])

    assert plugin(host, "bitsandbytes").disabled
    assert "halves" in host.quantizer_names()
    assert not {"int8", "nf4", "fp4"} & set(host.quantizer_names())
    assert host.architecture("bloom") is not None, "blocking our own distribution blocks none of the rest"


def test_blocking_a_broken_plugin_silences_it(host_with: MakeHost) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host = host_with("import_error", block=["import-error"])

    assert plugin(host, "import-error").disabled == "blocked by LORA_PLUGINS_BLOCK or block="


def test_trace_prints_hook_calls(
    host_with: MakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host_with()
    assert capsys.readouterr().err == ""

    monkeypatch.setenv("LORA_PLUGINS_TRACE", "1")
    PluginHost()
    trace = capsys.readouterr().err
    assert "register_architectures [hook]" in trace
    assert "finish register_quantizers --> " in trace

    monkeypatch.setenv("LORA_PLUGINS_TRACE", "0")
    PluginHost()
    assert capsys.readouterr().err == ""


# -- built-ins ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(set(BROKEN) - {"panic"}))
def test_a_broken_built_in_raises(case: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(case)
    monkeypatch.setattr(manager, "PLUGINS", (*manager.PLUGINS, f"fake_{case}"))

    with pytest.raises(BrokenBuiltin, match=rf"^The built-in plugin fake_{case} \(lora-plugins .*does not load: "):
        PluginHost(block=[case])


def test_hosts_share_no_state(host_with: MakeHost) -> None:
    before = PluginHost()
    host_with("clash_one")

    assert "contested" not in before.model_types()
    assert PluginHost().architecture("contested").targets == ("q",)
