"""The sizes of diffusers' transformers, by family, read off their configurations: no torch, no diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TransformerLayout:
    """What must be known of a transformer before it is built.

    Args:
        num_layers: Blocks that can be tapped, in the order in which they are run.
        num_attention_heads: Attention heads of a block.
        hidden_size: Width of its tokens.
        key_value_size: Width of keys and values: less than `hidden_size` where several heads share them.
        num_channels: Channels of the latents.
        patch_size: Latents a side that one token stands for.
        sample_size: Latents a side that the transformer was made for.
        max_grid: Tokens a side that its position table reaches; None where there is no limit.
        num_attention_outputs: The first so many blocks have an output projection of their attention alone.
        needs_prompt: Whether it is conditioned on a text, and so on the embeddings of the empty one.
    """

    num_layers: int
    num_attention_heads: int
    hidden_size: int
    key_value_size: int
    num_channels: int
    patch_size: int
    sample_size: int
    max_grid: int | None
    num_attention_outputs: int
    needs_prompt: bool


# No transformer has a size beyond this; with one, building a configuration would take the machine's memory.
MAX_SIZE = 2**16
MAX_LAYERS = 1000
_PLAIN = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")


def _plain(config: dict[str, Any], needs_prompt: bool, max_grid: int | None = None) -> TransformerLayout:
    hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
    return TransformerLayout(
        num_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        hidden_size=hidden_size,
        key_value_size=hidden_size,
        num_channels=config["in_channels"],
        patch_size=config["patch_size"],
        sample_size=config["sample_size"],
        max_grid=max_grid,
        num_attention_outputs=config["num_layers"],
        needs_prompt=needs_prompt,
    )


def _sd3(config: dict[str, Any]) -> TransformerLayout:
    return _plain(config, needs_prompt=True, max_grid=config["pos_embed_max_size"])


def _flux(config: dict[str, Any]) -> TransformerLayout:
    hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
    return TransformerLayout(
        # Blocks of two streams first, then those of one.
        num_layers=config["num_layers"] + config["num_single_layers"],
        num_attention_heads=config["num_attention_heads"],
        hidden_size=hidden_size,
        key_value_size=hidden_size,
        # diffusers' pipeline packs 2 × 2 latents into one token before the transformer sees them.
        num_channels=config["in_channels"] // 4,
        patch_size=2,
        sample_size=128,  # of the pipeline: the transformer has no position table and takes any size
        max_grid=None,
        # A block of one stream projects attention and MLP together.
        num_attention_outputs=config["num_layers"],
        needs_prompt=True,
    )


def _lumina2(config: dict[str, Any]) -> TransformerLayout:
    head_size = config["hidden_size"] // config["num_attention_heads"]
    return TransformerLayout(
        num_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
        key_value_size=head_size * (config.get("num_kv_heads") or config["num_attention_heads"]),
        num_channels=config["in_channels"],
        patch_size=config["patch_size"],
        sample_size=config["sample_size"],
        # Rotary positions are tabulated.
        max_grid=min(config["axes_lens"][1:]),
        num_attention_outputs=config["num_layers"],
        needs_prompt=True,
    )


_LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], TransformerLayout]]] = {
    "DiTTransformer2DModel": (_PLAIN, lambda config: _plain(config, needs_prompt=False)),
    "SD3Transformer2DModel": ((*_PLAIN, "pos_embed_max_size"), _sd3),
    "PixArtTransformer2DModel": (_PLAIN, lambda config: _plain(config, needs_prompt=True)),
    "FluxTransformer2DModel": (
        ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "num_single_layers"),
        _flux,
    ),
    "SanaTransformer2DModel": (_PLAIN, lambda config: _plain(config, needs_prompt=True)),
    "Lumina2Transformer2DModel": (
        ("hidden_size", "num_attention_heads", "in_channels", "num_layers", "sample_size", "patch_size", "axes_lens"),
        _lumina2,
    ),
}
FAMILY_NAMES = tuple(_LAYOUTS)


def check_family(name: str | None) -> None:
    """Refuse a transformer class that is none of the families.

    Raises:
        ValueError: If `name` is none of them.
    """
    if not isinstance(name, str) or name not in _LAYOUTS:
        raise ValueError(
            f"Unsupported transformer {name!r}; supported are {', '.join(FAMILY_NAMES)}. CONTRIBUTING.md says how to "
            "add a family."
        )


def layout_of(transformer: dict[str, Any]) -> TransformerLayout:
    """Return the layout of a transformer.

    Args:
        transformer: diffusers' configuration of it, with `_class_name`.

    Raises:
        ValueError: If its class is none of the families, or the configuration lacks a size.
    """
    name = transformer.get("_class_name")
    check_family(name)
    needed, read = _LAYOUTS[str(name)]
    if missing := [size for size in needed if transformer.get(size) is None]:
        raise ValueError(
            f"`transformer` lacks {', '.join(missing)}: give the whole configuration that diffusers saved "
            "(`dict(transformer.config)`)."
        )
    if "axes_lens" in needed:
        lengths = transformer["axes_lens"]
        if not isinstance(lengths, list | tuple) or len(lengths) != 3 or not all(map(_is_size, lengths)):
            raise ValueError(f"`transformer` must have a list of three lengths as `axes_lens`, got {lengths!r}.")
        shared = transformer.get("num_kv_heads")
        if shared is not None and not _is_size(shared):
            raise ValueError(f"`transformer` must have an integer from 1 on as `num_kv_heads`, got {shared!r}.")
    sizes = {size: transformer[size] for size in needed if size != "axes_lens"}
    if wrong := {size: value for size, value in sizes.items() if not _is_size(value)}:
        raise ValueError(
            f"`transformer` must have sizes that are integers from 1 on, got {wrong}; at most {MAX_SIZE}."
        )
    if deep := {size: value for size, value in sizes.items() if "layers" in size and value > MAX_LAYERS}:
        raise ValueError(f"`transformer` must have at most {MAX_LAYERS} blocks, got {deep}.")
    return read(transformer)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE
