"""Features of a data set's images, read once and kept on disk as a `datasets` dataset."""

import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.fingerprint import Hasher

from ..checkpoints.saving import in_memory
from ..images.rows import ImageRows, as_rows, is_stream, is_transformed, refuse_addresses
from ..model.checks import IGNORED_LABEL
from ..model.layouts import plain
from ..model.modeling_aselect import ASelectPreTrainedModel
from ..selection.distribution import called_by, refuse_flattened, unwrapped
from .cache_origin import facts_of_selection
from .cached_features import CachedFeatures
from .feature_parts import STATE, FeatureParts, part_name, write_parts
from .feature_reader import DTYPES, WHAT, FeatureReader
from .views import Augment, Views

_MAX_VIEWS = 10_000


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
    """Return the features of a data set's images as a dataset, read from disk where they were computed before.

    The backbone then runs once and not in every epoch: `Trainer` trains a head on what comes back, whose columns
    `features` and `label` are what `DiTForImageClassification` takes. It is memory-mapped, so memory does not grow
    with it; several taps and timesteps, whose tokens lie side by side, take as much more of the disk. What belongs to
    other weights, another timestep, tap, noise, size, preprocessing, data set or augmentation has another fingerprint,
    and so another folder. Parts that were finished before an interruption are kept. Under `accelerate launch` (or
    torchrun) each process computes its share: all must call this, and see the same `cache_dir`. What `datasets` does
    not see is not seen here: images that are read from paths and replaced in place, and functions that `augment`
    calls; name another `cache_dir` then.

    Args:
        model: The model, with a selected timestep (unless for "latents"); its head, if any, is of no account. Features
            are read in eval mode, with the fixed noise of `config.noise_seed`.
        dataset: A `datasets.Dataset` with a column of images. Its other columns are kept, but for further images. Of
            one with a format those columns that it shows; of one with a transform what that makes, with an image or
            `pixel_values` among it. What a transform draws at random is drawn once, by `seed`. Or a map-style dataset
            of torch, of images, pairs (image, label) or rows by name, which is read once more to know what it holds.
        cache_dir: Folder of caches, one sub-folder each. Default: `hf_aselect` in the cache of `datasets`.
        what: "tokens" (N, D); "pooled" (S · D,), what `config.pooling` leaves of them, for linear heads; or "latents"
            (C, h, w), the VAE's posterior mean (the images themselves in pixel space), which stay valid when the
            timestep changes: models take them as `latents=`.
        image_column: Column of the images. Default: `image`, or the only one with images.
        num_views: Views of each image: the image itself, then `num_views - 1` augmented ones. Row `v * len + i`
            is view v of image i; the column `view` has v.
        augment: What makes an augmented view, from an image (PIL) to an image. Default: a random crop of 8/9 of each
            side and a flip. Random numbers of `random`, numpy and torch are seeded for each view, by `seed`.
        batch_size: Images in one forward pass, at least 1; no part of the fingerprint.
        dtype: "float16" or "float32", of what is written.
        seed: Seed of the views.

    Returns:
        The dataset in torch format, `len(dataset) * num_views` rows long. `fingerprint.json` in its folder says what
        it was made from; `datasets.load_from_disk` reads the folder, too.

    Raises:
        ValueError: If an argument is out of range, the timestep is not selected yet, there is no such column, a
            label is negative (but for -100), an image cannot be read, or a value is beyond `dtype` or not finite.
        OSError: If the disk has too little space, which is looked at before anything is computed.

    Example:
        >>> from datasets import load_dataset
        >>> from hf_aselect import DiTForImageClassification, cache_features
        >>> folder = "src/hf_aselect/assets/fashion_mnist"
        >>> images = load_dataset("parquet", data_files=f"{folder}/train.parquet", split="train[:8]")
        >>> model = DiTForImageClassification.from_pretrained(folder, timestep=19, head="linear", num_labels=10)
        >>> features = cache_features(model, images, "fashion-features", what="pooled")
        >>> features[:2]["features"].shape
        torch.Size([2, 128])
    """
    refuse_flattened(model)
    model = unwrapped(model)
    num_views, batch_size, seed = map(plain, (num_views, batch_size, seed))
    _check_dataset(dataset)
    dataset = as_rows(dataset)
    _check_options(what, num_views, augment, batch_size, dtype, seed)
    if what != "latents":
        model.config.resolved_timestep()
    refuse_addresses(dataset)
    is_stored = isinstance(dataset, datasets.Dataset) and not is_transformed(dataset)
    rows, stored, kept = _stored(dataset, image_column) if is_stored else _made(dataset, image_column)
    if taken := sorted(kept.keys() & {"features", "latents", "view"}):
        raise ValueError(f"The dataset already has a column {taken[0]!r}. Rename it (`dataset.rename_column`).")
    if stored is not None:
        _check_labels(model, stored, list(kept))
    views = Views(rows, num_views, augment, seed, is_made=stored is None)
    parts = FeatureParts(FeatureReader(model, views, what, dtype), kept, batch_size, stored)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_aselect" if cache_dir is None else Path(cache_dir)
    with called_by(model):
        fingerprint = _fingerprint(parts, _hash_of_rows(dataset if stored is None else stored, views))
        target = folder / hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]
        write_parts(parts, target, fingerprint)
    return CachedFeatures.of(_opened(parts, target))


def _check_dataset(dataset: Any) -> None:
    if is_stream(dataset) or isinstance(dataset, datasets.DatasetDict | str | bytes):
        raise ValueError(
            "`dataset` must be a `datasets.Dataset` with a column of images, a list, or a map-style torch dataset, "
            f"got {type(dataset).__name__}. Pass one split of a DatasetDict, or a part of a stream "
            "(`datasets.Dataset.from_list(list(stream.take(n)))`)."
        )
    if not len(dataset):
        raise ValueError("The dataset has no rows.")


def _check_options(what: str, num_views: int, augment: Augment | None, batch_size: int, dtype: str, seed: int) -> None:
    if what not in WHAT:
        raise ValueError(f"`what` must be one of {', '.join(WHAT)}, got {what!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if augment is not None and num_views == 1:
        raise ValueError(
            "`augment` creates the additional views, the first being the image itself. Pass `num_views=2` or more."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"`seed` must be an integer, got {seed!r}.")
    for name, value in (("num_views", num_views), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if num_views > _MAX_VIEWS:
        raise ValueError(f"`num_views` must be at most {_MAX_VIEWS}, got {num_views}.")


def _made(dataset: Any, image_column: str | None) -> tuple[ImageRows, None, dict[str, Any]]:
    """Return the rows that a transform or a dataset of torch makes, nothing, and their other values with their kinds.

    Raises:
        ValueError: If they have neither an image nor pixel values, or values that `datasets` cannot store.
    """
    rows = ImageRows(dataset, image_column=image_column)
    kept: dict[str, Any] = {}
    for name, value in rows.others(rows.first).items():
        try:
            kept |= datasets.Dataset.from_dict({name: [plain(value)]}).features
        except (ValueError, TypeError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"The dataset returns {name!r} as a {type(value).__name__}, which cannot be stored with the "
                f"features: {error}"
            ) from error
    return rows, None, kept


def _stored(dataset: datasets.Dataset, image_column: str | None) -> tuple[ImageRows, datasets.Dataset, dict[str, Any]]:
    """Return the rows of images that a dataset holds, the dataset without its format, and its other columns.

    A format says in which types values come, which is of no account here, and which columns there are, which is.
    """
    form = dataset.format
    seen = dataset.column_names if form["output_all_columns"] else form["columns"]
    source = dataset.with_format(None)
    column = _image_column(source, seen, image_column)
    kept = {name: source.features[name] for name in source.column_names if name in seen and name != column}
    rows = ImageRows(source.select_columns([column]), image_column=column)
    return rows, source, {name: kind for name, kind in kept.items() if not _has_images(kind)}


def _hash_of_rows(dataset: Any, views: Views) -> str:
    """Return a hash of a dataset: its own fingerprint, or that of all its rows, which are read for it."""
    if isinstance(dataset, datasets.Dataset):
        return str(dataset._fingerprint)
    digest = hashlib.sha256()
    for index in range(len(views.images)):
        digest.update(Hasher.hash(views.row(index)).encode())
    return digest.hexdigest()


def _image_column(dataset: datasets.Dataset, seen: list[str], name: str | None) -> str:
    """Return the column of the images, among those that the dataset's format shows."""
    if name is not None and name not in dataset.column_names:
        raise ValueError(f"The dataset has no column {name!r}, only {', '.join(dataset.column_names)}.")
    found = [each for each in seen if isinstance(dataset.features[each], datasets.Image)]
    column = name or ("image" if "image" in seen else found[0] if len(found) == 1 else None)
    if column not in seen:
        hidden = sorted({*dataset.column_names} - {*seen})
        why = f" The format set on it shows only these, and not {', '.join(hidden)}." if hidden else ""
        raise ValueError(
            f"Expected a column `image`, or exactly one column of images, got {', '.join(seen)}.{why} Pass its name "
            "as `image_column=`."
        )
    return str(column)


def _has_images(kind: Any) -> bool:
    """Return whether a column is of images, or of lists of them."""
    while hasattr(kind, "feature"):
        kind = kind.feature
    return isinstance(kind, datasets.Image)


def _check_labels(model: ASelectPreTrainedModel, dataset: datasets.Dataset, kept: list[str]) -> None:
    """Raise for labels that are none of a classifier's classes: training would, after all features are computed."""
    config = model.config
    is_classifier = model.task == "image-classification" and int(config.num_labels or 0) > 1
    if not is_classifier or config.problem_type not in (None, "single_label_classification"):
        return
    for name in [each for each in ("label", "labels") if each in kept]:
        kind = dataset.features[name]
        if not isinstance(kind, (datasets.ClassLabel, datasets.Value)) or "int" not in kind.dtype:
            continue
        # `datasets` writes -1 in a column of class labels where there is none, as in unlabelled test sets.
        none = -1 if isinstance(kind, datasets.ClassLabel) else IGNORED_LABEL
        labels = dataset.with_format("arrow").select_columns(name)[:][name]
        ends = pc.min_max(pc.if_else(pc.equal(labels, none), 0, labels)).as_py()
        outside = [label for label in ends.values() if label is not None and not 0 <= label < config.num_labels]
        if outside:
            raise ValueError(
                f"`dataset` has the label {outside[0]} in column {name!r}, but the model's classes are integers in "
                f"[0, {config.num_labels}). Load the model with `num_labels=` set to the number of classes, or "
                "remove such rows (`dataset.filter`) or the column (`dataset.remove_columns`)."
            )


def _opened(parts: FeatureParts, target: Path) -> Any:
    """Return the dataset of a finished cache.

    Raises:
        ValueError: If it is broken, or not what was written.
    """
    try:
        # It would follow other names out of the folder.
        files = [each["filename"] for each in json.loads((target / STATE).read_bytes())["_data_files"]]
        expected = [part_name(number, parts.num_parts) for number in range(parts.num_parts)]
        if files != expected:
            raise ValueError(f"it has the parts {files[:3]}, expected {expected[:3]}")
        opened = datasets.load_from_disk(str(target))
        if opened.num_rows != parts.num_rows or parts.name not in opened.column_names:
            raise ValueError(f"it has {opened.num_rows} rows of {opened.column_names}, expected {parts.num_rows}")
    # What JSON, pyarrow and `datasets` make of broken files.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, NotImplementedError) as error:
        raise ValueError(
            f"The cache in {str(target)!r} is broken ({error}). Remove that folder, and run this again."
        ) from error
    return opened


def _fingerprint(parts: FeatureParts, rows: str) -> dict[str, Any]:
    """Return all that the values depend on, as JSON has it."""
    reader, views = parts.reader, parts.reader.views
    made_from = {
        "format": 1,
        "what": reader.what,
        "dtype": reader.dtype,
        "shape": list(reader.shape),
        "weights": _hash_of_weights(reader),
        "preprocessing": json.loads(reader.processor.to_json_string()),
        "dataset": rows,
        "num_rows": parts.num_rows,
        "columns": [views.images.kind, *parts.kept],
        "part_rows": parts.part_rows,
        **_facts_of_model(reader.model),
    }
    if views.num_views > 1:
        made_from |= {"num_views": views.num_views, "seed": views.seed, "augment": _hash_of_function(views.augment)}
    if reader.what != "latents":
        made_from |= facts_of_selection(reader.model.config)
    result: dict[str, Any] = json.loads(json.dumps(made_from))
    return result


def _facts_of_model(model: ASelectPreTrainedModel) -> dict[str, Any]:
    """Return what of a model both features and latents depend on, beside its weights."""
    config = model.config
    return {
        "computed_in": str(model.dtype).removeprefix("torch."),
        "image_size": list(config.image_height_width),
        "transformer": config.transformer,
        "vae": config.vae,
    }


def _hash_of_weights(reader: FeatureReader) -> str | None:
    """Return a hash of the weights that the values depend on; None where they depend on none."""
    base: Any = reader.model._base()
    part = base.vae if reader.what == "latents" else base
    if part is None:
        return None
    digest = hashlib.sha256()
    for name, module in part.named_modules():
        # peft's layers: which adapters are active, and their scale, are not weights. transformers' models have
        # methods of similar names.
        if hasattr(module, "merged_adapters"):
            switches = module.disable_adapters, list(module.active_adapters), list(module.merged_adapters)
            digest.update(repr((name, *switches, sorted(module.scaling.items()))).encode())
    for name, value in sorted(part.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole: Any = in_memory(part, name, value)
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of_function(function: Augment | None) -> str:
    """Return a hash of a function and of its source; what it calls elsewhere is known by name alone."""
    if function is None:
        return "crop and flip"
    try:
        # What is imported is hashed by its name alone.
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    return str(Hasher.hash((function, source)))
