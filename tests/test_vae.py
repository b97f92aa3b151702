"""The kinds of VAE: latents are those of diffusers' own pipelines, and what is kept is enough to encode."""

import pytest
import torch
from conftest import HEAD
from diffusers import (
    AutoencoderKLQwenImage,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    QwenImageImg2ImgPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_img2img
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from pipelines import dc, dit_transformer, flux2_vae, images_of, kl, video_vae

from hf_aselect import ASelectConfig, DiTForImageClassification, DiTModel, convert_diffusers
from hf_aselect.model.vae import encode_images, keep_encoder

# Deviations and means that Wan 2.2 publishes are other ones; for a test any will do.
WAN22 = {
    "z_dim": 4,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "latents_mean": [-0.2, 0.1, 0.3, 0.0],
    "latents_std": [0.5, 1.5, 2.0, 0.9],
}
VAES = {
    "flux": lambda: kl(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
    "dc": dc,
    "flux2": flux2_vae,
    "qwen": lambda: video_vae(AutoencoderKLQwenImage),
    "wan": video_vae,
    "wan22": lambda: video_vae(**WAN22),
}
# Pixels a side and channels of a latent.
SIZES = {"flux": (8, 16), "dc": (2, 4), "flux2": (16, 16), "qwen": (8, 16), "wan": (8, 16), "wan22": (16, 4)}


def pipelines_latents(name, vae, pixel_values):
    """What diffusers' pipeline makes of images, (B, C, h, w), one by one where it does."""
    if name == "flux2":
        pipe = Flux2KleinPipeline(vae=vae, scheduler=None, text_encoder=None, tokenizer=None, transformer=None)
        return pipe._encode_vae_image(pixel_values, generator=None)
    if name == "qwen":
        parts = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "transformer"))
        return QwenImageImg2ImgPipeline(vae=vae, **parts)._encode_vae_image(pixel_values[:, :, None], None)[:, :, 0]
    if name.startswith("wan"):
        scheduler = FlowMatchEulerDiscreteScheduler()
        # Clean latents are what is asked for.
        scheduler.add_noise = lambda clean, noise, timestep: clean
        parts = dict.fromkeys(("text_encoder", "tokenizer", "transformer"))
        pipe = WanVideoToVideoPipeline(vae=vae, scheduler=scheduler, **parts)
        size, _, height, width = pixel_values.shape
        clean = pipe.prepare_latents(
            pixel_values[:, :, None],
            batch_size=size,
            num_channels_latents=vae.config.z_dim,
            height=height,
            width=width,
            dtype=torch.float32,
            device="cpu",
            generator=torch.Generator().manual_seed(0),
        )
        return clean[:, :, 0]
    if name == "dc":
        return vae.encode(pixel_values).latent * vae.config.scaling_factor
    return (vae.encode(pixel_values).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline of a DiT on the latents of each VAE, and the folder that diffusers saved it in."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            channels = SIZES[name][1]
            transformer = dit_transformer(in_channels=channels, out_channels=channels)
            DiTPipeline(
                transformer=transformer, vae=kl(), scheduler=FlowMatchEulerDiscreteScheduler()
            ).save_pretrained(folder)
            vae = VAES[name]()
            vae.save_pretrained(folder / "vae")
            made[name] = vae, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", VAES)
def test_latents_are_those_of_diffusers_pipeline(saved, name, monkeypatch):
    # The mean in place of a sample, as other pipelines of diffusers take.
    monkeypatch.setattr(
        pipeline_qwenimage_img2img, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode()
    )
    vae, folder = saved(name)
    model = DiTModel.from_pretrained(folder, timestep=5).eval()
    side, channels = SIZES[name]
    assert (model.config.vae_scale_factor, model.config.num_channels) == (side, 3)
    pixel_values = images_of(model, (3 * side * 2, 2 * side * 2), num=1)
    with torch.no_grad():
        latents = model.encode(pixel_values)
        expected = pipelines_latents(name, vae, pixel_values)
    assert latents.shape == (1, channels, 6, 4)
    assert torch.equal(latents, expected)
    # Of two images each one is encoded as if it were alone.
    both = torch.cat([pixel_values, -pixel_values])
    with torch.no_grad():
        torch.testing.assert_close(model.encode(both)[:1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flux2", "qwen", "wan22"])
def test_a_model_on_a_vae_of_each_kind_is_converted_saved_and_loaded(saved, tmp_path, name):
    _, folder = saved(name)
    made = convert_diffusers(folder, tmp_path / "ours", dtype="bfloat16", timestep=5)
    # The decoder stays behind, and the normalisation does not.
    assert made.vae_decoder_bytes > 0.3 * made.vae_encoder_bytes
    model = DiTForImageClassification.from_pretrained(made.output, num_labels=3, **HEAD).eval()
    assert {value.dtype for value in model.base_model.vae.state_dict().values()} == {torch.float32}
    pixel_values = images_of(model)
    source = DiTModel.from_pretrained(folder, timestep=5).eval()
    with torch.no_grad():
        assert torch.equal(model.encode(pixel_values), source.encode(pixel_values))
    model.save_pretrained(tmp_path / "again")
    again = DiTForImageClassification.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values).logits, model(pixel_values).logits)
    assert again.generate_latents(1, num_steps=2).shape[1:] == source.encode(pixel_values).shape[1:]


@pytest.mark.parametrize("name", ["qwen", "wan"])
def test_encoding_leaves_nothing_in_the_vae(saved, name):
    # diffusers' `encode` keeps the frames before there, where a second thread that encodes would find them.
    model = DiTModel.from_pretrained(saved(name)[1], timestep=5).eval()
    before = set(vars(model.vae))
    with torch.no_grad():
        model.encode(images_of(model, (32, 32)))
    assert set(vars(model.vae)) == before


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="to torch 2.6 `get` of a mapping is `[]`")
@pytest.mark.parametrize("name", VAES)
def test_encoding_is_compiled_without_a_break_and_exported(name):
    vae, pixel_values = keep_encoder(VAES[name]()).eval(), torch.rand(1, 3, 32, 32) * 2 - 1

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, images):
            return encode_images(self.vae, images)

    encoder = Encoder().eval()
    with torch.no_grad():
        expected = encoder(pixel_values)
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)(pixel_values)
        exported = torch.export.export(encoder, (pixel_values,), strict=False).module()(pixel_values)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(exported, expected)


def configuration(name, **changes):
    vae = {**dict(VAES[name]().config), **changes}
    channels = SIZES[name][1]
    transformer = {**dict(dit_transformer(in_channels=channels).config), "_class_name": "DiTTransformer2DModel"}
    kind = {"wan": "AutoencoderKLWan", "qwen": "AutoencoderKLQwenImage", "flux2": "AutoencoderKLFlux2"}[name]
    return ASelectConfig(transformer=transformer, vae={**vae, "_class_name": kind}, timestep=5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("wan", {"latents_std": None}, "`vae` lacks latents_std. Pass the VAE itself"),
        ("qwen", {"latents_mean": [0.0] * 15}, "`latents_mean` of `vae` must be a list of 16 finite numbers"),
        ("wan", {"latents_std": [0.0] + [1.0] * 15}, "`latents_std` of `vae` .*standard deviations not 0"),
        ("wan", {"latents_std": [float("nan")] * 16}, "`latents_std` of `vae` must be a list of 16 finite numbers"),
        ("wan", {"z_dim": 0}, "`z_dim` of `vae` must be a positive integer, got 0"),
        ("wan", {"patch_size": "2"}, "`patch_size` of `vae` must be a positive integer, got '2'"),
        ("qwen", {"dim_mult": []}, "`dim_mult` of `vae` must have 1 to 16 entries"),
        ("flux2", {"batch_norm_eps": "x"}, "`batch_norm_eps` of `vae` must be a number >= 0, got 'x'"),
        ("flux2", {"latent_channels": 5}, "takes latents of 16 channels, but the VAE returns 20"),
    ],
)
def test_a_broken_configuration_of_a_vae_is_refused(name, changes, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        configuration(name, **changes)
    configuration(name)


def test_the_channels_of_an_image_are_those_of_the_vae():
    assert configuration("qwen", input_channels=4).num_channels == 4
    assert configuration("wan", in_channels=12, patch_size=2).num_channels == 3
    # As published, without the field.
    assert configuration("qwen", input_channels=None).num_channels == 3


def test_other_vaes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Unsupported VAE 'AutoencoderKLLTXVideo'.*AutoencoderKLWan.*`vae=None`"):
        ASelectConfig(vae={"_class_name": "AutoencoderKLLTXVideo"})
