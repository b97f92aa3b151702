"""What a linear head pools of its tokens: the same from images, tokens and caches, trained, fitted, folded, saved."""

import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as Images
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d
from transformers import AutoModelForImageClassification

from hf_aselect import ASelectImageProcessor, DiTForImageClassification, cache_features, select_timestep
from hf_aselect.cli import main
from hf_aselect.model.heads import LinearHead, pooled_tokens

POOLINGS = {"mean": 1, "mean_std": 2, "regions": 5}


def load(folder, **fields):
    torch.manual_seed(0)
    given = {"timestep": 20, "num_labels": 3, "head": "linear", "pooling": "regions", **fields}
    return DiTForImageClassification.from_pretrained(folder, **given)


@pytest.fixture(scope="module")
def train():
    """Images whose class is the corner that is bright: the means of the whole image are equal."""
    generator = np.random.default_rng(0)
    images, labels = [], list(np.arange(90) % 3)
    for label in labels:
        values = generator.normal(90, 25, (8, 8, 3))
        row, column = divmod(int(label), 2)
        values[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 80
        images.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return Dataset.from_dict({"image": images, "label": labels}, Features(image=Images(), label=ClassLabel(3)))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 7), (1, 1)])
def test_regions_are_the_quarters_of_the_grid(grid):
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    pooled = pooled_tokens(tokens, "regions", grid)
    expected = adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(-1, grid), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled[:, :4], expected)
    torch.testing.assert_close(pooled[:, 4], tokens.std(1, correction=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled_tokens(tokens, "mean_std")[:, 1], pooled[:, 4])
    torch.testing.assert_close(pooled_tokens(tokens, "mean_std")[:, :1], pooled_tokens(tokens, "mean"))


def test_tokens_that_are_all_alike_have_a_gradient():
    tokens = torch.ones(2, 4, 3, requires_grad=True)
    pooled_tokens(tokens, "mean_std").sum().backward()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("is_standardized", [False, True])
def test_images_tokens_and_caches_give_the_same_logits(pixel_folder, train, tmp_path, pooling, is_standardized):
    model = load(pixel_folder, pooling=pooling, block="all", feature="hidden").eval()
    if is_standardized:
        model.standardize(train["image"])
    fit = model.fit_head(train)
    config = model.config
    assert (
        config.pooled_size == config.feature_size * POOLINGS[pooling] == model.classifier.output_projection.in_features
    )
    kinds = ["tokens"]
    if is_standardized and pooling != "mean":
        with pytest.raises(ValueError, match=r"what='pooled' with pooling=.* is not possible: .*what='tokens'"):
            cache_features(model, train, tmp_path, what="pooled")
        with pytest.raises(ValueError, match=r"`features` are pooled .* cannot be standardized afterwards"):
            model(features=torch.zeros(2, config.pooled_size))
    else:
        kinds.append("pooled")
    caches = [cache_features(model, train, tmp_path, what=what, dtype="float32") for what in kinds]
    assert caches[-1]["features"][:].shape[-1] == (config.pooled_size if kinds[1:] else config.feature_size)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        processor = ASelectImageProcessor.from_model_config(config)
        expected = model(processor(train["image"][:], return_tensors="pt").pixel_values).logits
        for cache in caches:
            found = again(features=cache["features"][:]).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert fit.accuracy > 0.9
    refit = load(pixel_folder, pooling=pooling, block="all", feature="hidden").fit_head(caches[-1])
    # Of 90 images; tokens that are standardized first have other deviations.
    assert refit.accuracy == pytest.approx(fit.accuracy, abs=4 / 90)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_tokens_are_standardized_before_they_are_pooled(pooling):
    """Else the deviation is that of the noise, which is the same for all images."""
    head = LinearHead(4, 2, (3, 2), pooling=pooling)
    head.standardization.scale, head.standardization.shift = torch.rand(4) + 0.5, torch.randn(3, 2, 4)
    tokens = torch.randn(5, 6, 4)
    expected = pooled_tokens(head.standardization(tokens), pooling, (3, 2)).flatten(1)
    torch.testing.assert_close(head.pool(tokens), expected)


def test_regions_are_folded_trained_and_read_at_other_sizes(pixel_folder):
    model = load(pixel_folder)
    model.standardize(torch.rand(4, 3, 8, 8) * 2 - 1)
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.fold()(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4)
        assert model(torch.rand(1, 3, 16, 12) * 2 - 1).logits.shape == (1, 3)
    model.train()(pixels, labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.classifier.parameters())


def test_half_precision_pools_in_float32():
    tokens = 100 + torch.randn(2, 64, 3)
    half = pooled_tokens(tokens.half(), "regions", (8, 8))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half[:, 4], tokens.half().float().std(1, correction=0), rtol=1e-4, atol=1e-4)


def test_a_head_without_a_grid_says_so():
    with pytest.raises(ValueError, match="12 tokens, but pooling='regions' needs their grid"):
        LinearHead(3, 2, pooling="regions")(torch.randn(1, 12, 3))
    with pytest.raises(ValueError, match="12 tokens, but pooling='regions' needs their grid"):
        LinearHead(3, 2, pooling="regions")(torch.randn(1, 12, 3), (2, 4))


def test_features_of_another_pooling_are_rejected(pixel_folder):
    model = load(pixel_folder)
    size = model.config.feature_size
    with pytest.raises(ValueError, match=rf"pooled with pooling='regions' to \(B, {5 * size}\), got \(2, {size}\)"):
        model(features=torch.zeros(2, size))


def test_an_unknown_pooling_is_rejected(pixel_folder):
    with pytest.raises(StrictDataclassError, match="`pooling` must be 'mean' or 'mean_std' or 'regions', got 'max'"):
        load(pixel_folder, pooling="max")


def test_an_attention_head_takes_no_pooling(pixel_folder):
    with pytest.raises(StrictDataclassError, match="`pooling='regions'` needs `head='linear'`"):
        DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, head="attention", pooling="regions")


def test_the_selection_knows_what_the_head_reads(pixel_folder):
    pixels = torch.rand(6, 3, 8, 8) * 2 - 1
    pooling = {
        name: select_timestep(load(pixel_folder, pooling=name), pixels, timesteps=[5, 500]).settings["pooling"]
        for name in POOLINGS
    }
    assert pooling == {"mean": "mean", "mean_std": "mean_std", "regions": "mean_std"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pooling", "regions"], "query of block 1, pooled by regions"),
        (["--block", "all", "--feature", "hidden", "--timestep", "20", "61"], "hidden of all blocks"),
        (["--block", "0", "2", "--feature", "hidden", "key"], "hidden, key of blocks 0, 2"),
    ],
)
def test_the_command_line_fits_read_outs(pixel_folder, train, tmp_path, capsys, given, said):
    train.to_parquet(tmp_path / "train.parquet")
    images = ["--images", str(tmp_path / "train.parquet"), "--timestep", "20"]
    assert main(["fit", str(pixel_folder), *images, *given, "--output", str(tmp_path / "out")]) == 0
    assert re.search(rf"^features +{said}$", capsys.readouterr().out, re.MULTILINE)
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.pooling == ("regions" if "--pooling" in given else "mean")


def test_the_command_line_has_no_pooling_for_masks(pixel_folder, train, tmp_path, capsys):
    masks = [Image.fromarray(np.full((8, 8), label, np.uint8)) for label in train["label"]]
    scenes = Dataset.from_dict({"image": train["image"][:], "label": masks}, Features(image=Images(), label=Images()))
    scenes.to_parquet(tmp_path / "masks.parquet")
    given = ["--images", str(tmp_path / "masks.parquet"), "--class-names", "a", "b", "c", "--pooling", "regions"]
    assert main(["fit", str(pixel_folder), *given, "--output", str(tmp_path / "out")]) == 1
    assert "the labels are masks, and a segmenter pools nothing" in capsys.readouterr().err
