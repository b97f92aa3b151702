"""How the demos train: with the plain Trainer, on the CPU."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def demo_arguments(output: Path, **options: Any) -> TrainingArguments:
    """Return the arguments of a demo's training: those that all demos share, and `options`."""
    return TrainingArguments(
        output_dir=str(output),
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        # What is compared with the reloaded model bit by bit must be computed on the same device.
        use_cpu=True,
        disable_tqdm=False,
        **options,
    )
