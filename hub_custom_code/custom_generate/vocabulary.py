"""One tokenizer as text and ids. It knows bytes and tokens, never models or answers.

Nothing of the user's tokenizer is changed, not even for a moment: what encodes and decodes here is a copy of its own.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from .transformers_private import byte_of_character

logger = logging.getLogger(__name__)

_BYTE_OF_CHARACTER = byte_of_character()
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What a tokenizer must have for text and ids to be told from one another.
_NEEDED = ("convert_ids_to_tokens", "get_vocab", "decode")
_SPACE_OF_PIECES = "\u2581"
_TOLD_CHARACTERS = 20  # Of a text in a warning, at the most.
_JOIN_CHARACTERS = 32  # Text to the left in which a place is looked for where the ids end with the text.
_HEAD_CHARACTERS = 256  # Text to the right by which such a place is found.


class _Remembered(dict[int, bytes]):
    """A function of tokens, asked once for each."""

    def __init__(self, find: Callable[[int], bytes]):
        self._find = find

    def __missing__(self, token: int) -> bytes:
        self[token] = self._find(token)
        return self[token]


class Vocabulary:
    """One tokenizer: what its tokens add to a text, and how text is encoded where other text stands before it.

    Several threads may use it at once. A token that is added to the tokenizer later is not seen: make another
    `Vocabulary` then.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`; it stays as it is.

    Raises:
        ValueError: for what lacks something that a crossing between two vocabularies needs.
    """

    def __init__(self, tokenizer: Any):
        _refuse_what_is_no_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._added = {i: token.content for i, token in added.items()}
        self._scheme = _byte_scheme(tokenizer)
        self._bytes = _Remembered(self._find_bytes)
        self._anchor: list[int] | None = None
        self._encode = lru_cache(maxsize=4096)(self._tokenize)
        self._codec: _Codec | None = None
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to a text, whatever stands before it; nothing for a control token."""
        return self._bytes[token]

    def join(self, ids: Sequence[int]) -> bytes:
        """The text of the ids, without control tokens."""
        return b"".join(map(self._bytes.__getitem__, ids))

    def encode_after(self, left: str, text: str) -> list[int]:
        """The ids of `text` as the tokenizer would write it after `left`, where the ids of `left` stand already.

        `encode(left) + encode(text)` is not `encode(left + text)`: `left` is encoded with and without `text`, and
        where its ids stay the same the others are those of `text`. Where they do not (`text` goes on within a word,
        and its beginning would have merged with what is there), less and less of `left` is taken. How many encodes
        that takes has a bound, whatever the script.

        Args:
            left: as far as a tokenizer looks back.
        """
        head = text[:_HEAD_CHARACTERS]
        for start in _starts_of_left(left):
            ids = self.encode_behind(left[start:], head)
            if ids is not None and len(head) < len(text):  # The place is likely one; the whole text says.
                ids = self.encode_behind(left[start:], text)
            if ids is not None:
                return ids
        alone = self._encode(text)
        ids = None
        if self.join(alone) != text.encode():  # It puts a space before a first word: let that be a line break.
            ids = self.encode_behind("\n", text)
        return list(alone) if ids is None else ids

    def encode_behind(self, left: str, text: str) -> list[int] | None:
        """The ids of `text` after those of `left`, where these stay the same."""
        ids, both = self._encode(left), self._encode(left + text)
        return list(both[len(ids) :]) if both[: len(ids)] == ids else None

    def tell_of_loss(self, text: str, ids: Sequence[int], deed: str) -> None:
        """Warns where the ids do not hold the text that they were made of: once for each tokenizer and deed.

        A tokenizer may not be able to write all text: Qwen's composes characters (NFC), those of SentencePiece have
        one sign for U+2581 and the space, and WordPiece knows no white space.

        Args:
            deed: what the ids are for, "write" or "read".
        """
        if deed in self._told or (got := self.join(ids)) == text.encode():
            return
        self._told.add(deed)
        start, given, held = _difference(text, to_text(got))
        logger.warning(
            "The tokenizer %s(name_or_path=%r) cannot hold all text that the other model writes: it will %s %s for %s "
            "(at character %d of %d). Each tokenizer is told of once.",
            type(self.tokenizer).__name__,
            getattr(self.tokenizer, "name_or_path", ""),
            deed,
            ascii(held),
            ascii(given),
            start,
            len(text),
        )

    def _own_codec(self) -> _Codec:
        with self._lock:
            if self._codec is None:
                self._codec = _BackendCodec(self.tokenizer) if _is_backend_alone(self.tokenizer) else None
                self._codec = self._codec or _TokenizerCodec(self.tokenizer)
            return self._codec

    def _tokenize(self, text: str) -> tuple[int, ...]:
        encode = self._own_codec().encode
        ids = encode(text)
        if self.control.isdisjoint(ids):
            return tuple(ids)
        # Unigram has control tokens among its pieces, and finds them all the same: cut each spelling in two.
        found: list[int] = []
        rest, guard = text, ""
        line_break = encode("\n")
        while (cut := self._in_a_spelling(rest, ids, len(guard))) is not None:
            found += encode(rest[:cut])[len(line_break) if guard else 0 :]
            rest, guard = "\n" + rest[cut:], "\n"
            ids = encode(rest)
        return tuple(found + ids[len(line_break) if guard else 0 :])

    def _in_a_spelling(self, text: str, ids: Sequence[int], start: int) -> int | None:
        """The place after the first character of the first control token that is both spelt out and encoded."""
        spellings = map(self.tokenizer.convert_ids_to_tokens, self.control.intersection(ids))
        places = [place for spelt in spellings if (place := text.find(spelt, start)) >= 0]
        return min(places) + 1 if places else None

    def _find_bytes(self, token: int) -> bytes:
        if token in self.control:
            return b""
        added = self._added.get(token)
        # Gemma's runs of spaces are added tokens, written as its pieces are: the decoder reads them.
        if added is not None and (self._scheme == "ByteLevel" or _SPACE_OF_PIECES not in added):
            return added.encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # Rows of the embedding matrix beyond the vocabulary.
            return b""
        if self._scheme == "ByteLevel" and _BYTE_OF_CHARACTER.keys() >= set(piece):
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, piece))
        if self._scheme == "ByteLevel":  # A piece that is not spelt in bytes is its own text.
            return piece.encode()
        if self._scheme == "ByteFallback" and (match := _BYTE_FALLBACK.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if self._anchor is None:  # Decoders drop the space of a first token: decode after another one.
            candidates = (*self._tokenize("a b"), *self.tokenizer.get_vocab().values())
            self._anchor = [next(i for i in candidates if i not in self.control)]
        decode = self._own_codec().decode
        return decode([*self._anchor, token])[len(decode(self._anchor)) :].encode()


class _BackendCodec:
    """Encodes and decodes with a copy of a tokenizer's `tokenizers.Tokenizer`, which nothing changes after this.

    Args:
        tokenizer: whose call does no more to a text than its backend does.
    """

    def __init__(self, tokenizer: Any):
        self._backend = _private_backend(tokenizer.backend_tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class _TokenizerCodec:
    """Encodes and decodes with a copy of a whole tokenizer, one thread at a time: a call may change its object."""

    def __init__(self, tokenizer: Any):
        try:
            self._tokenizer = copy.deepcopy(tokenizer)
        except Exception as error:  # Whatever a part of it raises that cannot be copied.
            raise ValueError(
                f"The tokenizer ({type(tokenizer).__name__}) cannot be copied, and is not to be changed: {error}. "
                "Give one that `copy.deepcopy` can copy."
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
    return text.decode("utf-8", errors="replace")


def _difference(text: str, other: str) -> tuple[int, str, str]:
    """Where two texts first differ, in characters, and a little of both from there on."""
    pairs = zip(text, other, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    return start, text[start:][:_TOLD_CHARACTERS], other[start:][:_TOLD_CHARACTERS]


def _refuse_what_is_no_tokenizer(tokenizer: Any) -> None:
    missing = [f"`{name}`" for name in _NEEDED if not callable(getattr(tokenizer, name, None))]
    if not callable(tokenizer):
        missing.append("a call that encodes text")
    if not isinstance(getattr(tokenizer, "added_tokens_decoder", None), Mapping):
        missing.append("a mapping `added_tokens_decoder`")
    if not isinstance(getattr(tokenizer, "all_special_ids", None), Sequence):
        missing.append("a list `all_special_ids`")
    if not missing:
        return
    remedy = "Give a tokenizer of transformers, as `AutoTokenizer.from_pretrained` loads it."
    if type(tokenizer).__name__.startswith("MistralCommon"):
        remedy = (
            "It is mistral-common's; give the same tokenizer as `PreTrainedTokenizerFast.from_pretrained(name)` loads "
            "it from `tokenizer.json` or `tekken.json`."
        )
    raise ValueError(f"The tokenizer, a {type(tokenizer).__name__}, lacks {', '.join(missing)}. {remedy}")


def _starts_of_left(left: str) -> Iterator[int]:
    """Where to begin with the text on the left: with all of it, at the last word, then ever later within its end."""
    if left:
        yield 0
        word = max(left.rstrip(" ").rfind(" "), 0)
        near = max(word, len(left) - _JOIN_CHARACTERS)
        if 0 < word < near:
            yield word
        yield from range(max(near, 1), len(left))


def _private_backend(backend: Any) -> Any:
    """What encodes and decodes as `backend` does, control tokens as text, without padding and truncation.

    The parts that hold the vocabulary are the same objects, for encoding changes none of them; added tokens and flags
    are its own.
    """
    own = type(backend)(backend.model)  # `tokenizers.Tokenizer`, which this module does not import.
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (given := getattr(backend, part)) is not None:
            setattr(own, part, given)
    added = backend.get_added_tokens_decoder()
    own.add_tokens([added[i] for i in sorted(added)])
    if _added_tokens(own) != _added_tokens(backend):
        raise ValueError(
            "The tokenizer's added tokens have other ids than they get when they are added again, so it cannot be "
            "copied, nor saved: its model was replaced after they were added. Add them anew."
        )
    own.encode_special_tokens = True
    return own


def _added_tokens(backend: Any) -> dict[int, str]:
    return {i: repr(token) for i, token in backend.get_added_tokens_decoder().items()}


def _is_backend_alone(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer does nothing to a text but what its `tokenizers.Tokenizer` does."""
    kinds = type(tokenizer).__mro__
    if PreTrainedTokenizerFast not in kinds:
        return False
    own = kinds[: kinds.index(PreTrainedTokenizerFast)]
    overridden = ("__call__", "_encode_plus", "_convert_encoding", "decode", "_decode")
    return not any(name in vars(kind) for kind in own for name in overridden)


def _byte_scheme(tokenizer: Any) -> str | None:
    """How the tokenizer writes single bytes: "ByteLevel" (GPT-2's characters), "ByteFallback" (<0xNN>), or not."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    types = {part["type"] for part in [state, *state.get("decoders", [])]}
    return next((scheme for scheme in ("ByteLevel", "ByteFallback") if scheme in types), None)
