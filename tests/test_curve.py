"""The steps of the bootstrap, each by an answer known by hand; the whole is tried in test_timestep_selection.py."""

import pytest
import torch

from hf_aselect.selection.curve import agreement, best_place, resampled_scores, rivals_of

# Four timesteps in a row: each is near its neighbours.
NEAR = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1


def won_by(*places, num_taps=1):
    """Scores of resamples, (R, A, 4): of the first tap 1 at one place and 0 elsewhere, of the others -1."""
    scores = torch.full((len(places), num_taps, 4), -1.0, dtype=torch.float64)
    scores[:, 0] = torch.nn.functional.one_hot(torch.tensor(places), 4).double()
    return scores


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def test_groups_of_equal_images_score_the_same_in_every_resample():
    sums = torch.tensor([[0.3, 1.0]], dtype=torch.float64).expand(2, 5, 16, 2)
    resampled = resampled_scores(sums, mean, seed=0)
    assert resampled.shape == (1000, 2, 5)
    torch.testing.assert_close(resampled, torch.full_like(resampled, 0.3))


def test_resamples_spread_as_the_mean_of_the_groups_does():
    values = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.stack([values, torch.ones_like(values)], dim=-1)[None, None]
    resampled = resampled_scores(sums, mean, seed=0)
    # The standard error of a mean of 16, to what 1000 resamples tell of it.
    assert float(resampled.std()) == pytest.approx(float(values.std(correction=0)) / 4, rel=0.1)
    assert torch.equal(resampled, resampled_scores(sums, mean, seed=0))
    assert not torch.equal(resampled, resampled_scores(sums, mean, seed=1))


def test_resamples_in_which_nothing_is_counted_are_left_out():
    sums = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    sums[0, 0, 0] = 1.0
    # A quarter of the draws are the empty group, twice.
    assert 700 < len(resampled_scores(sums, mean, seed=0)) < 800


@pytest.mark.parametrize(
    ("places", "best"),
    [
        # At least half agree with the highest score, or are near it.
        ((3, 3, 0, 0), 3),
        ((2, 2, 0, 0), 3),
        # Most of them are elsewhere: the best near where most are.
        ((3, 0, 0, 0), 1),
    ],
)
def test_the_highest_score_wins_unless_most_resamples_select_elsewhere(places, best):
    smoothed = torch.tensor([[0.2, 0.3, 0.1, 0.4]], dtype=torch.float64)
    assert best_place(smoothed, won_by(*places), NEAR) == (0, best)


def test_agreement_is_the_share_of_resamples_near_the_best_of_the_same_tap():
    resampled = won_by(0, 1, 2, 3, num_taps=2)
    assert agreement(resampled, (0, 1), NEAR) == 0.75
    assert agreement(resampled, (0, 3), NEAR) == 0.5
    assert agreement(resampled, (1, 1), NEAR) == 0.0


def test_rivals_are_as_good_as_the_best_in_some_of_the_resamples():
    often, seldom = [0] * 97 + [2] * 3, [0] * 98 + [2] * 2
    # Where neither wins, 1 and 3 are as good as 0 is there: not better.
    assert rivals_of(won_by(*often), (0, 0)) == [0, 1, 2, 3]
    assert rivals_of(won_by(*seldom), (0, 0)) == [0]
