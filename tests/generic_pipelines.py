"""Tiny pipelines of the families that are not folded: diffusers' own classes."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from pipelines import SMALL, VOCABULARY, WIDTH, flux2_vae, gemma, kl, randomized, t5, tokenizer, video_vae
from transformers import (
    BertConfig,
    BertModel,
    GlmConfig,
    GlmModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5GemmaConfig,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

SIZES = {"attention_head_dim": 16, "num_attention_heads": 2}
# Of a language model that reads the prompt.
LANGUAGE_MODEL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def chat_tokenizer():
    """A tokenizer that knows how its model is spoken to."""
    made = tokenizer("<s> $A")
    made.chat_template = "{% for message in messages %}a {{ message['content'] }} cat{% endfor %}"
    return made


def qwen3(kind=Qwen3Model, **options):
    return randomized(kind(Qwen3Config(**{**LANGUAGE_MODEL, **options})))


def qwen25_vl():
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": WIDTH}
    text = {**LANGUAGE_MODEL, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4]}}
    return randomized(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)))


def umt5():
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
    return randomized(UMT5EncoderModel(UMT5Config(vocab_size=len(VOCABULARY), **sizes)))


def flux_vae():
    return kl(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def flux2(**options):
    # The text is three layers of the encoder, side by side.
    given = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
        **SIZES,
        **options,
    }
    return Flux2KleinPipeline(
        transformer=randomized(Flux2Transformer2DModel(**given)),
        vae=flux2_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=qwen3(Qwen3ForCausalLM, hidden_size=8, num_hidden_layers=28, head_dim=4),
        tokenizer=chat_tokenizer(),
    )


def z_image(**options):
    given = {
        "in_channels": 16,
        "dim": WIDTH,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 16, 16],
        **options,
    }
    return ZImagePipeline(
        transformer=randomized(ZImageTransformer2DModel(**given)),
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=qwen3(),
        tokenizer=chat_tokenizer(),
    )


def qwen_image(**options):
    given = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 3,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
        **SIZES,
        **options,
    }
    return QwenImagePipeline(
        transformer=randomized(QwenImageTransformer2DModel(**given)),
        vae=video_vae(AutoencoderKLQwenImage),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
        ),
        text_encoder=qwen25_vl(),
        tokenizer=tokenizer("$A"),
    )


def chroma(**options):
    given = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
        **SIZES,
        **options,
    }
    return ChromaPipeline(
        transformer=randomized(ChromaTransformer2DModel(**given)),
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def aura_flow(**options):
    given = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH,
        "pos_embed_max_size": 64,
        **SIZES,
        **options,
    }
    made = tokenizer()
    made.model_input_names = made.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    return AuraFlowPipeline(
        transformer=randomized(AuraFlowTransformer2DModel(**given)),
        vae=kl(scaling_factor=0.13025),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        text_encoder=umt5(),
        tokenizer=made,
    )


def cogview4(**options):
    given = {
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "sample_size": 8,
        **SIZES,
        **options,
    }
    return CogView4Pipeline(
        transformer=randomized(CogView4Transformer2DModel(**given)),
        vae=kl(16, scaling_factor=1.0, shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            time_shift_type="linear",
        ),
        text_encoder=randomized(GlmModel(GlmConfig(**LANGUAGE_MODEL))),
        tokenizer=tokenizer("<s> $A"),
    )


def hunyuan_dit(**options):
    given = {
        "in_channels": 4,
        "hidden_size": WIDTH,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": 4,
        **SMALL,
        "num_layers": 4,
        **options,
    }
    return HunyuanDiTPipeline(
        transformer=randomized(HunyuanDiT2DModel(**given)),
        vae=kl(scaling_factor=0.13025),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction"
        ),
        text_encoder=randomized(BertModel(BertConfig(**LANGUAGE_MODEL))),
        tokenizer=tokenizer("<s> $A </s>"),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lumina_next(**options):
    given = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": WIDTH,
        "num_layers": 3,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "cross_attention_dim": WIDTH,
        **options,
    }
    return LuminaPipeline(
        transformer=randomized(LuminaNextDiT2DModel(**given)),
        vae=kl(scaling_factor=0.13025),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=gemma(),
        tokenizer=tokenizer("<s> $A"),
    )


def prx(**options):
    given = {
        "in_channels": 16,
        "patch_size": 2,
        "context_in_dim": WIDTH,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "depth": 3,
        "axes_dim": [8, 8],
        **options,
    }
    config = T5GemmaConfig(encoder=dict(LANGUAGE_MODEL), decoder=dict(LANGUAGE_MODEL)).encoder
    # diffusers reads an encoder's sizes off the configuration of a whole model, which is what is published.
    config.encoder = dict(LANGUAGE_MODEL)
    made = PRXPipeline(
        transformer=randomized(PRXTransformer2DModel(**given)),
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=randomized(T5GemmaEncoder(config)),
        tokenizer=tokenizer("<s> $A"),
    )
    # It needs ftfy, and an empty prompt is clean.
    made.text_preprocessor.clean_text = str
    return made


def longcat(**options):
    given = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "axes_dims_rope": [4, 6, 6],
        **SIZES,
        **options,
    }
    return LongCatImagePipeline(
        transformer=randomized(LongCatImageTransformer2DModel(**given)),
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=qwen25_vl(),
        tokenizer=tokenizer("$A"),
        text_processor=None,
    )


def wan_transformer(**options):
    given = {
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_max_seq_len": 32,
        **SIZES,
        **options,
    }
    return randomized(WanTransformer3DModel(**given))


def wan(vae=video_vae, expand_timesteps=False, **options):
    return WanPipeline(
        transformer=wan_transformer(**options),
        vae=vae(),
        expand_timesteps=expand_timesteps,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=umt5(),
        tokenizer=tokenizer(),
    )


GENERIC_PIPELINES = {
    "flux2": flux2,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "chroma": chroma,
    "aura_flow": aura_flow,
    "cogview4": cogview4,
    "hunyuan_dit": hunyuan_dit,
    "lumina_next": lumina_next,
    "prx": prx,
    "longcat": longcat,
    "wan": wan,
}


class OneStep(FlowMatchEulerDiscreteScheduler):
    """A scheduler of one timestep, which keeps what the transformer predicts, as a pipeline hands it over."""

    timestep, prediction, init_noise_sigma = 0, None, 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.num_inference_steps, self.timesteps = 1, torch.tensor([float(self.timestep)])

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, **options):
        self.prediction = model_output
        return FlowMatchEulerDiscreteSchedulerOutput(sample)


def prediction_of(name, pipe, noised, timestep, pixels=8):
    """What a pipeline's transformer predicts of latents with the empty prompt, in the pipeline's own call of it."""
    size, _, height, width = noised.shape
    scheduler = OneStep()
    scheduler.timestep = unshifted(timestep, height * width // 4) if name == "cogview4" else timestep
    trained_with, pipe.scheduler = pipe.scheduler, scheduler
    is_packed = hasattr(pipe, "_unpack_latents")
    latents = pipe._pack_latents(noised, size, noised.shape[1], height, width) if is_packed else noised
    latents = latents[:, :, None] if name == "wan" else latents
    pixels = 16 if name == "flux2" else pixels
    given = {"height": pixels * height, "width": pixels * width, "guidance_scale": 0.0, "output_type": "latent"}
    handles = [pipe.transformer.register_forward_pre_hook(hide_padding, with_kwargs=True)] if name == "chroma" else []
    try:
        pipe.set_progress_bar_config(disable=True)
        pipe(prompt=[""] * size, latents=latents, num_inference_steps=1, **{**given, **CALLED_WITH.get(name, {})})
    finally:
        pipe.scheduler = trained_with
        for handle in handles:
            handle.remove()
    output = scheduler.prediction
    if name == "flux2":
        return output.mT.reshape(noised.shape)
    output = pipe._unpack_latents(output, 8 * height, 8 * width, 8) if is_packed else output
    return output.reshape(noised.shape)


def unshifted(timestep, num_tokens):
    """What CogView4's transformer is given at the noise level of a timestep, which is shifted by the image's size."""
    return 1000 / (1 + calculate_shift(num_tokens) * (1000 / timestep - 1))


CALLED_WITH = {
    # Else an image has one of the sizes that the model was trained with.
    "hunyuan_dit": {"use_resolution_binning": False},
    "longcat": {"enable_prompt_rewrite": False},
    # 1 is no guidance.
    "prx": {"use_resolution_binning": False, "guidance_scale": 1.0},
    "wan": {"num_frames": 1},
}


def hide_padding(transformer, args, kwargs):
    """Make a mask of Chroma's mask, which diffusers 0.42 adds to the attention scores as it is: 0 and 1."""
    return args, {**kwargs, "attention_mask": kwargs["attention_mask"].bool()}
