"""What every family of diffusion transformers shares: its blocks are run as far as they are read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .layouts import BEFORE_ATTENTION, Tap


@dataclass
class Pass:
    """What runs from block to block.

    Args:
        hidden_states: Tokens, (B, N, D): the image's, or, where there is one stream, text and image.
        rows: Rows of the token grid.
        columns: Its columns.
        condition: What the blocks are modulated with.
        context: Tokens of the text, (B, L, D), where there are any.
        rotary: Rotary position embeddings, where there are any.
        output_condition: What the output is modulated with, where that is something else.
    """

    hidden_states: Tensor
    rows: int
    columns: int
    condition: Any
    context: Tensor | None = None
    rotary: Any = None
    output_condition: Any = None


class BlockStep(GradientCheckpointingLayer):
    """Runs a block so that transformers can have it computed again in the backward pass; has no weights of its own.

    diffusers' transformers have the same in a `forward` that is not used here.
    """

    def forward(
        self, hidden_states: Tensor, context: Tensor | None, state: Pass, advance: Callable[[Pass], None]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens and the text's tokens after the block, without changing the state."""
        after = replace(state, hidden_states=hidden_states, context=context)
        advance(after)
        return after.hidden_states, after.context


class Denoiser(nn.Module, ABC):
    """A diffusion transformer that is read at taps of its blocks, and run no further than the last of them.

    Args:
        transformer: A transformer of diffusers.
        timestep_embedding: How a timestep is embedded; "diffusers" is what diffusers itself does.
        prompt_shapes: Shapes of the empty prompt's embeddings, by name; the values are buffers of that name. None to
            do without them, where nothing is read.
        guidance: Guidance that a guidance-distilled transformer is conditioned on; the others have no use for it.
        vae_scale_factor: Pixels a side that one latent stands for.
    """

    # Names of the empty prompt's embeddings and of the buffers that hold them; the field of diffusers' configuration
    # that says how wide each is.
    prompt_fields: ClassVar[dict[str, str]] = {}
    timestep_embeddings: ClassVar[tuple[str, ...]] = ("diffusers",)
    # What diffusers calls the module that makes tokens of latents.
    patch_embedding_name: ClassVar[str] = "pos_embed"

    transformer: Any  # diffusers is imported when a denoiser is built, not here
    prompt_embeds: Tensor  # (1, L, C); of text-conditioned families
    pooled_prompt_embeds: Tensor  # (1, C); of some of them

    def __init__(
        self,
        transformer: nn.Module,
        timestep_embedding: str = "diffusers",
        prompt_shapes: dict[str, list[int]] | None = None,
        guidance: float = 1.0,
        vae_scale_factor: int = 1,
    ) -> None:
        super().__init__()
        if timestep_embedding not in self.timestep_embeddings:
            raise ValueError(
                f"`timestep_embedding` of {type(transformer).__name__} must be one of "
                f"{', '.join(self.timestep_embeddings)}, got {timestep_embedding!r}."
            )
        self.transformer = transformer
        self.timestep_embedding = timestep_embedding
        self.guidance = guidance
        self.vae_scale_factor = vae_scale_factor
        if prompt_shapes is not None:
            self._check_prompt(prompt_shapes)
            for name, shape in prompt_shapes.items():
                self.register_buffer(name, torch.zeros(shape))

    def _check_prompt(self, shapes: dict[str, list[int]]) -> None:
        """Reject embeddings of the prompt that the transformer does not take."""
        name = type(self.transformer).__name__
        if set(shapes) != set(self.prompt_fields):
            raise ValueError(
                f"{name} is conditioned on {', '.join(self.prompt_fields) or 'no prompt'}, but the configuration's "
                f"`prompt_shapes` has {', '.join(shapes) or 'none'}. Load the whole pipeline, with its text encoders, "
                "or give `prompt_embeds=`."
            )
        for part, field in self.prompt_fields.items():
            width, shape = self.transformer.config.get(field), list(shapes[part])
            expected = [1, width] if part.startswith("pooled") else [1, *shape[1:2], width]
            if width is not None and (shape != expected or 0 in shape):
                wanted = f"(1, {width})" if part.startswith("pooled") else f"(1, L, {width})"
                raise ValueError(f"`{part}` of a {name} must have shape {wanted}, got {tuple(shape)}.")

    @property
    def patch_embedding(self) -> nn.Module:
        """The module that makes tokens of noised latents."""
        module: nn.Module = getattr(self.transformer, self.patch_embedding_name)
        return module

    @property
    def num_channels(self) -> int:
        """Channels of the latents."""
        return int(self.transformer.config.in_channels)

    @property
    def num_classes(self) -> int:
        """Classes that the transformer knows; as a label, this number is the null label. 0 for text-conditioned."""
        return 0

    @property
    def patch_size(self) -> int:
        """Side of a token in latents."""
        return int(self.transformer.config.patch_size)

    @property
    def blocks(self) -> Sequence[Any]:
        """The blocks, in the order in which they are run."""
        blocks: Sequence[Any] = self.transformer.transformer_blocks
        return blocks

    def forward(self, noised_latents: Tensor, timesteps: Tensor | int, block: int, feature: str) -> Tensor:
        """Return the tokens at a tap, (B, N, D), running no block that comes after it; see `read_taps`."""
        return self.read_taps(noised_latents, timesteps, [(block, feature)])[block, feature]

    @abstractmethod
    def read_taps(self, noised_latents: Tensor, timesteps: Tensor | int, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return the tokens at several taps from one pass, running no block that comes after the last.

        Args:
            noised_latents: Noised latents, (B, C, h, w); h and w multiples of the patch size.
            timesteps: Integer timesteps in [0, 1000), (B,), or one of all.
            taps: Blocks, counted from the first, and features; (-1, "hidden") is what the first block reads.

        Returns:
            Tokens of the image at each tap in row-major order, (B, N, D).
        """

    @abstractmethod
    def unused_modules(self, block: int, feature: str) -> list[nn.Module]:
        """Return the modules that have no influence on the tokens at (block, feature)."""

    def unused_parameters(self, taps: Sequence[Tap]) -> list[nn.Parameter]:
        """Return the parameters that have no influence on the tokens at any of `taps`."""
        # Tables that hang on the transformer itself belong to its output.
        own = list(self.transformer.parameters(recurse=False))
        return own + unused_by_all(self, taps)

    def tables_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return what a module's buffers that no checkpoint holds must be after a build without data, by name."""
        return {}


class SteppedDenoiser(Denoiser):
    """A denoiser of a family that is written by hand: its blocks are run one after the other.

    A family says how a pass begins, what a block's attention reads and how a block is run; `read_taps` and
    `unused_modules` are the same for all.

    Args:
        transformer: A transformer of diffusers.
        options: See `Denoiser`.
    """

    # What diffusers calls a block's self-attention, what only the text runs through before the first block, and what
    # is run after the last.
    attention_name: ClassVar[str] = "attn1"
    text_input_names: ClassVar[tuple[str, ...]] = ()
    output_names: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    # What else than the patch embedding the tokens run through before the first block.
    stem_names: ClassVar[tuple[str, ...]] = ()
    # Whether the patch embedding has a position table, in its buffer `pos_embed`, that checkpoints do not hold.
    has_position_table: ClassVar[bool] = False

    def __init__(self, transformer: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(transformer, *args, **options)
        self.steps = nn.ModuleList(BlockStep() for _ in self.blocks)

    @property
    def position_embedding(self) -> nn.Module | None:
        """The module with a position table, in its buffer `pos_embed`, that checkpoints do not hold; None without."""
        return self.patch_embedding if self.has_position_table else None

    def position_table(self) -> Tensor:
        """Return a newly computed position table, (1, N, D), float32."""
        embed: Any = self.position_embedding
        with torch.device("cpu"):
            fresh = type(embed)(
                height=embed.height * embed.patch_size,
                width=embed.width * embed.patch_size,
                patch_size=embed.patch_size,
                in_channels=1,
                embed_dim=embed.proj.out_channels,
                interpolation_scale=embed.interpolation_scale,
            )
        table: Tensor = fresh.pos_embed
        return table

    def tables_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the position table, if the module is the one that holds it."""
        return {"pos_embed": self.position_table()} if module is self.position_embedding else {}

    @abstractmethod
    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; without labels, with the null label or the empty prompt."""

    @abstractmethod
    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the block's attention reads of the image's tokens, (B, N, D)."""

    def attend(self, state: Pass, block: Any, normed: Tensor) -> Tensor:
        """Return what the block's attention yields for the image, after the output projection, (B, N, D)."""
        tokens: Tensor = self.attention_of(block)(normed)
        return tokens

    @abstractmethod
    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""

    def output_modules(self) -> list[nn.Module]:
        """Return the modules that are run after the last block."""
        return [getattr(self.transformer, name) for name in self.output_names]

    def attention_of(self, block: Any) -> Any:
        """Return the block's self-attention, with `to_q`, `to_k`, `to_v`."""
        return getattr(block, self.attention_name)

    def tokens_of(self, state: Pass) -> Tensor:
        """Return the image's tokens, (B, N, D)."""
        return state.hidden_states

    def read_taps(self, noised_latents: Tensor, timesteps: Tensor | int, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return the tokens at several taps from one pass; see `Denoiser`."""
        if isinstance(timesteps, int):
            timesteps = torch.full(noised_latents.shape[:1], timesteps, device=noised_latents.device)
        state = self.begin(noised_latents, timesteps, None)
        last = max(block for block, _ in taps)
        tokens = {(-1, "hidden"): self.tokens_of(state)} if (-1, "hidden") in taps else {}
        for index, block in enumerate(self.blocks[: last + 1]):
            asked = [feature for tapped, feature in taps if tapped == index]
            for feature in asked:
                if feature != "hidden":
                    tokens[index, feature] = as_if_called(block, partial(self._read, state, block, feature))
            if index < last or "hidden" in asked:
                self._step(state, index)
            if "hidden" in asked:
                tokens[index, "hidden"] = self.tokens_of(state)
        return tokens

    def _step(self, state: Pass, index: int) -> None:
        """Run a block, changing the state; with checkpoints, if transformers asked for them."""
        advance, step = partial(self.advance, block=self.blocks[index]), self.steps[index]
        if not step.gradient_checkpointing:
            advance(state)
            return
        state.hidden_states, state.context = step(state.hidden_states, state.context, state=state, advance=advance)

    def unused_modules(self, block: int, feature: str) -> list[nn.Module]:
        """Return the modules that have no influence on the tokens at (block, feature).

        None of them is run, but for those of a text's stream in the last block that is run whole, and, where only the
        stem is read, what embeds timestep and text.
        """
        if block < 0:
            stem = [getattr(self.transformer, name) for name in self.stem_names]
            return _others(self.transformer, [self.patch_embedding, *stem])
        unused = [*self.blocks[block + 1 :], *self.output_modules()]
        tapped = self.blocks[block]
        if feature == "hidden":
            return unused + self.text_outputs(tapped)
        if feature in BEFORE_ATTENTION:
            before = self.text_outputs(self.blocks[block - 1]) if block else self.text_inputs()
            return unused + before + _others(tapped, self._used(tapped, feature))
        if not block and not self.is_joint(tapped):
            unused += self.text_inputs()
        return unused + _others(tapped, self._used(tapped, feature)) + self.text_outputs(tapped)

    def text_inputs(self) -> list[nn.Module]:
        """Return the modules that only the text runs through before the first block."""
        modules = [getattr(self.transformer, name) for name in self.text_input_names]
        return [module for module in modules if module is not None]

    def text_outputs(self, block: Any) -> list[nn.Module]:
        """Return the modules of a block that only the text of later blocks depends on."""
        return []

    def is_joint(self, block: Any) -> bool:
        """Return whether the block's self-attention looks at the text, too."""
        return False

    def norms_of(self, block: Any) -> list[nn.Module]:
        """Return the modules that `normed` runs."""
        return [block.norm1]

    def _used(self, block: Any, feature: str) -> list[nn.Module]:
        norms, attention = self.norms_of(block), self.attention_of(block)
        if feature == "normed":
            return norms
        if feature == "attention":
            return [*norms, attention, *self.joint_norms_of(block)]
        return [*norms, getattr(attention, _PROJECTIONS[feature])]

    def joint_norms_of(self, block: Any) -> list[nn.Module]:
        """Return the modules that make what a joint attention reads of the text."""
        return []

    def _read(self, state: Pass, block: Any, feature: str) -> Tensor:
        normed = self.normed(state, block)
        if feature == "normed":
            return normed
        if feature == "attention":
            return self.attend(state, block, normed)
        projection = getattr(self.attention_of(block), _PROJECTIONS[feature])
        tokens: Tensor = projection(normed)
        return tokens


_PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v"}


def as_if_called(module: Any, read: Callable[[], Any]) -> Any:
    """Return what a part of a module makes, with all that is done where the module is called.

    FSDP gathers its weights then, and hooks of accelerate and diffusers bring them in or cast them.
    """
    registry = getattr(module, "_diffusers_hook", None)
    hooks = [module._hf_hook] if hasattr(module, "_hf_hook") else []
    hooks += [] if registry is None else list(registry.hooks.values())
    for hook in hooks:
        hook.pre_forward(module)
    try:
        return _as_if_called_by_fsdp(module, read) if is_sharded(module) else read()
    finally:
        for hook in reversed(hooks):
            hook.post_forward(module, None)


def with_own_weights(denoiser: Any, read: Callable[[], Any]) -> Any:
    """Return what is read with a denoiser, which may have weights of its own and is not called.

    Nor is a transformer that is run step by step.
    """
    for module in (denoiser, denoiser.transformer) if hasattr(denoiser, "begin") else (denoiser,):
        read = partial(as_if_called, module, read)
    return read()


def _as_if_called_by_fsdp(module: Any, read: Callable[[], Any]) -> Any:
    from torch.distributed.fsdp import register_fsdp_forward_method

    module.read_tap = read
    register_fsdp_forward_method(module, "read_tap")
    try:
        return module.read_tap()
    finally:
        del module.read_tap


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Return the device and the dtype that a module computes in: those of hooks, else of its weights.

    Accelerate keeps weights elsewhere while they are not needed, and diffusers in a smaller dtype. The dtype is None
    where no weight is in one that computes, as where all are quantized.
    """
    device = dtype = None
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        registry: Any = getattr(part, "_diffusers_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if device is None and getattr(each, "execution_device", None) is not None:
                device = torch.device(each.execution_device)
        for each in () if registry is None else registry.hooks.values():
            dtype = dtype or getattr(each, "compute_dtype", None)
            group = getattr(each, "group", None)
            device = device or getattr(group, "onload_device", None)
    for tensor in (*module.parameters(), *module.buffers()):
        if device is None and tensor.device.type != "meta":
            device = tensor.device
        if dtype is None and tensor.is_floating_point() and tensor.element_size() > 1:  # none of 8 bits
            dtype = tensor.dtype
    return device or torch.device("meta"), dtype


# Below, two processes under FSDP2 learned something else than one, without a word; all else runs on older ones.
OLDEST_TORCH_OF_FSDP2 = (2, 10)


def is_sharded(module: Any) -> bool:
    """Return whether FSDP2 shards a module: its weights are gathered while it is called.

    Raises:
        RuntimeError: If it does, and torch is too old for that.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    found = isinstance(module, FSDPModule)
    if found and tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH_OF_FSDP2:
        raise RuntimeError(
            f"FSDP2 is supported from torch {'.'.join(map(str, OLDEST_TORCH_OF_FSDP2))} on, got {torch.__version__}: "
            "older ones train other weights than a single process. Upgrade torch, or train with DDP."
        )
    return found


def _others(module: nn.Module, used: list[nn.Module]) -> list[nn.Module]:
    """Return the largest parts of a module that neither hold one of `used` nor are held by one."""
    if any(module is one for one in used):
        return []
    if not any(part is one for part in module.modules() for one in used):
        return [module]
    return [other for child in module.children() for other in _others(child, used)]


def modulated_by_table(state: Pass, block: Any) -> Tensor:
    """Return what a block's self-attention reads, (B, N, D), where all blocks share one modulation.

    Each adds a table of its own to it (`ada_norm_single` of diffusers).
    """
    modulation = block.scale_shift_table[None] + state.condition.unflatten(1, (6, -1))  # (B, 6, D)
    shift, scale = modulation[:, :1], modulation[:, 1:2]
    tokens: Tensor = block.norm1(state.hidden_states) * (1 + scale) + shift
    return tokens.to(state.hidden_states.dtype)


def grid_of(noised_latents: Tensor, patch_size: int) -> tuple[int, int]:
    """Return rows and columns of the token grid of latents, (B, C, h, w)."""
    return noised_latents.shape[-2] // patch_size, noised_latents.shape[-1] // patch_size


def unused_by_all(denoiser: Any, taps: Sequence[Tap]) -> list[nn.Parameter]:
    """Return the parameters of the modules of a denoiser that are unused at each of `taps`."""
    unused = [
        {id(each): each for module in denoiser.unused_modules(*tap) for each in module.parameters()} for tap in taps
    ]
    return [unused[0][key] for key in set.intersection(*map(set, unused))]


def zero_channels(tokens: Tensor, channels: Sequence[int]) -> Tensor:
    """Return the tokens, (..., D), with some channels set to zero."""
    if not channels:
        return tokens
    return tokens.index_fill(-1, torch.tensor(channels, device=tokens.device), 0)
