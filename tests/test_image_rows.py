"""Sets of images as people have them, for selection, fit, cache and scripts alike: PIL images are the measure.

Of each kind one case was met in somebody's script; its siblings are named by the ids of the tests.
"""

import gc
import io
import zipfile

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from packaging.version import Version
from PIL import Image as Pictures
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from hf_aselect import ASelectImageProcessor, DiTForImageClassification, cache_features, select_timestep
from hf_aselect.cli import main
from hf_aselect.images.rows import ImageRows
from hf_aselect.images.sources import read_folder, read_images
from hf_aselect.training.splits import read_splits

NUM = 12
ARRAYS = [np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8) for index in range(NUM)]
PIL = [Pictures.fromarray(array) for array in ARRAYS]
LABELS = [index % 3 for index in range(NUM)]


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def pixel_values():
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1 for array in ARRAYS])


def rows():
    features = Features(image=Image(), label=ClassLabel(names=["a", "b", "c"]), name=Value("string"))
    return Dataset.from_dict({"image": PIL, "label": LABELS, "name": list(map(str, LABELS))}, features=features)


class MapStyle(torch.utils.data.Dataset):
    """A dataset of torch: rows by number, and no `__iter__`."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        if index >= NUM:
            raise IndexError(index)
        tensor = torch.from_numpy(ARRAYS[index]).permute(2, 0, 1)
        return {
            "pairs": (PIL[index], LABELS[index]),
            "to-tensor": (tensor / 255, LABELS[index]),
            "bytes": (tensor, LABELS[index]),
            "pixel-values": (pixel_values()[index], LABELS[index]),
            "named": {"image": PIL[index], "label": LABELS[index]},
            "named-pixel-values": {"pixel_values": pixel_values()[index], "labels": LABELS[index]},
            "three": (PIL[index], LABELS[index], "more"),
        }[self.kind]


class Stream(IterableDataset):
    """A stream of torch."""

    def __iter__(self):
        return iter(zip(PIL, LABELS, strict=True))


def to_tensor(batch):
    return {"image": [torch.from_numpy(np.array(each)).permute(2, 0, 1) / 255 for each in batch["image"]]} | {
        "label": batch["label"]
    }


def to_pixel_values(batch):
    values = [torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1 for each in batch["image"]]
    return {"pixel_values": values, "labels": batch["label"]}


WITH_LABELS = {
    **{kind: lambda kind=kind: MapStyle(kind) for kind in ("pairs", "to-tensor", "bytes", "pixel-values")},
    **{kind: lambda kind=kind: MapStyle(kind) for kind in ("named", "named-pixel-values", "three")},
    "subset": lambda: Subset(MapStyle("pairs"), range(NUM)),
    "concatenated": lambda: ConcatDataset(
        [Subset(MapStyle("pairs"), range(5)), Subset(MapStyle("pairs"), range(5, NUM))]
    ),
    "tensor-dataset": lambda: TensorDataset(pixel_values(), torch.tensor(LABELS)),
    "list-of-pairs": lambda: list(zip(PIL, LABELS, strict=True)),
    "list-of-fractions": lambda: [(array / 255, label) for array, label in zip(ARRAYS, LABELS, strict=True)],
    "dataset": rows,
    "undecoded": lambda: rows().cast_column("image", Image(decode=False)),
    "torch-format": lambda: rows().with_format("torch"),
    "numpy-format": lambda: rows().with_format("numpy"),
    "columns": lambda: rows().with_format("torch", columns=["image", "label"]),
    "transform": lambda: rows().with_transform(to_pixel_values),
    "transform-to-fractions": lambda: rows().with_transform(to_tensor),
    "pandas-format": lambda: rows().with_format("pandas"),
    "arrow-format": lambda: rows().with_format("arrow", columns=["image", "label"]),
    "normalized-arrays": lambda: [(array / 127.5 - 1, label) for array, label in zip(ARRAYS, LABELS, strict=True)],
    "another-name": lambda: rows().rename_column("image", "img").with_format("torch"),
    "arrays": lambda: Dataset.from_dict(
        {"image": [array.tolist() for array in ARRAYS], "label": LABELS},
        features=Features(image=datasets.Array3D((8, 8, 3), "uint8"), label=Value("int64")),
    ),
    "mapping": lambda: {"pixel_values": pixel_values(), "labels": torch.tensor(LABELS)},
    "a-table-of-pandas": lambda: pandas.DataFrame({"image": PIL, "label": LABELS}, index=LABELS),
    "a-table-of-pandas-of-arrays": lambda: pandas.DataFrame({"image": ARRAYS, "label": LABELS}),
    "a-table-of-arrow": lambda: pyarrow.table({"image": [encoded(image) for image in PIL], "label": LABELS}),
}
WITHOUT = {
    "arrays-of-fractions": lambda: [array / 255 for array in ARRAYS],
    "float32": lambda: [(array / 255).astype(np.float32) for array in ARRAYS],
    "as-ToTensor": lambda: [torch.from_numpy(array).permute(2, 0, 1) / 255 for array in ARRAYS],
    "tensor": pixel_values,
    "tensor-of-fractions": lambda: (pixel_values() + 1) / 2,
    "tensor-of-bytes": lambda: torch.from_numpy(np.stack(ARRAYS)).permute(0, 3, 1, 2),
    "tensor-to-255": lambda: torch.from_numpy(np.stack(ARRAYS)).permute(0, 3, 1, 2).float(),
    "one-array": lambda: np.stack(ARRAYS),
    "one-array-of-fractions": lambda: np.stack(ARRAYS) / 255,
    "tuple": lambda: tuple(PIL),
    "encoded": lambda: [encoded(image) for image in PIL],
    "stream-of-torch": Stream,
    "stream": lambda: rows().to_iterable_dataset(),
    "iterator": lambda: iter(PIL),
    "array-of-images": lambda: pandas.Series(PIL).to_numpy(),
    "a-series": lambda: pandas.Series(PIL, index=LABELS),
}


@pytest.fixture(scope="module")
def chosen(loaded_model):
    return selection(loaded_model, PIL)


def selection(model, images, **options):
    return select_timestep(model, images, criterion="hfr", timesteps=[1, 200, 700], max_images=NUM, **options)


@pytest.mark.parametrize("kind", [*WITH_LABELS, *WITHOUT])
def test_a_selection_sees_the_same_images_whatever_they_come_in(model, chosen, kind):
    found = selection(model, {**WITH_LABELS, **WITHOUT}[kind]())
    assert found.timestep == chosen.timestep
    assert found.scores == pytest.approx(chosen.scores, rel=1e-4)


def test_a_selection_reads_files_by_their_paths(model, chosen, tmp_path):
    for index, image in enumerate(PIL):
        image.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(NUM)]
    for given in (paths, Dataset.from_dict({"image": paths})):
        assert selection(model, given).scores == pytest.approx(chosen.scores, rel=1e-4)


@pytest.fixture(scope="module")
def linear(pixel_folder):
    return DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=50, num_labels=3, head="linear", standardize_features=False
    ).eval()


@pytest.fixture(scope="module")
def fitted(linear):
    linear.fit_head(rows())
    return {name: value.clone() for name, value in linear.classifier.state_dict().items()}


@pytest.mark.parametrize("kind", WITH_LABELS)
def test_a_fit_sees_the_same_images_whatever_they_come_in(linear, fitted, kind):
    linear.fit_head(WITH_LABELS[kind](), image_column="img" if kind == "another-name" else None)
    for name, value in linear.classifier.state_dict().items():
        torch.testing.assert_close(value, fitted[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "pandas-format",
        "arrow-format",
        "undecoded",
        "torch-format",
        "numpy-format",
        "columns",
        "transform",
        "transform-to-fractions",
        "arrays",
    ],
)
def test_a_cache_applies_what_the_user_set_up(linear, tmp_path, kind):
    """A transform was met; formats, columns and undecoded images are its siblings."""
    expected = cache_features(linear, rows(), tmp_path / "plain", dtype="float32")
    given = WITH_LABELS[kind]()
    cached = cache_features(linear, given, tmp_path / kind, dtype="float32", batch_size=5)
    torch.testing.assert_close(cached["features"][:], expected["features"][:], rtol=1e-4, atol=1e-4)
    label = "labels" if kind == "transform" else "label"
    assert cached[label][:].tolist() == LABELS
    has_name = "name" in given[0] if kind != "arrays" else False
    assert ("name" in cached.column_names) == has_name
    again = cache_features(linear, WITH_LABELS[kind](), tmp_path / kind, dtype="float32")
    assert len(list((tmp_path / kind).iterdir())) == 1 and torch.equal(again["features"][:], cached["features"][:])


@pytest.mark.parametrize("kind", ["pairs", "to-tensor", "bytes", "pixel-values", "named", "subset", "list-of-pairs"])
def test_a_cache_takes_datasets_of_torch(linear, tmp_path, kind):
    expected = cache_features(linear, rows(), tmp_path / "plain", dtype="float32")
    cached = cache_features(linear, WITH_LABELS[kind](), tmp_path / kind, dtype="float32", batch_size=5)
    torch.testing.assert_close(cached["features"][:], expected["features"][:], rtol=1e-4, atol=1e-4)
    assert cached["label"][:].tolist() == LABELS
    cache_features(linear, WITH_LABELS[kind](), tmp_path / kind, dtype="float32")
    assert len(list((tmp_path / kind).iterdir())) == 1
    other = cache_features(linear, Subset(WITH_LABELS[kind](), range(5)), tmp_path / kind, dtype="float32")
    assert len(list((tmp_path / kind).iterdir())) == 2 and len(other) == 5


def test_a_cache_takes_a_table(linear, tmp_path):
    names = list(map(str, LABELS))
    table = pandas.DataFrame({"image": PIL, "label": LABELS, "name": names})
    cached = cache_features(linear, table, cache_dir=tmp_path)
    expected = cache_features(linear, rows(), cache_dir=tmp_path)
    assert np.allclose(cached["features"], expected["features"], atol=1e-5) and cached["name"][:] == names


def test_another_transform_is_another_cache(linear, tmp_path):
    def darker(batch):
        return {"image": [each.point(lambda value: value // 2) for each in batch["image"]], "label": batch["label"]}

    plain = cache_features(linear, rows(), tmp_path)
    dark = cache_features(linear, rows().with_transform(darker), tmp_path)
    assert not torch.allclose(plain["features"][:], dark["features"][:])
    # Views are made of what the transform makes.
    views = cache_features(linear, rows().with_transform(darker), tmp_path, num_views=2)
    assert torch.equal(views["features"][:NUM], dark["features"][:])
    assert views["label"][:].tolist() == LABELS * 2


def test_what_a_transform_draws_is_drawn_by_the_seed(linear, tmp_path):
    def noisy(batch):
        values = [value + 0.1 * torch.randn(()) for value in to_pixel_values(batch)["pixel_values"]]
        return {"pixel_values": [value.clamp(-1, 1) for value in values]}

    first, second, other = (
        cache_features(linear, rows().with_transform(noisy), tmp_path / name, seed=seed, batch_size=size)
        for name, seed, size in (("a", 0, 5), ("b", 0, 3), ("c", 1, 5))
    )
    assert torch.allclose(first["features"][:], second["features"][:], atol=2e-3)
    assert not torch.allclose(first["features"][:], other["features"][:], atol=2e-3)


def test_a_cache_says_what_it_cannot_apply(linear, tmp_path):
    with pytest.raises(ValueError, match=r"The format set on it shows only these, and not image"):
        cache_features(linear, rows().with_format("torch", columns=["label"]), tmp_path)
    with pytest.raises(ValueError, match=r"`num_views=2` augments images.*the dataset returns `pixel_values`"):
        cache_features(linear, rows().with_transform(to_pixel_values), tmp_path, num_views=2)
    with pytest.raises(ValueError, match=r"The dataset must have a column `image`"):
        cache_features(linear, rows().with_transform(lambda batch: {"label": batch["label"]}), tmp_path)
    with pytest.raises(ValueError, match=r"The dataset returns 'more' as a object, which cannot be stored"):
        cache_features(
            linear, rows().with_transform(lambda batch: {**to_tensor(batch), "more": [object()] * NUM}), tmp_path
        )


def test_a_dark_image_stays_dark_among_floats():
    """One that is seen alone, in a batch of its own, would be taken for one in [0, 1]."""
    images = [array.astype(np.float32) for array in ARRAYS[:3]] + [np.full((8, 8, 3), 0.8, np.float32)]
    read = ImageRows(images)
    values = ASelectImageProcessor(size=8)(read.image(read.row(3), 3), return_tensors="pt").pixel_values
    assert float(values.max()) < -0.99


@pytest.mark.parametrize(
    "wrap", [np.asarray, torch.from_numpy, lambda given: given / 255, lambda given: given / 127.5 - 1]
)
def test_grey_images_need_no_axis_of_channels(wrap):
    grey = np.stack([array[..., 0] for array in ARRAYS])
    read = ImageRows(wrap(grey))
    images = [read.image(read.row(index), index) for index in range(len(read))]
    if read.is_ready:
        assert all(image.shape == (1, 8, 8) for image in images)
    else:
        processor = ASelectImageProcessor(size=8, num_channels=1)
        expected = processor([Pictures.fromarray(each) for each in grey], return_tensors="pt").pixel_values
        assert torch.equal(processor(images, return_tensors="pt").pixel_values, expected)


def test_an_image_of_another_kind_than_the_first_is_named():
    images = [array / 255 for array in ARRAYS * 3]
    images[10] = images[10] * 255
    read = ImageRows(images)
    with pytest.raises(ValueError, match=r"Image 10 has values from .* expected \[0, 1\] as in the other images"):
        read.image(read.row(10), 10)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (lambda: DataLoader(MapStyle("pairs")), "Pass the `dataset` of the DataLoader"),
        (lambda: datasets.DatasetDict(train=rows()), "Pass one split of a `DatasetDict`"),
        (lambda: rows().remove_columns("image"), "exactly one image column, got label, name"),
        (lambda: "folder", "got str"),
        (lambda: "digits/train", r'Load the images of a folder with `load_dataset\("imagefolder", data_dir=...\)`'),
        (lambda: torch.zeros(3, 8, 8), "must have shape"),
        (lambda: np.zeros((8, 8, 3)), "must have shape"),
    ],
)
def test_what_holds_no_images_is_refused(model, images, words):
    with pytest.raises(ValueError, match=words):
        selection(model, images())


def test_labels_are_read_beside_a_transform(model):
    given = rows().with_transform(to_pixel_values)
    plain = select_timestep(model, rows(), criterion="probe", labels="label", timesteps=[1, 700])
    assert select_timestep(model, given, criterion="probe", labels="label", timesteps=[1, 700]).scores == plain.scores


def folder_of(tmp_path, *names):
    for index, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL[index].save(path)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        pytest.param(["healthy/1.png", "healthy/2.png", "test/1.png"], ["healthy", "test"], id="a-class-called-test"),
        pytest.param(["bus/1.png", "car/1.png", "train/1.png"], ["bus", "car", "train"], id="a-class-called-train"),
        pytest.param(["train/1.png", "val/1.png"], ["train", "val"], id="all-classes-called-so"),
        pytest.param(["a/train_1.png", "b/test.png", "b/val-2.png"], ["a", "b"], id="files-called-so"),
        pytest.param(["eval.png", "train.png", "x.png"], None, id="files-of-no-class"),
        pytest.param(["x/test/1.png", "x/train/2.png"], ["test", "train"], id="a-level-below"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_all_images_below_a_folder_are_read(tmp_path, files, classes, streaming):
    folder = folder_of(tmp_path / "a [1] b*", *files)
    train = read_splits(train_dir=str(folder), streaming=streaming)["train"]
    assert len(list(train)) == len(files)
    if classes:
        assert train.features["label"].names == classes
    assert len(read_images(str(folder))) == len(files)


def test_a_folder_of_splits_keeps_them(tmp_path):
    splits = read_folder(folder_of(tmp_path, "train/a/1.png", "train/b/1.png", "valid/a/2.png", "test/b/1.png"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation": 1, "test": 1}
    assert splits["test"]["label"][:] == [1]
    with pytest.raises(ValueError, match="it has no split 'other'"):
        read_images(str(tmp_path), "other")


def test_the_command_line_reads_all_images_of_a_folder(pixel_folder, tmp_path, capsys):
    folder = folder_of(
        tmp_path / "images", *[f"{name}/{index}.png" for index in range(3) for name in ("bus", "train")]
    )
    words = ["fit", str(pixel_folder), "--images", str(folder), "--output", str(tmp_path / "out"), "--timestep", "5"]
    assert main(words) == 0
    assert "6 of 2 classes" in capsys.readouterr().out


def tree_of(tmp_path, *names):
    """A folder of small images, or of other files, by their names."""
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Pictures.new("RGB", (8, 8)).save(path)
        else:
            path.write_text("notes")
    return tmp_path


SPLITS = ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png")


def test_files_that_are_no_images_do_not_decide_on_splits(tmp_path):
    read = read_folder(tree_of(tmp_path, *SPLITS, "README.md", "train/notes.txt"))
    assert {name: len(rows) for name, rows in read.items()} == {"train": 2, "test": 2}


@pytest.mark.parametrize("stray", ["c.png", "train/c.png"])
def test_an_image_beside_classes_of_splits_is_told_of(tmp_path, stray):
    with pytest.raises(ValueError, match=r"has the splits test, train, but 'c\.png' is beside the class folders"):
        read_folder(tree_of(tmp_path, *SPLITS, stray))


needs_its_strings = pytest.mark.skipif(
    Version(datasets.__version__) < Version("4.1") and Version(pandas.__version__) >= Version("3"),
    reason="datasets 4.0 does not know the strings of pandas 3",
)
METADATA = "file_name,label\n1.png,x\n2.png,y\n"
# `datasets` closes no table that it reads the first rows of, and PIL no image that is broken.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in[\s\S]*(metadata|1\.png):pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def unclosed():
    """What was left open is collected here, and not in another test."""
    yield
    gc.collect()


@pytest.mark.usefixtures("unclosed")
@pytest.mark.parametrize(
    ("files", "table", "words"),
    [
        pytest.param(
            ["1.png", "2.png", "3.png"],
            "metadata.csv",
            "lists 2 of the 3 images",
            id="metadata-of-some",
            marks=needs_its_strings,
        ),
        pytest.param(
            ["a/1.png", "a/2.png", "b/1.png"],
            "a/metadata.csv",
            "lists 2 of the 3",
            id="metadata-of-a-class",
            marks=needs_its_strings,
        ),
        pytest.param(["1.png", "2.png"], "metadata.csv", None, id="metadata-of-all", marks=needs_its_strings),
        pytest.param(["a/1.png", "b/1.png", "b/c/2.png"], None, "as a/1.png and b/c/2.png", id="a-folder-in-a-class"),
        pytest.param(["1.png", "a/1.png", "b/2.png"], None, "as 1.png and a/1.png", id="an-image-beside-classes"),
        pytest.param([*SPLITS, "test/b/c/5.png"], None, "as test/a/3.png and test/b/c/5.png", id="in-a-split"),
        pytest.param(["a/1.png", "b/1.png"], None, None, id="classes"),
        pytest.param(["x/__a__/1.png", "x/b/1.png"], None, None, id="classes-with-special-names"),
    ],
)
def test_what_a_folder_leaves_out_is_said(tmp_path, caplog, files, table, words):
    folder = tree_of(tmp_path, *files)
    if table:
        (folder / table).write_text(METADATA)
    splits = read_folder(folder)
    said = [each.getMessage() for each in caplog.records]
    assert len(said) == (words is not None) and (words or "") in "".join(said)
    assert ("label" in splits["train"].features) == (words is None or table is not None)
    # As they are there, where we say so.
    theirs = load_dataset("imagefolder", data_dir=str(folder))["train"]
    if words is not None:
        assert splits["train"].features == theirs.features and len(splits["train"]) == len(theirs)


def test_folders_are_read_whatever_their_names(tmp_path):
    names = ["a/1.png", "__x__/2.png", "__x/3.png", "__x/__y__/4.png", ".hidden/5.png", "a/.6.png"]
    assert len(read_folder(tree_of(tmp_path / "__z__", *names))["train"]) == 4
    classes = read_folder(tree_of(tmp_path / "classes", "cat/1.png", "__dog__/2.png"))["train"]
    assert classes.features["label"].names == ["__dog__", "cat"]


@needs_its_strings
@pytest.mark.usefixtures("unclosed")
def test_splits_may_have_metadata_in_place_of_classes(tmp_path):
    folder = tree_of(tmp_path, "train/1.png", "train/2.png", "test/1.png", "test/2.png")
    for split in ("train", "test"):
        (folder / split / "metadata.csv").write_text(METADATA)
    splits = read_folder(folder)
    assert {name: rows["label"][:] for name, rows in splits.items()} == {"train": ["x", "y"], "test": ["x", "y"]}


@pytest.mark.usefixtures("unclosed")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("b.zip", b"PK no archive", r"an archive is damaged \(File is not a zip file\)", id="no-zip"),
        pytest.param("b.zip", None, "an archive is damaged", id="a-part-of-a-zip"),
        pytest.param("metadata.csv", b"id,label\n1,x\n", "`file_name`", id="metadata-of-no-files"),
        pytest.param("metadata.jsonl", b"{no json", "cannot be read as images", id="no-json"),
    ],
)
def test_what_is_broken_in_a_folder_is_said(tmp_path, name, content, words):
    folder = tree_of(tmp_path / "a", "1.png", "2.png")
    if content is None:
        with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
            archive.writestr("3.png", np.random.default_rng(0).bytes(4000))
        content = (tmp_path / "whole.zip").read_bytes()[:2000]
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as found:
        read_folder(folder)
    assert str(folder) in str(found.value)


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("notes")
    with pytest.raises(ValueError, match="contains no images"):
        read_folder(tmp_path)


@pytest.mark.usefixtures("unclosed")
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_an_image_of_a_folder_that_cannot_be_read_is_named(tmp_path, share):
    folder = folder_of(tmp_path, "a/1.png", "b/1.png")
    whole = (folder / "b" / "1.png").read_bytes()
    (folder / "b" / "1.png").write_bytes(whole[: int(share * len(whole))])
    rows = ImageRows(read_folder(folder)["train"])
    with pytest.raises(ValueError, match=r"Image 1, '.*b/1\.png', cannot be read"):
        list(rows)
    with pytest.raises(ValueError, match=r"b/1\.png"):
        rows.row(1)


def test_an_image_as_nested_lists_is_no_pair():
    """Its first row was taken for an image, and all else for a label."""
    arrays = [np.random.default_rng(index).random((8, 8, 3)) for index in range(8)]
    rows = ImageRows([array.tolist() for array in arrays])
    assert not rows.is_pair
    pairs = ImageRows([(array, 1) for array in arrays])
    assert pairs.is_pair
