"""The noise schedule of a diffusion model: timestep to signal and noise level, and the fixed noise."""

import math
from typing import Any

import torch
from torch import Tensor

from .configuration_aselect import NUM_TIMESTEPS

# The schedulers of diffusers that add noise as DDPM does; they differ only in how they sample.
DDPM_LIKE = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# alpha is 0 at the last timestep of zero-terminal-SNR schedules; this keeps the log-SNR finite, hence valid in JSON.
MIN_SIGNAL_POWER = 1e-20
# A grid of timesteps goes no further: what is below holds a millionth of the picture's power.
MIN_LOG_SNR = -14.0


class NoiseSchedule:
    """How much signal and how much noise a timestep stands for: noised = alpha(t)·latents + sigma(t)·noise.

    Args:
        alphas_cumprod: Share of signal power after each timestep, (1000,), falling, in [0, 1].

    Raises:
        ValueError: If there are not 1000 timesteps, or the shares do not fall within [0, 1].
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        shares = alphas_cumprod.to("cpu", torch.float64)
        if shares.shape != (NUM_TIMESTEPS,):
            raise ValueError(f"A noise schedule has {NUM_TIMESTEPS} timesteps, got shape {tuple(shares.shape)}.")
        if not (bool((shares.diff() <= 0).all()) and float(shares[-1]) >= 0 and float(shares[0]) < 1):
            raise ValueError("`alphas_cumprod` must fall with the timestep and stay in [0, 1).")
        self.alphas_cumprod = shares

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """Build the schedule from the configuration of a diffusers scheduler that adds noise as DDPM does.

        Args:
            config: diffusers' configuration with `_class_name`; missing values take `DDPMScheduler`'s defaults.

        Raises:
            ValueError: If the scheduler is none of those or set to flow matching, has other than 1000 timesteps, or
                its betas are of an unknown kind.

        Source: diffusers, `schedulers/scheduling_ddpm.py`; computed in float64, diffusers' own in float32.
        """
        name = config.get("_class_name")
        if name not in DDPM_LIKE:
            raise ValueError(f"Unsupported scheduler {name!r}; supported are {', '.join(DDPM_LIKE)}.")
        if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"The configuration of {name} is that of a flow-matching model (`use_flow_sigmas` or "
                "`prediction_type` 'flow_prediction'), whose noise levels are not DDPM's; only DDPM's are supported."
            )
        num_timesteps = config.get("num_train_timesteps", NUM_TIMESTEPS)
        if num_timesteps != NUM_TIMESTEPS:
            raise ValueError(f"`num_train_timesteps` of the scheduler must be {NUM_TIMESTEPS}, got {num_timesteps}.")
        alphas_cumprod = (1 - _betas(config)).cumprod(0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _rescale_to_zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod)

    def alpha(self, timesteps: Tensor | int) -> Tensor:
        """Return the signal's factor at integer timesteps in [0, 1000), same shape, float64, on the CPU.

        Raises:
            ValueError: If a timestep is no integer or outside [0, 1000).
        """
        return self._shares(timesteps).sqrt()

    def sigma(self, timesteps: Tensor | int) -> Tensor:
        """Return the noise's factor at integer timesteps in [0, 1000), same shape, float64, on the CPU.

        Raises:
            ValueError: If a timestep is no integer or outside [0, 1000).
        """
        return (1 - self._shares(timesteps)).sqrt()

    def log_snr(self, timesteps: Tensor | int) -> Tensor:
        """Return 2·ln(alpha / sigma) at integer timesteps in [0, 1000), same shape, float64, on the CPU.

        It falls with t.

        Raises:
            ValueError: If a timestep is no integer or outside [0, 1000).
        """
        shares = self._shares(timesteps)
        return shares.clamp_min(MIN_SIGNAL_POWER).log() - (1 - shares).log()

    def _shares(self, timesteps: Tensor | int) -> Tensor:
        """Return the signal's share of power; float64 stays on the CPU, as not every accelerator has it."""
        given = torch.as_tensor(timesteps).cpu()
        if given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(f"Timesteps must be integers in [0, {NUM_TIMESTEPS}), got values of {given.dtype}.")
        given = given.long()
        if given.numel() and not (int(given.min()) >= 0 and int(given.max()) < NUM_TIMESTEPS):
            raise ValueError(
                f"Timesteps must be integers in [0, {NUM_TIMESTEPS}), got values from {int(given.min())} to "
                f"{int(given.max())}."
            )
        return self.alphas_cumprod[given]

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
        """Return up to `num` timesteps from 0 to 999, evenly spaced in log-SNR: where little happens, few are spent.

        Args:
            num: Timesteps wanted, at least 1; where two would be the same there is one.
        """
        first, last = self.log_snr(torch.tensor([0, NUM_TIMESTEPS - 1])).tolist()
        # A last timestep of pure noise has no finite log-SNR.
        last = max(last, MIN_LOG_SNR)
        return sorted({self.timestep_at(level) for level in torch.linspace(first, last, num).tolist()})

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix latents with noise.

        Args:
            latents: Clean latents, (B, C, h, w).
            noise: Standard normal noise that broadcasts to `latents`.
            timesteps: Integer timesteps in [0, 1000), (B,).

        Returns:
            Noised latents, (B, C, h, w), computed in float32 and returned in the dtype of `latents`.
        """
        alpha = self.alpha(timesteps).float().to(latents.device).view(-1, 1, 1, 1)
        sigma = self.sigma(timesteps).float().to(latents.device).view(-1, 1, 1, 1)
        return (alpha * latents.float() + sigma * noise.to(latents.device).float()).to(latents.dtype)


def fixed_noise(shape: tuple[int, ...], seed: int, draw: int = 0) -> Tensor:
    """Return the `draw`-th standard normal tensor of a seed, float32, made on the CPU: the same on every device.

    Draws are made one after the other, as torch keeps only 32 bits of a seed and two seeds could meet.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draw):
        torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _betas(config: dict[str, Any]) -> Tensor:
    """Return the noise variance added by each timestep, (1000,), float64."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, NUM_TIMESTEPS, dtype=torch.float64)
    if kind == "scaled_linear":
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
