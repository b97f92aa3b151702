"""Model cards (README.md): the facts of a model and its training."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints.atomic import whole_file
from ..checkpoints.licenses import NON_COMMERCIAL, license_of
from ..model.checks import read_text

logger = logging.getLogger(__name__)
TAGS = ("hf_aselect", "a-select", "diffusion-transformer")
# What an earlier card knew and the configuration does not: it is kept in the front matter, so that a card can be
# written again.
KEPT = (
    "model_name",
    "accuracy",
    "mean_iou",
    "by_set",
    "baselines",
    "dataset",
    "license",
    "license_name",
    "training",
    "command",
    "limits",
    "tags",
)
# Of a front matter, and of the letters of a licence's name.
_MAX_VALUES = 10_000
# What nobody wrote: cards of hf_aselect, and drafts of transformers.
_MADE_BY_MACHINE = re.compile(r"^hf_aselect:|\[More Information Needed\]|generated automatically", re.MULTILINE)
# Facts that are read from front matters, too: what each must be, and how that is said.
_KINDS: dict[str, tuple[Any, str]] = {
    "baselines": (Mapping, "figures by name"),
    "by_set": (Mapping, "figures by the name of a split"),
    "training": (Mapping, "facts by name"),
    "tags": ((list, tuple), "a list of tags"),
    "dataset": (str, "a name"),
}
YOURS = "<!-- What follows is yours: it stays when this card is written again. -->"
Figure = float | Sequence[float]
# Arguments of pushes of transformers 4, and what they are called today.
_OF_FORMER_PUSHES = {"use_auth_token": "token", "repo_path_or_name": "repo_id", "repo_name": "repo_id"}
_UNLABELLED = ", without labels or training."
_HOW = {
    "consensus": "Selected by how well the features here predict what those of all timesteps have in common"
    + _UNLABELLED,
    "hfr": "Selected by the share of high spatial frequencies in the features (A-SelecT's criterion, reconstructed)"
    + _UNLABELLED,
    "signal_hfr": "Selected by the share of high spatial frequencies in what the features of two noise draws share"
    + _UNLABELLED,
    "probe": "Selected by the accuracy of a linear probe, with labels.",
    "patch_probe": "Selected by the accuracy of a linear probe on patches, with masks.",
}
_STOPPED_BY = {
    "confidence": "stopped early, at the requested confidence",
    "max_images": "stopped at the maximum number of images",
    "all pictures": "all images were used",
}


class Task(NamedTuple):
    """What a model does, the Auto class that loads it, and what its pipeline is called."""

    does: str
    auto: str
    verb: str | None


_TASKS = {
    "image-classification": Task("with a head that classifies images", "AutoModelForImageClassification", "classify"),
    "image-segmentation": Task(
        "with a decoder that predicts the class of each pixel", "AutoModelForSemanticSegmentation", "segment"
    ),
    "image-feature-extraction": Task("as a vision model that returns tokens", "AutoModel", None),
}


@dataclass(frozen=True)
class CardFacts:
    """The facts of a model for its card; fields that are None are left out.

    Args:
        model_name: Its name.
        repo_id: Its id on the Hub.
        timestep: Timestep at which features are read, in [0, 1000); a list of several.
        block: Block at which they are read, counted from the first; a list of several.
        feature: Feature that is read there; a list of several.
        channels: Channels of all taps and timesteps side by side, where there are several.
        read_out: Timestep, block and feature of each of them, where not every combination is read.
        criterion: Criterion that selected the timestep.
        log_snr: 2·ln(alpha / sigma) at the timestep.
        num_images: Images that it was selected from.
        images: "given", or "generated" by the transformer itself.
        seconds: Seconds that the selection took.
        confidence: Share of bootstrap resamples that agree with the selection, in [0, 1].
        stopped_by: Why no more images were looked at: "confidence", "max_images" or "all images".
        score: The criterion at the timestep.
        interval: 95 % bootstrap interval of that.
        joint_scores: Of several timesteps that were selected, the criterion of the first, the first two together, ...
        warnings: What speaks against the selection.
        figure: Path of the curve's image, relative to the card.
        task: What the model does: "image-classification", "image-segmentation" or "image-feature-extraction".
        auto_class: Name of the Auto class that loads it; by default the task's.
        accuracy: Accuracy on the evaluation split, in [0, 1]; of several runs (seeds) a sequence.
        mean_iou: Mean intersection over union on the evaluation split, in [0, 1], of a segmenter; or a sequence.
        by_set: The same on several evaluation splits, by the split's name.
        baselines: The same of what it is compared with, by name.
        dataset: Dataset that it was trained and evaluated on.
        base_model: Model that it was made from, as an id of the Hub.
        base_license: Licence of that model, by its own card; "other/NAME" where the Hub has no identifier for it.
        license: Identifier of its licence; by default that of `base_model`, where it is known. A licence of the base
            that forbids commercial use is always said.
        license_name: Its name, where the Hub has no identifier for it ("other").
        training: Facts of the training, by name.
        command: Command that gives the figures again.
        limits: What it is not for.
        adapter_of: What an adapter (LoRA) of peft is put on: an id on the Hub, or the name of a folder. It is then
            loaded by peft.
        folded: Whether the timestep is in the weights.
        has_processor: Whether there is an image processor beside it; latents without a VAE are not images.
        needs_diffusers: Whether it is loaded through diffusers; None: where that is not known.
        tags: Further tags.
    """

    model_name: str
    repo_id: str | None = None
    timestep: int | Sequence[int] | None = None
    block: int | Sequence[int] | None = None
    feature: str | Sequence[str] | None = None
    channels: int | None = None
    read_out: Sequence[tuple[Any, int, str]] | None = None
    criterion: str | None = None
    log_snr: float | None = None
    num_images: int | None = None
    pictures: str | None = None
    seconds: float | None = None
    confidence: float | None = None
    stopped_by: str | None = None
    score: float | None = None
    interval: Sequence[float] | None = None
    joint_scores: Sequence[float] | None = None
    warnings: Sequence[str] = ()
    figure: str | None = None
    task: str = "image-classification"
    auto_class: str | None = None
    accuracy: Figure | None = None
    mean_iou: Figure | None = None
    by_set: Mapping[str, Figure] | None = None
    baselines: Mapping[str, Figure] | None = None
    dataset: str | None = None
    base_model: str | None = None
    base_license: str | None = None
    license: str | None = None
    license_name: str | None = None
    training: Mapping[str, object] | None = None
    command: str | None = None
    limits: str | None = None
    adapter_of: str | None = None
    folded: bool | None = None
    has_processor: bool = True
    needs_diffusers: bool | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the facts, and make figures plain numbers of Python: the front matter holds no others.

        Raises:
            ValueError: If the task is unknown, a fact is of another kind, or a share is not in [0, 1].
        """
        if self.task not in _TASKS:
            raise ValueError(f"`task` must be one of {', '.join(_TASKS)}, got {self.task!r}.")
        for name, (kind, what) in _KINDS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"`{name}` must be {what}, got {value!r}.")
        figures = {
            "accuracy": self.accuracy,
            "mean_iou": self.mean_iou,
            **(self.by_set or {}),
            **(self.baselines or {}),
        }
        for name, value in figures.items():
            if value is not None:
                _check_figure(name, value)
        for name in ("accuracy", "mean_iou"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _plain_figure(getattr(self, name)))
        for name in ("baselines", "by_set"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, {str(key): _plain_figure(value) for key, value in given.items()})


def render_card(facts: CardFacts) -> str:
    """Return the text of a model card: front matter for the Hub, then the facts."""
    metric, _ = _metric(facts)
    base_license, auto = _base_license(facts), facts.auto_class or _TASKS[facts.task].auto
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"),
        facts=facts,
        task=_TASKS[facts.task],
        name=_one_line(facts.model_name),
        command=facts.command and _one_line(facts.command).replace("`", "'"),
        auto=auto,
        # Of a folder transformers' own asks the Hub whether it is there.
        is_backbone_here=auto == "AutoBackbone" and facts.repo_id is None,
        how=_how(facts),
        choice=_known(_choice_rows(facts)),
        stopped_by=_STOPPED_BY.get(facts.stopped_by or ""),
        metric=metric.replace("mean_iou", "mean IoU"),
        results=_result_rows({**_own_figures(facts), **(facts.baselines or {})}) if _own_figures(facts) else {},
        folder=facts.repo_id or ".",
        training=_known(
            {
                "dataset": facts.dataset,
                "adapter of": facts.adapter_of,
                "base model": facts.base_model,
                "licence of its weights, which also applies here": base_license[1] or base_license[0],
                **(facts.training or {}),
            }
        ),
        is_non_commercial=base_license[2],
        yours=YOURS,
    )
    return str(card).rstrip("\n") + "\n"


def write_card(facts: CardFacts, folder: str | os.PathLike[str]) -> None:
    """Write README.md into a folder; it appears whole or not at all, and keeps what a reader wrote below the mark."""
    path = Path(folder) / "README.md"
    text = render_card(facts)
    if path.is_file():
        text += own_words(path.read_text(encoding="utf-8"))
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def own_words(text: str) -> str:
    """Return what stands below the mark of a card; of a card that somebody wrote by hand, all but its front matter."""
    _, mark, below = text.partition(f"{YOURS}\n")
    if mark or _MADE_BY_MACHINE.search(text):
        return below
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
    return f"\n{body}\n" if body else ""


def refuse_unknown_facts(facts: Mapping[str, Any], options: Sequence[str] = ()) -> None:
    """Reject names that are not fields of `CardFacts`, naming the nearest.

    Args:
        facts: What was given as facts.
        options: What else could have been meant: arguments of a push.

    Raises:
        ValueError: If there are such.
    """
    known = [each.name for each in fields(CardFacts)]
    if unknown := sorted(facts.keys() - set(known)):
        near = {name: get_close_matches(name, [*known, *options, *_OF_FORMER_PUSHES], n=1) for name in unknown}
        meant = {name: _OF_FORMER_PUSHES.get(found[0], found[0]) for name, found in near.items() if found}
        said = [f"{name!r}" + f" (did you mean {meant.get(name)!r}?)" * (name in meant) for name in unknown]
        hint = "" if meant else ". The most common are dataset, accuracy, license, base_model and tags"
        raise ValueError(f"A card has no facts {', '.join(said)}{hint}. `hf_aselect.hub.card.CardFacts` lists all.")


def facts_of_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a card knows that the model's configuration does not.

    Args:
        path: The card: ours, of which all is read, or another one, of which its results, data and licence are.

    Returns:
        Fields of `CardFacts` by name.

    Raises:
        ValueError: If its front matter cannot be read.

    Example:
        >>> from hf_aselect import facts_of_card
        >>> facts_of_card("model_cards/fashion-mnist-classifier/README.md")["dataset"]
        'fashion_mnist'
    """
    text = read_text(Path(path))
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
    except Exception as error:  # of yaml, or of the Hub's client
        raise ValueError(f"The front matter of {str(path)!r} cannot be read: {error}") from error
    if _is_endless(vars(data)):
        raise ValueError(f"The front matter of {str(path)!r} has more than {_MAX_VALUES} values.")
    kept = data.get("hf_aselect")
    if isinstance(kept, Mapping):
        return {name: value for name, value in kept.items() if name in KEPT}
    datasets = data.get("datasets")
    datasets = datasets if isinstance(datasets, list) and datasets else [datasets]
    facts = {
        "license": data.get("license"),
        "license_name": data.get("license_name"),
        "base_model": data.get("base_model"),
        "dataset": datasets[0],
    }
    for result in data.get("eval_results") or []:
        if result.metric_type in ("accuracy", "mean_iou"):
            facts[result.metric_type] = result.metric_value
    return {name: value for name, value in facts.items() if isinstance(value, (str, float))}


def _is_endless(value: Any) -> bool:
    """Return whether a value holds more than a card has; a few aliases of YAML stand for billions."""
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        count += 1
        parts = one.values() if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else ()
        if count + len(parts) > _MAX_VALUES:
            return True
        waiting.extend(parts)
    return False


def _base_license(facts: CardFacts) -> tuple[str | None, str | None, bool]:
    """Return the licence of the base model: from the table, else from the base model's card."""
    identifier, name, is_non_commercial = license_of(facts.base_model or "")
    if identifier is None and facts.base_license is not None:
        identifier, _, after = facts.base_license.partition("/")
        name = after or None
        is_non_commercial = NON_COMMERCIAL.search(facts.base_license) is not None
    return identifier, name, is_non_commercial


def _license(facts: CardFacts) -> tuple[str | None, str | None]:
    """Return the licence of the front matter: what was said, unless the base forbids commercial use."""
    identifier, name, is_non_commercial = _base_license(facts)
    said = facts.license, facts.license_name
    if facts.license is None or (is_non_commercial and said != (identifier, name)):
        if facts.license is not None:
            logger.warning(
                "The licence in the card is %s, that of %s, which forbids commercial use, instead of %s.",
                name or identifier,
                facts.base_model,
                facts.license,
            )
        return identifier, name
    return facts.license, facts.license_name


def _check_figure(name: str, value: Any) -> None:
    """Check that a figure is a share, or one for each run.

    Raises:
        ValueError: If it is not.
    """
    try:
        runs = () if isinstance(value, str) else _runs(value)
    except (TypeError, ValueError):
        runs = ()
    if not (runs and all(0 <= share <= 1 for share in runs)):
        raise ValueError(f"{name!r} must be in [0, 1], or a list of such values with one per run, got {value!r}.")


def _runs(value: Figure) -> tuple[float, ...]:
    """Return the figures of all runs as Python's, of what numpy and torch made as well."""
    try:
        return (float(value),)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return tuple(float(share) for share in value)  # type: ignore[union-attr]


def _plain_figure(value: Figure) -> Figure:
    """Return a figure as a number of Python; of several runs, or a list of one, as a list."""
    runs = _runs(value)
    is_one = len(runs) == 1 and getattr(value, "ndim", 0) == 0 and not isinstance(value, (list, tuple))
    return runs[0] if is_one else list(runs)


def _metric(facts: CardFacts) -> tuple[str, Figure | None]:
    """Return the metric of the model's task, and its value."""
    is_segmenter = facts.task == "image-segmentation"
    return ("mean_iou", facts.mean_iou) if is_segmenter else ("accuracy", facts.accuracy)


def _metadata(facts: CardFacts) -> ModelCardData:
    """Return the front matter."""
    identifier, name = _license(facts)
    results = _results(facts)
    is_on_the_hub = facts.adapter_of is not None and "/" in facts.adapter_of
    is_trained = facts.base_model is not None and _TASKS[facts.task].verb is not None
    return ModelCardData(
        library_name="peft" if facts.adapter_of else "transformers",
        pipeline_tag=facts.task,
        tags=list(dict.fromkeys([*TAGS, *facts.tags])),
        license=identifier,
        license_name=name,
        base_model=facts.adapter_of if is_on_the_hub else facts.base_model,
        # A head on it is a training of it; features alone are it.
        base_model_relation="adapter" if facts.adapter_of else "finetune" if is_trained else None,
        datasets=[facts.dataset] if facts.dataset else None,
        metrics=[_metric(facts)[0]] if results else None,
        model_name=facts.model_name,
        eval_results=results,
        hf_aselect=_kept(facts),
    )


def _results(facts: CardFacts) -> list[EvalResult] | None:
    """Return the figures of the model's task as the Hub has them; None unless they and their dataset are known."""
    metric, value = _metric(facts)
    found: list[tuple[str | None, Figure]] = [] if value is None else [(None, value)]
    found += list((facts.by_set or {}).items())
    if not found or facts.dataset is None:
        return None
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type=facts.dataset,
            dataset_name=facts.dataset,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(mean(_runs(each)), 4),
        )
        for split, each in found
    ]


def _own_figures(facts: CardFacts) -> dict[str, Figure]:
    """Return the figures of the model's task, by what the table calls them: one, or one for each evaluation split."""
    _, value = _metric(facts)
    one = {} if value is None else {"**this model**": value}
    return {**one, **{f"**this model**, {name}": each for name, each in (facts.by_set or {}).items()}}


def _kept(facts: CardFacts) -> dict[str, Any]:
    """Return what the front matter keeps, so that the card can be written again."""
    given = {each.name: getattr(facts, each.name) for each in fields(facts) if each.name in KEPT}
    return {name: _plain(value) for name, value in given.items() if value is not None and (name != "tags" or value)}


def _plain(value: Any) -> Any:
    """Return a fact as the front matter can hold it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _known(rows: Mapping[str, object]) -> dict[str, str]:
    """Return what is known of a table's rows, as its cells can hold it."""
    return {_cell(name): _cell(value) for name, value in rows.items() if value is not None}


def _one_line(text: object) -> str:
    """Return a text with single spaces in place of line ends and the like."""
    return " ".join(str(text).split())


def _cell(value: object) -> str:
    """Return a value as a cell of a table can hold it."""
    return _one_line(value).replace("|", "\\|")


def _choice_rows(facts: CardFacts) -> dict[str, object]:
    """Return the rows of the table of the timestep; a value that is not known is None."""

    def rounded(value: float | None, digits: int) -> str | None:
        return None if value is None else f"{value:.{digits}f}"

    made = " that the transformer generated" if facts.pictures == "generated" else ""
    return {
        "timestep": _listing(facts.timestep),
        "log-SNR": rounded(facts.log_snr, 2),
        "block": _listing(facts.block),
        "feature": _listing(facts.feature),
        "channels": _side_by_side(facts),
        "criterion": facts.criterion,
        "images": None if facts.num_images is None else f"{facts.num_images}{made}",
        "confidence": rounded(facts.confidence, 2),
        "score (95 % interval)": None
        if facts.score is None or facts.interval is None
        else f"{facts.score:.4g} ({facts.interval[0]:.4g} to {facts.interval[1]:.4g})",
        "joint score of the first, the first two, ...": None
        if facts.joint_scores is None
        else ", ".join(f"{score:.4g}" for score in facts.joint_scores),
        "seconds": rounded(facts.seconds, 1),
        "folded": _folded(facts),
    }


def _folded(facts: CardFacts) -> str | None:
    """Return that a model is read at its timesteps alone; None where it is not folded."""
    if not facts.folded:
        return None
    is_one = not isinstance(facts.timestep, list) or len(facts.timestep) == 1
    return f"yes, so only {'this timestep' if is_one else 'these timesteps'} can be read"


def _listing(values: Any) -> str | None:
    """Return one value or several as text, three whole numbers or more in a row by their ends."""
    several = list(values) if isinstance(values, list | tuple) else [values]
    if not several or several == [None]:
        return None
    is_row = len(several) > 2 and isinstance(several[0], int) and several == list(range(several[0], several[-1] + 1))
    return f"{several[0]} to {several[-1]}" if is_row else ", ".join(map(str, several))


def _side_by_side(facts: CardFacts) -> str | None:
    """Return how several taps and timesteps are read together; None of a single one."""
    if facts.channels is None:
        return None
    what = "every timestep, block and feature"
    if facts.read_out is not None:
        what = ", ".join(f"{feature} of block {block} at t = {at}" for at, block, feature in facts.read_out)
    return f"{facts.channels:,}, concatenated in this order: {what}"


def _how(facts: CardFacts) -> str:
    """Return the sentence on how the timestep was selected."""
    if facts.criterion is None:
        return "The features are read here:"
    # A criterion of the user's own is named in the table.
    return _HOW.get(facts.criterion, "Selected by this criterion:")


def _result_rows(figures: Mapping[str, Figure]) -> dict[str, str]:
    """Return means, and the least and the greatest where there were several runs."""
    rows = {}
    for name, value in figures.items():
        runs = _runs(value)
        spread = f" ({min(runs):.1%} to {max(runs):.1%}, {len(runs)} runs)" if len(runs) > 1 else ""
        rows[_cell(name)] = f"{mean(runs):.1%}{spread}"
    return rows
