"""Classification heads: tokens to logits."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


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
