"""The resolver in vLLM's own `OpenAIServingModels`, without an engine: what it keeps, answers and refuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm.lora.resolver", reason="vLLM is not installed; `make test-serving` does so")

import tiny
from adapters import adapted
from fastapi import HTTPException
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry

from lora_plugins.serving.resolver_settings import ResolverSettings
from lora_plugins.serving.vllm_entry import register
from lora_plugins.serving.vllm_resolver import PinnedRequest, RegistryResolver
from registry import push_adapter, remove_alias, set_alias, yank
from registry.testing import LoopbackHub

Steps = Callable[[OpenAIServingModels, "Engine"], Awaitable[None]]


class Engine:
    """What a server asks of its engine: to load adapters. It takes all but those in ``refused``."""

    def __init__(self, base: Path) -> None:
        self.model_config = SimpleNamespace(model=str(base), revision=None, max_model_len=64)
        self.renderer = self.input_processor = None
        self.loaded: list[LoRARequest] = []
        self.refused: tuple[str, ...] = ()

    async def add_lora(self, request: LoRARequest) -> bool:
        if request.lora_name in self.refused:
            raise ValueError("LoRA rank 16 is greater than max_lora_rank 8.")
        self.loaded.append(request)
        return True


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def registry(base: Path, tmp_path: Path) -> Path:
    place = tmp_path / "registry"
    for version, seed in (("1.0.0", 1), ("1.1.0", 2)):
        push(base, place, version, seed)
    set_alias("org/name@1.0.0", "champion", hub=place)
    return place


def push(base: Path, place: Any, version: str, seed: int = 1, **options: Any) -> None:
    model = tiny.LlamaForCausalLM.from_pretrained(base)
    push_adapter(adapted(model, seed), "org/name", version=version, hub=place, **options)


def drive(base: Path, settings: ResolverSettings, steps: Steps) -> None:
    """Run some steps with a server that has one resolver."""

    async def run() -> None:
        LoRAResolverRegistry.resolvers.clear()
        LoRAResolverRegistry.register_resolver("lora-plugins", RegistryResolver(settings))
        engine = Engine(base)
        models = OpenAIServingModels(engine, [BaseModelPath("base", str(base))])
        try:
            await steps(models, engine)
        finally:
            LoRAResolverRegistry.resolvers.clear()

    asyncio.run(run())


async def wait_until(done: Callable[[], bool]) -> None:
    for _ in range(600):
        if done():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen within 30 s")


def test_the_entry_point_registers_in_vllm(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PLUGINS_VLLM", str(registry))
    LoRAResolverRegistry.resolvers.clear()
    register()
    register()
    assert list(LoRAResolverRegistry.get_supported_resolvers()) == ["lora-plugins"]
    LoRAResolverRegistry.resolvers.clear()


def test_names_are_answered_under_their_version_with_its_own_number(registry: Path, base: Path) -> None:
    numbers: list[dict[str, int]] = []

    async def steps(models: OpenAIServingModels, engine: Engine) -> None:
        found = [await models.resolve_lora(name) for name in ("org/name@champion", "org/name", "org/name@1.0.0")]
        assert [models.model_name(one) for one in found] == ["org/name@1.0.0", "org/name@1.1.0", "org/name@1.0.0"]
        numbers.append({one.lora_name: one.lora_int_id for one in found})
        shown = [card.id for card in (await models.show_available_models()).data]
        assert shown == ["base", "org/name@1.0.0", "org/name@1.1.0", "org/name@1.0.0"]
        assert found[0].lora_int_id == found[2].lora_int_id > 1000

    drive(base, ResolverSettings(str(registry)), steps)
    drive(base, ResolverSettings(str(registry)), steps)
    assert numbers[0] == numbers[1]


def test_a_request_is_equal_to_vllms_own_of_that_name() -> None:
    pinned = PinnedRequest(lora_name="org/name@1.0.0", lora_int_id=7, lora_path="/somewhere")
    pinned.lora_int_id = 1
    pinned.base_model_name = "base"
    assert (pinned.lora_int_id, pinned.base_model_name) == (7, "base")
    other = LoRARequest(lora_name="org/name@1.0.0", lora_int_id=1, lora_path="/somewhere")
    assert pinned == other
    assert other == pinned
    assert hash(pinned) == hash(other)


def test_refusals_have_a_status_and_their_reason_is_in_the_log(
    registry: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny.llama()
    other.get_input_embeddings().weight.data += 0.1
    other.save_pretrained(base)
    logging.getLogger("vllm").propagate = True

    async def steps(models: OpenAIServingModels, engine: Engine) -> None:
        with pytest.raises(HTTPException) as refused:
            await models.resolve_lora("org/name@1.0.0")
        assert refused.value.status_code == 400
        assert str(base.parent) not in refused.value.detail
        for name in ("org/name@9.9.9", "org/none", "other/name", "no reference"):
            answer = await models.resolve_lora(name)
            assert isinstance(answer, ErrorResponse)
            assert answer.error.code == 404
        assert not models.lora_requests
        assert not engine.loaded

    drive(base, ResolverSettings(str(registry), ("org/*",)), steps)
    assert "BaseMismatch" in caplog.text
    assert "other/name is not allowed" in caplog.text


def test_what_the_engine_refuses_is_refused(registry: Path, base: Path) -> None:
    async def steps(models: OpenAIServingModels, engine: Engine) -> None:
        engine.refused = ("org/name@1.0.0",)
        answer = await models.resolve_lora("org/name@1.0.0")
        assert answer.error.code == 400
        assert "org/name@1.0.0" not in models.lora_requests

    drive(base, ResolverSettings(str(registry)), steps)


def test_names_that_move_are_followed_and_others_are_not(registry: Path, base: Path) -> None:
    async def steps(models: OpenAIServingModels, engine: Engine) -> None:
        names = ("org/name@champion", "org/name", "org/name>=1.0,<1.1", "org/name@1.0.0")
        for name in names:
            await models.resolve_lora(name)
        set_alias("org/name@1.1.0", "champion", hub=registry)
        push(base, registry, "1.2.0", 3)
        kept = models.lora_requests
        await wait_until(lambda: kept[names[0]].lora_name == "org/name@1.1.0")
        await wait_until(lambda: kept[names[1]].lora_name == "org/name@1.2.0")
        assert [kept[name].lora_name for name in names[2:]] == ["org/name@1.0.0", "org/name@1.0.0"]
        assert engine.loaded[-1].lora_name in ("org/name@1.1.0", "org/name@1.2.0")
        remove_alias("org/name", "champion", hub=registry)
        await wait_until(lambda: names[0] not in kept)
        assert (await models.resolve_lora(names[0])).error.code == 404

    drive(base, ResolverSettings(str(registry), refresh=0.1), steps)


def test_a_name_stays_where_its_next_version_is_refused(
    registry: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("vllm").propagate = True

    async def steps(models: OpenAIServingModels, engine: Engine) -> None:
        await models.resolve_lora("org/name@champion")
        engine.refused = ("org/name@1.1.0",)
        set_alias("org/name@1.1.0", "champion", hub=registry)
        await wait_until(lambda: "stays org/name@1.0.0: ValueError: LoRA rank 16" in caplog.text)
        assert models.lora_requests["org/name@champion"].lora_name == "org/name@1.0.0"
        yank("org/name@1.0.0", "trained on the test set", hub=registry)
        engine.refused = ()
        await wait_until(lambda: models.lora_requests["org/name@champion"].lora_name == "org/name@1.1.0")

    drive(base, ResolverSettings(str(registry), refresh=0.1), steps)


def test_a_name_beyond_the_limit_takes_the_place_of_the_oldest(
    registry: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_plugins.serving.vllm_resolver._MOST_NAMES", 2)

    async def steps(models: OpenAIServingModels, engine: Engine) -> None:
        names = ("org/name", "org/name>=1", "org/name>=1.0", "org/name")
        for name in names:
            assert (await models.resolve_lora(name)).lora_name == "org/name@1.1.0"
        assert list(models.lora_requests) == ["org/name>=1.0", "org/name"]
        push(base, registry, "1.2.0", 3)
        await wait_until(lambda: models.lora_requests["org/name"].lora_name == "org/name@1.2.0")

    drive(base, ResolverSettings(str(registry), refresh=0.1), steps)


def test_a_name_that_moves_is_refused_where_it_cannot_be_followed(registry: Path, base: Path) -> None:
    async def ask() -> None:
        resolver = RegistryResolver(ResolverSettings(str(registry)))
        found = await resolver.resolve_lora(str(base), "org/name@1.0.0")
        assert found is not None
        with pytest.raises(HTTPException) as refused:
            await resolver.resolve_lora(str(base), "org/name@champion")
        assert refused.value.status_code == 400

    asyncio.run(ask())


def test_fifty_first_requests_download_once_and_a_hub_that_is_down_is_no_fault_of_the_asker(
    base: Path, loopback_hub: LoopbackHub
) -> None:
    loopback_hub.create_repo("org/base")
    loopback_hub.commit("org/base", {file.name: file.read_bytes() for file in base.iterdir()})
    push(base, loopback_hub.endpoint, "1.0.0", token=loopback_hub.token, base_model="org/base")
    loopback_hub.requests.clear()

    async def steps(models: OpenAIServingModels, engine: Engine) -> None:
        names = ["org/name@1.0.0", "org/name", "org/name>=1", "org/name==1.0"]
        found = await asyncio.gather(*(models.resolve_lora(names[index % 4]) for index in range(50)))
        assert {one.lora_name for one in found} == {"org/name@1.0.0"}
        pulled = [one for one in loopback_hub.requests if one.path.endswith("adapter_model.safetensors")]
        assert len([one for one in pulled if one.route == "resolve" and one.method == "GET"]) == 1, pulled
        loopback_hub.faults.refuse_connection("*", times=None)
        assert (await models.resolve_lora("org/name")).lora_name == "org/name@1.0.0"
        with pytest.raises(HTTPException) as down:
            await models.resolve_lora("org/name@2.0.0")
        assert down.value.status_code == 503

    drive(base, ResolverSettings(loopback_hub.endpoint, ("org/*",)), steps)
