"""What `transformers.Trainer` is given for our models: a callback that selects the timestep and writes the card."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub.push import write_model_card
from ..images.rows import is_stream
from ..model.configuration_aselect import write_code
from ..model.layouts import plain
from ..model.modeling_aselect import ASelectPreTrainedModel
from ..selection.apply import apply_selection
from ..selection.distribution import unwrapped
from ..selection.record import TimestepSelection
from ..selection.select import select_timestep
from .kept_card import keep_card
from .trackers import report_selection
from .training_rows import first_rows, label_of

# Of a selection, in the trainer's history.
RECORD = "aselect/selection"


class ASelectCallback(TrainerCallback):
    """Selects the timestep where none is selected, and writes the model card and the curve into the output folder.

    A model whose timestep is still "auto" when training begins reads it off training images, once, the same in all
    processes: the first ones of a stream, some from all over a set of known size, which may be sorted.
    `from_pretrained` selects at once; `model.config.timestep = "auto"` leaves the selection to the callback. While the
    backbone is fine-tuned the selection can be looked at again: how far it goes from the timestep of the beginning
    is the drift. Choices, also one that was made before, go to the trainer's history and to all trackers that it
    reports to. Card and curve are written after each evaluation, with its accuracy or mean IoU (of each set, where
    there are several), and at the end of training, by the main process only.

    Args:
        dataset: Name of the dataset, for the card; left out of it if None.
        base_model: Where the DiT comes from, for the card. Default: the id on the Hub that it was loaded from, if any.
        license: Licence of the trained model, for the card. Default: that of the weights, where it is known.
        max_images: Look at no more training images than this.
        criterion: As in `select_timestep`; "probe" reads the labels, too.
        reselect_epochs: Select again every N epochs while the backbone is trained; None: never.
        follow: Whether the model is read at the new choice from then on; else it is only reported.
        options: Further arguments of `select_timestep`, by name. `num_train_images` is the number of training images,
            unless it is given, they are a stream, or the model is a segmenter.

    Raises:
        ValueError: If a number is out of range; on training, if the timestep is to be selected and there are no pixel
            values in the rows, or, while the backbone is trained, another tap is to be selected, `reselect_epochs` is
            given with a stream, or a model is to follow a selection of another number of timesteps than it reads.

    Example:
        >>> import torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from hf_aselect import ASelectCallback, DiTForImageClassification
        >>> folder = "src/hf_aselect/assets/fashion_mnist"
        >>> model = DiTForImageClassification.from_pretrained(folder, timestep=0, head="linear", num_labels=2)
        >>> model.config.timestep = "auto"
        >>> train = [{"pixel_values": torch.rand(1, 28, 28), "labels": i % 2} for i in range(8)]
        >>> callback = ASelectCallback(max_images=8, timesteps=[19, 900], dataset="my images")
        >>> args = TrainingArguments("run", max_steps=1, report_to="none")
        >>> trainer = Trainer(model, args, train_dataset=train, callbacks=[callback])
        >>> callback in trainer.callback_handler.callbacks  # `trainer.train()` selects the timestep first
        True
    """

    def __init__(
        self,
        dataset: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
        *,
        max_images: int = 256,
        criterion: Any = "consensus",
        reselect_epochs: int | None = None,
        follow: bool = False,
        **options: Any,
    ) -> None:
        max_images, reselect_epochs = plain(max_images), plain(reselect_epochs)
        for name, value in (("max_images", max_images), ("reselect_epochs", reselect_epochs)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        self.dataset = dataset
        self.base_model = base_model
        self.license = license
        self.max_images = max_images
        self.criterion = criterion
        self.reselect_epochs = reselect_epochs
        self.follow = follow
        self.options = options
        self.metrics_by_step: dict[int, dict[str, float]] = {}
        self.selections: list[tuple[float, TimestepSelection]] = []  # epoch, choice
        self.first_timestep: int | None = None  # what drift is counted from
        self.final_step: int | None = None  # whose weights the model has once the training is over

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Select the timestep if none is selected; a resumed training keeps its selection and its metrics."""
        model, dataloader = unwrapped(kwargs["model"]), kwargs["train_dataloader"]
        if args.push_to_hub and model.include_code is None:
            # `Trainer` pushes files that it copies from its checkpoints.
            model.include_code = True
        self._check_reselection(model, dataloader)
        self._read_history(state)
        if self.selections and (model.config.timestep == "auto" or self.follow):
            # A resumed training: its selection was made on the weights that it started from.
            apply_selection(model, self.selections[-1 if self.follow else 0][1], are_statistics_kept=True)
        if model.config.timestep == "auto":
            selection = self._select(model, dataloader)
            model.apply_selection(selection)
            self._report(args, state, control, selection)
        elif self.first_timestep is None:
            self.first_timestep = model.config.resolved_timestep()
            # `from_pretrained` selected.
            if model.config.selection and model.config.is_selection_in_use():
                self._report(args, state, control, TimestepSelection.from_dict(model.config.selection))
        # A checkpoint of an epoch's last step is written before the epoch's end.
        if self._is_due(model, state) and round(state.epoch or 0) not in [round(each) for each, _ in self.selections]:
            self._select_again(args, state, control, model, dataloader)

    def _take_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the figures of a step; of a dictionary of evaluation sets each comes alone, with its name in theirs."""
        if any(name.startswith("eval_") for name in metrics):
            self.metrics_by_step[step] = {**self.metrics_by_step.get(step, {}), **metrics}

    def _read_history(self, state: TrainerState) -> None:
        """Read the metrics and selections of a resumed training from the trainer's history."""
        self.metrics_by_step = {}
        for row in state.log_history:
            self._take_metrics(int(row["step"]), row)
        history: list[dict[str, Any]] = [row for row in state.log_history if RECORD in row]
        self.selections = [(row["epoch"], TimestepSelection.from_dict(row[RECORD])) for row in history]
        self.first_timestep, self.final_step = None, None
        if history:
            self.first_timestep = history[0]["aselect/timestep"] - history[0]["aselect/drift"]

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Select again, where that was asked for and the backbone is trained."""
        model = unwrapped(kwargs["model"])
        if self._is_due(model, state):
            self._select_again(args, state, control, model, kwargs["train_dataloader"])

    def _is_due(self, model: ASelectPreTrainedModel, state: TrainerState) -> bool:
        """Return whether it is the end of an epoch after which to select again."""
        if self.reselect_epochs is None or model.config.freeze_backbone:
            return False
        epoch = round(state.epoch or 0)
        is_whole = epoch > 0 and abs((state.epoch or 0) - epoch) < 1e-3
        return is_whole and epoch % self.reselect_epochs == 0

    def _select_again(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: ASelectPreTrainedModel,
        dataloader: Any,
    ) -> None:
        selection = self._select(model, dataloader)
        if self.follow:
            model.apply_selection(selection)
        self._report(args, state, control, selection)

    def _check_reselection(self, model: ASelectPreTrainedModel, dataloader: Any) -> None:
        """Reject what cannot be done while the backbone is trained."""
        if model.config.freeze_backbone:
            return
        follows = self.reselect_epochs is not None and self.follow
        count = self.options.get("num_timesteps") or model.config.num_timesteps
        if follows and model.config.timestep != "auto" and len(model.config.timesteps()) != count:
            raise ValueError(
                f"`follow=True` moves the model to {count} timestep{'s' * (count > 1)} selected again, but its head "
                f"was built for {model.config.timestep}. Omit `follow` to report the selection only."
            )
        if self.options.keys() & {"block", "feature"} and (model.config.timestep == "auto" or follows):
            raise ValueError(
                "No other tap can be selected while the backbone is trained, because the optimizer already holds "
                "the weights up to the configured tap. Select it before training (`select_timestep` and "
                "`apply_selection`)."
            )
        if self.reselect_epochs is not None and is_stream(dataloader.dataset):
            raise ValueError(
                "`reselect_epochs` counts passes over a training set of known size, and a stream has none. Omit it, "
                "or train on a dataset that is not streamed."
            )

    def _select(self, model: ASelectPreTrainedModel, dataloader: Any) -> TimestepSelection:
        """Return the selection on training images; no random state is touched."""
        needs_labels = getattr(self.criterion, "name", self.criterion) in ("probe", "patch_probe")
        rows = first_rows(dataloader.dataset, self.max_images)
        if not rows or "pixel_values" not in rows[0]:
            raise ValueError(
                "The timestep is still 'auto', but the training set has no `pixel_values` to select it on, only "
                f"{', '.join(rows[0]) if rows else 'no rows'}. Select it before training (`select_timestep`)."
            )
        pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
        given: dict[str, Any] = {"criterion": self.criterion, "max_images": self.max_images, **self.options}
        # A mask labels each patch of an image.
        if hasattr(dataloader.dataset, "__len__") and not hasattr(unwrapped(model), "decoder"):
            given.setdefault("num_train_images", len(dataloader.dataset))
        if needs_labels:
            given["labels"] = [label_of(row) for row in rows]
        return select_timestep(model, {"pixel_values": pixels}, **given)

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, selection: TimestepSelection
    ) -> None:
        """Write a selection to the trainer's history, and to the trackers that it reports to."""
        epoch = round(state.epoch or 0.0, 4)
        self.selections.append((epoch, selection))
        if self.first_timestep is None:
            self.first_timestep = selection.timestep
        facts = {
            "aselect/timestep": selection.timestep,
            "aselect/confidence": selection.confidence,
            "aselect/drift": selection.timestep - self.first_timestep,
        }
        history: list[dict[str, Any]] = state.log_history
        history.append({**facts, RECORD: selection.to_dict(), "epoch": epoch, "step": state.global_step})
        if state.is_world_process_zero:
            report_selection(args, state, control, facts, selection)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write card and curve with the newest figures; evaluations of other sets than Trainer's own do not count."""
        step = state.global_step if self.final_step is None else self.final_step
        self._take_metrics(step, kwargs.get("metrics") or {})
        self._write_card(args, state, kwargs["model"], step)

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Put the model's code beside it, and keep the card.

        Out of a checkpoint `Trainer` copies weights and configuration, and not the code that the configuration names;
        the card it pushes as it is. Any other push starts by replacing the card with Trainer's draft.
        """
        if not state.is_world_process_zero:
            return
        trained, folder = kwargs["model"], Path(str(args.output_dir))
        _write_code(trained, folder)
        # A checkpoint at the end of a process's time is not announced.
        is_of_checkpoint = control.should_save or (args.enable_jit_checkpoint and self.final_step is None)
        if not is_of_checkpoint:
            keep_card(unwrapped(trained, keep_adapters=True), folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write card and curve: of the best step where its weights are loaded at the end, else of the last."""
        best = state.best_global_step if args.load_best_model_at_end else None
        self.final_step = best or state.global_step
        self._write_card(args, state, kwargs["model"], self.final_step)

    def _write_card(self, args: TrainingArguments, state: TrainerState, trained: Any, step: int) -> None:
        """Write card and curve of the weights of a step, by the main process only."""
        if not state.is_world_process_zero:
            return
        model, metrics = unwrapped(trained), self.metrics_by_step.get(step, {})
        model.card_facts = dict(
            accuracy=metrics.get("eval_accuracy"),
            mean_iou=metrics.get("eval_mean_iou"),
            by_set=_by_set(metrics, "mean_iou" if type(model).task == "image-segmentation" else "accuracy"),
            dataset=self.dataset,
            base_model=self.base_model,
            license=self.license,
            training=_facts_of_training(args, state, step, self.selections) if step else None,
        )
        name = args.hub_model_id if args.push_to_hub else None
        where = {"repo_id": name, "model_name": name.rpartition("/")[2]} if name and "/" in name else {}
        write_model_card(unwrapped(trained, keep_adapters=True), str(args.output_dir), **{**model.card_facts, **where})
        # The card says that it is there, and `save_model` writes it again where it is.
        _write_code(trained, Path(str(args.output_dir)))


def _by_set(metrics: dict[str, Any], metric: str) -> dict[str, float] | None:
    """Return a metric of each of Trainer's evaluation sets, by the set's name; None where there is but one set."""
    # Of each set Trainer says how long it took, whatever else is measured.
    names = [name[len("eval_") : -len("_runtime")] for name in metrics if re.fullmatch(r"eval_.+_runtime", name)]
    return {name: metrics[f"eval_{name}_{metric}"] for name in names if f"eval_{name}_{metric}" in metrics} or None


def _write_code(trained: Any, folder: Path) -> None:
    """Write the code of a model into a folder; an adapter of peft's has none."""
    if unwrapped(trained, keep_adapters=True) is trained and trained._auto_class is not None:
        write_code(Path(inspect.getfile(type(trained))).parent, folder)


def _facts_of_training(
    args: TrainingArguments, state: TrainerState, step: int, selections: list[tuple[float, TimestepSelection]]
) -> dict[str, object]:
    """Return the rows of the card's table on the training."""
    facts: dict[str, object] = {
        "epochs": round(state.epoch or 0, 2),
        "steps": step,
        "batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "seed": args.seed,
    }
    if len(selections) > 1:
        timesteps = [f"{epoch:g}: {selection.timestep}" for epoch, selection in selections]
        facts["timestep selected at epoch"] = ", ".join(timesteps)
    return facts
