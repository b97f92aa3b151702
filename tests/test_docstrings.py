"""Each public name has an example in its docstring, which runs at the root of the repository."""

import doctest
from pathlib import Path

import pytest

import hf_aselect

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", hf_aselect.__all__)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    for path in ("src", "model_cards"):
        (tmp_path / path).symlink_to(ROOT / path)
    monkeypatch.chdir(tmp_path)
    named = getattr(hf_aselect, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(named, name, globs={})
    assert found.examples, f"{name} has no example"
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(found, out=report.append)
    assert result.failed == 0, "".join(report)
