"""Tables and plots over the results of `selection_regret.py`: what each way of selecting loses."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Row = dict[str, Any]
Tap = tuple[int, str]
Place = tuple[str, int, str]  # pair, block, feature

DEFAULT = "consensus"
OWN = ", own images"
TAPS = "tap and timestep: "
# The figures of a row, by the truth that they are measured against.
LOSSES = {"linear head": "loss", "attention head": "attention_loss"}


def summarize(folder: Path) -> str:
    """Return tables over the results in a folder, and draw each pair.

    Raises:
        ValueError: If there are no results.
    """
    pairs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not pairs:
        raise ValueError(f"There are no results in {str(folder)!r}; run the benchmark on some pairs first.")
    for name, pair in pairs.items():
        draw(pair, folder / f"{name}.png")
    rows = [
        {**row, "pair": name, "search": pair["search"], "once": pair["arguments"].get("looked_at_once", False)}
        for name, pair in pairs.items()
        for row in pair["rows"]
    ]
    tables = (
        table_of_bars(rows),
        overall_table(rows),
        *(table_by_pair(rows, pairs, truth) for truth in LOSSES),
        table_of_taps(rows, pairs),
        table_of_warnings(rows),
        table_of_own_images(rows, pairs),
    )
    return "\n\n".join("\n".join(table) for table in tables if table) + "\n"


def markdown(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a table under a sentence."""
    names = list(head)
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [title, "", f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}", *lines] if lines else []


def table_of_bars(rows: list[Row]) -> list[str]:
    """Return what the default is to reach, and what it reaches."""
    default = [row for row in rows if row["criterion"] == DEFAULT]
    once = [row for row in default if row["once"]]
    guesses = {row["criterion"] for row in rows if row["criterion"].startswith("t = ")}
    lines = []
    for head, key in LOSSES.items():
        for what, part, bars in (("all pairs", default, (0.5, 3.0)), ("held-out pairs", once, (0.7, 3.0))):
            mean, worst = mean_and_worst(key, part)
            lines.append((f"points lost, {head}, {what}", f"mean ≤ {bars[0]}, worst ≤ {bars[1]:g}", mean, worst, bars))
    found = [
        [what, bar, f"{mean:.2f}, {worst:.2f}", verdict(mean <= bars[0] and worst <= bars[1])]
        for what, bar, mean, worst, bars in lines
        if np.isfinite(mean)
    ]
    for head, key in LOSSES.items():
        mine = mean_and_worst(key, default)[0]
        means = {name: mean_and_worst(key, of(rows, name))[0] for name in guesses}
        best = min(means, key=lambda name: means[name], default=None)
        if best is not None:
            text = f"{mine:.2f}; best guess, {best}: {means[best]:.2f}"
            found.append([f"mean points lost, {head}, against fixed timesteps", "less than each", text])
            found[-1].append(verdict(mine < means[best]))
    silent = [row for row in default if row.get("attention_loss", 0) > 10 and not row.get("is_warned")]
    found.append(["attention head loses more than 10 points without a warning", "never", str(len(silent))])
    found[-1].append(verdict(not silent))
    selected, fixed = (mean_and_worst("tap_loss", of(rows, TAPS + name))[0] for name in (DEFAULT, "default tap"))
    if np.isfinite(selected):
        text = f"{selected:.2f}; default tap {fixed:.2f}"
        bar = "mean ≤ 1.5, and less than the default tap"
        found.append(["points lost, tap and timestep, without labels", bar, text])
        found[-1].append(verdict(selected <= 1.5 and selected < fixed))
    more = [extra for key in LOSSES.values() for extra in extra_losses(rows, DEFAULT, key)]
    if more:
        text = f"{np.mean(more):+.2f}, {max(more):+.2f}"
        found.append(["points more with images of its own", "mean ≤ 0.5, worst ≤ 2", text])
        found[-1].append(verdict(np.mean(more) <= 0.5 and max(more) <= 2))
    share = passes_saved(default)
    found.append(["forward passes, against the search", "≤ 1/100", f"1/{share:.0f}", verdict(share >= 100)])
    return markdown("The goals for the default, and what it reaches:", ("what", "bar", "found", "reached"), found)


def verdict(is_reached: Any) -> str:
    """Return whether a bar is reached, in a word."""
    return "yes" if is_reached else "no"


def overall_table(rows: list[Row]) -> list[str]:
    """Return losses over all pairs and taps, by each truth, and costs."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    once = list(dict.fromkeys(row["pair"] for row in rows if row["once"]))
    head = ["selected by"]
    for truth in LOSSES:
        head += [f"{truth}, {what}" for what in ("mean", "worst", "held out, mean", "held out, worst")]
    head += ["rank correlation", "forward passes", "seconds"]
    found = []
    for name in ordered(rows):
        own = of(rows, name)
        cells = [name]
        for key in LOSSES.values():
            for part in (own, [row for row in own if row["once"]]):
                cells += shown(*mean_and_worst(key, part))
        correlations = [row["rank_correlation"] for row in own if row["rank_correlation"] is not None]
        # Two curves have no rank correlation where one of them is level.
        correlations = [value for value in correlations if np.isfinite(value)]
        measured = [row for row in own if "num_forwards" in row]
        cells += [
            f"{np.mean(correlations):.2f}" if correlations else "",
            f"1/{passes_saved(measured):.0f}" if measured else "",
            f"{np.median([row['seconds'] for row in measured]):.1f}" if measured else "",
        ]
        found.append(cells)
    title = (
        f"Accuracy points lost over {len(pairs)} pairs and all of their taps, each of which counts once; and over "
        f"the held-out ones ({', '.join(once) or 'none'}). Passes are a share of the exhaustive "
        "search's, seconds a median, the rank correlation is over the timesteps that were read."
    )
    return markdown(title, head, found)


def table_by_pair(rows: list[Row], pairs: dict[str, Row], truth: str) -> list[str]:
    """Return the mean and worst loss by pair, by one truth."""
    key = LOSSES[truth]
    have = [pair for pair in pairs if any(key in row for row in rows if row["pair"] == pair)]
    found = [["best of all taps", *(describe_best(pairs[pair], truth) for pair in have)]]
    for name in ordered(rows, key):
        losses = [values_of(key, [row for row in of(rows, name) if row["pair"] == pair]) for pair in have]
        cells = [f"{np.mean(each):.2f} ({max(each):.2f})" if each else "" for each in losses]
        found.append([name, *cells])
    return markdown(f"Mean (worst) loss by pair, {truth}:", ("selected by", *have), found)


def table_of_taps(rows: list[Row], pairs: dict[str, Row]) -> list[str]:
    """Return what selecting the tap, too, loses against the best tap and timestep of the whole search."""
    ways = list(dict.fromkeys(row["criterion"] for row in rows if "tap_loss" in row))
    found = []
    for truth, name in (("ridge", "linear head"), ("attention", "attention head")):
        for way in ways:
            of_way = [row for row in of(rows, way) if row["truth"] == truth]
            if of_way:
                losses = [values_of("tap_loss", [row for row in of_way if row["pair"] == pair]) for pair in pairs]
                cells = [f"{np.mean(each):.2f}" if each else "" for each in losses]
                found.append(
                    [f"{way.removeprefix(TAPS)}, {name}", *shown(*mean_and_worst("tap_loss", of_way)), *cells]
                )
    title = (
        "Points lost by selecting block and feature, too, against the best tap and timestep of the whole search. "
        "*Default tap* is the configuration's block and feature, with the timestep selected there."
    )
    return markdown(title, ("tap and timestep by", "mean", "worst", *pairs), found)


def table_of_warnings(rows: list[Row]) -> list[str]:
    """Return the losses of selections that came with a warning, and of those that did not."""
    found = []
    for name in dict.fromkeys(row["criterion"] for row in rows if "is_warned" in row and "tap_loss" not in row):
        cells = [name]
        for is_warned in (False, True):
            of_them = [row for row in of(rows, name) if row["is_warned"] == is_warned]
            cells.append(str(len(of_them)))
            for key in LOSSES.values():
                losses = values_of(key, of_them)
                cells.append(f"{np.mean(losses):.2f} ({max(losses):.2f})" if losses else "")
        found.append(cells)
    head = ["selected by"]
    for kind in ("without a warning", "with one"):
        head += [kind, *LOSSES]
    return markdown("Mean (worst) loss of selections by whether they were warned of:", head, found)


def table_of_own_images(rows: list[Row], pairs: dict[str, Row]) -> list[str]:
    """Return what changes where the DiT generates the images itself."""
    found = []
    for name in dict.fromkeys(row["criterion"] for row in rows if row["criterion"].endswith(OWN)):
        given = name.removesuffix(OWN)
        for truth, key in LOSSES.items():
            cells = []
            for pair in pairs:
                more = extra_losses([row for row in rows if row["pair"] == pair], given, key)
                cells.append(f"{np.mean(more):+.2f} ({max(more):+.2f})" if more else "")
            found.append([f"{given}, {truth}", *cells])
    title = "Points lost with images that the DiT generates itself, beyond what given ones lose; mean (worst):"
    return markdown(title, ("selected by", *pairs), found)


def table_of_few_labels(folder: Path) -> str:
    """Return what a linear head loses with few labels: without their number, by the default, and at fixed timesteps.

    Args:
        folder: Results of runs with `--consensus_only`.
    """
    ways = {"number unknown": f"{DEFAULT}, number of labels unknown", "`num_train_images=100`": DEFAULT}
    ways |= {name: name for name in ("t = 50", "t = 100", "t = 300")}
    lines = []
    for path in sorted(folder.glob("*.json")):
        pair = json.loads(path.read_text(encoding="utf-8"))
        name = f"`{path.stem}`" + " (held out)" * pair["arguments"]["looked_at_once"]
        found = [
            mean_and_worst("loss", [{**row, "pair": name} for row in of(pair["rows"], way)]) for way in ways.values()
        ]
        lines.append([name, *(f"{mean:.2f} ({worst:.2f})" for mean, worst in found)])
    return "\n".join(markdown("", ["pair", *ways], lines)[2:])


def extra_losses(rows: list[Row], name: str, key: str) -> list[float]:
    """Return for each tap how many points more a selection on generated images loses than one on given ones."""
    given = {(place_of(row), row["seed"]): row for row in of(rows, name) if key in row}
    own = [row for row in of(rows, name + OWN) if key in row]
    return [row[key] - given[place_of(row), row["seed"]][key] for row in own]


def passes_saved(rows: list[Row]) -> float:
    """Return how many times the passes of selections the exhaustive search has.

    A search for one tap alone has as many passes as one for all of them, but fits fewer classifiers.
    """
    return sum(row["search"]["num_forwards"] for row in rows) / max(1, sum(row["num_forwards"] for row in rows))


def ordered(rows: list[Row], key: str = "loss") -> list[str]:
    """Return the ways of selecting a timestep, the best first."""
    names = dict.fromkeys(row["criterion"] for row in rows if key in row)
    return sorted(names, key=lambda name: mean_and_worst(key, of(rows, name))[0])


def of(rows: list[Row], name: str) -> list[Row]:
    """Return the rows of one way of selecting."""
    return [row for row in rows if row["criterion"] == name]


def values_of(key: str, rows: list[Row]) -> list[float]:
    """Return a figure of the rows that have it."""
    return [row[key] for row in rows if key in row]


def place_of(row: Row) -> Place:
    """Return the pair and tap that a row belongs to."""
    return row["pair"], row["block"], row["feature"]


def mean_and_worst(key: str, rows: list[Row]) -> tuple[float, float]:
    """Return the mean and the largest of a figure, NaN where there is none.

    Each tap (or truth, where the tap was selected, too) counts once, however many seeds it has.
    """
    key_of: Callable[[Row], Any] = place_of if key != "tap_loss" else lambda row: (row["pair"], row["truth"])
    by_place: dict[Any, list[float]] = {}
    for row in rows:
        if key in row:
            by_place.setdefault(key_of(row), []).append(row[key])
    if not by_place:
        return float("nan"), float("nan")
    return float(np.mean([np.mean(each) for each in by_place.values()])), max(values_of(key, rows))


def shown(mean: float, worst: float) -> list[str]:
    """Return two cells, empty where there is nothing."""
    return [f"{mean:.2f}", f"{worst:.2f}"] if np.isfinite(mean) else ["", ""]


def describe_best(pair: Row, truth: str) -> str:
    """Return the exhaustive search's best tap, timestep and accuracy."""
    name = "ridge" if truth == "linear head" else "attention"
    best = max((each for each in pair["accuracy"] if each["truth"] == name), key=lambda each: max(each["accuracies"]))
    place = int(np.argmax(best["accuracies"]))
    return f"{best['feature']} of {best['block']}, t = {pair['timesteps'][place]}: {best['accuracies'][place]:.1%}"


def draw(pair: Row, path: Path) -> None:
    """Draw the accuracy at each timestep, tap by tap, and where the default's selections lie."""
    curves = pair["accuracy"]
    taps = list(dict.fromkeys((curve["block"], curve["feature"]) for curve in curves))
    blocks, features = sorted({block for block, _ in taps}), list(dict.fromkeys(feature for _, feature in taps))
    figure = Figure(figsize=(3 * len(features), 2.2 * len(blocks)), layout="constrained")
    axes = figure.subplots(len(blocks), len(features), squeeze=False, sharex=True)
    ratios = 10 * np.log10(np.e) * np.array(pair["log_snr"])  # decibels
    styles = {
        "ridge": ("#0072b2", "-", "o", "linear head"),
        "attention": ("#d55e00", "--", "s", "attention head"),
        "attention, by channel": ("#999999", ":", "^", "attention head, standardized by channel alone"),
    }
    for block, feature in taps:
        axis = axes[blocks.index(block), features.index(feature)]
        for curve in curves:
            if (curve["block"], curve["feature"]) == (block, feature):
                color, line, marker, label = styles[curve["truth"]]
                accuracies = 100 * np.array(curve["accuracies"])
                axis.plot(ratios, accuracies, color=color, linestyle=line, marker=marker, markersize=3, label=label)
        selected = [row for row in pair["rows"] if (row["block"], row["feature"]) == (block, feature)]
        selected = [row for row in selected if row["criterion"] == DEFAULT]
        for key, (color, _, _, label), line in zip(LOSSES.values(), styles.values(), (":", "-."), strict=False):
            for timestep in {row["timestep"] for row in selected if key in row}:
                place = ratios[pair["timesteps"].index(timestep)]
                axis.axvline(place, color=color, linestyle=line, label=f"selected for the {label}: t = {timestep}")
        axis.set_title(f"block {block}, {feature}", fontsize=9)
        axis.grid(alpha=0.3)
    # From clean to noisy, as t runs.
    axes[0, 0].invert_xaxis()
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)")
    for axis in axes[-1]:
        axis.set_xlabel("signal-to-noise ratio (dB)")
    # Not every tap has an attention head.
    drawn = [pair for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    shown = {label.split(": t")[0]: handle for handle, label in drawn}
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), fontsize=9)
    figure.savefig(path, dpi=100)
