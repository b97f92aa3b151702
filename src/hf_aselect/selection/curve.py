"""A criterion over the timesteps: the selection, and how sure it is by a bootstrap over images."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

NUM_RESAMPLES = 1000
# A timestep that is as good as the best in this share of the resamples is not told apart from it.
RIVAL_SHARE = 0.025
# Neighbours on the log-SNR scale count half at this distance, and one choice is near another within a step and a half:
# the default grid's step is 1.0 for DDPM's schedule.
SMOOTHING_WIDTH = 1.0
NEAR = 1.5
# With fewer of the resamples near the highest score, it is one of several peaks, and they vote.
MAJORITY = 0.5
ROUNDED_TO = 12  # decimals


@dataclass(frozen=True)
class TimestepCurve:
    """Scores of A taps at the T timesteps read so far, and what the bootstrap says of them."""

    timesteps: list[int]
    scores: Tensor  # (A, T)
    smoothed: Tensor  # (A, T), what the selection is made by where most resamples agree
    intervals: Tensor  # (A, T, 2)
    rivals: list[int]  # places of the best tap's timesteps that are as good as the best in some of the resamples
    best: tuple[int, int]  # which tap, which timestep
    confidence: float

    def warnings(self, wanted: float, remedies: tuple[str, str]) -> list[str]:
        """Return what speaks against trusting the selection, and what to do about it.

        Args:
            wanted: The confidence that was asked for.
            remedies: What gives more images, and what labels would decide.
        """
        more, remedy = remedies
        if len(self.timesteps) < 2:
            return []
        found = [self._edge_warning(remedy), self._higher_warning(remedy)]
        found += [self._flat_warning(more, remedy), self._peaks_warning(remedy)]
        if self.confidence < wanted:
            found.append(
                f"its confidence is {self.confidence:.2f}, below {wanted:.2f}, so other images may give another "
                f"timestep. Use {more}, or {remedy}."
            )
        return [text for text in found if text]

    @property
    def _curve(self) -> list[float]:
        """The smoothed scores of the best tap."""
        smoothed: list[float] = self.smoothed[self.best[0]].tolist()
        return smoothed

    @property
    def _reached(self) -> list[int]:
        """Places of the best timestep and its rivals."""
        return sorted({self.best[1], *self.rivals})

    @property
    def _is_flat(self) -> bool:
        return len(self._reached) > len(self.timesteps) / 2

    def _edge_warning(self, remedy: str) -> str:
        best, curve = self.best[1], self._curve
        # Of one or two timesteps each is at an end.
        if len(curve) < 3 or best not in (0, len(curve) - 1):
            return ""
        steady = all((after >= before) == bool(best) for before, after in pairwise(curve))
        return (
            f"it is at the {'noisy' if best else 'clean'} end of the timesteps that were scored"
            + (", and scores only rise toward it: " if steady else ": ")
            + "the criterion may depend only on "
            + ("the noise" if best else "details that noise removes")
            + f". Compare it with a timestep inside the range, using {remedy}."
        )

    def _higher_warning(self, remedy: str) -> str:
        curve = self._curve
        highest = max(range(len(curve)), key=curve.__getitem__)
        if highest == self.best[1]:
            return ""
        return (
            f"timestep {self.timesteps[highest]} scores higher on all images together, but fewer bootstrap resamples "
            f"select a timestep near it. Compare both, using {remedy}."
        )

    def _flat_warning(self, more: str, remedy: str) -> str:
        if not self._is_flat:
            return ""
        return (
            f"the curve is flat: {len(self._reached)} of {len(self.timesteps)} timesteps cannot be told apart, and "
            f"any of them may do. To decide, use {more} or {remedy}."
        )

    def _peaks_warning(self, remedy: str) -> str:
        peaks = [self.timesteps[i] for i in self._reached if self._is_peak(i) and abs(i - self.best[1]) > 1]
        if not peaks or self._is_flat:
            return ""
        return (
            f"the curve has other peaks of the same height, at {', '.join(map(str, peaks))}. Score a finer grid "
            f"(`timesteps=model.noise_schedule.even_timesteps(40)`), or compare them, using {remedy}."
        )

    def _is_peak(self, place: int) -> bool:
        curve = self._curve
        return all(curve[place] >= curve[next_to] for next_to in (place - 1, place + 1) if 0 <= next_to < len(curve))


def bootstrap(
    timesteps: list[int], log_snr: Tensor, sums: Tensor, score: Callable[[Tensor], Tensor], seed: int
) -> TimestepCurve:
    """Return the curve of sums over groups of images.

    The selection is the highest smoothed score, unless fewer than half of the resamples select near it: two peaks
    may be as high, and what is a little higher on all images need not be so on most draws of them. Then, at the same
    tap, it is the highest smoothed score near the timestep that has most of the resamples near it.

    Args:
        timesteps: T timesteps, rising.
        log_snr: Their log-SNR, (T,).
        sums: What the criterion measured, by tap, timestep and group of images, (A, T, G, S), float64.
        score: Scores, (...), of sums over images, (..., S).
        seed: Seed of the resampling.

    Raises:
        ValueError: If a score is not finite.
    """
    scores = score(sums.sum(2))
    if not bool(scores.isfinite().all()):
        raise ValueError("The criterion is not finite at every timestep")
    log_snr = log_snr.to(scores)
    kernel = _smoothing_kernel(log_snr)
    # Not by places of the grid: it may be fine or coarse.
    near = (log_snr[:, None] - log_snr).abs() <= NEAR
    resampled = resampled_scores(sums, score, seed)
    if not len(resampled):
        resampled = scores[None]
    smoothed, resampled_smoothed = _smoothed(scores, kernel), _smoothed(resampled, kernel)
    best = best_place(smoothed, resampled_smoothed, near)
    # One group is drawn as itself each time, which says nothing of others.
    confidence = agreement(resampled_smoothed, best, near) if sums.shape[2] > 1 else 0.0
    return TimestepCurve(
        timesteps, scores, smoothed, _intervals(resampled), rivals_of(resampled_smoothed, best), best, confidence
    )


def resampled_scores(sums: Tensor, score: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """Return the scores of resamples of the groups of images, (R, A, T), R at most 1000.

    Resamples with a score that is not finite are left out: groups that count nothing (no patch of theirs has a class)
    can be all that is drawn.

    Args:
        sums: What the criterion measured, by tap, timestep and group of images, (A, T, G, S), float64.
        score: Scores, (...), of sums over images, (..., S).
        seed: Seed of the resampling.
    """
    num_groups = sums.shape[2]
    picks = torch.randint(num_groups, (NUM_RESAMPLES, num_groups), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(NUM_RESAMPLES, num_groups, dtype=sums.dtype).scatter_add_(
        1, picks, torch.ones(picks.shape, dtype=sums.dtype)
    )
    resampled = score(torch.einsum("rg,atgs->rats", weights, sums))
    return resampled[resampled.isfinite().flatten(1).all(1)]


def best_place(smoothed: Tensor, resampled: Tensor, near: Tensor) -> tuple[int, int]:
    """Return which tap and which timestep is best, by its smoothed score or, where few agree, by vote.

    The highest smoothed score wins if at least half of the resamples select a timestep near it. Else the resamples
    vote at the same tap: the highest smoothed score near the timestep that most of them select near.

    Args:
        smoothed: Smoothed scores, (A, T).
        resampled: The same of each resample, (R, A, T).
        near: Which timesteps are near each other, (T, T), bool.
    """
    tap, place = divmod(int(smoothed.argmax()), smoothed.shape[1])
    # At the best tap, whichever tap a resample prefers: taps may be as good as each other, and agree on the timestep.
    votes = torch.bincount(resampled[:, tap].argmax(1), minlength=smoothed.shape[1]).double()
    shares = near.double() @ votes / len(resampled)
    return tap, place if shares[place] >= MAJORITY else _most_voted(shares, smoothed[tap], near)


def agreement(resampled: Tensor, best: tuple[int, int], near: Tensor) -> float:
    """Return the share of resamples, in [0, 1], that select the best tap and a timestep near the best.

    Args:
        resampled: Smoothed scores of each resample, (R, A, T).
        best: Which tap and which timestep is best.
        near: Which timesteps are near each other, (T, T), bool.
    """
    num_timesteps = resampled.shape[2]
    selected = resampled.flatten(1).argmax(1)
    agreeing = near[best[1]][selected % num_timesteps] & (selected // num_timesteps == best[0])
    return float(agreeing.double().mean())


def rivals_of(resampled: Tensor, best: tuple[int, int]) -> list[int]:
    """Return the places of the best tap's timesteps that score as high as the best in 2.5 % of the resamples or more.

    They are compared within each resample: an image that is hard at one timestep is hard at the next too, which the
    timesteps' separate intervals do not show.

    Args:
        resampled: Smoothed scores of each resample, (R, A, T).
        best: Which tap and which timestep is best.
    """
    tap, place = best
    as_good = (resampled[:, tap] >= resampled[:, tap, place, None]).double().mean(0)
    rivals: list[int] = (as_good >= RIVAL_SHARE).nonzero().flatten().tolist()
    return rivals


def _intervals(resampled: Tensor) -> Tensor:
    """Return the ends of the middle 95 % of scores of resamples, (R, A, T), as (A, T, 2)."""
    ends = torch.tensor([0.025, 0.975], dtype=resampled.dtype)
    return resampled.quantile(ends, dim=0).movedim(0, -1)


def _most_voted(shares: Tensor, smoothed: Tensor, near: Tensor) -> int:
    """Return the highest smoothed score, (T,), near the timestep with the largest share of resamples near it, (T,)."""
    largest = smoothed.masked_fill(shares < shares.max(), -torch.inf).argmax()
    return int(smoothed.masked_fill(~near[largest], -torch.inf).argmax())


def _smoothing_kernel(log_snr: Tensor) -> Tensor:
    """Return how much each timestep's score counts at each timestep, (T, T), of log-SNRs, (T,); rows add up to 1."""
    weights = torch.exp2(-((log_snr[:, None] - log_snr) / SMOOTHING_WIDTH).square())
    return weights / weights.sum(1, keepdim=True)


def _smoothed(scores: Tensor, kernel: Tensor) -> Tensor:
    """Return scores, (..., T), averaged with their neighbours by a kernel, (T, T)."""
    # Rounded, so that equal scores stay equal: the rows of the kernel add up to 1 but for the last bit.
    return (scores @ kernel.T).round(decimals=ROUNDED_TO)
