r"""Train a classifier on a diffusion transformer with the plain `Trainer`, on any `datasets` source.

On the pictures that ship in the package, from a checkout of the repository (a minute or two on two CPU cores):

    python examples/train_image_classification.py \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist --timestep auto \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --validation_file src/hf_aselect/assets/fashion_mnist/test.parquet \
        --head_hidden_size 128 --head_num_attention_heads 4 --resample_noise_in_training True \
        --output_dir fashion-classifier --num_train_epochs 5 --learning_rate 1e-3 --per_device_train_batch_size 64

`--output_dir` ends with `config.json`, `model.safetensors`, `preprocessor_config.json` and the card, `README.md`.
Every field of `ASelectConfig` is an option (`--timestep`, `--block`, `--feature`, `--head`, ...), and so is every one
of `TrainingArguments`.
"""

import logging
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_aselect import Accuracy, ASelectCallback, ASelectConfig, ASelectImageProcessor, DiTForImageClassification


@dataclass
class DataArguments:
    """What to train on, and which pictures the timestep is chosen from."""

    model_name_or_path: str = field(metadata={"help": "A checkpoint of ours, or a folder that diffusers saved."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the Hub, or a local folder of it."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one sub-folder of pictures a class."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with pictures and labels."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet file of the validation split."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column with the class indices or names."})
    num_calibration_images: int = field(default=256, metadata={"help": "Training pictures for `--timestep auto`."})


def int_or_word(value: str) -> int | str:
    """Return the integer that a word spells, else the word."""
    return int(value) if value.lstrip("-").isdigit() else value


# Fields of the configuration that are one word on a command line; the rest are records of diffusers and of ours.
OPTIONS = {
    name: int_or_word if kind not in (bool, float) else kind
    for name, kind in ASelectConfig.__annotations__.items()
    if not name.startswith("_")
    and name not in ("transformer", "vae", "scheduler", "selection", "model_type", "prompt_shapes")
}
ConfigArguments = make_dataclass(
    "ConfigArguments",
    [
        (name, kind, field(default=None, metadata={"help": "Field of ASelectConfig."}))
        for name, kind in OPTIONS.items()
    ],
)


def load_splits(args: DataArguments, seed: int) -> DatasetDict:
    """Return the `train` and `validation` splits: `test` stands in for `validation`, else a tenth of train does."""
    sources = [args.dataset_name, args.train_dir, args.train_file]
    if sum(source is not None for source in sources) != 1:
        raise ValueError("Give exactly one of --dataset_name, --train_dir and --train_file.")
    if args.dataset_name:
        splits = load_dataset(args.dataset_name)
    elif args.train_dir:
        splits = load_dataset("imagefolder", data_dir=args.train_dir)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        splits = load_dataset("parquet", data_files={name: path for name, path in files.items() if path})
    if "train" not in splits:
        raise ValueError(f"The dataset has no train split, only {sorted(splits)}.")
    for column in (args.image_column, args.label_column):
        if column not in splits["train"].column_names:
            raise ValueError(f"The dataset has no column {column!r}, only {splits['train'].column_names}.")
    train = splits["train"]
    if not isinstance(train.features[args.label_column], ClassLabel):
        train = train.class_encode_column(args.label_column)
    held_out = splits.get("validation", splits.get("test"))
    if held_out is None:
        return DatasetDict(
            zip(
                ("train", "validation"),
                train.train_test_split(0.1, seed=seed, stratify_by_column=args.label_column).values(),
                strict=True,
            )
        )
    return DatasetDict(train=train, validation=with_classes_of(train, held_out, args.label_column))


def with_classes_of(train: Dataset, other: Dataset, column: str) -> Dataset:
    """Return another split with the class indices of the training split: each split alone may lack some classes."""
    classes = train.features[column]
    if other.features[column] == classes:
        return other
    known = set(classes.names)
    kind = other.features[column]
    spell = kind.int2str if isinstance(kind, ClassLabel) else str
    names = [spell(value) for value in other[column]]
    if unknown := sorted(set(names) - known):
        raise ValueError(
            f"The evaluation split has {len(unknown)} classes that the training split lacks, among them "
            f"{unknown[:3]}; those of the training split are {classes.names[:10]}."
        )
    indices = [classes.str2int(name) for name in names]
    return other.remove_columns(column).add_column(column, indices).cast_column(column, classes)


def prepare(split: Dataset, processor: ASelectImageProcessor, args: DataArguments) -> Dataset:
    """Return the split with `pixel_values` and `labels`, made when a row is read."""

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        pixels = processor(batch[args.image_column], return_tensors="pt").pixel_values
        return {"pixel_values": pixels, "labels": batch[args.label_column]}

    return split.with_transform(transform)


def needs_timestep(source: str, given: dict[str, Any]) -> bool:
    """Return whether the timestep is to be chosen: "auto" is asked for, or none was chosen before."""
    if "timestep" in given:
        return bool(given["timestep"] == "auto")
    try:
        saved, _ = ASelectConfig.get_config_dict(source)
    except OSError:
        saved = {}  # a folder of diffusers has no configuration of ours
    return bool(saved.get("timestep", "auto") == "auto")


def main() -> None:
    parser = HfArgumentParser((DataArguments, ConfigArguments, TrainingArguments))
    args, config_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    set_seed(training_args.seed)
    training_args.remove_unused_columns = False  # the transform needs the picture's column
    splits = load_splits(args, training_args.seed)
    names = splits["train"].features[args.label_column].names

    given = {name: value for name, value in asdict(config_args).items() if value is not None}
    calibration = splits["train"].shuffle(training_args.seed)
    calibration = calibration[: args.num_calibration_images][args.image_column]
    model = DiTForImageClassification.from_pretrained(
        args.model_name_or_path,
        calibration_images=calibration if needs_timestep(args.model_name_or_path, given) else None,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **given,
    )
    processor = ASelectImageProcessor.from_model_config(model.config)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return Accuracy().compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=prepare(splits["train"], processor, args),
        eval_dataset=prepare(splits["validation"], processor, args),
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=compute_metrics,
        callbacks=[ASelectCallback(dataset=args.dataset_name)],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
