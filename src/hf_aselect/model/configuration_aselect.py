"""Configuration of the A-SelecT models: every value that changes their output."""

import difflib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .checks import NUM_TIMESTEPS, check_dtype, check_timestep, class_maps, short
from .families import layout_of
from .layouts import (
    MAX_LAYERS,
    MAX_READ_OUTS,
    MAX_SIZE,
    POOLINGS,
    FoldedLayout,
    ReadOut,
    Tap,
    TransformerLayout,
    check_feature,
    check_format,
    listed,
    parse_tap_key,
    plain,
    record_of,
    tap_key,
)
from .noise_schedule import count_trained
from .vae import check_vae, image_channels_of, latent_channels_of, vae_scale_factor_of

logger = logging.get_logger(__name__)
# A folder with this file contains the code: every class that travels needs it.
CODE = "configuration_aselect.py"
# Blocks that UperNet reads, in eighths of the depth. The default tap is one of them.
UPERNET_EIGHTHS = (1, 3, 5, 6)
# The defaults of diffusers' `DiTTransformer2DModel`, which are the sizes of DiT-XL/2.
DIT_XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
DDPM_LINEAR = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
# An upper bound. A model with more tokens would exhaust the memory while it is built.
_MAX_TOKENS = 2**20
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "head": ("linear", "attention"),
    "pooling": tuple(POOLINGS),
    "decoder": ("linear", "upernet"),
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
}
_RANGES: dict[str, tuple[int, float]] = {
    **dict.fromkeys(("head_hidden_size", "head_mlp_ratio", "head_num_attention_heads"), (1, MAX_SIZE)),
    "head_num_layers": (1, MAX_LAYERS),
    "decoder_hidden_size": (1, MAX_SIZE),
    "auxiliary_hidden_size": (0, MAX_SIZE),
    **dict.fromkeys(("auxiliary_loss_weight", "guidance", "initializer_range"), (0, 10**6)),
    "num_noise_draws": (1, 1000),
    "noise_seed": (0, 2**32 - 1),
    "semantic_loss_ignore_index": (-(2**63), 2**63 - 1),
}
# Fields that are configurations of diffusers' objects.
PARTS = ("transformer", "vae", "scheduler")
# Fields that `read_out` replaces, with their defaults.
_OF_READ_OUT = {"timestep": "auto", "block": None, "feature": "query"}
_BESIDE_READ_OUT = (
    "`read_out` replaces `timestep`, `block` and `feature`, got {} as well. Omit them, or pass `read_out=None`."
)
# The classes that transformers' Auto classes load from a checkpoint's code. One module names all models and imports
# the others, so the code of all models is loaded, and can be saved again, with any of them.
ALL_MODELS = "modeling_segmentation"
AUTO_MAP = {
    "AutoConfig": "configuration_aselect.ASelectConfig",
    "AutoImageProcessor": "image_processing_aselect.ASelectImageProcessor",
    "AutoModel": f"{ALL_MODELS}.DiTModel",
    "AutoBackbone": f"{ALL_MODELS}.DiTBackbone",
    "AutoModelForImageClassification": f"{ALL_MODELS}.DiTForImageClassification",
    "AutoModelForSemanticSegmentation": f"{ALL_MODELS}.DiTForSemanticSegmentation",
}
# Keys that transformers accepts in addition to its configurations' fields, or writes (`to_dict`, `Trainer`).
_OF_TRANSFORMERS = {
    *("_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attn_implementation", "auto_map"),
    *("experts_implementation", "model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config"),
    *("quantization_config", "stage_names", "tie_word_embeddings", "torch_dtype", "use_cache"),
    # From transformers 4.
    *("add_cross_attention", "cross_attention_hidden_size", "is_decoder", "prefix", "pruned_heads"),
    *("task_specific_params", "tie_encoder_decoder", "torchscript", "use_bfloat16"),
}
# Keywords of transformers' scripts that no configuration reads: `i2label` is how one of them spells `id2label`.
_OF_SCRIPTS = {"finetuning_task", "i2label"}
# Fields of ViT: sizes may be passed if they equal the transformer's, and dropout if it is 0.
_READ_OFF = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "patch_size"}
_DROPOUTS = {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"}
_OF_VIT = _READ_OFF | _DROPOUTS | {"encoder_stride", "hidden_act", "intermediate_size", "layer_norm_eps", "qkv_bias"}
# Keys that transformers would interpret as fields of a text model.
_OF_TEXT = {"head_dim", "layer_types", "mlp_layer_types", "rope_parameters", "rope_scaling", "rope_theta"}
# Under this name, unknown keys of a file bypass the check of keywords.
_OF_FILE = "_keys_of_file"


def _plain_on_assignment(kind: Any) -> Any:
    """Make each field of a configuration accept numpy and torch values, tuples and diffusers objects."""
    assign = kind.__setattr__
    numbers = {name for name, field in kind.__annotations__.items() if field is float}

    def assign_plain(self: Any, name: str, value: Any) -> None:
        value = record_of(value) if name in PARTS else plain(value)
        if value is None and name in _OF_READ_OUT:
            value = _OF_READ_OUT[name]
        if name == "image_size" and isinstance(value, dict) and value.keys() == {"height", "width"}:
            value = [value["height"], value["width"]]
        if name == "output_attentions":
            name = "_output_attentions"  # transformers would ask for another kernel, which changes nothing here
        if name == "_output_attentions" and value:
            logger.warning_once(
                "`output_attentions=True` in a configuration changes nothing: attention weights are never returned."
            )
        assign(self, name, float(value) if name in numbers and type(value) is int else value)

    kind.__setattr__ = assign_plain
    return kind


@_plain_on_assignment
@strict
class ASelectConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a diffusion transformer that is read at a timestep and a tap, or at several of them.

    Unknown keywords are rejected, unlike in `PreTrainedConfig`. `hidden_size`, `num_hidden_layers`,
    `num_attention_heads` and `num_channels` are read off `transformer` and `vae` and cannot be set.

    Args:
        transformer: diffusers' configuration of the transformer, with `_class_name`. Default: DiT-XL/2's sizes.
        vae: diffusers' configuration of the VAE, with `_class_name`, one of `VAE_KINDS`; None for a DiT in pixel
            space.
        scheduler: diffusers' configuration of a scheduler of the kind that the transformer was trained with, DDPM-like
            or flow matching, with `_class_name`. Default: DiT's own, 1000 steps of linear betas.
        timestep: Noise level at which features are read, an integer in [0, 1000), 0 = least noise, or a list of them;
            "auto", or None, as long as none is selected.
        num_timesteps: How many timesteps are selected for "auto"; several complement each other, the best one first.
        block: Block at which features are read, 0-based, negative from the end; a list of them, or "all". Default:
            `3 * num_hidden_layers // 8`, the place of the A-SelecT authors' choice (9 of the 24 blocks of Stable
            Diffusion 3).
        feature: Feature to read at the block: `hidden` (block output), `normed` (adaLN-modulated input of attention),
            `query`, `key`, `value` (before the head split), `attention` (after the output projection, before the
            gate), or a list of them. FLUX's single-stream blocks have no `attention`. With several timesteps, blocks
            or features, every combination is read, and the tokens are concatenated along their channels: timesteps
            outermost, then blocks, then features, each in the order given.
        read_out: List of [timestep, block, feature] that replaces the three fields, concatenated in this order. The
            three fields then have the values of its first entry.
        timestep_embedding: Timestep embedding of a `DiTTransformer2DModel`: "diffusers" for weights trained with
            diffusers, "original" for weights of `facebookresearch/DiT` (its sinusoidal frequencies differ slightly
            from those of diffusers), "sit" for weights of SiT, which takes 1 - t/1000, and "repa" for weights of REPA
            and SRA, which take t/1000. Other families only have "diffusers".
        prompt_shapes: Shapes of the empty prompt's embeddings by name, which are saved among the weights of a
            text-conditioned model: `prompt_embeds` (1, L, C), `pooled_prompt_embeds` (1, C). Written by the
            conversion.
        guidance: Guidance scale that a guidance-distilled transformer (FLUX.1-dev) is conditioned on. 1 is none.
        zeroed_channels: Channels of the tokens that are set to zero. A list applies to the configuration's own tap (an
            empty list: no channel at any tap). A dictionary has one list per tap, such as `{"9.hidden": [3, 71]}`. In
            large transformers, a few channels of the residual stream dwarf all others: with "auto",
            `select_timestep` finds these together with the timestep. Default: "auto" for `hidden`, `normed` and
            `attention` if the timestep is selected, else none.
        noise_seed: Seed of the fixed noise that is added to images.
        num_noise_draws: Number of fixed noise draws over which tokens are averaged, at least 1.
        resample_noise_in_training: Whether train mode draws fresh noise for every image (an augmentation).
        freeze_backbone: Whether only the head is trained.
        head: Classification head: "attention" (the A-SelecT authors') or "linear" (pooling, layer norm, linear).
        head_hidden_size: Width of the attention head.
        head_num_layers: Transformer blocks of the attention head.
        head_num_attention_heads: Attention heads in each of them.
        head_mlp_ratio: Width of their MLPs as a multiple of `head_hidden_size`.
        head_norm: Whether the linear head has a layer norm. One that `fit_head` fitted has none.
        pooling: How tokens are pooled for the linear head: "mean"; "mean_std" for mean and standard deviation; or
            "regions" for the mean of each quarter of the image and the standard deviation. See `heads.pooled_tokens`.
        standardize_features: Whether a new head (or decoder) standardizes the tokens by their mean and spread over the
            images that the timestep is selected from, or over those passed to `model.standardize`. False for a
            checkpoint that was saved before this field existed.
        standardized_grid: Rows and columns of the token grid that these statistics were computed on. The statistics
            are part of the head's weights. None without statistics. Written by the package.
        decoder: Segmentation decoder: "linear" (batch norm and a classifier of each token of `block`) or "upernet" (of
            four blocks, `out_indices`).
        decoder_hidden_size: Channels of UperNet.
        auxiliary_hidden_size: Channels of its auxiliary head, which only training uses; 0 for none.
        auxiliary_loss_weight: Weight of that head's loss.
        semantic_loss_ignore_index: Value of mask pixels that have no class.
        out_features: Stages that a backbone returns: "stem" is the input of the first block, "stage1" its output.
        out_indices: Indices of the stages in increasing order, negative from the end: 0 is the stem, 1 the first
            block. Default: the last block, as transformers' backbones; for "upernet" the blocks at 1, 3, 5 and 6
            eighths of the depth.
        reshape_hidden_states: Whether a backbone returns maps, (B, D, rows, columns); else tokens, (B, 1 + N, D),
            behind their mean in place of a class token, as transformers' DPT wants them.
        image_size: Pixels a side, or [height, width]. Default: the transformer's `sample_size` (times the VAE's
            down-sampling; 1024 pixels for FLUX). Other multiples of a token's side work, square or not: DiT, PixArt
            and Sana make their position table again, scaled to it as diffusers does; Stable Diffusion 3 cuts the
            middle out of its table, which ends at 192 tokens a side (3.5-medium: 384); FLUX and Lumina have rotary
            positions.
        folded: Whether the conditioning on the timesteps is merged into the weights, as by `model.fold()`. Such a
            model only reads at its own timesteps and taps.
        folded_layout: Layout of a folded transformer, as from `FoldedLayout.to_dict()`. Written by `fold`.
        selection: Record of the timestep selection, as from `TimestepSelection.to_dict()`.
        base_model: Hub id of the model that the weights derive from. Its licence also applies to this model.
        base_license: Licence of the base model according to its card: a Hub identifier, or "other/NAME".
        initializer_range: Standard deviation of newly initialised weights, except for the attention head, which uses
            Xavier initialisation.

    Raises:
        ValueError: If a keyword is unknown or a value is invalid. When a value is checked after construction,
            huggingface_hub wraps the error in a `StrictDataclassError`.

    Example:
        >>> from hf_aselect import ASelectConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "patch_size": 4}
        >>> transformer = {"_class_name": "DiTTransformer2DModel", "in_channels": 3, "sample_size": 32, **sizes}
        >>> config = ASelectConfig(transformer=transformer, timestep=[19, 61], block="all", feature="hidden")
        >>> config.read_outs()[:2], config.feature_size
        ([(19, 0, 'hidden'), (19, 1, 'hidden')], 256)
    """

    model_type = "aselect_dit"

    transformer: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    # Lists of anything: our own checks say what is wrong with one.
    timestep: int | list[Any] | str = "auto"
    num_timesteps: int = 1
    block: int | list[Any] | str | None = None
    feature: str | list[Any] = "query"
    read_out: list[Any] | None = None
    timestep_embedding: Literal["diffusers", "original", "sit", "repa"] = "diffusers"
    prompt_shapes: dict[str, list[int]] | None = None
    guidance: float = 1.0
    zeroed_channels: list[int] | dict[str, list[int]] | str | None = None
    noise_seed: int = 0
    num_noise_draws: int = 1
    resample_noise_in_training: bool = False
    freeze_backbone: bool = True
    head: str = "attention"
    head_hidden_size: int = 800
    head_num_layers: int = 2
    head_num_attention_heads: int = 8
    head_mlp_ratio: int = 4
    head_norm: bool = True
    pooling: str = "mean"
    standardize_features: bool = True
    standardized_grid: list[int] | None = None
    decoder: str = "linear"
    decoder_hidden_size: int = 512
    auxiliary_hidden_size: int = 256
    auxiliary_loss_weight: float = 0.4
    semantic_loss_ignore_index: int = 255
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    image_size: int | list[int] | None = None
    folded: bool = False
    folded_layout: dict[str, Any] | None = None
    selection: dict[str, Any] | None = None
    base_model: str | None = None
    base_license: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the fields that follow from the transformer and reject unknown keywords."""
        others, kwargs = kwargs.pop(_OF_FILE, {}), plain(kwargs)
        if "model_type" in kwargs or self.transformers_version is not None:
            # The values come from `to_dict()`, which also has keys that are not fields, from a file or a user.
            others = {**others, **{name: value for name, value in kwargs.items() if name not in TAKEN}}
            others = {name: value for name, value in others.items() if not hasattr(type(self), name)}
            kwargs = {name: value for name, value in kwargs.items() if name not in others}
            _warn_of_unknown(others)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        refuse_unknown_keywords(kwargs.keys() - TAKEN)
        of_vit = {name: kwargs.pop(name) for name in _OF_VIT & kwargs.keys()}
        # The names of the stages follow from the depth.
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_SCRIPTS | {"stage_names"}}
        if kwargs.get("num_labels") is None:
            kwargs.pop("num_labels", None)
        for name, classes in class_maps(vars(self), kwargs.get("num_labels")).items():
            setattr(self, name, classes)
        for dtype in (self.dtype, kwargs.get("torch_dtype")):
            check_dtype(dtype)
        self.transformer = dict(DIT_XL_2) if self.transformer is None else self.transformer
        self.scheduler = dict(DDPM_LINEAR) if self.scheduler is None else self.scheduler
        layout = layout_of(self.transformer)
        _ = self.folding  # rejected before anything is read off it
        check_vae(self.vae)
        if self.read_out is not None:
            self._take_read_out(self.read_out)
        if self.block is None:
            self.block = 3 * layout.num_layers // 8
        if self.image_size is None:
            self.image_size = layout.sample_size * self.vae_scale_factor
        for name, value in of_vit.items():
            self._refuse_other_than(name, value)
        # Named as in transformers: the input of the first block, then each block.
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, layout.num_layers + 1))]
        if out_features is None and out_indices is None:
            out_indices = self._default_out_indices()
        if out_indices is not None:
            self._check_order(out_indices)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs, **others)

    def _refuse_other_than(self, name: str, value: Any) -> None:
        """Reject a field of ViT whose value differs from that of the transformer."""
        own = getattr(self, name) if name in _READ_OFF else 0 if name in _DROPOUTS else None
        if value is None or value != own:
            what = f"is {own}" if own is not None else "follows from `_class_name`"
            raise ValueError(
                f"`{name}` cannot be set, because it {what} in `transformer` or `vae`; got {short(value)}."
            )

    def _take_read_out(self, read_out: list[Any]) -> None:
        """Set the timestep, block and feature that are not given to the first entry of a read-out."""
        are_entries = all(isinstance(each, list | tuple) and len(each) == 3 and each[0] != "auto" for each in read_out)
        if not 1 <= len(read_out) <= MAX_READ_OUTS or not are_entries:
            raise ValueError(
                f"`read_out` must be a list of 1 to {MAX_READ_OUTS} entries [timestep, block, feature], with integer "
                f"timesteps, got {short(read_out)}."
            )
        for (name, default), value in zip(_OF_READ_OUT.items(), read_out[0], strict=True):
            if getattr(self, name) == default:
                setattr(self, name, value)

    def _default_out_indices(self) -> list[int]:
        """Return the default stages: the last one, as in transformers, or the four of UperNet."""
        depth = len(self.stage_names) - 1
        is_deep_enough = self.decoder == "upernet" and depth >= 4
        return [1 + share * depth // 8 for share in UPERNET_EIGHTHS] if is_deep_enough else [depth]

    def to_dict(self) -> dict[str, Any]:
        """Return all values; a read-out where there is one, and stages by their indices where not the default."""
        values: dict[str, Any] = super().to_dict()
        values.pop("stage_names", None)
        if values.get("read_out") is None:
            values.pop("read_out", None)
        del values["out_features"]
        if values["out_indices"] == self._default_out_indices():
            del values["out_indices"]
        return values

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        include_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the configuration; with its code where that is wanted, see the models' `save_pretrained`."""
        # Whoever saves a model has decided already, and says where the code is.
        source = vars(self).pop("_code_folder", None)
        with_code = is_code_saved(self, save_directory, push_to_hub, include_code if source is None else bool(source))
        # A configuration that is pushed alone, or of a user's own class, has transformers write its code alone.
        is_alone = source is None and (push_to_hub or type(self).__module__ != __name__)
        kept = vars(self).get("auto_map")
        with nullcontext() if with_code and is_alone else without_code(self):
            if with_code and not is_alone:
                code = write_code(Path(source or Path(__file__).parent), save_directory)
                self.auto_map = {**code, **(kept or {})} if source else code
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if kept:
            self.auto_map = kept

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """Return this configuration: there is no text. Transformers would take `decoder` for one that is nested."""
        return self

    def _check_order(self, out_indices: list[int] | tuple[int, ...]) -> None:
        """Reject stages that do not exist or are out of order. transformers does not detect all of these."""
        depth = len(self.stage_names)
        if not isinstance(out_indices, list | tuple):
            raise ValueError(f"`out_indices` must be a list of integers, got {out_indices!r}.")
        if not all(isinstance(index, int) and -depth <= index < depth for index in out_indices):
            raise ValueError(f"`out_indices` must be integers in [{-depth}, {depth}), got {list(out_indices)}.")
        positive = [index % depth for index in out_indices]
        if positive != sorted(set(positive)):
            raise ValueError(f"`out_indices` must be strictly increasing, got {list(out_indices)}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary, with `kwargs` in place of its values.

        transformers sets `kwargs` on the finished configuration without checks. Here they are checked like other
        values.

        Raises:
            ValueError: As the constructor, and if `config_dict` is not a dictionary of fields by name.
        """
        if not isinstance(config_dict, dict) or not all(isinstance(name, str) for name in config_dict):
            raise ValueError(f"A configuration must be a dictionary of fields by name, got {short(config_dict)}.")
        if not isinstance(config_dict.get("quantization_config", {}), dict):
            # transformers calls methods of a dictionary on it.
            raise ValueError(
                f"`quantization_config` must be a dictionary, got {short(config_dict['quantization_config'])}."
            )
        known = cls.__dataclass_fields__.keys() | _OF_TRANSFORMERS | OWN_FIELDS
        others = {name: value for name, value in config_dict.items() if name not in known | _OF_TEXT}
        _warn_of_unknown(others.keys() - _OF_SCRIPTS - _OF_VIT)
        # A file cannot replace methods and properties.
        others = {name: value for name, value in others.items() if not hasattr(cls, name)}
        config_dict = {name: value for name, value in config_dict.items() if name in known}
        own_fields = {name: kwargs.pop(name) for name in list(kwargs) if name in TAKEN - _DTYPES}
        # Scripts pass None for arguments that they were not given. The saved value stays.
        own_fields = {
            name: value for name, value in own_fields.items() if value is not None or name not in _OF_READ_OUT
        }
        maps, num_labels = class_maps(config_dict, None), plain(own_fields.get("num_labels"))
        own_fields |= (own_maps := class_maps(own_fields, num_labels))
        if own_maps or (num_labels is not None and maps and len(maps["id2label"]) != num_labels):
            # The saved class names do not fit another number of classes.
            config_dict = {name: value for name, value in config_dict.items() if name not in (*maps, "num_labels")}
        if "model_type" in config_dict:
            # The default for checkpoints that were saved before the field existed.
            config_dict = {"standardize_features": False, **config_dict}
        if own_fields.get("timestep", "auto") != "auto" or own_fields.get("read_out") is not None:
            # The saved number belongs to the saved timesteps.
            config_dict = {name: value for name, value in config_dict.items() if name != "num_timesteps"}
        of_read_out = own_fields.keys() & _OF_READ_OUT
        if own_fields.get("read_out") is not None:
            # A read-out replaces the saved fields.
            config_dict = {name: value for name, value in config_dict.items() if name not in _OF_READ_OUT}
        elif of_read_out and config_dict.get("read_out") is not None and "read_out" not in own_fields:
            raise ValueError(_BESIDE_READ_OUT.format(", ".join(sorted(of_read_out))))
        is_unused_asked = kwargs.pop("return_unused_kwargs", False)
        values = {**config_dict, **own_fields, _OF_FILE: others}
        config, unused = super().from_dict(values, return_unused_kwargs=True, **kwargs)
        if own_fields and config_dict.get("standardized_grid"):
            saved = super().from_dict(dict(config_dict))
            if config._read_settings() != saved._read_settings():
                config.standardized_grid = None
        if is_unused_asked:
            return config, unused
        refuse_unknown_keywords({name for name in unused if not name.startswith("_")})
        return config

    def _read_settings(self) -> tuple[Any, ...]:
        """Return the settings, other than weights, that the statistics of tokens depend on."""
        stages = self.stage_read_outs() if self.decoder == "upernet" else [self.read_outs()]
        channels = [self.channels_at(block, feature) for stage in stages for _, block, feature in stage]
        return stages, self.noise_seed, self.num_noise_draws, channels, self.standardize_features

    @property
    def layout(self) -> TransformerLayout:
        """The sizes of the transformer."""
        return layout_of(self.transformer or {})

    @property
    def hidden_size(self) -> int:
        """Width of the transformer's tokens."""
        return self.layout.hidden_size

    @property
    def feature_size(self) -> int:
        """Width of the tokens that are read, of all taps and timesteps together."""
        return sum(self.widths_of(self.read_outs()))

    @property
    def pooled_size(self) -> int:
        """Width of the pooled features of one image, the input of a linear head."""
        return self.feature_size * POOLINGS[self.pooling]

    @property
    def is_pooling_of_raw_tokens(self) -> bool:
        """Whether pooling needs no standardized tokens: there are none, or only the mean is pooled."""
        return self.pooling == "mean" or self.standardized_grid is None

    def widths_of(self, read_outs: Iterable[ReadOut]) -> list[int]:
        """Return the width of each read-out: `hidden_size`, or less for keys and values that several heads share."""
        sizes = dict.fromkeys(("key", "value"), self.layout.key_value_size)
        # Before the selection, "auto" stands for all timesteps that will be selected.
        counts, width = {"auto": self.num_timesteps}, self.layout.hidden_size
        return [counts.get(str(t), 1) * sizes.get(feature, width) for t, _, feature in read_outs]

    @property
    def num_hidden_layers(self) -> int:
        """Number of transformer blocks."""
        return self.layout.num_layers

    @property
    def num_attention_heads(self) -> int:
        """Number of attention heads in each block."""
        return self.layout.num_attention_heads

    @property
    def num_channels(self) -> int:
        """Number of colour channels of an image: 1 for grey, 3 for RGB."""
        return self.layout.num_channels if self.vae is None else image_channels_of(self.vae)

    @property
    def takes_latents(self) -> bool:
        """Whether the inputs are latents: there is no VAE, and the number of channels is not that of an image."""
        return self.vae is None and self.num_channels not in (1, 3)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side that one latent stands for: 1 in pixel space."""
        return vae_scale_factor_of(self.vae)

    @property
    def patch_pixels(self) -> int:
        """Pixels a side that one token stands for."""
        return self.layout.patch_size * self.vae_scale_factor

    # By the name that the heads of transformers ask for, DPT's above all.
    patch_size = patch_pixels

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        if isinstance(self.image_size, list):
            return self.image_size[0], self.image_size[1]
        return self.image_size, self.image_size  # type: ignore[return-value]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of `image_size`."""
        height, width = self.image_height_width
        return height // self.patch_pixels, width // self.patch_pixels

    def read_outs(self, timestep: Any = None, block: Any = None, feature: Any = None) -> list[ReadOut]:
        """Return timestep, block and feature of all that is read, in the order in which it is concatenated.

        Args:
            timestep: One or several in place of the configuration's own; so are the other two.
            block: Or "all".
            feature: Where one of the three is given, a `read_out` is left aside, and only its first entry is asked.

        Returns:
            Each once, blocks counted from the first; the timestep is "auto" as long as none is selected.

        Raises:
            ValueError: If a value is out of range, none is named or something twice, or a field was set beside a
                `read_out`.
        """
        own = [self.timestep, self.block, self.feature]
        named: list[Any] = list(self.read_out or ())
        if named and list(named[0]) != own:
            raise ValueError(_BESIDE_READ_OUT.format(", ".join(map(repr, own))))
        if not named or not timestep is block is feature is None:
            given = zip((timestep, block, feature), own, ("timestep", "block", "feature"), strict=True)
            timesteps, blocks, features = (
                listed(name, mine if other is None else other) for other, mine, name in given
            )
            blocks = list(range(self.num_hidden_layers)) if blocks == ["all"] else blocks
            if (count := len(timesteps) * len(blocks) * len(features)) > MAX_READ_OUTS:
                raise ValueError(
                    f"At most {MAX_READ_OUTS} combinations of timestep and tap can be read together, got {count}."
                )
            named = [(t, b, f) for t in timesteps for b in blocks for f in features]
        return self._checked_read_outs(named)

    def _checked_read_outs(self, named: list[Any]) -> list[ReadOut]:
        """Return the read-outs with blocks counted from the first, and reject invalid and repeated ones."""
        folded = self.folded_layout or {}  # looked at when the configuration was made
        folded_at = [folded["timestep"], *folded.get("others", ())] if folded else []
        for timestep, _, feature in named:
            check_feature(feature)
            if timestep != "auto":
                check_timestep(timestep)
            elif self.timestep != "auto":
                raise ValueError("`timestep` must be 'auto' or integers in [0, 1000); 'auto' cannot be in a list.")
            if folded and timestep not in folded_at:
                raise ValueError(
                    f"This model was folded at timestep {' or '.join(map(str, folded_at))} and cannot be read at "
                    f"{timestep!r}. Load the model it was folded from, and fold it at that timestep."
                )
        found = [(timestep, self.block_index(block), feature) for timestep, block, feature in named]
        if len(set(found)) < len(found):
            timestep, block, feature = next(each for each in found if found.count(each) > 1)
            raise ValueError(
                f"`{feature}` of block {block} is listed twice at timestep {timestep}. List each tap once (negative "
                "blocks count from the end)."
            )
        return found

    def taps(self) -> list[Tap]:
        """Return the block and feature of each tap, without its timesteps."""
        return list(dict.fromkeys((block, feature) for _, block, feature in self.read_outs()))

    def block_index(self, block: int | None = None) -> int:
        """Return a block's index counted from the first. None stands for the configuration's (first) block.

        Raises:
            ValueError: If there is no such block.
        """
        if block is None:
            return self.read_outs()[0][1]
        block, depth = plain(block), self.num_hidden_layers
        if isinstance(block, str):
            raise ValueError(f"`block` must be an integer, a list of integers or 'all', got {block!r}.")
        if isinstance(block, bool) or not isinstance(block, int) or not -depth <= block < depth:
            raise ValueError(
                f"`block` must be in [{-depth}, {depth}) for a transformer of {depth} blocks, got {block!r}."
            )
        return block % depth

    def resolved_timestep(self) -> int:
        """Return the timestep at which features are read, the first of several.

        Raises:
            ValueError: If it is still "auto".
        """
        timestep = self.read_outs()[0][0]
        if isinstance(timestep, str):
            raise ValueError(f"The timestep of this model is still {timestep!r}: {_HOW_TO_RESOLVE}.")
        return timestep

    def timesteps(self) -> list[int | str]:
        """Return the timesteps that are read, each once."""
        return list(dict.fromkeys(timestep for timestep, _, _ in self.read_outs()))

    def is_selection_in_use(self, record: dict[str, Any] | None = None) -> bool:
        """Return whether a selection's record (by default the configuration's) is for the taps that are read."""
        if (record := record or self.selection) is None:
            return True
        selected, tap = record.get("selected_timesteps"), (record.get("block"), record.get("feature"))
        is_of_tap = len(self.taps()) > 1 or self.taps() == [tap]
        return is_of_tap and self.timesteps() == (selected or [record.get("timestep")])

    def validate_tap(self) -> None:
        """Reject timesteps outside [0, 1000), unknown features and blocks that do not exist."""
        for _, block, feature in self.read_outs():
            self.check_tap(block, feature)
        limit = count_trained(self.scheduler) if isinstance(self.scheduler, dict) else NUM_TIMESTEPS
        if beyond := [each for each in self.timesteps() if isinstance(each, int) and each >= limit]:
            raise ValueError(
                f"`timestep` must be below {limit}, got {beyond[0]}: the pipeline has two transformers, and the one "
                "that is read was trained only on low noise."
            )
        count, is_open = self.num_timesteps, self.timestep == "auto"
        if count not in (range(1, 1 + NUM_TIMESTEPS) if is_open else (1, len(self.timesteps()))):
            raise ValueError(f"`num_timesteps` must be at least 1, and 1 unless `timestep='auto'`, got {count}.")

    def channels_at(self, block: int, feature: str) -> list[int] | None:
        """Return the channels that are set to zero at a tap, or None if the configuration does not list the tap.

        Args:
            block: Block index, counted from the first; -1 is a backbone's stem.
            feature: The feature.
        """
        channels = self.zeroed_channels
        if isinstance(channels, dict):
            return channels.get(tap_key(block, feature))
        if isinstance(channels, list):
            if not channels:
                return []  # none, anywhere
            return channels if [(block, feature)] == self.taps() else None
        return None

    def stage_read_outs(self, stages: Iterable[int] | None = None) -> list[list[ReadOut]]:
        """Return the read-outs of each stage of a backbone: all timesteps and features, at the stage's block.

        The stem is the hidden state of block -1, at every timestep.

        Args:
            stages: Indices of the stages. Default: `out_indices`.
        """
        asked = [index % len(self.stage_names) for index in (self.out_indices if stages is None else stages)]
        every = self.read_outs()
        return [
            list(dict.fromkeys((t, stage - 1, feature if stage else "hidden") for t, _, feature in every))
            for stage in asked
        ]

    def hidden_read_outs(self, output_hidden_states: bool | None) -> list[ReadOut]:
        """Return the read-outs of `hidden_states`: the first block's input and each block's output at one timestep.

        A folded model only returns those that it was folded at.

        Args:
            output_hidden_states: Whether they are requested. Default: the configuration's setting.

        Raises:
            ValueError: If they are requested here and the model is folded at other features.
        """
        if not (self.output_hidden_states if output_hidden_states is None else output_hidden_states):
            return []
        folded, timestep = self.folding, self.read_outs()[0][0]
        blocks = range(-1, self.num_hidden_layers)
        kept = [block for block in blocks if folded is None or tap_key(block, "hidden") in folded.taps]
        if output_hidden_states and not kept:
            raise ValueError(
                "`output_hidden_states=True` needs the outputs of all blocks, but this model is folded at "
                f"{', '.join(folded.taps if folded else ())}. Use the model it was folded from."
            )
        return [(timestep, block, "hidden") for block in kept]

    def check_tap(self, block: int, feature: str) -> None:
        """Reject a feature that does not exist, or not at this block (counted from the first).

        Raises:
            ValueError: If `feature` is unknown, or the block has none of that name, or there is no such block.
        """
        check_feature(feature)
        layout = self.layout
        # The input of the first block counts as the output of block -1.
        first = -1 if feature == "hidden" else 0
        if isinstance(block, bool) or not isinstance(block, int) or not first <= block < layout.num_layers:
            raise ValueError(
                f"There is no `{feature}` of block {block!r}: this transformer has {layout.num_layers} blocks, "
                f"counted from 0{', and -1 for the input of the first block' * (first < 0)}."
            )
        taps = None if self.folded_layout is None else self.folded_layout.get("taps", ())
        if taps is not None and tap_key(block, feature) not in taps:
            raise ValueError(
                f"This model was folded to be read at {', '.join(taps)}, got {tap_key(block, feature)}. Load the "
                "model it was folded from."
            )
        depth = layout.num_attention_outputs
        if feature == "attention" and block >= depth:
            raise ValueError(
                f"Block {block} has no `attention`, because only the first {depth} blocks of this transformer "
                "project it separately. Use `hidden`, `normed`, `query`, `key` or `value`, or an earlier block."
            )

    @property
    def folding(self) -> FoldedLayout | None:
        """The layout of a folded transformer, or None if the model is not folded."""
        return None if self.folded_layout is None else FoldedLayout.from_dict(self.folded_layout)

    def validate_selection(self) -> None:
        """Reject a selection record that a later version wrote in another format."""
        if self.selection is not None:
            check_format("selection", self.selection)

    def validate_folding(self) -> None:
        """Reject a timestep or sizes that differ from those the model was folded at."""
        folded = self.folding
        if self.folded != (folded is not None):
            raise ValueError(
                "`folded` and `folded_layout` must be set together, as `model.fold()` does, got "
                f"folded={self.folded} and {'a' if folded else 'no'} layout."
            )
        if folded is None:
            return
        self.read_outs()  # at its own timestep alone
        layout = self.layout
        for name in ("num_channels", "patch_size", "hidden_size", "num_attention_heads"):
            if getattr(folded, name) != getattr(layout, name):
                raise ValueError(
                    f"`folded_layout` has {name} {getattr(folded, name)}, but `transformer` has "
                    f"{getattr(layout, name)}."
                )
        if folded.last_block >= layout.num_layers:
            raise ValueError(
                f"`folded_layout` has block {folded.last_block}, but `transformer` only {layout.num_layers} blocks."
            )

    def validate_vae(self) -> None:
        """Reject a VAE whose latents do not fit the transformer."""
        made = latent_channels_of(self.vae) if self.vae else None
        if made is not None and made != self.layout.num_channels:
            raise ValueError(
                f"The transformer takes latents of {self.layout.num_channels} channels, but the VAE returns {made}. "
                "Transformers with additional inputs, such as the masked image of FLUX.1-Fill, are not supported."
            )

    def validate_prompt(self) -> None:
        """Reject the empty prompt's shapes where the transformer has none."""
        if self.prompt_shapes and not self.layout.needs_prompt:
            raise ValueError(
                f"`prompt_shapes` were given, but a {self.transformer['_class_name']} takes no text prompt. Omit them."  # type: ignore[index]
            )

    def validate_zeroed_channels(self) -> None:
        """Reject channels that the tokens do not have."""
        channels = self.zeroed_channels
        if channels is None or channels == "auto":
            return
        taps = self.taps()
        if isinstance(channels, list) and channels and len(taps) > 1:
            raise ValueError(
                "`zeroed_channels` must have one list per tap if several taps are read, such as "
                f"{{'{tap_key(*taps[0])}': [3, 71]}}, got {channels!r}."
            )
        by_tap = channels if isinstance(channels, dict) else {tap_key(*taps[0]): channels}
        for key, indices in by_tap.items():
            try:
                block, feature = parse_tap_key(key)
            except ValueError:
                block, feature = -1, ""
            if block < 0:
                raise ValueError(
                    f"`zeroed_channels` by tap must have keys 'BLOCK.FEATURE', such as '9.hidden', got {key!r}."
                )
            self.check_tap(self.block_index(block), feature)
            (size,) = self.widths_of([(0, block, feature)])
            if isinstance(indices, str) or not all(0 <= channel < size for channel in indices):
                raise ValueError(
                    f"`zeroed_channels` must be 'auto', a list of channels in [0, {size}), or a dictionary of such "
                    f"lists by tap, got {channels!r}."
                )

    def validate_ranges(self) -> None:
        """Reject unknown names, and numbers that are out of range."""
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, known))}, got {value!r}.")
        for name, (low, high) in _RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"`{name}` must be in [{low}, {high}], got {value}.")

    def validate_head(self) -> None:
        """Reject a pooling without a linear head, and sizes of an attention head that do not fit."""
        if self.head == "attention" and self.pooling != "mean":
            raise ValueError(
                f"`pooling={self.pooling!r}` needs `head='linear'`, because an attention head reads all tokens."
            )
        if self.head_hidden_size * self.head_mlp_ratio > MAX_SIZE:
            raise ValueError(
                f"`head_hidden_size` times `head_mlp_ratio` must be at most {MAX_SIZE}, got {self.head_hidden_size} "
                f"and {self.head_mlp_ratio}."
            )
        if self.head_hidden_size % self.head_num_attention_heads:
            raise ValueError(
                f"`head_hidden_size` ({self.head_hidden_size}) must be a multiple of `head_num_attention_heads` "
                f"({self.head_num_attention_heads})."
            )

    def validate_standardized_grid(self) -> None:
        """Reject statistics of a token grid that there cannot be."""
        grid = [1, 1] if self.standardized_grid is None else self.standardized_grid
        if len(grid) != 2 or bool in map(type, grid) or min(grid) < 1 or grid[0] * grid[1] > _MAX_TOKENS:
            raise ValueError(
                "`standardized_grid` must be None or two positive integers, the rows and columns of a grid of at "
                f"most {_MAX_TOKENS} tokens, got {grid}."
            )

    def validate_decoder(self) -> None:
        """Reject other than four blocks for UperNet."""
        if self.decoder != "upernet":
            return
        if self.num_hidden_layers < 4:
            raise ValueError(
                f"`decoder='upernet'` reads four blocks, but this transformer has {self.num_hidden_layers}. Use "
                "`decoder='linear'`."
            )
        if len(self.out_indices) != 4:
            raise ValueError(f"`decoder='upernet'` needs four blocks in `out_indices`, got {self.out_indices}.")
        self.check_stages()

    def check_stages(self) -> None:
        """Reject stages whose block does not have the feature.

        Raises:
            ValueError: If there is one.
        """
        for stage in self.stage_read_outs():
            for _, block, feature in stage:
                self.check_tap(block, feature)

    def validate_output_attentions(self) -> None:
        """Accept any value. `forward` rejects `output_attentions`, because most kernels return no weights."""

    def validate_host_fields(self) -> None:
        """Reject values that transformers accepts unchecked and fails on later."""
        classes = self.architectures
        if classes is not None and not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
            raise ValueError(f"`architectures` must be a list of class names, got {classes!r}.")

    def validate_image_size(self) -> None:
        """Reject image sizes that do not divide into tokens."""
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise ValueError(f"`image_size` must be an integer or [height, width], got {self.image_size}.")
        for side in self.image_height_width:
            if side > MAX_SIZE:
                raise ValueError(f"`image_size` must be at most {MAX_SIZE} pixels per side, got {self.image_size}.")
            if side < 1 or side % self.patch_pixels:
                raise ValueError(
                    f"`image_size` must be a multiple of {self.patch_pixels} pixels (a token's size), got "
                    f"{self.image_size}."
                )
            limit = self.layout.max_grid
            if limit is not None and side > limit * self.patch_pixels:
                raise ValueError(
                    f"`image_size` must be at most {limit * self.patch_pixels} pixels per side, the size of this "
                    f"transformer's position table, got {self.image_size}."
                )
        height, width = self.image_height_width
        if height * width > _MAX_TOKENS * self.patch_pixels**2:
            raise ValueError(
                f"`image_size` must give at most {_MAX_TOKENS} tokens of {self.patch_pixels}×{self.patch_pixels} "
                f"pixels, got {self.image_size}."
            )


_HOW_TO_RESOLVE = (
    "pass `calibration_images=` to `from_pretrained`, call `model.apply_selection(select_timestep(model, images))`, "
    "or set `model.config.timestep` to an integer in [0, 1000)"
)

# The fields that users may set, including the two that transformers stores under other names.
OWN_FIELDS = {name for name in ASelectConfig.__annotations__ if not name.startswith("_")} | {
    "out_features",
    "out_indices",
}


# All accepted keywords, including those of transformers and its scripts.
_DTYPES = {"dtype", "torch_dtype"}
TAKEN = OWN_FIELDS | PreTrainedConfig.__dataclass_fields__.keys() | _OF_TRANSFORMERS | _OF_SCRIPTS | _OF_VIT | _DTYPES


# Keywords of other libraries that resemble no field, or a field with another meaning.
_ELSEWHERE = {
    "add_pooling_layer": "it is for a `DiTModel`, and adds nothing there",
    "use_mask_token": "no token is masked",
    "pooler_act": "the pooled output is the mean of the tokens",
    "pooler_output_size": "the pooled output is the mean of the tokens",
    "use_auth_token": "did you mean `token`?",
}
# Keywords of `from_pretrained`, which users may misspell.
_OF_LOADING = {"attn_implementation", "cache_dir", "calibration_images", "device_map", "ignore_mismatched_sizes"}
_OF_LOADING |= {"local_files_only", "revision", "subfolder", "token", "trust_remote_code", "variant"}


def _nearest(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return the closest known name of each name that has one."""
    near = {name: difflib.get_close_matches(name, sorted(known), n=1) for name in names}
    return {name: found[0] for name, found in near.items() if found}


def _warn_of_unknown(names: Iterable[str]) -> None:
    """Warn about keys of a file that may be misspelt fields."""
    for name, field in sorted(_nearest(names, OWN_FIELDS | {"num_labels"}).items()):
        logger.warning_once(f"The configuration has an unknown key `{name}`. Did you mean `{field}`?")


def refuse_unknown_keywords(names: Iterable[str]) -> None:
    """Reject keywords that are not fields of the configuration, naming the nearest field.

    Raises:
        ValueError: If there are `names`.
    """
    known = OWN_FIELDS | PreTrainedConfig.__dataclass_fields__.keys() | _OF_LOADING | {"num_labels"}
    hints = {name: f"did you mean `{near}`?" for name, near in _nearest(names, known).items()} | _ELSEWHERE
    if said := [f"`{name}`" + f" ({hints.get(name)})" * (name in hints) for name in sorted(names)]:
        raise ValueError(f"ASelectConfig has no field {', '.join(said)}.")


def is_code_saved(saved: Any, folder: str | os.PathLike[str], is_pushed: bool, asked: bool | None) -> bool:
    """Return whether the code of a configuration, model or image processor is saved beside it.

    Args:
        saved: The object to save.
        folder: Folder to save it in.
        is_pushed: Whether the folder is pushed to the Hub.
        asked: The user's setting. By default, code is saved on a push, if the folder already contains it, or if the
            object was itself loaded from such code, because it could not be loaded again without it.
    """
    if asked is not None:
        return asked
    is_copy = any(kind.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME) for kind in type(saved).__mro__)
    return is_pushed or is_copy or Path(folder, CODE).is_file()


def write_code(source: Path, folder: str | os.PathLike[str]) -> dict[str, str]:
    """Copy all modules of a folder into another, and return the `auto_map` of the copied classes.

    Args:
        source: Folder of the modules: this one, or, for code that was loaded from a checkpoint, that of the class.
        folder: Target folder, created if missing.
    """
    os.makedirs(folder, exist_ok=True)
    modules = [path for path in source.glob("*.py") if path.name != "__init__.py"]
    for path in modules:
        shutil.copyfile(path, Path(folder, path.name))
    here = {path.stem for path in modules}
    return {auto: where for auto, where in AUTO_MAP.items() if where.partition(".")[0] in here}


@contextmanager
def without_code(*saved: Any) -> Iterator[None]:
    """Keep transformers from copying the code of objects that it saves. It reads this from their attributes."""
    for each in saved:
        vars(each).pop("auto_map", None)
        vars(each).update({"is_remote_code": bool} if hasattr(each, "forward") else {"_auto_class": None})
    try:
        yield
    finally:
        for each in saved:
            vars(each).pop("is_remote_code" if hasattr(each, "forward") else "_auto_class")
