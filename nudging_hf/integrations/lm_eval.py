"""Nudging as a model of lm-evaluation-harness (0.4.13). It knows the harness's requests, never tasks or scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import (
        Collator,
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError as error:
    raise ImportError("This needs lm-evaluation-harness: pip install 'nudging-hf[lm-eval]'.") from error

from ..chats import chat_inputs, plain_prompt, turn_template
from ..core.config import NudgingConfig
from ..core.generate import generate, loaded_vocabulary
from ..core.named_model import named_nudging_model
from ..provenance import count_nudged_words, pieces_of

NAME = "nudging_hf"
# The paper's prompt, whose "Question: " or "Instruction: " a task writes itself.
BASE_TEMPLATE = "{system}\n{user}\n"


def register() -> None:
    """Makes `--model nudging_hf` known to the harness of this process. Registering twice is registering once."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=NudgingLM)


class Conversation(str):
    """Messages on their way through the harness, which hands a prompt about as one string: their JSON."""


class NudgingLM(HFLM):
    """A base model, nudged. It generates; it scores nothing.

    Without `--apply_chat_template` the base is given the harness's prompt as it is, and the nudging model the same
    text as one user turn of its own chat template. With it the nudging model is given the messages, system message
    included, and the base their text by `base_template`. Line breaks at the end of a message are left out.

    Args:
        pretrained (`str` or `PreTrainedModel`):
            The base.
        nudging_model (`str` or `PreTrainedModel`, *optional*):
            The small aligned model; a name is loaded to the base's device and in its dtype. Left out, the one that
            the base's generation config names.
        nudging_tokenizer (`str` or tokenizer, *optional*):
            Left out, it is loaded from where the nudging model came from.
        base_template (`str`, defaults to `"{system}\\n{user}\\n"`):
            How messages become the base's text: see [`plain_prompt`]. The two characters `\\n` are a line break.
        kwargs:
            The knobs of [`NudgingConfig`], and all that `HFLM` takes (`dtype`, `device`, `batch_size`, `tokenizer`,
            `chat_template_args`, ...). A task's generation arguments and `--gen_kwargs` may set knobs too.

    Raises:
        ValueError: where there is no nudging model, it cannot be loaded, or a knob or the template is out of range.
    """

    def __init__(
        self,
        pretrained: Any,
        nudging_model: Any = None,
        nudging_tokenizer: Any = None,
        base_template: str = BASE_TEMPLATE,
        **kwargs: Any,
    ):
        knobs = {name: kwargs.pop(name) for name in NudgingConfig.field_names() if name in kwargs}
        NudgingConfig.resolve([knobs])  # Refused now, not after the base is loaded.
        self.base_template = base_template.replace("\\n", "\n")
        turn_template(self.base_template)
        super().__init__(pretrained, **kwargs)
        if isinstance(self.think_end_token, int):
            raise ValueError(
                f"`think_end_token={self.think_end_token}` is an id, and control tokens of the nudging model do not "
                "cross to the base: give the text that ends the thinking."
            )
        of_base = self.model.generation_config.to_dict()
        self.nudging_config = NudgingConfig.resolve([knobs, of_base])
        named = nudging_model or of_base.get("nudging_model_name_or_path")
        if named is None:
            raise ValueError("There is no nudging model: name one by `--model_args nudging_model=...`.")
        if isinstance(nudging_tokenizer, str):
            nudging_tokenizer = AutoTokenizer.from_pretrained(nudging_tokenizer)
        if isinstance(named, str):
            self.nudging_model, own_tokenizer = named_nudging_model(self.model, named, {})
            self.nudging_tokenizer = nudging_tokenizer or own_tokenizer
        else:
            self.nudging_model = named
            vocabulary = loaded_vocabulary(nudging_tokenizer, named, "nudging_tokenizer", "nudging model")
            self.nudging_tokenizer = vocabulary.tokenizer
        self._words: Counter[str] = Counter()
        self._finish_reasons: Counter[str] = Counter()

    # Prompts --------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages themselves: each model is given them in its own way, later.

        Raises:
            ValueError: where the task begins the answer itself.
        """
        if not add_generation_prompt:
            raise ValueError(
                "The task begins the answer itself (`gen_prefix`), which two chat prompts cannot: leave out "
                "--apply_chat_template."
            )
        return Conversation(json.dumps(chat_history, ensure_ascii=False))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The nudging model's chat template, for the record."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"--apply_chat_template takes no name here, got {chat_template!r}: the nudging model's own is used."
            )
        return self.nudging_tokenizer.get_chat_template() if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are kept under: with messages, they are the same for every tokenizer."""
        return NAME

    def _inputs(self, contexts: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
        """The prompts of both models."""
        chats, texts = [], []
        for context in contexts:
            if isinstance(context, Conversation):
                chat = [{**each, "content": each["content"].rstrip("\n")} for each in json.loads(context)]
                texts.append(plain_prompt(chat, self.base_template))
            else:
                chat = [{"role": "user", "content": context.rstrip("\n")}]
                texts.append(context)
            chats.append(chat)
        inputs = dict(
            chat_inputs(chats, self.tokenizer, self.nudging_tokenizer, self.base_template, self.chat_template_args)
        )
        # The base's prompts as HFLM makes them: `add_bos_token`, `truncation` and `max_length` hold.
        inputs["input_ids"], inputs["attention_mask"] = self.tok_batch_encode(
            texts, left_truncate_len=self._prompt_length(max_new_tokens), truncation=self.truncation
        )
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _prompt_length(self, max_new_tokens: int) -> int:
        """How long the base's prompt may be, in tokens."""
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise ValueError(
                f"The base reads {self.max_length} tokens at the most, and the answer alone may have "
                f"{max_new_tokens}: lower `max_gen_toks`, or raise `max_length`."
            )
        return room

    # Answers --------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The nudged answers, each cut before the first of its stop strings."""
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),  # The longest first, as HFLM does.
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
            output: Any = generate(
                self.model,
                **self._inputs(contexts, max_new_tokens),
                tokenizer=self.tokenizer,
                nudging_model=self.nudging_model,
                nudging_tokenizer=self.nudging_tokenizer,
                nudging_config=self.nudging_config,
                max_new_tokens=max_new_tokens,
                stop_strings=until or None,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **decoding,
            )
        self._finish_reasons.update(output.finish_reasons)
        # The end mark is no part of the text; written out, it ends an answer as the harness has it.
        stop = [*until, self.tokenizer.eos_token]
        answers = []
        for pieces in pieces_of(output, self.tokenizer):
            nudged, words = count_nudged_words(pieces)
            self._words.update(nudged=nudged, all=words)
            text = "".join(piece.text for piece in pieces)
            answers.append(postprocess_generated_text(text, stop, self.think_end_token))
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model: HFLM's, the nudging model, every knob, and how much it nudged.

        `nudge_rate` is the share of words that the nudging model wrote, of the answers that this process wrote itself:
        those that came from `--use_cache` are not among them. `None` where there are none.
        """
        words = self._words["all"]
        return {
            **super().get_model_info(),
            "nudging_model": self.nudging_model.name_or_path,
            "nudging_model_num_parameters": self.nudging_model.num_parameters(),
            "base_template": self.base_template,
            **asdict(self.nudging_config),
            "nudge_rate": self._words["nudged"] / words if words else None,
            "finish_reasons": dict(self._finish_reasons),
        }

    # What there is none of ------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Raises a `ValueError`: a nudged model has no probabilities."""
        raise ValueError(
            "The task scores given texts, and nudging gives no probabilities: which model writes a word depends on "
            "those before it, and the base alone would be scored. Take a task that generates, such as gsm8k, or "
            "`--model hf` for the base alone."
        )

    loglikelihood_rolling = loglikelihood
