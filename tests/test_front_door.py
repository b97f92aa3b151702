"""What a contributor meets first: hooks, workflow and forms fit what setup.cfg and the tree say."""

import configparser
import re
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


HOOKS = load(ROOT / ".pre-commit-config.yaml")
WORKFLOW = load(GITHUB / "workflows" / "ci.yml")
JOBS = WORKFLOW["jobs"].values()


def steps_of(job, key):
    return [step[key] for step in job["steps"] if key in step]


def bounds_of(requirement):
    """The versions that setup.cfg allows of a tool of the `dev` extra."""
    (bounds,) = re.findall(rf"^{requirement}([<>=].*)$", SETUP["options.extras_require"]["dev"], re.MULTILINE)
    return SpecifierSet(bounds)


def pythons_of(job):
    """The versions of Python that a job runs on."""
    matrix = job.get("strategy", {}).get("matrix", {}).get("python-version", [])
    named = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    return [version for version in [*matrix, *named] if not version.startswith("${{")]


def test_the_hooks_ruff_is_the_one_of_setup_cfg():
    (ruff,) = (repo for repo in HOOKS["repos"] if repo["repo"].endswith("ruff-pre-commit"))
    assert ruff["rev"].removeprefix("v") in bounds_of("ruff")
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


def test_mypy_is_run_from_the_environment_that_setup_cfg_makes():
    (local,) = (repo for repo in HOOKS["repos"] if repo["repo"] == "local")
    (hook,) = local["hooks"]
    assert (hook["entry"], hook["language"], hook["pass_filenames"]) == ("mypy", "system", False)
    assert bounds_of("mypy")


def test_the_workflow_runs_on_the_versions_of_python_that_setup_cfg_allows():
    required = SpecifierSet(SETUP["options"]["python_requires"])
    versions = {version for job in JOBS for version in pythons_of(job)}
    assert versions == {"3.11", "3.12", "3.13"}
    assert all(version in required for version in versions)
    # The lowest versions of all else are tried on the lowest Python.
    (lowest,) = pythons_of(WORKFLOW["jobs"]["lowest-versions"])
    assert lowest in required and f"3.{int(lowest.split('.')[1]) - 1}" not in required


def test_the_workflow_may_read_and_ends():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "group" in WORKFLOW["concurrency"]
    assert all("permissions" not in job and job["timeout-minutes"] <= 90 for job in JOBS)
    for job in JOBS:
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in steps_of(job, "uses"))


def test_the_workflow_checks_what_contributing_asks_for():
    commands = steps_of(WORKFLOW["jobs"]["quality"], "run")
    assert {"ruff check .", "ruff format --check .", "mypy"} <= set(commands)
    assert "pytest --numprocesses 2 --dist loadfile" in steps_of(WORKFLOW["jobs"]["tests"], "run")


@pytest.mark.parametrize("path", [GITHUB / "workflows" / "ci.yml", *FORMS, GITHUB / "pull_request_template.md"])
def test_the_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:src|tests|examples)/[\w/.-]*\w", text)
    named += [name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "setup.cfg") if name in text]
    assert named or path.name == "feature_request.yml"
    assert not [name for name in named if not (ROOT / name).exists()]


def requirements(text):
    found = [re.fullmatch(r"([\w.-]+)(.*)", line.strip()) for line in text.splitlines() if line.strip()]
    return {line[1]: line[2] for line in found if line and not line[0].startswith("hf_aselect")}


def test_bounds_are_wide_and_closed():
    """Each is from the oldest version that was tried to before one that may break; a minor version is no reason."""
    extras = SETUP["options.extras_require"]
    every = requirements(SETUP["options"]["install_requires"])
    for extra in ("train", "demo", "peft", "export", "test"):
        every |= requirements(extras[extra])
    for name, bounds in every.items():
        operators = {each.operator for each in SpecifierSet(bounds)}
        assert ">=" in operators and operators & {"<", "<="}, name
    assert SpecifierSet(every["transformers"]).contains("5.18") and SpecifierSet(every["torch"]).contains("2.6")
    # The minor version after the newest that the tests ran with; a nightly run says what becomes of it.
    assert SpecifierSet(every["diffusers"]).contains("0.43")
    # Siblings: what older scikit-learn, matplotlib and pyarrow were shut out for were warnings of tests.
    for name, oldest in {"scikit-learn": "1.6", "matplotlib": "3.9", "pyarrow": "21"}.items():
        assert SpecifierSet(every[name]).contains(oldest), name


def test_training_installs_nothing_that_the_demo_alone_needs():
    extras = SETUP["options.extras_require"]
    assert not requirements(extras["train"]).keys() & {"scikit-learn", "scipy", "matplotlib", "threadpoolctl"}
    assert "hf_aselect[train]" in extras["demo"] and "scikit-learn" in requirements(extras["demo"])
    # A sibling: torchvision, gradio and onnx come with extras of their own.
    others = {"torchvision", "gradio", "onnx", "peft"}
    assert not (requirements(SETUP["options"]["install_requires"]) | requirements(extras["train"])).keys() & others


def test_extras_that_the_workflow_installs_exist():
    extras = re.findall(r"\.\[(\w+)\]", (GITHUB / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert extras and set(extras) <= set(SETUP["options.extras_require"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_for(path):
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_a_bug_report_asks_for_versions_and_an_example():
    required = {
        field["id"]: field["attributes"]
        for field in load(GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml")["body"]
        if field.get("validations", {}).get("required")
    }
    assert "hf-aselect env" in required["environment"]["description"]
    assert "example" in required
