"""Compute logits in llama.cpp: python llamacpp_run.py LIBRARY JOBS.

LIBRARY is a shared library with llama.cpp's C interface: ``libllama.so``, or the extension of the package xllamacpp.
JOBS is a JSON list of ``{"base": file, "adapter": file or null, "ids": [...], "out": file}``; each ``out`` is a NumPy
file of float32 values, shape ``[tokens, vocabulary]``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int8, c_int32, c_size_t, c_void_p
from pathlib import Path

import numpy


class Settings(ctypes.Structure):
    """Parameters of a model or context. Their fields differ between releases; the library fills its part of this."""

    _fields_ = (("room", ctypes.c_uint64 * 128),)


class Batch(ctypes.Structure):
    """``llama_batch`` of llama.h."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class Library:
    """llama.cpp, by the functions of llama.h."""

    def __init__(self, path: str) -> None:
        self.llama = ctypes.CDLL(path)
        for name, result, arguments in (
            ("llama_backend_init", None, []),
            ("llama_model_default_params", Settings, []),
            ("llama_context_default_params", Settings, []),
            ("llama_model_load_from_file", c_void_p, [c_char_p, Settings]),
            ("llama_init_from_model", c_void_p, [c_void_p, Settings]),
            ("llama_adapter_lora_init", c_void_p, [c_void_p, c_char_p]),
            ("llama_set_adapters_lora", c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
            ("llama_batch_init", Batch, [c_int32, c_int32, c_int32]),
            ("llama_decode", c_int32, [c_void_p, Batch]),
            ("llama_get_logits", POINTER(c_float), [c_void_p]),
            ("llama_model_get_vocab", c_void_p, [c_void_p]),
            ("llama_vocab_n_tokens", c_int32, [c_void_p]),
            ("llama_batch_free", None, [Batch]),
            ("llama_free", None, [c_void_p]),
            ("llama_model_free", None, [c_void_p]),
        ):
            function = getattr(self.llama, name)
            function.restype, function.argtypes = result, arguments
        self.llama.llama_backend_init()

    def compute(self, base: str, adapter: str | None, ids: list[int]) -> numpy.ndarray:
        """Return the logits of every token."""
        llama = self.llama
        model = llama.llama_model_load_from_file(base.encode(), llama.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {base}")
        context = llama.llama_init_from_model(model, llama.llama_context_default_params())
        if adapter is not None:
            loaded = c_void_p(llama.llama_adapter_lora_init(model, adapter.encode()))
            if not loaded:
                raise SystemExit(f"llama.cpp refuses {adapter}")
            if llama.llama_set_adapters_lora(context, byref(loaded), 1, byref(c_float(1.0))):
                raise SystemExit(f"llama.cpp cannot use {adapter}")
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        if llama.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp cannot run {base}")
        rows = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        made = numpy.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), rows)).copy()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)
        return made


def main(path: str, jobs: str) -> None:
    """Run every job."""
    library = Library(path)
    for job in json.loads(Path(jobs).read_text()):
        numpy.save(job["out"], library.compute(job["base"], job["adapter"], job["ids"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
