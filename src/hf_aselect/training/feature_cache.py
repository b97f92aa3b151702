"""Features of a data set's pictures, read once and kept on disk as a `datasets` dataset."""

import errno
import hashlib
import inspect
import json
import logging
import os
import random
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.denoiser import eval_mode
from ..model.image_processing_aselect import ASelectImageProcessor
from ..model.layouts import tap_key
from ..model.modeling_aselect import ASelectPreTrainedModel
from ..selection.distribution import called_by
from ..selection.images import refuse_addresses
from .cached_features import DESCRIPTION, cached_features_class

logger = logging.getLogger(__name__)
WHAT = ("tokens", "pooled", "latents")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_MAX_VIEWS = 10_000
# A process that is killed loses the part that it was writing: so small, and at least so many of them, that several
# processes have something to share.
PART_BYTES, MIN_PARTS, MIN_PART_ROWS, MAX_PART_ROWS = 2**27, 16, 256, 2048
# Of a view, as the A-SelecT authors' 512 pixels of 576.
CROP = 8 / 9
Augment = Callable[[Any], Any]


def cache_features(
    model: ASelectPreTrainedModel,
    dataset: Any,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    what: str = "tokens",
    image_column: str | None = None,
    num_views: int = 1,
    augment: Augment | None = None,
    batch_size: int = 32,
    dtype: str = "float16",
    seed: int = 0,
) -> Any:
    """Return the features of a data set's pictures as a dataset, read from disk where they were computed before.

    The backbone then runs once and not in every epoch: `Trainer` trains a head on what comes back, whose columns
    `features` and `label` are what `DiTForImageClassification` takes. It is memory-mapped, so memory does not grow
    with it. What belongs to other weights, another timestep, tap, noise, size, preprocessing, data set or augmentation
    has another fingerprint, and so another folder. Parts that were finished before an interruption are kept. Under
    `accelerate launch` (or torchrun) each process computes its share: all must call this, and see the same
    `cache_dir`. What `datasets` does not see is not seen here: pictures that are read from paths and replaced in
    place, and functions that `augment` calls; name another `cache_dir` then.

    Args:
        model: The model, with a chosen timestep (unless for "latents"); its head, if any, is of no account. Features
            are read in eval mode, with the fixed noise of `config.noise_seed`.
        dataset: A `datasets.Dataset` with a column of pictures. Its other columns are kept, but for further pictures.
        cache_dir: Folder of caches, one sub-folder each. Default: `hf_aselect` in the cache of `datasets`.
        what: "tokens" (N, D); "pooled", their mean (D,), for linear heads; or "latents" (C, h, w), the VAE's posterior
            mean (the pictures themselves in pixel space), which stay valid when the timestep changes: models take them
            as `latents=`.
        image_column: Column of the pictures. Default: `image`, or the only one with pictures.
        num_views: Views of each picture: the picture itself, then so many less one augmented ones. Row `v * len + i`
            is view v of picture i; the column `view` says v.
        augment: What makes an augmented view, from a picture (PIL) to a picture. Default: a random crop of 8/9 of each
            side and a flip. Random numbers of `random`, numpy and torch are seeded for each view, by `seed`.
        batch_size: Pictures in one forward pass, at least 1; no part of the fingerprint.
        dtype: "float16" or "float32", of what is written.
        seed: Seed of the views.

    Returns:
        The dataset in torch format, `len(dataset) * num_views` rows long. `fingerprint.json` in its folder says what
        it was made from; `datasets.load_from_disk` reads the folder, too.

    Raises:
        ValueError: If an argument is out of range, the timestep is not chosen yet, there is no such column, a picture
            cannot be read, or a value is beyond `dtype` or not finite.
        OSError: If the disk has too little space, which is looked at before anything is computed.
        ImportError: If `datasets` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError("`cache_features` needs datasets: pip install 'hf_aselect[train]'") from error
    _check(model, dataset, what, num_views, augment, batch_size, dtype, seed, datasets.Dataset)
    column = _picture_column(dataset, image_column, datasets.Image)
    refuse_addresses(dataset)
    kept = [name for name, kind in dataset.features.items() if name != column and not _has_pictures(kind)]
    if taken := sorted(set(kept) & {"features", "latents", "view"}):
        raise ValueError(f"The dataset has a column {taken[0]!r} already; rename it (`dataset.rename_column`).")
    job = _Job(model, dataset.with_format(None), column, kept, what, num_views, augment, batch_size, dtype, seed)
    if cache_dir is None:
        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "hf_aselect"
    with called_by(model):
        target = _written(job, Path(cache_dir))
    cached: Any = _opened(job, target).with_format("torch")
    cached.__class__ = cached_features_class()
    return cached


def _written(job: "_Job", cache_dir: Path) -> Path:
    """Return the folder with the features, which are computed where they are not there yet."""
    fingerprint = _fingerprint(job)
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]
    target = cache_dir / name
    _write(job, target, fingerprint)
    return target


def _opened(job: "_Job", target: Path) -> Any:
    """Return the dataset of a finished cache.

    Raises:
        ValueError: If it is broken, or not what was written.
    """
    import datasets

    try:
        # It would follow other names out of the folder.
        files = [each["filename"] for each in json.loads((target / "state.json").read_bytes())["_data_files"]]
        expected = [_part_path(target, job, number).name for number in range(job.num_parts)]
        if files != expected:
            raise ValueError(f"it has the parts {files[:3]}, expected {expected[:3]}")
        opened = datasets.load_from_disk(str(target))
        if opened.num_rows != job.num_rows or job.name not in opened.column_names:
            raise ValueError(f"it has {opened.num_rows} rows of {opened.column_names}, expected {job.num_rows}")
    # What JSON, pyarrow and `datasets` make of broken files.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, NotImplementedError) as error:
        raise ValueError(
            f"The cache in {str(target)!r} is broken ({error}). Remove that folder, and run this again."
        ) from error
    return opened


@dataclass
class _Job:
    """What is to be read, and how it is written."""

    model: ASelectPreTrainedModel
    dataset: Any
    column: str
    kept: list[str]
    what: str
    num_views: int
    augment: Augment | None
    batch_size: int
    dtype: str
    seed: int

    def __post_init__(self) -> None:
        """Work out the sizes, from the configuration alone."""
        config = self.model.config
        # Alone: reading a row decodes all of its columns.
        self.pictures = self.dataset.select_columns([self.column])
        self.processor = ASelectImageProcessor.from_model_config(config)
        height, width = config.image_height_width
        rows, columns = height // config.patch_pixels, width // config.patch_pixels
        scale = config.vae_scale_factor
        self.shape: tuple[int, ...] = {
            "tokens": (rows * columns, config.feature_size),
            "pooled": (config.feature_size,),
            "latents": (config.layout.num_channels, height // scale, width // scale),
        }[self.what]
        self.num_rows = len(self.dataset) * self.num_views
        self.row_bytes = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        shared = max(MIN_PART_ROWS, -(-self.num_rows // MIN_PARTS))
        self.part_rows = max(1, min(PART_BYTES // self.row_bytes, shared, MAX_PART_ROWS))
        self.num_parts = -(-self.num_rows // self.part_rows)

    def disk_row_bytes(self, batch_size: int) -> int:
        """Return how much of a disk a row takes, rounded up: values, places of nested lists, kept columns."""
        nested = [int(np.prod(self.shape[:depth])) for depth in range(len(self.shape))] if len(self.shape) > 1 else []
        table = self.dataset.select_columns(self.kept).data if self.kept else None
        kept = -(-table.nbytes // max(1, table.num_rows)) if table is not None else 0
        header = 512  # of each batch that is written
        return self.row_bytes + 4 * sum(nested) + kept + -(-header // batch_size)

    @property
    def name(self) -> str:
        """Column of the result."""
        return "latents" if self.what == "latents" else "features"

    def part(self, number: int) -> range:
        """Return the rows of a part."""
        return range(number * self.part_rows, min((number + 1) * self.part_rows, self.num_rows))

    def schema(self) -> Any:
        """Return the columns of the result."""
        from datasets import Array2D, Array3D, Features, Sequence, Value

        kind = {
            1: lambda: Sequence(Value(self.dtype), length=self.shape[0]),
            2: lambda: Array2D(self.shape, self.dtype),
            3: lambda: Array3D(self.shape, self.dtype),
        }[len(self.shape)]()
        features = {self.name: kind, **{name: self.dataset.features[name] for name in self.kept}}
        return Features({**features, "view": Value("int32")} if self.num_views > 1 else features)


def _check(
    model: ASelectPreTrainedModel,
    dataset: Any,
    what: str,
    num_views: int,
    augment: Augment | None,
    batch_size: int,
    dtype: str,
    seed: int,
    kind: Any,
) -> None:
    if not isinstance(dataset, kind):
        raise ValueError(
            f"`dataset` must be a `datasets.Dataset` with a column of pictures, got {type(dataset).__name__}. Give "
            "one split of a DatasetDict; of a stream take a part (`datasets.Dataset.from_list(list(stream.take(n)))`)."
        )
    if what not in WHAT:
        raise ValueError(f"`what` must be one of {', '.join(WHAT)}, got {what!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if augment is not None and num_views == 1:
        raise ValueError("`augment` makes further views: pass `num_views=2` or more. The first is the picture itself.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"`seed` must be an integer, got {seed!r}.")
    for name, value in (("num_views", num_views), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer from 1 on, got {value!r}.")
    if num_views > _MAX_VIEWS:
        raise ValueError(f"`num_views` must be at most {_MAX_VIEWS}, got {num_views}.")
    if not dataset.num_rows:
        raise ValueError("The dataset has no rows.")
    if what != "latents":
        model.config.resolved_timestep()


def _has_pictures(kind: Any) -> bool:
    """Return whether a column is of pictures, or of lists of them."""
    while hasattr(kind, "feature"):
        kind = kind.feature
    return type(kind).__name__ == "Image"


def _picture_column(dataset: Any, name: str | None, kind: type) -> str:
    """Return the column of the pictures."""
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"The dataset has no column {name!r}, only {', '.join(dataset.column_names)}.")
        return name
    if "image" in dataset.column_names:
        return "image"
    found = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"Expected a column `image`, or exactly one with pictures, got {', '.join(dataset.column_names)}. Name it "
            "by `image_column=`."
        )
    return str(found[0])


def _fingerprint(job: _Job) -> dict[str, Any]:
    """Return all that the values depend on."""
    config = job.model.config
    made_from: dict[str, Any] = {
        "format": 1,
        "what": job.what,
        "dtype": job.dtype,
        "shape": list(job.shape),
        "computed_in": str(job.model.dtype).removeprefix("torch."),
        "weights": _hash_of_weights(job),
        "image_size": list(config.image_height_width),
        "transformer": config.transformer,
        "vae": config.vae,
        "preprocessing": json.loads(job.processor.to_json_string()),
        "dataset": job.dataset._fingerprint,
        "num_rows": job.num_rows,
        "columns": [job.column, *job.kept],
        "part_rows": job.part_rows,
    }
    if job.num_views > 1:
        made_from |= {"num_views": job.num_views, "seed": job.seed, "augment": _hash_of_function(job.augment)}
    if job.what != "latents":
        block = config.block_index()
        made_from |= {
            "timestep": config.timestep,
            "tap": tap_key(block, config.feature),
            "noise_seed": config.noise_seed,
            "num_noise_draws": config.num_noise_draws,
            "zeroed_channels": config.channels_at(block, config.feature),
            "scheduler": config.scheduler,
            "timestep_embedding": config.timestep_embedding,
            "guidance": config.guidance,
        }
    result: dict[str, Any] = json.loads(json.dumps(made_from))
    return result


def _hash_of_weights(job: _Job) -> str | None:
    """Return a hash of the weights that the values depend on; None where they depend on none."""
    base: Any = job.model._base()  # peft's wrapper has another `base_model`
    part = base.vae if job.what == "latents" else base
    if part is None:
        return None
    digest = hashlib.sha256()
    for name, module in part.named_modules():
        # peft's layers: which of their adapters count, and how much, is no weight. The host's models have methods of
        # similar names.
        if hasattr(module, "merged_adapters"):
            switches = module.disable_adapters, list(module.active_adapters), list(module.merged_adapters)
            digest.update(repr((name, *switches, sorted(module.scaling.items()))).encode())
    for name, value in sorted(part.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of_function(function: Augment | None) -> str:
    """Return a hash of a function and of its source; what it calls elsewhere is known by name alone."""
    if function is None:
        return "crop and flip"
    from datasets.fingerprint import Hasher

    try:
        # What is imported is hashed by its name alone.
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    return str(Hasher.hash((function, source)))


def _write(job: _Job, target: Path, fingerprint: dict[str, Any]) -> None:
    """Compute what is not there yet; the folder appears when all of it is."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object
    from tqdm.auto import tqdm

    # accelerate takes part in a group of processes without an accelerator only where it is told so.
    state = PartialState(cpu=True) if not torch.accelerator.is_available() else PartialState()
    if len(set(gather_object([target.name]))) > 1:
        raise ValueError(
            "The processes have other pictures or another model each: their caches would have other names. Give all "
            "of them the same dataset (a shuffle needs a seed) and the same weights."
        )
    # One answer for all processes: somebody else may be finishing the same cache.
    if broadcast_object_list([(target / "state.json").is_file()])[0]:
        return
    unfinished = target.with_name(f"{target.name}.incomplete")
    unfinished.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(job.num_parts) if not _part_path(unfinished, job, number).is_file()]
    (missing,) = broadcast_object_list([missing])
    rows = sum(len(job.part(number)) for number in missing)
    if len(missing) < job.num_parts:
        logger.info(
            "Going on in %s: %d of %d parts are there.", unfinished, job.num_parts - len(missing), job.num_parts
        )
    needed = rows * job.disk_row_bytes(job.batch_size)
    _in_step(lambda: _check_space(unfinished, needed))
    mine = missing[state.process_index :: state.num_processes]
    size = _size(needed)
    with (
        tqdm(
            total=sum(len(job.part(number)) for number in mine),
            desc=f"Caching {job.what}, {size}",
            unit="picture",
            disable=not state.is_local_main_process,
        ) as bar,
        eval_mode(job.model),
        torch.no_grad(),
    ):
        # Part by part: one that fails tells the others, and nobody waits longer than a part takes.
        for start in range(0, len(missing), state.num_processes):
            share = missing[start : start + state.num_processes][state.process_index :][:1]
            steps = [partial(_write_part, job, number, _part_path(unfinished, job, number), bar) for number in share]
            if _in_step(partial(_is_done_by_another, target, *steps)):
                break
    finish = partial(_finish, job, unfinished, target, fingerprint)
    _in_step(lambda: state.is_main_process and _is_done_by_another(target, finish))


def _in_step(step: Callable[[], bool | None]) -> bool:
    """Run a step in all processes and return whether one of them said True; where one fails, all do.

    Raises:
        RuntimeError: If the step failed in another process.
    """
    from accelerate.utils import gather_object

    said, failure = False, None
    try:
        said = bool(step())
    except Exception as error:  # of any kind: the others must hear of it
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    told = gather_object([(said, text)])
    if failure is not None:
        raise failure
    failures = [text for _, text in told if text is not None]
    if failures:
        raise RuntimeError(f"Another process failed ({failures[0]}). Parts that are done are kept; run it again.")
    return any(said for said, _ in told)


def _is_done_by_another(target: Path, *steps: Callable[[], None]) -> bool:
    """Run steps; return whether somebody else, who writes the same, gave the folder its name meanwhile."""
    try:
        for step in steps:
            step()
    except FileNotFoundError:
        for _ in range(50):  # it may be about to
            if (target / "state.json").is_file():
                return True
            time.sleep(0.1)
        raise
    return False


def _part_path(folder: Path, job: _Job, number: int) -> Path:
    return folder / f"data-{number:05d}-of-{job.num_parts:05d}.arrow"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OSError: If there is too little space.
    """
    free = shutil.disk_usage(folder).free
    # What lies beside the features, labels above all, and the space that other programs need.
    if needed * 1.02 + 2**20 > free:
        raise OSError(
            errno.ENOSPC,
            f"The cache needs {_size(needed)}, but {str(folder)!r} has {_size(free)} left. Name another `cache_dir`, "
            "or take what='pooled', fewer views, or a smaller `image_size`",
        )


def _write_part(job: _Job, number: int, path: Path, bar: Any) -> None:
    """Write one part; it appears when it is whole."""
    import pyarrow as pa
    from datasets import Dataset

    schema = job.schema()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with pa.ipc.new_stream(str(temporary), schema.arrow_schema) as writer:
            for rows in _batches(job.part(number), job.batch_size):
                columns = {job.name: list(_read(job, rows)), **_kept_columns(job, rows)}
                table = Dataset.from_dict(columns, features=schema).data.table
                writer.write_table(table.cast(schema.arrow_schema))
                bar.update(len(rows))
        # After a power cut a part that is there must be whole.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _batches(rows: range, size: int) -> Iterator[range]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _kept_columns(job: _Job, rows: Sequence[int]) -> dict[str, list[Any]]:
    indices = [row % len(job.dataset) for row in rows]
    kept = job.dataset.select_columns(job.kept)[indices] if job.kept else {}
    return {**kept, "view": [row // len(job.dataset) for row in rows]} if job.num_views > 1 else kept


def _read(job: _Job, rows: Sequence[int]) -> Any:
    """Return the values of some rows, of the cache's dtype."""
    pixel_values = _pixel_values(job, rows)
    with torch.autocast(job.model.device.type, enabled=False):  # a caller's would be in no fingerprint
        values = job.model.encode(pixel_values) if job.what == "latents" else job.model.extract_features(pixel_values)
    if job.what == "pooled":
        values = values.mean(1, dtype=torch.float32)
    if tuple(values.shape[1:]) != job.shape:
        raise ValueError(f"The model gives values of shape {tuple(values.shape[1:])}, expected {job.shape}.")
    return _rounded(values, job, rows).cpu().numpy()


def _rounded(values: Tensor, job: _Job, rows: Sequence[int]) -> Tensor:
    """Return values in the cache's dtype.

    Raises:
        ValueError: If one is not finite, there or before.
    """
    rounded = values.to(DTYPES[job.dtype])
    finite = rounded.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        row = rows[int((~finite).nonzero()[0, 0])]
        worst = float(values.abs().max())
        raise ValueError(
            f"The {job.what} of picture {row % len(job.dataset)} hold values that {job.dtype} does not (up to "
            f"{worst:g}). Pass dtype='float32', or zero massive channels (`config.zeroed_channels`)."
        )
    return rounded


def _pixel_values(job: _Job, rows: Sequence[int]) -> Tensor:
    """Return the pixel values of some rows, (B, C, H, W)."""
    pictures = [_view(job, row % len(job.dataset), row // len(job.dataset)) for row in rows]
    values: Tensor
    try:
        values = job.processor(pictures, return_tensors="pt").pixel_values
    except ValueError:
        for row, picture in zip(rows, pictures, strict=True):
            try:
                job.processor([picture], return_tensors="pt")
            except ValueError as error:
                view = row // len(job.dataset)
                made = f", as `augment` made it (view {view})," if view else ""
                raise ValueError(
                    f"Picture {row % len(job.dataset)} of the dataset{made} cannot be read: {error}"
                ) from error
        raise
    return values


def _view(job: _Job, index: int, view: int) -> Any:
    """Return a view of a picture: 0 is the picture itself."""
    try:
        picture = job.pictures[index][job.column]
    # What PIL makes of broken files.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"Picture {index} of the dataset cannot be read ({error}).") from error
    if picture is None:
        raise ValueError(f"Row {index} of the dataset has no picture in {job.column!r}.")
    if view == 0:
        return picture
    # The same view whatever was drawn before, in whichever process.
    number = int.from_bytes(hashlib.sha256(f"{job.seed} {index} {view}".encode()).digest()[:4], "big")
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number)
            torch.default_generator.manual_seed(number)  # not those of accelerators, which would not be restored
            return (job.augment or crop_and_flip)(picture)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def crop_and_flip(picture: Image.Image) -> Image.Image:
    """Return a random crop of 8/9 of each side of a picture, flipped or not; by the numbers of `random`.

    Source: the A-SelecT authors' recipe, 512 pixels of 576.
    """
    width, height = picture.size
    side_width, side_height = max(1, round(CROP * width)), max(1, round(CROP * height))
    left, top = random.randint(0, width - side_width), random.randint(0, height - side_height)
    crop = picture.crop((left, top, left + side_width, top + side_height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


def _finish(job: _Job, unfinished: Path, target: Path, fingerprint: dict[str, Any]) -> None:
    """Write what makes a dataset of the parts, and give the folder its name."""
    paths = [_part_path(unfinished, job, number) for number in range(job.num_parts)]
    missing = [path.name for path in paths if not path.is_file()]
    if not unfinished.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder of the cache is gone", str(unfinished))
    if missing:
        raise OSError(
            f"{len(missing)} of {job.num_parts} parts are missing in {str(unfinished)!r}, among them {missing[0]}. "
            "All processes must see the same `cache_dir`; run it again to go on"
        )
    from datasets import DatasetInfo

    info = DatasetInfo(
        description=DESCRIPTION + json.dumps(fingerprint, sort_keys=True),
        features=job.schema(),
    )
    info.write_to_directory(str(unfinished))
    _write_json(unfinished / "fingerprint.json", fingerprint)
    # What `datasets.load_from_disk` reads; last, as it says that all the rest is there.
    state: dict[str, Any] = {
        "_data_files": [{"filename": path.name} for path in paths],
        "_fingerprint": target.name[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    _write_json(unfinished / "state.json", state)
    try:
        os.replace(unfinished, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (target / "state.json").is_file():
            raise OSError(
                f"The features are whole in {str(unfinished)!r}, but {str(target)!r} is there and is no cache. Remove "
                "it, and run this again: nothing is computed anew"
            ) from error
        # Somebody else finished the same cache meanwhile: it holds the same.
        shutil.rmtree(unfinished, ignore_errors=True)
    for leftover in target.glob(".data-*"):  # of processes that were killed
        leftover.unlink(missing_ok=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(temporary, path)
