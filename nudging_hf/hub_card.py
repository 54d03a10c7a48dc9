"""The model card of an exported folder. It knows names, licences and cards, never weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard
from yaml import YAMLError

UNKNOWN, SEVERAL = "unknown", "other"  # What the Hub calls a licence that is not known, and one with no name there.


class Card(NamedTuple):
    """What the card of a model says: its licence, and the names on the Hub of the model, or of what it was made of."""

    licence: str | None
    names: list[str]


def read_card(model: str) -> Card:
    """The card of a model that is a folder, or of one on the Hub. A missing card says nothing."""
    is_folder = Path(model).is_dir()
    try:
        data = ModelCard.load(Path(model, "README.md") if is_folder else model).data
    except (OSError, ValueError, YAMLError):  # There is none, or it is no card.
        return Card(None, [] if is_folder else [model])
    made_of = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
    return Card(data.license if isinstance(data.license, str) else None, made_of if is_folder else [model])


def common_licence(cards: Sequence[Card]) -> str:
    """The licence of weights that come from several models, as the Hub names licences."""
    licences = {card.licence for card in cards}
    if None in licences:
        return UNKNOWN
    return licences.pop() or UNKNOWN if len(licences) == 1 else SEVERAL


def model_card(
    title: str, licence: str, base_models: Sequence[str], nudging_model: str, parameters: dict[str, Any]
) -> str:
    """The card of a folder that nudges by itself.

    Args:
        licence: that of the weights.
        base_models: names on the Hub of the models that it is made of.
        nudging_model: as its generation config names it.
        parameters: the fields of [`NudgingConfig`] that its generation config sets.
    """
    listed = "".join(f"\n- {name}" for name in base_models)
    assigned = ", ".join(f"`{name}={value!r}`" for name, value in parameters.items())
    return _MODEL_CARD.format(
        title=title,
        licence=licence,
        base_models=f"\nbase_model:{listed}" if base_models else "",
        nudging_model=nudging_model,
        parameters=f" with {assigned}" if parameters else "",
    )


_MODEL_CARD = """\
---
library_name: transformers
license: {licence}
pipeline_tag: text-generation
tags:
- custom_generate
- nudging{base_models}
---

# {title}

A base model, and a small aligned model that writes the words where the base is unsure: nudging
([arXiv 2410.09300](https://arxiv.org/abs/2410.09300)). The nudging model is `{nudging_model}`, named in
`generation_config.json`{parameters}; it is loaded with the first answer.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "..."  # this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name)

chat = [{{"role": "user", "content": "What do bees make honey from?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

**Without `trust_remote_code=True` the base alone answers, and nothing says so**: transformers then leaves the code in
`custom_generate/` alone. With the package `nudging_hf` installed, `nudging_hf.register()` nudges this model without
it.

- `model.generate(..., nudge_threshold=0.3)` changes a parameter for one call, `nudging_model=None` asks the base
  alone, and `return_dict_in_generate=True` tells who wrote what (`nudged_mask`).
- The chat template makes the plain prompt that a base understands. The nudging model is given the prompt's text as a
  user turn of its own template, or what `nudging_input_ids=` says.
- A `generation_config=` given to `from_pretrained` makes transformers leave the code alone too.
- `save_pretrained` saves the weights and not the code: copy the folder instead.

The licence above is that of the weights; the code is under Apache-2.0.

```bibtex
@inproceedings{{fei2025nudging,
  title     = {{Nudging: Inference-time Alignment of {{LLM}}s via Guided Decoding}},
  author    = {{Fei, Yu and Razeghi, Yasaman and Singh, Sameer}},
  booktitle = {{Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics}},
  year      = {{2025}},
  note      = {{arXiv:2410.09300}}
}}
```
"""
