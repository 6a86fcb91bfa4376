"""Converts a GGUF file into a folder that transformers and vLLM load: weights in bfloat16, tokenizer, chat
template.

A program for model_source.py, which starts it with the GGUF file and an existing folder as arguments and
keeps a pipe to its standard input open. It is apart because it imports torch. Not meant for models of many
GB: they fit into memory once as bfloat16.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

ORPHANED = 3
"""Exit status when the caller died."""


def _end_with_caller() -> None:
    """Ends this process when standard input does, that is when the caller is gone, however it went."""
    while os.read(0, 1):  # not sys.stdin: its lock, held here, would crash the interpreter's exit
        pass
    os._exit(ORPHANED)


def convert(gguf: Path, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub at its import; everything needed is in the file
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    vars(model.config).pop("quantization_config", None)  # the folder would be loaded as GGUF again
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    threading.Thread(target=_end_with_caller, daemon=True).start()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
