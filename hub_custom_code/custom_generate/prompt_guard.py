"""Encodes prompts in which control tokens that a user has spelt out stay text. It knows no messages and no models.

A tokenizer cannot tell a control token that a template writes from one that stands in a message. So each spelling in
a message is broken by a mark before the template is filled in. What is whole afterwards is the template's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from .control_tokens import control_ids
from .vocabulary import Vocabulary, copy_backend, uses_backend_only

# For each tokenizer, as long as it has so many tokens and this template: its control tokens and what finds them.
_SPELLINGS: WeakKeyDictionary[Any, tuple[Any, dict[str, int], re.Pattern[str]]] = WeakKeyDictionary()


class PromptGuard:
    """Encodes prompts of one tokenizer.

    Args:
        tokenizer: a tokenizer of transformers. It is not changed.
        contents: the texts that users have written.

    Attributes:
        is_needed: whether a content spells out a control token. If none does, the tokenizer may encode the prompt.
    """

    def __init__(self, tokenizer: Any, contents: Iterable[str]):
        contents = list(contents)
        self._tokenizer = tokenizer
        self._ids, self._pattern = _spellings(tokenizer)
        self._control = frozenset(self._ids.values())
        self.is_needed = any(map(self._pattern.search, contents))
        marks = (f"zq{i}qz" for i in count())
        self._mark = next(mark for mark in marks if not any(mark in text for text in contents))

    def broken(self, content: str) -> str:
        """A content with a mark inside each control token that it spells out."""
        while self._pattern.search(content):  # What is left of one may be a part of another one.
            content = self._pattern.sub(lambda match: match[0][0] + self._mark + match[0][1:], content)
        return content

    def mended(self, text: str) -> str:
        """A text without the marks."""
        return text.replace(self._mark, "")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encodes a prompt.

        Args:
            text: the prompt, with broken contents.
            add_special_tokens: whether the tokenizer adds tokens of its own, such as BOS.

        Raises:
            ValueError: if the tokenizer can encode a spelling only as the control token that it spells.
        """
        parts = self._pattern.split(text)  # Each second part is a control token of the template.
        parts[::2] = map(self.mended, parts[::2])
        tokens = [self._ids[token] for token in parts[1::2]]
        encode = self._encode_by_backend if uses_backend_only(self._tokenizer) else self._encode_in_parts
        ids = encode(parts)
        if [token for token in ids if token in self._control] != tokens:
            raise ValueError(
                "A message spells out a control token, and the tokenizer cannot encode it as text: leave it out of "
                "the message, or give the prompt as ids."
            )
        if not add_special_tokens:
            return ids
        bare, whole = (self._tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return [*whole[:start], *ids, *whole[start + len(bare) :]]

    def _encode_by_backend(self, parts: list[str]) -> list[int]:
        """Encodes with a copy of the tokenizer in which control tokens have other names."""
        backend = self._tokenizer.backend_tokenizer
        names = {
            i: f"{self._mark}{i}{self._mark}" if i in self._control else token.content
            for i, token in backend.get_added_tokens_decoder().items()
        }
        own = copy_backend(backend, names)
        own.encode_special_tokens = False
        given = {own.token_to_id(name): i for i, name in names.items()}
        parts[1::2] = [names[self._ids[token]] for token in parts[1::2]]
        return [given.get(i, i) for i in own.encode("".join(parts), add_special_tokens=False).ids]

    def _encode_in_parts(self, parts: list[str]) -> list[int]:
        encode = Vocabulary(self._tokenizer).encode_after
        each = [[self._ids[part]] if i % 2 else encode("", part) for i, part in enumerate(parts)]
        return [token for ids in each for token in ids]


def _spellings(tokenizer: Any) -> tuple[dict[str, int], re.Pattern[str]]:
    """The control tokens of a tokenizer by what they are spelt as, and a pattern that finds and captures one."""
    state = (len(tokenizer), tokenizer.chat_template)
    if (known := _SPELLINGS.get(tokenizer)) is None or known[0] != state:
        control = sorted(control_ids(tokenizer))
        spelt = dict(zip(tokenizer.convert_ids_to_tokens(control), control, strict=True))
        ids = {token: i for token, i in spelt.items() if len(token.strip()) > 1}
        longest_first = sorted(map(re.escape, ids), key=len, reverse=True)
        _SPELLINGS[tokenizer] = known = state, ids, re.compile(f"({'|'.join(longest_first) or '(?!)'})")
    return known[1:]
