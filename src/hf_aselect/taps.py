"""Taps: where tokens are read, and how a configuration names them."""

import re
from typing import Literal, get_args

Tap = tuple[int, str]  # block, feature
Feature = Literal["hidden", "normed", "query", "key", "value", "attention"]
FEATURES: tuple[str, ...] = get_args(Feature)
PROJECTIONS = ("query", "key", "value")
# Those that are read before the block's attention is run.
BEFORE_ATTENTION = ("normed", *PROJECTIONS)
# Those of the residual stream, where a few channels may dwarf all others.
MASSIVE_FEATURES = ("hidden", "normed", "attention")


def tap_key(block: int, feature: str) -> str:
    """Return what a tap is called in a configuration, as "9.query"."""
    return f"{block}.{feature}"


def parse_tap_key(key: str) -> Tap:
    """Return block and feature of a tap's name in a configuration; a backbone's stem is "-1.hidden".

    Raises:
        ValueError: If it is none.
    """
    # Digits of ASCII, and so few that `int` takes them.
    found = re.fullmatch(r"(-1|0|[1-9][0-9]{0,5})\.([a-z]+)", str(key))
    if found is None or found[2] not in FEATURES:
        raise ValueError(f"A tap must be named 'BLOCK.FEATURE', as '9.hidden', got {key!r}.")
    return int(found[1]), found[2]


def check_feature(feature: str) -> None:
    """Refuse a name that is none of the features.

    Raises:
        ValueError: If `feature` is unknown.
    """
    if feature not in FEATURES:
        raise ValueError(f"`feature` must be one of {', '.join(FEATURES)}, got {feature!r}.")
