"""A real vLLM on this machine's CPU answers from a registry. `make test-serving` installs it and names its Python."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapted
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_plugins.commands.demo.model import demo_model
from registry import pull_adapter, push_adapter, set_alias, yank

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("VLLM_PYTHON"), reason="VLLM_PYTHON must be the Python of an environment with vLLM"
    ),
]

REFRESH = 2.0
PROMPT = "The weather today is"
TOKENS = 12


@dataclass
class Server:
    """A vLLM that runs."""

    port: int
    log: Path
    base: str

    def ask(self, model: str, prompt: str = PROMPT, **more: Any) -> tuple[int, dict[str, Any]]:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}
        return self.post("/v1/completions", body)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def models(self) -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=60) as answer:
            return [one["id"] for one in json.load(answer)["data"]]

    def lines(self, part: str) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if part in line]


@pytest.fixture(scope="module")
def base() -> Path:
    return demo_model()


@pytest.fixture(scope="module")
def registry(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of SmolLM2 that a server may have, and some that it must not."""
    place: Path = tmp_path_factory.mktemp("served") / "registry"

    model: Any = AutoModelForCausalLM.from_pretrained(base)

    def push(name: str, version: str, seed: int, model: Any = model, **lora: Any) -> None:
        made = adapted(model, seed, **{"r": 8, "lora_alpha": 48, **lora})
        push_adapter(made, name, version=version, hub=place, allow=lora.get("modules_to_save", ()))
        made.unload()

    push("org/poet", "1.0.0", 1)
    push("org/poet", "1.1.0", 2)
    set_alias("org/poet@1.0.0", "champion", hub=place)
    push("org/fresh", "1.0.0", 3)
    push("org/dora", "1.0.0", 4, use_dora=True)
    push("org/rank", "1.0.0", 5, r=16)
    push("org/norm", "1.0.0", 6, modules_to_save=["norm"])
    push("org/tampered", "1.0.0", 7)
    push("secret/adapter", "1.0.0", 8)
    torch.manual_seed(0)
    push("org/other", "1.0.0", 9, AutoModelForCausalLM.from_config(model.config))
    for weights in (place / "org" / "tampered").rglob("adapter_model.safetensors"):
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(data)
    return place


@pytest.fixture(scope="module")
def server(base: Path, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(base, registry, tmp_path_factory.mktemp("vllm")) as made:
        yield made


@contextmanager
def serving(base: Path, registry: Path, work: Path, *options: str) -> Iterator[Server]:
    """Run a vLLM with a cache of its own; print what the resolver logged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "LORA_PLUGINS_VLLM": str(registry),
        "LORA_PLUGINS_VLLM_ALLOW": "org/*",
        "LORA_PLUGINS_VLLM_REFRESH": str(REFRESH),
        "LORA_REGISTRY_CACHE": str(work / "cache"),
    }
    command = [
        *(os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.cli.main", "serve", str(base)),
        *("--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
        *("--max-cpu-loras", "8", "--max-model-len", "256", "--enforce-eager", "--dtype", "float32", *options),
    ]
    log, begun = work / "vllm.log", time.monotonic()
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=work)
        try:
            made = Server(port, log, str(base))
            wait_for(made, process)
            print(f"\nvLLM answers after {time.monotonic() - begun:.0f}s")
            yield made
        finally:
            process.terminate()
            process.wait(60)
    print("\n".join(made.lines("vllm_resolver")))


def wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 900
    while time.monotonic() < end:
        assert process.poll() is None, server.log.read_text(errors="replace")[-5000:]
        try:
            server.models()
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(server.log.read_text(errors="replace")[-5000:])


def write_greedily(base: Path, registry: Path, reference: str | None, cache: Path) -> str:
    """What transformers writes after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if reference is not None:
        model = pull_adapter(reference, hub=registry, cache_dir=cache).load(model)
    given = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        made = model.eval().generate(**given, max_new_tokens=TOKENS, do_sample=False)
    text: str = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def read_answer(answered: tuple[int, dict[str, Any]]) -> tuple[str, str]:
    status, body = answered
    assert status == 200, body
    return body["model"], body["choices"][0]["text"]


def test_versions_are_answered_by_name_as_transformers_answers(
    server: Server, base: Path, registry: Path, tmp_path: Path
) -> None:
    names = ("org/poet@1.0.0", "org/poet@1.1.0")
    expected = {name: write_greedily(base, registry, name, tmp_path) for name in names}
    plain = write_greedily(base, registry, None, tmp_path)
    assert len({plain, *expected.values()}) == 3
    assert read_answer(server.ask(server.base))[1] == plain
    for name, text in expected.items():
        assert read_answer(server.ask(name)) == (name, text)
        print(f"{name}: {text!r}")
    for name, meant in {"org/poet": "1.1.0", "org/poet@champion": "1.0.0", "org/poet>=1.0,<1.1": "1.0.0"}.items():
        assert read_answer(server.ask(name)) == (f"org/poet@{meant}", expected[f"org/poet@{meant}"])
    assert {"org/poet@1.0.0", "org/poet@1.1.0"} <= set(server.models())


@pytest.mark.parametrize(
    ("name", "status", "told", "logged"),
    [
        ("org/other@1.0.0", 400, "BaseMismatch", "was trained on a base known by its fingerprint"),
        ("org/tampered@1.0.0", 400, "IntegrityError", "adapter_model.safetensors"),
        ("org/dora@1.0.0", 400, "RefusedAdapter", "DoRA is refused [vllm/lora/peft_helper.py]"),
        ("org/norm@1.0.0", 400, "RefusedAdapter", "modules_to_save=['norm'] is refused"),
        ("org/rank@1.0.0", 400, "was found but could not be loaded", "LoRA rank 16 is greater than max_lora_rank 8"),
        ("org/poet@9.9.9", 404, "does not exist", "9.9.9"),
        ("org/poet@nobody", 404, "does not exist", "nobody"),
        ("org/nobody", 404, "does not exist", "org/nobody"),
        ("secret/adapter@1.0.0", 404, "does not exist", "secret/adapter is not allowed"),
        ("no reference at all", 404, "does not exist", "no reference at all"),
    ],
)
def test_what_must_not_answer_is_refused(server: Server, name: str, status: int, told: str, logged: str) -> None:
    found, body = server.ask(name)
    assert (found, "choices" in body) == (status, False)
    assert told in body["error"]["message"]
    assert any(logged in line for line in server.lines(name.partition("@")[0])), server.lines(name)
    print(f"{name}: {found} {body['error']['message']}")


def test_many_first_requests_pull_once(server: Server) -> None:
    begun = time.monotonic()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: read_answer(server.ask("org/fresh@1.0.0")), range(50)))
    assert {model for model, _ in answers} == {"org/fresh@1.0.0"}
    assert len(set(answers)) == 1
    assert len(server.lines("'org/fresh@1.0.0' is org/fresh@1.0.0")) == 1
    print(f"50 first requests at once: pulled once, all answered in {time.monotonic() - begun:.1f}s")


def test_an_alias_that_is_moved_is_followed(server: Server, registry: Path) -> None:
    assert read_answer(server.ask("org/poet@champion"))[0] == "org/poet@1.0.0"
    exact = {name: read_answer(server.ask(f"org/poet@{name}")) for name in ("1.0.0", "1.1.0")}
    set_alias("org/poet@1.1.0", "champion", hub=registry)
    begun = time.monotonic()
    while (found := read_answer(server.ask("org/poet@champion")))[0] != "org/poet@1.1.0":
        assert found == exact["1.0.0"]
        assert time.monotonic() - begun < 60
    took = time.monotonic() - begun
    assert found == exact["1.1.0"]
    assert read_answer(server.ask("org/poet@1.0.0")) == exact["1.0.0"]
    print(f"the alias is followed after {took:.1f}s, with {REFRESH}s between two looks")


def test_a_version_that_is_withdrawn_is_warned_of(server: Server, registry: Path) -> None:
    assert read_answer(server.ask("org/poet@1.0.0"))[0] == "org/poet@1.0.0"
    yank("org/poet@1.0.0", "trained on the test set", hub=registry)
    end = time.monotonic() + 60
    while not server.lines("trained on the test set"):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert read_answer(server.ask("org/poet@1.0.0"))[0] == "org/poet@1.0.0"


def test_what_is_served_stays_when_the_registry_is_gone(server: Server, registry: Path) -> None:
    known = read_answer(server.ask("org/poet@champion"))
    registry.rename(registry.with_name("away"))
    try:
        time.sleep(3 * REFRESH)
        assert read_answer(server.ask("org/poet@champion")) == known
        assert server.ask("org/poet@2.0.0")[0] == 404
    finally:
        registry.with_name("away").rename(registry)


def test_vllm_itself_refuses_several_api_servers_of_one_engine(base: Path, registry: Path, tmp_path: Path) -> None:
    """It keeps adapters in each process, so a resolver is for one. Several vLLMs may share a registry and a cache."""
    with (
        pytest.raises(
            AssertionError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING cannot be used with api_server_count > 1"
        ),
        serving(base, registry, tmp_path, "--api-server-count", "2"),
    ):
        pass
