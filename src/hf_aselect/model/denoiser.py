"""A diffusion transformer that is read at taps of its blocks by hooks, and stops after the last tap."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from .families import Inputs, TransformerFamily
from .layouts import PROJECTIONS, Tap

# Hooks stay registered, because adding and removing them at each read would fail if two threads read at once. The
# values to keep are stored per thread.
_NOW = threading.local()


class _Stop(BaseException):
    """Ends a transformer's call after the last tap. It must not be caught by an `except Exception`."""


@dataclass
class _Reading:
    """The state of one call that is read.

    Args:
        inputs: Inputs of the transformer.
        keep: Returns the image's tokens of a sequence.
        waiting: Taps that are still to be read.
        may_stop: Whether the call ends at the last of them.
        found: Values that were read, by tap.
        timed: Modules that already received the timesteps.
    """

    inputs: Inputs
    keep: Callable[[Tensor], Tensor]
    waiting: set[Tap]
    may_stop: bool = True
    found: dict[Tap, Any] = field(default_factory=dict)
    timed: set[nn.Module] = field(default_factory=set)


@dataclass(frozen=True)
class _Hook:
    """Keeps the input or the output of a module if this thread requested it.

    Args:
        tap: Block and feature; "input" stands for the arguments of a block.
        output: Index of the module's output.
    """

    tap: Tap
    output: int = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *outputs: Any) -> None:
        reading: _Reading | None = getattr(_NOW, "reading", None)
        if reading is None or self.tap not in reading.waiting:
            return
        if self.tap[1] == "input":
            reading.found[self.tap] = args, kwargs
        else:
            value = outputs[0] if outputs else _first(args, kwargs)
            reading.found[self.tap] = reading.keep(value[self.output] if isinstance(value, (tuple, list)) else value)
        reading.waiting.discard(self.tap)
        if reading.may_stop and not reading.waiting:
            raise _Stop


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input tokens of a block or an attention, passed by position or by name."""
    tokens: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else (args or tuple(kwargs.values()))[0]
    return tokens


@dataclass(frozen=True)
class _ExactTimesteps:
    """Passes the unrounded timesteps to a module. diffusers passes them in the model's dtype.

    FLUX [dev] embeds its guidance by the same module, after the timesteps.

    Args:
        divisor: Divisor that maps timesteps in [0, 1000] to the range that the module expects.
    """

    divisor: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        reading: _Reading | None = getattr(_NOW, "reading", None)
        if reading is None:
            return None
        exact = reading.inputs.timesteps
        if module in reading.timed:
            if not reading.inputs.transformer.config.get("guidance_embeds"):
                return None
            exact = torch.full_like(exact, 1000 * reading.inputs.guidance)
        reading.timed.add(module)
        return exact / self.divisor, *args[1:]


class BlockStep(GradientCheckpointingLayer):
    """Runs a block so that transformers can recompute it in the backward pass; has no weights.

    diffusers' own switch for all blocks stays off, because transformers selects the blocks to checkpoint, and hooks of
    FSDP must run only once.
    """

    def forward(self, *values: Any, run: Callable[..., Any], names: tuple[str, ...]) -> Any:
        """Return a block's output. The last `values` are its keyword arguments: only positional ones get gradients."""
        split = len(values) - len(names)
        return run(*values[:split], **dict(zip(names, values[split:], strict=True)))


def _run(step: Any, index: int, forward: Callable[..., Any], block: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a block, with gradient checkpointing if it is enabled and nothing inside the block is read."""
    if not step.gradient_checkpointing:
        return forward(block, *args, **kwargs)
    reading: _Reading | None = getattr(_NOW, "reading", None)
    if reading is not None and not reading.waiting.isdisjoint(((index, "normed"), (index, "attention"))):
        return forward(block, *args, **kwargs)
    return step(*args, *kwargs.values(), run=partial(forward, block), names=tuple(kwargs))


def _run_whole(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module that takes weights of its layers, with all that is done where the layers are called."""
    run = partial(forward, module, *args, **kwargs)
    for layer in module.children():
        run = partial(as_if_called, layer, run)
    return run()


class Denoiser(nn.Module):
    """A diffusion transformer that is read at taps of its blocks, and stops after the last tap.

    An exception ends the call as soon as all taps are read. Under `torch.export` and with offloaded weights, where the
    call must complete, the lists of blocks are cut after the last tap instead. If FSDP shards the blocks, the call
    ends after the last block that is read.

    Args:
        transformer: A transformer of the family.
        family: Its description.
        rebuild: Builds the same transformer with new weights, to restore tables that are not in checkpoints if it was
            built without data. None if it has its data.
        timestep_embedding: Kind of timestep embedding. "diffusers" is the one of diffusers.
        prompt_shapes: Shapes of the empty prompt's embeddings by name. The values are buffers of that name. None if
            nothing will be read.
        guidance: Guidance scale of a guidance-distilled transformer. Other transformers ignore it.
        vae_scale_factor: Pixels a side that one latent stands for.

    Raises:
        ValueError: If the description names a module that the transformer does not have, or the transformer does not
            take this timestep embedding or these embeddings of the prompt.
    """

    transformer: Any  # diffusers is imported when a denoiser is built, not here

    def __init__(
        self,
        transformer: nn.Module,
        family: TransformerFamily,
        rebuild: Callable[[], nn.Module] | None = None,
        timestep_embedding: str = "diffusers",
        prompt_shapes: Mapping[str, list[int]] | None = None,
        guidance: float = 1.0,
        vae_scale_factor: int = 1,
    ) -> None:
        super().__init__()
        if timestep_embedding not in family.timestep_embeddings:
            raise ValueError(
                f"`timestep_embedding` of {family.name} must be one of {', '.join(family.timestep_embeddings)}, "
                f"got {timestep_embedding!r}."
            )
        _check_names(transformer, family)
        self.transformer, self.family = transformer, family
        self.timestep_embedding, self.guidance = timestep_embedding, guidance
        self.vae_scale_factor = vae_scale_factor
        if prompt_shapes is not None:
            _check_prompt(transformer, family, prompt_shapes)
            for name, shape in prompt_shapes.items():
                self.register_buffer(name, torch.zeros(shape))
        # Of buffers, by name: loading empties them after this.
        self._tables: dict[nn.Module, dict[str, Tensor]] = {}
        self._rebuild = rebuild
        self._restore_tables()
        if family.prepare is not None:
            family.prepare(transformer, timestep_embedding)
        self.steps = nn.ModuleList(BlockStep() for _ in self.blocks)
        self._add_hooks()

    def _add_hooks(self) -> None:
        for path, divisor in self.family.timestep_modules.items():
            self.transformer.get_submodule(path).register_forward_pre_hook(_ExactTimesteps(divisor))
        for module in self.whole_modules:
            module.forward = partial(_run_whole, type(module).forward, module)
        blocks = zip(self.blocks, self._parts(), self.steps, strict=True)
        for index, (block, part, step) in enumerate(blocks):
            attention = block.get_submodule(part.attention)
            block.register_forward_pre_hook(_Hook((index, "input")), with_kwargs=True)
            if index == 0:
                block.register_forward_pre_hook(_Hook((-1, "hidden")), with_kwargs=True)
            attention.register_forward_pre_hook(_Hook((index, "normed")), with_kwargs=True)
            attention.register_forward_hook(_Hook((index, "attention")), with_kwargs=True)
            block.register_forward_hook(_Hook((index, "hidden"), part.hidden), with_kwargs=True)
            block.forward = partial(_run, step, index, type(block).forward, block)
        if self.family.output_module:
            output = self.transformer.get_submodule(self.family.output_module)
            output.register_forward_hook(_Hook(_OUTPUT), with_kwargs=True)

    @property
    def patch_embedding(self) -> nn.Module:
        """The module that makes tokens of noised latents."""
        module: nn.Module = self.transformer.get_submodule(self.family.patch_embedding)
        return module

    @property
    def whole_modules(self) -> Sequence[Any]:
        """The modules that take weights of layers inside of them without calling these layers."""
        return [self.transformer.get_submodule(path) for path in self.family.whole_modules]

    def _parts(self) -> list[Any]:
        """Return the list of blocks that each block belongs to."""
        return [part for part in self.family.blocks for _ in self.transformer.get_submodule(part.path)]

    @property
    def blocks(self) -> Sequence[Any]:
        """The blocks, in the order in which they are run."""
        return [block for part in self.family.blocks for block in self.transformer.get_submodule(part.path)]

    @property
    def _layout(self) -> Any:
        return self.family.layout(self.transformer.config)

    @property
    def num_channels(self) -> int:
        """Channels of the latents."""
        return int(self._layout.num_channels)

    @property
    def patch_size(self) -> int:
        """Side of a token in latents."""
        return int(self._layout.patch_size)

    @property
    def num_classes(self) -> int:
        """Number of classes, which is also the null label. 0 for text-conditioned transformers."""
        return int(self.transformer.config[self.family.num_classes]) if self.family.num_classes else 0

    def forward(self, noised_latents: Tensor, timesteps: Tensor | int, block: int, feature: str) -> Tensor:
        """Return the tokens at a tap, (B, N, D), without running later blocks. See `read_taps`."""
        return self.read_taps(noised_latents, timesteps, [(block, feature)])[block, feature]

    def read_taps(self, noised_latents: Tensor, timesteps: Tensor | int, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return the tokens at several taps from one pass, without running blocks after the last tap.

        Args:
            noised_latents: Noised latents, (B, C, h, w); h and w multiples of the patch size.
            timesteps: Timesteps in [0, 1000), (B,), or one integer for all images.
            taps: Blocks, counted from the first, and features. (-1, "hidden") is the input of the first block.

        Returns:
            Tokens of the image at each tap in row-major order, (B, N, D).
        """
        inputs = self._inputs(noised_latents, timesteps)
        last = max(block for block, _ in taps)
        if is_sharded(self.blocks[0]):
            return self._read_sharded(inputs, taps, last)
        if self._must_end(last):
            with self._cut(last):
                return self._read(self._call(inputs), inputs, taps, may_stop=False)
        return self._read(self._call(inputs), inputs, taps)

    def _must_end(self, last: int) -> bool:
        """Return whether the call must complete, because tracing or hooks depend on its end."""
        # Tracing follows the entry and exit of modules.
        is_traced = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        # accelerate and diffusers offload the fetched weights again at the end.
        block = self.blocks[max(last, 0)]
        return is_traced or hasattr(block, "_diffusers_hook") or next(block.parameters()).is_meta

    def _read_sharded(self, inputs: Inputs, taps: Sequence[Tap], last: int) -> dict[Tap, Tensor]:
        """Return the tokens at several taps where FSDP gathers a block's weights while it is called.

        A block's call must complete, and values read inside the block must be returned by that call.
        """
        inner = sorted({block for block, feature in taps if feature != "hidden"})
        outer = [tap for tap in taps if tap[1] == "hidden"]
        # After the last block all is read, and FSDP's own hook has run. Some transformers then look into their blocks.
        with self._cut(last) if is_sharded(self.transformer) else _ended_after(self.blocks[max(last, 0)]):
            found = self._read(
                self._call(inputs), inputs, [*outer, *((block, "input") for block in inner)], may_stop=False
            )
        for index in inner:
            args, kwargs = found.pop((index, "input"))
            asked = [(block, feature) for block, feature in taps if block == index and feature != "hidden"]
            block = self.blocks[index]
            found |= as_if_called(block, partial(self._read, partial(block.forward, *args, **kwargs), inputs, asked))
        return found

    def _inputs(self, noised_latents: Tensor, timesteps: Tensor | int, labels: Tensor | None = None) -> Inputs:
        size, device = noised_latents.shape[0], noised_latents.device
        if isinstance(timesteps, int):
            timesteps = torch.full((size,), timesteps, device=device)
        if labels is None:
            labels = torch.full((size,), self.num_classes, device=device)
        prompt = {name: getattr(self, name) for name in self.family.prompt_fields}
        prompt = {name: value.expand(size, *value.shape[1:]) for name, value in prompt.items()}
        return Inputs(
            self.transformer,
            noised_latents,
            timesteps.float().expand(size),
            labels,
            prompt,
            self.guidance,
            self.vae_scale_factor,
            self.timestep_embedding,
            timesteps.expand(size),
        )

    def _call(self, inputs: Inputs) -> Callable[[], Any]:
        if getattr(self.transformer, "gradient_checkpointing", False):
            # As transformers sets it, of all modules that have it; blocks are checkpointed by their steps.
            self.transformer.gradient_checkpointing = False
        return partial(self.transformer, **self.family.call(inputs), return_dict=False)  # type: ignore[misc]

    def _read(
        self, call: Callable[[], Any], inputs: Inputs, taps: Sequence[Tap], may_stop: bool = True
    ) -> dict[Tap, Any]:
        """Return the tokens at several taps of a call, (B, N, D), which ends with the last of them if it may."""
        rows, columns = grid_of(inputs.latents, self.patch_size)
        waiting = {(block, "normed" if feature in PROJECTIONS else feature) for block, feature in taps}
        reading = _Reading(inputs, lambda whole: self.family.tokens(whole, rows * columns), waiting, may_stop)
        _NOW.reading = reading
        try:
            call()
        except _Stop:
            pass
        finally:
            _NOW.reading = None
        # Projections are run here: in a block they would be missing when a checkpointed one is run again.
        return {tap: self._feature(reading.found, *tap) for tap in taps}

    def _feature(self, found: dict[Tap, Any], block: int, feature: str) -> Any:
        if feature not in PROJECTIONS:
            return found[block, feature]
        part = self._parts()[block]
        attention, normed = self.blocks[block].get_submodule(part.attention), found[block, "normed"]
        if callable(part.projections):
            return part.projections(attention, normed)[PROJECTIONS.index(feature)]
        return attention.get_submodule(part.projections[PROJECTIONS.index(feature)])(normed)

    @contextmanager
    def _cut(self, last: int) -> Iterator[None]:
        """Leave out the blocks after a block within this context; the first one stays, because its input is read."""
        left, whole = max(last, 0) + 1, []
        for part in self.family.blocks:
            parent_path, _, name = part.path.rpartition(".")
            parent = self.transformer.get_submodule(parent_path)
            blocks: Any = parent._modules[name]
            whole.append((parent, name, blocks))
            parent._modules[name] = _FirstBlocks(blocks, left)
            left = max(left - len(blocks), 0)
        try:
            yield
        finally:
            for parent, name, blocks in whole:
                parent._modules[name] = blocks

    def predict(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction of the whole transformer, of the kind of its scheduler's `prediction_type`.

        For flow matching this is the velocity from the image to the noise, also for families that predict the opposite
        direction. A learned variance is left out. Call it in eval mode: in train mode diffusers' DiT randomly replaces
        one label in ten by the null label.

        Args:
            noised_latents: Noised latents, (B, C, h, w).
            timesteps: Timesteps in [0, 1000], (B,).
            labels: Class indices in [0, `num_classes`), or `num_classes` for the null label, (B,). Ignored by
                text-conditioned transformers, which always use the empty prompt.

        Returns:
            The prediction, (B, C, h, w).
        """
        inputs = self._inputs(noised_latents, timesteps, labels)
        if self.family.output_module:
            # Later layers may only support square images.
            is_square = noised_latents.shape[-2] == noised_latents.shape[-1]
            output = self._read(self._call(inputs), inputs, [_OUTPUT], may_stop=not is_square)[_OUTPUT]
        else:
            found: list[Any] = []
            self._read(lambda: found.append(self._call(inputs)()[0]), inputs, [])
            output = found[0]
        return self.family.output(output, inputs)

    def unused_parameters(self, taps: Sequence[Tap]) -> list[nn.Parameter]:
        """Return the parameters that have no influence on the tokens at any of `taps`.

        They are those that autograd gives no gradient in a pass without data.

        Raises:
            ValueError: If the transformer's call looks at the values of a tensor.
        """
        mine = list(self.parameters())
        if self._rebuild is not None and not all(map(_is_plain, mine)):
            with torch.device("meta"):
                plain = Denoiser(self._rebuild(), self.family, None, self.timestep_embedding, self._prompt_shapes())
            unused = {id(each) for each in plain.unused_parameters(taps)}
            names = {name for name, each in plain.named_parameters() if id(each) in unused}
            return [each for name, each in self.named_parameters() if name in names]
        weights = [torch.empty_like(each, device="meta", requires_grad=True) for each in mine]
        buffers = {id(each): each.to("meta") for each in self.buffers()}
        # A copy on the meta device, because a transformer may move its tables to the device of its input.
        twin = copy.deepcopy(self, {**buffers, **{id(each): new for each, new in zip(mine, weights, strict=True)}})
        # The older kind (`use_reentrant`) rejects `autograd.grad`.
        for step in twin.steps:
            step.gradient_checkpointing = False  # type: ignore[assignment]
        latents = torch.empty(1, self.num_channels, *2 * [4 * self.patch_size], device="meta", dtype=mine[0].dtype)
        try:
            with torch.enable_grad():
                tokens = twin.read_taps(latents, 0, list(taps))
                total = torch.stack([each.sum() for each in tokens.values()]).sum()
                gradients = torch.autograd.grad(total, weights, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"The weights that a tap of a {self.family.name} uses could not be found by a pass on the meta "
                f"device ({error}). Keep the backbone frozen (`freeze_backbone=True`), or let `call` create its "
                "tensors on the device of `inputs.latents` and not read their values."
            ) from error
        return [each for each, gradient in zip(mine, gradients, strict=True) if gradient is None]

    def _prompt_shapes(self) -> dict[str, list[int]]:
        return {name: list(getattr(self, name).shape) for name in self.family.prompt_fields}

    def unused_modules(self, block: int, feature: str) -> list[nn.Module]:
        """Return the largest modules whose weights do not influence the tokens."""
        unused = {id(each) for each in self.unused_parameters([(block, feature)])}
        return _largest(self.transformer, lambda module: all(id(each) in unused for each in module.parameters()))

    def tables_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the values, by name, of a module's buffers that are lost in a build without data."""
        return self._tables.get(module, {})

    def _restore_tables(self) -> None:
        """Give the transformer the tables that were lost in a build without data: buffers and attributes."""
        if self._rebuild is None or not (lost := list(_without_data(self.transformer))):
            return
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), _WeightsWithoutData():
                whole = self._rebuild()
        finally:
            torch.set_default_dtype(dtype)
        for path, name in lost:
            module, table = self.transformer.get_submodule(path), getattr(whole.get_submodule(path), name)
            setattr(module, name, table)
            if name in module._buffers:
                self._tables.setdefault(module, {})[name] = table


class _FirstBlocks(nn.ModuleList):
    """The first blocks of a list, which seems to be as long as before: Chroma counts its blocks to find modulations.

    Args:
        blocks: The whole list.
        left: How many of them are run.
    """

    def __init__(self, blocks: Any, left: int) -> None:
        super().__init__(list(blocks)[:left])
        self._whole = len(blocks)

    def __len__(self) -> int:
        return int(self.__dict__.get("_whole", len(self._modules)))


@contextmanager
def _ended_after(block: nn.Module) -> Iterator[None]:
    """End the transformer's call when a block and all of its hooks are done, while this lasts."""

    def end(*_: Any) -> None:
        raise _Stop

    handle = block.register_forward_hook(end)
    try:
        yield
    finally:
        handle.remove()


class _WeightsWithoutData(TorchFunctionMode):
    """Creates the weights of modules without data, while computed tables get their values.

    torch's own layers allocate weights by `torch.empty`, which tables do not use.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch."""
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _check_names(transformer: Any, family: TransformerFamily) -> None:
    """Reject a description that names a module which the transformer does not have.

    Raises:
        ValueError: If there is one.
    """
    names = [
        family.patch_embedding,
        *family.timestep_modules,
        *family.whole_modules,
        *(part.path for part in family.blocks),
    ]
    names += [family.output_module] if family.output_module else []
    modules = {name for name, _ in transformer.named_modules()}
    for part in family.blocks:
        attention = f"{part.path}.0.{part.attention}"
        projections = () if callable(part.projections) else part.projections
        # A list may be empty.
        if f"{part.path}.0" in modules:
            names += [attention, *(f"{attention}.{name}" for name in projections)]
    if missing := [name for name in names if name not in modules]:
        raise ValueError(
            f"The description of {family.name} names {', '.join(missing)}, which the transformer does not have. Its "
            f"modules are {', '.join(name for name, _ in transformer.named_children())}."
        )
    count, expected = (
        sum(len(transformer.get_submodule(part.path)) for part in family.blocks),
        family.layout(transformer.config),
    )
    if count != expected.num_layers:
        raise ValueError(
            f"The `layout` of {family.name} has {expected.num_layers} blocks, but its `blocks` have {count}."
        )


def _check_prompt(transformer: Any, family: TransformerFamily, shapes: Mapping[str, list[int]]) -> None:
    """Reject prompt embeddings that do not fit the transformer.

    Raises:
        ValueError: If their names, number of tokens or width do not fit.
    """
    name, config = family.name, transformer.config
    if set(shapes) != set(family.prompt_fields):
        raise ValueError(
            f"{name} is conditioned on {', '.join(family.prompt_fields) or 'no prompt'}, but `prompt_shapes` in the "
            f"configuration has {', '.join(shapes) or 'none'}. Load the whole pipeline with its text encoders, or "
            "pass `prompt_embeds=`."
        )
    for part, size in family.prompt_fields.items():
        width, shape = config.get(size), list(shapes[part])
        expected = [1, width] if part.startswith("pooled") else [1, *shape[1:2], width]
        if width is not None and (shape != expected or 0 in shape):
            wanted = f"(1, {width})" if part.startswith("pooled") else f"(1, L, {width})"
            raise ValueError(f"`{part}` of a {name} must have shape {wanted}, got {tuple(shape)}.")
    # Rotary positions are tabulated.
    if "axes_lens" in family.sizes and "prompt_embeds" in shapes:
        length, limit = shapes["prompt_embeds"][1], config["axes_lens"][0]
        if length > limit:
            raise ValueError(f"`prompt_embeds` of a {name} must have at most {limit} tokens, got {length}.")


def _without_data(transformer: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield path and name of tensors that have no data and are in no checkpoint: buffers and attributes."""
    for path, module in transformer.named_modules():
        named = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        named |= {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        for name, value in named.items():
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            if any(isinstance(each, Tensor) and each.is_meta for each in values):
                yield path, name


_OF_MODULES = ("_parameters", "_buffers", "_modules")
# The tap that stands for the output of a family's `output_module`.
_OUTPUT = (-2, "hidden")


def _is_plain(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is neither quantized nor sharded."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point()


def _largest(module: nn.Module, is_fit: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the largest parts of a module that have weights and fulfil a condition."""
    if next(module.parameters(), None) is None:
        return []
    return [module] if is_fit(module) else [part for child in module.children() for part in _largest(child, is_fit)]


def as_if_called(module: Any, read: Callable[[], Any]) -> Any:
    """Return the output of a part of a module, with the hooks that run when the module is called.

    FSDP gathers its weights, and hooks of accelerate and diffusers load or cast them.
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


def _as_if_called_by_fsdp(module: Any, read: Callable[[], Any]) -> Any:
    from torch.distributed.fsdp import register_fsdp_forward_method

    module.read_tap = read
    register_fsdp_forward_method(module, "read_tap")
    try:
        return module.read_tap()
    finally:
        del module.read_tap


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Return the device and dtype that a module computes in, from its hooks or else its weights.

    accelerate may offload weights, and diffusers may store them in a smaller dtype. The dtype is None if no weight has
    a dtype to compute in, for example if all are quantized.
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
            f"FSDP2 requires torch >= {'.'.join(map(str, OLDEST_TORCH_OF_FSDP2))}, got {torch.__version__}, which "
            "trains to different weights than a single process. Upgrade torch, or train with DDP."
        )
    return found


def grid_of(noised_latents: Tensor, patch_size: int) -> tuple[int, int]:
    """Return rows and columns of the token grid of latents, (B, C, h, w)."""
    return noised_latents.shape[-2] // patch_size, noised_latents.shape[-1] // patch_size


def zero_channels(tokens: Tensor, channels: Sequence[int]) -> Tensor:
    """Return the tokens, (..., D), with some channels set to zero."""
    if not channels:
        return tokens
    return tokens.index_fill(-1, torch.tensor(channels, device=tokens.device), 0)
