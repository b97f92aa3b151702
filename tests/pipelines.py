"""Tiny pipelines of every transformer family, with random weights: diffusers' own classes."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 32  # of the tokens and of the text encoders' embeddings
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "cat": 5}


def randomized(module):
    """Give a module weights every one of which matters, small enough for a dozen blocks."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.1, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return module.eval()


def tokenizer(template="$A </s>", length=16):
    """A tokenizer of six words; `template` is what it puts around a text."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, index) for word, index in VOCABULARY.items() if word in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side="right",
    )


def clip(projection=True, width=8):
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomized((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5():
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0
    )
    return randomized(T5EncoderModel(config))


def gemma():
    config = Gemma2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomized(Gemma2Model(config))


def kl(channels=4, **options):
    return randomized(
        AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            **options,
        )
    )


def dc():
    return randomized(
        AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="stride_conv",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        )
    )


def flux2_vae():
    """FLUX.2's VAE, with statistics of its batch norm that are neither 0 nor 1."""
    vae = randomized(
        AutoencoderKLFlux2(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    )
    generator = torch.Generator().manual_seed(1)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.5, 2, generator=generator)
    return vae


def video_vae(kind=AutoencoderKLWan, **options):
    """The VAE of Wan 2.1, or Qwen-Image's, with latents of 16 channels and the published means and deviations."""
    return randomized(kind(base_dim=4, num_res_blocks=1, **options))


SMALL = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8, "patch_size": 2}


def dit_transformer(**options):
    given = {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10, **SMALL, **options}
    return randomized(DiTTransformer2DModel(**given))


def sd3_transformer(**options):
    given = {
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 12,
        **SMALL,
        **options,
    }
    return randomized(SD3Transformer2DModel(**given))


def pixart_transformer(**options):
    given = {"cross_attention_dim": WIDTH, "caption_channels": WIDTH, **SMALL, **options}
    return randomized(PixArtTransformer2DModel(**given))


def flux_transformer(**options):
    given = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
        **options,
    }
    return randomized(FluxTransformer2DModel(**given))


def sana_transformer(**options):
    given = {
        "in_channels": 4,
        "out_channels": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
        **SMALL,
        "patch_size": 1,
        **options,
    }
    return randomized(SanaTransformer2DModel(**given))


def lumina2_transformer(**options):
    given = {
        "sample_size": 8,
        "in_channels": 16,
        "hidden_size": WIDTH,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 8,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (32, 16, 16),
        "cap_feat_dim": WIDTH,
        **options,
    }
    return randomized(Lumina2Transformer2DModel(**given))


def dit(**options):
    return DiTPipeline(transformer=dit_transformer(**options), vae=kl(), scheduler=DDIMScheduler(clip_sample=False))


def sit(**options):
    pipe = dit(**options)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe


def sd3(t5_too=True, **options):
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(**options),
        vae=kl(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(),
        tokenizer=tokenizer("<s> $A </s>"),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer("<s> $A </s>"),
        text_encoder_3=t5() if t5_too else None,
        tokenizer_3=tokenizer() if t5_too else None,
    )


def sd35(**options):
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1), **options)


def pixart_alpha(**options):
    # The embeddings of size and aspect ratio are thirds of the width.
    sizes = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 48}
    return PixArtAlphaPipeline(
        transformer=pixart_transformer(**sizes, **options),
        vae=kl(),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def pixart_sigma(**options):
    return PixArtSigmaPipeline(
        transformer=pixart_transformer(**options),
        vae=kl(),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def flux(**options):
    return FluxPipeline(
        transformer=flux_transformer(**options),
        vae=kl(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=clip(projection=False),
        tokenizer=tokenizer("<s> $A </s>"),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


def flux_dev(**options):
    return flux(guidance_embeds=True, **options)


def sana(**options):
    return SanaPipeline(
        transformer=sana_transformer(**options),
        vae=dc(),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        text_encoder=gemma(),
        tokenizer=tokenizer("<s> $A"),
    )


def lumina2(**options):
    return Lumina2Pipeline(
        transformer=lumina2_transformer(**options),
        vae=kl(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        text_encoder=gemma(),
        tokenizer=tokenizer("<s> $A"),
    )


# Sizes of tiny weights by the names of the research code of DiT, SiT and REPA.
RESEARCH = {"width": 64, "heads": 4, "depth": 3, "channels": 4, "classes": 10, "patch": 2, "side": 8}


def position_table(width, side):
    """The original's fixed positions: columns first, then rows, each half sines and half cosines."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    places = torch.arange(side, dtype=torch.float64)
    columns, rows = places.repeat(side), places.repeat_interleave(side)
    halves = [torch.outer(each, omega) for each in (columns, rows)]
    return torch.cat([part for half in halves for part in (half.sin(), half.cos())], 1)[None].float()


def research_shapes(width, depth, patch=2, channels=4, outputs=8, classes=1000, side=32):
    """Names and shapes of the research code's tensors."""
    shapes = {
        "pos_embed": (1, (side // patch) ** 2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (patch**2 * outputs, width),
        "final_layer.linear.bias": (patch**2 * outputs,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    parts = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    parts |= {"adaLN_modulation.1": (6, 1)}
    for block in range(depth):
        for part, (rows, columns) in parts.items():
            shapes[f"blocks.{block}.{part}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{block}.{part}.bias"] = (rows * width,)
    return shapes


def research_weights(seed=0, **sizes):
    """Random weights by those names, every one of which matters."""
    names = ("width", "depth", "patch", "channels", "classes", "side")
    sizes = {name: RESEARCH[name] for name in names} | {"outputs": RESEARCH["channels"], **sizes}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in research_shapes(**sizes).items()}
    return weights | {"pos_embed": position_table(sizes["width"], sizes["side"] // sizes["patch"])}


class ResearchPort:
    """A SiT in diffusers' folders that keeps the names of the research code, as ports on the Hub do."""

    def __init__(self, scheduler=None, vae=None, **config):
        self.scheduler, self.vae = scheduler or FlowMatchEulerDiscreteScheduler(), vae
        self.config = {"_class_name": "SiTTransformer2DModel", "depth": RESEARCH["depth"], "learn_sigma": True}
        self.config |= {"hidden_size": RESEARCH["width"], "num_heads": RESEARCH["heads"]}
        self.config |= {"input_size": RESEARCH["side"], "patch_size": RESEARCH["patch"]}
        self.config |= {"in_channels": RESEARCH["channels"], "num_classes": RESEARCH["classes"], **config}

    def save_pretrained(self, folder):
        transformer = Path(folder) / "transformer"
        transformer.mkdir(parents=True)
        weights = research_weights(outputs=2 * RESEARCH["channels"])
        save_file(weights, transformer / "diffusion_pytorch_model.safetensors")
        (transformer / "config.json").write_text(json.dumps(self.config))
        self.scheduler.save_pretrained(Path(folder) / "scheduler")
        if self.vae is not None:
            self.vae.save_pretrained(Path(folder) / "vae")


PIPELINES = {
    "dit": dit,
    "sit": sit,
    "sd3": sd3,
    "sd35": sd35,
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "flux": flux,
    "flux_dev": flux_dev,
    "sana": sana,
    "lumina2": lumina2,
}


# What some families need to be loaded small: fields of the configuration.
LOAD_OPTIONS = {
    "dit": {"timestep_embedding": "diffusers"},
    "sit": {"timestep_embedding": "sit"},
    "flux": {"image_size": 64},
    "flux_dev": {"image_size": 64, "guidance": 3.5},
}


def images_of(model, size=None, num=2, seed=0):
    """Pixel values of a size, by default the model's."""
    height, width = size or model.config.image_height_width
    values = torch.rand(num, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(seed))
    return values * 2 - 1


def distance(tokens, expected):
    """The relative difference of two outputs."""
    assert tokens.shape == expected.shape
    return float((tokens.double() - expected.double()).norm() / expected.double().norm())
