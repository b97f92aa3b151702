"""What trackers of experiments are given of a selection: TensorBoard and trackio, where Trainer reports to them."""

import importlib
import logging
import os
import tempfile
from typing import Any

from PIL import Image
from transformers import TrainerState, TrainingArguments

from ..selection.record import TimestepSelection

logger = logging.getLogger(__name__)


def report_selection(
    args: TrainingArguments, state: TrainerState, facts: dict[str, float], selection: TimestepSelection
) -> None:
    """Write a selection to the trackers that Trainer reports to.

    Args:
        args: Trainer's arguments, with the trackers' names.
        state: Trainer's state.
        facts: Figures of the selection, by name.
        selection: The selection.
    """
    trackers = args.report_to or ()
    if "tensorboard" in trackers:
        _write_tensorboard(args, state, facts, selection)
    if "trackio" in trackers:
        _write_trackio(state, facts, selection)


def _write_tensorboard(
    args: TrainingArguments, state: TrainerState, facts: dict[str, float], selection: TimestepSelection
) -> None:
    """Write a selection beside what Trainer writes: a curve over the timestep, and the figures."""
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        # Trainer takes either.
        tensorboard = importlib.import_module("tensorboardX")

    # As Trainer reads it.
    given = os.getenv("TENSORBOARD_LOGGING_DIR")
    folder = os.path.expanduser(given) if given else os.path.join(str(args.output_dir), "runs", "aselect")
    with tensorboard.SummaryWriter(log_dir=folder) as writer:
        for name, value in facts.items():
            writer.add_scalar(name, value, state.global_step)
        for timestep, score in zip(selection.timesteps, selection.scores, strict=True):
            writer.add_scalar(f"aselect/curve at step {state.global_step}", score, timestep)


def _write_trackio(state: TrainerState, facts: dict[str, float], selection: TimestepSelection) -> None:
    """Write a selection into the run that Trainer began: the figures, and the curve as an image."""
    # Only now: few have it.
    import trackio

    # Beside each of Trainer's own figures, too: what one is drawn over.
    logged: dict[str, Any] = {**facts, "train/global_step": state.global_step}
    with tempfile.TemporaryDirectory() as folder:
        try:
            (path, *_) = selection.plot(os.path.join(folder, "timestep_curve.png"))
        except ImportError:
            logger.warning("Without matplotlib, trackio gets no curve of the choice.")
        else:
            with Image.open(path) as curve:
                curve.load()
            logged["aselect/curve"] = trackio.Image(curve)
    trackio.log(logged)
