"""Nudging as a model provider of inspect-ai (0.3.285). It knows messages and settings, never tasks or scores."""

from __future__ import annotations

from typing import Any

import torch

try:
    import anyio.to_thread
    from inspect_ai import model as inspect
    from inspect_ai.model import ChatMessage, GenerateConfig
except ImportError as error:
    raise ImportError("This needs inspect-ai: pip install 'nudging-hf[inspect-ai]'.") from error

from ..chats import DEFAULT_TEMPLATE, turn_template
from ..core.config import NudgingConfig
from ..pair import Pair, load_model, nudging_model_named_in
from ..provenance import count_nudged_words, pieces_of, text_of

# The limit holds for all models together, because they share torch's random numbers, which a seed sets.
_ONE_AT_A_TIME = anyio.CapacityLimiter(1)
_STOP_REASONS: dict[str, Any] = {"eos": "stop", "stop_string": "stop", "length": "max_tokens"}
_REFUSED = "logprobs top_logprobs prompt_logprobs best_of frequency_penalty presence_penalty".split()
_REFUSED += ["logit_bias", "response_schema"]


@inspect.modelapi(name="nudging_hf")
class NudgingAPI(inspect.ModelAPI):
    """A nudged base: `--model nudging_hf/BASE -M nudging_model=SMALL`. Usage counts the base's tokens.

    `-M` takes `nudging_model` (if it is left out, the one that the base's generation config names), the fields of
    [`NudgingConfig`], `base_template` and `chat_template_kwargs` as [`chat_inputs`] does, and what `from_pretrained`
    takes for the base. Answers are greedy unless a temperature above 0, `top_p` or `top_k` is set.
    """

    def __init__(self, model_name: str, base_url: Any = None, api_key: Any = None, config: Any = None, **args: Any):
        super().__init__(model_name, base_url, api_key, config=config or GenerateConfig())
        self.parameters = {name: args.pop(name) for name in NudgingConfig.field_names() if name in args}
        NudgingConfig(**self.parameters)  # A bad value is refused now, not after the base is loaded.
        template = args.pop("base_template", DEFAULT_TEMPLATE).replace("\\n", "\n")
        turn_template(template)
        self.prompting = {"base_template": template, "chat_template_kwargs": args.pop("chat_template_kwargs", None)}
        named = args.pop("nudging_model", None)
        base, tokenizer = load_model(model_name, "The base", **{"device_map": "auto", **args})
        named = named or nudging_model_named_in(base)
        if named is None:
            raise ValueError("There is no nudging model: name one by `-M nudging_model=...`.")
        self.pair = Pair.of(base, named, tokenizer)

    def max_tokens(self) -> int:
        return 512

    def collapse_user_messages(self) -> bool:  # Messages of user and assistant must alternate.
        return True

    collapse_assistant_messages = collapse_system_messages = collapse_user_messages

    async def generate(self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig) -> Any:
        """One answer, or `num_choices` of them, in a thread. A `ValueError` says what cannot be done."""
        if tools:
            raise ValueError(f"Nudging calls no tools, got {[tool.name for tool in tools]}: take a task without any.")
        if refused := [name for name in _REFUSED if getattr(config, name)]:
            raise ValueError(f"Nudging has no {', '.join(f'`{name}`' for name in refused)}: leave it out.")
        return await anyio.to_thread.run_sync(self._answer, input, config, limiter=_ONE_AT_A_TIME)

    def _answer(self, messages: list[ChatMessage], config: GenerateConfig) -> inspect.ModelOutput:
        drawing = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k")}
        drawing = {name: value for name, value in drawing.items() if value is not None and config.temperature != 0}
        rows, stops = config.num_choices or 1, [text for text in config.stop_seqs or [] if text]
        if rows > 1 and not drawing:
            raise ValueError(f"`num_choices={rows}` needs a temperature above 0: else all answers are the same.")
        if config.seed is not None:
            torch.manual_seed(config.seed)
        chat = [message.model_dump(include={"role", "content"}) for message in messages]
        inputs = self.pair.inputs(chat, **self.prompting)
        output = self.pair.generate(
            inputs,
            do_sample=bool(drawing),
            num_return_sequences=rows,
            max_new_tokens=config.max_tokens,
            stop_strings=stops or None,
            nudging_config=self.parameters,
            return_dict_in_generate=True,
            **drawing,
        )
        choices, nudged, words = [], 0, 0
        word_boundary = self.pair.nudging_config(self.parameters).word_boundary
        for pieces, reason in zip(pieces_of(output, self.pair.tokenizer), output.finish_reasons, strict=True):
            counted = count_nudged_words(pieces, word_boundary)
            nudged, words = nudged + counted[0], words + counted[1]
            text = text_of(pieces)
            for stop in stops:
                text = text.split(stop)[0]
            said = inspect.ChatMessageAssistant(content=text, model=self.model_name, source="generate")
            stop_reason = _STOP_REASONS.get(reason, "unknown")
            choices.append(inspect.ChatCompletionChoice(message=said, stop_reason=stop_reason))
        read, written = inputs["input_ids"].numel(), int((~output.base_top1_probs.isnan()).sum())
        usage = inspect.ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        told = {"nudge_rate": nudged / words if words else None, "finish_reasons": output.finish_reasons}
        return inspect.ModelOutput(model=self.model_name, choices=choices, usage=usage, metadata=told)
