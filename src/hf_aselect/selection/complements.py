"""Timesteps that complement each other: each further one is that with which the set predicts most together."""

from collections.abc import Callable, Sequence

from .curve import NEAR

# Scores that differ by less are equal: sums over other numbers of processes differ by less.
ROUNDED_TO = 6  # decimals


def complements(
    first: int,
    count: int,
    log_snr: dict[int, float],
    scores_of: Callable[[Sequence[list[int]]], list[float]],
) -> tuple[list[int], list[float]]:
    """Return timesteps selected one after the other, and the score of the set with each.

    A timestep that lies within 1.5 in log-SNR of a selected one shows the same, and what it seems to add is noise: it
    is a candidate only where no other is left. Ties go to the smaller timestep.

    Args:
        first: The timestep that is selected already.
        count: How many to select beside it, at most as many as there are.
        log_snr: The log-SNR of each timestep that may be selected.
        scores_of: Returns the score of each of some sets of timesteps; the largest wins.
    """
    selected: list[int] = [first]
    scores: list[float] = []
    for _ in range(count):
        left = [timestep for timestep in sorted(log_snr) if timestep not in selected]
        apart = [t for t in left if all(abs(log_snr[t] - log_snr[other]) > NEAR for other in selected)]
        candidates = apart or left
        found = scores_of([[*selected, timestep] for timestep in candidates])
        best = max(range(len(candidates)), key=lambda place: round(found[place], ROUNDED_TO))
        selected.append(candidates[best])
        scores.append(found[best])
    return selected[1:], scores
