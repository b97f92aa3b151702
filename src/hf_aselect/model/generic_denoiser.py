"""A transformer read by hooks on its own call: all of a family is its description."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .denoiser import Denoiser, as_if_called, grid_of, is_sharded
from .families import Inputs, TransformerFamily
from .layouts import PROJECTIONS, Tap

# Hooks stay on, as what is put on and taken off at each read is lost where two threads read. What they are to keep is
# the thread's own.
_NOW = threading.local()


class _Stop(BaseException):
    """Ends a transformer's call when all is read; no `except Exception` on the way may take it."""


@dataclass
class _Reading:
    """What is read from one call.

    Args:
        inputs: What the transformer is called with.
        keep: Makes of a sequence the image's tokens.
        waiting: Taps that are still to be read.
        may_stop: Whether the call ends with the last of them.
        found: What was read.
        timed: Modules that were given the timesteps; FLUX.2 [dev] has its guidance embedded by the same one, after.
    """

    inputs: Inputs
    keep: Callable[[Tensor], Tensor]
    waiting: set[Tap]
    may_stop: bool = True
    found: dict[Tap, Any] = field(default_factory=dict)
    timed: set[nn.Module] = field(default_factory=set)


@dataclass(frozen=True)
class _Hook:
    """Keeps what a module reads, or what it returns, if this thread waits for it.

    Args:
        tap: Block and feature; "input" stands for the arguments of a block.
        output: Which of the module's outputs.
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
    """Return what a block or an attention reads, however it is called."""
    tokens: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else (args or tuple(kwargs.values()))[0]
    return tokens


@dataclass(frozen=True)
class _ExactTimesteps:
    """Gives a module the timesteps unrounded, which diffusers hands to it in the model's dtype.

    Args:
        divisor: What timesteps in [0, 1000] are divided by to be what the module takes.
    """

    divisor: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        reading: _Reading | None = getattr(_NOW, "reading", None)
        if reading is None or module in reading.timed:
            return None
        reading.timed.add(module)
        return reading.inputs.timesteps / self.divisor, *args[1:]


class _Checkpoints(nn.Module):
    """What transformers switches gradient checkpointing on with, for transformers that have none of their own."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None


def _run(checkpoints: _Checkpoints, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block, again in the backward pass if that is switched on."""
    if checkpoints.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoints._gradient_checkpointing_func(partial(forward, **kwargs), *args)
    return forward(*args, **kwargs)


class GenericDenoiser(Denoiser):
    """A transformer of any family that is described, read by hooks on its own call.

    The call is ended by an exception as soon as all taps are read. Where it must end in good order, in `torch.export`
    and with offloaded weights, the lists of blocks are cut behind the last tap instead. Where FSDP shards the blocks,
    the call ends after the last of them.

    Args:
        transformer: A transformer of the family.
        family: Its description.
        rebuild: Builds the same transformer once more, with new weights: for tables that checkpoints do not hold, and
            that are lost where it was built without data.
        options: Of all families, see `Denoiser`.

    Raises:
        ValueError: If the description names a module that the transformer does not have.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *args: Any,
        family: TransformerFamily,
        rebuild: Callable[[], nn.Module],
        **options: Any,
    ) -> None:
        self.family = family
        self.prompt_fields = family.prompt_fields  # type: ignore[misc, assignment]
        _check_names(transformer, family)
        super().__init__(transformer, *args, **options)
        # Of buffers, by name: loading empties them after this.
        self._tables: dict[nn.Module, dict[str, Tensor]] = {}
        self._restore_tables(rebuild)
        for path, divisor in family.timestep_modules.items():
            transformer.get_submodule(path).register_forward_pre_hook(_ExactTimesteps(divisor))
        if not hasattr(transformer, "gradient_checkpointing"):
            self.checkpoints = _Checkpoints()
            for block in self.blocks:
                block.forward = partial(_run, self.checkpoints, type(block).forward, block)
        for index, (block, part) in enumerate(zip(self.blocks, self._parts(), strict=True)):
            attention = block.get_submodule(part.attention)
            block.register_forward_pre_hook(_Hook((index, "input")), with_kwargs=True)
            if index == 0:
                block.register_forward_pre_hook(_Hook((-1, "hidden")), with_kwargs=True)
            attention.register_forward_pre_hook(_Hook((index, "normed")), with_kwargs=True)
            attention.register_forward_hook(_Hook((index, "attention")), with_kwargs=True)
            block.register_forward_hook(_Hook((index, "hidden"), part.hidden), with_kwargs=True)

    @property
    def patch_embedding(self) -> nn.Module:
        """The module that makes tokens of noised latents."""
        module: nn.Module = self.transformer.get_submodule(self.family.patch_embedding)
        return module

    def _parts(self) -> list[Any]:
        """Return of each block which list it is in."""
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
        """Classes that the transformer knows; as a label, this number is the null label."""
        return int(self.transformer.config[self.family.num_classes]) if self.family.num_classes else 0

    def read_taps(self, noised_latents: Tensor, timesteps: Tensor | int, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return the tokens at several taps from one pass, stopping after the last; see `Denoiser`."""
        inputs = self._inputs(noised_latents, timesteps)
        last = max(block for block, _ in taps)
        if is_sharded(self.blocks[0]):
            return self._read_sharded(inputs, taps, last)
        if self._must_end(last):
            with self._cut(last):
                return self._read(self._call(inputs), inputs, taps, may_stop=False)
        return self._read(self._call(inputs), inputs, taps)

    def _must_end(self, last: int) -> bool:
        """Return whether a call may not be ended by an exception: what waits for its end would wait for ever."""
        # Modules are followed in and out.
        is_traced = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        # accelerate and diffusers put weights back that they fetched.
        block = self.blocks[max(last, 0)]
        return is_traced or hasattr(block, "_diffusers_hook") or next(block.parameters()).is_meta

    def _read_sharded(self, inputs: Inputs, taps: Sequence[Tap], last: int) -> dict[Tap, Tensor]:
        """Return the tokens at several taps where FSDP gathers a block's weights while it is called.

        A block's call must end in good order, and what is read inside of it must be what a call of it returns.
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
        prompt = {name: getattr(self, name) for name in self.prompt_fields}
        prompt = {name: value.expand(size, *value.shape[1:]) for name, value in prompt.items()}
        exact = timesteps.float().expand(size)
        return Inputs(self.transformer, noised_latents, exact, labels, prompt, self.guidance, self.vae_scale_factor)

    def _call(self, inputs: Inputs) -> Callable[[], Any]:
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
        """Leave out the blocks after a block while this lasts; the first one stays, as it is asked what it reads."""
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
        """Return what the transformer predicts, (B, C, h, w), running all of it; from the image to the noise."""
        inputs, output = self._inputs(noised_latents, timesteps, labels), []
        self._read(lambda: output.append(self._call(inputs)()[0]), inputs, [])
        return self.family.output(output[0], inputs)

    def unused_parameters(self, taps: Sequence[Tap]) -> list[nn.Parameter]:
        """Return the parameters that have no influence on the tokens at any of `taps`.

        They are those that autograd gives no gradient in a pass without data.

        Raises:
            ValueError: If the transformer's call looks at the values of a tensor.
        """
        mine = list(self.parameters())
        weights = [torch.empty_like(each, device="meta", requires_grad=True) for each in mine]
        buffers = {id(each): each.to("meta") for each in self.buffers()}
        # A copy, as a transformer may move its tables to where it is run; of what has no data in it.
        twin = copy.deepcopy(self, {**buffers, **{id(each): new for each, new in zip(mine, weights, strict=True)}})
        latents = torch.empty(1, self.num_channels, *2 * [4 * self.patch_size], device="meta", dtype=mine[0].dtype)
        try:
            with torch.enable_grad():
                tokens = twin.read_taps(latents, 0, list(taps))
                total = torch.stack([each.sum() for each in tokens.values()]).sum()
                gradients = torch.autograd.grad(total, weights, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"Which weights of a {self.family.name} a tap depends on is found in a pass without data, which "
                f"failed ({error}): its call, or the description's, looks at values. Keep the backbone frozen "
                "(`freeze_backbone=True`), or let `call` make its tensors where `inputs.latents` are."
            ) from error
        return [each for each, gradient in zip(mine, gradients, strict=True) if gradient is None]

    def unused_modules(self, block: int, feature: str) -> list[nn.Module]:
        """Return the largest modules that have weights, none of which has an influence on the tokens."""
        unused = {id(each) for each in self.unused_parameters([(block, feature)])}
        return _largest(self.transformer, lambda module: all(id(each) in unused for each in module.parameters()))

    def tables_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return what a module's buffers that no checkpoint holds must be after a build without data, by name."""
        return self._tables.get(module, {})

    def _restore_tables(self, rebuild: Callable[[], nn.Module]) -> None:
        """Give the transformer the tables that were lost in a build without data: buffers and attributes."""
        if not (lost := list(_without_data(self.transformer))):
            return
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), _WeightsWithoutData():
                whole = rebuild()
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
    """Lets modules make their weights without data, while all that is computed is there.

    torch's own layers ask for their weights by `torch.empty`, of which no table is made.
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
    names = [family.patch_embedding, *family.timestep_modules, *(part.path for part in family.blocks)]
    modules = {name for name, _ in transformer.named_modules()}
    for part in family.blocks:
        attention = f"{part.path}.0.{part.attention}"
        projections = () if callable(part.projections) else part.projections
        # A list may be empty.
        if f"{part.path}.0" in modules:
            names += [attention, *(f"{attention}.{name}" for name in projections)]
    if missing := [name for name in names if name not in modules]:
        raise ValueError(
            f"The description of {family.name} names {', '.join(missing)}, and the transformer has no such module. "
            f"It has {', '.join(name for name, _ in transformer.named_children())}."
        )
    count, expected = (
        sum(len(transformer.get_submodule(part.path)) for part in family.blocks),
        family.layout(transformer.config),
    )
    if count != expected.num_layers:
        raise ValueError(
            f"The description of {family.name} has a `layout` of {expected.num_layers} blocks, and its `blocks` hold "
            f"{count}."
        )


def _without_data(transformer: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield path and name of what has no data and is in no checkpoint: buffers, and attributes with tensors."""
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


def _largest(module: nn.Module, is_fit: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the largest parts of a module that have weights and are fit."""
    if next(module.parameters(), None) is None:
        return []
    return [module] if is_fit(module) else [part for child in module.children() for part in _largest(child, is_fit)]
