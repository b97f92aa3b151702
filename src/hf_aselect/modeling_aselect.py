"""What all models share, and the one without a head: a diffusion transformer read at one timestep."""

import copy
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_aselect import ASelectConfig, refuse_unknown_keywords
from .decoders import token_map
from .denoisers import build_denoiser, build_sampler, build_vae_encoder
from .diffusers_checkpoint import find_diffusers
from .diffusers_files import HubOptions, refuse_other_than_safetensors
from .empty_prompt import TEXT_PARTS
from .field_checks import check_timestep
from .folding import fold_denoiser
from .generation import generate_latents
from .heads import AttentionHead
from .input_checks import check_floats, check_latents, check_pixel_values
from .loading import HUB_OPTIONS, check_dtypes, check_files, check_loaded, take_diffusers
from .massive_channels import zero_channels
from .model_card import inherited_license
from .noise_schedule import NoiseSchedule, fixed_noise
from .selection_record import TimestepSelection
from .sharing import ShareableModel
from .taps import MASSIVE_FEATURES, Tap, tap_key
from .timestep_selection import select_timestep
from .whole_folder import finish_files

logger = logging.getLogger(__name__)

MAX_TOKENS = 2**15  # in one forward pass of a choice that loading makes
MAX_KEPT_NOISE = 64  # tensors of fixed noise: pictures may be of many sizes


class ASelectPreTrainedModel(ShareableModel):
    """What all models share: loading, weight initialisation, and the road from pictures to tokens."""

    config: ASelectConfig
    task: ClassVar[str] = "image-feature-extraction"
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules: set[str] | list[str] | None = [  # noqa: RUF012 - the host's way
        "AttentionHeadBlock",
        "BasicTransformerBlock",
        "FoldedBlock",
        "FoldedLumina2Block",
        "FoldedSanaBlock",
        "FoldedSingleBlock",
        "FluxSingleTransformerBlock",
        "FluxTransformerBlock",
        "JointTransformerBlock",
        "Lumina2TransformerBlock",
        "SanaTransformerBlock",
    ]
    supports_gradient_checkpointing = True
    # Of folded models; in the others diffusers runs its own kernels.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Encoders overflow in float16, and in bfloat16 latents lose what a small timestep leaves of them.
    _keep_in_fp32_modules_strict = {"vae"}  # noqa: RUF012 - the host's way

    def post_init(self) -> None:
        """Finish building, as the host's; of the modules that it is told of only those that are here are named."""
        super().post_init()
        # accelerate's FSDP refuses a model that names a class which it does not hold: those of all other families.
        here = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules or () if name in here}
        if self._base().vae is None:
            self._keep_in_fp32_modules_strict = set()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        denoiser = self._base().denoiser
        if denoiser.position_embedding is not None and module is denoiser.position_embedding:
            # diffusers keeps the table out of checkpoints, and loading builds the model without data.
            init.copy_(module.pos_embed, denoiser.position_table())
        if module is denoiser:
            # Positions of a folded model, the empty prompt: nothing until they are loaded.
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                init.zeros_(tensor)
        if isinstance(module, AttentionHead):
            init.zeros_(module.class_token)
            # As in ViT and DiT. With the host's narrow normal distribution a small head learns several times slower.
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    init.xavier_uniform_(layer.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that makes tokens of noised latents; peft and accelerate's FSDP ask for it."""
        module: nn.Module = self._base().denoiser.patch_embedding
        return module

    def _base(self) -> "DiTModel":
        """Return the model that holds the denoiser: this one, or the one under the head."""
        base: DiTModel = self.base_model  # type: ignore[assignment]
        return base

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        calibration_images: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model and, where its timestep is "auto", choose the timestep.

        Args:
            pretrained_model_name_or_path: A checkpoint of ours (folder or id on the Hub); a pipeline of diffusers
                (folder or id), or as much of one as `transformer/` and `scheduler/` (and `vae/` for a DiT in latent
                space); or a bare diffusers transformer (folder or id), taken for a DiT in pixel space with DiT's own
                noise schedule. Only what is needed is downloaded. A text-conditioned transformer is read with the
                empty prompt, which the pipeline's text encoders are loaded for, once. None to load nothing, but build
                the model of `config=` from the weights in `state_dict=`; what is missing there is new.
            args: Passed on to the host.
            calibration_images: Pictures to choose the timestep from, as in `select_timestep`. Without them the
                transformer generates some, which takes a while for a large one.
            kwargs: Fields of `ASelectConfig` (`timestep=`, `block=`, `num_labels=`, ...), or anything that
                `PreTrainedModel.from_pretrained` takes (`revision=`, `token=`, `variant=`, ...). diffusers' weights
                become float32 unless `dtype` says otherwise. With a text-conditioned pipeline also
                `text_encoder_3=None` and the like, to do without a part as diffusers does, or `prompt_embeds=`, the
                empty prompt's embeddings by name, to load no text encoder.

        Returns:
            The model in eval mode. Where the timestep was chosen here, `config.selection` holds the record.

        Raises:
            ValueError: If the folder is none of those, its files are broken, has only pickled weights, a part of the
                backbone's weights is missing (but for `output_loading_info=True`, which returns what is), a field is
                unknown or out of range, or `calibration_images` are given though the timestep is fixed.
            OSError: If a repository of the Hub is not found or may not be read, or the Hub cannot be reached.
        """
        source = pretrained_model_name_or_path
        output_loading_info = kwargs.pop("output_loading_info", False)
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("`use_safetensors=False` asks for pickled weights, which are never unpickled.")
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        path: str | os.PathLike[str] | None = source
        text = {name: kwargs.pop(name) for name in (*TEXT_PARTS, "prompt_embeds") if name in kwargs}
        folder = None
        if source is not None:
            if os.path.isdir(source):
                finish_files(source)
            folder = find_diffusers(
                source,
                HubOptions(**{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}),
                without=[name for name in text if name != "prompt_embeds"],
                has_prompt=text.get("prompt_embeds") is not None,
            )
        if source is not None and folder is not None:
            take_diffusers(source, folder, text, kwargs)
            path = None
        elif text:
            raise ValueError(
                f"{', '.join(text)} can only be given with a diffusers pipeline; in a checkpoint of ours the empty "
                "prompt's embeddings are among the weights."
            )
        if source is not None and folder is None:
            check_files(source, kwargs.get("subfolder"))
        try:
            loaded: Any = super().from_pretrained(
                path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below, where the error can say what to do
                use_safetensors=True,  # never unpickle
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {str(source)!r} are truncated or no safetensors ({error}). "
                "Save or download them again."
            ) from error
        except TypeError as error:
            # The host passes keywords that it does not know on to the model's `__init__`.
            refuse_unknown_keywords(set(re.findall(r"unexpected keyword argument '(\w+)'", str(error))))
            raise
        model: Self
        model, info = loaded
        if source is not None:
            check_loaded(source, info, model, ignore_mismatched_sizes, output_loading_info)
            if folder is None:
                inherited_license(model.config, source, kwargs)
            else:
                # The host was given none, and peft asks what an adapter belongs to.
                model.name_or_path = model._base().name_or_path = model.config.name_or_path = str(source)
        model._base().freeze()  # the host makes every loaded weight trainable
        model._settle_timestep(calibration_images)
        return (model, info) if output_loading_info else model  # type: ignore[return-value]

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as the host does, but from safetensors alone: it unpickles shards and adapters of other names."""
        refuse_other_than_safetensors(checkpoint_files or ())
        if getattr(model.config, "quantization_config", None) is None:
            check_dtypes(checkpoint_files or (), model)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _settle_timestep(self, calibration_images: Any) -> None:
        """Choose the timestep if it is "auto"; forget a record that no longer fits."""
        config = self.config
        if config.timestep == "auto":
            height, width = (side // config.patch_pixels for side in config.image_height_width)
            # As many tokens at once as 32 pictures of 512 pixels have: large pictures would not fit many a machine.
            batch_size = max(1, min(32, MAX_TOKENS // (height * width)))
            self.apply_selection(select_timestep(self, calibration_images, batch_size=batch_size))
            return
        if config.zeroed_channels == "auto":
            raise ValueError(
                f"`zeroed_channels='auto'` are found with the timestep, which is fixed at {config.timestep}. Pass "
                "`timestep='auto'`, or name the channels."
            )
        if calibration_images is not None:
            raise ValueError(
                f"`calibration_images` are given, but the timestep is fixed at {config.timestep}. "
                "Pass `timestep='auto'` to choose it anew, or leave the pictures out."
            )
        if not self._is_selection_in_use():
            config.selection = None
        unsaid = [f"{feature} of block {block}" for block, feature in self._taps_of_unknown_channels()]
        if unsaid:
            logger.warning(
                "Nothing is set to zero in %s, where a few channels may dwarf all others in large transformers. They "
                "are found where the timestep is chosen (`timestep='auto'`, or `select_timestep` and "
                "`apply_selection`); name them by `zeroed_channels=`, or pass `zeroed_channels=[]` if there are none.",
                ", ".join(unsaid),
            )

    def _taps_of_unknown_channels(self) -> list[Tap]:
        """Return the taps in the residual stream of which the configuration says nothing."""
        if isinstance(self.config.zeroed_channels, list):
            return []  # whoever wrote a list knows of them
        return [
            (block, feature)
            for block, feature in self._base().taps()
            if block >= 0 and feature in MASSIVE_FEATURES and self.config.channels_at(block, feature) is None
        ]

    def apply_selection(self, selection: TimestepSelection) -> None:
        """Read at the timestep and tap of a choice from now on, as they were scored.

        Sets `timestep`, `block`, `feature` and `selection` of the configuration and, where massive channels were
        looked for, those found there in `zeroed_channels`.

        Args:
            selection: What `select_timestep` returned.

        Raises:
            ValueError: If there is a head, and the tokens of the choice are of another width than those it reads.
        """
        if not isinstance(selection, TimestepSelection):
            raise ValueError(f"`selection` must be what `select_timestep` returned, got {type(selection).__name__}.")
        config, base = self.config, self._base()
        width = config.width_of(selection.feature)
        if self is not base and width != config.feature_size:
            raise ValueError(
                f"The head reads tokens of {config.feature_size} channels, but {selection.feature!r} has {width}. "
                f"Load the model with `feature={selection.feature!r}, block={selection.block}, "
                f"timestep={selection.timestep}`."
            )
        own = config.block_index(), config.feature
        is_another_tap = (selection.block, selection.feature) != own
        if is_another_tap and isinstance(config.zeroed_channels, list):
            config.zeroed_channels = {tap_key(*own): config.zeroed_channels}  # they stay where they are
        if is_another_tap:  # else the block stays as it was written, perhaps counted from the end
            config.block, config.feature = selection.block, selection.feature
        config.timestep, config.selection = selection.timestep, selection.to_dict()
        if selection.massive_channels is not None:
            known = config.zeroed_channels if isinstance(config.zeroed_channels, dict) else {}
            found = {tap_key(selection.block, selection.feature): selection.massive_channels}
            config.zeroed_channels = {**known, **found}
        if is_another_tap and not config.freeze_backbone:
            base.denoiser.requires_grad_(True)
            base.freeze()  # other blocks come after the tap

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the weights, of those in memory where accelerate offloads the others."""
        for parameter in self.parameters():
            if parameter.device.type != "meta":
                return parameter.device
        # All are on a disk, or the model is built without data.
        hook = getattr(self, "_hf_hook", None)
        return torch.device("meta" if hook is None else hook.execution_device)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Timesteps to signal and noise levels."""
        return self._base().schedule

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return clean latents of pictures: the VAE's posterior mean, scaled; the pictures themselves in pixel space.

        Args:
            pixel_values: Pictures in [-1, 1], (B, C, H, W); H and W multiples of a token's side.

        Returns:
            Latents, (B, C, h, w), float32 where the model computes in half precision: noise is added before they are
            rounded, of which a small timestep would leave little.

        Raises:
            ValueError: If the shape does not fit the model or a value is NaN or infinite.
        """
        check_pixel_values(pixel_values, self.config)
        vae = self._base().vae
        dtype = torch.promote_types(self.dtype, torch.float32)
        if vae is None:
            return pixel_values.to(self.device, dtype)
        parameter = next(vae.parameters())
        # In the VAE's own dtype even where a trainer runs the rest in half precision.
        with torch.autocast(parameter.device.type, enabled=False):
            encoded = vae.encode(pixel_values.to(parameter.device, parameter.dtype))
        # An AutoencoderDC has no distribution.
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        shift, scale = float(vae.config.get("shift_factor") or 0), float(vae.config.scaling_factor)
        scaled: Tensor = ((latents - shift) * scale).to(self.device, dtype)
        return scaled

    def add_noise(self, latents: Tensor, timestep: int, draw: int = 0) -> Tensor:
        """Mix latents with the fixed noise of `config.noise_seed`, the same for every picture.

        Args:
            latents: Clean latents, (B, C, h, w).
            timestep: Integer in [0, 1000), 0 = least noise.
            draw: Which of the seed's noise tensors to take, from 0.

        Returns:
            Noised latents, (B, C, h, w).

        Raises:
            ValueError: If `timestep` is outside [0, 1000), `draw` is no integer from 0 on, or latents are none.
        """
        check_timestep(timestep)
        check_floats("latents", latents)
        if isinstance(draw, bool) or not isinstance(draw, int) or draw < 0:
            raise ValueError(f"`draw` must be an integer from 0 on, got {draw!r}.")
        noise = self._base().noise(tuple(latents.shape[1:]), draw)
        return self.noise_schedule.add_noise(latents, noise, timestep)

    def read_tokens(self, noised_latents: Tensor, timesteps: Tensor, block: int, feature: str) -> Tensor:
        """Return tokens at a tap, (B, N, D), of noised latents, (B, C, h, w), at timesteps, (B,)."""
        return self.read_taps(noised_latents, timesteps, [(block, feature)])[block, feature]

    def read_taps(
        self, noised_latents: Tensor, timesteps: Tensor, taps: Sequence[tuple[int, str]]
    ) -> dict[tuple[int, str], Tensor]:
        """Return tokens, (B, N, D), at each (block, feature) of `taps` from one pass; see `read_tokens`."""
        if self.config.folded:
            self._check_reading(int(timesteps.min()), int(timesteps.max()), taps)
        noised = noised_latents.to(self.dtype)
        tokens: dict[Tap, Tensor] = self._base().denoiser.read_taps(noised, timesteps, taps)
        return tokens

    def token_grid(self, latents: Tensor) -> tuple[int, int]:
        """Return rows and columns of the token grid of latents, (B, C, h, w)."""
        patch_size = self._base().denoiser.patch_size
        return latents.shape[-2] // patch_size, latents.shape[-1] // patch_size

    def generate_latents(self, num_images: int, num_steps: int = 20, batch_size: int = 32, seed: int = 0) -> Tensor:
        """Return clean latents that the diffusion model makes itself, of random classes if any, for want of pictures.

        They are what `encode` would return for such pictures, of `config.image_size`. A class-conditional model is
        sampled with a guidance of 2: 2 · `num_images` · `num_steps` passes of a picture through the whole transformer,
        by DDIM, or by Euler's method where it was trained by flow matching. One that knows one class only, or is
        conditioned on a text and so given the empty prompt, needs half of that and has no guidance. `seed` alone says
        what comes out, beyond rounding; the same pictures come first in a larger set. No global random state is
        touched, and each module keeps its mode.

        Args:
            num_images: How many, at least 1.
            num_steps: Timesteps on the way from noise, a divisor of 1000.
            batch_size: Pictures at once, at least 1; the transformer sees twice as many.
            seed: Seed of classes and starting noise.

        Returns:
            Latents, (n, C, h, w), float32, on the CPU; in pixel space clamped to [-1, 1].

        Raises:
            ValueError: If a number is out of range, the scheduler's `prediction_type` is unknown, or NaN or infinite
                values come out.
        """
        if self.config.folded:
            raise ValueError("A folded model has no layers to generate with. Use the model it was folded from.")
        height, width = (side // self.config.vae_scale_factor for side in self.config.image_height_width)
        base, sampler = self._base(), build_sampler(self.config)
        latents = generate_latents(
            base.denoiser,
            sampler,
            (height, width),
            num_images,
            num_steps=num_steps,
            batch_size=batch_size,
            seed=seed,
        )
        return latents.clamp(-1, 1) if base.vae is None else latents

    def count_generation_forwards(self, num_images: int, num_steps: int = 20) -> int:
        """Return how many passes of a picture through the transformer `generate_latents` makes."""
        guided = 2 if self._base().denoiser.num_classes > 1 else 1
        return guided * num_images * num_steps

    def check_is_resolved(self) -> None:
        """Refuse to go on without a chosen timestep.

        Raises:
            ValueError: If it is still "auto".
        """
        self._resolved_timestep()

    def extract_features(
        self,
        pixel_values: Tensor | None = None,
        timestep: int | None = None,
        block: int | None = None,
        feature: str | None = None,
        num_noise_draws: int | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of pictures at a timestep and a tap; what is None is taken from the configuration.

        Args:
            pixel_values: Pictures in [-1, 1], (B, C, H, W).
            timestep: Integer in [0, 1000), 0 = least noise.
            block: Block index, negative from the end.
            feature: `hidden`, `normed`, `query`, `key`, `value` or `attention`.
            num_noise_draws: Fixed noise draws to average over.
            latents: Clean latents, (B, C, h, w), as from `encode`, in place of `pixel_values`.

        Returns:
            Tokens in row-major order, (B, N, D).

        Raises:
            ValueError: If the timestep is not chosen yet, an argument is out of range, or not exactly one of
                `pixel_values` and `latents` is given.
        """
        if timestep is None:
            timestep = self._resolved_timestep()
        feature = self.config.feature if feature is None else feature
        block = self.config.block_index(block)
        self.config.check_tap(block, feature)
        num_draws = self.config.num_noise_draws if num_noise_draws is None else num_noise_draws
        if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"`num_noise_draws` must be at least 1, got {num_draws!r}; an integer.")
        clean = self._clean_latents(pixel_values, latents)
        return self._read(clean, timestep, [(block, feature)], num_draws)[0][block, feature]

    def extract_maps(self, pixel_values: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return a map, (B, D, rows, columns), at each (block, feature) of `taps`, from one pass.

        Args:
            pixel_values: Pictures in [-1, 1], (B, C, H, W).
            taps: Blocks, counted from the first, and features.

        Raises:
            ValueError: If the timestep is not chosen yet, the pictures do not fit, or there is no such tap.
        """
        read, (rows, columns) = self.read_pictures(taps, pixel_values)
        return {tap: token_map(tokens, rows, columns) for tap, tokens in read.items()}

    def read_pictures(
        self, taps: Sequence[Tap], pixel_values: Tensor | None, latents: Tensor | None = None
    ) -> tuple[dict[Tap, Tensor], tuple[int, int]]:
        """Return tokens, (B, N, D), at each (block, feature) of `taps`, from one pass, and their rows and columns.

        Args:
            taps: Blocks, counted from the first, and features.
            pixel_values: Pictures in [-1, 1], (B, C, H, W).
            latents: Clean latents, (B, C, h, w), as from `encode`, in place of `pixel_values`.

        Raises:
            ValueError: If the timestep is not chosen yet, the pictures do not fit, or there is no such tap.
        """
        for tap in taps:
            self.config.check_tap(*tap)
        timestep, clean = self._resolved_timestep(), self._clean_latents(pixel_values, latents)
        return self._read(clean, timestep, list(dict.fromkeys(taps)), self.config.num_noise_draws)

    def hidden_taps(self, output_hidden_states: bool | None) -> list[Tap]:
        """Return the taps of what the first block reads and of each block's output, if they are asked for.

        Of a folded model these are those among them that it is read at.

        Args:
            output_hidden_states: Whether they are; None for what the configuration says.
        """
        if not (self.config.output_hidden_states if output_hidden_states is None else output_hidden_states):
            return []
        folded = self.config.folding
        every = [(index, "hidden") for index in range(-1, self.config.num_hidden_layers)]
        return every if folded is None else [tap for tap in every if tap_key(*tap) in folded.taps]

    def _clean_latents(self, pixel_values: Tensor | None, latents: Tensor | None) -> Tensor:
        """Return clean latents: those given, or those of the pictures."""
        if (pixel_values is None) == (latents is None):
            raise ValueError("Give exactly one of `pixel_values` and `latents`.")
        if latents is None:
            return self.encode(pixel_values)  # type: ignore[arg-type]
        check_latents(latents, self.config.layout)
        return latents.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def _read(
        self, latents: Tensor, timestep: int, taps: list[Tap], num_draws: int
    ) -> tuple[dict[Tap, Tensor], tuple[int, int]]:
        """Return the tokens of latents, (B, N, D), at each tap, and the rows and columns of their grid."""
        check_timestep(timestep)
        self._check_reading(timestep, timestep, taps)
        timesteps = torch.full((latents.shape[0],), timestep, device=latents.device)
        denoiser = self._base().denoiser
        draws = []
        for draw in range(num_draws):
            if self.training and self.config.resample_noise_in_training:
                noised = self.noise_schedule.add_noise(latents, torch.randn_like(latents), timestep)
            else:
                noised = self.add_noise(latents, timestep, draw)
            draws.append(denoiser.read_taps(noised.to(self.dtype), timesteps, taps))
        tokens = {
            tap: torch.stack([read[tap] for read in draws]).mean(0) if num_draws > 1 else draws[0][tap] for tap in taps
        }
        zeroed = {tap: zero_channels(values, self._zeroed_at(tap, values.shape[-1])) for tap, values in tokens.items()}
        return zeroed, self.token_grid(latents)

    def _check_reading(self, first: int, last: int, taps: Sequence[Tap]) -> None:
        """Refuse to read a folded model at other timesteps, or at taps that it has not."""
        layout = getattr(self._base().denoiser, "layout", None)
        if layout is None or torch.compiler.is_compiling():
            return
        if (first, last) != (layout.timestep, layout.timestep):
            raise ValueError(
                f"This model was folded at timestep {layout.timestep}, which is in its weights, and cannot be read at "
                f"{first if first != layout.timestep else last}. Load the model it was folded from."
            )
        for tap in taps:
            self.config.check_tap(*tap)

    def fold(self) -> Self:
        """Return a new, smaller model of the same class with equal outputs, at this timestep and tap alone.

        The timestep's conditioning is multiplied into the neighbouring layers, query, key and value become one layer,
        and what is not needed is left out: embedders of timestep and label (or text), modulation layers, the blocks
        after the tap, the output layers. What is left is a plain vision transformer, which needs no diffusers but for
        a VAE, runs on the kernel that `attn_implementation` names (Sana's linear attention has one only), trains, and
        takes LoRA.

        Returns:
            The folded model, on the same device, in the same dtype and mode, sharing no weights with this one.

        Raises:
            ValueError: If the timestep is not chosen yet, the model is folded already, a layer is none that a plain
                one could stand for (another kind of norm or activation), it holds adapters or quantized weights, or a
                part of it is not in memory.
        """
        self._resolved_timestep()
        base = self._base()
        if self.config.folded:
            raise ValueError("This model is folded already.")
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("A part of this model is not in memory. Load it without offloading, then fold it.")
        taps = list(dict.fromkeys(base.taps()))
        config = copy.deepcopy(self.config)
        if (config.block_index(), config.feature) not in taps:
            # A backbone or decoder reads other blocks than this one, which would be kept for nothing.
            taps += [(0, config.feature)] if max(taps)[0] < 0 else []
            if isinstance(config.zeroed_channels, list) and config.zeroed_channels:
                own = tap_key(config.block_index(), config.feature)
                config.zeroed_channels = {own: config.zeroed_channels}  # they stay where they are
            config.block = max(taps)[0]
        layout, weights = fold_denoiser(base.denoiser, config, taps)
        if isinstance(config.zeroed_channels, dict):
            kept = config.zeroed_channels.items()
            config.zeroed_channels = {key: channels for key, channels in kept if key in layout.taps}
        config.folded_layout, config.folded = layout.to_dict(), True
        if not self._is_selection_in_use():
            config.selection = None
        config.validate()
        with torch.device("meta"):
            folded: Self = type(self)(config)
        prefix = "" if self is base else f"{self.base_model_prefix}."
        others = {
            name: value.clone()
            for name, value in self.state_dict().items()
            if not name.startswith(f"{prefix}denoiser.")
        }
        weights = {f"{prefix}denoiser.{name}": value for name, value in weights.items()}
        folded.load_state_dict({**others, **weights}, assign=True)
        folded._base().freeze()
        folded.train(self.training)
        return folded

    def _zeroed_at(self, tap: Tap, width: int) -> list[int]:
        """Return the channels that are set to zero at a tap; they may have been changed since they were checked."""
        channels = self.config.channels_at(*tap) or []
        if self.config.zeroed_channels == "auto" or any(not 0 <= channel < width for channel in channels):
            raise ValueError(
                f"`zeroed_channels` must be integers in [0, {width}) once the timestep is chosen, got "
                f"{self.config.zeroed_channels!r}. `select_timestep` and `apply_selection` find them."
            )
        return channels

    def _resolved_timestep(self) -> int:
        timestep = self.config.timestep
        if isinstance(timestep, str):
            raise ValueError(f"The timestep of this model is still {timestep!r}: {_HOW_TO_RESOLVE}.")
        return timestep


_HOW_TO_RESOLVE = (
    "pass `calibration_images=` to `from_pretrained`, or call "
    "`model.apply_selection(select_timestep(model, images))`, "
    "or set `model.config.timestep` to an integer in [0, 1000) yourself"
)


def refuse_tap_keywords(kwargs: dict[str, Any]) -> None:
    """Refuse a timestep or tap in `forward`: it would be ignored, as the head was trained at the configuration's."""
    if named := sorted(kwargs.keys() & {"timestep", "block", "feature", "num_noise_draws"}):
        raise ValueError(
            f"`forward` reads at the configuration's timestep and tap and takes no {', '.join(named)}. Set them in "
            "`model.config`, or call `extract_features`, which takes them."
        )


class DiTModel(ASelectPreTrainedModel):
    """A diffusion transformer (and VAE encoder) whose tokens at one timestep and tap are its output.

    Args:
        config: The configuration.
    """

    schedule: NoiseSchedule
    denoiser: Any  # one of the families of `denoisers`
    vae: Any  # diffusers is imported when a VAE is built, not here

    def __init__(self, config: ASelectConfig) -> None:
        super().__init__(config)
        self.schedule = NoiseSchedule.from_config(config.scheduler or {})
        self.denoiser = build_denoiser(config)
        self.vae = build_vae_encoder(config)
        if self.vae is not None:
            self.vae.float()  # in half precision, too, where the model is built of its configuration
        if not config.folded and config._attn_implementation not in (None, "sdpa"):
            logger.warning(
                "`attn_implementation=%r` is of no account here: diffusers' blocks run kernels of their own. The "
                "blocks of a folded model (`model.fold()`) run the host's.",
                config._attn_implementation,
            )
        self._noise: dict[tuple[tuple[int, ...], int, int], Tensor] = {}
        if config.folded:
            # Made before a graph is compiled or exported, which would have no generator in it.
            height, width = (side // config.vae_scale_factor for side in config.image_height_width)
            for draw in range(config.num_noise_draws):
                self.noise((config.layout.num_channels, height, width), draw)
        self.freeze()
        self.post_init()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as torch does, but leave the VAE in float32, as loading does: encoders overflow in float16."""
        vae, self._modules["vae"] = self.vae, None
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules["vae"] = vae
        if vae is not None:

            def moved_alone(values: Tensor) -> Tensor:
                moved = fn(values)
                is_cut = values.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16)
                return values.to(moved.device) if is_cut else moved

            vae._apply(moved_alone)
        return self

    def taps(self) -> list[Tap]:
        """Return the (block, feature) pairs that are read."""
        return [(self.config.block_index(), self.config.feature)]

    def noise(self, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        """Return the fixed noise of `config.noise_seed` for latents of a shape, (C, h, w), float32, on the CPU.

        Args:
            shape: Channels, height and width.
            draw: Which of the seed's noise tensors, from 0.
        """
        key = shape, self.config.noise_seed, draw
        if key not in self._noise:
            if len(self._noise) >= MAX_KEPT_NOISE:
                self._noise.clear()
            self._noise[key] = fixed_noise(*key)
        return self._noise[key]

    def freeze(self) -> None:
        """Freeze what is not trained: the VAE, and the denoiser, or the parts of it that come after the tap."""
        if self.config.freeze_backbone:
            self.denoiser.requires_grad_(False)
        else:
            # What is never run never gets a gradient, which distributed training takes for an error.
            unused = [
                {id(part): part for module in self.denoiser.unused_modules(*tap) for part in module.parameters()}
                for tap in self.taps()
            ]
            for name in set.intersection(*(set(parts) for parts in unused)):
                unused[0][name].requires_grad_(False)
        if self.vae is not None:
            self.vae.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set train mode, except for what is frozen: it stays as it is used later."""
        super().train(mode)
        if self.config.freeze_backbone:
            self.denoiser.eval()
        if self.vae is not None:
            self.vae.eval()
        return self

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the tokens of pictures, (B, N, D), and their mean, (B, D), at the configuration's timestep and tap.

        Args:
            pixel_values: Pictures in [-1, 1], (B, C, H, W).
            latents: Clean latents, (B, C, h, w), as from `encode`, in place of `pixel_values`.
            output_hidden_states: Whether to return what the first block reads and each block's output in
                `hidden_states`, too, (B, N, D) each; runs all blocks.
            kwargs: Ignored; the host passes keywords that only some models know. `return_dict=False` gives a tuple.

        Raises:
            ValueError: If the timestep is not chosen yet, the pictures do not fit, or a timestep or tap is named here.
        """
        refuse_tap_keywords(kwargs)
        tap, every = (self.config.block_index(), self.config.feature), self.hidden_taps(output_hidden_states)
        read, _ = self.read_pictures([tap, *every], pixel_values, latents)
        return BaseModelOutputWithPooling(
            last_hidden_state=read[tap],
            pooler_output=read[tap].mean(1),
            hidden_states=tuple(read[each] for each in every) or None,
        )
