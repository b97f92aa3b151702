"""transformers' own tests, which its source distribution on PyPI carries: fetched once, never copied into git.

python tests/host/host_tests.py

downloads the source distribution of the installed version through pip and keeps its tests in the cache folder
(`$XDG_CACHE_HOME` or `~/.cache`); `pytest tests/host` then runs them on our classes, and is skipped before.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers


def folder() -> Path:
    """Where the tests of the installed version are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hf_aselect" / f"transformers-{transformers.__version__}-tests"


def fetch() -> Path:
    """Download the tests, unless they are there; the folder appears whole or not at all."""
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


def host_module(name: str) -> ModuleType:
    """Import one of the host's test modules, or skip the module that asks for it."""
    if not folder().is_dir():
        pytest.skip("transformers' tests are not here: run `python tests/host/host_tests.py`", allow_module_level=True)
    # A module of the host's repository that its source distribution lacks; only tests with pictures of the Hub use it.
    stand_in = ModuleType("fetch_hub_objects_for_ci")
    stand_in.url_to_local_path = lambda url: url
    sys.modules.setdefault(stand_in.__name__, stand_in)
    sys.path.insert(0, str(folder()))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(folder()))


if __name__ == "__main__":
    print(fetch())
