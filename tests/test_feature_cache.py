"""Features kept on disk: what Trainer reads of them, what makes them stale, and what an interruption leaves."""

import copy
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import END_OF_PROCESSES
from datasets import ClassLabel, Dataset, Features, Value
from datasets.fingerprint import Hasher
from forking import offline
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Trainer, TrainingArguments

from hf_aselect import DiTForImageClassification, DiTModel, cache_features
from hf_aselect.model.image_processing_aselect import ASelectImageProcessor
from hf_aselect.training import cached_features, feature_parts

NUM_PICTURES = 10


def make_dataset(num=NUM_PICTURES, seed=5):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (num, 10, 12, 3), generator=generator, dtype=torch.uint8)
    rows = {
        "image": [Image.fromarray(value.numpy()) for value in values],
        "label": [index % 4 for index in range(num)],
        "name": [f"image {index}" for index in range(num)],
    }
    return Dataset.from_dict(
        rows, features=Features(image=datasets.Image(), label=ClassLabel(num_classes=4), name=Value("string"))
    )


@pytest.fixture
def data():
    return make_dataset()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of three rows, so that ten images make several."""
    monkeypatch.setattr(feature_parts, "MIN_PARTS", 4)
    monkeypatch.setattr(feature_parts, "MIN_PART_ROWS", 3)


def pixel_values(model, data):
    return ASelectImageProcessor.from_model_config(model.config)(data["image"][:], return_tensors="pt").pixel_values


def folders(path):
    return sorted(folder.name for folder in path.iterdir())


def test_tokens_are_those_of_the_model(model, data, tmp_path):
    cached = cache_features(model, data, tmp_path, batch_size=4)
    assert cached.column_names == ["features", "label", "name"]
    assert cached["label"][:].tolist() == data["label"][:]
    assert cached["name"][:] == data["name"][:]
    with torch.no_grad():
        expected = model.extract_features(pixel_values(model, data))
    torch.testing.assert_close(cached["features"][:], expected.half().float(), rtol=2e-3, atol=2e-3)
    assert str(cached.features["features"]) == f"Array2D(shape={tuple(expected.shape[1:])}, dtype='float16')"


def test_it_is_memory_mapped_and_read_by_datasets_itself(model, data, tmp_path):
    cached = cache_features(model, data, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert {os.path.dirname(each["filename"]) for each in cached.cache_files} == {str(folder)}
    again = datasets.load_from_disk(folder).with_format("torch")
    assert torch.equal(again["features"][:], cached["features"][:])
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_logits_from_features_are_those_from_pixels(classifier, data, tmp_path):
    classifier.eval()
    exact = cache_features(classifier, data, tmp_path, dtype="float32")
    half = cache_features(classifier, data, tmp_path)
    with torch.no_grad():
        expected = classifier(pixel_values(classifier, data)).logits
        torch.testing.assert_close(classifier(features=exact["features"][:]).logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(classifier(features=half["features"][:]).logits, expected, rtol=1e-2, atol=1e-2)


def test_means_serve_a_linear_head_and_no_other(pixel_folder, classifier, data, tmp_path):
    linear = DiTForImageClassification.from_pretrained(pixel_folder, timestep=50, num_labels=4, head="linear").eval()
    cached = cache_features(linear, data, tmp_path, what="pooled", dtype="float32")
    assert cached["features"][:].shape == (NUM_PICTURES, linear.config.feature_size)
    with torch.no_grad():
        expected = linear(pixel_values(linear, data)).logits
        torch.testing.assert_close(linear(features=cached["features"][:]).logits, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"An attention head needs tokens.*what='tokens'"):
        classifier(features=cached["features"][:])


def test_latents_stay_when_the_timestep_changes(latent_folder, data, tmp_path):
    model = DiTForImageClassification.from_pretrained(latent_folder, timestep=50, num_labels=4, head="linear").eval()
    cached = cache_features(model, data, tmp_path, what="latents", dtype="float32")
    model.config.timestep = 200
    cache_features(model, data, tmp_path, what="latents", dtype="float32")
    assert len(folders(tmp_path)) == 1
    latents = cached["latents"][:]
    with torch.no_grad():
        pixels = pixel_values(model, data)
        torch.testing.assert_close(
            model.extract_features(latents=latents, timestep=300), model.extract_features(pixels, timestep=300)
        )
        torch.testing.assert_close(model(latents=latents).logits, model(pixels).logits)
        torch.testing.assert_close(
            model.backbone(latents=latents).last_hidden_state, model.backbone(pixels).last_hidden_state
        )


def test_latents_that_do_not_fit_are_refused(latent_folder):
    model = DiTModel.from_pretrained(latent_folder, timestep=50)
    for latents, message in (
        (torch.zeros(1, 3, 8, 8), r"shape \(B, 4, h, w\)"),
        (torch.zeros(1, 4, 7, 8), "multiples of"),
        (torch.full((1, 4, 8, 8), torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            model(latents=latents)
    with pytest.raises(ValueError, match="exactly one of `pixel_values` and `latents`"):
        model()


@pytest.mark.parametrize("what", ["tokens", "pooled", "latents"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("large", [1, 2**14])
def test_batches_are_those_of_datasets(model, data, tmp_path, monkeypatch, what, dtype, large):
    monkeypatch.setattr(cached_features, "LARGE_ROW_BYTES", large)
    extra = {"weight": [index / 4 for index in range(NUM_PICTURES)], "is_bright": [True, False] * 5}
    for name, values in extra.items():
        data = data.add_column(name, values)
    cached = cache_features(model, data, tmp_path, what=what, dtype=dtype)
    numbers, keys = cached.remove_columns("name"), [7, 0, 9, 2, 2]
    assert cached_features._plain_columns(numbers)  # read where they lie
    some = numbers.select_columns(["label"]).rename_column("label", "labels")
    copied = pickle.loads(pickle.dumps(numbers)), copy.deepcopy(numbers)
    others = numbers.shuffle(0), numbers.select([3] * 10), numbers.with_format("numpy"), numbers.with_format("torch")
    for split in (cached, numbers, some, *copied, *others):
        expected = Dataset.__getitems__(split, keys)
        for found, row in zip(split.__getitems__(keys), expected, strict=True):
            assert found.keys() == row.keys()
            for name, value in row.items():
                assert type(found[name]) is type(value)
                assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None)
                assert np.array_equal(found[name], value)
                if isinstance(value, torch.Tensor) and value.ndim:
                    found[name].zero_()  # what is on disk stays
    with pytest.raises(IndexError):
        numbers.__getitems__([0, NUM_PICTURES])


@pytest.mark.parametrize("fold", [False, True])
def test_trainer_learns_the_same_from_features_as_from_pictures(classifier, data, tmp_path, fold):
    model = classifier.fold() if fold else classifier
    start = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    cached = cache_features(model, data, tmp_path / "cache", dtype="float32")
    pixels = data.map(
        lambda batch: {
            "pixel_values": ASelectImageProcessor.from_model_config(model.config)(batch["image"])["pixel_values"]
        },
        batched=True,
        remove_columns=["image", "name"],
    ).with_format("torch")
    losses = []
    for rows in (pixels, cached):
        model.classifier.load_state_dict(start)
        args = TrainingArguments(
            tmp_path / "out",
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            seed=3,
        )
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[1][-1] != losses[1][0]


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_a_forward_pass_changes_no_fingerprint(request, pixels, kind):
    """`datasets` hashes a model that a function of `map` holds, and computes again what has another hash."""
    given = request.getfixturevalue(kind).eval()
    before = Hasher.hash(given)
    with torch.no_grad():
        given(pixels)
    assert Hasher.hash(given) == before
    copied = copy.deepcopy(given)
    with torch.no_grad():
        assert all(map(torch.equal, copied(pixels).values(), given(pixels).values()))


def test_a_second_call_computes_nothing(model, data, tmp_path, monkeypatch):
    first = cache_features(model, data, tmp_path)
    monkeypatch.setattr(DiTModel, "extract_features", lambda *_: pytest.fail("the model was run"))
    second = cache_features(model, make_dataset(), tmp_path, batch_size=3)
    assert torch.equal(first["features"][:], second["features"][:])


def changed_weights(model):
    with torch.no_grad():
        next(model.denoiser.parameters()).mul_(1.001)


@pytest.mark.parametrize(
    "change",
    [
        changed_weights,
        lambda model: setattr(model.config, "timestep", 51),
        lambda model: setattr(model.config, "block", 0),
        lambda model: setattr(model.config, "feature", "key"),
        lambda model: setattr(model.config, "noise_seed", 1),
        lambda model: setattr(model.config, "num_noise_draws", 2),
        lambda model: setattr(model.config, "zeroed_channels", [1]),
        lambda model: setattr(model.config, "image_size", 16),
        lambda model: model.to(torch.float64),
    ],
    ids=["weights", "timestep", "block", "feature", "seed", "draws", "zeroed", "size", "dtype"],
)
def test_another_model_has_another_cache(model, data, tmp_path, change):
    before = cache_features(model, data, tmp_path)["features"][:]
    change(model)
    after = cache_features(model, data, tmp_path)["features"][:]
    assert len(folders(tmp_path)) == 2
    with torch.no_grad():
        expected = model.extract_features(pixel_values(model, data))
    torch.testing.assert_close(after.double(), expected.double(), rtol=2e-3, atol=2e-3)
    assert before.shape != after.shape or not torch.equal(before, after) or model.dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"what": "pooled"}, {"num_views": 2}, {"num_views": 2, "seed": 1}, {"num_views": 3}],
)
def test_other_options_have_another_cache(model, data, tmp_path, options):
    for given in ({}, {"num_views": 2, "augment": lambda picture: picture.rotate(90)}, options):
        cache_features(model, data, tmp_path, **given)
    assert len(folders(tmp_path)) == 3


def test_other_pictures_have_another_cache(model, tmp_path):
    for rows in (
        make_dataset(),
        make_dataset(seed=6),
        make_dataset().select(range(5)),
        make_dataset().shuffle(seed=1),
    ):
        cache_features(model, rows, tmp_path)
    assert len(folders(tmp_path)) == 4


def test_the_fingerprint_says_what_it_was_made_from(model, data, tmp_path):
    cache_features(model, data, tmp_path)
    (folder,) = tmp_path.iterdir()
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    assert fingerprint["timestep"] == 50 and fingerprint["tap"] == "1.query" and fingerprint["noise_seed"] == 0
    assert len(fingerprint["weights"]) == 64 and fingerprint["image_size"] == [8, 8]
    assert str(tmp_path) not in json.dumps(fingerprint)


def test_views_are_the_picture_and_random_crops_of_it(model, data, tmp_path):
    cached = cache_features(model, data, tmp_path, num_views=3, dtype="float32", batch_size=7)
    assert cached["view"][:].tolist() == [view for view in range(3) for _ in range(NUM_PICTURES)]
    assert cached["label"][:].tolist() == data["label"][:] * 3
    plain = cache_features(model, data, tmp_path, dtype="float32")["features"][:]
    views = cached["features"][:].unflatten(0, (3, NUM_PICTURES))
    torch.testing.assert_close(views[0], plain)
    assert not torch.allclose(views[1], views[0]) and not torch.allclose(views[1], views[2])


def test_views_do_not_depend_on_the_batch_or_on_what_was_drawn_before(model, data, tmp_path):
    def jitter(picture):
        values = np.asarray(picture) * random.random() * np.random.rand() * float(torch.rand(()))
        return Image.fromarray(values.astype(np.uint8))

    states = random.getstate(), torch.get_rng_state()
    options = {"num_views": 2, "augment": jitter, "dtype": "float32"}
    first = cache_features(model, data, tmp_path / "a", batch_size=3, **options)["features"][:]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    random.seed(99)
    torch.manual_seed(99)
    second = cache_features(model, data, tmp_path / "b", batch_size=5, **options)["features"][:]
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_an_interrupted_cache_goes_on_where_it_stopped(model, data, tmp_path, monkeypatch):
    calls = []
    extract = DiTModel.extract_features

    def interrupted(self, pixels, *args, **kwargs):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extract(self, pixels, *args, **kwargs)

    monkeypatch.setattr(DiTModel, "extract_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_features(model, data, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith(".incomplete")
    parts = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(parts) == 2  # of three rows each, and nothing half-written
    (folder / ".state.incomplete-0.json").write_text("{")  # of a process that was killed
    calls[:] = [0] * 3
    cached = cache_features(model, data, tmp_path)
    assert sum(calls) == NUM_PICTURES - 6
    (folder,) = tmp_path.iterdir()
    assert all((folder / name).stat().st_mtime_ns == at for name, at in parts.items())
    assert not list(folder.glob(".*"))
    monkeypatch.setattr(DiTModel, "extract_features", extract)
    whole = cache_features(model, data, tmp_path / "again")
    torch.testing.assert_close(cached["features"][:], whole["features"][:], rtol=1e-3, atol=1e-3)


SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from hf_aselect import DiTModel, cache_features
from hf_aselect.training import feature_parts
from hf_aselect.training.feature_reader import FeatureReader
from test_feature_cache import make_dataset
feature_parts.MIN_PARTS, feature_parts.MIN_PART_ROWS = 4, 3
model = DiTModel.from_pretrained(sys.argv[2], timestep=50)
if len(sys.argv) > 4:
    read = FeatureReader.read
    def slow(self, rows):
        print("row", rows[0], flush=True)
        # gloo writes to the same stdout, from both processes at once and into the middle of a line.
        with Path(sys.argv[3] + f".read-by-{os.getpid()}").open("a") as read_by:
            print(rows[0], file=read_by)
        time.sleep(0.2)
        return read(self, rows)
    FeatureReader.read = slow
cached = cache_features(model, make_dataset(), sys.argv[3], batch_size=1)
print("length", len(cached), flush=True)
"""


def start_script(code, pixel_folder, cache, *words, world=1):
    return offline().start(code, os.path.dirname(__file__), pixel_folder, cache, *words, world=world)


@pytest.mark.process
def test_killed_in_the_middle_it_goes_on(model, data, pixel_folder, tmp_path):
    running = start_script(SCRIPT, pixel_folder, tmp_path / "cache", "slow")
    while "row 7" not in running.said:
        assert not running.has_ended, running.said[-2000:]
        time.sleep(0.01)
    running.kill()
    assert running.wait()[0] == -signal.SIGKILL
    (folder,) = (tmp_path / "cache").iterdir()
    assert {path.name[:10] for path in folder.glob("data-*")} == {"data-00000", "data-00001"}
    cached = cache_features(model, data, tmp_path / "cache")
    whole = cache_features(model, data, tmp_path / "again")
    torch.testing.assert_close(cached["features"][:], whole["features"][:], rtol=1e-3, atol=1e-3)
    assert len(folders(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").glob("*/.*"))


@pytest.mark.process
def test_two_processes_share_the_work(model, data, pixel_folder, tmp_path):
    running = start_script(SCRIPT + END_OF_PROCESSES, pixel_folder, tmp_path / "cache", "told", world=2)
    code, said = running.wait()
    assert code == 0, said[-2000:]
    shares = [list(map(int, path.read_text().split())) for path in tmp_path.glob("cache.read-by-*")]
    assert sorted(map(len, shares)) == [4, 6]  # parts of 3, 3, 3 and 1
    assert sorted(shares[0] + shares[1]) == list(range(NUM_PICTURES))
    (folder,) = (tmp_path / "cache").iterdir()
    shared = datasets.load_from_disk(folder).with_format("torch")["features"][:]
    alone = cache_features(model, data, tmp_path / "alone")
    torch.testing.assert_close(shared, alone["features"][:], rtol=1e-3, atol=1e-3)


@pytest.mark.process
def test_two_that_know_nothing_of_each_other_do_no_harm(model, data, pixel_folder, tmp_path):
    stranger = "import os\nfor name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):\n    del os.environ[name]\n"
    running = start_script(stranger + SCRIPT, pixel_folder, tmp_path / "cache", "slow", world=2)
    code, said = running.wait()
    assert code == 0, said[-2000:]
    assert said.splitlines().count(f"length {NUM_PICTURES}") == 2
    assert len(folders(tmp_path / "cache")) == 1
    cached, alone = (cache_features(model, data, tmp_path / name) for name in ("cache", "alone"))
    torch.testing.assert_close(cached["features"][:], alone["features"][:], rtol=1e-3, atol=1e-3)


def test_a_disk_too_small_is_refused_before_anything_is_computed(model, data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_parts.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    monkeypatch.setattr(DiTModel, "extract_features", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(OSError, match=r"The cache needs 0\.0 MB, but .* has 0\.0 MB left"):
        cache_features(model, data, tmp_path)


def test_the_need_is_told_before_it_starts(model, data, tmp_path, capsys):
    cache_features(model, data, tmp_path, dtype="float32")
    assert "Caching tokens, 0.0 MB" in capsys.readouterr().err


def test_values_beyond_float16_are_refused(model, data, tmp_path, monkeypatch):
    extract = DiTModel.extract_features
    monkeypatch.setattr(DiTModel, "extract_features", lambda *args: extract(*args) * 1e7)
    with pytest.raises(ValueError, match=r"tokens of image 0 overflow float16.*dtype='float32'"):
        cache_features(model, data, tmp_path)
    assert cache_features(model, data, tmp_path, dtype="float32").num_rows == NUM_PICTURES


def test_a_broken_picture_is_named(model, tmp_path):
    good = tmp_path / "good.png"
    Image.new("RGB", (8, 8)).save(good)
    broken = good.read_bytes()[:40]
    rows = {"image": [{"bytes": good.read_bytes(), "path": None}, {"bytes": broken, "path": None}]}
    data = Dataset.from_dict(rows, features=Features(image=datasets.Image()))
    with pytest.raises(ValueError, match=r"Image 1 cannot be read"):
        cache_features(model, data, tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "maps"}, "`what` must be one of tokens, pooled, latents, got 'maps'"),
        ({"dtype": "bfloat16"}, "`dtype` must be one of float16, float32"),
        ({"num_views": 0}, "`num_views` must be a positive integer"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"image_column": "picture"}, "no column 'picture', only image, label, name"),
    ],
)
def test_wrong_options_are_refused(model, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        cache_features(model, data, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_wrong_data_are_refused(model, data, tmp_path):
    for wrong, message in (
        (7, "got int"),
        (datasets.DatasetDict(train=data), "one split of a DatasetDict"),
        (data.to_iterable_dataset(), "or a part of a stream"),
        (data.select([]), "no rows"),
        (data.remove_columns("image"), "exactly one column of images"),
        (data.rename_column("label", "features"), "already has a column 'features'"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_features(model, wrong, tmp_path)
    model.config.timestep = "auto"
    with pytest.raises(ValueError, match="still 'auto'"):
        cache_features(model, data, tmp_path)


@pytest.mark.parametrize("kind", [ClassLabel(num_classes=6), Value("int64")], ids=["ClassLabel", "int64"])
@pytest.mark.parametrize("name", ["label", "labels"])
@pytest.mark.parametrize("wrong", [-2, 4])
def test_labels_beyond_the_classes_are_rejected_before_anything_is_computed(
    classifier, data, tmp_path, kind, name, wrong
):
    # What stands for no class: `datasets` writes no -100 in a column of class labels.
    none = -1 if isinstance(kind, ClassLabel) else -100
    if isinstance(kind, ClassLabel) and wrong == -2:
        pytest.skip("`datasets` has no such class label")
    labels = [wrong, none, *range(4), *range(4)]
    rows = data.remove_columns("label").add_column(name, labels).cast_column(name, kind)
    with pytest.raises(ValueError, match=rf"`dataset` has the label {wrong} in column '{name}'.*`dataset.filter`"):
        cache_features(classifier, rows, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    cached = cache_features(classifier, rows.select(range(1, len(rows))), tmp_path / "cache")
    assert cached[name][:].tolist() == labels[1:]


def test_labels_of_a_model_without_classes_are_kept_as_they_are(model, data, tmp_path):
    rows = data.remove_columns("label").add_column("label", [-7] * NUM_PICTURES)
    assert cache_features(model, rows, tmp_path)["label"][:].tolist() == [-7] * NUM_PICTURES


def test_labels_that_are_no_integers_are_kept_as_they_are(model, data, tmp_path):
    rows = data.rename_column("label", "labels").add_column("label", [-0.5] * NUM_PICTURES)
    masks = [[[-1, 0], [1, 2]]] * NUM_PICTURES
    rows = rows.remove_columns("labels").add_column("labels", masks)
    rows = rows.cast_column("labels", datasets.Array2D((2, 2), "int64"))
    cached = cache_features(model, rows, tmp_path)
    assert cached["label"][:].tolist() == [-0.5] * NUM_PICTURES and cached["labels"][:].tolist() == masks


def test_train_mode_and_gradients_are_as_before(classifier, data, tmp_path):
    classifier.train()
    cache_features(classifier, data, tmp_path)
    assert classifier.training and classifier.classifier.training and not classifier.backbone.denoiser.training


@pytest.mark.process
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_it_by_its_name(model, data, tmp_path, start):
    cached = cache_features(model, data, tmp_path).remove_columns("name")
    with multiprocessing.get_context(start).Pool(1) as pool:
        kind, rows = pool.apply(read_rows, (cached, [7, 0]))
    assert kind == "hf_aselect.training.cached_features.CachedFeatures"
    assert all(np.array_equal(row["features"], cached["features"][key]) for row, key in zip(rows, [7, 0], strict=True))


def read_rows(cached, keys):
    """The class of a dataset, and some rows as numpy's, in whichever process."""
    rows = [{name: value.numpy() for name, value in row.items()} for row in cached.__getitems__(keys)]
    return f"{type(cached).__module__}.{type(cached).__qualname__}", rows


def test_it_stays_what_it_is_where_no_rows_are_taken(model, data, tmp_path):
    cached = cache_features(model, data, tmp_path)
    changed = cached.with_format("numpy"), cached.rename_column("label", "labels"), cached.remove_columns("name")
    for each in (*changed, cached.select_columns("label"), copy.deepcopy(cached)):
        assert type(each) is cached_features.CachedFeatures


@pytest.mark.process
def test_without_datasets_it_is_said_what_to_install():
    code = "import sys; sys.modules['datasets'] = None; import hf_aselect; hf_aselect.cache_features"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: `cache_features` needs datasets: pip install 'hf_aselect[train]'" in done.stderr


def test_reading_is_fast_enough_for_a_head(model, tmp_path):
    cached = cache_features(model, make_dataset(300), tmp_path)
    loader = torch.utils.data.DataLoader(cached, batch_size=32, shuffle=True)
    started = time.monotonic()
    assert sum(len(batch["label"]) for batch in loader) == 300
    assert time.monotonic() - started < 5


def test_a_folder_in_the_way_costs_no_work(model, data, tmp_path):
    cache_features(model, data, tmp_path / "a")
    (name,) = folders(tmp_path / "a")
    (tmp_path / "b" / name).mkdir(parents=True)
    (tmp_path / "b" / name / "data-00000-of-00004.arrow").write_text("half copied")
    with pytest.raises(OSError, match=r"are complete in .* exists and is not a cache"):
        cache_features(model, data, tmp_path / "b")
    assert len(list((tmp_path / "b" / f"{name}.incomplete").glob("data-*.arrow"))) == 4
    for path in (tmp_path / "b" / name).iterdir():
        path.unlink()
    assert cache_features(model, data, tmp_path / "b").num_rows == NUM_PICTURES


def test_an_augmentation_without_further_views_is_refused(model, data, tmp_path):
    with pytest.raises(ValueError, match=r"`augment` creates the additional views.*Pass `num_views=2`"):
        cache_features(model, data, tmp_path, augment=lambda picture: picture)


def test_another_scaling_of_the_latents_has_another_cache(latent_folder, data, tmp_path):
    model = DiTModel.from_pretrained(latent_folder, timestep=50)
    cache_features(model, data, tmp_path, what="latents")
    model.config.vae = {**model.config.vae, "scaling_factor": 0.25}
    cache_features(model, data, tmp_path, what="latents")
    assert len(folders(tmp_path)) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_adapters_that_are_switched_off_are_another_cache(model, data, tmp_path):
    """Which adapters count is no weight."""
    cached = cache_features(model, data, tmp_path)["features"][:]
    adapted = get_peft_model(model, LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    with_adapter = cache_features(adapted.get_base_model(), data, tmp_path)["features"][:]
    with adapted.disable_adapter():
        without = cache_features(adapted.get_base_model(), data, tmp_path)["features"][:]
    assert not torch.allclose(with_adapter, cached, atol=1e-2)
    torch.testing.assert_close(without, cached, rtol=1e-3, atol=1e-3)


FAILING = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
from hf_aselect import DiTModel, cache_features
from hf_aselect.training import feature_parts
from hf_aselect.training.feature_reader import FeatureReader
from test_feature_cache import make_dataset
feature_parts.MIN_PARTS, feature_parts.MIN_PART_ROWS = 4, 3
read = FeatureReader.read
def broken(self, rows):
    if os.environ["RANK"] == "1":
        raise ValueError("Image 3 of the dataset cannot be read")
    return read(self, rows)
FeatureReader.read = broken
try:
    cache_features(DiTModel.from_pretrained(sys.argv[2], timestep=50), make_dataset(), sys.argv[3])
except (RuntimeError, ValueError) as error:
    with open(f"{sys.argv[3]}-{os.environ['RANK']}", "w") as said:
        said.write(f"{type(error).__name__}: {error}")
"""


@pytest.mark.process
def test_a_process_that_fails_keeps_no_other_waiting(pixel_folder, tmp_path):
    code, said = start_script(FAILING + END_OF_PROCESSES, pixel_folder, tmp_path / "cache", world=2).wait()
    assert code == 0, said[-2000:]
    said = [(tmp_path / f"cache-{rank}").read_text() for rank in (0, 1)]
    assert said[1] == "ValueError: Image 3 of the dataset cannot be read"
    assert said[0].startswith("RuntimeError: Another process failed (ValueError: Image 3 of the dataset cannot")


def test_the_need_counts_what_lies_beside_the_features(model, pictures, tmp_path, monkeypatch):
    """Captions longer than the features, eight times over."""
    rows = {"image": pictures, "caption": ["x" * 5000] * len(pictures)}
    data = Dataset.from_dict(rows, features=Features(image=datasets.Image(), caption=datasets.Value("string")))
    asked = []
    monkeypatch.setattr(feature_parts, "_check_space", lambda _, needed: asked.append(needed))
    cached = cache_features(model, data, tmp_path, what="pooled", num_views=8)
    size = sum(path.stat().st_size for path in Path(cached.cache_files[0]["filename"]).parent.glob("*.arrow"))
    assert 0.98 * size <= asked[0] <= 1.3 * size  # what is left open is that much and a megabyte
