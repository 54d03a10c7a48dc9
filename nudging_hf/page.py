"""Nudged answers as a page of HTML. It knows pieces of text and figures, never tokens or models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path

from .provenance import Piece, count_nudged_words


@dataclass(frozen=True)
class Answer:
    """One answer of a page.

    Args:
        prompt: what was asked.
        pieces: the answer, as [`~provenance.pieces_of`] gives it. A piece with `top1` shows it when it is pointed at.
        figures: what else to say of it, by name, such as `{"finished": "eos"}`.
    """

    prompt: str
    pieces: Sequence[Piece]
    figures: Mapping[str, str] = field(default_factory=dict)


def write(
    path: str | os.PathLike[str], answers: Sequence[Answer], threshold: float | None, title: str = "Nudged answers"
) -> None:
    """Writes [`render`]'s page to a file."""
    Path(path).write_text(render(answers, threshold, title), encoding="utf-8", newline="\n")


def render(answers: Sequence[Answer], threshold: float | None, title: str = "Nudged answers") -> str:
    """A page that needs nothing but itself: each answer with the nudging model's words highlighted.

    The base's top-1 probability at a piece is shown when the piece is pointed at, touched, or reached with the Tab
    key. The text of an element of class "text", parsed, is the prompt or the answer to the last character.

    Args:
        answers: one or more.
        threshold: γ, below which the base was unsure; `None` where another measure, or no fixed one, told that.
        title: of the page.
    """
    counts = [count_nudged_words(answer.pieces) for answer in answers]
    nudged, words = sum(count[0] for count in counts), sum(count[1] for count in counts)
    several = f"{len(answers)} answers, {_of(nudged, words)} words nudged. " if len(answers) > 1 else ""
    unsure = "" if threshold is None else f": below γ = {threshold:g} the base is unsure"
    body = "\n".join(_answer(answer, threshold) for answer in answers)
    html = _PAGE.format(title=escape(title), style=_STYLE, unsure=unsure, several=several, answers=body)
    return html.replace("\r", "&#13;")  # A parser makes a line feed of a carriage return that is not spelt out.


def _answer(answer: Answer, threshold: float | None) -> str:
    figures = {"nudged words": _of(*count_nudged_words(answer.pieces)), **answer.figures}
    return (
        "<article>\n<h2>Prompt</h2>\n"
        f'<div class="text prompt" dir="auto">{escape(answer.prompt)}</div>\n<h2>Answer</h2>\n'
        f'<div class="text answer" dir="auto">{_marked(answer.pieces, threshold)}</div>\n<dl>'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items())
        + "</dl>\n</article>"
    )


def _marked(pieces: Iterable[Piece], threshold: float | None) -> str:
    """The pieces, with a mark around neighbours of the nudging model, but not around the white space at their ends."""
    html = ""
    for nudged, group in groupby(pieces, key=lambda piece: piece.nudged):
        run = "".join(_piece(piece, threshold) for piece in group)
        before, body, after = _trimmed(run)
        html += f"{before}<mark>{body}</mark>{after}" if nudged and body else run
    return html


def _piece(piece: Piece, threshold: float | None) -> str:
    before, body, after = _trimmed(escape(piece.text))
    if piece.top1 is None or not body:
        return before + body + after
    tip = f"{piece.top1:.3f}"
    if threshold is not None:
        tip += " ≥ γ" if piece.top1 >= threshold else " &lt; γ"
    return f'{before}<span tabindex="0" data-tip="{tip}">{body}</span>{after}'


def _trimmed(html: str) -> tuple[str, str, str]:
    """The white space before and behind, and what it stands around."""
    body = html.strip()
    start = html.index(body)
    return html[:start], body, html[start + len(body) :]


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.0%})" if whole else "")


# The policy makes sure that the page loads and runs nothing, whatever a model has written. Orange is told from black
# and white by every kind of colour vision, and the line under a nudged word needs no colour at all.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{several}<mark>Words like these</mark> are the nudging model's, all others the base's. Point at a piece of an \
answer, or step through it with the Tab key, to see the probability of the base's most probable token \
there{unsure}.</p>
</header>
<main>
{answers}
</main>
</body>
</html>
"""

_STYLE = """:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #5c5c5c; --rule: #d8d8d8;
  --mark: #ffe3b8; --under: #b35c00; --panel: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #16181b; --faint: #a8a8a8; --rule: #3a3d42;
    --mark: #573800; --under: #ffb347; --panel: #1f2226; } }
body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.65 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
h2 { font-size: .8rem; font-weight: 600; color: var(--faint); margin: 1.25rem 0 .35rem; }
header p { margin: 0; color: var(--faint); font-size: .95rem; }
header mark { color: var(--ink); }
article { border-top: 1px solid var(--rule); margin-top: 1.5rem; padding-top: .25rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem; }
mark { background: var(--mark); color: inherit; border-bottom: 2px solid var(--under); border-radius: .15rem; }
[data-tip] { position: relative; }
[data-tip]:hover, [data-tip]:focus { outline: 1.5px solid var(--ink); border-radius: .15rem; }
[data-tip]:hover::after, [data-tip]:focus::after { content: attr(data-tip); position: absolute; z-index: 1;
  bottom: 100%; left: 50%; transform: translateX(-50%); padding: .1rem .45rem; border-radius: .3rem; direction: ltr;
  white-space: nowrap; pointer-events: none; background: var(--ink); color: var(--paper);
  font: .8rem/1.5 system-ui, sans-serif; }
dl { display: flex; flex-wrap: wrap; gap: .15rem 1.5rem; margin: 1rem 0 0; font-size: .875rem; color: var(--faint); }
dl div { display: flex; gap: .4rem; }
dd { margin: 0; color: var(--ink); }
@media print { mark { print-color-adjust: exact; } }
"""
