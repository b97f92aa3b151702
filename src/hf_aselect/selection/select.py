"""Selecting the timestep by a criterion of the features."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..images.rows import as_rows
from ..model.denoiser import is_sharded
from .criteria import Criterion, labels_wanted
from .curve import TimestepCurve
from .distribution import called_by, refuse_flattened, unwrapped
from .generation import count_forwards
from .images import CalibrationPictures
from .reader import ReadableModel, eval_mode
from .record import TimestepSelection
from .request import Request, checked_request
from .standardization import measured
from .sweep import Sweep

logger = logging.getLogger(__name__)

# A selected timestep at which images differ by a smaller share of the tokens' variance is warned of. On three pairs
# attention heads on tokens as they are lost 5 to 14 points at 0.6 to 2 %, and were at chance below 0.1 %.
LEAST_DIFFERENCE = 0.02


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
    num_timesteps: int | None = None,
    num_train_images: int | None = None,
) -> TimestepSelection:
    """Select the timestep whose features at the model's tap score best, or several that complement each other.

    Images are looked at in rounds, each adding half of those before, until the selection is as sure as `confidence`
    says. A coarse grid is read first and then the neighbours of the best timestep, until no neighbour is better. Under
    `accelerate launch` each process takes its share of the images and all come to the same choice; only what must be
    equal everywhere is done by each: images that the transformer makes, the first 32 of a consensus, and the 8 that
    are searched for channels. The processes must have met before: `accelerate.Accelerator()` sees to it, and Trainer.
    Of a model that FSDP2 shards each process reads all images.

    The best timestep is that whose score is largest in the mean with its neighbours' scores, weighted by 2^-d², where
    d is their distance in log-SNR: a step of DDPM's default grid counts half, and on a much coarser grid each score
    counts alone. The curve is smooth on that scale and a score from few images is not, so this steadies the selection.
    Where fewer than half of the bootstrap's resamples of the images select within 1.5 of it, others are as good:
    then it is the largest such mean within 1.5 of the timestep near which most of them select.

    Where `hidden`, `normed` or `attention` is read (or `config.zeroed_channels` is "auto"), channels that dwarf all
    others in every token are found on the first images and set to zero before anything is scored.

    Several timesteps (`num_timesteps`) are selected one after the other. The first is the best one. Each further one
    is that with which all together score most, of those that were read, by the features that were kept: nothing more
    is read. It lies more than 1.5 in log-SNR from each that is selected, as long as there are such: nearer ones show
    the same. `joint_scores` in the record says what each adds, and a warning which adds nothing.

    Where the configuration names several taps, timesteps are selected for all of them, at the first, unless `block` or
    `feature` names others. Where it names several timesteps, those selected take their place.

    The images are then read once more at the selected timesteps, as the model reads them: for what standardizes the
    features of its head (`config.standardize_features`), and for the share of their variance that is between images.

    Nothing in the model changes; `model.apply_selection` takes the result.

    Args:
        model: Model with the tap (`config.block`, `config.feature`) to select a timestep for, or several; also where
            DDP, FSDP2, torch.compile or peft wraps it.
        images: PIL images, files, arrays or tensors; a dataset of `datasets` or torch, of any format or transform,
            streaming or not; pairs (image, label); or pixel values, (B, C, H, W), in [-1, 1]. Floating-point values
            are in [0, 255], in [0, 1], or with negative ones pixel values, see `images.rows.ImageRows`. A stream is
            read from its start on several times, so it should be shuffled, with a seed: the same each time. Default:
            the transformer generates some.
        criterion: "signal_hfr" (share of high frequencies in what two noise draws agree on), "hfr" (the paper's, of
            one noise draw), "consensus" (how much of what the features agree on can be read from this one, as
            `config.head` sees it: an attention head sees more than the tokens' mean), "probe" (accuracy of a linear
            probe, needs `labels`), "patch_probe" (the same of patches, needs masks), or a criterion with other
            settings, such as `criteria.HFR(cutoff=0.25)`.
        timesteps: Timesteps to read, integers in [0, 1000): all of them, from every image. Default: from coarse to
            fine on `model.noise_schedule.even_timesteps()`; for "consensus", a linear head and `normed`, `query`,
            `key` or `value` of the first block only those with a log-SNR of at least -5.5.
        labels: For "probe": class index of each image in `images`; or, for dense tasks, its mask, one class index a
            pixel: the probe then classifies patches ("patch_probe"). Or the name of a column with either.
        block: Block to read at in place of the configuration's (first) one; several, or "auto" for every third, to
            select the block, too, by "consensus", "probe" or "patch_probe".
        feature: Feature to read in place of the configuration's (first) one; several, or "auto" for `hidden`, `query`,
            `key` and `value`, to select the feature, too, in the same way.
        max_images: Look at no more images than this; a larger set is sampled. Without `images` the transformer
            generates at most 128, unguided: each costs 20 passes through the whole transformer.
        confidence: Look at no more images once the selection is as sure as this, in [0, 1].
        batch_size: Noised images in one forward pass; does not change the result beyond rounding.
        seed: Seed in [0, 2**63) of the sampled or generated images, of the bootstrap and, for "hfr" and
            "signal_hfr", of the noise; the other criteria read features with the model's own noise.
        num_timesteps: How many timesteps to select, at most as many as are read from every image. More than one need
            "consensus" or a probe. Default: `config.num_timesteps`.
        num_train_images: How many labelled images the head will learn from, at least 1. For fewer than 1,000, of
            aligned images (digits, products, faces), "consensus" prefers timesteps with more noise, at which a head
            needs fewer labels. Default: many.

    Returns:
        The selection with its curve; ties go to the smaller timestep.

    Raises:
        ValueError: If there are no images, they do not fit the model, a timestep is outside [0, 1000), `criterion`
            is unknown or lacks its labels, the labels are not one class index an image, a tap does not exist, a
            number is out of range, several timesteps are asked of a criterion that cannot score them together or for a
            `read_out`, the model is folded, or it is sharded and there are no images.

    Source: A-SelecT, arXiv 2603.25758, for "hfr"; the rest is ours.

    Example:
        >>> from datasets import load_dataset
        >>> from hf_aselect import DiTModel, select_timestep
        >>> folder = "src/hf_aselect/assets/fashion_mnist"
        >>> images = load_dataset("parquet", data_files=f"{folder}/train.parquet", split="train[:64]")
        >>> model = DiTModel.from_pretrained(folder, timestep=0)
        >>> selection = select_timestep(model, images, timesteps=[19, 100, 900])
        >>> selection.timestep in (19, 100)
        True
    """
    started = time.monotonic()
    refuse_flattened(model)
    model = unwrapped(model)
    _check_model(model, images)
    images = as_rows(images)
    request = checked_request(
        model,
        images,
        criterion=criterion,
        timesteps=timesteps,
        labels=labels,
        block=block,
        feature=feature,
        max_images=max_images,
        confidence=confidence,
        batch_size=batch_size,
        seed=seed,
        num_timesteps=num_timesteps,
        num_train_images=num_train_images,
    )
    with eval_mode(model), called_by(model, "encode", "_read_taps", then_shard=True), torch.no_grad():
        sweep = _sweep_of_generated(model, request) if images is None else _sweep_of_given(model, images, request)
        curve, stopped_by = sweep.run()
        selected, scores = sweep.complements(curve)
        found = measured(sweep, request.taps[curve.best[0]], selected)
    if len(selected) > 1:
        found |= {"selected_timesteps": selected, "joint_scores": scores}
    selection = replace(_record(sweep, curve, stopped_by, images is None, started), **found)
    selection.warnings.extend(_useless_warnings(selection))
    if warning := _difference_warning(selection, model.config.standardize_features):
        selection.warnings.insert(0, warning)
    _report(selection, len(request.grid))
    return selection


def _check_model(model: ReadableModel, images: Any) -> None:
    if model.config.folded:
        raise ValueError(
            f"This model was folded at timestep {model.config.timestep}, so there is no timestep to select. Select "
            "it on the model it was folded from, and fold that again."
        )
    if images is None and is_sharded(model):
        raise ValueError("A model sharded by FSDP2 cannot generate images. Pass your own as `images`.")


def _sweep_of_given(model: ReadableModel, images: Any, request: Request) -> Sweep:
    return Sweep(model, CalibrationPictures(images, model.config, request.max_images, request.seed), request)


def _sweep_of_generated(model: Any, request: Request) -> Sweep:
    """Return a sweep over images that the model makes itself, and count what these cost."""
    count = request.max_images
    num_forwards = count_forwards(count)
    logger.warning(
        "No images were given to select a timestep on, so the transformer generates %d in %d passes. Your own images "
        "may give another timestep, above all where they look different or labels are few.",
        count,
        num_forwards,
    )
    # Every process makes all of them.
    # Without guidance: twice as many images for as many passes, as various as those that the model was trained on.
    latents: Tensor = model.generate_latents(
        count, batch_size=request.batch_size, seed=request.seed, guidance_scale=1.0
    )
    latents = latents.to(model.device)
    sweep = _sweep_of_given(model, {"pixel_values": latents.clamp(-1, 1)}, request)
    sweep.reader.latents = dict(enumerate(latents))
    sweep.reader.num_forwards = num_forwards
    return sweep


def _record(
    sweep: Sweep, curve: TimestepCurve, stopped_by: str, is_generated: bool, started: float
) -> TimestepSelection:
    """Return the record of a sweep that ended."""
    request, model = sweep.request, sweep.reader.model
    tap, best = curve.best
    block, feature = request.taps[tap]
    warnings = _few_images_warnings(sweep, is_generated)
    warnings += curve.warnings(request.confidence, _remedies(sweep, is_generated))
    return TimestepSelection(
        timestep=curve.timesteps[best],
        timesteps=curve.timesteps,
        scores=curve.scores[tap].tolist(),
        smoothed=curve.smoothed[tap].tolist(),
        intervals=curve.intervals[tap].tolist(),
        log_snr=model.noise_schedule.log_snr(torch.tensor(curve.timesteps)).tolist(),
        confidence=curve.confidence,
        criterion=request.criterion.name,
        settings=_settings(request.criterion),
        options=_options(model, request),
        block=block,
        feature=feature,
        num_images=sweep.num_images,
        pictures="generated" if is_generated else "given",
        stopped_by=stopped_by,
        num_forwards=sweep.num_forwards(),
        seconds=round(time.monotonic() - started, 3),
        seed=request.seed,
        warnings=warnings,
        massive_channels=sweep.massive_channels(request.taps[tap]),
        other_massive_channels=sweep.other_massive_channels(request.taps[tap]),
        table=_table(request, curve) if len(request.taps) > 1 else None,
    )


def _settings(criterion: Criterion) -> dict[str, Any]:
    """Return a criterion's settings by name, for the record."""
    return asdict(criterion) if is_dataclass(criterion) and not isinstance(criterion, type) else {}


def _options(model: ReadableModel, request: Request) -> dict[str, Any]:
    """Return what else the selection depends on, for the record."""
    return {
        "timesteps": list(request.grid) if request.is_grid_given else None,
        "max_images": request.max_images,
        "confidence": request.confidence,
        "batch_size": request.batch_size,
        "num_train_images": request.num_train_images,
        "noise_seed": model.config.noise_seed,
        "num_noise_draws": model.config.num_noise_draws,
    }


def _table(request: Request, curve: TimestepCurve) -> list[dict[str, Any]]:
    """Return the scores of each tap, for the record."""
    return [
        {"block": at, "feature": name, "scores": scores.tolist(), "smoothed": smoothed.tolist()}
        for (at, name), scores, smoothed in zip(request.taps, curve.scores, curve.smoothed, strict=True)
    ]


def _difference_warning(selection: TimestepSelection, is_standardized: bool) -> str:
    """Return what speaks against a timestep at which all images look alike; nothing where they differ enough."""
    share = selection.share_between_images
    if share is None or share >= LEAST_DIFFERENCE:
        return ""
    where = "at one of these timesteps" if selection.joint_scores else "there"
    found = (
        f"the images account {where} for {share:.2%} of the variance of {selection.feature}, less than "
        f"{LEAST_DIFFERENCE:.0%}; the rest comes from the noise, which is the same for all images. "
    )
    if is_standardized:
        return found + (
            "A head can learn from that because its features are standardized, but only in float32, as half "
            "precision rounds it away. Use a smaller timestep for half precision."
        )
    return found + (
        "A head trained by gradient descent may learn nothing from it. Load the model with "
        "`standardize_features=True` (the default for a new head), or use a smaller timestep."
    )


def _useless_warnings(selection: TimestepSelection) -> list[str]:
    """Return which of several selected timesteps add nothing to those selected before them."""
    scores = selection.joint_scores or []
    return [
        f"timestep {timestep} adds nothing to the timesteps selected before it (score {after:.4f}, before "
        f"{before:.4f}). Pass `num_timesteps={count}`."
        for count, (timestep, before, after) in enumerate(
            zip(selection.selected[1:], scores, scores[1:], strict=False), start=1
        )
        if after <= before
    ]


def _few_images_warnings(sweep: Sweep, is_generated: bool) -> list[str]:
    """Return what speaks against trusting any selection from so few images."""
    criterion, count = sweep.request.criterion, sweep.num_images
    if count >= criterion.min_images:
        return []
    remedy = "Pass more images"
    if is_generated:
        remedy = "Pass images, or raise `max_images`"
    elif sweep.request.labels is None:
        remedy += ", or pass none, so that the transformer generates its own"
    needed = f"{criterion.name!r} needs at least {criterion.min_images}, however confident it seems"
    return [f"it is based on {count} image{'s' * (count > 1)}, and {needed}. {remedy}."]


def _remedies(sweep: Sweep, is_generated: bool) -> tuple[str, str]:
    """Return what gives more images, and what labels would decide."""
    if is_generated:
        more = "images of your own"
    elif sweep.num_images >= sweep.request.max_images:
        more = "more images (`max_images`)"
    else:
        more = "more images"
    has_labels = labels_wanted(sweep.request.criterion) is not None
    return more, "more labelled images" if has_labels else "`criterion='probe'` with a few labels"


def _report(selection: TimestepSelection, grid_size: int) -> None:
    """Log the selection, and what speaks against it."""
    logger.info(
        "Selected timestep %d (log-SNR %.2f, confidence %.2f) of %d by %s from %d images, %s of block %d, in %.1f s.",
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
    if selection.joint_scores is not None:
        logger.info(
            "Selected %d complementary timesteps in addition: %s. Joint scores of the first, the first two, ...: %s.",
            len(selection.selected) - 1,
            ", ".join(map(str, selection.selected)),
            ", ".join(f"{score:.4f}" for score in selection.joint_scores),
        )
    for warning in selection.warnings:
        logger.warning("Selection of timestep %d: %s", selection.timestep, warning)
