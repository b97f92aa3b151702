"""The modules stand on levels and import downward only; what travels to the Hub imports only what is there.

The sources of the checkout are read, not the installed package, so that the examples are read beside them.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import hf_aselect

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_aselect"
MODULES = sorted(PACKAGE.glob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

LEVELS = {
    "card_template": 0,
    "consensus": 0,
    "cached_features": 0,
    "decoders": 0,
    "diffusers_files": 0,
    "massive_channels": 0,
    "metrics": 0,
    "probe": 0,
    "spectrum": 0,
    "taps": 0,
    "timestep_curve": 0,
    "transformer_layout": 0,
    "whole_folder": 0,
    "criteria": 1,
    "denoiser": 1,
    "empty_prompt": 1,
    "field_checks": 1,
    "folded_layout": 1,
    "folded_parts": 1,
    "heads": 1,
    "model_card": 1,
    "plots": 1,
    "configuration_aselect": 2,
    "denoiser_dit": 2,
    "denoiser_flux": 2,
    "denoiser_lumina2": 2,
    "denoiser_pixart": 2,
    "denoiser_sana": 2,
    "denoiser_sd3": 2,
    "folded_lumina2": 2,
    "folded_sana": 2,
    "folded_transformer": 3,
    "image_processing_aselect": 3,
    "input_checks": 3,
    "noise_schedule": 3,
    "selection_record": 3,
    "calibration": 4,
    "denoisers": 4,
    "publishing": 4,
    "diffusers_checkpoint": 5,
    "folding": 5,
    "generation": 5,
    "sharing": 5,
    "sweep": 5,
    "convert_diffusers": 6,
    "loading": 6,
    "timestep_selection": 6,
    "modeling_aselect": 7,
    "feature_cache": 8,
    "modeling_classification": 8,
    "modeling_segmentation": 8,
    "training": 8,
    "demo": 9,
    "demo_segmentation": 10,
    "__init__": 11,
    "cli": 11,
}

# Saving a model with its code copies these and all that they import to the Hub.
HUB_ROOTS = ("modeling_classification", "modeling_segmentation", "image_processing_aselect")
# What a user of such a checkpoint has installed, beside the standard library.
HUB_LIBRARIES = {"PIL", "diffusers", "huggingface_hub", "numpy", "safetensors", "torch", "transformers"}


class Import(NamedTuple):
    """One imported module: how many dots, its name, the names taken from it, and where it stands."""

    dots: int
    module: str
    names: tuple[str, ...]
    at_top: bool
    optional: bool


def is_optional(statement: ast.stmt) -> bool:
    """Return whether this is a `try` that does without what it cannot import."""
    return isinstance(statement, ast.Try) and any(
        handler.type is not None and ast.unparse(handler.type) in ("ImportError", "ModuleNotFoundError")
        for handler in statement.handlers
    )


def imports(path: Path) -> Iterator[Import]:
    """Yield each import statement anywhere in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    optional = {id(node) for part in ast.walk(tree) if is_optional(part) for node in ast.walk(part)}
    for node in ast.walk(tree):
        at_top, is_in_try = node in tree.body, id(node) in optional
        if isinstance(node, ast.ImportFrom):
            yield Import(node.level, node.module or "", tuple(a.name for a in node.names), at_top, is_in_try)
        elif isinstance(node, ast.Import):
            yield from (Import(0, alias.name, (), at_top, is_in_try) for alias in node.names)


def own_modules(path: Path) -> set[str]:
    """Return the package's modules that the file imports."""
    return {found.module for found in imports(path) if found.dots}


def hub_modules() -> list[str]:
    """Return the modules that are copied to the Hub with a checkpoint."""
    reached, waiting = set(), list(HUB_ROOTS)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(own_modules(PACKAGE / f"{module}.py"))
    return sorted(reached)


def test_every_module_has_a_level_and_every_level_a_module():
    assert sorted(LEVELS) == sorted(path.stem for path in MODULES)


def test_the_package_has_no_sub_packages():
    assert not list(PACKAGE.glob("*/**/*.py")), "the Hub copies modules into one flat folder"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_only_from_lower_levels(path):
    for found in imports(path):
        if found.dots:
            assert found.dots == 1 and found.module in LEVELS, f"{path.name}: write `from .module import Name`"
            assert LEVELS[found.module] < LEVELS[path.stem], f"{path.name} imports {found.module}, of no lower level"
        else:
            assert found.module.split(".")[0] != "hf_aselect", f"{path.name}: write `from .module import Name`"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_own_modules_are_imported_at_the_top_and_by_name(path):
    for found in imports(path):
        if found.dots:
            assert "*" not in found.names, f"{path.name} takes all of {found.module}: name what it uses"
            # Only the outside is lazy: a name or a command may need libraries that not everyone installs.
            at_outside = path.stem in ("__init__", "cli")
            assert found.at_top or at_outside, f"{path.name} imports {found.module} inside a function"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_import_is_for_type_checkers_only(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    words = {getattr(node, word, None) for node in nodes for word in ("id", "attr", "name")}
    assert "TYPE_CHECKING" not in words, f"{path.name}: an import that only a type checker sees hides a circle"


@pytest.mark.parametrize("module", hub_modules())
def test_what_travels_to_the_hub_imports_only_what_is_there(module):
    for found in imports(PACKAGE / f"{module}.py"):
        library = found.module.split(".")[0]
        # transformers' loader of foreign code does not ask for what is imported inside a `try` either.
        if not found.dots and not found.optional and library not in sys.stdlib_module_names:
            assert library in HUB_LIBRARIES, f"{module}.py imports {library}, which not every user of the Hub has"


@pytest.mark.parametrize("module", hub_modules())
def test_the_hub_finds_the_same_imports_as_python(module):
    # transformers finds them by a regular expression, in docstrings too.
    path = PACKAGE / f"{module}.py"
    assert set(get_relative_imports(path)) == own_modules(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_public_names_only(path):
    public = {*hf_aselect.__all__, "__version__"}
    for found in imports(path):
        assert not found.module.startswith("hf_aselect."), f"{path.name}: import from `hf_aselect` itself"
        if found.module == "hf_aselect":
            assert set(found.names) <= public, f"{path.name}: {set(found.names) - public} not in `hf_aselect.__all__`"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_aselect":
            assert node.attr in public, f"{path.name}: {node.attr} is not in `hf_aselect.__all__`"
