"""Nudged answers as a page of HTML. It knows pieces of text and figures, never tokens or models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, repeat
from typing import Any, NamedTuple, cast

from . import html_page
from .provenance import Alternative, Piece, count_nudged_words

# A piece is the darker, the more of these top-1 probabilities the base stays below.
_LEVELS = (0.9, 0.7, 0.5, 0.3)
_CONTEXT_CHARACTERS = 60  # So much of the answer stands before a continuation of the base.


@dataclass(frozen=True)
class MarkedAnswer:
    """One answer of a page.

    Args:
        prompt: what was asked.
        pieces: the answer, as [`~provenance.pieces_of`] or [`~continuations.pieces_with_continuations`] return it; or
            a text, if one model wrote it alone.
        figures: what else the page says about the answer, by name, such as `{"finished": "eos"}`.
        word_boundary: how its words are counted: that with which it was written.
    """

    prompt: str
    pieces: Sequence[Piece] | str
    figures: Mapping[str, str] = field(default_factory=dict)
    word_boundary: str = "space"

    @property
    def nudged_words(self) -> tuple[int, int] | None:
        """How many words are nudged, and how many there are; `None` if one model wrote it alone."""
        is_plain = isinstance(self.pieces, str)
        return None if is_plain else count_nudged_words(cast(Sequence[Piece], self.pieces), self.word_boundary)


Entry = MarkedAnswer | Mapping[str, MarkedAnswer]


def write(
    path: str | os.PathLike[str],
    answers: Sequence[Entry],
    threshold: float | None,
    title: str = "Nudged answers",
    headings: Sequence[str] = (),
) -> None:
    """Writes the page of [`render`] to a file."""
    html_page.write(path, render(answers, threshold, title, headings))


def render(
    answers: Sequence[Entry], threshold: float | None, title: str = "Nudged answers", headings: Sequence[str] = ()
) -> str:
    """A page that shows each answer with the nudging model's words highlighted.

    A piece is shaded by how unsure the base was there. What the base itself would have written there, and how sure it
    was, is shown when the piece is pointed at, touched, or reached with the Tab key. Where a piece of a nudge has a
    continuation, a click on the nudge shows how the base alone would have gone on. The text of an element of class
    "text", parsed, is the prompt or the answer to the last character.

    Args:
        answers: one or more. Several answers to one prompt, by their titles, stand beside each other, as in
            `[{"base alone": MarkedAnswer(prompt, text), "nudged": MarkedAnswer(prompt, pieces)}]`.
        threshold: γ, below which the base was unsure; `None` if another measure, or no fixed one, decided that.
        title: the title of the page.
        headings: what stands above the first prompts in the place of "Prompt".

    Raises:
        ValueError: if answers that stand beside each other are to different prompts.
    """
    entries = _entries(answers, threshold, headings)
    counts = [
        counted
        for entry in answers
        for answer in (entry.values() if isinstance(entry, Mapping) else [entry])
        if (counted := answer.nudged_words) is not None
    ]
    nudged, words = sum(count[0] for count in counts), sum(count[1] for count in counts)
    return html_page.render(
        _HEADER + _ENTRIES + "{% endblock %}\n",
        title=title,
        style=_STYLE,
        colours=_COLOURS,
        several=f"{len(counts)} answers, {_of(nudged, words)} words nudged. " if len(counts) > 1 else "",
        unsure="" if threshold is None else f"; below γ = {threshold:g} it is unsure",
        scale=[f"p ≥ {_LEVELS[0]:g}", *(f"< {level:g}" for level in _LEVELS)],
        has_continuations=any(answer["continuations"] for entry in entries for answer in entry["answers"]),
        has_tips=any(
            part.tip for entry in entries for each in entry["answers"] for run in each["runs"] for part in run[1]
        ),
        entries=entries,
    )


def render_part(answers: Sequence[Entry], threshold: float | None) -> str:
    """The answers as [`render`] shows them, as a part of another page, which needs [`style_within`]."""
    return html_page.render(_ENTRIES, entries=_entries(answers, threshold))


def style_within(selector: str) -> str:
    """The style of [`render_part`] within the elements of a selector, whose `color-scheme` chooses the colours."""
    return f"{selector} {{\n{html_page.COLOURS}{_COLOURS}{html_page.STYLE}{_STYLE}}}\n"


def _entries(answers: Sequence[Entry], threshold: float | None, headings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What the template needs: the prompts, each with its answers."""
    shown = []
    for i, (entry, heading) in enumerate(zip(answers, chain(headings, repeat("Prompt")), strict=False), start=1):
        titled = entry if isinstance(entry, Mapping) else {"Answer": entry}
        if len(prompts := {answer.prompt for answer in titled.values()}) != 1:
            raise ValueError(f"Answers beside each other have one prompt, got {len(prompts)}: {sorted(prompts)}.")
        each = [_shown(*item, threshold, f"{i}-{j}") for j, item in enumerate(titled.items(), start=1)]
        is_beside = isinstance(entry, Mapping)
        shown.append({"heading": heading, "prompt": prompts.pop(), "is_beside": is_beside, "answers": each})
    return shown


class _Part(NamedTuple):
    """A part of a text.

    Args:
        text: the part.
        tip: what is shown when it is pointed at, if anything is.
        level: how unsure the base was, 0 to 4; `None` if that is not known.
    """

    text: str
    tip: str = ""
    level: int | None = None


def _shown(heading: str, answer: MarkedAnswer, threshold: float | None, name: str) -> dict[str, object]:
    """What the template needs for an answer. The names of its elements begin with `name`."""
    counted = answer.nudged_words
    pieces = [Piece(answer.pieces, False)] if isinstance(answer.pieces, str) else answer.pieces
    runs: list[tuple[bool, list[_Part], str]] = []
    continuations: list[tuple[str, str, str, str]] = []  # The target, the nudge, the text before it, and the base's.
    before = ""
    for nudged, group in groupby(pieces, key=lambda piece: piece.nudged):
        run = list(group)
        text = "".join(piece.text for piece in run)
        target, instead = "", run[0].instead
        if instead is not None and instead.continuation is not None and text.strip():
            target = f"base-{name}-{len(continuations)}"
            continuations.append((target, text.strip(), before[-_CONTEXT_CHARACTERS:], instead.continuation))
        runs += [(mark, parts, target if mark else "") for mark, parts in _parted(nudged, run, threshold)]
        before += text
    figures = {} if counted is None else {"nudged words": _of(*counted)}
    return {
        "heading": heading,
        "runs": runs,
        "continuations": continuations,
        "figures": list({**figures, **answer.figures}.items()),
    }


def _parted(nudged: bool, run: Iterable[Piece], threshold: float | None) -> list[tuple[bool, list[_Part]]]:
    """The parts of a run by one author, and whether they are marked as nudged. White space around is not."""
    parts = [part for piece in run for part in _parts(piece, threshold)]
    inked = [i for i, part in enumerate(parts) if part.text.strip()]
    start, end = (inked[0], inked[-1] + 1) if inked else (0, 0)
    split = [(False, parts[:start]), (nudged, parts[start:end]), (False, parts[end:])]
    return [each for each in split if each[1]]


def _parts(piece: Piece, threshold: float | None) -> list[_Part]:
    """The white space before a piece, the piece with what is known of it, and the white space after it."""
    body = piece.text.strip()
    start = piece.text.index(body)
    level, tip = None, ""
    if piece.top1 is not None:
        level = sum(piece.top1 < each for each in _LEVELS)
        tip = f"{piece.top1:.3f}"
        if threshold is not None:
            tip += " ≥ γ" if piece.top1 >= threshold else " < γ"
        if piece.instead is not None:
            tip += "\n" + _told(piece.instead)
    return [_Part(piece.text[:start]), _Part(body, tip, level), _Part(piece.text[start + len(body) :])]


def _told(instead: Alternative) -> str:
    """What the base would have written, in words. The isolates keep its text from turning the words around it."""
    text = "⏎".join(instead.text.splitlines()) + "⏎" * instead.text.endswith("\n")
    said = f"“\u2068{text}\u2069”" if text else "no more text"
    return f"the base alone: {said} ({instead.probability:.3f})\nrank of this token: {instead.rank}"


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.0%})" if whole else "")


# Every kind of colour vision tells orange from blue, and the line under a nudged word needs no colour.
_HEADER = """\
{% extends "page" %}
{% block header %}
<p>{{ several }}In a nudged answer, <mark>words like these</mark> are the nudging model's, all others the base's.
{%- if has_tips %} Point at a piece of the answer, or step through it with the Tab key, to see p, the probability of \
the base's most probable token there{{ unsure }}, and what the base itself would have written in place of a nudge.
{%- endif %}
{%- if has_continuations %} A click on a nudge shows how the base alone would have gone on from there.{% endif %}</p>
{% if has_tips %}
<p class="scale">How unsure the base was: {% for said in scale %}<span class="u{{ loop.index0 }}">{{ said }}</span> \
{% endfor %}</p>
{% endif %}
{% endblock %}
{% block main %}
"""

_ENTRIES = """\
{% for entry in entries %}
<article>
<h2>{{ entry.heading }}</h2>
<div class="text prompt" dir="auto">{{ entry.prompt }}</div>
<div class="answers"{% if entry.is_beside %} data-beside{% endif %}>
{% for answer in entry.answers %}
<section>
<h2>{{ answer.heading }}</h2>
<div class="text answer" dir="auto">
{%- for nudged, parts, target in answer.runs %}{% if nudged %}<mark>{% endif %}
{%- for part in parts %}
{%- if not part.tip or not part.text %}{{ part.text }}
{%- elif target %}<a href="#{{ target }}" class="u{{ part.level }}" data-tip="{{ part.tip }}">{{ part.text }}</a>
{%- else %}<span tabindex="0" class="u{{ part.level }}" data-tip="{{ part.tip }}">{{ part.text }}</span>
{%- endif %}
{%- endfor %}{% if nudged %}</mark>{% endif %}{% endfor -%}
</div>
{% for target, nudge, before, continuation in answer.continuations %}
<aside id="{{ target }}">
<p>From “{{ nudge }}” on, the base alone would have written:</p>
<p class="alone" dir="auto"><span>{{ before }}</span>{{ continuation or "(it ends the answer here)" }}</p>
<a href="#_">Close</a>
</aside>
{% endfor %}
<dl>{% for name, value in answer.figures %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</section>
{% endfor %}
</div>
</article>
{% endfor %}
"""

_COLOURS = """--mark: light-dark(#ffe3b8, #432c00); --under: light-dark(#b35c00, #ffb347);
--u1: light-dark(#e6eef8, #1f2937); --u2: light-dark(#d3e1f3, #263649);
--u3: light-dark(#bed2ed, #2d425c); --u4: light-dark(#a8c2e6, #344d6e);
--n1: light-dark(#ffdaa3, #4c3200); --n2: light-dark(#ffcf8a, #563800);
--n3: light-dark(#ffc270, #603d00); --n4: light-dark(#ffb454, #6a4200);
"""

_STYLE = """body:has([data-beside]) { max-width: 84rem; }
header p, .prompt { max-width: 46rem; }
header mark, .scale span { color: var(--ink); }
.scale span { padding: 0 .4rem; border-radius: .2rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem; }
.answers { display: grid; gap: 0 2rem; }
.answers[data-beside] { grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.answer { position: relative; }
.u1 { background: var(--u1); } .u2 { background: var(--u2); }
.u3 { background: var(--u3); } .u4 { background: var(--u4); }
mark { background: var(--mark); color: inherit; border-bottom: 2px solid var(--under); border-radius: .15rem; }
mark .u1 { background: var(--n1); } mark .u2 { background: var(--n2); }
mark .u3 { background: var(--n3); } mark .u4 { background: var(--n4); }
mark a { color: inherit; text-decoration: none; cursor: pointer; }
[data-tip] { border-radius: .15rem; }
[data-tip]:hover, [data-tip]:focus { outline: 1.5px solid var(--ink); }
[data-tip]:hover::after, [data-tip]:focus::after { content: attr(data-tip); position: absolute; z-index: 1;
  left: 0; width: max-content; max-width: 100%; box-sizing: border-box; margin-top: 1.75em; padding: .25rem .55rem;
  border-radius: .3rem; direction: ltr; text-align: left; white-space: pre-line; overflow-wrap: anywhere;
  pointer-events: none; background: var(--ink); color: var(--paper); font: .8rem/1.5 system-ui, sans-serif; }
@media (min-width: 64rem) {
  .answers:not([data-beside]) [data-tip] { position: relative; }
  .answers:not([data-beside]) [data-tip]::after { left: 50%; transform: translateX(-50%); max-width: 20rem; } }
aside { display: none; }
aside:target { display: block; position: fixed; z-index: 2; inset: auto 0 0; max-width: 46rem; max-height: 60vh;
  overflow: auto; margin: 0 auto; padding: .75rem 1.25rem 1rem; box-sizing: border-box; background: var(--panel);
  border: solid var(--rule); border-width: 1px 1px 0; border-radius: .6rem .6rem 0 0; box-shadow: 0 0 2rem #0005; }
aside p { margin: 0 0 .5rem; overflow-wrap: anywhere; }
aside p:first-child, .alone span { color: var(--faint); }
.alone { white-space: pre-wrap; }
aside a { color: inherit; text-decoration: underline; }
@media print { mark, [class^="u"] { print-color-adjust: exact; } }
"""
