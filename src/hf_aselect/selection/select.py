"""Choosing the timestep by a criterion of the features."""

import logging
import operator
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from itertools import product
from typing import Any

import torch
from PIL import Image

from ..model.checks import check_timestep
from ..model.configuration_aselect import ASelectConfig
from ..model.denoiser import eval_mode, is_sharded
from ..model.layouts import Tap
from .criteria import CRITERIA, Consensus, Criterion, PatchProbe, Probe
from .curve import TimestepCurve
from .distribution import called_by
from .images import CalibrationPictures
from .record import TimestepSelection
from .sweep import AUTO_FEATURES, ReadableModel, Sweep

logger = logging.getLogger(__name__)
NUM_GENERATED = 64
COARSE_STEP = 3


def select_timestep(
    model: ReadableModel,
    images: Any = None,
    *,
    criterion: str | Criterion = "consensus",
    timesteps: Sequence[int] | None = None,
    labels: Sequence[int] | str | None = None,
    block: int | str | Sequence[int] | None = None,
    feature: str | Sequence[str] | None = None,
    max_images: int = 256,
    confidence: float = 0.95,
    batch_size: int = 32,
    seed: int = 0,
) -> TimestepSelection:
    """Choose the timestep whose features at the model's tap score best.

    Pictures are looked at in rounds, each adding half of those before, until the choice is as sure as `confidence`
    says. A coarse grid is read first and then the neighbours of the best timestep, until no neighbour is better. Under
    `accelerate launch` each process takes its share of the pictures and all come to the same choice; only what must be
    equal everywhere is done by each: pictures that the transformer makes, the first 32 of a consensus, and the 8 that
    are searched for channels. The processes must have met before: `accelerate.Accelerator()` sees to it, and Trainer.
    Of a model that FSDP2 shards each process reads all pictures.

    The best timestep is that whose score is largest in the mean with its neighbours' scores, weighted by 2^-d², where
    d is their distance in log-SNR: a step of DDPM's default grid counts half, and on a much coarser grid each score
    counts alone. The curve is smooth on that scale and a score from few pictures is not, so this steadies the choice.
    Where fewer than half of the bootstrap's resamples of the pictures choose within 1.5 of it, others are as good:
    then it is the largest such mean within 1.5 of the timestep near which most of them choose.

    Where `hidden`, `normed` or `attention` is read (or `config.zeroed_channels` is "auto"), channels that dwarf all
    others in every token are found on the first pictures and set to zero before anything is scored.

    Nothing in the model changes; `model.apply_selection` takes the result.

    Args:
        model: Model with the tap (`config.block`, `config.feature`) to choose a timestep for.
        images: PIL pictures or arrays; a `datasets` dataset with an image column, streaming or not; or pixel values,
            (B, C, H, W), in [-1, 1]. A stream is read from its start on several times, so it should be shuffled, with
            a seed: the same each time. Default: the transformer generates some.
        criterion: "signal_hfr" (share of high frequencies in what two noise draws agree on), "hfr" (the paper's, of
            one noise draw), "consensus" (how much of what the features agree on can be read from this one, as
            `config.head` sees it: an attention head sees more than the tokens' mean), "probe" (accuracy of a linear
            probe, needs `labels`), "patch_probe" (the same of patches, needs masks), or one with settings of its own,
            such as `criteria.HFR(cutoff=0.25)`.
        timesteps: Timesteps to read, integers in [0, 1000): all of them, from every picture. Default: from coarse to
            fine on `model.noise_schedule.even_timesteps()`.
        labels: For "probe": class index of each picture in `images`; or, for dense tasks, its mask, one class index a
            pixel: the probe then classifies patches ("patch_probe"). Or the name of a column with either.
        block: Block to read at in place of the configuration's; for "probe" also several, or "auto" for every third.
        feature: Feature to read in place of the configuration's; for "probe" also several, or "auto" for `hidden`,
            `query`, `key` and `value`.
        max_images: Look at so many pictures at the most; a larger set is sampled. Of its own pictures the transformer
            makes 64 at the most: each costs as many passes as a sampler has steps.
        confidence: Look at no more pictures once the choice is as sure as this, in [0, 1].
        batch_size: Noised pictures in one forward pass; does not change the result beyond rounding.
        seed: Seed in [0, 2**63) of the sampled or generated pictures, of the bootstrap and, for "hfr" and
            "signal_hfr", of the noise; the other criteria read features with the model's own noise.

    Returns:
        The choice with its curve; ties go to the smaller timestep.

    Raises:
        ValueError: If there are no pictures, they do not fit the model, a timestep is outside [0, 1000), `criterion`
            is unknown or lacks its labels, the labels are not one class index a picture, a tap does not exist, a
            number is out of range, the model is folded, or it is sharded and there are no pictures.

    Source: A-SelecT, arXiv 2603.25758, for "hfr"; the rest is ours.
    """
    started = time.monotonic()
    if model.config.folded:
        raise ValueError(
            f"This model was folded at timestep {model.config.timestep}, which is in its weights: there is nothing to "
            "choose. Choose with the model it was folded from, then fold that."
        )
    if images is None and is_sharded(model):
        raise ValueError("A model that FSDP2 shards makes no pictures of its own: give some as `images`.")
    criterion = _checked_criterion(criterion, labels)
    masks = _masks(labels, images)
    if masks is not None and type(criterion) is Probe:
        criterion = PatchProbe()
    if isinstance(criterion, Consensus):
        criterion = criterion.for_head(model.config.head)
    if isinstance(criterion, PatchProbe) and masks is None:
        raise ValueError("`criterion='patch_probe'` needs masks as `labels`: one class index a pixel of each picture.")
    _check_numbers(max_images, batch_size, confidence, seed)
    taps = _checked_taps(model.config, block, feature, several=isinstance(criterion, Probe))
    grid = model.noise_schedule.even_timesteps() if timesteps is None else _checked_grid(timesteps)
    search = Sweep(model, criterion, taps, grid, batch_size, seed)
    if masks is not None:
        search.masks = masks
    elif labels is not None:
        search.labels = _checked_labels(labels, images)
    with eval_mode(model), called_by(model, "encode", "_read_taps", then_shard=True), torch.no_grad():
        if images is None:
            max_images = min(max_images, NUM_GENERATED)
            latents = search.generate(max_images)
            pictures = CalibrationPictures(latents.clamp(-1, 1), model.config, max_images, seed)
        else:
            pictures = CalibrationPictures(images, model.config, max_images, seed)
        wanted = list(grid) if timesteps is not None else sorted({*grid[::COARSE_STEP], grid[-1]})
        stopped_by = search.run(pictures, wanted, max_images, confidence)
    curve = search.curve()
    best_tap, best = curve.best
    selection = TimestepSelection(
        timestep=curve.timesteps[best],
        timesteps=curve.timesteps,
        scores=curve.scores[best_tap].tolist(),
        smoothed=curve.smoothed[best_tap].tolist(),
        intervals=curve.intervals[best_tap].tolist(),
        log_snr=model.noise_schedule.log_snr(torch.tensor(curve.timesteps)).tolist(),
        confidence=curve.confidence,
        criterion=criterion.name,
        settings=asdict(criterion) if is_dataclass(criterion) and not isinstance(criterion, type) else {},
        options={
            "timesteps": None if timesteps is None else list(grid),
            "max_images": max_images,
            "confidence": confidence,
            "batch_size": batch_size,
            "noise_seed": model.config.noise_seed,
            "num_noise_draws": model.config.num_noise_draws,
        },
        block=taps[best_tap][0],
        feature=taps[best_tap][1],
        num_images=search.num_images,
        pictures="generated" if images is None else "given",
        stopped_by=stopped_by,
        num_forwards=search.num_forwards,
        seconds=round(time.monotonic() - started, 3),
        seed=seed,
        warnings=search.warnings() + curve.warnings(confidence, _remedies(search, max_images)),
        massive_channels=search.massive_channels(taps[best_tap]),
        table=_table(taps, curve) if len(taps) > 1 else None,
    )
    _report(selection, len(grid))
    return selection


def _table(taps: list[Tap], curve: TimestepCurve) -> list[dict[str, Any]]:
    """Return the scores of each tap, for the record."""
    return [
        {"block": at, "feature": name, "scores": scores.tolist(), "smoothed": smoothed.tolist()}
        for (at, name), scores, smoothed in zip(taps, curve.scores, curve.smoothed, strict=True)
    ]


def _report(selection: TimestepSelection, grid_size: int) -> None:
    """Log the choice, and what speaks against it."""
    logger.info(
        "Chose timestep %d (log-SNR %.2f, confidence %.2f) of %d by %s from %d pictures, %s of block %d, in %.1f s.",
        selection.timestep,
        selection.log_snr[selection.timesteps.index(selection.timestep)],
        selection.confidence,
        grid_size,
        selection.criterion,
        selection.num_images,
        selection.feature,
        selection.block,
        selection.seconds,
    )
    for warning in selection.warnings:
        logger.warning("The choice of timestep %d: %s", selection.timestep, warning)


def _remedies(search: Sweep, max_images: int) -> tuple[str, str]:
    """Return what gives more pictures, and what labels would decide."""
    if search.generated:
        more = "pictures of your own"
    elif search.num_images >= max_images:
        more = "more pictures (`max_images`)"
    else:
        more = "more pictures"
    labelled = isinstance(search.criterion, Probe)
    return more, "more labelled pictures" if labelled else "`criterion='probe'` with a few labels"


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
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, or such an object, got {criterion!r}.")
    if isinstance(criterion, Probe) != (labels is not None):
        raise ValueError(
            "`criterion='probe'` needs `labels`, the class index of each picture or the name of their column."
            if labels is None
            else f"`labels` are given, but {criterion.name!r} uses none; did you mean `criterion='probe'`?"
        )
    return criterion


def _masks(labels: Any, images: Any) -> Any:
    """Return masks by picture where the labels are masks, else None.

    Raises:
        ValueError: If there are not as many masks as pictures.
    """
    if isinstance(labels, str):
        is_there = hasattr(images, "__len__") and labels in getattr(images, "column_names", [])
        labels = images[labels] if is_there and len(images) else None
    if labels is None or not hasattr(labels, "__len__") or not len(labels):
        return None
    if not isinstance(labels[0], Image.Image) and getattr(labels[0], "ndim", 0) != 2:
        return None
    if not hasattr(images, "__len__") or len(images) != len(labels):
        raise ValueError(
            f"There must be a mask for each picture, got {len(labels)} masks for "
            f"{len(images) if hasattr(images, '__len__') else 'a stream of'} pictures."
        )
    return labels


def _checked_labels(labels: Any, images: Any) -> list[int]:
    """Return the class index of each picture."""
    if not hasattr(images, "__len__"):
        raise ValueError(
            "`labels` need a set of pictures whose size is known, got "
            f"{'none' if images is None else type(images).__name__}. Of a stream, take a part first: "
            "`datasets.Dataset.from_list(list(stream.take(1000)))`."
        )
    if isinstance(labels, str):
        columns = getattr(images, "column_names", [])
        if labels not in columns:
            raise ValueError(
                f"`labels` names the column {labels!r}, but the pictures have "
                f"{'the columns ' + ', '.join(columns) if columns else 'no columns'}."
            )
        labels = images[labels][:]
    if not hasattr(labels, "__len__"):
        raise ValueError(f"`labels` must be a list of class indices, one a picture, got {type(labels).__name__}.")
    if len(labels) != len(images):
        raise ValueError(f"`labels` must name the class of each of {len(images)} pictures, got {len(labels)} labels.")
    try:
        indices = [operator.index(label) for label in labels]
    except TypeError as error:
        raise ValueError(f"`labels` must be class indices, integers from 0 on: {error}.") from error
    if min(indices, default=0) < 0 or len(set(indices)) < 2:
        raise ValueError(f"`labels` must be class indices from 0 on, of two classes or more, got {set(indices)}.")
    return indices


def _checked_taps(
    config: ASelectConfig, block: int | str | Sequence[int] | None, feature: str | Sequence[str] | None, several: bool
) -> list[Tap]:
    if block == "auto":
        blocks = list(range(0, config.num_hidden_layers, 3))
    elif block is None or isinstance(block, int):
        blocks = [config.block_index(block)]
    elif isinstance(block, Sequence) and not isinstance(block, str):
        blocks = [config.block_index(each) for each in block]
    else:
        raise ValueError(f"`block` must be an integer, several of them, or 'auto', got {block!r}.")
    if feature == "auto":
        features = list(AUTO_FEATURES)
    else:
        if not (feature is None or isinstance(feature, Sequence)):
            raise ValueError(f"`feature` must be a name, several of them, or 'auto', got {feature!r}.")
        features = [config.feature] if feature is None else [feature] if isinstance(feature, str) else list(feature)
    taps = list(product(blocks, features))
    for tap in taps:
        config.check_tap(*tap)
    if len(taps) > 1 and not several:
        raise ValueError(
            "Several blocks or features can only be compared by `criterion='probe'`: the scores of the other criteria "
            f"say nothing across taps. Name one block and one feature, got {len(taps)} taps."
        )
    if not taps:
        raise ValueError("Name at least one block and one feature.")
    return taps


def _checked_grid(timesteps: Sequence[int]) -> list[int]:
    if not hasattr(timesteps, "__len__"):
        raise ValueError(f"`timesteps` must be a list of integers in [0, 1000), got {timesteps!r}.")
    if not len(timesteps):
        raise ValueError("`timesteps` must name at least one timestep, got none.")
    for timestep in timesteps:
        if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):
            check_timestep(timestep)
    grid = sorted({operator.index(timestep) for timestep in timesteps})  # of numpy and torch, too
    for timestep in (grid[0], grid[-1]):
        check_timestep(timestep)
    return grid
