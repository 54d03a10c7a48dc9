"""Renders an analysis as plots and as one page of HTML. It knows figures, never models.

The plots need matplotlib: `pip install "nudging-hf[analysis]"`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import html_page
from .tables import percent as plain_percent

SOURCE = "Fei, Razeghi and Singh, Nudging: Inference-time Alignment of LLMs via Guided Decoding, arXiv 2410.09300"

_WITHOUT_LARGE = (
    " They are those of a large aligned model, and here there is none. So the nudging model's lack of skill counts as "
    "disagreement too, and where the base is sure of itself, it may be the one that is right."
)

# These are Okabe and Ito's colours, which people with colour blindness can tell apart too.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"


def write(folder: Path, tables: Mapping[str, Any], about: Mapping[str, str]) -> Path:
    """Writes `tables.json`, each plot as a PNG, and `report.html`, which contains the plots and needs no other file.

    Args:
        folder: a folder that exists.
        tables: the figures, as [`~analysis.tables`] returns them.
        about: further facts that the page states about the analysis, by name, such as `{"base": "gemma-2-27b"}`.

    Returns:
        The path of the page.

    Raises:
        ImportError: without matplotlib, naming the extra to install.
    """
    images = plots(tables)
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    text = json.dumps({"about": dict(about), **tables}, ensure_ascii=False, indent=1)
    (folder / "tables.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    page = folder / "report.html"
    html_page.write(page, render(tables, about, images))
    return page


def paper_comparison(tables: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that the paper reports too: what each is, the paper's value, and the value here."""
    lowest = tables["bins"][0]
    half = next(row for row in tables["thresholds"] if row["threshold"] == 0.5)
    return [
        (
            "disagreement of base and aligned model at positions with p\u00a0<\u00a00.1",
            "90\u00a0%",
            percent(lowest["disagreement"]),
        ),
        (
            "share of alignment-related positions that have p\u00a0<\u00a00.5",
            "over 80\u00a0%",
            percent(half["caught"]),
        ),
        ("share of all positions that have p\u00a0<\u00a00.5", "11\u00a0%", percent(half["positions"])),
        (
            "agreement of small and large aligned model at alignment-related positions",
            "65 to 83\u00a0% (Llama-2), 58 to 88\u00a0% (Gemma-2)",
            percent(tables["agreement"]["alignment_related"]),
        ),
    ]


def percent(share: float | None) -> str:
    """A share as text that stays on one line; "-" if it is the share of nothing."""
    return plain_percent(share, digits=0 if share in (0, 1) else 1).replace("%", "\u00a0%")


# Plots --------------------------------------------------------------------------------------------------------------


def plots(tables: Mapping[str, Any]) -> dict[str, bytes]:
    """All plots by name, as PNG files.

    Raises:
        ImportError: without matplotlib, naming the extra to install.
    """
    drawn = {
        "positions": _draw(_positions, tables),
        "disagreement": _draw(_disagreement, tables),
        "caught": _draw(_caught, tables),
    }
    if tables["agreement"]["alignment_related"] is not None:
        drawn["agreement"] = _draw(_agreement, tables)
    if tables["curve"]:
        drawn["thresholds"] = _draw(_curve, tables)
    return drawn


def plot_calibration(found: Any) -> bytes:
    """A plot of a [`~calibration.Calibration`] as a PNG file: the nudge rate, and any score, against the threshold.

    Raises:
        ImportError: without matplotlib, naming the extra to install.
    """
    return _draw(_calibration, found)


def require_matplotlib() -> None:
    """Checks that plots can be drawn, so that a long run fails at its start.

    Raises:
        ImportError: without matplotlib, naming the extra to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "nudging-hf[analysis]".') from error


def _draw(plot: Any, figures: Any) -> bytes:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=144, layout="constrained")  # pyplot would set a backend and global state.
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4")
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
    axes.axvline(found.threshold, color="black", linewidth=0.8, label=f"chosen: {found.threshold:g}")
    axes.set(xlabel=f"nudge_threshold of {found.nudge_gate}", ylabel="share", ylim=(0, 1.02))
    axes.legend()


def _positions(axes: Any, tables: Mapping[str, Any]) -> None:
    _bars(axes, tables, "share", [percent(row["share"]) for row in tables["bins"]], _BLUE)
    _finish(axes, "of all positions (%)")


def _disagreement(axes: Any, tables: Mapping[str, Any]) -> None:
    _bars(axes, tables, "disagreement", _labels(tables, "disagreement", of="compared"), _ORANGE)
    _mean_line(axes, tables["along"]["disagreement"], "all positions")
    _finish(axes, "base and aligned disagree (%)", whole=True)


def _agreement(axes: Any, tables: Mapping[str, Any]) -> None:
    _bars(axes, tables, "small_agreement", _labels(tables, "small_agreement", of="small_compared"), _GREEN)
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
        styles = {"base": ":", "nudging model": "--", "large aligned": "-."}
        for name, style in styles.items():
            if (alone := tables["alone"][name]) is not None:
                axes.axhline(100 * alone, color=_GREY, linestyle=style, linewidth=1.2, label=f"accuracy, {name} alone")
    axes.plot(at, _percents(rows, "nudged_words"), color=_BLUE, marker="s", label="nudged words")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(axes, "accuracy, nudged words (%)", "threshold γ", whole=True)


def _percents(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float("nan") if row[name] is None else 100 * row[name] for row in rows]


def _bars(axes: Any, tables: Mapping[str, Any], name: str, labels: Sequence[str], color: str) -> None:
    """Draws a bar for each bin, with a label above it."""
    centres = [(row["from"] + row["to"]) / 2 for row in tables["bins"]]
    bars = axes.bar(centres, _percents(tables["bins"], name), width=0.09, color=color)
    axes.bar_label(bars, labels, fontsize=7, padding=2)


def _labels(tables: Mapping[str, Any], name: str, of: str) -> list[str]:
    """Each bar's share, and how many positions it is a share of, which the bin counts under `of`."""
    return ["" if row[name] is None else f"{percent(row[name])}\nof {row[of]:,}" for row in tables["bins"]]


def _mean_line(axes: Any, mean: float | None, whose: str) -> None:
    if mean is not None:
        axes.axhline(100 * mean, color=_GREY, linestyle="--", linewidth=1, label=f"{whose}: {percent(mean)}")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))  # The legend stands above the bars.


def _finish(axes: Any, y: str, x: str = "the base's top-1 probability p", whole: bool = False) -> None:
    """Sets the labels and ranges of the axes. If `whole` is true, y goes up to 100 %."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([i / 10 for i in range(11)])
    if whole:
        axes.set_ylim(0, 116)  # This leaves room for the labels of bars.
        axes.set_yticks(range(0, 101, 20))


# The page -----------------------------------------------------------------------------------------------------------


class _Section(NamedTuple):
    """A section of the page.

    Args:
        title, text: the heading, and the paragraph under it.
        image: the name of a plot and its alternative text, if there is a plot.
        head, rows: the header and the rows of a table, if there is one.
    """

    title: str
    text: str
    image: tuple[str, str] | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def render(tables: Mapping[str, Any], about: Mapping[str, str], images: Mapping[str, bytes]) -> str:
    """The page as HTML, with all images embedded.

    Args:
        tables, about: see [`write`].
        images: the plots, as [`plots`] returns them.
    """
    along = tables["along"]
    large = along["writer"] == "large aligned"
    whose = "large aligned model's" if large else f"nudged (γ = {along['threshold']:g})"
    aligned = "large aligned model" if large else "nudging model"
    sections = [
        _Section(
            "Compared with the paper",
            f"The paper's figures are from {SOURCE}." + ("" if large else _WITHOUT_LARGE),
            head=("", "paper", "here"),
            rows=paper_comparison(tables),
        ),
        _Section(
            "How sure the base is",
            f"{along['positions']:,} positions along the {whose} answers to {tables['prompts']} prompts.",
            ("positions", "Share of positions by the base's top-1 probability"),
        ),
        _Section(
            "Where base and aligned model disagree",
            f"A position is alignment-related if the base's greedy token is not the {aligned}'s. The plot shows the "
            f"share of such positions. {along['compared']:,} positions were compared, and "
            f"{along['alignment_related']:,} are alignment-related.",
            ("disagreement", "Disagreement of base and aligned model by the base's top-1 probability"),
        ),
        _Section(
            "What a threshold catches",
            "If every position with p < γ were nudged, these would be the nudged shares of all positions and of the "
            "alignment-related ones.",
            ("caught", "Alignment-related positions caught, and positions nudged, by threshold"),
        ),
    ]
    if "agreement" in images:
        agreement = tables["agreement"]
        sections.append(
            _Section(
                "Whether the small model can stand in for the large",
                f"Both can be compared at {agreement['alignment_related_compared']:,} alignment-related positions. "
                f"They agree on {percent(agreement['alignment_related'])} of them, and on "
                f"{percent(agreement['elsewhere'])} of the other positions.",
                ("agreement", "Agreement of small and large aligned model"),
            )
        )
    if "thresholds" in images:
        sections.append(_thresholds(tables))
    shares = ("share", "disagreement", "small_agreement")
    sections.append(
        _Section(
            "By the base's top-1 probability",
            _how_compared(large),
            head=("p", "positions", "of all", "disagree", "small and large agree"),
            rows=[
                (
                    f"{row['from']:g} to {row['to']:g}",
                    f"{row['positions']:,}",
                    *(percent(row[name]) for name in shares),
                )
                for row in tables["bins"]
            ],
        )
    )
    return html_page.render(
        _TEMPLATE,
        title="Nudging: analysis of a pair",
        style=_STYLE,
        about=list(about.items()),
        sections=sections,
        images={name: base64.b64encode(image).decode("ascii") for name, image in images.items()},
    )


def _thresholds(tables: Mapping[str, Any]) -> _Section:
    rows = tables["curve"]
    names = {"accuracy": "accuracy", "nudged_words": "nudged words", "nudged_tokens": "nudged tokens"}
    if rows[0]["accuracy"] is None:
        del names["accuracy"]
    text = "An answer is unfinished if the limit on its length ended it."
    if "accuracy" in names:
        alone = [f"{name} {percent(share)}" for name, share in tables["alone"].items() if share is not None]
        points = 98 / tables["prompts"] ** 0.5  # 1.96 standard errors of a share of one half, in percent.
        text += (
            f" Accuracy of each model alone: {', '.join(alone)}. An accuracy on {tables['prompts']} questions is "
            f"uncertain by up to {points:.0f} points either way."
        )
    return _Section(
        "Nudged answers at each threshold",
        text,
        ("thresholds", "Accuracy and nudge rate by threshold"),
        ("γ", *names.values(), "unfinished"),
        [(f"{row['threshold']:g}", *(percent(row[name]) for name in names), str(row["unfinished"])) for row in rows],
    )


def _how_compared(large: bool) -> str:
    whose = "large one's" if large else "nudging model's, as no large one was given"
    return (
        "Positions are the base's tokens without the end mark; all models read the same answers. The aligned model's "
        f"token is the {whose}. Two greedy tokens of one vocabulary agree if they are the same. Across vocabularies "
        "they agree if the text of one is a prefix of the text of the other, and only positions where a token starts "
        "in both are compared. The last column counts only the alignment-related positions."
    )


_TEMPLATE = """\
{% extends "page" %}
{% block policy %}; img-src data:{% endblock %}
{% block header %}
<dl>{% for name, value in about %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
<p>p is the probability of the base's most probable token. Nudging lets the small model write where p is below a \
threshold γ. The paper observes three things: the base is mostly sure; where it is not, it and the aligned model \
disagree; and there the small aligned model says what the large one would.</p>
{% endblock %}
{% block main %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
{% if section.image %}
<img src="data:image/png;base64,{{ images[section.image[0]] }}" alt="{{ section.image[1] }}">
{% endif %}
{% if section.rows %}
<table>
<thead><tr>{% for cell in section.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
</section>
{% endfor %}
{% endblock %}
"""

_STYLE = """:root { color-scheme: light; --ink: #1b1b1b; --faint: #5c5c5c; --rule: #d8d8d8; }
body { margin: 0 auto; max-width: 48rem; padding: 1.5rem 1.25rem 4rem; background: #fff; color: var(--ink);
  font: 1.0625rem/1.6 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 0 0 .35rem; }
section { border-top: 1px solid var(--rule); margin-top: 1.5rem; padding-top: 1rem; }
header p { margin: .75rem 0 0; font-size: .95rem; }
section p { margin: 0 0 .75rem; color: var(--faint); font-size: .95rem; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .15rem 1.5rem; margin: 0;
  font-size: .9rem; color: var(--faint); }
dl div { display: flex; gap: .4rem; }
dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
"""
