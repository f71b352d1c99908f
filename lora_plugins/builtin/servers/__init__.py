"""The servers whose source was read; each rule names the file."""

from __future__ import annotations

from collections.abc import Iterable

from lora_plugins import Server, hookimpl
from lora_plugins.builtin.servers.llama import LLAMA_CPP, OLLAMA
from lora_plugins.builtin.servers.torch_servers import SGLANG, TGI, TRANSFORMERS, VLLM

__all__ = ["register_servers"]


@hookimpl
def register_servers() -> Iterable[Server]:
    return [LLAMA_CPP, OLLAMA, SGLANG, TGI, TRANSFORMERS, VLLM]
