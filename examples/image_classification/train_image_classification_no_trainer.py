r"""Train a classifier on a diffusion transformer with accelerate's own loop, for those who want to change the loop.

On the images that ship in the package, from a checkout of the repository (a minute or two on two CPU cores):

    accelerate launch examples/image_classification/train_image_classification_no_trainer.py \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist --timestep auto \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --validation_file src/hf_aselect/assets/fashion_mnist/test.parquet \
        --head_hidden_size 128 --head_num_attention_heads 4 \
        --output_dir fashion-classifier --num_train_epochs 5 --learning_rate 1e-3 --per_device_train_batch_size 64

It goes on where a checkpoint ends (`--resume_from_checkpoint DIR`, or `latest`), at the very batch and at the timestep
that was selected then, and the weights that come out are those of a run that was not interrupted. `--cache_dir` reads
the features once. `--with_tracking` writes to the trackers that are installed.

The features are frozen, and whole images are seen; recipes, crops, streams and the best epoch are in
`train_image_classification.py`. `--push_to_hub` shares the model with its card.
"""

import argparse
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import SchedulerType, default_data_collator, get_scheduler

from hf_aselect import Accuracy, ASelectImageProcessor, DiTForImageClassification, cache_features
from hf_aselect.training.config_arguments import (
    int_or_word,
    needs_images,
    one_or_several,
    resumed_fields,
    write_config,
)
from hf_aselect.training.splits import read_splits, train_and_validation

logger = logging.getLogger("train_image_classification_no_trainer")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", required=True, help="hf_aselect checkpoint, or a folder saved by diffusers"
    )
    parser.add_argument("--dataset_name", help="Hub dataset, or a local folder of one")
    parser.add_argument("--train_dir", help="folder with one subfolder of images per class")
    parser.add_argument("--train_file", help="parquet file with images and labels")
    parser.add_argument("--validation_file", help="parquet file of the validation split (default: a tenth of train)")
    parser.add_argument("--image_column", default="image", help="column with the images (%(default)s)")
    parser.add_argument("--label_column", default="label", help="column with the class indices (%(default)s)")
    parser.add_argument(
        "--timestep", type=int_or_word, nargs="+", help=("one or several timesteps, or auto (default: the model's)")
    )
    parser.add_argument(
        "--num_calibration_images",
        type=int,
        default=256,
        help=("images for selecting the timestep and standardizing (%(default)s)"),
    )
    parser.add_argument("--head", default="attention", choices=("attention", "linear"))
    parser.add_argument("--head_hidden_size", type=int, default=800)
    parser.add_argument("--head_num_layers", type=int, default=2)
    parser.add_argument("--head_num_attention_heads", type=int, default=8)
    parser.add_argument("--cache_dir", help="compute features once, and cache them here")
    parser.add_argument("--num_views", type=int, default=1, help="cached views per image (%(default)s)")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="maximum gradient norm (%(default)s)")
    parser.add_argument("--num_train_epochs", type=int, default=28)
    parser.add_argument("--max_train_steps", type=int, help="overrides --num_train_epochs")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--lr_scheduler_type", type=SchedulerType, default="cosine", choices=list(SchedulerType))
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--output_dir", required=True, help="folder for the model and checkpoints")
    parser.add_argument("--checkpointing_steps", help="save every N steps, or every `epoch`")
    parser.add_argument("--resume_from_checkpoint", help="checkpoint folder, or `latest`")
    parser.add_argument("--with_tracking", action="store_true", help="report to the installed trackers")
    parser.add_argument("--report_to", default="all", help="trackers to use (%(default)s)")
    parser.add_argument("--push_to_hub", action="store_true", help="push the model with its card at the end")
    parser.add_argument("--hub_model_id", help="repository to push to (default: the name of the output folder)")
    parser.add_argument("--hub_private_repo", action="store_true", help="make a new repository private")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if sum(source is not None for source in (args.dataset_name, args.train_dir, args.train_file)) != 1:
        parser.error("pass exactly one of --dataset_name, --train_dir and --train_file")
    if args.checkpointing_steps not in (None, "epoch") and not str(args.checkpointing_steps).isdigit():
        parser.error("--checkpointing_steps must be a number or `epoch`")
    return args


def load_splits(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Return training and validation split, with class indices."""
    splits = read_splits(
        dataset_name=args.dataset_name,
        train_dir=args.train_dir,
        train_file=args.train_file,
        validation_file=args.validation_file,
        columns=(args.image_column, args.label_column),
    )
    return train_and_validation(splits, args.seed, args.label_column)


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a folder, oldest first; what was half-written has another name."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def last_checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    """Return the checkpoint to go on from."""
    if args.resume_from_checkpoint != "latest":
        found = Path(args.resume_from_checkpoint)
        if not found.is_dir() or not re.fullmatch(r"step_\d+", found.name):
            raise ValueError(f"--resume_from_checkpoint must be `latest` or a folder step_N, got {str(found)!r}.")
        return found
    if found := checkpoints(folder):
        return found[-1]
    raise ValueError(f"There is no checkpoint in {str(folder)!r} to resume from.")


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save the state of everything; the checkpoint appears when all of it is written."""
    target = folder / f"step_{step}"
    unfinished = folder / f".step_{step}.incomplete"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in unfinished.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # or a power cut leaves a whole name with empty files
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
    accelerator.wait_for_everyone()


def main() -> None:
    args = parse_args()
    tracking = {"log_with": args.report_to, "project_dir": args.output_dir} if args.with_tracking else {}
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of an epoch depends on seed and epoch alone, so that a resumed one is the same.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        **tracking,
    )
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    with accelerator.main_process_first():
        train, held_out = load_splits(args)
    names = train.features[args.label_column].names
    checkpoint = last_checkpoint(args, output) if args.resume_from_checkpoint else None
    if checkpoint is None and (found := checkpoints(output)):
        raise ValueError(
            f"{args.output_dir!r} has checkpoints of an earlier training, the last of them {found[-1].name!r}. "
            "Resume it with `--resume_from_checkpoint latest`, pass another --output_dir, or delete them."
        )
    given: dict[str, Any] = {} if args.timestep is None else {"timestep": one_or_several(args.timestep)}
    if checkpoint is not None:
        given = resumed_fields(given, checkpoint.parent)
    calibration = None
    if needs_images(args.model_name_or_path, given):
        calibration = train.shuffle(args.seed)[: args.num_calibration_images][args.image_column]
    model = DiTForImageClassification.from_pretrained(
        args.model_name_or_path,
        calibration_images=calibration,
        num_train_images=len(train),
        **given,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        head=args.head,
        head_hidden_size=args.head_hidden_size,
        head_num_layers=args.head_num_layers,
        head_num_attention_heads=args.head_num_attention_heads,
    )
    processor = ASelectImageProcessor.from_model_config(model.config)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # The state of a checkpoint has no configuration, and a training that goes on needs the selection.
        write_config(model.config, output)

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        pixels = processor(batch[args.image_column], return_tensors="pt").pixel_values
        return {"pixel_values": pixels, "labels": batch[args.label_column]}

    if args.cache_dir:
        # Deviations of tokens cannot be pooled before these are standardized.
        is_pooled = args.head == "linear" and model.config.is_pooling_of_raw_tokens
        what = "pooled" if is_pooled else "tokens"
        options = {"image_column": args.image_column, "what": what}
        model.to(accelerator.device)
        train = cache_features(model, train, args.cache_dir, num_views=args.num_views, **options)
        held_out = cache_features(model, held_out, args.cache_dir, **options)
        train, held_out = (
            split.select_columns(["features", args.label_column]).rename_columns({args.label_column: "labels"})
            if args.label_column != "labels"
            else split.select_columns(["features", "labels"])
            for split in (train, held_out)
        )
    else:
        train, held_out = train.with_transform(transform), held_out.with_transform(transform)
    # A generator of its own: starting a loader draws a number, which a training that goes on would draw once more.
    loader = DataLoader(
        train,
        shuffle=True,
        collate_fn=default_data_collator,
        batch_size=args.per_device_train_batch_size,
        generator=torch.Generator(),
    )
    eval_loader = DataLoader(
        held_out,
        collate_fn=default_data_collator,
        batch_size=args.per_device_eval_batch_size,
        generator=torch.Generator(),
    )

    # What DeepSpeed's ZeRO 3 takes apart has one axis, and is told of its shape.
    num_axes = {value: len(getattr(value, "ds_shape", value.shape)) for value in model.parameters()}
    decayed = [value for value in model.parameters() if value.requires_grad and num_axes[value] > 1]
    others = [value for value in model.parameters() if value.requires_grad and num_axes[value] <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
    )
    steps_per_epoch = math.ceil(len(loader) / accelerator.num_processes / args.gradient_accumulation_steps)
    max_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
        num_training_steps=max_steps * accelerator.num_processes,
    )
    model, optimizer, loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, loader, eval_loader, scheduler
    )
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    num_epochs = math.ceil(max_steps / steps_per_epoch)
    if args.with_tracking:
        facts = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("hf_aselect", {**facts, "lr_scheduler_type": str(args.lr_scheduler_type)})

    step = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        step = int(checkpoint.name.removeprefix("step_"))
        logger.info("Resuming from %s.", checkpoint)

    metric = Accuracy()

    def evaluate() -> float:
        model.eval()
        for batch in eval_loader:
            labels = batch.pop("labels")
            with torch.no_grad():
                predicted = model(**batch).logits.argmax(-1)
            predicted, labels = accelerator.gather_for_metrics((predicted, labels))
            metric.add_batch(predictions=predicted, references=labels)
        return metric.compute()["accuracy"]

    accuracy = None
    first_epoch, done = divmod(step, steps_per_epoch)
    for epoch in range(first_epoch, num_epochs):
        if step >= max_steps:
            break
        model.train()
        batches = loader
        if epoch == first_epoch and done:
            batches = accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps)
        # A new loader counts its epochs from 0 in accelerate before 1.15, and one of several processes hides what it
        # draws from.
        sampler = batches
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        total, num_batches = torch.zeros((), device=accelerator.device), 0
        for batch in batches:
            num_batches += 1
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                total += loss.detach()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if args.checkpointing_steps not in (None, "epoch") and step % int(args.checkpointing_steps) == 0:
                save_checkpoint(accelerator, output, step)
            if step >= max_steps:
                break
        accuracy = evaluate()
        logger.info("epoch %d: accuracy %.4f", epoch, accuracy)
        if args.with_tracking:
            facts = {"accuracy": accuracy, "train_loss": total.item() / num_batches, "epoch": epoch}
            accelerator.log(facts, step=step)
        if args.checkpointing_steps == "epoch":
            save_checkpoint(accelerator, output, step)
    if accuracy is None:  # it was done before
        accuracy = evaluate()
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(model)  # gathered by all, where they are sharded
    trained = accelerator.unwrap_model(model)
    trained.save_pretrained(
        output, is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=weights
    )
    if accelerator.is_main_process:
        processor.save_pretrained(output)
        (output / "all_results.json").write_text(json.dumps({"eval_accuracy": accuracy}), encoding="utf-8")
        if args.push_to_hub:
            # As it was saved, which is whole also where the weights in memory are shards.
            trained.save_pretrained(
                output,
                state_dict=weights,
                push_to_hub=True,
                repo_id=args.hub_model_id or output.resolve().name,
                private=args.hub_private_repo,
                accuracy=accuracy,
                dataset=args.dataset_name,
                training={"steps": step, "learning rate": args.learning_rate, "seed": args.seed},
            )
    accelerator.end_training()


if __name__ == "__main__":
    main()
