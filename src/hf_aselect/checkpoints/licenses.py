"""Licences of published weights, from a table and from model cards."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..model.checks import read_text

# Of what people have, by the beginning of its id in small letters: licence, its name where the Hub has no identifier
# for it, and whether it forbids commercial use. It holds for what is made from the weights, too.
LICENSES = {
    "facebook/dit-": ("cc-by-nc-4.0", None, True),
    "stabilityai/stable-diffusion-3": ("other", "stabilityai-ai-community", False),
    "pixart-alpha/": ("openrail++", None, False),
    "black-forest-labs/flux.1-schnell": ("apache-2.0", None, False),
    "black-forest-labs/flux.1-": ("other", "flux-1-dev-non-commercial-license", True),
    "efficient-large-model/sana": ("other", "nscl-v2-custom", True),
}
_MAX_LICENSE = 200
# Licences that forbid commercial use, by their identifiers or names.
NON_COMMERCIAL = re.compile(
    r"(^|[^a-z])nc([^a-z]|$)|non[-_ ]?commercial|research[-_ ]?only|amlr|intel-research", re.IGNORECASE
)


def inherited_license(config: Any, source: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Put what the card of a loaded model says of its licence into its configuration, unless more is known there.

    Args:
        config: The configuration, of which `base_model` and `base_license` are set.
        source: Where it was loaded from: a folder, or an id on the Hub.
        options: Keywords of `from_pretrained`: those of the Hub count.
    """
    if config.base_license is not None or license_of(config.base_model or "")[0] is not None:
        return
    if os.path.isdir(source):
        config.base_license = license_on_card(source)
        return
    config.base_model = config.base_model or str(source)
    how = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    try:
        path = hf_hub_download(str(source), "README.md", **how)
    except (HfHubHTTPError, OSError, ValueError):  # no card, or no Hub
        return
    config.base_license = license_on_card(Path(path).parent)


def license_on_card(folder: str | os.PathLike[str]) -> str | None:
    """Return the licence that the card in a folder says; "other/NAME" where the Hub has no identifier for it.

    Of a part of a pipeline it is the card of the whole.
    """
    path = Path(folder) / "README.md"
    if not path.is_file() and Path(folder).name == "transformer":
        path = Path(folder).parent / "README.md"
    try:
        data = ModelCard(read_text(path), ignore_metadata_errors=True).data
    except Exception:  # no card, or none that the Hub's client can read: nothing is known
        return None
    found, name = data.get("license"), data.get("license_name")
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, str) or len(found) > _MAX_LICENSE:
        return None
    is_named = isinstance(name, str) and 0 < len(name) <= _MAX_LICENSE
    return f"{found}/{name}" if found == "other" and is_named else found


def license_of(base_model: str) -> tuple[str | None, str | None, bool]:
    """Return the licence of a published model, its name where that is "other", and whether it is non-commercial."""
    name = base_model.lower().removeprefix("https://huggingface.co/")
    for beginning, found in LICENSES.items():
        if name.startswith(beginning):
            return found
    return None, None, False
