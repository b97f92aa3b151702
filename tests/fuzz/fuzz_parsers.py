"""Fuzzing of all that reads words, JSON or bytes from outside: mutated seeds, counted, one parser at a time.

    python tests/fuzz/fuzz_parsers.py --list
    python tests/fuzz/fuzz_parsers.py --parser weights_index --executions 1000000 --seconds 480 --seed 0

A parser may reject what it is given by the errors that it promises (`ValueError`, mostly) and by nothing else, must
be done within five seconds, and what it takes must hold what is checked here. The first inputs that break this are
shown; the exit code is then 1. Everything follows from the seed. Where atheris is installed, `--engine atheris` lets
libFuzzer select the mutations by the lines that they reach; it ends at the first failure.
"""

import argparse
import atexit
import copy
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FunctionType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from PIL import Image
from safetensors.torch import save

from hf_aselect import ASelectConfig, ASelectImageProcessor, NoiseSchedule, TimestepSelection
from hf_aselect.checkpoints.atomic import _names_on
from hf_aselect.checkpoints.convert import _bytes_of
from hf_aselect.checkpoints.empty_prompt import _refuse_other_code
from hf_aselect.checkpoints.hub_files import needed_files
from hf_aselect.checkpoints.licenses import license_on_card
from hf_aselect.checkpoints.research import research_file
from hf_aselect.checkpoints.weight_files import check_parts, iterate_weights, tensor_bytes
from hf_aselect.cli import _block, _gigabytes
from hf_aselect.hub.card import facts_of_card, own_words
from hf_aselect.model.checks import check_files, read_json, shards_of
from hf_aselect.model.configuration_aselect import DDPM_LINEAR, DIT_XL_2
from hf_aselect.model.families import layout_of
from hf_aselect.model.folded_transformer import sincos_table
from hf_aselect.model.layouts import FoldedLayout, parse_tap_key, tap_key
from hf_aselect.training.feature_cache import _opened

TIMEOUT = 5  # seconds of one execution
MAX_BYTES = 4096  # of a mutated input, unless its seed is larger


@dataclass
class Parser:
    """What is fuzzed: how it is called with bytes, what it starts from, and how it may reject."""

    call: Callable[[bytes], None]
    seeds: list[bytes]
    refusals: tuple[type[Exception], ...] = (ValueError,)
    words: list[bytes] = field(default_factory=list)  # that mean something to it


class Broken(BaseException):
    """What was taken does not hold what it must, or took too long; no `except Exception` of a parser ends it."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


def value_of(data: bytes) -> object:
    """What JSON makes of it, for parsers of what JSON made; rejected where it makes nothing."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("too deep") from error


def config(data: bytes) -> None:
    made = ASelectConfig.from_dict(value_of(data))
    again = made.to_dict()
    check(0 < made.num_labels < 2**20, "classes")
    check(made.patch_pixels >= 1 and min(made.image_height_width) >= made.patch_pixels, "sizes")
    json.dumps(again)


def folded_layout(data: bytes) -> None:
    made = FoldedLayout.from_dict(value_of(data))
    check(FoldedLayout.from_dict(made.to_dict()) == made, "round trip")
    check(made.last_block >= -1 and 0 <= made.timestep < 1000, "blocks")


def selection(data: bytes) -> None:
    made = TimestepSelection.from_dict(value_of(data))
    again = TimestepSelection.from_dict(made.to_dict())
    check(json.dumps(again.to_dict()) == json.dumps(made.to_dict()), "round trip")
    check(made.timestep in made.timesteps, "timestep")


def scheduler(data: bytes) -> None:
    made = NoiseSchedule.from_config(value_of(data))
    check(bool(made.alphas.isfinite().all() and made.sigmas.isfinite().all()), "finite")
    check(made.sampled is None or bool(made.sampled.isfinite().all()), "sampled")
    check(0 <= made.timestep_at(0.0) < 1000, "timestep")


def transformer(data: bytes) -> None:
    value = value_of(data)
    if not isinstance(value, dict):  # the configuration has checked that
        raise ValueError
    made = layout_of(value)
    check(all(isinstance(each, int | bool) or each is None for each in asdict(made).values()), "integers")


FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def written(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def json_file(data: bytes) -> None:
    check(isinstance(read_json(written("config.json", data)), dict), "an object")


def weights_index(data: bytes) -> None:
    for path in shards_of(written("model.safetensors.index.json", data)):
        check(path.parent == FOLDER and path.is_file() and path.suffix == ".safetensors", "inside the folder")


def safetensors_header(data: bytes) -> None:
    path = written("header.safetensors", data)
    sizes = tensor_bytes([path])  # never rejects
    check(all(isinstance(size, int) and size >= 0 for size in sizes.values()), "sizes")
    for _, value in iterate_weights([path]):
        check(value.nbytes <= len(data), "inside the file")


def research_pickle(data: bytes) -> None:
    weights = research_file(written("weights.pt", data), allow_pickle=True)
    sizes = weights.transformer(1)
    check(sizes["num_layers"] >= 1 and weights.layout("sit").timestep_embedding == "sit", "sizes")
    for _, value in weights.of_diffusers():
        check(value.nbytes <= len(data), "inside the file")


def research_seeds() -> list[bytes]:
    """Pickles of the weights of a DiT of one block, alone and in a checkpoint of a training."""
    width = 4
    shapes = {
        "x_embedder.proj": (width, 1, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
    }
    shapes |= {"final_layer.linear": (4, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    parts = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    shapes |= {f"blocks.0.{part}": (rows * width, columns * width) for part, (rows, columns) in parts.items()}
    weights = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.ones(shape[0]) for name, shape in shapes.items()}
    weights |= {
        "y_embedder.embedding_table.weight": torch.ones(3, width),
        "pos_embed": sincos_table(width, 2, 2, 2, 1),
    }
    seeds = []
    for content in (weights, {"ema": weights, "args": argparse.Namespace(model="SiT-S/2"), "steps": 1}):
        file = io.BytesIO()
        torch.save(content, file)
        seeds.append(file.getvalue())
    return seeds


FILES = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json"]
FILES += ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json"]
FILES += ["scheduler/scheduler_config.json", "transformer/evil.py", "../x.safetensors", "README.md"]
TEXT = ("text_encoder", "tokenizer")


def model_index(data: bytes) -> None:
    path = written("model_index.json", data)
    try:
        index = read_json(path)
        check_parts(FOLDER, ("transformer", "vae", *TEXT))
        _refuse_other_code(FOLDER, index, ("transformer", "vae", "scheduler", *TEXT))
        needed = needed_files(FILES, index, None, TEXT)
        check(set(needed) <= {*FILES, "model_index.json"} and "../x.safetensors" not in needed, "files")
    finally:
        path.unlink()


def note(data: bytes) -> None:
    for name in _names_on(written("note", data)):
        check((FOLDER / name).parent == FOLDER and name not in (".", ".."), "inside the folder")


def card(data: bytes) -> None:
    path = written("README.md", data)
    license_on_card(FOLDER)  # never rejects
    facts = facts_of_card(path)
    check(all(isinstance(name, str) for name in facts), "names")
    own_words(data.decode())


def cache(part: str) -> Callable[[bytes], None]:
    def opened(data: bytes) -> None:
        path = FOLDER / "cache" / part
        path.write_bytes(data)
        try:
            found = _opened(JOB, FOLDER / "cache")
            check(found.num_rows == JOB.num_rows, "rows")
        finally:
            path.write_bytes(CACHE[part])

    return opened


class JOB:
    """What a cache is expected to be."""

    num_rows, num_parts, name = 4, 1, "features"


def make_cache() -> dict[str, bytes]:
    folder = FOLDER / "cache"
    datasets.disable_progress_bars()
    rows = {"features": np.arange(8, dtype=np.float32).reshape(4, 2).tolist(), "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tap(data: bytes) -> None:
    word = data.decode("utf-8", "replace")
    block, feature = parse_tap_key(word)
    check(tap_key(block, feature) == word and block >= -1, "round trip")


def cli_words(data: bytes) -> None:
    word = data.decode("utf-8", "replace")
    for read in (_block, _gigabytes):
        try:
            found = read(word)
        except argparse.ArgumentTypeError:
            continue
        check(found == "auto" or isinstance(found, int) or 0 < found < float("inf"), "a number")
    check(1 <= _bytes_of(word) < float("inf"), "bytes")


PROCESSOR = ASelectImageProcessor(size=8)


def picture(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of broken metadata
        try:
            image = Image.open(io.BytesIO(data))
        except Exception as error:  # PIL's own parsers are not ours
            raise ValueError from error
        if image.width * image.height > 2**20:
            raise ValueError
        values = PROCESSOR(image, return_tensors="pt").pixel_values
    check(values.shape == (1, 3, 8, 8) and bool((values.abs() <= 1).all()), "range")


def processor(data: bytes) -> None:
    value = value_of(data)
    if not isinstance(value, dict):  # transformers has checked that
        raise ValueError
    made = ASelectImageProcessor(**value)
    check(callable(made.preprocess) and callable(made.process_image), "methods")


def adapter(data: bytes) -> None:
    path = written("adapter_config.json", data)
    try:
        check_files(FOLDER, None)
    finally:
        path.unlink()


def dumped(*values: object) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


TINY = {**DIT_XL_2, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
LUMINA = {"_class_name": "Lumina2Transformer2DModel", "hidden_size": 32, "num_attention_heads": 4, "in_channels": 16}
LUMINA |= {"num_layers": 3, "sample_size": 8, "patch_size": 2, "axes_lens": [32, 16, 16], "num_kv_heads": 2}
FLUX = {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64}
FLUX |= {"num_layers": 2, "num_single_layers": 2}
VAE = {"_class_name": "AutoencoderKL", "in_channels": 3, "block_out_channels": [8, 8], "latent_channels": 4}
LAYOUT = {"timestep": 5, "taps": ["1.query"], "num_channels": 4, "patch_size": 2, "hidden_size": 16}
LAYOUT |= {"num_attention_heads": 2, "mlp_size": 64, "rows": 16, "columns": 16, "query_key_norm_eps": None}
LAYOUT |= {"rotary_sizes": [2, 4], "dual_attention_blocks": [0], "positions": "sincos", "blocks": "plain"}
LAYOUT |= {"others": [60, 141]}
RECORD = {"timestep": 5, "timesteps": [1, 5], "scores": [0.1, 0.2], "smoothed": [0.1, 0.2], "block": 1, "seed": 0}
RECORD |= {"intervals": [[0.0, 0.2], [0.1, 0.3]], "log_snr": [3.0, 1.0], "confidence": 0.9, "criterion": "hfr"}
RECORD |= {"settings": {"cutoff": 0.15}, "options": {}, "feature": "query", "num_images": 4, "pictures": "given"}
RECORD |= {"stopped_by": "confidence", "num_forwards": 8, "seconds": 1.5, "warnings": ["few"], "table": None}
CONFIG = {
    "transformer": TINY,
    "scheduler": DDPM_LINEAR,
    "timestep": 5,
    "block": 1,
    "feature": "query",
    "head": "linear",
}
CONFIG |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}, "vae": VAE, "image_size": [64, 64]}
CONFIG |= {
    "zeroed_channels": {"1.hidden": [3]},
    "out_indices": [1, 2],
    "stage_names": ["stem"],
    "torch_dtype": "float16",
    "num_labels": 2,
    "problem_type": "regression",
    "tie_word_embeddings": False,
    "quantization_config": {},
    "architectures": ["DiTModel"],
    "dtype": "float32",
}
INDEX = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": [None, None]}
INDEX |= {"scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "T5EncoderModel"]}
SHARDS = {"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
CARD = b"""---
license: other
license_name: some-nc
datasets:
- one/two
hf_aselect:
  accuracy: 0.5
  training: {epochs: 3}
model-index:
- name: x
  results:
  - task: {type: image-classification}
    dataset: {type: a, name: a}
    metrics:
    - {type: accuracy, value: 0.5}
---
# Title
"""
PATHS = [
    b'"../x.safetensors"',
    b'"/etc/passwd"',
    b'"a/b.safetensors"',
    b'"model.bin"',
    b'"..\\\\x.safetensors"',
    b'".."',
]


def pictures() -> list[bytes]:
    image, found = Image.effect_noise((12, 10), 60), []
    for mode, kind in (("RGB", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGBA", "PNG"), ("L", "GIF"), ("CMYK", "JPEG")):
        file = io.BytesIO()
        image.convert("RGB").convert(mode).save(file, kind) if mode != "I;16" else image.convert("I").convert(
            "I;16"
        ).save(file, kind)
        found.append(file.getvalue())
    file, exif = io.BytesIO(), image.getexif()
    exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    return [*found, file.getvalue()]


def parsers() -> dict[str, Parser]:
    """All of them, by name."""
    for name in ("one.safetensors", "two.safetensors"):
        (FOLDER / name).write_bytes(b"x")
    (FOLDER / "vae").mkdir(exist_ok=True)
    CACHE.update(CACHE or make_cache())
    tensors = save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"format": "pt"})
    host = (ValueError, StrictDataclassFieldValidationError)
    return {
        "config": Parser(config, dumped(CONFIG, {"transformer": LUMINA}, {"transformer": FLUX}, {}), host),
        "transformer": Parser(transformer, dumped(DIT_XL_2, LUMINA, FLUX)),
        "scheduler": Parser(
            scheduler,
            dumped(
                DDPM_LINEAR,
                {**DDPM_LINEAR, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
                {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False},
                {**DDPM_LINEAR, "trained_betas": [0.001] * 1000},
            ),
        ),
        "folded_layout": Parser(folded_layout, dumped(LAYOUT)),
        "selection": Parser(selection, dumped(RECORD)),
        "tap": Parser(tap, [b"9.hidden", b"-1.hidden", b"0.query"], words=["²".encode(), "٣".encode(), b"-", b"."]),
        "cli_words": Parser(cli_words, [b"5GB", b"200 MB", b"1.5", b"auto", b"-3"], words=[b"inf", b"nan", b"1e999"]),
        "json_file": Parser(json_file, dumped(CONFIG, [1], 5), (ValueError, OSError)),
        "processor": Parser(processor, dumped(PROCESSOR.to_dict(), {"size": 8, "image_mean": [0.5], "resample": 3})),
        "adapter": Parser(adapter, dumped({"peft_type": "LORA", "r": 4, "target_modules": ["to_q"]})),
        "weights_index": Parser(weights_index, dumped(SHARDS), words=PATHS),
        "model_index": Parser(model_index, dumped(INDEX), words=[b'"os"', b'["evil", "X"]', *PATHS]),
        "note": Parser(note, dumped(["a.json"], []), words=PATHS),
        "safetensors_header": Parser(safetensors_header, [tensors], words=[b"data_offsets", b"F64", b"[0,8]"]),
        "research_pickle": Parser(
            research_pickle, research_seeds(), words=[b"posix\nsystem\n", b"blocks.1.", b"ema", b"R.", b"cos\nmkdir\n"]
        ),
        "card": Parser(
            card, [CARD, b"# A card\n"], words=[b"---\n", b"&a ", b"*a", b"!!python/name:os.system", b": "]
        ),
        "cache_state": Parser(cache("state.json"), [CACHE["state.json"]], words=PATHS),
        "cache_info": Parser(cache("dataset_info.json"), [CACHE["dataset_info.json"]]),
        "cache_rows": Parser(cache("data-00000-of-00001.arrow"), [CACHE["data-00000-of-00001.arrow"]]),
        "picture": Parser(picture, pictures()),
    }


CACHE: dict[str, bytes] = {}


ODD = [None, True, False, 0, -1, 1, 2, 10**6, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan")]
ODD += [
    float("inf"),
    "",
    "a",
    "auto",
    "../x",
    "\0",
    "\ud800",
    "²",
    "9.hidden",
    "x" * 300,
    [],
    {},
    [[]],
    [None],
    {"": 0},
]
TOKENS = [b"null", b"NaN", b"Infinity", b"-", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 800, b'"\\ud800"', b"\0"]
TOKENS += [
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"true",
    b'""',
    b"{}",
    b"[]",
    b",",
    b":",
    b'"',
    b"..",
    b"/",
    b"\n",
    b"\r",
    b"\\u0000",
]


def places(value: object) -> list[tuple[object, object]]:
    """Where in a nested value something can be replaced: containers and keys."""
    found: list[tuple[object, object]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found.append((value, key))
        if len(found) < 100:  # a long list has no more to say
            found += places(part)
    return found


def mutate_value(seed: object, chance: random.Random) -> bytes:
    """Mutate what JSON holds, as JSON."""
    holder = [copy.deepcopy(seed)]
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        where = places(holder)
        container, key = chance.choice(where)
        action = chance.randrange(8)
        if action == 0 and container is not holder:
            del container[key]
        elif action == 1:
            container[key] = [container[key]]
        elif action == 2:
            other, name = chance.choice(where)
            container[key] = copy.deepcopy(other[name])
        elif action == 3 and isinstance(container, dict):
            name = chance.choice(("", "a", "_class_name", "\0", str(key) + "x"))
            container[name] = copy.deepcopy(chance.choice(ODD))
        elif action == 4 and isinstance(container[key], int | float):
            container[key] = container[key] * chance.choice((-1, 0, 2, 1000))
        else:
            container[key] = copy.deepcopy(chance.choice(ODD))
    try:
        return json.dumps(holder[0]).encode()
    except ValueError:  # an integer of too many digits
        return b"1" + b"0" * 5000


def mutate_bytes(data: bytes, chance: random.Random, words: list[bytes]) -> bytes:
    """Mutate bytes: flipped, cut, doubled, put in."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(made) + 1)
        action = chance.randrange(7)
        if action == 0 and made:
            made[at % len(made)] ^= 1 << chance.randrange(8)
        elif action == 1 and made:
            made[at % len(made)] = chance.randrange(256)
        elif action == 2:
            del made[at : at + chance.choice((1, 2, 8, 64, 1 << 20))]
        elif action == 3:
            made[at:at] = made[at : at + chance.choice((1, 4, 32))]
        elif action == 4:
            made[at:at] = chance.choice(TOKENS)
        elif action == 5 and words:
            word = chance.choice(words)
            made[at : at + chance.choice((0, len(word)))] = word
        else:
            made[at:at] = chance.randbytes(chance.choice((1, 2, 8)))
    return bytes(made[: max(MAX_BYTES, len(data))])


def mutations(parser: Parser, chance: random.Random) -> Callable[[], bytes]:
    """What gives another input each time."""
    values = []
    for seed in parser.seeds:
        try:
            values.append(json.loads(seed))
        except ValueError:
            values.append(None)

    def made() -> bytes:
        number = chance.randrange(len(parser.seeds))
        if isinstance(values[number], dict | list) and chance.random() < 0.7:
            return mutate_value(values[number], chance)
        return mutate_bytes(parser.seeds[number], chance, parser.words)

    return made


@dataclass
class Outcome:
    """What a run found."""

    executions: int
    taken: int
    seconds: float
    failures: list[tuple[bytes, BaseException]]


def is_refusal(error: BaseException, parser: Parser) -> bool:
    """Whether a parser may say this."""
    if isinstance(error, StrictDataclassClassValidationError):
        # Transformers wraps whatever a check raises; types of fields it checks itself.
        error = error.__cause__ or error
    return isinstance(error, parser.refusals)


class TooSlow(Broken):
    """It took too long."""


def too_slow(*_: object) -> None:
    raise TooSlow(f"more than {TIMEOUT} s")


def attempt(parser: Parser, data: bytes) -> BaseException | None:
    """Return what a parser raises that it may not; None where it takes or rejects what it is given.

    Raises:
        ValueError: If it rejects it.
    """
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    try:
        parser.call(data)
    except (Exception, Broken) as error:  # of any kind: that is the question
        if is_refusal(error, parser):
            raise ValueError from error
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def fuzz(name: str, executions: int, seconds: float, seed: int, max_failures: int = 5) -> Outcome:
    """Run a parser on mutated seeds until one of the limits."""
    parser = parsers()[name]
    made, failures, done, taken = mutations(parser, random.Random(seed)), [], 0, 0
    before = signal.signal(signal.SIGALRM, too_slow)
    started = time.monotonic()
    try:
        while done < executions and time.monotonic() - started < seconds and len(failures) < max_failures:
            data = made()
            done += 1
            try:
                error = attempt(parser, data)
                if isinstance(error, TooSlow):  # or the machine was busy
                    error = attempt(parser, data)
            except ValueError:
                continue
            if error is None:
                taken += 1
            else:
                failures.append((data, error))
    finally:
        signal.signal(signal.SIGALRM, before)
    return Outcome(done, taken, time.monotonic() - started, failures)


def run_atheris(name: str, executions: int, seconds: float, seed: int) -> None:
    """Run a parser by libFuzzer, which ends the process."""
    import atheris

    # All that is loaded would take minutes.
    for module in [module for name, module in sys.modules.items() if name.startswith("hf_aselect.")]:
        for kind in (module, *(each for each in vars(module).values() if isinstance(each, type))):
            for each in list(vars(kind).values()):
                if isinstance(each, FunctionType) and each.__module__ == module.__name__:
                    atheris.instrument_func(each)
    parser = parsers()[name]

    def one(data: bytes) -> None:
        try:
            parser.call(data)
        except Exception as error:  # as above
            if not is_refusal(error, parser):
                raise

    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, each in enumerate(parser.seeds):
        (corpus / str(number)).write_bytes(each)
    limits = [f"-runs={executions}", f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", f"-timeout={TIMEOUT}"]
    atheris.Setup([sys.argv[0], *limits, f"-max_len={MAX_BYTES}", str(corpus)], one)
    atheris.Fuzz()


def main(arguments: list[str] | None = None) -> int:
    """Run one parser, or all of them one after the other."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parser", default="all", help="which one (%(default)s)")
    options.add_argument("--executions", type=int, default=1_000_000, help="at the most (%(default)s)")
    options.add_argument("--seconds", type=float, default=480, help="for each parser, at the most (%(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--engine", choices=("own", "atheris"), default="own")
    options.add_argument("--list", action="store_true", help="name the parsers")
    given = options.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    names = list(parsers())
    if given.list:
        print("\n".join(names))
        return 0
    if given.engine == "atheris":
        run_atheris(given.parser, given.executions, given.seconds, given.seed)
    broken = False
    for name in names if given.parser == "all" else [given.parser]:
        found = fuzz(name, given.executions, given.seconds, given.seed)
        print(
            f"{name}: {found.executions} executions, {found.taken} taken, {len(found.failures)} failures, "
            f"{found.seconds:.0f} s, seed {given.seed}",
            flush=True,
        )
        for data, error in found.failures:
            broken = True
            print(f"  {type(error).__name__}: {str(error)[:300]}\n    {data[:600]!r}", flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
