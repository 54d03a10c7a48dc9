"""An analysis as plots and as one page of HTML. It knows figures, never models.

Needs matplotlib: `pip install "nudging-hf[analysis]"`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

SOURCE = "Fei, Razeghi and Singh, Nudging: Inference-time Alignment of LLMs via Guided Decoding, arXiv 2410.09300"

_WITHOUT_LARGE = (
    " They are of a large aligned model, and here there is none: what the nudging model lacks in skill counts as "
    "disagreement too, and a base that is sure of itself may be right there."
)

_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"  # Okabe and Ito's: told apart by everybody.

_ABOVE: dict[str, Any] = {"frameon": False, "loc": "lower right", "bbox_to_anchor": (1, 1)}  # A legend off the bars.


def write(folder: Path, tables: Mapping[str, Any], about: Mapping[str, str]) -> Path:
    """Writes `tables.json`, each plot as a PNG, and `report.html`, which needs nothing but itself.

    Args:
        folder: where to; it must exist.
        tables: as [`~analysis.tables`] gives them.
        about: what else to say of the analysis, by name, such as `{"base": "gemma-2-27b"}`.

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
    page.write_text(render(tables, about, images), encoding="utf-8", newline="\n")
    return page


def paper_comparison(tables: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the paper reports beside what was found here: what it is, the paper's figure, and this one."""
    lowest = tables["bins"][0]
    half = next(row for row in tables["thresholds"] if row["threshold"] == 0.5)
    return [
        (
            "base and aligned model disagree, of positions with p\u00a0<\u00a00.1",
            "90\u00a0%",
            percent(lowest["disagreement"]),
        ),
        ("alignment-related positions that p\u00a0<\u00a00.5 catches", "over 80\u00a0%", percent(half["caught"])),
        ("positions with p\u00a0<\u00a00.5, of all", "11\u00a0%", percent(half["positions"])),
        (
            "small and large aligned model agree, of alignment-related positions",
            "65 to 83\u00a0% (Llama-2), 58 to 88\u00a0% (Gemma-2)",
            percent(tables["agreement"]["alignment_related"]),
        ),
    ]


def percent(share: float | None) -> str:
    """A share as text, on one line; "-" where it is the share of nothing."""
    if share is None:
        return "-"
    return f"{100 * share:.0f}\u00a0%" if share in (0, 1) else f"{100 * share:.1f}\u00a0%"


# Plots --------------------------------------------------------------------------------------------------------------


def plots(tables: Mapping[str, Any]) -> dict[str, bytes]:
    """All plots, by name, as PNG.

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
    """A [`~calibration.Calibration`] as PNG: nudge rate, and the score where there is one, against the threshold.

    Raises:
        ImportError: without matplotlib, naming the extra to install.
    """
    return _draw(_calibration, found)


def require_matplotlib() -> None:
    """Refuses now what would else be refused when there is something to draw.

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

    figure = Figure(figsize=(7, 3.6), dpi=144, layout="constrained")  # Without pyplot: no backend and no state.
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
    bars = axes.bar(_centres(tables), _percents(tables["bins"], "share"), width=0.09, color=_BLUE)
    axes.bar_label(bars, [percent(row["share"]) for row in tables["bins"]], fontsize=7, padding=2)
    _finish(axes, "of all positions (%)")


def _disagreement(axes: Any, tables: Mapping[str, Any]) -> None:
    bars = axes.bar(_centres(tables), _percents(tables["bins"], "disagreement"), width=0.09, color=_ORANGE)
    _label_bars(axes, bars, tables, "disagreement", of="compared")
    if (mean := tables["along"]["disagreement"]) is not None:
        axes.axhline(100 * mean, color=_GREY, linestyle="--", linewidth=1, label=f"all positions: {percent(mean)}")
        axes.legend(**_ABOVE)
    _finish(axes, "base and aligned disagree (%)", whole=True)


def _agreement(axes: Any, tables: Mapping[str, Any]) -> None:
    bars = axes.bar(_centres(tables), _percents(tables["bins"], "small_agreement"), width=0.09, color=_GREEN)
    _label_bars(axes, bars, tables, "small_agreement", of="small_compared")
    mean = tables["agreement"]["alignment_related"]
    label = f"all alignment-related positions: {percent(mean)}"
    axes.axhline(100 * mean, color=_GREY, linestyle="--", linewidth=1, label=label)
    axes.legend(**_ABOVE)
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


def _centres(tables: Mapping[str, Any]) -> list[float]:
    return [(row["from"] + row["to"]) / 2 for row in tables["bins"]]


def _percents(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float("nan") if row[name] is None else 100 * row[name] for row in rows]


def _label_bars(axes: Any, bars: Any, tables: Mapping[str, Any], name: str, of: str) -> None:
    """Above each bar what it shows, and of how many positions: those that the bin counts under `of`."""
    rows = tables["bins"]
    labels = ["" if row[name] is None else f"{percent(row[name])}\nof {row[of]:,}" for row in rows]
    axes.bar_label(bars, labels, fontsize=7, padding=2)


def _finish(axes: Any, y: str, x: str = "the base's top-1 probability p", whole: bool = False) -> None:
    """Labels, and the range of the axes; `whole` says that y goes up to 100 %."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([i / 10 for i in range(11)])
    if whole:
        axes.set_ylim(0, 116)  # Room for the labels of bars.
        axes.set_yticks(range(0, 101, 20))


# The page -----------------------------------------------------------------------------------------------------------


def render(tables: Mapping[str, Any], about: Mapping[str, str], images: Mapping[str, bytes]) -> str:
    """The page, with all images inside.

    Args:
        tables, about: see [`write`].
        images: as [`plots`] gives them.
    """
    along = tables["along"]
    large = along["writer"] == "large aligned"
    whose = "large aligned model's" if large else f"nudged (γ = {along['threshold']:g})"
    aligned = "large aligned model" if large else "nudging model"
    sections = [
        _section(
            "Beside the paper",
            _table(("", "paper", "here"), paper_comparison(tables)),
            f"The paper's figures: {escape(SOURCE)}." + ("" if large else _WITHOUT_LARGE),
        ),
        _section(
            "How sure the base is",
            _image(images, "positions", "Share of positions by the base's top-1 probability"),
            f"{along['positions']:,} positions along the {whose} answers to {tables['prompts']} prompts.",
        ),
        _section(
            "Where base and aligned model disagree",
            _image(images, "disagreement", "Disagreement of base and aligned model by the base's top-1 probability"),
            f"The share of positions where the base's greedy token is not the {aligned}'s: alignment-related ones. "
            f"{along['compared']:,} positions were compared, {along['alignment_related']:,} are alignment-related.",
        ),
        _section(
            "What a threshold catches",
            _image(images, "caught", "Alignment-related positions caught, and positions nudged, by threshold"),
            "A nudge wherever p < γ would fall on this share of all positions, and on this share of the "
            "alignment-related ones.",
        ),
    ]
    if "agreement" in images:
        agreement = tables["agreement"]
        sections.append(
            _section(
                "Whether the small model can stand in for the large",
                _image(images, "agreement", "Agreement of small and large aligned model"),
                f"Of the {agreement['alignment_related_compared']:,} alignment-related positions where both can be "
                f"compared, they agree on {percent(agreement['alignment_related'])}; elsewhere on "
                f"{percent(agreement['elsewhere'])}.",
            )
        )
    if "thresholds" in images:
        sections.append(_thresholds(tables, images))
    sections.append(
        _section(
            "By the base's top-1 probability",
            _table(
                ("p", "positions", "of all", "disagree", "small and large agree"),
                [
                    (
                        f"{row['from']:g} to {row['to']:g}",
                        f"{row['positions']:,}",
                        *(percent(row[name]) for name in ("share", "disagreement", "small_agreement")),
                    )
                    for row in tables["bins"]
                ],
            ),
            _how_compared(large),
        )
    )
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in about.items())
    return _PAGE.format(style=_STYLE, facts=facts, sections="\n".join(sections))


def _thresholds(tables: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    rows = tables["curve"]
    names = {"accuracy": "accuracy", "nudged_words": "nudged words", "nudged_tokens": "nudged tokens"}
    if rows[0]["accuracy"] is None:
        del names["accuracy"]
    table = _table(
        ("γ", *names.values(), "unfinished"),
        [(f"{row['threshold']:g}", *(percent(row[name]) for name in names), str(row["unfinished"])) for row in rows],
    )
    text = "An answer is unfinished where the limit on its length ended it."
    if "accuracy" in names:
        alone = [f"{name} {percent(share)}" for name, share in tables["alone"].items() if share is not None]
        points = 98 / tables["prompts"] ** 0.5  # 1.96 / 2, of a share at its most uncertain
        text += (
            f" Accuracy of each model alone: {', '.join(alone)}. An accuracy on {tables['prompts']} questions is "
            f"uncertain by up to {points:.0f} points either way."
        )
    return _section(
        "Nudged answers at each threshold",
        _image(images, "thresholds", "Accuracy and nudge rate by threshold") + table,
        text,
    )


def _how_compared(large: bool) -> str:
    whose = "large one's" if large else "nudging model's, as no large one was given"
    return (
        "Positions are the base's tokens, the end mark left out; all models read the same answers. The aligned "
        f"model's token is the {whose}. Two greedy tokens agree, in one vocabulary, if they are the same; across "
        "vocabularies, if the text of one is a prefix of the text of the other, and only positions are compared where "
        "a token starts in both. The last column is of the alignment-related positions."
    )


def _section(title: str, body: str, text: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{text}</p>\n{body}\n</section>"


def _image(images: Mapping[str, bytes], name: str, alt: str) -> str:
    data = base64.b64encode(images[name]).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>\n<thead>{line(head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


# The policy makes sure that the page loads and runs nothing.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Nudging: analysis of a pair</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>Nudging: analysis of a pair</h1>
<dl>{facts}</dl>
<p>p is the probability of the base's most probable token. Nudging lets the small model write where p is below a \
threshold γ. The paper observes three things: that the base is mostly sure, that it and the aligned model disagree \
where it is not, and that there the small aligned model says what the large one would.</p>
</header>
<main>
{sections}
</main>
</body>
</html>
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
