r"""Share a saved model on the Hub, with its card, curve, image processor and code.

    hf auth login
    python examples/sharing/push_to_hub.py --model_name_or_path fashion-classifier --repo_id me/fashion-classifier

What the model's card says of results, data, training and licence is kept; `--accuracy`, `--dataset` and `--license`
say it again. A repository that is there is updated by one commit. `HF_ENDPOINT` names another Hub.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import HfArgumentParser

from hf_aselect import (
    ASelectConfig,
    DiTBackbone,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    facts_of_card,
)

KINDS = {
    kind.__name__: kind for kind in (DiTBackbone, DiTForImageClassification, DiTForSemanticSegmentation, DiTModel)
}


@dataclass
class PushArguments:
    """What to push, and where to."""

    model_name_or_path: str = field(metadata={"help": "A saved hf_aselect model: folder or Hub id."})
    repo_id: str = field(metadata={"help": "Repository, created if it does not exist."})
    private: bool = field(default=False, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch, created if it does not exist."})
    create_pr: bool = field(default=False, metadata={"help": "Create a pull request."})
    commit_message: str | None = field(default=None, metadata={"help": "Commit message."})
    max_shard_size: str = field(default="50GB", metadata={"help": "Maximum size of a weight file."})


@dataclass
class FactArguments:
    """What the card is to say."""

    dataset: str | None = field(
        default=None, metadata={"help": ("Dataset that the model was trained and evaluated on.")}
    )
    accuracy: float | None = field(default=None, metadata={"help": "Accuracy on its evaluation split, in [0, 1]."})
    mean_iou: float | None = field(default=None, metadata={"help": "Mean IoU of a segmenter on it, in [0, 1]."})
    license: str | None = field(default=None, metadata={"help": "Licence identifier."})
    base_model: str | None = field(default=None, metadata={"help": "Base model, a Hub id."})


def main() -> None:
    args, given = HfArgumentParser((PushArguments, FactArguments)).parse_args_into_dataclasses()
    config = ASelectConfig.from_pretrained(args.model_name_or_path)
    name = (config.architectures or ["none"])[0]
    if name not in KINDS:
        raise ValueError(f"{args.model_name_or_path!r} is a {name}, expected one of {', '.join(KINDS)}.")
    model = KINDS[name].from_pretrained(args.model_name_or_path, dtype="auto")
    told = {fact: value for fact, value in asdict(given).items() if value is not None}
    options = {name: value for name, value in asdict(args).items() if name not in ("model_name_or_path", "repo_id")}
    card = Path(args.model_name_or_path) / "README.md"
    if not Path(args.model_name_or_path).is_dir() and file_exists(args.model_name_or_path, "README.md"):
        card = Path(hf_hub_download(args.model_name_or_path, "README.md"))
    facts = {**(facts_of_card(card) if card.is_file() else {}), **told}
    facts["model_name"] = args.repo_id.rpartition("/")[2]
    commit = model.push_to_hub(args.repo_id, **options, **facts)
    print(f"Pushed: {commit.pr_url or commit.commit_url}")


if __name__ == "__main__":
    try:
        main()
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SystemExit(f"push_to_hub.py: error: {' '.join(str(error).split())}") from error
