"""Several timesteps that complement each other: selected by what the set predicts together, from one pass."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from conftest import HEAD, build_transformer
from datasets import Dataset
from diffusers import DDPMScheduler
from forking import in_two_processes
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_aselect import (
    ASelectCallback,
    ASelectConfig,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    TimestepSelection,
    select_timestep,
)
from hf_aselect.cli import main
from hf_aselect.hub.push import write_model_card
from hf_aselect.selection.complements import complements
from hf_aselect.selection.consensus import unexplained
from hf_aselect.selection.criteria import HFR, Consensus
from hf_aselect.selection.joint_prediction import unexplained_together
from hf_aselect.selection.probe import leave_one_out_hits
from hf_aselect.selection.select import _difference_warning, _useless_warnings
from hf_aselect.training.config_arguments import resumed_fields

GRID = [0, 60, 250, 550, 900]
SMALL = {"zeroed_channels": [], **HEAD}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DiT of four blocks, 16 wide, on RGB images of 8 × 8."""
    made = tmp_path_factory.mktemp("dit")
    build_transformer(num_layers=4).save_pretrained(made / "transformer")
    DDPMScheduler().save_pretrained(made / "scheduler")
    return made


def images(count=48, seed=5):
    """Images of a few common patterns, so that there is something to predict."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = torch.einsum("np,pchw->nchw", torch.randn(count, 4, generator=generator), patterns)
    return (0.3 * mixed + 0.1 * torch.randn(count, 3, 8, 8, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def model(folder):
    return DiTModel.from_pretrained(folder, timestep=5, head="linear")


@pytest.fixture(scope="module")
def selection(model):
    return select_timestep(model, images(), timesteps=GRID, num_timesteps=3)


@pytest.fixture(scope="module")
def classifier(folder):
    torch.manual_seed(1)
    return DiTForImageClassification.from_pretrained(
        folder, timestep="auto", num_timesteps=3, calibration_images=images(), num_labels=4, head="linear"
    )


# The search.


def search(count, log_snr, gains, first=0):
    """Complements of a first timestep where the score of a set is the sum of the gains of its timesteps."""
    return complements(first, count, log_snr, lambda sets: [sum(gains[t] for t in each) for each in sets])


def test_each_further_timestep_is_that_which_adds_most():
    log_snr = {0: 9.0, 1: 6.0, 2: 3.0, 3: 0.0}
    assert search(2, log_snr, {0: 1.0, 1: 0.1, 2: 0.3, 3: 0.2}) == ([2, 3], [1.3, 1.5])


def test_a_timestep_near_a_selected_one_waits_until_no_other_is_left():
    log_snr = {0: 9.0, 1: 8.0, 2: 6.0}
    gains = {0: 1.0, 1: 0.5, 2: 0.1}
    assert search(1, log_snr, gains)[0] == [2]
    assert search(2, log_snr, gains)[0] == [2, 1]


def test_scores_that_differ_by_rounding_alone_are_a_tie_and_the_smaller_timestep_wins():
    log_snr = {0: 9.0, 1: 6.0, 2: 3.0}
    assert search(1, log_snr, {0: 1.0, 1: 0.2, 2: 0.2 + 1e-9})[0] == [1]
    assert search(1, log_snr, {0: 1.0, 1: 0.2, 2: 0.2 + 1e-3})[0] == [2]


# What a set predicts.


def test_features_side_by_side_predict_what_a_ridge_regression_of_them_does():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(60, width, generator=generator).double() + 1 for width in (50, 40)]
    targets = parts[0][:, :3] + parts[1][:, :3] + torch.randn(60, 3, generator=generator).double()
    targets, folds = targets - targets.mean(0), torch.arange(60) % 8
    features = torch.cat([torch.ones(60, 1).double(), *parts], dim=1)
    left, right = (
        torch.stack([features[folds == fold].T @ other[folds == fold] for fold in range(8)])
        for other in (features, targets)
    )
    variance = torch.stack([targets[folds == fold].square().sum() for fold in range(8)])
    gram = sum(part @ part.T for part in parts)
    found = unexplained_together(gram, 90, targets, folds, 8)
    torch.testing.assert_close(found, unexplained(left, right, variance), rtol=1e-5, atol=1e-5)


def test_images_without_a_difference_are_rejected():
    with pytest.raises(ValueError, match="are all the same"):
        unexplained_together(torch.ones(8, 8).double(), 4, torch.zeros(8, 1).double(), torch.arange(8) % 4, 4)


def test_a_joint_score_of_one_timestep_is_its_score_in_the_curve(model, monkeypatch):
    asked = {}

    def spy(first, count, log_snr, scores_of):
        asked.update({timestep: scores_of([[timestep]])[0] for timestep in log_snr})
        return complements(first, count, log_snr, scores_of)

    monkeypatch.setattr("hf_aselect.selection.sweep.complements", spy)
    found = select_timestep(model, images(), timesteps=GRID, num_timesteps=2)
    assert list(asked.values()) == pytest.approx(found.scores, abs=1e-5)


# What a user selects.


def test_one_timestep_is_selected_as_ever(model):
    one = select_timestep(model, images(), timesteps=GRID)
    assert one.selected == [one.timestep] and one.selected_timesteps is None and one.joint_scores is None
    assert not {"selected_timesteps", "joint_scores"} & one.to_dict().keys()
    assert {**select_timestep(model, images(), timesteps=GRID, num_timesteps=1).to_dict(), "seconds": 0} == {
        **one.to_dict(),
        "seconds": 0,
    }


def test_a_set_begins_with_the_best_timestep_and_grows(model, selection):
    one = select_timestep(model, images(), timesteps=GRID)
    two = select_timestep(model, images(), timesteps=GRID, num_timesteps=2)
    assert selection.timestep == one.timestep == selection.selected[0] and selection.scores == one.scores
    assert selection.selected[:2] == two.selected and len(set(selection.selected)) == 3
    alone = selection.scores[selection.timesteps.index(selection.timestep)]
    assert selection.joint_scores[0] == pytest.approx(alone, abs=1e-5)
    assert selection.joint_scores[:2] == two.joint_scores
    assert selection.joint_scores[1] > selection.joint_scores[0]


def test_nothing_more_is_read_than_for_one_but_to_standardize(model, selection):
    one = select_timestep(model, images(), timesteps=GRID)
    assert selection.num_forwards == one.num_forwards + 2 * one.num_images
    coarse = select_timestep(model, images(), num_timesteps=3)
    alone = select_timestep(model, images())
    assert coarse.timesteps == alone.timesteps and set(coarse.selected) <= set(coarse.timesteps)


def test_in_whatever_batches_images_come_the_set_is_the_same(model, selection):
    other = select_timestep(model, images(), timesteps=GRID, num_timesteps=3, batch_size=5)
    assert other.selected == selection.selected
    assert other.joint_scores == pytest.approx(selection.joint_scores, abs=1e-4)


def test_many_images_are_summed_up_and_the_first_show_how_timesteps_go_together(model, selection, monkeypatch):
    for place in ("consensus", "accumulators"):
        monkeypatch.setattr(f"hf_aselect.selection.{place}.NUM_JOINT", 30)
    kept = select_timestep(model, images(), timesteps=GRID, num_timesteps=3)
    assert kept.scores == selection.scores and kept.joint_scores != selection.joint_scores
    monkeypatch.setattr("hf_aselect.selection.consensus.NUM_KEPT", 30)
    summed = select_timestep(model, images(), timesteps=GRID, num_timesteps=3)
    assert summed.selected == kept.selected and summed.joint_scores == pytest.approx(kept.joint_scores, abs=1e-5)


def test_a_probe_selects_by_the_accuracy_of_the_set(model):
    labels = [index % 3 for index in range(48)]
    found = select_timestep(model, images(), timesteps=GRID, num_timesteps=2, criterion="probe", labels=labels)
    assert len(found.selected) == 2
    together = model.extract_features(images(), timestep=found.selected).mean(1)
    hits = leave_one_out_hits(together, torch.tensor(labels)).double().mean()
    assert found.joint_scores[1] == pytest.approx(float(hits), abs=0.03)


def test_patches_are_probed_together_too(model):
    masks = [torch.randint(0, 3, (8, 8), generator=torch.Generator().manual_seed(n)).numpy() for n in range(48)]
    found = select_timestep(model, images(), timesteps=GRID, num_timesteps=2, criterion="probe", labels=masks)
    assert found.criterion == "patch_probe" and len(found.selected) == 2


def test_blocks_are_compared_and_the_set_is_that_of_the_best(model):
    found = select_timestep(model, images(), timesteps=GRID, num_timesteps=2, block=[0, 2])
    assert len(found.selected) == 2 and found.block in (0, 2) and len(found.table) == 2


def test_a_timestep_that_adds_nothing_is_warned_of(selection):
    flat = replace(selection, joint_scores=[0.5, 0.6, 0.6])
    (warning,) = _useless_warnings(flat)
    assert f"timestep {selection.selected[2]} adds nothing" in warning and "Pass `num_timesteps=2`" in warning


def test_images_that_differ_little_at_one_of_them_are_warned_of(model, selection):
    shares = [
        select_timestep(model, images(), timesteps=[timestep]).share_between_images for timestep in selection.selected
    ]
    assert selection.share_between_images == pytest.approx(min(shares))
    warned = _difference_warning(replace(selection, share_between_images=0.001), is_standardized=True)
    assert warned.startswith("the images account at one of these timesteps for 0.10%")


# Models.


def test_a_model_is_loaded_at_several_selected_timesteps(classifier):
    config = classifier.config
    assert isinstance(config.timestep, list) and len(config.timestep) == config.num_timesteps == 3
    assert config.selection["selected_timesteps"] == config.timestep and config.is_selection_in_use()
    assert config.feature_size == 48 == classifier.classifier.standardization.scale.shape[0]
    record = TimestepSelection.from_dict(config.selection)
    assert record.is_of(config) and config.resolved_timestep() == record.timestep
    # Each timestep has the statistics of its own.
    alone = DiTForImageClassification.from_pretrained(
        config.name_or_path, timestep=config.timestep[2], calibration_images=images(), num_labels=4, head="linear"
    )
    torch.testing.assert_close(
        classifier.classifier.standardization.scale[32:], alone.classifier.standardization.scale
    )


def test_saved_and_loaded_it_is_the_same(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(images(4)).logits, classifier(images(4)).logits)
    assert again.config.selection == classifier.config.selection and again.config.num_timesteps == 3
    # Selected again, there are as many; at a timestep that is named there is one.
    renewed = DiTForImageClassification.from_pretrained(tmp_path, timestep="auto", calibration_images=images(seed=6))
    assert len(renewed.config.timestep) == 3
    assert DiTModel.from_pretrained(tmp_path, timestep=7).config.num_timesteps == 1
    assert DiTModel.from_pretrained(tmp_path, read_out=[[7, 0, "key"]]).config.num_timesteps == 1


def test_before_a_selection_the_number_is_saved(tmp_path):
    config = ASelectConfig(num_timesteps=2, num_labels=3)
    config.save_pretrained(tmp_path)
    again = ASelectConfig.from_pretrained(tmp_path)
    assert (again.timestep, again.num_timesteps) == ("auto", 2)
    assert again.feature_size == 2 * again.hidden_size
    assert again.widths_of([("auto", 0, "key"), (5, 0, "hidden")]) == [2 * 1152, 1152]


def test_a_segmenter_reads_them_too(folder):
    model = DiTForSemanticSegmentation.from_pretrained(
        folder, timestep="auto", num_timesteps=2, calibration_images=images(), num_labels=3
    )
    assert len(model.config.timestep) == 2 and model(images(2)).logits.shape == (2, 3, 8, 8)


def test_a_selection_is_applied_and_one_takes_the_place_of_several(folder, selection):
    model = DiTModel.from_pretrained(folder, timestep=5)
    model.apply_selection(selection)
    assert model.config.timestep == selection.selected and model.config.num_timesteps == 3
    assert model(images(2)).last_hidden_state.shape == (2, 16, 48)
    one = select_timestep(model, images(), timesteps=GRID, num_timesteps=1)
    model.apply_selection(one)
    assert model.config.timestep == one.timestep and model.config.num_timesteps == 1


def test_a_record_of_several_is_kept_and_is_of_all_of_them(folder, selection):
    record = json.loads(json.dumps(selection.to_dict()))
    assert TimestepSelection.from_dict(record) == selection
    model = DiTModel.from_pretrained(folder, timestep=selection.selected)
    assert selection.is_of(model.config)
    model.config.timestep = selection.selected[:2]
    assert not selection.is_of(model.config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"selected_timesteps": [60]},
        {"selected_timesteps": [901, 60, 0]},
        {"joint_scores": None},
        {"joint_scores": [0.1]},
        {"selected_timesteps": "60"},
    ],
)
def test_a_record_that_does_not_fit_is_rejected(selection, wrong):
    with pytest.raises(ValueError, match=r"A saved selection (must have|has values of another kind)"):
        TimestepSelection.from_dict({**selection.to_dict(), **wrong})


def test_the_head_is_fitted_on_them(classifier, folder):
    labels = (images().mean((2, 3)) > 0).long() @ torch.tensor([1, 2, 0])
    fit = classifier.fit_head({"pixel_values": images(), "labels": labels})
    assert fit.num_images == 48 and classifier.classifier.output_projection.in_features == 48


def test_the_callback_selects_several(folder, tmp_path):
    model = DiTForImageClassification.from_pretrained(folder, timestep=[5, 6], num_labels=4, **SMALL)
    model.config.timestep, model.config.num_timesteps = "auto", 2
    rows = [{"pixel_values": each, "labels": number % 4} for number, each in enumerate(images())]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    Trainer(model, args, train_dataset=rows, callbacks=[ASelectCallback()]).train()
    assert len(model.config.timestep) == 2
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        f"| timestep | {', '.join(map(str, model.config.timestep))} |" in card
        and "joint score of the first, the first two, ... | 0." in card
    )


def test_a_resumed_training_keeps_them(classifier, tmp_path):
    classifier.config.save_pretrained(tmp_path)
    resumed = resumed_fields({"timestep": "auto", "num_timesteps": 3}, tmp_path)
    assert resumed["timestep"] == classifier.config.timestep and resumed["num_timesteps"] == 3


def test_the_card_and_the_curve_say_them(classifier, tmp_path):
    write_model_card(classifier, tmp_path, model_name="several")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    scores = ", ".join(f"{score:.4g}" for score in classifier.config.selection["joint_scores"])
    assert f"| timestep | {', '.join(map(str, classifier.config.timestep))} |" in card
    assert f"| joint score of the first, the first two, ... | {scores} |" in card
    assert (tmp_path / "timestep_curve.png").stat().st_size > 0


# The command line.


def test_the_command_selects_several(folder, tmp_path, capsys):
    rows = Dataset.from_dict({"image": [as_image(each) for each in images(40)], "label": [0, 1] * 20})
    rows.to_parquet(tmp_path / "rows.parquet")
    words = ["select", str(folder), "--images", str(tmp_path / "rows.parquet"), "--num-timesteps", "2"]
    assert main([*words, "--timesteps", *map(str, GRID), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert f"Adding timestep {record['selected_timesteps'][1]}: joint score" in said
    assert said.count("<- selected") == 2
    fit = ["fit", str(folder), "--images", str(tmp_path / "rows.parquet"), "--num-timesteps", "2"]
    assert main([*fit, "--timestep", "auto", "--output", str(tmp_path / "fitted")]) == 0
    assert len(DiTModel.from_pretrained(tmp_path / "fitted").config.timestep) == 2


def as_image(pixel_values):
    return Image.fromarray(((pixel_values + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


# Errors.


@dataclass(frozen=True)
class Energy:
    name: ClassVar[str] = "energy"
    num_draws: ClassVar[int] = 0
    first_round: ClassVar[int] = 8
    min_images: ClassVar[int] = 2

    def measure(self, tokens, rows, columns):
        square = tokens.float().square().mean((0, 2, 3)).cpu().double()
        return torch.stack([square, torch.ones_like(square)], dim=-1)

    def score(self, sums):
        return sums[..., 0] / sums[..., 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_timesteps": 0}, "`num_timesteps` must be a positive integer, got 0"),
        ({"num_timesteps": 1.5}, "`num_timesteps` must be a positive integer, got 1.5"),
        ({"num_timesteps": True}, "`num_timesteps` must be a positive integer, got True"),
        (
            {"num_timesteps": 6},
            "`num_timesteps` must be at most 5, the number of timesteps that are always scored, got 6",
        ),
        ({"num_timesteps": 2, "criterion": "hfr"}, "`num_timesteps=2` needs the criterion 'consensus'.*got 'hfr'"),
        ({"num_timesteps": 2, "criterion": "signal_hfr"}, "got 'signal_hfr'"),
        ({"num_timesteps": 2, "criterion": Energy()}, "got 'energy'"),
        ({"num_timesteps": 2, "criterion": HFR(cutoff=0.3)}, "got 'hfr'"),
    ],
)
def test_what_cannot_be_selected_is_rejected(model, options, words):
    with pytest.raises(ValueError, match=words):
        select_timestep(model, images(8), timesteps=GRID, **options)


def test_a_read_out_has_no_several_timesteps(folder):
    model = DiTModel.from_pretrained(folder, read_out=[[5, 0, "key"], [60, 2, "key"]])
    with pytest.raises(ValueError, match="`num_timesteps=2` selects timesteps for all taps, but this model's"):
        select_timestep(model, images(), timesteps=GRID, num_timesteps=2)


def test_a_folded_model_selects_none(folder):
    folded = DiTModel.from_pretrained(folder, timestep=5).fold()
    with pytest.raises(ValueError, match="folded at timestep 5"):
        select_timestep(folded, images(), num_timesteps=2)


@pytest.mark.parametrize(
    "fields", [{"num_timesteps": 0}, {"num_timesteps": 10**9}, {"num_timesteps": 3, "timestep": 5}]
)
def test_a_configuration_of_no_such_number_is_rejected(fields):
    with pytest.raises(StrictDataclassError, match="must be at least 1, and 1 unless `timestep='auto'`"):
        ASelectConfig(**fields)


def test_a_head_that_does_not_fit_the_set_is_rejected(folder, selection):
    model = DiTForImageClassification.from_pretrained(folder, timestep=5, num_labels=4, **SMALL)
    with pytest.raises(ValueError, match=r"reads tokens of 16 channels, but the taps at timesteps \[.*\] have 48"):
        model.apply_selection(selection)


def test_following_needs_as_many_timesteps_as_are_selected_again(folder, tmp_path):
    model = DiTForImageClassification.from_pretrained(
        folder, timestep=[5, 60], num_labels=4, freeze_backbone=False, **SMALL
    )
    rows = [{"pixel_values": each, "labels": 0} for each in images(8)]
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    callback = ASelectCallback(reselect_epochs=1, follow=True)
    with pytest.raises(ValueError, match="moves the model to 1 timestep selected again, but its head was built for"):
        Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()


# Processes.


def select_both_ways(folder):
    model = DiTModel.from_pretrained(folder, timestep=5)
    ways = [{"criterion": Consensus("mean")}, {"criterion": "probe", "labels": [index % 3 for index in range(48)]}]
    return [select_timestep(model, images(), timesteps=GRID, num_timesteps=3, **options).to_dict() for options in ways]


def select_in_process(rank, folder):
    return select_both_ways(folder)


@pytest.mark.process
def test_two_processes_select_what_one_does(folder):
    first, second = in_two_processes(select_in_process, folder)
    for one, other, alone in zip(first, second, select_both_ways(folder), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
        assert one["selected_timesteps"] == alone["selected_timesteps"]
        assert one["joint_scores"] == pytest.approx(alone["joint_scores"], abs=1e-4)
