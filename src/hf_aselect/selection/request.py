"""What a selection is asked for: the arguments of `select_timestep`, checked."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from PIL import Image

from ..images.rows import column_of
from ..model.checks import check_count, check_timestep
from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import Tap, plain
from .accumulators import AUTO_FEATURES
from .criteria import CRITERIA, MASKS, Criterion, compares_taps, labels_wanted, least_log_snr, scores_sets, suited
from .placement import selected_at
from .reader import ReadableModel

# So many images the transformer makes itself at most.
NUM_GENERATED = 128
COARSE_STEP = 3


@dataclass(frozen=True)
class Request:
    """What to select a timestep by, where, and how surely.

    Args:
        criterion: The criterion, with the settings that suit the model.
        taps: Taps to compare, at least one.
        grid: Timesteps that may be read, rising integers in [0, 1000).
        is_grid_given: Whether all of them are read, rather than from coarse to fine.
        labels: Class index of each image, or its mask, by index; None where there are no labels.
        max_images: Images at most, at least 1.
        confidence: The confidence to reach, in [0, 1].
        batch_size: Noised images in one forward pass, at least 1.
        seed: Seed in [0, 2**63).
        num_timesteps: How many timesteps to select, at least 1.
        num_train_images: Labelled images that the head will learn from, at least 1; None where nobody knows.
    """

    criterion: Criterion
    taps: list[Tap]
    grid: list[int]
    is_grid_given: bool
    labels: Any
    max_images: int
    confidence: float
    batch_size: int
    seed: int
    num_timesteps: int = 1
    num_train_images: int | None = None

    @property
    def first_timesteps(self) -> list[int]:
        """The timesteps to read before any neighbour of the best, rising."""
        return list(self.grid) if self.is_grid_given else sorted({*self.grid[::COARSE_STEP], self.grid[-1]})


def checked_request(
    model: ReadableModel,
    images: Any,
    *,
    criterion: str | Criterion,
    timesteps: Sequence[int] | None,
    labels: Sequence[int] | str | None,
    block: int | str | Sequence[int] | None,
    feature: str | Sequence[str] | None,
    max_images: int,
    confidence: float,
    batch_size: int,
    seed: int,
    num_timesteps: int | None,
    num_train_images: int | None,
) -> Request:
    """Return what `select_timestep` is asked for; see there.

    Raises:
        ValueError: If an argument is not what `select_timestep` takes.
    """
    timesteps, block, feature, num_timesteps = map(plain, (timesteps, block, feature, num_timesteps))
    max_images, batch_size, confidence, seed = map(plain, (max_images, batch_size, confidence, seed))
    num_train_images = plain(num_train_images)
    if num_train_images is not None:
        check_count("num_train_images", num_train_images)
    criterion = _checked_criterion(criterion, labels)
    masks = _masks(labels, images)
    criterion = suited(criterion, model.config, masks is not None)
    if labels_wanted(criterion) == MASKS and masks is None:
        raise ValueError(
            "`criterion='patch_probe'` needs masks as `labels`, with one class index per pixel of each image."
        )
    _check_numbers(max_images, batch_size, confidence, seed)
    taps = _checked_taps(model.config, block, feature, several=compares_taps(criterion))
    grid = _default_grid(model, criterion, taps) if timesteps is None else _checked_grid(timesteps)
    count = _checked_count(model.config, criterion, num_timesteps)
    if masks is None and labels is not None:
        labels = _checked_labels(labels, images)
    request = Request(
        criterion,
        taps,
        grid,
        timesteps is not None,
        labels if masks is None else masks,
        min(max_images, NUM_GENERATED) if images is None else max_images,
        confidence,
        batch_size,
        seed,
        count,
        num_train_images,
    )
    if count > (most := len(request.first_timesteps)):
        raise ValueError(
            f"`num_timesteps` must be at most {most}, the number of timesteps that are always scored, got {count}. "
            "Pass more as `timesteps=`."
        )
    return request


def _default_grid(model: ReadableModel, criterion: Criterion, taps: list[Tap]) -> list[int]:
    """Return the timesteps of the schedule's even grid, as far toward noise as the criterion wants them."""
    schedule = model.noise_schedule
    grid = schedule.even_timesteps()
    log_snr = schedule.log_snr(torch.tensor(grid)).tolist()
    least = least_log_snr(criterion, model.config, taps)
    return [timestep for timestep, ratio in zip(grid, log_snr, strict=True) if ratio >= least] or grid


def _checked_count(config: ASelectConfig, criterion: Criterion, num_timesteps: int | None) -> int:
    """Return how many timesteps are to be selected."""
    count = config.num_timesteps if num_timesteps is None else num_timesteps
    check_count("num_timesteps", count)
    if count > 1 and not scores_sets(criterion):
        raise ValueError(
            f"`num_timesteps={count}` needs the criterion 'consensus', 'probe' or 'patch_probe', which score "
            f"timesteps jointly, got {criterion.name!r}."
        )
    if count > 1 and config.read_out is not None:
        raise ValueError(
            f"`num_timesteps={count}` selects timesteps for all taps, but this model's `read_out` lists timesteps "
            "and taps individually. Load the model with `read_out=None`, and pass `block` and `feature` instead."
        )
    return count


def _check_numbers(max_images: int, batch_size: int, confidence: float, seed: int) -> None:
    for name, value in (("max_images", max_images), ("batch_size", batch_size), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"`{name}` must be an integer, got {value!r}.")
    if not isinstance(confidence, int | float):
        raise ValueError(f"`confidence` must be a number in [0, 1], got {confidence!r}.")
    if max_images < 1 or batch_size < 1:
        raise ValueError(f"`max_images` and `batch_size` must be at least 1, got {max_images} and {batch_size}.")
    if not 0 <= confidence <= 1:
        raise ValueError(f"`confidence` must be in [0, 1], got {confidence}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be in [0, 2**63), got {seed}.")


def _checked_criterion(criterion: str | Criterion, labels: Any) -> Criterion:
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
        criterion = CRITERIA[criterion]
    needed = ("name", "num_draws", "first_round", "min_images", "measure", "score")
    if isinstance(criterion, type) or not all(hasattr(criterion, name) for name in needed):
        raise ValueError(
            f"`criterion` must be one of {', '.join(CRITERIA)}, or a criterion object, got {criterion!r}."
        )
    if (labels_wanted(criterion) is None) == (labels is not None):
        raise ValueError(
            "`criterion='probe'` needs `labels`: the class index of each image, or the name of the label column."
            if labels is None
            else f"`labels` were given, but {criterion.name!r} does not use them. Did you mean `criterion='probe'`?"
        )
    return criterion


def _masks(labels: Any, images: Any) -> Any:
    """Return masks by image where the labels are masks, else None.

    Raises:
        ValueError: If there are not as many masks as images.
    """
    if isinstance(labels, str):
        is_there = hasattr(images, "__len__") and labels in getattr(images, "column_names", [])
        labels = column_of(images, labels) if is_there and len(images) else None
    if labels is None or not hasattr(labels, "__len__") or not len(labels):
        return None
    if not isinstance(labels[0], Image.Image) and getattr(labels[0], "ndim", 0) != 2:
        return None
    if not hasattr(images, "__len__") or len(images) != len(labels):
        raise ValueError(
            f"`labels` must have one mask per image, got {len(labels)} masks for "
            f"{len(images) if hasattr(images, '__len__') else 'a stream of'} images."
        )
    return labels


def _checked_labels(labels: Any, images: Any) -> list[int]:
    """Return the class index of each image."""
    if not hasattr(images, "__len__"):
        raise ValueError(
            "`labels` need a set of images of known size, got "
            f"{'none' if images is None else type(images).__name__}. If it is a stream, take a part of it first: "
            "`datasets.Dataset.from_list(list(stream.take(1000)))`."
        )
    if isinstance(labels, str):
        columns = getattr(images, "column_names", [])
        if labels not in columns:
            raise ValueError(
                f"`labels` is the column name {labels!r}, but the images have "
                f"{'the columns ' + ', '.join(columns) if columns else 'no columns'}."
            )
        labels = column_of(images, labels)[:]
    if not hasattr(labels, "__len__"):
        raise ValueError(f"`labels` must be a list with one class index per image, got {type(labels).__name__}.")
    if len(labels) != len(images):
        raise ValueError(
            f"`labels` must have one class index per image, got {len(labels)} labels for {len(images)} images."
        )
    try:
        indices = [operator.index(label) for label in labels]
    except TypeError as error:
        raise ValueError(f"`labels` must be class indices, integers >= 0: {error}.") from error
    if min(indices, default=0) < 0 or len(set(indices)) < 2:
        raise ValueError(f"`labels` must be class indices >= 0 of at least two classes, got {set(indices)}.")
    return indices


def _checked_taps(
    config: ASelectConfig, block: int | str | Sequence[int] | None, feature: str | Sequence[str] | None, several: bool
) -> list[Tap]:
    own_block, own_feature = selected_at(config)
    if block == "auto":
        blocks = list(range(0, config.num_hidden_layers, 3))
    elif block is None or isinstance(block, int):
        blocks = [own_block if block is None else config.block_index(block)]
    elif isinstance(block, Sequence) and not isinstance(block, str):
        blocks = [config.block_index(each) for each in block]
    else:
        raise ValueError(f"`block` must be an integer, a list of integers or 'auto', got {block!r}.")
    if feature == "auto":
        features = list(AUTO_FEATURES)
    else:
        if not (feature is None or isinstance(feature, Sequence)):
            raise ValueError(f"`feature` must be a name, a list of names or 'auto', got {feature!r}.")
        features = [own_feature] if feature is None else [feature] if isinstance(feature, str) else list(feature)
    taps = list(product(blocks, features))
    for tap in taps:
        config.check_tap(*tap)
    if len(taps) > 1 and not several:
        raise ValueError(
            "Several blocks or features can only be compared by 'consensus', 'probe' or 'patch_probe', because the "
            "scores of other criteria are not comparable across taps. Pass one block and one feature, got "
            f"{len(taps)} taps."
        )
    if not taps:
        raise ValueError("`block` and `feature` must name at least one block and one feature.")
    return taps


def _checked_grid(timesteps: Sequence[int]) -> list[int]:
    if not hasattr(timesteps, "__len__"):
        raise ValueError(f"`timesteps` must be a list of integers in [0, 1000), got {timesteps!r}.")
    if not len(timesteps):
        raise ValueError("`timesteps` must name at least one timestep, got an empty list.")
    for timestep in timesteps:
        if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):
            check_timestep(timestep)
    grid = sorted({operator.index(timestep) for timestep in timesteps})  # of numpy and torch, too
    for timestep in (grid[0], grid[-1]):
        check_timestep(timestep)
    return grid
