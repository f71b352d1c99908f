"""What vLLM's own `PEFTHelper` and loader say of adapters, beside what the rules, cards and `doctor` say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from adapters import adapted
from test_serving_check import BREAKING

from lora_plugins.builtin.servers.vllm_types import ENDS, WITHOUT_ADAPTERS
from lora_plugins.commands.cli import main
from registry import pull_adapter, push_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("VLLM_PYTHON") and find_spec("vllm") is None,
        reason="vLLM is not installed; `make test-vllm-interface` does so",
    ),
]


def ask_vllm(question: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return vLLM's answers to a question of ``vllm_code.py``, one for each list of arguments."""
    if not os.environ.get("VLLM_PYTHON"):
        ask = importlib.import_module("vllm_code").QUESTIONS[question]
        return [ask(*one) for one in arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [os.environ["VLLM_PYTHON"], str(Path(__file__).with_name("vllm_code.py")), question, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**environment, "VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[Any] = json.loads(done.stdout.partition("ANSWERS")[2])
    return answers


def test_vllms_own_helper_gives_the_same_verdicts(tmp_path: Path) -> None:
    """`PEFTHelper` reads the configuration only; what its loader refuses by the tensors' names is left out here."""
    cases = [(lora, servers) for lora, servers in BREAKING if "trainable_token_indices" not in lora]
    folders = []
    for index, (lora, _) in enumerate(cases):
        folder = tmp_path / str(index)
        adapted(tiny.llama(), **lora).save_pretrained(folder, save_embedding_layers=False)
        folders.append(str(folder))
    answers = ask_vllm("helper", [(folder,) for folder in folders])
    for (lora, servers), answer in zip(cases, answers, strict=True):
        print(f"{lora}: {answer or 'taken'}")
        assert bool(answer) == ("vllm" in servers), lora


def test_vllms_classes_take_what_the_rules_say() -> None:
    kinds = sorted({*WITHOUT_ADAPTERS, *ENDS})
    answers = ask_vllm("takes", [(kind,) for kind in kinds])
    known = {kind: answer for kind, answer in zip(kinds, answers, strict=True) if answer is not None}
    said = {kind: [kind not in WITHOUT_ADAPTERS, sorted(ENDS.get(kind, ()))] for kind in known}
    print(f"{len(known)} classes: {sum(not takes for takes, _ in known.values())} take no adapter")
    assert known == said
    # Classes that this release of vLLM does not have, or that other classes stand for.
    assert set(kinds) - set(known) == {
        "beam", "dots3_note", "dots3_note_text", "flint", "gemma3", "kolibri1", "qwen3_5", "qwen3_5_text",
        "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text",
    }  # fmt: skip


#: Adapters by what they are made with, and whether vLLM 0.32 loads the release.
PUBLISHED: list[tuple[str, dict[str, Any], bool]] = [
    ("plain", {}, True),
    ("all linear layers", {"target_modules": "all-linear"}, True),
    ("rsLoRA", {"use_rslora": True}, True),
    ("ranks by pattern", {"rank_pattern": {"q_proj": 2}}, True),
    ("scales by pattern", {"alpha_pattern": {"q_proj": 3}}, True),
    ("some layers", {"layers_to_transform": [1]}, True),
    ("input embedding", {"target_modules": ["q_proj", "embed_tokens"]}, True),
    ("olora", {"init_lora_weights": "olora"}, True),
    ("DoRA", {"use_dora": True}, False),
    ("biases of the factors", {"lora_bias": True}, False),
    ("biases of the base", {"bias": "lora_only"}, False),
    ("a saved head", {"modules_to_save": ["lm_head"]}, False),
    ("trained tokens", {"trainable_token_indices": [3]}, False),
    ("rank 520", {"r": 520}, False),
    ("a grown vocabulary", {"tokens": 4}, False),
]


def publish_and_judge(
    name: str, lora: dict[str, Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, bool, bool]:
    """Push an adapter; return the release's folder, and whether its card and doctor say that vLLM serves it."""
    tiny.llama().save_pretrained(root / "base")
    base, lora = tiny.LlamaForCausalLM.from_pretrained(root / "base"), dict(lora)
    tokens = lora.pop("tokens", 0)
    if tokens:
        base.resize_token_embeddings(base.config.vocab_size + tokens, mean_resizing=False)
    model = adapted(base, **lora)
    push_adapter(model, "org/name", version="1.0.0", hub=root / "registry", allow=lora.get("modules_to_save", ()))
    folder = Path(pull_adapter("org/name@1.0.0", hub=root / "registry", cache_dir=root / "cache").path)
    (card,) = (root / "registry").rglob("README.md")
    (line,) = (one for one in card.read_text().splitlines() if "erves on" in one and "lora-plugins servers" in one)
    on_card = "vllm" in line.partition("Not on")[0].partition("by the rules")[0]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["doctor", str(folder)])
    (told,) = (one for one in capsys.readouterr().out.splitlines() if one.strip().startswith("serves on:"))
    with capsys.disabled():
        print(f"\n{name}: {line}\n{name}: doctor: {told.strip()}")
    return folder, on_card, "vllm" in told


def test_what_card_and_doctor_say_is_what_vllms_loader_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = {
        name: publish_and_judge(name, lora, tmp_path / str(index), capsys)
        for index, (name, lora, _) in enumerate(PUBLISHED)
    }
    answers = ask_vllm("load", [(str(folder), tiny.VOCABULARY) for folder, *_ in judged.values()])
    with capsys.disabled():
        print(f"\n{'adapter':22} card  doctor  vLLM's PEFTHelper and loader")
        for (name, (_, card, doctor)), answer in zip(judged.items(), answers, strict=True):
            print(f"{name:22} {'yes' if card else 'no':5} {'yes' if doctor else 'no':7} {answer[:150] or 'loaded'}")
    for (name, _, loaded), (_, card, doctor), answer in zip(PUBLISHED, judged.values(), answers, strict=True):
        assert (card, doctor, not answer) == (loaded, loaded, loaded), (name, answer)
