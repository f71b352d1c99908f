"""Compute logits in llama.cpp: python llamacpp_run.py LIBRARY JOBS.

LIBRARY is the folder with the package ``llama_cpp_py_sync``, which holds llama.cpp as a shared library. JOBS is a JSON
list of ``{"base": file, "adapter": file or null, "ids": [...], "out": file}``; each ``out`` gets float32 values of shape
``[tokens, vocabulary]`` as a NumPy file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy


class Library:
    """llama.cpp through the bindings that were generated for it."""

    def __init__(self, folder: str) -> None:
        sys.path.insert(0, folder)
        from llama_cpp_py_sync import _cffi_bindings as bindings

        self.ffi: Any = bindings.get_ffi()
        self.llama: Any = bindings.get_lib()
        self.llama.llama_backend_init()

    def compute(self, base: str, adapter: str | None, ids: list[int]) -> numpy.ndarray:
        """Return the logits of every token."""
        ffi, llama = self.ffi, self.llama
        model = llama.llama_model_load_from_file(base.encode(), llama.llama_model_default_params())
        if model == ffi.NULL:
            raise SystemExit(f"llama.cpp cannot load {base}")
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
        settings.n_threads = settings.n_threads_batch = 1
        context = llama.llama_init_from_model(model, settings)
        if adapter is not None:
            loaded = llama.llama_adapter_lora_init(model, adapter.encode())
            if loaded == ffi.NULL:
                raise SystemExit(f"llama.cpp refuses {adapter}")
            adapters = ffi.new("struct llama_adapter_lora *[1]", [loaded])
            if llama.llama_set_adapters_lora(context, adapters, 1, ffi.new("float[1]", [1.0])):
                raise SystemExit(f"llama.cpp cannot use {adapter}")
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        if llama.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp cannot run {base}")
        rows = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))
        values = ffi.buffer(llama.llama_get_logits(context), 4 * rows * len(ids))
        made = numpy.frombuffer(values, dtype=numpy.float32).reshape(len(ids), rows).copy()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)
        return made


def main(folder: str, jobs: str) -> None:
    """Run every job."""
    library = Library(folder)
    for job in json.loads(Path(jobs).read_text()):
        numpy.save(job["out"], library.compute(job["base"], job["adapter"], job["ids"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
