"""Makes a nudged base a model of lm-evaluation-harness (0.4.13). It knows requests, never tasks or scores."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

try:
    import lm_eval.evaluator
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError("This needs lm-evaluation-harness: pip install 'nudging-hf[lm-eval]'.") from error

from ..chats import turn_template
from ..core.config import NudgingConfig
from ..encoded_chats import padded, plain_ids
from ..pair import Pair, nudging_model_named_in
from ..provenance import count_nudged_words, pieces_of, text_of
from ..study.tables import share_of

logger = logging.getLogger(__name__)
NAME = "nudging_hf"
# The paper's prompt. Each task writes its own "Question: " or "Instruction: ".
BASE_TEMPLATE = "{system}\n{user}\n"


_GIVES_RATES = "gives_nudge_rates"  # Marks the harness's function once it is wrapped.
_CACHE_OWNER = "nudging_hf: who wrote these answers"  # A key of the file of --use_cache, whose others are hashes.


def register() -> None:
    """Registers `--model nudging_hf` with the harness in this process, and lets its results have nudge rates.

    The table of a nudged model then has a line `nudge_rate` for each task, and each sample has a field of that name. A
    second call does nothing.
    """
    if NAME not in model_registry:
        model_registry.register(NAME, target=NudgingLM)
    if not hasattr(lm_eval.evaluator.evaluate, _GIVES_RATES):
        lm_eval.evaluator.evaluate = _with_nudge_rates(lm_eval.evaluator.evaluate)


class Conversation(str):
    """Messages as JSON, because the harness passes a prompt around as one string."""


class NudgedText(str):
    """An answer that knows how many of its words the nudging model wrote, also after it was kept in a cache."""

    nudged: int
    words: int

    @classmethod
    def of(cls, text: str, nudged: int, words: int) -> NudgedText:
        self = cls(text)
        self.nudged, self.words = nudged, words
        return self

    @property
    def nudge_rate(self) -> float | None:
        return share_of(self.nudged, self.words)


def nudge_rate_of(answers: Iterable[Any]) -> float | None:
    """The share of nudged words in those answers that are a [`NudgedText`]; `None` if they have no words."""
    own = [answer for answer in answers if isinstance(answer, NudgedText)]
    return share_of(sum(answer.nudged for answer in own), sum(answer.words for answer in own))


def _with_nudge_rates(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """The harness's `evaluate`, which for a nudged model also says how much of each answer was nudged."""

    @functools.wraps(evaluate)
    def evaluated(lm: Any, *args: Any, log_samples: bool = True, **kwargs: Any) -> Any:
        is_nudged = isinstance(getattr(lm, "lm", lm), NudgingLM)  # With --use_cache, the harness wraps the model.
        found = evaluate(lm, *args, log_samples=log_samples or is_nudged, **kwargs)
        if is_nudged and found is not None:  # Other ranks than the first find nothing.
            for task, samples in found["samples"].items():
                answers = [[answer for each in sample["resps"] for answer in each] for sample in samples]
                for sample, own in zip(samples, answers, strict=True):
                    sample["nudge_rate"] = nudge_rate_of(own)
                if (rate := nudge_rate_of(answer for own in answers for answer in own)) is not None:
                    found["results"][task]["nudge_rate,none"] = rate
            if not log_samples:
                del found["samples"]
        return found

    setattr(evaluated, _GIVES_RATES, True)
    return evaluated


class NudgingLM(HFLM):
    """A nudged base model. It generates, and does not score texts.

    Without `--apply_chat_template` the base is given the harness's prompt as it is, and the nudging model is given the
    same text as one user turn of its own chat template. With it, the nudging model is given the messages, including
    the system message, and the base is given the text that `base_template` makes of them. Line breaks at the end of a
    message are removed, and control tokens that a message spells out are text. In the harness's own prompt, which it
    hands over without saying what a user wrote, they are control tokens of the base.

    Args:
        pretrained (`str` or `PreTrainedModel`):
            The base.
        nudging_model (`str` or `PreTrainedModel`, *optional*):
            The small aligned model; a name is loaded to the base's device and in its dtype. If it is left out, the
            base's generation config names the model.
        nudging_tokenizer (`str` or tokenizer, *optional*):
            The nudging model's tokenizer. If it is left out, it is loaded from where the nudging model came from.
        base_template (`str`, defaults to `"{system}\\n{user}\\n"`):
            How messages become the base's text: see [`plain_prompt`]. The two characters `\\n` mean a line break.
        kwargs:
            The fields of [`NudgingConfig`], and everything that `HFLM` takes (`dtype`, `device`, `batch_size`,
            `tokenizer`, `chat_template_args`, ...). A task's generation arguments and `--gen_kwargs` may set fields
            too.

    Raises:
        ValueError: if there is no nudging model, if it cannot be loaded, or if a field or the template is invalid.
    """

    def __init__(
        self,
        pretrained: Any,
        nudging_model: Any = None,
        nudging_tokenizer: Any = None,
        base_template: str = BASE_TEMPLATE,
        **kwargs: Any,
    ):
        given = {name: kwargs.pop(name) for name in NudgingConfig.field_names() if name in kwargs}
        NudgingConfig.resolve([given])  # This refuses an invalid value before the base is loaded.
        self.base_template = base_template.replace("\\n", "\n")
        turn_template(self.base_template)
        _refuse_misspelt(kwargs)
        self._given = {name: str(value) for name, value in sorted(kwargs.items())}
        super().__init__(pretrained, **kwargs)
        if isinstance(self.think_end_token, int):
            raise ValueError(
                f"`think_end_token={self.think_end_token}` is an id, and control tokens of the nudging model do not "
                "cross to the base: give the text that ends the thinking."
            )
        named = nudging_model or nudging_model_named_in(self.model)
        if named is None:
            raise ValueError("There is no nudging model: name one by `--model_args nudging_model=...`.")
        if isinstance(nudging_tokenizer, str):
            nudging_tokenizer = AutoTokenizer.from_pretrained(nudging_tokenizer)
        self.pair = Pair.of(self.model, named, self.tokenizer, nudging_tokenizer)
        self.nudging_config = self.pair.nudging_config(given)
        self._words: Counter[str] = Counter()
        self._finish_reasons: Counter[str] = Counter()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Takes the file of `--use_cache`, whose answers the harness finds by question and not by model.

        Raises:
            ValueError: if another model, or this one with other settings, wrote the answers in the file.
        """
        kept, own = cache_hook.dbdict, self._settings()
        stored = kept.get(_CACHE_OWNER, {} if len(kept) else own)
        differing = [name for name, value in own.items() if stored.get(name) != value]
        if changed := [f"{name}={stored.get(name)!r} (now {own[name]!r})" for name in differing]:
            path = kept.filename
            kept.close()
            raise ValueError(
                f"--use_cache: the answers in {path} were written with {', '.join(changed)}: give each setting a file "
                "of its own."
            )
        kept[_CACHE_OWNER] = own
        super().set_cache_hook(cache_hook)

    def _settings(self) -> dict[str, Any]:
        """Everything on which an answer depends, except what each request says."""
        return {
            "pretrained": self.model.name_or_path,
            "nudging_model": self.pair.nudging_model.name_or_path,
            "dtype": str(self.model.dtype),
            "base_template": self.base_template,
            **self._given,
            **asdict(self.nudging_config),
        }

    # Prompts --------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON. Each model's own prompt is made of them later.

        Raises:
            ValueError: if the task begins the answer itself.
        """
        if not add_generation_prompt:
            raise ValueError(
                "The task begins the answer itself (`gen_prefix`), which is not possible with two chat prompts: "
                "leave out --apply_chat_template."
            )
        return Conversation(json.dumps(chat_history, ensure_ascii=False))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The nudging model's chat template, which the harness records."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"--apply_chat_template takes no name here, got {chat_template!r}: leave out the name, and the "
                "nudging model's own template is used."
            )
        return self.pair.nudging_tokenizer.get_chat_template() if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests. They hold messages, which suit every tokenizer."""
        return NAME

    def _inputs(self, contexts: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
        """The prompts of both models."""
        room = self.max_length - max_new_tokens  # How many tokens the base's prompt may have.
        if room <= 0:
            raise ValueError(
                f"The base reads at most {self.max_length} tokens, and the answer alone may have "
                f"{max_new_tokens}: lower `max_gen_toks`, or raise `max_length`."
            )
        chats, rows = [], []
        for context in contexts:
            if isinstance(context, Conversation):
                chat = [{**each, "content": each["content"].rstrip("\n")} for each in json.loads(context)]
                ids = plain_ids(self.tokenizer, chat, self.base_template, self.add_bos_token is not False)
                if len(ids) > room:
                    logger.warning("A prompt of %d tokens is cut to its last %d.", len(ids), room)
                rows.append(ids[-room:])
            else:  # It is the harness's own text, and its control tokens are meant.
                chat = [{"role": "user", "content": context.rstrip("\n")}]
                ids, _ = self.tok_batch_encode([context], left_truncate_len=room, truncation=self.truncation)
                rows += ids.tolist()
            chats.append(chat)
        inputs = dict(self.pair.inputs(chats, self.base_template, self.chat_template_args))
        # These obey `add_bos_token`, `truncation` and `max_length`.
        inputs["input_ids"], inputs["attention_mask"] = padded(rows, self.tokenizer)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    # Answers --------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The nudged answers, each cut before its first stop string."""
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),  # The longest come first, as in HFLM.
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        batch_size = self._detect_batch_size() if self.batch_size == "auto" else self.batch_size
        hidden = disable_tqdm or self.rank != 0
        answers = []
        with tqdm(total=len(requests), disable=hidden, desc="Running nudged generate_until requests") as bar:
            for chunk in collator.get_batched(n=batch_size):
                contexts, all_gen_kwargs = zip(*chunk, strict=True)
                for context, answer in zip(contexts, self._answers(contexts, all_gen_kwargs[0]), strict=True):
                    answers.append(answer)
                    self.cache_hook.add_partial("generate_until", (context, all_gen_kwargs[0]), answer)
                    bar.update(1)
        return collator.get_original(answers)

    def _answers(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        """The answers of one batch."""
        decoding: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until = [text for text in handle_stop_sequences(decoding.pop("until", None), eos=None) if text]
        max_new_tokens = decoding.pop("max_gen_toks")
        if not decoding.get("do_sample"):
            decoding["do_sample"] = False
            decoding.pop("temperature", None)
        mixed = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=mixed, enabled=mixed is not None):
            output = self.pair.generate(
                self._inputs(contexts, max_new_tokens),
                nudging_config=self.nudging_config,
                max_new_tokens=max_new_tokens,
                stop_strings=until or None,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **decoding,
            )
        self._finish_reasons.update(output.finish_reasons)
        # The end mark is not part of the text. If a model spells it out, the harness ends the answer there.
        stop = [*until, self.tokenizer.eos_token]
        answers: list[str] = []
        for pieces in pieces_of(output, self.tokenizer):
            nudged, words = count_nudged_words(pieces, self.nudging_config.word_boundary)
            self._words.update(nudged=nudged, all=words)
            text = postprocess_generated_text(text_of(pieces), stop, self.think_end_token)
            answers.append(NudgedText.of(text, nudged, words))
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model: HFLM's entries, the nudging model, the config, and figures.

        `nudge_rate` is the share of words that the nudging model wrote, in the answers that this process decoded
        itself and did not take from `--use_cache`. It is `None` if there are none.
        """
        return {
            **super().get_model_info(),
            "nudging_model": self.pair.nudging_model.name_or_path,
            "nudging_model_num_parameters": self.pair.nudging_model.num_parameters(),
            "base_template": self.base_template,
            **asdict(self.nudging_config),
            "nudge_rate": share_of(self._words["nudged"], self._words["all"]),
            "finish_reasons": dict(self._finish_reasons),
        }

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Raises a `ValueError`: a nudged model has no probabilities."""
        raise ValueError(
            "The task scores given texts, and a nudged model has no probabilities: which model writes a word depends "
            "on the words before it, so the scores would be those of the base alone. Choose a task that generates, "
            "such as gsm8k, or `--model hf` to score the base alone."
        )

    loglikelihood_rolling = loglikelihood


def _refuse_misspelt(given: Mapping[str, Any]) -> None:
    """Refuses a model argument that the harness does not know and that looks like one that is known here.

    The harness hands all others on to `from_pretrained`, which ignores some names and fails on others.
    """
    own = {*NudgingConfig.field_names(), *inspect.signature(NudgingLM.__init__).parameters} - {"self", "kwargs"}
    harness = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    for name in given.keys() - harness:
        if meant := get_close_matches(name, own | harness, n=1, cutoff=0.8):
            raise ValueError(f"--model_args: there is no argument {name!r}, did you mean {meant[0]!r}?")
        if name.startswith("nudg"):
            raise ValueError(f"--model_args: there is no argument {name!r}; nudging has {', '.join(sorted(own))}.")
