r"""Train a classifier on a diffusion transformer with the plain `Trainer`, on any `datasets` source.

On the images that ship in the package, from a checkout of the repository (a minute or two on two CPU cores):

    python examples/image_classification/train_image_classification.py \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist --timestep auto \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --validation_file src/hf_aselect/assets/fashion_mnist/test.parquet \
        --head_hidden_size 128 --head_num_attention_heads 4 --resample_noise_in_training True \
        --output_dir fashion-classifier --num_train_epochs 5 --learning_rate 1e-3 --per_device_train_batch_size 64

`--recipe` names a set of arguments, each of which can still be given (`RECIPES` below has their values):

- `attention_probe`: the A-SelecT authors': their attention head on frozen features, AdamW with a learning rate of 3e-3
  and a cosine schedule, batches of 8, 28 epochs, random crops and flips; a tenth of the training images, of each
  class alike, tells which epoch is best, and that one is evaluated, on whole images as the saved model sees them
  (theirs on the middle 8/9);
- `linear_probe`: a linear head on frozen features (`linear_probe.py` tries several learning rates at once);
- `fine_tune`: all weights up to the last tap, with a learning rate that falls by a quarter from block to block;
- `lora`: LoRA on query and value of the blocks up to the last tap, and the head; only these are saved (the `peft`
  extra).

`--resume_from_checkpoint latest` goes on from the last whole checkpoint in `--output_dir`, at the timestep that was
selected then: on a CPU the weights that come out are bit for bit those of a training that was not interrupted.

`--streaming True --max_steps N` reads the images as they come, and keeps none: parquet files or WebDataset shards
(`--train_file 'shards/*.tar' --image_column png --label_column cls --class_names dark,bright`). Process 0 reads for
all of them, and fills a last batch that cannot be shared evenly with images of the first;
`--accelerator_config '{"dispatch_batches": false}'` lets each read files of its own, of which there must be as many as
processes (for evaluation process 0 reads all the same). A resumed stream is read again up to where it stopped; in
its first epoch the weights that come out are the same, too.

`--output_dir` ends with `config.json`, `model.safetensors`, `preprocessor_config.json`, the card, `README.md`, and
`confusion_matrix.png`, with the accuracy of each class.
Every field of `ASelectConfig` is an option (`--timestep`, `--block`, `--feature`, `--head`, ...), and so is every one
of `TrainingArguments`. Of timestep, block and feature there may be several, which are read side by side:
`--timestep 19 61 166 --block all --feature hidden`.
"""

import json
import logging
import os
import random
import re
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from hf_aselect import (
    Accuracy,
    ASelectCallback,
    ASelectImageProcessor,
    DiTForImageClassification,
    plot_confusion_matrix,
)
from hf_aselect.training.config_arguments import (
    ConfigArguments,
    given_fields,
    needs_images,
    resumed_fields,
    write_config,
)
from hf_aselect.training.splits import read_splits, train_and_validation
from hf_aselect.training.views import cropped_and_flipped


@dataclass
class DataArguments:
    """What to train on, and which images the timestep is selected from."""

    model_name_or_path: str = field(metadata={"help": "hf_aselect checkpoint, or a folder saved by diffusers."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, or a local folder of one."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one subfolder of images per class."})
    train_file: str | None = field(
        default=None, metadata={"help": "Parquet file with images and labels, or WebDataset shards (`*.tar`)."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for the validation split."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the class indices or names."})
    class_names: str | None = field(
        default=None, metadata={"help": "Comma-separated class names, for data without them."}
    )
    streaming: bool = field(default=False, metadata={"help": "Stream the images, without keeping any."})
    num_calibration_images: int = field(
        default=256, metadata={"help": ("Training images for selecting the timestep and standardizing.")}
    )
    recipe: str | None = field(default=None, metadata={"help": "A named set of arguments, see above."})
    crop_share: float = field(
        default=1.0,
        metadata={"help": "Train on random crops of this share of each side, and flips; evaluate on whole images."},
    )
    held_out_share: float = field(
        default=0.0,
        metadata={
            "help": "Hold out this share of the training images, stratified by class, to evaluate epochs on; the "
            "evaluation split is then used once, at the end."
        },
    )
    layer_decay: float = field(default=1.0, metadata={"help": "Layer-wise learning-rate decay, per block."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA on query and value, or 0 for no LoRA."})
    reselect_epochs: int | None = field(
        default=None,
        metadata={"help": "Select the timestep again every N epochs of fine-tuning, and report the drift."},
    )


FROZEN = {"weight_decay": 0.01, "lr_scheduler_type": "cosine", "num_train_epochs": 28, "freeze_backbone": True}
TRAINED = {"freeze_backbone": False, "crop_share": 8 / 9, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
BEST = {
    "held_out_share": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "save_total_limit": 1,
}
RECIPES: dict[str, dict[str, Any]] = {
    # The paper's (arXiv 2603.25758), as its authors' code has it: resized to 576 pixels, cropped to 512. To evaluate
    # they cut out the middle, too.
    "attention_probe": {
        **FROZEN,
        **BEST,
        "head": "attention",
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "per_device_train_batch_size": 8,
        "crop_share": 8 / 9,
    },
    "linear_probe": {**FROZEN, "head": "linear", "learning_rate": 1e-3, "per_device_train_batch_size": 64},
    "fine_tune": {
        **TRAINED,
        "learning_rate": 1e-3,
        "layer_decay": 0.75,
        "weight_decay": 0.05,
        "num_train_epochs": 10,
        "per_device_train_batch_size": 32,
    },
    # Adapters train better with larger steps than the weights they stand for.
    "lora": {
        **TRAINED,
        "learning_rate": 1e-3,
        "lora_rank": 8,
        "num_train_epochs": 10,
        "per_device_train_batch_size": 32,
    },
}


def parse(words: list[str]) -> tuple[DataArguments, Any, TrainingArguments]:
    """Return the arguments; those of a recipe take the place of the defaults."""
    # Not abbreviated: `--recip` would be taken below, and is not seen here.
    parser = HfArgumentParser((DataArguments, ConfigArguments, TrainingArguments), allow_abbrev=False)
    found = re.findall(r"--recipe[= ](\S+)", " ".join(words))
    if found and found[-1] not in RECIPES:
        parser.error(f"--recipe must be one of {', '.join(RECIPES)}, got {found[-1]!r}.")
    parser.set_defaults(**(RECIPES[found[-1]] if found else {}))
    args: tuple[DataArguments, Any, TrainingArguments] = parser.parse_args_into_dataclasses(words)
    data, _, training = args
    if not 0 < data.layer_decay <= 1:
        parser.error(f"--layer_decay must be in (0, 1], got {data.layer_decay}.")
    if not 0 < data.crop_share <= 1:
        parser.error(f"--crop_share must be in (0, 1], got {data.crop_share}.")
    if not 0 <= data.held_out_share < 1:
        parser.error(f"--held_out_share must be in [0, 1), got {data.held_out_share}.")
    if data.held_out_share and training.eval_strategy == "no":
        parser.error("--held_out_share holds out images that are not used: pass --eval_strategy epoch, or 0.")
    return args


def streams(splits: IterableDatasetDict, args: DataArguments) -> IterableDatasetDict:
    """Return the `train` and `validation` streams, once they tell their classes."""
    held_out = splits.get("validation", splits.get("test"))
    if held_out is None:
        raise ValueError("A stream cannot be split: pass --validation_file, or a dataset with a validation split.")
    if not isinstance((splits["train"].features or {}).get(args.label_column), ClassLabel):
        raise ValueError(f"The stream does not name the classes of {args.label_column!r}: pass --class_names.")
    names = [(split.features or {})[args.label_column].names for split in (splits["train"], held_out)]
    if names[0] != names[1]:
        raise ValueError(
            f"The streams have different class names, {names[0][:5]} and {names[1][:5]}: pass --class_names."
        )
    return IterableDatasetDict(train=splits["train"], validation=held_out)


def load_splits(args: DataArguments, seed: int) -> DatasetDict | IterableDatasetDict:
    """Return the `train` and `validation` splits: `test` stands in for `validation`, else a tenth of train does."""
    splits = read_splits(
        dataset_name=args.dataset_name,
        train_dir=args.train_dir,
        train_file=args.train_file,
        validation_file=args.validation_file,
        columns=(args.image_column, args.label_column),
        streaming=args.streaming,
    )
    if args.class_names:
        classes = ClassLabel(names=args.class_names.split(","))
        splits = type(splits)({name: split.cast_column(args.label_column, classes) for name, split in splits.items()})
    if args.streaming:
        if args.held_out_share:
            raise ValueError(
                "A stream cannot be split: pass `--held_out_share 0 --load_best_model_at_end False` to keep the "
                "last weights; without the latter, the evaluation split selects the best."
            )
        return streams(splits, args)
    both = train_and_validation(splits, seed, args.label_column)
    return DatasetDict(zip(("train", "validation"), both, strict=True))


def divided(train: Dataset, args: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Return what is trained on of the training split, and the share that tells which epoch is best."""
    try:
        parts = train.train_test_split(args.held_out_share, seed=seed, stratify_by_column=args.label_column)
    except ValueError as error:
        raise ValueError(
            f"A share of {args.held_out_share} of {len(train)} training images cannot contain each class: pass "
            f"another --held_out_share, or 0 to evaluate epochs on the evaluation split. ({error})"
        ) from error
    return parts["train"], parts["test"]


class Pictures(torch.utils.data.Dataset):
    """A split as `pixel_values` and `labels`, made when a row is read.

    What is random depends on the seed, the epoch and the image alone: a resumed training sees the same crops.

    Args:
        split: Rows with an image and a class index.
        processor: What makes pixel values of images.
        args: Names of the columns, and how much is cropped.
        seed: Seed of the crops; None for whole images, as the saved model sees them.
    """

    def __init__(
        self, split: Dataset, processor: ASelectImageProcessor, args: DataArguments, seed: int | None = None
    ) -> None:
        self.split, self.processor, self.args, self.seed = split, processor, args, seed
        # Shared, as workers that persist keep what they were given in the first epoch.
        self.shared_epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """Which epoch the crops are of."""
        return int(self.shared_epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.shared_epoch.fill_(value)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one image and its label."""
        row = self.split[index]
        image = row[self.args.image_column]
        if self.seed is not None and self.args.crop_share < 1:
            numbers = random.Random(f"{self.seed} {self.epoch} {index}")
            (image,) = cropped_and_flipped([image], self.args.crop_share, numbers)
        pixels = self.processor(image, return_tensors="pt").pixel_values[0]
        return {"pixel_values": pixels, "labels": row[self.args.label_column]}


def as_pixels(
    stream: IterableDataset, processor: ASelectImageProcessor, args: DataArguments, seed: int | None = None
) -> IterableDataset:
    """Return a stream of `pixel_values` and `labels`: shuffled within a buffer and cropped anywhere if seeded."""

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        image = row[args.image_column]
        if seed is not None and args.crop_share < 1:
            # By the place in the shuffled stream, which is another one in another epoch: whoever reads it, and
            # whether it is read again.
            worker = torch.utils.data.get_worker_info()
            numbers = random.Random(f"{seed} {os.environ.get('RANK', 0)} {worker.id if worker else 0} {index}")
            (image,) = cropped_and_flipped([image], args.crop_share, numbers)
        return {
            "pixel_values": processor(image, return_tensors="np").pixel_values[0],
            "labels": row[args.label_column],
        }

    stream = stream.select_columns([args.image_column, args.label_column])
    if seed is not None:
        stream = stream.shuffle(seed, buffer_size=1000)
    columns = [args.image_column, args.label_column]
    return stream.map(prepare, with_indices=True, remove_columns=columns).with_format("torch")


class EpochCallback(TrainerCallback, ExportableState):
    """Tells sampler and images of the epoch: transformers does not, where a training goes on in the middle of one.

    Each checkpoint holds of how many processes it is, by which one is known that some of them had not yet written.
    """

    def state(self) -> dict[str, dict[str, int]]:
        """Return what transformers keeps in a checkpoint."""
        return {"args": {}, "attributes": {"num_processes": num_processes()}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Enter what a checkpoint holds, where the one that is gone on from was written without this callback."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the epoch."""
        loader, epoch = kwargs["train_dataloader"], int((state.epoch or 0) + 1e-6)
        if isinstance(loader.dataset, Pictures):
            loader.dataset.epoch = epoch
        # Under what shares the batches, and skips those that were read before.
        sampler = getattr(loader, "batch_sampler", None)
        while sampler is not None and not hasattr(sampler, "set_epoch"):
            sampler = getattr(sampler, "sampler", None) or getattr(sampler, "batch_sampler", None)
        if sampler is not None:
            sampler.set_epoch(epoch)


def with_lora(model: DiTForImageClassification, rank: int) -> nn.Module:
    """Return the model with adapters; only they and the head are trained, and saved."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=model.lora_targets(), modules_to_save=["classifier"]),
    )


class LayerWiseTrainer(Trainer):
    """A trainer whose learning rate falls from block to block.

    Args:
        layer_decay: Factor from each block to the one before; 1 for Trainer's own optimizer.
    """

    def __init__(self, layer_decay: float, **options: Any) -> None:
        self.layer_decay = layer_decay
        super().__init__(**options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, of what FSDP made of the model where it did."""
        if self.layer_decay < 1 and self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = layer_wise_optimizer(trained, self.args, self.layer_decay)
        return super().create_optimizer(*([] if model is None else [model]))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Return the loader; process 0 reads a stream for all of them, or some rows would be judged twice."""
        if eval_dataset is not None:
            # With persistent workers transformers keeps one loader, and gives it for any other set.
            self.__dict__.pop("_eval_dataloaders", None)
        settings = self.accelerator.dataloader_config
        before, settings.dispatch_batches = settings.dispatch_batches, None
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            settings.dispatch_batches = before
        # A generator of its own: starting a loader draws a number, which a training that goes on at the end of an
        # epoch, after its evaluation, would not draw.
        for each in (loader, getattr(loader, "base_dataloader", loader)):  # what accelerate puts around another
            each.generator = torch.Generator()
        return loader


def layer_wise_optimizer(model: nn.Module, args: TrainingArguments, decay: float) -> torch.optim.Optimizer:
    """Return the optimizer asked for, with a learning rate that falls from block to block.

    Biases and norms have no weight decay.
    """
    denoiser = next(module for name, module in model.named_modules() if name.endswith("denoiser"))
    of_block = {id(value): index for index, block in enumerate(denoiser.blocks) for value in block.parameters()}
    of_denoiser = {id(value) for value in denoiser.parameters()}
    # The head is one step above the last block, what comes before the blocks one below the first.
    places = {
        name: of_block.get(id(value), -1 if id(value) in of_denoiser else None)
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    top = 1 + max((place for place in places.values() if place is not None), default=-1)
    parameters = dict(model.named_parameters())
    groups = []
    for name, place in places.items():
        depth = top if place is None else place
        groups.append(
            {
                "params": [parameters[name]],
                "lr": args.learning_rate * decay ** (top - depth),
                "weight_decay": args.weight_decay if num_axes(parameters[name]) > 1 else 0.0,
            }
        )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer: torch.optim.Optimizer = kind(groups, **options)
    return optimizer


def num_axes(value: nn.Parameter) -> int:
    """Return how many axes a weight has; what DeepSpeed's ZeRO 3 takes apart has one, and is told of its shape."""
    return len(getattr(value, "ds_shape", value.shape))


def num_processes() -> int:
    """Return how many processes train."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def last_checkpoint(folder: str) -> str:
    """Return the last whole checkpoint of a training: one that was being written when it died is passed over.

    Args:
        folder: Its output folder.

    Raises:
        ValueError: If there is none.
    """
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        try:
            # Trainer writes this file last, but does not wait for what other processes write.
            state = json.loads((path / "trainer_state.json").read_text())
            kept = state.get("stateful_callbacks", {}).get("EpochCallback", {}).get("attributes", {})
            num_writers = kept.get("num_processes", num_processes())
            # Of one process the file has another name, and weights alone (`--save_only_model`) have none.
            for rank in range(num_writers if (path / "rng_state_0.pth").exists() else 0):
                (path / f"rng_state_{rank}.pth").stat()
            found[state["global_step"]] = str(path), num_writers
        except (OSError, ValueError, KeyError):
            logging.warning("Skipped %s, which is incomplete.", path)
    if not found:
        raise ValueError(f"There is no complete checkpoint in {folder!r} to resume from.")
    last, num_writers = found[max(found)]
    if num_writers != num_processes():
        logging.warning(
            "%s was written by %d processes, but %d resume: the batches will differ.",
            *(last, num_writers, num_processes()),
        )
    return last


def check_unused(folder: str) -> None:
    """Reject a folder with an earlier training's checkpoints, which would pass for the new one's."""
    try:
        last = last_checkpoint(folder)
    except ValueError:
        return
    raise ValueError(
        f"{folder!r} has checkpoints of an earlier training, the last of them {Path(last).name!r}. Resume it with "
        "`--resume_from_checkpoint latest`, pass another --output_dir, or delete them."
    )


def main() -> None:
    args, config_args, training_args = parse(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    set_seed(training_args.seed)
    splits = load_splits(args, training_args.seed)
    names = splits["train"].features[args.label_column].names
    trained_on, evaluated_on = splits["train"], splits["validation"]
    if args.held_out_share:
        trained_on, evaluated_on = divided(splits["train"], args, training_args.seed)

    given = given_fields(config_args)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint == "latest":
        checkpoint = last_checkpoint(training_args.output_dir)
    if checkpoint:
        logging.info("Resuming from %s.", checkpoint)
        # Of adapters a checkpoint has no configuration.
        given = resumed_fields(given, checkpoint, training_args.output_dir)
    else:
        check_unused(training_args.output_dir)
    calibration = None
    if needs_images(args.model_name_or_path, given):
        sample = islice(trained_on.shuffle(training_args.seed), args.num_calibration_images)
        calibration = [row[args.image_column] for row in sample]
    model = DiTForImageClassification.from_pretrained(
        args.model_name_or_path,
        calibration_images=calibration,
        num_train_images=len(trained_on) if hasattr(trained_on, "__len__") else None,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **given,
    )
    if args.reselect_epochs is not None and model.config.freeze_backbone:
        raise ValueError(
            "--reselect_epochs selects again while the backbone is fine-tuned, but it is frozen: pass --recipe "
            "fine_tune or lora, or --freeze_backbone False."
        )
    processor = ASelectImageProcessor.from_model_config(model.config)

    judged: list[EvalPrediction] = []  # of the last evaluation, for the image

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        judged[:] = [prediction]
        return Accuracy().compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    unwrapped = model
    if args.lora_rank:
        model = with_lora(model, args.lora_rank)
    rows_of = as_pixels if args.streaming else Pictures
    trainer = LayerWiseTrainer(
        args.layer_decay,
        model=model,
        args=training_args,
        train_dataset=rows_of(trained_on, processor, args, seed=training_args.seed),
        eval_dataset=rows_of(evaluated_on, processor, args),
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=compute_metrics,
        callbacks=[
            ASelectCallback(dataset=args.dataset_name, reselect_epochs=args.reselect_epochs),
            EpochCallback(),
        ],
    )
    output = Path(training_args.output_dir)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        # Checkpoints of adapters lack it, and what is saved and pushed of them in the end: timestep, tap and classes.
        write_config(unwrapped.config, output)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_fsdp_enabled:  # whose checkpoints may be shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    # The evaluation split may not have been looked at before: its figure is that of the card, which is pushed below.
    metrics = trainer.evaluate(rows_of(splits["validation"], processor, args))
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        plot_confusion_matrix(
            output / "confusion_matrix.png",
            judged[0].label_ids,
            judged[0].predictions.argmax(-1),
            names,
        )
    trainer.save_model()
    # A process that ends with its group open may be aborted by torch, and the launcher calls the training failed.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
