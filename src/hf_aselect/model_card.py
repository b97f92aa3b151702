"""Model cards: what is known of a model and its training, as README.md."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_template import TEMPLATE

logger = logging.getLogger(__name__)

# Of what people have, by the beginning of its id: licence and, where the Hub has no identifier for it, its name; and
# whether it forbids commercial use. It holds for what is made from the weights, too.
LICENSES = {
    "facebook/DiT-XL-2-": ("cc-by-nc-4.0", None, True),
    "stabilityai/stable-diffusion-3": ("other", "stabilityai-ai-community", False),
    "PixArt-alpha/": ("openrail++", None, False),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", None, False),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license", True),
    "Efficient-Large-Model/Sana": ("other", "nscl-v2-custom", True),
}
TAGS = ("hf_aselect", "a-select", "diffusion-transformer")
# What an earlier card knew and the configuration does not: it is kept in the front matter, so that a card can be
# written again.
KEPT = (
    "model_name",
    "accuracy",
    "mean_iou",
    "baselines",
    "dataset",
    "license",
    "license_name",
    "training",
    "command",
    "limits",
    "tags",
)
YOURS = "<!-- What follows is yours: it stays when this card is written again. -->"

Figure = float | Sequence[float]


@dataclass(frozen=True)
class CardFacts:
    """What is known of a model; what is None is left out of the card.

    Args:
        model_name: Its name.
        repo_id: Its id on the Hub.
        timestep: Timestep at which features are read, in [0, 1000).
        block: Block at which they are read, counted from the first.
        feature: Feature that is read there.
        criterion: Criterion that chose the timestep.
        log_snr: 2·ln(alpha / sigma) at the timestep.
        num_images: Pictures that it was chosen from.
        pictures: "given", or "generated" by the transformer itself.
        seconds: Seconds that the choice took.
        confidence: Share of bootstrap resamples that agree with the choice, in [0, 1].
        stopped_by: Why no more pictures were looked at: "confidence", "max_images" or "all pictures".
        score: The criterion at the timestep.
        interval: 95 % bootstrap interval of that.
        warnings: What speaks against the choice.
        figure: Path of the curve's picture, relative to the card.
        task: What the model does: "image-classification", "image-segmentation" or "image-feature-extraction".
        auto_class: Name of the Auto class that loads it; by default the task's.
        accuracy: Accuracy on the evaluation split, in [0, 1]; of several runs (seeds) a sequence.
        mean_iou: Mean intersection over union on the evaluation split, in [0, 1], of a segmenter; or a sequence.
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
        needs_diffusers: Whether it is loaded through diffusers; None: where that is not known.
        tags: Further tags.
    """

    model_name: str
    repo_id: str | None = None
    timestep: int | None = None
    block: int | None = None
    feature: str | None = None
    criterion: str | None = None
    log_snr: float | None = None
    num_images: int | None = None
    pictures: str | None = None
    seconds: float | None = None
    confidence: float | None = None
    stopped_by: str | None = None
    score: float | None = None
    interval: Sequence[float] | None = None
    warnings: Sequence[str] = ()
    figure: str | None = None
    task: str = "image-classification"
    auto_class: str | None = None
    accuracy: Figure | None = None
    mean_iou: Figure | None = None
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
    needs_diffusers: bool | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what would make a wrong card.

        Raises:
            ValueError: If the task is unknown, or a share is not in [0, 1].
        """
        if self.task not in _TASKS:
            raise ValueError(f"`task` must be one of {', '.join(_TASKS)}, got {self.task!r}.")
        figures = {"accuracy": self.accuracy, "mean_iou": self.mean_iou, **(self.baselines or {})}
        for name, value in figures.items():
            if value is not None and not (_runs(value) and all(0 <= share <= 1 for share in _runs(value))):
                raise ValueError(f"{name!r} must be a share in [0, 1], or one for each run, got {value!r}.")


def render_card(facts: CardFacts) -> str:
    """Return the text of a model card: front matter for the Hub, then what is known."""
    metric, value = _metric(facts)
    base_license = _base_license(facts)
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=TEMPLATE,
        facts=facts,
        task=_TASKS[facts.task],
        auto=facts.auto_class or _TASKS[facts.task].auto,
        how=_how(facts),
        choice=_known(_choice_rows(facts)),
        stopped_by=_STOPPED_BY.get(facts.stopped_by or ""),
        metric=metric.replace("mean_iou", "mean IoU"),
        results={} if value is None else _result_rows({"**this model**": value, **(facts.baselines or {})}),
        folder=facts.repo_id or ".",
        training=_known(
            {
                "dataset": facts.dataset,
                "adapter of": facts.adapter_of,
                "base model": facts.base_model,
                "licence of its weights, and so of these": base_license[1] or base_license[0],
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
    temporary = path.with_name(".README.md.incomplete")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def own_words(text: str) -> str:
    """Return what stands below the mark of a card."""
    return text.partition(f"{YOURS}\n")[2]


def facts_of_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a card knows that the model's configuration does not.

    Args:
        path: The card: ours, of which all is read, or another one, of which its results, data and licence are.

    Returns:
        Fields of `CardFacts` by name.

    Raises:
        ValueError: If its front matter cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
    except Exception as error:  # of yaml, or of the Hub's client
        raise ValueError(f"The front matter of {str(path)!r} cannot be read: {error}") from error
    kept = data.get("hf_aselect")
    if isinstance(kept, Mapping):
        return {name: value for name, value in kept.items() if name in KEPT}
    datasets = data.get("datasets") or [None]
    facts = {
        "license": data.get("license"),
        "license_name": data.get("license_name"),
        "base_model": data.get("base_model"),
        "dataset": datasets if isinstance(datasets, str) else datasets[0],
    }
    for result in data.get("eval_results") or []:
        if result.metric_type in ("accuracy", "mean_iou"):
            facts[result.metric_type] = result.metric_value
    return {name: value for name, value in facts.items() if isinstance(value, (str, float))}


def license_on_card(folder: str | os.PathLike[str]) -> str | None:
    """Return the licence that the card in a folder says; "other/NAME" where the Hub has no identifier for it."""
    try:
        data = ModelCard((Path(folder) / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:  # no card, or none that the Hub's client can read: nothing is known
        return None
    found, name = data.get("license"), data.get("license_name")
    if not isinstance(found, str):
        return None
    return f"{found}/{name}" if found == "other" and name else found


def license_of(base_model: str) -> tuple[str | None, str | None, bool]:
    """Return the licence of a published model, its name where that is "other", and whether it is non-commercial."""
    for beginning, found in LICENSES.items():
        if base_model.startswith(beginning):
            return found
    return None, None, False


def _base_license(facts: CardFacts) -> tuple[str | None, str | None, bool]:
    """Return what is known of the licence of what the model was made from: of the table, else of its own card."""
    identifier, name, is_non_commercial = license_of(facts.base_model or "")
    if identifier is None and facts.base_license is not None:
        identifier, _, after = facts.base_license.partition("/")
        name = after or None
        said = facts.base_license.lower()
        is_non_commercial = any(part in said for part in ("-nc-", "non-commercial", "noncommercial"))
    return identifier, name, is_non_commercial


def _license(facts: CardFacts) -> tuple[str | None, str | None]:
    """Return the licence of the front matter: what was said, unless the base forbids commercial use."""
    identifier, name, is_non_commercial = _base_license(facts)
    if facts.license is None or (is_non_commercial and facts.license != identifier):
        if facts.license is not None:
            logger.warning(
                "The card says %s, the licence of %s, which forbids commercial use, in place of %s.",
                name or identifier,
                facts.base_model,
                facts.license,
            )
        return identifier, name
    return facts.license, facts.license_name


def _runs(value: Figure) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, (int, float)) else tuple(float(share) for share in value)


def _metric(facts: CardFacts) -> tuple[str, Figure | None]:
    """Return the metric of the model's task, and its value."""
    is_segmenter = facts.task == "image-segmentation"
    return ("mean_iou", facts.mean_iou) if is_segmenter else ("accuracy", facts.accuracy)


def _metadata(facts: CardFacts) -> ModelCardData:
    identifier, name = _license(facts)
    results = None
    metric, value = _metric(facts)
    if value is not None and facts.dataset is not None:
        results = [
            EvalResult(
                task_type=facts.task,
                dataset_type=facts.dataset,
                dataset_name=facts.dataset,
                metric_type=metric,
                metric_value=round(mean(_runs(value)), 4),
            )
        ]
    given = {each.name: getattr(facts, each.name) for each in fields(facts) if each.name in KEPT}
    is_on_the_hub = facts.adapter_of is not None and "/" in facts.adapter_of
    is_trained = facts.base_model is not None and _TASKS[facts.task].verb is not None
    kept = {name: _plain(value) for name, value in given.items() if value is not None and value != ()}
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
        metrics=[metric] if results else None,
        model_name=facts.model_name,
        eval_results=results,
        hf_aselect=kept,
    )


def _plain(value: Any) -> Any:  # noqa: ANN401 - a fact
    """Return a fact as the front matter can hold it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _known(rows: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in rows.items() if value is not None}


def _choice_rows(facts: CardFacts) -> dict[str, object]:
    def rounded(value: float | None, digits: int) -> str | None:
        return None if value is None else f"{value:.{digits}f}"

    made = " that the transformer made itself" if facts.pictures == "generated" else ""
    return {
        "timestep": facts.timestep,
        "log-SNR": rounded(facts.log_snr, 2),
        "block": facts.block,
        "feature": facts.feature,
        "criterion": facts.criterion,
        "pictures": None if facts.num_images is None else f"{facts.num_images}{made}",
        "confidence": rounded(facts.confidence, 2),
        "score (95 % interval)": None
        if facts.score is None or facts.interval is None
        else f"{facts.score:.4g} ({facts.interval[0]:.4g} to {facts.interval[1]:.4g})",
        "seconds": rounded(facts.seconds, 1),
        "folded": "the timestep is in the weights: it is read here alone" if facts.folded else None,
    }


def _how(facts: CardFacts) -> str:
    # A criterion of the user's own is named in the table.
    return (
        "Features are read here:" if facts.criterion is None else _HOW.get(facts.criterion, "Chosen by a criterion:")
    )


def _result_rows(figures: Mapping[str, Figure]) -> dict[str, str]:
    """Return means, and the least and the greatest where there were several runs."""
    rows = {}
    for name, value in figures.items():
        runs = _runs(value)
        spread = f" ({min(runs):.1%} to {max(runs):.1%}, {len(runs)} runs)" if len(runs) > 1 else ""
        rows[name] = f"{mean(runs):.1%}{spread}"
    return rows


_UNLABELLED = ", without labels or training."
_HOW = {
    "consensus": "Chosen by how much of what the transformer's features agree on can be read from these" + _UNLABELLED,
    "hfr": "Chosen by the share of high spatial frequencies in the features (A-SelecT's criterion, reconstructed)"
    + _UNLABELLED,
    "signal_hfr": "Chosen by the share of high spatial frequencies in what the features of two noise draws agree on"
    + _UNLABELLED,
    "probe": "Chosen by the accuracy of a linear probe, with labels.",
    "patch_probe": "Chosen by the accuracy of a linear probe of patches, with masks.",
}

_STOPPED_BY = {
    "confidence": "no more were looked at, as that was sure enough",
    "max_images": "no more were allowed",
    "all pictures": "there were no more",
}


class Task(NamedTuple):
    """What a model does, the Auto class that loads it, and what its pipeline is called."""

    does: str
    auto: str
    verb: str | None


_TASKS = {
    "image-classification": Task(
        "with a head that classifies pictures", "AutoModelForImageClassification", "classify"
    ),
    "image-segmentation": Task(
        "with a decoder that tells the class of each pixel", "AutoModelForSemanticSegmentation", "segment"
    ),
    "image-feature-extraction": Task("as a vision model, whose output is tokens", "AutoModel", None),
}
