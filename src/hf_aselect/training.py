"""What `transformers.Trainer` is given for our models: a callback that writes the model card."""

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .model_card import CardFacts, write_card
from .modeling_aselect import ASelectPreTrainedModel
from .selection_record import TimestepSelection

CURVE = "timestep_curve.png"


class ASelectCallback(TrainerCallback):
    """Writes the model card and the curve of the timestep's choice into the output folder.

    They are written after each evaluation, with its accuracy or mean IoU, and at the end of training, by the main
    process only.

    Args:
        dataset: Name of the dataset, for the card; left out of it if None.
        base_model: Where the DiT comes from, for the card. Default: the id on the Hub that it was loaded from, if any.
        license: Licence of the trained model, for the card. Default: that of the weights, where it is known.
    """

    def __init__(self, dataset: str | None = None, base_model: str | None = None, license: str | None = None) -> None:
        self.dataset = dataset
        self.base_model = base_model
        self.license = license
        self.metrics_by_step: dict[int, dict[str, float]] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Write card and curve with the newest figure; evaluations of other sets than Trainer's own do not count."""
        metrics = kwargs.get("metrics") or {}
        if any(name.startswith("eval_") for name in metrics):
            self.metrics_by_step[state.global_step] = metrics
        self._write(args, state, kwargs["model"], state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Write card and curve: of the best step where its weights are loaded at the end, else of the last."""
        best = state.best_global_step if args.load_best_model_at_end else None
        self._write(args, state, kwargs["model"], best or state.global_step)

    def _write(self, args: TrainingArguments, state: TrainerState, model: ASelectPreTrainedModel, step: int) -> None:
        if not state.is_world_process_zero:
            return
        training = {
            "epochs": args.num_train_epochs,
            "steps": step,
            "batch size": args.train_batch_size,
            "learning rate": args.learning_rate,
            "seed": args.seed,
        }
        write_model_card(
            model,
            str(args.output_dir),
            accuracy=self.metrics_by_step.get(step, {}).get("eval_accuracy"),
            mean_iou=self.metrics_by_step.get(step, {}).get("eval_mean_iou"),
            dataset=self.dataset,
            base_model=self.base_model,
            license=self.license,
            training=training if step else None,
        )


def write_model_card(model: ASelectPreTrainedModel, folder: str | os.PathLike[str], **facts: Any) -> None:  # noqa: ANN401
    """Write a model's card (README.md) into a folder, with the curve of its timestep's choice where it was chosen.

    Args:
        model: The model; its configuration tells timestep, tap and selection.
        folder: Folder for the files; made if it is missing.
        facts: Fields of `CardFacts` that the configuration does not tell.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    known: dict[str, Any] = {
        "model_name": folder.resolve().name,
        "task": model.task,
        "timestep": None if config.timestep == "auto" else config.timestep,
        "block": config.block_index(),
        "feature": config.feature,
        "base_model": config.base_model,
        "folded": config.folded or None,
        # By definition: that embedding is of no others' weights.
        "license": "cc-by-nc-4.0" if config.timestep_embedding == "original" else None,
    }
    record = TimestepSelection.from_dict(config.selection) if config.selection else None
    # After a timestep set by hand the record tells of another one.
    if record is not None and record.is_of(config):
        record.plot(folder / CURVE)
        known |= {
            "criterion": record.criterion,
            "log_snr": record.log_snr[record.timesteps.index(record.timestep)],
            "num_images": record.num_images,
            "seconds": record.seconds,
            "confidence": record.confidence,
            "figure": CURVE,
        }
    given = {name: value for name, value in facts.items() if value is not None}
    write_card(CardFacts(**{**known, **given}), folder)
