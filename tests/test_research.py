"""Weights by the names of the research code: converted, their hidden states are those of the original formulas."""

import argparse
import copy
import json
import math
import os
import re
import shutil
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import build_vae, denoiser_of
from diffusers import DDIMScheduler, DiTTransformer2DModel
from pipelines import RESEARCH, ResearchPort, position_table, research_shapes
from pipelines import research_weights as weights_of
from safetensors.torch import load_file, save_file
from torch import nn

from hf_aselect import (
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTModel,
    cache_features,
    convert_diffusers,
    convert_research,
    select_timestep,
)
from hf_aselect.checkpoints.diffusers import expected_shapes
from hf_aselect.checkpoints.layout_check import compare_layouts
from hf_aselect.checkpoints.research import _BLOCK, _EMBEDDERS, _WHOLE, LAYOUTS, ResearchWeights
from hf_aselect.cli import main
from hf_aselect.model.configuration_aselect import ASelectConfig
from hf_aselect.model.noise_schedule import NoiseSchedule

WIDTH, HEADS, DEPTH, CHANNELS, CLASSES, PATCH, SIDE = (
    RESEARCH[name] for name in ("width", "heads", "depth", "channels", "classes", "patch", "side")
)
TIMESTEPS = torch.tensor([20, 100, 300, 700])
# The time that the original code gives a noise level, t/1000 of noise.
TIMES = {"dit": TIMESTEPS.float(), "sit": 1 - TIMESTEPS / 1000, "repa": TIMESTEPS / 1000}


def reference(weights, latents, times, labels):
    """The original forward: what each block makes, and the prediction."""
    x = F.conv2d(latents, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + weights["pos_embed"]

    def linear(name, value):
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def modulated(value, shift, scale):
        return F.layer_norm(value, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    def split(value):
        return value.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    angles = times[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    embedded = torch.cat([angles.cos(), angles.sin()], -1)
    condition = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", embedded)))
    condition = F.silu(condition + weights["y_embedder.embedding_table.weight"][labels])
    hidden = []
    for block in range(DEPTH):
        name = f"blocks.{block}"
        six = linear(f"{name}.adaLN_modulation.1", condition)[:, None].chunk(6, -1)
        query, key, value = linear(f"{name}.attn.qkv", modulated(x, six[0], six[1])).chunk(3, -1)
        attended = F.scaled_dot_product_attention(split(query), split(key), split(value)).transpose(1, 2).flatten(2)
        x = x + six[2] * linear(f"{name}.attn.proj", attended)
        inner = F.gelu(linear(f"{name}.mlp.fc1", modulated(x, six[3], six[4])), approximate="tanh")
        x = x + six[5] * linear(f"{name}.mlp.fc2", inner)
        hidden.append(x)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, -1)
    patches = linear("final_layer.linear", modulated(x, shift, scale))
    grid = patches.unflatten(1, (SIDE // PATCH,) * 2).unflatten(-1, (PATCH, PATCH, -1))
    return hidden, torch.einsum("nhwpqc->nchpwq", grid).flatten(4).flatten(2, 3)


def save(weights, path):
    """Save weights as the suffix has it."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def convert(source, output, **options):
    given = {"layout": "sit", "num_attention_heads": HEADS, "allow_pickle": True, **options}
    return convert_research(source, output, **given)


@pytest.fixture
def noised():
    return torch.randn(4, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pickled(tmp_path):
    (tmp_path / "in").mkdir()
    return save(weights_of(), tmp_path / "in" / "weights.pt")


@pytest.fixture
def vae_folder(tmp_path):
    build_vae().save_pretrained(tmp_path / "vae-of-latents")
    return tmp_path / "vae-of-latents"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_hidden_states_and_predictions_are_those_of_the_original_formula(layout, suffix, noised, tmp_path):
    weights = weights_of(outputs=2 * CHANNELS if layout != "repa" else CHANNELS)
    convert(save(weights, tmp_path / f"weights{suffix}"), tmp_path / "out", layout=layout)
    model = DiTModel.from_pretrained(tmp_path / "out", timestep=5)
    labels = torch.full((4,), CLASSES)
    with torch.no_grad():
        expected, output = reference(weights, noised, TIMES[layout], labels)
        found = model.denoiser.read_taps(noised, TIMESTEPS, [(block, "hidden") for block in range(DEPTH)])
        predicted = model.denoiser.predict(noised, TIMESTEPS, labels)
    for block in range(DEPTH):
        torch.testing.assert_close(found[block, "hidden"], expected[block], rtol=1e-5, atol=1e-5)
    # SiT's velocity points to the image, and what a variance was learned for is left out.
    sign = -1 if layout == "sit" else 1
    torch.testing.assert_close(predicted, sign * output[:, :CHANNELS], rtol=1e-4, atol=1e-4)
    assert model.config.scheduler == LAYOUTS[layout].scheduler
    assert model.config.transformer["norm_eps"] == 1e-6


# Width, blocks and heads of the published sizes.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_read_off_the_tensors(size, patch):
    width, depth, heads = SIZES[size]
    shapes = research_shapes(width, depth, patch)
    table = position_table(width, 32 // patch)
    weights = ResearchWeights("there", shapes, lambda _: iter([("pos_embed", table)]), {})
    transformer = weights.transformer()
    assert transformer["num_attention_heads"] == heads
    assert transformer["attention_head_dim"] == (72 if size == "XL" else 64)
    sizes = {"num_layers": depth, "patch_size": patch, "sample_size": 32, "in_channels": 4, "out_channels": 8}
    assert {**sizes, "num_embeds_ada_norm": 1000}.items() <= transformer.items()
    expected = expected_shapes(ASelectConfig(transformer=transformer))
    weights.check_shapes(expected)
    # Every tensor of the model has its source.
    mapped = {key for name in weights.names if name != "pos_embed" for key, _ in weights._mapped(name, torch.empty(3))}
    assert {f"denoiser.transformer.{key}" for key in mapped} == expected.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folded_it_reads_alike(layout, tmp_path, noised):
    convert(save(weights_of(), tmp_path / "weights.pt"), tmp_path / "out", layout=layout)
    model = DiTModel.from_pretrained(tmp_path / "out", timestep=300, block=2, feature="hidden")
    folded = model.fold()
    assert folded.config.folding.mlp_norm_eps == 1e-6
    with torch.no_grad():
        expected, _ = reference(weights_of(), noised, TIMES[layout][2].expand(4), torch.full((4,), CLASSES))
        found = folded.denoiser.read_taps(noised, 300, [(2, "hidden")])[2, "hidden"]
    torch.testing.assert_close(found, expected[2], rtol=1e-4, atol=1e-4)


def test_averaged_weights_are_taken_and_the_rest_of_a_training_is_left(tmp_path, noised):
    ema, other = weights_of(seed=1), weights_of(seed=2)
    training = {"model": other, "ema": ema, "opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "steps": 7}
    # As the trainings of DiT, SiT and REPA save their options.
    training["args"] = argparse.Namespace(model="SiT-XL/2", lr=1e-4, results_dir=None)
    convert(save(training, tmp_path / "0400000.pt"), tmp_path / "out", layout="dit")
    model = DiTModel.from_pretrained(tmp_path / "out", timestep=5)
    assert torch.equal(model.denoiser.transformer.pos_embed.proj.weight, ema["x_embedder.proj.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "ema.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    weights = weights_of()
    given = {f"{prefix}{name}": value for name, value in weights.items()}
    if "ema" in prefix:
        given |= {f"model.{name}": value for name, value in weights_of(seed=3).items()}
    convert(save(given, tmp_path / "weights.safetensors"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["denoiser.transformer.proj_out_2.weight"], weights["final_layer.linear.weight"])


@pytest.mark.parametrize(
    ("layout", "outputs", "extra", "sign"),
    [
        ("repa", 2 * CHANNELS, {}, "outputs for a variance, like DiT and SiT"),
        ("sit", CHANNELS, {"projectors.0.0.bias": torch.zeros(3)}, "`projectors`, which only REPA trains"),
        ("repa", CHANNELS, {"projectors.0.0.bias": torch.zeros(3)}, None),
        ("sit", 2 * CHANNELS, {}, None),
        ("dit", CHANNELS, {"ap_head.linear1.bias": torch.zeros(3)}, None),
    ],
)
def test_tensors_that_speak_against_the_layout_are_refused(tmp_path, caplog, layout, outputs, extra, sign):
    path = save(weights_of(outputs=outputs) | extra, tmp_path / "weights.safetensors")
    said = f"is {layout!r}, but it has {sign}."
    if sign is not None:
        with pytest.raises(ValueError, match=rf"{re.escape(said)} Pass `layout=` .*`check_layout=False` \(`--no-lay"):
            convert(path, tmp_path / "out", layout=layout)
        with pytest.raises(ValueError, match=re.escape(said)):
            DiTModel.from_pretrained(tmp_path, layout=layout, num_attention_heads=HEADS, timestep=5)
        assert [each.name for each in tmp_path.iterdir()] == ["weights.safetensors"]
    with caplog.at_level("WARNING", logger="hf_aselect"):
        convert(path, tmp_path / "out", layout=layout, check_layout=False)
        given = {"layout": layout, "num_attention_heads": HEADS, "timestep": 5, "check_layout": False}
        (tmp_path / "in").mkdir()
        DiTModel.from_pretrained(path.rename(tmp_path / "in" / path.name).parent, **given)
    assert caplog.text.count(said) == (0 if sign is None else 2)
    assert "was not checked" not in caplog.text


@pytest.mark.parametrize("head", ["projectors.0.0", "ap_head.linear1"])
def test_heads_of_an_alignment_are_dropped_with_a_line(tmp_path, caplog, head):
    weights = weights_of() | {f"{head}.{kind}": torch.zeros(3, 3) for kind in ("weight", "bias")}
    with caplog.at_level("WARNING", logger="hf_aselect"):
        convert(save(weights, tmp_path / "repa.pt"), tmp_path / "out", layout="repa")
    assert f"2 tensors of '{tmp_path / 'repa.pt'}' ({head.split('.')[0]}.*)".replace("'", "") in caplog.text
    assert not any(head in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_blocks_that_repa_counted_anew_follow_the_others(tmp_path):
    weights = weights_of()
    legacy = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in weights.items()}
    convert(save(weights, tmp_path / "new.pt"), tmp_path / "out")
    convert(save(legacy, tmp_path / "old.pt"), tmp_path / "legacy")
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "legacy"))
    assert all(torch.equal(new[name], value) for name, value in old.items())


def port(folder, scheduler=None, vae=None, **config):
    """A port in diffusers' folders that keeps the research names."""
    ResearchPort(scheduler, vae, **config).save_pretrained(folder)
    return folder


def test_a_port_in_folders_of_diffusers_is_loaded(tmp_path, noised):
    folder = port(tmp_path / "port", vae=build_vae())
    model = DiTModel.from_pretrained(folder, layout="sit", timestep=5)
    with torch.no_grad():
        expected, _ = reference(weights_of(outputs=8), noised, TIMES["sit"], torch.full((4,), CLASSES))
        found = model.denoiser.read_taps(noised, TIMESTEPS, [(2, "hidden")])[2, "hidden"]
    torch.testing.assert_close(found, expected[2], rtol=1e-5, atol=1e-5)
    assert model.config.timestep_embedding == "sit"
    assert model.config.num_channels == 3
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 16, 16)).last_hidden_state.isfinite().all()
    # Its own word for the same, in a task model.
    again = DiTForImageClassification.from_pretrained(folder, timestep_embedding="sit", timestep=5, num_labels=2)
    assert again.config.transformer == model.config.transformer
    # Copies of the embedders are tensors of their own.
    parameters = list(again.parameters())
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)


@pytest.mark.parametrize("function", [convert_research, convert_diffusers])
def test_a_port_is_converted_and_reads_alike(tmp_path, noised, function):
    folder = port(tmp_path / "port", vae=build_vae())
    made = function(folder, tmp_path / "out", layout="sit", max_shard_size=50_000)
    assert made.vae_decoder_bytes > 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    direct = DiTModel.from_pretrained(folder, layout="sit", timestep=5)
    written = DiTModel.from_pretrained(tmp_path / "out", timestep=5)
    assert direct.state_dict().keys() == written.state_dict().keys()
    assert all(torch.equal(value, written.state_dict()[name]) for name, value in direct.state_dict().items())


def test_safetensors_of_any_name_in_a_folder_are_loaded(tmp_path, vae_folder):
    (tmp_path / "bare").mkdir()
    save_file(weights_of(), tmp_path / "bare" / "SiT-tiny.safetensors")
    given = {"layout": "repa", "num_attention_heads": HEADS, "timestep": 5}
    assert DiTModel.from_pretrained(tmp_path / "bare", **given).config.num_channels == CHANNELS
    shutil.copytree(vae_folder, tmp_path / "bare" / "vae")
    assert DiTModel.from_pretrained(tmp_path / "bare", **given).config.num_channels == 3
    # What the research code's configuration says beside them.
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"num_heads": HEADS, "input_size": SIDE}))
    assert DiTModel.from_pretrained(tmp_path / "bare", layout="sit", timestep=5).config.num_attention_heads == HEADS
    save_file(weights_of(), tmp_path / "bare" / "SiT-other.safetensors")
    with pytest.raises(ValueError, match=r"has several research checkpoints \(SiT-other.*SiT-tiny"):
        DiTModel.from_pretrained(tmp_path / "bare", **given)


def test_a_vae_is_taken_from_a_folder_or_a_pipeline(pickled, tmp_path, vae_folder):
    convert(pickled, tmp_path / "one", vae=vae_folder)
    port(tmp_path / "pipeline", vae=build_vae())
    convert(pickled, tmp_path / "two", vae=tmp_path / "pipeline")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(name.startswith("vae.encoder.") for name in one)
    assert not any("decoder" in name for name in one)


@pytest.mark.parametrize("form", ["name", "path", "object", "pipeline"])
def test_a_vae_is_given_where_weights_are_loaded(tmp_path, vae_folder, form, noised):
    folder = port(tmp_path / "port")
    given = {"name": str(vae_folder), "path": vae_folder, "object": build_vae()}
    if form == "pipeline":
        given["pipeline"] = port(tmp_path / "pipeline", vae=build_vae())
    model = DiTModel.from_pretrained(folder, layout="sit", timestep=5, vae=given[form])
    assert model.config.num_channels == 3 and not model.config.takes_latents
    expected = build_vae().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.vae.state_dict().items())


@pytest.mark.parametrize(
    ("vae", "words"),
    [
        ("./nowhere", "is neither a local folder nor an id on the Hub"),
        ("no-one/no-vae", "nor in the cache"),
        ("port", "has no supported VAE"),
    ],
)
def test_a_vae_that_is_none_is_refused_in_words(tmp_path, monkeypatch, vae, words):
    monkeypatch.chdir(tmp_path)
    port(tmp_path / "port")
    with pytest.raises((ValueError, OSError), match=words):
        DiTModel.from_pretrained("port", layout="sit", timestep=5, vae=vae)


def test_a_converted_checkpoint_has_its_own_vae_or_none(pickled, tmp_path, vae_folder):
    convert(pickled, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"cannot be used, because .* is an hf_aselect checkpoint.*`hf-aselect convert"
    ):
        DiTModel.from_pretrained(tmp_path / "out", timestep=5, vae=vae_folder)


def test_a_model_that_takes_latents_says_so_where_it_is_given_images(pickled, tmp_path, pictures, caplog):
    with caplog.at_level("WARNING", logger="hf_aselect"):
        convert(pickled, tmp_path / "out", timestep=5)
    assert "so the model accepts only latents. To use images, pass `vae=` (`--vae`)" in caplog.text
    model = DiTModel.from_pretrained(tmp_path / "out")
    words = r"takes latents of 4 channels and no images: it has no VAE\. Load or convert it with one \(`vae=`"
    with pytest.raises(ValueError, match=f"^`pixel_values` have 3 channels. The model {words}"):
        model(torch.zeros(1, 3, 16, 16))
    for read in (
        lambda: select_timestep(model, pictures),
        lambda: ASelectImageProcessor.from_model_config(model.config)(pictures),
        lambda: cache_features(model, [{"image": each} for each in pictures], tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match=f"^`num_channels` .*{words}"):
            read()


@pytest.mark.parametrize("source", ["file", "port"])
def test_whose_weights_they_are_is_asked_for(source, pickled, tmp_path):
    path = pickled if source == "file" else port(tmp_path / "in" / "port")
    words = r"do not show which. Pass `layout=` \(`hf-aselect convert --layout`\): 'dit': .*; 'sit': .*; 'repa': "
    with pytest.raises(ValueError, match=words):
        convert(path, tmp_path / "out", layout=None)
    if source == "port":
        with pytest.raises(ValueError, match=words):
            DiTModel.from_pretrained(path, timestep=5)
        with pytest.raises(ValueError, match=words):
            convert_diffusers(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    """Writes a file when it is unpickled as Python does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def change(path, edit):
    weights = torch.load(path, weights_only=True)
    weights = edit(weights) or weights
    torch.save(weights, path)


OTHERS = {
    "JiT": {"net.x_embedder.proj1.weight": (4, 4), "net.blocks.0.mlp.w12.weight": (4, 4)},
    "RAE": {"s_embedder.proj.weight": (4, 4), "blocks.0.mlp.w12.weight": (4, 4)},
    "REG": {"cls_projectors2.weight": (4, 4), "wg_norm.weight": (4,)},
    "MDT": {"sideblocks.0.attn.qkv.weight": (4, 4)},
    "MaskDiT": {"decoder_pos_embed": (1, 4, 4), "decoder_blocks.0.attn.qkv.weight": (4, 4)},
    "U-ViT": {"in_blocks.0.attn.qkv.weight": (4, 4)},
    "LightningDiT": {"blocks.0.mlp.w12.weight": (4, 4), "blocks.0.norm1.weight": (4,)},
    "a DiT that normalizes": {"blocks.0.attn.q_norm.weight": (4,)},
    "a DiT with rotary positions": {"rope.freqs": (4, 4)},
    "a DiT with gated MLPs": {"blocks.0.mlp.gate_proj.weight": (4, 4)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_other_architectures_are_known_by_their_tensors(name, form, tmp_path):
    given = {key: torch.zeros(shape) for key, shape in OTHERS[name].items()}
    weights = weights_of() | {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)} | given
    (tmp_path / "in").mkdir()
    path = save(weights, tmp_path / "in" / "model.safetensors")
    words = rf"the weights of {name}.*cannot be converted: a DiTTransformer2DModel has no "
    with pytest.raises(ValueError, match=words):
        convert(path if form == "file" else path.parent, tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        DiTModel.from_pretrained(path.parent, timestep=5)
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def replaced(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize("class_name", ["LightningDiT2DModel", "JiTTransformer2DModel"])
def test_other_architectures_are_known_by_their_class(class_name, tmp_path):
    DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": class_name}))
    with pytest.raises(ValueError, match=f"{class_name} is not supported: it has rotary positions"):
        DiTModel.from_pretrained(tmp_path, timestep=5)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("blocks.1.attn.proj"), r"lacks 2 tensors of a DiT with 3 blocks, such as blocks.1.attn.proj.bias"),
        (
            lambda weights: {name.replace("fc1", "up"): value for name, value in weights.items()},
            r"lacks 6 tensors .* blocks.0.mlp.fc1.bias.* has blocks.0.mlp.up.bias, .* instead",
        ),
        (without("y_embedder"), "lacks 1 tensors .* y_embedder.embedding_table.weight"),
        (without("pos_embed"), "has no `pos_embed`, so the size of its latents is unknown"),
        (
            replaced("blocks.0.cross.weight", torch.zeros(2)),
            "1 tensors that a DiT does not have, .* blocks.0.cross.weight",
        ),
        (replaced("pos_embed", torch.randn(1, 16, WIDTH)), "has a learned `pos_embed`"),
        (replaced("pos_embed", position_table(WIDTH, 4)[:, :12]), "has a learned `pos_embed`"),
        (replaced("x_embedder.proj.weight", torch.zeros(WIDTH, 16)), "must have 4 dimensions, got shape"),
        (replaced("blocks.0.mlp.fc1.weight", torch.zeros(3 * WIDTH, WIDTH)), "its MLPs are 3 times as wide"),
        (replaced("final_layer.linear.weight", torch.zeros(20, WIDTH)), "it predicts 5 channels from 4"),
        (replaced("x_embedder.proj.weight", torch.zeros(WIDTH, 4, 0, 0)), "is not a standard DiT"),
        (replaced("x_embedder.proj.weight", torch.zeros(WIDTH, 4, 2, 4)), r"has shape \(64, 4, 2, 4\)"),
        (replaced("blocks.2.attn.qkv.bias", torch.zeros(5)), r"'blocks.2.attn.qkv.bias' .* has shape \(5,\)"),
        (replaced("blocks.1.mlp.fc2.bias", torch.zeros(5)), r"'blocks.1.mlp.fc2.bias' .* has shape \(5,\)"),
        (replaced("blocks.1.mlp.fc2.bias", torch.zeros(WIDTH, dtype=torch.int8)), "int8"),
        (lambda _: {"epoch": 3}, r"must contain a dictionary of weights, got a dict of \['epoch'\]"),
        (
            lambda _: {"state_dict": {"epoch": 3}},
            r"must contain a dictionary of weights, got a dict of \['state_dict'\]",
        ),
        (
            lambda _: {"fc.weight": torch.zeros(2)},
            "has no weights in the layout of the DiT, SiT or REPA research code.*'fc.weight'",
        ),
        (lambda _: [torch.zeros(2)], r"must contain a dictionary of weights, got a list\."),
    ],
)
def test_weights_that_are_no_dit_are_refused_before_anything_is_written(pickled, tmp_path, edit, words):
    change(pickled, edit)
    with pytest.raises(ValueError, match=words):
        convert(pickled, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allow_pickle": False}, r"is a pickle, .* Pass `allow_pickle=True` \(`--allow-pickle`\)"),
        ({"layout": "flux"}, "`layout` must be one of dit, sit, repa, got 'flux'"),
        ({"timestep_embedding": "repa"}, "`timestep_embedding='repa'` conflicts with `layout='sit'`"),
        (
            {"num_attention_heads": None},
            "has a width of 64, which matches none of the published sizes .* `num_attention_heads=",
        ),
        ({"num_attention_heads": 7}, "must be an integer that divides 64, got 7"),
        ({"vae": "no/such/folder/here"}, "'no/such/folder/here' is neither a local folder nor an id on the Hub"),
        ({"vae": "./nowhere"}, "is neither a local folder nor an id on the Hub"),
        ({"vae": "in"}, "has no supported VAE"),
        ({"vae": "in/weights.pt"}, "`vae` must be a folder .*, got the file 'in/weights.pt'"),
        ({"timestp": 5}, "no field `timestp`"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(pickled, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        convert(pickled, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"depth": 4}, "has depth=4, but the tensors have 3"),
        ({"hidden_size": 128}, "has hidden_size=128, but the tensors have 64"),
        ({"patch_size": 4}, "has patch_size=4, but the tensors have 2"),
        ({"input_size": 16}, "has input_size=16, but the tensors have 8"),
        ({"num_classes": 1000}, "has num_classes=1000, but the tensors have 10"),
        ({"learn_sigma": False}, "has learn_sigma=False, but the tensors have True"),
        ({"num_heads": 7}, "must be an integer that divides 64, got 7"),
        ({"attention_head_dim": 8}, "has attention_head_dim=8, but the tensors have 16"),
        ({"qk_norm": True}, "has qk_norm=True"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(tmp_path, config, words):
    folder = port(tmp_path / "port", **config)
    with pytest.raises(ValueError, match=words):
        convert_research(folder, tmp_path / "out", layout="sit")
    with pytest.raises(ValueError, match=words):
        DiTModel.from_pretrained(folder, layout="sit", timestep=5)
    assert [path.name for path in tmp_path.iterdir()] == ["port"]


def test_a_scheduler_of_another_kind_contradicts_the_layout(tmp_path):
    folder = port(tmp_path / "port", scheduler=DDIMScheduler())
    model = DiTModel.from_pretrained(folder, layout="dit", timestep=5)
    assert model.config.scheduler["_class_name"] == "DDIMScheduler"
    with pytest.raises(
        ValueError, match=r"scheduler of .* is a DDIMScheduler, which does not match the layout .flow matching"
    ):
        DiTModel.from_pretrained(folder, layout="sit", timestep=5)


def test_a_prompt_is_no_option_of_research_weights(tmp_path):
    with pytest.raises(
        ValueError, match="`prompt_embeds` cannot be used with a DiTTransformer2DModel, which has no text"
    ):
        DiTModel.from_pretrained(port(tmp_path / "port"), layout="sit", timestep=5, prompt_embeds={})


def test_a_layout_is_no_option_of_what_diffusers_named(latent_folder):
    with pytest.raises(
        ValueError, match="`layout=` and `num_attention_heads=` are for weights of the DiT, SiT and REPA"
    ):
        DiTModel.from_pretrained(latent_folder, layout="sit", timestep=5)
    with pytest.raises(ValueError, match="has no weights in the layout of the DiT, SiT or REPA research code"):
        convert_research(latent_folder, latent_folder.parent / "never", layout="sit")


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")


BROKEN = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is truncated or not a PyTorch weights file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("not found\nat all\n"), "is a text file instead of a PyTorch weights file"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "a Git LFS pointer"),
    "zip": (zipped, "a zip archive instead of a PyTorch weights file"),
    "safetensors": (lambda path: save_file(weights_of(), path), "is a safetensors file. Rename it to .safetensors"),
    "old": (
        lambda path: torch.save(weights_of(), path, _use_new_zipfile_serialization=False),
        "is damaged or saved before torch 1.6",
    ),
    "code": (
        lambda path: torch.save(Bomb(path.with_name("ran")), path),
        r"more than tensors .'(posix|nt).mkdir'. and is not read",
    ),
    "code in a training": (
        lambda path: torch.save({"ema": weights_of(), "args": Bomb(path.with_name("ran"))}, path),
        r"more than tensors .'(posix|nt).mkdir'. and is not read",
    ),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_a_broken_pickle_and_one_with_code_are_refused(pickled, tmp_path, breakage):
    breaks, words = BROKEN[breakage]
    breaks(pickled)
    with pytest.raises(ValueError, match=f"weights.pt' .*{words}"):
        convert(pickled, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "weights.pt"]


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        ("empty", "is empty"),
        ("text", "is a text file instead of a safetensors file"),
        ("lfs", "a Git LFS pointer"),
        (
            "pickle",
            r"is a pickle \(saved by `torch\.save`\) instead of safetensors\. If it has research weights, rename it"
            r" to \.pt",
        ),
        ("old", "is a pickle"),
    ],
)
def test_safetensors_that_are_something_else_are_told_apart(pickled, tmp_path, breakage, words):
    if breakage != "pickle":
        BROKEN[breakage][0](pickled)
    path = pickled.rename(pickled.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match=words):
        convert(path, tmp_path / "out")
    assert [each.name for each in tmp_path.rglob("*")] == ["in", "weights.safetensors"]


NESTED = {
    "Lightning": lambda weights: {"state_dict": {f"model.{name}": value for name, value in weights.items()}},
    "Lightning with others": lambda weights: {
        "state_dict": {f"net.{name}": value for name, value in weights.items()} | {"vae.bias": torch.zeros(2)}
    },
    "twice": lambda weights: {"model": {"module": weights}, "epoch": 3},
    "an average that has no names": lambda weights: {"ema": {"shadow": list(weights.values())}, "model": weights},
    "an average inside": lambda weights: {"model": weights_of(seed=4), "state": {"ema_model": weights}},
    "any name": lambda weights: {"generator": weights, "discriminator": {"bias": torch.zeros(2)}},
    "compiled blocks": lambda weights: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in weights.items()
    },
    "checkpointed blocks of FSDP": lambda weights: {
        name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for name, value in weights.items()
    },
    "half": lambda weights: {name: value.half() for name, value in weights.items()},
    "parameters": lambda weights: {name: nn.Parameter(value) for name, value in weights.items()},
}


@pytest.mark.parametrize("form", NESTED)
def test_weights_are_found_in_whatever_holds_them(tmp_path, form):
    weights = weights_of()
    convert(save(NESTED[form](weights), tmp_path / "weights.ckpt"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for theirs, ours in (("final_layer.linear.weight", "proj_out_2.weight"), ("blocks.1.mlp.fc2.bias", None)):
        name = ours or "transformer_blocks.1.ff.net.2.bias"
        expected = weights[theirs].half() if form == "half" else weights[theirs]
        assert torch.equal(written[f"denoiser.transformer.{name}"], expected)


def test_weights_in_a_dictionary_that_holds_itself_are_found(tmp_path):
    weights = weights_of()
    expected = weights["final_layer.linear.weight"]
    weights["itself"] = weights
    convert(save(weights, tmp_path / "weights.pt"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["denoiser.transformer.proj_out_2.weight"], expected)


@pytest.mark.parametrize("options", [{"revision": "main"}, {"subfolder": "there"}, {"variant": "fp16"}])
def test_what_says_which_weights_to_take_has_no_meaning_for_a_file(pickled, tmp_path, vae_folder, options, capsys):
    ((name, value),) = options.items()
    words = f"`{name}='{value}'` can only be used with a folder .* but '.*weights.pt' is a single file"
    with pytest.raises(ValueError, match=words):
        convert(pickled, tmp_path / "out", **options)
    given = ["--layout", "sit", "--allow-pickle", f"--{name}", value]
    assert main(["convert", str(pickled), str(tmp_path / "out"), *given]) == 1
    assert f"`{name}='{value}'` can only be used with a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if name == "variant":  # of a VAE there may be one
        convert(pickled, tmp_path / "out", vae=vae_folder, **options)


def test_a_truncated_safetensors_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    path = save(weights_of(), tmp_path / "in" / "weights.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        convert(path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"other\.pt' does not exist"):
        convert(tmp_path / "in" / "other.pt", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def test_loading_never_unpickles(pickled, tmp_path):
    torch.save(Bomb(tmp_path / "ran"), pickled)
    with pytest.raises(ValueError, match=r"is not a supported checkpoint.* convert FILE OUTPUT --layout"):
        DiTModel.from_pretrained(pickled.parent, layout="sit", timestep=5)
    pickled.rename(pickled.with_name("model.pt"))
    with pytest.raises(ValueError, match="has only pickled weights"):
        DiTModel.from_pretrained(pickled.parent, layout="sit", timestep=5)
    assert not (tmp_path / "ran").exists()


def test_a_table_of_as_many_labels_as_classes_is_told_of(tmp_path, caplog):
    weights = weights_of(classes=9)
    with caplog.at_level("WARNING", logger="hf_aselect"):
        convert(save(weights, tmp_path / "weights.pt"), tmp_path / "out")
    assert "embeddings for 10 labels. The last is assumed to be the null label" in caplog.text


# What the losses tell of the layout.


@pytest.fixture(scope="module")
def trained():
    """A DiT in pixel space that is trained for a moment as REPA's are."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        in_channels=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1,
        norm_eps=1e-6,
    )
    first, second = (block.norm1 for block in transformer.transformer_blocks)
    second.emb = first.emb  # one for all blocks, as in the research code
    denoiser, schedule = denoiser_of(transformer, "repa"), NoiseSchedule.flow_matching()
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    for _ in range(150):
        images, noise = drawn(32, generator), torch.randn(32, 1, 8, 8, generator=generator)
        timesteps = torch.randint(0, 1000, (32,), generator=generator)
        noised = schedule.add_noise(images, noise, timesteps)
        loss = F.mse_loss(denoiser.predict(noised, timesteps, torch.ones(32, dtype=torch.long)), noise - images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    second.emb = copy.deepcopy(first.emb)
    return transformer.eval()


def drawn(num, generator):
    """Images of four smooth patterns."""
    base = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    patterns = nn.functional.interpolate(base, size=8, mode="bilinear").mul(2).clamp(-1, 1)
    return patterns[torch.randint(0, 4, (num,), generator=generator)]


@pytest.fixture
def as_research(trained, tmp_path):
    """The same by the names of the research code."""
    theirs, whole, kinds = trained.state_dict(), {}, ("weight", "bias")
    for name, key in [*_WHOLE.items(), *((each, f"transformer_blocks.0.{key}") for each, key in _EMBEDDERS.items())]:
        whole |= {f"{name}.{kind}": theirs[f"{key}.{kind}"] for kind in kinds if f"{key}.{kind}" in theirs}
    for block in range(2):
        at = f"transformer_blocks.{block}"
        for kind in kinds:
            third = [theirs[f"{at}.attn1.to_{letter}.{kind}"] for letter in "qkv"]
            whole[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(third)
            whole |= {f"blocks.{block}.{part}.{kind}": theirs[f"{at}.{key}.{kind}"] for part, key in _BLOCK.items()}
    (tmp_path / "in").mkdir()
    whole["pos_embed"] = position_table(32, 4)
    save_file({name: value.clone() for name, value in whole.items()}, tmp_path / "in" / "weights.safetensors")
    return tmp_path / "in" / "weights.safetensors"


@pytest.mark.parametrize("timestep", [5, "auto"])
@pytest.mark.parametrize("said", LAYOUTS)
def test_a_layout_that_losses_contradict_is_not_converted(as_research, said, timestep, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hf_aselect.checkpoints.convert._select", lambda *_: None)
    images = drawn(8, torch.Generator().manual_seed(3))
    given = {"layout": said, "num_attention_heads": 2, "calibration_images": images, "timestep": timestep}
    if said != "repa":
        words = rf"`layout` is '{said}', .* far better as 'repa'.*1\.25.*`layout='repa'` .*`--no-layout-check`"
        with pytest.raises(ValueError, match=words):
            convert_research(as_research, tmp_path / "out", **given)
        assert [each.name for each in tmp_path.iterdir()] == ["in"]
    with caplog.at_level("WARNING", logger="hf_aselect"):
        convert_research(as_research, tmp_path / "out", check_layout=said == "repa", **given)
    assert "layout" not in caplog.text
    assert ASelectConfig.from_pretrained(tmp_path / "out").timestep_embedding == LAYOUTS[said].timestep_embedding


def test_loading_warns_of_a_layout_that_the_losses_contradict(as_research, caplog):
    images = drawn(8, torch.Generator().manual_seed(3))
    given = {"num_attention_heads": 2, "calibration_images": images, "timestep": 5}
    with caplog.at_level("WARNING", logger="hf_aselect"):
        for said, checked, is_warned in (("sit", True, True), ("sit", False, False), ("repa", True, False)):
            caplog.clear()
            if checked:
                DiTModel.from_pretrained(as_research.parent, layout=said, **given)
            else:
                again = {**given, "timestep": "auto", "check_layout": False}
                DiTModel.from_pretrained(as_research.parent, layout=said, **again)
            assert ("far better as 'repa'" in caplog.text) == is_warned
            assert "was not checked" not in caplog.text


def test_what_could_not_be_checked_is_told(as_research, pickled_beside, pictures, caplog, tmp_path):
    def told(read, words):
        caplog.clear()
        with caplog.at_level("WARNING", logger="hf_aselect"):
            read()
        (line,) = [each.getMessage() for each in caplog.records if "`layout=" in each.getMessage()]
        assert line.startswith("`layout='sit'` ") and words in line

    given = {"layout": "sit", "num_attention_heads": 2, "timestep": 5}
    told(lambda: convert_research(as_research, tmp_path / "1", **given), "no images are given")
    told(lambda: DiTModel.from_pretrained(as_research.parent, **given), "no images are given")
    latent = {**given, "num_attention_heads": HEADS, "calibration_images": pictures}
    told(lambda: convert_research(pickled_beside, tmp_path / "2", allow_pickle=True, **latent), "the model has no VAE")
    latents = torch.rand(4, CHANNELS, SIDE, SIDE) * 2 - 1
    random = {**latent, "calibration_images": latents}
    words = "could not be checked: in no layout do the weights predict"
    told(lambda: convert_research(pickled_beside, tmp_path / "3", allow_pickle=True, **random), words)
    once = {**given, "calibration_images": iter(drawn(4, torch.Generator()))}
    told(lambda: convert_research(as_research, tmp_path / "4", **once), "the images can be read only once")


@pytest.fixture
def pickled_beside(tmp_path):
    return save(weights_of(), tmp_path / "weights.pt")


@pytest.mark.parametrize("said", LAYOUTS)
def test_a_layout_that_the_losses_contradict_is_warned_of(trained, said, tmp_path, caplog):
    trained.save_pretrained(tmp_path)
    fields = {"timestep_embedding": LAYOUTS[said].timestep_embedding, "scheduler": LAYOUTS[said].scheduler}
    model = DiTModel.from_pretrained(tmp_path, timestep=5, **fields)
    with caplog.at_level("WARNING", logger="hf_aselect"):
        losses = compare_layouts(model, drawn(8, torch.Generator().manual_seed(3)))
    assert min(losses, key=lambda name: losses[name]) == "repa"
    assert (f"`layout` is {said!r}" in caplog.text) == (said != "repa")
    assert model.denoiser.timestep_embedding == LAYOUTS[said].timestep_embedding


def test_loading_with_images_checks_the_layout(trained, tmp_path, caplog):
    trained.save_pretrained(tmp_path / "research")
    images = drawn(8, torch.Generator().manual_seed(3))
    options = {"timestep": "auto", "calibration_images": images, "scheduler": LAYOUTS["sit"].scheduler}
    for said, is_warned in (("sit", True), ("repa", False)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="hf_aselect"):
            DiTModel.from_pretrained(tmp_path / "research", timestep_embedding=said, **options)
        assert ("the weights predict the noise of 4 images far better as 'repa'" in caplog.text) == is_warned


# The command line.


def test_the_command_converts_and_selects(pickled, tmp_path, vae_folder, pictures, capsys, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for index, picture in enumerate(pictures):
        picture.save(images / f"{index}.png")
    looked = []
    monkeypatch.setattr("hf_aselect.checkpoints.convert.compare_layouts", lambda *given, **_: looked.append(given))
    words = ["convert", pickled, tmp_path / "out", "--layout", "sit", "--num-attention-heads", HEADS, "--allow-pickle"]
    words += ["--vae", vae_folder, "--timestep", "auto", "--images", images]
    assert main(list(map(str, words))) == 0
    assert f"Saved {tmp_path / 'out'}: " in capsys.readouterr().out
    config = ASelectConfig.from_pretrained(tmp_path / "out")
    assert config.timestep == config.selection["timestep"]
    assert config.selection["num_images"] == 6
    assert len(looked) == 1


@pytest.mark.parametrize("given", [[7], [7, 90]])
def test_the_command_writes_a_timestep_of_any_source(latent_folder, tmp_path, given):
    """One timestep was asked for; several are its sibling."""
    words = ["convert", str(latent_folder), str(tmp_path / "out"), "--timestep", *map(str, given)]
    assert main(words) == 0
    assert ASelectConfig.from_pretrained(tmp_path / "out").timestep == (given if len(given) > 1 else given[0])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--layout", "sit"], "is a pickle"),
        (["--allow-pickle"], "Pass `layout=` (`hf-aselect convert --layout`)"),
        (["--layout", "sit", "--allow-pickle", "--without", "text_encoder"], "`--without` names text encoders"),
        (["--layout", "sit", "--allow-pickle", "--timestep", "auto"], "`--timestep auto` needs `--images`"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(pickled, tmp_path, capsys, words, complaint):
    assert main(["convert", str(pickled), str(tmp_path / "out"), *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_options_of_research_weights_need_a_layout(latent_folder, tmp_path, capsys):
    assert main(["convert", str(latent_folder), str(tmp_path / "out"), "--allow-pickle"]) == 1
    assert "--allow-pickle: only for research weights. Pass `--layout`" in capsys.readouterr().err


def test_images_have_no_use_at_a_fixed_timestep(latent_folder, tmp_path, pictures):
    with pytest.raises(ValueError, match=r"`calibration_images` cannot be used with a fixed timestep .5"):
        convert_diffusers(latent_folder, tmp_path / "out", timestep=5, calibration_images=pictures)
    assert not list(tmp_path.iterdir())


def test_a_configuration_beside_a_file_is_heard(pickled, tmp_path):
    (pickled.parent / "config.json").write_text(json.dumps({"depth": DEPTH + 1}))
    with pytest.raises(ValueError, match="depth"):
        convert(pickled, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Of another checkpoint in the same folder.
    (pickled.parent / "config.json").write_text(json.dumps({"model_type": "vit", "depth": DEPTH + 1}))
    convert(pickled, tmp_path / "out")


def test_a_converted_checkpoint_knows_its_layout(pickled, tmp_path):
    convert(pickled, tmp_path / "out")
    with pytest.raises(ValueError, match=r"`layout='sit'` is for research weights, but .* Omit it"):
        DiTModel.from_pretrained(tmp_path / "out", layout="sit", timestep=5)
