"""Silence library messages that are irrelevant to a command's user."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from lora_plugins.plugins.host import plugin_host

__all__ = ["calm", "quiet"]

#: Logs about its own future while torch (2.13) is imported.
_TALKATIVE = "torch.utils._pytree"


def calm() -> None:
    """Silence known messages, and progress bars where no terminal shows them.

    Call it before the libraries are imported.
    """
    backends = {name for quantizer in plugin_host().quantizers() for name in quantizer.loggers}
    for name in (_TALKATIVE, *backends):
        logging.getLogger(name).setLevel(logging.ERROR)
    # PEFT 0.21.2 calls a method of transformers by its deprecated name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet() -> None:
    """Silence all messages of transformers below errors in this process, and its progress bars.

    Call it before the libraries are imported.
    """
    calm()
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger("transformers")
    # Not the logger's own level: the library's report follows it.
    for handler in logging.getLogger("transformers").handlers:
        handler.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
