"""Choosing the timestep: a label-free criterion over a grid of timesteps, and the record of the choice."""

import logging
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from .configuration_aselect import ASelectConfig, check_timestep
from .image_processing_aselect import ASelectImageProcessor
from .noise_schedule import NoiseSchedule
from .plots import plot_timestep_curve
from .spectrum import band_powers, noisy_power, signal_power, token_spectrum

logger = logging.getLogger(__name__)

DEFAULT_GRID_SIZE = 20
MIN_LOG_SNR = -14.0
NUM_RESAMPLES = 1000


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

    def read_tokens(self, noised_latents: Tensor, timesteps: Tensor, block: int, feature: str) -> Tensor:
        """Return tokens, (B, N, D), of noised latents, (B, C, h, w)."""
        ...

    def token_grid(self, latents: Tensor) -> tuple[int, int]:
        """Return rows and columns of the token grid of latents, (B, C, h, w)."""
        ...


class Criterion(NamedTuple):
    """A score for each timestep, the largest wins, from the band powers of a set of pictures.

    Args:
        num_draws: Noise draws it needs of each picture.
        score: Function of band powers, (..., n, 4) for n pictures, to scores, (...). The four are the high-band and
            whole power of the signal (zero with one draw) and of the noisy features.
    """

    num_draws: int
    score: Callable[[Tensor], Tensor]


def _score_hfr(powers: Tensor) -> Tensor:
    return (powers[..., 2] / powers[..., 3]).mean(-1)


def _score_signal_hfr(powers: Tensor) -> Tensor:
    high, whole, _, noisy = powers.sum(-2).unbind(-1)
    # Where the draws agree on less than a quarter of the power, the ratio is one of two small numbers and can be
    # anything, or even without bound: there it fades to 0.
    return high / torch.maximum(whole, noisy / 4)


CRITERIA = {"hfr": Criterion(1, _score_hfr), "signal_hfr": Criterion(2, _score_signal_hfr)}


@dataclass(frozen=True)
class TimestepSelection:
    """Which timestep was chosen, from what, and how sure the choice is.

    Args:
        timestep: The chosen timestep, an integer in [0, 1000), 0 = least noise.
        timesteps: The grid that was searched, rising.
        scores: The criterion at each of them; the largest was chosen.
        intervals: 95 % bootstrap interval (over pictures) of each score.
        log_snr: 2·ln(alpha / sigma) at each of them.
        confidence: Share of bootstrap resamples of the pictures that choose this timestep or a neighbour of it in the
            grid, in [0, 1].
        criterion: "hfr" or "signal_hfr".
        block: Block at which features were read, counted from the first.
        feature: Feature that was read there.
        num_images: Pictures that were looked at.
        num_forwards: Passes of a picture through the backbone up to the block.
        seconds: Time it took.
        seed: Seed of the noise, of the drawn pictures and of the bootstrap.
    """

    timestep: int
    timesteps: list[int]
    scores: list[float]
    intervals: list[list[float]]
    log_snr: list[float]
    confidence: float
    criterion: str
    block: int
    feature: str
    num_images: int
    num_forwards: int
    seconds: float
    seed: int

    def is_of(self, config: ASelectConfig) -> bool:
        """Return whether this is how the timestep of a configuration was chosen, at its tap."""
        return (self.timestep, self.block, self.feature) == (config.timestep, config.block_index(), config.feature)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain numbers, strings and lists, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TimestepSelection":
        """Return the record that `to_dict` wrote.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        fields = set(cls.__dataclass_fields__)
        if record.keys() != fields:
            raise ValueError(
                f"Not a record of a selection: missing {sorted(fields - record.keys())}, "
                f"unknown {sorted(record.keys() - fields)}."
            )
        return cls(**record)

    def plot(self, path: str | os.PathLike[str], accuracies: Sequence[float] | None = None) -> None:
        """Draw the criterion over the timestep, with intervals and the choice, as a PNG.

        Args:
            path: File to write.
            accuracies: Accuracy of a probe at each timestep, in [0, 1], to be drawn beside the criterion.
        """
        plot_timestep_curve(
            path,
            self.timesteps,
            self.scores,
            self.log_snr,
            self.timestep,
            intervals=self.intervals,
            criterion=self.criterion,
            accuracies=accuracies,
        )


def select_timestep(
    model: ReadableModel,
    images: Any,  # noqa: ANN401 - whatever the docstring lists
    *,
    criterion: str = "signal_hfr",
    timesteps: Sequence[int] | None = None,
    max_images: int = 256,
    batch_size: int = 32,
    seed: int = 0,
) -> TimestepSelection:
    """Choose the timestep whose features at the model's tap score best, without labels or training.

    Nothing in the model changes; set `model.config.timestep` to the result to use it.

    Args:
        model: Model with the tap (`config.block`, `config.feature`) to choose a timestep for.
        images: PIL pictures or arrays; a `datasets` dataset with an image column; or pixel values, (B, C, H, W), in
            [-1, 1].
        criterion: "signal_hfr" (share of high frequencies in what two noise draws agree on) or "hfr" (the paper's, of
            one noise draw, as reconstructed in `spectrum.hfr`).
        timesteps: Grid to search, integers in [0, 1000). Default: about 20, evenly spaced in log-SNR.
        max_images: Look at so many pictures at the most; a larger set is sampled.
        batch_size: Pictures in one forward pass; does not change the result beyond rounding.
        seed: Seed of the noise, of the sampled pictures and of the bootstrap.

    Returns:
        The choice with its curve; ties go to the smaller timestep.

    Raises:
        ValueError: If there are no pictures, they do not fit the model, a timestep is outside [0, 1000), `criterion`
            is unknown, or a number is not positive.

    Source: A-SelecT, arXiv 2603.25758, for "hfr". "signal_hfr" is ours: noise has high frequencies of its own, so the
    paper's criterion can rise toward pure noise.
    """
    started = time.monotonic()
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    if max_images < 1 or batch_size < 1:
        raise ValueError(f"`max_images` and `batch_size` must be at least 1, got {max_images} and {batch_size}.")
    schedule = model.noise_schedule
    grid = default_timesteps(schedule) if timesteps is None else _checked_grid(timesteps)
    batches = _pixel_batches(images, model.config, max_images, batch_size, seed)
    powers = _measure(model, batches, grid, CRITERIA[criterion].num_draws, seed)  # (T, n, 4)
    scores = CRITERIA[criterion].score(powers)
    if not bool(scores.isfinite().all()):
        raise ValueError(
            "The criterion is not finite at every timestep: the model's features are NaN, infinite or all zero. "
            "Check its weights and the pictures."
        )
    best = int(scores.argmax())
    resampled = _bootstrap(powers, CRITERIA[criterion].score, seed)  # (resamples, T)
    near = (resampled.argmax(1) - best).abs() <= 1
    intervals = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype), dim=0).T
    selection = TimestepSelection(
        timestep=grid[best],
        timesteps=grid,
        scores=scores.tolist(),
        intervals=intervals.tolist(),
        log_snr=schedule.log_snr(torch.tensor(grid)).tolist(),
        confidence=float(near.double().mean()),
        criterion=criterion,
        block=model.config.block_index(),
        feature=model.config.feature,
        num_images=powers.shape[1],
        num_forwards=len(grid) * powers.shape[1] * CRITERIA[criterion].num_draws,
        seconds=round(time.monotonic() - started, 3),
        seed=seed,
    )
    logger.info(
        "Chose timestep %d (log-SNR %.2f, confidence %.2f) of %d by %s from %d pictures, %s of block %d, in %.1f s.",
        selection.timestep,
        selection.log_snr[best],
        selection.confidence,
        len(grid),
        criterion,
        selection.num_images,
        selection.feature,
        selection.block,
        selection.seconds,
    )
    return selection


def default_timesteps(schedule: NoiseSchedule, size: int = DEFAULT_GRID_SIZE) -> list[int]:
    """Return up to `size` timesteps from 0 to 999, evenly spaced in log-SNR: where little happens, few are spent."""
    first, last = schedule.log_snr(torch.tensor([0, len(schedule.alphas_cumprod) - 1])).tolist()
    # A last timestep of pure noise has no finite log-SNR; what is below this holds a millionth of the picture's power.
    last = max(last, MIN_LOG_SNR)
    return sorted({schedule.timestep_at(level) for level in torch.linspace(first, last, size).tolist()})


def _checked_grid(timesteps: Sequence[int]) -> list[int]:
    if not len(timesteps):
        raise ValueError("`timesteps` must name at least one timestep, got none.")
    for timestep in timesteps:
        if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):
            check_timestep(timestep)
    grid = sorted({operator.index(timestep) for timestep in timesteps})  # of numpy and torch, too
    for timestep in (grid[0], grid[-1]):
        check_timestep(timestep)
    return grid


def _measure(model: ReadableModel, batches: Iterator[Tensor], grid: list[int], num_draws: int, seed: int) -> Tensor:
    """Return the band powers of each picture at each timestep, (T, n, 4), float64; tokens are not kept."""
    generator = torch.Generator().manual_seed(seed)
    block, feature = model.config.block_index(), model.config.feature
    measured = []
    with _EvalMode(model), torch.no_grad():
        for pixel_values in batches:
            latents = model.encode(pixel_values)
            rows, columns = model.token_grid(latents)
            # Each picture has noise of its own: what two draws have in common must vanish in the mean over pictures.
            # The timesteps share it, so that they differ by the timestep alone.
            noise = torch.stack(
                [torch.randn((num_draws, *latents.shape[1:]), generator=generator) for _ in latents], dim=1
            )
            by_timestep = []
            for timestep in grid:
                timesteps = torch.full((len(latents),), timestep, device=latents.device)
                spectra = []
                for draw in noise:
                    noised = model.noise_schedule.add_noise(latents, draw, timesteps)
                    tokens = model.read_tokens(noised, timesteps, block, feature)
                    spectra.append(token_spectrum(tokens, rows, columns))
                by_timestep.append(_picture_powers(torch.stack(spectra)))
            measured.append(torch.stack(by_timestep))
    if not measured:
        raise ValueError("No pictures to choose a timestep from: the set is empty.")
    return torch.cat(measured, dim=1)


def _picture_powers(spectra: Tensor, cutoff: float = 0.15) -> Tensor:
    """Return the signal's and the noisy high-band and whole power of each picture, (B, 4), of (K, B, D, h, w)."""
    # On the CPU: not every accelerator has float64.
    noisy = band_powers(noisy_power(spectra).cpu().double(), cutoff)
    signal = band_powers(signal_power(spectra).cpu().double(), cutoff) if len(spectra) > 1 else torch.zeros_like(noisy)
    return torch.cat([signal, noisy], dim=-1)


def _bootstrap(powers: Tensor, score: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """Return the scores of resamples of the pictures with replacement, (resamples, T)."""
    generator = torch.Generator().manual_seed(seed)
    num_images = powers.shape[1]
    picks = torch.randint(num_images, (NUM_RESAMPLES, num_images), generator=generator)
    return torch.stack([score(powers[:, pick]) for pick in picks])


class _EvalMode:
    """Puts a model in eval mode for a while; afterwards each module is in the mode it was in."""

    def __init__(self, model: ReadableModel) -> None:
        self.modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}

    def __enter__(self) -> None:
        for module in self.modes:
            module.training = False

    def __exit__(self, *exception: object) -> None:
        for module, training in self.modes.items():
            module.training = training


def _pixel_batches(
    images: Any,  # noqa: ANN401 - as in `select_timestep`
    config: ASelectConfig,
    max_images: int,
    batch_size: int,
    seed: int,
) -> Iterator[Tensor]:
    """Yield pixel values, (B, C, H, W), of at most `max_images` of the pictures."""
    if isinstance(images, Tensor):
        _check_pixel_values(images)
    processor = ASelectImageProcessor.from_model_config(config)
    chosen = iter(_sample(images, max_images, seed))
    while batch := list(islice(chosen, batch_size)):
        if isinstance(batch[0], Tensor) and isinstance(images, Tensor):
            yield torch.stack(batch)
        else:
            yield processor([_picture_of(row) for row in batch], return_tensors="pt").pixel_values


def _check_pixel_values(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"Pixel values must have shape (B, C, H, W), got {tuple(images.shape)}.")
    # Rounding in half precision may pass 1 by a little.
    if images.numel() and float(images.abs().max()) > 1.01:
        low, high = float(images.min()), float(images.max())
        raise ValueError(
            f"Pixel values must be in [-1, 1], got [{low:g}, {high:g}]; give PIL pictures, or scale them."
        )


def _sample(images: Iterable[Any], max_images: int, seed: int) -> Iterable[Any]:
    """Return at most `max_images` of the pictures: a random sample, as sets are often sorted by class."""
    if isinstance(images, (str, bytes, Image.Image, dict)) or not isinstance(images, Iterable):
        raise ValueError(
            "Pictures must be a list of PIL pictures or arrays, a dataset with an image column, or a tensor of pixel "
            f"values, got {type(images).__name__}."
        )
    indexed: Any = images
    try:
        size = len(indexed)
    except TypeError:  # a stream has no length
        return islice(images, max_images)
    if size <= max_images:
        return images
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:max_images]
    return (indexed[int(index)] for index in order.sort().values)


def _picture_of(row: Any) -> Any:  # noqa: ANN401 - a row of a dataset or a picture
    """Return the picture of a dataset's row; a row that is a picture already as it is."""
    if not isinstance(row, dict):
        return row
    pictures = [name for name, value in row.items() if isinstance(value, Image.Image)]
    if "image" in row:
        return row["image"]
    if len(pictures) != 1:
        raise ValueError(
            f"Expected a dataset with a column `image` or exactly one column of PIL pictures, got columns {list(row)}."
        )
    return row[pictures[0]]
