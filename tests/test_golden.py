"""Numbers of the embedded DiT do not drift; see `golden.py`."""

import json
from pathlib import Path

import golden
import pytest


@pytest.fixture(scope="module")
def found():
    return golden.reading()


@pytest.fixture(scope="module")
def expected():
    return json.loads(golden.PATH.read_text(encoding="utf-8"))


@pytest.mark.process
@pytest.mark.parametrize("name", ["consensus", "hfr", "signal_hfr"])
def test_the_choice_and_its_scores(expected, name):
    now, then = golden.scores(name), expected["selections"][name]
    assert (now["timestep"], now["timesteps"]) == (then["timestep"], then["timesteps"])
    assert now["scores"] == pytest.approx(then["scores"], abs=5e-4)
    assert now["confidence"] == pytest.approx(then["confidence"], abs=0.02)


def test_tokens(found, expected):
    assert found["tokens"].keys() == expected["tokens"].keys()
    for name, sums in expected["tokens"].items():
        assert found["tokens"][name] == pytest.approx(sums, abs=5e-4, rel=1e-3), name
    assert found["folded tokens"] == pytest.approx(expected["folded tokens"], abs=5e-4, rel=1e-3)


def test_the_card(found, expected):
    """But for its figures of the selection, which are compared above."""

    def text(card):
        return [line for line in card.splitlines() if not line.startswith(("| score", "| confidence", "**Confidence"))]

    assert text(found["card"]) == text(expected["card"])


def test_a_change_of_them_has_its_reason_in_the_changelog():
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"golden values {golden.checksum()}" in changelog
