import json
import logging
import random
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from forking import in_two_processes
from PIL import Image

from hf_aselect import (
    ASelectConfig,
    DiTForImageClassification,
    DiTModel,
    NoiseSchedule,
    TimestepSelection,
    select_timestep,
)
from hf_aselect.model.configuration_aselect import DDPM_LINEAR
from hf_aselect.selection import accumulators
from hf_aselect.selection.criteria import HFR, Consensus, SignalHFR
from hf_aselect.selection.curve import bootstrap

GRID = [0, 100, 300, 600, 999]
SCHEDULE = NoiseSchedule.from_config(DDPM_LINEAR)


class StubModel:
    """Tokens that carry the image's fine detail best at `best`: elsewhere it is weaker against the coarse part."""

    def __init__(self, best):
        self.best = best
        self.noise_schedule = SCHEDULE
        transformer = {"_class_name": "DiTTransformer2DModel", "num_layers": 1, "num_attention_heads": 1}
        sizes = {"attention_head_dim": 1, "in_channels": 1, "sample_size": 8, "patch_size": 1}
        self.config = ASelectConfig(transformer={**transformer, **sizes}, feature="hidden", zeroed_channels=[])
        self.num_forwards = 0

    def encode(self, pixel_values):
        return pixel_values

    def _read_taps(self, noised_latents, timesteps, taps):
        self.num_forwards += len(noised_latents)
        coarse = torch.nn.functional.avg_pool2d(noised_latents, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
        detail = (2.0 / (1 + (timesteps - self.best).abs() / 50)).view(-1, 1, 1, 1)
        tokens = 5 + 5 * coarse + detail * (noised_latents - coarse)
        return dict.fromkeys(taps, tokens.flatten(2).transpose(1, 2))


def pictures(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("criterion", ["hfr", "signal_hfr"])
@pytest.mark.parametrize("best", [0, 100, 300])
def test_a_timestep_that_is_best_is_found(best, criterion):
    selection = select_timestep(StubModel(best), pictures(64), criterion=criterion, timesteps=GRID)
    assert selection.timestep == best
    assert selection.confidence > 0.9


class AsFlowMatching:
    """A model that was trained with DDPM's noise, behind timesteps and noise of flow matching: the same log-SNRs."""

    def __init__(self, model, timesteps):
        self.model, self.config, self.noise_schedule = model, model.config, NoiseSchedule.flow_matching()
        levels = model.noise_schedule.log_snr(torch.tensor(timesteps)).tolist()
        self.theirs = {self.noise_schedule.timestep_at(level): t for level, t in zip(levels, timesteps, strict=True)}
        self.device, self.dtype = model.device, model.dtype
        self.encode = model.encode

    def _read_taps(self, noised_latents, timesteps, taps):
        theirs = [self.theirs[timestep] for timestep in timesteps.tolist()]
        power = self.noise_schedule.alpha(timesteps).square() + self.noise_schedule.sigma(timesteps).square()
        latents = noised_latents / power.sqrt().float().view(-1, 1, 1, 1)
        return self.model._read_taps(latents, torch.tensor(theirs), taps)


@pytest.mark.parametrize("criterion", ["hfr", "signal_hfr", "consensus"])
def test_ddpm_and_flow_matching_choose_the_same_noise_level(model, criterion):
    grid = [model.noise_schedule.timestep_at(level) for level in torch.linspace(4, -4, 9).tolist()]
    flow_model = AsFlowMatching(model, grid)
    images = pictures_of_three_channels()
    records = [
        select_timestep(each, images, criterion=criterion, timesteps=timesteps, max_images=60)
        for each, timesteps in ((model, grid), (flow_model, list(flow_model.theirs)))
    ]
    ddpm, flow = records
    assert ddpm.timesteps != flow.timesteps
    assert ddpm.timesteps.index(ddpm.timestep) == flow.timesteps.index(flow.timestep)
    # Timesteps are whole numbers, so the levels are only nearly the same.
    spread = max(ddpm.scores) - min(ddpm.scores)
    assert ddpm.scores == pytest.approx(flow.scores, abs=0.05 * spread)


class BlindModel(StubModel):
    """At t = 999, where nearly no signal is left, shows the noise's high frequencies only."""

    def _read_taps(self, noised_latents, timesteps, taps):
        (tokens,) = super()._read_taps(noised_latents, timesteps, taps).values()
        noise = noised_latents.flatten(2).transpose(1, 2)
        blind = (timesteps == 999).view(-1, 1, 1)
        return dict.fromkeys(taps, torch.where(blind, noise - noise.mean(1, keepdim=True), tokens - 5))


@pytest.mark.parametrize("seed", range(5))
def test_a_ratio_of_two_small_numbers_is_not_chosen(seed):
    model, grid = BlindModel(100), [0, 100, 999]
    assert select_timestep(model, pictures(64, seed), criterion="hfr", timesteps=grid, seed=seed).timestep == 999
    assert (
        select_timestep(model, pictures(64, seed), criterion="signal_hfr", timesteps=grid, seed=seed).timestep == 100
    )


def test_the_number_of_forward_passes_is_counted():
    model = StubModel(100)
    selection = select_timestep(model, pictures(10), timesteps=GRID, criterion="signal_hfr")
    # The images are read once more at the selected timestep.
    assert selection.num_forwards == model.num_forwards == 10 * 5 * 2 + 10


def test_the_plain_criterion_needs_one_draw():
    assert select_timestep(StubModel(100), pictures(10), timesteps=GRID, criterion="hfr").num_forwards == 10 * 5 + 10


@pytest.mark.parametrize(
    "criterion",
    ["hfr", "signal_hfr", "consensus", pytest.param(Consensus("mean_std", 512), marks=pytest.mark.process)],
)
def test_the_batch_size_changes_nothing_beyond_rounding(model, criterion):
    options = {"criterion": criterion, "max_images": 40, "timesteps": GRID}
    alone, together = (
        select_timestep(model, pictures_of_three_channels(), batch_size=size, **options) for size in (1, 64)
    )
    assert alone.timestep == together.timestep
    assert alone.scores == pytest.approx(together.scores, rel=1e-3, abs=1e-3)


def test_the_default_is_read_as_the_head_sees_the_features(pixel_folder, pixels):
    """By each class that has a head, and by tokens alone, as a configuration says."""
    chosen = {}
    for head in ("linear", "attention"):
        models = [
            DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, num_labels=2, head=head),
            DiTModel.from_pretrained(pixel_folder, timestep=5, head=head),
        ]
        records = [select_timestep(model, pixels, timesteps=GRID) for model in models]
        assert records[0].scores == records[1].scores
        chosen[head] = records[0]
    assert chosen["linear"].settings == {"pooling": "mean", "num_targets": 512, "region_weight": 0.5}
    assert chosen["attention"].settings == {"pooling": "mean_std", "num_targets": 512, "region_weight": 0.2}
    assert chosen["linear"].scores != chosen["attention"].scores


def test_the_same_seed_gives_the_same_record(model, pixels):
    records = [select_timestep(model, pixels, timesteps=GRID).to_dict() for _ in range(2)]
    assert {**records[0], "seconds": 0} == {**records[1], "seconds": 0}


def test_another_seed_draws_other_noise(model, pixels):
    first, second = (
        select_timestep(model, pixels, criterion="signal_hfr", timesteps=GRID, seed=seed) for seed in (0, 1)
    )
    assert first.scores != second.scores


def test_nothing_changes_in_the_model(classifier, pixels):
    classifier.train()
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    modes = [module.training for module in classifier.modules()]
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    config, generator = classifier.config.to_dict(), torch.get_rng_state()
    others = random.getstate(), np.random.get_state()[1].tolist()
    for criterion in ("hfr", "signal_hfr", "consensus"):
        select_timestep(classifier, pixels, timesteps=GRID, criterion=criterion)
        select_timestep(classifier, timesteps=GRID, criterion=criterion, max_images=2)
    select_timestep(classifier, pixels, timesteps=GRID, criterion="probe", labels=[0, 1, 0, 1, 0, 1, 0])
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert [module.training for module in classifier.modules()] == modes
    assert [parameter.requires_grad for parameter in classifier.parameters()] == flags
    assert classifier.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), generator)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others


def test_a_record_survives_json(model, pixels):
    selection = select_timestep(model, pixels, timesteps=GRID)
    assert TimestepSelection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


def test_the_record_says_what_the_choice_depends_on(model, pixels):
    settings = {"timesteps": GRID, "max_images": 5, "confidence": 0.9, "batch_size": 3}
    record = select_timestep(model, pixels, **settings)
    own = {
        "num_train_images": None,
        "noise_seed": model.config.noise_seed,
        "num_noise_draws": model.config.num_noise_draws,
    }
    assert record.options == {**settings, **own}


def test_a_record_of_something_else_is_refused():
    with pytest.raises(
        ValueError, match=r"A saved selection has other fields: missing .*'timestep'.*unknown .'colour'"
    ):
        TimestepSelection.from_dict({"colour": "red"})


@pytest.fixture
def record(model, pixels):
    return select_timestep(model, pixels, timesteps=GRID, criterion="hfr").to_dict()


def test_a_record_has_the_number_of_its_format(record):
    assert record["format"] == 1
    without = {name: value for name, value in record.items() if name != "format"}
    assert TimestepSelection.from_dict(without) == TimestepSelection.from_dict(record)
    assert "format" not in without, "what was given is left alone"


def test_a_record_of_a_newer_format_asks_for_an_upgrade(record):
    # Its fields may be others: the format is looked at first.
    for newer in ({**record, "format": 2}, {"format": 7, "curves": []}):
        words = rf"has format {newer['format']}, but the installed hf_aselect reads formats up to 1\. Upgrade it: pip"
        with pytest.raises(ValueError, match=words + r" install -U hf_aselect"):
            TimestepSelection.from_dict(newer)


@pytest.mark.parametrize("number", ["1", 1.0, True, None, 0, -1, [1]])
def test_a_format_that_is_no_number_of_one_is_rejected(record, number):
    with pytest.raises(ValueError, match="A saved selection must have a positive integer as `format`"):
        TimestepSelection.from_dict({**record, "format": number})


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
    (line,) = [record.getMessage() for record in caplog.records if "Selected timestep" in record.getMessage()]
    assert line.startswith(f"Selected timestep {selection.timestep} (log-SNR")
    assert "of 5 by consensus from 7 images, query of block 1, in" in line


def test_the_default_grid_is_even_in_log_snr():
    grid = SCHEDULE.even_timesteps()
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
    with pytest.raises(ValueError, match="is empty, so there is nothing to select a timestep on"):
        select_timestep(model, empty)


def test_an_unknown_criterion_is_refused(model, pixels):
    with pytest.raises(
        ValueError, match="`criterion` must be one of hfr, signal_hfr, consensus, probe, patch_probe, got 'best'"
    ):
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
    with pytest.raises(ValueError, match=r"has values from -3 to 255, expected \[0, 255\] as in the other images"):
        select_timestep(model, torch.tensor([-3.0, 255.0]).expand(2, 3, 8, 2))


def test_nan_pictures_are_refused(model):
    with pytest.raises(ValueError, match="NaN or infinite"):
        select_timestep(model, torch.full((2, 3, 8, 8), float("nan")))


@pytest.mark.parametrize(
    "images",
    ["folder", 7, {"image": []}, {1, 2}, torch.utils.data.DataLoader([0]), torch.zeros(1, 3, 8, 8).to_sparse()],
    ids=lambda images: type(images).__name__,
)
def test_what_is_no_set_of_pictures_is_refused(model, images):
    with pytest.raises(ValueError, match="Images must be a list of PIL images or arrays, a dataset"):
        select_timestep(model, images)


def test_a_dataset_without_pictures_is_refused(model):
    with pytest.raises(ValueError, match="a column `image` or exactly one image column"):
        select_timestep(model, datasets.Dataset.from_dict({"label": [1, 2]}))


def test_a_model_whose_features_are_nothing_is_refused(model, pixels):
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at every timestep: the model's features are NaN"):
        select_timestep(model, pixels, timesteps=GRID)


def test_a_probe_refuses_features_that_are_nothing(model, pixels):
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    labels = [0, 1, 0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="not finite at every timestep: the model's features are NaN"):
        select_timestep(model, pixels, timesteps=GRID, criterion="probe", labels=labels)
    masks = [torch.tensor([[each % 2] * 8] * 8).numpy() for each in range(7)]
    with pytest.raises(ValueError, match="not finite at every timestep: the model's features are NaN"):
        select_timestep(model, pixels, timesteps=GRID, criterion="probe", labels=masks)


def test_a_tap_that_is_the_same_for_all_pictures_is_not_the_probes_best(labelled):
    class WithADeadTap(ProbedModel):
        def _read_taps(self, noised_latents, timesteps, taps):
            tokens = super()._read_taps(noised_latents, timesteps, taps)
            return {tap: torch.zeros_like(each) if tap == (0, "query") else each for tap, each in tokens.items()}

    images, labels = labelled
    selection = select_timestep(
        WithADeadTap(300), images, criterion="probe", labels=labels, block="auto", feature="auto", timesteps=GRID
    )
    assert (selection.timestep, selection.block, selection.feature) == (300, 3, "key")
    (dead,) = [row["scores"] for row in selection.table if (row["block"], row["feature"]) == (0, "query")]
    assert max(dead) < 0.5


def test_pictures_of_which_no_patch_has_a_class_do_no_harm(model):
    images = pictures_of_three_channels(4)
    masks = [np.full((8, 8), 255)] + [np.arange(64).reshape(8, 8) // 32 for _ in range(3)]
    record = select_timestep(model, images, timesteps=GRID, criterion="patch_probe", labels=masks)
    assert np.isfinite(record.intervals).all()
    json.dumps(record.to_dict(), allow_nan=False)


def test_the_record_repeats_the_choice(model, pixels):
    for timesteps in (None, GRID):
        record = select_timestep(model, pixels, timesteps=timesteps, criterion=HFR(0.3), batch_size=3, seed=2)
        assert record.options["timesteps"] == timesteps
        options = {name: record.options[name] for name in ("timesteps", "max_images", "confidence", "batch_size")}
        again = select_timestep(model, pixels, criterion=HFR(**record.settings), seed=record.seed, **options)
        assert {**again.to_dict(), "seconds": 0} == {**record.to_dict(), "seconds": 0}


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_a_grid_may_be_an_array(model, pictures, kind):
    record = select_timestep(model, pictures, timesteps=kind([10, 500]))
    assert record.timesteps == [10, 500]
    assert type(record.timesteps[0]) is int


def test_the_grid_of_a_zero_terminal_snr_schedule_is_spread_over_the_timesteps():
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    grid = NoiseSchedule.from_config(config).even_timesteps()
    assert len(grid) >= 19
    assert sum(timestep < 900 for timestep in grid) >= 12


@pytest.mark.parametrize("best", [0, 61, 103, 253])
def test_coarse_to_fine_finds_what_the_full_grid_finds(best):
    model = StubModel(best)
    selection = select_timestep(model, pictures(64), criterion="signal_hfr")
    grid = SCHEDULE.even_timesteps()
    full = select_timestep(StubModel(best), pictures(64), criterion="signal_hfr", timesteps=grid)
    assert selection.timestep == full.timestep == best
    assert selection.num_forwards == model.num_forwards
    assert len(selection.timesteps) < 0.7 * len(full.timesteps)
    assert selection.num_forwards < 0.7 * full.num_forwards


def test_a_clear_choice_stops_after_the_first_round():
    selection = select_timestep(StubModel(100), pictures(500), timesteps=GRID, criterion="signal_hfr")
    assert (selection.num_images, selection.stopped_by) == (64, "confidence")


class NoisyModel(StubModel):
    """Which timestep is best differs from image to image."""

    def _read_taps(self, noised_latents, timesteps, taps):
        tokens = noised_latents.flatten(2).transpose(1, 2)
        return dict.fromkeys(taps, tokens / tokens.std(1, keepdim=True))


def test_pictures_are_added_while_the_choice_is_unsure():
    model = NoisyModel(0)
    options = {"timesteps": [0, 1, 2, 3, 4, 5, 6], "criterion": "hfr", "confidence": 1.0}
    selection = select_timestep(model, pictures(500), max_images=200, **options)
    assert (selection.num_images, selection.stopped_by) == (200, "max_images")
    assert select_timestep(model, pictures(90), **options).stopped_by == "all pictures"
    assert any("its confidence is" in warning for warning in selection.warnings)
    assert any("the curve is flat" in warning for warning in selection.warnings)


def test_a_choice_at_the_edge_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_aselect"):
        selection = select_timestep(BlindModel(100), pictures(64), criterion="hfr", timesteps=[0, 100, 999])
    (warning,) = [text for text in selection.warnings if "end of" in text]
    assert "is at the noisy end of the timesteps" in warning
    assert "criterion='probe'" in warning
    assert warning in caplog.text


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([0.1, 0.2, 0.3, 0.4], "noisy end of the timesteps that were scored, and scores only rise toward it: "),
        ([0.2, 0.1, 0.3, 0.4], "noisy end of the timesteps that were scored: "),
        ([0.4, 0.3, 0.2, 0.1], "clean end of the timesteps that were scored, and scores only rise toward it: "),
        ([0.4, 0.2, 0.3, 0.1], "clean end of the timesteps that were scored: "),
    ],
)
def test_the_warning_says_whether_the_curve_only_rises(scores, words):
    # Sums of 16 groups of images that all measured the same: one number and a 1 to count it.
    sums = torch.tensor(scores, dtype=torch.float64)[None, :, None].expand(1, 4, 16)
    sums = torch.stack([sums, torch.ones_like(sums)], dim=-1)
    timesteps = [0, 100, 300, 999]
    curve = bootstrap(timesteps, SCHEDULE.log_snr(torch.tensor(timesteps)), sums, HFR().score, 0)
    (warning,) = curve.warnings(0.95, ("more images", "the probe"))
    assert warning.startswith(f"it is at the {words}")
    assert warning.endswith("Compare it with a timestep inside the range, using the probe.")


def test_of_two_timesteps_one_is_always_at_an_end():
    selection = select_timestep(BlindModel(100), pictures(64), criterion="hfr", timesteps=[100, 999])
    assert not [text for text in selection.warnings if "end of the timesteps" in text]


def test_a_clear_peak_is_not_warned_of():
    assert select_timestep(StubModel(100), pictures(64), timesteps=GRID, criterion="signal_hfr").warnings == []


@pytest.mark.parametrize(("criterion", "needed"), [("hfr", 8), ("signal_hfr", 8), ("consensus", 32)])
def test_few_pictures_are_warned_of(model, criterion, needed):
    images = pictures_of_three_channels()
    for count, expected in ((needed - 1, 1), (needed, 0)):
        record = select_timestep(model, images, criterion=criterion, timesteps=GRID, max_images=count)
        warned = [text for text in record.warnings if f"is based on {count} images" in text]
        assert len(warned) == expected


def test_one_picture_is_too_few_to_compare(model):
    with pytest.raises(
        ValueError, match="must hold at least 2 images, because the timestep is selected by how images differ"
    ):
        select_timestep(model, pictures_of_three_channels(), timesteps=GRID, max_images=1)
    # Criteria that look at one image at a time know of no other.
    record = select_timestep(model, pictures_of_three_channels(), timesteps=GRID, max_images=1, criterion="hfr")
    assert record.confidence == 0.0


@pytest.mark.parametrize("count", [8, 9, 16, 32, 40])
def test_one_picture_again_and_again_is_refused(model, count):
    same = pictures_of_three_channels(1).repeat(count, 1, 1, 1)
    with pytest.raises(ValueError, match="are all the same"):
        select_timestep(model, same, timesteps=GRID)


class TwoPeaks(StubModel):
    def _read_taps(self, noised_latents, timesteps, taps):
        self.best = torch.where(timesteps < 350, 100, 600)
        normalised = noised_latents / noised_latents.std((2, 3), keepdim=True)
        # With the noise of other images, so that now the one and now the other is a little higher.
        return super()._read_taps(normalised.roll(int(timesteps[0] > 350), 0), timesteps, taps)


def test_a_curve_with_two_peaks_is_warned_of():
    # So coarse that each score counts alone.
    grid = [0, 10, 100, 300, 600, 850]
    selection = select_timestep(TwoPeaks(0), pictures(64) * 0, timesteps=grid, criterion="hfr")
    assert any("other peaks of the same height" in text for text in selection.warnings)


class LevelModel(StubModel):
    def _read_taps(self, noised_latents, timesteps, taps):
        return dict.fromkeys(taps, torch.ones(len(noised_latents), 64, 1))


def test_of_equal_timesteps_the_least_noisy_is_chosen():
    """The mean of equal scores differs from them in the last bit, now up and now down."""
    for value in (0.1, 1.0):

        class Level(HFR):
            def score(self, sums, value=value):
                return torch.full_like(sums[..., 0], value)

        record = select_timestep(LevelModel(0), pictures(64), criterion=Level(), timesteps=SCHEDULE.even_timesteps())
        assert record.timestep == 0
        assert any("the curve is flat: 20 of 20" in text for text in record.warnings)


def test_confidence_does_not_depend_on_how_fine_the_grid_is():
    fine = [t for t in range(60, 160, 2)]
    record = select_timestep(StubModel(100), pictures(64), criterion="signal_hfr", timesteps=fine)
    assert record.confidence > 0.95
    # Three places, the middle one selected: the others are far away.
    coarse = select_timestep(TwoPeaks(0), pictures(64) * 0, timesteps=[100, 600, 999], criterion="hfr")
    assert coarse.confidence < 0.95


class HillAndSpike(StubModel):
    """Detail grows slowly toward t = 103 and is a little stronger at t = 454 alone."""

    def _read_taps(self, noised_latents, timesteps, taps):
        noised_latents = noised_latents / noised_latents.std((2, 3), keepdim=True)
        coarse = torch.nn.functional.avg_pool2d(noised_latents, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
        log_snr = SCHEDULE.log_snr(timesteps).float()
        detail = 1 / (1 + 0.1 * (log_snr - SCHEDULE.log_snr(103)).square()) + 0.8 * (timesteps == 454)
        tokens = 5 + 5 * coarse + detail.float().view(-1, 1, 1, 1) * (noised_latents - coarse)
        return dict.fromkeys(taps, tokens.flatten(2).transpose(1, 2))


def test_a_spike_of_one_timestep_is_not_chosen_over_a_hill():
    grid = SCHEDULE.even_timesteps()
    selection = select_timestep(HillAndSpike(0), pictures(64) * 0, criterion="hfr", timesteps=grid)
    assert selection.timesteps[int(np.argmax(selection.scores))] == 454
    assert selection.timestep == 103
    assert selection.smoothed[selection.timesteps.index(103)] == max(selection.smoothed)
    # Where no neighbour is near, each score counts alone.
    assert (
        select_timestep(HillAndSpike(0), pictures(64) * 0, criterion="hfr", timesteps=[10, 103, 454]).timestep == 454
    )


def test_where_resamples_do_not_agree_on_the_highest_they_vote():
    """A peak that one group of images lifts above a plateau, which most draws of the images prefer."""
    timesteps = [19, 35, 61, 772]  # three neighbours of the default grid, and one far away
    noise = 0.2 * torch.randn(15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lone = torch.cat([torch.ones(1, dtype=torch.float64), noise - noise.mean() - 1 / 15])
    # Now the one and now the other end of the plateau is a little higher, and its middle on the whole.
    lean = torch.linspace(-0.02, 0.02, 16, dtype=torch.float64)
    scores = torch.stack([lean, torch.full_like(lean, 0.001), -lean, lone + 0.003])
    sums = torch.stack([scores, torch.ones_like(scores)], dim=-1)
    log_snr = SCHEDULE.log_snr(torch.tensor(timesteps))
    curve = bootstrap(timesteps, log_snr, sums[None], HFR().score, 0)
    assert curve.smoothed[0].argmax() == 3
    assert curve.best == (0, 1)
    # The share near it, which is more than half: it was less near the highest.
    assert 0.5 < curve.confidence < 0.8
    # The selection tells of the other, whatever confidence was asked for.
    (told,) = (text for text in curve.warnings(0.0, ("more images", "the probe")) if "scores higher" in text)
    assert told.startswith(
        "timestep 772 scores higher on all images together, but fewer bootstrap resamples select a timestep near"
    )
    # Were the lone peak as high without that group, most would select it, and it stays.
    steady = sums.clone()
    steady[3, :, 0] = 0.003
    assert bootstrap(timesteps, log_snr, steady[None], HFR().score, 0).best == (0, 3)


def test_a_tap_votes_for_itself_whichever_tap_a_resample_prefers():
    """Another tap wins in just those resamples in which the better peak of this one is high."""
    timesteps = [19, 772]
    noise = 0.08 * torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise -= noise.mean()
    ours, other = torch.stack([0.01 + noise, 0 * noise]), torch.stack([0.009 + 3 * noise, 0 * noise - 1])
    scores = torch.stack([other, ours])
    sums = torch.stack([scores, torch.ones_like(scores)], dim=-1)
    curve = bootstrap(timesteps, SCHEDULE.log_snr(torch.tensor(timesteps)), sums, HFR().score, 0)
    assert curve.best == (1, 0)
    # Of both, tap and timestep.
    assert curve.confidence < 0.4


@pytest.fixture
def labelled():
    """Images whose class is told by block 1's tokens at t = 300 alone."""
    labels = torch.arange(60) % 3
    return pictures(60) * 0.1 + (labels.view(-1, 1, 1, 1) - 1) * 0.5, labels.tolist()


class ProbedModel(StubModel):
    def __init__(self, best):
        super().__init__(best)
        transformer = {**self.config.transformer, "num_layers": 7, "attention_head_dim": 4}
        self.config = ASelectConfig(transformer=transformer, feature="hidden", block=0, zeroed_channels=[])

    def _read_taps(self, noised_latents, timesteps, taps):
        self.num_forwards += len(noised_latents)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(noised_latents), 64, 4, generator=generator)
        told = noised_latents.mean((1, 2, 3)).view(-1, 1, 1) * torch.tensor([1.0, 0, 0, 0]) + torch.tensor(
            [0, 1.0, 0, 0]
        )
        square = torch.stack([told[..., 0], told[..., 0] ** 2, told[..., 1], told[..., 1]], dim=-1)
        return {
            tap: noise + 30 * square * ((timesteps == self.best).view(-1, 1, 1) if tap == (3, "key") else 0)
            for tap in taps
        }


def test_the_probe_finds_timestep_block_and_feature_in_one_pass(labelled, tmp_path):
    images, labels = labelled
    model = ProbedModel(300)
    selection = select_timestep(
        model, images, criterion="probe", labels=labels, block="auto", feature="auto", timesteps=GRID
    )
    assert (selection.timestep, selection.block, selection.feature) == (300, 3, "key")
    assert selection.confidence > 0.95
    assert selection.scores[GRID.index(300)] > 0.9 > sorted(selection.scores)[-2]
    assert selection.num_forwards == model.num_forwards == 60 * len(GRID) + 60
    assert [(row["block"], row["feature"]) for row in selection.table] == [
        (block, feature) for block in (0, 3, 6) for feature in ("hidden", "query", "key", "value")
    ]
    written = selection.plot(tmp_path / "curve.png")
    assert written == [tmp_path / "curve.png", tmp_path / "curve_heat_map.png"]
    assert all(path.is_file() for path in written)


def test_the_probes_labels_may_be_a_column(model, pictures):
    rows = as_rows(pictures).remove_columns("label").add_column("label", [0, 1, 0, 1, 0, 1])
    by_name = select_timestep(model, rows, criterion="probe", labels="label", timesteps=GRID)
    assert (
        by_name.scores
        == select_timestep(model, pictures, criterion="probe", labels=[0, 1, 0, 1, 0, 1], timesteps=GRID).scores
    )


def test_a_tap_is_selected_without_labels(model, pixels):
    """All taps are held against the same targets: each scores as it does alone."""
    images = pixels.repeat(6, 1, 1, 1)[:36] + 0.3 * torch.randn(36, *pixels.shape[1:]).clamp(-2, 2)
    images = images.clamp(-1, 1)
    record = select_timestep(model, images, block="auto", feature="auto", timesteps=GRID)
    taps = [(row["block"], row["feature"]) for row in record.table]
    assert {feature for _, feature in taps} == {"hidden", "query", "key", "value"}
    best = max(record.table, key=lambda row: max(row["smoothed"]))
    assert (record.block, record.feature) == (best["block"], best["feature"])
    assert record.scores == best["scores"]
    for row in record.table:
        tap = {"block": row["block"], "feature": row["feature"]}
        by_means = Consensus(pooling="mean", region_weight=0.0)
        alone = select_timestep(model, images, criterion=by_means, timesteps=GRID, **tap)
        assert row["scores"] == pytest.approx(alone.scores, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"criterion": "probe"}, "needs `labels`"),
        ({"labels": [0] * 7}, "'consensus' does not use them. Did you mean `criterion='probe'`"),
        ({"block": [0, 1], "criterion": "hfr"}, "can only be compared by 'consensus', 'probe' or 'patch_probe'"),
        ({"block": "all"}, "`block` must be an integer, a list of integers or 'auto', got 'all'"),
        ({"feature": ["query", "key"], "criterion": "signal_hfr"}, "can only be compared by 'consensus', 'probe'"),
        ({"confidence": 2}, r"`confidence` must be in \[0, 1\], got 2"),
        ({"num_train_images": 0}, "`num_train_images` must be .*, got 0"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(model, pixels, options, words):
    with pytest.raises(ValueError, match=words):
        select_timestep(model, pixels, **options)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1], "one class index per image, got 2 labels for 6 images"),
        (["cat", "dog"] * 3, "must be class indices, integers >= 0"),
        ([None, 1] * 3, "must be class indices, integers >= 0"),
        ([0, -1] * 3, "must be class indices >= 0 of at least two classes"),
        ([1] * 6, "of at least two classes"),
        ("kind", "is the column name 'kind', but the images have no columns"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused_before_a_pass(labels, words):
    model = StubModel(100)
    with pytest.raises(ValueError, match=words):
        select_timestep(model, pictures(6), criterion="probe", labels=labels)
    assert model.num_forwards == 0


def test_labels_of_a_stream_or_of_no_pictures_are_refused(model, pictures):
    rows = datasets.Dataset.from_dict({"image": pictures, "kind": list(range(6))})
    for images in (rows.to_iterable_dataset(), None):
        with pytest.raises(ValueError, match="need a set of images of known size"):
            select_timestep(model, images, criterion="probe", labels="kind")
    with pytest.raises(ValueError, match="is the column name 'class', but the images have the columns image, kind"):
        select_timestep(model, rows, criterion="probe", labels="class")


def test_another_tap_can_be_asked_for(model, pixels):
    selection = select_timestep(model, pixels, block=-1, feature="key", timesteps=GRID)
    assert (selection.block, selection.feature) == (2, "key")
    model.config.block, model.config.feature = 2, "key"
    assert select_timestep(model, pixels, timesteps=GRID).scores == selection.scores


def test_a_criterion_may_have_settings_of_its_own(model, pixels):
    with_constant, without = (
        select_timestep(model, pixels, criterion=HFR(0.3, with_constant=kept), timesteps=GRID)
        for kept in (True, False)
    )
    assert with_constant.settings == {"cutoff": 0.3, "amplitude": False, "with_constant": True}
    assert all(a < b for a, b in zip(with_constant.scores, without.scores, strict=True))
    # Squares make the large ones larger still: of amplitudes the many small ones, which are high, have a larger share.
    amplitudes = select_timestep(model, pixels, criterion=HFR(0.3, amplitude=True), timesteps=GRID)
    assert all(a < b for a, b in zip(with_constant.scores, amplitudes.scores, strict=True))


def test_signal_hfr_may_have_more_draws(model, pixels):
    record = select_timestep(model, pixels, criterion=SignalHFR(num_draws=4), timesteps=GRID)
    assert record.settings["num_draws"] == 4
    assert record.num_forwards == 4 * len(pixels) * len(GRID) + len(pixels)
    with pytest.raises(ValueError, match="`num_draws` of 'signal_hfr' must be at least 2, got 1"):
        SignalHFR(num_draws=1)


def test_the_criterion_that_contributors_are_shown_works():
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    record = select_timestep(StubModel(300), pictures(64), criterion=names["Energy"](), timesteps=GRID)
    assert (record.criterion, record.timestep) == ("energy", 300)


def test_without_pictures_the_transformer_makes_its_own(model, latent_folder):
    selection = select_timestep(model, timesteps=GRID, max_images=4)
    assert (selection.pictures, selection.num_images) == ("generated", 4)
    assert any("Pass images, or raise `max_images`" in text for text in selection.warnings)
    assert not any("generates its own" in text for text in selection.warnings)
    # 4 images, 20 steps without guidance, 5 timesteps, and once more at the selected one.
    assert selection.num_forwards == 4 * 20 + 4 * 5 + 4
    latent = DiTModel.from_pretrained(latent_folder, timestep=5)
    assert select_timestep(latent, timesteps=GRID, max_images=4).pictures == "generated"


class Unsure(HFR):
    """Each resample of the images prefers another timestep."""

    def score(self, sums):
        return sums[..., 0] * 1e6 % 1


@pytest.mark.parametrize(("available", "read", "reason"), [(120, 100, "max_images"), (70, 70, "all pictures")])
def test_a_stream_is_read_until_there_is_no_more(model, pictures, available, read, reason):
    stream = as_rows((pictures * 20)[:available]).to_iterable_dataset()
    found = select_timestep(model, stream, max_images=100, criterion=Unsure(), timesteps=[0, 400, 800])
    assert (found.num_images, found.stopped_by) == (read, reason)
    assert found.num_forwards == 3 * read + read


def test_a_stream_gives_what_a_list_gives(model, pictures):
    stream = as_rows(pictures * 20).to_iterable_dataset()
    options = {"timesteps": [0, 1, 2, 3, 4], "confidence": 1.0, "criterion": "hfr"}
    found = select_timestep(model, stream, max_images=100, **options)
    assert found.scores == pytest.approx(
        select_timestep(model, (pictures * 20)[: found.num_images], max_images=100, **options).scores
    )


class SharingModel(StubModel):
    """All taps and timesteps show the same 40 numbers of an image, in mixtures and noise of their own.

    There is least noise at `best`; nothing in a single tap's spectrum tells so.
    """

    def __init__(self, best):
        super().__init__(best)
        transformer = {**self.config.transformer, "num_layers": 8, "attention_head_dim": 48}
        self.config = ASelectConfig(transformer=transformer, feature="key", block=4)

    def _read_taps(self, noised_latents, timesteps, taps):
        self.num_forwards += len(noised_latents)
        tokens = {}
        for block, feature in taps:
            rows = []
            for latents, timestep in zip(noised_latents, timesteps.tolist(), strict=True):
                content = latents.flatten()[:40]
                level = SCHEDULE.log_snr(timestep).item()
                distance = abs(level - SCHEDULE.log_snr(self.best).item())
                own = f"{block} {feature} {timestep}".encode()
                generator = torch.Generator().manual_seed(zlib.crc32(own))
                mixture = torch.randn(40, 48, generator=generator)
                generator.manual_seed(zlib.crc32(own + latents.numpy().tobytes()))
                noise = torch.randn(48, generator=generator)
                rows.append((content - content.mean()) @ mixture + (1 + distance) * noise)
            tokens[block, feature] = torch.stack(rows)[:, None].expand(-1, 64, -1)
        return tokens


class WithoutNoise:
    """A schedule that leaves the images as they are, so that a stub can tell them apart."""

    even_timesteps, log_snr = SCHEDULE.even_timesteps, SCHEDULE.log_snr

    def add_noise(self, latents, noise, timesteps):
        return latents


@pytest.mark.parametrize(
    "best", [pytest.param(0, marks=pytest.mark.process), 103, pytest.param(353, marks=pytest.mark.process)]
)
def test_the_timestep_that_tells_most_of_what_all_agree_on_is_found(best):
    model = SharingModel(best)
    model.noise_schedule = WithoutNoise()
    selection = select_timestep(model, pictures(64), criterion="consensus")
    places = [selection.timesteps.index(t) for t in (selection.timestep, best)]
    assert abs(places[0] - places[1]) <= 1
    assert selection.confidence > 0.5
    assert selection.num_forwards == model.num_forwards


def select_in_all_ways(folder):
    """Ways of selecting, each with a certainty that it does not reach where it has rounds."""
    model = DiTModel.from_pretrained(folder, timestep=5)
    images = pictures_of_three_channels(150)
    rows = as_rows([to_image(each) for each in images[:70]])
    ways = [({"criterion": each}, images) for each in ("signal_hfr", "consensus", Consensus("mean_std", 256), "hfr")]
    ways.append(({"criterion": "probe", "labels": [index % 3 for index in range(40)]}, images[:40]))
    ways.append(({"criterion": "consensus"}, rows.to_iterable_dataset()))
    # The second process has none of them.
    ways.append(({"criterion": "hfr", "timesteps": GRID}, images[:1]))
    ways.append(({"criterion": "consensus", "timesteps": GRID, "max_images": 6}, None))
    # The layout of the images counts.
    ways.append(({"criterion": Consensus("mean"), "block": 0, "feature": "query"}, images))
    return [select_timestep(model, given, confidence=1.0, **options).to_dict() for options, given in ways]


def to_image(pixel_values):
    return Image.fromarray(((pixel_values + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def select_in_process(rank, folder):
    if rank:
        # Another machine may find the components with other signs.
        found = accumulators.leading_directions
        accumulators.leading_directions = lambda moments: -found(moments)
    return select_in_all_ways(folder)


def pictures_of_three_channels(count=90):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.process
def test_two_processes_choose_what_one_does(pixel_folder):
    records = in_two_processes(select_in_process, pixel_folder)
    assert [record["num_images"] for record in records[0]] == [64, 150, 150, 64, 40, 70, 1, 6, 150]
    assert records[0][2]["settings"] == {"pooling": "mean_std", "num_targets": 256, "region_weight": 0.2}
    for first, second, alone in zip(*records, select_in_all_ways(pixel_folder), strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
        assert first["scores"] == pytest.approx(alone["scores"], rel=1e-4, abs=1e-4)
        same = ("timestep", "timesteps", "num_images", "stopped_by", "pictures")
        assert [first[name] for name in same] == [alone[name] for name in same]
