"""Heads and decoders: tokens to logits, of an image or of every pixel."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead


class LinearHead(nn.Module):
    """Mean pooling, layer norm and one linear layer.

    Args:
        hidden_size: Width D of the tokens.
        num_labels: Number of classes K.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        # The tokens of different taps and timesteps differ in scale by orders of magnitude.
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (B, K), of tokens, (B, N, D)."""
        logits: Tensor = self.classifier(self.norm(tokens.mean(1)))
        return logits


class AttentionHeadBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block without bias in its query, key and value projections.

    Args:
        hidden_size: Width D.
        num_attention_heads: Attention heads, a divisor of `hidden_size`.
        mlp_ratio: Width of the MLP as a multiple of `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.up_projection = nn.Linear(hidden_size, mlp_ratio * hidden_size)
        self.activation = nn.GELU()
        self.down_projection = nn.Linear(mlp_ratio * hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, num_outputs: int | None = None) -> Tensor:
        """Return the block's output for the first `num_outputs` tokens (default: all), (B, n, D), of (B, N, D)."""
        normed = self.attention_norm(hidden_states)
        split = self.query_key_value(normed).unflatten(-1, (3, self.num_attention_heads, -1))  # (B, N, 3, heads, d)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        mixed = nn.functional.scaled_dot_product_attention(query[:, :, :num_outputs], key, value)
        hidden_states = hidden_states[:, :num_outputs] + self.projection(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(hidden_states)
        output: Tensor = hidden_states + self.down_projection(self.activation(self.up_projection(normed)))
        return output


class AttentionHead(nn.Module):
    """A small transformer that reads the tokens into one class token.

    A linear layer to the head's width, a class token that starts at zero, pre-norm blocks, and a linear layer from the
    class token; no position embedding (the tokens know their place), no dropout, no final norm.

    Args:
        input_size: Width of the tokens.
        num_labels: Number of classes K.
        hidden_size: Width of the head.
        num_layers: Number of blocks.
        num_attention_heads: Attention heads in each.
        mlp_ratio: Width of their MLPs as a multiple of `hidden_size`.

    Source: the head of the A-SelecT authors' published code (arXiv 2603.25758), 16,766,600 parameters at the defaults
    of `ASelectConfig` with 1536 in and 200 classes.
    """

    def __init__(
        self,
        input_size: int,
        num_labels: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: int,
    ) -> None:
        super().__init__()
        self.input_projection = nn.Linear(input_size, hidden_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.blocks = nn.ModuleList(
            AttentionHeadBlock(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (B, K), of tokens, (B, N, D)."""
        hidden_states = self.input_projection(tokens)
        class_tokens = self.class_token.expand(tokens.shape[0], -1, -1)
        hidden_states = torch.cat([class_tokens, hidden_states], dim=1)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            # Of the last block only the class token is read: the others need no query and no MLP.
            hidden_states = block(hidden_states, num_outputs=1 if index == last else None)
        logits: Tensor = self.classifier(hidden_states[:, 0])
        return logits


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
