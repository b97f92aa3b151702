"""What is particular to families that are read by hooks on their own call, and to those that users describe."""

import copy
import importlib
import pickle
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import DESCRIBED, example
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from generic_pipelines import GENERIC_PIPELINES, prediction_of
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from pipelines import PIPELINES as HAND_WRITTEN_PIPELINES
from pipelines import video_vae
from test_denoiser_dit import TAPS, build_transformer
from test_vae import WAN22

from hf_aselect import (
    ASelectConfig,
    DiTForImageClassification,
    DiTModel,
    TransformerBlocks,
    TransformerFamily,
    register_family,
    transformer_layout,
)
from hf_aselect.model import families
from hf_aselect.model.denoisers import HAND_WRITTEN, DiTDenoiser, build_denoiser
from hf_aselect.model.families import FAMILIES, layout_of
from hf_aselect.model.generic_denoiser import GenericDenoiser
from hf_aselect.model.layouts import FEATURES
from hf_aselect.selection.prediction import predict

READING_COST = example("benchmarks/reading_cost.py")
DESCRIBED_BY_HAND = example("benchmarks/described_families.py")
NEW = [name for name in DESCRIBED if name in GENERIC_PIPELINES]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a family's tiny pipeline, saved when it is first asked for."""
    folders = {}

    def loaded(name, kind=DiTModel, **options):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            GENERIC_PIPELINES[name]().save_pretrained(folders[name])
        return kind.from_pretrained(folders[name], **{"timestep": 141, "image_size": 64, **options})

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


@pytest.mark.parametrize("name", NEW)
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


@pytest.mark.parametrize("name", NEW)
def test_an_image_has_the_same_tokens_alone_and_in_a_batch(load, name):
    model = load(name)
    noised = noised_of(model, 3, 8, 12)
    taps = [(1, "query"), (model.config.num_hidden_layers - 1, "hidden")]
    with torch.no_grad():
        together, alone = model._read_taps(noised, 141, taps), model._read_taps(noised[1:2], 141, taps)
    for tap in taps:
        torch.testing.assert_close(together[tap][1:2], alone[tap], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
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


@pytest.mark.parametrize("name", NEW)
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


@pytest.mark.parametrize("name", NEW)
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
        found = predict(model.denoiser, noised, torch.full((2,), 141), torch.zeros(2))
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
@pytest.mark.parametrize("name", NEW)
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


# HunyuanDiT's pooling of the text takes the weights of its parts without calling them, which offloading waits for.
@pytest.mark.parametrize("name", [name for name in NEW if name != "hunyuan_dit"])
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


def test_a_copy_and_a_pickle_read_as_the_model_does(load):
    model = load("z_image")
    noised = noised_of(model)
    with torch.no_grad():
        expected = model.denoiser(noised, 141, 1, "query")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.denoiser(noised, 141, 1, "query"), expected)
            assert other.denoiser.family is model.denoiser.family


def test_a_described_family_is_not_folded(load):
    with pytest.raises(ValueError, match="A ZImageTransformer2DModel cannot be folded"):
        load("z_image").fold()


def test_the_family_that_contributors_are_shown_reads_as_ours_does(registry, tmp_path):
    family = shown_family(registry)
    transformer = build_transformer()
    ours = DiTDenoiser(transformer).eval()
    config = {**transformer.config, "_class_name": family.name}
    model = DiTForImageClassification(ASelectConfig(transformer=config, timestep=141, num_labels=2)).eval()
    shown = model.backbone.denoiser
    shown.load_state_dict(ours.state_dict())
    noised, timesteps = torch.randn(2, 3, 8, 8), torch.full((2,), 141)
    with torch.no_grad():
        for block, feature in TAPS:
            assert torch.equal(shown(noised, timesteps, block, feature), ours(noised, timesteps, block, feature))
        labels = torch.tensor([0, 1])
        expected = predict(ours, noised, timesteps, labels)
        torch.testing.assert_close(predict(shown, noised, timesteps, labels), expected)
    # Saved with its description's name alone.
    model.save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 8, 8)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    del registry[family.name]
    with pytest.raises((ValueError, StrictDataclassError), match=r"'PlainTransformer2DModel'.*register_family"):
        DiTForImageClassification.from_pretrained(tmp_path)


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
    with pytest.raises(ValueError, match="with functions as `call` and `layout`"):
        register_family(TransformerFamily("Another", (), transformer_layout))
    with pytest.raises(ValueError, match="`name` of a family must be the name of a class"):
        register_family(replace(family, name=DiTModel))
    for blocks in ((), TransformerBlocks(), ("transformer_blocks",)):
        with pytest.raises(ValueError, match=r"`blocks` of .* must be a tuple of `TransformerBlocks`"):
            register_family(replace(family, blocks=blocks))
    for name in ("DiTTransformer2DModel", "ZImageTransformer2DModel"):
        with pytest.raises(ValueError, match=f"{name} is a family of the package"):
            register_family(TransformerFamily(name, family.sizes, family.layout, family.call))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"patch_embedding": "embedder"}, "embedder"),
        ({"blocks": (TransformerBlocks("layers"),)}, "layers"),
        ({"blocks": (TransformerBlocks(attention="attention"),)}, r"transformer_blocks\.0\.attention"),
        ({"timestep_modules": {"time_proj": 1}}, "time_proj"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(registry, changed, named):
    family = replace(shown_family(registry), **changed)
    config = {**build_transformer().config, "_class_name": family.name}
    register_family(family)
    with pytest.raises(ValueError, match=rf"PlainTransformer2DModel names {named}.* no such module. It has pos_embed"):
        build_denoiser(ASelectConfig(transformer=config))


def test_a_layout_of_other_blocks_than_there_are_is_refused(registry):
    family = shown_family(registry)
    register_family(replace(family, layout=lambda config: replace(family.layout(config), num_layers=7)))
    config = {**build_transformer().config, "_class_name": family.name}
    with pytest.raises(ValueError, match="has a `layout` of 7 blocks, and its `blocks` hold"):
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
    with pytest.raises(ValueError, match="OwnTransformer2DModel does not say which pipeline"):
        DiTModel.from_pretrained(tmp_path, timestep=5, image_size=64)
    model = DiTModel.from_pretrained(
        tmp_path, timestep=5, image_size=64, prompt_embeds={"prompt_embeds": torch.randn(1, 3, 32)}
    )
    assert model.denoiser.prompt_embeds.shape == (1, 3, 32)
    assert model(torch.rand(1, 3, 64, 64)).last_hidden_state.shape == (1, 16, 32)


@pytest.mark.parametrize("name", [name for name in HAND_WRITTEN_PIPELINES if name != "sit"])
def test_a_described_family_equals_the_one_that_is_written_by_hand_to_the_bit(name):
    transformer = HAND_WRITTEN_PIPELINES[name]().transformer
    config = {**transformer.config, "_class_name": type(transformer).__name__}
    family = DESCRIBED_BY_HAND.describe(config["_class_name"])
    generator = torch.Generator().manual_seed(0)
    shapes = {
        part: [1, config[field]] if part.startswith("pooled") else [1, 5, config[field]]
        for part, field in family.prompt_fields.items()
    }
    options = {"prompt_shapes": shapes, "guidance": 3.5, "vae_scale_factor": 8}
    ours = HAND_WRITTEN[config["_class_name"]](transformer, **options).eval()
    shown = GenericDenoiser(transformer, family=family, rebuild=lambda: None, **options).eval()
    for part, shape in shapes.items():
        getattr(ours, part).copy_(torch.randn(shape, generator=generator))
        getattr(shown, part).copy_(getattr(ours, part))
    layout = layout_of(config)
    assert replace(family.layout(config), max_grid=layout.max_grid) == layout
    taps = [
        (block, feature)
        for block in range(layout.num_layers)
        for feature in FEATURES
        if feature != "attention" or block < layout.num_attention_outputs
    ]
    for height, timestep in ((8, 141), (12, 999)):
        # A DiT of diffusers makes square images alone; of one that is not square it reads the tokens.
        noised = torch.randn(2, ours.num_channels, height, 8, generator=generator)
        with torch.no_grad():
            expected, found = (each.read_taps(noised, timestep, [(-1, "hidden"), *taps]) for each in (ours, shown))
        for tap in expected:
            assert torch.equal(found[tap], expected[tap]), (height, tap)
    for tap in [(1, "query"), (1, "hidden"), (2, "attention"), (layout.num_layers - 1, "hidden")]:
        if tap not in taps:
            continue
        if name == "lumina2":
            # Its own call counts the text's mask in Python.
            with pytest.raises(ValueError, match=r"DescribedLumina2.* is found in a pass without data"):
                shown.unused_parameters([tap])
            continue
        unused = [{id(each) for each in denoiser.unused_parameters([tap])} for denoiser in (ours, shown)]
        assert unused[0] == unused[1], tap


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
