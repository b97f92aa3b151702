"""Images of any kind to `pixel_values` in [-1, 1], masks to `labels`, and logits back to masks."""

import difflib
import os
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from io import BytesIO
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging
from transformers.utils.import_utils import is_torchvision_available

from .checks import NO_VAE, is_finite_number, warn_of_foreground
from .configuration_aselect import TAKEN, ASelectConfig, is_code_saved, without_code
from .layouts import plain

logger = logging.get_logger(__name__)
# Rec. 601, the weights of PIL's conversion to grey.
LUMINANCE = (0.299, 0.587, 0.114)
# Of `size`: with more, an image would take the machine's memory.
_MAX_PIXELS = 2**28
# What PIL raises for broken files.
UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)
ADDRESS = re.compile(r"\b(?:https?|ftp|sftp|s3|gs|gcs|abfs|az)://", re.IGNORECASE)
# What transformers writes into a processor's file.
_OF_FILE = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class", "backend"}
# By backend, as transformers names them.
_CLASSES = {"torchvision": "ASelectImageProcessor", "pil": "ASelectImageProcessorPil"}
NO_CLASS = 255  # in a mask, as transformers' processors write it
# How an image is turned upright, by its EXIF entry "orientation".
_ORIENTATION = 0x0112
_TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270"), start=2))
_TURNS |= {7: "TRANSVERSE", 8: "ROTATE_90"}


class ASelectImageProcessorKwargs(ImagesKwargs, total=False):
    """Keyword arguments of the image processor beyond transformers'.

    Args:
        num_channels: 3 for RGB, 1 for grey.
        do_reduce_labels: Whether 0 in a mask means no class, and class k is written as k + 1.
        do_exif_transpose: Whether images are turned upright, and their masks along with them.
    """

    num_channels: int | None
    do_reduce_labels: bool | None
    do_exif_transpose: bool | None


class _ASelectImageProcessing(BaseImageProcessor):
    """What both backends share: values are arrays of numpy in the one, and tensors of torch in the other."""

    valid_kwargs = ASelectImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = 0.5
    image_std = 0.5
    size = {"height": 256, "width": 256}  # noqa: RUF012 - transformers' way to give a default
    num_channels = 3
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_reduce_labels = False
    do_exif_transpose = True
    crop_size: Any = None

    def __init__(self, **kwargs: Any) -> None:
        _refuse_unknown(kwargs)
        super().__init__(**self._taken(kwargs))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor from the fields of a file; unknown fields are kept.

        Raises:
            ValueError: As the constructor, and if a field of the file is a method.
        """
        others = {name: value for name, value in image_processor_dict.items() if not _is_field(name)}
        fields = {name: value for name, value in image_processor_dict.items() if name not in others}
        for name in others:
            if hasattr(cls, name):
                raise ValueError(f"ASelectImageProcessor has no field {name!r}.")
        # Loading takes many more, and pipelines hand over fields of the model.
        _refuse_unknown({name for name in kwargs if name not in TAKEN and _nearest(name)})
        made: Any = super().from_dict(fields, **kwargs)
        for name, value in others.items():
            setattr(made[0] if isinstance(made, tuple) else made, name, value)
        return made

    @classmethod
    def from_model_config(cls, config: ASelectConfig, **fields: Any) -> Self:
        """Return the processor that fits a model: its image size and number of channels.

        Args:
            config: The model's.
            fields: The processor's own fields, in place of its defaults; `do_center_crop=False` for a segmenter, which
                is to see the whole of each image.
        """
        height, width = config.image_height_width
        values: dict[str, Any] = {"size": {"height": height, "width": width}, "num_channels": config.num_channels}
        return cls(**{**values, **fields})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        include_code: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Save the processor; with its code where that is wanted, see the models' `save_pretrained`."""
        with_code = is_code_saved(self, save_directory, push_to_hub, include_code)
        with nullcontext() if with_code else without_code(self):
            saved: list[str] = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        return saved

    def to_dict(self) -> dict[str, Any]:
        """Return all values, under one name of the class for both backends: what one saves the other loads."""
        values: dict[str, Any] = super().to_dict()
        values.pop("_auto_class", None)  # of a save without code
        if type(self).__name__ in _CLASSES.values():
            values["image_processor_type"] = _CLASSES["torchvision"]
            if "auto_map" in values:
                module = __name__.rpartition(".")[2]
                classes = {backend: f"{module}.{name}" for backend, name in _CLASSES.items()}
                values["auto_map"] = {"AutoImageProcessor": classes}
        return values

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """Return `pixel_values`, and `labels` where masks are given.

        Args:
            images: An image or several, see the class.
            segmentation_maps: A mask for each image, of its size: PIL of mode L, P (its indices), 1 or I, a file, or
                integers, (H, W), with an axis of one channel or without; a negative value, as -100, stays as it is.
                It is turned, cropped and resized with its image, to the nearest value.
            kwargs: Settings of the processor for this call.

        Returns:
            `pixel_values`, (C, H, W) each, and `labels`, (H, W) each, int64.

        Raises:
            ValueError: If an image or mask is none, a mask is of another size than its image, has colours or is empty,
                or there are not as many masks as images.
        """
        _refuse_unknown(kwargs)
        features: BatchFeature = super().preprocess(images, segmentation_maps, **self._taken(kwargs))
        return features

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self, images: Any, segmentation_maps: Any = None, **kwargs: Any
    ) -> BatchFeature:
        images = self._prepare_images_structure(images)
        prepared = self._prepare_image_like_inputs(images, **kwargs)
        if segmentation_maps is None:
            return self._preprocess(prepared, **kwargs)
        masks = _as_list(segmentation_maps)
        if len(masks) != len(prepared):
            raise ValueError(f"Each image must have one mask, got {len(masks)} masks for {len(prepared)} images.")
        labels = []
        for mask, image, values in zip(masks, images, prepared, strict=True):
            array = _mask_array(mask, image, kwargs["do_exif_transpose"])
            device = kwargs.get("device") or getattr(mask, "device", None)
            labels.append(self._of_backend(self._label(array, values.shape[-2:], **kwargs), device))
        pixel_values = self._preprocess(prepared, **{**kwargs, "return_tensors": None})["pixel_values"]
        data = {"pixel_values": pixel_values, "labels": labels}
        return BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))

    def _label(
        self,
        mask: NDArray[np.int64],
        picture_size: tuple[int, int],
        *,
        do_resize: bool,
        do_center_crop: bool,
        size: SizeDict,
        crop_size: SizeDict | None = None,
        do_reduce_labels: bool = False,
        **_: Any,
    ) -> NDArray[np.int64]:
        """Return a mask as its image is cut and resized, (H, W)."""
        if mask.shape != tuple(picture_size):
            raise ValueError(
                f"A mask must have the size of its image, {picture_size[0]}×{picture_size[1]} pixels, got "
                f"{mask.shape[0]}×{mask.shape[1]}."
            )
        if do_reduce_labels and mask.max() > NO_CLASS:
            raise ValueError(
                f"`do_reduce_labels` uses {NO_CLASS} for pixels without a class, but a mask has the class "
                f"{mask.max()}. Reduce the masks yourself, and set `semantic_loss_ignore_index` to a value that is "
                "no class."
            )
        if do_reduce_labels and mask.min() < 0:
            raise ValueError(
                f"`do_reduce_labels` requires 0 for pixels without a class, but a mask has {mask.min()}. Set it to "
                "False, and set the model's `semantic_loss_ignore_index` to that value."
            )
        if do_reduce_labels:
            mask = np.where((mask == 0) | (mask == NO_CLASS), NO_CLASS, mask - 1)
        array = mask[None]
        if do_center_crop:
            array = (_crop_to_shape if do_resize else self.center_crop)(array, size)
        if do_resize:
            # As 32-bit integers, which PIL keeps whatever the number of classes.
            picture = Image.fromarray(array[0].astype(np.int32))
            sides = int(size.width), int(size.height)  # type: ignore[arg-type]
            array = np.asarray(picture.resize(sides, Image.Resampling.NEAREST))[None]
            if do_center_crop and crop_size is not None:
                array = self.center_crop(array, crop_size)
        label: NDArray[np.int64] = array[0].astype(np.int64)
        return label

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, return_segmentation_scores: bool = False
    ) -> list[Any]:
        """Turn logits of any head into masks, as transformers' processors do it, where the model saw the image.

        With `do_center_crop` it saw the middle of the image, in the shape of `size`. The mask lies there; the rest
        of the image gets what is at the crop's nearest edge, and a warning is logged.

        Args:
            outputs: With `logits`, (B, K, h, w).
            target_sizes: Height and width of each image. Default: the masks stay as large as the logits.
            return_segmentation_scores: Whether the probabilities, (K, height, width), are returned beside each mask.

        Returns:
            A mask of class indices, (height, width), of each image; or one of transformers' outputs with
            `segmentation` and `segmentation_scores`.

        Raises:
            ValueError: If there are not as many target sizes as images.
        """
        post_process = BeitImageProcessorPil.post_process_semantic_segmentation
        if target_sizes is None or not self.do_center_crop:
            found: list[Any] = post_process(self, outputs, target_sizes, return_segmentation_scores)
            return found
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        middles = [_middle_seen(self, height, width) for height, width in sizes]
        found = post_process(self, outputs, [middle[2:] for middle in middles], return_segmentation_scores)
        for index, (size, middle) in enumerate(zip(sizes, middles, strict=True)):
            if middle[2:] == size:
                continue
            logger.warning_once(
                "The model saw only the center of an image, and its mask is extended to the edges. Load the "
                "processor with `do_center_crop=False` to segment the whole image."
            )
            if return_segmentation_scores:
                for name in ("segmentation", "segmentation_scores"):
                    found[index][name] = _continued(found[index][name], size, middle)
            else:
                found[index] = _continued(found[index], size, middle)
        return found

    def process_image(self, image: Any, num_channels: int = 3, do_exif_transpose: bool = True, **kwargs: Any) -> Any:
        """Return an image as an array or tensor, (C, H, W), with the asked number of channels.

        Args:
            image: PIL image of any mode, or array or tensor, (H, W, C) or (C, H, W), in [0, 255] or [0, 1].
            num_channels: 3 for RGB, 1 for grey.
            do_exif_transpose: Whether a PIL image is turned upright.
            kwargs: Passed on to transformers.

        Returns:
            Bytes, or float32 where the values are floating-point numbers.

        Raises:
            ValueError: If `num_channels` is neither 1 nor 3, the image is empty, cannot be read, has another number
                of channels than 1, 3 or 4 (the fourth, transparency, is dropped), or holds what is not a number, NaN,
                infinite values, or values outside [0, 255] (of 16 bits [0, 65535]).
        """
        if num_channels not in (1, 3):
            raise ValueError(
                f"`num_channels` must be 1 (grey) or 3 (RGB), got {num_channels}. {NO_VAE.format(num_channels)}"
            )
        if isinstance(image, Image.Image):
            image = _pil_values(image, num_channels, do_exif_transpose)
            kwargs["input_data_format"] = "channels_first"
        image = _numbers(image)
        sides = (image.shape[0], image.shape[-1])
        if kwargs.get("input_data_format") is None and not set(sides) & {1, 3}:
            # Transformers would say only that it cannot tell which axis is which.
            if 4 not in sides:
                raise ValueError(
                    "An image must have 1, 3 or 4 channels, in its first or last dimension, got shape "
                    f"{tuple(image.shape)}."
                )
            kwargs["input_data_format"] = "channels_last" if image.shape[-1] == 4 else "channels_first"
        return _with_channels(super().process_image(self._of_backend(image), **kwargs), num_channels)

    def center_crop(self, image: Any, size: SizeDict, **_: Any) -> Any:  # type: ignore[override]
        """Return the middle of images, (..., H, W), in a size, with zeros around a smaller one.

        An odd rest is cut off below and filled up above; transformers' two backends differ in that.
        """
        rows, columns = int(size.height), int(size.width)  # type: ignore[arg-type]
        top, left = (image.shape[-2] - rows) // 2, (image.shape[-1] - columns) // 2
        inside = image[..., max(top, 0) : top + rows, max(left, 0) : left + columns]
        height, width = inside.shape[-2:]
        if (height, width) == (rows, columns):
            return inside
        shape = (*image.shape[:-2], rows, columns)
        filled = image.new_zeros(shape) if isinstance(image, Tensor) else np.zeros(shape, image.dtype)
        top, left = max(-top, 0), max(-left, 0)
        filled[..., top : top + height, left : left + width] = inside
        return filled

    def _of_backend(self, values: Any, device: Any = None) -> Any:
        """Return an array or tensor as the backend has it."""
        raise NotImplementedError

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        # Transformers takes no grey arrays without an axis of channels, and would fetch what an address names.
        images = _opened(images)
        several = list(images) if isinstance(images, list | tuple) else [images]
        # Transformers takes lists in the list, too.
        parts = [part for each in several for part in (each if isinstance(each, list | tuple) else [each])]
        for image in parts:
            if not isinstance(image, Image.Image | np.ndarray | Tensor):
                raise ValueError(
                    "An image must be a PIL image, a file, encoded bytes, an array or a tensor, got "
                    f"{type(image).__name__}."
                )
        if not parts or (getattr(images, "ndim", 0) == 4 and not len(images)):
            raise ValueError("`images` must have at least one image, got an empty list.")
        if getattr(images, "ndim", None) == 2:
            images = [images]
        if isinstance(images, list | tuple):
            images = [image[None] if getattr(image, "ndim", None) == 2 else image for image in images]
        return super()._prepare_images_structure(images, expected_ndims=expected_ndims)

    def _preprocess(
        self, images: list[Any], *, do_resize: bool, do_center_crop: bool, size: SizeDict, **kwargs: Any
    ) -> BatchFeature:
        _check_settings(size, do_resize or do_center_crop, kwargs)
        if kwargs["do_rescale"] and (scale := kwargs["rescale_factor"]):
            floats = [image for image in images if _is_float(image)]
            if max((float(image.max()) for image in floats), default=2) > 1:
                scale = 1
                warn_of_fractions(floats)
            images = [_as_bytes(image / scale) if _is_float(image) else image for image in images]
        if do_center_crop:
            crop = _crop_to_shape if do_resize else self.center_crop
            images = [crop(image, size) for image in images]
        kwargs["do_center_crop"] = do_center_crop and do_resize and kwargs["crop_size"] is not None
        features: BatchFeature = super()._preprocess(images, do_resize=do_resize, size=size, **kwargs)
        return features

    def _taken(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return fields, of the constructor or a call, as transformers has them: a size by its height and width."""
        taken = {name: plain(value) for name, value in fields.items()}
        for name in ("size", "crop_size"):
            value = plain(taken.get(name))
            if isinstance(value, int | list):
                value = [value, value] if isinstance(value, int) else value
                taken[name] = {"height": value[0], "width": value[1]} if len(value) == 2 else value
            elif isinstance(value, Mapping | SizeDict):
                sides = {side: plain(length) for side, length in dict(value).items() if length is not None}
                if sides.keys() == {"shortest_edge"} and taken.get("do_center_crop", self.do_center_crop):
                    sides = dict.fromkeys(("height", "width"), sides["shortest_edge"])
                taken[name] = sides
        _check_fields(taken)
        return taken

    def _validate_preprocess_kwargs(  # type: ignore[override]
        self, do_center_crop: bool | None = None, **kwargs: Any
    ) -> None:
        # Transformers asks for a `crop_size` of its own; ours is `size`.
        super()._validate_preprocess_kwargs(**kwargs)


class ASelectImageProcessorPil(_ASelectImageProcessing, PilBackend):  # type: ignore[misc]
    """The image processor by PIL and numpy: `ASelectImageProcessor` where torchvision is not installed.

    `AutoImageProcessor.from_pretrained(..., backend="pil")` loads it in any case.

    Example:
        >>> from hf_aselect import ASelectImageProcessorPil
        >>> from PIL import Image
        >>> ASelectImageProcessorPil(size=32)(Image.new("RGB", (64, 48)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 32, 32])
    """

    def resize(  # type: ignore[override]
        self, image: NDArray[Any], size: SizeDict, resample: Any = None, **kwargs: Any
    ) -> NDArray[Any]:
        """Return an image, (C, H, W), in another size.

        Floating-point values stay such; transformers makes bytes of them first, of whole numbers or [0, 1] alone.
        """
        if _is_float(image):
            return _resized(image, size, resample)
        resized: NDArray[Any] = super().resize(image, size, resample=resample, **kwargs)
        return resized

    def _of_backend(self, values: Any, device: Any = None) -> Any:
        return values.cpu().numpy() if isinstance(values, Tensor) else values


class ASelectImageProcessor(_ASelectImageProcessing, TorchvisionBackend):  # type: ignore[misc]
    """Turn images into `pixel_values`: RGB or grey, centre crop to the target's shape, resize, scale to [-1, 1].

    Takes PIL images of any mode, files by their paths, encoded bytes (also as `datasets` has them undecoded), arrays
    and tensors. Their values are in [0, 255]; those of 16 bits, above 255, are brought to 8. Floating-point values are
    in [0, 1] where none in a call is above 1, and are then read as such.

    Args:
        size: Height and width of the result in pixels, or one integer for both; `{"shortest_edge": n}` is the latter.
        crop_size: With `do_center_crop`, what is cut out of the middle afterwards, as transformers' processors do it.
        num_channels: 3 for RGB, 1 for grey.
        do_center_crop: Whether the middle of the image is cut out in the shape of `size` before it is resized;
            otherwise the whole image is squeezed into it.
        do_reduce_labels: Whether 0 in a mask means no class, and class k is written as k + 1 (as in ADE20K): 0 becomes
            255 and all else is reduced by 1, but for 255, which stays.
        do_exif_transpose: Whether an image is turned upright by its EXIF entry. A mask without one is of the stored
            pixels, by its size, and turned along. transformers' processors turn nothing, and neither does the one that
            is saved beside a segmenter: its masks are of the pixels as they are stored.

    Example:
        >>> from hf_aselect import ASelectImageProcessor
        >>> from PIL import Image
        >>> processor = ASelectImageProcessor(size={"height": 32, "width": 32})
        >>> processor(Image.new("RGB", (64, 48)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 32, 32])
    """

    def resize(  # type: ignore[override]
        self, image: Tensor, size: SizeDict, resample: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return images, (..., C, H, W), in another size.

        Bilinear and bicubic by torchvision, on the images' device; of bytes within two steps of 255 of PIL's.
        Other filters are PIL's: torchvision has some of them on no device, and takes other pixels as the nearest.
        """
        if resample not in (None, PILImageResampling.BILINEAR, PILImageResampling.BICUBIC):
            channels = _resized(image.flatten(0, -3).cpu().numpy(), size, resample)
            return torch.from_numpy(channels).to(image.device).reshape(*image.shape[:-2], *channels.shape[-2:])
        resized: Tensor = super().resize(image, size, resample=resample, **kwargs)
        if not _is_float(image):
            return resized
        highest = torch.where(image.amax((-3, -2, -1), keepdim=True) > 1, 255.0, 1.0)
        return resized.clamp(min=0).minimum(highest)

    def _of_backend(self, values: Any, device: Any = None) -> Any:
        # A copy: torch takes no array that is read-only or runs backwards.
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, order="C"))
        return tensor if device is None else tensor.to(device)


if not is_torchvision_available():
    # One class under both names; the shorter one is what is shown, saved and looked up.
    ASelectImageProcessorPil.__doc__ = ASelectImageProcessor.__doc__
    ASelectImageProcessorPil.__name__ = ASelectImageProcessorPil.__qualname__ = ASelectImageProcessor.__name__
    ASelectImageProcessor = ASelectImageProcessorPil  # type: ignore[assignment,misc]


def warn_of_fractions(images: Iterable[Any]) -> None:
    """Say so where an image of floating-point numbers, read as one in [0, 255], may be one in [0, 1]."""
    if any(all(image.shape) and 0 < image.max() <= 1 and bool((image % 1).any()) for image in images):
        logger.warning_once(
            "An image has floating-point values of at most 1 while others reach 255, and is read as a dark image in "
            "[0, 255]. If its values are in [0, 1], multiply it by 255."
        )


def _check_settings(size: SizeDict, is_sized: bool, kwargs: dict[str, Any]) -> None:
    """Reject a size or numbers of a call with which no image can be made."""
    height, width = size.height or 0, size.width or 0
    if is_sized and not (height and width):
        raise ValueError(
            "`size` must be an integer or have `height` and `width`, because all images get one shape, got "
            f"{dict(size)}."
        )
    if is_sized and min(height, width) < 1:
        raise ValueError(f"`size` must be 1 or more, got {height}×{width}.")
    if height * width > _MAX_PIXELS:
        raise ValueError(f"`size` must be at most {_MAX_PIXELS} pixels in all, got {height}×{width}.")
    for name in ("image_mean", "image_std", "rescale_factor"):
        values = np.asarray(kwargs.get(name) if kwargs.get(name) is not None else 1.0, dtype=float)
        if not np.isfinite(values).all() or (name == "image_std" and not values.all()):
            raise ValueError(f"`{name}` must be finite{' and not 0' * (name == 'image_std')}, got {kwargs[name]}.")


def _refuse_unknown(names: Iterable[str]) -> None:
    """Reject keywords that are not fields of the processor, naming the nearest."""
    for name in names:
        if not _is_field(name):
            hint = f" Did you mean {near!r}?" if (near := _nearest(name)) else ""
            hint = " It is for `AutoImageProcessor.from_pretrained`." if name == "use_fast" else hint
            raise ValueError(f"ASelectImageProcessor has no field {name!r}.{hint}")


def _nearest(name: str) -> str:
    """Return the field of the nearest name, if one is near."""
    return next(iter(difflib.get_close_matches(name, sorted(ASelectImageProcessorKwargs.__annotations__), n=1)), "")


def _is_field(name: str) -> bool:
    """Return whether a name is a field of the processor, or one that transformers writes into its file."""
    return name in ASelectImageProcessorKwargs.__annotations__ or name in _OF_FILE


def _opened(images: Any) -> Any:
    """Return images, or masks, with those that are files or encoded bytes opened.

    Raises:
        ValueError: If one cannot be read, or is an address, of which nothing is fetched.
    """
    if isinstance(images, list | tuple):
        return [_opened(image) for image in images]
    if isinstance(images, Mapping) and images.keys() == {"bytes", "path"}:  # as `datasets` has them undecoded
        images = images["path"] if images["bytes"] is None else images["bytes"]
    if isinstance(images, str) and ADDRESS.match(images):
        raise ValueError(
            f"An image cannot be a URL, got {images[:100]!r}. URLs are not fetched, so download it first."
        )
    if not isinstance(images, str | bytes | bytearray | os.PathLike) and not hasattr(images, "read"):
        return images
    try:
        with Image.open(BytesIO(images) if isinstance(images, bytes | bytearray) else images) as image:
            image.load()
    except (*UNREADABLE, ValueError) as error:  # a path with a zero byte
        raise ValueError(f"An image cannot be read ({error}). Save or download it again.") from error
    return image


def _as_list(segmentation_maps: Any) -> list[Any]:
    maps = _opened(segmentation_maps)
    if isinstance(maps, list):
        return maps
    if not isinstance(maps, Image.Image | np.ndarray | Tensor):
        raise ValueError(f"Masks must be PIL images, files, arrays or tensors, got {type(maps).__name__}.")
    if isinstance(maps, Image.Image) or maps.ndim == 2 or (maps.ndim == 3 and maps.shape[-1] == 1):
        return [maps]
    return [*maps]


def _orientation(image: Any) -> int:
    """Return the EXIF entry of a PIL image that says how to turn it; 1 for not at all."""
    return int(image.getexif().get(_ORIENTATION, 1)) if isinstance(image, Image.Image) else 1


def _mask_array(mask: Any, image: Any, is_turned: bool) -> NDArray[np.int64]:
    """Return a mask as class indices, (H, W); turned as its image is, if that is."""
    if isinstance(mask, Image.Image) and mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(
            f"A mask must have one class index per pixel, got an image of mode {mask.mode}. Map its colors to "
            "indices first, or save it with a palette (mode P)."
        )
    turn = 1
    try:
        if is_turned:
            turn = _orientation(mask)
            size = mask.size if isinstance(mask, Image.Image) else tuple(getattr(mask, "shape", ()))[:-3:-1]
            if turn == 1 and isinstance(image, Image.Image) and image.size == size:
                turn = _orientation(image)
        if isinstance(mask, Image.Image):
            mask = np.asarray(mask)
    except UNREADABLE as error:
        raise ValueError(f"A mask cannot be read ({error}). Save or download it again.") from error
    array = np.asarray(_dense(mask, "mask").cpu() if isinstance(mask, Tensor) else mask)
    if array.ndim == 3 and 1 in (len(array), array.shape[-1]):
        array = array.squeeze(0 if len(array) == 1 else -1)  # with an axis of channels
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(
            f"A mask must have integers of shape (H, W), one class index per pixel, got {array.dtype} of shape "
            f"{array.shape}."
        )
    if not array.size:
        raise ValueError(f"A mask must not be empty, got shape {array.shape}.")
    if not (array.min() >= -(2**31) and array.max() < 2**31):  # more than PIL keeps on resizing
        raise ValueError(
            f"A mask must have class indices in [0, 2**31), got values from {array.min()} to {array.max()}."
        )
    if turn in _TURNS:
        array = np.asarray(Image.fromarray(array.astype(np.int32)).transpose(Image.Transpose[_TURNS[turn]]))
    warn_of_foreground(array, NO_CLASS)
    return array.astype(np.int64)


def _eight_bits(image: Image.Image) -> Any:
    """Return an image with values of more than 8 bits brought to 8; of floating-point values the array, (H, W)."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):  # NaN, too
        raise ValueError(
            f"An image of mode {image.mode} must have values in [0, 255], or in [0, 65535] for 16 bits, got values "
            f"from {low:g} to {high:g}. Scale them first."
        )
    if high > 255:
        # `convert` would clip instead of scale.
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode.startswith("I;16"):
        return Image.fromarray(values.astype(np.uint8))  # `convert` would scale
    return values[None] if image.mode == "F" else image


def _pil_values(image: Image.Image, num_channels: int, is_turned: bool) -> NDArray[Any]:
    """Return the values of a PIL image, (C, H, W)."""
    if not all(image.size):
        raise ValueError(f"An image must not be empty, got {image.width}×{image.height} pixels.")
    try:
        image = _eight_bits(ImageOps.exif_transpose(image) if is_turned else image)
        if not isinstance(image, Image.Image):
            return image
        # PIL knows no other way, or warns of another.
        ways = {"La": "LA", "LAB": "RGB"} | ({"P": "RGBA"} if "transparency" in image.info else {})
        image = image.convert(ways.get(image.mode, image.mode))
        array = np.asarray(image.convert("L" if num_channels == 1 else "RGB"))
    except UNREADABLE as error:
        raise ValueError(f"An image cannot be read ({error}). Save or download it again.") from error
    return array[None] if num_channels == 1 else np.moveaxis(array, -1, 0)


def _is_float(values: Any) -> bool:
    """Return whether an array or tensor holds floating-point numbers."""
    return values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"


def _bytes(values: Any) -> Any:
    """Return whole numbers in [0, 255], an array or tensor, as bytes."""
    return values.to(torch.uint8) if isinstance(values, Tensor) else values.astype(np.uint8)


def _numbers(image: Any) -> Any:
    """Return the values of an array or tensor as bytes, or in float32."""
    kind = getattr(image.dtype, "name", str(image.dtype)).removeprefix("torch.")
    if isinstance(image, Tensor):
        image = _dense(image, "image")
    if not _is_float(image) and not re.match("u?int", kind):
        raise ValueError(
            f"An image must have numbers in [0, 255], got values of {kind}. Multiply a Boolean mask by 255."
        )
    if not all(image.shape):
        raise ValueError(f"An image must not be empty, got shape {tuple(image.shape)}.")
    if kind == "uint8":
        return image
    low, high = float(image.min()), float(image.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("An image must have values in [0, 255], got NaN or infinite values.")
    if kind == "uint16" and high > 255:
        return _bytes(image >> 8)
    # Rounding and resampling may pass the ends by a little.
    if not (low >= -0.5 and high <= 255.5):
        raise ValueError(
            f"An image must have values in [0, 255], got values from {low:g} to {high:g}. Scale them first."
        )
    if not _is_float(image):
        return _bytes(image)
    return image if isinstance(image, Tensor) else image.astype(np.float32)


def _as_bytes(image: Any) -> Any:
    """Return whole numbers as bytes, which are resized as those of any image are; other numbers as they are."""
    whole = image.round()
    is_whole = whole.min() >= 0 and whole.max() <= 255 and abs(image - whole).max() < 1e-3
    return _bytes(whole) if is_whole else image


def _dense(values: Tensor, what: str) -> Tensor:
    """Return a tensor in one of the types that all operations take, numpy's too: bytes, int64 or float32."""
    if values.is_meta or values.layout != torch.strided:
        kind = "without data (on the meta device)" if values.is_meta else f"a {values.layout} tensor"
        raise ValueError(f"A {what} must be a dense tensor with data, got one that is {kind}.")
    values = values.detach()
    if values.is_floating_point():
        return values.float()
    return values if values.is_complex() or values.dtype in (torch.uint8, torch.bool) else values.long()


def _check_fields(fields: dict[str, Any]) -> None:
    """Reject numbers that transformers takes as they are, and that fail at an image."""
    for name, value in fields.items():
        if name in ("size", "crop_size") and value is not None:
            lengths = value.values() if isinstance(value, dict) else [value]
            if not all(isinstance(length, int) and not isinstance(length, bool) for length in lengths):
                raise ValueError(
                    f"`{name}` must be an integer, or have integers as `height` and `width`, got {value!r}."
                )
        if name in ("image_mean", "image_std") and value is not None:
            numbers = value if isinstance(value, list | tuple) else [value]
            if not all(is_finite_number(number) for number in numbers):
                raise ValueError(f"`{name}` must be finite numbers, one per channel, got {value!r}.")


def _with_channels(values: Any, num_channels: int) -> Any:
    """Return an image, (C, H, W), with 1 or 3 channels."""
    if len(values) == 4:
        values = values[:3]
    if len(values) == num_channels:
        return values
    if len(values) == 1:
        return values[[0] * num_channels]
    if len(values) == 3:
        grey = sum(weight * channel for weight, channel in zip(LUMINANCE, values, strict=True))[None]
        return grey if _is_float(values) else _bytes(grey.round())
    raise ValueError(f"An image must have 1, 3 or 4 channels, got {len(values)}.")


def _crop_to_shape(image: Any, size: SizeDict) -> Any:
    """Cut out the largest middle part, (C, h, w), that has the shape of `size`."""
    rows, columns = int(size.height), int(size.width)  # type: ignore[arg-type]
    top, left, height, width = _middle(image.shape[-2], image.shape[-1], rows, columns)
    return image[:, top : top + height, left : left + width]


def _resized(channels: NDArray[Any], size: SizeDict, resample: Any) -> NDArray[Any]:
    """Return channels of bytes or float32, (C, H, W), in another size, by PIL."""
    sides = int(size.width), int(size.height)  # type: ignore[arg-type]
    how = Image.Resampling.BILINEAR if resample is None else Image.Resampling(int(resample))
    resized = np.stack([np.asarray(Image.fromarray(channel).resize(sides, how)) for channel in channels])
    # Filters pass the ends, as they do in bytes, where PIL cuts them off.
    return resized.clip(0, 255 if channels.max() > 1 else 1) if _is_float(channels) else resized


def _middle_seen(processor: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of what the model sees of an image that is cropped."""
    rows, columns = int(processor.size["height"]), int(processor.size["width"])
    if processor.do_resize:
        top, left, high, wide = _middle(height, width, rows, columns)
        if processor.crop_size is None:
            return top, left, high, wide
        seen = round(high * processor.crop_size["height"] / rows), round(wide * processor.crop_size["width"] / columns)
        return top + (high - seen[0]) // 2, left + (wide - seen[1]) // 2, *seen
    # Of a smaller image it is larger, filled up with black.
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _middle(height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the largest middle part of an image in the shape of rows × columns."""
    scale = min(height / rows, width / columns)
    new_height, new_width = max(1, round(rows * scale)), max(1, round(columns * scale))
    return (height - new_height) // 2, (width - new_width) // 2, new_height, new_width


def _continued(values: Tensor, size: tuple[int, int], middle: tuple[int, int, int, int]) -> Tensor:
    """Return values of the middle of an image, (..., h, w), for all of it: outside as at the nearest edge."""
    top, left, height, width = middle
    rows = (torch.arange(size[0], device=values.device) - top).clamp(0, height - 1)
    columns = (torch.arange(size[1], device=values.device) - left).clamp(0, width - 1)
    return values[..., rows[:, None], columns]


# Here, and not where the package registers its models: this module travels with a model, and what is saved where the
# package is not is to have its code, too.
_ASelectImageProcessing.register_for_auto_class("AutoImageProcessor")
