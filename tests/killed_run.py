"""Run the program and kill it without warning: ``killed_run.py forward:7 train …`` or ``open:README.md train …``.

``forward:7`` kills in the seventh forward pass of the training; ``open:NAME`` when a file whose path ends in NAME is
opened for writing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_forward(number: int, action: Callable[[], None] = kill) -> Any:
    """Do something in a forward pass of the training; returns the handle that removes the hook."""
    from torch.nn.modules.module import register_module_forward_hook

    seen = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal seen
        # The outermost module, once a pass: gradient checkpointing runs only inner ones again.
        if type(module).__name__ == "PeftModelForCausalLM" and module.training:
            seen += 1
            if seen == number:
                action()

    return register_module_forward_hook(count)


def at_open(name: str) -> None:
    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and "w" in str(arguments[1]) and str(arguments[0]).endswith(name):
            kill()

    sys.addaudithook(watch)


if __name__ == "__main__":
    kind, _, value = sys.argv[1].partition(":")
    at_forward(int(value)) if kind == "forward" else at_open(value)
    from lora_plugins.commands.cli import main

    main(sys.argv[2:])
