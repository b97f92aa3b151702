"""What `SECURITY.md` promises: no pickles, no code of others, nothing read or written outside of what was named."""

import ast
import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bad_input_table import adapter_pickle, huge_header
from fuzz.fuzz_parsers import fuzz, parsers
from pipelines import pixart_sigma
from safetensors.torch import load_file, save_file

import hf_aselect
from hf_aselect import DiTForImageClassification, DiTModel
from hf_aselect.checkpoints.atomic import finish_files
from hf_aselect.checkpoints.weight_files import tensor_bytes, weight_files
from hf_aselect.model.checks import PickledWeightsError

PACKAGE = Path(hf_aselect.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# The one place where a pickle is read, by torch's reader of weights alone; what is imported of `pickle` is its error.
PICKLES = PACKAGE / "checkpoints" / "research.py"
INDEX = "model.safetensors.index.json"
# By name, called or taken from their modules: they run code, or unpickle, which does.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *("os.system", "os.popen", "os.execv", "os.spawnv", "os.posix_spawn", "runpy.run_path"),
    *(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "marshal.loads",
        "shelve.open",
        "torch.load",
        "torch.hub.load",
    ),
    *("yaml.load", "yaml.unsafe_load", "numpy.load", "np.load", "joblib.load", "tarfile.open", "zipfile.ZipFile"),
    *("shutil.unpack_archive", "ctypes.CDLL"),
}
STARTS = ("os.exec", "os.spawn", "os.posix_spawn", "asyncio.create_subprocess", "torch.multiprocessing")
UNUSED_MODULES = {
    "cloudpickle",
    "dill",
    "multiprocessing",
    "ctypes",
    "joblib",
    "marshal",
    "pickle",
    "runpy",
    "shelve",
    "subprocess",
    "tarfile",
    "yaml",
    "zipfile",
}


def names_in(tree):
    """Yield (dotted name, line) of all that is named, by the modules' own names whatever they are imported as."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = ast.unparse(node).partition(".")
            yield f"{known.get(first, first)}{dot}{rest}", node.lineno


def dangers_in(source):
    """Return what runs code or a shell, or unpickles."""
    tree = ast.parse(source)
    found = [(name, line) for name, line in names_in(tree) if name in FORBIDDEN or name.startswith(STARTS)]
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        # An exception's class opens nothing.
        if isinstance(node, ast.ImportFrom) and ast.unparse(node) != "from zipfile import BadZipFile"
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    modules = [each.args[0] for each in calls if ast.unparse(each.func).endswith("import_module")]
    keywords = {(each.arg, ast.unparse(each.value)) for each in ast.walk(tree) if isinstance(each, ast.keyword)}
    return [
        *found,
        *sorted(imported & UNUSED_MODULES),
        # The package's own modules are all that a name is made for.
        *(word for module in modules if not (word := ast.unparse(module)).startswith(("'", '"', "f'hf_aselect."))),
        *sorted(keywords & {("shell", "True"), ("trust_remote_code", "True"), ("use_safetensors", "False")}),
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_runs_code_or_a_shell_or_unpickles(path):
    found = dangers_in(path.read_text(encoding="utf-8"))
    if path == PICKLES:
        assert [each if isinstance(each, str) else each[0] for each in found] == ["torch.load", "pickle"]
    else:
        assert found == []


def test_the_one_reader_of_pickles_reads_weights_only():
    tree = ast.parse(PICKLES.read_text(encoding="utf-8"))
    (call,) = (
        each for each in ast.walk(tree) if isinstance(each, ast.Call) and ast.unparse(each.func) == "torch.load"
    )
    given = {each.arg: ast.unparse(each.value) for each in call.keywords}
    assert given["weights_only"] == given["mmap"] == "True"
    of_pickle = [name for name, _ in names_in(tree) if name.startswith("pickle.")]
    assert of_pickle == ["pickle.UnpicklingError"]
    # Who has it read one: the conversion, where it is allowed.
    readers = [path for path in SOURCES if "research_file(" in path.read_text(encoding="utf-8")]
    assert [path.name for path in readers] == ["convert.py", "research.py"]


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import os\nos.system('x')",
        "import os as o\no.execvp('x', [])",
        "from os import system as s\ns('x')",
        "from torch import load\nload('x', weights_only=False)",
        "import dill",
        "import subprocess",
        "from multiprocessing import Process",
        "import asyncio\nasyncio.create_subprocess_shell('x')",
        "import importlib\nimportlib.import_module(name)",
        "run(shell=True)",
        "from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_what_runs_code_is_seen(source):
    assert dangers_in(source)


class Canary:
    """A pickle that leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A pickle, and where it sings; nothing may try to unpickle it."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    return pickle.dumps(Canary(tmp_path / "sang")), tmp_path / "sang"


@pytest.fixture
def in_shards(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    return tmp_path / "model"


def with_index(folder, weight_map):
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**content, "weight_map": weight_map(content["weight_map"])}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "evil.pt", "model.ckpt", "model.safetensors.bin"])
def test_an_index_cannot_name_pickles(in_shards, canary, name):
    (in_shards / name).write_bytes(canary[0])
    with_index(in_shards, lambda names: dict.fromkeys(names, name))
    with pytest.raises(ValueError, match="only safetensors files in the same folder are read"):
        DiTForImageClassification.from_pretrained(in_shards)
    assert not canary[1].exists()


def test_shards_of_other_names_are_refused_wherever_they_come_from(in_shards, canary, monkeypatch):
    # Of a repository of the Hub the index is read by transformers alone.
    monkeypatch.setattr("hf_aselect.model.modeling_aselect.check_files", lambda *_: None)
    (in_shards / "pytorch_model.bin").write_bytes(canary[0])
    with_index(in_shards, lambda names: {**names, next(iter(names)): "pytorch_model.bin"})
    with pytest.raises(PickledWeightsError, match=r"pickles can run any code.*got pytorch_model\.bin"):
        DiTForImageClassification.from_pretrained(in_shards)
    assert not canary[1].exists()


def test_an_adapter_that_is_a_pickle_is_not_loaded(classifier, canary, tmp_path):
    classifier.save_pretrained(tmp_path / "model")
    adapter_pickle(tmp_path / "model")
    (tmp_path / "model" / "adapter_model.bin").write_bytes(canary[0])
    with pytest.raises(PickledWeightsError, match=r"got adapter_model\.bin"):
        DiTForImageClassification.from_pretrained(tmp_path / "model")
    assert not canary[1].exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "{}/secret.safetensors", "in/../../secret.safetensors", ".."]
)
def test_an_index_cannot_leave_its_folder(in_shards, tmp_path, name):
    weights = {key: value for shard in in_shards.glob("*.safetensors") for key, value in load_file(shard).items()}
    save_file(weights, tmp_path / "secret.safetensors", {"format": "pt"})
    (in_shards / "in").mkdir()
    with_index(in_shards, lambda names: dict.fromkeys(names, name.format(tmp_path)))
    with pytest.raises(ValueError, match="only safetensors files in the same folder are read"):
        DiTForImageClassification.from_pretrained(in_shards)
    diffusers_index = in_shards / "diffusion_pytorch_model.safetensors.index.json"
    diffusers_index.write_text((in_shards / INDEX).read_text())
    with pytest.raises(ValueError, match="only safetensors files in the same folder are read"):
        weight_files(in_shards)


def test_a_link_is_followed_and_what_it_leads_to_is_not_told(pixel_folder, tmp_path):
    """The cache of the Hub is made of links, so they are read; as safetensors, and as nothing else."""
    (tmp_path / "secret").write_text("the secret words")
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text((pixel_folder / "transformer" / "config.json").read_text())
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.symlink_to(pixel_folder / "transformer" / weights.name)
    assert DiTModel.from_pretrained(folder, timestep=5).config.timestep == 5
    weights.unlink()
    weights.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a text file instead of a safetensors file") as refused:
        DiTModel.from_pretrained(folder, timestep=5)
    assert "secret words" not in str(refused.value)


def test_a_gigantic_header_takes_no_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    huge_header(path)
    os.truncate(path, 2**40)  # of which nothing is on the disk
    assert tensor_bytes([path]) == {}


@pytest.mark.parametrize("name", ["../mine.txt", "{}/mine.txt", "model.safetensors/../../mine.txt"])
def test_a_note_in_a_folder_of_others_removes_nothing_elsewhere(tmp_path, name):
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "model"
    host = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in socket.gethostname())
    left_over = folder / f".incomplete-{host}-999999999-00000000"
    left_over.mkdir(parents=True)
    (left_over / ".complete").write_text(json.dumps([name.format(tmp_path)]))
    with pytest.raises(ValueError, match=r"was not written by hf_aselect: it names .* which is not in its folder"):
        finish_files(folder)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": ["evil", "Evil"]},
        {"scheduler": ["evil", "Evil"]},
        {"_class_name": ["evil", "Evil"]},
        {"text_encoder": ["transformers", "Evil"]},
        {"tokenizer": ["os", "system"]},
    ],
)
def test_a_pipeline_brings_no_code(tmp_path, change, monkeypatch):
    folder = tmp_path / "pipe"
    pixart_sigma().save_pretrained(folder)
    code = f"import os\nos.mkdir({str(tmp_path / 'sang')!r})\nclass Evil: pass\n"
    for part in (".", "tokenizer", "scheduler", "text_encoder"):
        (folder / part / "evil.py").write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    monkeypatch.syspath_prepend(str(folder))  # as if it were started there
    with pytest.raises(ValueError, match=r"only classes of diffusers|is never run|could not be loaded"):
        DiTModel.from_pretrained(folder, timestep=5)
    assert not (tmp_path / "sang").exists()
    assert "evil" not in sys.modules


# What a process opens to write, makes, moves or removes, with the folder that it was made in.
WATCHED = """
import json, os, sys
seen = set()
def watch(event, given):
    if event == "open" and isinstance(given[0], str):
        mode, flags = given[1], given[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (mode is None and flags & (os.O_WRONLY | os.O_RDWR)):
            seen.add(os.path.abspath(given[0]))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link", "os.truncate"):
        # What is relative to an open folder is of that folder, whose name was seen when it was made.
        seen.update(os.path.abspath(path) for path in given[:2] if isinstance(path, str) and given[-1] in (-1, None))
sys.addaudithook(watch)
from hf_aselect.cli import main
codes = [main(words) for words in json.loads(sys.argv[1])]
print("WATCHED", json.dumps([codes, sorted(seen)]))
"""


@pytest.mark.process
def test_files_are_written_in_the_folder_that_was_named_alone(pixel_folder, classifier, pictures, tmp_path):
    for name in ("here", "home", "temporary", "named", "pictures"):
        (tmp_path / name).mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "pictures" / f"{number}.png")
    named = tmp_path / "named"
    classifier.save_pretrained(tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    commands = [
        ["convert", str(pixel_folder), str(named / "converted")],
        ["fold", str(tmp_path / "model"), str(named / "folded")],
        ["card", str(tmp_path / "model"), "--output", str(named / "card")],
        ["select", str(pixel_folder), "--images", str(tmp_path / "pictures"), "--output", str(named / "report")],
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment = kept | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TQDM_DISABLE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path / "here",
        env=environment,
        check=False,
    )
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("WATCHED ")] or [finished.stderr]
    codes, seen = json.loads(line.removeprefix("WATCHED "))
    assert codes == [0, 0, 0, 0]
    # Libraries keep caches at home (datasets, matplotlib) and work in the folder for temporary files, torch in one of
    # a fixed name; and there are devices.
    own = [str(named), str(tmp_path / "home"), str(tmp_path / "temporary"), "/dev/", "/proc/"]
    assert [path for path in seen if not path.startswith(tuple(own)) and "torchinductor" not in path] == []
    assert not list((tmp_path / "here").iterdir()) and not list((tmp_path / "temporary").iterdir())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    assert sorted(path.name for path in named.iterdir()) == ["card", "converted", "folded", "report"]


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(parsers()))
def test_a_parser_refuses_what_it_does_not_take(name):
    found = fuzz(name, executions=200, seconds=5, seed=1)
    assert found.failures == []
    assert found.executions >= 20
    # A parser that rejects everything has not been tried.
    assert found.taken > 0


def test_a_parser_that_hangs_is_noticed(monkeypatch):
    """Whatever it swallows: the alarm is no `Exception`."""

    def hang(_):
        with contextlib.suppress(Exception):
            time.sleep(5)

    monkeypatch.setattr("fuzz.fuzz_parsers.TIMEOUT", 0.05)
    monkeypatch.setattr("fuzz.fuzz_parsers.tap", hang)
    found = fuzz("tap", executions=2, seconds=5, seed=1)
    assert [str(error) for _, error in found.failures] == ["more than 0.05 s"] * 2


def test_the_size_of_a_tensor_of_any_dtype_is_known(tmp_path):
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    kinds += [torch.int64, torch.uint8, torch.bool, torch.complex64]
    tensors = {str(kind): torch.zeros(3, 5, dtype=kind) for kind in kinds} | {"none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    sizes = tensor_bytes([tmp_path / "x.safetensors"])
    assert sizes == {name: value.nbytes for name, value in tensors.items()}
