"""What criteria gather: by hand, without a model; and a criterion that brings an accumulator of its own."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_aselect import NoiseSchedule, select_timestep
from hf_aselect.selection.accumulators import NUM_GROUPS, Accumulator, Context, PatchLabels, SumAccumulator
from hf_aselect.selection.criteria import (
    CLASSES,
    CRITERIA,
    HFR,
    MASKS,
    Consensus,
    PatchProbe,
    Probe,
    accumulator_of,
    labels_wanted,
    suited,
)
from hf_aselect.selection.distribution import Share
from hf_aselect.selection.reader import Batch

TAPS = [(0, "key"), (1, "hidden")]
DDPM = {"_class_name": "DDPMScheduler"}


def context(labels=None, taps=TAPS, images=None, config=None):
    return Context(taps, config, NoiseSchedule.from_config(DDPM), images, labels, Share())


def batch(indices, timesteps, width=3):
    """A batch whose tokens, (2, B, 4, D), are all the number of the image, plus the timestep."""

    def read(taps):
        for timestep in timesteps:
            values = torch.tensor(indices).float().view(1, -1, 1, 1) + timestep
            yield timestep, {tap: values.expand(2, -1, 4, width + number) for number, tap in enumerate(taps)}

    return Batch(indices, timesteps, (2, 2), torch.zeros(len(indices), 1, 4, 4), read)


class Mean:
    name, num_draws, first_round, min_images = "mean", 0, 4, 1

    def measure(self, tokens, rows, columns):
        assert (rows, columns) == (2, 2)
        return torch.stack([tokens.double().mean((0, 2, 3)), torch.ones(tokens.shape[1])], dim=-1)

    def score(self, sums):
        return sums[..., 0] / sums[..., 1]


def test_a_criterion_that_brings_none_is_summed_by_group():
    sums = accumulator_of(Mean(), context())
    assert isinstance(sums, SumAccumulator)
    sums.add(batch([0, 1], [10, 20]))
    sums.add(batch([NUM_GROUPS + 1], [10, 20]))
    found = sums.sums([10])
    assert list(found) == [10], "what is not asked for is not gathered"
    assert found[10].shape == (2, NUM_GROUPS, 2) and found[10].dtype == torch.float64
    for tap in range(2):
        assert found[10][tap, 0].tolist() == [10.0, 1.0]
        assert found[10][tap, 1].tolist() == [11.0 + 10 + NUM_GROUPS + 1, 2.0]
        assert not found[10][tap, 2:].any()


def test_a_probe_is_fitted_to_all_images_whatever_their_order():
    labels = [0, 1] * 6
    alone, turned = (accumulator_of(Probe(), context(labels)) for _ in range(2))
    alone.add(batch(list(range(12)), [10]))
    for start in (8, 0, 4):
        turned.add(batch(list(range(start, start + 4)), [10]))
    first, second = alone.sums([10])[10], turned.sums([10])[10]
    assert torch.equal(first, second)
    assert first[..., 1].sum(1).tolist() == [12.0, 12.0], "each image is answered once at each tap"


def test_the_labels_of_patches_are_made_once_an_image():
    class Images:
        asked: ClassVar[list[int]] = []

        def patch_labels(self, index, mask, rows, columns, ignored):
            self.asked.append(index)
            return torch.full((rows * columns,), mask)

    class Config:
        semantic_loss_ignore_index = 255

    images = Images()
    labels = PatchLabels(lambda count: torch.arange(count)[::2], context([7, 8, 9], images=images, config=Config))
    for _ in range(2):
        assert labels([2, 0], (2, 2)).tolist() == [[9, 9], [7, 7]]
    assert images.asked == [2, 0]


def test_what_criteria_need_is_asked_of_them(model):
    wanted = {name: labels_wanted(criterion) for name, criterion in CRITERIA.items()}
    assert wanted == {"hfr": None, "signal_hfr": None, "consensus": None, "probe": CLASSES, "patch_probe": MASKS}
    assert labels_wanted(Mean()) is None
    assert suited(Probe(), model.config, has_masks=True) == PatchProbe()
    assert suited(PatchProbe(4), model.config, has_masks=True) == PatchProbe(4)
    assert suited(Probe(), model.config, has_masks=False) == Probe()
    assert suited(Consensus(), model.config, has_masks=False) == Consensus().for_head(model.config.head)
    assert suited(HFR(), model.config, has_masks=False) == HFR()


class LargestOfGroup(Accumulator):
    """Of each group the largest number: no sum of what was measured."""

    num_calibration = 3

    def __init__(self, context):
        self.context, self.calibrated, self.found = context, [], {}

    def calibrate(self, batches, own):
        self.calibrated = own
        for batch in batches:
            self.add(batch)

    def add(self, batch):
        for timestep, tokens in batch.read(self.context.taps):
            largest = self.found.setdefault(timestep, torch.zeros(1, NUM_GROUPS, 2, dtype=torch.float64))
            for index, value in zip(batch.indices, tokens[self.context.taps[0]].abs().amax((0, 2, 3)), strict=True):
                largest[0, index % NUM_GROUPS] = largest[0, index % NUM_GROUPS].maximum(
                    torch.stack([value.double(), torch.ones((), dtype=torch.float64)])
                )

    def sums(self, timesteps):
        return {timestep: self.found[timestep] for timestep in timesteps}


@dataclass(frozen=True)
class Largest:
    name: ClassVar[str] = "largest"
    num_draws: ClassVar[int] = 0
    first_round: ClassVar[int] = 5
    min_images: ClassVar[int] = 2
    made: ClassVar[list] = []

    def accumulator(self, context):
        self.made.append(LargestOfGroup(context))
        return self.made[-1]

    def measure(self, tokens, rows, columns):
        raise AssertionError("it is the accumulator's")

    def score(self, sums):
        return sums[..., 0] / sums[..., 1]


def test_a_criterion_may_bring_an_accumulator_of_its_own(model, pixels):
    record = select_timestep(model, pixels, criterion=Largest(), timesteps=[5, 100, 500], confidence=1.0)
    (made,) = Largest.made
    assert len(made.calibrated) == 3
    # Three timesteps, and the selected one once more for the share between images.
    assert (record.criterion, record.num_images, record.num_forwards) == ("largest", len(pixels), 4 * len(pixels))
    groups = made.found[record.timestep][0, : len(pixels)]
    assert record.scores[record.timesteps.index(record.timestep)] == pytest.approx(float(groups[:, 0].mean()))
