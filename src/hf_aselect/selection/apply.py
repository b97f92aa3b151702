"""A model takes a selection over: timestep, tap, record and massive channels."""

import logging
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..model.checks import HEADS, check_count
from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import ReadOut, Tap, tap_key
from .distribution import Share, called_by, refuse_flattened, unwrapped
from .images import CalibrationPictures
from .massive_channels import LARGE, MASSIVE_FEATURES
from .placement import moved
from .reader import Reader, eval_mode
from .record import TimestepSelection
from .select import select_timestep
from .standardization import concatenated_statistics, read_moments, statistics_of

logger = logging.getLogger(__name__)

MAX_TOKENS = 2**15  # in one forward pass of a selection that loading makes


def settle(model: Any, images: Any, num_train_images: int | None = None, info: dict[str, Any] | None = None) -> None:
    """Select the timestep of a model that is loaded, and let it be read there.

    Args:
        model: The model.
        images: As in `select_timestep`.
        num_train_images: As there.
        info: transformers' loading info; code that was pushed before gives none.
    """
    if info is not None:
        _note_loaded_head(model, info)
    selection = select_timestep(
        model, images, batch_size=batch_size_for(model.config), num_train_images=num_train_images
    )
    if selection.pictures == "generated":
        source = model.config.name_or_path or "SOURCE"
        # Scripts for any model of transformers have no word for calibration images.
        if "model_type" in _saved_fields(model.config):
            advice = f"`hf-aselect select {source} --images FOLDER` and load it with the `timestep=` that this prints"
        else:
            advice = f"`hf-aselect convert {source} SELECTED --timestep auto --images FOLDER` and load SELECTED"
        logger.warning(
            "Selected timestep %s on images that the transformer generated. To select it on your own images, pass "
            "`calibration_images=`, or run %s.",
            selection.timestep,
            advice,
        )
    model.apply_selection(selection)


def batch_size_for(config: Any) -> int:
    """Return how many images one forward pass reads: as many as have the tokens of 32 of 512 pixels, at most 32."""
    rows, columns = config.token_grid
    # While a block is run it holds some eight times its tokens; those of many taps are held besides.
    count: int = MAX_TOKENS // (rows * columns) // max(1, len(config.taps()) // 8)
    return max(1, min(32, count))


def settle_standardization(model: Any, images: Any, info: dict[str, Any]) -> None:
    """Standardize what a head without statistics reads at a fixed timestep, or say why not.

    Args:
        model: A model that was just loaded.
        images: Images to standardize by; None where there are none.
        info: transformers' loading info.

    Raises:
        ValueError: If there are images and nothing to standardize by them.
    """
    _note_loaded_head(model, info)
    config, why = model.config, None
    is_new = _is_head_new(info)
    # Of a head that is read elsewhere than it was trained the statistics are left over.
    is_moved = any(".standardization." in name for name in info["unexpected_keys"])
    if not model._standardizations():
        why = f"a {type(model).__name__} has no head that standardizes its features"
    elif not config.standardize_features:
        why = "`standardize_features=False` leaves no other use for them"
    elif not (is_new or is_moved):
        how = (
            "with the statistics that it has" if config.standardized_grid else "on features that are not standardized"
        )
        why = f"the head was trained {how}"
    if images is not None and why is not None:
        raise ValueError(
            f"`calibration_images` were given, but the timestep is fixed at {config.timestep}. Pass "
            f"`timestep='auto'` to select it again, or omit the images: {why}."
        )
    if images is not None:
        model.standardize(images)
    elif why is None and is_moved and not is_new:
        logger.warning(
            "Removed the feature statistics, because they belong to another timestep or tap. Pass "
            "`calibration_images=` or call `model.standardize(images)`, and train the head again."
        )
    elif why is None and config.standardized_grid is None:
        logger.info(
            "The features of the new head are not standardized, so that it may learn little at a large timestep. "
            "Pass `calibration_images=`, or call `model.standardize(images)`, before you train it."
        )


def _is_head_new(info: dict[str, Any]) -> bool:
    """Return whether a head was not among the weights that were loaded, by transformers' loading info."""
    return any(name.partition(".")[0] in HEADS.values() for name in info["missing_keys"])


def note_head(model: Any, how: str, read_outs: list[ReadOut] | None) -> None:
    """Note on a model where its head is of use, for a warning if it is read elsewhere.

    Args:
        model: The model.
        how: How its head came to be: "fitted" or "trained".
        read_outs: What it read then; None if that is unknown.
    """
    model._head_origin = None if read_outs is None else (how, read_outs)


def _note_loaded_head(model: Any, info: dict[str, Any]) -> None:
    """Note what a head that was loaded was saved with, which need not be what it is loaded to read."""
    if model is model._base() or _is_head_new(info):
        return
    kind = type(model.config)
    known = {name: value for name, value in _saved_fields(model.config).items() if name in kind.__dataclass_fields__}
    with suppress(ValueError, StrictDataclassError):  # it may make sense only with what it was loaded with
        note_head(model, "trained", kind.from_dict(known).read_outs() if known else None)


def _saved_fields(config: Any) -> dict[str, Any]:
    """Return the configuration that lies beside the weights that were loaded; empty if there is none."""
    try:
        fields, _ = type(config).get_config_dict(
            config.name_or_path, revision=getattr(config, "_commit_hash", None), local_files_only=True
        )
    except (OSError, ValueError):
        return {}
    return dict(fields)


def warn_of_unknown_channels(model: Any) -> None:
    """Warn of taps in a large transformer's residual stream whose massive channels the configuration leaves open."""
    if isinstance(model.config.zeroed_channels, list) or model.config.hidden_size < LARGE:
        return  # whoever wrote a list knows of them
    unsaid = [
        f"{feature} of block {block}"
        for block, feature in model._base().taps()
        if block >= 0 and feature in MASSIVE_FEATURES and model.config.channels_at(block, feature) is None
    ]
    if unsaid:
        logger.warning(
            "In a transformer of %d channels a few channels may dwarf all others, and none is set to zero in %s. "
            "Pass `timestep='auto'`, which detects them, or `zeroed_channels=` (`[]` for none).",
            model.config.hidden_size,
            ", ".join(unsaid),
        )


def standardize(model: Any, images: Any, max_images: int) -> None:
    """Standardize the features that a model's head reads, by images; see its `standardize`."""
    refuse_flattened(model)
    model = unwrapped(model)
    config, heads = model.config, model._standardizations()
    check_count("max_images", max_images)
    if not heads:
        raise ValueError(f"A {type(model).__name__} has no head, so there are no features to standardize.")
    if not config.standardize_features:
        raise ValueError("`config.standardize_features` is False. Set it to True before you call `standardize`.")
    if config.folded:
        raise ValueError(
            "A folded model cannot be standardized. Standardize the model it was folded from, and fold it again."
        )
    config.resolved_timestep()
    base, read_outs = model._base(), model._base().read_outs()
    pictures = CalibrationPictures(images, config, max_images, seed=0)
    channels: dict[Tap, list[int] | None] = {tap: config.channels_at(*tap) for tap in base.taps()}
    reader = Reader(model, pictures, channels, 0, batch_size_for(config), seed=0)
    with eval_mode(model), called_by(model, "encode", "_read_taps", then_shard=True), torch.no_grad():
        moments, grid = read_moments(reader, read_outs, max_images, Share.of_model(model))
    if (count := moments[read_outs[0]].count) < 2:
        raise ValueError(f"`images` must hold at least 2 images to standardize features, got {count}.")
    statistics = statistics_of(config, moments, read_outs, grid)
    model._set_standardization([concatenated_statistics(statistics, stage) for stage in base.stages()])


def apply_selection(model: Any, selection: TimestepSelection, are_statistics_kept: bool = False) -> None:
    """Let a model be read at the timestep and tap of a selection; see its `apply_selection`.

    Args:
        model: The model.
        selection: The selection.
        are_statistics_kept: Whether the statistics that the model has are those of this selection, though it is not
            read as it was selected yet: they came with the weights of a resumed training.
    """
    # By what it has: a checkpoint's own code and the package have a class each.
    if not hasattr(selection, "selected") or not hasattr(selection, "to_dict"):
        raise ValueError(f"`selection` must be a result of `select_timestep`, got {type(selection).__name__}.")
    model = unwrapped(model)
    config, base = model.config, model._base()
    tap, taps, before = (selection.block, selection.feature), config.taps(), base.read_outs()
    new = moved(config, selection.selected, tap)
    if model is not base and new.feature_size != config.feature_size:
        raise ValueError(_of_other_width(selection, config, new))
    is_another_tap = new.taps() != taps
    if is_another_tap and isinstance(config.zeroed_channels, list):
        config.zeroed_channels = {tap_key(*taps[0]): config.zeroed_channels}  # they stay where they are
    was_selected = config.timestep != "auto"
    for name in ("timestep", "num_timesteps", "block", "feature", "read_out"):
        setattr(config, name, getattr(new, name))
    config.selection = selection.to_dict()
    found = dict(selection.other_massive_channels or {})
    if selection.massive_channels is not None:
        found[tap_key(*tap)] = selection.massive_channels
    if found:
        known = config.zeroed_channels if isinstance(config.zeroed_channels, dict) else {}
        config.zeroed_channels = {**known, **found}
    if is_another_tap and not config.freeze_backbone:
        # Code that was pushed before does not say which modules are its own.
        modules = getattr(base, "_own_modules", {}).get("denoiser", base.denoiser.modules())
        own = [each for part in modules for each in part.parameters(recurse=False)]
        # peft froze all of them, and trains what it put in.
        is_trained = any(each.requires_grad for each in own)
        for each in own if is_trained else ():
            each.requires_grad_(True)
        base.freeze()  # other blocks come after the tap
    is_told = False
    if model._standardizations():
        # What came with weights before there was a timestep is of the timestep that those were trained at.
        is_elsewhere = before != base.read_outs() and was_selected and not are_statistics_kept
        is_told = _standardize_as(model, selection, is_elsewhere)
    how, origin = getattr(model, "_head_origin", None) or ("", None)
    if origin is not None and origin != config.read_outs() and not are_statistics_kept:
        note_head(model, how, None)  # once: whoever trains it again need not hear of it
        if not is_told:
            there, here = _places(origin, config.read_outs())
            logger.warning("The head was %s at %s. At %s fit or train it again.", how, there, here)


def _places(origin: list[ReadOut], now: list[ReadOut]) -> list[str]:
    """Return what was read and what is read now in words: the timesteps, and the taps where these are others."""
    found = []
    taps = [list(dict.fromkeys((block, feature) for _, block, feature in each)) for each in (origin, now)]
    for read_outs, its_taps in zip((origin, now), taps, strict=True):
        timesteps = list(dict.fromkeys(timestep for timestep, _, _ in read_outs))
        words = f"timestep{'s' * (len(timesteps) > 1)} {', '.join(map(str, timesteps))}"
        names = ", ".join(f"{feature} of block {block}" for block, feature in its_taps)
        found.append(words if taps[0] == taps[1] else f"{words} ({names})")
    return found


def _of_other_width(selection: TimestepSelection, config: ASelectConfig, new: ASelectConfig) -> str:
    """Return why a head cannot read what a selection names, and what can be done."""
    if len(new.read_outs()) > 1 or config.num_timesteps > 1:
        where = f"timestep {new.timestep} alone" if len(selection.selected) == 1 else f"timesteps {new.timestep}"
        return (
            f"The head reads tokens of {config.feature_size} channels, but the taps at {where} have "
            f"{new.feature_size}. Load the model with `timestep={new.timestep}` and a new head."
        )
    return (
        f"The head reads tokens of {config.feature_size} channels, but {selection.feature!r} has {new.feature_size}. "
        f"Load the model with `feature={selection.feature!r}, block={selection.block}, "
        f"timestep={selection.timestep}`."
    )


def _standardize_as(model: Any, selection: TimestepSelection, is_elsewhere: bool) -> bool:
    """Standardize what a model's head reads as a selection measured it, if it did; return whether it warned."""
    config, found = model.config, selection.standardization or {}
    is_measured = all(each in found for each in model._base().read_outs())
    if config.standardize_features and is_measured:
        model._set_standardization([concatenated_statistics(found, stage) for stage in model._base().stages()])
    elif config.standardized_grid is not None and is_elsewhere:
        model._set_standardization(None)
        logger.warning(
            "Removed the feature statistics, because they belong to another timestep or tap, and a saved selection "
            "has none. Call `model.standardize(images)`, and train the head again."
        )
        return True
    elif config.standardized_grid is None and config.standardize_features:
        logger.info(
            "The head's features are not standardized, because a saved selection has no feature statistics. Call "
            "`model.standardize(images)` before you train the head."
        )
    return False
