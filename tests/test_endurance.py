"""A process that reads on and on does not grow, and two threads may use one model at once."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_aselect import DiTForImageClassification, DiTModel

pytestmark = pytest.mark.process

STATUS = Path("/proc/self/statm")


def megabytes():
    """The memory that this process holds."""
    import resource

    return int(STATUS.read_text().split()[1]) * resource.getpagesize() / 1e6


needs_linux = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's count of memory")


@needs_linux
@pytest.mark.parametrize("folded", [False, True])
def test_a_thousand_forward_calls_do_not_grow_the_process(classifier, pixels, folded):
    model = classifier.fold() if folded else classifier
    sizes = [pixels, pixels[:1], pixels[:3]]
    with torch.no_grad():
        for number in range(100):
            model(sizes[number % 3])
        before = megabytes()
        for number in range(1000):
            model(sizes[number % 3])
    assert megabytes() - before < 3


@needs_linux
def test_pictures_of_many_sizes_do_not_grow_it(pixel_folder):
    """The fixed noise of each size is kept, but of no more than some."""
    model = DiTModel.from_pretrained(pixel_folder, timestep=50)
    shapes = [(8 + 2 * (number % 40), 8 + 2 * (number // 40)) for number in range(400)]
    with torch.no_grad():
        for height, width in shapes[:150]:
            model(torch.zeros(1, 3, height, width))
        before = megabytes()
        for height, width in shapes[150:]:
            model(torch.zeros(1, 3, height, width))
    assert megabytes() - before < 8


@needs_linux
def test_fifty_loads_do_not_grow_it(classifier, pixels, tmp_path):
    classifier.save_pretrained(tmp_path)

    def load():
        model = DiTForImageClassification.from_pretrained(tmp_path)
        with torch.no_grad():
            model(pixels)
        return sys.getrefcount(model)

    for _ in range(5):
        load()
    before = megabytes()
    for _ in range(50):
        load()
    assert megabytes() - before < 5


def test_two_threads_may_use_one_model(pixel_folder, pixels):
    model = DiTModel.from_pretrained(pixel_folder, timestep=50)
    taps = [
        (pixels[number : number + 3], 50 * number, number, feature)
        for number in range(3)
        for feature in ("hidden", "query")
    ]

    @torch.no_grad()
    def read(tap):
        batch, timestep, block, feature = tap
        return model.extract_features(batch, timestep=timestep, block=block, feature=feature)

    expected = [read(tap) for tap in taps]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(40):
            assert all(torch.equal(*pair) for pair in zip(pool.map(read, taps), expected, strict=True))
