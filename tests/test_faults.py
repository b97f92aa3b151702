"""Whatever stops a run, the old state is there or the new one: kills, Ctrl-C, a full disk, folders that reject."""

import json
import os
import signal

import pytest
import torch
from forking import Forking, offline
from killing import OPERATIONS, PREAMBLE, TOKEN, environment_of, kill_often, left_overs, state_of
from safetensors import SafetensorError
from writable_hub import WritableHub, serve

from hf_aselect import DiTForImageClassification, DiTModel
from hf_aselect.checkpoints.atomic import whole_files, whole_folder
from hf_aselect.cli import main

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def hub():
    with serve(WritableHub({TOKEN: "me"})) as served:
        yield served


@pytest.fixture(scope="module")
def forking(hub, tmp_path_factory):
    """A process that has imported the package, and its environment."""
    environment = environment_of(hub, tmp_path_factory.mktemp("home"))
    server = Forking(environment)
    yield server, environment
    server.close()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kill_leaves_the_old_state_or_the_new_one(name, hub, forking):
    found = kill_often(name, 1, 7, hub, *forking)
    assert found["old"] + found["new"] == 1


# Files may not grow beyond a size: to whoever writes, a disk that is full. What is printed goes to a file, too.
FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("name", ["save", "save in shards", "convert", "fold", "select", "cache", "push"])
def test_a_full_disk_is_said_and_leaves_the_old_state(name, hub, forking, pixel_folder, tmp_path):
    server, environment = forking
    before, after = OPERATIONS[name]
    target = tmp_path / "place" / "target"
    target.parent.mkdir()
    hub.repos.clear()
    status, said = server.run(PREAMBLE + before, pixel_folder, target, environment=environment)
    assert status == 0, said
    old = state_of(name, target, hub)
    status, said = server.run(PREAMBLE + FULL + after, pixel_folder, target, environment=environment)
    assert status == 1
    assert "too large" in said.lower(), said[-2000:]
    if "main(" in after:
        assert said.count("hf-aselect: error: ") == 1
        assert "File too large" in said.split("hf-aselect: error: ")[1].splitlines()[0]
    assert state_of(name, target, hub) == old
    if name != "cache":  # whose parts are gone on with
        assert not left_overs(target.parent)
    status, said = server.run(PREAMBLE + after, pixel_folder, target, environment=environment)
    assert status == 0, said
    assert state_of(name, target, hub) != old


@pytest.mark.parametrize("command", ["select", "fold"])
def test_ctrl_c_is_one_line_and_leaves_nothing(command, forking, pixel_folder, tmp_path):
    """The signal comes when the work has begun."""
    server, environment = forking
    code = """
import os, signal, sys, threading
from hf_aselect.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is off in what a shell runs in the background
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
raise SystemExit(main(sys.argv[1:]))
"""
    words = {
        "select": ["select", pixel_folder, "--output", tmp_path / "out", "--max-images", "4096"],
        "fold": ["fold", pixel_folder, tmp_path / "out", "--timestep", "auto"],
    }
    status, said = server.run(code, *words[command], environment=environment)
    assert status == 130
    assert said.splitlines()[-1] == "hf-aselect: interrupted; existing files were left unchanged"
    assert "Traceback" not in said and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_that_may_not_be_written_is_said(classifier, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        classifier.save_pretrained(tmp_path / "closed")
    with pytest.raises(PermissionError):
        classifier.save_pretrained(tmp_path / "closed" / "inner")


@pytest.mark.parametrize("place", ["/proc/1", "/sys"])
@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs Linux's file systems that take no files")
def test_a_place_that_takes_no_files_is_said(classifier, pixel_folder, place, capsys):
    with pytest.raises(OSError):
        classifier.save_pretrained(f"{place}/model")
    assert main(["fold", str(pixel_folder), f"{place}/model", "--timestep", "5"]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("hf-aselect: error: ") and place in error.splitlines()[-1]


def test_what_killed_processes_left_is_removed_and_said(tmp_path, caplog):
    code = """
import os, signal, sys
from pathlib import Path
from hf_aselect.cli import main
from hf_aselect.checkpoints.atomic import whole_files, whole_folder
with whole_folder(Path(sys.argv[1]) / "a*"), whole_files(Path(sys.argv[1]) / "b"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert offline().run(code, tmp_path)[0] == -signal.SIGKILL
    assert len(left_overs(tmp_path)) == 2
    stranger = tmp_path / ".a*.incomplete-elsewhere-1-00"  # of another machine: it may be at work
    stranger.mkdir()
    # Two of one process do not take each other for left over.
    a, b = tmp_path / "a*", tmp_path / "b"
    with whole_folder(a) as first, whole_files(b) as second, whole_files(b) as third:
        assert len({first, second, third}) == 3 and second.is_dir()
    assert left_overs(tmp_path) == [str(stranger)]
    assert caplog.text.count("which an interrupted process left incomplete") == 2


def test_saving_over_a_save_with_more_shards_leaves_one_set_of_weights(classifier, tmp_path):
    classifier.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model_of_mine.safetensors").write_bytes(b"mine")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    classifier.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
    assert names == ["model.safetensors", "model_of_mine.safetensors"]
    classifier.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in classifier.state_dict().items())


def test_a_save_that_fails_leaves_what_was_there(classifier, tmp_path, monkeypatch, capsys):
    classifier.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_args, **_kwargs):
        raise SafetensorError("no space left")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    assert main(["fold", str(tmp_path), str(tmp_path / "folded")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "hf-aselect: error: no space left"
    classifier.config.timestep = 7
    with pytest.raises(SafetensorError):
        classifier.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert DiTModel.from_pretrained(tmp_path).config.timestep != 7


def test_a_save_that_was_killed_while_files_moved_is_ended_on_loading(classifier, tmp_path, caplog):
    code = """
import os, signal, sys
from hf_aselect import DiTForImageClassification
from hf_aselect.checkpoints import atomic as whole_folder
model = DiTForImageClassification.from_pretrained(sys.argv[1])
model.config.timestep = 7
moved = []

def move(source, target, replace=os.replace):
    if ".incomplete-" in str(source) and ".complete" not in str(source):
        if moved:
            os.kill(os.getpid(), signal.SIGKILL)
        moved.append(source)
    replace(source, target)

os.replace = move
model.save_pretrained(sys.argv[1])
"""
    classifier.save_pretrained(tmp_path, max_shard_size="20KB")
    assert offline().run(code, tmp_path)[0] == -signal.SIGKILL
    assert json.loads((tmp_path / "config.json").read_text())["timestep"] == 7
    assert not (tmp_path / "model.safetensors").exists()  # of the old state and the new one
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert "Completing an interrupted save" in caplog.text
    assert again.config.timestep == 7 and (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("model-*")) and not left_overs(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in classifier.state_dict().items())


def test_nothing_is_removed_where_nothing_was_written(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"old")
    with whole_files(tmp_path, r"model\.safetensors"):
        pass
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"
