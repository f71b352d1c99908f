"""Keeps the libraries' remarks about their own kernels and files out of the demo's output."""

from __future__ import annotations

from lora_plugins.commands.calm import calm

__all__ = ["quiet"]


def quiet() -> None:
    """Silence what the libraries say below an error, in this process. Call it before they are imported."""
    calm()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
