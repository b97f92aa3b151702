"""The command line: `hf-aselect COMMAND`."""

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What a bug report names beside hf_aselect and Python.
LIBRARIES = (
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0; 1 with a line on stderr that says what went wrong; 130 after Ctrl-C.

    Args:
        arguments: Words of the command line; those of the process if None.
    """
    parsed = _parser().parse_args(arguments)
    # Seconds, which `--help` and a misspelt option do not wait for.
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError  # of a disk that is full, among others

    importlib.import_module(".public", __package__)
    try:
        parsed.run(parsed)
    except StrictDataclassError as error:
        # It says where the check stands; its cause says what is wrong.
        print(f"hf-aselect: error: {_one_line(error.__cause__ or error)}", file=sys.stderr)
        return 1
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        print(f"hf-aselect: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-aselect: interrupted; existing files were left unchanged", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, which takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="hf-aselect", description="Use diffusion transformers as vision models.")
    parser.add_argument("--version", action="version", version=f"hf_aselect {_own_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_select, _add_fit, _add_convert, _add_fold, _add_card, _add_env):
        add(commands)
    return parser


def _quiet() -> None:
    """Hide transformers' warnings in the output of a command."""
    # Late, as all that takes long to import.
    from transformers.utils import logging

    logging.set_verbosity_error()


def _own_version() -> str:
    """Return the version of the code that runs, which need not be the installed one."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)


def _one_line(error: BaseException) -> str:
    """Return the words of an error in one line."""
    return " ".join(str(error).split())


def _given(parsed: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those arguments that were given, by name."""
    return {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}


def _gigabytes(word: str) -> float:
    """Return a size that was typed."""
    try:
        size = float(word)
    except ValueError:
        size = 0.0
    if not 1e-9 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {word!r}")
    return size


def _block(word: str) -> int | str:
    """Return an integer, or "auto", that was typed."""
    try:
        return word if word == "auto" else int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or auto, got {word!r}") from None


def _block_or_all(word: str) -> int | str:
    """Return an integer, or "all", that was typed."""
    try:
        return word if word == "all" else int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or all, got {word!r}") from None


def _one_or_several(values: Sequence[Any] | None) -> Any:
    """Return the values of an option that can be repeated: a single value, a list of several, or None."""
    return values[0] if values is not None and len(values) == 1 else values


def _class_of(config: Any) -> Any:
    """Return the class of the model that a configuration was saved with; None if it is none of hf_aselect."""
    # They take seconds to import, which `--help` should not.
    from .model.modeling_aselect import DiTModel
    from .model.modeling_classification import DiTForImageClassification
    from .model.modeling_segmentation import DiTBackbone, DiTForSemanticSegmentation

    kinds: tuple[Any, ...] = DiTModel, DiTBackbone, DiTForImageClassification, DiTForSemanticSegmentation
    return {kind.__name__: kind for kind in kinds}.get((config.architectures or [""])[0])


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="fit, compare and save a classifier on the embedded DiT, in about a minute and without network access",
        description="Select the timestep of the embedded Fashion-MNIST DiT without labels, fit a linear head to the "
        "features of two of its blocks (or, with --task segmentation, train UperNet on scenes composed of the "
        "sample's images), compare with other timesteps and with raw pixels, save the model with its card, and "
        "reload it.",
    )
    demo.add_argument(
        "--task",
        choices=("classification", "segmentation"),
        default="classification",
        help="task of the model (%(default)s)",
    )
    demo.add_argument("--output", default="hf-aselect-demo", metavar="DIR", help="folder to write to (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed for label subsets and training (%(default)s)")
    demo.add_argument(
        "--attention-head", action="store_true", help="also train an attention head, which takes minutes"
    )
    demo.set_defaults(run=_demo)


def _demo(parsed: argparse.Namespace) -> None:
    try:
        # It needs the packages of the `train` extra, and they take seconds to import.
        import matplotlib  # noqa: F401 - it draws when all the work is done

        from .demo.classification import DemoSettings, run_demo
        from .demo.segmentation import SegmentationDemoSettings, run_segmentation_demo
        from .demo.tables import format_segmentation_table, format_table
    except ModuleNotFoundError as error:
        raise ImportError(f"The demo needs {error.name}: pip install 'hf_aselect[demo]'") from error
    # transformers reports the head's new weights, which is what the demo is for.
    _quiet()
    if parsed.task == "segmentation":
        if parsed.attention_head:
            raise ValueError("`--attention-head` requires `--task classification`.")
        results = run_segmentation_demo(parsed.output, SegmentationDemoSettings(seed=parsed.seed))
        table, figure = format_segmentation_table(results), "overlays.png"
        auto_class = "AutoModelForSemanticSegmentation"
    else:
        settings = DemoSettings(seed=parsed.seed, attention_head=parsed.attention_head)
        results = run_demo(parsed.output, settings)
        table, figure = format_table(results), "predictions.png"
        auto_class = "AutoModelForImageClassification"
    print(f"\n{table}\n")
    print(f"Saved {parsed.output}/model, results.json, timestep_curve.png and {figure}.")
    print(f"Reloaded with {auto_class} and pipeline: the predictions are equal.")


def _add_select(commands: Any) -> None:
    select = commands.add_parser(
        "select",
        help="select the timestep of a diffusion transformer, and report how reliable the selection is",
        description=(
            "Score the features at each timestep, select the best timestep, print the curve, and optionally save it."
        ),
        epilog="example: hf-aselect select path/to/a/dit --images images/ --output report/",
    )
    select.add_argument("source", metavar="SOURCE", help="anything that DiTModel.from_pretrained accepts")
    select.add_argument(
        "--images",
        metavar="FOLDER|PARQUET|HUB_ID",
        help="images to select on (default: images that the transformer generates)",
    )
    select.add_argument(
        "--image-column", metavar="NAME", help="image column (default: `image`, or the only image column)"
    )
    select.add_argument("--split", default="train", help="split of a folder or Hub dataset (%(default)s)")
    select.add_argument(
        "--label-column",
        metavar="NAME",
        help="column with class indices or masks; selects the timestep with a linear probe",
    )
    select.add_argument(
        "--criterion", help="consensus (default), signal_hfr or hfr; with labels, probe or patch_probe"
    )
    select.add_argument("--head", help="head that will read the features: attention or linear (default: SOURCE's)")
    select.add_argument(
        "--block",
        type=_block,
        action="append",
        help="block to read, negative numbers count from the end (default: SOURCE's first); repeat it, or pass auto "
        "for every third block, to select the block as well",
    )
    select.add_argument(
        "--feature",
        action="append",
        help="hidden, normed, query, key, value or attention (default: SOURCE's first); repeat it, or pass auto, to "
        "select the feature as well",
    )
    select.add_argument(
        "--timesteps", type=int, nargs="+", metavar="T", help="timesteps to score (default: a coarse-to-fine grid)"
    )
    select.add_argument(
        "--num-timesteps", type=int, metavar="K", help="number of complementary timesteps to select (default: 1)"
    )
    select.add_argument(
        "--confidence", type=float, metavar="P", help="stop as soon as the confidence reaches P (0.95)"
    )
    select.add_argument("--max-images", type=int, metavar="N", help="maximum number of images")
    select.add_argument(
        "--num-train-images",
        type=int,
        metavar="N",
        help="labelled images that the head will learn from (default: many)",
    )
    select.add_argument("--batch-size", type=int, metavar="N", help="noised images per forward pass")
    select.add_argument("--seed", type=int, help="seed for noise, sampling and bootstrap")
    select.add_argument("--output", metavar="DIR", help="folder for selection.json and the plots of the curve")
    select.set_defaults(run=_select)


def _select(parsed: argparse.Namespace) -> None:
    # They take seconds to import, which `--help` should not.
    from .model.modeling_aselect import DiTModel
    from .selection.select import select_timestep

    _quiet()
    names = ("criterion", "block", "feature", "timesteps", "num_timesteps", "confidence", "max_images", "batch_size")
    images, labels = _images_and_labels(parsed)
    parsed.block, parsed.feature = _one_or_several(parsed.block), _one_or_several(parsed.feature)
    given = {
        **({"criterion": "probe"} if labels else {}),
        **_given(parsed, *names, "seed", "num_train_images"),
        **labels,
    }
    # Any timestep will do here: it only keeps loading from selecting one.
    model = DiTModel.from_pretrained(parsed.source, timestep=0, read_out=None, **_given(parsed, "head"))
    selection = select_timestep(model, images, **given)
    _print_curve(selection)
    if selection.table:
        _print_taps(selection)
    print(
        f"Timestep {selection.timestep} for {selection.feature} of block {selection.block}, confidence "
        f"{selection.confidence:.2f}, from {selection.num_images} {selection.pictures} images in "
        f"{selection.num_forwards} forward passes and {selection.seconds:.1f} s."
    )
    for timestep, before, after in zip(selection.selected[1:], *_steps(selection.joint_scores), strict=True):
        print(f"Adding timestep {timestep}: joint score {after:.4f} (+{after - before:.4f}).")
    if parsed.output is not None:
        written = _write_selection(selection, Path(parsed.output))
        print(f"Saved {', '.join(str(path) for path in written)}.")


def _steps(scores: Sequence[float] | None) -> tuple[Sequence[float], Sequence[float]]:
    """Return the scores of sets of timesteps before and after each further one; nothing of a single timestep."""
    return (scores or ())[:-1], (scores or ())[1:]


def _images_and_labels(parsed: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the images to select on, None if none are given, and their labels as a keyword, if any are asked for.

    Raises:
        ValueError: If the images cannot be read or lack a column, or labels are asked for without images.
    """
    images = None if parsed.images is None else _load_images(parsed.images, parsed.split)
    labels = {}
    if parsed.label_column is not None:
        if images is None:
            raise ValueError("`--label-column` needs `--images`: generated images have no labels.")
        labels = {"labels": _column(images, parsed.label_column)[parsed.label_column][:]}
    if images is not None and parsed.image_column is not None:
        images = _column(images, parsed.image_column)
    return images, labels


def _load_images(source: str, split: str) -> Any:
    """Return a dataset of images from a folder, a parquet file or the Hub."""
    try:
        # It takes seconds to import, which `--help` should not.
        from .images.sources import read_images
    except ModuleNotFoundError as error:
        raise ImportError("Reading images needs datasets: pip install 'hf_aselect[train]'") from error
    return read_images(source, split)


def _column(rows: Any, name: str) -> Any:
    """Return the rows with one column alone."""
    if name not in rows.column_names:
        raise ValueError(f"The images have no column {name!r}, only {', '.join(rows.column_names)}.")
    return rows.select_columns([name])


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a linear classifier or segmenter in closed form, evaluate it, and save it with its card",
        description="Load a diffusion transformer, select its timestep if it has none, standardize its features, fit "
        "a linear head in one pass over labelled images (ridge regression), evaluate it, and save it with its "
        "code and its card. If the labels are masks, the head is a linear decoder.",
        epilog="example: hf-aselect fit path/to/a/dit --block all --feature hidden --images images/ --output "
        "my-classifier",
    )
    fit.add_argument(
        "source", metavar="SOURCE", help="hf_aselect checkpoint or diffusers checkpoint: folder or Hub id"
    )
    data = fit.add_argument_group("images")
    data.add_argument("--images", required=True, metavar="FOLDER|PARQUET|HUB_ID", help="labelled images to fit on")
    data.add_argument("--split", default="train", help="split of a folder or Hub dataset (%(default)s)")
    data.add_argument(
        "--image-column", metavar="NAME", help="image column (default: `image`, or the only image column)"
    )
    data.add_argument(
        "--label-column", default="label", metavar="NAME", help="column of classes or masks (%(default)s)"
    )
    data.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="class names, for datasets without them, such as those with masks",
    )
    data.add_argument(
        "--ignore-index",
        type=int,
        metavar="N",
        help="mask value of pixels without a class (default: SOURCE's, else 255)",
    )
    data.add_argument("--num-images", type=int, metavar="N", help="fit on a random sample of N images (default: all)")
    data.add_argument("--eval-images", metavar="FOLDER|PARQUET|HUB_ID", help="labelled images to evaluate on")
    data.add_argument(
        "--eval-split", metavar="SPLIT", help="split of --eval-images, or else of --images, to evaluate on"
    )
    tap = fit.add_argument_group("features")
    tap.add_argument(
        "--timestep",
        type=_block,
        nargs="+",
        metavar="T",
        help="one or several in [0, 1000), or auto to select one (default: SOURCE's, else auto)",
    )
    tap.add_argument(
        "--block",
        type=_block_or_all,
        nargs="+",
        metavar="B",
        help="block to read, negative numbers count from the end; repeat it for several, or pass all (default: "
        "SOURCE's)",
    )
    tap.add_argument(
        "--feature",
        nargs="+",
        metavar="NAME",
        help="hidden, normed, query, key, value or attention; repeat it for several (default: SOURCE's)",
    )
    tap.add_argument(
        "--pooling",
        metavar="NAME",
        help="how a classifier pools the tokens: mean, mean_std or regions (default: SOURCE's, else mean)",
    )
    tap.add_argument(
        "--num-timesteps", type=int, metavar="K", help="number of timesteps that --timestep auto selects (1)"
    )
    how = fit.add_argument_group("fit")
    how.add_argument(
        "--balance-classes", action="store_true", help="give all classes the same weight, whatever their size"
    )
    how.add_argument("--allow-missing", action="store_true", help="allow classes without images")
    how.add_argument(
        "--batch-size", type=int, metavar="N", help="images per forward pass (default: depends on their size)"
    )
    how.add_argument("--seed", type=int, default=0, help="seed for sampling (%(default)s)")
    fit.add_argument("--output", required=True, metavar="DIR", help="folder to write; must be empty or not exist")
    fit.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    fit.add_argument("--token", help="Hub token (default: the one you logged in with)")
    fit.set_defaults(run=_fit)


def _fit(parsed: argparse.Namespace) -> None:
    # They take seconds to import, which `--help` should not.
    from .checkpoints.atomic import checked_output, whole_folder
    from .hub.push import write_model_card
    from .model.modeling_aselect import save_image_processor

    _quiet()
    target = checked_output(parsed.output)
    train, judged = _labelled_splits(parsed)
    model = _load_to_fit(parsed, train)
    fit = model.fit_head(
        train,
        image_column=parsed.image_column,
        label_column=parsed.label_column,
        eval_dataset=judged,
        max_images=parsed.num_images,
        balance_classes=parsed.balance_classes,
        allow_missing=parsed.allow_missing,
        batch_size=parsed.batch_size,
        seed=parsed.seed,
    )
    facts = {} if Path(parsed.images).exists() else {"dataset": parsed.images}
    with whole_folder(target) as unfinished:
        model.save_pretrained(unfinished, include_code=True)  # its card says so
        save_image_processor(model, unfinished)
        write_model_card(model, unfinished, model_name=target.name, **{**model.card_facts, **facts})
    _print_fit(model, fit, judged)
    print(f"Saved {parsed.output}.")


def _labelled_splits(parsed: argparse.Namespace) -> tuple[Any, Any]:
    """Return the images to fit to and those to evaluate on, None if none are named, with the same classes.

    Raises:
        ValueError: If they cannot be read, lack a column, or the labels are neither classes nor masks.
    """
    # They take seconds to import, which `--help` should not.
    from datasets import ClassLabel, Image, Value

    from .training.splits import with_classes_of

    column = parsed.label_column
    train, judged = _load_images(parsed.images, parsed.split), None
    if parsed.eval_images is not None:
        judged = _load_images(parsed.eval_images, parsed.eval_split or "train")
    elif parsed.eval_split is not None:
        if Path(parsed.images).suffix == ".parquet":
            raise ValueError(
                "A parquet file has no splits, so `--eval-split` cannot be used. Pass the evaluation file as "
                "`--eval-images`."
            )
        judged = _load_images(parsed.images, parsed.eval_split)
    for split in (train, judged):
        if split is not None:
            _column(split, column)
    kind = train.features[column]
    if isinstance(kind, Value) and kind.dtype in ("string", "large_string"):
        train = train.class_encode_column(column)
    elif isinstance(kind, Image) and not parsed.class_names:
        raise ValueError(f"The labels in {column!r} are masks. Pass the names of their classes as `--class-names`.")
    elif not isinstance(kind, (ClassLabel, Image)) and "int" not in str(getattr(kind, "dtype", "")):
        raise ValueError(f"The labels in {column!r} must be class indices, class names or masks, got {kind}.")
    if judged is not None and isinstance(train.features[column], ClassLabel):
        judged = with_classes_of(train, judged, column)
    return train, judged


def _load_to_fit(parsed: argparse.Namespace, train: Any) -> Any:
    """Return the model to fit, with a linear head and the classes of the images."""
    # They take seconds to import, which `--help` should not.
    from datasets import Image

    from .model.modeling_classification import DiTForImageClassification
    from .model.modeling_segmentation import DiTForSemanticSegmentation
    from .training.config_arguments import needs_images
    from .training.targets import check_classes

    given, kind = _given(parsed, "timestep", "block", "feature"), train.features[parsed.label_column]
    given = {name: _one_or_several(values) for name, values in given.items()} | _given(
        parsed, "num_timesteps", "pooling"
    )
    names = parsed.class_names or getattr(kind, "names", None)
    if names is None:
        names = _numbered_classes(train[parsed.label_column][:], parsed)
    images = None
    if needs_images(parsed.source, given):
        shown = train if parsed.image_column is None else train.select_columns([parsed.image_column])
        shown = shown.remove_columns(parsed.label_column) if isinstance(kind, Image) else shown
        images = shown.shuffle(parsed.seed).select(range(min(256, len(shown))))
    is_dense = isinstance(kind, Image)
    if is_dense and (parsed.ignore_index if parsed.ignore_index is not None else 255) in range(len(names)):
        raise ValueError(
            f"There are {len(names)} classes, so {parsed.ignore_index or 255} cannot mark pixels without a class. "
            "Pass a value that no class has as `--ignore-index`."
        )
    if is_dense and parsed.ignore_index is not None:
        given["semantic_loss_ignore_index"] = parsed.ignore_index
    if is_dense and parsed.pooling is not None:
        raise ValueError(
            "`--pooling` is for classifiers, but the labels are masks, and a segmenter pools nothing. Omit it."
        )
    if not is_dense:
        # Before a timestep is selected, which may take minutes.
        check_classes(train[parsed.label_column][:], dict(enumerate(names)), parsed.allow_missing)
    head = {"decoder": "linear"} if is_dense else {"head": "linear", "head_norm": False}
    loaded: Any = (DiTForSemanticSegmentation if is_dense else DiTForImageClassification).from_pretrained(
        parsed.source,
        calibration_images=images,
        num_train_images=None if is_dense else min(len(train), parsed.num_images or len(train)),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a head that is there is of no use
        **_given(parsed, "revision", "token"),
        **head,
        **given,
    )
    return loaded


def _numbered_classes(labels: list[int | None], parsed: argparse.Namespace) -> list[str]:
    """Return names of classes that are numbered alone.

    Raises:
        ValueError: If there are none, an image has no label, or there are more classes than images, unless allowed.
    """
    if None in labels:
        raise ValueError(
            f"Image {labels.index(None)} has no label in {parsed.label_column!r}. Leave such images out, or give them "
            "the label -100."
        )
    num_classes = 1 + max((label for label in labels if label is not None), default=-1)
    if num_classes < 1:
        raise ValueError(f"No image has a label in {parsed.label_column!r}: class indices are from 0 on.")
    if num_classes > len(labels) and not parsed.allow_missing:
        raise ValueError(
            f"The labels in {parsed.label_column!r} go up to {num_classes - 1}, so there are {num_classes} classes, "
            f"and only {len(labels)} images. Name another column by `--label-column`, or pass `--allow-missing`."
        )
    return [str(number) for number in range(num_classes)]


def _print_fit(model: Any, fit: Any, judged: Any) -> None:
    """Print what was fitted, and how good it is."""
    config, selection = model.config, model.config.selection
    how = f", selected from {selection['num_images']} images" if selection and config.is_selection_in_use() else ""
    rows = {
        "timestep": f"{config.timestep}{how}",
        "features": _read_outs_in_words(config),
        "images": f"{fit.num_images} of {len(fit.class_counts)} classes",
        "ridge strength": f"{fit.strength:.3g}",
        "held-out accuracy": f"{fit.accuracy:.1%}",
    }
    for name, value in (fit.evaluation or {}).items():
        rows[f"{name.replace('_iou', ' IoU')}, evaluation"] = f"{value:.1%} on {len(judged)} images"
    rows["seconds"] = f"{fit.seconds:.1f}"
    for name, value in rows.items():
        print(f"{name:<22} {value}")
    print()
    if len(config.read_outs()) == 1 and config.num_hidden_layers > 1:
        print("One block is read. All of them (`--block all --feature hidden`) are usually more accurate.")


def _read_outs_in_words(config: Any) -> str:
    """Return what a model reads, as "query of block 3"."""
    taps = list(dict.fromkeys((block, feature) for _, block, feature in config.read_outs()))
    blocks, features = (list(dict.fromkeys(each)) for each in zip(*taps, strict=True))
    if taps == [(block, feature) for block in blocks for feature in features]:
        every = list(range(config.num_hidden_layers))
        numbers = "all blocks" if blocks == every else f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
        words = f"{', '.join(features)} of {numbers}"
    else:
        words = ", ".join(f"{feature} of block {block}" for block, feature in taps)
    return words if config.pooling == "mean" else f"{words}, pooled by {config.pooling}"


def _print_curve(selection: Any) -> None:
    """Print the score of each timestep, in the order of the timesteps."""
    print(f"{'timestep':>8} {'log-SNR':>8} {selection.criterion:>12}   {'95 % interval':<16}  smoothed")
    columns = selection.timesteps, selection.log_snr, selection.scores, selection.intervals, selection.smoothed
    for timestep, level, score, (low, high), mean in zip(*columns, strict=True):
        mark = "  <- selected" if timestep in selection.selected else ""
        print(f"{timestep:>8} {level:>8.2f} {score:>12.4f}   {low:.4f} to {high:.4f}  {mean:.4f}{mark}")
    print()


def _print_taps(selection: Any) -> None:
    """Print the best timestep of each tap that was compared, the best tap first."""
    print(f"{'block':>5} {'feature':<9} {'best timestep':>13}  smoothed score")
    rows = []
    for tap in selection.table or []:
        is_selected = (tap["block"], tap["feature"]) == (selection.block, selection.feature)
        means = tap["smoothed"]
        # What was selected need not be the highest of its tap, where few of the resamples selected that.
        place = selection.timesteps.index(selection.timestep) if is_selected else means.index(max(means))
        rows.append((means[place], not is_selected, tap["block"], tap["feature"], selection.timesteps[place]))
    for mean, is_other, block, feature, timestep in sorted(rows, key=lambda row: (-row[0], row[1])):
        print(f"{block:>5} {feature:<9} {timestep:>13}  {mean:.4f}{'' if is_other else '  <- selected'}")
    print()


def _write_selection(selection: Any, output: Path) -> list[Path]:
    """Write the record of a selection and its figures into a folder, and return their paths."""
    # It takes seconds to import, which `--help` should not.
    from .checkpoints.atomic import whole_files

    # The heat map of an earlier selection would seem to be of this one.
    with whole_files(output, r"timestep_curve(_heat_map)?\.png") as unfinished:
        (unfinished / "selection.json").write_text(json.dumps(selection.to_dict(), indent=1), encoding="utf-8")
        try:
            figures = selection.plot(unfinished / "timestep_curve.png")
        except ImportError as error:
            figures = []
            print(f"There is no plot of the curve. {error}", file=sys.stderr)
    if not figures:
        for name in ("timestep_curve.png", "timestep_curve_heat_map.png"):
            (output / name).unlink(missing_ok=True)
    return [output / name for name in ("selection.json", *(path.name for path in figures))]


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help=(
            "convert a diffusers or research checkpoint to an hf_aselect checkpoint, without the parts that "
            "features do not need"
        ),
        description="Write the transformer, VAE encoder and scheduler of a diffusers checkpoint as an hf_aselect "
        "checkpoint, with the empty prompt's embeddings in place of the text encoders. With --layout, convert "
        "weights saved by the research code of DiT, SiT, REPA or SRA. Weights are streamed, and only the files "
        "needed are downloaded from the Hub.",
        epilog="example: hf-aselect convert PixArt-alpha/PixArt-Sigma-XL-2-1024-MS pixart --dtype bfloat16",
    )
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="diffusers pipeline or transformer: folder or Hub id; with --layout, also a weight file",
    )
    convert.add_argument("output", metavar="OUTPUT", help="folder to write; must be empty or not exist")
    convert.add_argument("--dtype", help="float32, float16 or bfloat16 (default: as in SOURCE)")
    convert.add_argument("--variant", help="variant of the weights to read, such as fp16")
    convert.add_argument("--revision", help="branch, tag or commit on the Hub")
    convert.add_argument("--subfolder", help="subfolder of SOURCE that holds the checkpoint")
    convert.add_argument("--token", help="Hub token (default: the one you logged in with)")
    convert.add_argument("--cache-dir", metavar="DIR", help="download cache")
    convert.add_argument(
        "--local-files-only", action="store_true", help="use downloaded files only, without contacting the Hub"
    )
    convert.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="PART",
        help="text encoder to leave out, such as text_encoder_3 (T5) of Stable Diffusion 3",
    )
    convert.add_argument(
        "--max-shard-size",
        type=_gigabytes,
        default=1.0,
        metavar="GB",
        help="maximum size of a weight file (%(default)s)",
    )
    convert.add_argument(
        "--timestep-embedding",
        help="timestep embedding of a DiT: diffusers, original, sit or repa (default: inferred from SOURCE)",
    )
    convert.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="image height and width (default: the transformer's)"
    )
    research = convert.add_argument_group("research weights")
    research.add_argument(
        "--layout",
        help="code that saved the weights: dit (facebookresearch/DiT), sit (SiT) or repa (REPA, SiT-SRA); checked "
        "against the tensors and, with --images, against their predictions",
    )
    research.add_argument(
        "--vae", metavar="DIR|HUB_ID", help="VAE of the weights (default: none; the model takes latents)"
    )
    research.add_argument(
        "--allow-pickle", action="store_true", help="read tensors from a .pt file, without running code in it"
    )
    research.add_argument(
        "--num-attention-heads",
        type=int,
        metavar="N",
        help="attention heads per block, for sizes that were not published",
    )
    research.add_argument(
        "--no-layout-check", action="store_true", help="also convert weights that contradict --layout"
    )
    timestep = convert.add_argument_group("timestep")
    timestep.add_argument(
        "--timestep",
        type=_block,
        nargs="+",
        metavar="T",
        help="one or several in [0, 1000), or auto to select one on --images (default: not set)",
    )
    timestep.add_argument(
        "--num-timesteps", type=int, metavar="K", help="number of timesteps that --timestep auto selects (1)"
    )
    timestep.add_argument("--images", metavar="FOLDER|PARQUET|HUB_ID", help="images to select the timestep on")
    timestep.add_argument(
        "--image-column", metavar="NAME", help="image column (default: `image`, or the only image column)"
    )
    timestep.add_argument("--split", default="train", help="split of a folder or Hub dataset (%(default)s)")
    convert.set_defaults(run=_convert)


def _convert(parsed: argparse.Namespace) -> None:
    # They take seconds to import, which `--help` should not.
    from .checkpoints.convert import convert_diffusers, convert_research

    _quiet()
    parsed.timestep = _one_or_several(parsed.timestep)
    names = ("dtype", "variant", "revision", "subfolder", "token", "cache_dir", "timestep_embedding", "image_size")
    given = _given(parsed, *names, "timestep", "num_timesteps")
    given |= {"local_files_only": parsed.local_files_only, "max_shard_size": int(parsed.max_shard_size * 1e9)}
    if parsed.images is not None:
        images, _ = _images_and_labels(argparse.Namespace(label_column=None, **vars(parsed)))
        given["calibration_images"] = images
    elif parsed.timestep == "auto":
        raise ValueError("`--timestep auto` needs `--images` to select the timestep on. Omit both to select it later.")
    research = _given(parsed, "layout", "vae", "num_attention_heads")
    research |= {"allow_pickle": True} if parsed.allow_pickle else {}
    research |= {"check_layout": False} if parsed.no_layout_check else {}
    if parsed.layout is not None or Path(parsed.source).is_file():
        if parsed.without:
            raise ValueError(
                "`--without` names text encoders of a diffusers checkpoint, and research weights have none. Omit it."
            )
        made = convert_research(parsed.source, parsed.output, **research, **given)
    elif research:
        flags = {"check_layout": "no_layout_check"}
        words = ", ".join(f"--{flags.get(name, name).replace('_', '-')}" for name in research)
        raise ValueError(f"{words}: only for research weights. Pass `--layout`, or omit it.")
    else:
        made = convert_diffusers(parsed.source, parsed.output, without=tuple(parsed.without), **given)
    rows = {
        "transformer": made.transformer_bytes,
        "VAE encoder": made.vae_encoder_bytes,
        "VAE decoder, dropped": made.vae_decoder_bytes,
        "text encoders, dropped": made.text_encoder_bytes,
    }
    for name, size in rows.items():
        print(f"{name:<24} {size / 1e6:>10.1f} MB")
    print()
    print(f"Saved {made.output}: {made.num_parameters / 1e6:.1f} M parameters, in {made.seconds:.1f} s.")


def _add_fold(commands: Any) -> None:
    fold = commands.add_parser(
        "fold",
        help="fold a model at its timestep into a smaller, plain vision transformer",
        description="Multiply the timestep's conditioning into the neighbouring layers and remove everything "
        "after the last tap. The outputs stay equal. The folded model has fewer parameters, needs diffusers only "
        "for a VAE, and cannot be read at another timestep or tap. Several timesteps share all layers.",
        epilog="example: hf-aselect fold my-classifier my-folded-classifier",
    )
    fold.add_argument(
        "source", metavar="SOURCE", help="hf_aselect checkpoint or diffusers checkpoint: folder or Hub id"
    )
    fold.add_argument("output", metavar="OUTPUT", help="folder to write; must be empty or not exist")
    fold.add_argument(
        "--timestep",
        type=_block,
        action="append",
        metavar="T",
        help="timestep to fold at, in [0, 1000), or auto to select one on images that the transformer generates "
        "(default: SOURCE's); repeat it for several, like --block and --feature",
    )
    fold.add_argument(
        "--block",
        type=int,
        action="append",
        help="block to read, negative numbers count from the end (default: SOURCE's)",
    )
    fold.add_argument(
        "--feature", action="append", help="hidden, normed, query, key, value or attention (default: SOURCE's)"
    )
    fold.add_argument("--dtype", help="float32, float16 or bfloat16 (default: SOURCE's, else float32)")
    fold.add_argument("--revision", help="branch, tag or commit on the Hub")
    fold.add_argument("--token", help="Hub token (default: the one you logged in with)")
    fold.set_defaults(run=_fold)


def _fold(parsed: argparse.Namespace) -> None:
    # They take seconds to import, which `--help` should not.
    from .checkpoints.atomic import checked_output, whole_folder
    from .checkpoints.convert import checked_dtype
    from .hub.push import write_model_card
    from .model.modeling_aselect import save_image_processor

    _quiet()
    target, dtype = checked_output(parsed.output), checked_dtype(parsed.dtype)
    model = _load_to_fold(parsed, dtype)
    folded = model.fold()
    with whole_folder(target) as unfinished:
        folded.save_pretrained(unfinished, include_code=True)  # its card says so
        save_image_processor(folded, unfinished)
        write_model_card(folded, unfinished, model_name=target.name)
    before, after = (sum(one.numel() for one in each.parameters()) for each in (model, folded))
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    timesteps = folded.config.folding.timesteps
    print(
        f"Saved {parsed.output} with {after / 1e6:.1f} of {before / 1e6:.1f} million parameters ({size / 1e6:.1f} MB)."
        f" It reads {_read_outs_in_words(folded.config)} at timestep {', '.join(map(str, timesteps))}."
    )


def _load_to_fold(parsed: argparse.Namespace, dtype: Any) -> Any:
    """Return the model to fold, of the class that it was saved as; of diffusers' files a `DiTModel`.

    Raises:
        ValueError: If it has no timestep, and none is given.
    """
    # They take seconds to import, which `--help` should not.
    from .checkpoints.diffusers import find_diffusers
    from .checkpoints.hub_files import HubOptions
    from .folding.fold import check_foldable
    from .model.configuration_aselect import ASelectConfig
    from .model.modeling_aselect import DiTModel

    given = {name: _one_or_several(value) for name, value in _given(parsed, "timestep", "block", "feature").items()}
    hub = _given(parsed, "revision", "token")
    kind, kept, has_timestep = DiTModel, "float32", False
    if find_diffusers(parsed.source, HubOptions(**hub), check=check_foldable) is None:
        config = ASelectConfig.from_pretrained(parsed.source, **hub)
        check_foldable((config.transformer or {}).get("_class_name"))
        kind, kept, has_timestep = _class_of(config) or DiTModel, "auto", config.timestep != "auto"
    if "timestep" not in given and not has_timestep:
        raise ValueError(
            f"No timestep is selected in {parsed.source!r} yet. Pass one as `--timestep`, such as one that "
            "`hf-aselect select` found on your images, or pass `--timestep auto` to select it on images that the "
            "transformer generates."
        )
    return kind.from_pretrained(parsed.source, dtype=dtype or kept, **hub, **given)


def _add_card(commands: Any) -> None:
    card = commands.add_parser(
        "card",
        help="rewrite the card and the timestep curve of a saved model",
        description="Rewrite the README.md and the curve of a saved model from its configuration, the results, data, "
        "training and licence in its current card, and the options given here. Text below the card's last "
        "comment is kept.",
        epilog="example: hf-aselect card my-classifier --dataset fashion_mnist --accuracy 0.88 0.87 0.88",
    )
    card.add_argument("model", metavar="MODEL", help="hf_aselect checkpoint: folder or Hub id")
    card.add_argument("--output", metavar="DIR", help="folder to write to (default: MODEL, if it is a folder)")
    card.add_argument("--name", metavar="NAME", help="model name, used as the title")
    card.add_argument("--dataset", metavar="ID", help="dataset that the model was trained and evaluated on")
    card.add_argument(
        "--accuracy", type=float, nargs="+", metavar="SHARE", help="accuracy in [0, 1]; one value per run"
    )
    card.add_argument(
        "--mean-iou",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="mean IoU of a segmenter in [0, 1]; one value per run",
    )
    card.add_argument("--license", metavar="ID", help="licence identifier, such as apache-2.0")
    card.add_argument("--limits", metavar="TEXT", help="uses that the model is not suited for")
    card.add_argument("--command", metavar="TEXT", help="command that reproduces the results")
    card.add_argument("--revision", help="branch, tag or commit on the Hub")
    card.add_argument("--token", help="Hub token (default: the one you logged in with)")
    card.set_defaults(run=_card)


def _card(parsed: argparse.Namespace) -> None:
    # They take seconds to import, which `--help` should not.
    from .hub.push import write_card_of
    from .model.configuration_aselect import ASelectConfig

    _quiet()
    is_folder = Path(parsed.model).is_dir()
    if parsed.output is None and not is_folder:
        raise ValueError(f"{parsed.model!r} is not a folder. Pass the folder to write the card to as `--output`.")
    config = ASelectConfig.from_pretrained(parsed.model, **_given(parsed, "revision", "token"))
    kind = _class_of(config)
    if config.model_type != ASelectConfig.model_type or kind is None:
        raise ValueError(f"{parsed.model!r} is not an hf_aselect model, but {config.architectures or 'none'}.")
    facts = _facts_before(parsed, is_folder)
    facts |= _given(parsed, "dataset", "accuracy", "mean_iou", "license", "limits", "command")
    facts |= {"model_name": parsed.name} if parsed.name else {}
    if not is_folder:
        facts.setdefault("model_name", parsed.model.rpartition("/")[2])
        facts["repo_id"] = parsed.model
    output = Path(parsed.output or parsed.model)
    write_card_of(config, kind, output, **facts)
    print(f"Saved {output / 'README.md'}.")


def _facts_before(parsed: argparse.Namespace, is_folder: bool) -> dict[str, Any]:
    """Return the facts of the card that the model has, in its folder or on the Hub; none if it has no card."""
    # They take seconds to import, which `--help` should not.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from .hub.card import facts_of_card

    card = Path(parsed.model) / "README.md"
    if not is_folder:
        try:
            card = Path(hf_hub_download(parsed.model, "README.md", **_given(parsed, "revision", "token")))
        except EntryNotFoundError:
            return {}
    return facts_of_card(card) if card.is_file() else {}


def _add_env(commands: Any) -> None:
    env = commands.add_parser(
        "env",
        help="print the versions and the hardware, for a bug report",
        description="Print what a bug report needs: the versions of hf_aselect, Python and the libraries it uses, the "
        "platform, the accelerator and the number of CPUs.",
    )
    env.set_defaults(run=_env)


def _env(_: argparse.Namespace) -> None:
    rows = {
        "hf_aselect": _own_version(),
        "Python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _installed_version(name) for name in LIBRARIES},
        "accelerator": _accelerator(),
        "CPUs": os.cpu_count(),
    }
    for name, value in rows.items():
        print(f"- {name}: {value}")


def _installed_version(name: str) -> str:
    """Return the version of a library, by its metadata: importing all of them would take seconds."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _accelerator() -> str:
    """Return the accelerator that torch sees: "cuda" or "mps", with its name where it has one, or "none"."""
    # It takes seconds to import, which `--help` should not.
    import torch

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.device_count()} × {torch.cuda.get_device_name(0)})"
    return "mps" if torch.backends.mps.is_available() else "none"
