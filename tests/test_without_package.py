"""A user without the package loads, runs, trains, saves, loads again and pushes what others pushed with it."""

import json
import os
import re

import pytest
from forking import Forking
from generic_pipelines import GENERIC_PIPELINES
from pipelines import PIPELINES
from writable_hub import WritableHub, serve

import hf_aselect

pytestmark = pytest.mark.process

TOKEN = "hf_goodgoodgoodgoodgood"
# Class, Auto class, and what diffusers saved.
KINDS = {
    "classifier": ("DiTForImageClassification", "AutoModelForImageClassification", "pixel"),
    "segmenter": ("DiTForSemanticSegmentation", "AutoModelForSemanticSegmentation", "pixel"),
    "backbone": ("DiTBackbone", "AutoBackbone", "pixel"),
    "tokens": ("DiTModel", "AutoModel", "pixel"),
    "folded": ("DiTForImageClassification", "AutoModelForImageClassification", "pixel"),
    "folded-several": ("DiTForImageClassification", "AutoModelForImageClassification", "pixel"),
    "several": ("DiTForImageClassification", "AutoModelForImageClassification", "pixel"),
    "latent": ("DiTForImageClassification", "AutoModelForImageClassification", "latent"),
    "text": ("DiTForImageClassification", "AutoModelForImageClassification", "text"),
    # Read by its description, with a VAE of videos.
    "described": ("DiTForImageClassification", "AutoModelForImageClassification", "described"),
}

OUTPUTS = """
import json
import os
import sys
import torch

def images(model, count=3):
    height, width = model.config.image_height_width
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1

def outputs(model):
    with torch.no_grad():
        found = model.eval()(images(model))
    for name in ("logits", "last_hidden_state", "feature_maps"):
        if getattr(found, name, None) is not None:
            value = found[name]
            return value[-1] if isinstance(value, tuple) else value
"""

OWNER = """
import hf_aselect
folders, output, kinds = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
fields = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1, "num_labels": 3}
for name, (kind, _, source) in kinds.items():
    torch.manual_seed(0)
    size = {"image_size": 32} if source in ("text", "described") else {}
    side = {"pixel": 8, "latent": 16, "text": 32, "described": 32}[source]
    # With a head, and so with statistics of its tokens.
    given = {"calibration_images": torch.rand(6, 3, side, side) * 2 - 1} if "For" in kind else {}
    several = {"timestep": [5, 60], "block": "all", "feature": ["hidden", "key"], "zeroed_channels": []}
    where = several if "several" in name else {"timestep": 5}
    model = getattr(hf_aselect, kind).from_pretrained(folders[source], **where, **fields, **size, **given)
    assert (model.config.standardized_grid is not None) == ("For" in kind)
    model = model.fold() if "folded" in name else model
    model.push_to_hub(f"me/{name}")
    torch.save(outputs(model), f"{output}/{name}.pt")
"""

FIRST = """
from transformers import AutoModelForImageClassification
AutoModelForImageClassification.from_pretrained("me/classifier", trust_remote_code=True)
"""

STRANGER = """
import transformers
from transformers import AutoImageProcessor, Trainer, TrainingArguments
output, kinds = sys.argv[1], json.loads(sys.argv[2])
for name, (_, auto, _) in kinds.items():
    load = local = getattr(transformers, auto).from_pretrained
    model = load(f"me/{name}", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert torch.equal(outputs(model), torch.load(f"{output}/{name}.pt")), name
    processor = AutoImageProcessor.from_pretrained(f"me/{name}", trust_remote_code=True)
    if auto == "AutoBackbone":  # transformers looks for the code of one on the Hub alone
        local = type(model).from_pretrained
    if "For" in auto:
        pixels = images(model)
        label = 1 if auto.endswith("ImageClassification") else torch.ones(pixels.shape[-2:], dtype=torch.long)
        rows = [{"pixel_values": each, "labels": label} for each in pixels]
        arguments = TrainingArguments(
            f"{output}/run-{name}", max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
        )
        before = {key: value.clone() for key, value in model.state_dict().items()}
        Trainer(model, arguments, train_dataset=rows, processing_class=processor).train()
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved and all(key.startswith(("classifier.", "decode_head.")) for key in moved), name
        again = load(f"{output}/run-{name}/checkpoint-1", trust_remote_code=True)
        assert torch.equal(outputs(again), outputs(model)), name
    model.save_pretrained(f"{output}/saved-{name}")
    again = local(f"{output}/saved-{name}", trust_remote_code=True)
    assert torch.equal(outputs(again), outputs(model)), name
    again.push_to_hub(f"me/{name}-again", commit_message="Again")
    assert torch.equal(outputs(load(f"me/{name}-again", trust_remote_code=True)), outputs(model)), name
"""

ASKS = """
from transformers import AutoModelForImageClassification, AutoModel
model = AutoModelForImageClassification.from_pretrained("me/classifier", trust_remote_code=True)
kind = type(model)
asked = {
    "fold": model.fold,
    "generate": lambda: model.generate_latents(2),
    "standardize": lambda: model.standardize(images(model)),
    "fit": lambda: model.fit_head([]),
    "select": lambda: AutoModel.from_pretrained("me/tokens", trust_remote_code=True, timestep="auto"),
    "diffusers": lambda: kind.from_pretrained(sys.argv[1], timestep=5),
    "facts": lambda: model.push_to_hub("me/facts", accuracy=0.5),
}
for name, ask in asked.items():
    try:
        ask()
    except ImportError as error:
        print(f"{name}: {error}")
"""


def environment(hub, home):
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    given |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": TOKEN}
    return given


def python(code, *words, hub, home, has_package=False):
    """Run code in a fork of a process that has imported all it needs, with the package or where that cannot be."""
    forking = hub.owner if has_package else hub.stranger
    status, said = forking.run(OUTPUTS + code, *words, environment=environment(hub, home))
    assert not status, said[-3000:]
    return said


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(WritableHub({TOKEN: "me"})) as served:
        given = environment(served, tmp_path_factory.mktemp("home"))
        served.owner, served.stranger = Forking(given), Forking(given, without_us=True)
        yield served
        served.owner.close()
        served.stranger.close()


@pytest.fixture(scope="module")
def pushed(hub, pixel_folder, latent_folder, tmp_path_factory):
    """What the owner computed; all kinds are on the hub."""
    output, text = tmp_path_factory.mktemp("owner"), tmp_path_factory.mktemp("text")
    PIPELINES["sd3"]().save_pretrained(text)
    described = tmp_path_factory.mktemp("described")
    GENERIC_PIPELINES["wan"]().save_pretrained(described)
    folders = {
        "pixel": str(pixel_folder),
        "latent": str(latent_folder),
        "text": str(text),
        "described": str(described),
    }
    python(OWNER, json.dumps(folders), output, json.dumps(KINDS), hub=hub, home=output / "home", has_package=True)
    return output


def test_a_first_load_asks_for_few_files(hub, pushed, tmp_path):
    files = [path for path in hub.paths("model", "me/classifier") if path.endswith(".py")]
    assert len(files) <= 15
    assert sum(len(hub.bytes_of("model", "me/classifier", path).splitlines()) for path in files) <= 7450
    hub.requests.clear()
    said = python(FIRST, hub=hub, home=tmp_path)
    asked = [path for _, path in hub.requests if path.endswith(".py")]
    warned = re.findall(r"A new version of the following files was downloaded", said)
    assert len(asked) <= 30 and len(warned) <= 15, (len(asked), len(warned))


def test_all_of_it_works_without_the_package(hub, pushed, tmp_path):
    python(STRANGER, pushed, json.dumps(KINDS), hub=hub, home=tmp_path)
    for name in KINDS:
        # Whoever comes next finds all that the first ones found.
        first, again = (set(hub.paths("model", f"me/{each}")) for each in (name, f"{name}-again"))
        assert {path for path in first if not path.startswith("timestep_curve")} == again
        content = json.loads(hub.bytes_of("model", f"me/{name}-again", "config.json"))
        assert content["auto_map"]["AutoConfig"] == "configuration_aselect.ASelectConfig"
    code = """
import hf_aselect
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("me/classifier-again")
assert type(model).__module__.startswith("hf_aselect."), type(model)
print(tuple(outputs(model).shape))
"""
    assert "(3, 3)" in python(code, hub=hub, home=tmp_path / "with", has_package=True)


EVERY = """
import transformers
found = {}
for auto in json.loads(sys.argv[2]):
    loaded = getattr(transformers, auto).from_pretrained(sys.argv[1], trust_remote_code=True)
    found[auto] = type(loaded).__name__
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
# What is saved again is whole, whichever class it was.
classifier = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
classifier.save_pretrained(sys.argv[3])
content = json.load(open(os.path.join(sys.argv[3], "config.json")))["auto_map"]
assert set(content) == {*json.loads(sys.argv[2]), "AutoConfig", "AutoBackbone"}, content
print(json.dumps(found))
"""
AUTO = ["AutoImageProcessor", "AutoModel", "AutoModelForImageClassification", "AutoModelForSemanticSegmentation"]


@pytest.mark.parametrize("name", ["tokens", "classifier", "segmenter", "backbone", "folded", "converted"])
def test_every_auto_class_loads_every_folder(hub, pushed, pixel_folder, tmp_path, name):
    """Base models, classifiers and converted folders were met; the others are siblings."""
    # What is folded has its own taps alone, and a backbone reads others.
    source, auto = f"me/{name}", AUTO if name == "folded" else [*AUTO, "AutoBackbone"]
    if name == "converted":
        source, auto = tmp_path / "converted", AUTO  # transformers looks for the code of a backbone on the Hub alone
        hf_aselect.convert_diffusers(pixel_folder, source, timestep=20)
    said = python(EVERY, source, json.dumps(auto), tmp_path / "saved", hub=hub, home=tmp_path / "home")
    assert json.loads(said.strip().splitlines()[-1]) == {
        "AutoImageProcessor": "ASelectImageProcessor",
        "AutoModel": "DiTModel",
        "AutoModelForImageClassification": "DiTForImageClassification",
        "AutoModelForSemanticSegmentation": "DiTForSemanticSegmentation",
        **({"AutoBackbone": "DiTBackbone"} if "AutoBackbone" in auto else {}),
    }


def test_what_needs_the_package_says_so_in_one_line(hub, pushed, pixel_folder, tmp_path):
    said = python(ASKS, pixel_folder, hub=hub, home=tmp_path)
    lines = dict(line.split(": ", 1) for line in said.splitlines() if "pip install hf_aselect" in line)
    assert lines == {
        "fold": "Folding needs hf_aselect: pip install hf_aselect",
        "generate": "Generating images needs hf_aselect: pip install hf_aselect",
        "standardize": "Standardizing features needs hf_aselect: pip install hf_aselect",
        "fit": "Fitting a head needs hf_aselect: pip install hf_aselect",
        "select": "Selecting a timestep (`timestep='auto'`) needs hf_aselect: pip install hf_aselect",
        "diffusers": "Loading a diffusers checkpoint needs hf_aselect: pip install hf_aselect",
        "facts": "A model card with facts needs hf_aselect: pip install hf_aselect",
    }
    assert ("model", "me/facts") not in hub.repos


def test_the_package_serves_a_model_whose_code_came_from_the_hub(hub, pushed, tmp_path):
    """Both are there: two classes of each name. What the package does goes by what things are, not by their class."""
    code = """
import hf_aselect
from transformers import AutoModelForImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module
kind = get_class_from_dynamic_module("modeling_classification.DiTForImageClassification", "me/classifier")
model = kind.from_pretrained("me/classifier", timestep="auto", calibration_images=torch.rand(40, 3, 8, 8) * 2 - 1)
assert not isinstance(model, hf_aselect.DiTForImageClassification)
assert model.config.selection["timestep"] == model.config.timestep
folded = model.fold()
# Noise is selected for images of noise: standardized, its features show the last bits of float32.
assert type(folded) is kind and (outputs(folded) - outputs(model)).abs().max() < 1e-2
model.save_pretrained(sys.argv[1])
assert torch.equal(outputs(kind.from_pretrained(sys.argv[1])), outputs(model))
model.push_to_hub("me/both", accuracy=0.5)
assert torch.equal(outputs(AutoModelForImageClassification.from_pretrained("me/both")), outputs(model))
"""
    python(code, tmp_path / "saved", hub=hub, home=tmp_path / "home", has_package=True)
    assert "README.md" in hub.paths("model", "me/both")


def test_a_push_removes_the_code_that_an_earlier_layout_left(hub, pushed, tmp_path):
    repo = hub.repos["model", "me/classifier"]
    files = dict(repo.files("main"))
    former = dict.fromkeys(["sharing.py", "sweep.py", "folding.py", "denoiser_dit.py", "mine.py"], files["heads.py"])
    repo.commits[repo.branches["main"]] = {**files, **former}
    code = """
import hf_aselect
model = hf_aselect.DiTForImageClassification.from_pretrained("me/classifier")
model.push_to_hub("me/classifier")
"""
    python(code, hub=hub, home=tmp_path, has_package=True)
    assert set(hub.paths("model", "me/classifier")) == {*files, "mine.py"}


@pytest.mark.parametrize("asked", [None, True, False])
def test_local_folders_have_code_where_it_is_asked_for(classifier, tmp_path, asked):
    classifier.save_pretrained(tmp_path, include_code=asked)
    found = {path.name for path in tmp_path.glob("*.py")}
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert bool(found) == bool(content.get("auto_map")) == bool(asked)
    classifier.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == found, "where the folder had code it is written again"
    assert bool(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).get("auto_map")) == bool(asked)


@pytest.mark.parametrize("asked", [None, True, False])
def test_so_have_configurations_and_image_processors(classifier, tmp_path, asked):
    from hf_aselect import ASelectImageProcessor

    for saved in (classifier.config, ASelectImageProcessor.from_model_config(classifier.config)):
        folder = tmp_path / type(saved).__name__
        saved.save_pretrained(folder, include_code=asked)
        assert bool(list(folder.glob("*.py"))) == bool(asked)
        texts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.json"))
        assert ("auto_map" in texts) == bool(asked) and "_auto_class" not in texts
        assert type(type(saved).from_pretrained(folder)) is type(saved)
