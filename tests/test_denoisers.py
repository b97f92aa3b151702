"""Every family: a pipeline that diffusers saved is loaded, and its tokens are those that diffusers' own call makes."""

import pytest
import torch
from conftest import DESCRIBED, MATRIX
from diffusers import FluxPipeline
from generic_pipelines import GENERIC_PIPELINES, prediction_of
from huggingface_hub.errors import StrictDataclassError
from pipelines import LOAD_OPTIONS, WIDTH, flux_transformer, pixart_alpha, sana_transformer, sd3
from pipelines import PIPELINES as FOLDED_PIPELINES

from hf_aselect import ASelectConfig, DiTBackbone, DiTForImageClassification, DiTModel
from hf_aselect.folding.fold import FOLDED
from hf_aselect.model.denoiser import grid_of
from hf_aselect.model.denoisers import build_denoiser
from hf_aselect.model.families import FAMILIES
from hf_aselect.model.layouts import FEATURES

TIMESTEP = 141
HEAD = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1}
PIPELINES = {**FOLDED_PIPELINES, **{name: GENERIC_PIPELINES[name] for name in DESCRIBED}}
TEXT_FAMILIES = [name for name in PIPELINES if name not in ("dit", "sit")]
# A learned variance stands for the original embedding, which diffusers' own call does not have; SiT's own conditioning
# is no default, and FLUX's default is 1024 pixels.
OPTIONS = {
    **LOAD_OPTIONS,
    "dit": {"timestep_embedding": "diffusers"},
    **{name: {"image_size": 64} for name in DESCRIBED},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each pipeline, and the folder that diffusers saved it in; made when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            pipe = PIPELINES[name]()
            folder = tmp_path_factory.mktemp(name)
            pipe.save_pretrained(folder)
            made[name] = pipe, folder
        return made[name]

    return get


@pytest.fixture(scope="module")
def loaded(saved):
    made = {}

    def get(name):
        if name not in made:
            made[name] = DiTModel.from_pretrained(saved(name)[1], timestep=TIMESTEP, **OPTIONS.get(name, {}))
        return made[name]

    return get


def conditioning(name, pipe, size):
    """What the family's pipeline gives its transformer beside latents, timestep and the class: padding and all."""
    if name in ("dit", "sit"):
        return {"class_labels": torch.full((size,), 10)}
    if name.startswith("sd3"):
        prompt, _, pooled, _ = pipe.encode_prompt("", "", "", do_classifier_free_guidance=False)
        return {"encoder_hidden_states": prompt.expand(size, -1, -1), "pooled_projections": pooled.expand(size, -1)}
    if name.startswith("flux"):
        # As black-forest-labs' own code: FLUX.1-schnell, without guidance, was trained with half as many.
        length = 512 if pipe.transformer.config.guidance_embeds else 256
        prompt, pooled, ids = pipe.encode_prompt("", "", max_sequence_length=length)
        guidance = torch.full((size,), 3.5) if name == "flux_dev" else None
        return {
            "encoder_hidden_states": prompt.expand(size, -1, -1),
            "pooled_projections": pooled.expand(size, -1),
            "txt_ids": ids,
            "guidance": guidance,
        }
    _, _, prompt, mask = pipe.encode_prompt("", do_classifier_free_guidance=True, negative_prompt="")
    assert prompt.shape[1] > mask.sum()  # there is padding, which we leave out
    return {
        "encoder_hidden_states": prompt.expand(size, -1, -1),
        "encoder_attention_mask": mask.expand(size, -1),
    }


def call(name, pipe, noised, timestep):
    """Diffusers' own call of the transformer, as its pipeline makes it; what it predicts, for us."""
    if name in DESCRIBED:
        return prediction_of(name, pipe, noised, timestep)
    size, _, height, width = noised.shape
    given = conditioning(name, pipe, size)
    timesteps = torch.full((size,), float(timestep))
    if name.startswith("flux"):
        given["img_ids"] = FluxPipeline._prepare_latent_image_ids(size, height // 2, width // 2, "cpu", torch.float32)
        packed = FluxPipeline._pack_latents(noised, size, 16, height, width)
        output = pipe.transformer(packed, timestep=timesteps / 1000, **given).sample
        return FluxPipeline._unpack_latents(output, height * 8, width * 8, 8)
    if name == "lumina2":
        return -pipe.transformer(noised, timestep=1 - timesteps / 1000, **given).sample
    if name == "sit":
        # The original embedding of SiT's own time; diffusers' module has no other.
        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        return -pipe.transformer(noised, timestep=1 - timesteps / 1000, **given).sample
    if name == "pixart_alpha":
        resolution = torch.tensor([height * 8.0, width * 8.0]).expand(size, -1)
        aspect_ratio = torch.tensor([height / width]).expand(size, -1)
        given["added_cond_kwargs"] = {"resolution": resolution, "aspect_ratio": aspect_ratio}
    return pipe.transformer(noised, timestep=timesteps, **given).sample


def hooked(name, pipe, noised, taps):
    """What forward hooks on diffusers' own modules see during its own call, at the image's tokens."""
    transformer = pipe.transformer
    lists = ("joint_transformer_blocks", "transformer_blocks", "single_transformer_blocks", "layers", "blocks")
    blocks = [block for each in lists for block in getattr(transformer, each, [])]
    num_tokens = noised.shape[-1] * noised.shape[-2] // (1 if name in ("sana", "flux2") else 4)
    image = slice(num_tokens) if name == "z_image" else slice(-num_tokens, None)
    seen, handles = {}, []
    for index, feature in taps:
        block = blocks[index]
        attention = next(getattr(block, each) for each in ("attn1", "attn", "attention") if hasattr(block, each))
        modules = {"query": "to_q", "key": "to_k", "value": "to_v"}
        # Query, key and value, and maybe the MLP, in one layer.
        fused = next((each for each in ("img_qkv_proj", "to_qkv_mlp_proj") if hasattr(attention, each)), None)
        third = None
        if fused and feature in modules:
            third = slice(list(modules).index(feature) * WIDTH, (list(modules).index(feature) + 1) * WIDTH)
            modules = dict.fromkeys(modules, fused)
        # What the attention reads is its first argument, however the family calls it.
        is_input = feature == "normed"
        module = block if feature == "hidden" else getattr(attention, modules.get(feature, ""), attention)

        def keep(_module, inputs, keywords, output, key=(index, feature), is_input=is_input, third=third):
            value = output
            if is_input:
                value = inputs[0] if inputs else keywords["hidden_states"]
            elif isinstance(output, tuple):
                # A block of two streams gives the text first, but for CogView's, and an attention the image.
                value = output[1] if key[1] == "hidden" and name != "cogview4" else output[0]
            seen[key] = value[:, image] if third is None else value[:, image, third]

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        prediction = call(name, pipe, noised, TIMESTEP)
    for handle in handles:
        handle.remove()
    return seen, prediction


def all_taps(config):
    blocks = range(config.num_hidden_layers)
    return [
        (block, feature)
        for block in blocks
        for feature in FEATURES
        if feature != "attention" or block < config.layout.num_attention_outputs
    ]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", PIPELINES)
def test_tokens_equal_hooks_in_diffusers_own_call_at_every_tap(saved, loaded, name):
    pipe, model = saved(name)[0], loaded(name)
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(2, model.denoiser.num_channels, 8, 8, generator=generator)
    taps = all_taps(model.config)
    seen, prediction = hooked(name, pipe, noised, taps)
    timesteps = torch.full((2,), TIMESTEP)
    with torch.no_grad():
        together = model._read_taps(noised, timesteps, taps)
        for block, feature in taps:
            close(together[block, feature], seen[block, feature])
            assert torch.equal(model._base().denoiser(noised, timesteps, block, feature), together[block, feature])
        found = model.denoiser.predict(noised, timesteps, torch.full((2,), model.denoiser.num_classes))
    close(found, prediction[:, : found.shape[1]])


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("dit", "sit")])
def test_tokens_of_a_picture_that_is_not_square_equal_diffusers_own(saved, loaded, name):
    pipe, model = saved(name)[0], loaded(name)
    noised = torch.randn(1, model.denoiser.num_channels, 8, 12, generator=torch.Generator().manual_seed(1))
    taps = [(0, "query"), (model.config.num_hidden_layers - 1, "hidden")]
    seen, _ = hooked(name, pipe, noised, taps)
    with torch.no_grad():
        found = model._read_taps(noised, torch.tensor([TIMESTEP]), taps)
    for tap in taps:
        close(found[tap], seen[tap])


# tests/test_vae.py has the VAEs of other kinds.
@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("qwen_image", "flux2", "wan")])
def test_latents_are_scaled_as_the_familys_pipeline_has_them(saved, loaded, name):
    pipe, model = saved(name)[0], loaded(name)
    height, width = model.config.image_height_width
    pixel_values = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = pipe.vae.encode(pixel_values)
        raw = encoded.latent if name == "sana" else encoded.latent_dist.mean
        # As the pipelines undo it before they decode: latents / scaling_factor + shift_factor.
        expected = (raw - (pipe.vae.config.get("shift_factor") or 0)) * pipe.vae.config.scaling_factor
        found = model.encode(pixel_values)
    close(found, expected)
    assert found.shape[1] == model.denoiser.num_channels
    tokens = model(pixel_values).last_hidden_state
    rows, columns = grid_of(found, model.config.layout.patch_size)
    assert tokens.shape == (2, rows * columns, model.config.feature_size)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_classifier_selects_trains_saves_and_reloads(saved, name, tmp_path):
    # Without images: each family generates its own.
    options = {"num_labels": 3, "timestep": "auto", **HEAD, **OPTIONS.get(name, {})}
    if name.startswith("sd3"):
        options["image_size"] = 64
    calibration = torch.rand(4, 3, 64, 64) * 2 - 1 if name != "sana" else None
    model = DiTForImageClassification.from_pretrained(saved(name)[1], calibration_images=calibration, **options)
    assert 0 <= model.config.timestep < 1000
    assert model.config.selection["pictures"] == ("given" if calibration is not None else "generated")
    height, width = model.config.image_height_width
    pixel_values = torch.rand(2, 3, height, width) * 2 - 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(pixel_values, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    model.save_pretrained(tmp_path)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        # Not to the bit: how a tensor lies in memory decides by which way a CPU multiplies it.
        first, second = model.eval().backbone(pixel_values), again.backbone(pixel_values)
        close(second.last_hidden_state, first.last_hidden_state)
        # PixArt's images differ in 1e-10 of the features' variance, and standardizing them makes much of rounding.
        if model.config.selection["share_between_images"] > 1e-6:
            close(again(pixel_values).logits, model(pixel_values).logits, 1e-2)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_called_unused_gets_no_gradient_and_all_else_does(loaded, name):
    """Else distributed training, which waits for each gradient, would hang or fail."""
    model = loaded(name)
    transformer = model.denoiser.transformer
    noised = torch.randn(2, model.denoiser.num_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    for block, feature in [(-1, "hidden"), *all_taps(model.config)]:
        for parameter in transformer.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        model.denoiser.train(False)
        model._base().denoiser(noised, torch.full((2,), TIMESTEP), block, feature).square().sum().backward()
        without = {name for name, parameter in transformer.named_parameters() if parameter.grad is None}
        unused = {id(parameter) for parameter in model.denoiser.unused_parameters([(block, feature)])}
        assert without == {name for name, parameter in transformer.named_parameters() if id(parameter) in unused}
        whole = {id(each) for part in model.denoiser.unused_modules(block, feature) for each in part.parameters()}
        assert len(whole) > 1 and whole <= unused
    model.freeze()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_call_ends_with_the_tap(loaded, name):
    model = loaded(name)
    noised = torch.randn(1, model.denoiser.num_channels, 8, 8)
    for block, feature in all_taps(model.config):
        ended = []
        after = model.denoiser.blocks[block + (feature == "hidden") :]
        handles = [each.register_forward_hook(lambda module, *_, ended=ended: ended.append(module)) for each in after]
        with torch.no_grad():
            model._base().denoiser(noised, torch.tensor([5]), block, feature)
        for handle in handles:
            handle.remove()
        assert not ended, (block, feature)


def test_the_matrix_of_families_is_all_but_two():
    assert {"dit", "sd3"} | MATRIX == set(PIPELINES)


def test_every_family_has_a_pipeline_here():
    assert {type(PIPELINES[name]().transformer).__name__ for name in PIPELINES} == set(FAMILIES)
    folded = {type(PIPELINES[name]().transformer).__name__ for name in FOLDED_PIPELINES}
    assert folded == set(FOLDED)


@pytest.mark.family
def test_keys_of_lumina_are_narrower_than_its_queries(loaded):
    model = loaded("lumina2")
    tokens = model._read_taps(torch.randn(1, 16, 8, 8), torch.tensor([5]), [(1, "query"), (1, "key"), (1, "value")])
    assert [tokens[1, name].shape[-1] for name in ("query", "key", "value")] == [WIDTH, WIDTH // 2, WIDTH // 2]
    head = DiTForImageClassification(ASelectConfig(**{**model.config.to_dict(), "feature": "key", "num_labels": 2}))
    assert head(torch.rand(1, 3, 64, 64)).logits.shape == (1, 2)


@pytest.mark.parametrize(("name", "limit"), [("sd3", 192), ("lumina2", 256)])
def test_a_forward_pass_beyond_the_position_table_is_refused(loaded, name, limit):
    with pytest.raises(
        ValueError,
        match=rf"at most {limit} pixels, the size of this transformer's position table.*got {limit + 16}×64",
    ):
        loaded(name)(torch.rand(1, 3, limit + 16, 64))


def test_a_prompt_beyond_luminas_positions_is_refused(loaded):
    shapes = {"prompt_embeds": [1, 40, WIDTH]}
    with pytest.raises(ValueError, match="must have at most 32 tokens, got 40"):
        build_denoiser(ASelectConfig(**{**loaded("lumina2").config.to_dict(), "prompt_shapes": shapes}))


def test_flux_has_no_attention_where_it_is_projected_with_the_mlp(loaded):
    model = loaded("flux")
    config = model.config.to_dict()
    assert ASelectConfig(**{**config, "block": 1, "feature": "attention"}).feature == "attention"
    with pytest.raises(ValueError, match=r"Block 3 has no `attention`"):
        DiTBackbone(ASelectConfig(**{**config, "block": 1, "feature": "attention", "out_indices": [2, 4]}))
    with pytest.raises(ValueError, match=r"Block 2 has no `attention`, because only the first 2 blocks"):
        model.extract_features(torch.rand(1, 3, 64, 64), block=2, feature="attention")
    with pytest.raises(StrictDataclassError, match="Block 3 has no `attention`"):
        ASelectConfig(**{**model.config.to_dict(), "block": -1, "feature": "attention"})


@pytest.mark.family
def test_the_guidance_changes_what_a_distilled_transformer_sees_and_no_other(saved):
    pixel_values = torch.rand(1, 3, 64, 64)
    for name, changes in (("flux_dev", True), ("flux", False)):
        found = [
            DiTModel.from_pretrained(saved(name)[1], timestep=5, guidance=guidance)(pixel_values).last_hidden_state
            for guidance in (1.0, 3.5)
        ]
        assert torch.equal(*found) != changes


def test_a_sana_with_a_guidance_is_refused():
    config = dict(sana_transformer(guidance_embeds=True).config)
    with pytest.raises(ValueError, match="Sana-Sprint"):
        ASelectConfig(transformer={**config, "_class_name": "SanaTransformer2DModel"})


def test_an_unknown_family_is_refused_by_naming_those_we_have():
    with pytest.raises(
        ValueError, match=r"Unsupported transformer 'CogVideoXTransformer3DModel'; supported are DiT.*register_family"
    ):
        ASelectConfig(transformer={"_class_name": "CogVideoXTransformer3DModel"})


def test_another_embedding_than_diffusers_is_refused_where_there_is_none(saved):
    with pytest.raises(ValueError, match=r"`timestep_embedding` of SD3.* must be one of diffusers, got 'original'"):
        DiTModel.from_pretrained(saved("sd3")[1], timestep=5, timestep_embedding="original")


def test_a_missing_prompt_is_refused():
    config = dict(flux_transformer().config)
    with pytest.raises(ValueError, match=r"conditioned on prompt_embeds, pooled_prompt_embeds.*has none"):
        build_denoiser(ASelectConfig(transformer={**config, "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(StrictDataclassError, match="takes no text prompt"):
        ASelectConfig(prompt_shapes={"prompt_embeds": [1, 1, 8]})


def test_pictures_beyond_the_position_table_are_refused(saved):
    with pytest.raises(StrictDataclassError, match=r"`image_size` must be at most 192 pixels per side"):
        DiTModel.from_pretrained(saved("sd3")[1], timestep=5, image_size=208)


@pytest.mark.parametrize("name", ["dit", "pixart_sigma"])
def test_other_sizes_have_the_position_table_that_diffusers_makes(saved, name):
    model = DiTModel.from_pretrained(saved(name)[1], timestep=TIMESTEP, image_size=[128, 64])
    pipe = PIPELINES[name]()
    noised = torch.randn(1, 4, 16, 8)
    with torch.no_grad():
        expected = pipe.transformer.pos_embed(noised)
        close(model.denoiser(noised, 5, -1, "hidden"), expected)


@pytest.mark.parametrize("name", ["dit", "pixart_alpha", "sana", "lumina2"])
def test_what_no_checkpoint_holds_is_there_after_loading(saved, name):
    """Position tables and rotary frequencies: loading builds the model without data."""
    model = DiTModel.from_pretrained(saved(name)[1], timestep=5)
    tokens = model.extract_features(torch.rand(1, 3, *model.config.image_height_width))
    assert bool(tokens.isfinite().all())


def test_a_position_table_with_an_interpolation_scale_is_made_anew():
    pipe = pixart_alpha(interpolation_scale=2)
    config = ASelectConfig(
        transformer={**pipe.transformer.config, "_class_name": "PixArtTransformer2DModel"},
        prompt_shapes={"prompt_embeds": [1, 1, WIDTH]},
    )
    with torch.device("meta"):
        table = build_denoiser(config).patch_embedding.pos_embed
    assert torch.equal(table, pipe.transformer.pos_embed.pos_embed)
    assert not torch.equal(table, pixart_alpha().transformer.pos_embed.pos_embed)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_half_precision_keeps_the_vae_and_changes_tokens_little(saved, loaded, name):
    exact = loaded(name)
    model = DiTModel.from_pretrained(saved(name)[1], timestep=TIMESTEP, dtype=torch.bfloat16, **OPTIONS.get(name, {}))
    assert {parameter.dtype for parameter in model.vae.parameters()} == {torch.float32}
    assert model.denoiser.prompt_embeds.dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(1, 3, *model.config.image_height_width, generator=generator) * 2 - 1
    with torch.no_grad():
        found, expected = model(pixel_values).last_hidden_state.float(), exact(pixel_values).last_hidden_state
    assert (
        float((found - expected).norm() / expected.norm()) < 0.1
    )  # bfloat16 has 3 digits, and there are some dozen layers


@pytest.mark.family
def test_sd3_does_without_t5_as_diffusers_does(tmp_path):
    pipe = sd3(t5_too=False)
    pipe.save_pretrained(tmp_path / "without")
    sd3().save_pretrained(tmp_path / "with")
    absent = DiTModel.from_pretrained(tmp_path / "without", timestep=5)
    dropped = DiTModel.from_pretrained(tmp_path / "with", timestep=5, text_encoder_3=None, tokenizer_3=None)
    whole = DiTModel.from_pretrained(tmp_path / "with", timestep=5)
    with torch.no_grad():
        expected = pipe.encode_prompt("", "", "", do_classifier_free_guidance=False)[0]
    close(absent.denoiser.prompt_embeds, expected)
    assert torch.equal(absent.denoiser.prompt_embeds, dropped.denoiser.prompt_embeds)
    assert not torch.equal(whole.denoiser.prompt_embeds, dropped.denoiser.prompt_embeds)


def test_a_configuration_is_built_as_it_says():
    """diffusers' own configuration lists what was left at its default, and would take the default again."""
    config = dict(flux_transformer().config)
    config |= {"_use_default_values": ["num_single_layers"], "num_single_layers": 1}
    shapes = {"prompt_embeds": [1, 2, WIDTH], "pooled_prompt_embeds": [1, 8]}
    config = ASelectConfig(transformer={**config, "_class_name": "FluxTransformer2DModel"}, prompt_shapes=shapes)
    assert len(build_denoiser(config).blocks) == config.num_hidden_layers == 3


@pytest.mark.family
def test_loading_chooses_a_timestep_in_batches_that_large_pictures_allow(saved):
    sizes = {}
    for image_size in (64, 1024):
        model = DiTModel.from_pretrained(
            saved("flux")[1],
            timestep="auto",
            image_size=image_size,
            calibration_images=torch.rand(2, 3, 64, 64),
        )
        sizes[image_size] = model.config.selection["options"]["batch_size"]
    assert sizes == {64: 32, 1024: 8}


@pytest.mark.skipif(not hasattr(DiTModel, "activation_checkpointing_enable"), reason="of later transformers")
@pytest.mark.parametrize(
    ("name", "folded"),
    [(name, folded) for name in PIPELINES for folded in (False, True) if name not in DESCRIBED or not folded],
)
def test_gradients_with_checkpoints_are_those_without(saved, name, folded):
    options = {"freeze_backbone": False, "zeroed_channels": [], "block": 1, "feature": "hidden", **HEAD}
    torch.manual_seed(0)
    model = DiTForImageClassification.from_pretrained(
        saved(name)[1], timestep=TIMESTEP, num_labels=3, **options, **OPTIONS.get(name, {})
    )
    model = (model.fold() if folded else model).train()
    height, width = model.config.image_height_width
    pixels = (
        torch.rand(2, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    block = model.backbone.denoiser.blocks[0]
    (layer, *_) = (module for module in block.modules() if isinstance(module, torch.nn.Linear))
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    gradients, runs = [], []
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable()
        model.zero_grad()
        calls.clear()
        model(pixels, labels=torch.tensor([0, 2])).loss.backward()
        runs.append(len(calls))
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert runs[1] == 2 * runs[0]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(DiTModel, "activation_checkpointing_enable"), reason="of later transformers")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("feature", ["hidden", "query"])
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_checkpoints_that_reenter_lose_no_gradient(saved, name, feature):
    """They run a block without gradients, so that what is read inside of it would have none, nor what has a name."""
    options = {"freeze_backbone": False, "zeroed_channels": [], "block": 1, "feature": feature}
    model = DiTModel.from_pretrained(saved(name)[1], timestep=TIMESTEP, **options, **OPTIONS.get(name, {})).train()
    noised = torch.randn(2, model.denoiser.num_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable(*([{"use_reentrant": True}] if gradients else []))
        model.zero_grad()
        model.denoiser(noised, TIMESTEP, 1, feature).square().sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)
