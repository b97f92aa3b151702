"""Models are pushed to a Hub by the real client, and loaded by strangers: with the package, and without it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forking import SCRIPT, Forking
from huggingface_hub import ModelCard
from PIL import Image
from writable_hub import WritableHub, serve

from hf_aselect import ASelectImageProcessor
from hf_aselect.hub.push import write_model_card
from hf_aselect.model.configuration_aselect import AUTO_MAP

pytestmark = pytest.mark.process

TOKEN = "hf_goodgoodgoodgoodgood"
KINDS = {
    "classifier": "DiTForImageClassification",
    "segmenter": "DiTForSemanticSegmentation",
    "backbone": "DiTBackbone",
    "tokens": "DiTModel",
    "folded": "DiTForImageClassification",
}
AUTO = {
    "classifier": "AutoModelForImageClassification",
    "segmenter": "AutoModelForSemanticSegmentation",
    "backbone": "AutoBackbone",
    "tokens": "AutoModel",
    "folded": "AutoModelForImageClassification",
}

READ = """
import json
import torch
pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

def outputs(model):
    with torch.no_grad():
        found = model.eval()(pixels)
    for name in ("logits", "last_hidden_state", "feature_maps"):
        if getattr(found, name, None) is not None:
            value = found[name]
            return value[-1] if isinstance(value, tuple) else value
"""

PUSH = (
    READ
    + """
import sys
import hf_aselect
folder, output = sys.argv[1:3]
fields = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1}
for name, kind in json.loads(sys.argv[3]).items():
    torch.manual_seed(0)
    model = getattr(hf_aselect, kind).from_pretrained(folder, timestep=5, num_labels=3, **fields)
    model = model.fold() if name == "folded" else model
    info = model.push_to_hub(f"me/{name}", tags=["mine"], dataset="noise", accuracy=0.5)
    torch.save(outputs(model), f"{output}/{name}.pt")
"""
)

LOAD = (
    READ
    + """
import sys
import transformers
output, trust = sys.argv[1], sys.argv[2] == "trust"
for name, auto in json.loads(sys.argv[4]).items():
    options = {"trust_remote_code": True} if trust else {}
    model = getattr(transformers, auto).from_pretrained(f"me/{name}", **options)
    processor = transformers.AutoImageProcessor.from_pretrained(f"me/{name}", **options)
    found = outputs(model), type(model).__module__, type(processor).__module__
    torch.save(found, f"{output}/{name}-{sys.argv[3]}.pt")
"""
)


def environment(hub, home, token=TOKEN):
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    given |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return given | ({"HF_TOKEN": token} if token else {})


def python(code, *words, hub, home, token=TOKEN, without=(), fails=False):
    """Run code in a process of its own, where some packages cannot be imported; return what it says.

    Where all packages can be, or all but ours, it is a fork of one that has imported them.
    """
    if tuple(without) == ("hf_aselect",):
        status, said = hub.stranger.run(code, *words, environment=environment(hub, home, token))
    elif without:
        blocked = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in without)
        command = [sys.executable, "-c", blocked + code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(hub, home, token))
        status, said = done.returncode, done.stdout + done.stderr
    else:
        status, said = hub.forking.run(code, *words, environment=environment(hub, home, token))
    assert (status != 0) == fails, said[-3000:]
    return said


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(WritableHub({TOKEN: "me", "hf_other": "other"})) as served:
        given = environment(served, tmp_path_factory.mktemp("home"), None)
        served.forking, served.stranger = Forking(given), Forking(given, without_us=True)
        yield served
        served.forking.close()
        served.stranger.close()


@pytest.fixture(scope="module")
def pushed(hub, pixel_folder, tmp_path_factory):
    """What was computed before the push, in a folder; all kinds are on the hub."""
    output = tmp_path_factory.mktemp("pushed")
    said = python(PUSH, pixel_folder, output, json.dumps(KINDS), hub=hub, home=output / "home")
    assert TOKEN not in said
    return output


@pytest.fixture(scope="module")
def loaded(hub, pushed):
    """What strangers computed: with the package, without it, and, of what is folded, without diffusers either."""
    without = ["hf_aselect"]
    every, folded = json.dumps(AUTO), json.dumps({"folded": AUTO["folded"]})
    options = {"hub": hub, "token": None}
    python("import hf_aselect\n" + LOAD, pushed, "", "with", every, home=pushed / "home-1", **options)
    python(LOAD, pushed, "trust", "without", every, home=pushed / "home-2", without=without, **options)
    without = ["hf_aselect", "diffusers"]
    python(LOAD, pushed, "trust", "bare", folded, home=pushed / "home-3", without=without, **options)
    return pushed


@pytest.mark.parametrize("way", ["with", "without"])
@pytest.mark.parametrize("name", KINDS)
def test_a_stranger_computes_what_the_owner_did(loaded, name, way):
    expected = torch.load(loaded / f"{name}.pt")
    found, of_model, of_processor = torch.load(loaded / f"{name}-{way}.pt")
    assert torch.equal(found, expected)
    package = "hf_aselect." if way == "with" else "transformers_modules."
    assert of_model.startswith(package) and of_processor.startswith(package)


def test_a_folded_model_needs_neither_the_package_nor_diffusers(loaded):
    assert torch.equal(torch.load(loaded / "folded-bare.pt")[0], torch.load(loaded / "folded.pt"))


def test_code_runs_only_where_it_is_trusted(hub, pushed):
    words = pushed, "", "no", json.dumps({"classifier": AUTO["classifier"]})
    said = python(LOAD, *words, hub=hub, home=pushed / "home-4", without=["hf_aselect"], fails=True)
    assert "trust_remote_code=True" in said
    assert not list((pushed / "home-4").rglob("modeling_classification.py"))


def test_all_that_a_stranger_needs_is_there(hub, pushed):
    paths = hub.paths("model", "me/classifier")
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(paths)
    assert "modeling_classification.py" in paths and "__init__.py" not in paths
    assert not [path for path in paths if "/" in path]
    config = json.loads(hub.bytes_of("model", "me/classifier", "config.json"))
    assert config["auto_map"] == AUTO_MAP
    card = ModelCard(hub.bytes_of("model", "me/classifier", "README.md").decode())
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert "mine" in card.data.tags and card.data.datasets == ["noise"]
    assert card.data.eval_results[0].metric_value == 0.5


AGAIN = """
import sys
from hf_aselect import DiTForImageClassification
model = DiTForImageClassification.from_pretrained(sys.argv[1], timestep=int(sys.argv[3]), num_labels=3, head="linear")
print(getattr(model.push_to_hub(sys.argv[2], **eval(sys.argv[4])), "pr_url", None))
"""


@pytest.fixture
def push(hub, pixel_folder, tmp_path):
    def run(repo_id, timestep=5, fails=False, token=TOKEN, **options):
        words = (pixel_folder, repo_id, timestep, repr(options))
        return python(AGAIN, *words, hub=hub, home=tmp_path / "home", token=token, fails=fails)

    return run


def read_config(hub, repo_id, revision="main"):
    return json.loads(hub.bytes_of("model", repo_id, "config.json", revision))


def test_a_second_push_takes_the_place_of_the_first(hub, push):
    push("me/again", max_shard_size="20KB")
    assert "model.safetensors.index.json" in hub.paths("model", "me/again")
    push("me/again", timestep=7, commit_message="Another timestep")
    paths = hub.paths("model", "me/again")
    assert [path for path in paths if "safetensors" in path] == ["model.safetensors"]
    assert read_config(hub, "me/again")["timestep"] == 7
    assert hub.repos["model", "me/again"].messages[-1] == "Another timestep"


def test_files_of_the_users_own_stay_where_they_are(hub, push, pixel_folder, tmp_path):
    """On the Hub and in the folder: neither deleted nor uploaded."""
    push("me/shared")
    repo = hub.repos["model", "me/shared"]
    own = {"handler.py", "cli.py", "other.safetensors"}
    repo.files("main").update(dict.fromkeys(own, repo.files("main")["config.json"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.py").write_text("password = 1")
    code = """
import sys
from hf_aselect import DiTModel
model = DiTModel.from_pretrained(sys.argv[1], timestep=5)
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/shared")
"""
    python(code, pixel_folder, tmp_path / "out", hub=hub, home=tmp_path / "home")
    paths = hub.paths("model", "me/shared")
    assert {*own, "model.safetensors"} <= set(paths) and "secret.py" not in paths
    assert "modeling_classification.py" in paths  # the code of every model goes along


def test_branches_and_pull_requests_leave_the_main_one_alone(hub, push):
    push("me/branches")
    push("me/branches", timestep=6, revision="trial")
    assert "discussions/1" in push("me/branches", timestep=7, create_pr=True)
    found = [read_config(hub, "me/branches", revision)["timestep"] for revision in ("main", "trial", "refs/pr/1")]
    assert found == [5, 6, 7]


def test_a_private_model_is_seen_by_its_owner_alone(hub, push, tmp_path):
    push("me/private", private=True)
    code = "import hf_aselect\nhf_aselect.DiTForImageClassification.from_pretrained('me/private')"
    python(code, hub=hub, home=tmp_path / "a")
    for token in ("hf_other", None):
        said = python(code, hub=hub, home=tmp_path / f"{token}", token=token, fails=True)
        assert "me/private" in said.splitlines()[-1]
        assert "hf_other" not in said


def test_a_wrong_token_is_refused_before_anything_is_written(hub, push):
    said = push("me/wrong", token="hf_wrongwrongwrong", fails=True)
    assert "401" in said and "hf_wrongwrongwrong" not in said
    assert ("model", "me/wrong") not in hub.repos


@pytest.mark.slow  # the client tries again and again
def test_an_upload_that_breaks_leaves_the_last_commit(hub, push):
    push("me/broken")
    before = hub.repos["model", "me/broken"].branches["main"]
    hub.breaks_uploads = True
    try:
        push("me/broken", timestep=9, fails=True, max_shard_size="19KB")
    finally:
        hub.breaks_uploads = False
    assert hub.repos["model", "me/broken"].branches["main"] == before
    assert read_config(hub, "me/broken")["timestep"] == 5


def test_two_may_push_at_once(hub, pixel_folder, tmp_path):
    """Two processes that know nothing of each other."""
    begin = "import os, sys\nsys.argv[3] = 5 + int(os.environ.pop('RANK'))\ndel os.environ['WORLD_SIZE']\n"
    words, given = (pixel_folder, "me/twice", 0, "{}"), environment(hub, tmp_path / "home")
    status, said = hub.forking.run(begin + AGAIN, *words, environment=given, world=2)
    assert status == 0, said[-3000:]
    assert read_config(hub, "me/twice")["timestep"] in (5, 6)
    assert len(hub.repos["model", "me/twice"].messages) == 2


def test_what_is_not_there_is_said(hub, tmp_path):
    code = "import hf_aselect\nhf_aselect.DiTModel.from_pretrained('me/nothing')"
    assert "me/nothing" in python(code, hub=hub, home=tmp_path, fails=True).splitlines()[-1]


def test_saving_with_push_to_hub_uploads_the_same(hub, pixel_folder, tmp_path):
    code = """
import sys
from hf_aselect import DiTModel
model = DiTModel.from_pretrained(sys.argv[1], timestep=5)
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/saved", private=True, commit_message="Saved")
"""
    python(code, pixel_folder, tmp_path / "out", hub=hub, home=tmp_path / "home")
    assert hub.paths("model", "me/saved") == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert hub.repos["model", "me/saved"].private and hub.repos["model", "me/saved"].messages == ["Saved"]


TRAIN = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from hf_aselect import ASelectCallback, ASelectImageProcessor, DiTForImageClassification
from hf_aselect.training.metrics import compute_accuracy
pixels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
rows = [{"pixel_values": value, "labels": index % 2} for index, value in enumerate(pixels)]
model = DiTForImageClassification.from_pretrained(sys.argv[1], timestep=5, num_labels=2, head="linear")
args = TrainingArguments(
    sys.argv[2], max_steps=4, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, push_to_hub=True,
    hub_model_id="me/trained", hub_strategy=sys.argv[3], eval_strategy="steps", eval_steps=2, hub_private_repo=True,
)
trainer = Trainer(
    model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_accuracy,
    processing_class=ASelectImageProcessor.from_model_config(model.config),
    callbacks=[ASelectCallback(dataset="noise", license="mit")],
)
trainer.train()
trainer.push_to_hub(tags=["mine"])
"""


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_the_trainer_pushes_all_of_it_with_our_card(hub, pixel_folder, tmp_path, strategy):
    said = python(TRAIN, pixel_folder, tmp_path / "out", strategy, hub=hub, home=tmp_path / "home")
    assert TOKEN not in said
    paths = hub.paths("model", "me/trained")
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(paths)
    assert "modeling_classification.py" in paths
    card = ModelCard(hub.bytes_of("model", "me/trained", "README.md").decode())
    assert card.data.license == "mit" and "mine" in card.data.tags and card.data.library_name == "transformers"
    assert card.data.eval_results[0].dataset_name == "noise"
    assert "| steps | 4 |" in card.text and "| epochs | 4.0 |" in card.text and "## The timestep" in card.text
    assert hub.repos["model", "me/trained"].private
    # While it trains, too: whoever takes one of those commits has the code that its configuration names.
    commits = [set(files) for files in hub.repos["model", "me/trained"].commits.values()]
    assert all(
        {"modeling_classification.py", "modeling_segmentation.py"} <= files
        for files in commits
        if "model.safetensors" in files
    )
    for files in hub.repos["model", "me/trained"].commits.values():
        assert "_README.md" not in files
        if "model.safetensors" in files:
            assert "AutoModelForImageClassification" in json.loads(hub.blobs[files["config.json"]])["auto_map"]
            assert ModelCard(hub.blobs[files["README.md"]].decode()).data.library_name == "transformers"
    assert sorted(path.name for path in (tmp_path / "out").glob("*README*")) == ["README.md"]
    hub.repos.pop(("model", "me/trained"))


STOPPED = """
steps, training_step = iter(range(2)), trainer.training_step
trainer.training_step = lambda *given: (next(steps), training_step(*given))[1]
with contextlib.suppress(StopIteration):
    trainer.train()
assert trainer.state.global_step == 2
"""


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("push_to_hub=True", "push_to_hub=False"),
        # Trainer trains another model than the one that its callbacks are given.
        ("    model, args, train", "    None, args, model_init=lambda: copy.deepcopy(model), train"),
        # The training stops in its third step, and what there is is pushed.
        ("trainer.train()", STOPPED),
    ],
    ids=["on request", "model_init", "interrupted"],
)
def test_what_the_trainer_is_told_to_push_is_whole(hub, pixel_folder, tmp_path, given, changed):
    assert given in TRAIN
    code = "import contextlib, copy\n" + TRAIN.replace(given, changed)
    code = code.replace("trainer.push_to_hub", "trainer.evaluate()\ntrainer.push_to_hub")
    python(code, pixel_folder, tmp_path / "out", "end", hub=hub, home=tmp_path / "home")
    paths = hub.paths("model", "me/trained")
    assert {"model.safetensors", "preprocessor_config.json", "modeling_classification.py"} <= set(paths)
    assert "AutoModelForImageClassification" in read_config(hub, "me/trained")["auto_map"]
    processor = json.loads(hub.bytes_of("model", "me/trained", "preprocessor_config.json"))
    assert processor["auto_map"]["AutoImageProcessor"]["pil"] == "image_processing_aselect.ASelectImageProcessorPil"
    card = ModelCard(hub.bytes_of("model", "me/trained", "README.md").decode())
    assert "## The timestep" in card.text and "generated automatically" not in card.text
    assert "mine" in card.data.tags and card.data.library_name == "transformers"
    hub.repos.pop(("model", "me/trained"))


def test_the_example_pushes_a_folder_and_keeps_what_its_card_says(hub, classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    write_model_card(classifier, tmp_path / "saved", dataset="noise", accuracy=0.75, license="mit")
    script = str(Path(__file__).parents[1] / "examples" / "sharing" / "push_to_hub.py")
    words = ["--model_name_or_path", str(tmp_path / "saved"), "--repo_id", "me/example", "--license", "apache-2.0"]
    said = python(SCRIPT, script, *words, hub=hub, home=tmp_path / "home")
    assert f"Pushed: {hub.endpoint}/me/example/commit/" in said
    card = ModelCard(hub.bytes_of("model", "me/example", "README.md").decode())
    assert (card.data.license, card.data.eval_results[0].metric_value) == ("apache-2.0", 0.75)


def test_accelerates_own_loop_learns_a_folder_of_pictures_and_pushes(hub, pixel_folder, tmp_path):
    for index in range(20):
        folder = tmp_path / "pictures" / ("dark", "bright")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200 * (index % 2), 40, index)).save(folder / f"{index}.png")
    examples = Path(__file__).parents[1] / "examples"
    script = str(examples / "image_classification" / "train_image_classification_no_trainer.py")
    words = ["--model_name_or_path", str(pixel_folder), "--train_dir", str(tmp_path / "pictures"), "--timestep", "5"]
    words += ["--output_dir", str(tmp_path / "out"), "--head", "linear", "--max_train_steps", "3", "--push_to_hub"]
    words += ["--hub_model_id", "me/looped", "--hub_private_repo"]
    python(SCRIPT, script, *words, hub=hub, home=tmp_path / "home")
    accuracy = json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_accuracy"]
    card = ModelCard(hub.bytes_of("model", "me/looped", "README.md").decode())
    assert f"accuracy: {accuracy}" in str(card)
    assert "| steps | 3 |" in card.text and hub.repos["model", "me/looped"].private
    assert {"model.safetensors", "preprocessor_config.json"} <= set(hub.paths("model", "me/looped"))


FEATURES = """
import pickle, sys
from datasets import load_dataset
from hf_aselect import DiTModel, cache_features
sys.path.insert(0, sys.argv[4])
from test_feature_cache import make_dataset
model = DiTModel.from_pretrained(sys.argv[1], timestep=50)
cached = cache_features(model, make_dataset(), sys.argv[2], what="pooled")
assert type(pickle.loads(pickle.dumps(cached))) is type(cached)
cached.push_to_hub("me/features", private=True)
again = load_dataset("me/features", split="train").with_format("torch")
assert again["features"][:].equal(cached["features"][:]) and again["label"][:].equal(cached["label"][:])
"""


def test_cached_features_are_pushed_with_their_fingerprint(hub, pixel_folder, tmp_path):
    words = pixel_folder, tmp_path / "cache", "", os.path.dirname(__file__)
    python(FEATURES, *words, hub=hub, home=tmp_path / "home")
    card = hub.bytes_of("dataset", "me/features", "README.md").decode()
    (folder,) = (tmp_path / "cache").iterdir()
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    assert json.loads(card.split("```json")[1].split("```")[0]) == fingerprint
    assert fingerprint["timestep"] == 50
    assert "dataset_info:" in card and "- hf_aselect" in card and 'load_dataset("me/features"' in card


LICENSED = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, ModelCardData
from hf_aselect import DiTForImageClassification
api = HfApi()
card = ModelCardData(license="other", license_name="some-non-commercial-licence")
(Path(sys.argv[1]) / "README.md").write_text(f"---\\n{card.to_yaml()}\\n---\\n# A DiT\\n")
api.create_repo("me/dit", exist_ok=True)
api.upload_folder(repo_id="me/dit", folder_path=sys.argv[1])
model = DiTForImageClassification.from_pretrained("me/dit", timestep=5, num_labels=3, head="linear")
assert model.config.base_model == "me/dit"
assert model.config.base_license == "other/some-non-commercial-licence"
model.push_to_hub("me/made-of-it", license="mit")
again = DiTForImageClassification.from_pretrained("me/made-of-it")
again.push_to_hub("me/made-of-that")
"""


def test_a_licence_is_inherited_from_the_card_of_the_base(hub, pixel_folder, tmp_path):
    shutil.copytree(pixel_folder / "transformer", tmp_path / "dit")
    said = python(LICENSED, tmp_path / "dit", hub=hub, home=tmp_path / "home")
    assert "forbids commercial use" in said
    for name in ("me/made-of-it", "me/made-of-that"):
        card = ModelCard(hub.bytes_of("model", name, "README.md").decode())
        assert (card.data.license, card.data.license_name) == ("other", "some-non-commercial-licence")
        assert card.data.base_model == "me/dit" and card.data.base_model_relation == "finetune"
        assert "**Not for commercial use**" in card.text


def test_what_a_reader_wrote_on_the_hub_stays(hub, push):
    push("me/noted", accuracy=0.5)
    repo = hub.repos["model", "me/noted"]
    text = hub.bytes_of("model", "me/noted", "README.md").decode() + "\n## My notes\n\nLooks good.\n"
    hub.blobs["noted"] = text.encode()
    repo.files("main")["README.md"] = "noted"
    push("me/noted", accuracy=0.75)
    text = hub.bytes_of("model", "me/noted", "README.md").decode()
    assert "75.0%" in text and "50.0%" not in text and text.endswith("## My notes\n\nLooks good.\n")


ADAPTER = (
    READ
    + """
import sys
import peft
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
base = AutoModelForImageClassification.from_pretrained("me/classifier", trust_remote_code=sys.argv[2] == "trust")
if sys.argv[1] == "push":
    from hf_aselect import ASelectCallback
    layers = {"target_modules": ["to_q", "to_v"], "modules_to_save": ["classifier"]}
    config = peft.LoraConfig(r=2, **layers, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    rows = [{"pixel_values": value, "labels": index} for index, value in enumerate(pixels)]
    args = TrainingArguments(sys.argv[4], max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
        learning_rate=0.1, push_to_hub=True, hub_model_id="me/adapter")
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[ASelectCallback(dataset="noise")])
    trainer.train()
    trainer.push_to_hub(tags="mine")
    assert "create_or_update_model_card" not in vars(model)
else:
    model = peft.PeftModel.from_pretrained(base, "me/adapter")
torch.save((outputs(model), type(base).__module__), sys.argv[3])
"""
)


def test_an_adapter_is_pushed_alone_and_loaded_by_strangers(hub, pushed, tmp_path):
    quiet, code = "import warnings; warnings.simplefilter('ignore')\n", "import hf_aselect\n" + ADAPTER
    words = "push", "", tmp_path / "owner.pt", tmp_path / "out"
    python(quiet + code, *words, hub=hub, home=tmp_path / "a")
    paths = hub.paths("model", "me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(paths) and "model.safetensors" not in paths
    card = ModelCard(hub.bytes_of("model", "me/adapter", "README.md").decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "me/classifier")
    assert card.data.base_model_relation == "adapter" and card.data.datasets == ["noise"]
    assert {"mine", "hf_aselect", "lora"} <= set(card.data.tags) and "generated automatically" not in card.text
    expected, _ = torch.load(tmp_path / "owner.pt")
    assert not torch.equal(expected, torch.load(pushed / "classifier.pt"))
    options = {"hub": hub, "token": None}
    python(quiet + code, "load", "", tmp_path / "with.pt", home=tmp_path / "b", **options)
    words = "load", "trust", tmp_path / "without.pt"
    python(quiet + ADAPTER, *words, home=tmp_path / "c", without=["hf_aselect"], **options)
    for name, package in (("with", "hf_aselect."), ("without", "transformers_modules.")):
        found, module = torch.load(tmp_path / f"{name}.pt")
        assert torch.equal(found, expected) and module.startswith(package)
    # The card's own code, with the package.
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code = quiet + READ + code + "\nimport sys\ntorch.save(outputs(model), sys.argv[1])"
    python(code, tmp_path / "card.pt", home=tmp_path / "d", **options)
    assert torch.equal(torch.load(tmp_path / "card.pt"), expected)


def test_the_guide_letter_by_letter(hub, classifier, tmp_path):
    """The guide of sharing, in a folder with a saved model and the examples."""
    root = Path(__file__).parents[1]
    section = (root / "examples" / "sharing" / "README.md").read_text(encoding="utf-8")
    codes = [code for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "push_to_hub" in code]
    commands = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    loads = re.findall(r"`(AutoModel\S+\(\"me/fashion-classifier\"\))`", section)
    assert len(codes) == 1 and len(commands) == 2 and len(loads) == 1
    (tmp_path / "examples").symlink_to(root / "examples")
    classifier.save_pretrained(tmp_path / "fashion-classifier")
    code = "from hf_aselect import DiTForImageClassification\n"
    code += f"model = DiTForImageClassification.from_pretrained('fashion-classifier')\n{codes[0]}"
    here = f"import os; os.chdir({str(tmp_path)!r})\n"
    python(here + code, hub=hub, home=tmp_path / "home")
    assert hub.repos["model", "me/fashion-classifier"].private
    given = environment(hub, tmp_path / "home")
    given["PATH"] = f"{Path(sys.executable).parent}:{given['PATH']}"
    for command in commands:
        done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(hub.repos["model", "me/fashion-classifier"].messages) == 2
    assert "87.7% (87.0% to 88.0%, 3 runs)" in (tmp_path / "fashion-classifier" / "README.md").read_text("utf-8")
    load = f"import torch, hf_aselect\nfrom transformers import AutoModelForImageClassification\nmodel = {loads[0]}"
    python(
        f"{READ}\n{load}\nimport sys\ntorch.save(outputs(model), sys.argv[1])",
        tmp_path / "x.pt",
        hub=hub,
        home=tmp_path,
    )
    with torch.no_grad():
        pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert torch.equal(torch.load(tmp_path / "x.pt"), classifier.eval()(pixels).logits)


def test_a_revision_is_pulled(hub, push, tmp_path):
    push("me/pulled")
    push("me/pulled", timestep=6, revision="trial")
    code = """
import sys
from hf_aselect import DiTForImageClassification
print(DiTForImageClassification.from_pretrained("me/pulled", revision=sys.argv[1]).config.timestep)
"""
    for revision, timestep in (("main", "5"), ("trial", "6"), (hub.repos["model", "me/pulled"].branches["main"], "5")):
        assert python(code, revision, hub=hub, home=tmp_path).splitlines()[-1] == timestep
    said = python(code, "v9", hub=hub, home=tmp_path, fails=True).splitlines()[-1]
    assert "me/pulled" in said and "v9" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(hub, push, tmp_path, name):
    push("me/partial")
    del hub.repos["model", "me/partial"].files("main")[name]
    code = "import hf_aselect\nhf_aselect.DiTForImageClassification.from_pretrained('me/partial')"
    said = python(code, hub=hub, home=tmp_path / "home", fails=True).splitlines()[-1]
    assert "me/partial" in said and name.partition(".")[0] in said
    hub.repos.pop(("model", "me/partial"))


def test_saving_and_pushing_twice_leaves_all_files(hub, pixel_folder, tmp_path):
    """Files that are what they were are not written again, and belong to what is pushed all the same."""
    code = """
import sys
from hf_aselect import DiTModel
model = DiTModel.from_pretrained(sys.argv[1], timestep=5)
model.push_to_hub("me/saved-twice")
for _ in range(2):
    model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/saved-twice", dataset="noise")
"""
    python(code, pixel_folder, tmp_path / "out", hub=hub, home=tmp_path / "home")
    paths = hub.paths("model", "me/saved-twice")
    assert paths == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"model.safetensors", "config.json", "modeling_aselect.py", "preprocessor_config.json"} <= set(paths)
    card = ModelCard(hub.bytes_of("model", "me/saved-twice", "README.md").decode())
    assert card.data.datasets == ["noise"]


def test_a_licence_goes_from_ours_to_ours(hub, pixel_folder, tmp_path):
    code = """
import sys
from hf_aselect import DiTForImageClassification, DiTModel
DiTModel.from_pretrained(sys.argv[1], timestep=5).push_to_hub("me/licensed", license="cc-by-nc-4.0")
model = DiTForImageClassification.from_pretrained("me/licensed", num_labels=3, head="linear")
model.push_to_hub("me/licensed-too", license="mit")
model.fold().save_pretrained(sys.argv[2])
DiTForImageClassification.from_pretrained(sys.argv[2]).push_to_hub("me/licensed-three")
"""
    python(code, pixel_folder, tmp_path / "folded", hub=hub, home=tmp_path / "home")
    for name in ("me/licensed-too", "me/licensed-three"):
        card = ModelCard(hub.bytes_of("model", name, "README.md").decode())
        assert card.data.license == "cc-by-nc-4.0" and "**Not for commercial use**" in card.text
        assert card.data.base_model == "me/licensed"


def test_the_code_of_a_card_asks_nothing(hub, pushed, tmp_path):
    """With the package no code of the repository is run, and nobody is asked whether it may."""
    for name in ("classifier", "segmenter", "folded"):
        text = hub.bytes_of("model", f"me/{name}", "README.md").decode()
        code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
        verb = "segment" if name == "segmenter" else "classify"
        code += f"\nfrom PIL import Image\nprint(len({verb}(Image.new('RGB', (8, 8)))))\nimport sys"
        code += "\nassert not [name for name in sys.modules if name.startswith('transformers_modules')]"
        said = python(code, hub=hub, home=tmp_path / name, token=None)
        assert "custom code" not in said


def test_what_is_pushed_again_without_the_package_is_whole(hub, pushed, tmp_path):
    code = """
from transformers import AutoModelForImageClassification
AutoModelForImageClassification.from_pretrained("me/folded", trust_remote_code=True).push_to_hub("me/again-without")
"""
    python(code, hub=hub, home=tmp_path, without=["hf_aselect", "diffusers"])
    content = json.loads(hub.bytes_of("model", "me/again-without", "preprocessor_config.json"))
    assert content["auto_map"]["AutoImageProcessor"]["pil"] == "image_processing_aselect.ASelectImageProcessorPil"
    assert set(hub.paths("model", "me/again-without")) == set(hub.paths("model", "me/folded"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy": 87}, "'accuracy' must be in [0, 1]"),
        ({"acuracy": 0.8}, "A card has no facts 'acuracy' (did you mean 'accuracy'?). `hf"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(hub, push, options, message):
    said = push("me/wrong-facts", fails=True, **options)
    assert message in said.splitlines()[-1] and TOKEN not in said
    assert ("model", "me/wrong-facts") not in hub.repos


@pytest.mark.parametrize("end", ["\n", " ", "é"])
def test_a_token_that_can_be_none_is_refused_and_not_said(hub, pixel_folder, tmp_path, end):
    """As one that was read from a file, with the end of its line."""
    words = pixel_folder, "me/odd-token", 5, repr({"token": TOKEN + end})
    said = python(AGAIN, *words, hub=hub, home=tmp_path / "home", token=None, fails=True)
    assert "no Hub token has" in said.splitlines()[-1] and TOKEN not in said
    assert ("model", "me/odd-token") not in hub.repos


def test_a_card_written_by_hand_stays_below_ours(hub, push):
    push("me/by-hand")
    repo = hub.repos["model", "me/by-hand"]
    hub.blobs["by hand"] = b"---\nlicense: mit\n---\n\n# Mine\n\nWritten by hand.\n"
    repo.files("main")["README.md"] = "by hand"
    push("me/by-hand", revision="new")
    for _ in range(2):
        push("me/by-hand")
    for revision in ("main", "new"):
        text = hub.bytes_of("model", "me/by-hand", "README.md", revision).decode()
        assert text.startswith("---") and text.count("Written by hand.") == 1 and "## The timestep" in text


def test_a_later_push_names_its_own_repository(hub, pixel_folder, tmp_path):
    code = TRAIN + "\nmodel.push_to_hub('me/later', tags='mine')"
    python(code, pixel_folder, tmp_path / "out", "end", hub=hub, home=tmp_path / "home")
    for name in ("me/trained", "me/later"):
        card = ModelCard(hub.bytes_of("model", name, "README.md").decode())
        assert f'folder = "{name}"' in card.text and f"# {name[3:]}\n" in card.text
        assert "mine" in card.data.tags and "m" not in card.data.tags
    hub.repos.pop(("model", "me/trained"))


def test_a_pipeline_of_a_folder_asks_nothing(classifier, tmp_path):
    """The code beside the weights is not taken for that of a video processor; nobody is asked whether it may run."""
    classifier.save_pretrained(tmp_path)
    ASelectImageProcessor.from_model_config(classifier.config).save_pretrained(tmp_path)
    code = """
import sys
import hf_aselect
from PIL import Image
from transformers import pipeline
print(len(pipeline("image-classification", model=sys.argv[1])(Image.new("RGB", (8, 8)))))
assert not [name for name in sys.modules if name.startswith("transformers_modules")]
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "4" and "custom code" not in done.stderr
