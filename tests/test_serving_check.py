"""Which servers take an adapter: every rule against a small adapter that breaks it, warned, told and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
from adapters import adapted
from transformers import AutoConfig
from versions import needs

from lora_plugins import (
    AdapterTraits,
    LoraCallback,
    Server,
    ServerRule,
    check_serving,
    export_adapter,
    merge_and_save,
    open_trial,
)
from lora_plugins.adapters.traits import traits_of
from lora_plugins.commands.cli import main
from lora_plugins.errors import MergeError, PreparationError, ServingWarning, UnknownServer, UnsupportedExport
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.plugins.traits import judge
from lora_plugins.serving.gguf_families import FAMILIES
from registry import diagnose, push_adapter

#: What the adapter is made with, and the servers that do not take it. All the others do.
BREAKING: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"use_rslora": True}, {"sglang"}),
    ({"rank_pattern": {"q_proj": 2}}, {"sglang", "tgi"}),
    ({"alpha_pattern": {"q_proj": 3}}, {"sglang", "tgi"}),
    ({"use_dora": True}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
    ({"lora_bias": True}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
    ({"bias": "all"}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
    ({"modules_to_save": ["lm_head"]}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
    ({"trainable_token_indices": [3]}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
    ({"r": 520}, {"vllm"}),
    ({"init_lora_weights": "olora"}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
    ({"init_lora_weights": "gaussian"}, set()),
    ({"layer_replication": [[0, 2], [1, 2]]}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
    ({"target_modules": ["q_proj", "embed_tokens"]}, {"tgi"}),
    ({"target_modules": r".*\.q_proj"}, {"sglang"}),
    ({"layers_to_transform": [1]}, {"tgi"}),
    ({"alora_invocation_tokens": [3, 4]}, {"llama.cpp", "ollama", "sglang", "tgi", "vllm"}),
]


def refusing(traits: AdapterTraits) -> set[str]:
    """The servers that do not take an adapter, but for the one that takes none at all."""
    return {verdict.server for verdict in judge(traits) if not verdict.served} - {"transformers"}


@pytest.mark.parametrize(("lora", "servers"), BREAKING, ids=lambda value: "-".join(sorted(map(str, value))) or "plain")
def test_each_rule_sees_the_adapter_that_breaks_it(lora: dict[str, Any], servers: set[str]) -> None:
    assert refusing(traits_of(adapted(tiny.llama(), **lora))) == servers


def test_every_rule_is_broken_by_one_of_these() -> None:
    """A rule that no adapter here breaks would be untested."""
    found = {
        (server.name, rule.name)
        for server in map(plugin_host().server, plugin_host().server_names())
        for rule in server.rules
    }
    broken = set()
    adapters = [traits_of(adapted(tiny.llama(), **lora)) for lora, _ in BREAKING]
    adapters += [traits_of(served.make_adapter("qwen3_moe", served.make_base("qwen3_moe")))]
    adapters += [traits_of(adapted(tiny.llama(tie_word_embeddings=True), target_modules=["q_proj", "embed_tokens"]))]
    adapters += [AdapterTraits(model_type="falcon_h1"), AdapterTraits(whole_weights=("lm_head.weight",))]
    adapters += [AdapterTraits(modules=("c_attn",))]
    adapters += [AdapterTraits(model_type="gpt2"), AdapterTraits(model_type="qwen2", embeddings=("embed_tokens",))]
    for name in plugin_host().server_names():
        broken |= {(name, rule.name) for rule in plugin_host().server(name).rules if any(map(rule.check, adapters))}
    assert found - broken == set()


def test_an_embedding_that_vllm_calls_otherwise_is_taken() -> None:
    for name, taken in (("embeddings", True), ("wte", False)):
        (verdict,) = judge(AdapterTraits(model_type="nemotron_h", embeddings=(name,)), ["vllm"])
        assert verdict.served is taken, name


def test_rules_name_their_source_and_release() -> None:
    for name in plugin_host().server_names():
        server = plugin_host().server(name)
        assert server.version
        assert all("/" in rule.source for rule in server.rules)


def test_the_types_of_the_rule_are_those_of_the_export() -> None:
    for kind in FAMILIES:
        assert judge(AdapterTraits(model_type=kind), ["llama.cpp"])[0].served
    assert not judge(AdapterTraits(model_type="falcon_h1"), ["llama.cpp"])[0].served


def test_a_stored_adapter_is_judged_like_the_live_one(tmp_path: Path) -> None:
    served.write("qwen3", tmp_path, use_rslora=True)
    verdicts = {verdict.server: verdict for verdict in check_serving(tmp_path / "adapter", base=tmp_path / "base")}
    assert {name for name, verdict in verdicts.items() if verdict.served} == {"llama.cpp", "tgi", "vllm"}
    assert str(verdicts["sglang"]) == (
        "sglang (0.5.23) does not serve it: rsLoRA's scale is ignored without an error: alpha / r is taken "
        "[sglang/srt/lora/lora.py]"
    )
    assert "loras are not yet implemented" in str(verdicts["ollama"])
    with pytest.raises(UnknownServer, match=r"No server .vlm.. Did you mean .vllm."):
        check_serving(tmp_path / "adapter", "vlm", base=tmp_path / "base")


def test_a_release_whose_base_is_not_at_hand_is_judged_by_its_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was trained on a folder that nobody else has: its type is recorded, its place is not."""
    push_adapter(served.write("qwen3", tmp_path, use_rslora=True), "org/name", version="1.0.0", hub=tmp_path / "reg")
    with pytest.raises(SystemExit):
        main(["servers", "org/name@1.0.0", "--hub", str(tmp_path / "reg")])
    out = capsys.readouterr().out
    assert out.startswith("serves on: llama.cpp b11549, tgi 45d95bdccc9d, vllm 0.33.0\n")
    assert "loras are not yet implemented" in out, "the type of the base is known from the manifest"
    with pytest.raises(SystemExit) as ended:
        main(["servers", "org/name@1.0.0", "--hub", str(tmp_path / "reg"), "--serve", "sglang"])
    assert ended.value.code == 1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for named in (None, "nobody/nothing", str(tmp_path / "gone")):
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": named})
        )
        verdicts = {one.server: one for one in check_serving(tmp_path / "adapter")}
        assert "the type of the base" in verdicts["ollama"].not_known
        assert not verdicts["sglang"].served
    with pytest.raises(MergeError):
        check_serving(tmp_path / "adapter", base=tmp_path / "gone")
    with pytest.raises(MergeError):
        check_serving(tmp_path / "adapter", revision="deadbeef")


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "\x00", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_one_line_wherever_an_adapter_is_read(text: str, tmp_path: Path) -> None:
    """Before: json's own error, or a TypeError of PEFT."""
    served.write("llama", tmp_path)
    folder, base = tmp_path / "adapter", tmp_path / "base"
    (folder / "adapter_config.json").write_text(text)
    for read in (
        lambda: check_serving(folder),
        lambda: export_adapter(folder, tmp_path / "a.gguf", "gguf", base=base),
        lambda: merge_and_save(folder, tmp_path / "merged", "bf16", base=base),
        lambda: open_trial(folder, base=base),
    ):
        with pytest.raises(PreparationError, match=r"adapter_config\.json in .* cannot be read: .*lora-plugins doctor"):
            read()


def test_an_export_to_a_server_that_will_not_take_it_is_refused(tmp_path: Path) -> None:
    served.write("llama", tmp_path, use_rslora=True)
    with pytest.raises(UnsupportedExport, match=r"rsLoRA's scale is ignored without an error.*merged=True"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "sglang", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_training_for_a_server_that_will_not_take_it_warns(tmp_path: Path) -> None:
    with pytest.warns(
        ServingWarning, match=r"The adapter is for vllm: vllm \(0.33.0\) does not serve it: DoRA is refused"
    ):
        tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4, use_dora=True, serve="vllm")], data=tiny.rows(4))
    with pytest.raises(UnknownServer, match="No server 'vlm'"):
        LoraCallback(serve="vlm")


def test_training_for_a_server_that_takes_it_says_nothing(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4, serve="vllm")], data=tiny.rows(4))


def test_transformers_own_server_needs_a_merged_model(tmp_path: Path) -> None:
    """It reads the configuration of what it is given, and an adapter has none."""
    served.write("llama", tmp_path)
    with pytest.raises(Exception, match=r"config.json|model_type"):
        AutoConfig.from_pretrained(tmp_path / "adapter")
    assert not check_serving(tmp_path / "adapter", "transformers", base=tmp_path / "base")[0].served


def test_the_command_lists_the_servers_and_fails_for_the_one_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.write("llama", tmp_path, use_rslora=True)
    for words, code in (([], 0), (["--serve", "sglang"], 1), (["--serve", "vllm"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(["servers", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), *words])
        assert int(ended.value.code or 0) == code
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "serves on: llama.cpp b11549, ollama 008a6caeac6c, tgi 45d95bdccc9d, vllm 0.33.0"


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "lm_head"]}], ids=["attention", "head"])
def test_a_grown_vocabulary_is_saved_whole_and_no_server_takes_that(lora: dict[str, Any], tmp_path: Path) -> None:
    """vLLM refuses the adapter, the others leave the rows out. It is said of the live model and of its file alike."""
    tiny.llama().save_pretrained(tmp_path / "base")
    base = tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 4, mean_resizing=False)
    model = adapted(base, **lora)
    reason = r"the whole .*model\.embed_tokens\.weight in its file is refused: its tensors have no LoRA name"
    assert re.search(reason, str(judge(traits_of(model), ["vllm"])[0]))
    push_adapter(model, "org/name", version="1.0.0", hub=tmp_path / "registry")
    found = diagnose("org/name@1.0.0", hub=tmp_path / "registry").servers
    assert [one.server for one in found if one.served] == []
    assert re.search(reason, " ".join(map(str, found)))


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"]], ids=["embedding", "head"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_a_release_holds_no_copy_of_what_has_no_adapter(targets: list[str], tied: bool, tmp_path: Path) -> None:
    """The head beside an adapted embedding is the base's: vLLM refuses an adapter that holds it."""
    tiny.llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = adapted(tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base"), target_modules=targets)
    done = push_adapter(model, "org/name", version="1.0.0", hub=tmp_path / "registry")
    whole = [name for name in done.manifest.tensors if "lora_" not in name]
    assert all(name.endswith(f"{targets[1]}.base_layer.weight") for name in whole), whole
    assert len(whole) == 1
    assert judge(traits_of(model), ["vllm"])[0].served


@pytest.mark.parametrize(
    ("make", "targets", "reason"),
    [
        ("gpt2", ["c_attn"], "its class for a 'gpt2' takes no adapter"),
        ("bloom", ["query_key_value"], "its class for a 'bloom' takes no adapter"),
        ("mistral", ["q_proj", "embed_tokens"], "an adapter on embed_tokens of a 'mistral' is refused"),
        ("qwen2", ["q_proj", "lm_head"], "an adapter on lm_head of a 'qwen2' is refused"),
        pytest.param(
            "gpt_neox",
            ["query_key_value", "lm_head"],
            "an adapter on lm_head of a 'gpt_neox' is refused",
            marks=needs("transformers", "5.23", "it calls the head of GPT-NeoX embed_out"),
        ),
        ("smollm3", ["q_proj", "lm_head"], "an adapter on lm_head of a 'smollm3' is refused"),
        ("mistral", ["q_proj"], None),
        ("phi3", ["qkv_proj", "lm_head"], None),
        ("smollm3", ["q_proj", "embed_tokens"], None),
    ],
)
def test_vllm_is_asked_by_the_type_of_the_base(make: str, targets: list[str], reason: str | None) -> None:
    """Before, GPT-2's adapter was said to be served: vLLM does not start with it."""
    made = adapted(served.make_base(make), target_modules=targets, fan_in_fan_out=make == "gpt2")
    (verdict,) = judge(traits_of(made), ["vllm"])
    assert verdict.served == (reason is None)
    assert reason is None or reason in str(verdict)


@pytest.mark.parametrize(
    ("make", "targets", "refused"),
    [
        ("gpt2", ["c_attn"], "c_attn"),
        ("bloom", ["query_key_value", "dense"], "dense, query_key_value"),
        ("starcoder2", ["q_proj", "c_fc"], "c_fc"),
        ("starcoder2", ["q_proj", "o_proj"], None),
        ("phi3", ["qkv_proj", "gate_up_proj", "lm_head"], None),
    ],
)
def test_sglang_is_asked_by_the_names_of_the_modules(make: str, targets: list[str], refused: str | None) -> None:
    """Before, an adapter was said to be served whose modules it raises a NotImplementedError for."""
    made = adapted(served.make_base(make), target_modules=targets, fan_in_fan_out=make == "gpt2")
    (verdict,) = judge(traits_of(made), ["sglang"])
    assert verdict.reasons == (
        (f"an adapter on {refused} is refused: it knows no size of these [sglang/srt/lora/utils.py]",)
        if refused
        else ()
    )


def test_a_plugin_adds_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = ServerRule("rank", "mine/lora.py", lambda traits: "too high" if traits.rank > 4 else None)
    server = Server("mine", "1.0", (rule,))
    assert not server.judge(AdapterTraits(rank=8)).served
    assert str(server.judge(AdapterTraits("llama", rank=4))) == "mine (1.0) serves it"
    for wrong in ({"name": ""}, {"version": 1}, {"rules": rule}):
        with pytest.raises(TypeError, match="must be"):
            Server(**{"name": "mine", "version": "1.0", "rules": (rule,), **wrong})
    host = PluginHost()
    assert host.server_names() == ["llama.cpp", "ollama", "sglang", "tgi", "transformers", "vllm"]
