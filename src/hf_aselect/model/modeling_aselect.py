"""The base class of all models, and `DiTModel`, a diffusion transformer read at taps of its blocks."""

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, NoneType
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import create_and_tag_model_card

from .checks import (
    check_count,
    check_dtypes,
    check_files,
    check_floats,
    check_latents,
    check_loaded,
    check_pixel_values,
    is_of_diffusers,
    refuse_other_than_safetensors,
)
from .configuration_aselect import (
    ALL_MODELS,
    TAKEN,
    ASelectConfig,
    is_code_saved,
    refuse_unknown_keywords,
    without_code,
)
from .denoiser import as_if_called, grid_of, placement, zero_channels
from .denoisers import build_denoiser, build_vae_encoder
from .heads import (
    SAVED_NAMES,
    AttentionHead,
    FeatureStandardization,
    concatenated,
    name_today,
    token_map,
    without_rounding,
)
from .image_processing_aselect import ASelectImageProcessor
from .layouts import ReadOut, Tap, plain
from .noise_schedule import NoiseSchedule, kept_noise
from .vae import encode_images

logger = logging.getLogger(__name__)

# Layers that LoRA is put on: queries and values, which folded models, PRX and FLUX.2's last blocks have in one.
LORA_LAYERS = ("to_q", "to_v", "query_key_value", "query_key_value_mlp", "img_qkv_proj", "to_qkv_mlp_proj")
# What is being loaded: transformers gets diffusers' weights as a state dict, and would report them "from: None".
SOURCE: ContextVar[str | None] = ContextVar("source", default=None)
OWN_WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


def package(module: str, what: str | None = None) -> Any:
    """Return a module of the installed package. All access to code that does not travel with a checkpoint is here.

    Args:
        module: Its name below `hf_aselect`, such as "selection.select".
        what: The operation that needs it, for the error message. None if it is optional.

    Returns:
        The module, or None if the package is not installed and the module is optional.

    Raises:
        ImportError: If the package is not installed and the module is required.
    """
    try:
        return importlib.import_module(f"hf_aselect.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hf_aselect":
            raise
        if what is None:
            return None
        raise ImportError(f"{what} needs hf_aselect: pip install hf_aselect") from error


class TokenReader(PreTrainedModel):
    """The steps from images to tokens, shared by all models: encode, add noise, read at taps."""

    config: ASelectConfig
    base_model_prefix = "backbone"

    def _base(self) -> "DiTModel":
        """Return the model that contains the denoiser: this one, or the backbone of a model with a head."""
        base: DiTModel = self.base_model  # type: ignore[assignment]
        return base

    @property
    def device(self) -> torch.device:
        """The device of the inputs. This is where the first layer computes, even if its weights are offloaded."""
        return placement(self._base().denoiser.patch_embedding)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that tokens are computed in, even if weights are stored in another one (hooks, quantization)."""
        dtype = placement(self._base().denoiser.patch_embedding)[1] or self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Timesteps to signal and noise levels."""
        return self._base().schedule

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return clean latents of images: the VAE's posterior mean, normalised; the images themselves in pixel space.

        Args:
            pixel_values: Images in [-1, 1], (B, C, H, W); H and W multiples of a token's side.

        Returns:
            Latents, (B, C, h, w). They are float32 if the model computes in half precision, because rounding them
            before noise is added would lose most of the noise of a small timestep.

        Raises:
            ValueError: If the shape does not fit the model or a value is NaN or infinite.
        """
        check_pixel_values(pixel_values, self.config)
        vae = self._base().vae
        dtype = torch.promote_types(self.dtype, torch.float32)
        if vae is None:
            return pixel_values.to(self.device, dtype)
        vae_device, vae_dtype = placement(vae)
        # In the VAE's own dtype even where a trainer runs the rest in half precision.
        with torch.autocast(vae_device.type, enabled=False):
            encode = partial(encode_images, vae, pixel_values.to(vae_device, vae_dtype))
            # FLUX.2's statistics hang on a module that is not called.
            latents = as_if_called(vae.bn, encode) if hasattr(vae, "bn") else encode()
        return latents.to(self.device, dtype)

    def add_noise(self, latents: Tensor, timestep: int, draw: int = 0) -> Tensor:
        """Mix latents with the fixed noise of `config.noise_seed`, the same for every image.

        Args:
            latents: Clean latents, (B, C, h, w).
            timestep: Integer in [0, 1000), 0 = least noise.
            draw: Which of the seed's noise tensors to take, from 0.

        Returns:
            Noised latents, (B, C, h, w).

        Raises:
            ValueError: If `timestep` is outside [0, 1000), `draw` is not an integer >= 0, or `latents` is not a
                floating-point tensor (B, C, h, w).
        """
        check_floats("latents", latents)
        draw = plain(draw)
        if isinstance(draw, bool) or not isinstance(draw, int) or draw < 0:
            raise ValueError(f"`draw` must be an integer >= 0, got {draw!r}.")
        noise = self._base().noise(tuple(latents.shape[1:]), draw)
        return self.noise_schedule.add_noise(latents, noise, timestep)

    def extract_features(
        self,
        pixel_values: Tensor | None = None,
        timestep: int | Sequence[int] | None = None,
        block: int | Sequence[int] | str | None = None,
        feature: str | Sequence[str] | None = None,
        num_noise_draws: int | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of images. Arguments that are None are taken from the configuration.

        Args:
            pixel_values: Images in [-1, 1], (B, C, H, W).
            timestep: Integer in [0, 1000), 0 = least noise, or several.
            block: Block index, negative from the end; several, or "all".
            feature: `hidden`, `normed`, `query`, `key`, `value` or `attention`, or several. If only some of
                timestep, block and feature are given, the others come from the first entry of `read_out`.
            num_noise_draws: Fixed noise draws to average over.
            latents: Clean latents, (B, C, h, w), as from `encode`, in place of `pixel_values`.

        Returns:
            Tokens in row-major order, (B, N, D). Several taps and timesteps are concatenated along the channels, in
            the order of `config.read_outs(timestep, block, feature)`. Each timestep takes one pass.

        Raises:
            ValueError: If the timestep is not selected yet, an argument is out of range, or not exactly one of
                `pixel_values` and `latents` is given.
        """
        wanted = self.config.read_outs(timestep, block, feature)
        if num_noise_draws is not None:
            check_count("num_noise_draws", num_noise_draws)
        return concatenated(list(self._read(wanted, pixel_values, latents, num_noise_draws)[0].values()))

    def extract_maps(self, pixel_values: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return a map, (B, D, rows, columns), at each (block, feature) of `taps`, from one pass a timestep.

        Args:
            pixel_values: Images in [-1, 1], (B, C, H, W).
            taps: Blocks, counted from the first, and features. Each is read at all timesteps of the configuration,
                whose tokens lie side by side along the channels.

        Raises:
            ValueError: If the timestep is not selected yet, the images do not fit, or there is no such tap.
        """
        timesteps, taps = self.config.timesteps(), [(plain(block), feature) for block, feature in taps]
        read, grid = self._read([(timestep, *tap) for timestep in timesteps for tap in taps], pixel_values)
        return {tap: token_map(concatenated([read[t, *tap] for t in timesteps]), *grid) for tap in taps}

    def _read(
        self,
        read_outs: Sequence[ReadOut],
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        num_draws: int | None = None,
    ) -> tuple[dict[ReadOut, Tensor], tuple[int, int]]:
        """Return tokens, (B, N, D), of each of `read_outs`, from one pass a timestep, and their rows and columns."""
        config = self.config
        taps: dict[int, list[Tap]] = {}  # by timestep
        for timestep, block, feature in dict.fromkeys(read_outs):
            timestep = config.resolved_timestep() if isinstance(timestep, str) else timestep
            config.check_tap(block, feature)
            taps.setdefault(timestep, []).append((block, feature))
        clean = self._clean_latents(pixel_values, latents)
        draws = [self._read_draw(clean, taps, draw) for draw in range(num_draws or config.num_noise_draws)]
        zeroed = {}
        for each in dict.fromkeys(read_outs):
            # The mean of a single draw would round it in half precision.
            tokens = torch.stack([read[each] for read in draws]).mean(0) if draws[1:] else draws[0][each]
            zeroed[each] = zero_channels(tokens, _zeroed_at(config, each, tokens.shape[-1]))
        return zeroed, grid_of(clean, config.layout.patch_size)

    def _read_draw(self, clean: Tensor, taps: dict[int, list[Tap]], draw: int) -> dict[ReadOut, Tensor]:
        """Return tokens of one draw of noise, which all timesteps share: of each the taps, from a pass to the last."""
        is_fresh = self.training and self.config.resample_noise_in_training
        noise = torch.randn_like(clean) if is_fresh else self._base().noise(tuple(clean.shape[1:]), draw)
        found: dict[ReadOut, Tensor] = {}
        for timestep, wanted in taps.items():
            noised = self.noise_schedule.add_noise(clean, noise, timestep)
            read = self._read_taps(noised, timestep, wanted)
            found.update({(timestep, *tap): tokens for tap, tokens in read.items()})
        return found

    def _read_taps(self, noised_latents: Tensor, timesteps: Tensor | int, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return tokens, (B, N, D), at each of `taps`, of noised latents, (B, C, h, w), at timesteps, (B,), or one."""
        denoiser = self._base().denoiser
        read = partial(denoiser.read_taps, noised_latents.to(self.dtype), timesteps, taps)
        # It is not called, and may have weights of its own.
        tokens: dict[Tap, Tensor] = as_if_called(denoiser, read)
        return tokens

    def _clean_latents(self, pixel_values: Tensor | None, latents: Tensor | None) -> Tensor:
        """Return the given latents, or encode the images."""
        if (pixel_values is None) == (latents is None):
            raise ValueError("Pass exactly one of `pixel_values` and `latents`.")
        if latents is None:
            return self.encode(pixel_values)  # type: ignore[arg-type]
        check_latents(latents, self.config.layout)
        return latents.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def generate_latents(
        self, num_images: int, num_steps: int = 20, batch_size: int = 32, seed: int = 0, guidance_scale: float = 2.0
    ) -> Tensor:
        """Return clean latents of images that the diffusion model generates, to select a timestep without a dataset.

        The latents correspond to images of `config.image_size` from random classes, sampled by DDIM (or Euler's method
        for flow matching) with classifier-free guidance. This takes 2 · `num_images` · `num_steps` passes of an image
        through the whole transformer, or half of that without guidance, for models with one class or an (empty) text
        prompt. Images depend only on `seed`, up to rounding, and a larger set begins with the same images.

        Args:
            num_images: Number of images, at least 1.
            num_steps: Number of sampling steps, a divisor of 1000.
            batch_size: Images per batch, at least 1. With guidance the transformer processes twice as many.
            seed: Seed of classes and starting noise. The global random state is not changed.
            guidance_scale: Guidance scale, at least 1. At 1 there is no guidance, which takes half of the passes and
                gives more varied but less sharp images.

        Returns:
            Latents, (n, C, h, w), float32, on the CPU; in pixel space clamped to [-1, 1].

        Raises:
            ValueError: If a number is out of range, the scheduler's `prediction_type` is unknown, or the images
                have NaN or infinite values.
            ImportError: If the package is not installed.
        """
        generation = package("selection.generation", "Generating images")
        latents: Tensor = generation.generate_for(self, num_images, num_steps, batch_size, seed, guidance_scale)
        return latents


class ShareableModel(TokenReader):
    """A model that saves its files atomically, with its code on request, and is pushed with its card."""

    # The default of `include_code` in `save_pretrained`.
    include_code: bool | None = None
    # Fields of the card that are known from training.
    card_facts: Mapping[str, Any] = MappingProxyType({})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        push_to_hub: bool = False,
        include_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save configuration and weights, and optionally the code of the model.

        A folder with code can be loaded without this package, using `trust_remote_code=True`. A selection record that
        is not in use is not saved. Existing files are replaced only when all new ones are written, so a full disk or
        an interruption leaves them intact (only if the package is installed).

        Args:
            save_directory: Folder to write.
            args: Passed on to transformers.
            push_to_hub: Whether to also upload the folder with image processor, card and curve, as `push_to_hub` does.
                Its arguments can be passed as well. `repo_id` defaults to the name of the folder.
            include_code: Whether to save the code of the model. By default it is saved on a push, if the folder
                already contains it, or if the model was itself loaded from such code.
            kwargs: Passed on to transformers.
        """
        hub = package("hub.push") if push_to_hub else None
        if hub is not None:
            hub.save_and_push(self, save_directory, *args, include_code=include_code, **kwargs)
        else:
            self._save(save_directory, *args, push_to_hub=push_to_hub, include_code=include_code, **kwargs)

    def _save(
        self,
        folder: str | os.PathLike[str],
        *args: Any,
        push_to_hub: bool = False,
        include_code: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Save as `save_pretrained`, and return the names of the files (none if the package is not installed)."""
        saving = package("checkpoints.saving")
        if saving is not None:
            kwargs = saving.with_whole_state(self, kwargs)
        config, record = self.config, self.config.selection
        asked = self.include_code if include_code is None else include_code
        with_code = is_code_saved(self, folder, push_to_hub, asked)
        if not config.is_selection_in_use():
            config.selection = None
        # The `auto_map` of another class may have been loaded, and its code is not in this folder.
        kept, config.auto_map = vars(config).get("auto_map"), {}
        # The configuration writes the code. transformers also does for a user's own class, and for a class whose copy
        # came without the other modules.
        vars(config)["_code_folder"] = os.path.dirname(__file__) if with_code else ""
        is_users = type(self).__module__.rpartition(".")[0] != __name__.rpartition(".")[0]
        is_users = is_users or not Path(__file__).with_name(f"{ALL_MODELS}.py").exists()
        atomic = package("checkpoints.atomic")
        try:
            with nullcontext() if with_code and is_users else without_code(self):
                # If it is a file instead of a folder, transformers raises a clear error.
                if atomic is None or push_to_hub or os.path.isfile(folder):
                    super().save_pretrained(folder, *args, **kwargs, push_to_hub=push_to_hub)  # type: ignore[misc]
                    return []
                # Weights of an earlier save in more shards, or fewer, go, as transformers has it.
                with atomic.whole_files(folder, None if kwargs.get("variant") else OWN_WEIGHTS) as unfinished:
                    super().save_pretrained(unfinished, *args, **kwargs)
                    return [path.name for path in unfinished.iterdir()]
        finally:
            config.selection = record
            for name in ("auto_map", "_code_folder"):
                vars(config).pop(name, None)
            vars(config).update({} if kept is None else {"auto_map": kept})

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] | str | None = (),
        **facts: Any,
    ) -> Any:
        """Upload configuration, weights, code, image processor, card and curve as one commit.

        An interrupted upload leaves the repository unchanged. The commit also deletes files of an earlier push that
        this model does not have, such as further shards. Without the package, transformers' own card is written and
        nothing is deleted.

        Args:
            repo_id: Repository, created if missing.
            commit_message: Summary of the commit. Default: "Upload model".
            commit_description: Description of the commit.
            private: Whether a new repository is private.
            token: Hub token. Default: the stored one.
            revision: Branch, created if missing.
            create_pr: Whether to propose it as a pull request.
            max_shard_size: Maximum size of a weight file. Larger weights are sharded.
            tags: Further tags of the card.
            facts: Fields of `CardFacts` that the model does not know, such as `dataset=`, `accuracy=` and `license=`.
                After training with `ASelectCallback` they are known. Requires the package.

        Returns:
            The Hub's `CommitInfo`.

        Raises:
            HfHubHTTPError: If the Hub rejects the push: wrong token, no write access, invalid name.
            ValueError: If a fact is unknown or has the wrong type. Nothing is created on the Hub then.
            ImportError: If facts are passed and the package is not installed.
        """
        facts.pop("use_temp_dir", None)  # of transformers 4, as is the next one
        if not facts.pop("safe_serialization", True):
            raise ValueError("`safe_serialization=False` is not supported: weights are only saved as safetensors.")
        hub = package("hub.push", "A model card with facts" if facts else None)
        commit: dict[str, Any] = {"commit_message": commit_message, "commit_description": commit_description}
        where: dict[str, Any] = {"token": token, "revision": revision, "create_pr": create_pr}
        if hub is not None:
            return hub.push_model(self, repo_id, private, max_shard_size, tags=tags or (), **commit, **where, **facts)
        api = HfApi(token=token)
        repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self._save(folder, max_shard_size=max_shard_size, include_code=True)
            save_image_processor(self, folder)
            named = [tags] if isinstance(tags, str) else list(tags or ())
            create_and_tag_model_card(repo_id, named, token=token).save(Path(folder, "README.md"))  # type: ignore[arg-type]
            commit["commit_message"] = commit_message or "Upload model"
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit, **where)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Put the card of `ASelectCallback` back over a draft that `Trainer` wrote; nothing without the package."""
        kept_card = package("training.kept_card")
        if kept_card is not None:
            kept_card.restore_card(output_dir)


def save_image_processor(model: Any, folder: str | os.PathLike[str], include_code: bool = True) -> None:
    """Write the image processor of a model beside it; nothing for a model of latents that are not images.

    A segmenter is to see the whole of an image, as it is stored, as its masks must cover it; others see the middle,
    undistorted and upright.
    """
    if model.config.num_channels in (1, 3):
        crop = type(model).task != "image-segmentation"
        fields = {"do_center_crop": crop, "do_exif_transpose": crop}
        processor = ASelectImageProcessor.from_model_config(model.config, **fields)
        processor.save_pretrained(folder, include_code=include_code)


class ASelectPreTrainedModel(ShareableModel):
    """Base class of all models: loading, weight initialisation and timestep selection."""

    task: ClassVar[str] = "image-feature-extraction"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules: set[str] | list[str] | None = [  # noqa: RUF012 - transformers' way
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
    # For folded models. Other models run diffusers' own kernels.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # VAE encoders overflow in float16, and bfloat16 is too coarse for latents at a small timestep.
    _keep_in_fp32_modules_strict = {"vae"}  # noqa: RUF012 - transformers' way

    def post_init(self) -> None:
        """Finish as transformers does, then drop from `_no_split_modules` the classes this model does not contain."""
        super().post_init()
        # accelerate's FSDP rejects class names, here of other families, that the model does not contain.
        here = {type(module).__name__ for module in self.modules()}
        denoiser = self._base().denoiser
        whole = {type(module).__name__ for module in (*denoiser.blocks, *denoiser.whole_modules)}
        self._no_split_modules = {name for name in self._no_split_modules or () if name in here} | whole
        if self._base().vae is None:
            self._keep_in_fp32_modules_strict = set()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        denoiser = self._base().denoiser
        for name, table in denoiser.tables_of(module).items():
            # It is not in diffusers' checkpoints, and loading builds the model without data.
            init.copy_(getattr(module, name), table)
        if module is denoiser:
            # Positions of a folded model and the empty prompt are zero until they are loaded.
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                init.zeros_(tensor)
        if isinstance(module, FeatureStandardization) and module.scale is not None and module.shift is not None:
            init.ones_(module.scale)
            init.zeros_(module.shift)
        if isinstance(module, AttentionHead):
            init.zeros_(module.class_token)
            # As in ViT and DiT. With transformers' narrow normal distribution a small head learns slower.
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    init.xavier_uniform_(layer.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that makes tokens of noised latents; peft and accelerate's FSDP ask for it."""
        module: nn.Module = self._base().denoiser.patch_embedding
        return module

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        calibration_images: Any = None,
        num_train_images: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model and, where its timestep is "auto", select the timestep.

        Args:
            pretrained_model_name_or_path: An hf_aselect checkpoint (folder or id on the Hub); a pipeline of diffusers
                (folder or id), or as much of one as `transformer/` and `scheduler/` (and `vae/` for a DiT in latent
                space); or a bare diffusers transformer (folder or id), taken for a DiT in pixel space with DiT's own
                noise schedule. Only the required files are downloaded. A text-conditioned transformer is read with the
                empty prompt, for which the pipeline's text encoders are loaded once. A peft adapter is loaded with the
                model that it was trained on. None builds the model from `config=` and `state_dict=`, and initialises
                missing weights. Safetensors with the weight names of the DiT, SiT or REPA code are loaded with
                `layout="dit"`, "sit" or "repa".
            args: Passed on to transformers.
            calibration_images: Images to select the timestep from, as in `select_timestep`; at a fixed timestep a
                new head standardizes its features by them. Without them the transformer generates some for the
                selection, which takes a while for a large one.
            num_train_images: How many labelled images the head will learn from, where the timestep is selected: see
                `select_timestep`.
            kwargs: Fields of `ASelectConfig` (`timestep=`, `block=`, `num_labels=`, ...), or anything that
                `PreTrainedModel.from_pretrained` takes (`revision=`, `token=`, `variant=`, ...). diffusers' weights
                become float32 unless `dtype` says otherwise. With a text-conditioned pipeline also
                `text_encoder_3=None` and the like, to do without a part as diffusers does, or `prompt_embeds=`, the
                empty prompt's embeddings by name, to load no text encoder.

        Returns:
            The model in eval mode. Where the timestep was selected here, `config.selection` holds the record.

        Raises:
            ValueError: If the folder is none of those, its files are broken, it has only pickled weights, weights of
                the backbone are missing (unless `output_loading_info=True`, which returns their names), a field is
                unknown or out of range, or `calibration_images` are passed but not needed.
            OSError: If a repository of the Hub is not found or may not be read, or the Hub cannot be reached.
            ImportError: If diffusers saved the source, the timestep is to be selected or features are to be
                standardized, and the package is not installed.
        """
        source = pretrained_model_name_or_path
        source = os.fspath(source) if isinstance(source, os.PathLike) else source  # of any kind, as `os.scandir`'s
        if not isinstance(source, (str, NoneType)):
            raise ValueError(
                "`pretrained_model_name_or_path` must be a folder, an id on the Hub, or None, got "
                f"a {type(source).__name__}. Save it first (`save_pretrained`), and pass the folder."
            )
        adapters = package("checkpoints.adapters")
        if adapters is not None and (adapter := adapters.find_adapter(source, kwargs)) is not None:
            kwargs |= {"calibration_images": calibration_images, "num_train_images": num_train_images}
            with_adapter: Self = adapters.load_with_adapter(cls, adapter, args, kwargs)
            return with_adapter
        with_info = kwargs.pop("output_loading_info", False)
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("`use_safetensors=False` is not supported, because pickles can run any code. Omit it.")
        replace_head = kwargs.pop("ignore_mismatched_sizes", False)
        is_checked = kwargs.get("check_layout", True)
        is_diffusers = _take_source(source, kwargs)
        options: Any = {"output_loading_info": True, "use_safetensors": True}  # never unpickle
        options["ignore_mismatched_sizes"] = True  # checked below, with a more helpful error
        with _explained(source):
            loaded: Any = super().from_pretrained(None if is_diffusers else source, *args, **options, **kwargs)
        model: Self
        model, info = loaded
        if source is not None:
            check_loaded(source, info, model, replace_head, with_info)
            if is_diffusers:
                # transformers was given no name, and peft saves it as the base model of an adapter.
                model.name_or_path = model._base().name_or_path = model.config.name_or_path = str(source)
            elif (licenses := package("checkpoints.licenses")) is not None:
                licenses.inherited_license(model.config, source, kwargs)
        if is_diffusers and is_checked:
            check = package("checkpoints.layout_check", "Checking a layout").compare_layouts
            if check(model, calibration_images) and model.config.timestep != "auto" and not model._standardizations():
                calibration_images = None  # they were only needed for the check
        model._settle_timestep(calibration_images, info, num_train_images)
        return (model, info) if with_info else model  # type: ignore[return-value]

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as transformers does, but only from safetensors: it would unpickle shards with other names."""
        refuse_other_than_safetensors(checkpoint_files or ())
        _place_buffers(model, load_config.device_map)
        if getattr(model.config, "quantization_config", None) is None:
            check_dtypes(checkpoint_files or (), model)
        former = [WeightRenaming(*names) for names in SAVED_NAMES.items()]
        load_config = replace(load_config, weight_mapping=[*former, *(load_config.weight_mapping or ())])
        found = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        # With these, transformers would save under the names that it loaded.
        model._weight_conversions = [each for each in model._weight_conversions if each not in former]
        return found

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Finish as transformers does, whose report then names where diffusers' weights come from."""
        name = load_config.pretrained_model_name_or_path or SOURCE.get()
        load_config = replace(load_config, pretrained_model_name_or_path=name)
        return PreTrainedModel._finalize_model_loading(model, load_config, *args, **kwargs)

    def load_adapter(self, peft_model_id: Any = None, adapter_name: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load an adapter as transformers does, and also a head's statistics and the magnitudes of DoRA."""
        name = adapter_name or "default"
        is_new = name not in getattr(self, "peft_config", {})
        loaded = super().load_adapter(peft_model_id, adapter_name, **kwargs)
        if is_new:
            # peft is optional and is installed if an adapter was loaded. The `try` keeps transformers from treating it
            # as a requirement of the model's code.
            try:
                import peft
            except ImportError:
                return loaded
            weights = kwargs.get("adapter_state_dict") or peft.load_peft_weights(
                str(peft_model_id), device="cpu", **(kwargs.get("adapter_kwargs") or {})
            )
            plain = {name_today(key.removeprefix("base_model.model.")): value for key, value in weights.items()}
            found: Any = peft.set_peft_model_state_dict(self, plain, adapter_name=name)
            loaded.missing_keys &= set(found.missing_keys)
            loaded.unexpected_keys &= set(found.unexpected_keys)
        return loaded

    def _standardizations(self) -> list[FeatureStandardization]:
        """Return the standardization of each output of `stages` for the head. Empty without a head."""
        return []

    def _set_standardization(self, statistics: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Set the scale, (D,), and shift, (rows, columns, D), of each output. None removes them."""
        for number, each in enumerate(self._standardizations()):
            taken = (None, None) if statistics is None else statistics[number]
            # A copy, because loading writes into the model's tensors.
            each.scale, each.shift = (None if value is None else value.to(self.device, copy=True) for value in taken)
        self.config.standardized_grid = None if statistics is None else list(statistics[0][1].shape[:2])

    def standardize(self, images: Any, max_images: int = 256) -> None:
        """Standardize the tokens that the head reads at this timestep by their mean and spread over images.

        Applying a selection does the same. A trained head has to be trained again afterwards.

        Args:
            images: Images as in `select_timestep`, at least a few dozen.
            max_images: Maximum number of images. A larger set is sampled.

        Raises:
            ValueError: If there is no head, `config.standardize_features` is False, the timestep is not selected yet,
                the model is folded, there are fewer than two images, or they do not fit the model.
            ImportError: If the package is not installed.
        """
        package("selection.apply", "Standardizing features").standardize(self, images, max_images)

    def fit_head(
        self,
        dataset: Any,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        eval_dataset: Any = None,
        max_images: int | None = None,
        balance_classes: bool = False,
        allow_missing: bool = False,
        replace_head: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Any:
        """Fit the linear head, or the linear decoder, in closed form: ridge regression after one pass over the images.

        The ridge strength and the scale of the logits are selected by cross-validation. The result is an ordinary
        head, which can be trained further, folded, saved and pushed.

            model = DiTForImageClassification.from_pretrained("my/dit", timestep=61, head="linear", num_labels=10)
            fit = model.fit_head(train)  # a dataset with the columns `image` and `label`
            print(f"{fit.accuracy:.1%} of {fit.num_images} images, each by a head that has not seen it")

        Args:
            dataset: A `datasets` dataset, streaming or not, or a cache from `cache_features`; pairs (image, label) in
                a list or a torch dataset; or a dictionary of `pixel_values` (or `features`, `latents`) and `labels`.
                Labels are class indices, (n,), or, depending on `config.problem_type`, rows of 0 and 1 or values, (n,
                K). For a segmenter they are masks, (n, H, W). Under torchrun, pass the same in all processes.
            image_column: Column of the images. Default: `image`, or the only one with images.
            label_column: Column of the labels. Default: `labels`, `label`, `label_ids`, `annotation` or `mask`.
            eval_dataset: Images of the same kind to evaluate the fitted head on, or a dictionary of several such sets.
            max_images: Maximum number of images: a random sample, or the first of a stream. Default: all.
            balance_classes: Whether classes have equal weight, regardless of their number of images (or pixels). The
                images are read twice unless the labels can be read without them.
            allow_missing: Whether classes may have no image. They are then never predicted.
            replace_head: Whether an attention head is replaced by a linear one.
            batch_size: Images per forward pass. Default: up to 32, fewer if they are large.
            seed: Seed of the sample.

        Returns:
            A `HeadFit`: strength, held-out error and accuracy, number of images, and seconds.

        Raises:
            ValueError: If there is no linear head, the timestep is not selected yet, the labels do not fit the model,
                a class has no image, features are constant, NaN or infinite, or the fit needs more memory than there
                is.
            ImportError: If the package is not installed.
        """
        fitting = package("training.fit", "Fitting a head")
        options = fitting.FitOptions(
            image_column, label_column, max_images, balance_classes, allow_missing, replace_head, batch_size, seed
        )
        return fitting.fit_head(self, dataset, options, eval_dataset)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load as torch does, including the statistics of tokens that a peft adapter contains with its head."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if (today := prefix + name_today(key.removeprefix(prefix))) != key:
                state_dict[today] = state_dict.pop(key)
        for key in [key for key in state_dict if ".standardization." in key and self._standardizations()]:
            if key.endswith("shift"):
                self.config.standardized_grid = list(state_dict[key].shape[:2])
            # peft only maps weights that its copy of the head has, and a new head has no statistics.
            part, _, name = key.removeprefix(prefix).partition(".")
            copies = f"{prefix}{part}.modules_to_save."
            adapters = {other.removeprefix(copies).partition(".")[0] for other in state_dict if copies in other}
            if name.startswith("standardization.") and len(adapters) == 1:
                state_dict[f"{copies}{adapters.pop()}.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _settle_timestep(
        self, calibration_images: Any, info: dict[str, Any], num_train_images: int | None = None
    ) -> None:
        """Select the timestep if it is "auto", and drop a selection record or statistics that no longer apply."""
        config = self.config
        if not self._standardizations() or any(".standardization." in name for name in info["missing_keys"]):
            self._set_standardization(None)
        if config.timestep == "auto":
            settling = package("selection.apply", "Selecting a timestep (`timestep='auto'`)")
            settling.settle(self, calibration_images, num_train_images, info)
            return
        if config.zeroed_channels == "auto":
            raise ValueError(
                f"`zeroed_channels='auto'` needs `timestep='auto'`, but the timestep is fixed at {config.timestep}. "
                "Pass `timestep='auto'`, or list the channels."
            )
        if not config.is_selection_in_use():
            config.selection = None
        settling = package("selection.apply", None if calibration_images is None else "Standardizing features")
        if settling is not None:
            settling.settle_standardization(self, calibration_images, info)
            settling.warn_of_unknown_channels(self)

    def apply_selection(self, selection: Any) -> None:
        """Set the timestep and tap of the model to those of a selection.

        Sets `timestep`, `block`, `feature` and `selection` of the configuration, and `zeroed_channels` if the
        selection searched for massive channels. The selected timesteps replace the previous ones. If the model reads
        several taps, all of them stay. A head standardizes its features by the statistics of the selection. A record
        that was loaded has none, and statistics of another timestep or tap are then removed.

        Args:
            selection: The `TimestepSelection` from `select_timestep`.

        Raises:
            ValueError: If it is not a `TimestepSelection`, or the width of the tokens would no longer fit the head.
            ImportError: If the package is not installed.
        """
        package("selection.apply", "Applying a selection").apply_selection(self, selection)

    def lora_targets(self, names: Sequence[str] = LORA_LAYERS) -> list[str]:
        """Return the names of the backbone's layers to apply LoRA to, up to the deepest tap.

            config = peft.LoraConfig(target_modules=model.lora_targets(), modules_to_save=["classifier"])

        Adapters on layers after the tap would never get a gradient, which is an error under DDP. If the model is the
        backbone of another one, such as UperNet, call this on the backbone. The names also work there.

        Args:
            names: Suffixes of layer names, such as "to_out.0". Default: queries and values (in folded models also
                keys).

        Raises:
            ValueError: If there is no such layer up to the tap.
        """
        base = self._base()
        unused = [
            {id(part) for module in base.denoiser.unused_modules(*tap) for part in module.modules()}
            for tap in base.taps()
        ]
        ends = tuple(f".{name}" for name in names)
        found = [
            name
            for name, module in self.named_modules()
            if name.endswith(ends) and ".denoiser." in f".{name}" and isinstance(module, nn.Linear | nn.Conv2d)
            if id(module) not in set.intersection(*unused)
        ]
        if not found:
            raise ValueError(f"`names` must be suffixes of the names of layers up to the tap, got {list(names)}.")
        return found

    def fold(self) -> Self:
        """Return a new, smaller model of the same class with equal outputs, limited to its timesteps and taps.

        The conditioning on the timestep is merged into the neighbouring layers, query, key and value become one layer,
        and unused parts are removed: embedders of timestep and label (or text), modulation layers, blocks after the
        last tap and output layers. Several timesteps share all layers, but each has its own gates and its own scales
        and shifts of the norms. The result is a plain vision transformer. It needs diffusers only for a VAE, supports
        `attn_implementation` (except for Sana's linear attention), and can be trained, also with LoRA.

        Returns:
            The folded model, with the same device, dtype and train or eval mode. It shares no weights with this one.

        Raises:
            ValueError: If the timestep is not selected yet, the model is already folded, a layer cannot be folded
                (such as another kind of norm or activation), it has adapters or quantized weights, or some weights are
                not in memory.
            ImportError: If the package is not installed.
        """
        folded: Self = package("folding.fold", "Folding").fold_model(self)
        return folded


def _take_source(source: str | os.PathLike[str] | None, kwargs: dict[str, Any]) -> bool:
    """Add a diffusers checkpoint to the keywords of `from_pretrained`; return whether the source is one."""
    needed = source is not None and is_of_diffusers(source)
    loading = package("checkpoints.loading", "Loading a diffusers checkpoint" if needed else None)
    if loading is not None and loading.take_source(source, kwargs):
        return True
    if source is not None:
        check_files(source, kwargs.get("subfolder"))
    return False


def _place_buffers(model: nn.Module, device_map: Any) -> None:
    """Add missing buffers to a device map. transformers omits those of a module that it splits."""
    if not isinstance(device_map, dict) or "" in device_map:
        return
    main = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
    for name, _ in model.named_buffers():
        if not any(f"{name}.".startswith(f"{place}.") for place in device_map):
            device_map[name] = main


@contextmanager
def _explained(source: Any) -> Iterator[None]:
    """Name the source in transformers' report, and raise clear errors for broken weights and unknown keywords."""
    token = SOURCE.set(None if source is None else str(source))
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {str(source)!r} are truncated or not safetensors ({error}). Save or download them again."
        ) from error
    except TypeError as error:
        # transformers passes keywords that it does not know on to the model's `__init__`.
        found = set(re.findall(r"unexpected keyword argument '(\w+)'", str(error)))
        if found & TAKEN:
            raise ValueError(f"Set {', '.join(found)} in `config=` instead of passing keywords beside it.") from error
        refuse_unknown_keywords(found)
        raise
    finally:
        SOURCE.reset(token)


def _zeroed_at(config: ASelectConfig, read_out: ReadOut, width: int) -> list[int]:
    """Return the channels that are set to zero at a tap; they may have been changed since they were checked."""
    channels = config.channels_at(*read_out[1:]) or []
    if config.zeroed_channels == "auto" or any(not 0 <= channel < width for channel in channels):
        raise ValueError(
            f"`zeroed_channels` must be integers in [0, {width}) once the timestep is selected, got "
            f"{config.zeroed_channels!r}. `select_timestep` and `apply_selection` find them."
        )
    return channels


def refuse_tap_keywords(kwargs: dict[str, Any]) -> None:
    """Reject keywords that `forward` would silently ignore: a timestep or tap, and misspelt images or labels."""
    if named := sorted(kwargs.keys() & {"timestep", "block", "feature", "read_out", "num_noise_draws"}):
        raise ValueError(
            f"`forward` reads the timestep and tap of the configuration, and takes no {', '.join(named)}. Set them "
            "in `model.config`, or call `extract_features`, which takes them."
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "`output_attentions=True` is not supported, because most attention kernels return no weights. Omit it; "
            "`feature='attention'` reads the output of attention."
        )
    if masks := [name for name in ("attention_mask", "bool_masked_pos") if kwargs.get(name) is not None]:
        raise ValueError(f"`{masks[0]}` is not supported, because all tokens are read. Omit it.")
    for name in () if torch.compiler.is_compiling() else kwargs:
        if near := get_close_matches(name, ("labels", "pixel_values", "latents", "features"), n=1, cutoff=0.8):
            hint = f"did you mean `{near[0]}`?" if near[0] != name else "only models with a head take it"
            raise ValueError(f"`forward` has no `{name}` ({hint}).")


class DiTModel(ASelectPreTrainedModel):
    """A diffusion transformer (and VAE encoder) whose tokens at its taps and timesteps are its output.

    Args:
        config: The configuration.
        add_pooling_layer: False, as scripts pass it that want ViT without one. There is none to be added.
        use_mask_token: As of ViT. There is none, with a warning if it is True.

    Example:
        >>> import torch
        >>> from hf_aselect import DiTModel
        >>> model = DiTModel.from_pretrained("src/hf_aselect/assets/fashion_mnist", timestep=19)
        >>> model(torch.zeros(2, 1, 28, 28)).last_hidden_state.shape
        torch.Size([2, 49, 128])
    """

    schedule: NoiseSchedule
    denoiser: Any  # a `Denoiser` or a `FoldedTransformer`
    vae: Any  # diffusers is imported when a VAE is built, not here

    def __init__(self, config: ASelectConfig, add_pooling_layer: bool = False, use_mask_token: bool = False) -> None:
        if add_pooling_layer:
            raise ValueError("`add_pooling_layer=True` is not supported: `pooler_output` is the mean of the tokens.")
        if use_mask_token:
            # A ViT with a mask token computes the same as long as nothing is masked, and `forward` refuses masks.
            logger.warning("`use_mask_token=True` is ignored, because images cannot be masked.")
        super().__init__(config)
        self.schedule = NoiseSchedule.from_config(config.scheduler or {})
        self.denoiser = build_denoiser(config)
        self.vae = build_vae_encoder(config)
        if self.vae is not None:
            self.vae.float()  # in half precision, too, where the model is built of its configuration
        if not config.folded and config._attn_implementation not in (None, "sdpa"):
            logger.warning(
                "`attn_implementation=%r` is ignored: diffusers' blocks use their own attention kernels. Folded "
                "models (`model.fold()`) support it.",
                config._attn_implementation,
            )
        # Computed before a graph is compiled or exported, because graphs cannot contain the generator.
        height, width = (side // config.vae_scale_factor for side in config.image_height_width)
        for draw in range(config.num_noise_draws):
            self.noise((config.layout.num_channels, height, width), draw)
        # The modules that the model freezes and keeps in eval mode. Modules added later are not changed.
        self._own_modules = {
            part: list(module.modules())
            for part, module in (("denoiser", self.denoiser), ("vae", self.vae))
            if module is not None
        }
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
            vae._apply(without_rounding(fn))
        return self

    def stages(self, config: ASelectConfig | None = None) -> list[list[ReadOut]]:
        """Return the read-outs that are concatenated to each output. Here there is one output."""
        return [(config or self.config).read_outs()]

    def read_outs(self) -> list[ReadOut]:
        """Return the timestep, block and feature of all read-outs, one output after the other."""
        return [each for stage in self.stages() for each in stage]

    def taps(self) -> list[Tap]:
        """Return the (block, feature) pairs that are read, without their timesteps."""
        return list(dict.fromkeys((block, feature) for _, block, feature in self.read_outs()))

    def noise(self, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        """Return the fixed noise of `config.noise_seed` for latents of a shape, (C, h, w), float32, on the CPU.

        Args:
            shape: Channels, height and width.
            draw: Index of the noise draw, from 0.
        """
        return kept_noise(shape, self.config.noise_seed, draw)

    def freeze(self) -> None:
        """Freeze the VAE and the denoiser (or only its parts after the last tap, if the backbone is trained)."""
        for module in self._frozen_modules():
            # transformers applies gradient checkpointing only to layers in train mode.
            module.training = module.training and isinstance(module, GradientCheckpointingLayer)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if not self.config.freeze_backbone:
            # Parameters that are never used get no gradient, which is an error in distributed training.
            for parameter in self.denoiser.unused_parameters(self.taps()):
                parameter.requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        """Return the modules that are never trained, among those that the model was built with and still has."""
        parts = ("denoiser", "vae") if self.config.freeze_backbone else ("vae",)
        present = set(self.modules())
        # Drop references to removed modules.
        self._own_modules = {
            name: [module for module in modules if module in present] for name, modules in self._own_modules.items()
        }
        return [module for name in parts for module in self._own_modules.get(name, ())]

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        """Initialize as transformers does, then freeze again. This ends a load and makes weights trainable."""
        super()._initialize_weights(module, *args)
        if module is self:
            self.freeze()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load as torch does, but keep frozen parameters frozen with `assign=True`."""
        for name, value in state_dict.items():
            state_dict[name] = value.detach() if isinstance(value, nn.Parameter) else value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> Self:
        """Set train mode, except for frozen parts, which stay in eval mode; modules added by others are unchanged."""
        super().train(mode)
        for module in self._frozen_modules():
            module.training = module.training and isinstance(module, GradientCheckpointingLayer)
        return self

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the tokens of images, (B, N, D), and their mean, (B, D), at the configuration's timestep and tap.

        Several taps and timesteps are concatenated along the channels, in the order of `config.read_outs()`.

        Args:
            pixel_values: Images in [-1, 1], (B, C, H, W).
            latents: Clean latents, (B, C, h, w), as from `encode`, in place of `pixel_values`.
            output_hidden_states: Whether to also return `hidden_states`, the first block's input and each block's
                output, (B, N, D) each, at the first timestep. This runs all blocks.
            kwargs: Ignored, as transformers passes keywords of other models. `return_dict=False` gives a tuple.

        Raises:
            ValueError: If the timestep is not selected yet, the images do not fit, or a timestep or tap is named here.
        """
        refuse_tap_keywords(kwargs)
        own, every = self.config.read_outs(), self.config.hidden_read_outs(output_hidden_states)
        read, _ = self._read([*own, *every], pixel_values, latents)
        tokens = concatenated([read[each] for each in own])
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(1),
            hidden_states=tuple(read[each] for each in every) or None,
        )
