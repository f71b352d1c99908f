"""Keeps remarks of the libraries that concern nobody here out of a command's output."""

from __future__ import annotations

import logging
import os
import sys
import warnings

__all__ = ["calm"]


#: Who speaks, while it is imported, of optional kernels and of its own future.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def calm() -> None:
    """Silence known remarks, and progress bars where no terminal shows them. Call it before anything is imported."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # PEFT calls a method of transformers by its former name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
