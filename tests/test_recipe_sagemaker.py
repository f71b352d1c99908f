"""The SageMaker example in the container's own toolkit: where things end up, and what a failure looks like."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import twin
from transformers import AutoModelForCausalLM

from lora_plugins import prepare_model
from lora_plugins.commands.demo.model import demo_model
from lora_plugins.errors import DemoError
from lora_plugins.recipe.parser import parse
from registry import push_adapter

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "sagemaker"

TOOLKIT = "sagemaker-training==5.1.4"

#: What the container's start command does for a PyTorch job, with the runner that the job asks for.
START = """
import sys
from sagemaker_training import entry_point, environment, runner
env = environment.Environment()
entry_point.run(env.module_dir, env.user_entry_point, env.to_cmd_args(), env.to_env_vars(),
                runner_type=runner.RunnerType[sys.argv[1]])
"""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sagemaker_example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# -- the parts ---------------------------------------------------------------------------------


def test_hyperparameters_of_the_launcher_are_flags() -> None:
    words = [word for key, value in example("launch").HYPERPARAMETERS.items() for word in (f"--{key}", str(value))]
    recipe, training = parse([*words, "--dataset", "d"])
    assert recipe.model == "bigscience/bloomz-7b1"
    assert training.save_steps == 200


def test_container_decides_what_hyperparameters_leave_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    monkeypatch.setenv("SM_OUTPUT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SM_CHANNEL_TRAINING", str(tmp_path / "channel"))
    entry = example("train")
    recipe, training = parse([*entry.container_flags(), "--model", "m"])
    assert (recipe.dataset, recipe.eval_dataset) == (str(tmp_path / "channel"), None)
    assert recipe.resume
    assert training.output_dir == str(tmp_path / "data" / "run")
    (tmp_path / "checkpoints").mkdir()
    assert parse([*entry.container_flags(), "--model", "m"])[1].output_dir == str(tmp_path / "checkpoints")
    # A hyperparameter has the last word.
    assert parse([*entry.container_flags(), "--model", "m", "--dataset", "org/name"])[0].dataset == "org/name"


def test_prompt_of_a_request_ends_where_the_completion_begins() -> None:
    inference, tokenizer = example("inference"), twin.make_tokenizer()
    template = "Summarize the chat dialogue:\\n{dialogue}\n---\nSummary:\n{summary}{eos_token}"
    assert inference.prompt_of(template, {"dialogue": "Hi {x}"}, tokenizer) == twin.PROMPT.format(dialogue="Hi {x}")
    template = "{bos_token}{{Q}} {q}{eos_token}A: {a} END{eos_token}"
    assert inference.prompt_of(template, {"q": "1"}, tokenizer) == "<s>{Q} 1</s>A:"
    for missing, advice in ((None, "as a text"), ("chat", "as a list of `role`")):
        with pytest.raises(ValueError, match=advice):
            inference.prompt_of(missing, {}, tokenizer)
    with pytest.raises(ValueError, match="needs q in `inputs`"):
        inference.prompt_of(template, {"a": "1"}, tokenizer)


def test_conversation_of_a_request_is_written_as_in_training() -> None:
    inference, tokenizer = example("inference"), twin.make_tokenizer()
    tokenizer.chat_template = twin.CHAT_TEMPLATE
    served = inference.Served(None, tokenizer, "chat")
    encoded = inference.encode([{"role": "user", "content": "Hi"}], served)
    assert tokenizer.decode(encoded["input_ids"][0]) == "<s>user\nHi</s><s>assistant\n"


def test_adapter_from_the_registry_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = twin.make_base(tmp_path / "base", steps=2)
    trained = prepare_model(AutoModelForCausalLM.from_pretrained(base))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    monkeypatch.setenv("LORA_REGISTRY", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    push_adapter(trained, "org/summaries", version="1.0.0")
    monkeypatch.setenv("ADAPTER", "org/summaries>=1,<2")
    monkeypatch.setenv("BASE", str(base))
    inference = example("inference")
    served = inference.model_fn(str(tmp_path / "nothing"))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(served.model(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)
    request = {"inputs": "Hi", "parameters": {"max_new_tokens": 4}}
    assert set(inference.predict_fn(request, served)) == {"generated_text"}


def test_sampling_is_the_recipes() -> None:
    expected = {"do_sample": True, "top_p": 0.9, "temperature": 0.1, "max_new_tokens": 100}
    assert expected == example("inference").SAMPLING


# -- the toolkit -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the toolkit, and sees the packages of this one."""
    folder = tmp_path_factory.mktemp("toolkit")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TOOLKIT],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode:
        pytest.skip(f"{TOOLKIT} cannot be installed here: {installed.stderr.strip()[-300:]}")
    packages = next((folder / "lib").glob("python*/site-packages"))
    # addsitedir also heeds the .pth files there, by which a checkout is installed.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (packages / "tests.pth").write_text("".join(lines))
    return python


class Container:
    """The folders of a training container."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.python = python
        source = folder / "source"
        shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("input/config", "input/data/training", "model", "output/data", "checkpoints"):
            (folder / name).mkdir(parents=True)
        twin.make_base(folder / "base")
        twin.write_jsonl(folder / "input" / "data" / "training" / "train.jsonl", twin.dialogues(60, seed=1))
        (folder / "input" / "data" / "validation").mkdir()
        twin.write_jsonl(folder / "input" / "data" / "validation" / "test.jsonl", twin.dialogues(20, seed=2))

    def run(self, hyperparameters: dict[str, Any], runner: str = "Process") -> subprocess.CompletedProcess[str]:
        settings = {
            "sagemaker_program": "train.py",
            "sagemaker_submit_directory": str(self.folder / "source"),
            "sagemaker_region": "us-east-1",
            **hyperparameters,
        }
        hosts = {"current_host": "localhost", "hosts": ["localhost"], "network_interface_name": "lo"}
        channel = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        self._write("hyperparameters", {key: json.dumps(value) for key, value in settings.items()})
        self._write("resourceconfig", {**hosts, "current_instance_type": "ml.m5.large"})
        self._write("inputdataconfig", {"training": channel, "validation": channel})
        environment = {
            **os.environ,
            "SAGEMAKER_BASE_DIR": str(self.folder),
            "HF_HOME": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            # What requirements.txt names is there; nothing may be fetched.
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        command = [self.python, "-c", START, runner]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=500
        )

    def _write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / "input" / "config" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def container(tmp_path: Path, python: Path) -> Container:
    return Container(tmp_path, python)


def hyperparameters(container: Container, **more: Any) -> dict[str, Any]:
    return {
        "model": str(container.folder / "base"),
        "chunk_length": 128,
        "learning_rate": 1e-2,
        "max_steps": 12,
        "logging_steps": 4,
        "r": 4,
        "bf16": False,
        **more,
    }


def assert_everything_is_in_its_place(container: Container, rank: int = 4) -> None:
    model, data = container.folder / "model", container.folder / "output" / "data"
    assert {path.name for path in model.iterdir()} >= {"config.json", "model.safetensors", "adapter", "code"}
    assert json.loads((model / "adapter" / "adapter_config.json").read_text())["r"] == rank
    assert (model / "code" / "inference.py").is_file()
    assert (data / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((data / "metrics.json").read_text())["eval_loss"] > 0
    assert json.loads((data / "parameter_report.json").read_text())["trainable"] == rank * 2 * (64 + 3 * 64)
    assert (container.folder / "checkpoints" / "checkpoint-12").is_dir()
    assert not (container.folder / "output" / "failure").exists()


@pytest.mark.slow
def test_job_leaves_everything_where_sagemaker_expects_it(container: Container) -> None:
    done = container.run(hyperparameters(container))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_everything_is_in_its_place(container)
    inference = example("inference")
    served = inference.model_fn(str(container.folder / "model"))
    row = twin.dialogues(1, seed=5)[0]
    answer = inference.predict_fn({"inputs": row, "parameters": {"max_new_tokens": 8}}, served)
    assert answer["generated_text"].strip()
    # The adapter alone answers too, over its base.
    (container.folder / "model" / "config.json").unlink()
    served = inference.model_fn(str(container.folder / "model"))
    assert type(served.model).__name__.startswith("Peft")
    assert inference.predict_fn({"inputs": "Hi", "parameters": {"max_new_tokens": 4}}, served)["generated_text"]


@pytest.mark.slow
def test_job_of_two_processes(container: Container) -> None:
    two = {"sagemaker_torch_distributed_enabled": True, "sagemaker_mpi_num_of_processes_per_host": 2}
    done = container.run(hyperparameters(container, **two), runner="TorchDistributed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_everything_is_in_its_place(container)
    # Twelve steps of two accumulated batches on each of two processes are 48 chunks: more than one epoch of them.
    counts = json.loads((container.folder / "output" / "data" / "metrics.json").read_text())
    assert counts["log"][-1]["epoch"] == pytest.approx(48 / counts["data"]["train"]["chunks"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_job_on_a_real_model(container: Container, processes: int) -> None:
    try:
        base = demo_model()
    except DemoError as error:
        pytest.skip(str(error))
    runner = {"sagemaker_torch_distributed_enabled": True, "sagemaker_mpi_num_of_processes_per_host": 2}
    more = {"model": str(base), "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "r": 8}
    more |= runner if processes == 2 else {}
    done = container.run(hyperparameters(container, **more), "TorchDistributed" if processes == 2 else "Process")
    assert done.returncode == 0, done.stdout + done.stderr
    merged = AutoModelForCausalLM.from_pretrained(container.folder / "model", dtype="auto")
    assert merged.config.model_type == "llama"
    metrics = json.loads((container.folder / "output" / "data" / "metrics.json").read_text())
    assert metrics["merge"]["distance"]["agreement"] > 0.9
    assert (container.folder / "output" / "data" / "loss.png").is_file()
    assert (container.folder / "model" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lerning_rate": 1e-3}, "--lerning_rate is not a flag. Did you mean --learning_rate"),
        ({"chunk_length": 100_000}, "fewer than one chunk of 100,000"),
        ({"template": "{dialog}{summary}"}, "Did you mean {dialogue}"),
    ],
)
def test_wrong_hyperparameter_is_the_failure_reason(container: Container, wrong: dict[str, Any], message: str) -> None:
    done = container.run(hyperparameters(container, **wrong))
    assert done.returncode != 0
    assert message in (container.folder / "output" / "failure").read_text()
    assert not list((container.folder / "model").iterdir())
