"""What is particular to reading by hooks on a transformer's own call, and to families that users describe."""

import ast
import copy
import importlib
import json
import pickle
import shutil
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import generic_pipelines
import numpy as np
import pytest
import torch
from conftest import DESCRIBED, denoiser_of, example
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from generic_pipelines import GENERIC_PIPELINES, prediction_of
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from pipelines import LOAD_OPTIONS, randomized, video_vae
from pipelines import PIPELINES as FOLDED_PIPELINES
from test_denoiser_dit import TAPS, build_transformer
from test_vae import WAN22

from hf_aselect import (
    ASelectConfig,
    DiTForImageClassification,
    DiTModel,
    TransformerBlocks,
    TransformerFamily,
    convert_diffusers,
    register_family,
    transformer_layout,
)
from hf_aselect.checkpoints import empty_prompt
from hf_aselect.cli import main
from hf_aselect.model import denoisers, families
from hf_aselect.model.denoiser import Denoiser
from hf_aselect.model.denoisers import build_denoiser
from hf_aselect.model.families import FAMILIES, layout_of

READING_COST = example("benchmarks/reading_cost.py")
PIPELINES = {**FOLDED_PIPELINES, **{name: GENERIC_PIPELINES[name] for name in DESCRIBED}}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a family's tiny pipeline, saved when it is first asked for."""
    folders = {}

    def loaded(name, kind=DiTModel, **options):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            PIPELINES[name]().save_pretrained(folders[name])
        given = {"timestep": 141, **({} if name == "sana" else {"image_size": 64}), **LOAD_OPTIONS.get(name, {})}
        return kind.from_pretrained(folders[name], **{**given, **options})

    return loaded


@pytest.fixture
def registry():
    """What is registered in a test is forgotten after it."""
    known = dict(FAMILIES)
    yield FAMILIES
    FAMILIES.clear()
    FAMILIES.update(known)


def noised_of(model, size=2, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, model.denoiser.num_channels, height, width, generator=generator)


def shown_family(registry):
    """The family that contributors are shown."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    exec(text.split("## Adding a family")[1].split("```python\n")[1].split("```")[0], {})
    return registry["PlainTransformer2DModel"]


@pytest.mark.parametrize("name", PIPELINES)
def test_one_changed_patch_changes_one_token_of_the_patch_embedding(load, name):
    denoiser = load(name).denoiser
    side = denoiser.patch_size
    latents = torch.randn(1, denoiser.num_channels, 4 * side, 6 * side)
    changed = latents.clone()
    changed[:, :, 2 * side : 3 * side, 5 * side :] += 1
    with torch.no_grad():
        # What comes between patches and blocks looks at all of them.
        for refiner in getattr(denoiser.transformer, "noise_refiner", []):
            refiner.forward = lambda tokens, *_: tokens
        before, after = (denoiser(each, 5, -1, "hidden") for each in (latents, changed))
    assert before.shape[1] == 24
    assert (before - after).abs().sum((0, 2)).gt(1e-6).nonzero().flatten().tolist() == [2 * 6 + 5]


@pytest.mark.parametrize("name", PIPELINES)
def test_an_image_has_the_same_tokens_alone_and_in_a_batch(load, name):
    model = load(name)
    noised = noised_of(model, 3, 8, 12)
    taps = [(1, "query"), (model.config.num_hidden_layers - 1, "hidden")]
    with torch.no_grad():
        together, alone = model._read_taps(noised, 141, taps), model._read_taps(noised[1:2], 141, taps)
    for tap in taps:
        torch.testing.assert_close(together[tap][1:2], alone[tap], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_two_threads_read_as_one_does(load, name):
    model = load(name)
    every = [[(0, "query")], [(1, "hidden")], [(2, "normed"), (0, "value")], [(-1, "hidden"), (1, "attention")]]
    noised = [noised_of(model, seed=seed) for seed in range(4)]
    expected = [model._read_taps(*each) for each in zip(noised, [5, 141, 300, 999], every, strict=True)]
    wrong = []

    @torch.no_grad()
    def read(which):
        for _ in range(5):
            found = model._read_taps(noised[which], [5, 141, 300, 999][which], every[which])
            wrong.extend(tap for tap in every[which] if not torch.equal(found[tap], expected[which][tap]))

    threads = [threading.Thread(target=read, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_class_that_an_older_diffusers_lacks_is_named(monkeypatch):
    older = type("Older", (), {"__version__": "0.36.0"})()
    monkeypatch.setitem(sys.modules, "diffusers", older)
    with pytest.raises(ValueError, match="has no LongCatImageTransformer2DModel"):
        denoisers._build({"_class_name": "LongCatImageTransformer2DModel"})


@pytest.mark.parametrize("name", PIPELINES)
def test_tables_are_there_after_a_build_without_data(load, name):
    model = load(name)
    config = ASelectConfig(**model.config.to_dict())
    whole = build_denoiser(config)
    whole.load_state_dict(model.denoiser.state_dict())
    tensors = {key: value for key, value in whole.named_buffers() if not key.startswith("prompt")}
    found = dict(model.denoiser.named_buffers())
    for key, value in tensors.items():
        assert torch.equal(found[key], value), key
    noised = noised_of(model)
    with torch.no_grad():
        found, expected = whole.eval()(noised, 141, 2, "hidden"), model.denoiser(noised, 141, 2, "hidden")
        # How weights lie in memory decides by which way a CPU multiplies them.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        half = load(name, dtype=torch.bfloat16).float()
        close = half.denoiser(noised, 141, 2, "hidden") - model.denoiser(noised, 141, 2, "hidden")
    assert float(close.norm() / model.denoiser(noised, 141, 2, "hidden").norm()) < 0.02


@pytest.mark.parametrize("name", PIPELINES)
def test_timesteps_are_not_rounded_in_half_precision(load, name):
    """In bfloat16, 998 and 999 are both 1000."""
    model = load(name, dtype=torch.bfloat16)
    noised = noised_of(model).bfloat16()
    with torch.no_grad():
        tokens = [model.denoiser(noised, timestep, 1, "hidden") for timestep in (998, 999, 1000)]
        exact = [model.float().denoiser(noised.float(), timestep, 1, "hidden") for timestep in (998, 999, 1000)]
    assert not torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[1], tokens[2])
    for half, whole in zip(tokens, exact, strict=True):
        assert float((half.float() - whole).norm() / whole.norm()) < 0.05


def test_wan_22_of_5b_is_read_with_its_own_vae(tmp_path):
    """Its pipeline gives the transformer a timestep for each token, all of which are the same for one frame."""
    pipe = GENERIC_PIPELINES["wan"](
        vae=partial(video_vae, **WAN22), expand_timesteps=True, in_channels=4, out_channels=4
    )
    pipe.save_pretrained(tmp_path)
    model = DiTModel.from_pretrained(tmp_path, timestep=141, image_size=64)
    assert (model.config.vae_scale_factor, model.config.patch_pixels) == (16, 32)
    noised = noised_of(model)
    with torch.no_grad():
        expected = prediction_of("wan", pipe, noised, 141, pixels=16)
        found = model.denoiser.predict(noised, torch.full((2,), 141), torch.zeros(2))
        assert model(torch.rand(1, 3, 64, 64)).last_hidden_state.shape == (1, 4, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_cogview4_is_given_the_timestep_that_its_scheduler_has_for_a_noise_level(load):
    model, scheduler = load("cogview4"), GENERIC_PIPELINES["cogview4"]().scheduler
    timesteps = np.linspace(1000, 1, 10).astype(np.int64).astype(np.float32)
    # As the pipeline does for 48 × 64 tokens.
    scheduler.set_timesteps(timesteps=timesteps, sigmas=timesteps / 1000, mu=calculate_shift(48 * 64))
    inputs = model.denoiser._inputs(noised_of(model, 9, 96, 128), 1000 * scheduler.sigmas[1:10])
    given = model.denoiser.family.call(inputs)["timestep"]
    torch.testing.assert_close(given, scheduler.timesteps[1:], rtol=1e-5, atol=1e-3)
    # It is not a little: the noise is twice of what the timestep seems to say.
    assert float(1000 * scheduler.sigmas[8] / given[7]) > 2


def test_a_guidance_is_not_taken_for_the_timestep(tmp_path):
    """FLUX.2 [dev] embeds both by one module, of which timesteps are not rounded in half precision."""
    GENERIC_PIPELINES["flux2"](guidance_embeds=True).save_pretrained(tmp_path)
    given = {"timestep": 999, "prompt_embeds": {"prompt_embeds": torch.randn(1, 4, 24)}}
    with torch.no_grad():
        tokens = []
        for guidance in (1.0, 4.0):
            model = DiTModel.from_pretrained(tmp_path, guidance=guidance, dtype=torch.bfloat16, **given)
            noised = noised_of(model).bfloat16()
            tokens.append(model.denoiser(noised, 999, 1, "hidden"))
            whole = model.float().denoiser(noised.float(), 999, 1, "hidden")
            assert float((tokens[-1].float() - whole).norm() / whole.norm()) < 0.05
    assert not torch.equal(*tokens)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 exports none of them")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_family_is_compiled_and_exported(load, name):
    model = load(name)
    taps = [(0, "hidden"), (1, "query")]

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, noised):
            return tuple(model._read_taps(noised, 141, taps).values())

    noised, reader = noised_of(model), Reader().eval()
    with torch.no_grad():
        expected = reader(noised)
        torch._dynamo.reset()  # the same code is compiled for each family
        compiled = torch.compile(reader, backend="aot_eager", fullgraph=True)(noised)
        exported = torch.export.export(reader, (noised,), strict=False)
        for found in (compiled, exported.module()(noised)):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        # The blocks after the tap are in neither.
        everything = torch.export.export(Deep(model, model.config.num_hidden_layers - 1), (noised,), strict=False)
    assert len(exported.graph.nodes) < len(everything.graph.nodes)
    assert len(model.denoiser.blocks) == model.config.num_hidden_layers


class Deep(torch.nn.Module):
    """Reads the output of a block."""

    def __init__(self, model, block):
        super().__init__()
        self.model, self.block = model, block

    def forward(self, noised):
        return self.model._read_taps(noised, 141, [(self.block, "hidden")])[self.block, "hidden"]


@pytest.mark.parametrize("name", PIPELINES)
def test_an_offloaded_model_reads_as_one_in_memory(load, name):
    from accelerate import cpu_offload

    model, other = load(name), load(name)
    cpu_offload(other.denoiser, execution_device=torch.device("cpu"))
    noised = noised_of(model)
    taps = [(1, "query"), (2, "hidden")]
    with torch.no_grad():
        expected, found = model._read_taps(noised, 141, taps), other.denoiser.read_taps(noised, 141, taps)
        again = other.denoiser.read_taps(noised, 141, taps)
    for tap in taps:
        assert torch.equal(found[tap], expected[tap]) and torch.equal(again[tap], expected[tap])
    assert all(parameter.is_meta for parameter in other.denoiser.transformer.parameters())


class MixedTransformer2DModel(diffusers.DiTTransformer2DModel):
    """A DiT whose latents are mixed by a layer of torch that takes the weights of the layer inside of it."""

    def forward(self, hidden_states, **options):
        rows = hidden_states.flatten(2).mT
        mixed = self.mixer(rows, rows, rows)[0].mT.unflatten(2, hidden_states.shape[2:])
        return super().forward(hidden_states=hidden_states + mixed, **options)


@pytest.mark.parametrize("whole", [(), ("mixer",)])
def test_layers_that_are_never_called_are_brought_in_where_the_description_says_so(whole):
    from accelerate import cpu_offload

    transformer = randomized(MixedTransformer2DModel.from_config(build_transformer().config))
    transformer.mixer = torch.nn.MultiheadAttention(3, 1, batch_first=True)
    family = replace(FAMILIES["DiTTransformer2DModel"], whole_modules=whole)
    denoiser, other = (Denoiser(copy.deepcopy(transformer), family).eval() for _ in range(2))
    cpu_offload(other, execution_device=torch.device("cpu"))
    noised = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = denoiser(noised, 141, 1, "query")
        if not whole:
            with pytest.raises(RuntimeError, match="meta"):
                other(noised, 141, 1, "query")
            return
        for _ in range(2):
            assert torch.equal(other(noised, 141, 1, "query"), expected)
    assert all(parameter.is_meta for parameter in other.parameters())


def test_a_device_map_puts_layers_that_are_never_called_on_one_device(load):
    assert {"HunyuanDiTAttentionPool", "HunyuanDiTBlock"} <= load("hunyuan_dit")._no_split_modules


@pytest.mark.skipif(not hasattr(DiTModel, "activation_checkpointing_enable"), reason="of later transformers")
# By diffusers' own checkpoints, with blocks of one stream as well, and by ours where diffusers has none.
@pytest.mark.parametrize("name", ["z_image", "chroma", "lumina_next"])
def test_every_other_block_is_checkpointed_where_that_is_asked_for(load, name):
    model = load(name, block=2, feature="hidden", freeze_backbone=False).train()
    pixels, runs = torch.rand(1, 3, 64, 64), []
    for index, block in enumerate(model.denoiser.blocks[:3]):
        block.get_submodule(model.denoiser._parts()[index].attention).register_forward_pre_hook(
            lambda *_, index=index: runs.append(index)
        )
    gradients = []
    for number, expected in ((0, [0, 1, 2]), (2, [0, 1, 2, 0, 2]), (1, [0, 1, 2, 0, 1, 2])):
        if number:
            model.activation_checkpointing_enable(every_n_layers=number)
        runs.clear()
        model.zero_grad()
        model(pixels).last_hidden_state.sum().backward()
        assert sorted(runs) == sorted(expected)
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


def test_a_copy_and_a_pickle_read_as_the_model_does(load):
    model = load("z_image")
    noised = noised_of(model)
    with torch.no_grad():
        expected = model.denoiser(noised, 141, 1, "query")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.denoiser(noised, 141, 1, "query"), expected)
            assert other.denoiser.family is model.denoiser.family


def test_a_described_family_is_not_folded(load):
    with pytest.raises(ValueError, match="ZImageTransformer2DModel cannot be folded"):
        load("z_image").fold()


def edited(folder, copy_to, pipeline=None, **fields):
    """A copy of a pipeline of another class, or with other fields in its transformer's configuration."""
    shutil.copytree(folder, copy_to)
    index, config = copy_to / "model_index.json", copy_to / "transformer" / "config.json"
    if pipeline:
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": pipeline}))
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return copy_to


@pytest.mark.parametrize(
    ("name", "pipeline", "fields", "words"),
    [
        (
            "qwen_image",
            "QwenImageEditPlusPipeline",
            {},
            "of a QwenImageEditPlusPipeline is not supported: it was trained to edit an image",
        ),
        (
            "qwen_image",
            None,
            {"zero_cond_t": True},
            "with `zero_cond_t` is not supported: it was trained to edit an image",
        ),
        ("qwen_image", None, {"use_additional_t_cond": True}, "into several layers"),
        ("longcat", "LongCatImageEditPipeline", {}, "of a LongCatImageEditPipeline is not supported"),
        (
            "z_image",
            None,
            {"siglip_feat_dim": 8},
            "with `siglip_feat_dim` is not supported: it is conditioned on images",
        ),
        ("wan", "WanImageToVideoPipeline", {"image_dim": 8}, "with `image_dim` is not supported: it generates videos"),
        # Whose latents have more channels for it.
        (
            "wan",
            "WanImageToVideoPipeline",
            {"in_channels": 36},
            "takes latents of 36 channels, but the VAE returns 16",
        ),
    ],
)
def test_a_transformer_that_takes_an_image_besides_is_refused(load, name, pipeline, fields, words, tmp_path):
    folder = edited(load(name).name_or_path, tmp_path / "changed", pipeline, **fields)
    with pytest.raises((ValueError, StrictDataclassError), match=words):
        DiTModel.from_pretrained(folder, timestep=5)
    with pytest.raises((ValueError, StrictDataclassError), match=words):
        convert_diffusers(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flux_kontext_is_read_as_flux_is(tmp_path):
    """Its transformer was trained without an image to be edited, too: its pipeline makes images of a text alone."""
    FOLDED_PIPELINES["flux"]().save_pretrained(tmp_path / "flux")
    folder = edited(tmp_path / "flux", tmp_path / "kontext", "FluxKontextPipeline")
    one, other = (DiTModel.from_pretrained(each, timestep=141, image_size=64) for each in (tmp_path / "flux", folder))
    noised = noised_of(one)
    with torch.no_grad():
        assert torch.equal(one.denoiser(noised, 141, 1, "hidden"), other.denoiser(noised, 141, 1, "hidden"))


@pytest.mark.parametrize("form", ["pipeline", "saved"])
def test_the_command_refuses_to_fold_a_described_family_before_it_loads(load, form, tmp_path, capsys, monkeypatch):
    model = load("aura_flow")
    folder = model.name_or_path
    if form == "saved":
        model.save_pretrained(folder := tmp_path / "saved")
    monkeypatch.setattr(DiTModel, "from_pretrained", None)
    assert main(["fold", str(folder), str(tmp_path / "out"), "--timestep", "5"]) == 1
    assert "AuraFlowTransformer2DModel cannot be folded. Supported are DiT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def lines_of_families():
    """Lines of each described family: what it alone uses of descriptions, encoders of prompts and tiny pipelines."""
    trees = [ast.parse(Path(each.__file__).read_text()) for each in (families, empty_prompt, generic_pipelines)]
    defined = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}

    def names(node):
        found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        return found | {name for each in found & defined.keys() for name in names(defined[each])}

    parts = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "TransformerFamily":
            parts[node.args[0].value] = [node]
    (encoders,) = (each.value for each in trees[1].body if ast.unparse(each).startswith("_ENCODERS"))
    pipelines = {name: node for name, node in defined.items() if name in GENERIC_PIPELINES}
    for name, entry in zip(encoders.keys, encoders.values, strict=True):
        parts[name.value] += [entry, *(node for node in pipelines.values() if name.value in names(node))]
    used = {name: set().union(*map(names, nodes)) & defined.keys() for name, nodes in parts.items()}
    shared = Counter(name for each in used.values() for name in each)
    return {
        name: sum(node.end_lineno - node.lineno + 1 for node in nodes)
        + sum(defined[each].end_lineno - defined[each].lineno + 1 for each in used[name] if shared[each] == 1)
        for name, nodes in parts.items()
        if any(isinstance(node, ast.FunctionDef) for node in nodes)
    }


def test_a_family_takes_as_few_lines_as_contributors_are_told():
    """HunyuanDiT has two texts with masks, and positions, sizes and a style that its pipeline makes."""
    lines = lines_of_families()
    assert len(lines) == len(DESCRIBED)
    assert lines.pop("HunyuanDiT2DModel") <= 70
    assert max(lines.values()) <= 60, lines


def test_the_family_that_contributors_are_shown_reads_as_ours_does(registry, tmp_path):
    family = shown_family(registry)
    transformer = build_transformer()
    ours = denoiser_of(transformer).eval()
    config = {**transformer.config, "_class_name": family.name}
    model = DiTForImageClassification(ASelectConfig(transformer=config, timestep=141, num_labels=2)).eval()
    shown = model.backbone.denoiser
    shown.load_state_dict(ours.state_dict())
    noised, timesteps = torch.randn(2, 3, 8, 8), torch.full((2,), 141)
    with torch.no_grad():
        for block, feature in TAPS:
            assert torch.equal(shown(noised, timesteps, block, feature), ours(noised, timesteps, block, feature))
        labels = torch.tensor([0, 1])
        expected = ours.predict(noised, timesteps, labels)
        torch.testing.assert_close(shown.predict(noised, timesteps, labels), expected)
    # Saved with its description's name alone.
    model.save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 8, 8)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    del registry[family.name]
    with pytest.raises((ValueError, StrictDataclassError), match=r"'PlainTransformer2DModel'.*register_family"):
        DiTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 exports none of them")
def test_a_registered_family_is_compiled_and_exported(registry):
    """What is checked at its first pass is no part of a graph."""
    config = {**build_transformer().config, "_class_name": shown_family(registry).name}
    reader = Deep(DiTModel(ASelectConfig(transformer=config, timestep=5)), 1).eval()
    noised = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(reader, backend="aot_eager", fullgraph=True)(noised)
        exported = torch.export.export(reader, (noised,), strict=False).module()(noised)
        for found in (compiled, exported):
            torch.testing.assert_close(found, reader(noised), rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_code_reads_what_is_registered_with_the_package(registry, tmp_path, monkeypatch):
    """As where a checkpoint's own code runs: `trust_remote_code` copies it."""
    family = shown_family(registry)
    shutil.copytree(Path(families.__file__).parent, tmp_path / "copy_of_the_code")
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copy_of_the_code.families")
    assert copied.family_of(family.name) is family
    assert copied.family_of("SanaTransformer2DModel") is copied.FAMILIES["SanaTransformer2DModel"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by its old name
def test_lora_on_a_projection_is_in_what_is_read(load):
    model = load("z_image")
    noised = noised_of(model)
    with torch.no_grad():
        before = model.denoiser.read_taps(noised, 141, [(1, "query"), (1, "key"), (2, "hidden")])
        adapted = get_peft_model(model, LoraConfig(target_modules=["to_q"], init_lora_weights=False))
        after = adapted.base_model.model.denoiser.read_taps(noised, 141, [(1, "query"), (1, "key"), (2, "hidden")])
        projection = adapted.base_model.model.denoiser.blocks[1].attention.to_q
        normed = model.denoiser(noised, 141, 1, "normed")
    assert torch.equal(after[1, "query"], projection(normed))
    for tap in before:
        assert not torch.equal(after[tap], before[tap])


def test_what_is_no_description_is_not_registered(registry):
    family = shown_family(registry)
    with pytest.raises(ValueError, match="must be a `TransformerFamily`"):
        register_family("DiTTransformer2DModel")
    with pytest.raises(ValueError, match="whose `call` and `layout` are functions"):
        register_family(TransformerFamily("Another", (), transformer_layout))
    with pytest.raises(ValueError, match="`name` of a family must be a class name"):
        register_family(replace(family, name=DiTModel))
    for blocks in ((), TransformerBlocks(), ("transformer_blocks",)):
        with pytest.raises(ValueError, match=r"`blocks` of .* must be a tuple of `TransformerBlocks`"):
            register_family(replace(family, blocks=blocks))
    for name in ("DiTTransformer2DModel", "ZImageTransformer2DModel"):
        with pytest.raises(ValueError, match=f"{name} is supported by hf_aselect already"):
            register_family(TransformerFamily(name, family.sizes, family.layout, family.call))


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("name", ["", 7, None], "must be a class name"),
        ("name", ["PlainTransformer"], "must equal the name of its class"),
        ("sizes", ["num_layers", (1,), None, ("",)], "must be a tuple of names of fields"),
        ("blocks", [(), TransformerBlocks(), ("transformer_blocks",), None], "must be a tuple of `TransformerBlocks`"),
        ("tokens", [None, "last"], "must be a function, such as `last_tokens`"),
        ("output", [None, torch.zeros(1)], "must be a function of what `forward` returns"),
        (
            "prompt_fields",
            ["prompt_embeds", {"prompt_embeds": None}, {1: "a"}, None],
            "must be a dictionary of names of",
        ),
        ("patch_embedding", ["", None, torch.nn.Linear(1, 1)], "must be the name of a module"),
        (
            "timestep_modules",
            ["time", {"time": 0}, {"time": "1"}, {"time": float("nan")}, {"time": -1000}, None],
            "must be a dictionary of names of modules and numbers above 0",
        ),
        ("num_classes", [None, 1000], 'must be the name of a field, or ""'),
        ("pipeline", [None, DiTModel], "must be the name of a pipeline"),
        ("pipeline", ["FluxPipeline"], "must be given together"),
        ("encode_prompt", ["FluxPipeline"], "must be a function, or None"),
        ("output_module", [None, 7], 'must be the name of a module, or ""'),
        ("whole_modules", ["pooler", (7,), None], "must be a tuple of names of modules"),
        ("timestep_embeddings", ["sit", (7,), None], "must be a tuple of names"),
        ("prepare", ["original"], "must be a function, or None"),
        ("encode_prompt", [lambda pipe, config: {}], "must be given together"),
        ("transformer_class", [None], "has no class PlainTransformer2DModel. Pass the class as `transformer_class`"),
        ("transformer_class", ["DiT", dict, torch.nn.Linear], "must inherit from diffusers' `ModelMixin`"),
        ("call", [None, "hidden_states"], "whose `call` and `layout` are functions"),
        ("layout", [None, {"num_layers": 2}], "whose `call` and `layout` are functions"),
    ],
)
def test_a_field_of_the_wrong_kind_is_not_registered(registry, field, values, words):
    family = shown_family(registry)
    registry.clear()
    for value in values:
        with pytest.raises(ValueError, match=words):
            register_family(replace(family, **{field: value}))
    assert not registry


@pytest.mark.parametrize(
    "changed",
    [
        {"path": ""},
        {"path": None},
        {"attention": 1},
        {"hidden": -1},
        {"hidden": 0.5},
        {"hidden": True},
        {"projections": ("to_q", "to_k")},
        {"projections": "qkv"},
        {"projections": None},
    ],
)
def test_blocks_of_the_wrong_kind_are_not_registered(registry, changed):
    family = shown_family(registry)
    with pytest.raises(ValueError, match="must have module names as `path` and `attention`, an integer >= 0"):
        register_family(replace(family, blocks=(replace(family.blocks[0], **changed),)))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (lambda config: dict(config), r"must return a `TransformerLayout`, .* got (dict|FrozenDict)"),
        (lambda config: transformer_layout({}), "reads 'num_attention_heads', which the configuration does not have"),
        (lambda config: transformer_layout(config, width=7), r"failed \(TypeError: .*width"),
        (
            lambda config: transformer_layout(config, patch_size=0, needs_prompt=False),
            "an integer >= 1 as `patch_size`, got 0",
        ),
        (lambda config: transformer_layout(config, sample_size=(4, 4), needs_prompt=False), "as `sample_size`"),
        (
            lambda config: transformer_layout(config, max_grid="large", needs_prompt=False),
            "as `max_grid`, got 'large'",
        ),
        (lambda config: transformer_layout(config, needs_prompt=1), "True or False as `needs_prompt`, got 1"),
        (transformer_layout, "`needs_prompt=True`, but its `prompt_fields` are empty"),
    ],
)
def test_a_layout_that_is_none_is_refused(registry, layout, words):
    register_family(replace(shown_family(registry), layout=layout))
    config = {**build_transformer().config, "_class_name": "PlainTransformer2DModel"}
    with pytest.raises((ValueError, StrictDataclassError), match=rf"The `layout` of PlainTransformer2DModel.*{words}"):
        ASelectConfig(transformer=config)


@pytest.mark.parametrize(
    "changed",
    [{"num_classes": "classes"}, {"num_classes": "norm_type"}, {"prompt_fields": {"prompt_embeds": "width"}}],
)
def test_a_field_that_the_configuration_lacks_is_named(registry, changed):
    family = shown_family(registry)
    if "prompt_fields" in changed:
        changed["layout"] = transformer_layout
    register_family(replace(family, **changed))
    config = {**build_transformer().config, "_class_name": family.name}
    with pytest.raises(
        (ValueError, StrictDataclassError), match=r"names the field '(classes|norm_type|width)', which"
    ):
        ASelectConfig(transformer=config)


def sized(**given):
    return {"layout": lambda config: transformer_layout(config, **{"needs_prompt": False, **given})}


def called(change):
    return {"call": lambda inputs: change({"hidden_states": inputs.latents, "timestep": inputs.timesteps}, inputs)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (sized(patch_size=4), r"has `patch_size=4`, which splits 8×8 latents into 2×2 tokens, but .* returns 16"),
        (sized(patch_size=1), r"has `patch_size=1`, which splits 8×8 latents into 8×8 tokens, but .* returns 16"),
        (sized(hidden_size=64), "has 64 channels for tokens .*to_q maps 16 channels to 16. Pass `hidden_size="),
        (sized(key_value_size=8), "8 for keys and values, but .*to_k maps 16 channels to 16"),
        (
            called(lambda given, _: tuple(given.values())),
            "must return a dictionary of the keyword arguments of `forward`, got tuple",
        ),
        (
            called(lambda given, _: None),
            "must return a dictionary of the keyword arguments of `forward`, got NoneType",
        ),
        (called(lambda given, _: {1: given}), "must return a dictionary of the keyword arguments of `forward`"),
        (
            called(lambda given, _: {**given, "encoder": 1}),
            "returns encoder, which `forward` does not accept",
        ),
        (
            called(lambda given, _: {"timestep": given["timestep"]}),
            "does not return hidden_states. Its `forward` accepts hidden_",
        ),
        (called(lambda given, _: {**given, "return_dict": False}), "returns return_dict, which is set automatically"),
        (
            called(lambda given, _: {**given, "hidden_states": given["hidden_states"].flatten(2)}),
            r"failed \(RuntimeError: .*\) after `call` returned hidden_states \(2, 3, 64\), timestep \(2,\)",
        ),
        (
            called(lambda given, _: {**given, "class_labels": given["timestep"] + 0.5}),
            r"failed \(RuntimeError: .*\) after `call` returned .*, class_labels \(2,\)",
        ),
        ({"blocks": (TransformerBlocks(attention="attn1", hidden=1),)}, r"is 1, but a block returns Tensor\. Set it"),
        ({"tokens": lambda sequence, count: sequence}, None),
        ({"tokens": lambda sequence, count: sequence[:, 1:]}, r"must return the 16 image tokens .* got \(2, 15, 16\)"),
        ({"tokens": lambda sequence, count: None}, "must return the 16 image tokens .* got NoneType"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_at_each_pass(registry, changed, words):
    family = replace(shown_family(registry), **changed)
    register_family(family)
    config = {**build_transformer().config, "_class_name": family.name}
    denoiser = build_denoiser(ASelectConfig(transformer=config)).eval()
    for _ in range(2):
        if words is None:
            denoiser(torch.randn(2, 3, 8, 8), 141, 1, "hidden")
            continue
        with pytest.raises(ValueError, match=rf"PlainTransformer2DModel.*{words}"):
            denoiser(torch.randn(2, 3, 8, 8), 141, 1, "hidden")


@pytest.mark.parametrize("output", [lambda output, _: output, lambda output, _: None, lambda output, _: output[:, :1]])
def test_a_prediction_of_another_shape_is_refused(registry, output):
    family = replace(shown_family(registry), output=output)
    register_family(family)
    config = {**build_transformer().config, "out_channels": 6, "_class_name": family.name}
    denoiser = build_denoiser(ASelectConfig(transformer=config)).eval()
    with pytest.raises(ValueError, match=r"`output` of Plain.* with the shape of the latents, \(2, 3, 8, 8\), got"):
        denoiser.predict(torch.randn(2, 3, 8, 8), torch.full((2,), 5), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"patch_embedding": "embedder"}, "embedder"),
        ({"blocks": (TransformerBlocks("layers"),)}, "layers"),
        ({"blocks": (TransformerBlocks(attention="attention"),)}, r"transformer_blocks\.0\.attention"),
        ({"timestep_modules": {"time_proj": 1}}, "time_proj"),
        ({"whole_modules": ("pooler",)}, "pooler"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(registry, changed, named):
    family = replace(shown_family(registry), **changed)
    config = {**build_transformer().config, "_class_name": family.name}
    register_family(family)
    with pytest.raises(
        ValueError, match=rf"PlainTransformer2DModel names {named}.* does not have. Its modules are pos_embed"
    ):
        build_denoiser(ASelectConfig(transformer=config))


def test_a_layout_of_other_blocks_than_there_are_is_refused(registry):
    family = shown_family(registry)
    register_family(replace(family, layout=lambda config: replace(family.layout(config), num_layers=7)))
    config = {**build_transformer().config, "_class_name": family.name}
    with pytest.raises(ValueError, match="has 7 blocks, but its `blocks` have"):
        build_denoiser(ASelectConfig(transformer=config))


def test_a_registered_family_without_an_encoder_needs_the_prompt(registry, tmp_path):
    qwen = FAMILIES["QwenImageTransformer2DModel"]
    GENERIC_PIPELINES["qwen_image"]().save_pretrained(tmp_path)
    kind = type("OwnTransformer2DModel", (type(GENERIC_PIPELINES["qwen_image"]().transformer),), {})
    register_family(
        TransformerFamily(
            "OwnTransformer2DModel",
            qwen.sizes,
            qwen.layout,
            qwen.call,
            qwen.blocks,
            prompt_fields=qwen.prompt_fields,
            patch_embedding="img_in",
            transformer_class=kind,
        )
    )
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"QwenImageTransformer2DModel"', '"OwnTransformer2DModel"'))
    with pytest.raises(ValueError, match="OwnTransformer2DModel has no `pipeline`"):
        DiTModel.from_pretrained(tmp_path, timestep=5, image_size=64)
    model = DiTModel.from_pretrained(
        tmp_path, timestep=5, image_size=64, prompt_embeds={"prompt_embeds": torch.randn(1, 3, 32)}
    )
    assert model.denoiser.prompt_embeds.shape == (1, 3, 32)
    assert model(torch.rand(1, 3, 64, 64)).last_hidden_state.shape == (1, 16, 32)


# Of published checkpoints, whose sizes are those of copies of their `transformer/config.json` in public code.
MILLIONS = {
    "Qwen/Qwen-Image": 20430.4,
    "Tongyi-MAI/Z-Image": 6154.9,
    "fal/AuraFlow-v0.3": 6858.6,
    "zai-org/CogView4-6B": 6369.1,
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": 1500.0,
    "Alpha-VLLM/Lumina-Next-SFT-diffusers": 1754.9,
    "black-forest-labs/FLUX.2-klein-base-4B": 3875.5,
    "lodestones/Chroma1-HD": 8900.0,
    "meituan-longcat/LongCat-Image": 6270.7,
    "Photoroom/prx-512-t2i-sft": 1170.7,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1419.0,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14288.5,
}


# In a pass without data diffusers 0.37 looks for values that are not 0 in Z-Image, which torch 2.6 cannot.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                "Z-Image" in name and Version(diffusers.__version__) < Version("0.42"), reason="of later diffusers"
            ),
        )
        for name in READING_COST.UNTIMED
    ],
)
def test_a_published_checkpoint_would_fit_by_names_and_shapes(name):
    kind, _, vae, prompt_shapes, _ = READING_COST.UNTIMED[name]
    transformer, family = READING_COST.whole_transformer(name), FAMILIES[kind]
    config = {**transformer.config, "_class_name": kind}
    fields = {"vae": vae, "scheduler": READING_COST.FLOW, "prompt_shapes": prompt_shapes, "timestep": 5}
    with torch.device("meta"):
        model = DiTModel(ASelectConfig(transformer=config, **fields))
    theirs = {f"denoiser.transformer.{key}": value.shape for key, value in transformer.state_dict().items()}
    assert theirs == {
        key: value.shape for key, value in model.state_dict().items() if key.startswith("denoiser.transformer.")
    }
    layout = layout_of(config)
    assert len(model.denoiser.blocks) == layout.num_layers
    assert layout.hidden_size % layout.num_attention_heads == 0
    attention = model.denoiser.blocks[0].get_submodule(family.blocks[0].attention)
    if callable(family.blocks[0].projections):
        assert layout.hidden_size == layout.key_value_size == attention.inner_dim
    else:
        query, key, _ = map(attention.get_submodule, family.blocks[0].projections)
        assert (query.in_features, key.out_features) == (layout.hidden_size, layout.key_value_size)
    # It reads, without data, as far as a tap.
    assert 0 < len(model.denoiser.unused_parameters([(1, "hidden")])) < len(list(model.denoiser.parameters()))
    found = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
    assert found == pytest.approx(MILLIONS[name], abs=0.1)
