"""Spectra of token grids: how much of the features' power lies in high spatial frequencies."""

import torch
from torch import Tensor


def radial_frequency(height: int, width: int) -> Tensor:
    """Return the radius of each frequency of a (height, width) FFT as a share of Nyquist, (h, w), in [0, sqrt(2)]."""
    vertical = torch.fft.fftfreq(height)[:, None] * 2
    horizontal = torch.fft.fftfreq(width)[None, :] * 2
    return torch.hypot(*torch.broadcast_tensors(vertical, horizontal))


def token_spectrum(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the 2-D Fourier transform of each channel of a token grid.

    Args:
        tokens: Tokens in row-major order, (B, N, D) with N = height·width; computed in float32.
        height: Rows of the token grid.
        width: Columns of the token grid.

    Returns:
        Spectrum, (B, D, h, w), complex64.

    Raises:
        ValueError: If `tokens` is not 3-D or N is not height·width.
    """
    if tokens.ndim != 3 or tokens.shape[1] != height * width:
        raise ValueError(
            f"`tokens` must have shape (B, {height * width}, D) for a {height}×{width} grid, "
            f"got {tuple(tokens.shape)}."
        )
    grid = tokens.float().transpose(1, 2).unflatten(2, (height, width))  # (B, D, h, w)
    spectrum: Tensor = torch.fft.fft2(grid)
    return spectrum


def band_powers(power: Tensor, cutoff: float, with_constant: bool = True) -> Tensor:
    """Sum power spectra over all frequencies and over those above a radius.

    Args:
        power: Power (or amplitude) at each frequency, (..., h, w).
        cutoff: Radius as a share of the Nyquist frequency, in [0, 1).
        with_constant: Whether the constant part (frequency 0) counts in the whole.

    Returns:
        High-band and whole power, (..., 2), in the dtype of `power`.

    Raises:
        ValueError: If `cutoff` is outside [0, 1).
    """
    if not 0 <= cutoff < 1:
        raise ValueError(f"`cutoff` must be in [0, 1), a share of the Nyquist frequency, got {cutoff}.")
    high_band = (radial_frequency(*power.shape[-2:]) > cutoff).to(power.device, power.dtype)
    whole = power.sum((-2, -1)) if with_constant else power.sum((-2, -1)) - power[..., 0, 0]
    return torch.stack([(power * high_band).sum((-2, -1)), whole], dim=-1)


def noisy_power(spectra: Tensor) -> Tensor:
    """Return the power of noisy features, mean over draws, summed over channels.

    Args:
        spectra: Spectra of K noise draws of each image, (K, B, D, h, w), complex.

    Returns:
        Power, (B, h, w), float32.
    """
    return spectra.abs().square().mean(0).sum(1)


def signal_power(spectra: Tensor) -> Tensor:
    """Return the power that K noise draws agree on, summed over channels: unbiased, so it may be negative.

    X = (|Σ_k F_k|² - Σ_k |F_k|²) / (K (K - 1)), the mean of the cross-spectra of all pairs of draws.

    Args:
        spectra: Spectra of K noise draws of each image, (K, B, D, h, w), complex.

    Returns:
        Power, (B, h, w), float32.

    Raises:
        ValueError: If K is below 2.
    """
    num_draws = len(spectra)
    if num_draws < 2:
        raise ValueError(f"The signal's power needs at least 2 noise draws, got {num_draws}.")
    agreed = spectra.sum(0).abs().square() - spectra.abs().square().sum(0)
    return agreed.sum(1) / (num_draws * (num_draws - 1))


def hfr(tokens: Tensor, height: int, width: int, cutoff: float = 0.15) -> Tensor:
    """Return the high-frequency ratio of token grids: the share of their power above a radius.

    Args:
        tokens: Tokens, (B, N, D) with N = height·width; computed in float32.
        height: Rows of the token grid.
        width: Columns of the token grid.
        cutoff: Radius as a share of the Nyquist frequency, in [0, 1).

    Returns:
        Ratios in [0, 1], (B,), float32: power is pooled over channels, not over images.

    Raises:
        ValueError: If the shapes do not fit or `cutoff` is outside [0, 1).

    Source: A-SelecT, arXiv 2603.25758. Its exact formula could not be read, so this is a reconstruction: power (not
    amplitude), the constant part included in the whole; the cut-off is the one in the authors' configuration.
    """
    high, whole = band_powers(noisy_power(token_spectrum(tokens, height, width)[None]), cutoff).unbind(-1)
    return high / whole


def signal_hfr(tokens: Tensor, height: int, width: int, cutoff: float = 0.15) -> Tensor:
    """Return the high-frequency ratio of what the noise draws of a set of images agree on.

    Args:
        tokens: Tokens of K noise draws of each of B images, (K, B, N, D), K at least 2.
        height: Rows of the token grid.
        width: Columns of the token grid.
        cutoff: Radius as a share of the Nyquist frequency, in [0, 1).

    Returns:
        One ratio, scalar, float32: powers are averaged over images before the ratio. Near [0, 1], but not bound to
        it, as both powers are unbiased estimates.

    Raises:
        ValueError: If the shapes do not fit, K is below 2 or `cutoff` is outside [0, 1).
    """
    spectra = torch.stack([token_spectrum(draw, height, width) for draw in tokens])
    high, whole = band_powers(signal_power(spectra), cutoff).sum(0).unbind(-1)
    return high / whole
