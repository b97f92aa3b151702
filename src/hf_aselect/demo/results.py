"""The results of a demo: figures, seconds, the curve of the selection, and what its card takes from them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from ..checkpoints.atomic import whole_file
from ..selection.record import TimestepSelection


@dataclass
class Stopwatch:
    """Seconds of each named part of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent in the `with` block to the part `name`."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 1)


def choice_of(selection: TimestepSelection, grid: list[int], probed: list[float]) -> dict[str, Any]:
    """Return what a demo's results say of the selection and of the exhaustive search beside it."""
    return {
        "timestep": selection.timestep,
        "log_snr": selection.log_snr[selection.timesteps.index(selection.timestep)],
        "timesteps": grid,
        "best_timestep": grid[int(np.argmax(probed))],
        "worst_timestep": grid[int(np.argmin(probed))],
    }


def probe_figures(selected: int, grid: list[int], probed: list[float]) -> dict[str, float]:
    """Return the probe's figure at the selected timestep and at those that it is compared with, by name."""
    return {
        "selected": probed[grid.index(selected)],
        "zero": probed[grid.index(0)],
        "random_mean": float(np.mean(probed)),
        "worst": min(probed),
        "best": max(probed),
    }


def probe_baselines(who: str, selected: str, figures: dict[str, float]) -> dict[str, float]:
    """Return the figures of a probe as the baselines of a card.

    Args:
        who: What is probed with, as "linear probe".
        selected: What the selected timestep is called.
        figures: As of `probe_figures`.
    """
    names = {
        "selected": selected,
        "zero": "t = 0",
        "random_mean": "a random t (mean over the grid)",
        "worst": "the worst t",
        "best": "the best t (exhaustive search)",
    }
    return {f"{who} at {where}": figures[name] for name, where in names.items()}


def training_facts(trainer: Trainer, results: dict[str, Any]) -> dict[str, object]:
    """Return the facts of a training that the cards of all demos name last."""
    return {
        "batch size": trainer.args.train_batch_size,
        "learning rate": trainer.args.learning_rate,
        "seed": results["seed"],
    }


def save_curve(
    selection: TimestepSelection, model: Any, timesteps: list[int], probed: list[float], output: Path, **names: str
) -> None:
    """Draw the criterion over the timestep beside the probe's figures, as `timestep_curve.png`."""
    levels = model.noise_schedule.log_snr(torch.tensor(timesteps)).tolist()
    selection.plot(output / "timestep_curve.png", accuracies=probed, accuracy_log_snr=levels, **names)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
