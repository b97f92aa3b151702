"""transformers' own tests, which its source distribution on PyPI carries: fetched once, never copied into git.

python tests/host/host_tests.py

downloads the source distribution of the installed version through pip and keeps its tests in the cache folder
(`$XDG_CACHE_HOME` or `~/.cache`); `pytest tests/host` then runs them on our classes, and is skipped before.
"""

import importlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import transformers

# Transformers' tests import each other by dots, so they need a package around them.
PACKAGE = "transformers_tests"


def folder() -> Path:
    """Where the tests of the installed version are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hf_aselect" / f"transformers-{transformers.__version__}-tests"


def fetch() -> Path:
    """Download the tests, unless they are there; the folder appears whole or not at all.

    These are all that the source distribution has of them: the files of `tests/`, none of its folders.
    """
    target = folder()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        wanted = f"transformers=={transformers.__version__}"
        command = ["download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", name, wanted]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        (archive,) = Path(name).glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            prefix = f"{archive.name.removesuffix('.tar.gz')}/tests/"
            members = [each for each in opened if each.name.startswith(prefix) and each.name.count("/") == 2]
            opened.extractall(name, members, filter="data")
        shutil.move(Path(name) / prefix, target)
    return target


def stand_in(name: str, **contents: object) -> None:
    """Put a module in the place of one of transformers' repository that its source distribution lacks."""
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        stand_in(parent)
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules.setdefault(name, module)


def _prepare() -> None:
    """Make the package, with what the source distribution lacks of it."""
    if PACKAGE in sys.modules:
        return
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder())]
    package.__spec__ = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    sys.modules[PACKAGE] = package
    # Only tests with images of the Hub use it.
    stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
    # Tests of exporters and of text generation: mixins that `ModelTesterMixin` inherits from, or looks for.
    stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    # A value that is not the default for each field that all configurations have.
    common = {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["BertModel"],
        "id2label": {0: "label"},
        "label2id": {"label": 0},
        "problem_type": "regression",
    }
    stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=common)
    # How tests of FSDP start their processes: they are of language models alone, so it does not come to that.
    unused = dict.fromkeys(
        ["_get_distributed_backend", "_get_rank_device", "_set_rank_device", "_start_rank_processes"]
    )
    stand_in(f"{PACKAGE}.distributed_testing_utils", **unused, _get_distributed_device_type=lambda: "cpu")


def host_module(name: str) -> ModuleType:
    """Import one of transformers' test modules, or skip the module that asks for it."""
    if not folder().is_dir():
        pytest.skip("transformers' tests are not here: run `python tests/host/host_tests.py`", allow_module_level=True)
    _prepare()
    # Two modules import transformers again from its source tree, which is not here: the installed one serves.
    with patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    print(fetch())
