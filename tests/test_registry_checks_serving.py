"""Servers that an adapter is for: asked before anything is uploaded, and told by the card and by doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
from adapters import adapted, saved
from safetensors.torch import load_file, save_file

from lora_plugins import AdapterTraits, LoraCallback, Server, ServerRule, judge_adapter, plan
from lora_plugins.adapters.traits import traits_of
from lora_plugins.commands.cli import main
from lora_plugins.errors import UnknownServer
from lora_plugins.plugins.traits import judge, read_traits
from registry import PushToRegistryCallback, check_push, diagnose, push_adapter
from registry.checks.serving import describe_base, judge_serving
from registry.errors import UnservedAdapter
from registry.formats.records import BaseKind, BaseRecord, Fingerprint

NAME = "org/name"
VLLM = r"vllm \(0\.33\.0\) does not serve it: "


@pytest.fixture
def base(tmp_path: Path) -> Any:
    tiny.llama().save_pretrained(tmp_path / "base")
    return tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    ("lora", "serve", "reason"),
    [
        ({"use_dora": True}, "vllm", VLLM + r"DoRA is refused \[vllm/lora/peft_helper\.py\]"),
        ({"r": 520}, ["tgi", "vllm"], VLLM + r"rank 520 is refused; the highest is 512"),
        ({"use_rslora": True}, ["sglang"], r"rsLoRA's scale is ignored without an error"),
        ({"trainable_token_indices": [3]}, "llama.cpp", r"trainable_token_indices has no place in a LoRA file"),
        ({"layers_to_transform": [1]}, "tgi", r"an adapter on some of the layers is left out"),
        ({}, "transformers", r"serve the merged model"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_push_for_a_server_that_will_not_take_it_uploads_nothing(
    lora: dict[str, Any], serve: Any, reason: str, base: Any, tmp_path: Path
) -> None:
    folder = saved(base, tmp_path / "adapter", **lora)
    with pytest.raises(UnservedAdapter, match=reason):
        push_adapter(folder, NAME, version="1.0.0", hub=tmp_path / "registry", serve=serve)
    assert not (tmp_path / "registry").exists()


def test_a_push_for_a_server_that_takes_it_is_published(base: Any, tmp_path: Path) -> None:
    model = adapted(base, use_rslora=True)
    done = push_adapter(model, NAME, version="1.0.0", hub=tmp_path / "registry", serve=["vllm", "llama.cpp"])
    assert done.created


def test_a_server_that_nobody_knows_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnknownServer, match=r"No server 'vlm'\. Did you mean 'vllm'\?"):
        push_adapter(tmp_path / "none", NAME, version="1.0.0", hub=tmp_path / "registry", serve="vlm")
    with pytest.raises(UnknownServer, match=r"Known: llama\.cpp, ollama"):
        check_push(adapted(tiny.llama()), NAME, version="1.0.0", hub=tmp_path / "registry", serve=["vllm", "tgl"])


def test_a_run_that_ends_in_such_a_push_is_refused_before_the_training(base: Any, tmp_path: Path) -> None:
    """An initialization that changes the base does not count: the push makes a plain LoRA of twice the rank of it."""
    for lora in ({"use_dora": True}, {"r": 300, "init_lora_weights": "olora"}):
        with pytest.raises(UnservedAdapter, match=VLLM):
            check_push(adapted(base, **lora), NAME, version="1.0.0", hub=tmp_path / "registry", serve="vllm")
        base = tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    check_push(
        adapted(base, r=4, init_lora_weights="olora"), NAME, version="1.0.0", hub=tmp_path / "registry", serve="vllm"
    )


def test_the_callback_that_publishes_asks_when_training_begins(tmp_path: Path) -> None:
    push = PushToRegistryCallback(NAME, hub=tmp_path / "registry", serve="vllm")
    callbacks = [LoraCallback(r=4, use_dora=True), push]
    trainer = tiny.trainer(tmp_path / "out", callbacks=callbacks, data=tiny.rows(4))
    with pytest.raises(UnservedAdapter, match=VLLM + "DoRA"):
        trainer.train()


def test_the_card_says_which_servers_take_the_release(base: Any, tmp_path: Path) -> None:
    push_adapter(adapted(base, use_rslora=True), NAME, version="1.0.0", hub=tmp_path / "registry")
    (card,) = (tmp_path / "registry").rglob("README.md")
    text = card.read_text()
    assert "Serves on llama.cpp b11549, ollama 008a6caeac6c, tgi 45d95bdccc9d, vllm 0.33.0, by the rules" in text
    assert "Not on sglang 0.5.23, transformers 5.23.0; `lora-plugins servers` says why." in text


def test_another_set_of_rules_does_not_make_another_release(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is not part of what a repeated push compares."""
    model = adapted(base)
    assert push_adapter(model, NAME, version="1.0.0", hub=tmp_path / "registry").created
    monkeypatch.setattr("lora_plugins.plugins.traits._list_servers", list)
    assert not push_adapter(model, NAME, version="1.0.0", hub=tmp_path / "registry").created


def test_doctor_says_which_servers_take_it(
    base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(base, tmp_path / "adapter", use_dora=True)
    with pytest.raises(SystemExit):
        main(["doctor", str(folder)])
    out = capsys.readouterr().out
    assert "serves on: none of the servers whose rules are known" in out
    assert "not on vllm 0.33.0: DoRA is refused [vllm/lora/peft_helper.py]" in out
    with pytest.raises(SystemExit):
        main(["doctor", str(folder), "--json"])
    verdicts = {one["server"]: one for one in json.loads(capsys.readouterr().out)["servers"]}
    assert verdicts["vllm"]["reasons"] == ["DoRA is refused [vllm/lora/peft_helper.py]"]


def test_doctor_knows_the_base_of_a_release_and_the_one_it_is_given(tmp_path: Path) -> None:
    push_adapter(served.write("qwen3", tmp_path), NAME, version="1.0.0", hub=tmp_path / "registry")
    for found in (
        diagnose(f"{NAME}@1.0.0", hub=tmp_path / "registry"),
        diagnose(tmp_path / "adapter", base=tmp_path / "base"),
    ):
        ollama = next(one for one in found.servers if one.server == "ollama")
        assert "loras are not yet implemented" in str(ollama), found.title
    plain = next(one for one in diagnose(tmp_path / "adapter").servers if one.server == "ollama")
    assert "the type of the base" in plain.not_known


def test_doctor_says_that_rules_ask_for_a_base_that_it_was_not_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, it said "serves on vllm" of GPT-2's adapter, and nothing of what it had not looked at."""
    served.write("gpt2", tmp_path)
    for words, on_vllm, asks in (([], True, True), (["--base", str(tmp_path / "base")], False, False)):
        with pytest.raises(SystemExit):
            main(["doctor", str(tmp_path / "adapter"), *words])
        out = capsys.readouterr().out
        assert ("vllm" in out.partition("serves on: ")[2].splitlines()[0]) == on_vllm
        assert ("not known: the type of the base, which some rules ask for; --base says which" in out) == asks


def test_doctor_of_what_is_not_readable_names_no_server(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    assert diagnose(tmp_path).servers == ()


def test_plan_says_which_servers_take_what_would_be_trained() -> None:
    asked = plan(tiny.llama(), use_dora=True, serve="vllm")
    assert asked.serves_on == []
    assert any("vllm (0.33.0) does not serve it: DoRA is refused" in note for note in asked.notes)
    assert "serves on" in str(asked)
    known = plan(tiny.llama(), use_rslora=True)
    assert known.serves_on == ["llama.cpp b11549", "ollama 008a6caeac6c", "tgi 45d95bdccc9d", "vllm 0.33.0"]
    assert not any("does not serve" in note for note in known.notes)
    with pytest.raises(UnknownServer):
        plan(tiny.llama(), serve="vlm")
    changing = plan(tiny.llama(), init_lora_weights="pissa", serve="vllm")
    assert changing.serves_on == []


def test_a_rule_that_fails_leaves_its_question_open() -> None:
    """A fault in one server's rule must neither stop a push nor pass as a verdict."""

    def fail(traits: AdapterTraits) -> str | None:
        raise KeyError("rank")

    verdict = Server("mine", "1.0", (ServerRule("rank", "mine/lora.py", fail),)).judge(AdapterTraits("llama"))
    assert verdict.served
    assert verdict.not_known == ("the rule 'rank', which raised KeyError: 'rank'",)
    assert "the type of the base" in Server("mine", "1.0", ()).judge(AdapterTraits()).not_known


def test_files_and_live_models_are_judged_alike(base: Any) -> None:
    for lora in ({}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 600}}, {"layers_to_transform": [0]}):
        folder_fields = adapted(base, **lora)
        fields = folder_fields.peft_config["default"].to_dict()
        names = [name.replace(".default.", ".") for name, _ in folder_fields.named_parameters() if "lora_" in name]
        found = judge_adapter(fields, names, base.config.to_dict())
        assert found == judge(traits_of(folder_fields)), lora
        base = folder_fields.unload()


def test_the_text_model_of_a_base_for_images_counts() -> None:
    fingerprint = Fingerprint({"text_config.model_type": "qwen3", "text_config.num_hidden_layers": 2})
    described = describe_base(BaseKind("qwen3_vl"), BaseRecord(fingerprint=fingerprint))
    assert read_traits({}, (), described, changes_base=False).model_type == "qwen3"
    assert describe_base(BaseKind(), BaseRecord()) is None
    assert read_traits({}, (), None, changes_base=False).model_type is None


def test_rules_are_asked_without_torch(tmp_path: Path) -> None:
    saved(tiny.llama(), tmp_path / "adapter")
    code = (
        "import sys; from registry import diagnose; "
        f"found = diagnose({str(tmp_path / 'adapter')!r}); "
        "assert len(found.servers) == 6, found.servers; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def rename_tensors(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    ],
    ids=["DDP", "kohya", "wrapped twice", "FSDP"],
)
def test_doctor_names_no_server_for_what_it_calls_broken(
    base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str]
) -> None:
    folder = saved(base, tmp_path / "adapter")
    rename_tensors(folder, change)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(folder)])
    assert ended.value.code == 4
    out = capsys.readouterr().out
    assert "serves on: not judged before the errors are cured" in out
    assert "vllm" not in out
    assert diagnose(folder, fix=tmp_path / "cured").servers == ()
    assert any(one.served for one in diagnose(tmp_path / "cured").servers)


def test_doctor_judges_the_names_that_are_in_the_file(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names with the adapter's name in them are a warning only: PEFT loads them."""
    seen: list[str] = []

    def watch(fields: Any, tensors: Any, known: Any) -> Any:
        seen.extend(tensors)
        return judge_serving(fields, tensors, known)

    monkeypatch.setattr("registry.health.doctor.judge_serving", watch)
    folder = saved(base, tmp_path / "adapter")
    rename_tensors(folder, lambda name: name.replace(".weight", ".default.weight"))
    found = diagnose(folder)
    assert found.severity == "warning"
    assert seen
    assert all(".default." in name for name in seen)
