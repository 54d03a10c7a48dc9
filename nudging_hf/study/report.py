"""Renders an analysis as plots and as one page of HTML. It knows figures, never models.

The plots need matplotlib: `pip install "nudging-hf[analysis]"`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import html_page
from .tables import percent as plain_percent

SOURCE = "Fei, Razeghi and Singh, Nudging: Inference-time Alignment of LLMs via Guided Decoding, arXiv 2410.09300"

# These are Okabe and Ito's colours, which people with colour blindness can tell apart too, on light and dark pages.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"
# The ink, the grid and the ground of a plot on a light page, and on a dark one.
_LIGHT, _DARK = ("#1b1b1b", "#e4e4e4", "#ffffff"), ("#ececec", "#3a3d42", "#16181b")


def write(folder: Path, tables: Mapping[str, Any], about: Mapping[str, str]) -> Path:
    """Writes `tables.json`, each plot as a PNG, and `report.html`, which contains the plots and needs no other file.

    The page is light or dark as the reader's browser wants it, and so are its plots.

    Args:
        folder: a folder that exists.
        tables: the figures, as [`~analysis.tables`] returns them.
        about: further facts that the page states about the analysis, by name, such as `{"base": "gemma-2-27b"}`.

    Returns:
        The path of the page. Without matplotlib, an `ImportError` names the extra to install.
    """
    images = plots(tables)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    text = json.dumps({"about": dict(about), **tables}, ensure_ascii=False, indent=1)
    (folder / "tables.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    page = folder / "report.html"
    html_page.write(page, render(tables, about, images, plots(tables, dark=True)))
    return page


def paper_comparison(tables: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that the paper reports too: what each is, the paper's value, and the value here."""
    half = next(row for row in tables["thresholds"] if row["threshold"] == 0.5)
    compared = (
        (
            "disagreement of base and aligned model at positions with p < 0.1",
            "90 %",
            tables["bins"][0]["disagreement"],
        ),
        ("share of alignment-related positions that have p < 0.5", "over 80 %", half["caught"]),
        ("share of all positions that have p < 0.5", "11 %", half["positions"]),
        (
            "agreement of small and large aligned model at alignment-related positions",
            "65 to 83 % (Llama-2), 58 to 88 % (Gemma-2)",
            tables["agreement"]["alignment_related"],
        ),
    )
    return [
        (what.replace("p < ", "p\u00a0<\u00a0"), paper.replace(" %", "\u00a0%"), percent(here))
        for what, paper, here in compared
    ]


def percent(share: float | None) -> str:
    """A share as text that stays on one line; "-" if it is the share of nothing."""
    return plain_percent(share, digits=0 if share in (0, 1) else 1).replace("%", "\u00a0%")


# Plots --------------------------------------------------------------------------------------------------------------


def plots(tables: Mapping[str, Any], dark: bool = False) -> dict[str, bytes]:
    """All plots by name, as PNG files, for a light page or a dark one. Without matplotlib it raises the error of
    [`require_matplotlib`]."""
    wanted = {"positions": _positions, "disagreement": _disagreement, "caught": _caught}
    if tables["agreement"]["alignment_related"] is not None:
        wanted["agreement"] = _agreement
    if tables["curve"]:
        wanted["thresholds"] = _curve
    return {name: _draw(plot, tables, dark) for name, plot in wanted.items()}


def plot_calibration(found: Any) -> bytes:
    """A PNG file of a [`~calibration.Calibration`]: nudge rate and any score by threshold. It needs matplotlib."""
    return _draw(_calibration, found)


def require_matplotlib() -> None:
    """Raises an `ImportError` that names the extra to install if plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "nudging-hf[analysis]".') from error


def _draw(plot: Any, figures: Any, dark: bool = False) -> bytes:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, grid, ground = _DARK if dark else _LIGHT
    colours: Any = {"axes.facecolor": ground, "figure.facecolor": ground, "grid.color": grid}
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with rc_context(colours | dict.fromkeys(inked, ink)):
        figure = Figure(figsize=(7, 3.6), dpi=144, layout="constrained")  # pyplot would set a backend.
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        plot(axes, figures)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})  # The same figures make the same file.
    return file.getvalue()


def _calibration(axes: Any, found: Any) -> None:
    thresholds = [point.threshold for point in found.curve]
    axes.plot(thresholds, [point.nudge_rate for point in found.curve], "o-", color=_BLUE, label="nudged words")
    scores = [point.score for point in found.curve]
    if None not in scores:
        axes.plot(thresholds, scores, "s--", color=_ORANGE, label="right answers")
    if found.target_nudge_rate is not None:
        axes.axhline(found.target_nudge_rate, color="grey", linestyle=":", label="target of nudged words")
    axes.axvline(found.threshold, color=_LIGHT[0], linewidth=0.8, label=f"chosen: {found.threshold:g}")
    axes.set(xlabel=f"nudge_threshold of {found.nudge_gate}", ylabel="share", ylim=(0, 1.02))
    axes.legend()


def _positions(axes: Any, tables: Mapping[str, Any]) -> None:
    _bars(axes, tables["bins"], "share", _BLUE, [percent(row["share"]) for row in tables["bins"]])
    _finish(axes, "of all positions (%)")


def _disagreement(axes: Any, tables: Mapping[str, Any]) -> None:
    _bars(axes, tables["bins"], "disagreement", _ORANGE, _labels(tables["bins"], "disagreement", of="compared"))
    _mean_line(axes, tables["along"]["disagreement"], "all positions")
    _finish(axes, "base and aligned disagree (%)", whole=True)


def _agreement(axes: Any, tables: Mapping[str, Any]) -> None:
    labels = _labels(tables["bins"], "small_agreement", of="small_compared")
    _bars(axes, tables["bins"], "small_agreement", _GREEN, labels)
    _mean_line(axes, tables["agreement"]["alignment_related"], "all alignment-related positions")
    _finish(axes, "small and large aligned agree (%)", whole=True)


def _caught(axes: Any, tables: Mapping[str, Any]) -> None:
    rows = tables["thresholds"]
    at = [row["threshold"] for row in rows]
    axes.plot(at, _percents(rows, "caught"), color=_ORANGE, marker="o", markersize=4, label="alignment-related caught")
    axes.plot(at, _percents(rows, "positions"), color=_BLUE, marker="s", markersize=4, label="of all positions")
    axes.legend(frameon=False)
    _finish(axes, "positions with p < γ (%)", "threshold γ", whole=True)


def _curve(axes: Any, tables: Mapping[str, Any]) -> None:
    rows = tables["curve"]
    at = [row["threshold"] for row in rows]
    if rows[0]["accuracy"] is not None:
        axes.plot(at, _percents(rows, "accuracy"), color=_ORANGE, marker="o", label="accuracy, nudged")
        for name, style in (("base", ":"), ("nudging model", "--"), ("large aligned", "-.")):
            if (alone := tables["alone"][name]["accuracy"]) is not None:
                axes.axhline(100 * alone, color=_GREY, linestyle=style, linewidth=1.2, label=f"accuracy, {name} alone")
    axes.plot(at, _percents(rows, "nudged_words"), color=_BLUE, marker="s", label="nudged words")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(axes, "accuracy, nudged words (%)", "threshold γ", whole=True)


def _percents(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float("nan") if row[name] is None else 100 * row[name] for row in rows]


def _bars(axes: Any, bins: Sequence[Mapping[str, Any]], name: str, color: str, labels: Sequence[str]) -> None:
    """Draws a bar for each bin, with a label above it."""
    bars = axes.bar([(row["from"] + row["to"]) / 2 for row in bins], _percents(bins, name), width=0.09, color=color)
    axes.bar_label(bars, labels, fontsize=7, padding=2)


def _labels(bins: Sequence[Mapping[str, Any]], name: str, of: str) -> list[str]:
    """Each bar's share, and how many positions it is a share of, which the bin counts under `of`."""
    return ["" if row[name] is None else f"{percent(row[name])}\nof {row[of]:,}" for row in bins]


def _mean_line(axes: Any, mean: float | None, whose: str) -> None:
    if mean is not None:
        axes.axhline(100 * mean, color=_GREY, linestyle="--", linewidth=1, label=f"{whose}: {percent(mean)}")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))  # The legend stands above the bars.


def _finish(axes: Any, y: str, x: str = "the base's top-1 probability p", whole: bool = False) -> None:
    """Sets the labels and ranges of the axes. If `whole` is true, y goes up to 100 %."""
    axes.set(xlabel=x, ylabel=y, xlim=(0, 1.02), xticks=[i / 10 for i in range(11)])
    if whole:  # There is room for the labels of bars above 100 %.
        axes.set(ylim=(0, 116), yticks=range(0, 101, 20))


# The page -----------------------------------------------------------------------------------------------------------


def render(
    tables: Mapping[str, Any], about: Mapping[str, str], images: Mapping[str, bytes], dark_images: Mapping[str, bytes]
) -> str:
    """The page as HTML, in which the images of [`plots`] are embedded. `tables` and `about` are those of [`write`]."""
    curve = tables["curve"]
    scored = bool(curve) and curve[0]["accuracy"] is not None
    measures = [*(["accuracy"] if scored else []), "nudged_words", "nudged_tokens"]
    shares = ("share", "disagreement", "small_agreement")
    return html_page.render(
        _TEMPLATE,
        title="Nudging: analysis of a pair",
        style=_STYLE,
        source=SOURCE,
        about=about,
        large=tables["along"]["writer"] == "large aligned",
        compared=paper_comparison(tables),
        scored=scored,
        measures=[name.replace("_", " ") for name in measures],
        at_thresholds=[
            (f"{row['threshold']:g}", *(_cell(row, name) for name in measures), row["unfinished"]) for row in curve
        ],
        in_bins=[
            (f"{row['from']:g} to {row['to']:g}", f"{row['positions']:,}", *(percent(row[name]) for name in shares))
            for row in tables["bins"]
        ],
        alone_shares=[
            f"{name} {_cell(row, 'accuracy')}" for name, row in tables["alone"].items() if row["accuracy"] is not None
        ],
        percent=percent,
        images=_encoded(images),
        dark_images=_encoded(dark_images),
        **tables,
    )


def _encoded(images: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(image).decode("ascii") for name, image in images.items()}


def _cell(row: Mapping[str, Any], name: str) -> str:
    """A share of a row as text, with its interval where it is an accuracy."""
    if name != "accuracy":
        return percent(row[name])
    low, high = (f"{100 * end:.0f}" for end in row["interval"])
    return f"{percent(row[name])} ({low} to {high})"


_TEMPLATE = """\
{% extends "page" %}
{% macro plot(name, shows) %}
<div class="wide"><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{{ dark_images[name] }}">
<img src="data:image/png;base64,{{ images[name] }}" alt="{{ shows }}">
</picture></div>
{% endmacro %}
{% macro table(head, rows, kind="figures") %}
<div class="wide"><table class="{{ kind }}">
<thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
{% block policy %}; img-src data:{% endblock %}
{% block header %}
<p><strong>{{ verdict }}</strong></p>
<dl>{% for name, value in about.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
<p>p is the probability of the base's most probable token. Nudging lets the small model write where p is below a \
threshold γ. The paper observes three things: the base is mostly sure; where it is not, it and the aligned model \
disagree; and there the small aligned model says what the large one would.</p>
{% endblock %}
{% block main %}
<section>
<h2>Compared with the paper</h2>
<p>The paper's figures are from {{ source }}.
{%- if not large %} They are those of a large aligned model, and here there is none. So the nudging model's lack of \
skill counts as disagreement too, and where the base is sure of itself, it may be the one that is right.{% endif %}</p>
{{ table(["", "paper", "here"], compared, "texts") -}}
</section>
<section>
<h2>How sure the base is</h2>
<p>{{ "{:,}".format(along.positions) }} positions along the \
{% if large %}large aligned model's{% else %}nudged (γ = {{ "%g" % along.threshold }}){% endif %} answers to \
{{ prompts }} prompts.</p>
{{ plot("positions", "Share of positions by the base's top-1 probability") -}}
</section>
<section>
<h2>Where base and aligned model disagree</h2>
<p>A position is alignment-related if the base's greedy token is not the \
{{ "large aligned model" if large else "nudging model" }}'s. The plot shows the share of such positions. \
{{ "{:,}".format(along.compared) }} positions were compared, and {{ "{:,}".format(along.alignment_related) }} are \
alignment-related.</p>
{{ plot("disagreement", "Disagreement of base and aligned model by the base's top-1 probability") -}}
</section>
<section>
<h2>What a threshold catches</h2>
<p>If every position with p &lt; γ were nudged, these would be the nudged shares of all positions and of the \
alignment-related ones.</p>
{{ plot("caught", "Alignment-related positions caught, and positions nudged, by threshold") -}}
</section>
{% if "agreement" in images %}
<section>
<h2>Whether the small model can stand in for the large</h2>
<p>Both can be compared at {{ "{:,}".format(agreement.alignment_related_compared) }} alignment-related positions. \
They agree on {{ percent(agreement.alignment_related) }} of them, and on {{ percent(agreement.elsewhere) }} of the \
other positions.</p>
{{ plot("agreement", "Agreement of small and large aligned model") -}}
</section>
{% endif %}
{% if "thresholds" in images %}
<section>
<h2>Nudged answers at each threshold</h2>
<p>An answer is unfinished if the limit on its length ended it.
{%- if scored %} Accuracy of each model alone: {{ alone_shares | join(", ") }}. In brackets are 95 % intervals \
(Wilson's).{% endif %}</p>
{% for said in nothing_right %}<p>{{ said }}</p>
{% endfor %}
{{ plot("thresholds", "Accuracy and nudge rate by threshold") -}}
{{ table(["γ"] + measures + ["unfinished"], at_thresholds) -}}
</section>
{% endif %}
<section>
<h2>By the base's top-1 probability</h2>
<p>Positions are the base's tokens without the end mark; all models read the same answers. The aligned model's token \
is the {{ "large one's" if large else "nudging model's, as no large one was given" }}. Two greedy tokens of one \
vocabulary agree if they are the same. Across vocabularies they agree if the text of one is a prefix of the text of \
the other, and only positions where a token starts in both are compared. The last column counts only the \
alignment-related positions.</p>
{{ table(["p", "positions", "of all", "disagree", "small and large agree"], in_bins) -}}
</section>
{% endblock %}
"""

_STYLE = """body { max-width: 48rem; }
h2 { font-size: 1.1rem; color: var(--ink); margin: 0 0 .35rem; }
section { border-top: 1px solid var(--rule); margin-top: 1.5rem; padding-top: 1rem; }
header p { margin: .75rem 0 0; }
strong { color: var(--ink); }
section p { margin: 0 0 .75rem; color: var(--faint); font-size: .95rem; }
.wide { overflow-x: auto; }
img { display: block; width: 100%; min-width: 34rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; }
.figures td { white-space: nowrap; }
"""
