"""What must be known before a model is built: taps, and the sizes of transformers, whole and folded."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

Tap = tuple[int, str]  # block, feature
ReadOut = tuple[int | str, int, str]  # timestep, or "auto" as long as none is selected; block, feature
# Nobody reads more; with more, building a model would take the machine's memory.
MAX_READ_OUTS = 4096
Feature = Literal["hidden", "normed", "query", "key", "value", "attention"]
FEATURES: tuple[str, ...] = get_args(Feature)
PROJECTIONS = ("query", "key", "value")
# Statistics per channel that a linear head reads, see `heads.pooled_tokens`.
POOLINGS = {"mean": 1, "mean_std": 2, "regions": 5}
# Those that are read before the block's attention is run.
BEFORE_ATTENTION = ("normed", *PROJECTIONS)


# Of the records in a configuration, `selection` and `folded_layout`. Those without a number are of the first.
FORMAT = 1


def check_format(name: str, record: dict[str, Any]) -> None:
    """Reject a record that a later version wrote in another way.

    Raises:
        ValueError: If its `format` is above `FORMAT`, or no number.
    """
    found = record.get("format", FORMAT)
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise ValueError(
            f"`{name}` has format {str(found)[:100]!r}, but this version of hf_aselect reads formats up to {FORMAT}. "
            "Upgrade it: pip install -U hf_aselect."
        )


def plain(value: Any) -> Any:
    """Return a value with Python's own numbers and lists in place of numpy's, torch's and tuples, also inside."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    # A tuple of types: torch 2.6 compiles no `isinstance` of a union.
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple, range)) else value


def hint_of(name: Any) -> str:
    """Return what to do where a configuration of diffusers has no `_class_name`."""
    return "" if name else " Pass the object itself, because the `config` of an object has no class name."


def record_of(part: Any) -> Any:
    """Return diffusers' configuration of a transformer, VAE or scheduler, of the object itself or a dictionary."""
    config = getattr(part, "config", None)
    if isinstance(config, dict):
        # An object that was made, rather than loaded, has no name in it.
        part = {"_class_name": type(part).__name__, **config}
        part.pop("_use_default_values", None)
    return plain(part)


def tap_key(block: int, feature: str) -> str:
    """Return what a tap is called in a configuration, as "9.query"."""
    return f"{block}.{feature}"


def parse_tap_key(key: str) -> Tap:
    """Return block and feature of a tap's name in a configuration; a backbone's stem is "-1.hidden".

    Raises:
        ValueError: If it is none.
    """
    # Digits of ASCII, and so few that `int` takes them.
    found = re.fullmatch(r"(-1|0|[1-9][0-9]{0,5})\.([a-z]+)", str(key))
    if found is None or found[2] not in FEATURES:
        raise ValueError(f"A tap must be named 'BLOCK.FEATURE', such as '9.hidden', got {key!r}.")
    return int(found[1]), found[2]


def listed(name: str, value: Any) -> list[Any]:
    """Return what a field names as a list, of one value as of several.

    Raises:
        ValueError: If it is an empty list.
    """
    value = plain(value)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"`{name}` must name at least one {name}, got an empty list.")
    return values


def check_feature(feature: str) -> None:
    """Reject a name that is none of the features.

    Raises:
        ValueError: If `feature` is unknown.
    """
    if feature not in FEATURES:
        raise ValueError(f"`feature` must be one of {', '.join(FEATURES)}, got {feature!r}.")


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
        num_attention_outputs: How many of the first blocks have an output projection for attention alone.
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

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
POSITIONS = ("sincos", "table", "rotary", "none")
BLOCKS = ("plain", "sana", "lumina2")


@dataclass(frozen=True)
class FoldedLayout:
    """What must be known of a folded transformer to build it.

    Args:
        timestep: Timestep whose conditioning is in the weights, in [0, 1000); the first of several.
        taps: Where it can be read, as `tap_key` names it; blocks count as in the transformer that it was made from,
            and none after the last of them is there.
        others: Further timesteps. All of them share the weights, and each has norms and gates folded with its
            conditioning.
        num_channels: Channels of the latents.
        patch_size: Latents a side that one token stands for.
        hidden_size: Width D of the tokens.
        num_attention_heads: Attention heads of a block.
        num_key_value_heads: Of keys and values, where several heads share them; 0 where each has its own.
        mlp_size: Width of the MLPs; where a half of it gates the other, of a half.
        activation: Of the MLPs, "gelu", "gelu_tanh" (its approximation) or "silu".
        blocks: Kind of the blocks: "sana" and "lumina2" for those of these families, "plain" for all others.
        num_refiners: Blocks that are run on the image before those that are counted.
        rows: Rows of the token grid that it was folded for.
        columns: Its columns.
        positions: "sincos" for a table that is made again for other grids, "table" for one whose middle is cut out for
            smaller grids, "rotary" for rotary embeddings of any grid, "none" where there are none.
        position_base_size: Of a "sincos" table: tokens a side whose places are a whole number apart.
        position_table_size: Of a "table": rows and columns of the whole one, out of whose middle this one was cut.
        position_scale: Of a "sincos" table: what places are divided by.
        is_size_fixed: Whether the image's size is in the weights, too, so that no other can be read.
        attention_norm_eps: Epsilon of the norm before attention.
        mlp_norm_eps: Epsilon of the norm before the MLP.
        query_key_norm_eps: Epsilon of the norms of queries and keys, of each head or, in "sana", of all together; None
            where there are none.
        text_size: Tokens of the text's stream; 0 where there is none.
        is_text_first: Whether attention has the text before the image.
        num_cross_tokens: Tokens that a cross-attention of each block reads; 0 where there is none. Of one token there
            is none either: what is read of it is constant.
        num_cross_heads: Heads of the cross-attention; 0 for those of attention.
        cross_size: Channels of its queries, keys and values; 0 for the tokens' width.
        dual_attention_blocks: Blocks with a second attention, of the image alone.
        num_joint_blocks: Of a transformer with a text's stream: blocks of two streams; those after them have one.
        rotary_sizes: Of rotary positions: channels of a head for each axis (text, row, column).
        rotary_theta: Of rotary positions: base of the frequencies.
        is_text_placed: Of rotary positions: whether the text's tokens have places one after another, and the image
            the next; else all have the first.
    """

    timestep: int
    taps: tuple[str, ...]
    num_channels: int
    patch_size: int
    hidden_size: int
    num_attention_heads: int
    mlp_size: int
    rows: int
    columns: int
    num_key_value_heads: int = 0
    blocks: str = "plain"
    num_refiners: int = 0
    activation: str = "gelu_tanh"
    positions: str = "sincos"
    position_base_size: int = 1
    position_scale: float = 1.0
    position_table_size: int = 0
    is_size_fixed: bool = False
    attention_norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-6
    query_key_norm_eps: float | None = None
    text_size: int = 0
    is_text_first: bool = False
    num_cross_tokens: int = 0
    num_cross_heads: int = 0
    cross_size: int = 0
    dual_attention_blocks: tuple[int, ...] = ()
    num_joint_blocks: int = 0
    rotary_sizes: tuple[int, ...] = ()
    rotary_theta: float = 10000.0
    is_text_placed: bool = False
    others: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Reject values that no transformer is built of.

        Raises:
            ValueError: If there is one.
        """
        self._check(_is_timestep, "an integer in [0, 1000)", "timestep")
        are_others = all(map(_is_timestep, self.others)) and len({self.timestep, *self.others}) == 1 + len(self.others)
        self._check(lambda _: are_others, "other, distinct integers in [0, 1000)", "others")
        sizes = ("num_channels", "patch_size", "hidden_size", "num_attention_heads", "mlp_size", "rows", "columns")
        self._check(lambda value: _is_count(value) and value > 0, "a positive integer", *sizes, "position_base_size")
        counts = ("num_key_value_heads", "num_refiners", "num_cross_tokens", "num_cross_heads", "cross_size")
        self._check(_is_count, "an integer >= 0", *counts, "position_table_size", "text_size", "num_joint_blocks")
        self._check(_is_number, "a number", "attention_norm_eps", "mlp_norm_eps", "position_scale", "rotary_theta")
        self._check(lambda value: value is None or _is_number(value), "a number, or None,", "query_key_norm_eps")
        flags = ("is_size_fixed", "is_text_first", "is_text_placed")
        self._check(lambda value: isinstance(value, bool), "True or False", *flags)
        self._check(lambda values: all(map(_is_count, values)), "integers", "dual_attention_blocks", "rotary_sizes")
        for name, known in (("activation", ACTIVATIONS), ("positions", POSITIONS), ("blocks", BLOCKS)):
            self._check(known.__contains__, f"one of {', '.join(known)}", name)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`folded_layout` must have a `hidden_size` ({self.hidden_size}) that is a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads})."
            )
        heads, cross_heads = self.num_attention_heads, self.num_cross_heads or self.num_attention_heads
        for whole, name, part in (
            (heads, "num_key_value_heads", self.num_key_value_heads or heads),
            (self.cross_size or self.hidden_size, "num_cross_heads", cross_heads),
        ):
            if whole % part:
                raise ValueError(f"`folded_layout` must have a divisor of {whole} as `{name}`, got {part}.")
        if not self.position_scale or not self.rotary_theta:
            raise ValueError("`folded_layout` must have a `position_scale` and a `rotary_theta` above 0.")
        if not self.taps:
            raise ValueError("`folded_layout` must have at least one tap in `taps`, got an empty list.")
        for key in self.taps:
            parse_tap_key(key)

    def _check(self, is_fit: Callable[[Any], bool], wanted: str, *names: str) -> None:
        """Reject fields whose value does not fit."""
        for name in names:
            if not is_fit(value := getattr(self, name)):
                raise ValueError(f"`folded_layout` must have {wanted} as `{name}`, got {value!r}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FoldedLayout":
        """Build a layout from the output of `to_dict`.

        Raises:
            ValueError: If a value is missing, unknown or of the wrong kind.
        """
        if not isinstance(values, dict):
            raise ValueError(f"`folded_layout` must be a dictionary, got {type(values).__name__}.")
        check_format("folded_layout", values)
        values = {name: value for name, value in values.items() if name != "format"}
        names = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, values.keys() - names)):
            raise ValueError(
                f"`folded_layout` has unknown keys {', '.join(unknown)}, from another version of hf_aselect."
            )
        lists = {name: value for name, value in values.items() if name in _LISTS}
        if wrong := [name for name, value in lists.items() if not isinstance(value, list | tuple)]:
            raise ValueError(f"`folded_layout` must have lists as {', '.join(wrong)}.")
        try:
            return cls(**{**values, **{name: tuple(value) for name, value in lists.items()}})
        except TypeError as error:
            raise ValueError(f"`folded_layout` is incomplete ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """Return all values, in JSON's types."""
        given = {name: value for name, value in asdict(self).items() if name != "others" or value}
        return {"format": FORMAT, **{name: list(value) if name in _LISTS else value for name, value in given.items()}}

    @property
    def timesteps(self) -> tuple[int, ...]:
        """All timesteps that the weights are made for."""
        return self.timestep, *self.others

    @cached_property
    def tapped(self) -> list[Tap]:
        """Block and feature of each tap."""
        return [parse_tap_key(key) for key in self.taps]

    @cached_property
    def last_block(self) -> int:
        """The last block that is there, whole or in part; -1 if only the stem is."""
        return max(block for block, _ in self.tapped)

    def features_at(self, block: int) -> tuple[str, ...]:
        """Return the features that can be read of a block."""
        return tuple(feature for tapped, feature in self.tapped if tapped == block)

    def is_run(self, block: int) -> bool:
        """Return whether a block is run to its end."""
        return block < self.last_block or "hidden" in self.features_at(block)

    def is_attending(self, block: int) -> bool:
        """Return whether a block's attention is run."""
        return self.is_run(block) or "attention" in self.features_at(block)

    def projections_at(self, block: int) -> tuple[str, ...]:
        """Return which of query, key and value are needed at a block, in this order."""
        if self.is_attending(block):
            return PROJECTIONS
        return tuple(name for name in PROJECTIONS if name in self.features_at(block))

    def is_text_used_after(self, block: int) -> bool:
        """Return whether an attention that comes after a block, or after the stem (-1), looks at the text."""
        later = range(block + 1, self.last_block + 1)
        return self.text_size > 0 and any(self.is_attending(index) for index in later)

    def is_single(self, block: int) -> bool:
        """Return whether text and image are in one stream at a block."""
        return self.text_size > 0 and block >= self.num_joint_blocks


def _is_timestep(value: Any) -> bool:
    return _is_count(value) and value < 1000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e30


def _is_count(value: Any) -> bool:
    # None is larger; an integer of JSON may have any number of digits.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


_LISTS = ("taps", "dual_attention_blocks", "rotary_sizes", "others")
