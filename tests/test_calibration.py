"""The images that a timestep is selected from: parts of a sample, shared by processes."""

import pytest
import torch

from hf_aselect import ASelectConfig
from hf_aselect.model.configuration_aselect import DDPM_LINEAR
from hf_aselect.selection.images import CalibrationPictures

TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    **{"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 4, "in_channels": 1},
    **{"sample_size": 2, "patch_size": 1},
}


class Stream:
    """A set of unknown size that can be read again."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


@pytest.fixture(params=["set", "stream"])
def sample(request):
    images = list(torch.zeros(150, 2, 2).numpy().astype("uint8"))
    config = ASelectConfig(transformer=TRANSFORMER, scheduler=DDPM_LINEAR)
    return CalibrationPictures(images if request.param == "set" else Stream(images), config, 140, seed=0)


def share(sample, start, stop, rank, world=3):
    return [index for indices, _ in sample.batches(start, stop, 16, rank, world) for index in indices]


def test_processes_share_a_part_without_overlap(sample):
    parts = [share(sample, 10, 128, rank) for rank in range(3)]
    together = [index for part in parts for index in part]
    assert len(together) == len(set(together)) == 118
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("rank", range(3))
def test_a_picture_is_of_the_same_process_in_every_part(sample, rank):
    in_rounds = share(sample, 0, 32, rank) + share(sample, 32, 128, rank) + share(sample, 128, 999, rank)
    assert sorted(in_rounds) == sorted(share(sample, 0, 140, rank))


def test_no_more_pictures_are_read_than_asked_for(sample):
    assert len(share(sample, 0, 999, 0, world=1)) == 140
