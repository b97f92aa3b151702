"""What standardises a tap's tokens: a scale for each channel and a shift for each position and channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.layouts import ReadOut, Tap
from .distribution import Share
from .massive_channels import given_channels
from .placement import stages_once_moved
from .reader import Reader
from .sweep import Sweep, progress_bar

# A channel that hardly varies here could be anything elsewhere: it counts as varying by this share of the mean one.
LEAST_SHARE = 1e-3
MAX_IMAGES = 256  # more would hardly change the statistics


@dataclass
class TokenMoments:
    """Sums over images from which the standardisation of a tap's tokens follows.

    Args:
        count: Images so far.
        total: Sum of their tokens at each position, (N, D), float64.
        squares: Sum of the squared distance from `origin`, over images and positions, (D,), float64.
        origin: What tokens are counted from, (N, D), float64: those of an image, as the differences between images
            can be a thousandth of the tokens.
    """

    count: int
    total: Tensor
    squares: Tensor
    origin: Tensor

    @classmethod
    def from_origin(cls, origin: Tensor) -> "TokenMoments":
        """Return empty sums with an origin, (N, D)."""
        origin = origin.double()
        return cls(0, torch.zeros_like(origin), origin.new_zeros(origin.shape[1]), origin)

    def add(self, tokens: Tensor) -> None:
        """Add the tokens of some images, (B, N, D)."""
        distance = tokens.double() - self.origin
        self.count += len(tokens)
        self.total += distance.sum(0)
        self.squares += distance.square().sum((0, 1))

    @classmethod
    def combined(cls, parts: Sequence["TokenMoments"]) -> "TokenMoments":
        """Return the sums over the images of all parts, whatever their origins."""
        whole = cls.from_origin(parts[0].origin)
        for part in parts:
            moved = part.origin - whole.origin
            whole.count += part.count
            whole.total += part.total + part.count * moved
            whole.squares += part.squares + (2 * moved * part.total + part.count * moved.square()).sum(0)
        return whole

    @property
    def position_means(self) -> Tensor:
        """The mean token at each position, (N, D), float64."""
        return self.origin + self.total / self.count

    def deviation(self, per_position: bool = True) -> Tensor:
        """Return how far each channel's tokens are from their mean, (D,), float64: root mean square.

        Args:
            per_position: Whether from the mean at their position, or from that of all positions.
        """
        num_tokens = self.count * len(self.total)
        mean = self.total / self.count
        between_images = self.squares / num_tokens - mean.square().mean(0)
        variance = between_images.clamp_min(0)
        if not per_position:
            variance = variance + self.position_means.var(0, correction=0)
        return variance.sqrt()

    @property
    def share_between_images(self) -> float:
        """Share of the tokens' variance, in [0, 1], that is between images; the rest is between positions.

        Both are taken channel by channel and the shares averaged, so that no channel outweighs the others.
        """
        between = self.deviation().square()
        whole = self.deviation(per_position=False).square()
        return float((between / whole.clamp_min(torch.finfo(whole.dtype).tiny)).mean())


def scale_and_shift(moments: TokenMoments, per_position: bool = True) -> tuple[Tensor, Tensor]:
    """Return the scale, (D,), and the shift, (N, D), float32, by which `tokens * scale + shift` is standardised.

    What differs between images then has a mean square of 1 in each channel. Where the noise is the same for all
    images, so is what it does to the tokens at each position, which can be a thousand times what differs between
    images: the mean token at each position is taken out. What it says of the position is kept: it is added again
    at no more than the size of what differs between images.

    Args:
        moments: Sums over the images.
        per_position: Whether the noise is the same for all images. If not, one mean serves for all positions.
    """
    means = moments.position_means
    mean = means.mean(0)
    deviation = _floored(moments.deviation(per_position), means)
    scale = 1 / deviation
    if not per_position:
        shift = (-mean * scale).expand_as(means)
    else:
        between_positions = means.std(0, correction=0)
        shift = (means - mean) / torch.maximum(deviation, between_positions) - means * scale
    return scale.float(), shift.float().contiguous()


def _floored(deviation: Tensor, means: Tensor) -> Tensor:
    """Return deviations, (D,), none of which is 0, or less than the rounding of the tokens."""
    rounding = 1e-5 * means.abs().mean(0)
    floored = torch.maximum(deviation, LEAST_SHARE * deviation.mean()).maximum(rounding)
    # A feature that is 0 everywhere stays 0.
    return torch.where(floored > 0, floored, torch.ones_like(floored))


# Of each tap at a timestep: scale, (D,), and shift, (rows, columns, D), float32.
Statistics = dict[ReadOut, tuple[Tensor, Tensor]]


def measured(sweep: Sweep, tap: Tap, timesteps: Sequence[int]) -> dict[str, Any]:
    """Return what a record has of the images of a sweep, read once more at the tap and timesteps that it selected.

    All processes call it together, and count its passes among those of the sweep.
    """
    reader, own_noise = sweep.reader, _with_own_noise(sweep.reader)
    num_images = min(sweep.num_images, MAX_IMAGES)
    if num_images < 2:
        return {}
    config = reader.model.config
    read_outs = [each for stage in stages_once_moved(reader.model, timesteps, tap) for each in stage]
    known = [tap, *sweep.taps_read_together]
    others = [(block, feature) for _, block, feature in read_outs if (block, feature) not in known]
    own_noise.channels |= given_channels(config, others)
    every = [(timestep, *tap) for timestep in timesteps]
    moments, grid = read_moments(own_noise, list(dict.fromkeys([*every, *read_outs])), num_images, sweep.share)
    reader.num_forwards += own_noise.num_forwards
    is_standardized = bool(read_outs) and config.standardize_features
    return {
        "share_between_images": min(moments[each].share_between_images for each in every),
        "standardization": statistics_of(config, moments, read_outs, grid) if is_standardized else None,
    }


def read_moments(
    reader: Reader, read_outs: Sequence[ReadOut], num_images: int, share: Share
) -> tuple[dict[ReadOut, TokenMoments], tuple[int, int]]:
    """Return the sums over images of the tokens of each tap at its timestep, and the rows and columns of their grid.

    Args:
        reader: Reads with the model's own noise.
        read_outs: Timesteps and taps; each image is read once at each of the timesteps.
        num_images: How many of the set's images.
        share: Which of them this process reads; all processes get the same sums.

    Raises:
        ValueError: If there are no images, or tokens are NaN or infinite.
    """
    own: dict[ReadOut, TokenMoments] = {}
    grid: tuple[int, int] | None = None
    taps: dict[Any, list[Tap]] = {}  # by timestep
    for timestep, block, feature in read_outs:
        taps.setdefault(timestep, []).append((block, feature))
    every = list(dict.fromkeys(tap for here in taps.values() for tap in here))
    with progress_bar("Standardizing features") as reader.bar:
        for batch in reader.batches(0, num_images, list(taps), share):
            grid = batch.grid
            for timestep, read in batch.read(every):
                for tap in taps[timestep]:
                    # The mean over noise draws. Not every accelerator has float64.
                    tokens = read[tap].cpu().double().mean(0)  # (B, N, D)
                    own.setdefault((timestep, *tap), TokenMoments.from_origin(tokens[0])).add(tokens)
    # A process may have no image, where there are fewer than processes.
    parts = [part for part in share.gather((own, grid)) if part[0]]
    if not parts:
        raise ValueError("`images` is empty, so there is nothing to standardize the features on.")
    moments = {each: TokenMoments.combined([part[each] for part, _ in parts]) for each in read_outs}
    if not all(bool(each.squares.isfinite().all()) for each in moments.values()):
        raise ValueError("The model's features are NaN or infinite. Check its weights and the images.")
    return moments, parts[0][1]


def statistics_of(
    config: Any, moments: dict[ReadOut, TokenMoments], read_outs: Sequence[ReadOut], grid: tuple[int, int]
) -> Statistics:
    """Return what standardizes the tokens of taps and timesteps, of a token grid of some rows and columns."""
    # With fresh noise in training nothing but the images is the same at a position.
    per_position = not config.resample_noise_in_training
    found = {each: scale_and_shift(moments[each], per_position) for each in read_outs}
    return {each: (scale, shift.unflatten(0, grid)) for each, (scale, shift) in found.items()}


def concatenated_statistics(found: Statistics, stage: Sequence[ReadOut]) -> tuple[Tensor, Tensor]:
    """Return scale and shift of the tokens of several taps and timesteps that lie side by side."""
    scales, shifts = zip(*(found[each] for each in stage), strict=True)
    return torch.cat(scales, dim=-1), torch.cat(shifts, dim=-1)


def _with_own_noise(reader: Reader) -> Reader:
    """Return a reader of the same images that reads as the model does, from the latents that are there already."""
    own = Reader(reader.model, reader.images, dict(reader.channels), 0, reader.batch_size, reader.seed)
    own.latents, own.kept_bytes = reader.latents, reader.kept_bytes
    return own
