"""Dense models: a diffusion transformer as a backbone of transformers' heads, and under a segmentation decoder."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, interpolate
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .checks import check_floats, check_masks
from .configuration_aselect import ASelectConfig
from .heads import FeatureStandardization, concatenated, token_map
from .layouts import ReadOut
from .modeling_aselect import ASelectPreTrainedModel, DiTModel, refuse_tap_keywords
from .modeling_classification import DiTForImageClassification

# All models, as `configuration_aselect.AUTO_MAP` has it.
__all__ = ["DiTBackbone", "DiTForImageClassification", "DiTForSemanticSegmentation", "DiTModel"]

logger = logging.get_logger(__name__)
POOL_SCALES = (1, 2, 3, 6)


class DiTBackbone(BackboneMixin, DiTModel):
    """A diffusion transformer as a backbone: one map a stage, all from one pass, at the configuration's timestep.

    Several timesteps are one pass each. Maps of several timesteps and features lie side by side along the channels,
    timesteps outermost. A `read_out` is asked for its timesteps and features alone: the stages name the blocks.

    Stages are named as transformers': `stem` is what the first block reads, `stage1` the first block, and so on.
    `config.out_features` or `config.out_indices` say which are returned, by default the last block; the block that a
    timestep was selected for is `out_indices=[config.block_index() + 1]`. Massive channels are found at that block
    alone; `config.zeroed_channels` takes those of the others by tap. Each map is `config.feature` of its block, the
    stem's its tokens. UperNet, Mask2Former, DPT and the like stand on it, by `backbone_config=`.

    Args:
        config: The configuration.

    Example:
        >>> import torch
        >>> from hf_aselect import DiTBackbone
        >>> folder = "src/hf_aselect/assets/fashion_mnist"
        >>> backbone = DiTBackbone.from_pretrained(folder, timestep=19, out_indices=[4, 8])
        >>> [tuple(each.shape) for each in backbone(torch.zeros(1, 1, 28, 28)).feature_maps]
        [(1, 128, 7, 7), (1, 128, 7, 7)]
    """

    has_attentions = False

    def __init__(self, config: ASelectConfig) -> None:
        config.check_stages()
        super().__init__(config)
        stages = config.stage_read_outs(range(len(config.stage_names)))
        self.num_features = [sum(config.widths_of(stage)) for stage in stages]

    def stages(self, config: ASelectConfig | None = None) -> list[list[ReadOut]]:
        """Return what is concatenated to the map of each stage; as another `config` has it."""
        return (config or self.config).stage_read_outs()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Return one map, (B, D, rows, columns), of each stage asked for; see `config.reshape_hidden_states`.

        Args:
            pixel_values: Images in [-1, 1], (B, C, H, W).
            output_hidden_states: Whether to return the map of every stage in `hidden_states`, too, `hidden` at the
                first timestep; runs all blocks.
            kwargs: `return_dict=False` gives a tuple; others are ignored, as transformers passes keywords that only
                some models know.

        Raises:
            ValueError: If the timestep is not selected yet, the images do not fit, or a timestep or tap is named here.
        """
        refuse_tap_keywords(kwargs)
        every = [[each] for each in self.config.hidden_read_outs(output_hidden_states)]
        stages = [*self.stages(), *every]
        read, grid = self._read([each for stage in stages for each in stage], pixel_values)
        maps = [token_map(concatenated([read[each] for each in stage]), *grid) for stage in stages]
        if not self.config.reshape_hidden_states:
            maps = [_sequence(each) for each in maps]
        count = len(maps) - len(every)
        return BackboneOutput(
            feature_maps=tuple(maps[:count]),  # type: ignore[arg-type]
            hidden_states=tuple(maps[count:]) or None,
        )


def _sequence(each: Tensor) -> Tensor:
    """Return a map, (B, D, rows, columns), as tokens behind their mean, (B, 1 + N, D)."""
    tokens = each.flatten(2).transpose(1, 2)
    return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


class TokenNorm(nn.BatchNorm2d):
    """Batch norm that takes a single value a channel in training, too: by the statistics that it has.

    The mean of such a batch is the value, which would leave nothing of it, and torch rejects it. Sizes and names are
    those of `nn.BatchNorm2d`.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Return normed maps, (B, D, rows, columns)."""
        if not self.training or maps.numel() > maps.shape[1]:
            return super().forward(maps)
        normed: Tensor = batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return normed


def _take_single_values(module: nn.Module) -> None:
    """Let the batch norms inside of a module take a single value a channel."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(part, name, TokenNorm(child.num_features, child.eps, child.momentum))


class LinearDecoder(nn.Module):
    """Batch norm and a linear classifier of each token; logits are enlarged to pixels.

    Args:
        width: Channels of the token map.
        num_labels: Classes.
        grid: Of `FeatureStandardization`.

    Source: the linear segmentation head of DINOv2, arXiv 2304.07193.
    """

    def __init__(self, width: int, num_labels: int, grid: Sequence[int] | None = None) -> None:
        super().__init__()
        self.standardization = nn.ModuleList([FeatureStandardization(width, grid)])
        self.norm = TokenNorm(width)
        self.classifier = nn.Conv2d(width, num_labels, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, None]:
        """Return logits of the token grid, (B, K, rows, columns), of the last map, (B, D, rows, columns)."""
        return self.classifier(self.norm(maps[-1])), None


class FeaturePyramid(nn.Module):
    """Four maps of one resolution to four resolutions: 4, 2, 1 and 1/2 times that of the token grid.

    Args:
        widths: Channels of each map.

    Source: BEiT, arXiv 2106.08254, appendix; transformers' `BeitForSemanticSegmentation`.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, _, _ = widths
        # As in transformers' BEiT; checkpoints hold its names. trf-ignore: TRF036
        self.enlarge_4 = nn.Sequential(
            nn.ConvTranspose2d(first, first, kernel_size=2, stride=2),
            nn.BatchNorm2d(first),
            nn.GELU(),
            nn.ConvTranspose2d(first, first, kernel_size=2, stride=2),
        )
        self.enlarge_2 = nn.ConvTranspose2d(second, second, kernel_size=2, stride=2)
        # A grid of one row or column stays as it is.
        self.halve = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid of four maps, (B, D, rows, columns) each, finest first."""
        first, second, third, fourth = maps
        return [self.enlarge_4(first), self.enlarge_2(second), third, self.halve(fourth)]


class UperNetDecoder(nn.Module):
    """transformers' own UperNet head on a feature pyramid, with its auxiliary head.

    Args:
        widths: Channels of each of the four maps.
        num_labels: Classes.
        hidden_size: Channels of the head.
        auxiliary_hidden_size: Channels of the auxiliary head; 0 for none.
        grid: Of `FeatureStandardization`.

    Source: UperNet, arXiv 1807.10221; transformers, `models/upernet/modeling_upernet.py`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_labels: int,
        hidden_size: int,
        auxiliary_hidden_size: int,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.standardization = nn.ModuleList(FeatureStandardization(width, grid) for width in widths)
        config = SimpleNamespace(
            pool_scales=POOL_SCALES,
            hidden_size=hidden_size,
            num_labels=num_labels,
            auxiliary_in_channels=None,
            auxiliary_channels=auxiliary_hidden_size,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.pyramid = FeaturePyramid(widths)
        self.head = UperNetHead(config, in_channels=list(widths))
        self.auxiliary_head = UperNetFCNHead(config, in_channels=list(widths)) if auxiliary_hidden_size else None
        _take_single_values(self)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return logits, (B, K, 4 · rows, 4 · columns), and the auxiliary head's, (B, K, rows, columns), in training.

        Args:
            maps: Four maps, (B, D, rows, columns), shallow to deep.
        """
        pyramid = self.pyramid(maps)
        auxiliary = self.auxiliary_head(pyramid) if self.auxiliary_head is not None and self.training else None
        return self.head(pyramid), auxiliary


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return logits, (B, K, h, w), interpolated to (B, K, height, width)."""
    enlarged: Tensor = interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    return enlarged


class DiTForSemanticSegmentation(ASelectPreTrainedModel):
    """A diffusion transformer with a decoder that tells the class of every pixel.

    Args:
        config: The configuration; `decoder` says which: "linear" reads what the configuration names, side by side,
            "upernet" the timesteps and features that it names at the four blocks of `config.out_indices`.

    Example:
        >>> import torch
        >>> from hf_aselect import DiTForSemanticSegmentation
        >>> folder = "src/hf_aselect/assets/fashion_mnist"
        >>> model = DiTForSemanticSegmentation.from_pretrained(folder, timestep=19, num_labels=3, decoder="linear")
        >>> model(torch.zeros(2, 1, 28, 28)).logits.shape
        torch.Size([2, 3, 28, 28])
    """

    task: ClassVar[str] = "image-segmentation"
    # The loss is a mean over its batch: Trainer is to divide it where gradients are accumulated.
    accepts_loss_kwargs = False

    def __init__(self, config: ASelectConfig) -> None:
        super().__init__(config)
        self.backbone = DiTBackbone(config) if config.decoder == "upernet" else DiTModel(config)
        widths = [sum(config.widths_of(stage)) for stage in self.backbone.stages()]
        num_labels, ignored = int(config.num_labels or 0), config.semantic_loss_ignore_index
        if 0 <= ignored < num_labels:
            logger.warning_once(
                f"Class {ignored} of {num_labels} is never learned, because it is `semantic_loss_ignore_index` (255 "
                "by default). Set that to a value that no class has, such as 65535."
            )
        self.decode_head: LinearDecoder | UperNetDecoder
        if config.decoder == "linear":
            self.decode_head = LinearDecoder(widths[0], num_labels, config.standardized_grid)
        else:
            self.decode_head = UperNetDecoder(
                widths,
                num_labels,
                config.decoder_hidden_size,
                config.auxiliary_hidden_size,
                config.standardized_grid,
            )
        self.post_init()

    def _standardizations(self) -> list[FeatureStandardization]:
        """Return what standardizes the tokens of each map that the decoder reads; nothing of one of the user's own."""
        return list(getattr(self.decode_head, "standardization", ()))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        """Return logits of every pixel, (B, K, H, W), and the loss where labels are given.

        Args:
            pixel_values: Images in [-1, 1], (B, C, H, W).
            labels: Class of each pixel in [0, K), (B, H, W), of any integer dtype;
                `config.semantic_loss_ignore_index` is left out of the loss.
            output_hidden_states: Whether to return what the first block reads and each block's output in
                `hidden_states`, too, (B, N, D) each, at the first timestep; runs all blocks.
            kwargs: Ignored, as transformers passes keywords of other models. `return_dict=False` gives a tuple.

        Raises:
            ValueError: If images or labels do not fit the model or each other, a label is outside the classes, the
                timestep is not selected yet, or a timestep or tap is named here.
        """
        refuse_tap_keywords(kwargs)
        if labels is not None:
            check_floats("pixel_values", pixel_values)
            check_masks(labels, pixel_values, self.config)
        stages, every = self.backbone.stages(), self.config.hidden_read_outs(output_hidden_states)
        read, grid = self._read([*self.backbone.read_outs(), *every], pixel_values)
        tokens = [concatenated([read[each] for each in stage]) for stage in stages]
        if standardizations := self._standardizations():
            tokens = [each(own, grid) for each, own in zip(standardizations, tokens, strict=True)]
            logits, auxiliary = self.decode_head([token_map(each, *grid) for each in tokens])
        else:
            # `model.decode_head = nn.Conv2d(...)`, which reads the last map.
            logits, auxiliary = self.decode_head(token_map(tokens[-1], *grid)), None
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        logits = enlarge(logits, size)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device).long()
            loss = self._loss(logits, labels)
            if auxiliary is not None:
                loss = loss + self.config.auxiliary_loss_weight * self._loss(enlarge(auxiliary, size), labels)
        return SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(read[each] for each in every) or None,
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the pixels that have a class; 0 where none has, as a crop may have none."""
        ignored = self.config.semantic_loss_ignore_index
        total = cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
        mean: Tensor = total / (labels != ignored).sum().clamp_min(1)
        return mean
