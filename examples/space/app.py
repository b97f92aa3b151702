"""A page on which a diffusion transformer tells what it sees: classes or masks, and its tokens over the noise.

    pip install '.[train,space]'
    python examples/space/app.py                                # the embedded DiT, without network
    python examples/space/app.py --model me/fashion-classifier  # a saved model: a folder, or an id on the Hub

The embedded DiT gets a linear head when the page starts, which takes some seconds; `hf-aselect demo` trains a better
one (`--model hf-aselect-demo/model`). On a Space `MODEL_ID` names the model.
"""

import argparse
import base64
import io
import os
import tempfile
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    TimestepSelection,
)

KINDS = {kind.__name__: kind for kind in (DiTForImageClassification, DiTForSemanticSegmentation)}
EMBEDDED = files("hf_aselect") / "assets" / "fashion_mnist"
NUM_CALIBRATION, NUM_TRAIN = 128, 4000  # pictures that the embedded DiT's timestep and head are made of
MAX_PIXELS = 50_000_000  # of an upload
# Told apart by the colour-blind (Okabe and Ito), and of different lightness.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
STYLE = """
img.tokens { width: 100%; max-width: 24rem; image-rendering: pixelated; border-radius: 0.5rem; }
.wide { overflow-x: auto; }
img.curve { width: 100%; min-width: 34rem; max-width: 44rem; background: white; border-radius: 0.5rem; }
.example img { width: 2rem; height: 2rem; object-fit: contain; }
.picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.prose, .prose * { overflow-wrap: anywhere; }
"""


class Seen(NamedTuple):
    """A model with what the page shows of it."""

    model: Any
    processor: ASelectImageProcessor
    name: str
    examples: dict[str, Image.Image]  # by what they show
    selection: TimestepSelection | None


def load(source: str | None) -> Seen:
    """Return a saved model, or the embedded DiT with a head that is trained now.

    Raises:
        ValueError: If it is neither a classifier nor a segmenter, or no timestep is chosen.
    """
    if source is None:
        return embedded()
    config = ASelectConfig.from_pretrained(source)
    kind = KINDS.get((config.architectures or [""])[0])
    if kind is None:
        raise ValueError(f"{source!r} holds {config.architectures}; the page shows {' and '.join(KINDS)}.")
    model = kind.from_pretrained(source).eval()
    if model.config.timestep == "auto":
        raise ValueError(f"No timestep is chosen in {source!r} yet: see `select_timestep`.")
    record = model.config.selection
    selection = TimestepSelection.from_dict(record) if record else None
    if selection is not None and not selection.is_of(model.config):
        selection = None  # of another timestep or tap than the one that is read
    processor = ASelectImageProcessor.from_model_config(model.config)
    examples = scenes() if isinstance(model, DiTForSemanticSegmentation) else of_each_class(6)
    return Seen(model, processor, Path(source).name, examples, selection)


def sample(split: str, num: int) -> Dataset:
    """Return some of the embedded pictures, of Fashion-MNIST."""
    rows = load_dataset("parquet", data_files=str(EMBEDDED / f"{split}.parquet"), split="train")
    return rows.select(range(num))


def of_each_class(num: int) -> dict[str, Image.Image]:
    """Return the first embedded picture of each of some classes, by its name."""
    rows = sample("test", 400)
    labels, names = rows["label"][:], rows.features["label"].names
    return {names[label]: rows[labels.index(label)]["image"] for label in range(num)}


def scenes() -> dict[str, Image.Image]:
    """Return pairs of the embedded pictures on one ground, as in the demo of segmentation, by what is on them."""
    pictures, made = list(of_each_class(10).items()), {}
    for (first, above), (second, below) in zip(pictures[::2], pictures[1::2], strict=True):
        ground = Image.new("L", (56, 56))
        for item, place in ((above, (2, 2)), (below, (26, 26))):
            ground.paste(item, place, item.point(lambda level: 255 * (level > 40)))
        made[f"{first}, {second}"] = ground
    return made


def embedded() -> Seen:
    """Return a classifier on the embedded DiT: the timestep chosen without labels, a linear head trained."""
    train = sample("train", NUM_TRAIN)
    names = train.features["label"].names
    torch.manual_seed(0)
    model = DiTForImageClassification.from_pretrained(
        EMBEDDED,
        timestep="auto",
        calibration_images=train["image"][:NUM_CALIBRATION],
        head="linear",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    ).eval()
    processor = ASelectImageProcessor.from_model_config(model.config)
    pixels = processor(train["image"][:], return_tensors="pt").pixel_values
    with torch.no_grad():
        means = torch.cat([model.extract_features(batch).mean(1) for batch in pixels.split(250)])
    labels = torch.tensor(train["label"][:])
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(200):
        loss = model(features=means, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    selection = TimestepSelection.from_dict(model.config.selection)
    return Seen(model, processor, "the embedded Fashion-MNIST DiT", of_each_class(6), selection)


def opened(path: str | None) -> Image.Image | None:
    """Return the picture in a file, upright; None without a file.

    Raises:
        gradio.Error: If it is none, or too large.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise gr.Error(f"The picture has {file.width} × {file.height} pixels; 50 million are enough.")
            return ImageOps.exif_transpose(file).copy()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise gr.Error("This file is no picture that can be read. Try a PNG or JPEG.") from error


def pixel_values(seen: Seen, picture: Image.Image) -> Tensor:
    """Return a picture as the model's `pixel_values`, (1, C, H, W).

    Raises:
        gradio.Error: If the processor refuses it.
    """
    try:
        pixels: Tensor = seen.processor(picture, return_tensors="pt").pixel_values
    except ValueError as error:
        raise gr.Error(str(error)) from error
    return pixels.to(seen.model.device)


@torch.no_grad()
def classes(seen: Seen, picture: Image.Image) -> dict[str, float]:
    """Return the probability of each class by name."""
    shares = seen.model(pixel_values(seen, picture)).logits[0].float().softmax(-1).tolist()
    return {seen.model.config.id2label[index]: share for index, share in enumerate(shares)}


@torch.no_grad()
def masks(seen: Seen, picture: Image.Image) -> tuple[Image.Image, list[tuple[np.ndarray, str]]]:
    """Return a picture, enlarged, and for each class that is in it where it is."""
    scale = max(1, 384 // max(picture.size))
    shown = picture.convert("RGB").resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    outputs = seen.model(pixel_values(seen, picture))
    size = (shown.height, shown.width)
    (found,) = seen.processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    found = found.cpu().numpy()
    return shown, [((found == index) * 1.0, seen.model.config.id2label[index]) for index in np.unique(found).tolist()]


@torch.no_grad()
def principal_colours(seen: Seen, pixels: Tensor, timestep: int) -> np.ndarray:
    """Return the first three principal components of a picture's tokens at a timestep as colours, (rows, columns, 3).

    Components have no sign and no order of their own: they are turned to be like those at the chosen timestep
    (orthogonal Procrustes), so that what moves with the slider is what the tokens hold.
    """
    tap = (seen.model.config.block_index(), seen.model.config.feature)
    rows, columns = seen.model.extract_maps(pixels, [tap])[tap].shape[-2:]

    def components(at: int) -> Tensor:
        tokens = seen.model.extract_features(pixels, timestep=at)[0].float().cpu()
        left, values, _ = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
        scores = left[:, :3] * values[:3]
        return scores / scores.std(0).clamp_min(1e-6)

    reference = components(seen.model.config.timestep)
    scores = components(timestep)
    left, _, right = torch.linalg.svd(scores.T @ reference)
    scores = scores @ (left @ right)
    low, high = torch.quantile(scores, 0.02, 0), torch.quantile(scores, 0.98, 0)
    colours = ((scores - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return (255 * colours).round().byte().unflatten(0, (rows, columns)).numpy()


def img(picture: Image.Image, alt: str, kind: str) -> str:
    """Return a picture as an element of the page that says what it shows."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return (
        f'<img class="{kind}" alt="{alt}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def tokens_at(seen: Seen, path: str | None, timestep: float) -> tuple[str, str]:
    """Return the picture of the tokens, and what is seen on it."""
    picture = opened(path)
    if picture is None:
        return "", "Pick or upload a picture first."
    timestep = int(timestep)
    colours = Image.fromarray(principal_colours(seen, pixel_values(seen, picture), timestep))
    scale = max(1, 384 // max(colours.size))
    large = colours.resize((scale * colours.width, scale * colours.height), Image.Resampling.NEAREST)
    level = float(seen.model.noise_schedule.log_snr(torch.tensor([timestep]))[0])
    is_own = timestep == seen.model.config.timestep
    said = f"**t = {timestep}**{', the chosen one' if is_own else ''}; log-SNR {level:.1f}"
    return img(large, f"Tokens at timestep {timestep}: tokens of like colours are alike", "tokens"), said


def curve(seen: Seen) -> str:
    """Return the curve of the timestep's choice as an element of the page."""
    config = seen.model.config
    if seen.selection is None:
        return f"<p>The model is read at t = {config.timestep}; how it was chosen is not recorded.</p>"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.png"
        seen.selection.plot(path)
        with Image.open(path) as picture:
            alt = (
                f"{seen.selection.criterion} over the timestep from 0, no noise, to 999, noise alone; highest at "
                f"t = {config.timestep}, the chosen one"
            )
            return f'<div class="wide" tabindex="0">{img(picture, alt, "curve")}</div>'


def certainty(seen: Seen) -> str:
    """Return how sure the choice is, in words."""
    if seen.selection is None:
        return ""
    warnings = "".join(f"\n- {warning}" for warning in seen.selection.warnings)
    return (
        f"Chosen by *{seen.selection.criterion}* from {seen.selection.num_images} pictures"
        f"{'' if seen.selection.criterion in ('probe', 'patch_probe') else ', without labels'}; "
        f"{seen.selection.confidence:.0%} of resamples of them agree.{warnings}"
    )


def build(seen: Seen) -> gr.Blocks:
    """Return the page of a model."""
    config = seen.model.config
    is_segmenter = isinstance(seen.model, DiTForSemanticSegmentation)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in config.id2label.items()}
    folder = Path(tempfile.mkdtemp(prefix="hf-aselect-space-"))
    paths = {}
    for number, (name, example) in enumerate(seen.examples.items()):
        paths[name] = str(folder / f"example-{number + 1}.png")
        example.save(paths[name])

    def show(path: str | None, at: float) -> tuple[Any, ...]:
        """Return all that is shown of a picture: itself, its classes or masks, its tokens and what is said of them."""
        picture = opened(path)
        if picture is None:
            return path, None, None, "", ""
        found = masks(seen, picture) if is_segmenter else classes(seen, picture)
        return path, picture.convert("RGB"), found, *(("", "") if config.folded else tokens_at(seen, path, at))

    with gr.Blocks(title="What a diffusion transformer sees", analytics_enabled=False) as page:
        gr.Markdown(
            "# What a diffusion transformer sees\n\nA DiT learned to generate pictures. Its tokens at the right noise "
            f"level, the *timestep*, also tell what is in one. Shown here: {seen.name}."
        )
        chosen = gr.State()
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture",
                    interactive=False,
                    height=320,
                    elem_classes="picture",
                    alt_text="The picture that is looked at",
                    buttons=[],
                )
                upload = gr.UploadButton("Upload a picture", file_types=["image"], size="sm")
                gr.Markdown("Or one of these:")
                with gr.Row():
                    # Buttons with a name, which thumbnails alone have not for who does not see them.
                    buttons = {
                        name: gr.Button(name, icon=path, size="sm", min_width=140, elem_classes="example")
                        for name, path in paths.items()
                    }
            with gr.Column():
                if is_segmenter:
                    found: Any = gr.AnnotatedImage(label="What is where", color_map=colours, height=384, buttons=[])
                else:
                    found = gr.Label(label="What it is", num_top_classes=min(5, config.num_labels))
        gr.Markdown("## Its tokens, at any noise\n\nEach square is a token; tokens of like colours are alike.")
        if config.folded:
            gr.Markdown(
                f"This model is folded: it reads at t = {config.timestep} alone, so there is nothing to slide."
            )
        with gr.Row(visible=not config.folded):
            with gr.Column():
                at = gr.Slider(0, 999, config.timestep, step=1, label="Timestep: 0 is no noise, 999 noise alone")
                said = gr.Markdown("Pick or upload a picture first.")
            with gr.Column():
                tokens = gr.HTML()
        parts = [chosen, picture, found, tokens, said]
        upload.upload(show, [upload, at], parts, api_name="show")
        for name, button in buttons.items():
            button.click(partial(show, paths[name]), at, parts, api_name=False)
        at.change(
            partial(tokens_at, seen),
            [chosen, at],
            [tokens, said],
            api_name=False,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        gr.Markdown(f"## Why t = {config.timestep}\n\n{certainty(seen)}")
        gr.HTML(curve(seen))
        gr.Markdown("Made with hf_aselect. The example pictures are Fashion-MNIST's (MIT, © 2017 Zalando SE).")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL_ID"),
        help="a classifier or segmenter of ours: folder, or id on the Hub (default: $MODEL_ID, or the embedded DiT)",
    )
    parser.add_argument("--host", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    args = parser.parse_args()
    try:
        page = build(load(args.model))
    except (OSError, ValueError) as error:
        raise SystemExit(f"app.py: error: {error}") from error
    # Letters of the system: the default theme fetches its own from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(server_name=args.host, server_port=args.port, theme=theme, css=STYLE, footer_links=[])


if __name__ == "__main__":
    main()
