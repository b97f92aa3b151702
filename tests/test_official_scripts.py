"""The calls of transformers' scripts for images, one after the other, on hf_aselect checkpoints.

As `run_image_classification.py`, `run_semantic_segmentation.py` and their `_no_trainer` forms make them
(github.com/huggingface/transformers, examples/pytorch, 4.56); the scripts themselves are run by
`tests/host/test_host_scripts.py`, where they were copied out of a checkout.
"""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_aselect import DiTForImageClassification, DiTForSemanticSegmentation, convert_diffusers
from hf_aselect.model.modeling_aselect import save_image_processor

SMALL_HEAD = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1}
LABELS = {"cat": "0", "dog": "1"}  # as text, both
OF_HUB = {"cache_dir": None, "revision": "main", "token": None, "trust_remote_code": False}
CLASSES = {
    # What each script says of the classes.
    "run_image_classification": {
        **{"num_labels": 2, "label2id": LABELS, "id2label": {number: name for name, number in LABELS.items()}},
        "finetuning_task": "image-classification",
    },
    "run_image_classification_no_trainer of 4.30": {
        **{"num_labels": 2, "label2id": LABELS, "i2label": {number: name for name, number in LABELS.items()}},
        "finetuning_task": "image-classification",
    },
    "run_semantic_segmentation": {"label2id": LABELS, "id2label": {0: "cat", 1: "dog"}},
    "run_semantic_segmentation_no_trainer": {"label2id": {"cat": 0, "dog": 1}, "id2label": {0: "cat", 1: "dog"}},
}


@pytest.fixture(scope="module")
def folders(pixel_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("scripts")
    for name, kind in (("classifier", DiTForImageClassification), ("segmenter", DiTForSemanticSegmentation)):
        model = kind.from_pretrained(pixel_folder, timestep=20, num_labels=2, **SMALL_HEAD)
        model.save_pretrained(root / name)
        save_image_processor(model, root / name)
    convert_diffusers(pixel_folder, root / "converted", **SMALL_HEAD)
    return root


@pytest.mark.parametrize("is_converted", [False, True])
@pytest.mark.parametrize("script", CLASSES)
def test_the_calls_of_a_script_are_taken(script, is_converted, folders, pixels, tmp_path, caplog):
    is_dense = "segmentation" in script
    folder = folders / ("converted" if is_converted else "segmenter" if is_dense else "classifier")
    auto = AutoModelForSemanticSegmentation if is_dense else AutoModelForImageClassification
    given = {} if is_dense else {"ignore_mismatched_sizes": False}
    config = AutoConfig.from_pretrained(folder, **CLASSES[script], **OF_HUB)
    model = auto.from_pretrained(folder, from_tf=False, config=config, **OF_HUB, **given)
    processor = AutoImageProcessor.from_pretrained(
        folder, **({"do_reduce_labels": False} if is_dense else {}), **OF_HUB
    )
    assert "shortest_edge" not in processor.size and (processor.size["height"], processor.size["width"]) == (8, 8)
    assert processor.image_mean == processor.image_std == 0.5
    assert model.config.num_labels == 2
    assert model.config.id2label == ({0: "cat", 1: "dog"}), "numbers, whatever the script wrote"
    told = [each.message for each in caplog.records if "`hf-aselect select" in each.message]
    assert len(told) == int(is_converted), "a timestep that is open is selected on generated images, and that is said"
    masks = torch.zeros(8, 8, dtype=torch.long)
    rows = [{"pixel_values": each, "labels": masks if is_dense else index % 2} for index, each in enumerate(pixels)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        data_collator=default_data_collator,
    )
    result = trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    assert "eval_loss" in trainer.evaluate()
    trainer.create_model_card(finetuned_from=str(folder), tasks="image-classification", tags=["vision"])
    assert auto.from_pretrained(tmp_path).config.timestep == model.config.timestep
