"""The example packages and what `new-plugin` writes: tested in place, and installed into a clean environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

from lora_plugins import Architecture, plan
from lora_plugins.commands.cli import main
from lora_plugins.commands.scaffold import write_package
from lora_plugins.errors import PluginError
from lora_plugins.plugins.host import BLOCK_VARIABLE, PluginHost, PluginInfo
from lora_plugins.plugins.types import Quantizer
from lora_plugins.targets.resolution import resolve_targets
from lora_plugins.testing import check_architecture, check_quantizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PACKAGES = ("ripple", "careful")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], PluginHost]:
    """The example packages on the path, each with the metadata that installing would write."""
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)
    for name in PACKAGES:
        info = tmp_path / f"{name}_lora-1.0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-lora\nVersion: 1.0.0\n")
        (info / "entry_points.txt").write_text(f"[lora_plugins]\n{name} = {name}.plugin\n")
        monkeypatch.syspath_prepend(EXAMPLES / name)
    monkeypatch.syspath_prepend(tmp_path)
    return PluginHost


def ripple() -> Any:
    from ripple import RippleConfig, RippleForCausalLM

    return RippleForCausalLM(RippleConfig(vocab_size=64, hidden_size=32, waves=3))


def hits(model: Any, host: PluginHost) -> dict[str, int]:
    return {hit.name: len(hit.modules) for hit in resolve_targets(model, host=host).hits}


def test_example_of_an_architecture(installed: Callable[[], PluginHost], monkeypatch: pytest.MonkeyPatch) -> None:
    host = installed()
    resolved = check_architecture(ripple, host=host)
    assert {hit.name for hit in resolved.hits} == {"ask", "give"}
    assert hits(ripple(), host) == {"ask": 3, "give": 3}
    names = {name for module in ripple().modules() for name, _ in module.named_children() if not name.isdigit()}
    own = {"pond", "waves", "stir", "ask", "seek", "give", "blend", "rise", "fall"}
    assert own <= names
    builtin = PluginHost(block=list(PACKAGES))
    for model_type in builtin.model_types():
        record = builtin.architecture(model_type)
        assert record is not None
        listed = {part for name in (*record.targets, *sum(record.scopes.values(), ())) for part in name.split(".")}
        assert not own & listed, model_type
    monkeypatch.setenv(BLOCK_VARIABLE, "ripple-lora")
    assert hits(ripple(), PluginHost()) == dict.fromkeys(("ask", "seek", "give", "blend", "rise", "fall"), 3)


def test_example_that_overrides_and_quantizes(installed: Callable[[], PluginHost]) -> None:
    host = installed()
    assert hits(tiny.gpt2(), host) == {"c_attn": 2, "attn.c_proj": 2}
    assert hits(tiny.gpt2(), PluginHost(block=["careful"])) == {"c_attn": 2}
    check_architecture(tiny.gpt2, host=host)
    check_quantizer(host.quantizer("rounded"))
    [info] = [info for info in host.plugins if info.name == "careful"]
    assert any("gpt2" in note for note in info.notes), "the listing says what is overridden"
    planned = plan(tiny.gpt2(), quantization=host.quantizer("rounded"), length=8)
    assert planned.chosen.quantization == "rounded"


# -- the kit finds what is wrong ---------------------------------------------------------------


class _Host:
    """A host that knows one record."""

    def __init__(self, record: Architecture | None) -> None:
        self.record = record

    def architecture(self, model_type: str) -> Architecture | None:
        return self.record if self.record is not None and model_type == self.record.model_type else None

    def architecture_plugin(self, model_type: str) -> PluginInfo | None:
        return None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "no plugin registers the model type 'llama'"),
        (Architecture("llama", ("nowhere",)), "names nothing that is in the model"),
    ],
)
def test_kit_refuses_records_that_do_not_fit(record: Architecture | None, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_architecture(tiny.llama, host=_Host(record))  # type: ignore[arg-type]


def test_kit_finds_layers_that_are_never_called() -> None:
    def make() -> Any:
        model = tiny.llama()
        for layer in model.model.layers:
            layer.self_attn.extra = nn.Linear(32, 32)
        return model

    with pytest.raises(AssertionError, match="no gradient reaches"):
        check_architecture(make, host=_Host(Architecture("llama", ("extra",))))  # type: ignore[arg-type]


def test_kit_finds_models_with_other_weights() -> None:
    seeds = iter(range(9))
    with pytest.raises(AssertionError, match="does make_model\\(\\) draw other weights"):
        check_architecture(lambda: tiny.llama(seed=next(seeds)))


def test_kit_finds_wrong_sizes_and_broken_backends(installed: Callable[[], PluginHost]) -> None:
    right: Any = installed().quantizer("rounded")

    class Small(type(right)):  # type: ignore[misc]
        def layer_bytes(self, *arguments: Any) -> int:
            return 1

    with pytest.raises(AssertionError, match="says 1 bytes and the layer has 49920"):
        check_quantizer(Small())

    class Unusable(type(right)):  # type: ignore[misc]
        def available(self, *arguments: Any) -> str:
            return "wrong machine"

    with pytest.raises(AssertionError, match="wrong machine"):
        check_quantizer(Unusable())
    assert isinstance(right, Quantizer)

    class Careless(type(right)):  # type: ignore[misc]
        def quantize_linear(self, linear: nn.Linear, options: Any) -> nn.Module:
            layer = super().quantize_linear(linear, options)
            layer.forward = lambda x: nn.functional.linear(x, layer.dequantized().to(x.dtype), layer.bias)
            return layer

    with pytest.raises(AssertionError, match=r"does not take torch\.bfloat16 activations"):
        check_quantizer(Careless())


@pytest.mark.parametrize("name", ["int8", "nf4", "int8-torchao"])
def test_built_in_backends_pass_the_kit(name: str) -> None:
    check_quantizer(PluginHost().quantizer(name))


# -- new packages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "module", "passed"),
    [(["--target", "mix_in", "--target", "mix_out"], "my_type_lora", 1), (["--backend"], "my_type_quantizer", 2)],
    ids=["architecture", "backend"],
)
def test_new_plugin_has_tests_that_pass(
    options: list[str], module: str, passed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    with pytest.raises(SystemExit) as end:
        main(["new-plugin", "my_type", "--folder", str(folder), *options])
    assert not end.value.code
    assert "pip install -e ." in capsys.readouterr().out
    info = tmp_path / f"{module}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[lora_plugins]\n{module} = {module}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout
    listing = [sys.executable, "-m", "lora_plugins", "plugins"]
    listed = subprocess.run(listing, capture_output=True, text=True, env=environment, check=False).stdout
    assert f"{module} ({module.replace('_', '-')} 0.1.0): 1 " in listed


@pytest.mark.parametrize("options", [["--target", "q"], ["--target", "q", "--target", "v"], ["--backend"]])
def test_what_new_plugin_writes_is_formatted(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with pytest.raises(SystemExit):
        main(["new-plugin", "my_type", "--folder", str(folder), *options])
    for command in (["format", "--check"], ["check", "--select", "E,F,I,UP,B"]):
        run = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120", "."]
        done = subprocess.run(run, capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, done.stdout


def test_new_plugin_takes_no_targets_for_a_backend(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["new-plugin", "mine", "--backend", "--target", "q", "--folder", str(tmp_path / "made")])
    assert end.value.code == 2
    assert "a backend has no target modules" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "made").exists()


def test_new_plugin_refuses_what_it_can_not_write(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="is not a valid name"):
        write_package("My Type", tmp_path / "a", ("q",))
    with pytest.raises(PluginError, match="is not a valid module name"):
        write_package("mine", tmp_path / "b", ("a.b",))
    with pytest.raises(PluginError, match="exists already"):
        write_package("mine", tmp_path, ("q",))


# -- really installed --------------------------------------------------------------------------

TRAINING = """
import sys
import torch
from datasets import Dataset
from ripple import RippleConfig, RippleForCausalLM
from transformers import Trainer, TrainingArguments
from lora_plugins import LoraCallback
from lora_plugins.adapters.report import make_report

torch.manual_seed(0)
rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[1, 2, 3, 4]] * 8})
arguments = TrainingArguments("out", max_steps=3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
model = RippleForCausalLM(RippleConfig(vocab_size=64, hidden_size=32, waves=3))
callback = LoraCallback(r=2, quantization=sys.argv[1] if len(sys.argv) > 1 else None)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
trainer.train()
report = make_report(trainer.model)
print("RESULT", report.source, sorted((row.name, row.modules) for row in report.targets), report.quantization)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment that sees the dependencies and this checkout, with the two packages installed by pip."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A path line adds the folder and leaves its .pth files alone.
    (site / "dependencies.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    for name in PACKAGES:
        source = tmp_path_factory.mktemp("source") / name
        _copy(EXAMPLES / name, source)
        command = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-index"]
        command += ["--no-deps", "--no-build-isolation", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return scripts / "python"


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))


def run(python: Path, folder: Path, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**environment, **variables}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_installed_packages_are_listed_used_and_blocked(python: Path, tmp_path: Path) -> None:
    listed = json.loads(run(python, tmp_path, "-m", "lora_plugins", "plugins", "--json"))
    ours = {info["name"]: info for info in listed if info["name"] in PACKAGES}
    assert ours["ripple"]["architectures"] == ["ripple"]
    assert ours["careful"]["quantizers"] == ["rounded"]
    assert {info["disabled"] for info in ours.values()} == {None}

    used = run(python, tmp_path, "-c", TRAINING, "rounded")
    assert "RESULT the registered architecture 'ripple' [('ask', 3), ('give', 3)] rounded" in used

    blocked = run(python, tmp_path, "-m", "lora_plugins", "plugins", "--json", LORA_PLUGINS_BLOCK="ripple,careful")
    states = {info["name"]: info["disabled"] for info in json.loads(blocked) if info["name"] in PACKAGES}
    assert all(state is not None and BLOCK_VARIABLE in state for state in states.values())
    without = run(python, tmp_path, "-c", TRAINING, LORA_PLUGINS_BLOCK="ripple,careful")
    assert "RESULT the model's structure" in without
    assert "('seek', 3)" in without


@pytest.mark.slow
def test_tests_of_the_installed_packages_pass(python: Path, tmp_path: Path) -> None:
    for name in PACKAGES:
        tests = str(EXAMPLES / name / "tests")
        assert "passed" in run(python, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
