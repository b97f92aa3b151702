"""Training on a stream: parquet files and WebDataset shards, read as they come."""

import io
import json
import re
import shutil
import sys
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import example
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage

from hf_aselect import ASelectImageProcessor, DiTForImageClassification

pytestmark = pytest.mark.process

# Five seconds after each stream's end, lest its threads outlive the process.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
TRAIN = example("image_classification/train_image_classification.py")
NUM_PICTURES = 48


@pytest.fixture(scope="module")
def rows():
    """Colour images of 10 × 12 in two classes, dark and bright."""
    generator = np.random.default_rng(0)
    labels = np.arange(NUM_PICTURES) % 2
    values = generator.integers(0, 100, (NUM_PICTURES, 10, 12, 3)) + 150 * labels[:, None, None, None]
    return [PILImage.fromarray(value.astype(np.uint8)) for value in values], labels.tolist()


@pytest.fixture(scope="module")
def parquet(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "train.parquet"
    features = Features(image=Image(), label=ClassLabel(names=["dark", "bright"]))
    Dataset.from_dict({"image": rows[0], "label": rows[1]}, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def shards(rows, tmp_path_factory):
    """The same in three tar files, as WebDataset has it: one file an image and one a label, of the same name."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for index in range(shard, NUM_PICTURES, 3):
                content = io.BytesIO()
                rows[0][index].save(content, "png")
                for suffix, data in (("png", content.getvalue()), ("cls", str(rows[1][index]).encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder / "*.tar"


@pytest.fixture
def train(monkeypatch, pixel_folder, tmp_path):
    def run(*words):
        given = [
            "--model_name_or_path",
            str(pixel_folder),
            "--output_dir",
            str(tmp_path / "out"),
            "--streaming",
            "True",
        ]
        given += ["--head_hidden_size", "16", "--head_num_attention_heads", "2", "--learning_rate", "1e-2"]
        given += ["--report_to", "none", "--use_cpu", "True", "--disable_tqdm", "True", *words]
        monkeypatch.setattr(sys, "argv", ["train_image_classification.py", *given])
        TRAIN.main()
        return json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_accuracy"]

    return run


# The transformer's weights are random: a selection of its timestep could be any, and pure noise tells nothing.
LONG = ["--max_steps", "24", "--crop_share", "0.9", "--timestep", "5"]


def test_a_stream_of_parquet_files_is_learnt(train, parquet, tmp_path):
    assert train("--train_file", str(parquet), "--validation_file", str(parquet), *LONG) >= 0.9
    model = DiTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "bright"}
    with PILImage.open(tmp_path / "out" / "confusion_matrix.png") as picture:
        assert picture.format == "PNG"


def test_a_stream_goes_on_to_the_weights_of_one_that_was_not_interrupted(train, parquet, tmp_path):
    words = ["--train_file", str(parquet), "--validation_file", str(parquet), "--crop_share", "0.9", "--timestep", "5"]
    words += ["--max_steps", "5", "--save_steps", "3", "--resample_noise_in_training", "True"]
    train(*words)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    train(*words, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    # And a checkpoint that was written without the script's callback is no obstacle.
    path = tmp_path / "out" / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["EpochCallback"]
    path.write_text(json.dumps(state))
    train(*words, "--resume_from_checkpoint", "latest", "--max_steps", "6")
    assert (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").exists()


def test_a_timestep_is_chosen_from_the_first_pictures_of_a_stream(train, parquet, tmp_path):
    words = ["--train_file", str(parquet), "--validation_file", str(parquet), "--num_calibration_images", "8"]
    train(*words, "--max_steps", "2")
    config = DiTForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.selection["num_images"] == 8
    assert config.selection["timestep"] == config.timestep


def test_the_recipe_that_splits_says_what_a_stream_needs(train, parquet):
    words = ["--train_file", str(parquet), "--validation_file", str(parquet), "--recipe", "attention_probe"]
    words += ["--max_steps", "4", "--timestep", "5", "--eval_strategy", "steps", "--save_strategy", "steps"]
    with pytest.raises(ValueError, match=r"pass `(--held_out_share 0 --load_best_model_at_end False)`") as found:
        train(*words)
    advice = re.search("`(.*?)`", str(found.value))[1].split()
    assert 0 <= train(*words, *advice) <= 1


def test_shards_of_webdataset_are_learnt(train, shards, tmp_path):
    words = ["--train_file", str(shards), "--validation_file", str(shards), "--image_column", "png"]
    words += ["--label_column", "cls", "--class_names", "dark,bright", *LONG]
    assert train(*words) >= 0.9
    assert DiTForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "dark", 1: "bright"}


def test_a_stream_that_does_not_name_its_classes_is_refused(train, shards):
    words = ["--train_file", str(shards), "--validation_file", str(shards), "--image_column", "png"]
    with pytest.raises(ValueError, match="does not name the classes of 'cls': pass --class_names"):
        train(*words, "--label_column", "cls", "--max_steps", "2")


def test_streams_that_name_their_classes_in_another_order_are_refused(train, parquet, rows, tmp_path):
    features = Features(image=Image(), label=ClassLabel(names=["bright", "dark"]))
    other = tmp_path / "other.parquet"
    Dataset.from_dict({"image": rows[0], "label": rows[1]}, features=features).to_parquet(other)
    with pytest.raises(ValueError, match=r"The streams have different class names, \['dark', 'bright'\] and"):
        train("--train_file", str(parquet), "--validation_file", str(other))


def test_a_stream_without_a_validation_split_is_refused(train, parquet):
    with pytest.raises(ValueError, match="pass --validation_file"):
        train("--train_file", str(parquet), "--max_steps", "2")


def test_a_stream_that_is_read_again_is_cropped_as_before_and_anew_in_the_next_epoch(parquet):
    args = SimpleNamespace(image_column="image", label_column="label", crop_share=0.5)

    rows = load_dataset("parquet", data_files=str(parquet), split="train", streaming=True)
    stream = TRAIN.as_pixels(rows, ASelectImageProcessor(size=8), args, seed=0)
    next(iter(stream))  # looked at before, as a selection of the timestep does

    def crops(num_workers, epoch=0):
        stream.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(stream, batch_size=4, num_workers=num_workers)
        return torch.cat([batch["pixel_values"] for batch in loader])

    for num_workers in (0, 1):
        assert torch.equal(crops(num_workers), crops(num_workers))
    ordered = [crops(0, epoch).flatten(1).sort(dim=0).values for epoch in (0, 1)]
    assert not torch.equal(*ordered)
