"""Images for reports: the timestep's curve and a sheet of predictions. matplotlib is imported on first use only."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, which the colour-blind can distinguish. In grey, line styles and markers differ.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
DPI = 180
_NO_MATPLOTLIB = "Plots need matplotlib: pip install 'hf_aselect[demo]'"


def plot_timestep_curve(
    path: str | os.PathLike[str],
    timesteps: Sequence[int],
    scores: Sequence[float],
    log_snr: Sequence[float],
    selected: int,
    intervals: Sequence[Sequence[float]] | None = None,
    smoothed: Sequence[float] | None = None,
    criterion: str = "consensus",
    accuracies: Sequence[float] | None = None,
    accuracy_log_snr: Sequence[float] | None = None,
    accuracy_name: str = "accuracy",
    others: Sequence[int] = (),
) -> None:
    """Draw a criterion, and where given a probe's accuracy, over the timestep, the selection marked, as a PNG.

    The timesteps are spaced by their log-SNR, which stands below; a step to the right is as much more noise anywhere.

    Args:
        path: File to write; it appears whole or not at all.
        timesteps: Timesteps, rising.
        scores: The criterion at each.
        log_snr: 2·ln(alpha / sigma) at each.
        selected: The selected timestep, one of `timesteps`.
        intervals: Low and high end of each score's interval.
        smoothed: Each score averaged with its neighbours, if the selection was made by that; it need not be the
            highest, where draws of the images do not agree.
        criterion: Name of the criterion.
        accuracies: Accuracy at each of these timesteps, or of other ones, in [0, 1].
        accuracy_log_snr: The log-SNR of those timesteps.
        accuracy_name: What the accuracies are, as "mean IoU".
        others: Timesteps that were selected beside it, in the order of their selection, of `timesteps`.

    Raises:
        ValueError: If the lengths differ or `selected` or one of `others` is none of the timesteps.
        ImportError: If matplotlib is missing.
    """
    accuracy_log_snr = log_snr if accuracy_log_snr is None else accuracy_log_snr
    of_curve = {"scores": scores, "log_snr": log_snr, "intervals": intervals, "smoothed": smoothed}
    for name, values in of_curve.items():
        _check_length(name, values, len(timesteps))
    _check_length("accuracies", accuracies, len(accuracy_log_snr))
    for each in (selected, *others):
        if each not in timesteps:
            raise ValueError(f"The selected timestep must be one of {list(timesteps)}, got {each}.")
    # Small in inches, so that the text is readable when a page shows the image at a third of its width.
    figure = _new_figure(6.6, 4.4)
    axes = figure.add_subplot()
    positions = [-value for value in log_snr]
    label = criterion if accuracies is None else f"{criterion} (left)"
    lines = _draw_scores(axes, positions, scores, intervals, smoothed, label)
    axes.set_ylabel(f"{criterion} score (shaded: 95 % interval)" if intervals is not None else criterion)
    if accuracies is not None:
        lines += _draw_accuracies(axes.twinx(), [-value for value in accuracy_log_snr], accuracies, accuracy_name)
    mark = positions[list(timesteps).index(selected)]
    lines.append(axes.axvline(mark, color=GREY, linestyle=":", linewidth=1.5, label=f"selected: t = {selected}"))
    name = f"also selected: t = {', '.join(map(str, others))}"
    marks = [positions[list(timesteps).index(other)] for other in others]
    beside = [axes.axvline(mark, color=GREY, linestyle=(0, (1, 4)), linewidth=1.5, label=name) for mark in marks]
    # One line of the legend for all.
    lines += beside[:1]
    _label_timesteps(axes, timesteps, log_snr, positions, named=(selected, *others))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(handles=lines, loc="outside upper center", ncols=2 if len(lines) > 3 else 3, frameon=False)
    _save(figure, path)


def _draw_scores(
    axes: Any,
    positions: Sequence[float],
    scores: Sequence[float],
    intervals: Sequence[Sequence[float]] | None,
    smoothed: Sequence[float] | None,
    label: str,
) -> list[Any]:
    """Draw scores, and where given their intervals and their means with their neighbours; return the lines."""
    if intervals is not None:
        low, high = zip(*intervals, strict=True)
        axes.fill_between(positions, low, high, color=BLUE, alpha=0.2, linewidth=0)
    lines: list[Any] = axes.plot(positions, scores, color=BLUE, marker="o", markersize=4, label=label)
    if smoothed is not None:
        lines += axes.plot(positions, smoothed, color=BLUE, linestyle="-.", linewidth=0.8, label="smoothed")
    return lines


def _draw_accuracies(axes: Any, positions: Sequence[float], accuracies: Sequence[float], name: str) -> list[Any]:
    """Draw accuracies, in [0, 1], in per cent; return the lines."""
    shares = [100 * accuracy for accuracy in accuracies]
    style = {"color": ORANGE, "marker": "s", "markersize": 4, "linestyle": "--"}
    lines: list[Any] = axes.plot(positions, shares, label=f"probe {name} (right)", **style)
    axes.set_ylabel(f"test {name} of a linear probe, %")
    return lines


def plot_timestep_heat_map(
    path: str | os.PathLike[str],
    timesteps: Sequence[int],
    log_snr: Sequence[float],
    taps: Sequence[str],
    values: Sequence[Sequence[float]],
    selected_tap: str,
    selected_timestep: int,
    label: str,
    others: Sequence[int] = (),
) -> None:
    """Draw values over taps and timesteps as a heat map, as a PNG.

    The selection and the best timestep of each tap are marked. The timesteps stand side by side, equally wide,
    with their log-SNR below.

    Args:
        path: File to write; it appears whole or not at all.
        timesteps: Timesteps, rising: the columns.
        log_snr: 2·ln(alpha / sigma) at each.
        taps: Names of the taps, such as "block 3, query": the rows, from the top.
        values: For each tap, the value at each timestep; the largest is the best, and of equal ones the first.
        selected_tap: Name of the selected tap, one of `taps`.
        selected_timestep: The selected timestep, one of `timesteps`.
        label: What the values are.
        others: Timesteps that were selected beside it, of `timesteps`.

    Raises:
        ValueError: If the lengths differ, or the selection is none of the taps or of the timesteps.
        ImportError: If matplotlib is missing.
    """
    if len(values) != len(taps):
        raise ValueError(f"`values` must have one row for each of {len(taps)} taps, got {len(values)}.")
    _check_length("log_snr", log_snr, len(timesteps))
    for tap, row in zip(taps, values, strict=True):
        _check_length(f"values of {tap}", row, len(timesteps))
    if selected_tap not in taps:
        raise ValueError(f"The selected tap must be one of {list(taps)}, got {selected_tap!r}.")
    for each in (selected_timestep, *others):
        if each not in timesteps:
            raise ValueError(f"The selected timestep must be one of {list(timesteps)}, got {each}.")
    figure = _new_figure(7.4, 1.9 + 0.27 * len(taps))
    axes = figure.add_subplot()
    # Brightness rises evenly with the value, in grey and for the colour-blind, too.
    image = axes.imshow(values, cmap="cividis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    dots = _mark_best(axes, values)
    down, named = list(taps).index(selected_tap), ", ".join(map(str, (selected_timestep, *others)))
    for each in (*others, selected_timestep):
        box = _mark_cell(axes, list(timesteps).index(each), down, f"selected: {selected_tap}, t = {named}")
    # Lines must not widen what the map takes up.
    axes.set_xlim(-0.5, len(timesteps) - 0.5)
    axes.set_ylim(len(taps) - 0.5, -0.5)
    axes.set_yticks(range(len(taps)), taps)
    _label_timesteps(axes, timesteps, log_snr, range(len(timesteps)), named=(selected_timestep, *others))
    figure.legend(handles=[box, dots], loc="outside upper center", frameon=False)
    _save(figure, path)


def _mark_best(axes: Any, values: Sequence[Sequence[float]]) -> Any:
    """Mark the largest value of each row of a heat map, of equal ones the first; return the marks for a legend."""
    best = [max(range(len(row)), key=row.__getitem__) for row in values]
    # White with a black rim is seen on any colour of the map.
    style = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": "black"}
    (dots,) = axes.plot(best, range(len(values)), linestyle="none", label="best timestep of each tap", **style)
    return dots


def _mark_cell(axes: Any, across: int, down: int, label: str) -> Any:
    """Outline a cell of a heat map in white and black; return a mark for a legend."""
    outline = ([across + x for x in (-0.5, 0.5, 0.5, -0.5, -0.5)], [down + y for y in (-0.5, -0.5, 0.5, 0.5, -0.5)])
    for color, width in (("black", 5), ("white", 2)):
        axes.plot(*outline, color=color, linewidth=width, clip_on=False)
    square = {"marker": "s", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
    (box,) = axes.plot([], [], linestyle="none", markeredgewidth=2, label=label, **square)
    return box


def plot_predictions(
    path: str | os.PathLike[str],
    images: Sequence[Any],
    true_names: Sequence[str],
    predicted_names: Sequence[str],
    columns: int = 5,
) -> None:
    """Draw images with their true and predicted names as a PNG; wrong ones have a cross, a frame and both names.

    Args:
        path: File to write; it appears whole or not at all.
        images: PIL images.
        true_names: Name of each image's class.
        predicted_names: Name of the class predicted for each.
        columns: Images in a row.

    Raises:
        ValueError: If there are no images or the lengths differ.
        ImportError: If matplotlib is missing.
    """
    if not len(images) or not len(images) == len(true_names) == len(predicted_names):
        raise ValueError(
            "`images`, `true_names` and `predicted_names` must have the same length of at least 1, got "
            f"{len(images)}, {len(true_names)} and {len(predicted_names)}."
        )
    rows = math.ceil(len(images) / columns)
    # Small in inches, so that the names are readable when a page shows the image at a third of its width.
    figure = _new_figure(1.35 * columns, 1.75 * rows)
    for index, (image, true, predicted) in enumerate(zip(images, true_names, predicted_names, strict=True)):
        _draw_prediction(figure.add_subplot(rows, columns, index + 1), image, true, predicted)
    _save(figure, path)


def _draw_prediction(axes: Any, image: Any, true: str, predicted: str) -> None:
    """Draw one image with its names; a frame and a cross where they differ."""
    axes.imshow(image, cmap="gray" if image.mode in ("L", "1") else None)
    axes.set_xticks([])
    axes.set_yticks([])
    # Longer ones would run into the next image's.
    true_name, predicted_name = _short(true, 14), _short(predicted, 16)
    if true == predicted:
        axes.set_title(f"✓ {predicted_name}", fontsize=9)
        return
    axes.set_title(f"✗ {predicted_name}\ntrue: {true_name}", fontsize=9)
    for spine in axes.spines.values():
        spine.set(color=ORANGE, linewidth=3)


def plot_confusion_matrix(
    path: str | os.PathLike[str],
    true_labels: Sequence[int],
    predicted_labels: Sequence[int],
    names: Sequence[str],
    max_classes: int = 30,
) -> None:
    """Draw the confusion matrix and the accuracy of each class as a PNG.

    Rows are true classes, columns predicted ones, in shares of the row, from 0 to 1. The classes are sorted by their
    accuracy, the worst at the top. With more than `max_classes` classes, only the worst are
    drawn, and predictions of other classes are in no column. Classes without an image are left out.

    Args:
        path: File to write; it appears whole or not at all.
        true_labels: Class index of each image.
        predicted_labels: The predicted one.
        names: Name of each class.
        max_classes: Maximum number of classes to draw.

    Raises:
        ValueError: If there are no images, the lengths differ, or an index is outside `names`.
        ImportError: If matplotlib is missing.

    Example:
        >>> from hf_aselect import plot_confusion_matrix
        >>> plot_confusion_matrix("confusion_matrix.png", [0, 1, 1], [0, 1, 0], ["cat", "dog"])
    """
    true, predicted = np.asarray(true_labels), np.asarray(predicted_labels)
    if not true.size or true.shape != predicted.shape:
        raise ValueError(
            f"`true` and `predicted` must have the same length of at least 1, got {true.size} and {predicted.size}."
        )
    if min(true.min(), predicted.min()) < 0 or max(true.max(), predicted.max()) >= len(names):
        raise ValueError(f"Class indices must be in [0, {len(names)}), the number of names.")
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (true, predicted), 1)
    sizes = counts.sum(1)
    accuracies = counts.diagonal() / np.maximum(sizes, 1)
    found = np.flatnonzero(sizes)
    order = found[np.argsort(accuracies[found], kind="stable")][:max_classes]
    side = 1.2 + 0.36 * len(order)
    figure = _new_figure(max(6.6, side + 3.4), max(3.2, side))
    left, right = figure.subplots(1, 2, width_ratios=(max(2.5, side), 2.5))
    _draw_shares(left, counts[np.ix_(order, order)] / sizes[order, None], [names[index] for index in order])
    _draw_class_accuracies(right, accuracies[order], sizes[order], accuracies[found].mean())
    dropped = f"; the {len(order)} worst of {len(found)} classes" if len(order) < len(found) else ""
    figure.suptitle(f"{(true == predicted).mean():.1%} of {true.size} images correct{dropped}", fontsize=10)
    _save(figure, path)


def _draw_shares(axes: Any, shares: Any, names: Sequence[str]) -> None:
    """Draw a confusion matrix in shares of its rows, (k, k), in [0, 1], with numbers from half a per cent."""
    # Brightness rises evenly with the value, in grey and for the colour-blind, too.
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    shown = [_short(name, 24) for name in names]
    axes.set_xticks(range(len(shown)), shown, rotation=90)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_xlabel("predicted class (numbers: % of the row)")
    axes.set_ylabel("true class")
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        share = shares[row, column]
        colour = "black" if share > 0.5 else "white"
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _draw_class_accuracies(axes: Any, accuracies: Any, sizes: Any, mean: float) -> None:
    """Draw the accuracy of each class, (k,), in [0, 1], its number of images, (k,), and the mean of all classes."""
    axes.barh(range(len(accuracies)), accuracies, color=BLUE)
    for row, (accuracy, size) in enumerate(zip(accuracies, sizes, strict=True)):
        axes.text(1.03, row, f"{100 * accuracy:.1f} % of {size}", va="center", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(len(accuracies) - 0.5, -0.5)
    axes.set_xlim(0, 1.85)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    axes.set_xlabel("accuracy, %")
    axes.axvline(mean, color="black", linestyle=":")
    axes.set_title(f"dotted: class mean, {100 * mean:.1f} %", fontsize=9)


def plot_overlays(
    path: str | os.PathLike[str],
    images: Sequence[Any],
    truths: Sequence[Any],
    predictions: Sequence[Any],
    names: Sequence[str],
) -> None:
    """Draw images, their masks and predicted masks side by side, with a legend of the classes, as a PNG.

    Areas of at least 2 % of an image also have the number of their class, so that they can be told apart in grey.

    Args:
        path: File to write; it appears whole or not at all.
        images: Images as arrays, (H, W) or (H, W, 3), in [0, 1].
        truths: Their masks of class indices, (H, W); pixels of no class, which are none of `names`, are black.
        predictions: The predicted masks, (H, W).
        names: Names of the classes.

    Raises:
        ValueError: If there are no images or the lengths differ.
        ImportError: If matplotlib is missing.
    """
    if not len(images) or not len(images) == len(truths) == len(predictions):
        raise ValueError(
            f"`images`, `truths` and `predictions` must have the same length of at least 1, got {len(images)}, "
            f"{len(truths)} and {len(predictions)}."
        )
    height, width = images[0].shape[:2]
    # Small in inches, so that the legend is readable when a page shows the image at a third of its width.
    figure = _new_figure(6.6, (2.2 * height / width + 0.15) * len(images) + 0.9)
    colours = _class_colours(len(names))
    titles = ("image", "truth (black: no class)", "prediction")
    for row, (image, *masks) in enumerate(zip(images, truths, predictions, strict=True)):
        for column, shown in enumerate((image, *(_coloured(np.asarray(mask), colours) for mask in masks))):
            axes = figure.add_subplot(len(images), 3, 3 * row + column + 1)
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.axis("off")
            if column:
                _number_areas(axes, np.asarray(masks[column - 1]), len(names))
            if not row:
                axes.set_title(titles[column], fontsize=9)
    figure.legend(handles=_patches(colours, names), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def _class_colours(count: int) -> Any:
    """Return a colour for each class, (K, 3), in [0, 1]: twenty, the strong ones first, again and again."""
    # It takes a second to import, and only reports need it.
    from matplotlib import colormaps

    strong = [*range(0, 20, 2), *range(1, 20, 2)]
    return np.array([colormaps["tab20"](strong[index % 20])[:3] for index in range(count)])


def _coloured(mask: Any, colours: Any) -> Any:
    """Return a mask of class indices, (H, W), in the colours of the classes, (H, W, 3); black is not a class."""
    known = (mask >= 0) & (mask < len(colours))
    return np.where(known[..., None], colours[np.where(known, mask, 0)], 0.0)


def _number_areas(axes: Any, mask: Any, num_classes: int) -> None:
    """Write the number of each class with at least 2 % of the pixels onto its area, (H, W)."""
    # It takes a second to import, and only reports need it.
    from matplotlib.patheffects import withStroke

    for index in range(num_classes):
        if (mask == index).mean() >= 0.02:
            row, column = _inner_pixel(mask == index)
            outline = [withStroke(linewidth=2, foreground="black")]
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white", "path_effects": outline}
            axes.text(column, row, str(index), **style)


def _inner_pixel(area: Any) -> Any:
    """Return row and column of a pixel of an area, (H, W), that is as far from its edge as any other."""
    inside = smaller = area
    while smaller.any():
        inside, padded = smaller, np.pad(smaller, 1)
        smaller = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    places = np.argwhere(inside)
    return places[len(places) // 2]


def _patches(colours: Any, names: Sequence[str]) -> list[Any]:
    """Return the colour, number and name of each class for a legend."""
    # It takes a second to import, and only reports need it.
    from matplotlib.patches import Patch

    numbered = enumerate(zip(colours, names, strict=True))
    return [Patch(color=colour, label=f"{index} {_short(name, 20)}") for index, (colour, name) in numbered]


def _short(name: str, length: int) -> str:
    """Return a name, cut to a length."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def _check_length(name: str, values: Sequence[Any] | None, expected: int) -> None:
    if values is not None and len(values) != expected:
        raise ValueError(f"`{name}` must have one entry for each of {expected} timesteps, got {len(values)}.")


def _new_figure(width: float, height: float) -> Any:
    try:
        # Importing it takes a second, and only reports need it. A separate figure does not change pyplot's state.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NO_MATPLOTLIB) from error
    return Figure(figsize=(width, height), layout="constrained")


def _label_timesteps(
    axes: Any,
    timesteps: Sequence[int],
    log_snr: Sequence[float],
    positions: Sequence[float],
    named: Sequence[int] = (),
) -> None:
    """Label at most a dozen timesteps, `named` ones first, without overlaps, with their log-SNR below."""
    step = max(1, math.ceil(len(timesteps) / 12))
    room = abs(positions[-1] - positions[0]) / 13
    shown: list[int] = []
    for i in (*(list(timesteps).index(each) for each in named), *range(0, len(timesteps), step)):
        if all(abs(positions[i] - positions[other]) >= room for other in shown):
            shown.append(i)
    shown.sort()
    # 0.0 is added to what may be -0.0.
    labels = [f"{timesteps[i]}\n{round(log_snr[i], 1) + 0.0:.1f}".replace("-", "−") for i in shown]
    axes.set_xticks([positions[i] for i in shown], labels)
    axes.set_xlabel("timestep (0 = least noise), log-SNR below")


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Save under a temporary name in the same folder, then rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.incomplete")
    try:
        figure.savefig(temporary, format="png", dpi=DPI)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
