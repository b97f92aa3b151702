"""A linear head in closed form: one pass over the images, then ridge regression; see a model's `fit_head`."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.saving import bring_in
from ..images.rows import TENSORS
from ..model.checks import check_count
from ..model.denoiser import is_sharded
from ..model.layouts import plain
from ..selection.apply import batch_size_for, note_head
from ..selection.distribution import Share, gather_objects, is_partitioned, refuse_flattened, unwrapped
from ..selection.reader import eval_mode
from ..selection.sweep import progress_bar
from .cache_origin import check_read_out
from .feature_sums import KEPT_BYTES, TOKEN_BITS, FeatureSums, Rows, check_memory
from .head_evaluation import Evaluation
from .head_solution import HeadSolution, solve
from .labelled_images import LabelledBatch, LabelledImages
from .targets import DENSE, MULTI, REGRESSION, LabelCounts, Targets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitOptions:
    """What `fit_head` is asked for; see there.

    Raises:
        ValueError: If a number is out of range.
    """

    image_column: str | None = None
    label_column: str | None = None
    max_images: int | None = None
    balance_classes: bool = False
    allow_missing: bool = False
    replace_head: bool = False
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers, those of numpy and torch, too."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))
        for name, value in (("max_images", self.max_images), ("batch_size", self.batch_size)):
            if value is not None:
                check_count(name, value)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be an integer in [0, 2**63), got {self.seed!r}.")


@dataclass(frozen=True)
class HeadFit:
    """What a head was fitted on, and what is known of how good it is.

    Args:
        strength: Selected strength of the ridge: its penalty on standardized features, divided by the images.
        scale: Factor by which the predictions became logits; 1 of a regression.
        num_images: Images that the head was fitted on.
        class_counts: Images of each class, or label; of a segmenter pixels. Empty of a regression.
        error: Squared error on images that were held out, a fifth at a time, as a share of the targets' variance.
        accuracy: Share of held-out images (of a segmenter pixels, of several labels an image labels) that the head
            fitted to the others is right about, in [0, 1]; None of a regression. On `num_held_out` of them.
        num_held_out: Rows of features that `accuracy` was measured on: all, or a sample where they take more than
            256 MB. A segmenter has a row for each token.
        evaluation: Figures on `eval_dataset`, by name: `accuracy`, with `mean_iou` of a segmenter, or `error`; of
            several sets as Trainer names them, `SET_accuracy`.
        seconds: Seconds that it took.
    """

    strength: float
    scale: float
    num_images: int
    class_counts: tuple[int, ...]
    error: float
    accuracy: float | None
    num_held_out: int
    evaluation: Mapping[str, float] | None
    seconds: float


def fit_head(model: Any, dataset: Any, options: FitOptions, eval_dataset: Any = None) -> HeadFit:
    """Fit the linear head or decoder of a model in closed form; see its `fit_head`.

    What the linear layer reads of each image is standardized and regressed on the labels with a penalty (ridge): on
    0 and 1 for each class, or on values. That takes sums over the images alone (`closed_form`), so each is read once.
    Features are kept as long as they take no more than 256 MB, and beyond that a uniform sample of them of that size.
    On these, a fifth of the images at a time, the solution of the other images is judged: the strength of the penalty
    and the scale of the logits are those with the least cross-entropy (of a regression, with the least squared error),
    and the accuracy is that of the selected ones. All of it goes into weight and bias of the linear layer.

    A linear head then reads no layer norm (`config.head_norm` is False). The batch norm of a linear decoder gets the
    mean and variance of the tokens, by which a training standardizes them, too.

    Args:
        model: The model. It is changed once all is read and solved, and by no fit or evaluation that fails.
        dataset: See `LabelledImages`.
        options: How.
        eval_dataset: Images to evaluate the fitted head on; or several sets by name.

    Returns:
        What is known of the fit; all processes return the same, and their models have the same head.

    Raises:
        ValueError: See the model's `fit_head`.
        RuntimeError: If another process failed.
    """
    started = time.monotonic()
    refuse_flattened(model)
    model = unwrapped(model)
    _check_model(model, options)
    images = _labelled(model, dataset, options)
    sets = _named_sets(eval_dataset)
    judged = {name: _labelled(model, each, replace(options, max_images=None)) for name, each in sets.items()}
    _check_names(images, judged, model.config)
    share, batch_size = Share.of_model(model), options.batch_size or batch_size_for(model.config)
    with _linear_part(model) as part:
        known = _known_targets(images, model.config, options, share, batch_size)
        for name, each in judged.items():
            _check_known_labels(name, each, model.config, known)
        # The machines of several processes may have different memories.
        _together(share, partial(_check_size, images, model.config, part))
        reading = _Reading(model.config, part, images, known, KEPT_BYTES // share.world)
        with _inputs_of(part.norm) as reading.seen:
            _pass(model, images, share, batch_size, reading.take, "Fitting the head")
        targets = reading.total(share)
        reading.labels.check(options.allow_missing)
        if any(share.gather(reading.sums.moments is not None)):
            _together(share, reading.sums.begin_moments)
        moments, rows = reading.sums.gathered(share)
        if moments is None:
            _together(share, partial(check_memory, rows.features.shape[1], targets.num_labels, len(rows)))
        # Of one process: where the last bits of two machines differ, so would their heads.
        solution, tokens = gather_objects((solve(moments, rows, targets), reading.tokens))[0]
        figures = {}
        with _undone_on_failure(model.config, part):
            _write(model, part, targets, solution, tokens)
            for name, each in judged.items():
                evaluation = Evaluation(targets, model.config)
                _pass(model, each, share, batch_size, evaluation.add, "Evaluating the head")
                figures[name] = evaluation.figures(share)
    fit = HeadFit(
        strength=solution.strength,
        scale=solution.scale,
        num_images=reading.labels.num_images,
        class_counts=() if targets.kind == REGRESSION else tuple(map(round, reading.labels.counts.tolist())),
        error=solution.error,
        accuracy=solution.accuracy,
        num_held_out=len(rows),
        evaluation={f"{name}_{key}".lstrip("_"): value for name, of in figures.items() for key, value in of.items()}
        or None,
        seconds=round(time.monotonic() - started, 3),
    )
    _take_names(images, model.config)
    note_head(model, "fitted", model.config.read_outs())
    model.card_facts = {**model.card_facts, **_card_facts(fit, figures, images.is_dense)}
    if any(hasattr(module, "merged_adapters") for module in model.modules()):
        # peft's layers. With its head among the adapters, a model has no head to fit.
        logger.warning(
            "The fitted head is no part of the model's adapters, and is not saved with them. Merge them "
            "(`merge_and_unload`) and save the whole model."
        )
    logger.info("Fitted a head on %d images in %.1f s, held-out error %.3f.", fit.num_images, fit.seconds, fit.error)
    return fit


def _check_model(model: Any, options: FitOptions) -> None:
    """Reject a model that has no linear head to be fitted; bring in one that is offloaded, which stays in memory.

    Raises:
        ValueError: If it has none.
    """
    config, name = model.config, type(model).__name__
    if not model._standardizations():
        head = getattr(model, "classifier", None)
        if head is not None:
            raise ValueError(
                f"The head of this model is a {type(head).__name__} that took the place of its own. Fit the head that "
                "it was loaded with, or save it and load it again."
            )
        raise ValueError(
            f"A {name} has no head to fit. Load a DiTForImageClassification or DiTForSemanticSegmentation."
        )
    config.resolved_timestep()
    if is_sharded(model) or is_partitioned(model):
        raise ValueError("The weights of this model are sharded over processes. Fit the head before you shard it.")
    is_dense = type(model).task == "image-segmentation"
    if is_dense and config.decoder != "linear":
        raise ValueError(
            f"`fit_head` fits linear decoders, but this model's decoder is {config.decoder!r}. Load it with "
            "`decoder='linear'`."
        )
    if not is_dense and config.head != "linear" and not options.replace_head:
        raise ValueError(
            f"`fit_head` fits linear heads, but this model's head is {config.head!r}. Load it with `head='linear'`, "
            "or pass `replace_head=True`, which discards the current head."
        )
    # By their names: code of a checkpoint has classes of its own.
    part = model.decode_head if is_dense else model.classifier
    is_whole = type(part).__name__ in ("LinearHead", "AttentionHead", "LinearDecoder")
    if not is_whole or type(_layer(part)) not in (nn.Linear, nn.Conv2d):
        raise ValueError(
            f"The head of this model, a {type(part).__name__}, has no plain linear layer. Fit the head before you add "
            "adapters or replace it."
        )
    bring_in(part, model.device)


def _layer(part: Any) -> Any:
    """Return the last layer of a head or linear decoder, which gives the logits."""
    return part.classifier if type(part).__name__ == "LinearDecoder" else part.output_projection


def _labelled(model: Any, dataset: Any, options: FitOptions) -> LabelledImages:
    images = LabelledImages(
        dataset,
        model.config,
        is_dense=type(model).task == "image-segmentation",
        image_column=options.image_column,
        label_column=options.label_column,
        max_images=options.max_images,
        seed=options.seed,
    )
    if images.images.kind == "features":
        check_read_out(str(getattr(getattr(dataset, "info", None), "description", "")), model.config)
    return images


def _named_sets(eval_dataset: Any) -> dict[str, Any]:
    """Return evaluation sets by name, one alone by none; a dictionary of tensors is one set."""
    if eval_dataset is None:
        return {}
    is_several = isinstance(eval_dataset, Mapping) and not eval_dataset.keys() & {*TENSORS}
    return dict(eval_dataset) if is_several else {"": eval_dataset}


@contextmanager
def _linear_part(model: Any) -> Iterator[Any]:
    """Give a classifier a linear head without a norm, and yield it; what it had comes back if the fit fails.

    The head's kind is part of the configuration, by which features of a cache are checked.
    """
    if type(model).task == "image-segmentation":
        yield model.decode_head
        return
    config, head = model.config, model.classifier
    kept = model._no_split_modules, config.head, config.head_norm, head
    norm = head.norm if config.head == "linear" else None
    try:
        if norm is None:
            config.head, config.head_norm = "linear", False
            model.classifier = model._new_head().to(model.device, model.dtype)
            model.classifier.standardization = head.standardization
            model.classifier.train(head.training)
            parts = {type(module).__name__ for module in model.modules()}
            model._no_split_modules = {name for name in kept[0] if name in parts}
        else:
            config.head_norm, head.norm = False, nn.Identity()
        yield model.classifier
    except BaseException:
        model._no_split_modules, config.head, config.head_norm, model.classifier = kept
        if norm is not None:
            head.norm = norm
        raise


@contextmanager
def _undone_on_failure(config: Any, part: Any) -> Iterator[None]:
    """Give a head or decoder, and the kind of its task, back what they were if what is done to them fails."""
    state, problem = {name: value.clone() for name, value in part.state_dict().items()}, config.problem_type
    try:
        yield
    except BaseException:
        part.load_state_dict(state)
        config.problem_type = problem
        raise


def _check_names(images: LabelledImages, judged: dict[str, LabelledImages], config: Any) -> None:
    """Reject sets of images that name the classes, and number them otherwise than the model or each other.

    Raises:
        ValueError: If a name has two numbers.
    """
    known = [("the model", {str(name): number for number, name in (config.id2label or {}).items()})]
    sets = {"`dataset`": images, **{_eval_name(name): each for name, each in judged.items()}}
    for what, each in sets.items():
        for whose, others in known:
            for name, number in each.class_numbers.items():
                if others.get(name, number) != number:
                    raise ValueError(
                        f"Class {name!r} has number {number} in {what}, and number {others[name]} in {whose}. Number "
                        "them alike (`dataset.align_labels_with_mapping`), or load the model with the names of the "
                        "dataset (`id2label=`)."
                    )
        known.append((what, each.class_numbers))


def _take_names(images: LabelledImages, config: Any) -> None:
    """Name the classes as the images do, where nobody has named them."""
    default = {number: f"LABEL_{number}" for number in range(config.num_labels)}
    if len(images.class_numbers) == config.num_labels and config.id2label == default:
        config.id2label = {number: name for name, number in images.class_numbers.items()}
        config.label2id = dict(images.class_numbers)


def _eval_name(name: str) -> str:
    """Return what a set to evaluate on is called, of its name, if it has one."""
    return f"`eval_dataset[{name!r}]`" if name else "`eval_dataset`"


def _check_known_labels(name: str, images: LabelledImages, config: Any, targets: Targets | None) -> None:
    """Reject labels to evaluate on that are known without an image, and do not fit the model or the other labels.

    Raises:
        ValueError: If they do not.
    """
    if (known := images.known_labels()) is None:
        return
    labels = LabelCounts(config, images.is_dense, targets)
    try:
        labels.add(LabelledBatch(sorted(images.order or ()), {}, known))
    except ValueError as error:
        raise ValueError(f"The labels of {_eval_name(name)} do not fit: {error}") from error
    if labels.targets.kind == REGRESSION and not labels.vary:
        raise ValueError(f"The labels of {_eval_name(name)} are the same for all images: they show no error.")


def _known_targets(
    images: LabelledImages, config: Any, options: FitOptions, share: Share, batch_size: int
) -> Targets | None:
    """Return how labels become targets, as far as that is known before the model reads an image.

    Raises:
        ValueError: If labels that are known do not fit the model, or classes cannot be balanced.
    """
    labels = LabelCounts(config, images.is_dense)
    if (known := images.known_labels()) is not None:
        labels.add(LabelledBatch(sorted(images.order or ()), {}, known))
        labels.check(options.allow_missing)
    if not options.balance_classes:
        return labels.found
    if known is None:
        if not images.can_repeat:
            raise ValueError(
                "`balance_classes` reads the dataset twice, and an iterator can only be read once. Pass a dataset "
                "or a list."
            )

        def count() -> None:
            for batch in images.labelled_batches(batch_size, share):
                labels.add(batch)

        _together(share, count)
        labels.total(share)
    if not labels.targets.is_exclusive:
        raise ValueError("`balance_classes` needs one class per image as the label. Omit it for other labels.")
    return labels.targets.balanced(labels.counts)


def _check_size(images: LabelledImages, config: Any, part: Any) -> None:
    """Reject images whose regression the memory cannot hold, where their number is known.

    Raises:
        ValueError: If it exceeds the memory.
    """
    rows, columns = config.token_grid if images.is_dense else (1, 1)
    if images.order is not None:
        each = rows * columns
        check_memory(_width(part), int(config.num_labels), each * len(images.order), each)


def _width(part: Any) -> int:
    """Return the width of what the linear layer of a head or decoder reads."""
    return int(_layer(part).weight.shape[1])


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module is called with."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _pass(
    model: Any,
    images: LabelledImages,
    share: Share,
    batch_size: int,
    take: Callable[[LabelledBatch, Any], None],
    description: str,
) -> None:
    """Read this process's share of the images, and let each batch and the model's output be taken."""
    # The size of a stream is unknown.
    total = None if images.order is None else len(images.share(0, images.max_images, share.rank, share.world))

    def read() -> None:
        with (
            eval_mode(model),
            torch.no_grad(),
            torch.autocast(model.device.type, enabled=False),
            progress_bar(description, total, unit="image") as bar,
        ):
            for batch in images.labelled_batches(batch_size, share):
                take(batch, model(**batch.inputs))
                bar.update(len(batch.indices))

    _together(share, read)


def _together(share: Share, step: Any) -> None:
    """Run a step in all processes; where one fails, all do, and none waits for it.

    Raises:
        RuntimeError: If the step failed in another process.
    """
    failure: Exception | None = None
    try:
        step()
    # Of any kind: the others must hear of it.
    except Exception as error:
        failure = error
    failures = share.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if said := [each for each in failures if each is not None]:
        raise RuntimeError(f"Another process failed to fit the head ({said[0]}).")


class _Reading:
    """Takes batches of images and adds up what the linear layer reads of them.

    Args:
        config: The model's.
        part: Its linear head or decoder.
        images: The images.
        targets: How labels become targets, if that is known.
        kept_bytes: Memory of the features that are kept.
    """

    def __init__(
        self, config: Any, part: Any, images: LabelledImages, targets: Targets | None, kept_bytes: int
    ) -> None:
        self.images, self.labels = images, LabelCounts(config, images.is_dense, targets)
        self.seen: list[Tensor] = []  # what is before the linear layer was called with
        rows, columns = config.token_grid if images.is_dense else (1, 1)
        self.sums = FeatureSums(_width(part), int(config.num_labels), kept_bytes, rows * columns)
        # Of a decoder: number, sum and sum of squares of all tokens.
        self.tokens = torch.zeros(3, _width(part), dtype=torch.float64)

    def take(self, batch: LabelledBatch, _: Any) -> None:
        """Add a batch of images.

        Raises:
            ValueError: If labels do not fit the model, features are not finite, or their moments exceed the memory.
        """
        features, grid = self.seen.pop().float().cpu(), (1, 1)
        finite = features.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"The features of image {batch.indices[int((~finite).nonzero()[0, 0])]} are NaN or infinite. Check "
                "the model's weights, and load it in float32."
            )
        if self.images.is_dense:
            grid = (features.shape[2], features.shape[3])
            features = features.flatten(2).transpose(1, 2).flatten(0, 1)
            wide = features.double()
            self.tokens += torch.stack([torch.full_like(wide[0], len(wide)), wide.sum(0), wide.square().sum(0)])
        found, known = self.labels.add(batch, grid)
        each = len(features) // len(batch.indices)
        images = self.images.image_numbers(batch.indices).repeat_interleave(each)
        numbers = (torch.tensor(batch.indices) << TOKEN_BITS)[:, None] + torch.arange(each)
        rows = Rows(features, found, images, numbers.flatten())
        self.sums.add(rows[known], self.labels.targets)

    def total(self, share: Share) -> Targets:
        """Add up what all processes counted, and return how labels became targets."""
        self.labels.total(share)
        self.tokens = share.total(self.tokens)
        return self.labels.targets


@torch.no_grad()
def _write(model: Any, part: Any, targets: Targets, solution: HeadSolution, tokens: Tensor) -> None:
    """Write a solution into the linear layer of a head or decoder.

    Args:
        model: The model.
        part: Its head or decoder.
        targets: What it was fitted to.
        solution: The solution.
        tokens: Of a decoder: number, sum and sum of squares of all tokens, (3, D).

    Raises:
        ValueError: If the layer's dtype does not hold the weights.
    """
    weight, bias = solution.weight, solution.bias
    if targets.kind == DENSE:
        norm, (count, total, squares) = part.norm, tokens
        mean = total / count
        norm.reset_parameters()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((squares / count - mean.square() - norm.eps).clamp_min(0))
        # As they were rounded.
        bias = bias + weight @ norm.running_mean.double().cpu()
        weight = weight * (norm.running_var.double().cpu() + norm.eps).sqrt()
    layer = _layer(part)
    largest, limit = float(max(weight.abs().max(), bias.abs().max())), torch.finfo(layer.weight.dtype).max
    if largest > limit:
        raise ValueError(
            f"The weights of the fitted head are up to {largest:g}, beyond what {layer.weight.dtype} holds. Load the "
            "model in bfloat16 or float32, or let it standardize its features (`calibration_images=`)."
        )
    layer.weight.copy_(weight.view(layer.weight.shape))
    layer.bias.copy_(bias)
    if targets.kind in (MULTI, REGRESSION):
        # As transformers' loss has it; its pipeline goes by it.
        model.config.problem_type = targets.kind


def _card_facts(fit: HeadFit, evaluated: dict[str, dict[str, float]], is_dense: bool) -> dict[str, Any]:
    """Return what the model's card says of a fit."""
    facts: dict[str, object] = {
        "head": "linear, in closed form (ridge regression)",
        "images it was fitted on": fit.num_images,
        "ridge strength": f"{fit.strength:.3g}",
    }
    if fit.accuracy is not None:
        facts[f"accuracy on held-out {'tokens of ' * is_dense}images, each held out once"] = f"{fit.accuracy:.1%}"
    else:
        facts["share of variance explained, on images each held out once"] = f"{1 - fit.error:.1%}"
    figures, metric = evaluated.get("", {}), "mean_iou" if is_dense else "accuracy"
    by_set = {name: each[metric] for name, each in evaluated.items() if name and metric in each}
    # Those of a former head do not hold for this one.
    return {
        "training": facts,
        "accuracy": None if is_dense else figures.get("accuracy"),
        "mean_iou": figures.get("mean_iou"),
        "by_set": by_set or None,
        "baselines": None,
        "command": None,
    }
