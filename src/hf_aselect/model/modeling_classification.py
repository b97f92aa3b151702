"""A diffusion transformer under a classification head."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .checks import IGNORED_LABEL, checked_features, checked_labels
from .configuration_aselect import ASelectConfig
from .heads import AttentionHead, FeatureStandardization, LinearHead, concatenated, pooled_tokens
from .modeling_aselect import ASelectPreTrainedModel, DiTModel, refuse_tap_keywords


class DiTForImageClassification(ASelectPreTrainedModel):
    """A diffusion transformer with a classification head on its tokens.

    Args:
        config: The configuration; `head` and its sizes say which head.

    Example:
        >>> from datasets import load_dataset
        >>> from hf_aselect import DiTForImageClassification
        >>> folder = "src/hf_aselect/assets/fashion_mnist"
        >>> images = load_dataset("parquet", data_files=f"{folder}/train.parquet", split="train[:64]")
        >>> model = DiTForImageClassification.from_pretrained(folder, timestep=19, head="linear", num_labels=10)
        >>> fit = model.fit_head(images)
        >>> 0 <= fit.accuracy <= 1
        True
    """

    task: ClassVar[str] = "image-classification"

    def __init__(self, config: ASelectConfig) -> None:
        super().__init__(config)
        # Transformers goes by the name of the class, which a subclass may change.
        self.loss_type = "ForImageClassification"
        self.backbone = DiTModel(config)
        self.classifier = self._new_head()
        self.post_init()

    def _new_head(self) -> LinearHead | AttentionHead:
        """Return a head of the kind and sizes that the configuration names, not initialized."""
        config, num_labels = self.config, int(self.config.num_labels or 0)
        if config.head == "linear":
            sizes = config.feature_size, num_labels, config.standardized_grid
            return LinearHead(*sizes, config.head_norm, config.pooling)
        return AttentionHead(
            config.feature_size,
            num_labels,
            config.head_hidden_size,
            config.head_num_layers,
            config.head_num_attention_heads,
            config.head_mlp_ratio,
            config.standardized_grid,
        )

    def _standardizations(self) -> list[FeatureStandardization]:
        """Return what standardizes the tokens that the head reads; nothing of a head of the user's own."""
        standardization = getattr(self.classifier, "standardization", None)
        return [] if standardization is None else [standardization]

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss takes the number of all rows of a step from Trainer; that of other problems is a mean."""
        one_class = self.config.problem_type in (None, "single_label_classification")
        return one_class and self.config.num_labels != 1

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        latents: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Return logits, (B, K), and the loss where labels are given.

        Args:
            pixel_values: Images in [-1, 1], (B, C, H, W).
            labels: Class indices in [0, K), (B,); -100 is left out of the loss. Or, as `config.problem_type` says,
                regression targets or multi-label rows, (B, K).
            features: Tokens, (B, N, D), in place of `pixel_values`, as from `cache_features`; a linear head takes
                pooled ones, (B, S · D), too. Those of several taps and timesteps lie side by side along the channels.
            latents: Clean latents, (B, C, h, w), in place of `pixel_values`, as from `encode`.
            output_hidden_states: Whether to return what the first block reads and each block's output in
                `hidden_states`, too, (B, N, D) each, at the first timestep; runs all blocks, and needs images or
                latents.
            kwargs: Passed on to the loss. `return_dict=False` gives a tuple.

        Raises:
            ValueError: If not exactly one of `pixel_values`, `features` and `latents` is given, it does not fit the
                model, a label is outside the classes, the timestep is not selected yet, or a timestep or tap is named
                here.
        """
        refuse_tap_keywords(kwargs)
        inputs = {"pixel_values": pixel_values, "features": features, "latents": latents}
        names = [name for name, given in inputs.items() if given is not None]
        if len(names) != 1:
            raise ValueError("Pass exactly one of `pixel_values`, `features` and `latents`.")
        if names[0] != self.main_input_name and not torch.compiler.is_compiling():
            # By this name Trainer hands inputs to metrics (`include_for_metrics`).
            self.main_input_name = names[0]
        hidden_states, grid = None, self.config.token_grid
        if features is not None:
            tokens = checked_features(features, self.config).to(self.device, self.dtype)
        else:
            own, every = self.backbone.read_outs(), self.config.hidden_read_outs(output_hidden_states)
            read, grid = self._read([*own, *every], pixel_values, latents)
            tokens = concatenated([read[each] for each in own])
            hidden_states = tuple(read[each] for each in every) or None
        logits = self._logits(tokens, grid)
        loss = None
        if labels is not None:
            labels = checked_labels(labels, len(tokens), self.config)
            loss = self._loss(labels.to(self.dtype) if labels.is_floating_point() else labels, logits, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)

    def _logits(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return logits, (B, K), of tokens, (B, N, D), or pooled ones, of a model that reads `grid`."""
        if not self._standardizations():
            # `model.classifier = nn.Linear(model.classifier.in_features, K)`, as of the models of transformers.
            mean = tokens if tokens.ndim == 2 else pooled_tokens(tokens, "mean")[:, 0].to(tokens.dtype)
            own: Tensor = self.classifier(mean)
            return own
        # Cached tokens are of images of the configuration's size, or else of those that the head knows.
        logits: Tensor = self.classifier(tokens, grid if tokens.shape[1] == grid[0] * grid[1] else None)
        return logits

    def _save(self, *args: Any, **kwargs: Any) -> list[str]:
        """Save as any model; a linear layer that took the head's place is a linear head without a norm."""
        layer: nn.Module = self.classifier
        if isinstance(layer, nn.Linear):
            config = self.config
            config.head, config.head_norm, config.pooling, config.standardized_grid = "linear", False, "mean", None
            if layer.bias is None:  # a linear head has one
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
            if config.num_labels != layer.out_features:
                config.num_labels = layer.out_features
        return super()._save(*args, **kwargs)

    def _loss(self, labels: Tensor, logits: Tensor, **kwargs: Any) -> Tensor:
        """Return the loss; 0 of a batch that is left out whole, as accumulated gradients may have one."""
        if labels.is_floating_point():
            loss: Tensor = self.loss_function(labels, logits, self.config, **kwargs)
            return loss
        # The mean of no rows is NaN. Any class does for them, as they do not count; the device is not waited for.
        is_left_out = (labels == IGNORED_LABEL).all()
        loss = self.loss_function(labels.masked_fill(is_left_out, 0), logits, self.config, **kwargs)
        return loss * ~is_left_out
