"""Models whose weights are elsewhere until they are needed, or in a smaller dtype: equal outputs, or one line."""

import accelerate
import datasets
import pytest
import torch
from generic_pipelines import hunyuan_dit
from packaging.version import Version
from pipelines import images_of, pixart_alpha, sd3

from hf_aselect import DiTForImageClassification, cache_features, select_timestep

pytestmark = [
    pytest.mark.family,
    # accelerate's, of weights and buffers that hang on no layer, as transformers itself names them.
    pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of classifiers with a VAE and a prompt.

    PixArt's blocks have weights that hang on no layer, and HunyuanDiT's pooling has layers that are never called.
    """
    pipelines = {"sd3": lambda: sd3(t5_too=False), "pixart_alpha": pixart_alpha, "hunyuan_dit": hunyuan_dit}
    folders = {}
    for name, build in pipelines.items():
        folder = tmp_path_factory.mktemp(name)
        build().save_pretrained(folder / "pipeline")
        torch.manual_seed(0)
        options = {"timestep": 300, "block": 1, "feature": ["hidden", "normed", "key", "attention"], "num_labels": 2}
        options |= {"text_encoder_3": None} if name == "sd3" else {}
        model = DiTForImageClassification.from_pretrained(folder / "pipeline", head="linear", **options)
        model.save_pretrained(folder / "saved")
        folders[name] = folder / "saved"
    return folders


def load(folder, **options):
    return DiTForImageClassification.from_pretrained(folder, **options)


def half_of(folder):
    return sum(value.nbytes for value in load(folder).state_dict().values()) // 2


def cpu_offload(folder, _):
    return accelerate.cpu_offload(load(folder), execution_device="cpu")


def cpu_offload_with_buffers(folder, _):
    return accelerate.cpu_offload(load(folder), execution_device="cpu", offload_buffers=True)


def disk_offload(folder, path):
    return accelerate.disk_offload(load(folder), path / "offloaded", execution_device="cpu")


def all_on_disk(folder, path):
    if Version(accelerate.__version__) < Version("1.15"):
        pytest.skip("before accelerate 1.15 no device map offloads a whole model to a disk")
    return load(folder, device_map={"": "disk"}, offload_folder=path / "offloaded")


def backbone_on_disk(folder, path):
    return load(folder, device_map={"backbone": "disk", "classifier": "cpu"}, offload_folder=path / "offloaded")


def transformer_on_disk(folder, path):
    # A sibling: a map that names no buffer of the denoiser itself.
    places = {"backbone.denoiser.transformer": "disk", "backbone.vae": "cpu", "classifier": "cpu"}
    return load(folder, device_map=places, offload_folder=path / "offloaded")


def auto(folder, _):
    return load(folder, device_map="auto")


def auto_that_splits(folder, path):
    memory = {"cpu": half_of(folder)}
    return load(folder, device_map="auto", max_memory=memory, offload_folder=path / "offloaded")


def sequential_with_buffers(folder, path):
    # A sibling.
    memory = {"cpu": half_of(folder)}
    options = {"offload_folder": path / "offloaded", "offload_buffers": True}
    return load(folder, device_map="sequential", max_memory=memory, **options)


def stored_in_8_bits(folder, _):
    model = load(folder)
    model.backbone.denoiser.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return model


def vae_stored_in_8_bits(folder, _):
    model = load(folder)
    model.backbone.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return model


WAYS = [
    cpu_offload,
    cpu_offload_with_buffers,
    disk_offload,
    all_on_disk,
    backbone_on_disk,
    transformer_on_disk,
    auto,
    auto_that_splits,
    sequential_with_buffers,
    stored_in_8_bits,
    vae_stored_in_8_bits,
]


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize(
    ("name", "offload"),
    [
        *(("sd3", way) for way in WAYS if way is not disk_offload),
        *(
            ("pixart_alpha", way)
            for way in (cpu_offload_with_buffers, disk_offload, auto_that_splits, stored_in_8_bits)
        ),
        *(("hunyuan_dit", way) for way in (cpu_offload, all_on_disk, transformer_on_disk, stored_in_8_bits)),
    ],
)
def test_what_is_offloaded_does_the_same(saved, pictures, tmp_path, name, offload):
    saved = saved[name]
    model, plain = offload(saved, tmp_path), load(saved)
    pixels = images_of(plain)
    if offload in (stored_in_8_bits, vae_stored_in_8_bits):
        # What is saved of it is the same rounded, and stored as it is computed.
        model.save_pretrained(tmp_path / "rounded")
        assert not torch.equal(plain(pixels).logits, model(pixels).logits)
        plain = load(tmp_path / "rounded")
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    expected, latents = plain(pixels).logits, plain.encode(pixels)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model(pixels).logits, expected, **close)
    torch.testing.assert_close(model.encode(pixels), latents, **close)
    torch.testing.assert_close(model(latents=latents).logits, expected, **close)
    torch.testing.assert_close(model(features=plain.extract_features(pixels)).logits, expected, **close)
    for feature in ("query", "value"):
        found, wanted = (each.extract_features(pixels, feature=feature) for each in (model, plain))
        torch.testing.assert_close(found, wanted, **close)
    generated = [each.generate_latents(2, num_steps=2) for each in (model, plain)]
    torch.testing.assert_close(*generated, rtol=1e-4, atol=1e-4)
    options = {"timesteps": [100, 500], "max_images": 6}
    selections = [select_timestep(each, pictures, **options) for each in (model, plain)]
    # The criterion standardizes, too, and images that differ in 1e-10 of the features' variance make much of rounding.
    torch.testing.assert_close(*(torch.tensor(each.scores) for each in selections), rtol=1e-2, atol=1e-3)
    model.apply_selection(selections[0])
    plain.apply_selection(selections[0])
    # Standardizing divides by how little the images differ, and enlarges rounding by as much.
    rough = {"rtol": 1e-2, "atol": 5e-3}
    torch.testing.assert_close(model(pixels).logits, plain(pixels).logits, **rough)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again")(pixels).logits, plain(pixels).logits, **rough)
    # A step of a training: what is trainable gets a gradient.
    model.train()(pixels, labels=torch.tensor([0, 1])).loss.backward()


@pytest.mark.parametrize("offload", [cpu_offload, all_on_disk, auto_that_splits, vae_stored_in_8_bits])
@pytest.mark.parametrize("what", ["tokens", "latents"])
def test_what_is_offloaded_has_the_same_cache(saved, pictures, tmp_path, offload, what):
    saved, features = saved["sd3"], datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": pictures}, features=features)
    found = cache_features(offload(saved, tmp_path), dataset, tmp_path / "cache", what=what)
    expected = cache_features(load(saved), dataset, tmp_path / "cache", what=what)
    # A VAE that is rounded is another one.
    is_same = offload is not vae_stored_in_8_bits
    assert (found.cache_files == expected.cache_files) == is_same


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("replace_head", [False, True])
@pytest.mark.parametrize("offload", [way for way in WAYS if "8_bits" not in way.__name__])
def test_a_head_is_fitted_on_an_offloaded_model(saved, tmp_path, offload, replace_head):
    """Head and all; the head stays in memory from then on."""
    folder = saved["pixart_alpha"]
    if replace_head:
        torch.manual_seed(0)
        options = {"head": "attention", "head_hidden_size": 16, "head_num_attention_heads": 2}
        load(folder, ignore_mismatched_sizes=True, **options).save_pretrained(tmp_path / "attention")
        folder = tmp_path / "attention"
    rows = {"pixel_values": images_of(load(folder), num=8), "labels": torch.arange(8) % 2}
    model, plain = offload(folder, tmp_path), load(folder)
    fits = [each.fit_head(rows, replace_head=replace_head) for each in (model, plain)]
    assert fits[0].strength == fits[1].strength
    expected = plain(rows["pixel_values"]).logits
    torch.testing.assert_close(model(rows["pixel_values"]).logits, expected)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again")(rows["pixel_values"]).logits, expected)


def test_what_cannot_be_done_says_so_in_a_line(saved, tmp_path):
    saved = saved["sd3"]
    model = cpu_offload(saved, tmp_path)
    with pytest.raises(ValueError, match=r"not in memory\. Load it without offloading to fold it"):
        model.fold()
    rows = {"pixel_values": images_of(load(saved), num=8), "labels": torch.arange(8) % 2}
    lost = load(saved)
    lost.classifier.to("meta")
    with pytest.raises(ValueError, match="is not in memory and has no accelerate hook"):
        lost.fit_head(rows)
    with pytest.raises(ValueError, match="is not in memory and has no accelerate hook"):
        lost.save_pretrained(tmp_path / "lost")
