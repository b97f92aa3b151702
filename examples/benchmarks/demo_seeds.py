"""The demo with several seeds, and the card of the classifier that it makes.

    python examples/benchmarks/demo_seeds.py --output_dir demo-seeds --card model_cards/fashion-mnist-classifier

runs `hf-aselect demo` with seeds 0, 1 and 2 (about a minute each on two CPU cores), and writes the card of seed 0's
model with the figures of all: a seed draws the few labels. A seed whose results are there is not run again.
`seeds.json` beside the card has what it was made from.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from hf_aselect import ASelectConfig, DiTForImageClassification
from hf_aselect.cli import main as hf_aselect
from hf_aselect.hub.card import facts_of_card
from hf_aselect.hub.push import write_card_of

BASELINES = {
    "logistic regression on raw pixels": "raw_pixels",
    "this read-out from 500 labels": "read_out_500",
    "logistic regression on raw pixels from 500 labels": "raw_pixels_500",
    "this read-out from 100 labels": "read_out_100",
    "logistic regression on raw pixels from 100 labels": "raw_pixels_100",
    "linear probe of one tap at the timestep selected for it": "selected",
    "linear probe of one tap at t = 0": "zero",
    "linear probe of one tap at a random t (mean over the grid)": "random_mean",
    "linear probe of one tap at the worst t": "worst",
    "linear probe of one tap at the best t (exhaustive search)": "best",
}
CARD = "model_cards/fashion-mnist-classifier"
LIMITS = (
    "It knows Fashion-MNIST's ten classes of clothes, as grey images of 28 × 28 pixels on a black ground, and calls "
    "anything else one of them. It was fitted on 4,000 images, as a demonstration."
)


def run(seed: int, output: Path) -> dict[str, Any]:
    """Return the results of the demo with a seed, which is run unless they are there."""
    if not (output / "results.json").is_file() and hf_aselect(["demo", "--seed", str(seed), "--output", str(output)]):
        raise RuntimeError(f"The demo with seed {seed} failed.")
    results: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return results


def write_card(results: list[dict[str, Any]], config: ASelectConfig, known: dict[str, Any], folder: Path) -> None:
    """Write the card of the first seed's model, with the figures of all seeds."""
    figures = {name: [each["accuracy"][name] for each in results] for name in ("read_out", *BASELINES.values())}
    seeds = " ".join(str(each["seed"]) for each in results)
    known["training"] = {**known["training"], "seed of the label subsets": ", ".join(seeds.split())}
    facts = {
        **known,
        "accuracy": _one_or_all(figures["read_out"]),
        "baselines": {name: _one_or_all(figures[key]) for name, key in BASELINES.items()},
        "command": f"python examples/benchmarks/demo_seeds.py --output_dir demo-seeds --card {CARD} --seeds {seeds}",
        "limits": LIMITS,
    }
    write_card_of(config, DiTForImageClassification, folder, **facts)


def _one_or_all(values: list[float]) -> float | list[float]:
    """Return a figure that no seed changes once."""
    return values[0] if max(values) == min(values) else values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of the demos")
    parser.add_argument("--card", required=True, help="folder for the card")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    output = Path(args.output_dir)
    results = [run(seed, output / f"seed-{seed}") for seed in args.seeds]
    model = output / f"seed-{args.seeds[0]}" / "model"
    config = ASelectConfig.from_pretrained(model)
    known = facts_of_card(model / "README.md")
    folder = Path(args.card)
    write_card(results, config, known, folder)
    content = {"results": results, "config": config.to_diff_dict(), "known": facts_of_card(model / "README.md")}
    (folder / "seeds.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    heads = [each["accuracy"]["read_out_100"] for each in results]
    print(f"From 100 labels: {statistics.mean(heads):.1%} ({min(heads):.1%} to {max(heads):.1%}). Saved {folder}.")


if __name__ == "__main__":
    main()
