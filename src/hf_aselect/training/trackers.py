"""What trackers of experiments are given of a selection: all its figures, TensorBoard and trackio its curve, too."""

import copy
import importlib
import inspect
import logging
import os
import tempfile
from typing import Any

from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..selection.record import TimestepSelection

logger = logging.getLogger(__name__)


def report_selection(
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    facts: dict[str, float],
    selection: TimestepSelection,
) -> None:
    """Write a selection to the trackers that Trainer reports to.

    Args:
        args: Trainer's arguments, with the trackers' names.
        state: Trainer's state.
        control: Trainer's control; it stays as it is.
        facts: Figures of the selection, by name.
        selection: The selection.
    """
    handler = _calling_handler()
    if handler is not None:
        # As Trainer hands its own figures to W&B, MLflow and whoever else listens; that unsets `should_log`.
        handler.on_log(args, state, copy.copy(control), dict(facts))
    trackers = args.report_to or ()
    if "tensorboard" in trackers:
        _write_tensorboard(args, state, facts, selection)
    if "trackio" in trackers:
        _write_trackio(state, facts, selection)


def _calling_handler() -> CallbackHandler | None:
    """Return what calls Trainer's callbacks, among them ours, just now; Trainer gives a callback no way to log."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


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
            logger.warning("The curve of the selection is not sent to trackio, because matplotlib is not installed.")
        else:
            with Image.open(path) as curve:
                curve.load()
            logged["aselect/curve"] = trackio.Image(curve)
    trackio.log(logged)
