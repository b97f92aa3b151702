"""The splits of a training script, and the configuration that it begins or resumes with."""

import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from hf_aselect import ASelectConfig
from hf_aselect.training.config_arguments import (
    ConfigArguments,
    given_fields,
    int_or_word,
    needs_images,
    needs_timestep,
    resumed_fields,
    write_config,
)
from hf_aselect.training.splits import read_splits, train_and_validation, with_classes_of


def rows(labels, names=None):
    split = Dataset.from_dict({"value": list(range(len(labels))), "label": labels})
    return split.cast_column("label", ClassLabel(names=names)) if names else split


@pytest.fixture
def files(tmp_path):
    """Parquet files whose classes are in another order."""
    rows([0, 1, 0], ["cat", "dog"]).to_parquet(tmp_path / "train.parquet")
    rows([0, 1], ["dog", "cat"]).to_parquet(tmp_path / "validation.parquet")
    return {f"{name}_file": str(tmp_path / f"{name}.parquet") for name in ("train", "validation")}


def test_files_keep_their_own_classes_until_they_are_matched(files):
    splits = read_splits(**files, columns=["value", "label"])
    assert splits["validation"].features["label"].names == ["dog", "cat"]
    train, validation = train_and_validation(splits, 0, "label")
    assert (train["label"][:], validation["label"][:]) == ([0, 1, 0], [1, 0])


@pytest.mark.parametrize("counts", [(4, 4), (2, 2), (3, 3, 30), (12, 2)])
def test_of_few_images_as_many_as_classes_are_held_out(counts):
    """A tenth of a folder of eight images was met: `datasets` rejects a part smaller than the number of classes."""
    labels = [name for name, count in enumerate(counts) for _ in range(count)]
    train, validation = train_and_validation(DatasetDict(train=rows(list(map(str, labels)))), 0, "label")
    assert len(train) + len(validation) == len(labels) and set(train["label"][:]) == set(range(len(counts)))
    assert len(validation) == max(-(-len(labels) // 10), len(counts))


def test_a_class_of_one_image_says_what_to_pass():
    """A sibling: then no split has all classes."""
    with pytest.raises(ValueError, match=r"class 'b' there is one image.*Pass a validation split"):
        train_and_validation(DatasetDict(train=rows(["a"] * 5 + ["b"])), 0, "label")


@pytest.mark.parametrize("sources", [{}, {"dataset_name": "a", "train_dir": "b"}])
def test_there_must_be_one_source(sources):
    with pytest.raises(ValueError, match="Pass exactly one of --dataset_name, --train_dir and --train_file"):
        read_splits(**sources)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_missing_is_named(files, streaming):
    with pytest.raises(ValueError, match=re.escape("no column 'image', only ['value', 'label']")):
        read_splits(**files, columns=["image"], streaming=streaming)


def test_a_dataset_without_a_train_split_is_rejected(tmp_path):
    rows([0]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=re.escape("The dataset has no train split, only ['test']")):
        read_splits(dataset_name=str(tmp_path))


def test_without_another_split_a_tenth_is_held_out_with_each_class_in_its_proportion():
    train, validation = train_and_validation(DatasetDict(train=rows(["a", "b"] * 10)), 0, "label")
    assert (len(train), sorted(validation["label"])) == (18, [0, 1])
    train, validation = train_and_validation(DatasetDict(train=rows(list(range(20)))), 0)
    assert (len(train), len(validation)) == (18, 2) and not set(train["value"]) & set(validation["value"])


def test_a_class_that_the_training_split_lacks_is_rejected():
    with pytest.raises(ValueError, match=r"has 1 classes that the training split lacks, among them \['c'\]"):
        with_classes_of(rows([0, 1], ["a", "b"]), rows(["a", "c"]), "label")


def test_each_field_but_records_is_an_option():
    fields = set(ConfigArguments.__dataclass_fields__)
    assert {"timestep", "block", "feature", "head", "freeze_backbone", "decoder"} <= fields
    assert not fields & {"transformer", "vae", "scheduler", "selection", "model_type"}
    assert given_fields(ConfigArguments(timestep=[int_or_word("auto")], block=[int_or_word("-1")])) == {
        "timestep": "auto",
        "block": -1,
    }


def test_a_timestep_is_needed_where_none_is_given_or_saved(pixel_folder, tmp_path):
    assert needs_timestep(str(pixel_folder), {}) and not needs_timestep(str(pixel_folder), {"timestep": 5})
    ASelectConfig(timestep=50).save_pretrained(tmp_path)
    assert not needs_timestep(str(tmp_path), {}) and needs_timestep(str(tmp_path), {"timestep": "auto"})


def test_images_are_of_use_to_a_new_head(pixel_folder, bare_folder, tmp_path):
    for folder in (str(pixel_folder), str(bare_folder)):
        assert needs_images(folder, {"timestep": 5})
        assert not needs_images(folder, {"timestep": 5, "standardize_features": False})
    ASelectConfig(timestep=50, architectures=["DiTModel"]).save_pretrained(tmp_path)
    assert needs_images(str(tmp_path), {})
    ASelectConfig(timestep=50, architectures=["DiTForImageClassification"]).save_pretrained(tmp_path)
    assert not needs_images(str(tmp_path), {}) and needs_images(str(tmp_path), {"timestep": "auto"})


def test_a_training_resumes_with_its_selection(tmp_path):
    assert resumed_fields({"timestep": "auto"}, tmp_path) == {"timestep": "auto"}
    write_config(ASelectConfig(timestep=50, block=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    fields = resumed_fields({"timestep": "auto", "head": "linear"}, tmp_path / "elsewhere", tmp_path)
    assert (fields["timestep"], fields["block"], fields["head"]) == (50, 1, "linear")
    with pytest.raises(ValueError, match="This training started with block 1, got --block 2"):
        resumed_fields({"block": 2}, tmp_path)
