"""Makes ``tests/data/version_0_1_0``: one of each thing that lora-plugins writes to disk, as an old version writes it.

This was run once, with version 0.1.0 at commit 2b0c6fa, and is kept so that one can see how the data came about. What
later versions have to read is what that version wrote, so nothing is ever made anew: the script refuses to overwrite,
and refuses to run with another commit. The data of another version is made by a copy of it, into a folder of its own.

::

    git clone . /tmp/old && git -C /tmp/old checkout 2b0c6fa
    cd /tmp/old && PYTHONPATH=/tmp/old:/tmp/old/tests python …/tests/make_old_releases.py

No path of the machine may get into the data: all is made with relative paths in a temporary folder, and where an
address of the folder registry is written, ``file:///old-registry`` takes its place. The tests put theirs there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import twin
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora_plugins
from lora_plugins import LoraCallback, ParameterReportCallback
from registry import (
    FolderHub,
    HuggingFaceHub,
    PushToRegistryCallback,
    mirror,
    pull_adapter,
    push_adapter,
    remove_alias,
    set_alias,
    show,
    versions,
    yank,
)
from registry.testing import LoopbackHub

COMMIT = "2b0c6fa"
TARGET = Path(__file__).resolve().parent / "data" / "version_0_1_0"
#: What stands in the data for the address of the folder registry.
OLD_REGISTRY = "file:///old-registry"
#: Where the hub listened from which a part of the cache was filled.
PORT = 47811
REGISTRY = Path("registry")
PROMPT = [[5, 17, 101, 250, 7, 44, 300, 12]]


def make_base() -> None:
    """A Llama of 2 layers and hidden size 16 with random weights, and a tokenizer of 320 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("base")
    twin.make_tokenizer().save_pretrained("base")


def base() -> Any:
    """The base model, from its folder."""
    return AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)


def adapted(model: Any, seed: int, **lora: Any) -> PeftModel:
    """A model with adapters that change something."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.requires_grad and "lora" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_rows() -> Dataset:
    """Training rows; the tests read them from the file."""
    generator = random.Random(1)
    rows = [[generator.randrange(4, 320) for _ in range(12)] for _ in range(16)]
    Path("rows.json").write_text(json.dumps(rows) + "\n")
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def trainer(folder: str, rows: Dataset, *callbacks: Any, more: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """A Trainer of four steps."""
    given: dict[str, Any] = {
        "output_dir": folder, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 7,
        "save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, **arguments,
    }  # fmt: skip
    return Trainer(
        model=base(), args=TrainingArguments(**given), train_dataset=rows, callbacks=list(callbacks), **(more or {})
    )


def fill_registry(rows: Dataset) -> None:
    """All kinds of releases, by `push_adapter` and by `PushToRegistryCallback`."""
    name, of = "org/summaries", f"org/base@{'b' * 40}"
    metrics = {"rouge": 0.41, "loss": 1.5}
    push_adapter(adapted(base(), 1), name, version="1.0.0", hub=REGISTRY, base_model=of)
    push_adapter(adapted(base(), 2, r=2), name, version="minor", hub=REGISTRY, base_model=of, metrics=metrics)
    push_adapter(adapted(base(), 3, target_modules="all-linear"), name, version="1.2.0", hub=REGISTRY, base_model=of)
    push_adapter(adapted(base(), 4, use_rslora=True), name, version="2.0.0rc1", hub=REGISTRY, base_model=of)
    yank(f"{name}@1.2.0", "trained on the test set", hub=REGISTRY)
    set_alias(f"{name}@1.0.0", "champion", hub=REGISTRY)
    set_alias(f"{name}@1.1.0", "champion", hub=REGISTRY, expect="1.0.0")
    set_alias(f"{name}@2.0.0rc1", "candidate", hub=REGISTRY)
    remove_alias(name, "candidate", hub=REGISTRY)

    dora = adapted(base(), 5, use_dora=True, modules_to_save=["lm_head"], rank_pattern={"v_proj": 2})
    push_adapter(dora, "org/dora", version="1.0.0", hub=REGISTRY)

    grown = base()
    grown.resize_token_embeddings(322, mean_resizing=False)
    tokenizer = twin.make_tokenizer()
    tokenizer.add_tokens(["<ask>", "<answer>"])
    tokens = adapted(grown, 6)
    run = Trainer(
        model=tokens,
        args=TrainingArguments("tokens", report_to=[], use_cpu=True),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    push_adapter(run, "org/tokens", version="0.1.0rc1", hub=REGISTRY)

    push = PushToRegistryCallback("org/counting", version="minor", hub=REGISTRY)
    more = {"eval_dataset": rows.select(range(4)), "processing_class": twin.make_tokenizer()}
    callback = LoraCallback(r=4, quantization="int8", lora_dropout=0.0)
    trainer("first", rows, callback, push, more=more, eval_strategy="steps", eval_steps=2).train()
    pulled = pull_adapter("org/counting@0.1.0", hub=REGISTRY, cache_dir="other-cache")
    push = PushToRegistryCallback("org/counting", version="minor", hub=REGISTRY)
    trainer("second", rows, LoraCallback(adapter=Path(pulled)), push, max_steps=2).train()


def fill_cache() -> dict[str, str]:
    """What was pulled from the folder, and from a hub on the network; and a lock file, which fixes an old version."""
    pull_adapter("org/summaries@1.0.0", hub=REGISTRY, cache_dir="cache", lock="adapters.lock")
    pull_adapter("org/dora", hub=REGISTRY, cache_dir="cache", lock="adapters.lock")
    with LoopbackHub(port=PORT) as server:
        hub = HuggingFaceHub(server.endpoint, server.token)
        mirror("org/summaries", hub, hub=REGISTRY)
        for reference in ("org/summaries", "org/summaries@2.0.0rc1"):
            pull_adapter(reference, hub=hub, cache_dir="cache", lock=False)
        return {"hub": server.endpoint, **{r.version: r.commit for r in versions("org/summaries", hub=hub)}}


def hide_address() -> None:
    """Put `OLD_REGISTRY` where the address of the folder was written."""
    address = FolderHub(REGISTRY).location
    lock = Path("adapters.lock")
    lock.write_text(lock.read_text().replace(address, OLD_REGISTRY))
    os.rename(Path("cache", "seen", record_folder(address)), Path("cache", "seen", record_folder(OLD_REGISTRY)))


def record_folder(address: str) -> str:
    """The folder of the cache in which is remembered what a registry said."""
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def train(rows: Dataset) -> None:
    """An adapter that was saved when its run was over, and a checkpoint in the middle of that run."""
    callbacks = [LoraCallback(r=4, lora_dropout=0.0), ParameterReportCallback()]
    run = trainer("run", rows, *callbacks, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model("adapter")
    shutil.rmtree("run/checkpoint-4")


def train_command() -> None:
    """The same of ``lora-plugins train``: the folder of a run that was killed after its first checkpoint."""
    twin.write_jsonl(Path("train.jsonl"), twin.dialogues(24))
    Path("run.yaml").write_text(
        "model: base\ndataset: train.jsonl\noutput_dir: command\nchunk_length: 64\nlora_dropout: 0.0\nmax_steps: 4\n"
        "save_strategy: steps\nsave_steps: 2\nlearning_rate: 0.01\nmerge: none\nreport_to: none\nuse_cpu: true\n"
    )
    subprocess.run([sys.executable, "-m", "lora_plugins", "train", "--config", "run.yaml"], check=True)
    os.rename("command/adapter", "command-adapter")
    for path in Path("command").iterdir():
        if path.name not in ("run.json", "checkpoint-2"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def logits(model: Any) -> torch.Tensor:
    """What a model says, the last three places of it."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(PROMPT)).logits[:, -3:].contiguous()


def expect(remote: dict[str, str]) -> None:
    """What the tests have to find."""
    tensors, facts = {}, {}
    for name in ("summaries", "dora", "tokens", "counting"):
        for release in versions(f"org/{name}", hub=REGISTRY):
            digest = show(str(release), hub=REGISTRY).manifest.digest
            facts[str(release)] = {"commit": release.commit, "digest": digest}
            adapter = pull_adapter(str(release), hub=REGISTRY, lock=False, cache_dir="other-cache")
            tensors[str(release)] = logits(adapter.load(Path("base")))
    for folder in ("adapter", "command-adapter"):
        tensors[folder] = logits(PeftModel.from_pretrained(base(), folder))
    merged = [sys.executable, "-m", "lora_plugins", "merge"]
    environment = {**os.environ, "LORA_REGISTRY": FolderHub(REGISTRY).location}
    # The manifest of the first says "bitsandbytes 8-bit", which the command of that version does not know.
    for source, target, *more in (
        ("org/counting@0.1.0", "merged", "--quantization", "int8"),
        ("./command-adapter", "merged-command"),
    ):
        command = [*merged, source, target, "--base", "base", "--dtype", "same", *more]
        subprocess.run(command, check=True, env=environment)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        tensors[f"merged {source.removeprefix('./')}"] = logits(model)
    save_file(tensors, "expected.safetensors")
    content = {"prompt": PROMPT, "releases": facts, "remote": remote}
    Path("expected.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def make() -> None:
    """Everything, in the working directory."""
    make_base()
    rows = make_rows()
    fill_registry(rows)
    remote = fill_cache()
    train(rows)
    train_command()
    expect(remote)
    hide_address()


def copy() -> None:
    """Take what is data; git keeps no read-only bits, so they go here, too."""
    kept = ("base", "registry", "cache", "adapter", "run", "command", "command-adapter")
    TARGET.mkdir(parents=True)
    for name in kept:
        shutil.copytree(name, TARGET / name)
    for name in ("adapters.lock", "rows.json", "train.jsonl", "run.yaml", "expected.json", "expected.safetensors"):
        shutil.copy(name, TARGET)
    for path in [TARGET, *TARGET.rglob("*")]:
        path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWUSR)
    for folder in sorted((path for path in TARGET.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()  # git keeps no empty folders either
    (TARGET.parent / ".gitattributes").write_text("# Bytes that are hashed: no ends of lines are changed.\n* -text\n")


def main() -> None:
    """Check that this is the right version and that nothing would be lost, then make the data."""
    root = Path(lora_plugins.__file__).parent.parent
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    if not head.stdout.startswith(COMMIT):
        sys.exit(f"{root} is at {head.stdout.strip()[:7]}, and this data is that of {COMMIT}")
    if TARGET.exists():
        sys.exit(f"{TARGET} is there, and is never made anew: what it holds was written by an old version")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["LORA_REGISTRY_CACHE"] = str(Path(folder, "other-cache"))
        make()
        copy()


if __name__ == "__main__":
    main()
