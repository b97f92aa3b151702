"""What memory segmenting one image of 512 × 512 takes, against diffusers' own forward of the same tokens.

    python examples/benchmarks/segmentation_memory.py --source path/to/a/pipeline --output memory.json

`--source` is a pipeline that diffusers saved, DiT-XL/2 for instance (`conversion_cost.py --work_dir DIR` leaves one of
random weights in `DIR/pipeline`): an image of 512 × 512 is 1,024 tokens. Each measurement is a process of its own:
diffusers' transformer, loaded and run on latents of that size; and `DiTForSemanticSegmentation` by either decoder
(UperNet of the default 512 channels), loaded and run on an image, its VAE encoder included. Peak memory is the
kernel's count (`ru_maxrss`) less that of a process that has imported the same and loaded nothing; medians.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

SIDE = 512
KINDS = ("nothing", "diffusers", "linear", "upernet")


def measure(source: str, kind: str, dtype: torch.dtype) -> None:
    """Load and run once, and print this process's peak memory in bytes."""
    import diffusers

    from hf_aselect import DiTForSemanticSegmentation

    with torch.no_grad():
        if kind == "diffusers":
            name = json.loads((Path(source) / "transformer" / "config.json").read_text())["_class_name"]
            transformer = getattr(diffusers, name).from_pretrained(source, subfolder="transformer", torch_dtype=dtype)
            latents = torch.randn(1, transformer.config.in_channels, SIDE // 8, SIDE // 8, dtype=dtype)
            transformer.eval()(latents, timestep=torch.tensor([50]), class_labels=torch.tensor([1000]))
        elif kind != "nothing":
            fields = {"timestep": 50, "image_size": SIDE, "num_labels": 19, "decoder": kind}
            model = DiTForSemanticSegmentation.from_pretrained(source, dtype=dtype, **fields)
            assert model(torch.rand(1, 3, SIDE, SIDE) * 2 - 1).logits.shape == (1, 19, SIDE, SIDE)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="pipeline of a class-conditional DiT in latent space")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--kind", choices=KINDS, help="only measure this, in this process (used by itself)")
    args = parser.parse_args()
    if args.kind:
        measure(args.source, args.kind, getattr(torch, args.dtype))
        return
    peaks: dict[str, float] = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--source", args.source, "--dtype", args.dtype, "--kind", kind]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(args.repeats)]
        peaks[kind] = statistics.median(int(run.stdout.split()[-1]) for run in runs)
    held = {kind: peaks[kind] - peaks["nothing"] for kind in KINDS[1:]}
    result = {
        "gigabytes": {kind: round(value / 1e9, 3) for kind, value in held.items()},
        "times_diffusers": {kind: round(held[kind] / held["diffusers"], 3) for kind in ("linear", "upernet")},
        "dtype": args.dtype,
        "side": SIDE,
        "repeats": args.repeats,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    print(json.dumps(result, indent=1))
    if args.output:
        temporary = Path(args.output).with_suffix(".incomplete")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(args.output)


if __name__ == "__main__":
    main()
