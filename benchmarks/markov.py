"""A pair of random Llamas of any size that write a Markov chain, for where only cost matters. It knows no clocks.

Each token has one likely successor. Embeddings are random; the row of the LM head for a token's successor is that
token's own embedding, as long as gives the wanted probability; and layers are there to be computed, but add next to
nothing to what they are given. So it is told, not trained, where the base is unsure and how often both agree, and no
answer ends by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from nudging_hf.core.gate import Top1Recorder

EOS, PAD, WORDS = 0, 1, 2  # From the third id on, each token is a word.
SURE, UNSURE = (0.85, 0.995), (0.15, 0.5)  # Between which top-1 probabilities are drawn.
UNSURE_SHARE = 0.1  # Of the base's tokens.
_LAYERS_ADD = 0.01  # Of what layers as they are initialised would add.
_AGREED_ROWS, _AGREED_TOKENS = 8, 64


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words, " w00002" and on: a space and as many digits each, so that none begins another."""
    vocabulary = {"<eos>": EOS, "<pad>": PAD} | {f"Ġw{i:05}": i for i in range(WORDS, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "merged_with_next"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


class MarkovPair:
    """A base and a nudging model of one vocabulary, made on a device.

    Args:
        base, nudging: what their `LlamaConfig`s say of their sizes, the vocabulary left out.
        vocab_size: of both, in tokens: the tokenizer's.
        device, dtype: of both.
        seed: of everything random.

    Attributes:
        base, nudging: the models. They agree everywhere until [`agree`] says otherwise.
        tokenizer: of both.
        successors: the base's greedy next token after each token, of shape (vocab_size,); EOS and padding have none.
        is_unsure: where the base's top-1 probability is of the `UNSURE`, of shape (vocab_size,), bool.
    """

    def __init__(
        self,
        base: Mapping[str, int],
        nudging: Mapping[str, int],
        vocab_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
    ):
        self.tokenizer = word_tokenizer(vocab_size)
        torch.manual_seed(seed)
        self.base, self.nudging = (_llama(size, vocab_size, device, dtype) for size in (base, nudging))
        words = vocab_size - WORDS
        order = torch.randperm(words) + WORDS
        self.successors = torch.full((vocab_size,), PAD)
        self.successors[order] = order.roll(-1)  # One cycle through all words.
        self.is_unsure = torch.zeros(vocab_size, dtype=torch.bool)
        self.is_unsure[torch.randperm(words)[: round(UNSURE_SHARE * words)] + WORDS] = True
        self._disagreeing = torch.randperm(words) + WORDS  # The first of them are where the models disagree.
        sure, unsure = (low + (high - low) * torch.rand(vocab_size) for low, high in (SURE, UNSURE))
        self._sure = sure
        _write_chain(self.base, self.successors, torch.where(self.is_unsure, unsure, sure))
        self.agree(1.0)

    @torch.no_grad()
    def agree(self, share: float) -> None:
        """Sets the share of tokens after which the nudging model's greedy token is the base's.

        After the others it is the base's successor of another one of them. Its weights are changed in place.
        """
        theirs = self._disagreeing[: round((1 - share) * len(self._disagreeing))]
        successors = self.successors.clone()
        successors[theirs] = self.successors[theirs.roll(1)]
        _write_chain(self.nudging, successors, self._sure)

    def prompts(self, rows: int, tokens: int, seed: int) -> torch.Tensor:
        """Random words, of shape (rows, tokens), on the models' device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(WORDS, len(self.successors), (rows, tokens), generator=generator)
        return drawn.to(self.base.device)

    def threshold(self, share: float = UNSURE_SHARE) -> float:
        """The quantile of the base's top-1 probabilities in a short greedy run: below it is that share of them."""
        recorder = Top1Recorder()
        ids = self.prompts(_AGREED_ROWS, 4, seed=0)
        self.base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=_AGREED_TOKENS,
            logits_processor=[recorder],
        )
        return torch.cat(recorder.probabilities).double().quantile(share).item()


def _llama(size: Mapping[str, int], vocab_size: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        **size,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    with torch.device(device):  # Nothing as large as this is made elsewhere and moved.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_()
        embedding /= embedding.float().square().mean(dim=-1, keepdim=True).sqrt().to(dtype)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= _LAYERS_ADD
            layer.mlp.down_proj.weight *= _LAYERS_ADD
    return model


@torch.no_grad()
def _write_chain(model: Any, successors: torch.Tensor, top1: torch.Tensor) -> None:
    """Sets the LM head so that each token's successor has that probability, both of shape (vocab_size,).

    With embeddings e of n numbers, mean square 1, and c e(t) / n as the successor's row, its logit after t is c, and
    those of all other rows are normal with variances c'^2 / n. So p = e^c / (e^c + sum of e^(c'^2 / 2n)).
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vocab_size, n = embedding.shape
    wanted = top1.double().logit()
    lengths = wanted + math.log(vocab_size)
    for _ in range(20):
        lengths = wanted + (lengths.square() / (2 * n)).logsumexp(dim=0)
    head.zero_()
    scale = (lengths[WORDS:, None] / n).to(head.device, torch.float32)
    head[successors[WORDS:].to(head.device)] = (embedding[WORDS:].float() * scale).to(head.dtype)
