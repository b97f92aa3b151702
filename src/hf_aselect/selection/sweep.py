"""Reading a model at many timesteps: what a criterion measures there, in rounds of pictures, shared by processes."""

import logging
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as host_logging

from ..model.configuration_aselect import ASelectConfig
from ..model.denoiser import grid_of, is_sharded, zero_channels
from ..model.layouts import MASSIVE_FEATURES, Tap
from ..model.noise_schedule import NoiseSchedule, fixed_noise
from .consensus import ConsensusSums, Key, leading_directions, unexplained
from .criteria import Consensus, Criterion, PatchProbe, Probe
from .curve import TimestepCurve, bootstrap
from .distribution import gather_objects, is_partitioned, process
from .generation import count_forwards
from .images import CalibrationPictures
from .massive_channels import massive_channels, outlier_share

logger = logging.getLogger(__name__)
# Pictures are summed in so many groups, and the bootstrap draws groups: sums are all it needs of the pictures.
NUM_GROUPS = 16
# Latents up to this size are kept, so that a picture is encoded once; beyond it they are encoded again.
MAX_KEPT_BYTES = 2**25
# Scale and weight of a consensus' reference features come from the first so many pictures.
NUM_CALIBRATION = 32
# Massive channels are the same in every picture, so a few pictures show them.
NUM_FOR_CHANNELS = 8
AUTO_FEATURES = ("hidden", "query", "key", "value")


class ReadableModel(Protocol):
    """What a selection needs of a model: `DiTModel` and the models on top of it have it."""

    config: ASelectConfig

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Timesteps to signal and noise levels."""
        ...

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return clean latents, (B, C, h, w), of pictures, (B, C, H, W)."""
        ...

    def _read_taps(self, noised_latents: Tensor, timesteps: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return tokens, (B, N, D), at each (block, feature), of noised latents, (B, C, h, w), from one pass."""
        ...


class Sweep:
    """What was measured so far, by timestep and group of pictures, and how to read more."""

    def __init__(
        self,
        model: ReadableModel,
        criterion: Criterion,
        taps: list[Tap],
        grid: list[int],
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.criterion, self.taps, self.grid = model, criterion, taps, grid
        self.batch_size, self.seed = batch_size, seed
        self.labels: list[int] | None = None
        self.masks: Any = None  # of a probe of patches, by picture
        self.patches: dict[int, Tensor] = {}  # the class of each patch, by picture
        self.pictures: Any = None
        self.shape = (0, 0)  # of the token grid
        self.generated = False
        # Weights that are sharded are gathered by all processes together: each then reads all pictures.
        self.rank, self.world = (0, 1) if is_sharded(model) or is_partitioned(model) else process()
        self.num_images = self.num_forwards = 0
        self.sums: dict[int, Tensor] = {}  # by timestep, (A, G, S)
        self.pooled: dict[int, list[tuple[list[int], list[Tensor]]]] = {}  # of the probe only: indices, (B, D) a tap
        self.consensus: ConsensusSums | None = None
        if isinstance(criterion, Consensus):
            self.consensus = ConsensusSums(NUM_GROUPS, criterion.num_targets, criterion.num_read)
        self.references = _reference_taps(model.config) if self.consensus else []
        self.channels = _given_channels(model.config, taps)  # set to zero, by tap
        self.searched: set[Tap] = set()
        # Of consensus and probe, which are not sums of what was measured: by timestep and number of pictures.
        self.fitted: dict[tuple[int, int], Tensor] = {}
        self.groups: set[int] = set()
        self.latents: dict[int, Tensor] = {}
        self.kept_bytes = 0
        self.bar: Any = None

    def warnings(self) -> list[str]:
        """Return what speaks against trusting any choice from these pictures."""
        if self.num_images >= self.criterion.min_images:
            return []
        remedy = "Give more pictures"
        if self.generated:
            remedy = "Give pictures, or raise `max_images`"
        elif self.labels is None:
            remedy += ", or none: the transformer then makes its own"
        needed = f"{self.criterion.name!r} needs {self.criterion.min_images} or more, however sure it seems"
        counted = f"{self.num_images} picture{'s' * (self.num_images > 1)}"
        return [f"it rests on {counted}, and {needed}. {remedy}."]

    def generate(self, num_images: int) -> Tensor:
        """Return latents that the model made itself, (n, C, h, w), and count what they cost."""
        model: Any = self.model
        logger.info(
            "No pictures to choose a timestep from are given: the transformer makes %d, in %d passes.",
            num_images,
            count_forwards(model, num_images),
        )
        latents: Tensor = model.generate_latents(num_images, batch_size=self.batch_size, seed=self.seed)
        latents = latents.to(model.device)
        self.generated = True
        # Every process makes all of them.
        self.num_forwards += self.world * count_forwards(model, num_images)
        self.latents = dict(enumerate(latents))
        return latents

    def run(self, pictures: CalibrationPictures, wanted: list[int], max_images: int, confidence: float) -> str:
        """Read pictures in rounds until the choice is sure; return why it ended."""
        self.pictures = pictures
        size = max_images if pictures.order is None else len(pictures.order)
        done, goal = 0, min(self.criterion.first_round, size)
        # Not `disable=False` in the first process: that would overrule TQDM_DISABLE.
        quiet = {"disable": True} if process()[0] else {}
        with host_logging.tqdm(desc="Choosing the timestep", unit="pass", leave=False, **quiet) as bar:
            self.bar = bar
            self._find_channels(pictures, wanted)
            if self.consensus:
                done = min(NUM_CALIBRATION, goal)
                self._calibrate(self.consensus, pictures, done, wanted)
            while True:
                before = self.num_images
                self._read(pictures, done, goal, wanted)
                if not self.num_images:
                    raise ValueError("No pictures to choose a timestep from: the set is empty.")
                while missing := self._unread_neighbours(wanted):
                    wanted = sorted({*wanted, *missing})
                    self._read(pictures, 0, goal, missing)
                if goal < size and self.num_images - before == goal - done:
                    if self.curve().confidence >= confidence:
                        return "confidence"
                    done, goal = goal, min(goal + -(-goal // 2), size)
                    continue
                sure = self.curve().confidence >= confidence
                return "confidence" if sure else "max_images" if self.num_images == max_images else "all pictures"

    def massive_channels(self, tap: Tap) -> list[int] | None:
        """Return the massive channels of a tap, found here or by an earlier choice; None where nobody looked."""
        if tap in self.searched:
            return self.channels[tap]
        config = self.model.config
        return config.channels_at(*tap) if isinstance(config.zeroed_channels, dict) else None

    def _find_channels(self, pictures: CalibrationPictures, timesteps: list[int]) -> None:
        """Find the massive channels of the taps that are asked for them, on the first pictures.

        Every process reads them all, so that all find the same.
        """
        taps = [tap for tap in self.taps if self.channels[tap] is None]
        self.searched = set(taps)
        if not taps:
            return
        shares: dict[Tap, dict[int, Tensor]] = {tap: {} for tap in taps}
        count = 0
        for indices, load in pictures.batches(0, NUM_FOR_CHANNELS, self.batch_size, 0, 1):
            latents = self._encode(indices, load)
            count += len(indices)
            for chosen, tokens in self._tokens(latents, indices, timesteps, taps):
                for tap in taps:
                    # The last batch may have fewer pictures: it counts for as many.
                    share = len(indices) * outlier_share(tokens[tap])
                    before = shares[tap].get(chosen)
                    shares[tap][chosen] = share if before is None else before + share
        for tap, by_timestep in shares.items():
            if by_timestep:
                found = massive_channels([share / count for share in by_timestep.values()])
                self.channels[tap] = self._gather(found)[0]
        draws = self.criterion.num_draws or self.model.config.num_noise_draws
        self.num_forwards += self.world * count * len(timesteps) * draws

    def _unread_neighbours(self, read: list[int]) -> list[int]:
        """Return the neighbours in the grid of the best timestep that were not read yet."""
        curve = self.curve()
        place = self.grid.index(curve.timesteps[curve.best[1]])
        return [t for t in self.grid[max(0, place - 1) : place + 2] if t not in read]

    def _read(self, pictures: CalibrationPictures, start: int, stop: int, timesteps: list[int]) -> None:
        """Add a part of the pictures to the sums at some timesteps."""
        first_time = start >= self.num_images
        count = 0
        for indices, load in pictures.batches(start, stop, self.batch_size, self.rank, self.world):
            latents = self._encode(indices, load)
            count += len(indices)
            self._read_batch(latents, indices, timesteps)
            self.groups.update(index % NUM_GROUPS for index in indices)
        counts = self._gather(count)
        draws = self.criterion.num_draws or self.model.config.num_noise_draws
        self.num_forwards += sum(counts) * len(timesteps) * draws
        if first_time:
            self.num_images += sum(counts)

    def _read_batch(self, latents: Tensor, indices: list[int], timesteps: list[int]) -> None:
        rows, columns = grid_of(latents, self.model.config.layout.patch_size)
        self.shape = rows, columns
        if self.consensus is None:
            for chosen, tokens in self._tokens(latents, indices, timesteps, self.taps):
                self._add(chosen, indices, [self.criterion.measure(tokens[tap], rows, columns) for tap in self.taps])
            return
        known = all(index in self.consensus.targets for index in indices)
        taps = self.taps if known else list(dict.fromkeys([*self.taps, *self.references]))
        pooled = {
            (chosen, *tap): self.criterion.measure(tokens[tap], rows, columns)
            for chosen, tokens in self._tokens(latents, indices, timesteps, taps)
            for tap in taps
        }
        self._add_pooled(self.consensus, indices, pooled, timesteps, known)

    def _add_pooled(
        self,
        consensus: ConsensusSums,
        indices: list[int],
        pooled: dict[Key, Tensor],
        timesteps: list[int],
        known: bool,
    ) -> None:
        """Add some pictures' statistics, (B, S, D), to a consensus; and their targets, unless these are known."""
        if not known:
            # Timesteps that were read later, next to the best, have no share in the targets.
            consensus.add_targets(indices, pooled)
        calibrated = sorted({timestep for timestep, _, _ in consensus.scales})
        for timestep in timesteps:
            near = min(calibrated, key=lambda known: abs(known - timestep))
            consensus.add(timestep, indices, pooled[(timestep, *self.taps[0])], (near, *self.taps[0]))

    def _calibrate(
        self, consensus: ConsensusSums, pictures: CalibrationPictures, stop: int, timesteps: list[int]
    ) -> None:
        """Take the scales of the reference features from the first pictures, and add these to the sums.

        Every process reads them all, so that all have the same scales, and adds its share.
        """
        pooled: dict[Key, list[Tensor]] = {}
        read: list[int] = []
        taps = list(dict.fromkeys([*self.references, *self.taps]))
        for indices, load in pictures.batches(0, stop, self.batch_size, 0, 1):
            latents = self._encode(indices, load)
            read += indices
            for chosen, tokens in self._tokens(latents, indices, timesteps, taps):
                for tap in taps:
                    pooled.setdefault((chosen, *tap), []).append(self.criterion.measure(tokens[tap], 0, 0))
        if not read:
            raise ValueError("No pictures to choose a timestep from: the set is empty.")
        together = {key: torch.cat(pooled.pop(key)) for key in list(pooled)}
        consensus.calibrate(together)
        consensus.scales = self._gather(consensus.scales)[0]
        own = pictures.share(0, stop, self.rank, self.world)
        if own := [index for index in own if index in read]:  # a stream may have ended
            places = [read.index(index) for index in own]
            mine = {key: values[places] for key, values in together.items()}
            self._add_pooled(consensus, own, mine, timesteps, known=False)
            self.groups.update(index % NUM_GROUPS for index in own)
        self.num_images = len(read)
        self.num_forwards += self.world * len(read) * len(timesteps) * self.model.config.num_noise_draws

    def _encode(self, indices: list[int], load: Any) -> Tensor:
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
        device = latents.device
        for at in range(0, len(timesteps), together):
            chosen = timesteps[at : at + together]
            where = torch.tensor(chosen).repeat_interleave(num_draws * size)
            repeated = latents.repeat(len(chosen) * num_draws, 1, 1, 1)
            drawn = noise.flatten(0, 1).repeat(len(chosen), 1, 1, 1)
            noised = self.model.noise_schedule.add_noise(repeated, drawn, where)
            parts = [
                self.model._read_taps(batch, steps.to(device), taps)
                for batch, steps in zip(noised.split(self.batch_size), where.split(self.batch_size), strict=True)
            ]
            read = {tap: torch.cat([part[tap] for part in parts]) for tap in taps}
            read = {tap: zero_channels(tokens, self.channels.get(tap) or ()) for tap, tokens in read.items()}
            for number, timestep in enumerate(chosen):
                here = slice(number * num_draws * size, (number + 1) * num_draws * size)
                yield timestep, {tap: tokens[here].unflatten(0, (num_draws, size)) for tap, tokens in read.items()}
            self.bar.update(len(where))

    def _noise(self, latents: Tensor, indices: list[int]) -> Tensor:
        """Return the noise of each draw and picture, (K, B, C, h, w); the timesteps share it.

        Each picture has noise of its own, a function of the seed and the picture: what two draws have in common must
        vanish in the mean over pictures. Only a criterion of the features as they are used later has the model's own.
        """
        shape = tuple(latents.shape[1:])
        config = self.model.config
        if not self.criterion.num_draws:
            draws = [fixed_noise(shape, config.noise_seed, draw) for draw in range(config.num_noise_draws)]
            return torch.stack(draws)[:, None].expand(-1, len(indices), *shape)
        drawn = [
            np.random.Generator(np.random.Philox(key=[self.seed, index])).standard_normal(
                (self.criterion.num_draws, *shape), dtype=np.float32
            )
            for index in indices
        ]
        return torch.from_numpy(np.stack(drawn, axis=1))

    def _add(self, timestep: int, indices: list[int], measured: list[Tensor]) -> None:
        if isinstance(self.criterion, Probe):
            self.pooled.setdefault(timestep, []).append((indices, measured))
            return
        values = torch.stack(measured)  # (A, B, S)
        if timestep not in self.sums:
            self.sums[timestep] = values.new_zeros(len(self.taps), NUM_GROUPS, values.shape[-1])
        self.sums[timestep].index_add_(1, torch.tensor(indices) % NUM_GROUPS, values)

    def _all_sums(self) -> dict[int, Tensor]:
        """Return the sums of all processes, added in the order of their ranks."""
        if isinstance(self.criterion, Probe):
            return self._sums_of_hits(self.criterion)
        if self.consensus:
            return self._sums_of_errors(self.consensus)
        total: dict[int, Tensor] = {}
        for part in self._gather(self.sums):
            for timestep, sums in part.items():
                total[timestep] = total[timestep] + sums if timestep in total else sums
        return total

    def _gather(self, value: Any) -> list[Any]:
        """Return the value of each process that has a share of the pictures."""
        return [value] if self.world == 1 else gather_objects(value)

    def _total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes that have a share of the pictures."""
        return torch.stack(self._gather(values)).sum(0)

    def _unfitted(self, by_timestep: dict[int, Any]) -> dict[int, Any]:
        """Return what was kept at the timesteps that have not been fitted to the pictures read so far."""
        return {t: kept for t, kept in by_timestep.items() if (t, self.num_images) not in self.fitted}

    def _fitted(self) -> dict[int, Tensor]:
        return {timestep: sums for (timestep, count), sums in self.fitted.items() if count == self.num_images}

    def _sums_of_hits(self, probe: Probe) -> dict[int, Tensor]:
        parts = self._gather(self._unfitted(self.pooled))
        self.shape = max(self._gather(self.shape))  # a process may have had no pictures
        for timestep in sorted({timestep for part in parts for timestep in part}):
            batches = [batch for part in parts for batch in part.get(timestep, [])]
            indices = torch.tensor([index for named, _ in batches for index in named])
            order = indices.argsort()
            labels = self._labels_of(probe, indices[order].tolist())
            # Taps may differ in width.
            pooled = [torch.cat([values[tap] for _, values in batches])[order] for tap in range(len(self.taps))]
            hits = torch.stack([probe.hits(each, labels) for each in pooled])  # (A, n, 2)
            sums = hits.new_zeros(len(self.taps), NUM_GROUPS, 2)
            self.fitted[timestep, self.num_images] = sums.index_add_(1, indices[order] % NUM_GROUPS, hits)
        return self._fitted()

    def _labels_of(self, probe: Probe, indices: list[int]) -> Tensor:
        """Return the class of some pictures, (n,); or of their patches, (n, S)."""
        if not isinstance(probe, PatchProbe):
            return torch.tensor(self.labels)[indices]
        for index in indices:
            if index not in self.patches:
                ignored = self.model.config.semantic_loss_ignore_index
                self.patches[index] = self.pictures.patch_labels(index, self.masks[index], *self.shape, ignored)
        places = probe.places(self.shape[0] * self.shape[1])
        return torch.stack([self.patches[index][places] for index in indices])

    def _sums_of_errors(self, consensus: ConsensusSums) -> dict[int, Tensor]:
        new = sorted(set().union(*self._gather(set(self._unfitted(consensus.features)))))
        if new:
            # Of one process: another machine may find them with other signs.
            directions = self._gather(leading_directions(self._total(consensus.target_moments())))[0]
            variance = self._total(consensus.variance(directions))
        for timestep in new:
            # One after the other: some megabytes each.
            own = consensus.products(timestep, directions) if timestep in consensus.features else None
            parts = [part for part in self._gather(own) if part is not None]
            left, right = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
            self.fitted[timestep, self.num_images] = unexplained(left, right, variance)[None]
        return self._fitted()

    def curve(self) -> TimestepCurve:
        """Return the scores at all timesteps read so far, with the bootstrap over groups of pictures."""
        by_timestep = self._all_sums()
        timesteps = sorted(by_timestep)
        groups = sorted(set().union(*self._gather(self.groups)))
        sums = torch.stack([by_timestep[t] for t in timesteps], dim=1)[:, :, groups]  # (A, T, G, S)
        log_snr = self.model.noise_schedule.log_snr(torch.tensor(timesteps))
        try:
            curve = bootstrap(timesteps, log_snr, sums, self.criterion.score, self.seed)
        except ValueError as error:
            why = "the model's features are NaN, infinite or all zero"
            why += ", or one picture is too few" if self.num_images < 2 else ""
            raise ValueError(f"{error}: {why}. Check its weights and the pictures.") from error
        # Of one process: where the last bits of two machines differ, one of them would go on reading alone.
        first: TimestepCurve = gather_objects(curve)[0]
        return first


def _given_channels(config: ASelectConfig, taps: list[Tap]) -> dict[Tap, list[int] | None]:
    """Return the channels to set to zero by tap; None where they have to be found."""
    given: dict[Tap, list[int] | None] = {}
    for tap in taps:
        known = config.channels_at(*tap)
        is_asked_for = config.zeroed_channels == "auto" or tap[1] in MASSIVE_FEATURES
        given[tap] = known if known is not None or is_asked_for else []
    return given


def _reference_taps(config: ASelectConfig) -> list[Tap]:
    """Return the taps whose agreement a consensus is: four features of three blocks, from 0 to 6/8 of the depth."""
    blocks = sorted({share * config.num_hidden_layers // 8 for share in (0, 3, 6)})
    return list(product(blocks, AUTO_FEATURES))
