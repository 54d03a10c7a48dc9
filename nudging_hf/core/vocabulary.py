"""One tokenizer as text and ids. It knows bytes and tokens, never models or answers.

The user's tokenizer is never changed, not even for a moment: encoding and decoding use a private copy.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerFast

from .control_tokens import control_ids
from .transformers_private import byte_of_character

logger = logging.getLogger(__name__)

_BYTE_OF_CHARACTER = byte_of_character()
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Translating between text and ids needs these methods of a tokenizer.
_REQUIRED_METHODS = ("convert_ids_to_tokens", "get_vocab", "decode")
_SENTENCEPIECE_SPACE = "\u2581"
_MAX_QUOTED_CHARACTERS = 20  # A warning quotes at most this much of a text,
_MAX_QUOTED_LOSSES = 4  # and at most so many samples.
_JOIN_CHARACTERS = 32  # `encode_after` drops a context up to any place within this end of it.
_ANCHORS = ("\n", ".", "0", "a")  # Characters that it puts before a text.
_HEAD_CHARACTERS = 256  # It tries each place with this beginning of the text first.
# Text that some tokenizers cannot represent. A sample of each kind tells whether one can.
_SAMPLES = (
    *("e\u0301", "\u1112\u1161\u11ab", "\u212b", "\u2000", "\u0958"),  # NFC composes and replaces characters,
    *("\uac01", "\u00e9", "\u0e33"),  # NFD takes them apart,
    *("\uff21", "\u00bd", "\u2026", "\ufb01", "\u0133"),  # NFKC replaces more of them,
    *("A", "\u0391", "\u00df", "``x''"),  # and others write small letters, no accents, or plain quotation marks.
    *("a\nb", "a\r\nb", "a\rb", "a\tb", "a  b   c", "a ", " \n "),  # White space is dropped or made one space.
    *("\u3000", "\u2028", "\u200b", "\u200d", "\u200e", "\ufe0f", "\ufeff", "\u2581"),  # Some stand for others.
    *("\u6f22", "\u3042", "\u0e01", "\u0639", "\u05e9", "\u0939", "\ud55c"),  # A script may be unknown.
    *("\U0001f600", "\U00012000", "\ue000", "\U000e0041", "\ufffd", "\U0010fffd"),
    # A byte may be missing: these characters have all the bytes of UTF-8.
    *map(chr, range(0xC0)),
    *map(chr, range(0xC0, 0x800, 0x40)),
    *map(chr, range(0x800, 0xD800, 0x1000)),
    *map(chr, range(0x10000, 0x110000, 0x40000)),
)


class _CachedBytes(dict[int, bytes]):
    """The bytes of tokens, computed once for each token."""

    def __init__(self, compute: Callable[[int], bytes]):
        self._compute = compute

    def __missing__(self, token: int) -> bytes:
        self[token] = self._compute(token)
        return self[token]


class Vocabulary:
    """What the tokens of one tokenizer add to a text, and which ids a text has after other text.

    Several threads may use one `Vocabulary` at once. It does not see a token that is added to the tokenizer later:
    make another `Vocabulary` then.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`. It is not changed.

    Raises:
        ValueError: if the tokenizer lacks something that translating text between two vocabularies needs.
    """

    def __init__(self, tokenizer: Any):
        _validate_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control = control_ids(tokenizer)
        self._added = {i: token.content for i, token in added.items()}
        self._scheme = _byte_scheme(tokenizer)
        self._bytes = _CachedBytes(self._compute_bytes)
        self._anchor: list[int] | None = None
        self._encode = lru_cache(maxsize=4096)(self._tokenize)
        self._codec: _Codec | None = None
        self._lock = threading.Lock()
        self._has_warned = False

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text, whatever stands before it. A control token adds none."""
        return self._bytes[token]

    def join(self, ids: Sequence[int]) -> bytes:
        """The text of the ids in UTF-8, without control tokens."""
        return b"".join(map(self._bytes.__getitem__, ids))

    def encode_after(self, context: str, text: str) -> list[int]:
        """The ids of `text` as the tokenizer would write it after `context`, whose own ids are already fixed.

        `encode(context) + encode(text)` is not `encode(context + text)`. So `context` is encoded with and without
        `text`: if its ids stay the same, the ids after them are those of `text`. They change if `text` continues a
        word and its beginning would have merged with the end of `context`. Then shorter and shorter ends of `context`
        are tried. The number of encodes is bounded, whatever the script.

        Args:
            context: the text before, at least as far as a tokenizer looks back.
            text: the text to encode.
        """
        head = text[:_HEAD_CHARACTERS]
        for start in _context_starts(context):
            ids = self.encode_suffix(context[start:], head)
            if ids is not None and len(head) < len(text):  # The beginning fits; now try the whole text.
                ids = self.encode_suffix(context[start:], text)
            if ids is not None:
                return ids
        alone = list(self._encode(text))
        if self.join(alone) == text.encode():
            return alone
        # It adds a space before a first word, so a character goes before it with which the text forms no token.
        suffixes = (self.encode_suffix(anchor, text) for anchor in _ANCHORS)
        return next((ids for ids in suffixes if ids is not None), alone)

    def encode_suffix(self, context: str, text: str) -> list[int] | None:
        """The ids of `text` after those of `context`; `None` where `text` changes the ids of `context`."""
        ids, both = self._encode(context), self._encode(context + text)
        return list(both[len(ids) :]) if both[: len(ids)] == ids else None

    @cached_property
    def losses(self) -> dict[str, str]:
        """Samples of the text that the tokenizer cannot represent, with what it holds in their place.

        Qwen's composes characters (NFC), SentencePiece has one symbol for both U+2581 and the space, and WordPiece
        drops white space.
        """
        held = {text: to_text(self.join(self.encode_after("x", text))) for text in _SAMPLES}
        return {text: other for text, other in held.items() if other != text}

    def announce_losses(self) -> None:
        """Warns, once, if the tokenizer cannot represent all text that another model may write."""
        if self.losses:
            self._warn_once(
                "%d of %d samples of text change: %s.",
                len(self.losses),
                len(_SAMPLES),
                ", ".join(
                    f"{text!a} becomes {held!a}" for text, held in islice(self.losses.items(), _MAX_QUOTED_LOSSES)
                ),
            )

    def warn_if_lossy(self, text: str, ids: Sequence[int]) -> None:
        """Warns, unless losses were announced, if the ids do not decode to the text that they were made from."""
        if not self._has_warned and (got := self.join(ids)) != text.encode():
            start, given, held = _difference(text, to_text(got))
            self._warn_once("%s becomes %s (at character %d of %d).", ascii(given), ascii(held), start, len(text))

    def _warn_once(self, what: str, *values: Any) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        name = getattr(self.tokenizer, "name_or_path", "")
        logger.warning(
            "The tokenizer %s(name_or_path=%r) cannot represent all text that the other model may write, so its model "
            f"may write or read something else: {what} This warning appears once for each tokenizer.",
            type(self.tokenizer).__name__,
            name,
            *values,
        )

    def _get_codec(self) -> _Codec:
        with self._lock:
            if self._codec is None:
                by_backend = uses_backend_only(self.tokenizer)
                self._codec = (
                    _BackendCodec(self.tokenizer, self.control) if by_backend else _TokenizerCodec(self.tokenizer)
                )
            return self._codec

    def _tokenize(self, text: str) -> tuple[int, ...]:
        encode = self._get_codec().encode
        ids = encode(text)
        if self._unspeakable.isdisjoint(ids):
            return tuple(ids)
        # Unigram encodes a control token or a byte that is spelt out as that token, because all tokens are pieces. So
        # each spelling is cut in two and the parts are encoded on their own.
        found: list[int] = []
        rest, guard = text, ""
        line_break = encode("\n")
        while (cut := self._find_cut(rest, ids, len(guard))) is not None:
            found += encode(rest[:cut])[len(line_break) if guard else 0 :]
            rest, guard = "\n" + rest[cut:], "\n"
            ids = encode(rest)
        return tuple(found + ids[len(line_break) if guard else 0 :])

    @cached_property
    def _unspeakable(self) -> frozenset[int]:
        """The tokens that stand for something other than their spelling: control tokens, and bytes of Unigram."""
        if self._scheme != "ByteFallback":
            return self.control
        spelt = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = self.tokenizer.convert_tokens_to_ids(spelt)
        encode = self._get_codec().encode
        return self.control.union(i for token, i in zip(spelt, ids, strict=True) if i in encode(token))

    def _find_cut(self, text: str, ids: Sequence[int], start: int) -> int | None:
        """The place after the first character of the first token of `ids` that is spelt out and is no text."""
        spellings = map(self.tokenizer.convert_ids_to_tokens, self._unspeakable.intersection(ids))
        places = [place for spelt in spellings if (place := text.find(spelt, start)) >= 0]
        return min(places) + 1 if places else None

    def _compute_bytes(self, token: int) -> bytes:
        if token in self.control:
            return b""
        added = self._added.get(token)
        # Gemma's runs of spaces are added tokens, but are spelt with U+2581 as its pieces are: the decoder reads them.
        if added is not None and (self._scheme == "ByteLevel" or _SENTENCEPIECE_SPACE not in added):
            return added.encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # The embedding matrix has more rows than the vocabulary has tokens.
            return b""
        if self._scheme == "ByteLevel" and _BYTE_OF_CHARACTER.keys() >= set(piece):
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, piece))
        if self._scheme == "ByteLevel":  # A piece outside GPT-2's alphabet stands for its own text.
            return piece.encode()
        if self._scheme == "ByteFallback" and (match := _BYTE_FALLBACK.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if self._anchor is None:  # Decoders drop the space of a first token, so another token goes before it.
            candidates = chain(self._tokenize("a b"), range(len(self.tokenizer)))
            self._anchor = [next(i for i in candidates if i not in self.control)]
        decode = self._get_codec().decode
        return decode([*self._anchor, token])[len(decode(self._anchor)) :].encode()


class _BackendCodec:
    """Encodes and decodes with a copy of a tokenizer's `tokenizers.Tokenizer`, which is never changed.

    Args:
        tokenizer: a tokenizer whose call does nothing to a text beyond what its backend does.
        control: the tokens that are no text.

    Raises:
        ValueError: if the copy would have other ids.
    """

    def __init__(self, tokenizer: Any, control: Collection[int]):
        backend = tokenizer.backend_tokenizer
        added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._backend = copy_backend(backend, added, control)
        if {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()} != added:
            raise ValueError(
                "The tokenizer cannot be copied, nor saved: its added tokens would get other ids if they were added "
                "again, because its model was replaced after they were added. Load the tokenizer again and add them "
                "anew."
            )

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class _TokenizerCodec:
    """Encodes and decodes with a copy of a whole tokenizer, in one thread at a time, because a call may change it."""

    def __init__(self, tokenizer: Any):
        try:
            self._tokenizer = copy.deepcopy(tokenizer)
        except Exception as error:  # A part that cannot be copied may raise anything.
            raise ValueError(
                f"The tokenizer, a {type(tokenizer).__name__}, cannot be copied, and nudging must not change the "
                f"original: {error}. Give a tokenizer that `copy.deepcopy` can copy."
            ) from error
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        # split_special_tokens: a control token that is spelt out is text like any other.
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


_Codec = _BackendCodec | _TokenizerCodec


def to_text(text: bytes) -> str:
    """Decodes UTF-8; each invalid sequence becomes U+FFFD."""
    return text.decode("utf-8", errors="replace")


def _difference(text: str, other: str) -> tuple[int, str, str]:
    """Where two texts first differ, in characters, and what each of them has from there on, cut short."""
    pairs = zip(text, other, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    return start, text[start:][:_MAX_QUOTED_CHARACTERS], other[start:][:_MAX_QUOTED_CHARACTERS]


def _validate_tokenizer(tokenizer: Any) -> None:
    missing = [f"`{name}`" for name in _REQUIRED_METHODS if not callable(getattr(tokenizer, name, None))]
    if not callable(tokenizer):
        missing.append("a `__call__` that encodes text")
    if not isinstance(getattr(tokenizer, "added_tokens_decoder", None), Mapping):
        missing.append("a mapping `added_tokens_decoder`")
    if not isinstance(getattr(tokenizer, "all_special_ids", None), Sequence):
        missing.append("a list `all_special_ids`")
    if not missing:
        return
    remedy = "Give a tokenizer of transformers, such as `AutoTokenizer.from_pretrained` loads."
    if type(tokenizer).__name__.startswith("MistralCommon"):
        remedy = (
            "It comes from mistral-common: give the tokenizer that `PreTrainedTokenizerFast.from_pretrained(name)` "
            "loads from the same `tokenizer.json` or `tekken.json`."
        )
    raise ValueError(f"The tokenizer, a {type(tokenizer).__name__}, lacks {', '.join(missing)}. {remedy}")


def _context_starts(context: str) -> Iterator[int]:
    """Places to begin a context at: its start, its last word, and then each later place within its end."""
    if context:
        yield 0
        word = max(context.rstrip(" ").rfind(" "), 0)
        near = max(word, len(context) - _JOIN_CHARACTERS)
        if 0 < word < near:
            yield word
        yield from range(max(near, 1), len(context))


def copy_backend(backend: Any, names: Mapping[int, str], control: Collection[int] = ()) -> Any:
    """A copy of `backend` that treats control tokens as text, and neither pads nor truncates.

    It shares the parts that hold the vocabulary with `backend`, because encoding changes none of them. Added tokens
    and flags are its own.

    Args:
        backend: a `tokenizers.Tokenizer`, which this module does not import.
        names: the spelling in the copy of each added token. A new one may get another id.
        control: the added tokens that are control tokens, besides the special ones.
    """
    own = type(backend)(backend.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (given := getattr(backend, part)) is not None:
            setattr(own, part, given)
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    own.add_tokens(
        [
            type(token)(
                names[i], **{flag: getattr(token, flag) for flag in flags}, special=token.special or i in control
            )
            for i, token in sorted(backend.get_added_tokens_decoder().items())
        ]
    )
    own.encode_special_tokens = True
    return own


def uses_backend_only(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer does nothing to a text beyond what its `tokenizers.Tokenizer` does."""
    kinds = type(tokenizer).__mro__
    if PreTrainedTokenizerFast not in kinds:
        return False
    own = kinds[: kinds.index(PreTrainedTokenizerFast)]
    overridden = ("__call__", "_encode_plus", "_convert_encoding", "decode", "_decode")
    return not any(name in vars(kind) for kind in own for name in overridden)


def _byte_scheme(tokenizer: Any) -> str | None:
    """How the tokenizer spells single bytes: "ByteLevel" (GPT-2's characters), "ByteFallback" (<0xNN>), or `None`."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    types = {part["type"] for part in [state, *state.get("decoders", [])]}
    return next((scheme for scheme in ("ByteLevel", "ByteFallback") if scheme in types), None)
