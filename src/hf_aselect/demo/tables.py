"""The tables that the demos print: figures and seconds of each way to the goal."""

from typing import Any

# Who, of what features, how well, in how many seconds.
Row = tuple[str, str, float, float]


def format_table(results: dict[str, Any]) -> str:
    """Return the demo's table: accuracies, timesteps and seconds, the best first, then those from few labels."""
    accuracy, seconds = results["accuracy"], results["seconds"]
    timestep, (block, feature) = f"t = {results['timestep']}", results["probe"]
    blocks, features = (list(dict.fromkeys(entry[place] for entry in results["read_out"])) for place in (1, 2))
    where = f"{timestep}, {' and '.join(features)} of blocks {' and '.join(map(str, blocks))}"
    reading = seconds["select_timestep"] + seconds["read_features"] + seconds["read_out"]
    rows: list[Row] = [("closed-form head", where, accuracy["read_out"], reading)]
    if "attention_head" in accuracy:
        trained = f"t = {results['attention_head_timestep']}, query of block 3"
        rows.append(("attention head", trained, accuracy["attention_head"], seconds["attention_head"]))
    rows.append(("logistic regression", "raw pixels", accuracy["raw_pixels"], seconds["raw_pixels"]))
    rows.sort(key=lambda row: -row[2])
    rows += probe_rows(results, accuracy, results["probe_timestep"], seconds["select_for_probe"])
    notes = [
        f"From {results['num_train']} labelled images, tested on {results['num_test']}. The linear probes read the "
        "mean of one tap,",
        f"{feature} of block {block}, from {results['num_probe']} images, tested on {results['num_probe_test']}.",
        "",
        f"{'labelled images':<20} " + " ".join(f"{num:>10}" for num in (results["num_train"], *results["few"])),
    ]
    for name, key in (("closed-form head", "read_out"), ("raw pixels", "raw_pixels")):
        figures = [accuracy[key], *(accuracy[f"{key}_{num}"] for num in results["few"])]
        notes.append(f"{name:<20} " + " ".join(f"{share:>10.1%}" for share in figures))
    notes.append(f"Results with few labels are means of {results['num_draws']} draws.")
    if "attention_head" in accuracy:
        notes.append(f"The attention head sees {results['num_views']} views of each image, mirrored or shifted.")
    return format_rows(results, "classifier", "test accuracy", rows, notes)


def format_segmentation_table(results: dict[str, Any]) -> str:
    """Return the demo's table: mean intersection over union, timesteps and seconds."""
    figures, seconds = results["mean_iou"], results["seconds"]
    selected = f"t = {results['timestep']}"
    rows = [
        ("UperNet", f"{selected}, selected without labels", figures["upernet"], seconds["upernet"]),
        *probe_rows(results, figures, results["timestep"], seconds["select_timestep"]),
        ("linear probe", f"{selected}, random weights", figures["random_weights"], seconds["random_weights"]),
        ("most frequent class", "grey level of a pixel", figures["colours"], seconds["colours"]),
    ]
    notes = [
        f"Scenes are composed of two images of the sample each; trained on {results['num_train']}, the linear",
        f"probes on the tokens of {results['num_probe']}; tested on {results['num_test']} scenes of other images.",
    ]
    return format_rows(results, "segmenter", "test mean IoU", rows, notes)


def probe_rows(results: dict[str, Any], figures: dict[str, float], timestep: int, select: float) -> list[Row]:
    """Return a table's rows of the probe, at the timesteps of `probe_figures`; selecting one took `select` seconds."""
    search = results["seconds"]["exhaustive_search"]
    each = search / len(results["timesteps"])
    return [
        ("linear probe", f"t = {timestep}, selected without labels", figures["selected"], select + each),
        ("linear probe", "t = 0", figures["zero"], each),
        ("linear probe", "random t (mean over the grid)", figures["random_mean"], each),
        ("linear probe", f"worst t = {results['worst_timestep']}", figures["worst"], each),
        ("linear probe", f"best t = {results['best_timestep']}, exhaustive search", figures["best"], search),
    ]


def format_rows(results: dict[str, Any], who: str, what: str, rows: list[Row], notes: list[str]) -> str:
    """Return a demo's table: the selection, then a row for each way, then notes."""
    select = results["seconds"]["select_timestep"]
    lines = [f"Selected timestep: {results['timestep']} (log-SNR {results['log_snr']:.2f}), in {select:.1f} s", ""]
    lines.append(f"{who:<20} {'features':<40} {what:>13} {'seconds':>8}")
    lines += [f"{name:<20} {where:<40} {share:>13.1%} {spent:>8.1f}" for name, where, share, spent in rows]
    return "\n".join([*lines, "", *notes])
