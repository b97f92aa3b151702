import math

import pytest
import torch

from hf_aselect.selection.spectrum import hfr, radial_frequency, signal_hfr, signal_power, token_spectrum


def wave(frequency_rows, frequency_columns, size=8):
    """Tokens, (1, size², 1), of one cosine that has so many periods in the grid."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angle = 2 * math.pi * (frequency_rows * rows + frequency_columns * columns) / size
    return angle.cos().reshape(1, size * size, 1)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_constant_has_no_high_frequencies():
    assert float(hfr(torch.ones(1, 64, 3), 8, 8)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("frequency", "expected"), [(1, 0.0), (2, 1.0), (4, 1.0)])
def test_a_wave_is_above_or_below_the_cutoff(frequency, expected):
    """On an 8 × 8 grid Nyquist is 4 periods, so 1 period is 0.25 of it and 2 periods are 0.5."""
    assert float(hfr(wave(frequency, 0), 8, 8, cutoff=0.3)) == pytest.approx(expected, abs=1e-6)


def test_two_waves_share_their_power():
    tokens = wave(1, 0) + 2 * wave(0, 3)
    assert float(hfr(tokens, 8, 8, cutoff=0.3)) == pytest.approx(4 / 5, abs=1e-6)


def test_the_constant_part_counts_in_the_whole():
    """A cosine of amplitude 1 has half the power of a constant 1."""
    assert float(hfr(1 + wave(2, 0), 8, 8, cutoff=0.3)) == pytest.approx(1 / 3, abs=1e-6)


def test_white_noise_has_the_share_of_frequencies_above_the_cutoff():
    share = float((radial_frequency(8, 8) > 0.6).float().mean())
    assert float(hfr(noise(200, 64, 4), 8, 8, cutoff=0.6).mean()) == pytest.approx(share, abs=0.01)


def test_the_radius_is_a_share_of_nyquist():
    radius = radial_frequency(8, 4)
    assert radius.shape == (8, 4)
    assert radius[0, 0] == 0
    assert radius[4, 0] == radius[0, 2] == 1
    assert radius.max() == pytest.approx(math.sqrt(2))


def test_rows_and_columns_of_a_grid_are_told_apart():
    tokens = torch.arange(3.0).repeat_interleave(5).reshape(1, 15, 1)  # 3 rows, constant along the 5 columns
    spectrum = token_spectrum(tokens, 3, 5).abs()
    assert float(spectrum[0, 0, :, 1:].max()) == pytest.approx(0, abs=1e-5)
    assert float(spectrum[0, 0, 1:, 0].min()) > 1


def test_the_order_of_channels_and_the_scale_do_not_matter():
    tokens = noise(2, 64, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(hfr(1000 * tokens[:, :, order], 8, 8), hfr(tokens, 8, 8))
    draws = noise(2, 4, 64, 6, seed=1)
    torch.testing.assert_close(signal_hfr(1000 * draws[:, :, :, order], 8, 8), signal_hfr(draws, 8, 8))


def test_the_signal_power_of_pure_noise_is_zero_on_average():
    spectra = torch.fft.fft2(noise(2, 4000, 2, 4, 4))
    power = signal_power(spectra).double()
    standard_error = power.std(0) / math.sqrt(4000)
    assert bool((power.mean(0).abs() < 4 * standard_error).all())


@pytest.mark.parametrize("num_draws", [2, 3, 5])
def test_the_signal_power_is_unbiased(num_draws):
    """A fixed signal under fresh noise of ten times its power is measured right on average."""
    signal = noise(1, 1, 2, 4, 4, seed=7)
    draws = signal + math.sqrt(10) * noise(num_draws, 20_000, 2, 4, 4)
    power = signal_power(torch.fft.fft2(draws)).double()
    expected = torch.fft.fft2(signal[0, 0]).abs().square().sum(0).double()
    standard_error = power.std(0) / math.sqrt(20_000)
    assert bool(((power.mean(0) - expected).abs() < 4 * standard_error).all())


def test_the_signal_power_without_noise_is_the_power():
    spectrum = token_spectrum(noise(3, 64, 2), 8, 8)
    torch.testing.assert_close(signal_power(torch.stack([spectrum, spectrum])), spectrum.abs().square().sum(1))


def test_noise_hides_in_hfr_and_not_in_signal_hfr():
    """Low-frequency features under strong noise: the plain ratio is the noise's, the signal's stays low."""
    features = wave(1, 0).expand(500, -1, 4)
    draws = features + 2 * noise(2, 500, 64, 4)
    assert float(hfr(draws[0], 8, 8, cutoff=0.3).mean()) > 0.7
    assert abs(float(signal_hfr(draws, 8, 8, cutoff=0.3))) < 0.05


def test_one_draw_is_too_few():
    with pytest.raises(ValueError, match="at least 2 noise draws, got 1"):
        signal_hfr(noise(1, 2, 64, 3), 8, 8)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"shape \(B, 64, D\) for a 8×8 grid, got \(1, 60, 3\)"):
        hfr(noise(1, 60, 3), 8, 8)


@pytest.mark.parametrize("cutoff", [-0.1, 1.0])
def test_a_cutoff_outside_the_frequencies_is_refused(cutoff):
    with pytest.raises(ValueError, match=r"`cutoff` must be in \[0, 1\)"):
        hfr(noise(1, 64, 3), 8, 8, cutoff=cutoff)
