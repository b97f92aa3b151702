"""The families of transformers: how each class of diffusers is built and read."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .layouts import MAX_LAYERS, MAX_SIZE, TransformerLayout, hint_of


@dataclass(frozen=True)
class Inputs:
    """The inputs of a transformer, before its family turns them into keywords.

    Args:
        transformer: The transformer.
        latents: Noised latents, (B, C, h, w).
        timesteps: Timesteps in [0, 1000], 0 = least noise, (B,), float32.
        labels: Class indices, (B,). Features are read with the null label.
        prompt: The empty prompt's embeddings by name, for each image: (B, L, C) or (B, C).
        guidance: Guidance scale of a guidance-distilled transformer.
        vae_scale_factor: Pixels a side that one latent stands for.
        timestep_embedding: Kind of timestep embedding, one of its family's. See `TransformerFamily`.
        given_timesteps: The timesteps as passed, (B,). Integers when features are read.
    """

    transformer: Any
    latents: Tensor
    timesteps: Tensor
    labels: Tensor
    prompt: Mapping[str, Tensor]
    guidance: float = 1.0
    vae_scale_factor: int = 1
    timestep_embedding: str = "diffusers"
    given_timesteps: Tensor | None = None

    @property
    def text(self) -> Tensor:
        """The empty prompt's embeddings, (B, L, C)."""
        return self.prompt["prompt_embeds"]

    @property
    def sigmas(self) -> Tensor:
        """Timesteps in [0, 1], 0 = least noise, (B,), float32."""
        return self.timesteps / 1000

    def keywords(self, timesteps: Tensor, latents: Tensor | None = None, **others: Any) -> dict[str, Any]:
        """Return latents, timesteps and text by the names that most of diffusers' transformers have for them.

        Args:
            timesteps: As the transformer takes them, (B,).
            latents: As it takes them; None for noised latents as they are.
            others: What else it is called with.
        """
        latents = self.latents if latents is None else latents
        return {"hidden_states": latents, "timestep": timesteps, "encoder_hidden_states": self.text, **others}

    @property
    def image_size(self) -> Tensor:
        """Height and width of each image in pixels, (B, 2), float32."""
        sides = [float(side * self.vae_scale_factor) for side in self.latents.shape[-2:]]
        return self.timesteps.new_tensor(sides).expand(len(self.timesteps), -1)

    def grid(self, side: int = 2) -> tuple[int, int]:
        """Return the rows and columns of the grid of tokens of `side` × `side` latents."""
        return self.latents.shape[-2] // side, self.latents.shape[-1] // side

    def packed(self) -> Tensor:
        """Return latents packed 2 × 2 into tokens, (B, N, 4C), channels first, as in FLUX's pipeline."""
        rows, columns = self.grid()
        patches = self.latents.unflatten(-1, (columns, 2)).unflatten(2, (rows, 2))  # (B, C, rows, 2, columns, 2)
        tokens: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return tokens

    def places(self, side: int = 2, axes: int = 3) -> Tensor:
        """Return the positions of the image's tokens, (N, axes), float32. Axes 1 and 2 are row and column."""
        rows, columns = self.grid(side)
        places = torch.zeros(rows, columns, axes, device=self.latents.device)
        places[..., 1] = torch.arange(rows, device=places.device)[:, None]
        places[..., 2] = torch.arange(columns, device=places.device)
        return places.flatten(0, 1)


def last_tokens(sequence: Tensor, num_tokens: int) -> Tensor:
    """Return the image's tokens, (B, N, D), of a sequence without text or with the text first."""
    # Not a slice if there is no text: the next block does not read the slice, so it would get no gradient.
    return sequence if sequence.shape[1] == num_tokens else sequence[:, -num_tokens:]


def first_tokens(sequence: Tensor, num_tokens: int) -> Tensor:
    """Return the image's tokens, (B, N, D), of a sequence with the text last."""
    return sequence[:, :num_tokens]


def image_of(output: Any, inputs: Inputs) -> Tensor:
    """Return a transformer's prediction as an image, (B, C, h, w), of an image or of tokens as `Inputs.packed`."""
    if output.ndim == 3:
        rows, columns = inputs.grid()
        patches = output.unflatten(-1, (-1, 2, 2)).unflatten(1, (rows, columns))  # (B, rows, columns, C, 2, 2)
        output = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    image: Tensor = output[:, : inputs.latents.shape[1]]
    return image


Projections = Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class TransformerBlocks:
    """A list of blocks of a transformer.

    Args:
        path: Its name in the transformer.
        attention: Name of the self-attention in a block. Its first argument is the feature `normed`.
        hidden: Index of the block's output that contains the image, if there are several.
        projections: Names of query, key and value in the attention; or, if they are one layer, a
            function that takes the attention and its input tokens, (B, N, D), and returns the three.

    Example:
        >>> from hf_aselect import TransformerBlocks
        >>> TransformerBlocks("layers", attention="self_attn").projections
        ('to_q', 'to_k', 'to_v')
    """

    path: str = "transformer_blocks"
    attention: str = "attn"
    hidden: int = 0
    projections: tuple[str, str, str] | Projections = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class TransformerFamily:
    """A class of transformers: its sizes, its call, and the location of its tokens.

    Args:
        name: Name of the class, in diffusers or of `transformer_class`.
        sizes: Fields of its configuration that must be integers >= 1.
        layout: Reads the layout off the configuration.
        call: Makes the keywords of its `forward`.
        blocks: Its lists of blocks, in the order in which they are run.
        tokens: Returns the image's tokens of a sequence, (B, N, D), given N: `last_tokens` or `first_tokens`.
        output: Turns the first output of `forward` into the prediction, (B, C, h, w), which points from the image to
            the noise.
        output_module: Name of the module whose output, (B, N, C), `output` gets instead. "" for that of `forward`.
        prompt_fields: Names of the empty prompt's embeddings, each with the field of the configuration that has its
            width ("" if there is none). Empty for a transformer without text.
        patch_embedding: Name of the module that turns latents into tokens. Its device is the model's.
        timestep_modules: Names of modules that would get a rounded timestep in half precision, each with the divisor
            that maps timesteps in [0, 1000] to its range.
        whole_modules: Names of modules that take weights of layers inside of them without calling these layers. While
            such a module runs, all of its weights are in memory, and on one device.
        timestep_embeddings: Kinds of timestep embedding that its checkpoints were trained with. A configuration names
            one of them.
        prepare: Adapts a new transformer to a kind of timestep embedding. None if there is nothing to change.
        num_classes: Field of the configuration with the number of classes; "" for none.
        pipeline: Name of diffusers' pipeline that encodes a prompt; "" if embeddings are always given.
        encode_prompt: Takes this pipeline and the transformer's configuration, and returns the empty prompt's
            embeddings by name, (1, L, C) or (1, C).
        transformer_class: The class, if it is not in diffusers. It must have diffusers' `ModelMixin` and
            `ConfigMixin`.

    Example:
        >>> from hf_aselect import TransformerFamily, transformer_layout
        >>> sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size")
        >>> TransformerFamily("MyTransformer2DModel", sizes, transformer_layout).name
        'MyTransformer2DModel'
    """

    name: str
    sizes: tuple[str, ...]
    layout: Callable[[Mapping[str, Any]], TransformerLayout]
    call: Callable[[Inputs], dict[str, Any]] | None = None
    blocks: tuple[TransformerBlocks, ...] = (TransformerBlocks(),)
    tokens: Callable[[Tensor, int], Tensor] = last_tokens
    output: Callable[[Any, Inputs], Tensor] = image_of
    prompt_fields: Mapping[str, str] = field(default_factory=dict)
    patch_embedding: str = "x_embedder"
    timestep_modules: Mapping[str, float] = field(default_factory=dict)
    num_classes: str = ""
    pipeline: str = ""
    encode_prompt: Callable[[Any, dict[str, Any]], dict[str, Tensor]] | None = None
    transformer_class: type | None = None
    output_module: str = ""
    timestep_embeddings: tuple[str, ...] = ("diffusers",)
    prepare: Callable[[Any, str], None] | None = None
    whole_modules: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Go into a pickle by name: a description consists of functions."""
        return family_of, (self.name,)

    def __deepcopy__(self, memo: Any) -> "TransformerFamily":
        """Return itself: nothing of it changes."""
        return self


FAMILIES: dict[str, TransformerFamily] = {}


def family_of(name: Any) -> TransformerFamily:
    """Return the description of a transformer class.

    Raises:
        ValueError: If there is none.
    """
    # Where a checkpoint's own code runs beside the package, it is the package that users register with.
    package = sys.modules.get("hf_aselect.model.families")
    known: dict[str, TransformerFamily] = {**getattr(package, "FAMILIES", {}), **FAMILIES}
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"Unsupported transformer {name!r}; supported are {', '.join(known)}. To use another class, "
            "describe it with a `TransformerFamily` and call `hf_aselect.register_family` before loading its "
            f"checkpoint; `help(hf_aselect.register_family)` has an example.{hint_of(name)}"
        )
    return known[name]


def layout_of(transformer: Mapping[str, Any]) -> TransformerLayout:
    """Return the layout of a transformer.

    Args:
        transformer: diffusers' configuration of it, with `_class_name`.

    Raises:
        ValueError: If its class is none of the families, or the configuration lacks a size.
    """
    family = family_of(transformer.get("_class_name"))
    if missing := [size for size in family.sizes if transformer.get(size) is None]:
        raise ValueError(
            f"`transformer` lacks {', '.join(missing)}. Pass the transformer itself, or the whole configuration that "
            "diffusers saved."
        )
    if "axes_lens" in family.sizes:
        lengths = transformer["axes_lens"]
        if not isinstance(lengths, list | tuple) or len(lengths) != 3 or not all(map(_is_size, lengths)):
            raise ValueError(f"`transformer` must have a list of three lengths as `axes_lens`, got {lengths!r}.")
    shared = transformer.get("num_kv_heads")
    if shared is not None and not _is_size(shared):
        raise ValueError(f"`transformer` must have a positive integer as `num_kv_heads`, got {shared!r}.")
    sizes = {size: transformer[size] for size in family.sizes if size != "axes_lens"}
    if wrong := {size: value for size, value in sizes.items() if not _is_size(value)}:
        raise ValueError(f"`transformer` must have integers in [1, {MAX_SIZE}] as sizes, got {wrong}.")
    if deep := {size: value for size, value in sizes.items() if "layers" in size and value > MAX_LAYERS}:
        raise ValueError(f"`transformer` must have at most {MAX_LAYERS} blocks, got {deep}.")
    return family.layout(transformer)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE


def transformer_layout(config: Mapping[str, Any], **given: Any) -> TransformerLayout:
    """Return the layout of a transformer whose configuration has diffusers' usual names.

    Args:
        config: diffusers' configuration of the transformer.
        given: Fields of `TransformerLayout` that are set here instead. `needs_prompt` is True by default.

    Example:
        >>> from hf_aselect import transformer_layout
        >>> sizes = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16}
        >>> transformer_layout({**sizes, "in_channels": 4, "patch_size": 2, "sample_size": 32}).hidden_size
        32
    """
    width = given.get("hidden_size") or config["num_attention_heads"] * config["attention_head_dim"]
    usual = {
        "num_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "num_channels": "in_channels",
        "patch_size": "patch_size",
        "sample_size": "sample_size",
    }
    read = {name: config[size] for name, size in usual.items() if name not in given}
    whole = {"hidden_size": width, "key_value_size": width, "max_grid": None, "needs_prompt": True, **read, **given}
    return TransformerLayout(**{"num_attention_outputs": whole["num_layers"], **whole})


_HEADS = ("num_attention_heads", "attention_head_dim", "in_channels")
_PLAIN = (*_HEADS, "num_layers", "sample_size", "patch_size")
_POOLED = {"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"}
_WIDE = ("hidden_size", "num_attention_heads", "in_channels", "num_layers", "sample_size", "patch_size")


def _dit_call(inputs: Inputs) -> dict[str, Any]:
    # Integers stay integers, because FSDP rounds floating-point inputs. SiT's own time runs in the other direction.
    timesteps = inputs.timesteps if inputs.given_timesteps is None else inputs.given_timesteps
    if inputs.timestep_embedding in ("sit", "repa"):
        timesteps = 1 - inputs.sigmas if inputs.timestep_embedding == "sit" else inputs.sigmas
    return {"hidden_states": inputs.latents, "timestep": timesteps, "class_labels": inputs.labels}


def _dit_frequencies(transformer: Any, timestep_embedding: str) -> None:
    # Of facebookresearch/DiT 10000^(-i/128), which SiT and REPA took over, and not diffusers' 10000^(-i/127).
    if timestep_embedding != "diffusers":
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0


def _dit_output(output: Tensor, inputs: Inputs) -> Tensor:
    # diffusers makes a square of the patches, whose channels come last. SiT's velocity points to the image.
    side = inputs.transformer.config.patch_size
    grid = output.unflatten(-1, (side, side, -1)).unflatten(1, inputs.grid(side))  # (B, rows, columns, p, p, C)
    image = image_of(grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), inputs)
    return -image if inputs.timestep_embedding == "sit" else image


def _pixart_call(inputs: Inputs) -> dict[str, Any]:
    # PixArt-alpha at 1024 pixels is also conditioned on the image's size, as its pipeline gives it.
    size, dtype = inputs.image_size, inputs.latents.dtype
    added: dict[str, Any] = {"resolution": size.to(dtype), "aspect_ratio": (size[:, :1] / size[:, 1:]).to(dtype)}
    if not inputs.transformer.use_additional_conditions:
        added = {"resolution": None, "aspect_ratio": None}
    return inputs.keywords(inputs.timesteps, added_cond_kwargs=added)


def _sana_layout(config: Mapping[str, Any]) -> TransformerLayout:
    if config.get("guidance_embeds"):
        raise ValueError(
            "A Sana transformer with `guidance_embeds` (Sana-Sprint) is not supported, because it is distilled with "
            "a different noise schedule. Use the Sana checkpoint it was distilled from."
        )
    return transformer_layout(config)


class _WholeMask:
    """A text mask of ones with known sums. Lumina2 counts them in Python, which would wait for the device."""

    def __init__(self, text: Tensor) -> None:
        self.shape, self._device = text.shape[:2], text.device

    def sum(self, dim: int) -> "_WholeMask":
        """Return the object whose `tolist` has the sums."""
        return self

    def tolist(self) -> list[int]:
        """Return the number of tokens of each text."""
        return [self.shape[1]] * self.shape[0]

    def bool(self) -> Tensor:
        """Return the mask, (B, L)."""
        return torch.ones(self.shape, dtype=torch.bool, device=self._device)


def _flux_layout(config: Mapping[str, Any]) -> TransformerLayout:
    # diffusers' pipeline packs 2 × 2 latents into one token before the transformer sees them. The size is
    # that of the pipeline: the transformer has no position table and takes any. Double-stream blocks come first, then
    # single-stream blocks, which project attention and MLP together.
    joint, depth = config["num_layers"], config["num_layers"] + config["num_single_layers"]
    channels = config["in_channels"] // 4
    packed = transformer_layout(config, num_layers=depth, num_channels=channels, patch_size=2, sample_size=128)
    return replace(packed, num_attention_outputs=joint)


def _lumina_layout(config: Mapping[str, Any], **given: Any) -> TransformerLayout:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    shared = config.get("num_kv_heads") or heads
    return transformer_layout(config, hidden_size=width, key_value_size=width // heads * shared, **given)


def _qwen_layout(config: Mapping[str, Any]) -> TransformerLayout:
    # 2 × 2 latents are packed into one token, as FLUX's; the size is the pipeline's.
    return transformer_layout(config, num_channels=config["in_channels"] // 4, patch_size=2, sample_size=128)


def _qwen_call(inputs: Inputs) -> dict[str, Any]:
    shapes = [[(1, *inputs.grid())]] * len(inputs.latents)
    return inputs.keywords(inputs.sigmas, inputs.packed(), img_shapes=shapes)


def _zimage_layout(config: Mapping[str, Any]) -> TransformerLayout:
    return transformer_layout(
        config,
        num_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        hidden_size=config["dim"],
        patch_size=2,  # The only one of `all_patch_size` that is published.
        sample_size=128,  # The pipeline's.
        max_grid=min(config["axes_lens"][1:]),
    )


def _zimage_call(inputs: Inputs) -> dict[str, Any]:
    # Its own time runs the other way. Images and prompts are lists; an image has one frame.
    return {
        "x": list(inputs.latents[:, :, None]),
        "t": (1000 - inputs.timesteps) / 1000,
        "cap_feats": list(inputs.text),
    }


def _auraflow_layout(config: Mapping[str, Any]) -> TransformerLayout:
    depth = config["num_mmdit_layers"] + config["num_single_dit_layers"]
    return transformer_layout(config, num_layers=depth, max_grid=int(config["pos_embed_max_size"] ** 0.5))


def _cogview4_call(inputs: Inputs) -> dict[str, Any]:
    size, (rows, columns), sigmas = inputs.image_size, inputs.grid(), inputs.sigmas
    # Its pipeline shifts the noise levels by the image's size, but conditions on the unshifted timesteps, which are
    # not 1000 times the level. The numbers are those of the published scheduler.
    shift = 0.25 + 0.75 * (rows * columns / 256) ** 0.5
    timesteps = 1000 * sigmas / (sigmas + shift * (1 - sigmas))
    return inputs.keywords(timesteps, original_size=size, target_size=size, crop_coords=size * 0)


def _hunyuan_dit_call(inputs: Inputs) -> dict[str, Any]:
    config, prompt, dtype = inputs.transformer.config, inputs.prompt, inputs.latents.dtype
    # As in the pipeline, positions span the centre of the grid of a 512-pixel image, for any image size.
    grid, base = inputs.grid(), 512 // 8 // 2
    sides = [round(base / max(grid) * side) for side in grid]
    start = [round((base - side) / 2) for side in sides]
    stop = [first + side for first, side in zip(start, sides, strict=True)]
    rotary = _embeddings().get_2d_rotary_pos_embed(
        config.attention_head_dim, (start, stop), grid, device=inputs.latents.device, output_type="pt"
    )
    # Versions up to 1.1 are also conditioned on a style and on sizes, the first of which is 1024.
    none = inputs.image_size * 0
    return inputs.keywords(
        inputs.timesteps.to(dtype),
        text_embedding_mask=prompt["prompt_mask"],
        encoder_hidden_states_t5=prompt["prompt_embeds_2"].contiguous(),
        text_embedding_mask_t5=prompt["prompt_mask_2"],
        image_meta_size=torch.cat([none + 1024, inputs.image_size, none], dim=1).to(dtype),
        style=none[:, 0].long(),
        image_rotary_emb=rotary,
    )


def _lumina_next_call(inputs: Inputs) -> dict[str, Any]:
    rows, columns = inputs.grid(inputs.transformer.patch_size)
    # As the pipeline at all timesteps but 0: places are closer together in a larger image, and attention is sharper.
    (height, width), usual = inputs.latents.shape[-2:], inputs.transformer.sample_size
    factor = (height * width) ** 0.5 / usual
    rotary = _embeddings().get_2d_rotary_pos_embed_lumina(
        inputs.transformer.head_dim, rows, columns, linear_factor=factor
    )
    # Its own time runs the other way.
    return inputs.keywords(
        1 - inputs.sigmas,
        encoder_mask=torch.ones(inputs.text.shape[:2], device=inputs.latents.device),
        image_rotary_emb=rotary,
        cross_attention_kwargs={"base_sequence_length": (usual // 2) ** 2},
    )


def _embeddings() -> Any:
    # Already imported with the transformer. An import statement would make diffusers a requirement of the saved code.
    return sys.modules["diffusers.models.embeddings"]


def _flux_call(inputs: Inputs) -> dict[str, Any]:
    places = inputs.places()
    text = places.new_zeros(inputs.text.shape[1], 3)
    return inputs.keywords(inputs.sigmas, inputs.packed(), img_ids=places, txt_ids=text)


def _flux1_call(inputs: Inputs) -> dict[str, Any]:
    called = {**_flux_call(inputs), "pooled_projections": inputs.prompt["pooled_prompt_embeds"]}
    if inputs.transformer.config.guidance_embeds:
        called["guidance"] = torch.full_like(inputs.sigmas, inputs.guidance)
    return called


def _longcat_call(inputs: Inputs) -> dict[str, Any]:
    # Text and image are told apart by the first axis. The text runs along the diagonal, and the image begins behind
    # the 512 tokens that a text is padded to.
    called = _flux_call(inputs)
    called["txt_ids"][:, 1:] = torch.arange(inputs.text.shape[1], device=inputs.text.device)[:, None]
    called["img_ids"][:, 0] = 1
    called["img_ids"][:, 1:] += 512
    return called


def _flux2_layout(config: Mapping[str, Any]) -> TransformerLayout:
    # Its VAE packs 2 × 2 latents into channels. The size is the pipeline's.
    joint, depth = config["num_layers"], config["num_layers"] + config["num_single_layers"]
    return transformer_layout(config, num_layers=depth, num_attention_outputs=joint, patch_size=1, sample_size=64)


def _flux2_call(inputs: Inputs) -> dict[str, Any]:
    places = inputs.places(side=1, axes=4)
    text = places.new_zeros(inputs.text.shape[1], 4)
    text[:, 3] = torch.arange(len(text), device=text.device)
    called = inputs.keywords(inputs.sigmas, inputs.latents.flatten(2).mT, img_ids=places, txt_ids=text)
    if inputs.transformer.config.guidance_embeds:
        called["guidance"] = torch.full_like(inputs.sigmas, inputs.guidance)
    return called


def _flux2_projections(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # One layer with the MLP's first.
    query, key, value = attention.to_qkv_mlp_proj(tokens)[..., : 3 * attention.inner_dim].chunk(3, dim=-1)
    return query, key, value


def _prx_layout(config: Mapping[str, Any]) -> TransformerLayout:
    return transformer_layout(
        config,
        num_layers=config["depth"],
        num_attention_heads=config["num_heads"],
        hidden_size=config["hidden_size"],
        # The pipeline's 512 pixels, with FLUX's VAE or, of 32 channels, with that of 32 pixels a latent.
        sample_size=16 if config["in_channels"] == 32 else 64,
    )


def _prx_projections(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = attention.img_qkv_proj(tokens).chunk(3, dim=-1)
    return query, key, value


def _wan_layout(config: Mapping[str, Any]) -> TransformerLayout:
    # It is made for videos of 832 × 480 pixels and more: 512 × 512 are as many. Rotary positions are tabulated.
    patch_size, reach = config.get("patch_size", (1, 2, 2))[-1], config["rope_max_seq_len"]
    return transformer_layout(config, patch_size=patch_size, sample_size=64, max_grid=reach)


_ALL = (
    TransformerFamily(
        "DiTTransformer2DModel",
        _PLAIN,
        lambda config: transformer_layout(config, needs_prompt=False),
        _dit_call,
        (TransformerBlocks(attention="attn1"),),
        output=_dit_output,
        output_module="proj_out_2",
        patch_embedding="pos_embed",
        timestep_embeddings=("diffusers", "original", "sit", "repa"),
        prepare=_dit_frequencies,
        # As a label, the null label, to which diffusers drops labels at random in train mode.
        num_classes="num_embeds_ada_norm",
    ),
    TransformerFamily(
        "SD3Transformer2DModel",
        (*_PLAIN, "pos_embed_max_size"),
        lambda config: transformer_layout(config, max_grid=config["pos_embed_max_size"]),
        lambda inputs: inputs.keywords(inputs.timesteps, pooled_projections=inputs.prompt["pooled_prompt_embeds"]),
        # Blocks with a second attention, of the image alone, are read at the first.
        (TransformerBlocks(hidden=1),),
        prompt_fields=_POOLED,
        patch_embedding="pos_embed",
    ),
    TransformerFamily(
        "PixArtTransformer2DModel",
        _PLAIN,
        transformer_layout,
        _pixart_call,
        (TransformerBlocks(attention="attn1"),),
        prompt_fields={"prompt_embeds": "caption_channels"},
        patch_embedding="pos_embed",
    ),
    TransformerFamily(
        "FluxTransformer2DModel",
        (*_HEADS, "num_layers", "num_single_layers"),
        _flux_layout,
        _flux1_call,
        (TransformerBlocks(hidden=1), TransformerBlocks("single_transformer_blocks", hidden=1)),
        prompt_fields=_POOLED,
        timestep_modules={"time_text_embed.time_proj": 1},
    ),
    TransformerFamily(
        "SanaTransformer2DModel",
        _PLAIN,
        _sana_layout,
        lambda inputs: inputs.keywords(inputs.timesteps * inputs.transformer.config.timestep_scale),
        (TransformerBlocks(attention="attn1"),),
        prompt_fields={"prompt_embeds": "caption_channels"},
        patch_embedding="patch_embed",
    ),
    TransformerFamily(
        "Lumina2Transformer2DModel",
        (*_WIDE, "axes_lens"),
        # Rotary positions are tabulated. The refiners of text and image are not counted as blocks.
        lambda config: _lumina_layout(config, max_grid=min(config["axes_lens"][1:])),
        # Its own time runs the other way.
        lambda inputs: inputs.keywords(1 - inputs.sigmas, encoder_attention_mask=_WholeMask(inputs.text)),
        (TransformerBlocks("layers"),),
        # It points from the noise to the image.
        output=lambda output, inputs: -image_of(output, inputs),
        prompt_fields={"prompt_embeds": "cap_feat_dim"},
    ),
    TransformerFamily(
        "QwenImageTransformer2DModel",
        (*_HEADS, "num_layers"),
        _qwen_layout,
        _qwen_call,
        (TransformerBlocks(hidden=1),),
        prompt_fields={"prompt_embeds": "joint_attention_dim"},
        patch_embedding="img_in",
        timestep_modules={"time_text_embed.time_proj": 1000},
    ),
    TransformerFamily(
        "ZImageTransformer2DModel",
        ("dim", "n_layers", "n_heads", "in_channels", "axes_lens"),
        _zimage_layout,
        _zimage_call,
        (TransformerBlocks("layers", "attention"),),
        first_tokens,
        # A list, and it points from the noise to the image.
        lambda output, _: -torch.stack(list(output))[:, :, 0],
        prompt_fields={"prompt_embeds": "cap_feat_dim"},
        patch_embedding="all_x_embedder.2-1",
    ),
    TransformerFamily(
        "AuraFlowTransformer2DModel",
        (*_HEADS, "num_mmdit_layers", "num_single_dit_layers", "sample_size", "patch_size", "pos_embed_max_size"),
        _auraflow_layout,
        lambda inputs: inputs.keywords(inputs.sigmas),
        (TransformerBlocks("joint_transformer_blocks", hidden=1), TransformerBlocks("single_transformer_blocks")),
        prompt_fields={"prompt_embeds": "joint_attention_dim"},
        patch_embedding="pos_embed",
    ),
    TransformerFamily(
        "CogView4Transformer2DModel",
        _PLAIN,
        transformer_layout,
        _cogview4_call,
        (TransformerBlocks(attention="attn1"),),
        prompt_fields={"prompt_embeds": "text_embed_dim"},
        patch_embedding="patch_embed",
    ),
    TransformerFamily(
        "HunyuanDiT2DModel",
        _PLAIN,
        transformer_layout,
        _hunyuan_dit_call,
        (TransformerBlocks("blocks", "attn1"),),
        prompt_fields={
            "prompt_embeds": "cross_attention_dim",
            "prompt_mask": "",
            "prompt_embeds_2": "cross_attention_dim_t5",
            "prompt_mask_2": "",
        },
        patch_embedding="pos_embed",
        timestep_modules={"time_extra_emb.time_proj": 1},
        whole_modules=("time_extra_emb.pooler",),
    ),
    TransformerFamily(
        "LuminaNextDiT2DModel",
        _WIDE,
        # Self-attention and cross-attention share the output projection.
        lambda config: _lumina_layout(config, num_attention_outputs=0),
        _lumina_next_call,
        (TransformerBlocks("layers", "attn1"),),
        output=lambda output, inputs: -image_of(output, inputs),
        prompt_fields={"prompt_embeds": "cross_attention_dim"},
        patch_embedding="patch_embedder",
    ),
    TransformerFamily(
        "Flux2Transformer2DModel",
        (*_HEADS, "num_layers", "num_single_layers"),
        _flux2_layout,
        _flux2_call,
        (
            TransformerBlocks(hidden=1),
            TransformerBlocks("single_transformer_blocks", projections=_flux2_projections),
        ),
        output=lambda output, inputs: output.mT.unflatten(2, inputs.latents.shape[2:]),
        prompt_fields={"prompt_embeds": "joint_attention_dim"},
        timestep_modules={"time_guidance_embed.time_proj": 1.0},
    ),
    TransformerFamily(
        "ChromaTransformer2DModel",
        (*_HEADS, "num_layers", "num_single_layers"),
        _flux_layout,
        _flux_call,
        (TransformerBlocks(hidden=1), TransformerBlocks("single_transformer_blocks")),
        prompt_fields={"prompt_embeds": "joint_attention_dim"},
        timestep_modules={"time_text_embed.time_proj": 1.0},
    ),
    TransformerFamily(
        "LongCatImageTransformer2DModel",
        (*_HEADS, "num_layers", "num_single_layers"),
        _flux_layout,
        _longcat_call,
        (TransformerBlocks(hidden=1), TransformerBlocks("single_transformer_blocks", hidden=1)),
        prompt_fields={"prompt_embeds": "joint_attention_dim"},
        timestep_modules={"time_embed.time_proj": 1.0},
    ),
    TransformerFamily(
        "PRXTransformer2DModel",
        ("hidden_size", "num_heads", "depth", "in_channels", "patch_size"),
        _prx_layout,
        lambda inputs: inputs.keywords(inputs.sigmas),
        (TransformerBlocks("blocks", "attention", projections=_prx_projections),),
        prompt_fields={"prompt_embeds": "context_in_dim"},
        patch_embedding="img_in",
    ),
    TransformerFamily(
        "WanTransformer3DModel",
        (*_HEADS, "num_layers", "rope_max_seq_len"),
        _wan_layout,
        lambda inputs: inputs.keywords(inputs.timesteps, inputs.latents[:, :, None]),
        (TransformerBlocks("blocks", "attn1"),),
        output=lambda output, _: output[:, :, 0],
        prompt_fields={"prompt_embeds": "text_dim"},
        patch_embedding="patch_embedding",
    ),
)
FAMILIES.update({family.name: family for family in _ALL})
