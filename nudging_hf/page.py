"""Nudged answers as a page of HTML. It knows pieces of text and figures, never tokens or models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from . import html_page
from .provenance import Piece, count_nudged_words


@dataclass(frozen=True)
class MarkedAnswer:
    """One answer of a page, as [`~provenance.pieces_of`] returns it. A piece with `top1` shows it when pointed at.

    `figures` is what else the page says about the answer, by name, such as `{"finished": "eos"}`.
    """

    prompt: str
    pieces: Sequence[Piece]
    figures: Mapping[str, str] = field(default_factory=dict)


def write(
    path: str | os.PathLike[str],
    answers: Sequence[MarkedAnswer],
    threshold: float | None,
    title: str = "Nudged answers",
) -> None:
    """Writes the page of [`render`] to a file."""
    html_page.write(path, render(answers, threshold, title))


def render(answers: Sequence[MarkedAnswer], threshold: float | None, title: str = "Nudged answers") -> str:
    """A page that shows each answer with the nudging model's words highlighted.

    The base's top-1 probability at a piece is shown when the piece is pointed at, touched, or reached with the Tab
    key. The text of an element of class "text", parsed, is the prompt or the answer to the last character.

    Args:
        answers: one or more.
        threshold: γ, below which the base was unsure; `None` if another measure, or no fixed one, decided that.
        title: the title of the page.
    """
    counts = [count_nudged_words(answer.pieces) for answer in answers]
    nudged, words = sum(count[0] for count in counts), sum(count[1] for count in counts)
    return html_page.render(
        _TEMPLATE,
        title=title,
        style=_STYLE,
        several=f"{len(answers)} answers, {_of(nudged, words)} words nudged. " if len(answers) > 1 else "",
        unsure="" if threshold is None else f": below γ = {threshold:g} the base is unsure",
        answers=[
            {
                "prompt": answer.prompt,
                "runs": _runs(answer.pieces, threshold),
                "figures": [("nudged words", _of(*count)), *answer.figures.items()],
            }
            for answer, count in zip(answers, counts, strict=True)
        ],
    )


# A part of a text, and the base's top-1 probability there as it is shown; "" if none is.
_Part = tuple[str, str]


def _runs(pieces: Iterable[Piece], threshold: float | None) -> list[tuple[bool, list[_Part]]]:
    """Runs of parts by one author, and whether that is the nudging model. White space around is not marked."""
    runs = []
    for nudged, group in groupby(pieces, key=lambda piece: piece.nudged):
        parts = [part for piece in group for part in _parts(piece, threshold)]
        inked = [i for i, (text, _) in enumerate(parts) if text.strip()]
        start, end = (inked[0], inked[-1] + 1) if inked else (0, 0)
        runs += [(False, parts[:start]), (nudged, parts[start:end]), (False, parts[end:])]
    return [run for run in runs if run[1]]


def _parts(piece: Piece, threshold: float | None) -> list[_Part]:
    """The white space before a piece, the piece with its top-1 probability, and the white space after it."""
    body = piece.text.strip()
    start = piece.text.index(body)
    tip = ""
    if piece.top1 is not None:
        tip = f"{piece.top1:.3f}"
        if threshold is not None:
            tip += " ≥ γ" if piece.top1 >= threshold else " < γ"
    return [(piece.text[:start], ""), (body, tip), (piece.text[start + len(body) :], "")]


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.0%})" if whole else "")


# Every kind of colour vision tells orange from black and white, and the line under a nudged word needs no colour.
_TEMPLATE = """\
{% extends "page" %}
{% block header %}
<p>{{ several }}<mark>Words like these</mark> are the nudging model's, all others the base's. Point at a piece of an \
answer, or step through it with the Tab key, to see the probability of the base's most probable token \
there{{ unsure }}.</p>
{% endblock %}
{% block main %}
{% for answer in answers %}
<article>
<h2>Prompt</h2>
<div class="text prompt" dir="auto">{{ answer.prompt }}</div>
<h2>Answer</h2>
<div class="text answer" dir="auto">
{%- for nudged, parts in answer.runs %}{% if nudged %}<mark>{% endif %}
{%- for text, tip in parts %}
{%- if tip and text %}<span tabindex="0" data-tip="{{ tip }}">{{ text }}</span>{% else %}{{ text }}{% endif %}
{%- endfor %}{% if nudged %}</mark>{% endif %}{% endfor -%}
</div>
<dl>{% for name, value in answer.figures %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</article>
{% endfor %}
{% endblock %}
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
