"""Research checkpoints: weights by the names of facebookresearch/DiT, which SiT, REPA and SRA share.

They map one to one onto diffusers' `DiTTransformer2DModel`: queries, keys and values are one matrix there, and
diffusers has a copy of the embedders in every block. Sizes are read off the tensors. How a timestep is to be given is
not in them: that is the layout, which has to be said.
"""

import argparse
import logging
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..model.checks import PickledWeightsError, read_json, refuse_other_than_weights, short
from ..model.configuration_aselect import DDPM_LINEAR
from ..model.families import FAMILIES
from ..model.folded_transformer import sincos_table
from ..model.layouts import MAX_SIZE
from ..model.noise_schedule import DDPM_LIKE, FLOW_MATCHING, is_flow_matching
from .weight_files import CONFIG, PICKLES, iterate_weights, unreadable, weight_files

logger = logging.getLogger(__name__)

# A pickle is mapped again after this many bytes, to free the memory of the tensors read before.
_MAPPED_BYTES = 2**27
# Dictionaries in one another, in a checkpoint of a training.
_MAX_DEPTH = 8
# What wraps a module adds to the names inside: `torch.compile`, checkpointing, FSDP.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


@dataclass(frozen=True)
class ResearchLayout:
    """How the weights of some code want to be used.

    Args:
        timestep_embedding: The configuration's field of that name.
        scheduler: diffusers' configuration of a scheduler of that kind.
        words: What it stands for.
    """

    timestep_embedding: str
    scheduler: dict[str, Any]
    words: str


_LINEAR_PATHS = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
LAYOUTS = {
    "dit": ResearchLayout("original", DDPM_LINEAR, "diffusion, timesteps 0 to 999 (facebookresearch/DiT, DiT-SRA)"),
    "sit": ResearchLayout("sit", _LINEAR_PATHS, "flow matching with the image at time 1 (SiT)"),
    "repa": ResearchLayout("repa", _LINEAR_PATHS, "flow matching with the image at time 0 (REPA, SiT-SRA)"),
}

# Heads of the published sizes S, B, L and XL, by width: the tensors do not tell them.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_FREQUENCIES = 256
# Of all norms of the research code; diffusers' default is another before the MLP.
NORM_EPS = 1e-6
_ANCHOR = "x_embedder.proj.weight"
# Their names, and those of diffusers: of the whole, of the embedders that each block has, and of a block.
_WHOLE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_QKV = "attn.qkv"
# What only training needs: REPA's and SRA's heads that are compared with another model's features.
_DROPPED = re.compile(r"(projectors|ap_head)\.")
# Tensor names that identify other architectures, and their parts that a `DiTTransformer2DModel` does not have.
_OTHERS = (
    (
        r"(^|\.)(x_embedder\.proj1\.|in_context_posemb)",
        "JiT",
        "rotary positions, SwiGLU, RMSNorm and class tokens",
    ),
    (r"(^|\.)(s_embedder|s_projector)\.", "RAE", "rotary positions, SwiGLU, RMSNorm and a wide head of blocks"),
    (r"(^|\.)(cls_projectors2|wg_norm)\.", "REG", "a class token among the patches"),
    (r"(^|\.)(sideblocks|en_inblocks)\.", "MDT", "side blocks and relative positions"),
    (r"(^|\.)(decoder_layer\.|decoder_pos_embed|mask_token)", "MaskDiT", "a decoder with mask tokens"),
    (r"(^|\.)(in_blocks|mid_block|out_blocks)\.", "U-ViT", "skip connections between its blocks"),
    (
        r"(^|\.)(feat_rope\.|blocks\.0\.(mlp\.w\d|norm1\.weight))",
        "LightningDiT or a similar model",
        "rotary positions, SwiGLU and RMSNorm",
    ),
    (
        r"(^|\.)blocks\.0\.attn\.(q|k)_norm\.",
        "a DiT that normalizes its queries and keys",
        "a norm of queries and keys",
    ),
    (r"(^|\.)\w*rope\w*\.", "a DiT with rotary positions", "rotary positions"),
    (r"(^|\.)blocks\.0\.mlp\.(gate|gate_proj)\.", "a DiT with gated MLPs", "gated MLPs (SwiGLU)"),
)
# Classes by which ports of some of them are known.
_KIN_CLASSES = re.compile(r"(LightningDiT|JiT|RAEDiT|DiTwDDT)")
# As of diffusers 0.42, which has RAE's autoencoder alone.
_NOT_THERE = "diffusers has no such transformer"
# Classes of ports that keep the research names in diffusers' folders.
_PORT = re.compile(r"(SiT|DiT|REPA|SRA)([A-Z_0-9].*)?")


def is_port(class_name: Any) -> bool:
    """Return whether the class that a `config.json` names may be a port that keeps the research names."""
    return isinstance(class_name, str) and class_name not in FAMILIES and _PORT.fullmatch(class_name) is not None


def refuse_kin(class_name: Any) -> None:
    """Reject the class of a port of LightningDiT, JiT or RAE, unless somebody registered it as a family.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(class_name, str) and class_name not in FAMILIES and _KIN_CLASSES.match(class_name):
        raise ValueError(
            f"{class_name} is not supported: it has rotary positions, SwiGLU and RMSNorm, which a "
            f"DiTTransformer2DModel does not have, and {_NOT_THERE}."
        )


@dataclass(frozen=True)
class ResearchWeights:
    """The tensors of a research checkpoint, whatever file holds them.

    Args:
        where: What they are read from, for errors.
        shapes: Their shapes, by their names in the file.
        values: Yields those of some names, each a part of a file that is mapped.
        config: What a `config.json` beside them says; empty without one.

    Raises:
        ValueError: If they are of another architecture.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    values: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]]
    config: dict[str, Any]

    def __post_init__(self) -> None:
        """Reject tensors of other names, and those that are missing.

        Raises:
            ValueError: If there are some.
        """
        for pattern, name, lacking in _OTHERS:
            if found := next((key for key in self.shapes if re.search(pattern, key)), None):
                raise ValueError(
                    f"{self.where!r} has the weights of {name} (which has {found!r}). They cannot be converted: a "
                    f"DiTTransformer2DModel has no {lacking}, and {_NOT_THERE}."
                )
        if not self.names:
            raise ValueError(
                f"{self.where!r} has no weights in the layout of the DiT, SiT or REPA research code: expected "
                f"{_ANCHOR}, blocks.0.attn.qkv.weight, ..., found {short(sorted(self.shapes)[:4])}."
            )
        dropped = [name for name in self.names if _DROPPED.match(name)]
        expected = self._expected()
        unknown = sorted(self.names.keys() - expected - {"pos_embed"} - set(dropped))
        if missing := sorted(expected - self.names.keys()):
            others = f" It has {', '.join(unknown[:3])} instead." if unknown else ""
            raise ValueError(
                f"{self.where!r} lacks {len(missing)} tensors of a DiT with {self.num_layers} blocks, such as "
                f"{', '.join(missing[:3])}.{others} It is incomplete or has another architecture."
            )
        if unknown:
            raise ValueError(
                f"{self.where!r} has {len(unknown)} tensors that a DiT does not have, such as "
                f"{', '.join(unknown[:3])}. It has another architecture and cannot be converted."
            )

    @cached_property
    def names(self) -> dict[str, str]:
        """The names in the file by those of facebookresearch/DiT; empty where it is not that layout."""
        keys = {_unwrapped(key): key for key in self.shapes}
        prefixes = [key.removesuffix(_ANCHOR) for key in keys if re.search(rf"(^|\.){_ANCHOR}$", key)]
        if not prefixes:
            return {}
        # Weights that were averaged over training come first.
        prefix = min(prefixes, key=lambda each: ("ema" not in each, len(each)))
        if len(prefixes) > 1:
            others = ", ".join(repr(each.rstrip(".")) for each in prefixes if each != prefix)
            logger.info("%s has several sets of weights. Using %r, not %s.", self.where, prefix[:-1], others)
        found = {name.removeprefix(prefix): key for name, key in keys.items() if name.startswith(prefix)}
        # REPA's first checkpoints count the blocks after the one that is aligned again.
        depth = _depth(found, "blocks")
        return {
            re.sub(r"^decoder_blocks\.(\d+)", lambda block: f"blocks.{depth + int(block[1])}", name): key
            for name, key in found.items()
        }

    @cached_property
    def num_layers(self) -> int:
        """Number of blocks."""
        return _depth(self.names, "blocks")

    @property
    def predicted_channels(self) -> float:
        """Channels that are predicted: those of the latents, or twice as many with a learned variance."""
        return self._shape("final_layer.linear.weight", 2)[0] / max(1, self._shape(_ANCHOR, 4)[2]) ** 2

    def _expected(self) -> set[str]:
        """Return the tensor names of a DiT with this number of blocks."""
        blocks = [f"blocks.{block}.{part}" for block in range(self.num_layers) for part in (_QKV, *_BLOCK)]
        both = [f"{stem}.{kind}" for stem in (*_WHOLE, *_EMBEDDERS, *blocks) for kind in ("weight", "bias")]
        return set(both) - {"y_embedder.embedding_table.bias"}

    def _shape(self, name: str, num_dimensions: int) -> tuple[int, ...]:
        shape = self.shapes[self.names[name]]
        if len(shape) != num_dimensions:
            raise ValueError(f"{name!r} of {self.where!r} must have {num_dimensions} dimensions, got shape {shape}.")
        return shape

    def transformer(self, num_attention_heads: int | None = None) -> dict[str, Any]:
        """Return diffusers' configuration of the transformer, as the tensors tell it.

        Args:
            num_attention_heads: Heads of a block, which they do not tell. Default: what the `config.json` says, or
                those of the published sizes.

        Raises:
            ValueError: If the number of heads is unknown or does not divide the width, a size is not a DiT's, the
                positions are others, or the `config.json` contradicts the tensors.
        """
        width, channels, patch, _ = self._shape(_ANCHOR, 4)
        rows = self._shape("y_embedder.embedding_table.weight", 2)[0]
        outputs = self.predicted_channels
        mlp_ratio = self._shape("blocks.0.mlp.fc1.weight", 2)[0] / max(1, width)
        frequencies = self._shape("t_embedder.mlp.0.weight", 2)[1]
        is_usual = outputs in (channels, 2 * channels) and mlp_ratio == 4 and frequencies == _FREQUENCIES
        if not is_usual or min(width, channels, patch) < 1:
            raise ValueError(
                f"{self.where!r} is not a standard DiT: it predicts {outputs:g} channels from {channels} (expected "
                f"as many, or twice as many with a learned variance), its MLPs are {mlp_ratio:g} times as wide as "
                f"the tokens (expected 4), and it has {frequencies} timestep frequencies (expected {_FREQUENCIES})."
            )
        if rows in (10, 100, 1000):
            logger.warning(
                "%s has embeddings for %d labels. The last is assumed to be the null label, with which features are "
                "read. If the model was trained without label dropout, it is the embedding of a class.",
                self.where,
                rows,
            )
        heads = self._heads(width, num_attention_heads)
        if rows > MAX_SIZE:
            raise ValueError(f"{self.where!r} must have embeddings for at most {MAX_SIZE} classes, got {rows}.")
        sizes = {
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "in_channels": channels,
            "out_channels": int(outputs),
            "num_layers": self.num_layers,
            "sample_size": self._sample_size(width, patch),
            "patch_size": patch,
            "num_embeds_ada_norm": rows - 1,
        }
        self._check_config(sizes, width, rows)
        return {"_class_name": "DiTTransformer2DModel", **sizes, "norm_eps": NORM_EPS}

    def _heads(self, width: int, given: int | None) -> int:
        said = self.config.get("num_heads", self.config.get("num_attention_heads"))
        heads = said if given is None else given
        heads = _HEADS.get(width) if heads is None else heads
        if heads is None:
            raise ValueError(
                f"{self.where!r} has a width of {width}, which matches none of the published sizes "
                f"({', '.join(map(str, _HEADS))}). Pass `num_attention_heads=` (`--num-attention-heads`)."
            )
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
            raise ValueError(f"`num_attention_heads` must be an integer that divides {width}, got {heads!r}.")
        if given is not None and said not in (None, given):
            raise ValueError(
                f"`num_attention_heads` is {given}, but {CONFIG} of {self.where!r} has {said}. Omit it, or correct "
                "the file."
            )
        return heads

    def _sample_size(self, width: int, patch: int) -> int:
        """Return the latents a side that the weights were trained at.

        Raises:
            ValueError: If there are no positions, or they are not those of a square grid, row by row.
        """
        if "pos_embed" not in self.names:
            said = self.config.get("input_size", self.config.get("sample_size"))
            if not isinstance(said, int) or said < 1 or said % patch:
                raise ValueError(
                    f"{self.where!r} has no `pos_embed`, so the size of its latents is unknown. Save the weights "
                    f"with it, or add a {CONFIG} with the side of the latents as `input_size`."
                )
            return said
        _, num_tokens, _ = self._shape("pos_embed", 3)
        side = math.isqrt(num_tokens)
        ((_, table),) = self.values([self.names["pos_embed"]])
        # In half precision the table is rounded.
        is_usual = side**2 == num_tokens and width % 4 == 0 and table.shape == (1, num_tokens, width)
        if not is_usual or not torch.allclose(table.float(), sincos_table(width, side, side, side, 1), atol=1e-2):
            raise ValueError(
                f"{self.where!r} has a learned `pos_embed` of shape {tuple(table.shape)}, but DiT has the sines and "
                "cosines of a square grid. It cannot be converted."
            )
        return side * patch

    def _check_config(self, sizes: dict[str, Any], width: int, rows: int) -> None:
        """Check that a `config.json`, in the words of the research code or of diffusers, says what the tensors say.

        Raises:
            ValueError: If it does not.
        """
        learns_variance = sizes["out_channels"] != sizes["in_channels"]
        # Without dropped labels there is no null label.
        classes = (rows - 1, rows) if self.config.get("class_dropout_prob") == 0 else (rows - 1,)
        found: dict[str, tuple[Any, ...]] = {
            **{name: (value,) for name, value in sizes.items()},
            "depth": (sizes["num_layers"],),
            "hidden_size": (width,),
            "input_size": (sizes["sample_size"],),
            "num_heads": (sizes["num_attention_heads"],),
            "num_classes": classes,
            "num_embeds_ada_norm": classes,
            "learn_sigma": (learns_variance,),
            "mlp_ratio": (4,),
            "qk_norm": (False,),
        }
        for name, values in found.items():
            said = self.config.get(name)
            if isinstance(said, list) and len(set(map(str, said))) == 1:
                said = said[0]
            if said is not None and said not in values:
                raise ValueError(
                    f"{CONFIG} of {self.where!r} has {name}={short(said)}, but the tensors have {values[0]}. Use the "
                    "configuration that belongs to these weights."
                )

    def layout(
        self, name: str | None, timestep_embedding: str | None = None, is_checked: bool = True
    ) -> ResearchLayout:
        """Return the layout of a name.

        Args:
            name: "dit", "sit" or "repa".
            timestep_embedding: Or the field of the configuration that stands for it.
            is_checked: Whether tensors that speak against it are an error, rather than a warning.

        Raises:
            ValueError: If none is named, it is unknown, the two contradict each other, or the tensors contradict it.
        """
        by_embedding = {each.timestep_embedding: key for key, each in LAYOUTS.items()}
        name = by_embedding.get(timestep_embedding or "") if name is None else name
        known = "; ".join(f"{key!r}: {each.words}" for key, each in LAYOUTS.items())
        has_projectors = any(each.startswith("projectors.") for each in self.names)
        hint = " It has `projectors`, which only REPA trains." if has_projectors else ""
        if name is None:
            raise ValueError(
                f"{self.where!r} has weights of the DiT, SiT or REPA research code, whose tensors do not show which. "
                f"Pass `layout=` (`hf-aselect convert --layout`): {known}.{hint}"
            )
        if name not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {short(name)}. {known}.")
        layout = LAYOUTS[name]
        if timestep_embedding not in (None, layout.timestep_embedding):
            raise ValueError(
                f"`timestep_embedding={timestep_embedding!r}` conflicts with `layout={name!r}`, which uses "
                f"{layout.timestep_embedding!r}. Omit one of them."
            )
        learns_variance = self.predicted_channels == 2 * self._shape(_ANCHOR, 4)[1]
        if (name == "repa" and learns_variance) or (name != "repa" and has_projectors):
            sign = (
                "`projectors`, which only REPA trains"
                if has_projectors
                else "outputs for a variance, like DiT and SiT"
            )
            message = f"`layout` of {self.where!r} is {name!r}, but it has {sign}."
            if is_checked:
                fits = "'repa'" if has_projectors else "'dit' or 'sit'"
                raise ValueError(
                    f"{message} Pass `layout=` (`--layout`) {fits}, or skip this check with `check_layout=False` "
                    "(`--no-layout-check`)."
                )
            logger.warning("%s The conversion continues because the layout check is off.", message)
        return layout

    def scheduler(self, layout: ResearchLayout, found: dict[str, Any] | None) -> dict[str, Any]:
        """Return the configuration of the scheduler: what lies beside the weights, if it is one of diffusers.

        Raises:
            ValueError: If it is of another kind than the layout's.
        """
        if found is None:
            return dict(layout.scheduler)
        name = found.get("_class_name")
        if name not in (*DDPM_LIKE, *FLOW_MATCHING):
            logger.warning(
                "The scheduler of %s, %s, is not used. The noise schedule is that of the layout.", self.where, name
            )
            return dict(layout.scheduler)
        if is_flow_matching(found) != is_flow_matching(layout.scheduler):
            raise ValueError(
                f"The scheduler of {self.where!r} is a {name}, which does not match the layout ({layout.words}). "
                "Pass another `layout=`."
            )
        return found

    def of_diffusers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights by diffusers' names, one by one; those of training alone are dropped, with a warning."""
        dropped = sorted(name for name in self.names if _DROPPED.match(name))
        if dropped:
            logger.warning(
                "%d tensors of %s (%s) are only used in training and are ignored.",
                len(dropped),
                self.where,
                ", ".join(sorted({f"{name.partition('.')[0]}.*" for name in dropped})),
            )
        kept = {key: name for name, key in self.names.items() if name not in (*dropped, "pos_embed")}
        for key, value in self.values(list(kept)):
            refuse_other_than_weights(kept[key], value.dtype)
            yield from self._mapped(kept[key], value)

    def _mapped(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the converted names and tensors of one tensor, in separate memory."""
        stem, _, kind = name.rpartition(".")
        if stem in _WHOLE:
            yield f"{_WHOLE[stem]}.{kind}", value
        elif stem in _EMBEDDERS:
            for number in range(self.num_layers):
                yield f"transformer_blocks.{number}.{_EMBEDDERS[stem]}.{kind}", value.clone()
        else:
            _, block, part = stem.split(".", 2)
            if part != _QKV:
                yield f"transformer_blocks.{block}.{_BLOCK[part]}.{kind}", value
                return
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                yield f"transformer_blocks.{block}.attn1.to_{letter}.{kind}", third.clone()

    def check_shapes(self, expected: dict[str, torch.Size]) -> None:
        """Check, before anything is read, that the tensors have the shapes of the transformer.

        Args:
            expected: Shapes by the names that `DiTModel` gives them.

        Raises:
            ValueError: If one has another shape.
        """
        for name in sorted(self._expected()):
            # Of a wrong shape there may be no thirds.
            shape = self.shapes[self.names[name]]
            is_divided = _QKV not in name or (shape[:1] and shape[0] % 3 == 0)
            for target, value in self._mapped(name, torch.empty(shape, device="meta")) if is_divided else ():
                if value.shape != expected[f"denoiser.transformer.{target}"]:
                    is_divided = False
            if not is_divided:
                raise ValueError(
                    f"{name!r} of {self.where!r} has shape {shape}, which does not match the other tensors. The file "
                    "is damaged or has another architecture."
                )


def _unwrapped(name: str) -> str:
    """Return a name without what wrappers of modules add to it."""
    while (plain := _WRAPPERS.sub(r"\1", name)) != name:
        name = plain
    return name


def _depth(names: dict[str, str], part: str) -> int:
    """Return how many blocks there are, up to the last one."""
    numbers = [int(found[1]) for name in names if (found := re.match(rf"{part}\.(\d{{1,4}})\.", name))]
    return max(numbers, default=-1) + 1


def research_in(folder: Path, variant: str | None = None) -> ResearchWeights | None:
    """Return the weights in the research layout that a folder holds as safetensors; None where there are none.

    Raises:
        ValueError: If they are incomplete, of another architecture, or there are several.
    """
    config = _config_in(folder)
    class_name = config.get("_class_name")
    if (class_name in FAMILIES and class_name != "DiTTransformer2DModel") or "model_type" in config:
        return None
    try:
        found = [weight_files(folder, variant)]
    except ValueError:
        found = [[path] for path in sorted(folder.glob("*.safetensors"))]
    try:
        read = [(files, shapes) for files in found if _is_research(shapes := _shapes_of(files))]
    except ValueError:
        return None  # whoever reads them as diffusers' says what is wrong
    if not read:
        return None
    if len(read) > 1:
        names = ", ".join(files[0].name for files, _ in read)
        raise ValueError(
            f"{str(folder)!r} has several research checkpoints ({names}). Move one to its own folder, or convert it: "
            "hf-aselect convert FILE OUTPUT --layout ..."
        )
    ((files, shapes),) = read
    return ResearchWeights(str(folder), shapes, lambda keys: _of_safetensors(files, keys), config)


def research_file(path: Path, allow_pickle: bool = False) -> ResearchWeights:
    """Return the weights of a file in the research layout: safetensors, or a pickle where that is allowed.

    Raises:
        PickledWeightsError: If it is a pickle, and none is allowed.
        ValueError: If it is broken, holds other things than weights, or those of another architecture.
    """
    config = _config_in(path.parent)
    if "model_type" in config:
        config = {}  # of a checkpoint that has nothing to do with it
    if path.suffix == ".safetensors":
        shapes = _shapes_of([path])
        return ResearchWeights(str(path), shapes, lambda keys: _of_safetensors([path], keys), config)
    if path.suffix not in PICKLES:
        raise ValueError(f"{str(path)!r} is not a file of weights: expected .safetensors, {', '.join(PICKLES)}.")
    if not allow_pickle:
        raise PickledWeightsError(
            f"{str(path)!r} is a pickle, and loading a pickle can run arbitrary code. Pass `allow_pickle=True` "
            "(`--allow-pickle`) to read its tensors with `torch.load(weights_only=True)`, which runs none."
        )
    tensors = _unpickled(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    del tensors
    return ResearchWeights(str(path), shapes, lambda keys: _of_pickle(path, keys), config)


def _config_in(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder; empty without one."""
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _is_research(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Return whether tensors are in the research layout, or in that of its kin."""
    is_kin = any(re.search(pattern, name) for name in shapes for pattern, _, _ in _OTHERS)
    has_joint_attention = any(name.endswith(f"blocks.0.{_QKV}.weight") for name in shapes)
    return has_joint_attention and (is_kin or any(name.endswith(_ANCHOR) for name in shapes))


def _shapes_of(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of some safetensors, by name.

    Raises:
        ValueError: If a file cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise unreadable(path, f"safetensors file ({error})", error) from error
    return shapes


def _of_safetensors(files: Sequence[Path], keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    wanted = set(keys)
    yield from ((name, value) for name, value in iterate_weights(files) if name in wanted)


def _of_pickle(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a pickle, which is mapped again every `_MAPPED_BYTES`."""
    waiting = list(keys)
    while waiting:
        mapped, tensors = 0, _unpickled(path)
        while waiting and mapped < _MAPPED_BYTES:
            name = waiting.pop(0)
            value = tensors.pop(name).detach()
            mapped += value.nbytes
            yield name, value
            del value
        del tensors


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, which is mapped: its weights averaged over training, where it has them.

    Only torch's reader of weights looks at it, which knows tensors and plain containers. Of other classes the
    `argparse.Namespace` is let through, which holds the arguments of a training in the checkpoints of DiT, SiT and
    REPA: its attributes are set, and nothing is called.

    Raises:
        ValueError: If it is truncated, of an old kind, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{culprit[1]!r}" if culprit else "something else"
        raise ValueError(
            f"{str(path)!r} contains more than tensors ({what}) and is not read, because that could run code. If you "
            "trust the file, save its weights with `safetensors.torch.save_file(weights, 'weights.safetensors')`."
        ) from error
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        raise unreadable(path, "PyTorch weights file", error) from error
    tensors = _named_tensors(found)
    if not tensors:
        of = f" of {short(list(found))}" if isinstance(found, dict) else ""
        raise ValueError(f"{str(path)!r} must contain a dictionary of weights, got a {type(found).__name__}{of}.")
    return tensors


def _named_tensors(found: Any) -> dict[str, Tensor]:
    """Return the tensors of dictionaries in one another, by the names that lead to them, joined by dots."""
    named: dict[str, Tensor] = {}
    inside, seen = [("", found, 0)], set()
    while inside:
        prefix, each, depth = inside.pop()
        # It may hold itself.
        if not isinstance(each, dict) or id(each) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(each))
        words = {key: value for key, value in each.items() if isinstance(key, str)}
        named |= {f"{prefix}{key}": value for key, value in words.items() if isinstance(value, Tensor)}
        inside += [(f"{prefix}{key}.", value, depth + 1) for key, value in words.items()]
    return named
