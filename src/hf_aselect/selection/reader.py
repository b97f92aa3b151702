"""Tokens of images at many timesteps: images are encoded once, noised, and read in batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..model.configuration_aselect import ASelectConfig
from ..model.denoiser import grid_of, zero_channels
from ..model.layouts import Tap
from ..model.noise_schedule import NoiseSchedule, fixed_noise
from .distribution import Share
from .images import CalibrationPictures

# Latents up to this size are kept, so that an image is encoded once; beyond it they are encoded again.
MAX_KEPT_BYTES = 2**25
EVERY_IMAGE = Share()


class ReadableModel(Protocol):
    """What a selection needs of a model: `DiTModel` and the models on top of it have it."""

    config: ASelectConfig

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Timesteps to signal and noise levels."""
        ...

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return clean latents, (B, C, h, w), of images, (B, C, H, W)."""
        ...

    def _read_taps(self, noised_latents: Tensor, timesteps: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return tokens, (B, N, D), at each (block, feature), of noised latents, (B, C, h, w), from one pass."""
        ...


@dataclass(frozen=True)
class Batch:
    """Some images, and how to read their tokens at some timesteps.

    Args:
        indices: Which images of the set.
        timesteps: Timesteps to read them at, integers in [0, 1000).
        grid: Rows and columns of their token grid.
        latents: Their clean latents, (B, C, h, w).
        read: Takes taps, and yields each timestep with the tokens of all noise draws, (K, B, N, D), at each tap. Each
            call makes one pass for each image, timestep and draw.
    """

    indices: list[int]
    timesteps: list[int]
    grid: tuple[int, int]
    latents: Tensor
    read: Callable[[list[Tap]], Iterator[tuple[int, dict[Tap, Tensor]]]]


class Reader:
    """Reads a set of images at any timesteps, and counts the passes.

    Args:
        model: Model to read with.
        images: The set.
        channels: Channels to set to zero, by tap; None where nobody knows them yet, and none is.
        num_draws: Noise draws of each image, different for each; 0 stands for the model's noise, the same for all.
        batch_size: Noised images in one forward pass.
        seed: Seed of the images' own noise.
    """

    def __init__(
        self,
        model: ReadableModel,
        images: CalibrationPictures,
        channels: dict[Tap, list[int] | None],
        num_draws: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.images, self.channels = model, images, channels
        self.num_draws, self.batch_size, self.seed = num_draws, batch_size, seed
        self.num_forwards = 0
        self.latents: dict[int, Tensor] = {}
        self.kept_bytes = 0
        self.bar: Any = None
        # Passes of the batches so far, done or not. Further rounds of a selection add to it.
        self.num_planned = 0

    def batches(self, start: int, stop: int, timesteps: list[int], share: Share = EVERY_IMAGE) -> Iterator[Batch]:
        """Yield the images of a part of the set.

        Args:
            start: First image of the part, counted in the sample.
            stop: End of the part; a shorter sample ends earlier.
            timesteps: Timesteps to read them at.
            share: Which of them. Default: all.
        """
        if self.images.order is not None:
            num_images = len(self.images.share(start, stop, share.rank, share.world))
            draws = self.num_draws or self.model.config.num_noise_draws
            self.num_planned += num_images * draws * len(timesteps)
            self.bar.total = self.num_planned
        for indices, load in self.images.batches(start, stop, self.batch_size, share.rank, share.world):
            latents = self._encode(indices, load)
            grid = grid_of(latents, self.model.config.layout.patch_size)
            yield Batch(indices, timesteps, grid, latents, partial(self._tokens, latents, indices, timesteps))

    def _encode(self, indices: list[int], load: Callable[[], Tensor]) -> Tensor:
        if all(index in self.latents for index in indices):
            return torch.stack([self.latents[index] for index in indices])
        latents = self.model.encode(load())
        for index, latent in zip(indices, latents, strict=True):
            if self.kept_bytes < MAX_KEPT_BYTES and index not in self.latents:
                self.latents[index] = latent.clone()
                self.kept_bytes += latent.nbytes
        return latents

    def _tokens(
        self, latents: Tensor, indices: list[int], timesteps: list[int], taps: list[Tap]
    ) -> Iterator[tuple[int, dict[Tap, Tensor]]]:
        """Yield each timestep with the tokens of all draws, (K, B, N, D), at each tap."""
        noise = self._noise(latents, indices)  # (K, B, C, h, w)
        num_draws, size = noise.shape[:2]
        together = max(1, self.batch_size // (num_draws * size))
        for at in range(0, len(timesteps), together):
            chosen = timesteps[at : at + together]
            where = torch.tensor(chosen).repeat_interleave(num_draws * size)
            repeated = latents.repeat(len(chosen) * num_draws, 1, 1, 1)
            drawn = noise.flatten(0, 1).repeat(len(chosen), 1, 1, 1)
            read = self._read(self.model.noise_schedule.add_noise(repeated, drawn, where), where, taps)
            for number, timestep in enumerate(chosen):
                here = slice(number * num_draws * size, (number + 1) * num_draws * size)
                yield timestep, {tap: tokens[here].unflatten(0, (num_draws, size)) for tap, tokens in read.items()}
            self.num_forwards += len(where)
            self.bar.update(len(where))

    def _read(self, noised: Tensor, where: Tensor, taps: list[Tap]) -> dict[Tap, Tensor]:
        """Return tokens, (M, N, D), at each tap, of noised latents, (M, C, h, w), at timesteps, (M,)."""
        parts = [
            self.model._read_taps(batch, steps.to(noised.device), taps)
            for batch, steps in zip(noised.split(self.batch_size), where.split(self.batch_size), strict=True)
        ]
        read = {tap: torch.cat([part[tap] for part in parts]) for tap in taps}
        return {tap: zero_channels(tokens, self.channels.get(tap) or ()) for tap, tokens in read.items()}

    def _noise(self, latents: Tensor, indices: list[int]) -> Tensor:
        """Return the noise of each draw and image, (K, B, C, h, w); the timesteps share it.

        Each image has its own noise, a function of the seed and the image: what two draws have in common must
        vanish in the mean over images. Only a criterion of the features as they are used later has the model's own.
        """
        shape = tuple(latents.shape[1:])
        config = self.model.config
        if not self.num_draws:
            draws = [fixed_noise(shape, config.noise_seed, draw) for draw in range(config.num_noise_draws)]
            return torch.stack(draws)[:, None].expand(-1, len(indices), *shape)
        drawn = [
            np.random.Generator(np.random.Philox(key=[self.seed, index])).standard_normal(
                (self.num_draws, *shape), dtype=np.float32
            )
            for index in indices
        ]
        return torch.from_numpy(np.stack(drawn, axis=1))


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put a module in eval mode for a while; afterwards each of its parts is in the mode that it was in."""
    modes = {part: part.training for part in model.modules()} if isinstance(model, nn.Module) else {}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
