"""A criterion over the timesteps: the choice, and how sure it is by a bootstrap over pictures."""

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
    smoothed: Tensor  # (A, T), what the choice is made by where most resamples agree
    intervals: Tensor  # (A, T, 2)
    rivals: list[int]  # places of the best tap's timesteps that are as good as the best in some of the resamples
    best: tuple[int, int]  # which tap, which timestep
    confidence: float

    def warnings(self, wanted: float, remedies: tuple[str, str]) -> list[str]:
        """Return what speaks against trusting the choice, and what to do about it.

        Args:
            wanted: The confidence that was asked for.
            remedies: What gives more pictures, and what labels would decide.
        """
        more, remedy = remedies
        tap, best = self.best
        scores = self.smoothed[tap].tolist()
        found: list[str] = []
        if len(scores) < 2:
            return found
        reached = sorted({best, *self.rivals})
        if best in (0, len(scores) - 1):
            steady = all((after >= before) == bool(best) for before, after in pairwise(scores))
            found.append(
                f"it lies at the {'noisy' if best else 'clean'} edge of the grid"
                + (", and the curve only rises toward it: " if steady else ": ")
                + ("the criterion may measure noise alone" if best else "the criterion may see only what noise takes")
                + f". Compare it with a timestep inside the range by {remedy}."
            )
        highest = max(range(len(scores)), key=scores.__getitem__)
        if highest != best:
            found.append(
                f"timestep {self.timesteps[highest]} scores higher on all pictures together, but fewer draws of them "
                f"choose near it. Compare both by {remedy}."
            )
        if len(reached) > len(scores) / 2:
            found.append(
                f"the curve is flat: {len(reached)} of {len(scores)} timesteps cannot be told apart. "
                f"Any of them may serve; {more} or {remedy} may decide."
            )
        peaks = [
            i
            for i in reached
            if all(scores[i] >= scores[j] for j in (i - 1, i + 1) if 0 <= j < len(scores)) and abs(i - best) > 1
        ]
        if peaks and len(reached) <= len(scores) / 2:
            found.append(
                f"the curve has other peaks as high, at {', '.join(str(self.timesteps[i]) for i in peaks)}. "
                "Read a finer grid (`timesteps=model.noise_schedule.even_timesteps(40)`), or compare them by "
                f"{remedy}."
            )
        if self.confidence < wanted:
            found.append(
                f"its confidence is {self.confidence:.2f}, below {wanted:.2f}: other pictures may give another "
                f"timestep. Use {more}, or {remedy}."
            )
        return found


def bootstrap(
    timesteps: list[int], log_snr: Tensor, sums: Tensor, score: Callable[[Tensor], Tensor], seed: int
) -> TimestepCurve:
    """Return the curve of sums over groups of pictures.

    The choice is the highest smoothed score, unless fewer than half of the resamples choose near it: two peaks may be
    as high, and what is a little higher on all pictures need not be so on most draws of them. Then, at the same tap,
    it is the highest smoothed score near the timestep that has most of the resamples near it.

    Args:
        timesteps: T timesteps, rising.
        log_snr: Their log-SNR, (T,).
        sums: What the criterion measured, by tap, timestep and group of pictures, (A, T, G, S), float64.
        score: Scores, (...), of sums over pictures, (..., S).
        seed: Seed of the resampling.

    Raises:
        ValueError: If a score is not finite.
    """
    scores = score(sums.sum(2))
    if not bool(scores.isfinite().all()):
        raise ValueError("The criterion is not finite at every timestep")
    log_snr = log_snr.to(scores)
    kernel = _smoothing_kernel(log_snr)
    # Rounded, so that equal scores stay equal: the rows of the kernel add up to 1 but for the last bit.
    smoothed = (scores @ kernel.T).round(decimals=ROUNDED_TO)
    best = divmod(int(smoothed.argmax()), len(timesteps))
    num_groups = sums.shape[2]
    picks = torch.randint(num_groups, (NUM_RESAMPLES, num_groups), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(NUM_RESAMPLES, num_groups, dtype=sums.dtype).scatter_add_(
        1, picks, torch.ones(picks.shape, dtype=sums.dtype)
    )
    resampled = score(torch.einsum("rg,atgs->rats", weights, sums))  # (R, A, T)
    # Groups that count nothing (no patch of theirs has a class) can be all that is drawn.
    resampled = resampled[resampled.isfinite().flatten(1).all(1)]
    if not len(resampled):
        resampled = scores[None]
    ends = torch.tensor([0.025, 0.975], dtype=resampled.dtype)
    intervals = resampled.quantile(ends, dim=0).movedim(0, -1)
    resampled = (resampled @ kernel.T).round(decimals=ROUNDED_TO)
    chosen = resampled.flatten(1).argmax(1)
    # Not by places of the grid: it may be fine or coarse.
    near = (log_snr[:, None] - log_snr).abs() <= NEAR
    # At the best tap, whichever tap a resample prefers: taps may be as good as each other, and agree on the timestep.
    votes = torch.bincount(resampled[:, best[0]].argmax(1), minlength=len(timesteps)).double()
    shares = near.double() @ votes / len(resampled)
    if shares[best[1]] < MAJORITY:
        best = best[0], _most_voted(shares, smoothed[best[0]], near)
    agreeing = near[best[1]][chosen % len(timesteps)] & (chosen // len(timesteps) == best[0])
    # In pairs: a picture that is hard at one timestep is so at the next, which separate intervals do not know.
    as_good = (resampled[:, best[0]] >= resampled[:, best[0], best[1], None]).double().mean(0)
    rivals = (as_good >= RIVAL_SHARE).nonzero().flatten().tolist()
    # One group is drawn as itself each time, which says nothing of others.
    confidence = float(agreeing.double().mean()) if num_groups > 1 else 0.0
    return TimestepCurve(timesteps, scores, smoothed, intervals, rivals, best, confidence)


def _most_voted(shares: Tensor, smoothed: Tensor, near: Tensor) -> int:
    """Return the highest smoothed score, (T,), near the timestep with the largest share of resamples near it, (T,)."""
    largest = smoothed.masked_fill(shares < shares.max(), -torch.inf).argmax()
    return int(smoothed.masked_fill(~near[largest], -torch.inf).argmax())


def _smoothing_kernel(log_snr: Tensor) -> Tensor:
    """Return how much each timestep's score counts at each timestep, (T, T), of log-SNRs, (T,); rows add up to 1."""
    weights = torch.exp2(-((log_snr[:, None] - log_snr) / SMOOTHING_WIDTH).square())
    return weights / weights.sum(1, keepdim=True)
