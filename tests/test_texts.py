"""One English: the terms of transformers and diffusers, in README, guides, cards, and the texts of the code."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "examples" / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md")]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
TEXTS = [*PAGES, *GUIDES, *CARDS, ROOT / "src" / "hf_aselect" / "hub" / "card_template.md"]
MODULES = [*sorted((ROOT / "src" / "hf_aselect").rglob("*.py")), ROOT / "examples" / "space" / "app.py"]
# What is said in place of each.
RETIRED = {
    r"pictures?": "image",
    r"the host('s)?": "transformers, diffusers, Trainer, the Hub",
    r"chosen|chooses": "selected",
    r"(one|some|those|checkpoints?) of ours": "an hf_aselect checkpoint",
    r"is refused|are refused": "is rejected",
    r"a stranger": "a user without the package",
    r"anew": "again",
    r"so many": "at most N, as many as",
    r"from (0|1|2) on": "at least N",
    r"of no account": "ignored",
    r"goes on with": "resumes",
    r"learnt": "learned",
}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_retired_words_are_not_used(path):
    # Names in code are a contract of their own.
    text = re.sub(r"^```.*?^```|`[^`]*`", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for word, instead in RETIRED.items():
        found = re.search(rf".*\b(?:{word})\b.*", text, re.IGNORECASE)
        assert found is None, f"say {instead!r}: {found[0].strip()}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_comments_and_messages_use_no_retired_words(path):
    words = "|".join((r"pictures?", r"the host('s)?", "chooses", "anew", "learnt", r"(is|are) refused"))
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        # One word alone is a name, and a value that is saved stays what it is.
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.strip().count(" ") > 1):
            text = re.sub(r"\{[^{}]*\}|`[^`]*`", "", token.string)
            found = re.search(rf".*\b(?:{words})\b.*", text, re.IGNORECASE)
            assert found is None, f"line {token.start[0]}: {found[0].strip()}"


@pytest.mark.parametrize(("name", "most"), [("CHANGELOG.md", 60), ("CONTRIBUTING.md", 200)])
def test_pages_are_read_in_a_few_minutes(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most
