r"""Train a segmenter on a diffusion transformer with the plain `Trainer`, on any `datasets` source with masks.

    python examples/semantic_segmentation/train_semantic_segmentation.py \
        --model_name_or_path path/to/a/dit --timestep auto --decoder upernet \
        --train_file camvid/train.parquet --validation_file camvid/test.parquet \
        --class_names sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist \
        --semantic_loss_ignore_index 11 --image_size 128 \
        --output_dir street-segmenter --num_train_epochs 30 --learning_rate 1e-3

`--output_dir` ends with `config.json`, `model.safetensors`, `preprocessor_config.json`, the card, `README.md`, and
`overlays.png`: images, masks, predictions and the classes' colours. Every field of `ASelectConfig` is an option
(`--timestep`, `--block`, `--decoder`, ...), and so is every one of `TrainingArguments`. Training images are cropped
at random and mirrored, mask and image alike; evaluation sees whole images, squeezed into the model's size, and
counts pixels there.
"""

import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_aselect import ASelectCallback, ASelectImageProcessor, DiTForSemanticSegmentation, MeanIoU
from hf_aselect.plots import plot_overlays
from hf_aselect.training.config_arguments import ConfigArguments, given_fields, needs_images
from hf_aselect.training.splits import read_splits, train_and_validation
from hf_aselect.training.views import cropped_and_flipped


@dataclass
class DataArguments:
    """What to train on, and how training images are changed."""

    model_name_or_path: str = field(
        metadata={"help": ("hf_aselect checkpoint, or a diffusers checkpoint: folder or Hub id.")}
    )
    class_names: str = field(metadata={"help": "Comma-separated class names, in the order of their indices."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, or a local folder of one."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and masks."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet file of the evaluation split."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    annotation_column: str = field(default="annotation", metadata={"help": "Column with the masks."})
    num_calibration_images: int = field(
        default=256, metadata={"help": ("Training images for selecting the timestep and standardizing.")}
    )
    min_crop: float = field(default=0.5, metadata={"help": "Minimum side of a random crop, as a share of the whole."})
    num_overlays: int = field(default=4, metadata={"help": "Number of images in overlays.png."})


def load_splits(args: DataArguments, seed: int) -> DatasetDict:
    """Return the `train` and `validation` splits: `test` stands in for `validation`, else a tenth of train does."""
    if (args.dataset_name is None) == (args.train_file is None):
        raise ValueError("Pass exactly one of --dataset_name and --train_file.")
    splits = read_splits(
        dataset_name=args.dataset_name,
        train_file=args.train_file,
        validation_file=args.validation_file,
        columns=(args.image_column, args.annotation_column),
    )
    return DatasetDict(zip(("train", "validation"), train_and_validation(splits, seed), strict=True))


def prepare(split: Dataset, processor: ASelectImageProcessor, args: DataArguments, augment: bool) -> Dataset:
    """Return the split with `pixel_values` and `labels`, made when a row is read."""

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images, masks = batch[args.image_column], batch[args.annotation_column]
        if augment:
            # By torch's random numbers, which are each worker's own.
            numbers = random.Random(int(torch.randint(2**62, ())))
            pairs = [
                cropped_and_flipped(pair, numbers.uniform(args.min_crop, 1), numbers)
                for pair in zip(images, masks, strict=True)
            ]
            images, masks = map(list, zip(*pairs, strict=True))
        return dict(processor(images, masks, do_center_crop=augment, return_tensors="pt"))

    return split.with_transform(transform)


@torch.no_grad()
def draw_overlays(model: DiTForSemanticSegmentation, split: Dataset, names: list[str], path: Path, count: int) -> None:
    """Draw images, their masks and what the model says, with a legend of the classes."""
    model.eval()
    rows = [split[index] for index in range(min(count, len(split)))]
    pixels = [row["pixel_values"] for row in rows]
    guesses = [model(each[None].to(model.device)).logits[0].argmax(0).cpu().numpy() for each in pixels]
    images = [((each + 1) / 2).movedim(0, -1).squeeze(-1).numpy() for each in pixels]
    plot_overlays(path, images, [row["labels"].numpy() for row in rows], guesses, names)


def main() -> None:
    parser = HfArgumentParser((DataArguments, ConfigArguments, TrainingArguments))
    args, config_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    set_seed(training_args.seed)
    training_args.remove_unused_columns = False  # the transform needs the image's column
    training_args.batch_eval_metrics = True  # masks are counted batch by batch, and not kept
    splits = load_splits(args, training_args.seed)
    names = [name.strip() for name in args.class_names.split(",")]

    given = given_fields(config_args)
    calibration = splits["train"].shuffle(training_args.seed)
    calibration = calibration[: args.num_calibration_images][args.image_column]
    model = DiTForSemanticSegmentation.from_pretrained(
        args.model_name_or_path,
        calibration_images=calibration if needs_images(args.model_name_or_path, given) else None,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **given,
    )
    # Whoever segments an image with the model wants all of it, as it is evaluated here.
    processor = ASelectImageProcessor.from_model_config(model.config, do_center_crop=False, do_exif_transpose=False)
    metric = MeanIoU(num_labels=len(names), ignore_index=model.config.semantic_loss_ignore_index)

    def compute_metrics(prediction: EvalPrediction, compute_result: bool) -> dict[str, Any]:
        metric.add_batch(predictions=prediction.predictions.cpu(), references=prediction.label_ids.cpu())
        if not compute_result:
            return {}
        figures = metric.compute()
        for name, iou in zip(names, figures.pop("per_category_iou"), strict=True):
            figures[f"iou_{name}"] = iou
        absent = [names[index] for index in figures.pop("absent_classes")]
        figures.pop("per_category_accuracy")
        return {**figures, "absent_classes": ", ".join(absent)}

    validation = prepare(splits["validation"], processor, args, augment=False)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=prepare(splits["train"], processor, args, augment=True),
        eval_dataset=validation,
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=compute_metrics,
        # Logits of all pixels are K times the masks: only the masks are gathered.
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1),
        callbacks=[ASelectCallback(dataset=args.dataset_name)],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        draw_overlays(model, validation, names, Path(training_args.output_dir) / "overlays.png", args.num_overlays)
    # A process that ends with its group open may be aborted by torch, and the launcher calls the training failed.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
