"""Decoders: token maps to a class for every pixel."""

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

POOL_SCALES = (1, 2, 3, 6)


class LinearDecoder(nn.Module):
    """Batch norm and a linear classifier of each token; logits are enlarged to pixels.

    Args:
        width: Channels of the token map.
        num_labels: Classes.

    Source: the linear segmentation head of DINOv2, arXiv 2304.07193.
    """

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Conv2d(width, num_labels, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, None]:
        """Return logits of the token grid, (B, K, rows, columns), of the last map, (B, D, rows, columns)."""
        return self.classifier(self.norm(maps[-1])), None


class FeaturePyramid(nn.Module):
    """Four maps of one resolution to four resolutions: 4, 2, 1 and 1/2 times that of the token grid.

    Args:
        width: Channels of each map.

    Source: BEiT, arXiv 2106.08254, appendix; transformers' `BeitForSemanticSegmentation`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enlarge_4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
        )
        self.enlarge_2 = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        # A grid of one row or column stays as it is.
        self.halve = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid of four maps, (B, D, rows, columns) each, finest first."""
        first, second, third, fourth = maps
        return [self.enlarge_4(first), self.enlarge_2(second), third, self.halve(fourth)]


class UperNetDecoder(nn.Module):
    """transformers' own UperNet head on a feature pyramid, with its auxiliary head.

    Args:
        width: Channels of each of the four maps.
        num_labels: Classes.
        hidden_size: Channels of the head.
        auxiliary_hidden_size: Channels of the auxiliary head; 0 for none.

    Source: UperNet, arXiv 1807.10221; transformers, `models/upernet/modeling_upernet.py`.
    """

    def __init__(self, width: int, num_labels: int, hidden_size: int, auxiliary_hidden_size: int) -> None:
        super().__init__()
        config = SimpleNamespace(
            pool_scales=POOL_SCALES,
            hidden_size=hidden_size,
            num_labels=num_labels,
            auxiliary_in_channels=None,
            auxiliary_channels=auxiliary_hidden_size,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.pyramid = FeaturePyramid(width)
        self.head = UperNetHead(config, in_channels=[width] * 4)
        self.auxiliary_head = UperNetFCNHead(config, in_channels=[width] * 4) if auxiliary_hidden_size else None

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return logits, (B, K, 4 · rows, 4 · columns), and the auxiliary head's, (B, K, rows, columns), in training.

        Args:
            maps: Four maps, (B, D, rows, columns), shallow to deep.
        """
        pyramid = self.pyramid(maps)
        auxiliary = self.auxiliary_head(pyramid) if self.auxiliary_head is not None and self.training else None
        return self.head(pyramid), auxiliary


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return logits, (B, K, h, w), interpolated to (B, K, height, width)."""
    enlarged: Tensor = interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    return enlarged


def token_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Return tokens, (B, N, D), as a map, (B, D, rows, columns)."""
    grid: Tensor = tokens.transpose(1, 2).unflatten(-1, (rows, columns))
    return grid.contiguous()
