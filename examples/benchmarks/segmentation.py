r"""What does the timestep do for segmentation? A DiT under both decoders at every timestep, beside what needs no DiT.

    python examples/benchmarks/segmentation.py --model_name_or_path dit-camvid \
        --train_file camvid/train.parquet --test_file camvid/test.parquet --ignore_index 11 \
        --class_names sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist \
        --image_size 72 96 --output_dir segmentation

Mean intersection over union on the test images, of `--seeds` trainings each: the linear decoder and UperNet on the
frozen DiT at every timestep of a grid, with the one that `select_timestep` selected (without labels, from the training
images) and t = 0 among them; the same at the selected timestep on a DiT of random weights; a multi-layer perceptron on
the colour of single pixels; and a UNet of about the DiT's size, trained whole. All see the same crops: UperNet and
UNet `--num_epochs` times, the other two, which have little to learn, `--num_linear_epochs` times. Tokens of a timestep
are read once and kept in half precision; each finished training is a file in `OUTPUT_DIR/runs`, so that a run that was
stopped goes on there, and several processes may share the work (`--part 0 2` and `--part 1 2`). `--summarize` writes
`OUTPUT_DIR/segmentation.json`, `table.md` and `curve.png`.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import load_dataset
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import HfArgumentParser, set_seed

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTBackbone,
    DiTForSemanticSegmentation,
    MeanIoU,
    select_timestep,
)
from hf_aselect.checkpoints.atomic import whole_file
from hf_aselect.model.modeling_segmentation import enlarge

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DECODERS = ("linear", "upernet")


@dataclass
class BenchmarkArguments:
    """Which DiT, which images, how long, where to write."""

    output_dir: str = field(metadata={"help": "Folder for the results."})
    model_name_or_path: str = field(metadata={"help": "The DiT."})
    train_file: str = field(metadata={"help": "Parquet file with images and masks."})
    test_file: str = field(metadata={"help": "Parquet file with images and masks."})
    class_names: str = field(metadata={"help": "Names of the classes, with commas."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    annotation_column: str = field(default="annotation", metadata={"help": "Column with the masks."})
    ignore_index: int = field(default=255, metadata={"help": "Value of mask pixels that have no class."})
    image_size: list[int] = field(default_factory=lambda: [72, 96], metadata={"help": "Height and width."})
    num_timesteps: int = field(default=8, metadata={"help": "Timesteps of the grid, evenly spaced in log-SNR."})
    num_views: int = field(default=4, metadata={"help": "Crops of each training image, half of them mirrored."})
    min_crop: float = field(default=0.6, metadata={"help": "Least side of a crop, as a share of the whole."})
    num_epochs: int = field(default=3, metadata={"help": "Times that UperNet and the UNet see each crop."})
    num_linear_epochs: int = field(default=10, metadata={"help": "Times that the linear decoder and the MLP do."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW, with one cycle."})
    batch_size: int = field(default=16, metadata={"help": "Images a step."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the trainings."})
    part: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Which share of how many to do."})
    summarize: bool = field(default=False, metadata={"help": "Only write table, figures and curve."})


@dataclass(frozen=True)
class Job:
    """One way to segment, at one timestep where it has one."""

    method: str
    timestep: int | None
    is_random: bool = False

    def path(self, folder: Path, seed: int) -> Path:
        """Return where a training's result lies."""
        parts = [self.method, *([] if self.timestep is None else [f"t{self.timestep}"])]
        return folder / "runs" / f"{'-'.join([*parts, *(['random'] if self.is_random else [])])}-{seed}.json"


class Benchmark:
    """Images, masks and the DiT."""

    def __init__(self, args: BenchmarkArguments) -> None:
        self.args, self.folder = args, Path(args.output_dir)
        self.names = [name.strip() for name in args.class_names.split(",")]
        self.config = ASelectConfig.from_dict(self.load("linear").config.to_dict())
        self.processor = ASelectImageProcessor.from_model_config(self.config)
        self.train = load_dataset("parquet", data_files=args.train_file, split="train")
        self.test = load_dataset("parquet", data_files=args.test_file, split="train")

    def load(
        self, decoder: str, timestep: int | list[int] = 0, is_random: bool = False, **fields: Any
    ) -> DiTForSemanticSegmentation:
        """Return the segmenter; if it is to be random, on a DiT with weights as its own training would begin with."""
        args = self.args
        model = DiTForSemanticSegmentation.from_pretrained(
            args.model_name_or_path,
            timestep=timestep,
            image_size=args.image_size,
            num_labels=len(self.names),
            semantic_loss_ignore_index=args.ignore_index,
            decoder=decoder,
            decoder_hidden_size=32,
            auxiliary_hidden_size=0,
            **fields,
        )
        if is_random:
            transformer = model.backbone.denoiser.transformer
            transformer.load_state_dict(type(transformer).from_config(transformer.config).state_dict())
        return model

    def batches(self, split: str) -> tuple[Tensor, Tensor]:
        """Return pixel values, (n, C, H, W), and masks, (n, H, W): crops of training images, or whole test ones."""
        rows = self.train if split == "train" else self.test
        images, masks = rows[self.args.image_column][:], rows[self.args.annotation_column][:]
        if split == "train":
            generator = torch.Generator().manual_seed(0)
            pairs = [
                self.crop(image, mask, generator)
                for _ in range(self.args.num_views)
                for image, mask in zip(images, masks, strict=True)
            ]
            images, masks = (list(each) for each in zip(*pairs, strict=True))
        batch = self.processor(images, masks, do_center_crop=False, return_tensors="pt")
        return batch.pixel_values, batch.labels

    def crop(
        self, image: Image.Image, mask: Image.Image, generator: torch.Generator
    ) -> tuple[Image.Image, Image.Image]:
        """Return a random part of an image in its own proportions, mirrored half of the time, and of its mask."""
        share, left, top, mirror = torch.rand(4, generator=generator).tolist()
        share = self.args.min_crop + share * (1 - self.args.min_crop)
        width, height = round(share * image.width), round(share * image.height)
        left, top = round(left * (image.width - width)), round(top * (image.height - height))
        pair = [each.crop((left, top, left + width, top + height)) for each in (image, mask)]
        if mirror < 0.5:
            pair = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in pair]
        return pair[0], pair[1]

    def selection(self) -> dict[str, Any]:
        """Return the selection of the timestep, made once."""
        path = self.folder / "selection.json"
        if not path.exists():
            record = select_timestep(self.load("linear"), self.train.select_columns([self.args.image_column]))
            write_json(path, record.to_dict())
        return read_json(path)

    def jobs(self) -> list[Job]:
        """Return everything that is trained."""
        selected = self.selection()["timestep"]
        schedule = self.load("linear").noise_schedule
        grid = sorted({0, selected, *schedule.even_timesteps(self.args.num_timesteps)})
        # What is asked first comes first.
        order = [selected, 0, *(t for t in grid if t not in (selected, 0))]
        jobs = [Job(decoder, selected, is_random=True) for decoder in DECODERS]
        jobs += [Job("mlp", None), Job("unet", None)]
        return [*(Job(decoder, timestep) for timestep in order for decoder in DECODERS), *jobs]

    @torch.no_grad()
    def maps(self, job: Job, seed: int, pixels: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return the maps, (n, D, rows, columns) in half precision, that UperNet and the linear decoder read."""
        set_seed(seed)
        model = self.load("upernet", int(job.timestep or 0), job.is_random).eval()
        assert isinstance(model.backbone, DiTBackbone)
        own = (model.config.block_index(), model.config.feature)
        taps = [*model.backbone.taps(), *([] if own in model.backbone.taps() else [own])]
        kept = {}
        for split, values in pixels.items():
            parts = [model.backbone.extract_maps(batch, taps) for batch in values.split(32)]
            kept[split] = [torch.cat([part[tap].half() for part in parts]) for tap in taps]
        self.place = taps.index(own)
        return kept

    def run(self) -> None:
        """Do this process' share of the trainings that are not done."""
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        todo = [(job, seed) for job in self.jobs() for seed in self.args.seeds]
        number, count = self.args.part
        # All trainings on the same tokens go to one process, which reads them once.
        keys = list(dict.fromkeys((job.timestep, job.is_random) for job, _ in todo))
        mine = [
            (job, seed)
            for job, seed in todo
            if keys.index((job.timestep, job.is_random)) % count == number and not job.path(self.folder, seed).exists()
        ]
        if not mine:
            return
        pixels, masks = {}, {}
        for split in ("train", "test"):
            pixels[split], masks[split] = self.batches(split)
        read: tuple[Any, dict[str, list[Tensor]]] = (None, {})
        for job, seed in mine:
            inputs: dict[str, list[Tensor]]
            if job.timestep is None:
                inputs = {split: [values] for split, values in pixels.items()}
            else:
                # Random weights are drawn again for each seed.
                key = (job.timestep, job.is_random, seed if job.is_random else None)
                if read[0] != key:
                    read = (key, self.maps(job, seed, pixels))
                inputs = read[1]
            started = time.monotonic()
            figures = self.train_and_test(job, seed, inputs, masks)
            figures["seconds"] = round(time.monotonic() - started, 1)
            write_json(job.path(self.folder, seed), {**asdict(job), "seed": seed, **figures})
            print(f"{job.path(self.folder, seed).stem}: {100 * figures['mean_iou']:.2f}", flush=True)

    def build(self, job: Job, inputs: list[Tensor]) -> tuple[nn.Module, Callable[[nn.Module, list[Tensor]], Tensor]]:
        """Return what is trained, and how it makes logits of a batch of inputs."""
        num_labels = len(self.names)
        if job.method == "mlp":
            channels, layers = inputs[0].shape[1], list[nn.Module]()
            for width in (64, 64):
                layers += [nn.Conv2d(channels, width, 1), nn.GELU()]
                channels = width
            return nn.Sequential(*layers, nn.Conv2d(channels, num_labels, 1)), lambda model, batch: model(batch[0])
        if job.method == "unet":
            height, width = self.args.image_size
            unet = UNet2DModel(
                sample_size=(height, width),
                in_channels=inputs[0].shape[1],
                out_channels=num_labels,
                block_out_channels=(24, 48, 72, 96),
                down_block_types=("DownBlock2D",) * 4,
                up_block_types=("UpBlock2D",) * 4,
                layers_per_block=1,
                norm_num_groups=8,
            )
            return unet, lambda model, batch: model(batch[0], 0).sample
        decoder = self.load(job.method).decode_head
        if job.method == "linear":
            return decoder, lambda model, batch: model([batch[self.place]])[0]
        return decoder, lambda model, batch: model(batch[:4])[0]

    def train_and_test(
        self, job: Job, seed: int, inputs: dict[str, list[Tensor]], masks: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Train from scratch and return the figures on the test images."""
        args = self.args
        set_seed(seed)
        model, logits_of = self.build(job, inputs["train"])
        optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01)
        epochs = args.num_epochs if job.method in ("upernet", "unet") else args.num_linear_epochs
        count = len(masks["train"])
        total = epochs * -(-count // args.batch_size)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=total)
        loss_of = nn.CrossEntropyLoss(ignore_index=args.ignore_index)

        def logits(chosen: Tensor, split: str) -> Tensor:
            batch = [values[chosen].float() for values in inputs[split]]
            # bfloat16, as on a GPU: half the time.
            with torch.autocast("cpu", torch.bfloat16):
                found = logits_of(model, batch)
            return enlarge(found, (args.image_size[0], args.image_size[1]))

        model.train()
        for _ in range(epochs):
            for chosen in torch.randperm(count).split(args.batch_size):
                optimizer.zero_grad()
                loss_of(logits(chosen, "train"), masks["train"][chosen]).backward()
                optimizer.step()
                scheduler.step()
        model.eval()
        metric = MeanIoU(num_labels=len(self.names), ignore_index=args.ignore_index)
        with torch.no_grad():
            for chosen in torch.arange(len(masks["test"])).split(32):
                metric.add_batch(predictions=logits(chosen, "test").argmax(1), references=masks["test"][chosen])
        figures = metric.compute()
        return {
            "mean_iou": figures["mean_iou"],
            "overall_accuracy": figures["overall_accuracy"],
            "per_category_iou": figures["per_category_iou"],
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }


def collect(args: BenchmarkArguments) -> dict[str, Any]:
    """Return everything that is known: arguments, the selection, and all runs."""
    folder = Path(args.output_dir)
    kept = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "part", "summarize")}
    # Names of files, not paths: they say nothing to another machine.
    for name in ("model_name_or_path", "train_file", "test_file"):
        kept[name] = "/".join(Path(kept[name]).parts[-2:])
    runs = [read_json(path) for path in sorted((folder / "runs").glob("*.json"))]
    return {"arguments": kept, "selection": read_json(folder / "selection.json"), "runs": runs}


def figures_of(
    content: dict[str, Any], method: str, timestep: int | None = None, is_random: bool = False
) -> list[float]:
    """Return the mean IoU of each seed, in per cent."""
    wanted = {"method": method, "timestep": timestep, "is_random": is_random}
    runs = [run for run in content["runs"] if all(run[name] == value for name, value in wanted.items())]
    return [100 * run["mean_iou"] for run in sorted(runs, key=lambda run: run["seed"])]


def timesteps_of(content: dict[str, Any], method: str) -> list[int]:
    """Return the timesteps at which a decoder was trained on the trained DiT."""
    return sorted({run["timestep"] for run in content["runs"] if run["method"] == method and not run["is_random"]})


def table_of(content: dict[str, Any]) -> str:
    """Return the table of all ways to segment, in Markdown."""
    chosen = content["selection"]["timestep"]

    def cells(values: list[float], baseline: list[float] | None = None) -> str:
        """Return mean and seeds; the difference is of the same seed, whose start both share."""
        difference = ""
        if baseline is not None:
            each = [value - other for value, other in zip(values, baseline, strict=True)]
            difference = f"{statistics.mean(each):+.2f} ({min(each):+.2f} to {max(each):+.2f})"
        return f"{statistics.mean(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} | {difference} |"

    lines = ["| decoder | features | mIoU, mean | seeds | against the selected t |", "| --- | --- | --- | --- | --- |"]
    for decoder in reversed(DECODERS):
        own = figures_of(content, decoder, chosen)
        means = {t: statistics.mean(figures_of(content, decoder, t)) for t in timesteps_of(content, decoder)}
        best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        over = statistics.mean(means.values())
        lines += [
            f"| {decoder} | t = {chosen}, selected without labels | {cells(own)}",
            f"| {decoder} | best t = {best}, by the test images | {cells(figures_of(content, decoder, best), own)}",
            f"| {decoder} | t = 0 | {cells(figures_of(content, decoder, 0), own)}",
            f"| {decoder} | random t (mean over the grid) | {over:.2f} |  | {over - statistics.mean(own):+.2f} |",
            f"| {decoder} | worst t = {worst} | {cells(figures_of(content, decoder, worst), own)}",
            f"| {decoder} | random weights, t = {chosen} | "
            f"{cells(figures_of(content, decoder, chosen, is_random=True), own)}",
        ]
    lines.append(f"| UNet, trained whole | pixels | {cells(figures_of(content, 'unet'))}")
    lines.append(f"| multi-layer perceptron | the colour of a pixel | {cells(figures_of(content, 'mlp'))}")
    return "\n".join(lines) + "\n"


def draw(path: Path, content: dict[str, Any]) -> None:
    """Draw the mean IoU at each timestep, with the range of the seeds."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    chosen, timesteps = content["selection"]["timestep"], timesteps_of(content, "upernet")
    places = range(len(timesteps))
    # Markers and line styles differ, too, for a print in grey.
    styles = (("#0072B2", "o", "--"), ("#D55E00", "s", "-."))
    for decoder, (colour, marker, line) in zip(reversed(DECODERS), styles, strict=True):
        values = [figures_of(content, decoder, t) for t in timesteps]
        axes.plot(places, [statistics.mean(each) for each in values], marker=marker, color=colour, label=decoder)
        axes.fill_between(
            places, [min(each) for each in values], [max(each) for each in values], alpha=0.2, color=colour
        )
        random = statistics.mean(figures_of(content, decoder, chosen, is_random=True))
        axes.axhline(random, color=colour, linestyle=line, linewidth=1, label=f"{decoder}, random weights")
    axes.axvline(timesteps.index(chosen), color="black", linestyle=":", label=f"selected, t = {chosen}")
    axes.set_xticks(places, [str(t) for t in timesteps])
    axes.set(xlabel="timestep (0 = least noise)", ylabel="mIoU on test images, %")
    axes.legend(frameon=False, fontsize=9)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    plt.close(figure)


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file holds."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    if not args.summarize:
        Benchmark(args).run()
        return
    content, folder = collect(args), Path(args.output_dir)
    table = table_of(content)
    write_json(folder / "segmentation.json", content)
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw(folder / "curve.png", content)
    print(table, end="")


if __name__ == "__main__":
    main()
