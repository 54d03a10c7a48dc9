"""Arguments that several commands have: models, prompts, parameters of nudging, colours, numbers.

Like the modules of the commands, it imports torch and transformers only inside functions, so that help is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chats import DEFAULT_TEMPLATE
from ..core.config import ADAPTIVE, AUTO, DEFAULT_THRESHOLDS, WORD_BOUNDARIES, NudgingConfig
from ..terminal import CLOSING, OPENING
from .streams import say

if TYPE_CHECKING:
    from ..pair import Pair


def command_parser(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], **options: Any
) -> argparse.ArgumentParser:
    """Adds a command, which is described by the docstring of the function that runs it, and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, description=run.__doc__, **options)
    parser.set_defaults(run=run)
    return parser


def first_line(error: BaseException) -> str:
    """The first line of an error's message, because those of transformers have many."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def count(text: str, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


positive = partial(count, least=1)


def drafts(text: str) -> int | str:
    """A whole number of at least 0, or `adaptive`."""
    return text if text == ADAPTIVE else count(text)


def threshold_or_auto(text: str) -> float | str:
    """A number, or `auto`."""
    try:
        return text if text == AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number such as 0.4, or {AUTO}, got {text!r}") from None


def add_number(parser: Any, option: str, default: int, what: str, least: int = 1) -> None:
    """Adds an option for a whole number."""
    kind = partial(count, least=least)
    parser.add_argument(option, type=kind, default=default, metavar="N", help=f"{what} (default: %(default)s)")


def add_color(parser: Any) -> None:
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="default: %(default)s, which means only in a terminal, and not if NO_COLOR is set",
    )


def add_output(parser: argparse.ArgumentParser) -> Any:
    """Adds the options that say how answers are shown, and returns their group."""
    output = parser.add_argument_group("output")
    add_color(output)
    output.add_argument(
        "--marks",
        action=argparse.BooleanOptionalAction,
        help=f"put the nudged words in {OPENING} {CLOSING} (default: only in a terminal without colour)",
    )
    output.add_argument("--quiet", action="store_true", help="no line of figures")
    return output


def add_threshold(parser: Any) -> None:
    parser.add_argument(
        "--threshold",
        type=float,
        default=NudgingConfig().nudge_threshold,
        metavar="P",
        help="the base is unsure where its most probable token has less than this probability (default: %(default)s)",
    )


def add_gate(parser: Any) -> None:
    """Adds the options that say when the base is unsure, and at which words it is asked.

    They have the names of [`NudgingConfig`], and the default `None`.
    """
    parser.add_argument(
        "--threshold",
        type=threshold_or_auto,
        metavar="T",
        dest="nudge_threshold",
        help="what the gate compares with: for top1, the base is unsure where its most probable token has less than "
        'this probability. "auto" finds one while it decodes (default: what is stored with the base, or else '
        + ", ".join(f"{value:g} for {gate}" for gate, value in DEFAULT_THRESHOLDS.items())
        + ")",
    )
    parser.add_argument(
        "--gate",
        choices=tuple(DEFAULT_THRESHOLDS),
        dest="nudge_gate",
        help=f"the measure that tells whether the base is unsure (default: {NudgingConfig.nudge_gate})",
    )
    parser.add_argument(
        "--target-nudge-rate",
        type=float,
        metavar="R",
        help=f"the share of words that --threshold auto aims at (default: {NudgingConfig.target_nudge_rate})",
    )
    add_word_boundary(parser)


def add_word_boundary(parser: Any) -> None:
    parser.add_argument(
        "--word-boundary",
        choices=WORD_BOUNDARIES,
        help='where a nudging word begins: at a space, or for languages without spaces also where "unicode" (UAX #29) '
        f"says so (default: what is stored with the base, or else {NudgingConfig.word_boundary})",
    )


PROMPT_FILE = (
    'JSON lines, a JSON array, CSV or TSV with the fields "messages", "conversations", "question", "instruction" (and '
    '"input") or "prompt", and "answer", "target" or "output" if the right answer is known; or plain text with a '
    'prompt in each line. "pattern" is a regular expression with one group, whose last match is what a text answers. '
    'Beside "messages", "prompt" is what the base is given, if --base-template is not to make it of them'
)

# Models -------------------------------------------------------------------------------------------------------------


def add_models(parser: argparse.ArgumentParser, required: bool = True) -> Any:
    """Adds the arguments of `load_pair` and returns their group. `required` says whether the models must be named."""
    models = parser.add_argument_group("models")
    name: dict[str, Any] = {"required": required, "metavar": "NAME"}
    models.add_argument("--base", **name, help="the large base model: a folder, or a name on the Hugging Face Hub")
    models.add_argument("--nudging-model", **name, help="the small aligned model, likewise")
    models.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="the dtype of the weights of both (default: %(default)s, as they were saved)",
    )
    models.add_argument(
        "--device",
        help="where both run, such as cpu, cuda:0, xpu or mps (default: an accelerator that torch finds, or else cpu)",
    )
    models.add_argument("--device-map", metavar="MAP", help='such as "auto", instead of --device; needs accelerate')
    return models


def load_pair(args: argparse.Namespace) -> Pair:
    """The models that `--base` and `--nudging-model` name: see [`load_named`]."""
    from ..pair import Pair, is_folder

    is_folder(args.nudging_model, "--nudging-model")  # A missing one is refused now, not after the base is loaded.
    return Pair(*load_named(args, "base"), *load_named(args, "nudging_model"))


def load_reader(args: argparse.Namespace, name: str, chat: bool = True) -> Any:
    """The [`Reader`] of the model that an option names, such as "large_aligned"; `None` if it was not given."""
    if getattr(args, name) is None:
        return None
    from ..study.reader import Reader

    return Reader(*load_named(args, name), chat, args.base_template)


def load_named(args: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """The model that an option names, such as "nudging_model", and its tokenizer.

    Raises:
        ValueError: if it cannot be loaded or moved to its device, naming the option.
    """
    from ..pair import load_model

    if args.device is not None and args.device_map is not None:
        raise ValueError("--device and --device-map both say where the models run: give one of them.")
    quiet = getattr(args, "quiet", False)
    with loading_bars(sys.stderr.isatty() and not quiet):
        option = "--" + name.replace("_", "-")
        model, tokenizer = load_model(getattr(args, name), option, dtype=args.dtype, device_map=args.device_map)
    if args.device is None and args.device_map is None:
        args.device = automatic_device()
        if not quiet:
            say(f"nudging-hf: running on {args.device}; --device chooses another")
    if args.device is not None:
        try:
            model = model.to(args.device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA.
            raise ValueError(f"--device {args.device}: {first_line(error)}") from error
    return model, tokenizer


def automatic_device() -> str:
    """The first accelerator that torch finds, or else the CPU."""
    import torch

    accelerators = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return next((name for name, backend in accelerators.items() if backend.is_available()), "cpu")


@contextmanager
def loading_bars(shown: bool) -> Iterator[None]:
    """Shows or hides the progress bars with which transformers loads models."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@contextmanager
def answer_bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar for answers, which begins again when it is full. `show(what, answered)` moves it on."""
    from tqdm import tqdm

    with tqdm(total=total, unit="answer", leave=False, file=sys.stderr) as bar:

        def show(what: str, answered: int) -> None:
            if bar.n == bar.total:
                bar.reset()
            bar.set_description(what, refresh=answered == 0)
            bar.update(answered)

        yield show


# Prompts and parameters ---------------------------------------------------------------------------------------------


def add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--system",
        metavar="TEXT",
        help="the system message of the nudging model; the base sees it if --base-template has {system}",
    )
    add_base_template(prompts)


def add_base_template(parser: Any) -> None:
    shown = DEFAULT_TEMPLATE.replace("\n", "\\n").replace("%", "%%")
    parser.add_argument(
        "--base-template",
        type=lambda text: text.replace("\\n", "\n"),
        metavar="TEXT",
        default=DEFAULT_TEMPLATE,
        help=f"the base's prompt, with the fields {{user}} and {{system}}; \\n is a line break (default: {shown})",
    )


def add_study(parser: argparse.ArgumentParser, title: str, prompts: str, required: bool = False) -> Any:
    """Adds what a study asks and how it is answered, and returns the group. `prompts` is the help of `--prompts`."""
    asked = parser.add_argument_group(title)
    asked.add_argument("--prompts", type=Path, required=required, metavar="FILE", help=prompts)
    add_base_template(asked)
    add_number(asked, "--max-new-tokens", 256, "the limit on an answer, in tokens")
    add_number(asked, "--batch-size", 16, "how many prompts are answered at once")
    return asked


def add_decoding(parser: argparse.ArgumentParser) -> None:
    nudging = parser.add_argument_group("nudging")
    add_gate(nudging)
    nudging.add_argument(
        "--num-draft-tokens",
        type=drafts,
        metavar="N",
        help="how many tokens of the nudging model the base verifies in a pass, which changes the speed and never the "
        f"answer (default: {NudgingConfig.num_draft_tokens})",
    )
    nudging.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default: %(default)s")
    nudging.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most probable ones")
    for name, kind, what in _SAMPLING:
        nudging.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=f"{what}, with --sample")
    nudging.add_argument("--seed", type=int, metavar="N", help="the seed of the draws, with --sample")


# How the base draws its tokens: argument of `generate`, type and meaning.
_SAMPLING: list[tuple[str, Callable[[str], Any], str]] = [
    ("temperature", float, "the base's temperature"),
    ("top_p", float, "draw only from the base's most probable tokens that together reach this probability"),
    ("top_k", count, "draw only from so many of the base's most probable tokens; 0: from all"),
]


def parameters_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of [`NudgingConfig`] that were given.

    Raises:
        ValueError: for values out of range, now and not after the models have been loaded.
    """
    options = {name: getattr(args, name, None) for name in NudgingConfig.field_names()}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    warn_of_threshold(NudgingConfig(**given))
    return given


def warn_of_threshold(config: NudgingConfig) -> None:
    """Says so where the base can never be confident, because its score is a probability and the threshold is not."""
    gamma = gamma_of(config)
    if gamma is not None and gamma > 1:
        say(
            f"nudging-hf: warning: the threshold {gamma:g} is no probability: the base is never confident, and the "
            "nudging model writes wherever it can. Thresholds lie between 0 and 1."
        )


def gamma_of(config: NudgingConfig) -> float | None:
    """γ, with which the base's top-1 probability is compared; `None` with another gate, or if it sets itself."""
    given = config.nudge_threshold
    return given if config.nudge_gate == NudgingConfig.nudge_gate and not isinstance(given, str) else None


def decoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` that say how it decodes.

    Raises:
        ValueError: for values out of range, and for what needs sampling without it.
    """
    drawing = {name: getattr(args, name) for name, _, _ in _SAMPLING if getattr(args, name) is not None}
    if drawing and not args.sample:
        raise ValueError(f"--{min(drawing).replace('_', '-')} needs --sample: otherwise no token is drawn.")
    if not 0 < drawing.get("top_p", 1) <= 1:
        raise ValueError(f"--top-p is a probability, above 0 and at most 1, got {args.top_p:g}.")
    given = parameters_of(args)
    return {"nudging_config": given, "max_new_tokens": args.max_new_tokens, "do_sample": args.sample, **drawing}


def warn_of_context(pair: Pair, inputs: Mapping[str, Any], max_new_tokens: int) -> None:
    """Says so where a prompt and its answer may pass what one of the models was trained to read."""
    models = {"base": (pair.base, "input_ids"), "nudging model": (pair.nudging_model, "nudging_input_ids")}
    for name, (model, ids) in models.items():
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        prompt = inputs[ids].shape[1]
        if context is not None and prompt + max_new_tokens > context:
            say(
                f"nudging-hf: warning: the prompt of the {name} has {prompt} tokens, and with --max-new-tokens "
                f"{max_new_tokens} the answer may pass its context of {context}."
            )


def apply_seed(args: argparse.Namespace) -> None:
    """Seeds torch if `--seed` is given."""
    if args.seed is not None:
        import transformers

        transformers.set_seed(args.seed)
