"""Models whose weights are spread over processes, and values that processes share."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.denoiser import is_sharded


def unwrapped(model: Any, keep_adapters: bool = False) -> Any:
    """Return the model under what DDP, FSDP, DeepSpeed, torch.compile and peft put around it.

    Args:
        model: Any of those, or a model itself.
        keep_adapters: Whether to stop at peft's wrapper, which saves adapters alone.

    Raises:
        ValueError: If there is another model under it, or none that reads features.
    """
    inner = model
    while not hasattr(type(inner), "_read_taps"):
        # By what the wrapper itself has: peft's and torch.compile's pass other names on to the model.
        parts: dict[str, Any] = vars(inner).get("_modules") or {}
        wrapped = next(
            (parts[name] for name in ("_orig_mod", "module", "_fsdp_wrapped_module") if name in parts), None
        )
        if hasattr(type(inner), "get_base_model"):
            if keep_adapters:
                return inner
            wrapped = inner.get_base_model()
        if wrapped is None:
            raise ValueError(_of_another_kind(inner))
        inner = wrapped
    return inner


def _of_another_kind(model: Any) -> str:
    """Return what is wrong with a model that does not read features, and what would do."""
    name = type(model).__name__
    for part, module in vars(model).get("_modules", {}).items():
        if hasattr(type(module), "_read_taps"):
            return f"`model` must be an hf_aselect model, got a {name}. Pass its `model.{part}` instead."
    return f"`model` must be an hf_aselect model, or one wrapped by DDP, FSDP, torch.compile or peft, got a {name}."


def is_partitioned(module: Any) -> bool:
    """Return whether DeepSpeed's ZeRO 3 took a module's weights apart: they look empty until they are gathered."""
    return any(hasattr(value, "ds_id") for value in getattr(module, "parameters", list)())


@contextmanager
def called_by(module: Any, *names: str, then_shard: bool = False) -> Iterator[None]:
    """Let methods of a module gather its weights for a while, as calling it does; they must not call each other.

    What DeepSpeed's ZeRO 3 took apart is whole meanwhile: before training nothing gathers it where it is called.
    FSDP2 leaves the weights of the outermost module gathered for the backward pass. Without one, `then_shard` gives
    them back: an optimizer that is made meanwhile would be of weights that are thrown away.
    """
    if is_partitioned(module):
        gathered: Any = importlib.import_module("deepspeed").zero.GatheredParameters
        with gathered(list(module.parameters())):
            yield
        return
    if not is_sharded(module):
        yield
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    before = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in names:
        register_fsdp_forward_method(module, name)
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
        vars(module).update(before)
        if then_shard:
            module.reshard()


def refuse_flattened(model: Any) -> None:
    """Reject a model of FSDP's first version, whose weights are gathered only where the whole is called.

    Raises:
        ValueError: If it is one.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in getattr(model, "modules", list)()):
        raise ValueError(
            "FSDP version 1 flattens the weights, so that features cannot be read. Call this before the model is "
            "wrapped, or use FSDP2 (`fsdp_version: 2`)."
        )


@dataclass(frozen=True)
class Share:
    """Which images of a set this process reads, every `world`-th from `rank` on, and how to gather what all found.

    Args:
        rank: Which share this is, in [0, `world`).
        world: How many processes share the images; 1 where each process reads all of them.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of_model(cls, model: Any) -> "Share":
        """Return the share of this process in reading a model: all images if the model's weights are sharded.

        The processes gather sharded weights together, so each of them has to make the same passes.
        """
        return cls() if is_sharded(model) or is_partitioned(model) else cls(*process())

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process that has a share of the images, in the order of their ranks."""
        return [value] if self.world == 1 else gather_objects(value)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes that have a share of the images."""
        return torch.stack(self.gather(values)).sum(0)


def process() -> tuple[int, int]:
    """Return the rank of this process and how many there are: 0 and 1 where torch.distributed is not initialized."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_objects(value: Any) -> list[Any]:
    """Return the value of each process, in the order of their ranks. All processes have to call it.

    Args:
        value: Anything that pickle takes; tensors on the CPU.
    """
    world = process()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values
