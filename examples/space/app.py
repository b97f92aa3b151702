"""A page that shows what a diffusion transformer sees: classes or masks, and its tokens at each noise level.

    pip install '.[demo,space]'
    python examples/space/app.py                                # the embedded DiT, without network
    python examples/space/app.py --model me/fashion-classifier  # a saved model: a folder, or an id on the Hub

The embedded DiT gets a linear head when the page starts, which takes a few seconds. `hf-aselect demo` trains a better
one (`--model hf-aselect-demo/model`). On a Space `MODEL_ID` names the model.
"""

import argparse
import atexit
import base64
import html
import io
import os
import shutil
import tempfile
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import pyarrow.parquet
import torch
from datasets import Dataset
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
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
NUM_CALIBRATION, NUM_TRAIN = 128, 4000  # images for the embedded DiT's timestep and head
MAX_PIXELS = 50_000_000  # of an upload
MAX_FILE = "50mb"
SIDE = 384  # pixels: smaller images are enlarged on the page, and those of more than twice that are reduced
# Distinguishable for the colour-blind (Okabe and Ito), and of different lightness.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
FIRST = "Select or upload an image first."
STYLE = """
img.tokens { width: 100%; max-width: 24rem; image-rendering: pixelated; border-radius: 0.5rem; }
img.overlay { width: 100%; max-width: 32rem; max-height: 32rem; object-fit: contain; border-radius: 0.5rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; list-style: none; margin: 0.5rem 0 0; padding: 0; }
.legend b { display: inline-block; min-width: 1.5rem; margin-right: 0.25rem; text-align: center; }
.wide { overflow-x: auto; }
img.curve { width: 100%; min-width: 34rem; max-width: 44rem; background: white; border-radius: 0.5rem; }
.slides { display: none; }
@media (max-width: 38rem) { .slides { display: block; margin: 0 0 0.5rem; } }
button.example { flex-wrap: nowrap; text-align: left; }
.example img { width: 2rem; height: 2rem; object-fit: contain; }
.shown img { width: 100%; height: 100%; object-fit: contain; }
.prose, .prose * { overflow-wrap: anywhere; }
.min_value, .max_value { color: var(--body-text-color) !important; }
button:focus-visible, input:focus-visible, [tabindex="0"]:focus-visible {
  outline: 3px solid var(--body-text-color) !important; outline-offset: 2px; }
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
        ValueError: If it is neither a classifier nor a segmenter, or no timestep is selected.
    """
    if source is None:
        return embedded()
    config = ASelectConfig.from_pretrained(source)
    kind = KINDS.get((config.architectures or [""])[0])
    if kind is None:
        raise ValueError(f"{source!r} is a {config.architectures}, but the page shows {' and '.join(KINDS)}.")
    model = kind.from_pretrained(source).eval()
    if model.config.timestep == "auto":
        raise ValueError(f"No timestep is selected in {source!r} yet. Use `select_timestep` first.")
    record = model.config.selection
    selection = TimestepSelection.from_dict(record) if record else None
    if selection is not None and not selection.is_of(model.config):
        selection = None  # of another timestep or tap than the one that is read
    try:
        processor = ASelectImageProcessor.from_pretrained(source)
    except OSError:  # saved without one
        processor = ASelectImageProcessor.from_model_config(model.config)
    examples = scenes() if isinstance(model, DiTForSemanticSegmentation) else of_each_class(6)
    # A Hub id as it is, of a path the end.
    name = "/".join(Path(source).resolve().parts[-2:]) if os.path.isdir(source) else source
    return Seen(model, processor, f"`{name}`", examples, selection)


def sample(split: str, num: int) -> Dataset:
    """Return some of the embedded images, of Fashion-MNIST."""
    # Not through `load_dataset`, which would tell its makers of it, and copy the sample into a cache.
    return Dataset(pyarrow.parquet.read_table(str(EMBEDDED / f"{split}.parquet"))).select(range(num))


def of_each_class(num: int) -> dict[str, Image.Image]:
    """Return the first embedded image of each of some classes, by its name."""
    rows = sample("test", 400)
    labels, names = rows["label"][:], rows.features["label"].names
    return {names[label]: rows[labels.index(label)]["image"] for label in range(num)}


def scenes() -> dict[str, Image.Image]:
    """Return pairs of the embedded images on one ground, as in the demo of segmentation, by what is on them."""
    images, made = list(of_each_class(10).items()), {}
    for (first, above), (second, below) in zip(images[::2], images[1::2], strict=True):
        ground = Image.new("L", (56, 56))
        for item, place in ((above, (2, 2)), (below, (26, 26))):
            ground.paste(item, place, item.point(lambda level: 255 * (level > 40)))
        made[f"{first}, {second}"] = ground
    return made


def embedded() -> Seen:
    """Return a classifier on the embedded DiT: the timestep selected without labels, a linear head trained."""
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
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(200):
        loss = model(features=means, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    selection = TimestepSelection.from_dict(model.config.selection)
    return Seen(model, processor, "the embedded Fashion-MNIST DiT", of_each_class(6), selection)


def opened(path: str | None) -> Image.Image | None:
    """Return the image in a file, upright; None without a file.

    Raises:
        gradio.Error: If it is none, or too large.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as file:
            if file.width * file.height <= MAX_PIXELS:
                return ImageOps.exif_transpose(file).copy()
            size = f"{file.width} × {file.height}"
    except Image.DecompressionBombError:
        size = "too many"
    except Exception as error:  # a broken file can break its decoder in any way
        raise gr.Error(
            "This file is not an image that can be read. Try a PNG or JPEG.", print_exception=False
        ) from error
    many = f"The image has {size} pixels, but at most {MAX_PIXELS // 1_000_000} million are allowed."
    raise gr.Error(many, print_exception=False)


def shown(image: Image.Image) -> Image.Image:
    """Return an image as it is put on the page: in colours, small ones enlarged without blur, large ones reduced."""
    if image.mode.startswith("I;16"):  # `convert` would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    scale = SIDE // max(image.size)
    if scale > 1:
        return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    image.thumbnail((2 * SIDE, 2 * SIDE))
    return image


def pixel_values(seen: Seen, image: Image.Image) -> Tensor:
    """Return an image as the model's `pixel_values`, (1, C, H, W).

    A segmenter's image is squeezed into them as a whole, as where it was evaluated: masks must cover all of it.

    Raises:
        gradio.Error: If the processor refuses it.
    """
    crop = {"do_center_crop": False} if isinstance(seen.model, DiTForSemanticSegmentation) else {}
    try:
        pixels: Tensor = seen.processor(image, return_tensors="pt", **crop).pixel_values
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    return pixels.to(seen.model.device)


@torch.no_grad()
def classes(seen: Seen, image: Image.Image) -> dict[str, float]:
    """Return the probability of each class by name."""
    shares = seen.model(pixel_values(seen, image)).logits[0].float().softmax(-1).tolist()
    return {seen.model.config.id2label[index]: share for index, share in enumerate(shares)}


@torch.no_grad()
def mask(seen: Seen, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return the class of each pixel of an image of that width and height, (height, width)."""
    outputs = seen.model(pixel_values(seen, image))
    (found,) = seen.processor.post_process_semantic_segmentation(outputs, target_sizes=[size[::-1]])
    return found.cpu().numpy()


def colours_of(found: list[int]) -> list[str]:
    """Return a colour for each of the classes, each its own where there are colours enough: the first choose first."""
    taken: list[str] = []
    for index in found:
        free = [colour for colour in COLOURS if colour not in taken] or list(COLOURS)
        own = COLOURS[index % len(COLOURS)]
        taken.append(own if own in free else free[0])
    return taken


def ink_on(colour: str) -> str:
    """Return black or white: what is read better on a colour."""
    red, green, blue = (part / 255 for part in ImageColor.getrgb(colour))
    return "black" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "white"


def middle(where: np.ndarray) -> tuple[int, int]:
    """Return column and row of one of the pixels that are true, as far inside as any."""
    step = max(1, max(where.shape) // 64)  # near enough, and quick
    inside = where[::step, ::step]
    if not inside.any():
        step, inside = 1, where
    smaller = inside
    while smaller.any():
        inside, padded = smaller, np.pad(smaller, 1)
        smaller = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    places = np.argwhere(inside)
    row, column = places[len(places) // 2].tolist()
    return step * column, step * row


def overlay(seen: Seen, image: Image.Image) -> str:
    """Return an image with its classes, in colours and numbered, as an element of the page."""
    ground = shown(image)
    found = mask(seen, image, ground.size)
    indices, counts = np.unique(found, return_counts=True)
    order = [int(index) for index in indices[np.argsort(-counts, kind="stable")]]
    colours = colours_of(order)
    tint = np.zeros((*found.shape, 3))
    for index, colour in zip(order, colours, strict=True):
        tint[found == index] = ImageColor.getrgb(colour)
    # Over grey, so that the image's own colours are not taken for classes.
    drawn = Image.fromarray((0.3 * np.asarray(ground.convert("L"))[..., None] + 0.7 * tint).astype(np.uint8))
    size = max(12, max(drawn.size) // 20)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(size)
    items, said = [], []
    for number, (index, colour) in enumerate(zip(order, colours, strict=True), 1):
        where = found == index
        place = [max(size, min(at, side - size)) for at, side in zip(middle(where), drawn.size, strict=True)]
        pen.text(place, str(number), "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
        said.append(f"{seen.model.config.id2label[index]}, {where.mean():.1%}")
        style = f"background: {colour}; color: {ink_on(colour)}"
        items.append(f'<li><b style="{style}">{number}</b>{html.escape(said[-1])}</li>')
    drawing = img(drawn, "Classes in the image: " + "; ".join(said), "overlay")
    return f'{drawing}<ol class="legend">{"".join(items)}</ol>'


@torch.no_grad()
def principal_colours(seen: Seen, pixels: Tensor, timestep: int) -> np.ndarray:
    """Return the first three principal components of an image's tokens at a timestep as colours, (rows, columns, 3).

    Components have no sign and no order of their own: they are turned to be like those at the selected timestep
    (orthogonal Procrustes), so that what moves with the slider is what the tokens hold.
    """

    def components(tokens: Tensor) -> Tensor:
        left, values, _ = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
        scores = left[:, :3] * values[:3]
        return scores / scores.std(0).clamp_min(1e-6)

    config = seen.model.config
    tap = block, feature = config.taps()[0]  # the first, of a model that reads several
    (own,) = seen.model.extract_maps(pixels, [tap])[tap].float().cpu()
    scores = reference = components(own.flatten(1).T)
    if timestep != config.timestep:
        found = seen.model.extract_features(pixels, timestep=timestep, block=block, feature=feature)
        scores = components(found[0].float().cpu())
        left, _, right = torch.linalg.svd(scores.T @ reference)
        scores = scores @ (left @ right)
    low, high = torch.quantile(scores, 0.02, 0), torch.quantile(scores, 0.98, 0)
    colours = ((scores - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return (255 * colours).round().byte().unflatten(0, own.shape[1:]).numpy()


def img(image: Image.Image, alt: str, kind: str) -> str:
    """Return an image as an element of the page that says what it shows."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def tokens_at(seen: Seen, path: str | None, timestep: float) -> tuple[str, str]:
    """Return the image of the tokens, and what is seen on it."""
    image = opened(path)
    if image is None:
        return "", FIRST
    timestep = int(timestep)
    colours = Image.fromarray(principal_colours(seen, pixel_values(seen, image), timestep))
    scale = max(1, 384 // max(colours.size))
    large = colours.resize((scale * colours.width, scale * colours.height), Image.Resampling.NEAREST)
    level = float(seen.model.noise_schedule.log_snr(torch.tensor([timestep]))[0])
    own = ", the selected timestep" if timestep == seen.model.config.timestep else ""
    said = f"**t = {timestep}**{own}. Its log-SNR is {level:.1f}, and higher means less noise."
    return img(large, f"Tokens at timestep {timestep}: similar tokens have similar colours", "tokens"), said


def curve(seen: Seen) -> str:
    """Return the curve of the timestep's choice as an element of the page."""
    config = seen.model.config
    if seen.selection is None:
        return f"<p>The model is read at t = {config.timestep}. How it was selected is not recorded.</p>"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.png"
        seen.selection.plot(path)
        with Image.open(path) as image:
            alt = (
                f"{seen.selection.criterion} over the timestep from 0 (least noise) to 999 (pure noise), highest at "
                f"t = {config.timestep}, the selected timestep"
            )
            # On a phone it is wider than the page, and slides by finger or arrow keys.
            words = 'tabindex="0" role="region" aria-label="The curve of the selection"'
            slides = '<p class="slides">Slide the curve sideways to see all of it.</p>'
            return f'{slides}<div class="wide" {words}>{img(image, alt, "curve")}</div>'


def certainty(seen: Seen) -> str:
    """Return how sure the choice is, in words."""
    if seen.selection is None:
        return ""
    warnings = "".join(f"\n- {warning}" for warning in seen.selection.warnings)
    return (
        f"Selected by the *{seen.selection.criterion}* score from {seen.selection.num_images} images"
        f"{'' if seen.selection.criterion in ('probe', 'patch_probe') else ', without labels'}. "
        f"{seen.selection.confidence:.0%} of the bootstrap resamples of these images select it or a timestep close to "
        f"it.{warnings}"
    )


def build(seen: Seen) -> gr.Blocks:
    """Return the page of a model."""
    config = seen.model.config
    is_segmenter = isinstance(seen.model, DiTForSemanticSegmentation)
    folder = Path(tempfile.mkdtemp(prefix="hf-aselect-space-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = {}
    for number, (name, example) in enumerate(seen.examples.items()):
        paths[name] = str(folder / f"example-{number + 1}.png")
        example.save(paths[name])

    def show(path: str | None, at: float) -> tuple[Any, ...]:
        """Return what is shown of an image: itself, its classes or mask, its tokens, and the text about them."""
        image = opened(path)
        if image is None:
            return path, None, "" if is_segmenter else None, "", FIRST
        found = overlay(seen, image) if is_segmenter else classes(seen, image)
        return path, shown(image), found, *tokens_at(seen, path, at)

    with gr.Blocks(title="What a diffusion transformer sees", analytics_enabled=False) as page:
        gr.Markdown(
            "# What a diffusion transformer sees\n\nA DiT is trained to generate images. At the right noise level, "
            f"the *timestep*, its tokens also describe what an image shows. Shown here: {seen.name}."
        )
        selected = gr.State()
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image",
                    interactive=False,
                    height=320,
                    elem_classes="shown",
                    alt_text="The selected image",
                    buttons=[],
                )
                upload = gr.UploadButton("Upload an image", file_types=["image"], size="md")
                gr.Markdown("Or one of these:")
                with gr.Row():
                    # Buttons with a name, which thumbnails alone have not for who does not see them.
                    buttons = {
                        name: gr.Button(name, icon=path, size="sm", min_width=140, elem_classes="example")
                        for name, path in paths.items()
                    }
            with gr.Column():
                if is_segmenter:
                    gr.Markdown("### Classes in the image")
                    found: Any = gr.HTML(f"<p>{FIRST}</p>")
                else:
                    found = gr.Label(label="Predicted classes", num_top_classes=min(5, config.num_labels))
        cropped = "" if is_segmenter else " An image of another shape than the model's input is cropped to its centre."
        gr.Markdown(
            f"## Tokens{'' if config.folded else ' at each noise level'}\n\nEach square is the token of one patch of "
            "the image. Red, green and blue are its first three principal components, so similar tokens have similar "
            f"colours.{cropped}"
        )
        if config.folded:
            gr.Markdown(f"This model is folded at t = {config.timestep}, so other timesteps cannot be shown.")
        with gr.Row():
            with gr.Column():
                label = "Timestep: 0 is least noise, 999 is pure noise"
                start = config.resolved_timestep()
                at = gr.Slider(0, 999, start, step=1, label=label, visible=not config.folded)
                said = gr.Markdown(FIRST)
            with gr.Column():
                tokens = gr.HTML()
        parts = [selected, image, found, tokens, said]
        upload.upload(show, [upload, at], parts, api_name="show")
        for name, button in buttons.items():
            button.click(partial(show, paths[name]), at, parts, api_visibility="private")
        at.change(
            partial(tokens_at, seen),
            [selected, at],
            [tokens, said],
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )
        gr.Markdown(f"## Why t = {config.timestep}\n\n{certainty(seen)}")
        gr.HTML(curve(seen))
        gr.Markdown("Made with hf_aselect. The example images are Fashion-MNIST's (MIT, © 2017 Zalando SE).")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL_ID") or None,
        help="hf_aselect classifier or segmenter: folder or Hub id (default: $MODEL_ID, else the embedded DiT)",
    )
    parser.add_argument("--host", help="address to listen on (default: localhost only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    args = parser.parse_args()
    try:
        page = build(load(args.model))
    except (OSError, ValueError) as error:
        raise SystemExit(f"app.py: error: {error}") from error
    # Letters of the system: there is nothing to fetch, from here or elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(
        server_name=args.host,
        server_port=args.port,
        theme=theme,
        css=STYLE,
        footer_links=[],
        max_file_size=MAX_FILE,
    )


if __name__ == "__main__":
    main()
