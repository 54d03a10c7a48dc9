"""Makes a nudged base a model of lm-evaluation-harness (0.4.13). It knows requests, never tasks or scores."""

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
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError("This needs lm-evaluation-harness: pip install 'nudging-hf[lm-eval]'.") from error

from ..chats import plain_prompt, turn_template
from ..core.config import NudgingConfig
from ..pair import Pair, nudging_model_named_in
from ..provenance import count_nudged_words, pieces_of, text_of

NAME = "nudging_hf"
# The paper's prompt. Each task writes its own "Question: " or "Instruction: ".
BASE_TEMPLATE = "{system}\n{user}\n"


def register() -> None:
    """Registers `--model nudging_hf` with the harness in this process. A second call does nothing."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=NudgingLM)


class Conversation(str):
    """Messages as JSON, because the harness passes a prompt around as one string."""


class NudgingLM(HFLM):
    """A nudged base model. It generates, and does not score texts.

    Without `--apply_chat_template` the base is given the harness's prompt as it is, and the nudging model is given the
    same text as one user turn of its own chat template. With it, the nudging model is given the messages, including
    the system message, and the base is given the text that `base_template` makes of them. Line breaks at the end of a
    message are removed.

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
        chats, texts = [], []
        for context in contexts:
            if isinstance(context, Conversation):
                chat = [{**each, "content": each["content"].rstrip("\n")} for each in json.loads(context)]
                texts.append(plain_prompt(chat, self.base_template))
            else:
                chat = [{"role": "user", "content": context.rstrip("\n")}]
                texts.append(context)
            chats.append(chat)
        inputs = dict(self.pair.inputs(chats, self.base_template, self.chat_template_args))
        # HFLM encodes the base's prompts, so that `add_bos_token`, `truncation` and `max_length` apply.
        inputs["input_ids"], inputs["attention_mask"] = self.tok_batch_encode(
            texts, left_truncate_len=room, truncation=self.truncation
        )
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
        answers = []
        for pieces in pieces_of(output, self.tokenizer):
            nudged, words = count_nudged_words(pieces)
            self._words.update(nudged=nudged, all=words)
            answers.append(postprocess_generated_text(text_of(pieces), stop, self.think_end_token))
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model: HFLM's entries, the nudging model, the config, and figures.

        `nudge_rate` is the share of words that the nudging model wrote, in the answers that this process decoded
        itself and did not take from `--use_cache`. It is `None` if there are none.
        """
        words = self._words["all"]
        return {
            **super().get_model_info(),
            "nudging_model": self.pair.nudging_model.name_or_path,
            "nudging_model_num_parameters": self.pair.nudging_model.num_parameters(),
            "base_template": self.base_template,
            **asdict(self.nudging_config),
            "nudge_rate": self._words["nudged"] / words if words else None,
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
