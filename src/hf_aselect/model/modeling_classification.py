"""A diffusion transformer under a classification head."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .checks import check_floats
from .configuration_aselect import ASelectConfig
from .heads import AttentionHead, LinearHead
from .modeling_aselect import ASelectPreTrainedModel, DiTModel, refuse_tap_keywords


class DiTForImageClassification(ASelectPreTrainedModel):
    """A diffusion transformer with a classification head on its tokens.

    Args:
        config: The configuration; `head` and its sizes say which head.
    """

    task: ClassVar[str] = "image-classification"

    def __init__(self, config: ASelectConfig) -> None:
        super().__init__(config)
        # The host goes by the name of the class, which a subclass may change.
        self.loss_type = "ForImageClassification"
        self.backbone = DiTModel(config)
        num_labels = int(config.num_labels or 0)
        self.head: LinearHead | AttentionHead
        if config.head == "linear":
            self.head = LinearHead(config.feature_size, num_labels)
        else:
            self.head = AttentionHead(
                config.feature_size,
                num_labels,
                config.head_hidden_size,
                config.head_num_layers,
                config.head_num_attention_heads,
                config.head_mlp_ratio,
            )
        self.post_init()

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
            pixel_values: Pictures in [-1, 1], (B, C, H, W).
            labels: Class indices in [0, K), (B,); -100 is left out of the loss. Or, as `config.problem_type` says,
                regression targets or multi-label rows, (B, K).
            features: Tokens, (B, N, D), in place of `pixel_values`, as from `cache_features`; a linear head takes
                their means, (B, D), too.
            latents: Clean latents, (B, C, h, w), in place of `pixel_values`, as from `encode`.
            output_hidden_states: Whether to return what the first block reads and each block's output in
                `hidden_states`, too, (B, N, D) each; runs all blocks, and needs pictures or latents.
            kwargs: Passed on to the loss. `return_dict=False` gives a tuple.

        Raises:
            ValueError: If not exactly one of `pixel_values`, `features` and `latents` is given, it does not fit the
                model, a label is outside the classes, the timestep is not chosen yet, or a timestep or tap is named
                here.
        """
        refuse_tap_keywords(kwargs)
        if sum(given is not None for given in (pixel_values, features, latents)) != 1:
            raise ValueError("Give exactly one of `pixel_values`, `features` and `latents`.")
        hidden_states = None
        if features is not None:
            tokens = self._checked_features(features)
        else:
            tap, every = self.backbone.taps()[0], self.config.hidden_taps(output_hidden_states)
            read, _ = self._read([tap, *every], pixel_values, latents)
            tokens, hidden_states = read[tap], tuple(read[each] for each in every) or None
        logits = self.head(tokens)
        loss = None
        if labels is not None:
            labels = self._checked_labels(labels, len(tokens))
            is_class = not labels.is_floating_point()
            if is_class and not torch.compiler.is_compiling() and bool((labels == -100).all()):
                # A small batch of what is left out, as accumulated gradients may have one: the mean of none is NaN.
                loss = logits.sum() * 0
            else:
                loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)

    def _checked_features(self, features: Tensor) -> Tensor:
        check_floats("features", features)
        if features.ndim == 2 and self.config.head == "linear":
            features = features[:, None]  # the head takes the mean, which this is
        if features.ndim == 2:
            raise ValueError(
                f"An attention head reads tokens, (B, N, {self.config.feature_size}), got their means, "
                f"{tuple(features.shape)}. Cache them with what='tokens', or train a head='linear'."
            )
        if features.ndim != 3 or features.shape[-1] != self.config.feature_size:
            raise ValueError(
                f"`features` must be tokens of shape (B, N, {self.config.feature_size}), got {tuple(features.shape)}."
            )
        if not torch.compiler.is_compiling() and not (features.numel() and bool(features.isfinite().all())):
            what = "hold NaN or infinite values" if features.numel() else f"are empty, {tuple(features.shape)}"
            raise ValueError(f"`features` {what}. Cache them again.")
        return features.to(self.device, self.dtype)

    def _checked_labels(self, labels: Tensor, count: int) -> Tensor:
        """Return labels as the loss takes them."""
        if not isinstance(labels, Tensor):
            raise ValueError(f"`labels` must be a tensor, got {type(labels).__name__}.")
        if torch.compiler.is_compiling():
            return labels
        num_labels = int(self.config.num_labels or 0)
        if labels.is_meta or labels.layout != torch.strided or labels.is_complex():
            raise ValueError(f"`labels` must be a dense tensor of numbers, got {labels.layout}, {labels.dtype}.")
        if labels.is_floating_point() and not bool(labels.isfinite().all()):
            raise ValueError("`labels` hold NaN or infinite values.")
        problem = self.config.problem_type or ("regression" if num_labels == 1 else None)
        is_table = problem is None and labels.numel() != count and labels.shape == (count, num_labels)
        if problem == "multi_label_classification" or (is_table and labels.is_floating_point()):
            if labels.shape != (count, num_labels) or not bool(((labels >= 0) & (labels <= 1)).all()):
                raise ValueError(
                    f"`labels` of several classes a picture must be of 0 and 1, ({count}, {num_labels}), got "
                    f"{tuple(labels.shape)} of values up to {float(labels.abs().max()) if labels.numel() else 0:g}."
                )
            return labels.to(self.dtype)
        if problem == "regression":
            shapes = ((count,), (count, 1)) if num_labels == 1 else ((count, num_labels),)
            if tuple(labels.shape) not in shapes:
                raise ValueError(
                    f"`labels` of a regression must have shape {' or '.join(map(str, shapes))}, got "
                    f"{tuple(labels.shape)}."
                )
            return labels.to(self.dtype)
        if labels.ndim == 0 or labels.numel() != count:
            raise ValueError(
                f"`labels` must be one for each of {count} pictures, got shape {tuple(labels.shape)}. Of several "
                "classes a picture, load the model with `problem_type='multi_label_classification'`."
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            # The host would take them for another kind of problem, from then on.
            raise ValueError(f"`labels` must be class indices, integers in [0, {num_labels}), got {labels.dtype}.")
        labels = labels.long()
        outside = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
        if len(outside):
            raise ValueError(
                f"Labels must be class indices in [0, {num_labels}), got {sorted(set(outside.tolist()))[:5]}. "
                f"Load the model with `num_labels=` the number of classes of the dataset."
            )
        return labels
