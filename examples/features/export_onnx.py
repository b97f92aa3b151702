r"""Write a classifier or segmenter as ONNX, with a free batch, and compare it with torch.

    python examples/features/export_onnx.py --model_name_or_path fashion-classifier --output fashion-classifier.onnx

What is exported takes `pixel_values`, (B, C, H, W) in [-1, 1], as `ASelectImageProcessor` makes them, of the size
that the model was saved with, and gives `logits`. It needs the `export` extra. The file appears only if onnxruntime's
logits are within `--tolerance` of torch's, for three batch sizes; weights of more than 1.5 GB are a second file, of
the same name and `.data`. A model that is not folded yet is folded first.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from transformers import AutoConfig, HfArgumentParser

from hf_aselect import DiTForImageClassification, DiTForSemanticSegmentation

KINDS = {kind.__name__: kind for kind in (DiTForImageClassification, DiTForSemanticSegmentation)}


@dataclass
class ExportArguments:
    """What to export, and where to."""

    model_name_or_path: str = field(metadata={"help": "A trained hf_aselect model: folder or Hub id."})
    output: str = field(metadata={"help": "File to write."})
    tolerance: float = field(default=1e-4, metadata={"help": "Maximum difference of a logit from torch's."})


def main() -> None:
    (args,) = HfArgumentParser(ExportArguments).parse_args_into_dataclasses()
    name = (AutoConfig.from_pretrained(args.model_name_or_path).architectures or ["none"])[0]
    if name not in KINDS:
        raise ValueError(f"Only {' and '.join(KINDS)} have logits, but {args.model_name_or_path!r} is a {name}.")
    model = KINDS[name].from_pretrained(args.model_name_or_path, dtype=torch.float32)
    if not model.config.folded:
        model = model.fold()
    height, width = model.config.image_height_width
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(7, model.config.num_channels, height, width, generator=generator) * 2 - 1
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent) as folder:
        # By its own name: weights of more than 1.5 GB are a file beside it, which the first one names.
        temporary = Path(folder) / output.name
        with torch.no_grad():
            expected = model(pixel_values=pixel_values).logits
            torch.onnx.export(
                model,
                (),
                temporary,
                kwargs={"pixel_values": pixel_values},
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                input_names=["pixel_values"],
                output_names=["logits"],
                external_data=False,
                dynamo=True,
            )
        session = onnxruntime.InferenceSession(temporary)
        difference = 0.0
        for size in (1, 3, 7):
            (logits,) = session.run(["logits"], {"pixel_values": pixel_values[:size].numpy()})
            difference = max(difference, float((torch.from_numpy(logits) - expected[:size]).abs().max()))
        if not difference <= args.tolerance:
            raise ValueError(f"onnxruntime's logits differ from torch's by {difference:.1e}.")
        del session  # it may hold the files
        written = sorted(Path(folder).iterdir(), key=lambda path: path == temporary)  # what names the other comes last
        size = sum(path.stat().st_size for path in written)
        for path in written:
            os.replace(path, output.with_name(path.name))
    print(f"Saved {output}: {size / 1e6:.1f} MB; logits within {difference:.1e} of torch's.")


if __name__ == "__main__":
    main()
