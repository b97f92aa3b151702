import json
import logging

import datasets
import numpy as np
import pytest
import torch

from hf_aselect import ASelectConfig, NoiseSchedule, TimestepSelection, select_timestep
from hf_aselect.configuration_aselect import DDPM_LINEAR
from hf_aselect.timestep_selection import default_timesteps

GRID = [0, 100, 300, 600, 999]
SCHEDULE = NoiseSchedule.from_config(DDPM_LINEAR)


class StubModel:
    """Tokens that carry the picture's fine detail best at `best`: elsewhere it is weaker against the coarse part."""

    def __init__(self, best):
        self.best = best
        self.noise_schedule = SCHEDULE
        transformer = {"_class_name": "DiTTransformer2DModel", "num_layers": 1, "num_attention_heads": 1}
        sizes = {"attention_head_dim": 1, "in_channels": 1, "sample_size": 8, "patch_size": 1}
        self.config = ASelectConfig(transformer={**transformer, **sizes}, feature="hidden")
        self.num_forwards = 0

    def encode(self, pixel_values):
        return pixel_values

    def token_grid(self, latents):
        return latents.shape[-2], latents.shape[-1]

    def read_tokens(self, noised_latents, timesteps, block, feature):
        self.num_forwards += len(noised_latents)
        coarse = torch.nn.functional.avg_pool2d(noised_latents, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
        detail = 2.0 / (1 + abs(int(timesteps[0]) - self.best) / 50)
        tokens = 5 + 5 * coarse + detail * (noised_latents - coarse)
        return tokens.flatten(2).transpose(1, 2)


def pictures(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("criterion", ["hfr", "signal_hfr"])
@pytest.mark.parametrize("best", [0, 100, 300])
def test_a_timestep_that_is_best_is_found(best, criterion):
    selection = select_timestep(StubModel(best), pictures(64), criterion=criterion, timesteps=GRID)
    assert selection.timestep == best
    assert selection.confidence > 0.9


class BlindModel(StubModel):
    """At t = 999, where nearly no signal is left, shows the noise's high frequencies only."""

    def read_tokens(self, noised_latents, timesteps, block, feature):
        tokens = super().read_tokens(noised_latents, timesteps, block, feature) - 5
        noise = noised_latents.flatten(2).transpose(1, 2)
        return noise - noise.mean(1, keepdim=True) if timesteps[0] == 999 else tokens


@pytest.mark.parametrize("seed", range(5))
def test_a_ratio_of_two_small_numbers_is_not_chosen(seed):
    model, grid = BlindModel(100), [0, 100, 999]
    assert select_timestep(model, pictures(64, seed), criterion="hfr", timesteps=grid, seed=seed).timestep == 999
    assert select_timestep(model, pictures(64, seed), timesteps=grid, seed=seed).timestep == 100


def test_the_number_of_forward_passes_is_counted():
    model = StubModel(100)
    selection = select_timestep(model, pictures(10), timesteps=GRID)
    assert selection.num_forwards == model.num_forwards == 10 * 5 * 2


def test_the_plain_criterion_needs_one_draw():
    assert select_timestep(StubModel(100), pictures(10), timesteps=GRID, criterion="hfr").num_forwards == 10 * 5


def test_the_batch_size_changes_nothing_beyond_rounding(model, pixels):
    alone, together = (select_timestep(model, pixels, batch_size=size) for size in (1, 7))
    assert alone.timestep == together.timestep
    assert alone.scores == pytest.approx(together.scores, rel=1e-4)


def test_the_same_seed_gives_the_same_record(model, pixels):
    records = [select_timestep(model, pixels, timesteps=GRID).to_dict() for _ in range(2)]
    assert {**records[0], "seconds": 0} == {**records[1], "seconds": 0}


def test_another_seed_draws_other_noise(model, pixels):
    first, second = (select_timestep(model, pixels, timesteps=GRID, seed=seed) for seed in (0, 1))
    assert first.scores != second.scores


def test_nothing_changes_in_the_model(classifier, pixels):
    classifier.train()
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    modes = [module.training for module in classifier.modules()]
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    config, generator = classifier.config.to_dict(), torch.get_rng_state()
    select_timestep(classifier, pixels, timesteps=GRID)
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert [module.training for module in classifier.modules()] == modes
    assert [parameter.requires_grad for parameter in classifier.parameters()] == flags
    assert classifier.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_record_survives_json(model, pixels):
    selection = select_timestep(model, pixels, timesteps=GRID)
    assert TimestepSelection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


def test_a_record_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"Not a record of a selection: missing .*'timestep'.*unknown .'colour'"):
        TimestepSelection.from_dict({"colour": "red"})


def test_the_intervals_hold_the_scores(model, pixels):
    selection = select_timestep(model, pixels, timesteps=GRID, criterion="hfr")
    for score, (low, high) in zip(selection.scores, selection.intervals, strict=True):
        assert low <= score <= high


def test_the_curve_can_be_drawn(model, pixels, tmp_path):
    select_timestep(model, pixels, timesteps=GRID).plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_choice_is_logged_in_one_line(model, pixels, caplog):
    with caplog.at_level(logging.INFO, logger="hf_aselect"):
        selection = select_timestep(model, pixels, timesteps=GRID)
    (line,) = [record.getMessage() for record in caplog.records if "Chose timestep" in record.getMessage()]
    assert line.startswith(f"Chose timestep {selection.timestep} (log-SNR")
    assert "of 5 by signal_hfr from 7 pictures, query of block 1, in" in line


def test_the_default_grid_is_even_in_log_snr():
    grid = default_timesteps(SCHEDULE)
    assert (grid[0], grid[-1]) == (0, 999)
    steps = SCHEDULE.log_snr(torch.tensor(grid)).diff()
    assert 15 <= len(grid) <= 20
    assert float(steps.min() / steps.max()) < 2  # both negative: the longest step is at most twice the shortest


def as_rows(pictures):
    return datasets.Dataset.from_dict({"image": pictures, "label": [0] * len(pictures)})


@pytest.mark.parametrize(
    "kind",
    ["list", "tuple", "generator", "dataset", "column", "streaming dataset", "arrays", "other column"],
)
def test_pictures_may_come_in_many_kinds(model, pictures, kind):
    expected = select_timestep(model, list(pictures), timesteps=GRID).scores
    given = {
        "list": pictures,
        "tuple": tuple(pictures),
        "generator": (picture for picture in pictures),
        "dataset": as_rows(pictures),
        "column": as_rows(pictures)["image"],
        "streaming dataset": as_rows(pictures).to_iterable_dataset(),
        "arrays": [np.asarray(picture) for picture in pictures],
        "other column": as_rows(pictures).rename_column("image", "photo"),
    }[kind]
    assert select_timestep(model, given, timesteps=GRID).scores == pytest.approx(expected)


def test_a_large_set_is_sampled(model):
    many = torch.rand(50, 3, 8, 8) * 2 - 1
    selection = select_timestep(model, many, timesteps=GRID, max_images=5)
    assert selection.num_images == 5
    assert selection.scores != select_timestep(model, many[:5], timesteps=GRID).scores


@pytest.mark.parametrize("empty", [[], torch.zeros(0, 3, 8, 8)])
def test_an_empty_calibration_set_is_refused(model, empty):
    with pytest.raises(ValueError, match="No pictures to choose a timestep from"):
        select_timestep(model, empty)


def test_an_unknown_criterion_is_refused(model, pixels):
    with pytest.raises(ValueError, match="`criterion` must be one of hfr, signal_hfr, got 'best'"):
        select_timestep(model, pixels, criterion="best")


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [([0, 1000], r"integer in \[0, 1000\).*got 1000"), ([-1], "got -1"), ([0.5], r"got 0\.5"), ([], "at least one")],
)
def test_a_grid_outside_the_timesteps_is_refused(model, pixels, timesteps, words):
    with pytest.raises(ValueError, match=words):
        select_timestep(model, pixels, timesteps=timesteps)


@pytest.mark.parametrize("name", ["max_images", "batch_size"])
def test_counts_below_one_are_refused(model, pixels, name):
    with pytest.raises(ValueError, match="must be at least 1"):
        select_timestep(model, pixels, **{name: 0})


def test_pixel_values_that_were_not_scaled_are_refused(model):
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got \[0, 255\]"):
        select_timestep(model, torch.tensor([0.0, 255.0]).expand(1, 3, 8, 2))


def test_nan_pictures_are_refused(model):
    with pytest.raises(ValueError, match="NaN or infinite"):
        select_timestep(model, torch.full((2, 3, 8, 8), float("nan")))


@pytest.mark.parametrize("images", ["folder", 7, {"image": []}])
def test_what_is_no_set_of_pictures_is_refused(model, images):
    with pytest.raises(ValueError, match="Pictures must be a list of PIL pictures or arrays, a dataset"):
        select_timestep(model, images)


def test_a_dataset_without_pictures_is_refused(model):
    with pytest.raises(ValueError, match="a column `image` or exactly one column of PIL pictures"):
        select_timestep(model, datasets.Dataset.from_dict({"label": [1, 2]}))


def test_a_model_whose_features_are_nothing_is_refused(model, pixels):
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at every timestep: the model's features are NaN"):
        select_timestep(model, pixels, timesteps=GRID)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_a_grid_may_be_an_array(model, pictures, kind):
    record = select_timestep(model, pictures, timesteps=kind([10, 500]))
    assert record.timesteps == [10, 500]
    assert type(record.timesteps[0]) is int


def test_the_grid_of_a_zero_terminal_snr_schedule_is_spread_over_the_timesteps():
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    grid = default_timesteps(NoiseSchedule.from_config(config))
    assert len(grid) >= 19
    assert sum(timestep < 900 for timestep in grid) >= 12
