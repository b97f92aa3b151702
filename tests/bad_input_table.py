"""Bad inputs, one by one, and what is said of each: `python tests/bad_input_table.py` prints them as a table.

`test_bad_input.py` holds that each is rejected with the right error, in words that say what is wrong.
"""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
from conftest import HEAD, build_transformer, build_vae
from diffusers import DDPMScheduler
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    NoiseSchedule,
    TimestepSelection,
    cache_features,
    convert_diffusers,
    convert_research,
    select_timestep,
)
from hf_aselect.cli import main as command_line
from hf_aselect.hub.card import CardFacts, facts_of_card
from hf_aselect.model.checks import PickledWeightsError
from hf_aselect.model.configuration_aselect import DDPM_LINEAR, DIT_XL_2
from hf_aselect.model.layouts import FoldedLayout, parse_tap_key
from hf_aselect.selection.probe import leave_one_out_hits

INDEX = "model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAN = float("nan")


class CommandError(Exception):
    """What the command line said on stderr, in one line, when it rejected; it ended with 1 or, for its words, 2."""


class World:
    """Models, folders and data sets to spoil, in a folder of their own; made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.number = 0

    def new(self, name: str = "") -> Path:
        """A path where nothing is."""
        self.number += 1
        return self.root / f"{self.number}-{name}"

    @cached_property
    def pixel(self) -> Path:
        folder = self.root / "pixel"
        build_transformer().save_pretrained(folder / "transformer")
        DDPMScheduler().save_pretrained(folder / "scheduler")
        return folder

    @cached_property
    def latent(self) -> Path:
        folder = self.root / "latent"
        build_transformer(num_channels=4).save_pretrained(folder / "transformer")
        build_vae().save_pretrained(folder / "vae")
        DDPMScheduler().save_pretrained(folder / "scheduler")
        return folder

    @cached_property
    def model(self) -> DiTModel:
        return DiTModel.from_pretrained(self.pixel, timestep=50)

    @cached_property
    def classifier(self) -> DiTForImageClassification:
        return DiTForImageClassification.from_pretrained(self.pixel, timestep=50, num_labels=4, **HEAD)

    @cached_property
    def segmenter(self) -> DiTForSemanticSegmentation:
        return DiTForSemanticSegmentation.from_pretrained(self.pixel, timestep=50, num_labels=4)

    @cached_property
    def saved(self) -> Path:
        self.classifier.save_pretrained(self.root / "saved")
        return self.root / "saved"

    @cached_property
    def in_shards(self) -> Path:
        self.classifier.save_pretrained(self.root / "in_shards", max_shard_size="10KB")
        return self.root / "in_shards"

    @cached_property
    def pixels(self) -> torch.Tensor:
        return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1

    @cached_property
    def pictures(self) -> list[Image.Image]:
        values = np.random.default_rng(3).integers(0, 256, (6, 10, 12, 3), dtype=np.uint8)
        return [Image.fromarray(value) for value in values]

    @cached_property
    def rows(self) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"image": self.pictures, "label": [0, 1, 2] * 2})

    def rows_of(self, *files: bytes | None) -> datasets.Dataset:
        """A data set whose images are files."""
        rows = [None if file is None else {"bytes": file, "path": None} for file in files]
        return datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image()))

    def rows_at(self, *paths: str) -> datasets.Dataset:
        """A data set whose images are elsewhere."""
        rows = [{"bytes": None, "path": path} for path in paths]
        return datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image()))

    def with_problem(self, kind: str, labels: torch.Tensor) -> object:
        """What a classifier of another kind of problem makes of labels."""
        config = ASelectConfig.from_dict({**self.classifier.config.to_dict(), "problem_type": kind})
        return DiTForImageClassification(config)(self.pixels, labels=labels)

    def spoiled(self, source: Path, change: Callable[[Path], object]) -> Path:
        """A copy of a folder, spoiled."""
        folder = self.new(source.name)
        shutil.copytree(source, folder)
        change(folder)
        return folder

    def with_config(self, **values: Any) -> Path:
        """Our checkpoint, with other values in its configuration."""
        return self.spoiled(self.saved, lambda folder: _update(folder / "config.json", values))

    def with_index(self, weight_map: Any) -> Path:
        """Our checkpoint in shards, with another index."""
        return self.spoiled(self.in_shards, lambda folder: _update(folder / INDEX, {"weight_map": weight_map}))

    def cache(self, change: Callable[[Path], object]) -> Any:
        """What `cache_features` makes of a cache that was spoiled."""
        folder = self.new("cache")
        cache_features(self.model, self.rows, folder)
        change(next(folder.iterdir()))
        return cache_features(self.model, self.rows, folder)

    def command(self, *words: object) -> None:
        """Run the command line; its error is raised."""
        said, code = io.StringIO(), 0
        before = torch.random.get_rng_state()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = command_line([str(word) for word in words])
        except SystemExit as end:  # argparse's
            code = int(end.code or 0)
        finally:
            torch.random.set_rng_state(before)
        # Progress bars go to stderr, too.
        lines = [line for line in said.getvalue().splitlines() if line.startswith("hf-aselect")]
        if code:
            assert "Traceback" not in said.getvalue()
            assert len(lines) == 1 or code == 2, said.getvalue()
            raise CommandError(lines[-1])


def _update(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path, share: float = 0.5) -> None:
    """Leave the beginning of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def file_of(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PHOTO = file_of(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
DRAWING = file_of(Image.effect_noise((16, 16), 50).convert("P"), "PNG")


@dataclass(frozen=True)
class Case:
    """A bad input: what it is, what is done with it, and what is to be said."""

    kind: str
    what: str
    call: Callable[[World], object]
    words: str
    error: type[Exception] = ValueError


def outcome(case: Case, world: World) -> Exception:
    """What is raised; an error where nothing is.

    Raises:
        AssertionError: If nothing is.
    """
    try:
        result = case.call(world)
    except (ValueError, OSError, StrictDataclassError, CommandError) as error:
        return error
    raise AssertionError(f"{case.what} was taken: {result!r}")


def text_of(error: Exception) -> str:
    """The words of an error, in one line."""
    # It says where the check stands; its cause says what is wrong.
    is_wrapped = isinstance(error, StrictDataclassError) and error.__cause__ is not None
    return " ".join(str(error.__cause__ if is_wrapped else error).split())


def processed(picture: Any, **options: Any) -> Callable[[World], object]:
    return lambda _: ASelectImageProcessor(size=8)(picture, return_tensors="pt", **options)


def configured(**fields: Any) -> Callable[[World], object]:
    return lambda _: ASelectConfig(**fields)


def scheduled(**values: Any) -> Callable[[World], object]:
    return lambda _: NoiseSchedule.from_config({**DDPM_LINEAR, **values})


def selected(images: Any = None, **options: Any) -> Callable[[World], object]:
    return lambda world: select_timestep(
        world.model, world.pictures if images is None else images, **{"timesteps": [10, 500], **options}
    )


def loaded(folder: Callable[[World], Path], **options: Any) -> Callable[[World], object]:
    return lambda world: DiTForImageClassification.from_pretrained(folder(world), **options)


def spoiled(source: str, change: Callable[[Path], object]) -> Callable[[World], object]:
    """Load a copy of a folder of the world, spoiled."""
    return lambda world: DiTModel.from_pretrained(world.spoiled(getattr(world, source), change), timestep=50)


def commanded(*words: object) -> Callable[[World], object]:
    """Run words, where `{name}` is a folder of the world, `{out}` one that is not there."""

    def run(world: World) -> None:
        names = {
            name: getattr(world, name) for word in words for name in re.findall(r"{(\w+)}", str(word)) if name != "out"
        }
        world.command(*(str(word).format(out=world.new("out"), **names) for word in words))

    return run


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def other_shape(path: Path) -> None:
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("proj_out_1.weight"))
    save_file({**weights, name: torch.zeros(1, 2)}, path, {"format": "pt"})


def extra_key(path: Path) -> None:
    save_file({**load_file(path), "backbone.denoiser.extra": torch.zeros(1)}, path, {"format": "pt"})


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


def adapter_pickle(folder: Path) -> None:
    config = {"peft_type": "LORA", "target_modules": ["to_q"], "r": 2, "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").write_bytes(b"a pickle")


LUMINA = {"_class_name": "Lumina2Transformer2DModel", "hidden_size": 32, "num_attention_heads": 4, "in_channels": 4}
LUMINA |= {"num_layers": 2, "sample_size": 8, "patch_size": 2}
VAE = {"_class_name": "AutoencoderKL", "in_channels": 3, "block_out_channels": [8]}
WAN_VAE = {"_class_name": "AutoencoderKLWan", "dim_mult": [1, 2], "z_dim": 4}
WAN_VAE |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
STRICT = StrictDataclassError
FIT = r"do not fit their configuration: 1 tensors of the backbone are missing, unexpected or of another shape"


def without_a_card() -> CardFacts:
    return CardFacts(model_name="x", accuracy=float("nan"))


CASES = [
    # Configurations.
    Case(
        "configuration",
        "timestep 1000",
        configured(timestep=1000),
        r"integer in \[0, 1000\) or 'auto'.*got 1000",
        STRICT,
    ),
    Case("configuration", "timestep True", configured(timestep=True), "'timestep'", STRICT),
    Case(
        "configuration", "no block", configured(block=[]), "`block` must name at least one block, got an empty", STRICT
    ),
    Case(
        "configuration",
        "auto among timesteps",
        configured(timestep=[5, "auto"]),
        "'auto' cannot be in a list",
        STRICT,
    ),
    Case("configuration", "a block twice", configured(block=[27, -1]), "`query` of block 27 is listed twice", STRICT),
    Case(
        "configuration",
        "a read-out without features",
        configured(read_out=[[5, 1]]),
        r"`read_out` must be a list of 1 to 4096 entries \[timestep, block, feature\], .* got \[\[5, 1\]\]",
    ),
    Case(
        "configuration",
        "a read-out beside blocks",
        configured(read_out=[[5, 1, "key"]], block=[0, 1]),
        r"`read_out` replaces .* got 5, \[0, 1\], 'key' as well",
        STRICT,
    ),
    Case(
        "configuration",
        "zeroed channels of several taps in one list",
        configured(block=[0, 1], zeroed_channels=[3]),
        "`zeroed_channels` must have one list per tap if several taps are read",
        STRICT,
    ),
    Case("configuration", "a misspelt field", configured(timestp=5), "no field `timestp` .did you mean `timestep`"),
    Case(
        "configuration",
        "a transformer that is a number",
        configured(transformer=5),
        "'transformer'.*expected a dict",
        STRICT,
    ),
    Case(
        "configuration",
        "a class name that is a list",
        configured(transformer={**DIT_XL_2, "_class_name": ["a"]}),
        r"Unsupported transformer \['a'\]; supported are DiT",
    ),
    Case(
        "configuration",
        "another model's transformer",
        configured(transformer={**DIT_XL_2, "_class_name": "UNet2DConditionModel"}),
        "Unsupported transformer 'UNet2DConditionModel'; supported are",
    ),
    Case(
        "configuration",
        "a size that is True",
        configured(transformer={**DIT_XL_2, "num_layers": True}),
        "integers in .1, .* as sizes, got.*True",
    ),
    Case(
        "configuration",
        "ten billion blocks",
        configured(transformer={**DIT_XL_2, "num_layers": 10**10}),
        r"integers in .1, 65536. as sizes, got.*10000000000",
    ),
    Case(
        "configuration",
        "rotary lengths of one axis",
        configured(transformer={**LUMINA, "axes_lens": [1]}),
        r"three lengths as `axes_lens`, got \[1\]",
    ),
    Case(
        "configuration",
        "key heads that are a word",
        configured(transformer={**LUMINA, "axes_lens": [9, 9, 9], "num_kv_heads": "x"}),
        "positive integer as `num_kv_heads`, got 'x'",
    ),
    Case(
        "configuration",
        "a VAE without resolutions",
        configured(vae={**VAE, "block_out_channels": []}),
        "must have 1 to 16 entries, one per resolution, got 0",
    ),
    Case(
        "configuration",
        "a VAE of 3000 resolutions",
        configured(vae={**VAE, "block_out_channels": [8] * 3000}),
        "1 to 16 entries, one per resolution, got 3000",
    ),
    Case(
        "configuration",
        "channels of a VAE that are a word",
        configured(vae={**VAE, "in_channels": "x"}),
        "`in_channels` of `vae` must be a positive integer, got 'x'",
    ),
    Case(
        "configuration",
        "latents scaled by NaN",
        configured(vae={**VAE, "scaling_factor": NAN}),
        "`scaling_factor` of `vae` must be a finite number other than 0, got nan",
    ),
    Case(
        "configuration",
        "latents scaled by 0",
        configured(vae={**VAE, "scaling_factor": 0}),
        "must be a finite number other than 0, got 0",
    ),
    Case(
        "configuration",
        "a VAE of another kind",
        configured(vae={"_class_name": "AutoencoderKLLTXVideo"}),
        r"Unsupported VAE 'AutoencoderKLLTXVideo'; supported are .*AutoencoderKLWan.* Pass `vae=None`",
    ),
    Case(
        "configuration",
        "a video's VAE without its deviations",
        configured(vae={**WAN_VAE, "latents_std": None}),
        "`vae` lacks latents_std",
    ),
    Case(
        "configuration",
        "a deviation of 1e-300",
        configured(vae={**WAN_VAE, "latents_std": [1.0, 1e-300, 1.0, 1.0]}),
        "`latents_std` of `vae` must be a list of 4 finite numbers.*standard deviations not 0",
    ),
    Case(
        "configuration",
        "means of other channels",
        configured(vae={**WAN_VAE, "latents_mean": [0.0]}),
        r"`latents_mean` of `vae` must be a list of 4 finite numbers.*got \[0.0\]",
    ),
    Case(
        "configuration",
        "a VAE of 1 channel in patches of 2 x 2",
        configured(vae={**WAN_VAE, "in_channels": 1, "patch_size": 2}),
        "`patch_size` of `vae` does not fit its channels.*got 2",
    ),
    Case(
        "configuration",
        "a FLUX.2 VAE of other patches",
        configured(vae={**VAE, "_class_name": "AutoencoderKLFlux2", "patch_size": [4, 4]}),
        r"`patch_size` of `vae` does not fit .*AutoencoderKLFlux2 has 2 × 2.*got \[4, 4\]",
    ),
    Case(
        "configuration",
        "an image of 2**40 pixels a side",
        configured(image_size=2**40),
        "`image_size` must be at most 65536 pixels per side",
        STRICT,
    ),
    Case(
        "configuration",
        "an image of -32 pixels",
        configured(image_size=-32),
        "must be a multiple of 2 pixels .a token's size., got -32",
        STRICT,
    ),
    Case(
        "configuration",
        "zeroed channels of a tap in Arabic digits",
        configured(zeroed_channels={"٣.hidden": [1]}),
        "keys 'BLOCK.FEATURE', such as '9.hidden', got",
        STRICT,
    ),
    Case(
        "configuration",
        "zeroed channels of a block of 5000 digits",
        configured(zeroed_channels={"9" * 5000 + ".hidden": [1]}),
        "keys 'BLOCK.FEATURE', such as '9.hidden', got",
        STRICT,
    ),
    Case("configuration", "0 classes", configured(num_labels=0), "`num_labels` must be a positive integer, got 0"),
    Case(
        "configuration",
        "classes that are a word",
        configured(num_labels="3"),
        "`num_labels` must be a positive integer, got '3'",
    ),
    Case(
        "configuration",
        "class names in a list",
        configured(id2label=["a", "b"]),
        "`id2label` must number the classes from 0 .*got .'a', 'b'.",
    ),
    Case(
        "configuration",
        "class names with a gap",
        configured(id2label={0: "a", 7: "b"}),
        "from 0 without gaps or repeats, got .0: 'a', 7: 'b'.",
    ),
    Case(
        "configuration",
        "stages that are a number",
        configured(out_indices=3),
        "`out_indices` must be a list of integers, got 3",
    ),
    Case(
        "configuration",
        "a guidance of NaN",
        configured(guidance=NAN),
        "`guidance` must be in .0, 1000000., got nan",
        STRICT,
    ),
    Case(
        "configuration",
        "a loss weight of NaN",
        configured(auxiliary_loss_weight=NAN),
        "`auxiliary_loss_weight` must be in .0, 1000000., got nan",
        STRICT,
    ),
    Case(
        "configuration",
        "weights in int7",
        configured(dtype="int7"),
        "`dtype` must be float32, bfloat16, float16 or float64, got 'int7'",
    ),
    Case(
        "configuration",
        "a problem of no kind",
        configured(problem_type="riddle"),
        "`problem_type` must be None or 'regression'.*got 'riddle'",
        STRICT,
    ),
    Case(
        "configuration",
        "a list in place of a dictionary",
        lambda _: ASelectConfig.from_dict([1]),
        r"must be a dictionary of fields by name, got \[1\]",
    ),
    Case(
        "configuration",
        "quantization that is a number",
        lambda _: ASelectConfig.from_dict({"quantization_config": 5}),
        "`quantization_config` must be a dictionary, got 5",
    ),
    Case(
        "configuration",
        "a folded layout of another version",
        configured(folded=True, folded_layout={"a": 1}),
        "`folded_layout` has unknown keys a, from another version",
    ),
    Case(
        "configuration",
        "a folded layout that is a list",
        lambda _: FoldedLayout.from_dict([1]),
        "`folded_layout` must be a dictionary, got list",
    ),
    Case(
        "configuration",
        "a record that is a list",
        lambda _: TimestepSelection.from_dict([1]),
        "A saved selection must be a dictionary, got list",
    ),
    Case(
        "configuration",
        "a tap of superscript digits",
        lambda _: parse_tap_key("².query"),
        "named 'BLOCK.FEATURE', such as '9.hidden', got '².query'",
    ),
    # Noise schedules.
    Case(
        "noise schedule",
        "betas of NaN",
        scheduled(beta_start=NAN),
        "`beta_start` of the scheduler must be a finite number, got nan",
    ),
    Case(
        "noise schedule",
        "a beta of 400 digits",
        scheduled(beta_end=10**400),
        "`beta_end` of the scheduler must be a finite number, got 1000",
    ),
    Case(
        "noise schedule",
        "betas below 0",
        scheduled(beta_start=-1.0, beta_schedule="scaled_linear"),
        "must be >= 0, got -1.0 and 0.02",
    ),
    Case(
        "noise schedule",
        "no noise at all",
        scheduled(beta_start=0.0, beta_end=0.0),
        r"must be in \[0, 1\] and not all 0, got values from 0 to 0",
    ),
    Case(
        "noise schedule",
        "betas above 1",
        scheduled(beta_end=5.0),
        r"must be in \[0, 1\] and not all 0, got values from 0.0001 to 5",
    ),
    Case(
        "noise schedule",
        "one trained beta",
        scheduled(trained_betas=[0.1]),
        "`trained_betas` of the scheduler must be a list of 1000 finite numbers",
    ),
    Case(
        "noise schedule",
        "an infinite shift",
        lambda _: NoiseSchedule.from_config({**FLOW, "shift": float("inf")}),
        "`shift` of the scheduler must be a finite number, got inf",
    ),
    Case(
        "noise schedule",
        "a boundary that is a word",
        lambda _: NoiseSchedule.from_config({**FLOW, "boundary_ratio": "x"}),
        "`boundary_ratio` of the scheduler must be a finite number, got 'x'",
    ),
    Case(
        "noise schedule",
        "a time that runs backwards",
        lambda _: NoiseSchedule.from_config({**FLOW, "invert_sigmas": True}),
        "`invert_sigmas=True` of the scheduler reverses the direction of time",
    ),
    Case(
        "noise schedule",
        "noise at timestep -1",
        lambda world: world.model.noise_schedule.add_noise(world.pixels, world.pixels, -1),
        r"integer in \[0, 1000\).*got -1",
    ),
    Case(
        "noise schedule",
        "a grid of no timesteps",
        lambda world: world.model.noise_schedule.even_timesteps(0),
        "`num` must be a positive integer, got 0",
    ),
    # Images.
    Case(
        "picture",
        "a truncated JPEG",
        processed(Image.open(io.BytesIO(PHOTO[:700]))),
        "An image cannot be read .image file is truncated",
    ),
    Case("picture", "of no pixels", processed(Image.new("RGB", (0, 5))), "An image must not be empty, got 0×5 pixels"),
    Case(
        "picture",
        "an array of no rows",
        processed(np.zeros((0, 8, 3), np.uint8)),
        r"An image must not be empty, got shape \(0, 8, 3\)",
    ),
    Case(
        "picture",
        "an array of true and false",
        processed(np.ones((8, 8, 3), bool)),
        "numbers in .0, 255., got values of bool. Multiply a Boolean mask",
    ),
    Case("picture", "complex numbers", processed(np.zeros((8, 8, 3), complex)), "got values of complex128"),
    Case("picture", "an array of None", processed(np.full((8, 8, 3), None)), "got values of object"),
    Case(
        "picture",
        "numbers beyond bytes in an array",
        processed(np.full((8, 8, 3), 60000, np.int32)),
        r"values in \[0, 255\], got values from 60000 to 60000",
    ),
    Case(
        "picture",
        "numbers below 0",
        processed(np.full((8, 8, 3), -5, np.int16)),
        "got values from -5 to -5. Scale them first",
    ),
    Case(
        "picture",
        "NaN in an array",
        processed(np.full((8, 8, 3), NAN)),
        "values in .0, 255., got NaN or infinite values",
    ),
    Case(
        "picture",
        "NaN in PIL's mode F",
        processed(Image.fromarray(np.full((8, 8), NAN, np.float32))),
        "An image of mode F must have values in .*, got values from nan to nan",
    ),
    Case(
        "picture",
        "infinity in PIL's mode F",
        processed(Image.fromarray(np.full((8, 8), np.inf, np.float32))),
        "An image of mode F must have values in .*, got values from inf to inf",
    ),
    Case(
        "picture",
        "2**30 in PIL's mode I",
        processed(Image.fromarray(np.full((8, 8), 2**30, np.int32))),
        "mode I must have values in .*16 bits, got values from 1.07374e.09",
    ),
    Case(
        "picture",
        "five channels",
        processed(np.zeros((9, 9, 5), np.uint8)),
        "must have 1, 3 or 4 channels, in its first or last dimension, got shape",
    ),
    Case(
        "picture",
        "a tensor without data",
        processed(torch.zeros(3, 8, 8, device="meta")),
        "one that is without data .on the meta device",
    ),
    Case(
        "picture",
        "a sparse tensor",
        processed(torch.ones(3, 8, 8).to_sparse()),
        "got one that is a torch.sparse_coo tensor",
    ),
    Case("picture", "None", processed(None), "a PIL image, a file, encoded bytes, an array or a tensor, got NoneType"),
    Case("picture", "the name of no file", processed("photo.png"), "cannot be read .*No such file.*photo.png"),
    Case(
        "picture",
        "an address",
        processed(["https://example.org/photo.png"]),
        "cannot be a URL, got 'https://example.org/photo.png'. URLs are not",
    ),
    Case("picture", "an empty list", processed([]), "must have at least one image, got an empty list"),
    Case(
        "picture", "a size of -8", processed(Image.new("RGB", (8, 8)), size=-8), "`size` must be 1 or more, got -8×-8"
    ),
    Case(
        "picture",
        "a standard deviation of 0",
        processed(Image.new("RGB", (8, 8)), image_std=0.0),
        "`image_std` must be finite and not 0, got 0.0",
    ),
    Case(
        "picture",
        "a mask of fractions",
        processed(Image.new("RGB", (8, 8)), segmentation_maps=np.zeros((8, 8))),
        "A mask must have integers of shape .H, W.",
    ),
    Case(
        "picture",
        "a mask that is a number",
        processed(Image.new("RGB", (8, 8)), segmentation_maps=3),
        "Masks must be PIL images, files, arrays or tensors, got int",
    ),
    Case(
        "picture",
        "a mask of class 2**40",
        processed(Image.new("RGB", (8, 8)), segmentation_maps=np.full((8, 8), 2**40)),
        "must have class indices in .0, 2..31",
    ),
    # Tensors.
    Case(
        "tensor",
        "pixel values of bytes",
        lambda world: world.model((world.pixels * 99).byte()),
        "`pixel_values` must be floating-point numbers, got torch.uint8. Convert 8-bit images with",
    ),
    Case(
        "tensor",
        "pixel values of true and false",
        lambda world: world.model(world.pixels > 0),
        "must be floating-point numbers, got torch.bool",
    ),
    Case(
        "tensor",
        "pixel values from 0 to 255",
        lambda world: world.model(world.pixels.abs() * 255),
        r"must be in \[-1, 1\], got values up to 25",
    ),
    Case(
        "tensor",
        "NaN",
        lambda world: world.model(world.pixels * NAN),
        r"`pixel_values` must be finite and in \[-1, 1\], got NaN",
    ),
    Case(
        "tensor",
        "infinity",
        lambda world: world.model(world.pixels / 0),
        r"`pixel_values` must be finite and in \[-1, 1\], got NaN",
    ),
    Case(
        "tensor",
        "an empty batch",
        lambda world: world.model(world.pixels[:0]),
        "`pixel_values` must hold at least one image",
    ),
    Case(
        "tensor",
        "on the meta device",
        lambda world: world.model(world.pixels.to("meta")),
        "a dense tensor with data, got one on the meta device",
    ),
    Case(
        "tensor",
        "sparse",
        lambda world: world.model(world.pixels.to_sparse()),
        "must be a dense tensor with data, got torch.sparse_coo",
    ),
    Case(
        "tensor",
        "an array of numpy",
        lambda world: world.model(world.pixels.numpy()),
        "`pixel_values` must be a tensor, got ndarray",
    ),
    Case(
        "tensor",
        "one image without a batch",
        lambda world: world.model(world.pixels[0]),
        r"must have shape \(B, C, H, W\), got \(3, 8, 8\)",
    ),
    Case(
        "tensor",
        "four channels",
        lambda world: world.model(torch.zeros(1, 4, 8, 8)),
        "must have 3 channels, got 4",
    ),
    Case(
        "tensor",
        "sides that do not divide",
        lambda world: world.model(torch.zeros(1, 3, 7, 8)),
        "must be multiples of 2 pixels .a token's size., got 7×8",
    ),
    Case(
        "tensor",
        "latents of integers",
        lambda world: world.model(latents=world.pixels.long()),
        "`latents` must be floating-point numbers, got torch.int64",
    ),
    Case(
        "tensor",
        "latents of NaN",
        lambda world: world.model(latents=world.pixels * NAN),
        "`latents` must be finite, got NaN",
    ),
    Case(
        "tensor",
        "features of NaN",
        lambda world: world.classifier(features=torch.full((2, 16, 16), NAN)),
        "`features` must be finite, got NaN or infinite values. Cache them again",
    ),
    Case(
        "tensor",
        "features of no tokens",
        lambda world: world.classifier(features=torch.zeros(2, 0, 16)),
        r"`features` must hold at least one image, got \(2, 0, 16\)",
    ),
    Case(
        "tensor",
        "labels outside the classes",
        lambda world: world.classifier(world.pixels, labels=torch.tensor([0, 4])),
        r"class indices in \[0, 4\), got \[4\]",
    ),
    Case(
        "tensor",
        "labels of fractions",
        lambda world: world.classifier(world.pixels, labels=torch.tensor([0.0, 1.0])),
        "must be class indices, integers in .0, 4., got torch.float32",
    ),
    Case(
        "tensor",
        "labels of true and false",
        lambda world: world.classifier(world.pixels, labels=torch.tensor([True, False])),
        "got torch.bool",
    ),
    Case(
        "tensor",
        "labels of NaN",
        lambda world: world.classifier(world.pixels, labels=torch.full((2, 4), NAN)),
        "`labels` must be finite, got NaN",
    ),
    Case(
        "tensor",
        "three labels of two images",
        lambda world: world.classifier(world.pixels, labels=torch.tensor([0, 1, 2])),
        r"one label for each of 2 images, got shape \(3,\)",
    ),
    Case(
        "tensor",
        "labels in a list",
        lambda world: world.classifier(world.pixels, labels=[0, 1]),
        "`labels` must be a tensor, got list",
    ),
    Case(
        "tensor",
        "masks of fractions",
        lambda world: world.segmenter(world.pixels, labels=torch.zeros(2, 8, 8)),
        "class indices of shape .2, 8, 8., one per pixel, got torch.float32",
    ),
    Case(
        "tensor",
        "masks outside the classes",
        lambda world: world.segmenter(world.pixels, labels=torch.full((2, 8, 8), 9)),
        r"class indices in \[0, 4\), or 255 for pixels without a class, got \[9\]",
    ),
    # Data sets.
    Case("data set", "empty", selected([]), "is empty, so there is nothing to select a timestep on"),
    Case(
        "data set",
        "a corrupt row",
        lambda world: selected(world.rows_of(DRAWING, DRAWING[:40]))(world),
        "Image 1 cannot be read: cannot identify image file",
    ),
    Case(
        "data set",
        "a truncated JPEG in a stream",
        lambda world: selected(world.rows_of(PHOTO, PHOTO[:700]).to_iterable_dataset())(world),
        "Image 1 cannot be read: image file is truncated",
    ),
    Case(
        "data set",
        "a row without an image",
        lambda world: selected(world.rows_of(DRAWING, None))(world),
        "Image 1 cannot be read: .*got NoneType",
    ),
    Case(
        "data set",
        "numbers for images",
        selected(datasets.Dataset.from_dict({"image": [1, 2]})),
        "Image 0 cannot be read: .*got int",
    ),
    Case(
        "data set",
        "names for images",
        selected(datasets.Dataset.from_dict({"image": ["/etc/passwd"]})),
        "cannot be read .cannot identify image file",
    ),
    Case(
        "data set",
        "no column of images",
        selected(datasets.Dataset.from_dict({"label": [1, 2]})),
        "a column `image` or exactly one image column, got label",
    ),
    Case(
        "data set",
        "pixel values of bytes",
        selected({"pixel_values": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}),
        "must be floating-point numbers in .-1, 1., got torch.uint8",
    ),
    Case(
        "data set",
        "all of one class",
        selected(criterion="probe", labels=[1] * 6),
        r"of at least two classes, got \{1\}",
    ),
    Case(
        "data set",
        "masks of one class",
        selected(criterion="patch_probe", labels=[np.zeros((10, 12), int)] * 6),
        "at least 2 classes and at least 2 images",
    ),
    Case(
        "data set",
        "one class for the probe",
        lambda _: leave_one_out_hits(torch.eye(3), torch.tensor([5, 5, 5])),
        "images of at least 2 classes",
    ),
    Case(
        "data set",
        "labels of NaN",
        selected(criterion="probe", labels=[0, 1, NAN] * 2),
        "class indices, integers >= 0: 'float' object",
    ),
    Case(
        "data set",
        "labels that are a number",
        selected(criterion="probe", labels=5),
        "a list with one class index per image, got int",
    ),
    Case(
        "data set",
        "a mask of another size",
        selected(criterion="patch_probe", labels=[np.zeros((9, 12), int)] * 6),
        "A mask must have the size of its image, 10×12 pixels, got 9×12",
    ),
    Case(
        "data set", "timesteps that are a number", selected(timesteps=5), r"a list of integers in \[0, 1000\), got 5"
    ),
    Case("data set", "2.5 images at the most", selected(max_images=2.5), "`max_images` must be an integer, got 2.5"),
    Case("data set", "no criterion", selected(criterion=None), "`criterion` must be one of hfr.*got None"),
    Case(
        "data set",
        "a block that is a fraction",
        selected(block=1.5),
        "`block` must be an integer, a list of integers or 'auto', got 1.5",
    ),
    Case(
        "data set",
        "a column that is not there, to cache",
        lambda world: cache_features(world.model, world.rows, world.new(), image_column="photo"),
        "has no column 'photo', only image, label",
    ),
    Case(
        "data set",
        "a column of numbers, to cache",
        lambda world: cache_features(world.model, world.rows, world.new(), image_column="label"),
        "Image 0 of the dataset cannot be read: .*got int",
    ),
    Case(
        "data set",
        "a row without an image, to cache",
        lambda world: cache_features(world.model, world.rows_of(DRAWING, None), world.new()),
        "Row 1 of the dataset has no image in 'image'",
    ),
    Case(
        "data set",
        "a corrupt row, to cache",
        lambda world: cache_features(world.model, world.rows_of(DRAWING, b"no image"), world.new()),
        "Image 1 cannot be read: cannot identify",
    ),
    Case(
        "data set",
        "an augmentation that gives nothing",
        lambda world: cache_features(world.model, world.rows, world.new(), num_views=2, augment=lambda picture: None),
        r"as `augment` returned it \(view 1\), cannot be read",
    ),
    Case(
        "data set",
        "a truncated cache",
        lambda world: world.cache(lambda folder: cut(next(folder.glob("*.arrow")))),
        "The cache in .* is broken .*Remove that folder, and run this again",
    ),
    Case(
        "data set",
        "a cache whose state leads elsewhere",
        lambda world: world.cache(
            lambda folder: _update(folder / "state.json", {"_data_files": [{"filename": "../../x.arrow"}]})
        ),
        "is broken .it has the parts .'../../x.arrow'., expected",
    ),
    Case(
        "data set",
        "a cache with brackets for a state",
        lambda world: world.cache(lambda folder: (folder / "state.json").write_text("[" * 10**5)),
        "is broken .maximum recursion depth",
    ),
    # Checkpoints.
    Case(
        "checkpoint",
        "truncated weights of diffusers",
        spoiled("pixel", lambda folder: cut(folder / "transformer" / WEIGHTS)),
        "is truncated or not a safetensors file",
    ),
    Case(
        "checkpoint",
        "truncated weights of ours",
        spoiled("saved", lambda folder: cut(folder / "model.safetensors")),
        "are truncated or not safetensors",
    ),
    Case(
        "checkpoint",
        "a header of 2**62 bytes, diffusers'",
        spoiled("pixel", lambda folder: huge_header(folder / "transformer" / WEIGHTS)),
        "is truncated or not a safetensors file .*header.*large",
    ),
    Case(
        "checkpoint",
        "a header of 2**62 bytes, ours",
        spoiled("saved", lambda folder: huge_header(folder / "model.safetensors")),
        "are truncated or not safetensors .*header.*large",
    ),
    Case(
        "checkpoint",
        "empty weights",
        spoiled("saved", lambda folder: cut(folder / "model.safetensors", 0)),
        "are truncated or not safetensors",
    ),
    Case(
        "checkpoint",
        "weights of another shape",
        spoiled("saved", lambda folder: other_shape(folder / "model.safetensors")),
        FIT,
    ),
    Case(
        "checkpoint",
        "a weight too many",
        spoiled("saved", lambda folder: extra_key(folder / "model.safetensors")),
        FIT,
    ),
    Case(
        "checkpoint",
        "another model's configuration",
        spoiled("saved", lambda folder: _update(folder / "config.json", {"model_type": "vit"})),
        "is not a supported checkpoint: expected an hf_aselect checkpoint",
    ),
    Case(
        "checkpoint",
        "a folder of notes",
        loaded(lambda world: world.spoiled(world.saved, lambda folder: [path.unlink() for path in folder.iterdir()])),
        "is not a supported checkpoint",
    ),
    Case(
        "checkpoint",
        "a configuration of brackets",
        spoiled("saved", lambda folder: (folder / "config.json").write_text("[" * 10**5)),
        "is not valid JSON: maximum recursion depth",
    ),
    Case(
        "checkpoint",
        "a number of 6000 digits",
        spoiled("saved", lambda folder: (folder / "config.json").write_text("1" * 6000)),
        "is not valid JSON: Exceeds the limit",
    ),
    Case(
        "checkpoint",
        "a configuration of no UTF-8",
        spoiled("pixel", lambda folder: (folder / "transformer/config.json").write_bytes(b"\xff\xfe")),
        "is not valid JSON: 'utf-8' codec",
    ),
    Case(
        "checkpoint",
        "an index that leaves the folder",
        loaded(lambda world: world.with_index({"a": "../saved/model.safetensors"})),
        "lists the weight file '../saved/model.safetensors', but only safetensors files in the same folder are read",
    ),
    Case(
        "checkpoint",
        "an index with an absolute path",
        loaded(lambda world: world.with_index({"a": str(world.saved / "model.safetensors")})),
        "but only safetensors files in the same folder are read",
    ),
    Case(
        "checkpoint",
        "an index of pickles",
        loaded(lambda world: world.with_index({"a": "pytorch_model.bin"})),
        "lists the weight file 'pytorch_model.bin', but only safetensors",
    ),
    Case("checkpoint", "an index without a map", loaded(lambda world: world.with_index([])), "has no `weight_map`"),
    Case(
        "checkpoint",
        "an index of a file that is gone",
        loaded(lambda world: world.with_index({"a": "gone.safetensors"})),
        "has no weights 'gone.safetensors'",
    ),
    Case(
        "checkpoint",
        "pickles alone",
        spoiled("saved", no_safetensors),
        "has only pickled weights .pytorch_model.bin., which are not loaded",
        PickledWeightsError,
    ),
    Case(
        "checkpoint",
        "an adapter that is a pickle",
        spoiled("saved", adapter_pickle),
        "because pickles can run any code, got adapter_model.bin",
        PickledWeightsError,
    ),
    Case(
        "checkpoint",
        "pickles asked for",
        loaded(lambda world: world.saved, use_safetensors=False),
        "`use_safetensors=False` is not supported",
    ),
    Case(
        "checkpoint",
        "a part that is missing",
        spoiled("latent", lambda folder: (folder / "vae" / WEIGHTS).unlink()),
        "has no weights 'diffusion_pytorch_model.safetensors'",
    ),
    Case(
        "checkpoint",
        "shards of 5 XB",
        lambda world: convert_diffusers(world.pixel, world.new(), max_shard_size="5 XB"),
        "at least 1 byte, as a number or a string such as '5GB' or '200MB', got '5 XB'",
    ),
    Case(
        "checkpoint",
        "a pickle of research weights",
        lambda world: convert_research(_written(world.new("sit.pt"), "x"), world.new(), layout="sit"),
        r"is a pickle, .* Pass `allow_pickle=True`",
    ),
    Case(
        "checkpoint",
        "a pickle that is none",
        lambda world: convert_research(
            _written(world.new("sit.pt"), "x"), world.new(), layout="sit", allow_pickle=True
        ),
        "is a text file instead of a PyTorch weights file",
    ),
    Case(
        "checkpoint",
        "a layout of a pipeline",
        lambda world: DiTModel.from_pretrained(world.pixel, timestep=5, layout="sit"),
        "`layout=` and `num_attention_heads=` are for weights of the DiT, SiT and REPA research code",
    ),
    Case(
        "checkpoint",
        "a card of broken YAML",
        lambda world: facts_of_card(_written(world.new("card.md"), "---\n[\n---\n")),
        "The front matter of .* cannot be read",
    ),
    Case(
        "checkpoint",
        "a card that runs code",
        lambda world: facts_of_card(
            _written(world.new("card.md"), "---\na: !!python/object/apply:os.getcwd []\n---\n")
        ),
        "could not determine a constructor for the tag",
    ),
    Case("checkpoint", "an accuracy of NaN", lambda _: without_a_card(), r"'accuracy' must be in \[0, 1\]"),
    # Command lines.
    Case("command line", "(nothing)", commanded(), "the following arguments are required: COMMAND", CommandError),
    Case("command line", "guess", commanded("guess"), "invalid choice: 'guess'", CommandError),
    Case(
        "command line",
        "select PIXEL --block first",
        commanded("select", "{pixel}", "--block", "first"),
        "--block: must be an integer or auto, got 'first'",
        CommandError,
    ),
    Case(
        "command line",
        "select PIXEL --max-images 0",
        commanded("select", "{pixel}", "--max-images", "0"),
        "must be at least 1, got 0",
        CommandError,
    ),
    Case(
        "command line",
        "select PIXEL --num-timesteps 0",
        commanded("select", "{pixel}", "--num-timesteps", "0"),
        "`num_timesteps` must be a positive integer, got 0",
        CommandError,
    ),
    Case(
        "command line",
        "select PIXEL --seed -1",
        commanded("select", "{pixel}", "--seed", "-1"),
        r"`seed` must be in \[0, 2..63\), got -1",
        CommandError,
    ),
    Case(
        "command line",
        "select PIXEL --images JUNK.parquet",
        lambda world: world.command("select", world.pixel, "--images", _written(world.new("junk.parquet"), "junk")),
        "Parquet|too small|Either the file is corrupted",
        CommandError,
    ),
    Case(
        "command line",
        "select PIXEL --images (an empty folder)",
        lambda world: world.command("select", world.pixel, "--images", _made(world.new("empty"))),
        "contains no images",
        CommandError,
    ),
    Case(
        "command line",
        "select PIXEL --images (a folder with a broken image)",
        lambda world: world.command(
            "select", world.pixel, "--images", _written(_made(world.new()) / "a.png", "no image").parent
        ),
        "Image 0 cannot be read",
        CommandError,
    ),
    Case(
        "command line",
        "convert nowhere OUT",
        commanded("convert", "no/where", "{out}"),
        "'no/where' is neither a local folder nor in the cache, and the Hub cannot be reached",
        CommandError,
    ),
    Case(
        "command line",
        "convert PIXEL OUT --max-shard-size inf",
        commanded("convert", "{pixel}", "{out}", "--max-shard-size", "inf"),
        "must be a positive number, got 'inf'",
        CommandError,
    ),
    Case(
        "command line",
        "convert PIXEL OUT --timestep auto",
        commanded("convert", "{pixel}", "{out}", "--timestep", "auto"),
        "`--timestep auto` needs `--images`",
        CommandError,
    ),
    Case(
        "command line",
        "convert PIXEL OUT --vae PIXEL",
        commanded("convert", "{pixel}", "{out}", "--vae", "{pixel}"),
        "--vae: only for research weights",
        CommandError,
    ),
    Case(
        "command line",
        "convert PIXEL OUT --image-size 7",
        commanded("convert", "{pixel}", "{out}", "--image-size", "7"),
        "must be a multiple of 2 pixels",
        CommandError,
    ),
    Case(
        "command line",
        "convert PIXEL PIXEL/in",
        commanded("convert", "{pixel}", "{pixel}/in"),
        "must not lie inside the source, got .* Pass a folder beside it",
        CommandError,
    ),
    Case(
        "command line",
        "fold SAVED OUT --timestep 1000",
        commanded("fold", "{saved}", "{out}", "--timestep", "1000"),
        r"`timestep` must be an integer in \[0, 1000\)",
        CommandError,
    ),
    Case(
        "command line",
        "fold (classes that are a number) OUT",
        lambda world: world.command("fold", world.with_config(architectures=5), world.new()),
        "`architectures` must be a list of class names, got 5",
        CommandError,
    ),
    Case(
        "command line",
        "fold (a scheduler of one beta) OUT",
        lambda world: world.command(
            "fold", world.with_config(scheduler={**DDPM_LINEAR, "trained_betas": [1]}), world.new()
        ),
        "a list of 1000 finite numbers",
        CommandError,
    ),
    Case(
        "command line",
        "card SAVED --accuracy 75",
        commanded("card", "{saved}", "--accuracy", "75"),
        "'accuracy' must be in .0, 1.",
        CommandError,
    ),
    Case(
        "command line",
        "card nowhere",
        commanded("card", "no/where"),
        "is not a folder. Pass the folder to write the card to",
        CommandError,
    ),
    Case(
        "command line",
        "demo --task guess",
        commanded("demo", "--task", "guess"),
        "invalid choice: 'guess'",
        CommandError,
    ),
    # What an outside reading found.
    Case(
        "configuration",
        "weights in 8 bits",
        configured(dtype="float8_e4m3fn"),
        "`dtype` must be float32, bfloat16, float16 or float64, got 'float8_e4m3fn'",
    ),
    Case(
        "configuration",
        "60000 blocks",
        configured(transformer={**DIT_XL_2, "num_layers": 60000}),
        "at most 1000 blocks, got .'num_layers': 60000",
    ),
    Case(
        "configuration",
        "ten million layers in the head",
        configured(head_num_layers=10**7),
        "`head_num_layers` must be in .1, 1000., got",
        STRICT,
    ),
    Case(
        "configuration",
        "a head as wide as a disk",
        configured(head_hidden_size=10**12),
        "`head_hidden_size` times `head_mlp_ratio` must be at most",
        STRICT,
    ),
    Case(
        "configuration",
        "a decoder as wide as a disk",
        configured(decoder_hidden_size=10**12),
        "`decoder_hidden_size` must be in .1, 65536., got",
        STRICT,
    ),
    Case(
        "configuration",
        "a billion noise draws",
        configured(num_noise_draws=10**9),
        "`num_noise_draws` must be in .1, 1000., got 1000000000",
        STRICT,
    ),
    Case(
        "configuration",
        "an image of a billion tokens",
        configured(image_size=65536),
        "`image_size` must give at most 1048576 tokens",
        STRICT,
    ),
    Case(
        "configuration",
        "a problem of no kind, of a saved model",
        loaded(lambda world: world.saved, problem_type="junk"),
        "`problem_type` must be None or 'regression'",
        STRICT,
    ),
    Case(
        "configuration",
        "class names with a gap, of a saved model",
        loaded(lambda world: world.saved, id2label={"0": "a", "5": "b"}),
        "`id2label` must number the classes",
    ),
    Case(
        "picture",
        "lists of nothing",
        lambda _: ASelectImageProcessor(size=8)([[]]),
        "`images` must have at least one image",
    ),
    Case(
        "picture",
        "a batch of no images",
        processed(torch.zeros(0, 3, 8, 8)),
        "`images` must have at least one image",
    ),
    Case("picture", "a size of words", lambda _: ASelectImageProcessor(size={"height": "8", "width": 8}), "integers"),
    Case("picture", "a size that is a list of words", lambda _: ASelectImageProcessor(size=["a"]), "an integer, or"),
    Case("picture", "a size of 10**9", processed(Image.new("RGB", (9, 9)), size=10**9), "at most 268435456 pixels"),
    Case(
        "picture",
        "a standard deviation by name",
        lambda _: ASelectImageProcessor(image_std={"a": 1}),
        "`image_std` must be finite numbers, one per channel",
    ),
    Case(
        "picture",
        "a field in place of a method",
        lambda _: ASelectImageProcessor(preprocess=5),
        "ASelectImageProcessor has no field 'preprocess'",
    ),
    Case(
        "picture",
        "a mask without data",
        lambda _: ASelectImageProcessor(size=8)(
            Image.new("RGB", (8, 8)), torch.zeros(8, 8, dtype=torch.long, device="meta")
        ),
        "A mask must be a dense tensor with data",
    ),
    Case(
        "picture",
        "a truncated mask",
        lambda _: ASelectImageProcessor(size=8)(
            Image.new("RGB", (16, 16)), Image.open(io.BytesIO(DRAWING[: len(DRAWING) - 40]))
        ),
        "A mask cannot be read",
    ),
    Case(
        "tensor",
        "labels of three shapes in a regression",
        lambda world: world.with_problem("regression", torch.rand(2, 1)),
        r"`labels` for regression must have shape \(2, 4\), got \(2, 1\)",
    ),
    Case(
        "tensor",
        "labels of several classes that are indices",
        lambda world: world.with_problem("multi_label_classification", torch.tensor([0, 3])),
        r"`labels` for multi-label classification must be 0 or 1, \(2, 4\), got \(2,\)",
    ),
    Case(
        "tensor",
        "labels of several classes left out by -100",
        lambda world: world.with_problem("multi_label_classification", torch.full((2, 4), -100)),
        "must be 0 or 1, .* with values up to 100",
    ),
    Case(
        "tensor",
        "labels without data",
        lambda world: world.classifier(world.pixels, labels=torch.zeros(2, dtype=torch.long, device="meta")),
        "`labels` must be a dense tensor of numbers",
    ),
    Case(
        "tensor",
        "a block that there is not",
        lambda world: world.model.extract_maps(world.pixels, [(9, "hidden")]),
        "There is no `hidden` of block 9: this transformer has 3 blocks",
    ),
    Case(
        "tensor",
        "queries of what the first block reads",
        lambda world: world.model.extract_maps(world.pixels, [(-1, "query")]),
        "There is no `query` of block -1",
    ),
    Case(
        "tensor",
        "noise on integers",
        lambda world: world.model.add_noise(world.pixels.long(), 3),
        "`latents` must be floating-point numbers",
    ),
    Case(
        "tensor",
        "noise draw -1",
        lambda world: world.model.add_noise(world.pixels, 3, draw=-1),
        "`draw` must be an integer >= 0, got -1",
    ),
    Case(
        "data set",
        "an address in place of an image",
        lambda world: select_timestep(world.model, world.rows_at("http://127.0.0.1:9/a.png"), timesteps=[10, 500]),
        "has URLs instead of images, such as 'http://127.0.0.1:9/a.png'",
    ),
    Case(
        "data set",
        "an address in place of an image, to cache",
        lambda world: cache_features(world.model, world.rows_at("http://127.0.0.1:9/a.png"), world.new()),
        "has URLs instead of images",
    ),
    Case(
        "data set",
        "one image again and again",
        selected([Image.new("RGB", (12, 10))] * 9, criterion="consensus"),
        "are all the same",
    ),
    Case(
        "data set",
        "10**12 views",
        lambda world: cache_features(world.model, world.rows, world.new(), num_views=10**12),
        "`num_views` must be at most 10000",
    ),
    Case(
        "checkpoint",
        "weights in whole numbers, ours",
        loaded(lambda world: world.spoiled(world.saved, lambda folder: in_dtype(folder / "model.safetensors"))),
        r"has dtype I64, expected float32, bfloat16, float16 or float64",
    ),
    Case(
        "checkpoint",
        "weights in whole numbers, diffusers'",
        spoiled("pixel", lambda folder: in_dtype(folder / "transformer" / WEIGHTS)),
        r"has dtype torch.int64, expected float32",
    ),
    Case(
        "checkpoint",
        "a pipe in place of a configuration",
        spoiled("pixel", lambda folder: pipe(folder / "transformer" / "config.json")),
        "config.json' is not a file",
    ),
    Case(
        "checkpoint",
        "a pipe in place of an index",
        loaded(lambda world: world.spoiled(world.in_shards, lambda folder: pipe(folder / INDEX))),
        "index.json' is not a file",
    ),
    Case(
        "checkpoint",
        "an index of 60 MB",
        loaded(lambda world: world.spoiled(world.in_shards, lambda folder: os.truncate(folder / INDEX, 60_000_000))),
        "has 60000000 bytes, but at most 50000000 are read",
    ),
    Case(
        "checkpoint",
        "an adapter that is a number",
        loaded(lambda world: world.spoiled(world.saved, lambda folder: _written(folder / "adapter_config.json", "5"))),
        "adapter_config.json' must contain a JSON object, got a int",
    ),
    Case(
        "checkpoint",
        "an adapter of kind 5",
        loaded(
            lambda world: world.spoiled(
                world.saved, lambda folder: _written(folder / "adapter_config.json", '{"peft_type": 5}')
            )
        ),
        "its `peft_type` must be a string, got 5",
    ),
    Case(
        "checkpoint",
        "a card of a billion aliases",
        lambda world: facts_of_card(_written(world.new("card.md"), aliases("hf_aselect: {accuracy: *i}"))),
        "has more than 10000 values",
    ),
    Case(
        "command line",
        "select PIXEL --images (a folder whose list is no JSON)",
        lambda world: world.command("select", world.pixel, "--images", _listed(world.new())),
        "cannot be read as images",
        CommandError,
    ),
    Case(
        "command line",
        "fold (weights in 8 bits) OUT",
        lambda world: world.command("fold", world.with_config(dtype="float8_e4m3fn"), world.new()),
        "`dtype` must be float32",
        CommandError,
    ),
]


def aliases(last: str) -> str:
    """A card of a few lines that stands for a billion values."""
    text, before = "---\na: &a [x,x,x,x,x,x,x,x,x,x]\n", "a"
    for name in "bcdefghi":
        text += f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n"
        before = name
    return f"{text}{last}\n---\n"


def in_dtype(path: Path) -> None:
    save_file({name: value.long() for name, value in load_file(path).items()}, path, {"format": "pt"})


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _listed(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "label": ')
    return folder


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def table(world: World) -> str:
    """All cases with what was said of each, as Markdown."""
    lines = ["| kind | input | error |", "| --- | --- | --- |"]
    for case in CASES:
        error = outcome(case, world)
        name = "exit" if isinstance(error, CommandError) else type(error).__name__
        said = text_of(error).replace(str(world.root), "…").replace("|", "\\|")
        said = said if len(said) <= 300 else f"{said[:300]}…"
        lines.append(f"| {case.kind} | {case.what} | {name}: {said} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        print(table(World(Path(folder))))
        print(f"\n{len(CASES)} inputs.", file=sys.stderr)


if __name__ == "__main__":
    main()
