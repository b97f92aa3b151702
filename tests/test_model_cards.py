"""The cards of what the project publishes: their figures are those of the files beside them."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_aselect import select_timestep

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "model_cards" / "selection-benchmark"


def table_rows(text, first_cell):
    """Return the cells of each Markdown table row below the head that starts with a cell, by their first cell."""
    lines = text.split(f"| {first_cell} |", 1)[1].split("\n\n", 1)[0].splitlines()
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    return head, {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """The benchmark's tables, made anew from the results."""
    folder = tmp_path_factory.mktemp("regret")
    for path in BENCHMARK.glob("*.json"):
        shutil.copy(path, folder)
    script = ROOT / "examples" / "benchmarks" / "selection_regret.py"
    command = [sys.executable, str(script), "--output_dir", str(folder), "--summarize"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return (folder / "table.md").read_text(encoding="utf-8")


def test_the_benchmarks_card_has_the_tables_of_its_results(summary):
    assert summary in (BENCHMARK / "README.md").read_text(encoding="utf-8")


def test_the_readme_quotes_the_benchmark(summary):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    head, quoted = table_rows(readme, "chosen by")
    full_head, full = table_rows(summary, "criterion")
    assert len(quoted) > 5
    for name, cells in quoted.items():
        assert cells == [full[name][full_head.index(column)] for column in head], name


def test_the_default_is_the_criterion_that_loses_least(summary):
    """By both truths together: by the linear classifier alone another one is as good, and takes pure noise."""
    head, full = table_rows(summary, "criterion")
    label_free = ("hfr", "signal_hfr", "consensus", "RankMe", "alpha-ReQ", "LiDAR")
    columns = [head.index(name) for name in ("mean", "attention head, mean")]
    losses = {name: sum(float(full[name][column]) for column in columns) for name in label_free}
    default = inspect.signature(select_timestep).parameters["criterion"].default
    assert min(losses, key=losses.__getitem__) == default


def test_each_pair_is_drawn():
    results = sorted(path.stem for path in BENCHMARK.glob("*.json"))
    assert len(results) >= 6
    assert sorted(path.stem for path in BENCHMARK.glob("*.png")) == results
