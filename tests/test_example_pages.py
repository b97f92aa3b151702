"""The pages of the examples name what is there, their commands take the options that they give, their code runs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import example
from transformers import TrainingArguments

from hf_aselect import ASelectConfig
from hf_aselect.cli import _parser, main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/README.md"))
SCRIPTS = sorted(EXAMPLES.glob("*/*.py"))
PAGES = [EXAMPLES / "README.md", *(folder / "README.md" for folder in FOLDERS)]
TEXTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "model_cards").glob("*/README.md"),
    *PAGES,
    *SCRIPTS,
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "src").rglob("*.md"),
    ROOT / "setup.cfg",
    ROOT / "pyproject.toml",
]


def name_of(path):
    return str(path.relative_to(ROOT))


def commands_of(page):
    """The words of each command on a page, or at the head of a script, that runs a script."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ *(?:python|accelerate launch|torchrun)\b.*$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith(".py")]
        if scripts and "..." not in words:
            yield scripts[0], words[words.index(scripts[0]) + 1 :]


def test_each_folder_has_a_page_and_the_index_names_it():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        folder.name for folder in FOLDERS
    }
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [folder.name for folder in FOLDERS if f"({folder.name}/README.md)" not in index] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_each_script_is_on_its_page_and_in_the_index(script):
    assert script.name in (script.parent / "README.md").read_text(encoding="utf-8")
    if script.parent.name != "benchmarks":
        assert f"`{script.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_each_page_says_where_its_commands_are_run():
    pages = [page for page in PAGES if page.parent.name != "space"]  # that one is the Space's own front page
    assert all("from the root of the repository" in page.read_text(encoding="utf-8") for page in pages)


def test_examples_lie_where_texts_say():
    for text in TEXTS:
        for name in re.findall(r"\bexamples/[\w/]+\.(?:py|yaml|md)\b", text.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{name_of(text)} names {name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES, *SCRIPTS], ids=name_of)
def test_commands_give_options_that_their_script_takes(page):
    shared = {*vars(TrainingArguments(report_to="none")), *ASelectConfig().to_dict()}
    for script, words in commands_of(page):
        # A script takes the options of one beside it whose arguments it imports.
        source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / script).parent.glob("*.py"))
        for option in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
            assert option in shared or re.search(rf"\b{option}\b", source), f"{script} has no --{option}"


# A block of code, and why it is not run.
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)
# Those with Python.
GUIDES = [ROOT / "README.md", *(page for page in PAGES if "```python" in page.read_text(encoding="utf-8"))]


def blocks_of(page, language):
    """The code of the blocks of a page that are to be run."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [block["code"] for block in blocks if block["language"] == language and not block["reason"]]


def run_code_of(page, folder, monkeypatch):
    """Run the Python of a page in a folder that has the sources as the root of the repository has them."""
    (folder / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(folder)
    scope = {}
    for code in blocks_of(EXAMPLES / page, "python"):
        exec(compile(code, str(page), "exec"), scope)
    return scope


# The others have tests of their own.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by its old name
@pytest.mark.parametrize(
    "page",
    [page for page in GUIDES if page.parent.name not in ("features", "semantic_segmentation")],
    ids=name_of,
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    scope = run_code_of(page, tmp_path, monkeypatch)
    assert scope["model"].config.num_labels == 10
    if page.parent == ROOT:
        # The quickstart fits a working classifier.
        assert len(re.findall(r"\S.*\n", blocks_of(page, "python")[0])) <= 17
        assert scope["fit"].evaluation["accuracy"] > 0.7


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 220
    # It is the page of PyPI, too, where relative links lead nowhere.
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    for link in links:
        found = re.match(
            r"https://(?:raw\.githubusercontent|github)\.com/hf-aselect/hf_aselect/(?:blob/)?main/(.+)", link
        )
        assert found is None or (ROOT / found[1]).is_file(), link


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name_of)
def test_relative_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def commands_in(page):
    """The words of each `hf-aselect` command of a page."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        for line in block["code"].splitlines():
            if line.startswith("hf-aselect "):
                yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name_of)
def test_commands_of_hf_aselect_are_understood(page):
    for words in commands_in(page):
        assert _parser().parse_args(words)


@pytest.mark.parametrize("number", range(4))
def test_the_command_line_of_its_page_runs(number, tmp_path, monkeypatch, fitted_by_command):
    words = list(commands_in(EXAMPLES / "command_line" / "README.md"))[number]
    monkeypatch.chdir(fitted_by_command)
    # The second one has run already.
    assert number == 1 or main(words) == 0


@pytest.fixture(scope="module")
def fitted_by_command(tmp_path_factory):
    """A folder in which the page's `fit` was run."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "src").symlink_to(ROOT / "src")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(list(commands_in(EXAMPLES / "command_line" / "README.md"))[1]) == 0
    return folder


def test_the_page_of_features_caches_and_folds(tmp_path, monkeypatch, capsys):
    scope = run_code_of("features/README.md", tmp_path, monkeypatch)
    assert len(scope["features"]) == 64 and "features" in scope["features"].column_names
    assert scope["folded"].config.folded and (tmp_path / "fashion-folded" / "model.safetensors").is_file()
    assert re.fullmatch(r"\d\d% of the weights\n", capsys.readouterr().out)


def test_the_page_of_segmentation_makes_masks(tmp_path, monkeypatch):
    clothes = run_code_of("semantic_segmentation/README.md", tmp_path, monkeypatch)["clothes"]
    assert (tmp_path / "fashion-masks.parquet").is_file()
    mask = clothes[0]["annotation"]
    assert mask.size == clothes[0]["image"].size and np.unique(mask).tolist() == [0, 1]


@pytest.mark.parametrize("criterion", ["hfr", "probe"])
def test_selecting_a_timestep_leaves_a_record_and_a_plot(
    criterion, pixel_folder, pictures, tmp_path, capsys, monkeypatch
):
    for index, picture in enumerate(pictures * 2):
        (tmp_path / "images" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "images" / str(index % 2) / f"{index}.png")
    words = ["--model_name_or_path", str(pixel_folder), "--images", str(tmp_path / "images"), "--criterion", criterion]
    words += ["--output_dir", str(tmp_path / "report"), "--block", "0"]
    words += ["--label_column", "label"] if criterion == "probe" else []
    monkeypatch.setattr(sys, "argv", ["select_timestep.py", *words])
    example("selection/select_timestep.py").main()
    record = json.loads((tmp_path / "report" / "selection.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"Timestep {record['timestep']} for query of block 0, confidence ")
    assert [line.removeprefix("Warning: ") for line in lines[:-1]] == record["warnings"]
    assert (tmp_path / "report" / "timestep_curve.png").is_file()


@pytest.mark.process
def test_a_script_is_found_from_another_folder(tmp_path):
    script = EXAMPLES / "selection" / "select_timestep.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--criterion" in done.stdout
