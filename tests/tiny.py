"""Makes tiny random pairs for the tests. It knows models and tokenizers, never nudging.

Everything is seeded, in float64, made in memory and cached, so treat it as read-only. A random model is made to
behave like a language model in what matters to a decoder: its top-1 probabilities spread over (0, 1), its greedy token
depends on the whole context and not only on the last token, its text has words of a few tokens, and its EOS is greedy
now and then.
"""

import copy
import functools
import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "In 1984 there were 27 trees; by 2021 only 3 of them stood there.",
    'She said: "It\'s the other one," and then she went to the other house.',
    "A caf\u00e9 in Z\u00fcrich, a na\u00efve fa\u00e7ade, S\u00e3o Paulo, \u0141\u00f3d\u017a and \u00c5rhus.",
    "def add(a, b):\n    return a + b  # the sum\n\n\nprint(add(1, 2))",
    "Two  spaces  here,   three   there.  The end of the sentence.  ",
    "First, take 12 apples.\nSecond, take 7 pears.\nThen there are 19 in all.",
    "The answer is 42 \U0001f600 and the weather is \u2600\ufe0f today \U0001f680\U0001f680!",
    "What is the name of the thing that he is thinking of? 'Nothing,' he says.",
    "\u00e9t\u00e9, \u00eatre, o\u00f9, \u00e0 la fran\u00e7aise; \u4f60\u597d, \u4e16\u754c; "
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "one two three four five six seven eight nine ten; and one more time: one, two, three.",
    "- the list\n- of the things\n- that are on it  (in the end)",
)

# Text with few spaces, of few characters, so that small vocabularies have tokens for many of them.
UNSPACED = (
    "我们去北京。我们去大学，他们去北京大学。",
    "東京タワーへ行きます。大学へ行きます。",
    "ฉันกินน้ำ ฉันกิน",
    "나는 학교에 학교는",
    "الولد الولد، ولد.",
    "it's a 3.14 (it's) it's\n😀我😀",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


# Tokenizers ----------------------------------------------------------------------------------------------------------


def _wrap(backend: Tokenizer, bos: str, eos: str, pad: str, unk: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _byte_level(vocab_size: int, specials: list[str], use_regex: bool, corpus: Sequence[str] = CORPUS) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=specials,
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


@functools.cache
def byte_bpe(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's: all 256 bytes; text is split into words first. `vocab_size` is in tokens."""
    return _wrap(_byte_level(vocab_size, ["<bos>", "<eos>", "<pad>"], use_regex=True), "<bos>", "<eos>", "<pad>")


@functools.cache
def unspaced_byte_bpe() -> PreTrainedTokenizerFast:
    """`byte_bpe` for text without spaces: it has as many tokens, of which some are words and some begin inside a
    character."""
    specials = ["<bos>", "<eos>", "<pad>"]
    return _wrap(_byte_level(320, specials, use_regex=True, corpus=UNSPACED), *specials)


@functools.cache
def other_byte_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens may span spaces ("e t", "s  "). Its special tokens are not `byte_bpe`'s."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _wrap(_byte_level(360, specials, use_regex=False), "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _sentencepiece_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@functools.cache
def metaspace_bpe() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE like Llama 2's: "\u2581" for a space, and 256 byte tokens `<0xNN>` as a fallback."""
    # The alphabet is small: other letters, and most accents, are written with byte tokens.
    return _metaspace_bpe(CORPUS[:3] + CORPUS[5:7] + CORPUS[10:], alphabet=60, vocab_size=130)


def _metaspace_bpe(corpus: Sequence[str], alphabet: int, vocab_size: int) -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, limit_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    bpe = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *_BYTES, *sorted(bpe["vocab"], key=bpe["vocab"].get)]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in bpe["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = _sentencepiece_decoder()
    # As in Llama 2, the unknown token is the padding token.
    return _wrap(backend, "<s>", "</s>", "<unk>", "<unk>")


@functools.cache
def unspaced_metaspace_bpe() -> PreTrainedTokenizerFast:
    """`metaspace_bpe` for text without spaces, which has tokens for whole characters and for some words."""
    return _metaspace_bpe(UNSPACED, alphabet=90, vocab_size=96)


@functools.cache
def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece-like Unigram: pieces of up to 5 characters by frequency, and byte tokens as a fallback."""
    count: dict[str, int] = {}
    for word in itertools.chain.from_iterable(re.findall(r" ?[^ ]+|  +", " " + line) for line in CORPUS[:7]):
        word = word.replace(" ", "\u2581")
        for start, size in itertools.product(range(len(word)), range(1, 6)):
            if start + size <= len(word) and word[start : start + size].isprintable():
                count[word[start : start + size]] = count.get(word[start : start + size], 0) + 1
    # All of ASCII has pieces. A letter without one would cost more than a control piece, which must never be encoded.
    single = [*map(chr, range(32, 127)), "\n", "\u2581", "\u2581\u2581"]
    longer = sorted((piece for piece in count if len(piece) > 1), key=lambda p: (-count[p] * (len(p) - 1), p))[:90]
    total = sum(count.values())
    log = [float(torch.tensor((count.get(p, 0) + 1) / total).log()) for p in single + longer]
    vocab = [(piece, -1000.0) for piece in ("<pad>", "<unk>", "<s>", "</s>")] + [(byte, -20.0) for byte in _BYTES]
    vocab += list(dict(zip(single + longer, log, strict=True)).items())
    backend = Tokenizer(models.Unigram(vocab, unk_id=1, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = _sentencepiece_decoder()
    return _wrap(backend, "<s>", "</s>", "<pad>", "<unk>")


@functools.cache
def wordpiece() -> PreTrainedTokenizerFast:
    """BERT-like WordPiece: "##" continues a word, white space is lost, and [UNK] replaces unknown words."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(CORPUS[:4] + CORPUS[5:7] + CORPUS[8:9] + CORPUS[10:]))
    letters = sorted({letter for word in words for letter in word if letter.isalnum()})
    ends: dict[str, int] = {}
    for word in words:
        for size in range(2, min(5, len(word))):
            ends[word[-size:]] = ends.get(word[-size:], 0) + size
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *sorted({w for w in words if not w.isalnum()})]
    pieces += ["##" + letter for letter in letters] + list(dict.fromkeys(w for w in words if len(w) > 1))[:90]
    pieces += ["##" + end for end in sorted(ends, key=lambda end: (-ends[end], end))[:50]]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False, handle_chinese_chars=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return _wrap(backend, "[CLS]", "[SEP]", "[PAD]", "[UNK]")


@functools.cache
def composing_byte_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE that composes characters (NFC), as Qwen's does."""
    backend = _byte_level(300, ["<bos>", "<eos>", "<pad>"], use_regex=True)
    backend.normalizer = normalizers.NFC()
    return _wrap(backend, "<bos>", "<eos>", "<pad>")


@functools.cache
def spaces_bpe() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE like Gemma's: no space before a first word, and added tokens for runs of spaces."""
    backend = Tokenizer.from_str(metaspace_bpe().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(n * "\u2581", normalized=True) for n in range(2, 9)])
    backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<table>", normalized=False)])
    return _wrap(backend, "<s>", "</s>", "<unk>", "<unk>")


UNSPACED_TOKENIZERS = {
    "unspaced_byte_bpe": unspaced_byte_bpe,
    "unspaced_metaspace_bpe": unspaced_metaspace_bpe,
    "other_byte_bpe": other_byte_bpe,
}
TOKENIZERS = {
    "byte_bpe": byte_bpe,
    "metaspace_bpe": metaspace_bpe,
    "other_byte_bpe": other_byte_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


# Models --------------------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_GPT2_SIZES = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 1024,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_SIZES, **_SLIDING, "query_pre_attn_scalar": 8}
_WITHOUT_HEAD_DIM = {name: size for name, size in _SIZES.items() if name != "head_dim"}

_ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, _SIZES),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _SIZES),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GEMMA),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _GEMMA),
    "mistral": (MistralForCausalLM, MistralConfig, {**_SIZES, "sliding_window": 8}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2_SIZES),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, _WITHOUT_HEAD_DIM),
}
ARCHITECTURES = tuple(_ARCHITECTURES)

# Standard deviations of the layers' weights and of the token embeddings. The larger the embeddings are, compared with
# what the layers add to them, the less a greedy token depends on distant tokens.
_LAYER_STD = 0.25
_EMBEDDING_STD = {
    "llama": 2.0,
    "qwen3": 2.0,
    "gemma2": 0.6,
    "gemma3": 0.6,
    "mistral": 2.0,
    "gpt2": 2.0,
    "olmo2": 2.0,
}


def tiny_model(
    arch: str,
    vocab_size: int,
    seed: int,
    eos_token_id: int,
    pad_token_id: int,
    *,
    loudness: Sequence[float] | None = None,
    eos_rate: float = 0.03,
) -> PreTrainedModel:
    """A random causal LM in float64 and eval mode: two layers, sliding windows of 8 tokens where `arch` has them.

    Args:
        arch: One of `ARCHITECTURES`.
        vocab_size: Rows of its embeddings, in tokens.
        seed: Seeds its weights.
        eos_token_id: Its end-of-sequence token.
        pad_token_id: Its padding token.
        loudness: A factor for each token's logits, `(vocab_size,)`: above 1, a token is greedy more often than others.
        eos_rate: The share of positions at which EOS is greedy.
    """
    model_class, config_class, sizes = _ARCHITECTURES[arch]
    ids = {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(vocab_size=vocab_size, **sizes, **ids)).double().eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                embeds = parameter is model.get_input_embeddings().weight
                parameter.data.normal_(0.0, _EMBEDDING_STD[arch] if embeds else _LAYER_STD)
            elif name.endswith("bias"):
                parameter.data.normal_(0.0, 0.05)
    model.requires_grad_(False)
    if loudness is not None:
        model.lm_head.weight.mul_(torch.tensor(loudness, dtype=torch.float64)[:, None])
    model.generation_config = GenerationConfig(eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    return _sharpen(model, eos_rate)


def relative(
    model: PreTrainedModel, noise: float, seed: int, *, rows: Sequence[int] | None = None, eos_rate: float = 0.008
) -> PreTrainedModel:
    """A nudging model that writes similarly to `model`: its weights are those of `model` with noise added.

    Args:
        model: The model to start from.
        noise: The noise's standard deviation, as a share of each weight matrix's own.
        seed: Seeds the noise.
        rows: For another vocabulary: the row of `model`'s embeddings that each of its tokens starts from. The first
            token that starts from `model`'s EOS is its EOS, and likewise for the padding token. If several tokens
            start from one row, all but the first get as much noise as they keep.
        eos_rate: The share of positions at which EOS is greedy.
    """
    config, generation_config = copy.deepcopy(model.config), GenerationConfig(**_ids(model))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    if rows is not None:
        eos, pad = rows.index(config.eos_token_id), rows.index(config.pad_token_id)
        repeated = torch.tensor([row in rows[:i] for i, row in enumerate(rows)])[:, None]
        for name, weight in state.items():
            if weight.dim() == 2 and len(weight) == config.vocab_size:
                state[name] = weight[list(rows)]
        config.vocab_size, config.eos_token_id, config.pad_token_id = len(rows), eos, pad
        generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for weight in state.values():
            if weight.dim() == 2:
                fresh = torch.randn_like(weight) * weight.std()
                weight += noise * fresh
                if rows is not None and len(weight) == len(rows):  # A repeated row is half noise.
                    weight.copy_(torch.where(repeated, (weight + fresh) / 2**0.5, weight))
        copied = type(model)(config).double().eval()
    copied.load_state_dict(state)
    copied.requires_grad_(False)
    copied.generation_config = generation_config
    return _sharpen(copied, eos_rate)


def _ids(model: PreTrainedModel) -> dict[str, int]:
    return {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}


@torch.no_grad()
def _sharpen(model: PreTrainedModel, eos_rate: float) -> PreTrainedModel:
    """Scales the head so that half of the top-1 probabilities are above 0.45, and EOS so that it wins at `eos_rate`.

    EOS is measured along the model's own greedy text. The top-1 probability is measured there and along random ids,
    because greedy text may loop. A scale changes no argmax, so the text stays the same.
    """
    head, eos = model.lm_head.weight, model.config.eos_token_id
    cap = getattr(model.config, "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (48, 4), generator=generator)
    for _ in range(24):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        logits = hidden[:, -1] @ head.T
        logits[:, eos] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, 4:].flatten(0, 1)
    others = hidden @ head.T
    at_eos = others[:, eos].clone()
    others[:, eos] = -torch.inf
    # EOS wins if the factor of its row is above this ratio.
    needed = torch.where(at_eos > 0, others.amax(-1) / at_eos, torch.inf)
    head[eos] *= needed.quantile(eos_rate, interpolation="lower")
    ids = torch.randint(0, model.config.vocab_size, (48, 28), generator=generator)
    hidden = torch.cat([hidden, model.base_model(ids, use_cache=False).last_hidden_state[:, 4:].flatten(0, 1)])
    logits = hidden @ head.T
    for step in range(160):  # From flat to sharp. With a soft cap on the logits, a large scale is flat again.
        scale = 2.0 ** (step / 8 - 10)
        scaled = cap * torch.tanh(scale * logits / cap) if cap else scale * logits
        if scaled.softmax(-1).amax(-1).median() >= 0.45:
            break
    head *= scale
    return model


# Pairs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A base and a nudging model with their tokenizers. With one vocabulary both tokenizers are the same object."""

    base: PreTrainedModel
    nudging_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    nudging_tokenizer: PreTrainedTokenizerFast


def _spellings(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The spelling of each token by id, with a plain space for "\u0120", "\u2581" and the word starts of WordPiece."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    continues = any(piece.startswith("##") for piece in pieces)
    spelled = []
    for piece in pieces:
        if continues and piece not in tokenizer.all_special_tokens:
            piece = piece[2:] if piece.startswith("##") and len(piece) > 2 else " " + piece
        spelled.append(piece.replace("\u0120", " ").replace("\u2581", " "))
    return spelled


def _loudness(tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Factors for the logits: high for words, so that text has spaces, and low for bytes and control tokens."""
    spelled = _spellings(tokenizer)
    rarely_starts = sum(piece.startswith(" ") for piece in spelled) < 0.3 * len(spelled)
    loudness = []
    for token_id, piece in enumerate(spelled):
        if token_id in tokenizer.all_special_ids:
            loudness.append(0.5)
        elif re.fullmatch(r"<0x..>", piece) or (len(piece) == 1 and not piece.isascii()):
            loudness.append(0.85)
        elif piece.startswith(" ") and len(piece) <= 2:  # It begins many words, so base and nudging model agree there.
            loudness.append(2.0)
        elif piece.startswith(" "):
            loudness.append(1.4 if rarely_starts else 1.0)
        else:
            loudness.append(1.0)
    return loudness


def _model_for(tokenizer: PreTrainedTokenizerFast, arch: str, seed: int, eos_rate: float = 0.03) -> PreTrainedModel:
    loudness, eos, pad = _loudness(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    return tiny_model(arch, len(tokenizer), seed, eos, pad, loudness=loudness, eos_rate=eos_rate)


def _rows(tokenizer: PreTrainedTokenizerFast, nudging_tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """For each token of `nudging_tokenizer`, a token of `tokenizer` that is spelled so, or begins so, or any token."""
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for_special = {getattr(nudging_tokenizer, f"{name}_token_id"): row for name, row in special.items()}
    spelled = {piece: row for row, piece in enumerate(_spellings(tokenizer)) if row not in special.values()}
    any_row = random.Random(0)
    rows = []
    for token_id, piece in enumerate(_spellings(nudging_tokenizer)):
        starts = [piece[:end] for end in range(len(piece), 0, -1) if piece[:end] in spelled and piece[:end] != " "]
        row = spelled[starts[0]] if starts else any_row.choice(list(spelled.values()))
        rows.append(for_special.get(token_id, row))
    return rows


@functools.cache
def pair(arch: str, seed: int, kind: str) -> Pair:
    """A cached pair; do not change its models.

    Args:
        arch: The base's architecture, one of `ARCHITECTURES`.
        seed: Seeds the weights and chooses the rest. With `kind="shared"`, 10 successive seeds cover all five
            tokenizers, each with a nudging model that is a relative of the base (even seeds) and with one that is
            not. With `kind="two"`, 40 successive seeds cover all twenty ordered pairs of tokenizers likewise. A
            nudging model that is no relative has the next architecture.
        kind: "shared" for one vocabulary, "two" for two. With "unspaced shared" and "unspaced two" it is likewise with
            `UNSPACED_TOKENIZERS`, of which 6 and 12 successive seeds cover all.
    """
    tokenizers = UNSPACED_TOKENIZERS if kind.startswith("unspaced ") else TOKENIZERS
    kind = kind.removeprefix("unspaced ")
    other_arch = ARCHITECTURES[(ARCHITECTURES.index(arch) + 1) % len(ARCHITECTURES)]
    if kind == "shared":
        tokenizer = nudging_tokenizer = list(tokenizers.values())[seed % len(tokenizers)]()
        related, rows = seed % 2 == 0, None
    elif kind == "two":
        combinations = list(itertools.permutations(tokenizers, 2))
        random.Random(0).shuffle(combinations)
        tokenizer, nudging_tokenizer = (tokenizers[name]() for name in combinations[seed % len(combinations)])
        related, rows = (seed + seed // len(combinations)) % 2 == 0, _rows(tokenizer, nudging_tokenizer)
    else:
        raise ValueError(f"kind={kind!r}: expected 'shared' or 'two'")
    base = _model_for(tokenizer, arch, seed)
    if related:
        nudging_model = relative(base, noise=0.1, seed=seed + 1000, rows=rows)
    else:
        nudging_model = _model_for(nudging_tokenizer, other_arch, seed + 1000, eos_rate=0.008)
    return Pair(base, nudging_model, tokenizer, nudging_tokenizer)


def prompts(pair: Pair, n: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """`n` prompts for the base and `n` others for the nudging model, of 1 to about 40 tokens each.

    Some begin with a BOS token. They have no other control tokens.
    """
    choose = random.Random(seed)
    words = [word for line in CORPUS for word in re.findall(r" ?[^ ]+| ", line)]

    def prompt(tokenizer: PreTrainedTokenizerFast) -> list[int]:
        bos = [tokenizer.bos_token_id] if choose.random() < 0.4 else []
        start, length = choose.randrange(len(words) - 12), choose.randint(1, 12)
        ids = tokenizer.encode("".join(words[start : start + length]), add_special_tokens=False)
        return bos + [i for i in ids if i not in tokenizer.all_special_ids] or [tokenizer.bos_token_id]

    both = [(prompt(pair.tokenizer), prompt(pair.nudging_tokenizer)) for _ in range(n)]
    return [base for base, _ in both], [nudging for _, nudging in both]
