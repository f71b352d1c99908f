"""Convert a base model to GGUF with llama.cpp's own code: python llamacpp_convert.py SOURCE FOLDER FILE.

SOURCE is the folder of llama.cpp with ``conversion/`` in it, which comes with the source release of llama-cpp-python.
The model's tokenizer is left out: token ids go in as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: str, folder: str, file: str) -> None:
    """Do what convert_hf_to_gguf.py does with its default options and ``--outtype f32``."""
    sys.path[:0] = [str(Path(source) / "gguf-py"), source]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel

    hparams = ModelBase.load_hparams(Path(folder), False)
    # transformers 5 writes it elsewhere, and GPT-NeoX's class still asks for it.
    hparams.setdefault("rotary_pct", hparams.get("rope_parameters", {}).get("partial_rotary_factor"))
    made = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    rows = int(hparams["vocab_size"])
    # Gemma 3's class reads from this file how many rows of the embedding have a token.
    tokens = {"model": {"vocab": {str(index): index for index in range(rows)}}, "added_tokens": []}
    (Path(folder) / "tokenizer.json").write_text(json.dumps(tokens))

    def set_no_vocabulary(model: TextModel) -> None:
        model.gguf_writer.add_tokenizer_model("no_vocab")
        model.gguf_writer.add_vocab_size(rows)

    made.set_vocab = set_no_vocabulary
    with torch.inference_mode():
        made(Path(folder), gguf.LlamaFileType.ALL_F32, Path(file), hparams=hparams).write()


if __name__ == "__main__":
    main(*sys.argv[1:])
