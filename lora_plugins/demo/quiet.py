"""Keeps the libraries' remarks about their own kernels and files out of the demo's output."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence what the libraries say below an error, in this process. Call it before they are imported."""
    # bitsandbytes speaks while it is imported, and then at every cast.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
