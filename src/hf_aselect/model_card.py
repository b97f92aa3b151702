"""Model cards: what is known of a model and its training, as README.md."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

# Of what people have, by the beginning of its id: licence and, where the Hub has no identifier for it, its name. It
# holds for what is made from the weights, too.
LICENSES = {
    "facebook/DiT-XL-2-": ("cc-by-nc-4.0", None),
    "stabilityai/stable-diffusion-3": ("other", "stabilityai-ai-community"),
    "PixArt-alpha/": ("openrail++", None),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", None),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
    "Efficient-Large-Model/Sana": ("other", "nscl-v2-custom"),
}
TAGS = ("hf_aselect", "a-select", "diffusion-transformer")


@dataclass(frozen=True)
class CardFacts:
    """What is known of a model; what is None is left out of the card.

    Args:
        model_name: Its name.
        timestep: Timestep at which features are read, in [0, 1000).
        block: Block at which they are read, counted from the first.
        feature: Feature that is read there.
        criterion: Criterion that chose the timestep.
        log_snr: 2·ln(alpha / sigma) at the timestep.
        num_images: Pictures that it was chosen from.
        seconds: Seconds that the choice took.
        confidence: Share of bootstrap resamples that agree with the choice, in [0, 1].
        figure: Path of the curve's picture, relative to the card.
        task: What the model does: "image-classification", "image-segmentation" or "image-feature-extraction".
        accuracy: Accuracy on the evaluation split, in [0, 1].
        mean_iou: Mean intersection over union on the evaluation split, in [0, 1], of a segmenter.
        baselines: Accuracies of what it is compared with, by name, in [0, 1].
        dataset: Dataset that it was trained and evaluated on.
        base_model: Model that it was made from, as an id of the Hub.
        license: Identifier of its licence; by default that of `base_model`, where it is known.
        license_name: Its name, where the Hub has no identifier for it ("other").
        training: Facts of the training, by name.
        command: Command that gives the figures again.
        limits: What it is not for.
        folded: Whether the timestep is in the weights.
        tags: Further tags.
    """

    model_name: str
    timestep: int | None = None
    block: int | None = None
    feature: str | None = None
    criterion: str | None = None
    log_snr: float | None = None
    num_images: int | None = None
    seconds: float | None = None
    confidence: float | None = None
    figure: str | None = None
    task: str = "image-classification"
    accuracy: float | None = None
    mean_iou: float | None = None
    baselines: Mapping[str, float] | None = None
    dataset: str | None = None
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    training: Mapping[str, object] | None = None
    command: str | None = None
    limits: str | None = None
    folded: bool | None = None
    tags: tuple[str, ...] = ()


def license_of(base_model: str) -> tuple[str | None, str | None]:
    """Return the licence of a published model and, where that is "other", its name; None where it is not known."""
    for beginning, license_and_name in LICENSES.items():
        if base_model.startswith(beginning):
            return license_and_name
    return None, None


def render_card(facts: CardFacts) -> str:
    """Return the text of a model card: front matter for the Hub, then sections for what is known."""
    sections = [
        f"# {facts.model_name}",
        f"A diffusion transformer (DiT) {_TASKS[facts.task][0]}, made with hf_aselect. A DiT learned to "
        "generate pictures; its tokens at the right noise level, the *timestep*, also tell what is in one.",
        _choice_section(facts),
        _results_section(facts),
        _usage_section(facts),
        _training_section(facts),
        f"## Limits\n\n{facts.limits}" if facts.limits else "",
        _CITATION,
    ]
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def write_card(facts: CardFacts, folder: str | os.PathLike[str]) -> None:
    """Write README.md into a folder; it appears whole or not at all."""
    path = Path(folder) / "README.md"
    temporary = path.with_name(".README.md.incomplete")
    temporary.write_text(render_card(facts), encoding="utf-8")
    os.replace(temporary, path)


def _license(facts: CardFacts) -> tuple[str | None, str | None]:
    if facts.license is not None or facts.base_model is None:
        return facts.license, facts.license_name
    return license_of(facts.base_model)


def _metric(facts: CardFacts) -> tuple[str, float | None]:
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
                metric_value=round(value, 4),
            )
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=list(dict.fromkeys([*TAGS, *facts.tags])),
        license=identifier,
        license_name=name,
        base_model=facts.base_model,
        datasets=[facts.dataset] if facts.dataset else None,
        metrics=[metric] if results else None,
        model_name=facts.model_name,
        eval_results=results,
    )


def _choice_section(facts: CardFacts) -> str:
    rows = {
        "timestep": facts.timestep,
        "log-SNR": None if facts.log_snr is None else f"{facts.log_snr:.2f}",
        "block": facts.block,
        "feature": facts.feature,
        "criterion": facts.criterion,
        "pictures": facts.num_images,
        "confidence": None if facts.confidence is None else f"{facts.confidence:.2f}",
        "seconds": None if facts.seconds is None else f"{facts.seconds:.1f}",
        "folded": "the timestep is in the weights: it is read here alone" if facts.folded else None,
    }
    # A criterion of the user's own is named in the table.
    how = "Features are read here:" if facts.criterion is None else _HOW.get(facts.criterion, "Chosen by a criterion:")
    parts = ["## The timestep", how, _table(("what", "value"), rows)]
    if facts.figure:
        parts.append(f"![Criterion over the timestep]({facts.figure})")
    return "\n\n".join(parts)


def _results_section(facts: CardFacts) -> str:
    metric, value = _metric(facts)
    if value is None:
        return ""
    rows = {"**this model**": value, **(facts.baselines or {})}
    parts = [
        "## Results",
        _table(
            ("what", metric.replace("mean_iou", "mean IoU")), {name: f"{share:.1%}" for name, share in rows.items()}
        ),
    ]
    if facts.command:
        parts.append(f"Command: `{facts.command}`")
    return "\n\n".join(parts)


def _training_section(facts: CardFacts) -> str:
    identifier, name = _license(facts)
    rows = {
        "dataset": facts.dataset,
        "base model": facts.base_model,
        "licence of its weights, and so of these": name or identifier if facts.base_model else None,
        **(facts.training or {}),
    }
    if all(value is None for value in rows.values()):
        return ""
    return "## Training\n\n" + _table(("what", "value"), rows)


def _table(head: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items() if value is not None])


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

# By task: what the model does, the Auto class that loads it, and what its pipeline is called.
_TASKS = {
    "image-classification": ("with a head that classifies pictures", "AutoModelForImageClassification", "classify"),
    "image-segmentation": (
        "with a decoder that tells the class of each pixel",
        "AutoModelForSemanticSegmentation",
        "segment",
    ),
    "image-feature-extraction": ("as a vision model, whose output is tokens", "AutoModel", None),
}


def _usage_section(facts: CardFacts) -> str:
    _, auto, verb = _TASKS[facts.task]
    lines = [
        "## Use",
        "",
        "```python",
        "import hf_aselect  # registers the model with the Auto classes",
        f"from transformers import AutoImageProcessor, {auto}{', pipeline' if verb else ''}",
        "",
        'folder = "."  # this folder, or the model\'s id on the Hub',
        f"model = {auto}.from_pretrained(folder)",
        "processor = AutoImageProcessor.from_pretrained(folder)",
        *([f'{verb} = pipeline("{facts.task}", model=folder)'] if verb else []),
        "```",
    ]
    return "\n".join(lines)


_CITATION = """## Source

That a timestep can be chosen without labels is A-SelecT's idea (Liu et al., CVPR 2026 Findings,
[arXiv 2603.25758](https://arxiv.org/abs/2603.25758))."""
