import math

import pytest
import torch
from conftest import NUM_BLOCKS, NUM_CLASSES, build_transformer, denoiser_of
from diffusers import DiTTransformer2DModel

from hf_aselect.model.layouts import FEATURES

TAPS = [(block, feature) for block in range(NUM_BLOCKS) for feature in FEATURES]
SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
SHAPES = {"square": (8, 8), "wide": (4, 12), "high": (10, 6)}


def hooked_tokens(transformer, noised, timestep, block, feature):
    """What a forward hook on diffusers' own module sees while diffusers' own blocks run."""
    tapped = transformer.transformer_blocks[block]
    attention = tapped.attn1
    module = {
        "hidden": tapped,
        "normed": tapped.norm1,
        "query": attention.to_q,
        "key": attention.to_k,
        "value": attention.to_v,
        "attention": attention,
    }[feature]
    seen = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    timesteps = torch.full((len(noised),), timestep)
    labels = torch.full((len(noised),), NUM_CLASSES)
    if noised.shape[-1] == noised.shape[-2]:
        transformer(noised, timestep=timesteps, class_labels=labels)
    else:
        # diffusers' forward puts the patches together to a square, so its parts are called one by one.
        hidden_states = transformer.pos_embed(noised)
        for each in transformer.transformer_blocks:
            hidden_states = each(hidden_states, timestep=timesteps, class_labels=labels)
    handle.remove()
    return seen[0][0] if feature == "normed" else seen[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_a_hook_on_diffusers_at_every_tap(shape, batch, training):
    transformer = build_transformer()
    denoiser = denoiser_of(transformer).train(training)
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(batch, 3, *SHAPES[shape], generator=generator)
    timesteps = torch.full((batch,), 141)
    with torch.no_grad():
        for block, feature in TAPS:
            expected = hooked_tokens(transformer, noised, 141, block, feature)
            found = denoiser(noised, timesteps, block, feature)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("block", "feature"), TAPS)
def test_nothing_that_comes_after_the_tap_is_run(block, feature):
    denoiser = denoiser_of(build_transformer())
    ran = []
    for module in denoiser.unused_modules(block, feature):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        denoiser(torch.randn(1, 3, 8, 8), torch.tensor([5]), block, feature)
    assert ran == []


def test_the_last_block_and_the_mlp_are_unused_at_a_query():
    denoiser = denoiser_of(build_transformer())
    blocks = denoiser.transformer.transformer_blocks
    unused = denoiser.unused_modules(1, "query")
    for module in (
        blocks[2],
        blocks[1].ff,
        blocks[1].attn1.to_k,
        blocks[1].attn1.to_v,
        denoiser.transformer.proj_out_2,
    ):
        assert any(module is other for other in unused)
    assert not any(blocks[1].attn1.to_q is other for other in unused)


def test_blocks_are_given_timesteps_as_integers():
    """FSDP rounds what else a block is given: in bfloat16, 998 and 999 are both 1000."""
    denoiser, seen = denoiser_of(build_transformer()), []
    denoiser.blocks[1].register_forward_pre_hook(lambda _module, _args, given: seen.append(given), with_kwargs=True)
    with torch.no_grad():
        for timesteps in (998, torch.tensor([998])):
            denoiser(torch.randn(1, 3, 8, 8), timesteps, 1, "hidden")
    assert [int(each["timestep"]) for each in seen] == [998, 998]
    assert not any(each["timestep"].is_floating_point() for each in seen)


def test_what_a_quantized_transformer_does_not_use_is_known():
    with torch.device("meta"):
        denoiser = denoiser_of(DiTTransformer2DModel(**SIZES), rebuild=lambda: DiTTransformer2DModel(**SIZES))
    taps = [(0, "query")]
    expected = [name for name, each in denoiser.named_parameters() if has(denoiser.unused_parameters(taps), each)]
    layers = denoiser.blocks[0].attn1
    layers.to_q.weight = torch.nn.Parameter(layers.to_q.weight.to(torch.int8), requires_grad=False)
    found = [name for name, each in denoiser.named_parameters() if has(denoiser.unused_parameters(taps), each)]
    assert found == expected and any("to_k" in name for name in found)
    assert not has(denoiser.unused_modules(0, "query"), layers.to_q)


def has(those, one):
    return any(each is one for each in those)


def test_the_timestep_changes_the_tokens():
    denoiser = denoiser_of(build_transformer())
    noised = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        early, late = (denoiser(noised, torch.tensor([t]), 1, "query") for t in (5, 500))
    assert (early - late).abs().max() > 1e-3


def test_the_original_timestep_embedding_is_that_of_the_dit_paper():
    """facebookresearch/DiT, models.py, TimestepEmbedder: frequencies 10000^(-i/half), cosines first."""
    denoiser = denoiser_of(build_transformer(), "original")
    timesteps = torch.tensor([0, 121, 999])
    half = 128
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    for block in denoiser.transformer.transformer_blocks:
        torch.testing.assert_close(block.norm1.emb.time_proj(timesteps), expected, rtol=0, atol=1e-4)


def test_the_diffusers_timestep_embedding_is_left_alone():
    plain = build_transformer().transformer_blocks[0].norm1.emb.time_proj
    denoiser = denoiser_of(build_transformer())
    timesteps = torch.tensor([121])
    found = denoiser.transformer.transformer_blocks[0].norm1.emb.time_proj(timesteps)
    assert torch.equal(found, plain(timesteps))
    original = denoiser_of(build_transformer(), "original").transformer.transformer_blocks[0].norm1.emb.time_proj
    assert (original(timesteps) - found).abs().max() > 0.1


def test_the_position_table_is_the_one_that_diffusers_builds():
    expected = build_transformer().pos_embed.pos_embed
    with torch.device("meta"):
        denoiser = denoiser_of(DiTTransformer2DModel(**SIZES), rebuild=lambda: DiTTransformer2DModel(**SIZES))
    assert torch.equal(denoiser.patch_embedding.pos_embed, expected)
    assert torch.equal(denoiser.tables_of(denoiser.patch_embedding)["pos_embed"], expected)


def test_the_embedder_drops_labels_to_the_label_that_we_give():
    """diffusers drops to `num_classes` in train mode; so dropping changes nothing for us."""
    embedder = build_transformer().transformer_blocks[0].norm1.emb.class_embedder.train()
    assert embedder.num_classes == NUM_CLASSES
    assert len(embedder.embedding_table.weight) == NUM_CLASSES + 1


def test_the_names_that_are_reached_in_diffusers_exist():
    transformer = DiTTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8, sample_size=4)
    block = transformer.transformer_blocks[0]
    assert block.norm1.emb.time_proj.downscale_freq_shift == 1
    for module in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out, block.ff):
        assert isinstance(module, torch.nn.Module)


def test_several_taps_are_read_in_one_pass(model, pixels):
    latents, timesteps = model.encode(pixels), torch.full((7,), 50)
    taps = [(0, "key"), (0, "hidden"), (2, "query"), (1, "attention")]
    calls = []
    first = model.denoiser.transformer.transformer_blocks[0]
    hook = first.register_forward_hook(lambda *_: calls.append(1))
    found = model._read_taps(latents, timesteps, taps)
    hook.remove()
    assert len(calls) == 1
    assert found.keys() == set(taps)
    for block, feature in taps:
        assert found[block, feature].equal(model._base().denoiser(latents, timesteps, block, feature))
