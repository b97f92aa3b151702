"""The noise schedule of a diffusion model: timestep to signal and noise level, and the fixed noise."""

import math
from typing import Any

import torch
from torch import Tensor

from .checks import NUM_TIMESTEPS, check_timestep, is_finite_number, short
from .layouts import hint_of, plain, record_of

# The schedulers of diffusers that add noise as DDPM does; they differ only in how they sample.
DDPM_LIKE = (
    *("DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
)
# Schedulers for flow matching only. Some of the above also support it, by a setting.
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# What makes a flow-matching scheduler visit other timesteps than those of one shift: an image's size, an end that is
# not 0, sigmas spaced in another way.
_OWN_SPACING = (
    *("use_dynamic_shifting", "shift_terminal"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
# alpha is 0 at the last timestep of zero-terminal-SNR schedules; sigma at the first one of
# flow matching: this keeps the log-SNR finite, hence valid in JSON.
MIN_POWER = 1e-20
# A grid of timesteps goes no further: beyond, noise is finer than the steps of 8-bit images, or hides all of them.
# DDPM's linear schedule runs from 9.2 to -10.1.
MAX_LOG_SNR = 10.2
_OTHER_LENGTH = "Pass the scheduler with 1000 timesteps that the transformer was trained with as `scheduler=`."


class NoiseSchedule:
    """How much signal and how much noise a timestep stands for: noised = alpha(t)·latents + sigma(t)·noise.

    Args:
        alphas: Factor of the signal at each timestep, (1000,), falling, in [0, 1].
        sigmas: Factor of the noise at each timestep, (1000,), rising, in [0, 1].
        sampled: Timesteps that a sampler of 1000 steps visits, (1000,), falling; None where that is not known.
        num_trained: The transformer was trained on this many timesteps, the lowest ones.

    Raises:
        ValueError: If there are not 1000 timesteps, or the factors do not fall and rise within [0, 1].

    Example:
        >>> from hf_aselect import NoiseSchedule
        >>> schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", "beta_schedule": "linear"})
        >>> schedule.timestep_at(0.0)  # where signal and noise are equal
        258
    """

    def __init__(
        self, alphas: Tensor, sigmas: Tensor, sampled: Tensor | None = None, num_trained: int = NUM_TIMESTEPS
    ) -> None:
        self.sampled = sampled
        self.num_trained = num_trained
        self.alphas, self.sigmas = (values.to("cpu", torch.float64) for values in (alphas, sigmas))
        for name, falling in (("alphas", self.alphas), ("sigmas", self.sigmas.flip(0))):
            if falling.shape != (NUM_TIMESTEPS,):
                raise ValueError(f"`{name}` must have {NUM_TIMESTEPS} timesteps, got shape {tuple(falling.shape)}.")
            if not (bool((falling.diff() <= 0).all()) and float(falling[-1]) >= 0 and float(falling[0]) <= 1):
                way = "fall" if name == "alphas" else "rise"
                raise ValueError(f"`{name}` must {way} with the timestep and stay in [0, 1].")
        self._factors = list(zip(self.alphas.float().tolist(), self.sigmas.float().tolist(), strict=True))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> "NoiseSchedule":
        """Build the schedule of a model whose signal and noise have powers that add up to 1, as DDPM's.

        Args:
            alphas_cumprod: Share of signal power after each timestep, (1000,), falling, in [0, 1].

        Raises:
            ValueError: If there are not 1000 timesteps, or the shares do not fall within [0, 1].
        """
        shares = alphas_cumprod.to("cpu", torch.float64)
        descending = torch.arange(NUM_TIMESTEPS - 1, -1, -1, dtype=torch.float64, device="cpu")
        return cls(shares.sqrt(), (1 - shares).sqrt(), descending)

    @classmethod
    def flow_matching(cls, shift: float | None = 1.0) -> "NoiseSchedule":
        """Build the schedule of flow matching along straight lines: sigma = t / 1000, alpha = 1 - sigma.

        Args:
            shift: Moves the timesteps that sampling and training visit toward noise, and so what an index means; not
                what a timestep stands for. None where it depends on the image's size (FLUX).

        Raises:
            ValueError: If `shift` is not above 0, or beyond all measure.

        Source: diffusers, `schedulers/scheduling_flow_match_euler_discrete.py`: the transformer is given 1000·sigma.
        """
        sigmas = torch.arange(NUM_TIMESTEPS, dtype=torch.float64, device="cpu") / NUM_TIMESTEPS
        if shift is None:
            return cls(1 - sigmas, sigmas)
        if not 1e-6 <= shift <= 1e6:  # far beyond what moves all timesteps to one end
            raise ValueError(f"`shift` of a flow-matching scheduler must be in [1e-6, 1e6], got {shift}.")
        # diffusers' `set_timesteps(1000)` spaces evenly down to a least sigma that is shifted already, and shifts all.
        least = float(_shifted(torch.tensor(1 / NUM_TIMESTEPS, dtype=torch.float64, device="cpu"), shift))
        even = torch.linspace(1, least, NUM_TIMESTEPS, dtype=torch.float64, device="cpu")
        return cls(1 - sigmas, sigmas, NUM_TIMESTEPS * _shifted(even, shift))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """Build the schedule from the configuration of a diffusers scheduler: DDPM's or flow matching's.

        Args:
            config: diffusers' configuration with `_class_name`; missing values take `DDPMScheduler`'s defaults.

        Raises:
            ValueError: If the scheduler is none of those, has other than 1000 timesteps or inverted sigmas, or its
                betas are of an unknown kind.

        Source: diffusers, `schedulers/scheduling_ddpm.py`; computed in float64, diffusers' own in float32.
        """
        config = record_of(config)
        if not isinstance(config, dict):
            raise ValueError(f"The scheduler's configuration must be a dictionary, got {type(config).__name__}.")
        name = config.get("_class_name")
        for field in ("shift", "beta_start", "beta_end", "boundary_ratio"):
            if not is_finite_number(config.get(field, 1.0)):
                raise ValueError(f"`{field}` of the scheduler must be a finite number, got {short(config[field])}.")
        if (trained := config.get("trained_betas")) is not None:
            if not isinstance(trained, list | tuple):
                raise ValueError(f"`trained_betas` of the scheduler must be a list, got {trained!r}.")
            if len(trained) != NUM_TIMESTEPS or not all(map(is_finite_number, trained)):
                wanted = f"`trained_betas` of the scheduler must be a list of {NUM_TIMESTEPS} finite numbers."
                raise ValueError(f"{wanted} {_OTHER_LENGTH}")
        if name not in DDPM_LIKE + FLOW_MATCHING:
            supported = ", ".join(DDPM_LIKE + FLOW_MATCHING)
            raise ValueError(f"Unsupported scheduler {name!r}; supported are {supported}.{hint_of(name)}")
        if (num_timesteps := config.get("num_train_timesteps", NUM_TIMESTEPS)) != NUM_TIMESTEPS:
            wanted = f"`num_train_timesteps` of the scheduler must be {NUM_TIMESTEPS}, got {short(num_timesteps)}."
            raise ValueError(f"{wanted} {_OTHER_LENGTH}")
        if config.get("invert_sigmas"):
            raise ValueError(
                "`invert_sigmas=True` of the scheduler reverses the direction of time, which is not supported. If "
                "the transformer was not trained that way, pass `scheduler=` without it."
            )
        if is_flow_matching(config):
            # FLUX's shift depends on the image's size, and how many-step solvers space their sigmas is their own. What
            # a timestep stands for is the same for all of them: sigma = t / 1000.
            is_plain = name in FLOW_MATCHING and not any(config.get(field) for field in _OWN_SPACING)
            schedule = cls.flow_matching(float(config.get("shift", 1.0)) if is_plain else None)
            schedule.num_trained = count_trained(config)
            return schedule
        # On the CPU by name: a model is built on the meta device to be loaded.
        with torch.device("cpu"):
            betas = _betas(config)
            # Some are so small that nothing is taken from the signal: no noise at any timestep.
            if not bool(((betas >= 0) & (betas <= 1)).all()) or not bool((1 - betas < 1).any()):
                raise ValueError(
                    "The betas of the scheduler (the noise that each timestep adds) must be in [0, 1] and not all 0, "
                    f"got values from {float(betas.min()):g} to {float(betas.max()):g}."
                )
            alphas_cumprod = (1 - betas).cumprod(0)
            if config.get("rescale_betas_zero_snr"):
                alphas_cumprod = _rescale_to_zero_terminal_snr(alphas_cumprod)
            return cls.from_alphas_cumprod(alphas_cumprod)

    @property
    def alphas_cumprod(self) -> Tensor:
        """Signal power at each timestep, (1000,)."""
        return self.alphas.square()

    def alpha(self, timesteps: Tensor | int) -> Tensor:
        """Return the signal's factor at integer timesteps in [0, 1000), same shape, float64, on the CPU.

        Raises:
            ValueError: If a timestep is not an integer or outside [0, 1000).
        """
        return self.alphas[_checked_timesteps(timesteps)]

    def sigma(self, timesteps: Tensor | int) -> Tensor:
        """Return the noise's factor at integer timesteps in [0, 1000), same shape, float64, on the CPU.

        Raises:
            ValueError: If a timestep is not an integer or outside [0, 1000).
        """
        return self.sigmas[_checked_timesteps(timesteps)]

    def log_snr(self, timesteps: Tensor | int) -> Tensor:
        """Return 2·ln(alpha / sigma) at integer timesteps in [0, 1000), same shape, float64, on the CPU.

        It falls with t.

        Raises:
            ValueError: If a timestep is not an integer or outside [0, 1000).
        """
        given = _checked_timesteps(timesteps)
        signal, noise = (factor[given].square().clamp_min(MIN_POWER).log() for factor in (self.alphas, self.sigmas))
        return signal - noise

    def timestep_at_index(self, index: int) -> int:
        """Return the integer timestep nearest to the one that a sampler of 1000 steps visits at an index.

        The A-SelecT authors' code names timesteps so, and their paper by 1000 - index: index 950 of Stable Diffusion 3
        is the paper's t = 50, and the timestep 141 that the transformer is conditioned on (sigma 0.141, log-SNR 3.6).

        Args:
            index: From 0, the first step from pure noise, to 999.

        Raises:
            ValueError: If there is no such index, or a sampler's timesteps depend on more than is known here.
        """
        index = plain(index)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < NUM_TIMESTEPS:
            raise ValueError(f"`index` must be an integer in [0, {NUM_TIMESTEPS}), got {index!r}.")
        nearest = int(self._known_sampled()[index].round())
        return min(nearest, NUM_TIMESTEPS - 1)  # flow matching begins at 1000, which is noise alone

    def index_at(self, timestep: int) -> int:
        """Return the index at which a sampler of 1000 steps comes nearest to a timestep; see `timestep_at_index`.

        Raises:
            ValueError: If `timestep` is not in [0, 1000), or a sampler's timesteps depend on more than is known
                here.
        """
        if _checked_timesteps(timestep).numel() != 1:
            raise ValueError(f"`timestep` must be one integer in [0, {NUM_TIMESTEPS}), got {timestep!r}.")
        return int((self._known_sampled() - timestep).abs().argmin())

    def timestep_of_paper(self, paper_timestep: int) -> int:
        """Return the timestep that the A-SelecT paper calls `paper_timestep`, in [1, 1000]; see `timestep_at_index`.

        Raises:
            ValueError: If it is out of range, or a sampler's timesteps depend on more than is known here.
        """
        return self.timestep_at_index(NUM_TIMESTEPS - paper_timestep)

    def _known_sampled(self) -> Tensor:
        if self.sampled is None:
            raise ValueError(
                "The timesteps of this scheduler depend on the image size or the solver, so an index does not "
                "identify a noise level. Use `timestep_at(log_snr)` or `timestep_at_sigma(sigma)`."
            )
        return self.sampled

    def timestep_at_sigma(self, sigma: float) -> int:
        """Return the integer timestep in [0, 1000) whose factor of the noise is nearest to `sigma`.

        Raises:
            ValueError: If `sigma` is outside [0, 1].
        """
        if not 0 <= sigma <= 1:
            raise ValueError(f"`sigma` must be in [0, 1], got {sigma}.")
        return int((self.sigmas - sigma).abs().argmin())

    def timestep_at(self, log_snr: float) -> int:
        """Return the integer timestep in [0, 1000) whose log-SNR is nearest to `log_snr`.

        Raises:
            ValueError: If `log_snr` is not a number.
        """
        if math.isnan(log_snr):
            raise ValueError("`log_snr` must be a number, got nan.")
        every = self.log_snr(torch.arange(NUM_TIMESTEPS))
        return int((every - log_snr).abs().argmin())

    def even_timesteps(self, num: int = 20) -> list[int]:
        """Return up to `num` timesteps from least to most noise, evenly spaced in log-SNR.

        Where little happens between timesteps, few of them are spent. None is such that the transformer was not
        trained on it.

        Args:
            num: Timesteps wanted, at least 1; where two would be the same there is one.

        Raises:
            ValueError: If `num` is not an integer >= 1.
        """
        num = plain(num)
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise ValueError(f"`num` must be a positive integer, got {num!r}.")
        first, last = self.log_snr(torch.tensor([0, self.num_trained - 1])).tolist()
        # Neither pure noise nor an untouched image has a finite log-SNR.
        levels = torch.linspace(min(first, MAX_LOG_SNR), max(last, -MAX_LOG_SNR), num)
        return sorted({self.timestep_at(level) for level in levels.tolist()})

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Mix latents with noise.

        Args:
            latents: Clean latents, (B, C, h, w).
            noise: Standard normal noise that broadcasts to `latents`.
            timesteps: Integer timesteps in [0, 1000), (B,), or one for all.

        Returns:
            Noised latents, (B, C, h, w), computed in float32 and returned in the dtype of `latents`.

        Raises:
            ValueError: If a timestep is not an integer or outside [0, 1000), or there are not as many as latents.
        """
        if not isinstance(timesteps, Tensor):
            check_timestep(timesteps)
            # Plain numbers: nothing is copied to an accelerator, and a compiled graph has constants here.
            alpha, sigma = self._factors[timesteps]
            noised: Tensor = alpha * latents.float() + sigma * noise.to(latents.device).float()
            return noised.to(latents.dtype)
        if timesteps.numel() not in (1, len(latents)):
            raise ValueError(
                f"`timesteps` must have one value, or one for each of {len(latents)} latents, got {timesteps.numel()}."
            )
        alpha = self.alpha(timesteps).float().to(latents.device).view(-1, 1, 1, 1)
        sigma = self.sigma(timesteps).float().to(latents.device).view(-1, 1, 1, 1)
        return (alpha * latents.float() + sigma * noise.to(latents.device).float()).to(latents.dtype)


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Return sigmas moved toward noise. Source: diffusers' flow-matching schedulers."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def count_trained(config: dict[str, Any]) -> int:
    """Return the number of timesteps, counted from 0, that the transformer of a scheduler was trained on.

    It is below 1000 for one of Wan 2.2's two transformers, which was trained at low noise only.
    """
    share = config.get("boundary_ratio", 1)
    return max(1, min(NUM_TIMESTEPS, int(NUM_TIMESTEPS * share))) if is_finite_number(share) else NUM_TIMESTEPS


def is_flow_matching(config: dict[str, Any]) -> bool:
    """Return whether the configuration of a diffusers scheduler is that of a flow-matching model."""
    return bool(
        config.get("_class_name") in FLOW_MATCHING
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )


def _checked_timesteps(timesteps: Tensor | int) -> Tensor:
    """Return timesteps as indices on the CPU: float64 stays there, as not every accelerator has it."""
    given = torch.as_tensor(timesteps).cpu()
    if given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"Timesteps must be integers in [0, {NUM_TIMESTEPS}), got values of {given.dtype}.")
    given = given.long()
    if given.numel() and not (int(given.min()) >= 0 and int(given.max()) < NUM_TIMESTEPS):
        raise ValueError(
            f"Timesteps must be integers in [0, {NUM_TIMESTEPS}), got values from {int(given.min())} to "
            f"{int(given.max())}."
        )
    return given


def kept_noise(shape: tuple[int, ...], seed: int, draw: int = 0) -> Tensor:
    """Return `fixed_noise`, made once for all models: no model holds it, so none is another one once it was called."""
    key = shape, seed, draw
    if key not in _KEPT_NOISE:
        if len(_KEPT_NOISE) >= _MAX_KEPT_NOISE:
            _KEPT_NOISE.clear()
        _KEPT_NOISE[key] = fixed_noise(*key)
    return _KEPT_NOISE[key]


_MAX_KEPT_NOISE = 64  # tensors: images may be of many sizes
_KEPT_NOISE: dict[tuple[tuple[int, ...], int, int], Tensor] = {}


# A graph has no generator, and older versions of dynamo warn that they cannot trace one.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def fixed_noise(shape: tuple[int, ...], seed: int, draw: int = 0) -> Tensor:
    """Return the `draw`-th standard normal tensor of a seed, float32, made on the CPU: the same on every device.

    Draws are made one after the other, as torch keeps only 32 bits of a seed and two seeds could meet.
    """
    generator = torch.Generator().manual_seed(seed)
    # On the CPU by name: a model is built on the meta device to be loaded.
    for _ in range(draw):
        torch.randn(shape, generator=generator, device="cpu")
    return torch.randn(shape, generator=generator, device="cpu")


def _betas(config: dict[str, Any]) -> Tensor:
    """Return the noise variance added by each timestep, (1000,), float64."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, NUM_TIMESTEPS, dtype=torch.float64)
    if kind == "scaled_linear":
        if min(start, end) < 0:
            raise ValueError(f"`beta_start` and `beta_end` of the scheduler must be >= 0, got {start} and {end}.")
        return torch.linspace(start**0.5, end**0.5, NUM_TIMESTEPS, dtype=torch.float64).square()
    if kind == "sigmoid":
        sigmoid = torch.linspace(-6, 6, NUM_TIMESTEPS, dtype=torch.float64).sigmoid()
        return start + (end - start) * sigmoid
    if kind == "squaredcos_cap_v2":
        edges = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
        shares = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - shares[1:] / shares[:-1]).clamp_max(0.999)
    raise ValueError(
        f"Unsupported `beta_schedule` {kind!r}; supported are linear, scaled_linear, sigmoid and squaredcos_cap_v2."
    )


def _rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch the signal's factor so that the last timestep is pure noise (arXiv 2305.08891)."""
    factors = alphas_cumprod.sqrt()
    stretch = factors[0] / (factors[0] - factors[-1])
    rescaled: Tensor = torch.square((factors - factors[-1]) * stretch)
    return rescaled
