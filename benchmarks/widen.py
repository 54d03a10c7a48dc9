"""Makes a Llama wide or noisy, or hands it to other kernels, without training. It knows weights, never clocks.

A small trained pair costs almost nothing, but what drafting saves can be timed only where a pass of the base costs
something. So each vector of the model is repeated `factor` times: hidden states, heads, and the units between the
matrices of an MLP. RMSNorm then sees the same mean square, and each head keeps its size and so its rotary positions.
A matrix that reads repeated vectors gives each copy a share of its weights. The shares are powers of two whose sum is
1, so no weight is rounded in any dtype.
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaForCausalLM


def shares(copies: int) -> list[float]:
    """Powers of two, one for each copy, whose sum is 1. They are equal if `copies` is a power of two itself."""
    parts = [1.0]
    while len(parts) < copies:
        largest = parts.pop(0)
        parts += [largest / 2, largest / 2]  # The list stays sorted, so its first part is always the largest.
    return parts


@torch.no_grad()
def widened(model: LlamaForCausalLM, factor: int) -> LlamaForCausalLM:
    """A model that is `factor` times as wide and has the same logits.

    In the result, embedding and LM head are never tied, because they scale differently.

    Args:
        model: a Llama without biases. It is not changed.
        factor: the number of copies of each hidden unit, head and MLP unit.

    Raises:
        ValueError: if the factor is below 1, or the model is not a Llama without biases.
    """
    if factor < 1:
        raise ValueError(f"`factor` must be at least 1, got {factor!r}.")
    if not isinstance(model, LlamaForCausalLM) or model.config.attention_bias or model.config.mlp_bias:
        raise ValueError(f"`model` must be a LlamaForCausalLM without biases, got {type(model).__name__}.")
    config = copy.deepcopy(model.config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, getattr(config, name) * factor)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        wide = LlamaForCausalLM(config)
    states = model.state_dict()
    states["lm_head.weight"] = model.lm_head.weight
    wide.load_state_dict({name: _copies(name, weight, factor) for name, weight in states.items()}, assign=True)
    # Rotary frequencies are a buffer outside the state dict. Heads keep their size, so the model's own ones fit.
    wide.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.eval().requires_grad_(False)


def _copies(name: str, weight: torch.Tensor, factor: int) -> torch.Tensor:
    """The weight of that name in the wide model."""
    if weight.ndim == 1:  # A norm's weight.
        return weight.repeat(factor)
    if name == "model.embed_tokens.weight":
        return weight.repeat(1, factor)
    reading = torch.cat([weight * share for share in shares(factor)], dim=1)
    return reading if name == "lm_head.weight" else reading.repeat(factor, 1)


@torch.no_grad()
def with_larger_heads(model: LlamaForCausalLM, head_dim: int) -> LlamaForCausalLM:
    """A model whose heads have more dimensions and which has the same logits, up to rounding.

    Some attention kernels take only heads of 32, 64, ... dimensions. The new dimensions are zeros. A rotary pair i is
    made of the dimensions i and i + head_dim / 2 and turns by theta ** (-2 * i / head_dim), so with a greater theta
    the old pairs keep their frequencies.

    Args:
        model: a Llama with the default rotary positions. It is not changed.
        head_dim: at least the model's own.
    """
    old = model.config.head_dim
    config = copy.deepcopy(model.config)
    config.head_dim = head_dim
    rope = dict(config.rope_parameters)
    config.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] ** (head_dim / old)}
    large = LlamaForCausalLM(config).to(model.dtype)
    halves = torch.arange(old // 2)
    kept = torch.cat([halves, halves + head_dim // 2])
    states = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            heads = weight.view(-1, old, weight.shape[1])
            padded = heads.new_zeros(len(heads), head_dim, weight.shape[1])
            # Attention divides by the square root of the head's size, which has grown.
            padded[:, kept] = heads * ((head_dim / old) ** 0.5 if "q_proj" in name else 1.0)
            states[name] = padded.flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            heads = weight.view(len(weight), -1, old)
            padded = heads.new_zeros(len(weight), heads.shape[1], head_dim)
            padded[:, :, kept] = heads
            states[name] = padded.flatten(1)
        else:
            states[name] = weight
    large.load_state_dict(states)
    large.generation_config = copy.deepcopy(model.generation_config)
    return large.eval().requires_grad_(False)


@torch.no_grad()
def with_noise(model: LlamaForCausalLM, share: float, seed: int = 0) -> LlamaForCausalLM:
    """A copy of the model whose matrices are mixed with noise.

    Each matrix W becomes (1 - share) * W + share * noise, where the noise is normal and has W's standard deviation.
    """
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in noisy.parameters():
        if weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=generator).to(weight) * weight.std()
            weight.lerp_(noise, share)
    return noisy


class OneDNNLinear(torch.nn.Module):
    """A linear layer without a bias, in float32, whose product oneDNN computes."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to_mkldnn())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.mkldnn_linear(states.to_mkldnn(), self.weight).to_dense()


def hand_to_onednn(model: torch.nn.Module) -> None:
    """Replaces all linear layers of a model by `OneDNNLinear`, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, OneDNNLinear(module))
