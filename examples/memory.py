r"""Tells what the weights and the caches of a pair take, from the configs of its models. No weights are loaded.

Without arguments it writes the tables of docs/memory.md, of the usual pairs. For another pair it reads two configs:

    python examples/memory.py
    python examples/memory.py --base google/gemma-2-27b --nudging-model google/gemma-2-2b-it
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# What https://huggingface.co/NAME/blob/main/config.json says of the models' shapes: the model type, the hidden and the
# intermediate size, layers, attention heads, heads of keys and values, the vocabulary, and what is not the default.
SHAPES = {
    "meta-llama/Llama-2-70b-hf": ("llama", 8192, 28672, 80, 64, 8, 32000, {}),
    "meta-llama/Llama-2-7b-chat-hf": ("llama", 4096, 11008, 32, 32, 32, 32000, {}),
    "meta-llama/Llama-3.1-70B": ("llama", 8192, 28672, 80, 64, 8, 128256, {}),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 14336, 32, 32, 8, 128256, {}),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 2048, 8192, 16, 32, 8, 128256, {"tie_word_embeddings": True}),
    "google/gemma-2-27b": ("gemma2", 4608, 36864, 46, 32, 16, 256000, {"head_dim": 128}),
    "google/gemma-2-2b-it": ("gemma2", 2304, 9216, 26, 8, 4, 256000, {"head_dim": 256}),
    "allenai/OLMo-2-1124-13B": ("olmo2", 5120, 13824, 40, 40, 40, 100352, {}),
    "allenai/OLMo-2-1124-7B": ("olmo2", 4096, 11008, 32, 32, 32, 100352, {}),
    "allenai/OLMo-2-0425-1B-Instruct": ("olmo2", 2048, 8192, 16, 16, 16, 100352, {}),
    "Qwen/Qwen2.5-72B": ("qwen2", 8192, 29568, 80, 64, 8, 152064, {}),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 152064, {}),
    "Qwen/Qwen3-14B-Base": ("qwen3", 5120, 17408, 40, 40, 8, 151936, {"head_dim": 128}),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 151936, {"head_dim": 128, "tie_word_embeddings": True}),
}
USUAL_PAIRS = [
    ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-8B-Instruct"),
    ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.2-1B-Instruct"),
    ("google/gemma-2-27b", "google/gemma-2-2b-it"),
    ("Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-7B-Instruct"),
    ("Qwen/Qwen3-14B-Base", "Qwen/Qwen3-0.6B"),
    ("allenai/OLMo-2-1124-13B", "allenai/OLMo-2-0425-1B-Instruct"),
    ("allenai/OLMo-2-1124-7B", "allenai/OLMo-2-0425-1B-Instruct"),
]
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# Bytes of a weight. The NF4 of bitsandbytes adds a float32 scale for each 64 weights (arXiv 2305.14314, without double
# quantisation).
BYTES = {"16": 2.0, "8": 1.0, "4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Sizes:
    """What a model holds.

    Args:
        parameters: how many there are. Tied embeddings count once.
        quantisable: how many of them 8 and 4 bits reach: the weights of all linear layers except the output's.
        cached: how many numbers the cache keeps for a token.
    """

    parameters: int
    quantisable: int
    cached: int

    def weights(self, bits: str) -> float:
        """Bytes of the weights in "16", "8" or "4" bits. What is not quantised keeps 16."""
        return BYTES["16"] * (self.parameters - self.quantisable) + BYTES[bits] * self.quantisable

    def cache(self, tokens: int) -> float:
        """Bytes of the cache of one row of `tokens` tokens, in 16 bits."""
        return 2 * self.cached * tokens


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The sizes of the causal LM that a config describes. It is built without memory for its weights.

    Raises:
        ValueError: for layers that keep something else than the keys and values of each token.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(text, "kv_lora_rank", None) or not kinds <= {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }:
        raise ValueError(f"{text.model_type} does not cache the keys and values of each token in each layer.")
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    cached = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    quantisable = sum(each.weight.numel() for each in linear if each is not model.get_output_embeddings())
    return Sizes(sum(each.numel() for each in model.parameters()), quantisable, cached)


def usual_config(name: str) -> PreTrainedConfig:
    kind, hidden, inner, layers, heads, key_value_heads, vocabulary, more = SHAPES[name]
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        **more,
    )


def amount(size: float) -> str:
    unit, one = next(((unit, one) for unit, one in (("GB", 1e9), ("MB", 1e6)) if size >= one), ("kB", 1e3))
    return f"{size / one:.1f} {unit}"


def tables(pairs: Sequence[tuple[str, str]], sizes: Mapping[str, Sizes], tokens: int) -> str:
    """Two tables in Markdown, of the models and of the pairs. A GB is 10⁹ bytes.

    Args:
        tokens: of a prompt and its answer, in one row.
    """
    models = ["| model | parameters | 16 bits | 8 bits | 4 bits | cache of a token |"]
    models.append("|---|---:|---:|---:|---:|---:|")
    for name, each in sizes.items():
        weights = " | ".join(amount(each.weights(bits)) for bits in BYTES)
        models.append(f"| `{name}` | {each.parameters:,} | {weights} | {amount(each.cache(1))} |")
    together = [f"| base | nudging model | caches of {tokens:,} tokens | all in 16 bits | base in 8 | base in 4 |"]
    together.append("|---|---|---:|---:|---:|---:|")
    for base, nudging in pairs:
        large, small = sizes[base], sizes[nudging]
        caches = large.cache(tokens) + small.cache(tokens)
        totals = [large.weights(bits) + small.weights("16") + caches for bits in BYTES]
        names = " | ".join(f"`{name.rpartition('/')[2]}`" for name in (base, nudging))
        together.append(f"| {names} | {' | '.join(map(amount, (caches, *totals)))} |")
    return "\n".join([*models, "", *together])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder or Hub name, of which the config is read")
    parser.add_argument("--nudging-model", help="likewise")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt and its answer (default: %(default)s)")
    args = parser.parse_args()
    if (args.base is None) != (args.nudging_model is None):
        parser.error("name both models, or none for the usual pairs")
    if args.base is None:
        pairs, configs = USUAL_PAIRS, {name: usual_config(name) for name in SHAPES}
    else:
        pairs = [(args.base, args.nudging_model)]
        configs = {name: AutoConfig.from_pretrained(name) for name in pairs[0]}
    print(tables(pairs, {name: sizes_of(config) for name, config in configs.items()}, args.tokens))


if __name__ == "__main__":
    main()
