"""The command line: `nudging-hf`. It knows arguments, terminals and exit codes, never how an answer is written."""

from __future__ import annotations

import argparse
import json
import os
import string
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from . import __version__, demo
from .config import ADAPTIVE, NudgingConfig
from .generate import generate
from .streaming import MarkingStreamer

_COLOUR, _PLAIN = "\033[1;32m", "\033[0m"
_OPENING, _CLOSING = "⟦", "⟧"
_USER_ERROR, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `nudging-hf`.

    Args:
        argv: the arguments; left out, those of the process.

    Returns:
        The exit code: 0, 2 for what the user can mend, 130 after an interrupt.

    Raises:
        SystemExit: for `--help`, `--version` and arguments that cannot be parsed.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("nudging-hf: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # Whoever read the output, `head` for one, has had enough of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"nudging-hf: error: {_first_line(error)}", file=sys.stderr)
        return _USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nudging-hf",
        description="Nudging: a small aligned model writes the words where a large base model is unsure.",
    )
    parser.add_argument("--version", action="version", version=f"nudging-hf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="answer a prompt", description=_GENERATE))
    _add_demo(commands.add_parser("demo", help="see a pair of models at work, and measured", description=_DEMO))
    return parser


_GENERATE = (
    "Answers a prompt with a nudged base model. The answer goes to standard output as it is written, with the words "
    "of the nudging model in colour; a line of figures goes to standard error."
)
_DEMO = (
    "Shows what nudging does with a pair of models: some answers, with the words of the nudging model in colour, and "
    "then, on questions with known answers, how often each model alone and both together are right."
)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    defaults = NudgingConfig()
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help='left out or "-": read from standard input')
    models = parser.add_argument_group("models")
    name: dict[str, Any] = {"required": True, "metavar": "NAME"}
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
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--system",
        metavar="TEXT",
        help="the system message of the nudging model; the base sees it where --base-template has {system}",
    )
    prompts.add_argument(
        "--base-template",
        metavar="TEXT",
        default="{prompt}",
        help="the base's prompt, with the fields {prompt} and {system}; \\n is a line break (default: %(default)s)",
    )
    nudging = parser.add_argument_group("nudging")
    nudging.add_argument(
        "--threshold",
        type=float,
        default=defaults.nudge_threshold,
        metavar="P",
        help="the base is unsure where its most probable token has less than this probability (default: %(default)s)",
    )
    nudging.add_argument(
        "--num-draft-tokens",
        type=_drafts,
        default=defaults.num_draft_tokens,
        metavar="N",
        help="how many tokens of the nudging model the base checks at once, which changes the speed and never the "
        "answer (default: %(default)s)",
    )
    nudging.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="default: %(default)s")
    nudging.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most probable ones")
    nudging.add_argument("--temperature", type=float, metavar="T", help="of the base, with --sample")
    nudging.add_argument("--seed", type=int, metavar="N", help="of what is drawn, with --sample")
    output = parser.add_argument_group("output")
    _add_color(output)
    output.add_argument(
        "--marks",
        action=argparse.BooleanOptionalAction,
        help=f"put the nudged words in {_OPENING} {_CLOSING} (default: in a terminal without colour)",
    )
    output.add_argument("--quiet", action="store_true", help="no line of figures")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_demo)
    parser.add_argument(
        "--pair",
        type=Path,
        metavar="FOLDER",
        help="the models and their questions (default: examples/mini, here or where the package lies)",
    )
    parser.add_argument(
        "--questions", type=_count, default=50, metavar="N", help="measured a task; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--examples", type=_count, default=1, metavar="N", help="answers shown a task (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=NudgingConfig().nudge_threshold,
        metavar="P",
        help="the base is unsure where its most probable token has less than this probability (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=50,
        metavar="N",
        help="questions answered at once (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and answers to this file")
    _add_color(parser)


def _add_color(parser: Any) -> None:
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="default: %(default)s, which is in a terminal, unless NO_COLOR is set",
    )


def _drafts(text: str) -> int | str:
    return text if text == ADAPTIVE else _count(text)


def _positive(text: str) -> int:
    return _integer(text, least=1)


def _count(text: str) -> int:
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


# generate -----------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    if args.temperature is not None and not args.sample:
        raise ValueError("--temperature needs --sample: the most probable token has no temperature.")
    prompt = _read_prompt(args.prompt)
    if args.device is not None and args.device_map is not None:
        raise ValueError("--device and --device-map both say where the models run: give one of them.")
    config = NudgingConfig(nudge_threshold=args.threshold, num_draft_tokens=args.num_draft_tokens)
    base_prompt = _fill_in(args.base_template, prompt, args.system)
    if args.seed is not None:
        transformers.set_seed(args.seed)
    with _loading_bars(sys.stderr.isatty() and not args.quiet):
        base, tokenizer = _load("--base", args.base, args)
        nudging_model, nudging_tokenizer = _load("--nudging-model", args.nudging_model, args)

    pieces: list[demo.Piece] = []
    coloured = _is_coloured(args.color)
    marked = sys.stdout.isatty() and not coloured if args.marks is None else args.marks
    with Ink(sys.stdout, coloured, marked) as ink:

        def write(text: str, nudged: bool) -> None:
            pieces.append((text, nudged))
            ink.write(text, nudged)

        began = time.monotonic()
        inputs = tokenizer(base_prompt, return_tensors="pt")
        out: Any = generate(
            base,
            input_ids=inputs.input_ids.to(base.device),
            attention_mask=inputs.attention_mask.to(base.device),
            tokenizer=tokenizer,
            nudging_model=nudging_model,
            nudging_tokenizer=nudging_tokenizer,
            nudging_input_ids=_nudging_ids(nudging_tokenizer, prompt, base_prompt, args.system),
            nudging_config=config,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.sample,
            streamer=MarkingStreamer(tokenizer, write),
            return_dict_in_generate=True,
            **({} if args.temperature is None else {"temperature": args.temperature}),
        )
        seconds = time.monotonic() - began
    if not args.quiet:
        nudged, words = demo.count_nudged_words(pieces)
        figures = [
            f"nudged words: {nudged} of {words}" + (f" ({nudged / words:.0%})" if words else ""),
            f"passes: base {out.base_forward_passes}, nudging model {out.nudging_forward_passes}",
            f"tokens: {out.nudged_mask.shape[1]} in {seconds:.1f} s",
            f"finished: {out.finish_reasons[0]}",
        ]
        print(" | ".join(figures), file=sys.stderr)


def _read_prompt(argument: str | None) -> str:
    if argument in (None, "-"):
        if sys.stdin.isatty():
            print("Prompt, ended by Ctrl-D on a line of its own:", file=sys.stderr)
        argument = sys.stdin.read().removesuffix("\n")
    assert argument is not None
    if not argument.strip():
        raise ValueError("The prompt is empty: give one as an argument or on standard input.")
    return argument


def _fill_in(template: str, prompt: str, system: str | None) -> str:
    """The base's prompt."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"--base-template: {error}; a brace itself is written twice.") from error
    if unknown := fields - {"prompt", "system"}:
        raise ValueError(f"--base-template knows the fields {{prompt}} and {{system}}, got {{{min(unknown)}}}.")
    if "prompt" not in fields:
        raise ValueError(f"--base-template has no field {{prompt}}, got {template!r}.")
    if "system" in fields and system is None:
        raise ValueError("--base-template has the field {system}: give --system too.")
    return template.replace("\\n", "\n").format(prompt=prompt, system=system)


def _nudging_ids(tokenizer: Any, prompt: str, base_prompt: str, system: str | None) -> torch.Tensor:
    """The nudging model's prompt: its chat template, or the base's prompt where it has none."""
    if not tokenizer.chat_template:
        return tokenizer(base_prompt, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    except TemplateError as error:
        raise ValueError(f"The nudging model's chat template refuses the messages: {error}") from error


def _load(option: str, name: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """A model in its place, and its tokenizer."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"{option}: there is no folder {name}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=args.device_map)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: cannot load {name}: {_first_line(error)}") from error
    if args.device is not None:
        try:
            model = model.to(args.device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA.
            raise ValueError(f"--device {args.device}: {_first_line(error)}") from error
    return model, tokenizer


@contextmanager
def _loading_bars(shown: bool) -> Iterator[None]:
    """Lets transformers show how loading goes, or not."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


# demo ---------------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> None:
    began = time.monotonic()
    NudgingConfig(nudge_threshold=args.threshold)  # Refused now, not after the models that answer alone.
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {args.json.parent}.")
    folder = args.pair if args.pair is not None else demo.find_pair()
    print(f"Loading the models of {folder} ...", file=sys.stderr)
    with _loading_bars(False):
        pair = demo.Pair.load(folder)
    _show_examples(pair, args)
    results: list[demo.Result] = []
    try:
        _evaluate(pair, args, results)
    finally:  # After an interrupt, what was finished is shown all the same.
        seconds = time.monotonic() - began
        _show_results(results, args)
        if args.json is not None:
            _write_json(folder, results, seconds, args)
        print(f"This took {seconds:.0f} s.")


def _show_examples(pair: demo.Pair, args: argparse.Namespace) -> None:
    questions = demo.first_of_each_task(pair.questions, args.examples)
    coloured = _is_coloured(args.color)
    if questions:
        with Ink(sys.stdout, coloured, marked=not coloured) as ink:
            ink.write("In the answers below ", False)
            ink.write("words like these", True)
            ink.write(" are the nudging model's, and all others the base's.\n", False)
    for question in questions:
        print(f"\n[{question.task}] {question.text}", flush=True)
        with Ink(sys.stdout, coloured, marked=not coloured) as ink:
            answer = demo.stream_answer(pair, question, args.threshold, ink.write)
        given = "no answer" if answer.given is None else answer.given
        print("-> " + (f"{given}: right" if answer.correct else f"{given}: wrong, it is {question.answer}"))


def _evaluate(pair: demo.Pair, args: argparse.Namespace, results: list[demo.Result]) -> None:
    """Lets all contestants answer; `results` holds those that have finished, also after an interrupt."""
    questions = demo.first_of_each_task(pair.questions, args.questions)
    if not questions:
        return
    contestants = demo.contestants(pair)
    with tqdm(total=len(contestants) * len(questions), unit="answer", leave=False, file=sys.stderr) as bar:
        for contestant in contestants:
            bar.set_description(contestant.name)
            results.append(demo.evaluate(contestant, questions, args.threshold, args.batch_size, bar.update))


def _show_results(results: Sequence[demo.Result], args: argparse.Namespace) -> None:
    if not results:
        return
    print(f"\nRight answers, of {args.questions} questions a task; the share of words that the nudging model wrote;")
    print(f"forward passes of the large and of the small model, each for up to {args.batch_size} answers at once:\n")
    print(demo.table(results), end="\n\n")
    for sentence in demo.summary(results):
        print(sentence)


def _write_json(folder: Path, results: Sequence[demo.Result], seconds: float, args: argparse.Namespace) -> None:
    report = {
        "pair": str(folder),
        "nudge_threshold": args.threshold,
        "questions_per_task": args.questions,
        "batch_size": args.batch_size,
        "max_new_tokens": demo.MAX_NEW_TOKENS,
        "versions": {
            "nudging_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(seconds, 1),
        "contestants": demo.as_dict(results),
    }
    args.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"All figures and answers: {args.json}")


# Terminals ----------------------------------------------------------------------------------------------------------


class Ink:
    """Writes an answer so that the nudging model's words stand out; the white space around them does not.

    As a context manager it leaves the terminal plain and on a new line, also after an interrupt.

    Args:
        out: where to.
        coloured: whether nudged words are in colour.
        marked: whether they stand between marks.
    """

    def __init__(self, out: TextIO, coloured: bool, marked: bool):
        self._out = out
        self._before = _COLOUR * coloured + _OPENING * marked
        self._after = _CLOSING * marked + _PLAIN * coloured
        self._nudged = False  # Whether what was written last is.
        self._space = ""  # White space that waits for the author of what comes after it.

    def write(self, text: str, nudged: bool) -> None:
        """Writes a piece of an answer, and whether the nudging model wrote it."""
        body = text.strip()
        if not body:
            self._space += text
            return
        start = text.index(body)
        self._space += text[:start]
        if nudged != self._nudged:
            self._out.write(self._space + self._before if nudged else self._after + self._space)
            self._nudged = nudged
        else:
            self._out.write(self._space)
        self._out.write(body)
        self._space = text[start + len(body) :]
        self._out.flush()

    def __enter__(self) -> Ink:
        return self

    def __exit__(self, *error: object) -> None:
        self._out.write((self._after if self._nudged else "") + self._space.rstrip("\n") + "\n")
        self._out.flush()


def _is_coloured(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"


def _first_line(error: BaseException) -> str:
    """What an error says first: the messages of transformers go on for lines."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
