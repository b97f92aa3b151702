"""The command line: `hf-aselect COMMAND`."""

import argparse
import sys
from collections.abc import Sequence

from transformers.utils import logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 with one line on stderr that says what went wrong.

    Args:
        arguments: Words of the command line; those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="hf-aselect", description="Diffusion transformers as vision models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train, compare and save a classifier on the embedded DiT, in a few minutes and without network",
        description="Choose the timestep of the embedded Fashion-MNIST DiT with A-SelecT, train an attention head on "
        "it, compare with other timesteps and with raw pixels, save the model with its card, and reload it.",
    )
    demo.add_argument("--output", default="hf-aselect-demo", metavar="DIR", help="folder to write (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the head's training (%(default)s)")
    demo.set_defaults(run=_demo)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"hf-aselect: error: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(parsed: argparse.Namespace) -> None:
    try:
        # It needs the packages of the `train` extra, and they take seconds to import.
        from .demo import DemoSettings, format_table, run_demo
    except ModuleNotFoundError as error:
        raise ImportError(f"The demo needs {error.name}: pip install 'hf_aselect[train]'") from error
    logging.set_verbosity_error()  # the host reports the head's new weights, which is what the demo is for
    results = run_demo(parsed.output, DemoSettings(seed=parsed.seed))
    print()
    print(format_table(results))
    print()
    print(f"Saved {parsed.output}/model, results.json, timestep_curve.png and predictions.png.")
    print("Reloaded through AutoModelForImageClassification and pipeline: the predictions are equal.")
