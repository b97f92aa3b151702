"""The wings stand in an order and import downward only; what travels to the Hub imports only what is there.

The sources of the checkout are read, not the installed package, so that the examples are read beside them.
"""

import ast
import functools
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import hf_aselect

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_aselect"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Benchmarks measure what is inside.
EXAMPLES = [path for path in sorted((ROOT / "examples").rglob("*.py")) if "benchmarks" not in path.parts]
# The only modules of the package that an example may name: what several scripts share, reading images, their splits
# and their options, has its home there. It is no part of `hf_aselect.__all__`, because only scripts have a use for it.
OF_SCRIPTS = (
    "hf_aselect.images.sources",
    "hf_aselect.plots",
    "hf_aselect.training.config_arguments",
    "hf_aselect.training.splits",
    "hf_aselect.training.views",
)

# Each wing, or module beside the wings, imports from those before it; what it owns stands in CONTRIBUTING.md, too.
WINGS = {
    "model": "what travels with a checkpoint: configuration, models, image processor, denoisers, heads; flat",
    "images": "images as people have them: where they lie, what they come in, and which values they have",
    "plots": "figures",
    "selection": "the selection of the timestep: criteria, the sweep over timesteps, the record, calibration images",
    "folding": "a denoiser at its timesteps as the weights of a plain transformer",
    "checkpoints": "what diffusers saved: found, fetched, read, converted; licences; folders that appear whole",
    "hub": "the model card and the push",
    "training": "the callback for Trainer, its trackers, cached features, heads in closed form, metrics",
    "demo": "the demo on the embedded DiT",
    "public": "the public names, and their registration with the Auto classes",
    "cli": "the command line",
    "__main__": "`python -m hf_aselect`",
    "__init__": "the public names, which the command line imports late",
}
ORDER = list(WINGS)
GUIDE = ROOT / "CONTRIBUTING.md"
MARK, END = "<!-- Written by `python tests/test_import_rules.py`. -->\n", "<!-- Until here. -->\n"

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


@functools.cache
def imports(path: Path) -> list[Import]:
    """Return each import statement anywhere in the file."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    optional = {id(node) for part in ast.walk(tree) if is_optional(part) for node in ast.walk(part)}
    for node in ast.walk(tree):
        at_top, is_in_try = node in tree.body, id(node) in optional
        if isinstance(node, ast.ImportFrom):
            found.append(Import(node.level, node.module or "", tuple(a.name for a in node.names), at_top, is_in_try))
        elif isinstance(node, ast.Import):
            found.extend(Import(0, alias.name, (), at_top, is_in_try) for alias in node.names)
    return found


def name_of(path: Path) -> str:
    """Return a module's name below the package, as "model.heads"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def wing_of(name: str) -> str:
    """Return the wing of a module's name."""
    return name.partition(".")[0]


def own_modules(path: Path) -> set[str]:
    """Return the package's modules that the file imports, by their names below it."""
    above = name_of(path).split(".")
    return {".".join([*above[: len(above) - found.dots], found.module]) for found in imports(path) if found.dots}


def hub_modules() -> list[str]:
    """Return the modules that are copied to the Hub with a checkpoint."""
    reached, waiting = set(), [f"model.{root}" for root in HUB_ROOTS]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(own_modules(path_of(module)))
    return sorted(reached)


def path_of(module: str) -> Path:
    """Return the file of a module, by its name below the package."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def architecture() -> str:
    """Return the table of CONTRIBUTING.md: each wing, what it owns, and its modules."""
    rows = ["| wing | owns | modules |", "| --- | --- | --- |"]
    for wing, owns in WINGS.items():
        inside = [
            path.stem for path in MODULES if wing_of(name_of(path)) == wing and path.stem not in (wing, "__init__")
        ]
        rows.append(f"| `{wing}` | {owns} | {', '.join(f'`{name}`' for name in inside)} |")
    return "\n".join(rows) + "\n"


def guide_with_architecture() -> str:
    """Return CONTRIBUTING.md with today's table between its marks."""
    text = GUIDE.read_text(encoding="utf-8")
    before, mark, rest = text.partition(MARK)
    _, end, after = rest.partition(END)
    return f"{before}{mark}{architecture()}{end}{after}"


def test_the_contributing_guide_shows_the_wings():
    assert GUIDE.read_text(encoding="utf-8") == guide_with_architecture(), "run python tests/test_import_rules.py"


def test_every_module_is_in_a_wing_and_every_wing_has_a_module():
    assert {wing_of(name_of(path)) for path in MODULES} == set(WINGS)


def test_what_travels_is_flat_small_and_complete():
    files = [path for path in (PACKAGE / "model").rglob("*.py") if path.stem != "__init__"]
    assert all(path.parent == PACKAGE / "model" for path in files), "the Hub copies modules into one flat folder"
    assert {f"model.{path.stem}" for path in files} == set(hub_modules())
    # Whichever model is pushed: the code of all goes along, so that every Auto class loads it.
    assert len(files) <= 15
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 7450


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_wings_import_downward_only(path):
    own = wing_of(name_of(path))
    for module in own_modules(path):
        assert path_of(module).is_file(), f"{path.name} imports {module}: write `from ..wing.module import Name`"
        wing = wing_of(module)
        assert wing == own or ORDER.index(wing) < ORDER.index(own), f"{own} imports {module}, which stands above it"
    for found in imports(path):
        assert found.module.split(".")[0] != "hf_aselect" or found.dots, f"{path.name}: write a relative import"


def test_no_module_imports_in_a_circle():
    order = list(TopologicalSorter({name_of(path): own_modules(path) for path in MODULES}).static_order())
    assert order.index("model.layouts") < order.index("model.modeling_aselect") < order.index("cli")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_own_modules_are_imported_at_the_top_and_by_name(path):
    for found in imports(path):
        if found.dots:
            assert "*" not in found.names, f"{path.name} takes all of {found.module}: name what it uses"
            # Only the outside is lazy: a name or a command may need libraries that not everyone installs.
            at_outside = path.stem in ("__init__", "cli")
            assert found.at_top or at_outside, f"{path.name} imports {found.module} inside a function"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_is_for_type_checkers_only(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    words = {getattr(node, word, None) for node in nodes for word in ("id", "attr", "name")}
    assert "TYPE_CHECKING" not in words, f"{path.name}: an import that only a type checker sees hides a circle"


@pytest.mark.parametrize("module", hub_modules())
def test_what_travels_to_the_hub_imports_only_what_is_there(module):
    for found in imports(path_of(module)):
        library = found.module.split(".")[0]
        # transformers' loader of foreign code does not ask for what is imported inside a `try` either.
        if not found.dots and not found.optional and library not in sys.stdlib_module_names:
            assert library in HUB_LIBRARIES, f"{module}.py imports {library}, which not every user of the Hub has"


@pytest.mark.parametrize("module", hub_modules())
def test_the_hub_finds_the_same_imports_as_python(module):
    # transformers finds them by a regular expression, in docstrings too.
    path = path_of(module)
    assert {f"model.{name}" for name in get_relative_imports(path)} == own_modules(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_public_names_only(path):
    public = {*hf_aselect.__all__, "__version__"}
    for found in imports(path):
        is_of_package = found.module.startswith("hf_aselect.") and found.module not in OF_SCRIPTS
        assert not is_of_package, f"{path.name}: import from `hf_aselect` itself"
        if found.module in OF_SCRIPTS:
            assert not [name for name in found.names if name.startswith("_")], f"{path.name}: takes a private name"
        if found.module == "hf_aselect":
            assert set(found.names) <= public, f"{path.name}: {set(found.names) - public} not in `hf_aselect.__all__`"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_aselect":
            assert node.attr in public, f"{path.name}: {node.attr} is not in `hf_aselect.__all__`"


if __name__ == "__main__":
    GUIDE.write_text(guide_with_architecture(), encoding="utf-8")
