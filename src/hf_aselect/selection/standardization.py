"""What standardises a tap's tokens: a scale for each channel and a shift for each position and channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

# A channel that hardly varies here could be anything elsewhere: it counts as varying by this share of the mean one.
LEAST_SHARE = 1e-3


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
