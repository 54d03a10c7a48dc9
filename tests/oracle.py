"""Decodes by the plain rules of nudging. It knows no cache, no draft, no batch and nothing of the package.

It decodes one row greedily and recomputes everything from whole token lists at each step. It is slow and meant to be
obviously right. "Rule n" in a comment names a step of a nudging round: 1 lookahead, 2 termination, 3 words, 4 the
questions to the base, 5 a new round.
"""

import codecs
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import regex
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}


@dataclass
class Answer:
    """A decoded answer.

    Attributes:
        ids: The answer in the base's tokens. It ends with the end mark if the nudging model ended it and there was
            room for the mark.
        nudged: For each of `ids`, whether the nudging model wrote it. It is False for the end mark.
        reason: Why the answer ended. "eos": the nudging model ended it. "length": `max_new_tokens` or a model's last
            position was reached. "stop_token": a token of `stop_tokens` was accepted. "stuck": no token of a lookahead
            could be accepted, and the base, which then had to go on, would have emitted EOS.
        top1: The base's top-1 probability by position in `ids`, wherever the base was asked.
        events: How often each rule was applied, by name.
    """

    ids: list[int] = field(default_factory=list)
    nudged: list[bool] = field(default_factory=list)
    reason: str = ""
    top1: dict[int, float] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    def saw(self, event: str) -> None:
        self.events[event] = self.events.get(event, 0) + 1


# Text of tokens -----------------------------------------------------------------------------------------------------


@functools.cache
def control_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The ids of the tokenizer's control (special) tokens."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


@functools.cache
def token_bytes(tokenizer: PreTrainedTokenizerFast, token_id: int) -> bytes:
    """The bytes that one token adds to any text. A control token adds none."""
    decoder = tokenizer.backend_tokenizer.decoder.__getstate__()
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token_id in control_ids(tokenizer):
        return b""
    if token_id in tokenizer.added_tokens_decoder:
        return token.encode()
    if b'"ByteLevel"' in decoder:
        return bytes(_BYTE_OF[letter] for letter in token)
    if b'"ByteFallback"' in decoder and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    ordinary = tokenizer.convert_tokens_to_ids("a")
    assert ordinary is not None and ordinary not in control_ids(tokenizer)
    before = tokenizer.decode([ordinary], clean_up_tokenization_spaces=False)
    after = tokenizer.decode([ordinary, token_id], clean_up_tokenization_spaces=False)
    assert after.startswith(before)
    return after[len(before) :].encode()


def join_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    return b"".join(token_bytes(tokenizer, token_id) for token_id in ids)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of `ids` without control tokens. Bytes that are not UTF-8 become U+FFFD."""
    return join_bytes(tokenizer, ids).decode(errors="replace")


def inside_character(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bool:
    """Whether the bytes of `ids` end in the middle of a UTF-8 character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(join_bytes(tokenizer, ids))
    return decoder.getstate()[0] != b""


def after_last_control(tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int]) -> list[int]:
    """The ids of a prompt after its last control token."""
    last = max((i for i, token_id in enumerate(prompt_ids) if token_id in control_ids(tokenizer)), default=-1)
    return prompt_ids[last + 1 :]


def encode_in_context(tokenizer: PreTrainedTokenizerFast, left: str, text: str) -> list[int]:
    """The ids of `text` after the text `left`. Spellings of control tokens are ordinary text."""

    def encode(string: str) -> list[int]:
        return tokenizer.encode(string, add_special_tokens=False, split_special_tokens=True)

    last_word = left[max(left.rfind(" "), 0) :]
    for tail in [left] + [last_word[start:] for start in range(len(last_word))]:
        alone, whole = encode(tail), encode(tail + text)
        if tail and whole[: len(alone)] == alone:
            return whole[len(alone) :]
    if join_bytes(tokenizer, encode(text)) != text.encode():  # It adds a space before a text, so put a guard there.
        for guard in "\n.0a":
            alone, whole = encode(guard), encode(guard + text)
            if whole[: len(alone)] == alone:
                return whole[len(alone) :]
    return encode(text)


# Words --------------------------------------------------------------------------------------------------------------


def split_points(text: bytes, boundary: str = "space") -> list[int]:
    """Where the words after the first one begin in a lookahead (rule 3): at the last space of each run of spaces.

    The offsets are in bytes. With the boundary "unicode" there are more of them: see [`letter_points`].

    >>> split_points(b"  a  b ")
    [4, 6]
    """
    first = len(text) - len(text.lstrip(b" "))  # Leading spaces belong to the first word.
    spaces = [i for i in range(first, len(text)) if text[i : i + 1] == b" " and text[i + 1 : i + 2] != b" "]
    return spaces if boundary == "space" else letter_points(text, spaces)


def letter_points(text: bytes, spaces: Collection[int]) -> list[int]:
    """`spaces`, and the bounds of UAX #29 before letters or digits, where a word has a letter or digit already.

    >>> letter_points("我们 (3.5)".encode(), [6])
    [3, 6]
    """
    string = text.decode("utf-8", "surrogateescape")
    for faulty, sign in {"[\U0001f1e6-\U0001f1ff]": "\U0001d100", "'": ".", "\u2019": "\ufe52"}.items():
        string = re.sub(faulty, sign, string)  # Older versions of `regex` err in half a flag and before "'e".
    bounds = [match.start() for match in regex.finditer(r"(?w)\b", string)]
    inner = {match.start() for match in regex.finditer(r"(?<=\X)\X", string)}
    points, has_letter, at = [], False, 0
    for i, letter in enumerate(string):
        if at in spaces:
            points.append(at)
            has_letter = False
        elif has_letter and i in inner and i in bounds:
            end = min((bound for bound in bounds if bound > i), default=len(string))
            if any(map(is_letter, string[i:end])):
                points.append(at)
                has_letter = False
        has_letter = has_letter or is_letter(letter)
        at += len(letter.encode("utf-8", "surrogateescape"))
    return points


def is_letter(character: str) -> bool:
    """Whether it is a letter or digit of its own. Halfwidth voicing marks of Japanese are not."""
    return regex.fullmatch(r"[\p{L}\p{N}]", character) is not None and character not in "\uff9e\uff9f"


def words_of_tokens(tokenizer: PreTrainedTokenizerFast, ids: list[int], boundary: str = "space") -> list[list[int]]:
    """The words of a lookahead in one vocabulary, as lists of tokens, including the last piece (rule 3)."""
    starts, offset = [], 0
    for token_id in ids:
        starts.append(offset)
        offset += len(token_bytes(tokenizer, token_id))
    # A split inside a token moves to that token's start, and the first word has at least one token.
    points = split_points(join_bytes(tokenizer, ids), boundary)
    cuts = {max(i for i, start in enumerate(starts) if start <= at) for at in points}
    bounds = sorted({0, len(ids), *(max(cut, 1) for cut in cuts)})
    if (
        boundary == "unicode"
    ):  # No character is split: a split moves on to a token before which the characters are whole.
        whole = [i for i in range(1, len(ids)) if not inside_character(tokenizer, ids[:i])]
        cuts = {max((i for i in whole if starts[i] <= at), default=min(whole, default=len(ids))) for at in points}
        bounds = sorted({0, len(ids), *cuts})
    words = [ids[start:end] for start, end in itertools.pairwise(bounds)]
    for i in range(len(words) - 2, 0, -1):  # Spaces alone belong to the word before.
        if join_bytes(tokenizer, words[i]).strip(b" ") == b"":
            words[i - 1 : i + 1] = [words[i - 1] + words[i]]
    return words


def words_of_text(text: bytes, boundary: str = "space") -> list[str]:
    """The words of a lookahead between two vocabularies, as texts, including the last piece (rule 3)."""
    bounds = [0, *split_points(text, boundary), len(text)]
    return [text[start:end].decode(errors="replace") for start, end in itertools.pairwise(bounds)]


# The decoder --------------------------------------------------------------------------------------------------------


def eos_ids(model: PreTrainedModel) -> list[int]:
    eos = model.generation_config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


@torch.no_grad()
def next_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Raw float32 logits of shape `(vocab,)` for the token after `ids`."""
    return model(torch.tensor([ids])).logits[0, -1].float()


class _Stop(Exception):
    """The token that was just accepted ends the answer, for the given reason."""


@dataclass
class _Decoder:
    base: PreTrainedModel
    nudging_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    nudging_tokenizer: PreTrainedTokenizerFast
    prompt_ids: list[int]
    nudging_prompt_ids: list[int]
    threshold: float
    max_new_tokens: int
    num_nudging_tokens: int
    takeover_on_agreement: bool
    word_boundary: str
    min_new_tokens: int
    gate: str
    target: float | None
    forbidden: Callable[[list[int]], Collection[int]] | None
    stop_tokens: Collection[int]
    base_positions: float
    nudging_positions: float

    def __post_init__(self) -> None:
        # Two tokenizers with equal vocabularies count as one vocabulary, whatever their names.
        self.one_vocabulary = self.tokenizer.get_vocab() == self.nudging_tokenizer.get_vocab()
        assert self.one_vocabulary or self.min_new_tokens == 0, "min_new_tokens is counted in one vocabulary only"
        self.answer = Answer()
        self.scores = []

    # Phases: each returns the next one, or None if the answer is finished -------------------------------------------

    def run(self) -> Answer:
        phase = self.nudging_round if self.max_new_tokens > 0 else self.out_of_room
        try:
            while phase is not None:
                phase = phase()
        except _Stop as stop:
            self.answer.reason = str(stop)
        return self.answer

    def out_of_room(self) -> None:
        self.answer.reason = "length"

    def nudging_round(self):
        """Rules 1 to 5."""
        answer = self.answer
        answer.saw("round")
        if inside_character(self.tokenizer, answer.ids):
            answer.saw("round inside a character")
        if not self.one_vocabulary and self.only_end_is_allowed():
            draft, ended = [], True
        else:
            draft, ended = self.lookahead()  # Rule 1.
        words = self.words(draft) if draft else []  # Rule 3.
        if not self.one_vocabulary:
            words, ended = self.up_to_forbidden(words, ended)
        if ended:  # Rule 2: all the text before EOS is accepted, and the answer is finished.
            answer.saw("termination")
            while words:
                if not self.accept_word(self.take_word(words)):
                    return self.out_of_room
            if len(answer.ids) == self.max_new_tokens:
                return self.out_of_room
            answer.ids.append(eos_ids(self.base)[0])
            answer.nudged.append(False)
            answer.reason = "eos"
            return None
        if not words:  # No word of this lookahead is allowed.
            return self.go_on_without_words
        word = self.take_word(words)
        if self.ids_of(word) == []:  # No word of this lookahead has tokens in the base's vocabulary.
            return self.go_on_without_words
        if not words:
            answer.saw("only one word")
        if not self.accept_word(word):  # Rule 4: the first word is accepted.
            return self.out_of_room
        while words:
            word = self.take_word(words)
            set_aside = not words
            if set_aside and self.word_text(word).strip(" ") == "":
                answer.saw("empty last piece")
                break
            if len(answer.ids) == self.max_new_tokens:
                return self.out_of_room
            token, confident, would_end = self.ask_base()
            if would_end:
                answer.saw("round ended by base EOS")
                return self.nudging_round
            if confident:
                answer.saw("confident takeover")
                return functools.partial(self.base_phase, first=token)
            if self.takeover_on_agreement and self.agrees(token, word, words):
                answer.saw("agreement takeover")
                return functools.partial(self.base_phase, first=token)
            if set_aside:
                break
            answer.saw("further word accepted")
            if not self.accept_word(word):
                return self.out_of_room
        answer.saw("words ran out")  # Rule 5.
        return self.nudging_round if len(answer.ids) < self.max_new_tokens else self.out_of_room

    def base_phase(self, first: int):
        """Accepts the base's tokens while it is confident. `first` is accepted in any case."""
        answer = self.answer
        answer.saw("base phase")
        self.accept(first, nudged=False)
        while len(answer.ids) < self.max_new_tokens:
            token, confident, would_end = self.ask_base()
            if would_end:
                answer.saw("base phase ended by base EOS")
                return self.nudging_round
            if not confident:
                if not inside_character(self.tokenizer, answer.ids):
                    return self.nudging_round
                answer.saw("base goes on inside a character")
            answer.saw("confident base token" if confident else "unsure base token")
            self.accept(token, nudged=False)
        return self.out_of_room

    def go_on_without_words(self):
        """Lets the base go on, whatever its confidence, because no word of the lookahead can be accepted."""
        self.answer.saw("lookahead without tokens")
        token, _, would_end = self.ask_base()
        if would_end:
            self.answer.reason = "stuck"
            return None
        return functools.partial(self.base_phase, first=token)

    # The questions to the two models --------------------------------------------------------------------------------

    def ask_base(self) -> tuple[int, bool, bool]:
        """The base's greedy token at the end of the answer, whether it is confident, and whether it would emit EOS."""
        logits = next_logits(self.base, self.prompt_ids + self.answer.ids)
        p = logits.softmax(-1)  # These are raw logits, before anything is suppressed.
        self.answer.top1[len(self.answer.ids)] = p.max().item()
        if len(self.answer.ids) < self.min_new_tokens:
            logits[eos_ids(self.base)] = -torch.inf
        logits[list(self.forbidden_after(self.answer.ids))] = -torch.inf
        assert logits.max() > -torch.inf
        token = logits.argmax().item()
        would_end = token in eos_ids(self.base)
        return token, self.is_confident(p, token) and not would_end, would_end  # EOS is never confident.

    def is_confident(self, p: torch.Tensor, token: int) -> bool:
        """Whether the base is confident by the gate's formula. `p` are its probabilities, of shape `(vocab,)`."""
        t, ordered = self.threshold, p.sort(descending=True).values
        if self.target is not None:
            return self.is_confident_by_quantile(ordered[0].item())
        if self.gate == "top1":
            return ordered[0].item() >= t
        if self.gate == "entropy":
            return -sum(x * math.log(x) for x in p.tolist() if x > 0) <= t
        if self.gate == "margin":
            return (ordered[0] - ordered[1]).item() >= t
        if self.gate == "kad":
            return p[token].item() >= t
        assert self.gate == "rejection"
        q = next_logits(self.nudging_model, self.nudging_context()).softmax(-1)
        return p[token].item() >= q.max().item() - t

    def is_confident_by_quantile(self, score: float) -> bool:
        """Whether a score reaches the online cutoff: a quantile of the scores so far, with a level from the words."""
        pieces = [token_bytes(self.tokenizer, token_id) for token_id in self.answer.ids]
        authors = [nudged for piece, nudged in zip(pieces, self.answer.nudged, strict=True) for _ in piece]
        level = self.target
        text = b"".join(pieces)
        words = [word.span() for word in re.finditer(rb"\S+(?=\s)", text)]
        if self.word_boundary == "unicode":
            bounds = [0, *split_points(text, "unicode")]  # The last word may go on.
            words = [(start, end) for start, end in itertools.pairwise(bounds) if text[start:end].strip()]
        for start, end in words:
            ink = [
                own
                for byte, own in zip(text[start:end], authors[start:end], strict=True)
                if byte not in b" \t\n\r\v\f"
            ]
            level += 0.05 * (self.target - any(ink))
        cutoff = 0.4
        if len(self.scores) >= 8:
            place = int(level * len(self.scores))
            cutoff = -1 if level < 0 else 0.6 if level >= 1 else min(0.6, sorted(self.scores)[place])
        self.scores.append(score)
        return score >= cutoff

    def lookahead(self) -> tuple[list[int], bool]:
        """What the nudging model writes next, in its own ids, and whether it ends the answer after that (rule 1)."""
        context, draft = self.nudging_context(), []
        ends = eos_ids(self.nudging_model)
        suppressed = sorted(control_ids(self.nudging_tokenizer) - set(ends))  # EOS is its only allowed control token.
        # A lookahead of more than 32 tokens must fit into the answer, and the nudging model must be able to read it.
        room = min(self.max_new_tokens, self.base_positions - len(self.prompt_ids)) - len(self.answer.ids)
        length = min(self.num_nudging_tokens, max(32, room))
        for i in range(int(min(length + 3, self.nudging_positions - len(context)))):
            if i >= length:
                # If the only word ends inside a character, the lookahead goes on until the character is complete.
                if len(self.words(draft)) > 1 or not inside_character(self.nudging_tokenizer, draft):
                    break
                self.answer.saw("lookahead drawn on")
            logits = next_logits(self.nudging_model, context + draft)
            logits[suppressed] = -torch.inf
            if len(self.answer.ids) + len(draft) < self.min_new_tokens:
                logits[ends] = -torch.inf
            if self.one_vocabulary and self.forbidden is not None:
                forbidden = self.forbidden_after(self.answer.ids + draft)
                may_end = not set(eos_ids(self.base)) <= set(forbidden) and logits[ends].max() > -torch.inf
                at_end = logits[ends].clone()
                logits[list(forbidden)] = -torch.inf
                logits[ends] = at_end if may_end else -torch.inf
                if logits.max() == -torch.inf:
                    self.answer.saw("nothing that the nudging model may write")
                    break
            token = logits.argmax().item()
            if token in ends:
                return draft, True
            draft.append(token)
            if self.one_vocabulary and self.forbidden is not None and token in self.stop_tokens:
                break
        return draft, False

    # Forbidden tokens -----------------------------------------------------------------------------------------------

    def forbidden_after(self, ids: list[int]) -> Collection[int]:
        return self.forbidden(ids) if self.forbidden is not None else ()

    def only_end_is_allowed(self) -> bool:
        vocabulary = range(self.base.get_output_embeddings().out_features)
        return set(vocabulary) - set(self.forbidden_after(self.answer.ids)) <= set(eos_ids(self.base))

    def up_to_forbidden(self, words: list[str], ended: bool) -> tuple[list[str], bool]:
        """The words up to the first forbidden one, between two vocabularies, and whether the answer ends after them.

        The forbidden word is the last piece, which is not accepted. If it is the first word, there are no words.
        """
        whole, ids = [], list(self.answer.ids)
        words = list(words)
        while words:
            word, before = words.pop(0), self.answer.ids
            self.answer.ids = ids  # As if the words before this one were accepted.
            while words and self.ids_of(word) == []:
                word += words.pop(0)
            new = self.ids_of(word)
            self.answer.ids = before
            set_aside = not words and whole and not ended
            for token in [] if set_aside else new:
                if token in self.forbidden_after(ids):
                    self.answer.saw("forbidden word")
                    return ([*whole, word] if whole else []), False
                ids = [*ids, token]
                if token in self.stop_tokens:
                    return [*whole, word, *words], ended
            whole.append(word)
        if ended and set(eos_ids(self.base)) <= set(self.forbidden_after(ids)):
            self.answer.saw("forbidden end")
            ended = False
        return whole, ended

    def nudging_context(self) -> list[int]:
        """The nudging model's context: its prompt and the answer's text or, in one vocabulary, the answer's ids.

        It has no control tokens of the answer.
        """
        if self.one_vocabulary:
            hidden = control_ids(self.nudging_tokenizer)
            return self.nudging_prompt_ids + [token for token in self.answer.ids if token not in hidden]
        left = text_of(self.nudging_tokenizer, after_last_control(self.nudging_tokenizer, self.nudging_prompt_ids))
        answer = text_of(self.tokenizer, self.answer.ids)
        return self.nudging_prompt_ids + encode_in_context(self.nudging_tokenizer, left, answer)

    # Words: lists of ids in one vocabulary, or texts between two ----------------------------------------------------

    def words(self, draft: list[int]) -> list[list[int]] | list[str]:
        if self.one_vocabulary:
            return words_of_tokens(self.tokenizer, draft, self.word_boundary)
        if self.word_boundary == "unicode":  # The whole is encoded and split between tokens, unless that loses text.
            text = text_of(self.nudging_tokenizer, draft)
            ids = self.ids_of(text)
            if join_bytes(self.tokenizer, ids) == text.encode():
                return words_of_tokens(self.tokenizer, ids, self.word_boundary)
        return words_of_text(join_bytes(self.nudging_tokenizer, draft), self.word_boundary)

    def word_text(self, word: list[int] | str) -> str:
        return text_of(self.tokenizer, word) if isinstance(word, list) else word

    def ids_of(self, word: list[int] | str) -> list[int]:
        """The base's ids of a word that follows the answer so far."""
        if isinstance(word, list):
            return word
        left = text_of(self.tokenizer, after_last_control(self.tokenizer, self.prompt_ids) + self.answer.ids)
        return encode_in_context(self.tokenizer, left, word)

    def take_word(self, words: list) -> list[int] | str:
        """Removes and returns the first of `words`. If it encodes to no ids, it is joined with the next word."""
        word = words.pop(0)
        while words and self.ids_of(word) == []:
            self.answer.saw("word without tokens joined")
            word += words.pop(0)
        return word

    def agrees(self, token: int, word: list[int] | str, following: list) -> bool:
        """Whether the base's token has text and the word, including its space, begins with it.

        With the boundary "unicode", the words that follow may be part of the beginning.
        """
        text, ahead = text_of(self.tokenizer, [token]), self.word_text(word)
        if self.word_boundary == "unicode":
            ahead = "".join([ahead, *map(self.word_text, following)])
        return text != "" and ahead.startswith(text)

    # Accepting ------------------------------------------------------------------------------------------------------

    def accept_word(self, word: list[int] | str) -> bool:
        """Accepts the nudging model's word token by token. Returns False if there was no room for all of it."""
        return all(self.accept(token, nudged=True) for token in self.ids_of(word))

    def accept(self, token: int, nudged: bool) -> bool:
        """Accepts one token. Returns False if there was no room for it."""
        if len(self.answer.ids) == self.max_new_tokens:
            return False
        self.answer.ids.append(token)
        self.answer.nudged.append(nudged)
        if token in self.stop_tokens:
            raise _Stop("stop_token")
        if len(self.prompt_ids) + len(self.answer.ids) >= self.base_positions:
            raise _Stop("length")
        if len(self.nudging_context()) >= self.nudging_positions:
            raise _Stop("length")
        return True


def decode(
    base: PreTrainedModel,
    nudging_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    nudging_tokenizer: PreTrainedTokenizerFast,
    prompt_ids: list[int],
    nudging_prompt_ids: list[int],
    *,
    threshold: float,
    max_new_tokens: int,
    num_nudging_tokens: int = 16,
    takeover_on_agreement: bool = True,
    word_boundary: str = "space",
    min_new_tokens: int = 0,
    gate: str = "top1",
    target: float | None = None,
    forbidden: Callable[[list[int]], Collection[int]] | None = None,
    stop_tokens: Collection[int] = (),
    base_positions: float = math.inf,
    nudging_positions: float = math.inf,
) -> Answer:
    """Decodes one answer greedily by nudging, recomputing everything at each step.

    Args:
        base: The model that writes where it is confident.
        nudging_model: The model that writes elsewhere.
        tokenizer: The base's tokenizer.
        nudging_tokenizer: The nudging model's tokenizer. If its vocabulary equals the base's, words are lists of ids.
        prompt_ids: The base's prompt, without padding.
        nudging_prompt_ids: The nudging model's prompt, in its own ids, without padding.
        threshold: The base is confident where its top-1 probability is at least this; see `gate`.
        max_new_tokens: The maximum number of the base's tokens in the answer, including the end mark.
        num_nudging_tokens: The length of a lookahead, in the nudging model's tokens.
        takeover_on_agreement: Whether the base takes over where its token begins the next nudging word.
        word_boundary: Where the words of a lookahead begin: at "space" alone, or "unicode", also by UAX #29.
        min_new_tokens: The number of base tokens before which neither model may end the answer. It needs one
            vocabulary.
        gate: The formula that is compared with the threshold.
        target: If given, the share of nudged words that an online cutoff of the top-1 probability aims at, in place of
            `threshold`.
        forbidden: Takes the answer's ids so far, and returns the base's ids that neither model may write next.
        stop_tokens: The base's ids that end the answer.
        base_positions, nudging_positions: How many tokens each model can read.
    """
    return _Decoder(
        base,
        nudging_model,
        tokenizer,
        nudging_tokenizer,
        list(prompt_ids),
        list(nudging_prompt_ids),
        threshold,
        max_new_tokens,
        num_nudging_tokens,
        takeover_on_agreement,
        word_boundary,
        min_new_tokens,
        gate,
        target,
        forbidden,
        stop_tokens,
        base_positions,
        nudging_positions,
    ).run()
