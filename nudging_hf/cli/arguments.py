"""What several commands take alike: models, prompts, knobs, colours, numbers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..chats import chat_inputs
from ..core.config import ADAPTIVE, AUTO, DEFAULT_THRESHOLDS, NudgingConfig


def first_line(error: BaseException) -> str:
    """What an error says first: the messages of transformers go on for lines."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _integer(text, least=1)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def drafts(text: str) -> int | str:
    """A whole number of at least 0, or `adaptive`."""
    return text if text == ADAPTIVE else count(text)


def threshold_or_auto(text: str) -> float | str:
    """A number, or `auto`."""
    try:
        return text if text == AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number such as 0.4, or {AUTO}, got {text!r}") from None


def add_color(parser: Any) -> None:
    """Adds `--color`."""
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="default: %(default)s, which is in a terminal, unless NO_COLOR is set",
    )


def add_threshold(parser: Any) -> None:
    """Adds `--threshold` of the paper's gate, a number."""
    parser.add_argument(
        "--threshold",
        type=float,
        default=NudgingConfig().nudge_threshold,
        metavar="P",
        help="the base is unsure where its most probable token has less than this probability (default: %(default)s)",
    )


def add_gate(parser: Any) -> None:
    """Adds all that says when the base is unsure, as `NudgingConfig` names it; what is left out is `None`."""
    parser.add_argument(
        "--threshold",
        type=threshold_or_auto,
        metavar="T",
        dest="nudge_threshold",
        help="what the gate compares with: for top1, the base is unsure where its most probable token has less than "
        'this probability. "auto" finds one on the way (default: what is stored with the base, or else '
        + ", ".join(f"{value:g} for {gate}" for gate, value in DEFAULT_THRESHOLDS.items())
        + ")",
    )
    parser.add_argument(
        "--gate",
        choices=tuple(DEFAULT_THRESHOLDS),
        dest="nudge_gate",
        help=f"by what it is told whether the base is unsure (default: {NudgingConfig.nudge_gate})",
    )
    parser.add_argument(
        "--target-nudge-rate",
        type=float,
        metavar="R",
        help=f"the share of words that --threshold auto aims at (default: {NudgingConfig.target_nudge_rate})",
    )


# Models -------------------------------------------------------------------------------------------------------------


def add_models(parser: argparse.ArgumentParser, required: bool = True) -> Any:
    """Adds what `load_pair` goes by, and returns the group, for more; `required` says whether both must be named."""
    models = parser.add_argument_group("models")
    name: dict[str, Any] = {"required": required, "metavar": "NAME"}
    models.add_argument("--base", **name, help="the large base model: a folder, or a name on the Hugging Face Hub")
    models.add_argument("--nudging-model", **name, help="the small aligned model, likewise")
    models.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights of both (default: %(default)s, as they were saved)",
    )
    models.add_argument("--device", help="where both run, such as cpu or cuda:0 (default: cpu)")
    models.add_argument("--device-map", metavar="MAP", help='such as "auto", instead of --device; needs accelerate')
    return models


@dataclass(frozen=True)
class LoadedPair:
    """Two models in their places, and their tokenizers."""

    base: Any
    tokenizer: Any
    nudging_model: Any
    nudging_tokenizer: Any

    def inputs(self, messages: list[dict[str, Any]], base_template: str) -> dict[str, Any]:
        """What `generate` is to be told of the models and of a chat."""
        prompts = chat_inputs(messages, self.tokenizer, self.nudging_tokenizer, base_template)
        return {
            **prompts.to(self.base.device),
            "tokenizer": self.tokenizer,
            "nudging_model": self.nudging_model,
            "nudging_tokenizer": self.nudging_tokenizer,
        }

    def nudging_config(self, knobs: Mapping[str, Any]) -> NudgingConfig:
        """The knobs that were given, and of all others those that are stored with the base."""
        return NudgingConfig.resolve([knobs, self.base.generation_config.to_dict()])


def load_pair(args: argparse.Namespace, progress: bool) -> LoadedPair:
    """The models that `--base` and `--nudging-model` name.

    Raises:
        ValueError: where one cannot be loaded or put in its place, naming the option.
    """
    if args.device is not None and args.device_map is not None:
        raise ValueError("--device and --device-map both say where the models run: give one of them.")
    with loading_bars(progress):
        base = load_model("--base", args.base, args)
        nudging = load_model("--nudging-model", args.nudging_model, args)
    return LoadedPair(*base, *nudging)


def load_model(option: str, name: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """A model in its place, and its tokenizer.

    Raises:
        ValueError: where it cannot be loaded or put in its place, naming `option`.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"{option}: there is no folder {name}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=args.device_map)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: cannot load {name}: {first_line(error)}") from error
    if args.device is not None:
        try:
            model = model.to(args.device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA.
            raise ValueError(f"--device {args.device}: {first_line(error)}") from error
    return model, tokenizer


@contextmanager
def loading_bars(shown: bool) -> Iterator[None]:
    """Lets transformers show how loading goes, or not."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


# Prompts and knobs --------------------------------------------------------------------------------------------------


def add_prompts(parser: argparse.ArgumentParser, base_template: str) -> None:
    """Adds `--system` and `--base-template`, which is `base_template` where it is left out."""
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--system",
        metavar="TEXT",
        help="the system message of the nudging model; the base sees it where --base-template has {system}",
    )
    add_base_template(prompts, base_template)


def add_base_template(parser: Any, base_template: str) -> None:
    """Adds `--base-template`, which is `base_template` where it is left out."""
    parser.add_argument(
        "--base-template",
        type=lambda text: text.replace("\\n", "\n"),
        metavar="TEXT",
        default=base_template,
        help="the base's prompt, with the fields {user} and {system}; \\n is a line break (default: "
        + base_template.replace("\n", "\\n").replace("%", "%%")
        + ")",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Adds what `decoding_of` goes by."""
    nudging = parser.add_argument_group("nudging")
    add_gate(nudging)
    nudging.add_argument(
        "--num-draft-tokens",
        type=drafts,
        metavar="N",
        help="how many tokens of the nudging model the base checks at once, which changes the speed and never the "
        f"answer (default: {NudgingConfig.num_draft_tokens})",
    )
    nudging.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default: %(default)s")
    nudging.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most probable ones")
    nudging.add_argument("--temperature", type=float, metavar="T", help="of the base, with --sample")
    nudging.add_argument("--seed", type=int, metavar="N", help="of what is drawn, with --sample")


def knobs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The knobs of [`NudgingConfig`] that were given."""
    given = {name: getattr(args, name, None) for name in NudgingConfig.field_names()}
    return {name: value for name, value in given.items() if value is not None}


def decoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `generate` is to be told of the way that it decodes. Seeds torch where `--seed` is given.

    Raises:
        ValueError: for values out of range, and for a temperature where nothing is drawn.
    """
    if args.temperature is not None and not args.sample:
        raise ValueError("--temperature needs --sample: the most probable token has no temperature.")
    if args.seed is not None:
        transformers.set_seed(args.seed)
    knobs = knobs_of(args)
    NudgingConfig(**knobs)  # Refused now, not after the models have been loaded.
    return {
        "nudging_config": knobs,
        "max_new_tokens": args.max_new_tokens,
        "do_sample": args.sample,
        **({} if args.temperature is None else {"temperature": args.temperature}),
    }
