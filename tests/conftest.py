"""Tiny real diffusers models, made once: nothing is downloaded.

torch, diffusers, transformers and the package are imported inside what uses them: a file that needs none of them, or
few, is done in seconds.
"""

import os

# Before anything imports huggingface_hub: a test that reaches for the network fails instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
# Several workers of pytest-xdist, and the processes that they start, share the processor.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import gc
import importlib.util
import logging
import re
import socketserver
import subprocess
import sys
from pathlib import Path

import pytest

# Begun first, so that no process is left alone with one of them in the end. They are named by what takes longest.
# fmt: off
LONGEST = (
    "sharing", "without_package", "folding", "examples", "distributed", "streaming", "resume", "training", "faults",
    "feature_cache", "determinism", "denoisers", "convert_diffusers", "timestep_selection", "model_cards",
    "diffusers_files", "demo", "half_precision", "golden", "segmentation",
)
# fmt: on
NUM_CLASSES = 5
NUM_BLOCKS = 3
# Families of `generic_pipelines.py`, which are not folded.
# fmt: off
DESCRIBED = (
    "z_image", "qwen_image", "aura_flow", "cogview4", "hunyuan_dit", "lumina_next",
    "flux2", "chroma", "longcat", "prx", "wan",
)
# fmt: on
# All families but for two, which stand for all in a quick run.
MATRIX = {"sit", "sd35", "pixart_alpha", "pixart_sigma", "flux", "flux_dev", "sana", "lumina2", *DESCRIBED}
# Fixtures that start processes or a server, or are whole runs.
PROCESS_FIXTURES = {"finished", "forking", "hub", "outcome", "pages", "summary", "train"}
HEAD = {"head_hidden_size": 16, "head_num_attention_heads": 2}


# The last lines of a script of several processes. One that ends while another still talks to it lets that one abort,
# and one that ends with its group open may abort itself: its threads outlive the interpreter.
END_OF_PROCESSES = """
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def example(name):
    """The module of an example, by its path below `examples/`."""
    path = Path(__file__).parents[1] / "examples" / name
    # A script finds those beside it, as when it is run.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark what is known by its parameters and fixtures, and leave out what is off unless `-m` names it."""
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        # Every tap of a family is folded: one family is enough for a quick run.
        matrix = MATRIX | {"sd3"} if item.path.stem == "test_folding" else MATRIX
        if any(isinstance(value, str) and value in matrix for value in given):
            item.add_marker("family")
        if "sd3_folder" in getattr(item, "fixturenames", ()):
            item.add_marker("family")
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")
    if not {"slow", "gpu"} & set(re.findall(r"\w+", config.option.markexpr)):
        off = {item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("gpu")}
        items[:] = [item for item in items if item not in off]
        config.hook.pytest_deselected(items=list(off))
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure(config):
    # The files are in the order in which pytest-xdist is to begin them; it would sort them by their number of tests.
    config.option.loadscopereorder = False
    # Imports make millions of objects, none of them to be collected: looking through them takes a second.
    gc.disable()


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()
    # Its summary imports all of hypothesis, to find that there is nothing to say.
    plugins = session.config.pluginmanager
    if "hypothesis" not in sys.modules and plugins.has_plugin("hypothesispytest"):
        plugins.unregister(name="hypothesispytest")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """What starts Python or a server costs seconds: only a test that is marked `process` may, with its fixtures."""
    if item.get_closest_marker("process") or item.path.parent != Path(__file__).parent:
        return (yield)
    start, listen = subprocess.Popen.__init__, socketserver.TCPServer.__init__

    def guarded_start(self, args, *others, **options):
        assert str(args[0]) != sys.executable, "A test that starts Python is to be marked `process`."
        return start(self, args, *others, **options)

    def guarded_listen(*_args, **_options):
        raise AssertionError("A test that starts a server is to be marked `process`.")

    subprocess.Popen.__init__, socketserver.TCPServer.__init__ = guarded_start, guarded_listen
    try:
        return (yield)
    finally:
        subprocess.Popen.__init__, socketserver.TCPServer.__init__ = start, listen


class DeprecationHandler(logging.Handler):
    """Collects what transformers and diffusers say of deprecated things."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if "deprecat" in record.getMessage().lower():
            self.lines.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_deprecations():
    """Transformers' deprecations fail our tests on the day they appear."""
    handler = DeprecationHandler()
    for name in ("transformers", "diffusers"):
        logging.getLogger(name).addHandler(handler)
    yield
    for name in ("transformers", "diffusers"):
        logging.getLogger(name).removeHandler(handler)
    assert not handler.lines


def build_transformer(num_channels=3, num_layers=NUM_BLOCKS):
    """A DiT of 3 blocks, 16 wide, 8 × 8 latents, every weight of which matters."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=num_channels,
        num_layers=num_layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def denoiser_of(transformer, timestep_embedding="diffusers", **options):
    """What reads a transformer of diffusers."""
    from hf_aselect.model.denoiser import Denoiser
    from hf_aselect.model.families import family_of

    family = family_of(type(transformer).__name__)
    return Denoiser(transformer, family, timestep_embedding=timestep_embedding, **options)


def build_vae():
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    ).eval()


@pytest.fixture(scope="session")
def pixel_folder(tmp_path_factory):
    """transformer/ and scheduler/ of a DiT on RGB images of 8 × 8."""
    from diffusers import DDPMScheduler

    folder = tmp_path_factory.mktemp("pixel")
    build_transformer().save_pretrained(folder / "transformer")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory):
    """A diffusers transformer alone."""
    folder = tmp_path_factory.mktemp("bare")
    build_transformer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def latent_folder(tmp_path_factory):
    """transformer/, scheduler/ and vae/ of a DiT on latents of images of 16 × 16."""
    from diffusers import DDPMScheduler

    folder = tmp_path_factory.mktemp("latent")
    build_transformer(num_channels=4).save_pretrained(folder / "transformer")
    build_vae().save_pretrained(folder / "vae")
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def loaded_model(pixel_folder):
    from hf_aselect import DiTModel

    return DiTModel.from_pretrained(pixel_folder, timestep=50)


@pytest.fixture
def model(loaded_model):
    """A DiT in pixel space, read at timestep 50."""
    return copy.deepcopy(loaded_model)


@pytest.fixture(scope="session")
def loaded_classifier(pixel_folder):
    """The classifier, and the random numbers that come after it was made."""
    import torch

    from hf_aselect import DiTForImageClassification

    torch.manual_seed(1)
    model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=50, num_labels=4, **HEAD)
    return model, torch.random.get_rng_state()


@pytest.fixture
def classifier(loaded_classifier):
    """A classifier of 4 classes on it, with a small attention head that is not trained."""
    import torch

    model, numbers = loaded_classifier
    torch.random.set_rng_state(numbers)
    return copy.deepcopy(model)


@pytest.fixture
def pixels():
    """Seven RGB images of 8 × 8 in [-1, 1]."""
    import torch

    return torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture
def pictures():
    """Six PIL images of 12 × 10."""
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 256, (6, 10, 12, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(value.numpy()) for value in values]


def enable_checkpointing(model, *options):
    """Turn checkpointing on: by its new name in transformers 5.23, where the old one is deprecated."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(*options)


def take_one_step(model, rows, batch_size, folder):
    """Let Trainer take one step of SGD on all rows, whose gradients it adds up over batches."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(rows) // batch_size,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows).train()
