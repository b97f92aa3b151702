"""`hf-aselect COMMAND`, called as from a shell, on a tiny real transformer."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version

import hf_aselect
from hf_aselect import DiTForImageClassification, DiTModel, TimestepSelection, cli
from hf_aselect.cli import main
from hf_aselect.hub.push import write_model_card

# Seconds to import, and not needed to print a few lines. accelerate and peft are not among them: transformers itself
# imports them.
HEAVY = ("datasets", "diffusers", "evaluate", "matplotlib")
# Before 5.23 transformers imports it where it is installed.
HEAVY += ("sklearn",) if Version(transformers.__version__) >= Version("5.23") else ()


@pytest.fixture
def folder(pictures, tmp_path):
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    return tmp_path


@pytest.fixture
def parquet(pictures, tmp_path):
    rows = {"photo": pictures, "thumbnail": pictures}
    Dataset.from_dict(rows).to_parquet(tmp_path / "pictures.parquet")
    return tmp_path / "pictures.parquet"


def run(*words):
    return main(["select", *map(str, words)])


def test_the_choice_is_printed_and_written_down(pixel_folder, folder, tmp_path, capsys):
    assert run(pixel_folder, "--images", folder, "--output", tmp_path / "report") == 0
    record = TimestepSelection.from_dict(json.loads((tmp_path / "report" / "selection.json").read_text()))
    assert record.num_images == 6
    shown = capsys.readouterr().out
    (chosen,) = [line for line in shown.splitlines() if line.endswith("<- selected")]
    assert chosen.split()[0] == str(record.timestep)
    assert f"Timestep {record.timestep} for query of block 1, confidence" in shown
    assert "from 6 given images in" in shown
    assert (tmp_path / "report" / "timestep_curve.png").stat().st_size > 1000


def without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_matplotlib_the_record_is_written_all_the_same(
    pixel_folder, folder, tmp_path_factory, capsys, monkeypatch
):
    without_matplotlib(monkeypatch)
    report = tmp_path_factory.mktemp("report")
    (report / "timestep_curve.png").write_text("of an earlier selection")
    assert run(pixel_folder, "--images", folder, "--timesteps", 10, 500, 700, "--output", report) == 0
    assert [path.name for path in report.iterdir()] == ["selection.json"]
    shown = capsys.readouterr()
    assert "There is no plot of the curve. Plots need matplotlib: pip install 'hf_aselect[demo]'\n" in shown.err
    assert f"Saved {report / 'selection.json'}." in shown.out


def test_without_matplotlib_the_demo_does_not_begin(tmp_path, capsys, monkeypatch):
    without_matplotlib(monkeypatch)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1
    assert "pip install 'hf_aselect[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("kind", ["diffusers", "hf_aselect"])
def test_the_advice_to_select_on_ones_own_images_works(pixel_folder, folder, tmp_path, caplog, kind):
    source = pixel_folder
    if kind == "hf_aselect":
        source = tmp_path / "source"
        DiTModel.from_pretrained(pixel_folder, timestep=5).save_pretrained(source)
    DiTModel.from_pretrained(source, timestep="auto")
    (said,) = [text for text in caplog.messages if "on images that the transformer generated" in text]
    command = re.search("`hf-aselect ([^`]*)`", said).group(1)
    output = tmp_path / "selected"
    words = command.replace("SELECTED", str(output)).replace("FOLDER", str(folder)).split()
    assert str(source) in words and main(words) == 0
    if kind == "diffusers":
        assert DiTModel.from_pretrained(output).config.selection["pictures"] == "given"


def test_options_reach_the_selection(pixel_folder, parquet, tmp_path):
    words = ("--criterion", "hfr", "--block", "-1", "--feature", "key", "--max-images", "4", "--seed", "3")
    words += ("--images", parquet, "--image-column", "photo", "--batch-size", "2", "--output", tmp_path)
    assert run(pixel_folder, *words) == 0
    record = json.loads((tmp_path / "selection.json").read_text())
    assert record["options"]["timesteps"] is None
    expected = {"criterion": "hfr", "block": 2, "feature": "key", "num_images": 4, "seed": 3}
    assert {name: record[name] for name in expected} == expected


def test_timesteps_and_confidence_reach_the_selection(pixel_folder, folder, tmp_path):
    words = ("--images", folder, "--timesteps", "10", "500", "--confidence", "0.5", "--output", tmp_path)
    assert run(pixel_folder, *words) == 0
    record = json.loads((tmp_path / "selection.json").read_text())
    assert record["timesteps"] == record["options"]["timesteps"] == [10, 500]
    assert record["options"]["confidence"] == 0.5


def test_the_choice_is_made_for_a_head(pixel_folder, folder, tmp_path):
    for head, pooling in (("linear", "mean"), ("attention", "mean_std")):
        assert run(pixel_folder, "--images", folder, "--head", head, "--output", tmp_path / head) == 0
        record = json.loads((tmp_path / head / "selection.json").read_text())
        assert record["settings"]["pooling"] == pooling


def test_with_labels_the_probe_compares_blocks_and_features(pixel_folder, pictures, tmp_path, capsys):
    rows = {"image": pictures * 7, "kind": list(range(6)) * 7}
    Dataset.from_dict(rows).to_parquet(tmp_path / "labelled.parquet")
    words = ("--images", tmp_path / "labelled.parquet", "--label-column", "kind", "--output", tmp_path / "report")
    assert run(pixel_folder, *words, "--block", "auto", "--feature", "auto") == 0
    record = json.loads((tmp_path / "report" / "selection.json").read_text())
    assert record["criterion"] == "probe"
    # Each image is there seven times, so that its class is known from the others.
    assert max(record["scores"]) == 1.0
    assert len(record["table"]) == 4
    assert (tmp_path / "report" / "timestep_curve_heat_map.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "timestep_curve_heat_map.png" in shown
    taps = shown.split("best timestep  smoothed score\n")[1].split("\n\n")[0].splitlines()
    assert len(taps) == 4
    assert taps[0].split()[:3] == [str(record[name]) for name in ("block", "feature", "timestep")]
    assert [line.endswith("<- selected") for line in taps] == [True, False, False, False]
    # What the resamples voted for need not be the highest.
    selection = TimestepSelection.from_dict(record)
    voted = next(timestep for timestep in record["timesteps"] if timestep != record["timestep"])
    cli._print_taps(replace(selection, timestep=voted))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    mean = selection.smoothed[record["timesteps"].index(voted)]
    (chosen,) = (row for row in rows if row[-1] == "selected")
    assert chosen[:4] == [str(selection.block), selection.feature, str(voted), f"{mean:.4f}"]
    assert rows == sorted(rows, key=lambda row: -float(row[3]))


def test_without_pictures_the_transformer_makes_its_own(pixel_folder, capsys):
    assert run(pixel_folder, "--max-images", "4") == 0
    assert "from 4 generated images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ("--criterion", "best"),
            "`criterion` must be one of hfr, signal_hfr, consensus, probe, patch_probe, got 'best'",
        ),
        (("--images", "missing.parquet"), "The file 'missing.parquet' does not exist."),
        (("--head", "round"), "`head` must be 'linear' or 'attention', got 'round'"),
        (("--block", "9"), "`block` must be in [-3, 3)"),
        (("--feature", "auto", "--criterion", "hfr"), "can only be compared by 'consensus', 'probe'"),
        (("--label-column", "kind"), "`--label-column` needs `--images`"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(pixel_folder, words, complaint, capsys):
    assert run(pixel_folder, *words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("hf-aselect: error: ")
    assert complaint in line


def test_a_block_that_is_no_number_is_refused(pixel_folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(pixel_folder, "--block", "first")
    assert "argument --block: must be an integer or auto, got 'first'" in capsys.readouterr().err


def test_a_column_that_is_not_there_is_named(pixel_folder, parquet, capsys):
    assert run(pixel_folder, "--images", parquet, "--image-column", "picture") == 1
    assert "have no column 'picture', only photo, thumbnail" in capsys.readouterr().err
    assert run(pixel_folder, "--images", parquet) == 1
    assert "exactly one image column" in capsys.readouterr().err


def test_convert_prints_what_it_made_and_dropped(latent_folder, tmp_path, capsys):
    assert main(["convert", str(latent_folder), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    for words in ("transformer", "VAE decoder, dropped", "text encoders, dropped", f"Saved {tmp_path / 'out'}: "):
        assert words in printed
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-size", "7"], "`image_size` must be a multiple of 4 pixels (a token's size), got 7."),
        (["--timestep-embedding", "wrong"], "Field 'timestep_embedding' expected one of"),
        (["--dtype", "int8"], "`dtype` must be one of float32, float16, bfloat16, got 'int8'."),
    ],
)
def test_convert_says_in_one_line_what_is_wrong(latent_folder, tmp_path, capsys, words, message):
    assert main(["convert", str(latent_folder), str(tmp_path / "out"), *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"hf-aselect: error: {message}")
    assert "Traceback" not in "".join(lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["0", "-1", "inf", "nan", "many"])
def test_a_shard_size_that_is_no_size_is_refused(latent_folder, tmp_path, capsys, size):
    with pytest.raises(SystemExit) as refused:
        main(["convert", str(latent_folder), str(tmp_path / "out"), "--max-shard-size", size])
    assert refused.value.code == 2
    assert f"argument --max-shard-size: must be a positive number, got '{size}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_fold_writes_a_model_that_reads_alike(classifier, tmp_path, capsys, pixels):
    classifier.config.timestep = 7
    classifier.save_pretrained(tmp_path / "whole")
    assert main(["fold", str(tmp_path / "whole"), str(tmp_path / "folded"), "--dtype", "float32"]) == 0
    assert "reads query of block 1 at timestep 7" in capsys.readouterr().out
    folded = DiTForImageClassification.from_pretrained(tmp_path / "folded")
    assert folded.config.folded
    with torch.no_grad():
        torch.testing.assert_close(folded(pixels).logits, classifier.eval()(pixels).logits, rtol=1e-4, atol=1e-5)
    assert "only this timestep can be read" in (tmp_path / "folded" / "README.md").read_text()
    assert (tmp_path / "folded" / "preprocessor_config.json").is_file()
    assert not list(tmp_path.glob(".*incomplete*"))


def test_fold_takes_what_diffusers_saved(pixel_folder, tmp_path):
    words = ["--timestep", "9", "--block", "-1", "--feature", "hidden", "--dtype", "bfloat16"]
    assert main(["fold", str(pixel_folder), str(tmp_path / "folded"), *words]) == 0
    folded = DiTModel.from_pretrained(tmp_path / "folded", dtype="auto")
    assert (folded.config.timestep, folded.config.feature, folded.dtype) == (9, "hidden", torch.bfloat16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No timestep is selected"),
        (["--timestep", "1000"], "`timestep` must be an integer in [0, 1000)"),
        (["--timestep", "3", "--feature", "mlp"], "`feature` must be one of"),
        (["--timestep", "3", "--dtype", "int8"], "`dtype` must be one of"),
    ],
)
def test_fold_says_in_one_line_what_is_wrong(pixel_folder, tmp_path, capsys, words, message):
    assert main(["fold", str(pixel_folder), str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fold_overwrites_nothing(pixel_folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["fold", str(pixel_folder), str(tmp_path), "--timestep", "3"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.fixture
def described(classifier, tmp_path):
    """A saved classifier with its card."""
    folder = tmp_path / "described"
    classifier.save_pretrained(folder)
    facts = {"dataset": "noise", "accuracy": 0.75, "training": {"epochs": 3}, "license": "mit"}
    write_model_card(classifier, folder, model_name="Clothes", **facts)
    return folder


def test_card_is_written_again_as_it_was(described, capsys):
    before = (described / "README.md").read_text(encoding="utf-8")
    assert main(["card", str(described)]) == 0
    assert capsys.readouterr().out == f"Saved {described / 'README.md'}.\n"
    assert (described / "README.md").read_text(encoding="utf-8") == before


def test_card_says_what_it_is_told_beside_what_was_known(described, tmp_path):
    words = [
        "--accuracy",
        "0.5",
        "0.7",
        "--name",
        "Shoes",
        "--limits",
        "Only shoes.",
        "--output",
        str(tmp_path / "new"),
    ]
    before = (described / "README.md").read_text(encoding="utf-8")
    assert main(["card", str(described), *words]) == 0
    text = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "# Shoes" in text and "60.0% (50.0% to 70.0%, 2 runs)" in text and "Only shoes." in text
    assert "| epochs | 3 |" in text and "\nlicense: mit\n" in text
    assert (described / "README.md").read_text(encoding="utf-8") == before


def test_card_draws_the_curve_of_the_choice(pixel_folder, pictures, tmp_path):
    model = DiTModel.from_pretrained(pixel_folder, timestep="auto", calibration_images=pictures)
    model.save_pretrained(tmp_path)
    assert main(["card", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "timestep_curve.png").is_file() and "(timestep_curve.png)" in text
    assert f"| timestep | {model.config.timestep} |" in text and "**Confidence.**" in text
    assert all(f"- {warning}\n" in text for warning in model.config.selection["warnings"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["card", "{}", "--accuracy", "75"], "'accuracy' must be in [0, 1]"),
        (["card", "{}/nothing"], "is not a folder. Pass the folder to write the card to as `--output`"),
        (["card", "{}/empty"], "is not an hf_aselect model"),
    ],
)
def test_card_says_in_one_line_what_is_wrong(described, words, complaint, capsys):
    (described / "empty").mkdir()
    before = (described / "README.md").read_text(encoding="utf-8")
    assert main([word.format(described) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and complaint in error
    assert (described / "README.md").read_text(encoding="utf-8") == before


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"hf_aselect {hf_aselect.__version__}\n"


def test_env_prints_what_belongs_in_a_bug_report(monkeypatch, capsys):
    def version(name):
        if name == "datasets":
            raise importlib.metadata.PackageNotFoundError(name)
        return f"1.2.{len(name)}"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["env"]) == 0
    rows = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["hf_aselect"] == hf_aselect.__version__
    assert rows["Python"] == platform.python_version() and rows["platform"] == platform.platform()
    assert rows["torch"] == "1.2.5" and rows["huggingface_hub"] == "1.2.15"
    assert rows["datasets"] == "not installed"
    assert rows["CPUs"] == str(os.cpu_count())
    assert {"transformers", "diffusers", "accelerate", "peft", "safetensors", "numpy"} <= rows.keys()


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, False, "cuda (2 × NVIDIA H200)"), (False, True, "mps"), (False, False, "none")],
)
def test_env_names_the_accelerator(monkeypatch, capsys, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert main(["env"]) == 0
    assert f"- accelerator: {expected}\n" in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["env"]])
def test_what_only_prints_imports_nothing_heavy(words):
    code = f"""
import sys
from hf_aselect.cli import main
try:
    main({words!r})
except SystemExit:
    pass
print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "code", "stream", "message"),
    [
        (["--help"], 0, "stdout", "usage: hf-aselect [-h] [--version] COMMAND ..."),
        (["env"], 0, "stdout", f"- hf_aselect: {hf_aselect.__version__}"),
        (["card", "no-such-folder"], 1, "stderr", "hf-aselect: error: 'no-such-folder' is not a folder"),
        (["no-such-command"], 2, "stderr", "usage: hf-aselect [-h] [--version] COMMAND ..."),
    ],
)
def test_the_module_runs_as_the_command(words, code, stream, message):
    result = subprocess.run([sys.executable, "-m", "hf_aselect", *words], capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert getattr(result, stream).startswith(message)


@pytest.mark.process
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["convert", "--help"], ["select", "--imagse", "x"]])
def test_help_waits_for_nothing(words):
    """Seconds of torch, transformers and diffusers are for commands that run."""
    command = [sys.executable, "-X", "importtime", "-m", "hf_aselect", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if "--imagse" not in words else 2), done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "hf_aselect" in imported
    assert not imported & {"torch", "transformers", "diffusers", "huggingface_hub", "numpy", "PIL", "safetensors"}


@pytest.mark.process
def test_the_command_has_all_public_names_when_it_runs():
    code = """
import sys
sys.argv[0] = "/usr/bin/hf-aselect"
import hf_aselect
assert "torch" not in sys.modules
for name in hf_aselect.__all__:
    getattr(hf_aselect, name)
from transformers import AutoConfig
assert AutoConfig.for_model("aselect_dit")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
