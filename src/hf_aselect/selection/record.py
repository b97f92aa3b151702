"""The record of a selection of the timestep: everything needed to repeat, to judge and to plot it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.checks import NUM_TIMESTEPS
from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import FEATURES, ReadOut, parse_tap_key
from ..plots import plot_timestep_curve, plot_timestep_heat_map

# Number of the format of a record. It rises when a reader of former records would misread new ones.
FORMAT = 1


@dataclass(frozen=True)
class TimestepSelection:
    """Which timestep was selected, or which several, from what, and how sure the selection of the first is.

    Args:
        timestep: The selected timestep, an integer in [0, 1000), 0 = least noise.
        timesteps: The timesteps that were read, rising.
        scores: The criterion at each of them.
        smoothed: The same, each averaged with its neighbours: what the selection was made by, unless fewer than half
            of the resamples select near the highest. Then it is the highest near where most of them select.
        intervals: 95 % bootstrap interval (over groups of images) of each score.
        log_snr: 2·ln(alpha / sigma) at each of them.
        confidence: Share of bootstrap resamples of the images that select this timestep or one within 1.5 of it in
            log-SNR (a neighbour in the default grid), in [0, 1].
        criterion: Name of the criterion.
        settings: Its settings, by name.
        options: What else the selection depends on: `timesteps` (None where they were read from coarse to fine),
            `max_images`, `confidence` (the wanted one) and `batch_size` of `select_timestep`, `noise_seed` and
            `num_noise_draws` of the configuration.
        block: Block at which features were read, counted from the first.
        feature: Feature that was read there.
        num_images: Images that were looked at.
        images: "given", or "generated" by the transformer itself.
        stopped_by: Why no more images were looked at: "confidence" (the wanted one was reached), "max_images", or
            "all images".
        num_forwards: Passes of an image through the backbone, those that generated images included.
        seconds: Time it took.
        seed: Seed of the sampled or generated images, of the bootstrap and, for "hfr" and "signal_hfr", of the
            noise; the other criteria read features with the model's own noise.
        warnings: What speaks against trusting the selection, and what to do about it.
        massive_channels: Channels of the selected tap that dwarf all others in every token, and were set to zero:
            found by this choice, or by an earlier one; None where they were not looked for.
        table: Where several taps were compared: for each its block, feature, scores and smoothed scores.
        other_massive_channels: Where the model reads several taps, the same of the others, by tap, as "9.hidden",
            without those at which they were not looked for; None if there are no others.
        share_between_images: Share of the variance of the selected tap's tokens, in [0, 1], that is between images,
            read as the model reads them; the rest is between positions, and the same in all images. Of several
            timesteps it is the least. None where there were fewer than two images, and in a record from before it was
            measured.
        selected_timesteps: Where several timesteps were selected, all of them, in the order of their selection: the
            first is `timestep`, and each further one that with which the set scores most. None for a single one.
        joint_scores: The criterion of the first of them, of the first two read together, and so on; what each adds is
            the difference. None for a single one.
        standardization: What standardizes the tokens of each tap that the model's head reads, by (timestep, block,
            feature): scale, (D,), and shift, (rows, columns, D), float32; for `apply_selection`. Not in the record.
            None where nothing is standardized.

    Example:
        >>> import torch
        >>> from hf_aselect import DiTModel, TimestepSelection, select_timestep
        >>> model = DiTModel.from_pretrained("src/hf_aselect/assets/fashion_mnist", timestep=0)
        >>> selection = select_timestep(model, torch.rand(8, 1, 28, 28), timesteps=[19, 900])
        >>> selection.timesteps, len(selection.scores)
        ([19, 900], 2)
        >>> TimestepSelection.from_dict(selection.to_dict()) == selection
        True
    """

    timestep: int
    timesteps: list[int]
    scores: list[float]
    smoothed: list[float]
    intervals: list[list[float]]
    log_snr: list[float]
    confidence: float
    criterion: str
    settings: dict[str, Any]
    options: dict[str, Any]
    block: int
    feature: str
    num_images: int
    pictures: str
    stopped_by: str
    num_forwards: int
    seconds: float
    seed: int
    warnings: list[str]
    massive_channels: list[int] | None = None
    table: list[dict[str, Any]] | None = None
    share_between_images: float | None = None
    other_massive_channels: dict[str, list[int]] | None = None
    selected_timesteps: list[int] | None = None
    joint_scores: list[float] | None = None
    standardization: dict[ReadOut, tuple[Tensor, Tensor]] | None = field(default=None, compare=False, repr=False)

    def is_of(self, config: ASelectConfig) -> bool:
        """Return whether this is how the timestep of a configuration was selected, at its tap or for several."""
        return config.is_selection_in_use(self.to_dict())

    @property
    def selected(self) -> list[int]:
        """All selected timesteps in the order of their selection; of a single one that alone."""
        return self.selected_timesteps or [self.timestep]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain numbers, strings and lists, fit for JSON, with the number of its `format`."""
        values = asdict(replace(self, standardization=None))
        del values["standardization"]
        for name in ("other_massive_channels", "selected_timesteps", "joint_scores"):
            if values[name] is None:
                del values[name]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TimestepSelection":
        """Return the record that `to_dict` wrote; one without a `format` is of the first.

        Raises:
            ValueError: If its format is newer than this version reads, or a field is missing, unknown, or of another
                kind than `to_dict` writes.
        """
        if not isinstance(record, dict):
            raise ValueError(f"A saved selection must be a dictionary, got {type(record).__name__}.")
        _check_format(record.get("format", 1))
        fields = {name: value for name, value in record.items() if name != "format"}
        _check_names(fields)
        _check_values(fields)
        return cls(**fields)

    def plot(
        self,
        path: str | os.PathLike[str],
        accuracies: Sequence[float] | None = None,
        accuracy_log_snr: Sequence[float] | None = None,
        accuracy_name: str = "accuracy",
    ) -> list[Path]:
        """Draw the criterion over the timestep, with intervals and the selection, as a PNG.

        Where several taps were compared, a heat map of all of them is written beside it, as `NAME_heat_map.png`.

        Args:
            path: File to write.
            accuracies: Accuracy of a probe at each timestep, in [0, 1], to be drawn beside the criterion.
            accuracy_log_snr: Where the probe was tried at other timesteps, their log-SNR.
            accuracy_name: What the accuracies are, as "mean IoU".

        Returns:
            The files written.

        Raises:
            ImportError: If matplotlib is missing.
        """
        plot_timestep_curve(
            path,
            self.timesteps,
            self.scores,
            self.log_snr,
            self.timestep,
            intervals=self.intervals,
            smoothed=self.smoothed,
            criterion=self.criterion,
            accuracies=accuracies,
            accuracy_log_snr=accuracy_log_snr,
            accuracy_name=accuracy_name,
            others=self.selected[1:],
        )
        curve = Path(path)
        if self.table is None:
            return [curve]
        heat_map = curve.with_name(f"{curve.stem}_heat_map.png")
        plot_timestep_heat_map(
            heat_map,
            self.timesteps,
            self.log_snr,
            [_tap_name(row["block"], row["feature"]) for row in self.table],
            [row["smoothed"] for row in self.table],
            _tap_name(self.block, self.feature),
            self.timestep,
            self.criterion,
            others=self.selected[1:],
        )
        return [curve, heat_map]


def _check_format(number: Any) -> None:
    if not _is_integer(number) or number < 1:
        raise ValueError(f"A saved selection must have a positive integer as `format`, got {number!r}.")
    if number > FORMAT:
        raise ValueError(
            f"This saved selection has format {number}, but the installed hf_aselect reads formats up to {FORMAT}. "
            "Upgrade it: pip install -U hf_aselect"
        )


def _check_names(record: dict[str, Any]) -> None:
    known = {name: kind for name, kind in TimestepSelection.__dataclass_fields__.items() if kind.compare}
    missing = {name for name, kind in known.items() if kind.default is MISSING} - record.keys()
    if missing or record.keys() - known.keys():
        raise ValueError(
            f"A saved selection has other fields: missing {sorted(missing)}, unknown "
            f"{sorted(map(str, record.keys() - known.keys()))}."
        )


def _check_values(record: dict[str, Any]) -> None:
    wrong = [name for name, is_right in _FIELDS.items() if name in record and not is_right(record[name])]
    if wrong:
        raise ValueError(
            f"A saved selection has values of another kind in {', '.join(wrong)}. Select the timestep again."
        )
    count = len(record["timesteps"])
    uneven = [name for name in ("scores", "smoothed", "intervals", "log_snr") if len(record[name]) != count]
    if uneven or record["timestep"] not in record["timesteps"]:
        why = (
            f"{', '.join(uneven)} must have one value per timestep"
            if uneven
            else ("its timestep is not among `timesteps`")
        )
        raise ValueError(f"A saved selection is broken: {why}. Select the timestep again.")
    _check_selected(record)


def _check_selected(record: dict[str, Any]) -> None:
    """Reject several selected timesteps that were not read, or do not fit the rest."""
    selected, scores = record.get("selected_timesteps"), record.get("joint_scores")
    if selected is None and scores is None:
        return
    is_right = (
        selected is not None
        and scores is not None
        and len(scores) == len(selected) == len(set(selected)) > 1
        and selected[0] == record["timestep"]
        and set(selected) <= set(record["timesteps"])
    )
    if not is_right:
        raise ValueError(
            "A saved selection must have distinct scored timesteps as `selected_timesteps`, its `timestep` first, "
            f"and one of `joint_scores` for each, got {selected} and {scores}."
        )


def _tap_name(block: int, feature: str) -> str:
    return f"block {block}, {feature}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_timestep(value: Any) -> bool:
    return _is_integer(value) and value < NUM_TIMESTEPS


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_word(value: Any) -> bool:
    return isinstance(value, str)


def _is_dictionary(value: Any) -> bool:
    return isinstance(value, dict)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def _are_channels_by_tap(value: Any) -> bool:
    try:
        return (
            isinstance(value, dict)
            and all(parse_tap_key(key)[0] >= 0 for key in value)
            and all(_is_list_of(_is_integer)(channels) for channels in value.values())
        )
    except ValueError:  # a key that is none
        return False


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_list(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(check, value))

    return is_list


# What the fields of a record are: it comes from files.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "timestep": _is_timestep,
    "timesteps": _is_list_of(_is_timestep),
    "scores": _is_list_of(_is_number),
    "smoothed": _is_list_of(_is_number),
    "intervals": _is_list_of(_is_interval),
    "log_snr": _is_list_of(_is_number),
    "confidence": _is_number,
    "criterion": _is_word,
    "settings": _is_dictionary,
    "options": _is_dictionary,
    "block": _is_integer,
    "feature": lambda value: value in FEATURES,
    "num_images": _is_integer,
    "pictures": _is_word,
    "stopped_by": _is_word,
    "num_forwards": _is_integer,
    "seconds": _is_number,
    "seed": _is_integer,
    "warnings": _is_list_of(_is_word),
    "massive_channels": lambda value: value is None or _is_list_of(_is_integer)(value),
    "table": lambda value: value is None or _is_list_of(_is_dictionary)(value),
    "share_between_images": lambda value: value is None or _is_number(value),
    "other_massive_channels": lambda value: value is None or _are_channels_by_tap(value),
    "selected_timesteps": lambda value: value is None or _is_list_of(_is_timestep)(value),
    "joint_scores": lambda value: value is None or _is_list_of(_is_number)(value),
}
