"""The tables that the demos print: figures and seconds of each way to the goal."""

from typing import Any

# Who, of what features, how well, in how many seconds.
Row = tuple[str, str, float, float]


def format_table(results: dict[str, Any]) -> str:
    """Return the demo's table: accuracies, timesteps and seconds."""
    accuracy, seconds = results["accuracy"], results["seconds"]
    chosen = f"t = {results['timestep']}, chosen without labels"
    rows = [
        ("attention head", chosen, accuracy["attention_head"], seconds["attention_head"]),
        *probe_rows(results, accuracy, results["probe_timestep"], seconds["select_for_probe"]),
        ("logistic regression", "raw pixels", accuracy["raw_pixels"], seconds["raw_pixels"]),
    ]
    notes = [
        f"Trained on {results['num_train']} pictures, the linear probes on {results['num_probe']}; "
        f"tested on {results['num_test']}.",
        f"The attention head sees {results['num_views']} views of each, mirrored or shifted; the others only itself.",
    ]
    return format_rows(results, "classifier", "test accuracy", rows, notes)


def format_segmentation_table(results: dict[str, Any]) -> str:
    """Return the demo's table: mean intersection over union, timesteps and seconds."""
    figures, seconds = results["mean_iou"], results["seconds"]
    chosen = f"t = {results['timestep']}"
    rows = [
        ("UperNet", f"{chosen}, chosen without labels", figures["upernet"], seconds["upernet"]),
        *probe_rows(results, figures, results["timestep"], seconds["select_timestep"]),
        ("linear probe", f"{chosen}, random weights", figures["random_weights"], seconds["random_weights"]),
        ("most frequent class", "grey level of a pixel", figures["colours"], seconds["colours"]),
    ]
    notes = [
        f"Scenes are composed of two pictures of the sample each; trained on {results['num_train']}, the linear",
        f"probes on the tokens of {results['num_probe']}; tested on {results['num_test']}, of other pictures.",
    ]
    return format_rows(results, "segmenter", "test mean IoU", rows, notes)


def probe_rows(results: dict[str, Any], figures: dict[str, float], timestep: int, select: float) -> list[Row]:
    """Return a table's rows of the probe, at the timesteps of `probe_figures`: one was chosen in `select` seconds."""
    search = results["seconds"]["exhaustive_search"]
    each = search / len(results["timesteps"])
    return [
        ("linear probe", f"t = {timestep}, chosen without labels", figures["selected"], select + each),
        ("linear probe", "t = 0", figures["zero"], each),
        ("linear probe", "random t (mean over the grid)", figures["random_mean"], each),
        ("linear probe", f"worst t = {results['worst_timestep']}", figures["worst"], each),
        ("linear probe", f"best t = {results['best_timestep']}, exhaustive search", figures["best"], search),
    ]


def format_rows(results: dict[str, Any], who: str, what: str, rows: list[Row], notes: list[str]) -> str:
    """Return a demo's table: the choice, then a row for each way, then notes."""
    select = results["seconds"]["select_timestep"]
    lines = [f"Chosen timestep: {results['timestep']} (log-SNR {results['log_snr']:.2f}), in {select:.1f} s", ""]
    lines.append(f"{who:<20} {'features':<36} {what:>13} {'seconds':>8}")
    lines += [f"{name:<20} {where:<36} {share:>13.1%} {spent:>8.1f}" for name, where, share, spent in rows]
    return "\n".join([*lines, "", *notes])
