"""The demo's attention head: trained on augmented images, for minutes, where the closed form takes seconds."""

from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, default_data_collator

from ..model.image_processing_aselect import ASelectImageProcessor
from ..model.modeling_classification import DiTForImageClassification
from ..training.metrics import compute_accuracy
from .sample import EMBEDDED, classes_of
from .training import demo_arguments

# Images in one forward pass without gradients: small batches stay in a CPU's cache.
BATCH_SIZE = 50


def load_attention_model(train: Dataset, num_calibration: int) -> DiTForImageClassification:
    """Return a classifier with an attention head on the embedded DiT, its timestep selected from training images."""
    return DiTForImageClassification.from_pretrained(
        EMBEDDED,
        timestep="auto",
        calibration_images=train["image"][:num_calibration],
        head="attention",
        head_hidden_size=256,
        head_num_layers=1,
        head_num_attention_heads=64,  # many narrow ones: each looks at few of the 49 tokens
        head_mlp_ratio=1,
        **classes_of(train),
    )


def augmented(pixels: Tensor, shift: int = 1) -> Tensor:
    """Return images, (n, C, H, W), mirrored or not and shifted by up to `shift` pixels each way, at random."""
    mirrored = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
    padded = torch.nn.functional.pad(mirrored, [shift] * 4, mode="replicate")
    height, width = pixels.shape[-2:]
    corners = torch.randint(2 * shift + 1, (len(pixels), 2)).tolist()
    return torch.stack(
        [view[:, top : top + height, left : left + width] for view, (top, left) in zip(padded, corners, strict=True)]
    )


@torch.no_grad()
def training_rows(
    model: DiTForImageClassification, pixels: Tensor, labels: Tensor, num_views: int
) -> list[dict[str, Tensor]]:
    """Return rows of tokens and labels: of the images as they are, and of `num_views - 1` augmented copies.

    The frozen backbone sees each view once, instead of once in each epoch.
    """
    model.eval()
    rows = []
    for view in tqdm(range(num_views), desc="Reading tokens of the views"):
        shown = pixels if view == 0 else augmented(pixels)
        # Half precision: the tokens of all views take some 800 MB.
        tokens = torch.cat([model.extract_features(batch).half() for batch in shown.split(BATCH_SIZE)])
        rows += [{"features": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]
    return rows


def train_attention_head(
    model: DiTForImageClassification,
    pixels: dict[str, Tensor],
    labels: dict[str, Tensor],
    output: Path,
    *,
    num_views: int,
    num_epochs: int,
    seed: int,
) -> float:
    """Train the classifier's head with the plain Trainer, save the model, and return its test accuracy in [0, 1]."""
    test_rows = [{"pixel_values": p, "labels": y} for p, y in zip(pixels["test"], labels["test"], strict=True)]
    arguments = demo_arguments(
        output,
        num_train_epochs=num_epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        warmup_steps=50,
        # 4,000 images: with less, the head learns them by heart.
        weight_decay=2.0,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(model, pixels["train"], labels["train"], num_views),
        eval_dataset=test_rows,
        data_collator=default_data_collator,
        processing_class=ASelectImageProcessor.from_model_config(model.config),
        compute_metrics=compute_accuracy,
    )
    trainer.train()
    trainer.save_model()
    accuracy: float = trainer.evaluate()["eval_accuracy"]
    return accuracy
