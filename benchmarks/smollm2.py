"""Makes a pair of SmolLM2-135M-Instruct, whose weights come from a Python package: `make smollm2`.

    python benchmarks/smollm2.py GGUF FOLDER

FOLDER/instruct is the model as a folder of transformers, in float32. FOLDER/base stands for a base: a copy whose
matrices, except the embedding, have noise of 3 % of their standard deviation. It is no unaligned model, but it writes
natural English in a real vocabulary, and often something else than the model does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

NOISE = 0.03


@torch.no_grad()
def add_noise(model: PreTrainedModel, share: float, seed: int = 0) -> None:
    """Adds to each matrix but the embedding normal noise of `share` times its standard deviation, in place."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    for weight in model.parameters():
        if weight.ndim == 2 and weight is not embedding:
            weight += share * weight.std() * torch.randn(weight.shape, generator=generator)


def main(gguf: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # Of the file, whose weights have been restored.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name in ("instruct", "base"):
        if name == "base":
            add_noise(model, NOISE)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
