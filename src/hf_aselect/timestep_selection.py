"""Choosing the timestep: a criterion over a grid of timesteps, how sure the choice is, and the record of it."""

import logging
import operator
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as host_logging

from .calibration import CalibrationPictures
from .configuration_aselect import ASelectConfig, check_feature, check_timestep
from .consensus import ConsensusSums, Key, unexplained
from .criteria import CRITERIA, Consensus, Criterion, Probe
from .denoisers import eval_mode
from .noise_schedule import NoiseSchedule, fixed_noise
from .plots import plot_timestep_curve, plot_timestep_heat_map

logger = logging.getLogger(__name__)

NUM_GENERATED = 64
COARSE_STEP = 3
# Pictures are summed in so many groups, and the bootstrap draws groups: sums are all it needs of the pictures.
NUM_GROUPS = 16
NUM_RESAMPLES = 1000
# A timestep that is as good as the best in this share of the resamples is not told apart from it.
RIVAL_SHARE = 0.025
# Neighbours on the log-SNR scale count half at this distance, and one choice is near another within a step and a half:
# the default grid's step is 1.0 for DDPM's schedule.
SMOOTHING_WIDTH = 1.0
NEAR = 1.5
ROUNDED_TO = 12  # decimals
# Latents up to this size are kept, so that a picture is encoded once; beyond it they are encoded again.
MAX_KEPT_BYTES = 2**25
# Scale and weight of a consensus' reference features come from the first so many pictures.
NUM_CALIBRATION = 32
AUTO_FEATURES = ("hidden", "query", "key", "value")

Tap = tuple[int, str]


class ReadableModel(Protocol):
    """What a selection needs of a model: `DiTModel` and the models on top of it have it."""

    config: ASelectConfig

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Timesteps to signal and noise levels."""
        ...

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return clean latents, (B, C, h, w), of pictures, (B, C, H, W)."""
        ...

    def read_taps(self, noised_latents: Tensor, timesteps: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return tokens, (B, N, D), at each (block, feature), of noised latents, (B, C, h, w), from one pass."""
        ...

    def token_grid(self, latents: Tensor) -> tuple[int, int]:
        """Return rows and columns of the token grid of latents, (B, C, h, w)."""
        ...


@dataclass(frozen=True)
class TimestepSelection:
    """Which timestep was chosen, from what, and how sure the choice is.

    Args:
        timestep: The chosen timestep, an integer in [0, 1000), 0 = least noise.
        timesteps: The timesteps that were read, rising.
        scores: The criterion at each of them.
        smoothed: The same, each averaged with its neighbours: what the choice was made by.
        intervals: 95 % bootstrap interval (over groups of pictures) of each score.
        log_snr: 2·ln(alpha / sigma) at each of them.
        confidence: Share of bootstrap resamples of the pictures that choose this timestep or one within 1.5 of it in
            log-SNR (a neighbour in the default grid), in [0, 1].
        criterion: Name of the criterion.
        settings: Its settings, by name.
        options: What else the choice depends on: `max_images`, `confidence` (the wanted one) and `batch_size` of
            `select_timestep`, `noise_seed` and `num_noise_draws` of the configuration.
        block: Block at which features were read, counted from the first.
        feature: Feature that was read there.
        num_images: Pictures that were looked at.
        pictures: "given", or "generated" by the transformer itself.
        stopped_by: Why no more pictures were looked at: "confidence" (the wanted one was reached), "max_images", or
            "all pictures".
        num_forwards: Passes of a picture through the backbone, those that generated pictures included.
        seconds: Time it took.
        seed: Seed of the sampled or generated pictures, of the bootstrap and, for "hfr" and "signal_hfr", of the
            noise; the other criteria read features with the model's own noise.
        warnings: What speaks against trusting the choice, and what to do about it.
        table: Where several taps were compared: for each its block, feature, scores and smoothed scores.
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
    table: list[dict[str, Any]] | None = None

    def is_of(self, config: ASelectConfig) -> bool:
        """Return whether this is how the timestep of a configuration was chosen, at its tap."""
        return (self.timestep, self.block, self.feature) == (config.timestep, config.block_index(), config.feature)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain numbers, strings and lists, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TimestepSelection":
        """Return the record that `to_dict` wrote.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        fields = set(cls.__dataclass_fields__)
        if record.keys() != fields:
            raise ValueError(
                f"Not a record of a selection: missing {sorted(fields - record.keys())}, "
                f"unknown {sorted(record.keys() - fields)}."
            )
        return cls(**record)

    def plot(
        self,
        path: str | os.PathLike[str],
        accuracies: Sequence[float] | None = None,
        accuracy_log_snr: Sequence[float] | None = None,
    ) -> list[Path]:
        """Draw the criterion over the timestep, with intervals and the choice, as a PNG.

        Where several taps were compared, a heat map of all of them is written beside it, as `NAME_heat_map.png`.

        Args:
            path: File to write.
            accuracies: Accuracy of a probe at each timestep, in [0, 1], to be drawn beside the criterion.
            accuracy_log_snr: Where the probe was tried at other timesteps, their log-SNR.

        Returns:
            The files written.

        Raises:
            ImportError: If matplotlib is missing.
        """
        written = [Path(path)]
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
        )
        if self.table is not None:
            written.append(written[0].with_name(f"{written[0].stem}_heat_map.png"))
            plot_timestep_heat_map(
                written[1],
                self.timesteps,
                self.log_snr,
                [_tap_name(row["block"], row["feature"]) for row in self.table],
                [row["smoothed"] for row in self.table],
                _tap_name(self.block, self.feature),
                self.timestep,
                self.criterion,
            )
        return written


def select_timestep(
    model: ReadableModel,
    images: Any = None,  # noqa: ANN401 - whatever the docstring lists
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
    equal everywhere is done by each: pictures that the transformer makes, and the first 32 of a consensus.

    The best timestep is that whose score is largest in the mean with its neighbours' scores, weighted by 2^-d², where
    d is their distance in log-SNR: a step of DDPM's default grid counts half, and on a much coarser grid each score
    counts alone. The curve is smooth on that scale and a score from few pictures is not, so this steadies the choice.

    Nothing in the model changes; set `model.config.timestep` to the result to use it.

    Args:
        model: Model with the tap (`config.block`, `config.feature`) to choose a timestep for.
        images: PIL pictures or arrays; a `datasets` dataset with an image column, streaming or not; or pixel values,
            (B, C, H, W), in [-1, 1]. A stream is read from its start on several times, so it should be shuffled, with
            a seed: the same each time. Default: the transformer generates some.
        criterion: "signal_hfr" (share of high frequencies in what two noise draws agree on), "hfr" (the paper's, of
            one noise draw), "consensus" (how much of what the features agree on can be read from this one), "probe"
            (accuracy of a linear probe, needs `labels`), or one with settings of its own,
            such as `criteria.HFR(cutoff=0.25)`.
        timesteps: Timesteps to read, integers in [0, 1000): all of them, from every picture. Default: from coarse to
            fine on `model.noise_schedule.even_timesteps()`.
        labels: For "probe": class index of each picture in `images`, or the name of a column.
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
            is unknown or lacks its labels, the labels are not one class index a picture, a tap does not exist, or a
            number is out of range.

    Source: A-SelecT, arXiv 2603.25758, for "hfr"; the rest is ours.
    """
    started = time.monotonic()
    criterion = _checked_criterion(criterion, labels)
    if max_images < 1 or batch_size < 1:
        raise ValueError(f"`max_images` and `batch_size` must be at least 1, got {max_images} and {batch_size}.")
    if not 0 <= confidence <= 1:
        raise ValueError(f"`confidence` must be in [0, 1], got {confidence}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be in [0, 2**63), got {seed}.")
    taps = _checked_taps(model.config, block, feature, several=isinstance(criterion, Probe))
    grid = model.noise_schedule.even_timesteps() if timesteps is None else _checked_grid(timesteps)
    search = _Search(model, criterion, taps, grid, batch_size, seed)
    if labels is not None:
        search.labels = _checked_labels(labels, images)
    with eval_mode(model), torch.no_grad():
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
    found = curve.timesteps[best]
    selection = TimestepSelection(
        timestep=found,
        timesteps=curve.timesteps,
        scores=curve.scores[best_tap].tolist(),
        smoothed=curve.smoothed[best_tap].tolist(),
        intervals=curve.intervals[best_tap].tolist(),
        log_snr=model.noise_schedule.log_snr(torch.tensor(curve.timesteps)).tolist(),
        confidence=curve.confidence,
        criterion=criterion.name,
        settings=asdict(criterion) if is_dataclass(criterion) and not isinstance(criterion, type) else {},
        options={
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
        table=[
            {"block": at, "feature": name, "scores": scores.tolist(), "smoothed": smoothed.tolist()}
            for (at, name), scores, smoothed in zip(taps, curve.scores, curve.smoothed, strict=True)
        ]
        if len(taps) > 1
        else None,
    )
    logger.info(
        "Chose timestep %d (log-SNR %.2f, confidence %.2f) of %d by %s from %d pictures, %s of block %d, in %.1f s.",
        found,
        selection.log_snr[best],
        selection.confidence,
        len(grid),
        criterion.name,
        selection.num_images,
        selection.feature,
        selection.block,
        selection.seconds,
    )
    for warning in selection.warnings:
        logger.warning("The choice of timestep %d: %s", found, warning)
    return selection


@dataclass(frozen=True)
class _Curve:
    """Scores of A taps at the T timesteps read so far, and what the bootstrap says of them."""

    grid: list[int]
    timesteps: list[int]
    scores: Tensor  # (A, T)
    smoothed: Tensor  # (A, T), what the choice is made by
    intervals: Tensor  # (A, T, 2)
    rivals: list[int]  # places of the best tap's timesteps that are as good as the best in some of the resamples
    best: tuple[int, int]  # which tap, which timestep
    confidence: float

    def warnings(self, wanted: float, remedies: tuple[str, str]) -> list[str]:
        """Return what speaks against trusting the choice, and what to do about it.

        Args:
            wanted: The confidence that was asked for.
            remedies: What gives more pictures, and what labels would decide.
        """
        more, remedy = remedies
        tap, best = self.best
        scores = self.smoothed[tap].tolist()
        found: list[str] = []
        if len(scores) < 2:
            return found
        reached = sorted({best, *self.rivals})
        if best in (0, len(scores) - 1):
            steady = all((after >= before) == bool(best) for before, after in pairwise(scores))
            found.append(
                f"it lies at the {'noisy' if best else 'clean'} edge of the grid"
                + (", and the curve only rises toward it: " if steady else ": ")
                + ("the criterion may measure noise alone" if best else "the criterion may see only what noise takes")
                + f". Compare it with a timestep inside the range by {remedy}."
            )
        if len(reached) > len(scores) / 2:
            found.append(
                f"the curve is flat: {len(reached)} of {len(scores)} timesteps cannot be told apart. "
                f"Any of them may serve; {more} or {remedy} may decide."
            )
        peaks = [
            i
            for i in reached
            if all(scores[i] >= scores[j] for j in (i - 1, i + 1) if 0 <= j < len(scores)) and abs(i - best) > 1
        ]
        if peaks and len(reached) <= len(scores) / 2:
            found.append(
                f"the curve has other peaks as high, at {', '.join(str(self.timesteps[i]) for i in peaks)}. "
                "Read a finer grid (`timesteps=model.noise_schedule.even_timesteps(40)`), or compare them by "
                f"{remedy}."
            )
        if self.confidence < wanted:
            found.append(
                f"its confidence is {self.confidence:.2f}, below {wanted:.2f}: other pictures may give another "
                f"timestep. Use {more}, or {remedy}."
            )
        return found


class _Search:
    """What was read so far: sums over pictures, by timestep and group of pictures, and how to read more."""

    def __init__(
        self,
        model: ReadableModel,
        criterion: Criterion,
        taps: list[Tap],
        grid: list[int],
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.criterion, self.taps, self.grid = model, criterion, taps, grid
        self.batch_size, self.seed = batch_size, seed
        self.labels: list[int] | None = None
        self.generated = False
        self.rank, self.world = _process()
        self.num_images = self.num_forwards = 0
        self.sums: dict[int, Tensor] = {}  # by timestep, (A, G, S)
        self.pooled: dict[int, list[tuple[list[int], Tensor]]] = {}  # of the probe only: indices, (A, B, D)
        self.consensus = ConsensusSums(NUM_GROUPS) if isinstance(criterion, Consensus) else None
        self.references = _reference_taps(model.config) if self.consensus else []
        # Of consensus and probe, which are not sums of what was measured: by timestep and number of pictures.
        self.fitted: dict[tuple[int, int], Tensor] = {}
        self.groups: set[int] = set()
        self.latents: dict[int, Tensor] = {}
        self.kept_bytes = 0
        self.bar: Any = None

    def warnings(self) -> list[str]:
        """Return what speaks against trusting any choice from these pictures."""
        if self.num_images >= self.criterion.min_images:
            return []
        remedy = "Give more pictures"
        if self.generated:
            remedy = "Give pictures, or raise `max_images`"
        elif self.labels is None:
            remedy += ", or none: the transformer then makes its own"
        needed = f"{self.criterion.name!r} needs {self.criterion.min_images} or more, however sure it seems"
        return [f"it rests on {self.num_images} pictures, and {needed}. {remedy}."]

    def generate(self, num_images: int) -> Tensor:
        """Return latents that the model made itself, (n, C, h, w), and count what they cost."""
        model: Any = self.model
        logger.info(
            "No pictures to choose a timestep from are given: the transformer makes %d, in %d passes.",
            num_images,
            model.count_generation_forwards(num_images),
        )
        latents: Tensor = model.generate_latents(num_images, batch_size=self.batch_size, seed=self.seed)
        latents = latents.to(model.device, model.dtype)
        self.generated = True
        # Every process makes all of them.
        self.num_forwards += self.world * model.count_generation_forwards(num_images)
        self.latents = dict(enumerate(latents))
        return latents

    def run(self, pictures: CalibrationPictures, wanted: list[int], max_images: int, confidence: float) -> str:
        """Read pictures in rounds until the choice is sure; return why it ended."""
        size = max_images if pictures.order is None else len(pictures.order)
        done, goal = 0, min(self.criterion.first_round, size)
        # Not `disable=False` in the first process: that would overrule TQDM_DISABLE.
        quiet = {"disable": True} if self.rank else {}
        with host_logging.tqdm(desc="Choosing the timestep", unit="pass", leave=False, **quiet) as bar:
            self.bar = bar
            if self.consensus:
                done = min(NUM_CALIBRATION, goal)
                self._calibrate(pictures, done, wanted)
            while True:
                before = self.num_images
                self._read(pictures, done, goal, wanted)
                if not self.num_images:
                    raise ValueError("No pictures to choose a timestep from: the set is empty.")
                while missing := self._unread_neighbours(wanted):
                    wanted = sorted({*wanted, *missing})
                    self._read(pictures, 0, goal, missing)
                if goal < size and self.num_images - before == goal - done:
                    if self.curve().confidence >= confidence:
                        return "confidence"
                    done, goal = goal, min(goal + -(-goal // 2), size)
                    continue
                sure = self.curve().confidence >= confidence
                return "confidence" if sure else "max_images" if self.num_images == max_images else "all pictures"

    def _unread_neighbours(self, read: list[int]) -> list[int]:
        """Return the neighbours in the grid of the best timestep that were not read yet."""
        curve = self.curve()
        place = self.grid.index(curve.timesteps[curve.best[1]])
        return [t for t in self.grid[max(0, place - 1) : place + 2] if t not in read]

    def _read(self, pictures: CalibrationPictures, start: int, stop: int, timesteps: list[int]) -> None:
        """Add a part of the pictures to the sums at some timesteps."""
        first_time = start >= self.num_images
        count = 0
        for indices, load in pictures.batches(start, stop, self.batch_size, self.rank, self.world):
            latents = self._encode(indices, load)
            count += len(indices)
            self._read_batch(latents, indices, timesteps)
            self.groups.update(index % NUM_GROUPS for index in indices)
        counts = _gather(count)
        draws = self.criterion.num_draws or self.model.config.num_noise_draws
        self.num_forwards += sum(counts) * len(timesteps) * draws
        if first_time:
            self.num_images += sum(counts)

    def _read_batch(self, latents: Tensor, indices: list[int], timesteps: list[int]) -> None:
        rows, columns = self.model.token_grid(latents)
        if self.consensus is None:
            for chosen, tokens in self._tokens(latents, indices, timesteps, self.taps):
                self._add(chosen, indices, [self.criterion.measure(tokens[tap], rows, columns) for tap in self.taps])
            return
        known = all(index in self.consensus.targets for index in indices)
        taps = self.taps if known else list(dict.fromkeys([*self.taps, *self.references]))
        pooled = {
            (chosen, *tap): self.criterion.measure(tokens[tap], rows, columns)
            for chosen, tokens in self._tokens(latents, indices, timesteps, taps)
            for tap in taps
        }
        self._add_pooled(self.consensus, indices, pooled, timesteps, known)

    def _add_pooled(
        self,
        consensus: ConsensusSums,
        indices: list[int],
        pooled: dict[Key, Tensor],
        timesteps: list[int],
        known: bool,
    ) -> None:
        """Add some pictures' pooled tokens, (B, D), to a consensus; and their targets, unless these are known."""
        if not known:
            # Timesteps that were read later, next to the best, have no share in the targets.
            consensus.add_targets(indices, pooled)
        calibrated = sorted({timestep for timestep, _, _ in consensus.scales})
        for timestep in timesteps:
            near = min(calibrated, key=lambda known: abs(known - timestep))
            consensus.add(timestep, indices, pooled[(timestep, *self.taps[0])], (near, *self.taps[0]))

    def _calibrate(self, pictures: CalibrationPictures, stop: int, timesteps: list[int]) -> None:
        """Take the scales of the reference features from the first pictures, and add these to the sums.

        Every process reads them all, so that all have the same scales, and adds its share.
        """
        assert self.consensus is not None  # called for a consensus only
        pooled: dict[Key, list[Tensor]] = {}
        read: list[int] = []
        taps = list(dict.fromkeys([*self.references, *self.taps]))
        for indices, load in pictures.batches(0, stop, self.batch_size, 0, 1):
            latents = self._encode(indices, load)
            read += indices
            for chosen, tokens in self._tokens(latents, indices, timesteps, taps):
                for tap in taps:
                    pooled.setdefault((chosen, *tap), []).append(self.criterion.measure(tokens[tap], 0, 0))
        if not read:
            raise ValueError("No pictures to choose a timestep from: the set is empty.")
        together = {key: torch.cat(values) for key, values in pooled.items()}
        self.consensus.calibrate(together)
        self.consensus.scales = _gather(self.consensus.scales)[0]
        own = pictures.share(0, stop, self.rank, self.world)
        if own := [index for index in own if index in read]:  # a stream may have ended
            places = [read.index(index) for index in own]
            mine = {key: values[places] for key, values in together.items()}
            self._add_pooled(self.consensus, own, mine, timesteps, known=False)
            self.groups.update(index % NUM_GROUPS for index in own)
        self.num_images = len(read)
        self.num_forwards += self.world * len(read) * len(timesteps) * self.model.config.num_noise_draws

    def _encode(self, indices: list[int], load: Any) -> Tensor:  # noqa: ANN401 - reads the pixel values
        if all(index in self.latents for index in indices):
            return torch.stack([self.latents[index] for index in indices])
        latents = self.model.encode(load())
        for index, latent in zip(indices, latents, strict=True):
            if self.kept_bytes < MAX_KEPT_BYTES and index not in self.latents:
                self.latents[index] = latent.clone()
                self.kept_bytes += latent.nbytes
        return latents

    def _tokens(
        self, latents: Tensor, indices: list[int], timesteps: list[int], taps: list[Tap]
    ) -> Iterator[tuple[int, dict[Tap, Tensor]]]:
        """Yield each timestep with the tokens of all draws, (K, B, N, D), at each tap."""
        noise = self._noise(latents, indices)  # (K, B, C, h, w)
        num_draws, size = noise.shape[:2]
        together = max(1, self.batch_size // (num_draws * size))
        device = latents.device
        for at in range(0, len(timesteps), together):
            chosen = timesteps[at : at + together]
            where = torch.tensor(chosen).repeat_interleave(num_draws * size)
            repeated = latents.repeat(len(chosen) * num_draws, 1, 1, 1)
            drawn = noise.flatten(0, 1).repeat(len(chosen), 1, 1, 1)
            noised = self.model.noise_schedule.add_noise(repeated, drawn, where)
            parts = [
                self.model.read_taps(batch, steps.to(device), taps)
                for batch, steps in zip(noised.split(self.batch_size), where.split(self.batch_size), strict=True)
            ]
            read = {tap: torch.cat([part[tap] for part in parts]) for tap in taps}
            for number, timestep in enumerate(chosen):
                here = slice(number * num_draws * size, (number + 1) * num_draws * size)
                yield timestep, {tap: tokens[here].unflatten(0, (num_draws, size)) for tap, tokens in read.items()}
            self.bar.update(len(where))

    def _noise(self, latents: Tensor, indices: list[int]) -> Tensor:
        """Return the noise of each draw and picture, (K, B, C, h, w); the timesteps share it.

        Each picture has noise of its own, a function of the seed and the picture: what two draws have in common must
        vanish in the mean over pictures. Only a criterion of the features as they are used later has the model's own.
        """
        shape = tuple(latents.shape[1:])
        config = self.model.config
        if not self.criterion.num_draws:
            draws = [fixed_noise(shape, config.noise_seed, draw) for draw in range(config.num_noise_draws)]
            return torch.stack(draws)[:, None].expand(-1, len(indices), *shape)
        drawn = [
            np.random.Generator(np.random.Philox(key=[self.seed, index])).standard_normal(
                (self.criterion.num_draws, *shape), dtype=np.float32
            )
            for index in indices
        ]
        return torch.from_numpy(np.stack(drawn, axis=1))

    def _add(self, timestep: int, indices: list[int], measured: list[Tensor]) -> None:
        if isinstance(self.criterion, Probe):
            self.pooled.setdefault(timestep, []).append((indices, torch.stack(measured)))
            return
        values = torch.stack(measured)  # (A, B, S)
        if timestep not in self.sums:
            self.sums[timestep] = values.new_zeros(len(self.taps), NUM_GROUPS, values.shape[-1])
        self.sums[timestep].index_add_(1, torch.tensor(indices) % NUM_GROUPS, values)

    def _all_sums(self) -> dict[int, Tensor]:
        """Return the sums of all processes, added in the order of their ranks."""
        if isinstance(self.criterion, Probe):
            return self._sums_of_hits(self.criterion)
        if self.consensus:
            return self._sums_of_errors(self.consensus)
        total: dict[int, Tensor] = {}
        for part in _gather(self.sums):
            for timestep, sums in part.items():
                total[timestep] = total[timestep] + sums if timestep in total else sums
        return total

    def _unfitted(self, by_timestep: dict[int, Any]) -> dict[int, Any]:
        """Return what was kept at the timesteps that have not been fitted to the pictures read so far."""
        return {t: kept for t, kept in by_timestep.items() if (t, self.num_images) not in self.fitted}

    def _fitted(self) -> dict[int, Tensor]:
        return {timestep: sums for (timestep, count), sums in self.fitted.items() if count == self.num_images}

    def _sums_of_hits(self, probe: Probe) -> dict[int, Tensor]:
        parts = _gather(self._unfitted(self.pooled))
        for timestep in sorted({timestep for part in parts for timestep in part}):
            batches = [batch for part in parts for batch in part.get(timestep, [])]
            indices = torch.tensor([index for named, _ in batches for index in named])
            order = indices.argsort()
            pooled = torch.cat([values for _, values in batches], dim=1)[:, order]
            labels = torch.tensor(self.labels)[indices[order]]
            hits = torch.stack([probe.hits(each, labels) for each in pooled])  # (A, n, 2)
            sums = hits.new_zeros(len(self.taps), NUM_GROUPS, 2)
            self.fitted[timestep, self.num_images] = sums.index_add_(1, indices[order] % NUM_GROUPS, hits)
        return self._fitted()

    def _sums_of_errors(self, consensus: ConsensusSums) -> dict[int, Tensor]:
        # Some megabytes a timestep: only of those that are new.
        parts = _gather((self._unfitted(consensus.moments), consensus.target_moments))
        targets = torch.stack([target for _, target in parts]).sum(0)
        for timestep in sorted(set().union(*(moments for moments, _ in parts))):
            moments = torch.stack([moments[timestep] for moments, _ in parts if timestep in moments]).sum(0)
            self.fitted[timestep, self.num_images] = unexplained(moments, targets)[None]
        return self._fitted()

    def curve(self) -> _Curve:
        """Return the scores at all timesteps read so far, with the bootstrap over groups of pictures."""
        by_timestep = self._all_sums()
        timesteps = sorted(by_timestep)
        groups = sorted(set().union(*_gather(self.groups)))
        sums = torch.stack([by_timestep[t] for t in timesteps], dim=1)[:, :, groups]  # (A, T, G, S)
        scores = self.criterion.score(sums.sum(2))
        if not bool(scores.isfinite().all()):
            raise ValueError(
                "The criterion is not finite at every timestep: the model's features are NaN, infinite or all zero"
                + (", or one picture is too few. " if self.num_images < 2 else ". ")
                + "Check its weights and the pictures."
            )
        log_snr = self.model.noise_schedule.log_snr(torch.tensor(timesteps)).to(scores)
        kernel = _smoothing_kernel(log_snr)
        # Rounded, so that equal scores stay equal: the rows of the kernel add up to 1 but for the last bit.
        smoothed = (scores @ kernel.T).round(decimals=ROUNDED_TO)
        best = divmod(int(smoothed.argmax()), len(timesteps))
        generator = torch.Generator().manual_seed(self.seed)
        picks = torch.randint(len(groups), (NUM_RESAMPLES, len(groups)), generator=generator)
        weights = torch.zeros(NUM_RESAMPLES, len(groups), dtype=sums.dtype).scatter_add_(
            1, picks, torch.ones(picks.shape, dtype=sums.dtype)
        )
        resampled = self.criterion.score(torch.einsum("rg,atgs->rats", weights, sums))  # (R, A, T)
        ends = torch.tensor([0.025, 0.975], dtype=resampled.dtype)
        intervals = resampled.quantile(ends, dim=0).movedim(0, -1)
        resampled = (resampled @ kernel.T).round(decimals=ROUNDED_TO)
        chosen = resampled.flatten(1).argmax(1)
        # Not so many places of the grid: it may be fine or coarse.
        near = (log_snr[chosen % len(timesteps)] - log_snr[best[1]]).abs() <= NEAR
        near &= chosen // len(timesteps) == best[0]
        # In pairs: a picture that is hard at one timestep is so at the next, which separate intervals do not know.
        as_good = (resampled[:, best[0]] >= resampled[:, best[0], best[1], None]).double().mean(0)
        rivals = (as_good >= RIVAL_SHARE).nonzero().flatten().tolist()
        return _Curve(self.grid, timesteps, scores, smoothed, intervals, rivals, best, float(near.double().mean()))


def _remedies(search: _Search, max_images: int) -> tuple[str, str]:
    """Return what gives more pictures, and what labels would decide."""
    if search.generated:
        more = "pictures of your own"
    elif search.num_images >= max_images:
        more = "more pictures (`max_images`)"
    else:
        more = "more pictures"
    labelled = isinstance(search.criterion, Probe)
    return more, "more labelled pictures" if labelled else "`criterion='probe'` with a few labels"


def _smoothing_kernel(log_snr: Tensor) -> Tensor:
    """Return how much each timestep's score counts at each timestep, (T, T), of log-SNRs, (T,); rows add up to 1."""
    weights = torch.exp2(-((log_snr[:, None] - log_snr) / SMOOTHING_WIDTH).square())
    return weights / weights.sum(1, keepdim=True)


def _checked_criterion(criterion: str | Criterion, labels: Any) -> Criterion:  # noqa: ANN401 - checked later
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
        criterion = CRITERIA[criterion]
    if isinstance(criterion, Probe) != (labels is not None):
        raise ValueError(
            "`criterion='probe'` needs `labels`, the class index of each picture or the name of their column."
            if labels is None
            else f"`labels` are given, but {criterion.name!r} uses none; did you mean `criterion='probe'`?"
        )
    return criterion


def _checked_labels(labels: Any, images: Any) -> list[int]:  # noqa: ANN401 - what they may be is checked here
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
    elif isinstance(block, str):
        raise ValueError(f"`block` must be an integer, several of them, or 'auto', got {block!r}.")
    else:
        blocks = [config.block_index(each) for each in ([block] if block is None or isinstance(block, int) else block)]
    if feature == "auto":
        features = list(AUTO_FEATURES)
    else:
        features = [config.feature] if feature is None else [feature] if isinstance(feature, str) else list(feature)
    for each in features:
        check_feature(each)
    taps = list(product(blocks, features))
    if len(taps) > 1 and not several:
        raise ValueError(
            "Several blocks or features can only be compared by `criterion='probe'`: the scores of the other criteria "
            f"say nothing across taps. Name one block and one feature, got {len(taps)} taps."
        )
    if not taps:
        raise ValueError("Name at least one block and one feature.")
    return taps


def _tap_name(block: int, feature: str) -> str:
    return f"block {block}, {feature}"


def _reference_taps(config: ASelectConfig) -> list[Tap]:
    """Return the taps whose agreement a consensus is: four features of three blocks, from 0 to 6/8 of the depth."""
    blocks = sorted({share * config.num_hidden_layers // 8 for share in (0, 3, 6)})
    return list(product(blocks, AUTO_FEATURES))


def _checked_grid(timesteps: Sequence[int]) -> list[int]:
    if not len(timesteps):
        raise ValueError("`timesteps` must name at least one timestep, got none.")
    for timestep in timesteps:
        if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):
            check_timestep(timestep)
    grid = sorted({operator.index(timestep) for timestep in timesteps})  # of numpy and torch, too
    for timestep in (grid[0], grid[-1]):
        check_timestep(timestep)
    return grid


def _process() -> tuple[int, int]:
    """Return the rank of this process and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _gather(value: Any) -> list[Any]:  # noqa: ANN401 - anything that can be pickled
    """Return the value of each process, in the order of their ranks."""
    world = _process()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values
