"""Makes a pair of random Llamas of any size that write a Markov chain, for timings where only the cost matters.

It knows weights and probabilities, never clocks. Each token has one likely successor. Embeddings are random. The LM
head's row for a token's successor is that token's own embedding, scaled so that the successor has the wanted
probability. The layers cost what they always cost, but add almost nothing to the hidden states. So where the base is
unsure and how often the models agree is set and needs no training, and no answer ends by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from nudging_hf.core.gate import Top1Recorder

EOS, PAD, WORDS = 0, 1, 2  # All ids from WORDS on are words.
SURE, UNSURE = (0.85, 0.995), (0.15, 0.5)  # The ranges that top-1 probabilities are drawn from.
UNSURE_SHARE = 0.1  # The share of tokens after which the base is unsure.
_LAYER_SCALE = 0.01  # What a layer adds, relative to one with the usual initialisation.
_AGREED_ROWS, _AGREED_TOKENS = 8, 64


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words " w00002", " w00003" and so on. All have one length, so none is a prefix of another."""
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
    """A base and a nudging model that share a vocabulary, made directly on a device.

    Args:
        base, nudging: the sizes of the models as arguments of `LlamaConfig`, without the vocabulary's.
        vocab_size: the size of the shared vocabulary, in tokens.
        device, dtype: the device and dtype of both models.
        seed: the seed of everything random.

    Attributes:
        base, nudging: the models. They agree everywhere until [`agree`] changes that.
        tokenizer: the tokenizer of both models.
        successors: the base's greedy next token after each token, of shape (vocab_size,). Those of EOS and padding
            mean nothing.
        is_unsure: bool of shape (vocab_size,): after which tokens the base's top-1 probability is drawn from `UNSURE`.
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
        self.successors[order] = order.roll(-1)  # The chain is one cycle through all words.
        self.is_unsure = torch.zeros(vocab_size, dtype=torch.bool)
        self.is_unsure[torch.randperm(words)[: round(UNSURE_SHARE * words)] + WORDS] = True
        self._disagreeing = torch.randperm(words) + WORDS  # The models disagree after the first of these.
        sure, unsure = (low + (high - low) * torch.rand(vocab_size) for low, high in (SURE, UNSURE))
        self._sure = sure
        _write_chain(self.base, self.successors, torch.where(self.is_unsure, unsure, sure))
        self.agree(1.0)

    @torch.no_grad()
    def agree(self, share: float) -> None:
        """Sets the share of tokens after which both models have the same greedy token.

        After each of the other tokens, the nudging model's greedy token is the base's successor of another of them.
        Its weights are changed in place.
        """
        theirs = self._disagreeing[: round((1 - share) * len(self._disagreeing))]
        successors = self.successors.clone()
        successors[theirs] = self.successors[theirs.roll(1)]
        _write_chain(self.nudging, successors, self._sure)

    def prompts(self, rows: int, tokens: int, seed: int) -> torch.Tensor:
        """Ids of random words, of shape (rows, tokens), on the models' device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(WORDS, len(self.successors), (rows, tokens), generator=generator)
        return drawn.to(self.base.device)

    def threshold(self, share: float = UNSURE_SHARE) -> float:
        """The threshold below which the given share of the base's top-1 probabilities lies in a short greedy run."""
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
    with torch.device(device):  # A large model is made on its device, and not copied to it.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_()
        embedding /= embedding.float().square().mean(dim=-1, keepdim=True).sqrt().to(dtype)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= _LAYER_SCALE
            layer.mlp.down_proj.weight *= _LAYER_SCALE
    return model


@torch.no_grad()
def _write_chain(model: Any, successors: torch.Tensor, top1: torch.Tensor) -> None:
    """Sets the LM head so that each token's successor gets a given probability.

    Let the embeddings e have n entries with mean square 1, and let the row of t's successor be c e(t) / n. Then the
    successor's logit after t is c, and the logit of any other row, with its own c', is normal with variance c'^2 / n.
    So p = e^c / (e^c + sum of e^(c'^2 / 2n)).

    Args:
        successors: each token's successor, of shape (vocab_size,).
        top1: the successor's probability, of shape (vocab_size,).
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
