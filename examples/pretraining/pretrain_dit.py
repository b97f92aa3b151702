r"""Pretrain a small class-conditional DiT on any image dataset, in pixel space or on the latents of a VAE.

The result is a folder with `transformer/` and `scheduler/`, which `DiTModel.from_pretrained` reads. The embedded DiT
of the package was made by these two commands (about an hour on two CPU cores that compute in bf16 and have nothing
else to do):

    python examples/pretraining/fashion_mnist_to_parquet.py /usr/share/datasets/fashion-mnist fashion-mnist
    python examples/pretraining/pretrain_dit.py --train_file fashion-mnist/train.parquet \
        --output_dir dit-fashion-mnist --image_size 28 --patch_size 4 --num_channels 1 --num_pictures 921600 \
        --label_dropout 0.5 --save_dtype float16

`--prediction_type flow_matching` learns the velocity from the image to the noise along straight lines, as Stable
Diffusion 3 does, with logit-normal timesteps and `--shift`. `--vae_name_or_path` names an `AutoencoderKL` (such as
`pretrain_vae.py` trains): the DiT then learns its latents, and the output folder gets a copy in `vae/`.

A run that was stopped resumes from its last checkpoint when the same command is given again. On several processes
`--batch_size` is the batch of each of them:

    accelerate launch --num_processes 2 examples/pretraining/pretrain_dit.py ...
    # on CPU cores
    OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 \
        examples/pretraining/pretrain_dit.py ...
"""

import copy
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_bf16_available, set_seed
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_aselect import ASelectImageProcessor
from hf_aselect.training.splits import read_splits


@dataclass
class PretrainingArguments:
    """What to train on, the DiT's sizes, and how long."""

    output_dir: str = field(metadata={"help": "Folder for transformer/, scheduler/, samples and checkpoints."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the Hub."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one subfolder of images per class."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and labels."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str | None = field(
        default="label", metadata={"help": "Column with the class indices; `none` trains without labels."}
    )
    image_size: int = field(
        default=32, metadata={"help": ("Image height and width in pixels, a multiple of patch_size.")}
    )
    min_crop: float = field(
        default=1.0,
        metadata={
            "help": ("Minimum side of a random square crop, as a share of the short side (1: always the centre).")
        },
    )
    num_channels: int = field(default=3, metadata={"help": "1 for grey, 3 for RGB."})
    patch_size: int = field(default=4, metadata={"help": "Side of a token, in pixels or in latents of a VAE."})
    num_layers: int = field(default=8, metadata={"help": "Number of transformer blocks."})
    num_attention_heads: int = field(default=2, metadata={"help": "Number of attention heads."})
    attention_head_dim: int = field(default=64, metadata={"help": "Width of an attention head."})
    num_pictures: int = field(default=960_000, metadata={"help": "Number of training images, counting repetitions."})
    batch_size: int = field(default=128, metadata={"help": "Batch size per process."})
    optim: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "Optimizer; `muon` trains the matrices in the blocks, and AdamW everything else."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "`cosine` or `linear`, down to 0."})
    warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = field(
        default="linear", metadata={"help": "Noise schedule; the second has fewer timesteps of nearly pure noise."}
    )
    prediction_type: Literal["epsilon", "v_prediction", "flow_matching"] = field(
        default="epsilon",
        metadata={
            "help": "Prediction target: the noise, the velocity of DDPM's schedule, or that of flow matching along "
            "straight lines, which has no `beta_schedule`."
        },
    )
    shift: float = field(
        default=1.0, metadata={"help": "For flow matching: moves timesteps toward noise, in training and sampling."}
    )
    vae_name_or_path: str | None = field(
        default=None,
        metadata={"help": "`AutoencoderKL` whose latents the DiT learns; image sizes are those before encoding."},
    )
    label_dropout: float = field(default=0.1, metadata={"help": "Share of images trained with the null label."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the averaged weights, which are saved."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "`no`, `bf16` or `fp16` (default: `bf16` if the hardware supports it, else `no`)."},
    )
    save_dtype: str = field(default="float32", metadata={"help": "`float32`, `float16` or `bfloat16`."})
    stages: list[int] = field(
        default_factory=list,
        metadata={"help": "Also save the DiT after about N images, in OUTPUT_DIR/stage-N."},
    )
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "Minutes between two checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order of images, noise and samples."})


# Where things lie and how they are written; images and VAE are known by digests, and may have been moved.
CHANGEABLE = (
    *("output_dir", "dataset_name", "train_dir", "train_file", "vae_name_or_path"),
    *("stages", "save_dtype", "checkpoint_minutes"),
)


def default_precision() -> str:
    """Return `bf16` where the hardware computes in it; where it does not, a CPU takes 2.6 times as long as without."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if torch.accelerator.is_available():
        return "bf16" if is_bf16_available() else "no"
    # An older torch does not tell.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def load_pictures(args: PretrainingArguments) -> Dataset:
    """Return the training split of the one source that was named."""
    return read_splits(dataset_name=args.dataset_name, train_dir=args.train_dir, train_file=args.train_file)["train"]


def digest(dataset: Dataset, image_column: str) -> str:
    """Return a digest of the number of images and of some of them, by which they are known wherever they lie."""
    found = hashlib.sha256(str(len(dataset)).encode())
    for picture in dataset.select(np.linspace(0, len(dataset) - 1, 16).astype(int))[image_column]:
        found.update(np.asarray(picture).tobytes())
    return found.hexdigest()[:16]


def vae_digest(vae: AutoencoderKL | None) -> str | None:
    """Return a digest of a VAE's weights and of how its latents are scaled."""
    if vae is None:
        return None
    found = hashlib.sha256(f"{vae.config.scaling_factor} {vae.config.shift_factor}".encode())
    for weight in vae.state_dict().values():
        found.update(weight.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def to_tensors(batch: dict[str, list], args: PretrainingArguments) -> dict[str, list]:
    """Crop squares out of images and resize them to (C, H, W) tensors in [-1, 1]."""
    size = (args.image_size, args.image_size)
    # Of any mode, as the models read them: `convert` would clip what has more than 8 bits.
    whole = {"do_resize": False, "do_center_crop": False, "do_normalize": False}
    values = ASelectImageProcessor(num_channels=args.num_channels, **whole)(batch[args.image_column])["pixel_values"]
    values = [np.rint(255 * np.asarray(each)).astype(np.uint8) for each in values]
    pictures = [Image.fromarray(each[0] if len(each) == 1 else np.moveaxis(each, 0, -1)) for each in values]
    if args.min_crop < 1:
        pictures = [random_square(picture, args.min_crop) for picture in pictures]
    pictures = [ImageOps.fit(picture, size) for picture in pictures]
    arrays = [np.asarray(picture, dtype=np.float32).reshape(*size, -1) / 127.5 - 1 for picture in pictures]
    labels = batch[args.label_column] if args.label_column else [0] * len(arrays)
    return {"pixels": [torch.from_numpy(a).permute(2, 0, 1) for a in arrays], "labels": labels}


def random_square(picture: Image.Image, min_crop: float) -> Image.Image:
    """Cut a square of random place and side out of an image, and mirror it half of the time."""
    share, left, top, mirror = torch.rand(4).tolist()
    side = round((min_crop + share * (1 - min_crop)) * min(picture.size))
    left, top = round(left * (picture.width - side)), round(top * (picture.height - side))
    square = picture.crop((left, top, left + side, top + side))
    return ImageOps.mirror(square) if mirror < 0.5 else square


def picture_order(num_pictures: int, args: PretrainingArguments, num_processes: int) -> list[list[int]]:
    """Return the image indices of every batch of the run: a function of the seed, so a resumed run repeats it."""
    total = args.num_pictures + args.batch_size * num_processes
    epochs = [
        torch.randperm(num_pictures, generator=torch.Generator().manual_seed(args.seed + epoch))
        for epoch in range(total // num_pictures + 1)
    ]
    order = torch.cat(epochs)
    num_batches = num_processes * -(-args.num_pictures // (args.batch_size * num_processes))
    return [order[i * args.batch_size : (i + 1) * args.batch_size].tolist() for i in range(num_batches)]


def build_scheduler(args: PretrainingArguments) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """Return the scheduler that adds the noise, and that is saved."""
    if args.prediction_type == "flow_matching":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=args.shift)
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule=args.beta_schedule, prediction_type=args.prediction_type
    )


def build_transformer(
    args: PretrainingArguments, num_classes: int, in_channels: int, sample_size: int
) -> DiTTransformer2DModel:
    """Return a DiT initialised as in the DiT paper: each block is the identity, the output is 0."""
    model = DiTTransformer2DModel(
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        in_channels=in_channels,
        num_layers=args.num_layers,
        sample_size=sample_size,
        patch_size=args.patch_size,
        num_embeds_ada_norm=num_classes,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) or ".timestep_embedder.linear" in name:
            nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.view(model.pos_embed.proj.out_channels, -1))
    zeroed = [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1, model.proj_out_2]
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return model


def set_train_mode(model: nn.Module) -> None:
    """Set train mode, but not for the label embeddings: diffusers' dropout drops in each block on its own."""
    model.train()
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()


@torch.no_grad()
def sample_grid(
    model: nn.Module,
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    path: Path,
    null_label: int,
    seed: int,
    rows: int = 8,
    vae: AutoencoderKL | None = None,
) -> None:
    """Draw `rows` images of up to 10 classes (DDIM or Euler, 50 steps, guidance 2) and save them as one PNG."""
    config = model.config
    columns = min(10, null_label)
    labels = torch.arange(columns).repeat(rows).to(model.device)
    if null_label == 1:
        labels = torch.full_like(labels, null_label)  # trained without labels, it knows no class
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    if isinstance(scheduler, DDPMScheduler):
        # From the last timestep on, where there is only noise, and without clipping, which breaks guidance.
        sampler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, timestep_spacing="trailing")
    else:
        sampler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    sampler.set_timesteps(50)
    for t in sampler.timesteps:
        both_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        timesteps = t.to(model.device).expand(len(both_labels))
        prediction = model(torch.cat([pictures, pictures]), timestep=timesteps, class_labels=both_labels).sample
        with_label, without_label = prediction.chunk(2)
        pictures = sampler.step(without_label + 2.0 * (with_label - without_label), t, pictures).prev_sample
    if vae is not None:
        pictures = vae.decode(pictures / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    grid = pictures.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    array = ((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    picture = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)


def incomplete(target: Path) -> Path:
    """Return the empty folder that becomes `target` once it is written."""
    temporary = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def complete(target: Path) -> None:
    """Rename what was written to `incomplete(target)`: `target` is never half of a folder.

    A run that dies between the two renamings leaves the old one under another name: `restore` puts it back.
    """
    previous = target.with_name(f".{target.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    for path in target.with_name(f".{target.name}.incomplete").rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut leaves a whole name with empty files
    if target.exists():
        os.replace(target, previous)
    os.replace(target.with_name(f".{target.name}.incomplete"), target)
    shutil.rmtree(previous, ignore_errors=True)


def restore(target: Path) -> None:
    """Put back what a run that died in `complete` had taken away."""
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        os.replace(previous, target)


def training_step(
    model: nn.Module,
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    batch: dict[str, Tensor],
    args: PretrainingArguments,
    null_label: int,
) -> Tensor:
    """Return the mean squared error of the predicted noise or velocity at randomly drawn timesteps."""
    latents, labels = batch["pixels"], batch["labels"]
    noise = torch.randn_like(latents)
    if isinstance(scheduler, DDPMScheduler):
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noised = scheduler.add_noise(latents, noise, timesteps)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    else:
        # As Stable Diffusion 3 (arXiv 2403.03206): more often in the middle, then moved toward noise.
        drawn = compute_density_for_timestep_sampling("logit_normal", len(latents), 0.0, 1.0, device=latents.device)
        sigmas = scheduler.shift * drawn / (1 + (scheduler.shift - 1) * drawn)
        timesteps = scheduler.config.num_train_timesteps * sigmas
        sigmas = sigmas.view(-1, 1, 1, 1)
        noised, target = (1 - sigmas) * latents + sigmas * noise, noise - latents
    dropped = torch.rand(len(labels), device=labels.device) < args.label_dropout
    prediction = model(noised, timestep=timesteps, class_labels=labels.masked_fill(dropped, null_label)).sample
    return nn.functional.mse_loss(prediction.float(), target)


class Pretraining:
    """A run: model, averaged weights, optimizer and how far it is; goes on from the last checkpoint, if there is one.

    Args:
        args: What to train on, and how.
    """

    part = "transformer"  # folder of the weights, as a pipeline of diffusers names it
    hidden = r"\.(attn1|ff)\..*weight"  # weights that are Muon's, if it is asked for

    def __init__(self, args: PretrainingArguments) -> None:
        self.args, self.output = args, Path(args.output_dir)
        self.check_arguments()
        self.vae = self.load_vae()
        self.check_image_size()
        self.output.mkdir(parents=True, exist_ok=True)
        args.mixed_precision = args.mixed_precision or default_precision()
        self.accelerator = accelerator = Accelerator(mixed_precision=args.mixed_precision)
        self.dataset = load_pictures(args)
        if args.label_column in ("none", ""):
            # One class that is never shown: every image has the null label.
            args.label_column, args.label_dropout = None, 1.0
        self.num_classes = self.dataset.features[args.label_column].num_classes if args.label_column else 1
        self.batches = picture_order(len(self.dataset), args, accelerator.num_processes)
        self.batch_size = args.batch_size * accelerator.num_processes
        self.num_steps = len(self.batches) // accelerator.num_processes
        self.scheduler = build_scheduler(args)
        set_seed(args.seed)
        model = self.build()
        self.ema = EMAModel(model.parameters(), decay=args.ema_decay, foreach=True)
        set_seed(args.seed, device_specific=True)
        self.model = accelerator.prepare(model)
        self.optimizers, self.lr_schedulers = [], []
        for optimizer in self.build_optimizers():
            lr_scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=args.warmup_steps * accelerator.num_processes,
                num_training_steps=len(self.batches),
            )
            optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
            self.optimizers.append(optimizer)
            self.lr_schedulers.append(lr_scheduler)
        self.ema.to(accelerator.device)
        if self.vae is not None:
            self.vae.to(accelerator.device)
        accelerator.register_for_checkpointing(self.ema)
        self.checkpoint = self.output / "checkpoint"
        self.log: list[dict] = []
        if accelerator.is_main_process:
            restore(self.checkpoint)
        accelerator.wait_for_everyone()
        if self.checkpoint.exists():
            self.check_recipe()
            accelerator.load_state(self.checkpoint)
            self.log = json.loads((self.checkpoint / "log.json").read_text())
        self.step = self.log[-1]["step"] if self.log else 0

    def check_arguments(self) -> None:
        """Reject options that do not go together, before anything is read or written."""
        args, is_flow_matching = self.args, self.args.prediction_type == "flow_matching"
        if args.optim == "muon" and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"--optim muon requires torch >= 2.9, got {torch.__version__}. Give --optim adamw.")
        if not 1e-6 <= args.shift <= 1e6:  # what `DiTModel.from_pretrained` takes
            raise ValueError(
                f"--shift must be above 0, in [1e-6, 1e6], got {args.shift}. 1 leaves timesteps unchanged."
            )
        if args.shift != 1 and not is_flow_matching:
            raise ValueError(
                f"--shift is for flow matching, got {args.shift} with --prediction_type {args.prediction_type}. Omit "
                "it, or pass --prediction_type flow_matching."
            )
        if args.beta_schedule != "linear" and is_flow_matching:
            raise ValueError(
                f"Flow matching has no betas, got --beta_schedule {args.beta_schedule}. Omit it; --shift moves "
                "timesteps toward noise."
            )

    def check_image_size(self) -> None:
        """Reject sides of images that leave a rest."""
        size, multiple = self.args.image_size, self.multiple()
        if size < 1 or size % multiple:
            raise ValueError(
                f"--image_size must be a multiple of {multiple} for this model and --patch_size, got {size}, for "
                f"example {max(size, 1) + -max(size, 1) % multiple}."
            )

    def multiple(self) -> int:
        """Return what the side of the images must be a multiple of: the pixels along a token's."""
        if self.vae is None:
            return self.args.patch_size
        return self.args.patch_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def recipe(self) -> dict[str, Any]:
        """Return what must not change on the way: a run that goes on is to end as one that was never stopped."""
        given = {name: value for name, value in vars(self.args).items() if name not in CHANGEABLE}
        pictures = digest(self.dataset, self.args.image_column)
        processes = self.accelerator.num_processes
        return {
            **given,
            "digest of the images": pictures,
            "digest of the VAE": vae_digest(self.vae),
            "processes": processes,
        }

    def check_recipe(self) -> None:
        """Reject to go on from the checkpoint of another run."""
        path = self.checkpoint / "recipe.json"
        before = json.loads(path.read_text()) if path.exists() else {}  # older ones do not tell
        now = self.recipe()
        other = [
            f"{name} {value!r}, now {now.get(name)!r}"
            for name, value in before.items()
            if name not in CHANGEABLE and now.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{str(self.output)!r} contains a run with {'; '.join(other)}. Pass the same values to resume it, or "
                "another --output_dir."
            )

    def build(self) -> nn.Module:
        """Return the model with new weights."""
        if self.vae is None:
            return build_transformer(self.args, self.num_classes, self.args.num_channels, self.args.image_size)
        latents = self.encode(torch.zeros(1, self.args.num_channels, self.args.image_size, self.args.image_size))
        return build_transformer(self.args, self.num_classes, latents.shape[1], latents.shape[2])

    def load_vae(self) -> AutoencoderKL | None:
        """Return the frozen VAE, if one was named: a repository or folder of its own, or a folder with `vae/`.

        Raises:
            ValueError: If there is none, or its images have other channels than those that it is to be given.
        """
        source = self.args.vae_name_or_path
        if source is None:
            return None
        subfolder = "vae" if (Path(source) / "vae").is_dir() else None
        wanted = "--vae_name_or_path must be a repository or folder of an `AutoencoderKL`, or have it in vae/"
        try:
            kind = AutoencoderKL.load_config(source, subfolder=subfolder)["_class_name"]
        except OSError as e:
            raise ValueError(f"{wanted}, got {source!r}. pretrain_vae.py trains one.") from e
        if kind != "AutoencoderKL":
            raise ValueError(f"{wanted}, got {source!r} with an `{kind}`. pretrain_vae.py trains one.")
        vae = AutoencoderKL.from_pretrained(source, subfolder=subfolder)
        if vae.config.in_channels != self.args.num_channels:
            raise ValueError(
                f"--num_channels must be that of the VAE's images, {vae.config.in_channels}, got "
                f"{self.args.num_channels}. The latents have their own channels."
            )
        return vae.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the VAE's latents of images, the posterior's mean, or the images if there is no VAE.

        They are what `DiTModel.encode` returns.
        """
        if self.vae is None:
            return pixels
        latents = self.vae.encode(pixels).latent_dist.mean
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return AdamW, and Muon before it, if that is asked for.

        Muon (Jordan et al., 2024) is torch's, with steps as large as AdamW's (arXiv 2502.16982), so that one learning
        rate does for both. It knows matrices alone: a convolution is shown to it as (out, in · height · width).
        """
        args, weights = self.args, dict(self.model.named_parameters())
        hidden = [name for name in weights if args.optim == "muon" and re.search(self.hidden, name)]
        # Views of a weight and, from `optimize` on, of its gradient: a step moves the model's own numbers.
        self.matrices = {name: nn.Parameter(weights[name].data.flatten(1)) for name in hidden}
        rest = [weight for name, weight in weights.items() if name not in self.matrices]
        optimizers = [torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)]
        if hidden:
            options = {"lr": args.learning_rate, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
            optimizers.insert(0, torch.optim.Muon(self.matrices.values(), **options))
        return optimizers

    def train(self) -> None:
        """Train to the end, with a checkpoint every few minutes; a finished run only writes its results again."""
        if self.step == self.num_steps:
            if self.accelerator.is_main_process:
                self.write_averaged_model()
            self.accelerator.wait_for_everyone()
            return
        accelerator, losses = self.accelerator, []
        dataset = self.dataset.with_transform(lambda batch: to_tensors(batch, self.args))
        # Each process takes its own batches of the same list; where a run goes on, the list starts later.
        mine = self.batches[
            self.step * accelerator.num_processes + accelerator.process_index :: accelerator.num_processes
        ]
        bar = tqdm(
            total=self.num_steps * self.batch_size,
            initial=self.step * self.batch_size,
            unit=" images",
            mininterval=5,
            disable=not accelerator.is_main_process,
        )
        set_train_mode(self.model)
        spent = self.log[-1]["seconds"] if self.log else 0.0
        started = last = time.monotonic()
        # A generator of its own: starting a loader draws a number, which a run that goes on would draw once more.
        for batch in torch.utils.data.DataLoader(dataset, batch_sampler=mine, generator=torch.Generator()):
            losses.append(self.optimize(batch))
            bar.update(self.batch_size)
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
            self.write_stage()
            late = time.monotonic() - last > 60 * self.args.checkpoint_minutes
            if self.step == self.num_steps or broadcast_object_list([late])[0]:
                self.write_checkpoint(float(np.mean(losses)), spent + time.monotonic() - started)
                last, losses = time.monotonic(), []
        bar.close()

    def optimize(self, batch: dict[str, Tensor]) -> float:
        """Take one step and return its loss."""
        batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        loss = self.loss(batch)
        self.accelerator.backward(loss)
        weights = dict(self.model.named_parameters())
        for name, matrix in self.matrices.items():
            matrix.grad = weights[name].grad.flatten(1)
        self.accelerator.clip_grad_norm_(weights.values(), 1.0)
        for optimizer, lr_scheduler in zip(self.optimizers, self.lr_schedulers, strict=True):
            optimizer.step()
            lr_scheduler.step()
        self.model.zero_grad()
        self.ema.step(self.model.parameters())
        self.step += 1
        return loss.item()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        batch = {**batch, "pixels": self.encode(batch["pixels"])}
        return training_step(self.model, self.scheduler, batch, self.args, self.num_classes)

    def write_checkpoint(self, loss: float, seconds: float) -> None:
        """Write what a later run goes on from, and the averaged weights with samples of theirs."""
        pictures = self.step * self.batch_size
        self.log.append(
            {"step": self.step, "pictures": pictures, "loss": round(loss, 5), "seconds": round(seconds, 1)}
        )
        accelerator = self.accelerator
        if accelerator.is_main_process:
            print(json.dumps(self.log[-1]), flush=True)
            incomplete(self.checkpoint)
        accelerator.wait_for_everyone()
        accelerator.save_state(self.checkpoint.with_name(".checkpoint.incomplete"))  # each process has its own share
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name, value in (("log", self.log), ("recipe", self.recipe())):
                (self.checkpoint.with_name(".checkpoint.incomplete") / f"{name}.json").write_text(json.dumps(value))
            complete(self.checkpoint)
            self.write_averaged_model()
        accelerator.wait_for_everyone()

    def write_stage(self) -> None:
        """Write the averaged model to a folder of its own, when the step just taken completes one of the stages."""
        done, main = self.step * self.batch_size, self.accelerator.is_main_process
        for stage in self.args.stages:
            if main and done - self.batch_size < stage <= done:
                self.write_averaged_model(self.output / f"stage-{stage}")

    def write_samples(self, model: nn.Module, path: Path) -> None:
        """Draw what the model makes."""
        sample_grid(model, self.scheduler, path, self.num_classes, self.args.seed, vae=self.vae)

    def parts(self, model: Any) -> dict[str, Any]:
        """Return what is saved, by folder."""
        return {self.part: model, "scheduler": self.scheduler} | ({"vae": self.vae} if self.vae is not None else {})

    def write_averaged_model(self, output: Path | None = None) -> None:
        """Write `transformer/`, `scheduler/`, a grid of samples and the log to `output`, else to the run's folder."""
        output = output or self.output
        output.mkdir(exist_ok=True)
        # A copy, not a new model: drawing new weights would change the random numbers of the steps that follow.
        averaged = copy.deepcopy(self.accelerator.unwrap_model(self.model)).eval()
        self.ema.copy_to(averaged.parameters())
        self.write_samples(averaged, output / "samples.png")
        averaged.to(getattr(torch, self.args.save_dtype))
        for name, part in self.parts(averaged).items():
            part.save_pretrained(incomplete(output / name))
            complete(output / name)
        log = {"arguments": vars(self.args), "log": self.log}
        (output / "training_log.json").write_text(json.dumps(log, indent=1))


def main() -> None:
    """Run the training that the command line asks for."""
    training = Pretraining(HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()[0])
    training.train()
    # A process that ends with its group open may be aborted by torch, and the launcher calls the training failed.
    training.accelerator.end_training()


if __name__ == "__main__":
    main()
