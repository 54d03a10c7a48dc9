"""Turns the journal's rows into figures: JSON, Markdown tables and a plot. It knows rows, never models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from racers import ADAPTIVE, ALONE, BASE, OWN, RACERS, SHARED, nudged_racer
from scenarios import CONTEXTS, FAR_WIDTHS, LONG_BIN, PASS_WIDTHS

from nudging_hf.study.bench import by_call, median_of, rate_against, tokens_of
from nudging_hf.study.tables import markdown_table

Row = dict[str, Any]
FAR = 32768  # The number of tokens for which the cost of long text is computed.
NUDGED = {small: nudged_racer(small, ADAPTIVE).name for small in (SHARED, OWN)}


def summary(rows: Sequence[Row]) -> Row:
    """All figures, in a form that JSON can represent."""
    races = sorted({(row["dtype"], row["batch"]) for row in rows if _is_timed_race(row)}, key=_race_order)
    figures = {
        "passes": [row for row in rows if row["scenario"] == "passes"],
        "races": [_race(rows, dtype, batch) for dtype, batch in races],
        "memory": [_needed(row) for row in rows if row["scenario"] == "memory"],
        "agreement": _agreement([row for row in rows if row["scenario"] == "agreement"]),
        "hopeless": _hopeless([row for row in rows if row["scenario"] == "hopeless"]),
        "long": _long([row for row in rows if row["scenario"] == "long"]),
    }
    figures["far"] = _far(figures)
    return figures


def _is_timed_race(row: Row) -> bool:
    return row["scenario"] == "race" and "seconds" in row


def _race_order(race: tuple[str, int]) -> tuple[int, str]:
    return race[1], race[0]


# The race -----------------------------------------------------------------------------------------------------------


def _race(rows: Sequence[Row], dtype: str, batch: int) -> Row:
    timed = [row for row in rows if _is_timed_race(row) and (row["dtype"], row["batch"]) == (dtype, batch)]
    by_name = {each.name: [row for row in timed if row["contestant"] == each.name] for each in RACERS}
    alone = by_name[ALONE.name]
    tasks = sorted({row["task"] for row in timed})
    found = []
    for contestant in RACERS:
        own = by_name[contestant.name]
        if not own or not alone:
            continue
        tokens, seconds = sum(map(tokens_of, own)), sum(row["seconds"] for row in own)
        by_task = {
            task: rate_against(
                [row for row in own if row["task"] == task], [row for row in alone if row["task"] == task]
            )["ratio"]
            for task in tasks
            if any(row["task"] == task for row in own) and any(row["task"] == task for row in alone)
        }
        in_passes = sum(row[size]["seconds"] for row in own for size in ("large", "small"))
        found.append({
            "contestant": contestant.name,
            "runs": len(own),
            **rate_against(own, alone),
            "by_task": by_task,
            **{
                f"{size}_{what}_per_token": sum(row[size][what] for row in own) / tokens
                for size in ("large", "small")
                for what in ("passes", "fed")
            },
            "outside_passes": 1 - in_passes / seconds,
            **_memory(own),
        })  # fmt: skip
    drafted = {
        small: [each for each in RACERS if each.draft is not None and each.draft[0] == small]
        for small in (SHARED, OWN)
    }
    return {
        "dtype": dtype,
        "batch": batch,
        "contestants": found,
        "limits": {small: _limit(by_name, [each.name for each in drafted[small]]) for small in drafted},
        "differing_answers": {
            small: _differing([row for each in drafted[small] for row in by_name[each.name]]) for small in drafted
        },
    }


def _memory(rows: Sequence[Row]) -> Row:
    """The largest peak, which is the weights and the process's growth, and its ratio to weights and full caches."""
    measured = [row for row in rows if row["extra_bytes"] is not None]
    if not measured:
        return {"peak_bytes": None, "peak_over_weights_and_caches": None}
    peak = max(measured, key=lambda row: row["extra_bytes"])
    total = peak["weight_bytes"] + peak["extra_bytes"]
    return {
        "peak_bytes": total,
        "peak_over_weights_and_caches": total / (peak["weight_bytes"] + peak["cache_bytes"]),
    }


def _needed(row: Row) -> Row:
    shares = {name: _memory([peak])["peak_over_weights_and_caches"] for name, peak in row["contestants"].items()}
    return {"dtype": row["dtype"], "batch": row["batch"], "peak_over_weights_and_caches": shares}


def _limit(by_name: dict[str, list[Row]], names: Sequence[str]) -> Row | None:
    """Compares the adaptive draft length with the fixed one that was best in hindsight.

    All seconds of the adaptive one count, but of the fixed one only those in forward passes.
    """
    adaptive, *fixed = [by_call(by_name[name]) for name in names]
    calls = sorted(adaptive)
    fixed_names = [name for name, each in zip(names[1:], fixed, strict=True) if set(each) >= set(calls)]
    if not calls or not fixed_names:
        return None

    def in_passes(row: Row) -> float:
        return (row["large"]["seconds"] + row["small"]["seconds"]) / tokens_of(row)

    limits = {
        name: sum(median_of(each[call], in_passes) for call in calls)
        for name, each in zip(names[1:], fixed, strict=True)
        if name in fixed_names
    }
    best = min(limits, key=lambda name: limits[name])
    own = sum(median_of(adaptive[call], lambda row: row["seconds"] / tokens_of(row)) for call in calls)
    return {"best_fixed": best, "adaptive_over_limit": own / limits[best]}


def _differing(rows: Sequence[Row]) -> Row:
    """How many answers of a pair differ from what most runs gave to the question, over all draft lengths."""
    differing = total = 0
    for call in by_call(rows).values():
        for answers in zip(*(row["answers"] for row in call), strict=True):
            differing += len(answers) - max(answers.count(each) for each in set(answers))
            total += len(answers)
    return {"differing": differing, "of": total}


# The others ---------------------------------------------------------------------------------------------------------


def _agreement(rows: Sequence[Row]) -> list[Row]:
    found = []
    for noise, threshold in sorted({(row["noise"], row["threshold"]) for row in rows}):
        own = [row for row in rows if (row["noise"], row["threshold"]) == (noise, threshold)]
        found.append({
            "noise": noise,
            "threshold": threshold,
            "agreement": statistics.mean(row["agreement"] for row in own),
            "nudge_rate": statistics.mean(row["nudge_rate"] for row in own),
            "ratio": sum(row["alone_seconds"] for row in own) / sum(row["seconds"] for row in own),
            "dtype": own[0]["dtype"],
        })  # fmt: skip
    return found


def _hopeless(rows: Sequence[Row]) -> list[Row]:
    alone = [row for row in rows if row["contestant"] == ALONE.name]
    names = dict.fromkeys(row["contestant"] for row in rows)
    return [
        {"contestant": name, **rate_against([row for row in rows if row["contestant"] == name], alone)}
        for name in names
        if alone
    ]


def _long(rows: Sequence[Row]) -> list[Row]:
    found = []
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [row for row in rows if row["contestant"] == name]
        starts = [0, *own[0]["tokens"]]
        sizes = [late - early for early, late in zip(starts, own[0]["tokens"], strict=False)]
        found.append({
            "contestant": name,
            "tokens": own[0]["tokens"],
            "seconds_per_token": [
                statistics.median(row["seconds"][i] for row in own) / size for i, size in enumerate(sizes)
            ],
            "large_passes_per_token": own[0]["large"] / own[0]["tokens"][-1],
            "outside_passes": statistics.median(1 - row["in_passes"] / row["total"] for row in own),
        })  # fmt: skip
    return found


def _far(figures: Row) -> list[Row]:
    """The seconds per token with FAR tokens in the cache, computed by a cost model.

    The passes per token are those of the race. The seconds of a pass are extrapolated by the straight line through
    those measured at both CONTEXTS.
    """
    found = []
    for measured in figures["passes"]:
        race = next((r for r in figures["races"] if (r["dtype"], r["batch"]) == (measured["dtype"], 1)), None)
        own = race and next((c for c in race["contestants"] if c["contestant"] == NUDGED[SHARED]), None)
        if not own:
            continue
        width = min(FAR_WIDTHS, key=lambda w: abs(w - own["large_fed_per_token"] / own["large_passes_per_token"]))
        alone = _seconds_far(measured, BASE, 1)
        nudged = own["large_passes_per_token"] * _seconds_far(measured, BASE, width)
        nudged += own["small_passes_per_token"] * _seconds_far(measured, SHARED, 1)
        found.append({"dtype": measured["dtype"], "tokens": FAR, "base_alone": alone, "nudged": nudged})
    return found


def pass_seconds(measured: Row, model: str, rows: int, width: int, context: int) -> float | None:
    """The median seconds of one kind of pass, if it was measured."""
    shape = {"model": model, "rows": rows, "width": width, "context": context}
    return next((p["seconds"][1] for p in measured["passes"] if shape.items() <= p.items()), None)


def _seconds_far(measured: Row, model: str, width: int) -> float:
    near, far = (pass_seconds(measured, model, 1, width, context) for context in CONTEXTS)
    assert near is not None and far is not None
    return near + (far - near) * (FAR - CONTEXTS[0]) / (CONTEXTS[1] - CONTEXTS[0])


# Tables and plot ----------------------------------------------------------------------------------------------------


def markdown(setup: Row, figures: Row) -> str:
    """The setup, followed by all tables."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in setup.items() if name not in ("code", "questions"))]
    for measured in figures["passes"]:
        parts.append(_passes_table(measured))
    for race in figures["races"]:
        parts.append(_race_table(race))
    if figures["memory"]:
        parts.append(_memory_table(figures["memory"]))
    if figures["hopeless"]:
        parts.append(
            "A pair that drafting cannot help (γ = 0, and each token of the nudging model is replaced by another):\n\n"
            + markdown_table(
                ["", "tokens/s", "× base alone", "quartiles"],
                [[h["contestant"], f"{h['tokens_per_second']:.2f}", *_ratio(h)] for h in figures["hopeless"]],
            )
        )
    if figures["agreement"]:
        parts.append(
            f"Speed-up against agreement ({figures['agreement'][0]['dtype']}, batch 1). The nudging model's weights "
            "are mixed with noise. Agreement is the share of the answer's tokens that it would have written itself."
            "\n\n"
            + markdown_table(
                ["noise", "γ", "agreement", "nudged tokens", "× base alone"],
                [
                    [
                        f"{a['noise']:.0%}",
                        str(a["threshold"]),
                        f"{a['agreement']:.0%}",
                        f"{a['nudge_rate']:.0%}",
                        f"{a['ratio']:.2f}",
                    ]
                    for a in figures["agreement"]
                ],
            )
        )
    if figures["long"]:
        parts.append(_long_table(figures))
    return "\n\n".join(parts) + "\n"


def _passes_table(measured: Row) -> str:
    rows = [
        [
            str(p["model"]), str(p["rows"]), str(p["width"]), str(p["context"]), f"{1000 * p['seconds'][1]:.1f}",
            f"{p['seconds'][1] / (pass_seconds(measured, BASE, 1, 1, p['context']) or float('nan')):.2f}",
        ]
        for p in measured["passes"]
    ]  # fmt: skip
    sizes = ", ".join(f"{name} {count / 1e6:.0f} M" for name, count in measured["parameters"].items())
    return f"Forward passes in {measured['dtype']} ({sizes} parameters):\n\n" + markdown_table(
        ["model", "rows", "tokens a row", "in the cache", "ms", "× base, 1 row, 1 token"], rows
    )


def _race_table(race: Row) -> str:
    header = [
        "", "tokens/s", "× base alone", "quartiles", "worst task", "large: passes/token", "fed/token",
        "small: passes/token", "outside passes", "peak GB", "/ weights + caches",
    ]  # fmt: skip
    rows = [
        [
            c["contestant"],
            f"{c['tokens_per_second']:.2f}",
            *_ratio(c),
            f"{min(c['by_task'].values()):.2f}",
            f"{c['large_passes_per_token']:.2f}",
            f"{c['large_fed_per_token']:.2f}",
            f"{c['small_passes_per_token']:.2f}",
            f"{c['outside_passes']:.1%}",
            "–" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 1e9:.2f}",
            _share(c["peak_over_weights_and_caches"]),
        ]
        for c in race["contestants"]
    ]
    notes = []
    for small, name in NUDGED.items():
        if (limit := race["limits"][small]) is not None:
            notes.append(
                f"{name}: it takes {limit['adaptive_over_limit']:.2f} times the limit, which is the time in passes of "
                f"“{limit['best_fixed']}”."
            )
        if (answers := race["differing_answers"][small])["differing"]:
            notes.append(
                f"**{name}: {answers['differing']} of {answers['of']} ANSWERS DIFFER by draft length or run.**"
            )
    return "\n\n".join([f"{race['dtype']}, batch {race['batch']}:", markdown_table(header, rows), *notes])


def _memory_table(measured: Sequence[Row]) -> str:
    shares = [each["peak_over_weights_and_caches"] for each in measured]
    return "Peak memory in a separate process, as a multiple of weights and caches:\n\n" + markdown_table(
        ["", *(f"{each['dtype']}, batch {each['batch']}" for each in measured)],
        [[name, *(_share(each[name]) for each in shares)] for name in shares[0]],
    )


def _long_table(figures: Row) -> str:
    longs = figures["long"]
    rows = [
        [str(tokens), *(f"{1000 * each['seconds_per_token'][i]:.2f}" for each in longs)]
        for i, tokens in enumerate(longs[0]["tokens"])
    ]
    text = "Milliseconds per token as an answer grows (the mini pair, not widened, float32):\n\n" + markdown_table(
        ["tokens", *(each["contestant"] for each in longs)], rows
    )
    for far in figures["far"]:
        text += (
            f"\n\nThe cost model gives for the widened pair in {far['dtype']} at {far['tokens']} tokens: base alone "
            f"{far['base_alone']:.2f} s per token, nudged {far['nudged']:.2f}."
        )
    return text


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ratio(row: Row) -> list[str]:
    low, _, high = row["quartiles"]
    return [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]


def plot(figures: Row, path: Path) -> None:
    """Plots races, passes, agreement and long text, as far as there are figures of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), layout="constrained")
    (race_axes, pass_axes), (agreement_axes, long_axes) = figure.subplots(2, 2)
    names = [each.name for each in RACERS]
    for i, race in enumerate(figures["races"]):
        ratios = {c["contestant"]: c for c in race["contestants"]}
        places = [len(names) - n + 0.8 * i / len(figures["races"]) for n, name in enumerate(names) if name in ratios]
        found = [ratios[name] for name in names if name in ratios]
        spread = [[abs(c["ratio"] - c["quartiles"][side]) for c in found] for side in (0, 2)]
        race_axes.barh(
            places, [c["ratio"] for c in found], 0.8 / len(figures["races"]), xerr=spread, align="edge",
            label=f"{race['dtype']}, batch {race['batch']}",
        )  # fmt: skip
    race_axes.set_yticks([len(names) - n + 0.4 for n in range(len(names))], names, fontsize=8)
    race_axes.axvline(1, color="black", linewidth=0.8)
    race_axes.set(title="Tokens a second, against the base alone", xlabel="× base alone")
    for measured in figures["passes"]:
        one = pass_seconds(measured, BASE, 1, 1, CONTEXTS[0]) or float("nan")
        costs = [(w, pass_seconds(measured, BASE, 1, w, CONTEXTS[0])) for w in PASS_WIDTHS]
        known = [(w, cost / one) for w, cost in costs if cost is not None]
        pass_axes.plot(*zip(*known, strict=True), marker="o", label=measured["dtype"])
    pass_axes.set(title="A pass of the base", xlabel="tokens", ylabel="× a pass of one token", ylim=(0, None))
    for threshold in sorted({a["threshold"] for a in figures["agreement"]}):
        points = sorted((a["agreement"], a["ratio"]) for a in figures["agreement"] if a["threshold"] == threshold)
        agreement_axes.plot(*zip(*points, strict=True), marker="o", label=f"γ = {threshold}")
    agreement_axes.axhline(1, color="black", linewidth=0.8)
    agreement_axes.set(
        title="Speed-up against agreement", xlabel="tokens of the answer that the nudging model would write itself",
        ylabel="× base alone", ylim=(0, None),
    )  # fmt: skip
    for each in figures["long"]:
        middles = [tokens - LONG_BIN / 2 for tokens in each["tokens"]]
        long_axes.plot(middles, [1000 * s for s in each["seconds_per_token"]], marker=".", label=each["contestant"])
    long_axes.set(title="Long text, unwidened pair", xlabel="new tokens", ylabel="ms a token", ylim=(0, None))
    for axes in (race_axes, pass_axes, agreement_axes, long_axes):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        else:  # Nothing was measured for this plot.
            axes.remove()
    figure.savefig(path, dpi=110, bbox_inches="tight")
