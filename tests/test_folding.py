"""Folding: a plain, smaller model whose outputs are equal, from every family that can be folded."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from pipelines import LOAD_OPTIONS, PIPELINES, distance, dit_transformer, images_of, sana, sd3
from torch import nn
from transformers import AutoModelForImageClassification, UperNetConfig, UperNetForSemanticSegmentation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_aselect import (
    ASelectConfig,
    DiTBackbone,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    select_timestep,
)
from hf_aselect.folding import fold as folding
from hf_aselect.model.folded_blocks import linear_attention
from hf_aselect.model.folded_transformer import FoldedTransformer, sincos_table
from hf_aselect.model.layouts import FEATURES, FoldedLayout, parse_tap_key

TIMESTEP = 141
HEAD = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1, "num_labels": 3}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a family's tiny pipeline as a model; saved when it is first asked for."""
    folders = {}

    def get(name, kind=DiTModel, **options):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            PIPELINES[name]().save_pretrained(folders[name])
        given = {"timestep": TIMESTEP, "zeroed_channels": [], **LOAD_OPTIONS.get(name, {}), **options}
        return kind.from_pretrained(folders[name], **given)

    return get


def assert_same(model, expected):
    """Two models have the same weights and logits."""
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    with torch.no_grad():
        # Not to the bit: loaded weights lie at other addresses, for which a kernel may sum in another order.
        assert distance(model(images_of(model)).logits, expected(images_of(model)).logits) <= 1e-6


@pytest.mark.parametrize("name", PIPELINES)
def test_what_the_first_block_is_given_is_what_diffusers_own_call_gives_it(load, name):
    """Folding writes out what comes before the blocks; the denoiser itself reads diffusers' call."""
    denoiser = load(name).denoiser
    noised = torch.randn(2, denoiser.num_channels, 8, 12, generator=torch.Generator().manual_seed(0))
    timesteps, given = torch.tensor([141, 998]), {}
    block = denoiser.blocks[0]

    def keep(_module, args, kwargs):
        given.update(inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments)

    block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        tokens = denoiser.read_taps(noised, timesteps, [(0, "hidden"), (-1, "hidden")])[-1, "hidden"]
        begin, _ = folding.FOLDED[type(denoiser.transformer).__name__]
        start = begin(denoiser, noised, timesteps)
    assert torch.equal(start.hidden_states, given["hidden_states"])
    assert torch.equal(start.hidden_states[:, -start.rows * start.columns :], tokens)
    assert (start.rows, start.columns) == ((8, 12) if name == "sana" else (4, 6))
    if name in ("dit", "sit"):
        expected = given["timestep"], given["class_labels"]
    else:
        expected = (given["temb" if "temb" in given else "timestep"],)
    condition = start.condition if isinstance(start.condition, tuple) else (start.condition,)
    assert all(torch.equal(*pair) for pair in zip(condition, expected, strict=True))
    if start.context is not None:
        assert torch.equal(start.context, given["encoder_hidden_states"])
    if start.rotary is not None:
        for one, other in zip(start.rotary, given["image_rotary_emb"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", PIPELINES)
def test_tokens_at_every_tap_are_those_of_the_model(load, name, feature):
    model = load(name)
    given = images_of(model)
    for block in range(model.config.num_hidden_layers):
        if feature == "attention" and block >= model.config.layout.num_attention_outputs:
            continue
        model.config.block, model.config.feature = block, feature
        with torch.no_grad():
            tokens, expected = model.fold()(given).last_hidden_state, model(given).last_hidden_state
        assert distance(tokens, expected) <= 1e-5, block


def prompt(num_tokens=5):
    """Embeddings of a prompt of several tokens."""
    return {"prompt_embeds": torch.randn(1, num_tokens, 32, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dit", (32, 48)),
        ("sd3", (32, 48)),
        ("flux", (32, 48)),
        ("sana", (8, 24)),
        ("lumina2", (32, 96)),
    ],
)
def test_pictures_of_other_sizes_are_read_as_before(load, name, size):
    model = load(name)
    folded = model.fold()
    with torch.no_grad():
        tokens, expected = (each(images_of(model, size)).last_hidden_state for each in (folded, model))
    assert distance(tokens, expected) <= 1e-5


def test_a_larger_picture_than_the_table_reaches_is_refused(load):
    folded = load("sd3").fold()
    with pytest.raises(ValueError, match=r"folded for a grid of 4×4 tokens and reads at most that size, got 6×4"):
        folded(images_of(folded, (96, 64)))


def test_a_model_conditioned_on_the_size_reads_that_size_alone(load):
    folded = load("pixart_alpha").fold()
    with pytest.raises(ValueError, match=r"folded for a grid of 4×4 tokens and reads only that size, got 2×4"):
        folded(images_of(folded, (32, 64)))


@pytest.mark.family
def test_several_taps_of_one_pass_are_folded_together(load):
    for name in ("dit", "sd35", "flux", "sana", "lumina2"):
        backbone = load(name, DiTBackbone, out_indices=[0, 1, 2], feature="attention")
        folded = backbone.fold()
        assert folded.config.folding.taps == ("-1.hidden", "0.attention", "1.attention")
        with torch.no_grad():
            for got, expected in zip(
                folded(images_of(backbone)).feature_maps, backbone(images_of(backbone)).feature_maps, strict=True
            ):
                assert distance(got, expected) <= 1e-5


@pytest.mark.parametrize("feature", ["hidden", "attention"])
@pytest.mark.parametrize("name", ["pixart_sigma", "sana", "lumina2"])
def test_a_prompt_of_several_tokens_is_looked_at(tmp_path, name, feature):
    PIPELINES[name]().save_pretrained(tmp_path)
    model = DiTModel.from_pretrained(
        tmp_path, timestep=TIMESTEP, block=2, feature=feature, zeroed_channels=[], prompt_embeds=prompt()
    )
    folded = model.fold()
    assert folded.config.folding.num_cross_tokens + folded.config.folding.text_size == 5
    with torch.no_grad():
        tokens, expected = folded(images_of(model)).last_hidden_state, model(images_of(model)).last_hidden_state
    assert distance(tokens, expected) <= 1e-5


@pytest.mark.parametrize("feature", ["hidden", "attention"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        # Published: Sana 1.0 has no positions or scales them, Sana 1.5 norms queries and keys.
        ("sana", {"qk_norm": "rms_norm_across_heads"}),
        ("sana", {"interpolation_scale": 2.0, "patch_size": 2}),
        ("sana", {"attention_bias": True, "norm_elementwise_affine": True, "norm_eps": 1e-5}),
        ("sana", {"num_cross_attention_heads": 3, "cross_attention_head_dim": 8}),
        ("lumina2", {"num_refiner_layers": 0}),
        ("lumina2", {"num_refiner_layers": 2, "num_kv_heads": 4}),
        ("lumina2", {"num_kv_heads": 1, "norm_eps": 1e-3}),
    ],
)
def test_other_kinds_of_sana_and_lumina(tmp_path, name, options, feature):
    pipe = PIPELINES[name](**options)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(3)  # blocks that change much: little is hidden by what goes past them
    pipe.save_pretrained(tmp_path)
    model = DiTModel.from_pretrained(
        tmp_path, timestep=TIMESTEP, block=2, feature=feature, zeroed_channels=[], prompt_embeds=prompt()
    )
    side = model.config.image_size
    for size in ((side, side), (side, 2 * side)):
        with torch.no_grad():
            given = images_of(model, size)
            tokens, expected = model.fold()(given).last_hidden_state, model(given).last_hidden_state
        assert distance(tokens, expected) <= 1e-5


@pytest.mark.parametrize(
    "options", [{"attention_bias": False}, {"activation_fn": "gelu"}, {"norm_elementwise_affine": True}]
)
def test_other_kinds_of_blocks(tmp_path, options):
    dit_transformer(**options).save_pretrained(tmp_path / "transformer")
    model = DiTModel.from_pretrained(tmp_path / "transformer", timestep=TIMESTEP, block=2)
    with torch.no_grad():
        tokens, expected = model.fold()(images_of(model)).last_hidden_state, model(images_of(model)).last_hidden_state
    assert distance(tokens, expected) <= 1e-5


@pytest.mark.parametrize("grid", [(3, 5), (4, 4)])
def test_the_position_table_is_diffusers_own(grid):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(24, grid, base_size=4, interpolation_scale=2.0, output_type="pt")
    torch.testing.assert_close(sincos_table(24, *grid, 4, 2.0)[0], expected.float(), rtol=0, atol=1e-7)


def test_a_classifier_keeps_its_head_and_its_logits(classifier, pixels):
    classifier.config.timestep = TIMESTEP
    folded = classifier.fold()
    assert type(folded) is type(classifier)
    assert folded.config.folded and not classifier.config.folded
    assert folded.num_parameters() < classifier.num_parameters()
    with torch.no_grad():
        assert distance(folded(pixels).logits, classifier(pixels).logits) <= 1e-5
    shared = {value.data_ptr() for value in classifier.parameters()}
    assert not shared & {value.data_ptr() for value in folded.parameters()}


def test_decoders_of_one_and_of_four_blocks(tmp_path):
    dit_transformer(num_layers=8, in_channels=3, out_channels=3).save_pretrained(tmp_path)
    for decoder in ("linear", "upernet"):
        model = DiTForSemanticSegmentation.from_pretrained(
            tmp_path, timestep=TIMESTEP, decoder=decoder, decoder_hidden_size=8, num_labels=3
        )
        folded = model.fold()
        assert len(folded.backbone.denoiser.blocks) == (4 if decoder == "linear" else 7)
        folded.save_pretrained(tmp_path / decoder)
        again = DiTForSemanticSegmentation.from_pretrained(tmp_path / decoder)
        with torch.no_grad():
            expected = model(images_of(model)).logits
            assert distance(folded(images_of(model)).logits, expected) <= 1e-5
            assert_same(again, folded)


def test_a_head_of_the_host_stands_on_a_folded_backbone(tmp_path):
    dit_transformer(num_layers=4, in_channels=3, out_channels=3).save_pretrained(tmp_path)
    backbone = DiTBackbone.from_pretrained(tmp_path, timestep=TIMESTEP, out_indices=[1, 2, 3, 4]).fold()
    head = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone.config, hidden_size=8, num_labels=3, auxiliary_in_channels=32, pool_scales=[1]
        )
    )
    assert isinstance(head.backbone.denoiser, FoldedTransformer)
    assert head.eval()(images_of(backbone, num=1)).logits.shape == (1, 3, 8, 8)


@pytest.mark.family
@pytest.mark.parametrize("tap", [(-1, "query"), (0, "query"), (-1, "attention"), (-1, "hidden")])
def test_what_is_left_is_plain_and_all_of_it_is_used(load, tap):
    for name in PIPELINES:
        if tap[1] == "attention" and "flux" in name:  # its last block has no attention output
            continue
        options = {"freeze_backbone": False, "block": tap[0], "feature": tap[1], **HEAD}
        model = load(name, DiTForImageClassification, **options).fold().train()
        kinds = {type(part) for part in model.backbone.denoiser.modules() if not list(part.children())}
        assert kinds <= {nn.Linear, nn.LayerNorm, nn.Conv2d, nn.GELU, nn.SiLU, nn.RMSNorm}
        model(images_of(model), labels=torch.tensor([0, 1])).loss.backward()
        unused = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
        assert not unused, (name, unused)
        assert any(value.requires_grad for value in model.backbone.denoiser.parameters())


def test_a_frozen_backbone_stays_frozen(classifier):
    classifier.config.timestep = TIMESTEP
    folded = classifier.fold()
    assert not any(value.requires_grad for value in folded.backbone.parameters())
    assert all(value.requires_grad for value in folded.classifier.parameters())


@pytest.mark.family
def test_saved_and_loaded_it_is_the_same(load, tmp_path):
    for name in ("dit", "sd3", "pixart_sigma", "flux", "sana", "lumina2"):
        folded = load(name, DiTForImageClassification, **HEAD).fold()
        folded.save_pretrained(tmp_path / name)
        again = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert_same(again, folded)


@pytest.mark.process
def test_without_a_vae_it_loads_without_diffusers(classifier, tmp_path):
    classifier.config.timestep = TIMESTEP
    classifier.fold().save_pretrained(tmp_path)
    script = (
        "import sys, torch, hf_aselect\n"
        "from transformers import AutoModelForImageClassification\n"
        "model = AutoModelForImageClassification.from_pretrained(sys.argv[1])\n"
        "height, width = model.config.image_height_width\n"
        "model(torch.zeros(1, model.config.num_channels, height, width))\n"
        "print('diffusers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_half_of_diffusers_weights_and_more_are_gone():
    """DiT-XL/2, folded at block 13: at most 0.30 of diffusers' parameters, so 0.15 of its bytes in bfloat16."""
    config = ASelectConfig(timestep=121, block=13, feature="hidden")
    layout = FoldedLayout(
        timestep=121,
        taps=("13.hidden",),
        num_channels=4,
        patch_size=2,
        hidden_size=1152,
        num_attention_heads=16,
        mlp_size=4608,
        rows=16,
        columns=16,
        position_base_size=16,
    )
    with torch.device("meta"):
        whole, folded = DiTModel(config).denoiser, FoldedTransformer(config, layout)
    count, total = (sum(one.numel() for one in each.parameters()) for each in (folded, whole))
    assert (total, count) == (749_826_464, 223_118_208)
    assert count / total <= 0.30


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers by its old name
def test_lora_trains_the_folded_layers_alone(classifier, pixels):
    classifier.config.timestep = TIMESTEP
    folded = classifier.fold()
    with torch.no_grad():
        before = folded(pixels).logits
    adapted = get_peft_model(folded, LoraConfig(target_modules=["query_key_value"], r=2, init_lora_weights=False))
    adapted.train()
    adapted(pixel_values=pixels, labels=torch.zeros(len(pixels), dtype=torch.long)).loss.backward()
    touched = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert touched and all("lora_" in name for name in touched)
    merged = adapted.eval().merge_and_unload()
    with torch.no_grad():
        assert distance(merged(pixels).logits, before) > 1e-4


def test_the_host_names_the_attention_kernel(classifier, pixels, tmp_path):
    classifier.config.timestep = TIMESTEP
    folded = classifier.fold()
    assert folded.config._attn_implementation == "sdpa"
    folded.save_pretrained(tmp_path)
    eager = DiTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("counted", counted)
    own = DiTForImageClassification.from_pretrained(tmp_path, attn_implementation="counted")
    with torch.no_grad():
        expected = folded(pixels).logits
        assert distance(eager(pixels).logits, expected) <= 1e-5
        assert distance(own(pixels).logits, expected) <= 1e-6
    assert len(calls) == folded.config.block_index()  # the tapped block's own attention is not run


def test_several_heads_share_a_key_and_a_value_in_every_kernel(load):
    model = load("lumina2", block=2, feature="hidden")
    folded, given = model.fold(), images_of(model)
    layout = folded.config.folding
    assert (layout.num_key_value_heads, layout.num_attention_heads) == (2, 4)
    with torch.no_grad():
        expected = folded(given).last_hidden_state
        for kernel in ("eager", "sdpa"):
            folded.set_attn_implementation(kernel)
            assert distance(folded(given).last_hidden_state, expected) <= 1e-6


@pytest.mark.parametrize("name", ["dit", "sana", "lumina2"])
def test_gradient_checkpointing_changes_nothing(load, name):
    model = load(name, DiTForImageClassification, freeze_backbone=False, **HEAD).fold().train()
    given, labels = images_of(model), torch.tensor([0, 1])
    model(given, labels=labels).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    denoiser = model.backbone.denoiser
    for block in [*denoiser.refiners, *denoiser.blocks]:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = lambda run, *args: torch.utils.checkpoint.checkpoint(
            run, *args, use_reentrant=False
        )
    model(given, labels=labels).loss.backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, expected[name], msg=name)


@pytest.mark.process
@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 writes code that lacks torch")
def test_compiled_without_graph_breaks(classifier, pixels):
    classifier.config.timestep = TIMESTEP
    folded = classifier.fold()
    compiled = torch.compile(folded, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert distance(compiled(pixel_values=pixels).logits, folded(pixels).logits) <= 1e-6


class Reading(nn.Module):
    """A folded transformer alone, without a VAE, as a function of its latents."""

    def __init__(self, model):
        super().__init__()
        self.denoiser, self.tap = model.denoiser, (model.config.block_index(), model.config.feature)

    def forward(self, latents):
        return self.denoiser(latents, torch.full((latents.shape[0],), TIMESTEP), *self.tap)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter, of its own trees
@pytest.mark.parametrize("name", ["sd35", "pixart_sigma", "flux", "sana", "lumina2"])
def test_every_family_is_compiled_and_exported_with_a_free_batch(load, name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the `export` extra is not installed")
    model = load(name, block=2, feature="hidden").fold()
    # Of the VAE of Sana, which is diffusers' own, the exported graph makes NaN where all weights of a token are 0.
    reading = Reading(model).eval()
    latents = torch.randn(3, model.config.layout.num_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = ({0: torch.export.Dim("batch", max=64)},)
    with torch.no_grad():
        expected = reading(latents)
        assert distance(torch.compile(reading, fullgraph=True, backend="eager")(latents), expected) <= 1e-6
        program = torch.export.export(reading, (latents,), dynamic_shapes=batch)
        torch.onnx.export(program, (latents,), tmp_path / "model.onnx", input_names=["latents"], dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in (1, 3):
        with torch.no_grad():
            assert distance(program.module()(latents[:size]), expected[:size]) <= 1e-5
        (tokens,) = session.run(None, {"latents": latents[:size].numpy()})
        assert distance(torch.from_numpy(tokens), expected[:size]) <= 1e-5


def test_tokens_without_a_positive_query_get_nothing_of_linear_attention():
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    torch.manual_seed(0)
    attention = Attention(32, heads=4, dim_head=8, processor=SanaLinearAttnProcessor2_0())
    attention.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    tokens = torch.randn(2, 6, 32)
    tokens[:, 0] = 0
    with torch.no_grad():
        parts = [layer(tokens) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        mixed = linear_attention(*(part.unflatten(-1, (4, 8)).transpose(1, 2) for part in parts))
        torch.testing.assert_close(mixed, attention(tokens))
    assert not mixed[:, 0].any() and mixed[:, 1].any()


@pytest.mark.process
@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 writes code that lacks torch")
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter, of its own trees
def test_exported_with_a_free_batch(classifier, pixels, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the `export` extra is not installed")
    classifier.config.timestep = TIMESTEP
    folded = classifier.fold()
    batch = {"pixel_values": {0: torch.export.Dim("batch", max=64)}}
    with torch.no_grad():
        expected = folded(pixels).logits
        program = torch.export.export(folded, (), {"pixel_values": pixels}, dynamic_shapes=batch)
        for size in (1, len(pixels)):
            logits = program.module()(pixel_values=pixels[:size])["logits"]
            assert distance(logits, expected[:size]) <= 1e-5
        torch.onnx.export(
            folded,
            (),
            tmp_path / "model.onnx",
            kwargs={"pixel_values": pixels},
            dynamic_shapes=batch,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamo=True,
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in (1, len(pixels)):
        (logits,) = session.run(["logits"], {"pixel_values": pixels[:size].numpy()})
        assert abs(torch.from_numpy(logits) - expected[:size]).max() <= 1e-4


def test_a_kernel_that_is_not_run_is_said_so(pixel_folder, caplog):
    DiTModel.from_pretrained(pixel_folder, timestep=TIMESTEP)
    assert "is of no account" not in caplog.text
    DiTModel.from_pretrained(pixel_folder, timestep=TIMESTEP, attn_implementation="eager")
    assert "`attn_implementation='eager'` is ignored" in caplog.text


@pytest.mark.parametrize("size", [(32, 48), (48, 64), (80, 96)])
def test_the_middle_of_the_middle_is_that_of_the_whole_table(tmp_path, size):
    """An odd grid and an even one have middles that are half a token apart."""
    sd3(pos_embed_max_size=12).save_pretrained(tmp_path)
    model = DiTModel.from_pretrained(tmp_path, timestep=TIMESTEP, image_size=112)
    folded, given = model.fold(), images_of(model, size)
    with torch.no_grad():
        assert distance(folded(given).last_hidden_state, model(given).last_hidden_state) <= 1e-5


def test_zeroed_channels_of_another_tap_stay_there(tmp_path):
    dit_transformer(num_layers=4, in_channels=3, out_channels=3).save_pretrained(tmp_path)
    fields = {"timestep": TIMESTEP, "block": 1, "zeroed_channels": [5], "out_indices": [3, 4]}
    model = DiTBackbone.from_pretrained(tmp_path, **fields)
    given, folded = images_of(model), model.fold()
    with torch.no_grad():
        for got, expected in zip(folded(given).feature_maps, model(given).feature_maps, strict=True):
            assert distance(got, expected) <= 1e-5


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers by its old name
def test_adapters_on_the_patch_embedding_must_be_merged_too(classifier):
    classifier.config.timestep = TIMESTEP
    adapted = get_peft_model(classifier, LoraConfig(target_modules=["pos_embed.proj"], r=2))
    with pytest.raises(ValueError, match="Only plain linear layers and convolutions can be folded"):
        adapted.fold()


def test_an_unresolved_model_is_refused(classifier):
    classifier.config.timestep = "auto"
    with pytest.raises(ValueError, match=r"timestep of this model is still 'auto'"):
        classifier.fold()


def test_a_folded_model_is_not_folded_again(classifier):
    classifier.config.timestep = TIMESTEP
    with pytest.raises(ValueError, match="is already folded"):
        classifier.fold().fold()


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers by its old name
def test_adapters_must_be_merged_first(classifier):
    classifier.config.timestep = TIMESTEP
    adapted = get_peft_model(classifier, LoraConfig(target_modules=["to_q"], r=2))
    with pytest.raises(ValueError, match=r"Only plain linear layers and convolutions can be folded.*merge_and_unload"):
        adapted.fold()
    assert adapted.merge_and_unload().fold().config.folded


def test_other_families_are_refused_by_name(load, monkeypatch):
    monkeypatch.delitem(folding.FOLDED, "SanaTransformer2DModel")
    with pytest.raises(
        ValueError,
        match=r"SanaTransformer2DModel cannot be folded. Supported are DiTTransformer2DModel, Pix",
    ):
        load("sana").fold()


def test_other_norms_of_queries_are_refused(tmp_path):
    sana(qk_norm="layer_norm_across_heads").save_pretrained(tmp_path)
    model = DiTModel.from_pretrained(tmp_path, timestep=TIMESTEP, block=2)
    with pytest.raises(ValueError, match=r"Only RMSNorm on queries and keys can be folded, got LayerNorm"):
        model.fold()


def test_what_is_no_longer_there_is_not_read(classifier, pixels, tmp_path):
    classifier.config.timestep = TIMESTEP
    folded = classifier.fold()
    message = r"was folded at timestep 141 and cannot be read at"
    with pytest.raises(ValueError, match=message):
        folded.extract_features(pixels, timestep=0)
    with pytest.raises(ValueError, match=r"was folded to be read at 1\.query"):
        folded.extract_features(pixels, block=0)
    with pytest.raises(ValueError, match=r"so there is no timestep to select"):
        select_timestep(folded, pixels)
    with pytest.raises(ValueError, match=r"A folded model cannot generate images"):
        folded.generate_latents(2)
    folded.save_pretrained(tmp_path)
    for wrong in ({"timestep": 5}, {"timestep": "auto"}, {"block": 0}, {"feature": "hidden"}, {"folded": False}):
        with pytest.raises((ValueError, StrictDataclassError), match=r"was folded|set together"):
            DiTForImageClassification.from_pretrained(tmp_path, **wrong)
    folded.config.timestep = 5
    with pytest.raises(ValueError, match=message):
        folded(pixels)


def test_a_classifier_is_no_backbone_of_other_blocks(classifier, tmp_path):
    classifier.config.timestep = TIMESTEP
    classifier.fold().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was folded to be read at 1\.query"):
        DiTBackbone.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "multiple of `num_attention_heads`"),
        ({"hidden_size": 0}, "positive integer as `hidden_size`"),
        ({"taps": []}, "at least one tap"),
        ({"taps": ["x.query"]}, "must be named 'BLOCK.FEATURE'"),
        ({"taps": "1.query"}, "must have lists as taps"),
        ({"taps": ["40.query"]}, "has block 40"),
        ({"positions": "learned"}, "as `positions`"),
        ({"blocks": "mamba"}, "one of plain, sana, lumina2 as `blocks`"),
        ({"num_key_value_heads": 3}, "a divisor of 2 as `num_key_value_heads`"),
        ({"num_cross_heads": 5}, "a divisor of 16 as `num_cross_heads`"),
        ({"cross_size": -1}, "integer >= 0 as `cross_size`"),
        ({"unheard": 1}, "has unknown keys unheard"),
        ({"timestep": 7}, "was folded at timestep 7"),
        ({"num_channels": 2}, "num_channels 2"),
        ({"mlp_norm_eps": "x"}, "number as `mlp_norm_eps`"),
    ],
)
def test_a_broken_layout_is_refused(classifier, tmp_path, change, message):
    classifier.config.timestep = TIMESTEP
    classifier.fold().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["folded_layout"] = {**values["folded_layout"], **change}
    path.write_text(json.dumps(values))
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DiTForImageClassification.from_pretrained(tmp_path)


def test_massive_channels_and_the_record_go_along(load):
    model = load("dit", block=1, feature="hidden", zeroed_channels={"1.hidden": [3], "2.hidden": [5]})
    folded = model.fold()
    assert folded.config.zeroed_channels == {"1.hidden": [3]}
    with torch.no_grad():
        tokens, expected = folded(images_of(model)).last_hidden_state, model(images_of(model)).last_hidden_state
    assert distance(tokens, expected) <= 1e-5
    assert not tokens[..., 3].any()


def test_noise_draws_are_averaged(load):
    model = load("dit", num_noise_draws=3)
    with torch.no_grad():
        tokens, expected = model.fold()(images_of(model)).last_hidden_state, model(images_of(model)).last_hidden_state
    assert distance(tokens, expected) <= 1e-5


@pytest.mark.family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_in_half_precision(load, dtype):
    """Folding rounds once: it is no further from float32 than the half-precision model that it was made from."""
    for name in ("dit", "sd3", "sana", "lumina2"):
        exact, half = load(name), load(name, dtype=dtype)
        given = images_of(exact)
        with torch.no_grad():
            expected, tokens = exact(given).last_hidden_state, half(given).last_hidden_state
            folded = half.fold()
            assert {value.dtype for value in folded.denoiser.parameters()} == {dtype}
            error, folded_error = distance(tokens, expected), distance(folded(given).last_hidden_state, expected)
        assert folded_error <= 2 * error + 1e-4


def test_parse_tap_key():
    assert parse_tap_key("-1.hidden") == (-1, "hidden")
    for wrong in ("hidden", "1", "01.hidden", "-2.hidden", "1.mlp", "1.hidden.2", ".hidden"):
        with pytest.raises(ValueError, match="must be named"):
            parse_tap_key(wrong)


def test_stable_diffusion_3_keeps_no_text_that_the_picture_does_not_need(tmp_path):
    sd3().save_pretrained(tmp_path)
    folded = DiTModel.from_pretrained(tmp_path, timestep=TIMESTEP, block=2, feature="query").fold()
    names = {name for name, _ in folded.denoiser.named_parameters() if ".text." in name}
    # Block 1 is the last whose attention is run: its text is looked at, but not looked at again.
    assert {name for name in names if name.startswith("blocks.1.")} == {
        "blocks.1.text.query_key_value.weight",
        "blocks.1.text.query_key_value.bias",
    }
    assert folded.denoiser.blocks[1].text.query_key_value.out_features == 2 * 32
    assert "blocks.0.text.down_projection.weight" in names
    assert not any(name.startswith("blocks.2.") for name in names)


@pytest.mark.parametrize(("feature", "has_text"), [("query", False), ("attention", True)])
@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2"])
def test_the_text_is_kept_where_the_picture_looks_at_it(load, name, feature, has_text):
    folded = load(name, block=0, feature=feature).fold()
    assert ("denoiser.text" in folded.state_dict()) == has_text


def test_lumina_keeps_refiners_of_the_picture_and_no_others(load):
    denoiser = load("lumina2", block=0, feature="query").fold().denoiser
    names = {name for name, _ in denoiser.named_parameters()}
    assert {name for name in names if name.startswith("blocks.")} == {"blocks.0.query_key_value.weight"}
    assert sorted({name.split(".")[0] for name in names}) == ["blocks", "patch_embedding", "refiners"]
    assert len(denoiser.refiners) == 1
    assert denoiser.refiners[0].query_key_value.out_features == 32 + 2 * 16
