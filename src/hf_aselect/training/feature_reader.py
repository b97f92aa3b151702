"""What a cache holds of each image: its tokens, what a linear head pools of them, or its latents, read by a model."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..images.rows import stacked
from ..model.checks import POOLED_UNSTANDARDIZED
from ..model.heads import pooled_tokens
from ..model.image_processing_aselect import ASelectImageProcessor
from ..model.modeling_aselect import ASelectPreTrainedModel
from ..selection.images import check_pixel_values
from .views import Views

WHAT = ("tokens", "pooled", "latents")
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class FeatureReader:
    """Reads the features of views.

    Args:
        model: The model, with a selected timestep (unless for "latents").
        views: The images.
        what: One of `WHAT`.
        dtype: One of `DTYPES`, of what comes back.

    Raises:
        ValueError: If tokens are to be pooled to deviations, and the model standardizes them first.
    """

    def __init__(self, model: ASelectPreTrainedModel, views: Views, what: str, dtype: str) -> None:
        config = model.config
        if what == "pooled" and not config.is_pooling_of_raw_tokens:
            raise ValueError(f"what='pooled' with pooling={config.pooling!r} is not possible: {POOLED_UNSTANDARDIZED}")
        self.model = model
        self.views = views
        self.what = what
        self.dtype = dtype
        self.processor = ASelectImageProcessor.from_model_config(config)
        height, width = config.image_height_width
        num_tokens = (height // config.patch_pixels) * (width // config.patch_pixels)
        scale = config.vae_scale_factor
        # Of one row.
        self.shape: tuple[int, ...] = {
            "tokens": (num_tokens, config.feature_size),
            "pooled": (config.pooled_size,),
            "latents": (config.layout.num_channels, height // scale, width // scale),
        }[what]

    @property
    def name(self) -> str:
        """Column of the values."""
        return "latents" if self.what == "latents" else "features"

    @property
    def kind(self) -> datasets.features.features.FeatureType:
        """What `datasets` calls such a column."""
        if len(self.shape) == 1:
            return datasets.Sequence(datasets.Value(self.dtype), length=self.shape[0])
        kind = {2: datasets.Array2D, 3: datasets.Array3D}[len(self.shape)]
        return kind(self.shape, self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of the values of one row."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def read(self, rows: Sequence[int]) -> NDArray[np.floating]:
        """Return the values of some rows, (B, *shape).

        Raises:
            ValueError: If an image cannot be read, or a value is not finite, or beyond the dtype.
        """
        pixel_values = self._pixel_values(rows)
        # A caller's autocast would be in no fingerprint.
        with torch.autocast(self.model.device.type, enabled=False):
            is_latent = self.what == "latents"
            values = self.model.encode(pixel_values) if is_latent else self.model.extract_features(pixel_values)
        if self.what == "pooled":
            config = self.model.config
            values = pooled_tokens(values, config.pooling, config.token_grid).flatten(1)
        if tuple(values.shape[1:]) != self.shape:
            raise ValueError(f"The model returns values of shape {tuple(values.shape[1:])}, expected {self.shape}.")
        found: NDArray[np.floating] = self._rounded(values, rows).cpu().numpy()
        return found

    def _rounded(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Return values in the cache's dtype.

        Raises:
            ValueError: If one is not finite, there or before.
        """
        rounded = values.to(DTYPES[self.dtype])
        finite = rounded.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            index, _ = self.views.index_and_view(rows[int((~finite).nonzero()[0, 0])])
            worst = float(values.abs().max())
            raise ValueError(
                f"The {self.what} of image {index} overflow {self.dtype} (up to {worst:g}). Pass dtype='float32', or "
                "zero massive channels (`config.zeroed_channels`)."
            )
        return rounded

    def _pixel_values(self, rows: Sequence[int]) -> Tensor:
        """Return the pixel values of some rows, (B, C, H, W)."""
        images = self.views.read(rows)
        if self.views.images.is_ready:
            given = stacked("pixel_values", list(rows), images)
            check_pixel_values(given)
            return given
        try:
            values: Tensor = self.processor(images, return_tensors="pt").pixel_values
        except ValueError:
            # Else it is the model that takes no images.
            for row, image in zip(rows, images, strict=True) if self.processor.num_channels in (1, 3) else ():
                self._check_image(row, image)
            raise
        return values

    def _check_image(self, row: int, image: Any) -> None:
        """Raise what is wrong with the image of a row, by its name.

        Raises:
            ValueError: If the processor cannot read it.
        """
        try:
            self.processor([image], return_tensors="pt")
        except ValueError as error:
            index, view = self.views.index_and_view(row)
            made = f", as `augment` returned it (view {view})," if view else ""
            raise ValueError(f"Image {index} of the dataset{made} cannot be read: {error}") from error
