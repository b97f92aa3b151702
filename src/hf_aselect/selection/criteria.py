"""The criteria that a timestep can be selected by: each measures images and turns the sums into a score."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..model.checks import is_finite_number
from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import Tap
from .accumulators import (
    Accumulator,
    ConsensusAccumulator,
    Context,
    PatchLabels,
    ProbeAccumulator,
    SumAccumulator,
    is_before_mixing,
)
from .consensus import LEAST_LOG_SNR, NUM_COMPONENTS
from .probe import held_out_hits, leave_one_out_hits
from .spectrum import band_powers, noisy_power, signal_power, token_spectrum

# A probe of patches is tried on each of so many parts of the images.
NUM_FOLDS = 8
# How many statistics of the tokens a consensus reads: the mean, or the standard deviation, too. By head: all that a
# linear one sees is the mean.
POOLINGS = {"mean": 1, "mean_std": 2}
POOLING_OF_HEAD = {"linear": "mean", "attention": "mean_std"}
# Of `Consensus`, by pooling. Settled on six pairs of a transformer and a dataset, see model_cards/selection-benchmark.
REGION_WEIGHTS = {"mean": 0.5, "mean_std": 0.2}
# Labels: the class index of each image, or its mask.
CLASSES, MASKS = "classes", "masks"


class Criterion(Protocol):
    """A score for each timestep, the largest wins.

    The numbers that `measure` returns are added up over images, so a criterion is a function of sums. One that is not,
    as `Probe` and `Consensus`, has a method `accumulator` more, which takes a `Context` and returns what gathers its
    sums in another way. It may also have

    - `labels_wanted`, what its accumulator needs as the context's labels: `CLASSES` or `MASKS`;
    - `compares_taps`, whether its scores can be compared across blocks and features (default: if it needs labels);
    - `scores_sets`, whether its accumulator scores several timesteps together, by `joint_sums` (default: no);
    - `least_log_snr`, which takes the model's configuration and the taps, and returns the log-SNR at which the default
      grid ends (default: where the noise schedule's ends);
    - `suited_to`, which takes the model's configuration and whether masks are given, and returns the criterion with
      the settings that suit these.
    """

    name: ClassVar[str]
    # Images of the first round, before the selection is looked at.
    first_round: ClassVar[int]
    # With fewer images the selection is warned of, however sure the bootstrap is.
    min_images: ClassVar[int]

    @property
    def num_draws(self) -> int:
        """Noise draws of each image; 0 stands for the model's own noise, with which its features are used later."""
        ...

    def measure(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return numbers that add up over images, (B, S), float64 on the CPU, of tokens, (K, B, N, D)."""
        ...

    def score(self, sums: Tensor) -> Tensor:
        """Return scores, (...), of sums over images, (..., S)."""
        ...


def accumulator_of(criterion: Criterion, context: Context) -> Accumulator:
    """Return what gathers a criterion's sums: its own accumulator, or the sum of what it measures."""
    if not hasattr(criterion, "accumulator"):
        return SumAccumulator(criterion.measure, context)
    made: Accumulator = criterion.accumulator(context)
    return made


def labels_wanted(criterion: Criterion) -> str | None:
    """Return which labels a criterion needs, `CLASSES` or `MASKS`; None where it needs none."""
    wanted: str | None = getattr(criterion, "labels_wanted", None)
    return wanted


def compares_taps(criterion: Criterion) -> bool:
    """Return whether a criterion's scores can be compared across blocks and features."""
    return bool(getattr(criterion, "compares_taps", labels_wanted(criterion) is not None))


def scores_sets(criterion: Criterion) -> bool:
    """Return whether a criterion scores several timesteps together."""
    return bool(getattr(criterion, "scores_sets", False))


def least_log_snr(criterion: Criterion, config: ASelectConfig, taps: Sequence[Tap]) -> float:
    """Return the log-SNR at which a criterion wants the default grid to end, minus infinity if it sets no limit."""
    if not hasattr(criterion, "least_log_snr"):
        return -math.inf
    least: float = criterion.least_log_snr(config, taps)
    return least


def suited(criterion: Criterion, config: ASelectConfig, has_masks: bool) -> Criterion:
    """Return a criterion with the settings that suit a model's configuration and its labels."""
    if not hasattr(criterion, "suited_to"):
        return criterion
    made: Criterion = criterion.suited_to(config, has_masks)
    return made


@dataclass(frozen=True)
class HFR:
    """The paper's criterion: the share of high spatial frequencies in features of one noise draw.

    Args:
        cutoff: Radius above which a frequency is high, as a share of Nyquist, in [0, 1).
        amplitude: Whether amplitudes are summed instead of powers.
        with_constant: Whether the constant part (frequency 0) counts in the whole.

    Source: A-SelecT, arXiv 2603.25758. The paper's exact formula could not be read; the defaults are a reconstruction,
    with the cut-off of the authors' configuration.
    """

    name: ClassVar[str] = "hfr"
    num_draws: ClassVar[int] = 1
    first_round: ClassVar[int] = 64
    min_images: ClassVar[int] = 8

    cutoff: float = 0.15
    amplitude: bool = False
    with_constant: bool = True

    def measure(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return each image's ratio and a 1 to count it, (B, 2)."""
        spectra = _spectra(tokens, rows, columns)
        power = spectra.abs().mean(0).sum(1) if self.amplitude else noisy_power(spectra)
        # On the CPU: not every accelerator has float64.
        high, whole = band_powers(power.cpu().double(), self.cutoff, self.with_constant).unbind(-1)
        return torch.stack([high / whole, torch.ones_like(whole)], dim=-1)

    def score(self, sums: Tensor) -> Tensor:
        """Return the mean ratio, in [0, 1]."""
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class SignalHFR:
    """The share of high spatial frequencies in what two noise draws agree on (their cross-spectrum).

    Noise has high frequencies of its own, so the paper's criterion can rise toward pure noise; what independent draws
    agree on has none. Ours.

    Args:
        cutoff: Radius above which a frequency is high, as a share of Nyquist, in [0, 1).
        with_constant: Whether the constant part (frequency 0) counts in the whole.
        num_draws: Noise draws of each image, two or more.

    Raises:
        ValueError: If there are fewer draws than two.
    """

    name: ClassVar[str] = "signal_hfr"
    first_round: ClassVar[int] = 64
    min_images: ClassVar[int] = 8

    cutoff: float = 0.15
    with_constant: bool = True
    num_draws: int = 2

    def __post_init__(self) -> None:
        """Reject a single draw, which agrees with itself in everything."""
        if self.num_draws < 2:
            raise ValueError(f"`num_draws` of 'signal_hfr' must be at least 2, got {self.num_draws}.")

    def measure(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return each image's high and whole power of the signal, and whole power of the noisy features, (B, 3)."""
        spectra = _spectra(tokens, rows, columns)
        signal = band_powers(signal_power(spectra).cpu().double(), self.cutoff, self.with_constant)
        noisy = band_powers(noisy_power(spectra).cpu().double(), self.cutoff, self.with_constant)
        return torch.cat([signal, noisy[..., 1:]], dim=-1)

    def score(self, sums: Tensor) -> Tensor:
        """Return the ratio of the summed powers, near [0, 1]."""
        high, whole, noisy = sums.unbind(-1)
        # Where the draws agree on less than a quarter of the power, the ratio is one of two small numbers and can be
        # anything, or even without bound: there it fades to 0.
        return high / torch.maximum(whole, noisy / 4)


@dataclass(frozen=True)
class Probe:
    """Accuracy of a linear probe on mean-pooled tokens, each image left out in turn. Needs labels.

    It keeps of each image its pooled tokens, D numbers a timestep and tap.
    """

    name: ClassVar[str] = "probe"
    labels_wanted: ClassVar[str] = CLASSES
    scores_sets: ClassVar[bool] = True
    num_draws: ClassVar[int] = 0
    first_round: ClassVar[int] = 2**30  # all: its accuracy depends on how many images it learns from
    min_images: ClassVar[int] = 32

    def suited_to(self, config: ASelectConfig, has_masks: bool) -> "Probe":
        """Return the probe of patches where masks are given."""
        return PatchProbe() if has_masks and type(self) is Probe else self

    def accumulator(self, context: Context) -> Accumulator:
        """Return what keeps the tokens and is fitted to all images."""
        labels = torch.tensor(context.labels)
        return ProbeAccumulator(self.measure, self.hits, lambda indices, grid: labels[indices], context)

    def measure(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return the mean token of each image, (B, D), over the noise draws."""
        return tokens.float().mean((0, 2)).cpu()

    def hits(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return for each image whether the probe is right about it and a 1 to count it, (n, 2), float64.

        They are NaN where a feature is not finite.
        """
        if not bool(pooled.isfinite().all()):
            return torch.full((len(labels), 2), torch.nan, dtype=torch.float64)
        hits = leave_one_out_hits(pooled, labels).double()
        return torch.stack([hits, torch.ones_like(hits)], dim=-1)

    def score(self, sums: Tensor) -> Tensor:
        """Return the accuracy, in [0, 1]."""
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class PatchProbe(Probe):
    """The accuracy of a linear probe of single patches, for dense tasks: needs a mask of each image.

    A ridge classifier of some patches' tokens, on images that it was not fitted to. A patch's class is that of most
    of its pixels.

    Args:
        num_patches: Patches of each image, at the same places in all, at least 1; the whole grid where it has fewer.

    Raises:
        ValueError: If `num_patches` is less than 1.
    """

    name: ClassVar[str] = "patch_probe"
    labels_wanted: ClassVar[str] = MASKS
    min_images: ClassVar[int] = 16

    num_patches: int = 16

    def __post_init__(self) -> None:
        """Reject numbers out of range."""
        if self.num_patches < 1:
            raise ValueError(f"`num_patches` of 'patch_probe' must be at least 1, got {self.num_patches}.")

    def accumulator(self, context: Context) -> Accumulator:
        """Return what keeps the patches' tokens and is fitted to those of other images."""
        return ProbeAccumulator(self.measure, self.hits, PatchLabels(self.places, context), context)

    def places(self, num_tokens: int) -> Tensor:
        """Return which tokens are read: the same at random each time, (S,)."""
        order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
        return order[: self.num_patches].sort().values

    def measure(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return the tokens of some patches of each image, (B, S, D), averaged over the noise draws."""
        return tokens[:, :, self.places(rows * columns)].float().mean(0).cpu()

    def hits(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return of how many patches of each image the probe is right, and how many have a class, (n, 2), float64.

        They are NaN where a feature is not finite.

        Args:
            pooled: Tokens of patches, (n, S, D).
            labels: Their classes, (n, S); -1 for those of none.
        """
        if not bool(pooled.isfinite().all()):
            return torch.full((len(labels), 2), torch.nan, dtype=torch.float64)
        known = labels >= 0
        pictures = torch.arange(len(labels))[:, None].expand_as(labels)
        right = torch.zeros_like(known)
        right[known] = held_out_hits(pooled[known], labels[known], pictures[known] % NUM_FOLDS)
        return torch.stack([right.sum(1), known.sum(1)], dim=-1).double()


@dataclass(frozen=True)
class Consensus:
    """How much of what the features of several timesteps and blocks agree on can be read from this one. Ours.

    The share of variance (R²) of the 20 leading principal components of all reference features that a ridge regression
    predicts from pooled tokens, cross-validated: a linear probe whose labels are the transformer's own. See
    `consensus`. The references are `hidden`, `query`, `key` and `value` of the first block and of those at 3/8 and 6/8
    of the depth, and the tap itself, at those timesteps of the coarse grid (or of the given ones) whose log-SNR lies
    between -5.5 and 8, or less for few labels of aligned images (`consensus.reference_range`). So a pass goes to 6/8
    of the depth even for an earlier tap. Several taps are held against the same targets, so that their scores can be
    compared.

    At a single tap of the first block that is read before the attention (`query`, `key`, `value`, `normed`) by its
    mean alone, what is coarse in the images counts in the targets, too (`consensus.LAYOUT_WEIGHT`): no token has seen
    another there, and their mean tells where something is only because noise and position embeddings differ from place
    to place. More noise tells more, until nothing is left of the image, so the default grid ends there at a log-SNR
    of -5.5.

    Args:
        pooling: What it is read from: the "mean" of the tokens, which is all that a linear head sees, or "mean_std",
            their mean and standard deviation, for heads that look at each token. At the first block the two can want
            opposite ends of the range. Default: by the model's `config.head`, which is "attention" for models that
            have no such head (tokens alone, segmenters) unless it is set.
        region_weight: How much the means over 4 × 4 regions of the image count in the targets, against the mean over
            all of it; at least 0. It is multiplied by a · (1 - a) for the pooling "mean" and by a² for "mean_std",
            where a says how far images are aligned, from 0 (photographs) to 0.7 (digits). With several taps
            regions do not count. With 0 the layout of the images does not count either. Default: 0.5 for "mean" and
            0.2 for "mean_std".
        num_targets: Size of the random projection in which all reference features are added up, at least 20. What it
            holds is right to about 1 / sqrt(size), and it is kept for each image; with 128 numbers more accuracy is
            lost.

    Raises:
        ValueError: If `pooling` is neither, `num_targets` is less than 20, or `region_weight` is negative.
    """

    name: ClassVar[str] = "consensus"
    compares_taps: ClassVar[bool] = True
    scores_sets: ClassVar[bool] = True
    num_draws: ClassVar[int] = 0
    first_round: ClassVar[int] = 128
    min_images: ClassVar[int] = 32

    pooling: str | None = None
    num_targets: int = 512
    region_weight: float | None = None

    def __post_init__(self) -> None:
        """Reject an unknown pooling, and a projection that holds fewer numbers than there are components."""
        if self.pooling not in (None, *POOLINGS):
            raise ValueError(
                f"`pooling` of 'consensus' must be one of {', '.join(map(repr, POOLINGS))}, got {self.pooling!r}."
            )
        if type(self.num_targets) is not int or self.num_targets < NUM_COMPONENTS:
            raise ValueError(
                f"`num_targets` of 'consensus' must be an integer >= {NUM_COMPONENTS}, got {self.num_targets!r}."
            )
        weight = self._region_weight
        if not is_finite_number(weight) or weight < 0:
            raise ValueError(f"`region_weight` of 'consensus' must be a number >= 0, got {weight!r}.")

    def for_head(self, head: str) -> "Consensus":
        """Return this with the pooling that suits a head, "linear" or "attention", and with its weight of regions.

        What was named stays.
        """
        suited = replace(self, pooling=self.pooling or POOLING_OF_HEAD[head])
        return replace(suited, region_weight=suited._region_weight)

    def suited_to(self, config: ASelectConfig, has_masks: bool) -> "Consensus":
        """Return this with the pooling and the weight of regions that suit the model's head, where none was named."""
        # A linear head that reads more than the mean is like an attention head in that.
        return self.for_head("attention" if config.pooling != "mean" else config.head)

    def accumulator(self, context: Context) -> Accumulator:
        """Return what holds the tap against the features of all timesteps and several blocks."""
        return ConsensusAccumulator(
            self.measure,
            self.measure_regions,
            self.num_targets,
            self.num_read,
            self._region_weight,
            self._has_layout(context.config, context.taps),
            context,
        )

    def least_log_snr(self, config: ASelectConfig, taps: Sequence[Tap]) -> float:
        """Return where the default grid ends: at the end of the references where the layout counts."""
        return LEAST_LOG_SNR if self._has_layout(config, taps) else -math.inf

    def _has_layout(self, config: ASelectConfig, taps: Sequence[Tap]) -> bool:
        """Return whether tokens that have not seen each other are read by their mean alone."""
        return self.num_read == 1 and self._region_weight > 0 and is_before_mixing(config, taps)

    @property
    def _region_weight(self) -> float:
        """The weight of regions: what was named, or the pooling's own."""
        own = REGION_WEIGHTS[self.pooling or "mean_std"]
        return own if self.region_weight is None else self.region_weight

    @property
    def num_read(self) -> int:
        """How many of the measured statistics are read, counted from the first."""
        return POOLINGS[self.pooling or "mean_std"]

    def measure(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return the statistics of each image's tokens, averaged over the draws, (B, `num_read`, D), float32."""
        averaged = tokens.float().mean(0)
        statistics = [averaged.mean(1)]
        if self.num_read > 1:
            statistics.append(averaged.std(1, correction=0))
        return torch.stack(statistics, dim=1).cpu()

    def measure_regions(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return the mean token of each of up to 4 × 4 regions, averaged over the draws, (B, R, D), float32."""
        grid = tokens.float().mean(0).transpose(1, 2).unflatten(2, (rows, columns))
        return adaptive_avg_pool2d(grid, (min(rows, 4), min(columns, 4))).flatten(2).transpose(1, 2).cpu()

    def score(self, sums: Tensor) -> Tensor:
        """Return R², at most 1: 1 - squared error / variance, from their sums."""
        return 1 - sums[..., 0] / sums[..., 1]


def _spectra(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Return spectra, (K, B, D, h, w), of the tokens of K noise draws, (K, B, N, D)."""
    return torch.stack([token_spectrum(draw, rows, columns) for draw in tokens])


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion for criterion in (HFR(), SignalHFR(), Consensus(), Probe(), PatchProbe())
}
