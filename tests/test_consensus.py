"""What views of the same images agree on, and how much of it one view tells: against long-hand computations."""

from importlib.resources import files

import pytest
import torch
from datasets import load_dataset
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

from hf_aselect import ASelectConfig, DiTModel, select_timestep
from hf_aselect.selection import consensus
from hf_aselect.selection.accumulators import is_before_mixing
from hf_aselect.selection.consensus import NUM_COMPONENTS, STRENGTHS, ConsensusSums, leading_directions, unexplained
from hf_aselect.selection.criteria import Consensus

EMBEDDED = files("hf_aselect") / "assets" / "fashion_mnist"
NUM_PICTURES, NUM_FOLDS, NUM_TARGETS = 320, 8, 128


def at(timestep):
    return timestep, 0, "hidden"


def views(noise, width=48, count=NUM_PICTURES):
    """Features of 5 views of 40 hidden numbers of each image, each with noise of its own."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(count, 40, generator=generator)
    return {
        (timestep, 0, "hidden"): (
            content @ torch.randn(40, width, generator=generator)
            + 4 * noise[timestep] * torch.randn(count, width, generator=generator)
        )[:, None]
        for timestep in range(5)
    }


def filled(pooled, batch_size=16, num_read=1, num_targets=NUM_TARGETS):
    sums = ConsensusSums(NUM_FOLDS, num_targets, num_read)
    sums.calibrate(pooled)
    count = len(next(iter(pooled.values())))
    for start in range(0, count, batch_size):
        indices = list(range(start, min(start + batch_size, count)))
        sums.add_targets(indices, {key: values[indices] for key, values in pooled.items()})
        for key, values in pooled.items():
            sums.add(key, indices, values[indices], key)
    return sums


def r_squared(sums, timestep):
    directions = leading_directions(sums.target_moments())
    error, variance = unexplained(*sums.products(at(timestep), directions), sums.variance(directions)).sum(0)
    return float(1 - error / variance)


def test_the_cleanest_view_tells_the_most():
    scores = [r_squared(filled(views([2.0, 1.0, 0.1, 1.0, 4.0])), timestep) for timestep in range(5)]
    assert scores.index(max(scores)) == 2
    assert scores[4] == min(scores)


def test_a_view_of_something_else_tells_nothing():
    pooled = views([0.1] * 5)
    sums = filled(pooled)
    other = torch.randn(NUM_PICTURES, 1, 48, generator=torch.Generator().manual_seed(9))
    sums.add(at(7), list(range(NUM_PICTURES)), other, (0, 0, "hidden"))
    assert r_squared(sums, 7) < 0.05 < 0.2 < r_squared(sums, 0)


def test_sums_give_what_the_pictures_themselves_give():
    """Against scikit-learn's ridge, fitted to the other folds and tried on each fold, at each strength."""
    pooled = views([1.0, 1.0, 0.5, 1.0, 1.0])
    sums = filled(pooled)
    targets = torch.stack([sums.targets[index] for index in range(NUM_PICTURES)]).double()
    targets = targets - targets.mean(0)
    left, values, _ = torch.linalg.svd(targets, full_matrices=False)
    count = min(NUM_COMPONENTS, int((values.square() > 1e-6 * values[0].square()).sum()) // 2)
    whitened = left[:, :count].numpy()
    features = pooled[2, 0, "hidden"][:, 0].double()
    features = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    fold = torch.arange(NUM_PICTURES).numpy() % NUM_FOLDS
    errors = []
    for strength in STRENGTHS:
        error = 0.0
        for number in range(NUM_FOLDS):
            ridge = Ridge(alpha=strength * NUM_PICTURES).fit(features[fold != number], whitened[fold != number])
            error += ((ridge.predict(features[fold == number]) - whitened[fold == number]) ** 2).sum()
        errors.append(error)
    assert r_squared(sums, 2) == pytest.approx(1 - min(errors) / count, abs=2e-3)


def test_the_batches_make_no_difference():
    pooled = views([1.0, 0.5, 1.0, 2.0, 1.0])
    alone, together = filled(pooled, 1), filled(pooled, NUM_PICTURES)
    for timestep in range(5):
        assert r_squared(alone, timestep) == pytest.approx(r_squared(together, timestep), abs=1e-4)


def test_scale_and_order_of_channels_make_no_difference():
    pooled = views([1.0, 0.5, 1.0, 2.0, 1.0])
    scaled = {key: values * 1000 + 3 for key, values in pooled.items()}
    assert r_squared(filled(scaled), 1) == pytest.approx(r_squared(filled(pooled), 1), abs=1e-3)


def test_wide_features_are_sketched_and_still_told_apart():
    sums = filled(views([4.0, 1.0, 0.1, 1.0, 8.0], width=400))
    assert [part.shape for part in sums.products(at(0))] == [(NUM_FOLDS, 193, 193), (NUM_FOLDS, 193, 1 + NUM_TARGETS)]
    scores = [r_squared(sums, timestep) for timestep in range(5)]
    assert scores[4] == min(scores)


def kept_bytes(sums, timestep):
    summed = sum(part.nbytes for part in sums.summed.get(at(timestep), ()))
    # The storage: a view of a batch would keep all of it.
    return summed + sum(values.untyped_storage().nbytes() for _, values in sums.features[at(timestep)])


def test_few_pictures_take_less_than_their_moments():
    sums = filled(views([1.0] * 5, width=400, count=64))
    assert all(kept_bytes(sums, timestep) == 64 * 192 * 4 for timestep in range(5))
    assert sum(part.nbytes for part in sums.products(at(0))) / 20 > 64 * 192 * 4


def test_what_is_kept_does_not_grow_with_many_pictures(monkeypatch):
    pooled = views([1.0, 0.5, 1.0, 2.0, 1.0], count=800)
    whole = filled(pooled)
    monkeypatch.setattr(consensus, "NUM_KEPT", 100)
    few, many = filled({key: values[:320] for key, values in pooled.items()}), filled(pooled)
    for timestep in range(5):
        moments = sum(part.nbytes for part in few.products(at(timestep)))
        assert moments <= kept_bytes(few, timestep) < moments + 100 * 48 * 4
        assert moments <= kept_bytes(many, timestep) < moments + 100 * 48 * 4
        assert r_squared(many, timestep) == pytest.approx(r_squared(whole, timestep), abs=1e-9)
    assert many.targets[0].untyped_storage().nbytes() == 4 * NUM_TARGETS


def test_a_constant_channel_does_no_harm():
    constant = torch.ones(NUM_PICTURES, 1, 1)
    pooled = {key: torch.cat([values, constant], dim=2) for key, values in views([0.5] * 5).items()}
    assert r_squared(filled(pooled), 0) == pytest.approx(r_squared(filled(views([0.5] * 5)), 0), abs=0.02)


def test_the_standard_deviation_is_read_where_it_is_asked_for_and_has_no_share_in_the_targets():
    """The mean of the first view is noise, and its deviation tells what all others agree on."""
    clear, noise = views([0.1] * 5), torch.randn(NUM_PICTURES, 1, 48, generator=torch.Generator().manual_seed(9))
    pooled = {key: torch.cat([values, 0 * noise], dim=1) for key, values in clear.items()}
    pooled[0, 0, "hidden"] = torch.cat([noise, clear[0, 0, "hidden"]], dim=1)
    means = {key: values[:, :1] for key, values in pooled.items()}
    both, mean, alone = filled(pooled, num_read=2), filled(pooled), filled(means)
    # The noise is one of the five references, so that it tells a little of what is shared.
    assert r_squared(mean, 0) < 0.15 < 0.5 < r_squared(both, 0)
    torch.testing.assert_close(mean.target_moments(), both.target_moments(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.target_moments(), both.target_moments(), rtol=1e-4, atol=1e-4)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="`pooling` of 'consensus' must be one of 'mean', 'mean_std', got 'max'"):
        Consensus("max")


@pytest.mark.parametrize(("head", "pooling"), [("linear", "mean"), ("attention", "mean_std")])
def test_the_head_says_what_is_read(head, pooling):
    weights = {"mean": 0.5, "mean_std": 0.2}
    assert Consensus().for_head(head) == Consensus(pooling, region_weight=weights[pooling])
    for named, weight in weights.items():
        assert Consensus(named).for_head(head) == Consensus(named, region_weight=weight)
        assert Consensus(named, region_weight=0.0).for_head(head) == Consensus(named, region_weight=0.0)


def test_a_larger_projection_is_nearer_to_the_features_themselves():
    """Against components of all standardised features side by side, which nobody keeps of many images."""
    pooled = views([1.0] * 5)
    whole = torch.cat([(values[:, 0] - values[:, 0].mean(0)) / values[:, 0].std(0) for values in pooled.values()], 1)
    exact = torch.linalg.svd(whole - whole.mean(0), full_matrices=False)[0][:, :NUM_COMPONENTS]
    shared = []
    for num_targets in (32, 128, 512):
        sums = filled(pooled, num_targets=num_targets)
        targets = torch.stack([sums.targets[index] for index in range(NUM_PICTURES)])
        found = torch.linalg.svd(targets - targets.mean(0), full_matrices=False)[0][:, :NUM_COMPONENTS]
        shared.append(float((exact.T @ found).square().sum()) / NUM_COMPONENTS)
    assert shared[0] + 0.05 < shared[1] and shared[1] + 0.05 < shared[2] and shared[2] > 0.8


@pytest.mark.parametrize("rounding", [0.0, 3e-7])
def test_a_reference_that_is_the_same_for_the_first_pictures_has_no_share(rounding):
    """Its rounding, or what it is later, would be all that the others are held against."""
    generator = torch.Generator().manual_seed(5)
    pooled = views([1.0, 0.5, 1.0, 2.0, 1.0])
    still = 1 + rounding * torch.randn(NUM_PICTURES, 1, 48, generator=generator)
    still[32:] += 0.01 * torch.randn(NUM_PICTURES - 32, 1, 48, generator=generator)
    with_still = {**pooled, (5, 0, "hidden"): still}
    sums = ConsensusSums(NUM_FOLDS, NUM_TARGETS)
    sums.calibrate({key: values[:32] for key, values in with_still.items()})
    indices = list(range(NUM_PICTURES))
    sums.add_targets(indices, with_still)
    for key, values in with_still.items():
        sums.add(key, indices, values, key)
    scores = [r_squared(sums, timestep) for timestep in range(6)]
    assert scores[:5] == pytest.approx([r_squared(filled(pooled), timestep) for timestep in range(5)], abs=0.05)
    assert scores[5] < 0.05


@pytest.mark.parametrize(("count", "words"), [(1, "must hold at least 2 images"), (8, "are all the same")])
def test_pictures_without_a_difference_are_refused(count, words):
    pooled = {key: values[:1].repeat(count, 1, 1) for key, values in views([1.0] * 5).items()}
    with pytest.raises(ValueError, match=words):
        r_squared(filled(pooled), 0)


@pytest.mark.parametrize("num_targets", [8, 128.0, True])
def test_a_projection_that_is_too_small_is_refused(num_targets):
    with pytest.raises(ValueError, match="`num_targets` of 'consensus' must be an integer >= 20, got"):
        Consensus(num_targets=num_targets)


def test_features_of_timesteps_that_are_no_references_have_no_share_in_the_targets():
    """They get a scale alone, which those read there need."""
    pooled = views([1.0, 0.5, 1.0, 2.0, 1.0])
    some = ConsensusSums(NUM_FOLDS, NUM_TARGETS)
    some.calibrate(pooled, references=[1, 2])
    few = ConsensusSums(NUM_FOLDS, NUM_TARGETS)
    few.calibrate({key: values for key, values in pooled.items() if key[0] in (1, 2)})
    assert [some.scales[at(timestep)][2] > 0 for timestep in range(5)] == [False, True, True, False, False]
    some.add_targets([0, 1], {key: values[:2] for key, values in pooled.items()})
    other = {key: values[:2] * (1.0 if key[0] in (1, 2) else 100.0) for key, values in pooled.items()}
    again = ConsensusSums(NUM_FOLDS, NUM_TARGETS)
    again.calibrate(pooled, references=[1, 2])
    again.add_targets([0, 1], other)
    assert torch.equal(again.targets[0], some.targets[0])
    assert torch.equal(some.scales[at(2)][0], few.scales[at(2)][0])


def photographs(count=64, aligned=0.0):
    """Latents of images whose large shapes lie anywhere, or everywhere at the same place."""
    generator = torch.Generator().manual_seed(3)
    anywhere = torch.randn(count, 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fixed = torch.randn(1, 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (1 - aligned) ** 0.5 * anywhere + aligned**0.5 * fixed


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("count", [8, 32, 256])
def test_alignment_is_the_share_of_the_mean_however_few_images(share, count):
    # The fixed shapes are 64 random numbers a channel: their own variance is off by a tenth.
    assert consensus.alignment(photographs(count, share)) == pytest.approx(share, abs=0.12)


def test_a_few_photographs_are_not_aligned_by_chance(monkeypatch):
    """Of images with four fields anywhere, the mean of 32 is uneven by a few hundredths."""
    generator = torch.Generator().manual_seed(6)
    sets = torch.nn.functional.interpolate(torch.randn(3200, 3, 2, 2, generator=generator), 32).split(32)
    assert not any(map(consensus.alignment, sets))
    monkeypatch.setattr(consensus, "LEAST_ALIGNMENT", 1e-9)
    assert any(map(consensus.alignment, sets))


def test_equal_images_are_aligned_and_level_ones_are_not():
    assert consensus.alignment(photographs(1).expand(8, -1, -1, -1)) == pytest.approx(1.0)
    assert consensus.alignment(torch.zeros(8, 3, 16, 16)) == 0.0


@pytest.mark.parametrize(
    ("common", "by_mean", "by_more"), [(0.0, 0.0, 0.0), (0.01, 0.0099, 0.0001), (0.5, 0.25, 0.25), (1.0, 0.0, 1.0)]
)
def test_regions_count_by_how_far_images_are_aligned_and_by_what_is_read(common, by_mean, by_more):
    assert consensus.region_share(common, 1) == pytest.approx(by_mean)
    assert consensus.region_share(common, 2) == pytest.approx(by_more)


@pytest.mark.parametrize(
    ("common", "count", "by_mean", "by_more"),
    [
        (0.0, 100, 8.0, 8.0),
        (0.7, 100, 3.0, 5.06),
        (0.7, 10, 3.0, 5.06),
        (0.25, 100, 5.5, 7.625),
        (0.7, 1000, 8.0, 8.0),
        (0.7, 50_000, 8.0, 8.0),
        (0.7, None, 8.0, 8.0),
        (0.7, 1000 // 10**0.5, 5.5, 6.53),
    ],
)
def test_the_fewer_labels_and_the_more_aligned_the_images_the_more_noise_the_references_have(
    common, count, by_mean, by_more
):
    assert consensus.reference_range(common, 1, count) == pytest.approx((-5.5, by_mean), abs=5e-3)
    assert consensus.reference_range(common, 2, count) == pytest.approx((-5.5, by_more), abs=5e-3)


def regions(pooled):
    """Of each feature two regions: what all views share is in their difference, which the mean does not show."""
    generator = torch.Generator().manual_seed(11)
    content = 8 * torch.randn(NUM_PICTURES, 48, generator=generator)
    return content, {
        key: torch.cat([values + content[:, None], values - content[:, None]], dim=1) for key, values in pooled.items()
    }


def test_regions_count_in_the_targets_as_they_are_weighted():
    pooled = views([1.0] * 5)
    content, by_region = regions(pooled)
    scores = []
    for weight in (0.0, 1.0, 50.0):
        sums = ConsensusSums(NUM_FOLDS, 512)
        sums.calibrate(pooled, regions=by_region, region_weight=weight)
        indices = list(range(NUM_PICTURES))
        sums.add_targets(indices, pooled, by_region)
        sums.scales[at(9)] = (content[:, None].mean(0), content[:, None].std(0), 0.0)
        sums.add(at(9), indices, content[:, None], at(9))
        scores.append(r_squared(sums, 9))
    assert scores[0] < 0.05 < scores[1] < scores[2]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_layout_counts_in_the_targets(weight):
    pooled = views([1.0] * 5)
    layout = torch.randn(NUM_PICTURES, 64, generator=torch.Generator().manual_seed(12))
    sums = ConsensusSums(NUM_FOLDS, 512)
    sums.calibrate(pooled, layout=layout, layout_weight=weight)
    indices = list(range(NUM_PICTURES))
    sums.add_targets(indices, pooled, layout=layout)
    sums.scales[at(9)] = (layout[:, None].mean(0), layout[:, None].std(0), 0.0)
    sums.add(at(9), indices, layout[:, None], at(9))
    sums.add(at(0), indices, pooled[at(0)], at(0))
    assert (r_squared(sums, 9) > 0.2) == bool(weight)
    # What the features agree on still counts.
    assert r_squared(sums, 0) > 0.2


def test_one_image_that_reaches_the_border_is_not_most_of_the_layout():
    """The first images, which the scales are taken from, are all but level there."""
    generator = torch.Generator().manual_seed(4)
    layout = 1e-4 * torch.randn(128, 8, 8, generator=generator)
    layout[:, 2:6, 2:6] = torch.randn(128, 4, 4, generator=generator)
    layout[100, 0, 0] = 1.0
    sums = ConsensusSums(NUM_FOLDS, 512)
    pooled = views([1.0] * 5, count=128)
    sums.calibrate(
        {key: values[:32] for key, values in pooled.items()}, layout=layout.flatten(1)[:32], layout_weight=1
    )
    sums.add_targets(list(range(128)), pooled, layout=layout.flatten(1))
    energy = torch.stack([sums.targets[index] for index in range(128)]).square().sum(1)
    assert float(energy.max() / energy.sum()) < 0.05


def test_targets_need_the_layout_that_the_calibration_had():
    pooled = views([1.0] * 5)
    sums = ConsensusSums(NUM_FOLDS, 512)
    sums.calibrate(pooled, layout=torch.randn(NUM_PICTURES, 64), layout_weight=1.0)
    with pytest.raises(ValueError, match="The calibration had a layout"):
        sums.add_targets(list(range(NUM_PICTURES)), pooled)


@pytest.mark.parametrize(
    ("criterion", "taps", "ends_early"),
    [
        (Consensus("mean"), [(0, "query")], True),
        (Consensus("mean"), [(0, "hidden")], False),
        (Consensus("mean"), [(1, "query")], False),
        (Consensus("mean"), [(0, "query"), (0, "key")], False),
        (Consensus("mean", region_weight=0.0), [(0, "query")], False),
        (Consensus("mean_std"), [(0, "query")], False),
    ],
)
def test_the_default_grid_ends_early_only_where_the_layout_counts(criterion, taps, ends_early):
    assert (criterion.least_log_snr(ASelectConfig(timestep=0), taps) == consensus.LEAST_LOG_SNR) == ends_early


def test_what_is_coarse_is_the_mean_of_fields():
    latents = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(consensus.coarse_layout(latents)[1, 64], latents[1, 1, :2, :2].mean(), atol=1e-6)
    assert consensus.coarse_layout(latents).shape == (3, 128)


def shifted_squares(count=96):
    """Squares of one size and of random places, all of them near the middle: only where they are tells them apart."""
    generator = torch.Generator().manual_seed(3)
    images = -torch.ones(count, 1, 28, 28)
    for image, (row, column) in zip(
        images, torch.randint(6, 15, (count, 2), generator=generator).tolist(), strict=True
    ):
        image[:, row : row + 8, column : column + 8] = 1
    return images


@pytest.mark.parametrize(
    ("block", "feature", "head", "is_moved"),
    [
        (0, "query", "linear", True),
        (0, "normed", "linear", True),
        (0, "hidden", "linear", False),
        (3, "query", "linear", False),
        (0, "query", "attention", False),
    ],
)
def test_only_a_mean_of_tokens_that_have_not_seen_each_other_is_held_against_the_layout(
    monkeypatch, block, feature, head, is_moved
):
    given = {"block": block, "feature": feature, "timesteps": [10, 166, 454, 834]}
    model = DiTModel.from_pretrained(EMBEDDED, timestep=0, head=head)
    scores = []
    for weight in (0.0, 1.0):
        monkeypatch.setattr("hf_aselect.selection.accumulators.LAYOUT_WEIGHT", weight)
        scores.append(select_timestep(model, shifted_squares(), **given).scores)
    assert (scores[0] != scores[1]) == is_moved


def test_at_the_first_query_a_linear_head_reads_places_from_the_noise():
    """On images of clothes a linear head is 15 points better there at t = 546 to 999 than at t = 50."""
    model = DiTModel.from_pretrained(EMBEDDED, timestep=0, block=0, feature="query", head="linear")
    images = load_dataset("parquet", data_files=str(EMBEDDED / "train.parquet"), split="train[:128]")
    selected = select_timestep(model, images.select_columns(["image"]))
    assert selected.timestep >= 454
    # Where next to nothing is left of the image it is not read at all.
    assert min(selected.log_snr) >= consensus.LEAST_LOG_SNR
    assert max(select_timestep(model, images[:16]["image"], timesteps=[454, 999]).timesteps) == 999


def test_tokens_that_blocks_before_the_first_have_mixed_are_not_held_against_the_layout():
    config = ASelectConfig(timestep=0)
    config.transformer = {**config.transformer, "n_refiner_layers": 2}
    assert not is_before_mixing(config, [(0, "query")])
    config.transformer["n_refiner_layers"] = 0
    assert is_before_mixing(config, [(0, "query")])
    assert not is_before_mixing(config, [(0, "query"), (0, "key")])


def test_the_sketch_of_regions_keeps_inner_products():
    values = torch.randn(40, 16 * 48, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(40, 512)
    consensus._count_sketch(values, total, 0)
    error = (total @ total.T - values @ values.T) / values.square().sum(1).mean()
    assert float(error.square().mean().sqrt()) < 2 / 512**0.5


def test_few_labels_of_aligned_images_select_more_noise():
    """Digits, all of them upright in the middle, on the embedded DiT."""
    model = DiTModel.from_pretrained(EMBEDDED, timestep=0, block=3, feature="query")
    values = torch.from_numpy(load_digits().images[:64]).float()[:, None] / 8 - 1
    images = torch.nn.functional.pad(torch.nn.functional.interpolate(values, 22, mode="bilinear"), [3] * 4, value=-1)
    given = {"criterion": Consensus("mean"), "timesteps": [0, 4, 19, 61, 166, 353, 546]}
    few, many = (select_timestep(model, images, num_train_images=count, **given) for count in (100, 1000))
    assert few.timestep > many.timestep
    assert many.scores == select_timestep(model, images, **given).scores
