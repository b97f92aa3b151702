"""What is fetched of a repository, over real HTTP by the real client, and what its refusals say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, LoopbackHub, serve
from pipelines import ResearchPort, dit, dit_transformer, pixart_sigma, research_weights, sd3, sd35
from safetensors.torch import save_file

from hf_aselect import DiTModel
from hf_aselect.checkpoints.hub_files import needed_files
from hf_aselect.model.checks import read_json

# Each step is one line of output, so that one process, which takes seconds to start, does for all.
STEPS = """
import json, os, sys
import torch
from transformers import AutoBackbone
from hf_aselect import DiTForImageClassification, DiTModel, convert_diffusers, convert_research

def step(name, call):
    try:
        result = call()
    except (OSError, ValueError) as error:
        result = f"{type(error).__name__}: {error}"
    print("STEP", json.dumps([name, result]))

def described(model):
    return [type(model).__name__, model.config.transformer["_class_name"], str(model.dtype)]

def origin(source):
    model = DiTModel.from_pretrained(source, timestep=5)
    model.save_pretrained(sys.argv[1] + "/saved")
    return DiTModel.from_pretrained(sys.argv[1] + "/saved").config.base_model

step("pipeline", lambda: described(DiTModel.from_pretrained("us/dit", timestep=5)))
step("again", lambda: described(DiTModel.from_pretrained("us/dit", timestep=5)))
step("text", lambda: described(DiTForImageClassification.from_pretrained("us/pixart", timestep=5, num_labels=2)))
step("variant", lambda: described(DiTModel.from_pretrained("us/dit", timestep=5, variant="fp16")))
step("commit", lambda: described(DiTModel.from_pretrained("us/dit", timestep=5, revision=sys.argv[2])))
step("cache", lambda: described(DiTModel.from_pretrained("us/bare", timestep=5, cache_dir=sys.argv[1] + "/cache")))
step("bare", lambda: described(DiTModel.from_pretrained("us/bare", timestep=5)))
step("subfolder", lambda: described(DiTModel.from_pretrained("us/many", subfolder="one/dit", timestep=5)))
step("ours", lambda: described(DiTModel.from_pretrained("us/ours")))
step("convert", lambda: str(convert_diffusers("us/dit", sys.argv[1] + "/converted").output.name))
step("origin", lambda: origin("us/dit"))
step("origin of a folder", lambda: origin(sys.argv[1] + "/converted"))
step("backbone", lambda: described(AutoBackbone.from_pretrained("us/ours", out_indices=[1, 2])))
step("gated", lambda: described(DiTModel.from_pretrained("us/gated", timestep=5)))
step("wrong token", lambda: described(DiTModel.from_pretrained("us/gated", timestep=5, token="hf_wrong")))
step("right token", lambda: described(DiTModel.from_pretrained("us/gated", timestep=5, token="hf_right")))
step("missing", lambda: described(DiTModel.from_pretrained("us/nothing", timestep=5)))
step("revision", lambda: described(DiTModel.from_pretrained("us/dit", timestep=5, revision="v9")))
step("pickled", lambda: described(DiTModel.from_pretrained("us/pickled", timestep=5)))
step("pull request", lambda: described(DiTModel.from_pretrained("us/pickled", timestep=5, revision="refs/pr/1")))
step("no text encoder", lambda: described(DiTModel.from_pretrained("us/sd3", timestep=5, text_encoder_3=None)))
given = {"prompt_embeds": torch.zeros(1, 3, 32), "pooled_prompt_embeds": torch.zeros(1, 16)}
step("prompt", lambda: described(DiTModel.from_pretrained("us/sd35", timestep=5, prompt_embeds=given)))
step("unsupported", lambda: described(DiTModel.from_pretrained("us/hunyuan", timestep=5)))
step("vit", lambda: described(DiTModel.from_pretrained("us/vit", timestep=5)))
step("original", lambda: described(DiTModel.from_pretrained("us/original", timestep=5)))
step("half", lambda: described(DiTModel.from_pretrained("us/half", timestep=5, local_files_only=True)))
step("another", lambda: described(DiTModel.from_pretrained("us/unet", timestep=5)))
step("local", lambda: described(DiTModel.from_pretrained("us/dit", timestep=5, local_files_only=True)))
step("local ours", lambda: described(DiTModel.from_pretrained("us/ours", local_files_only=True)))
def with_vae(source, name):
    output = f"{sys.argv[1]}/{name}"
    convert_research(f"{sys.argv[1]}/sit.safetensors", output, layout="sit", num_attention_heads=4, vae=source)
    return DiTModel.from_pretrained(output, timestep=5).config.num_channels

step("vae of a pipeline", lambda: with_vae("us/whole", "of-pipeline"))
step("vae alone", lambda: with_vae("us/vae", "of-vae"))
step("vae that is none", lambda: with_vae("us/vit", "of-none"))
step("not local", lambda: described(DiTModel.from_pretrained("us/other", timestep=5, local_files_only=True)))
"""


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What each step gave, what was downloaded for it in all, and all output."""
    root = tmp_path_factory.mktemp("hub")
    pipe = dit()
    pipe.save_pretrained(root / "dit")
    pipe.save_pretrained(root / "gated")
    pipe.save_pretrained(root / "many" / "one" / "dit")
    pipe.save_pretrained(root / "pickled")
    dit_transformer(in_channels=3).save_pretrained(root / "bare")
    pixart_sigma().save_pretrained(root / "pixart")
    DiTModel.from_pretrained(root / "dit", timestep=7).save_pretrained(root / "ours")
    pipe.to(torch.float16).save_pretrained(root / "dit", variant="fp16")
    # What such repositories hold beside it, and no feature needs.
    for name in ("README.md", "samples.png", "transformer/diffusion_pytorch_model.bin", "safety_checker/model.bin"):
        (root / "dit" / name).parent.mkdir(exist_ok=True)
        (root / "dit" / name).write_bytes(b"no use")
    weights = root / "pickled" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    (root / "unet").mkdir()
    (root / "unet" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    pipe.to(torch.float32).save_pretrained(root / "pulled")
    sd3().save_pretrained(root / "sd3")
    sd35().save_pretrained(root / "sd35")
    pipe.save_pretrained(root / "hunyuan")
    changed(root / "hunyuan" / "transformer" / "config.json", _class_name="CogVideoXTransformer3DModel")
    (root / "vit").mkdir()
    (root / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (root / "original").mkdir()
    (root / "original" / "sd3_medium.safetensors").write_bytes(b"weights")
    dit().save_pretrained(root / "whole")
    dit().vae.save_pretrained(root / "vae")
    repos = {f"us/{path.name}": path for path in root.iterdir()}
    repos["us/pickled@refs/pr/1"] = repos.pop("us/pulled")
    hub = LoopbackHub(repos, gated={"us/gated": "hf_right"})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with serve(hub):
        environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(root.parent / f"{root.name}-home"),
        }
        # What a download leaves that broke off before the VAE.
        cache = Path(environment["HF_HOME"]) / "hub" / "models--us--half"
        snapshot = cache / "snapshots" / COMMIT
        shutil.copytree(root / "dit", snapshot, ignore=shutil.ignore_patterns("vae"))
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(COMMIT)
        work = tmp_path_factory.mktemp("work")
        save_file(research_weights(), work / "sit.safetensors")
        finished = subprocess.run(
            [sys.executable, "-c", STEPS, str(work), COMMIT],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("STEP ")]
    assert finished.returncode == 0, finished.stderr
    steps = dict(json.loads(line.removeprefix("STEP ")) for line in lines)
    assert (work / "cache" / "models--us--bare").is_dir()
    return steps, hub.downloads, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "name",
    [
        *("pipeline", "again", "variant", "commit", "cache", "bare", "subfolder", "ours", "right token", "local"),
        "pull request",
    ],
)
def test_a_repository_is_loaded(outcome, name):
    assert outcome[0][name] == ["DiTModel", "DiTTransformer2DModel", "torch.float32"]


def test_a_text_conditioned_pipeline_is_loaded_with_its_encoders(outcome):
    steps, downloads, _ = outcome
    assert steps["text"] == ["DiTForImageClassification", "PixArtTransformer2DModel", "torch.float32"]
    assert "us/pixart/text_encoder/model.safetensors" in downloads
    assert steps["local ours"] == steps["ours"]


def test_only_what_is_needed_is_downloaded_and_once(outcome):
    downloads = [name for name in outcome[1] if name.startswith("us/dit/")]
    # By three loads and a conversion.
    assert sorted(downloads) == [
        "us/dit/README.md",  # for the licence
        "us/dit/model_index.json",
        "us/dit/scheduler/scheduler_config.json",
        "us/dit/transformer/config.json",
        "us/dit/transformer/diffusion_pytorch_model.fp16.safetensors",
        "us/dit/transformer/diffusion_pytorch_model.safetensors",
        "us/dit/vae/config.json",
        "us/dit/vae/diffusion_pytorch_model.fp16.safetensors",
        "us/dit/vae/diffusion_pytorch_model.safetensors",
    ]
    assert outcome[0]["convert"] == "converted"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gated",
            "OSError: 'us/gated' is gated. Accept its conditions at https://huggingface.co/us/gated, then log in",
        ),
        ("wrong token", "OSError: 'us/gated' is gated"),
        ("missing", "OSError: 'us/nothing' is neither a local folder nor a repository on the Hub that you can access"),
        ("revision", "OSError: 'us/dit' has no revision 'v9' on the Hub"),
        (
            "pickled",
            "ValueError: 'transformer/ of the repository' has only pickled weights (diffusion_pytorch_model.bin)",
        ),
        (
            "unsupported",
            "ValueError: Unsupported transformer 'CogVideoXTransformer3DModel'; supported are DiTTransformer",
        ),
        ("vit", "ValueError: 'us/vit' is a checkpoint of vit. Pass an hf_aselect checkpoint, or a pipeline"),
        ("original", "ValueError: 'us/original' has neither model_index.json nor config.json in its root folder"),
        ("another", "ValueError: 'us/unet' is a StableDiffusionPipeline without a `transformer`"),
        (
            "not local",
            "OSError: 'us/other' is neither a local folder nor in the cache, and the Hub cannot be reached (or",
        ),
    ],
)
def test_a_refusal_says_what_to_do(outcome, name, message):
    assert outcome[0][name].startswith(message)


def test_pickles_name_the_pull_request_that_has_safetensors(outcome):
    expected = " Alternatively, load safetensors from a pull request whose author you trust: `revision='refs/pr/1'`"
    assert outcome[0]["pickled"].endswith(f"{expected} (by someone).")
    assert not [name for name in outcome[1] if name.startswith("us/pickled/") and name.endswith(".bin")]


def test_text_encoders_that_are_done_without_are_not_downloaded(outcome):
    steps, downloads, _ = outcome
    assert steps["no text encoder"] == steps["prompt"] == ["DiTModel", "SD3Transformer2DModel", "torch.float32"]
    assert not [name for name in downloads if "_3/" in name]
    # What two encoders have in common is downloaded once.
    assert [name for name in downloads if name.startswith(("us/sd3/text_encoder/", "us/sd3/text_encoder_2/"))]
    assert not [name for name in downloads if name.startswith(("us/sd35/text_encoder", "us/sd35/tokenizer"))]


def test_what_is_not_supported_is_not_downloaded(outcome):
    downloads = [name for name in outcome[1] if name.startswith("us/hunyuan/")]
    assert downloads == ["us/hunyuan/model_index.json", "us/hunyuan/transformer/config.json"]


def test_of_a_vae_for_research_weights_nothing_else_is_downloaded(outcome):
    assert outcome[0]["vae of a pipeline"] == outcome[0]["vae alone"] == 3
    assert "has no supported VAE" in outcome[0]["vae that is none"]
    downloads = {name for name in outcome[1] if name.startswith("us/whole/")}
    assert downloads == {"us/whole/vae/config.json", "us/whole/vae/diffusion_pytorch_model.safetensors"}


def test_half_a_download_is_said_to_be_one(outcome):
    assert "Download or copy the whole pipeline" in outcome[0]["half"]


def test_a_port_with_research_names_is_found_on_the_hub(tmp_path):
    folder = tmp_path / "models--us--sit" / "snapshots" / COMMIT
    ResearchPort().save_pretrained(folder)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "SiTPipeline", "transformer": ["transformer_sit", "SiTTransformer2DModel"]})
    )
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(COMMIT)
    model = DiTModel.from_pretrained("us/sit", cache_dir=tmp_path, layout="sit", timestep=5)
    assert model.config.timestep_embedding == "sit"
    assert model.config.base_model == "us/sit"


@pytest.mark.slow  # the client tries for half a minute
def test_what_was_downloaded_before_is_taken_where_the_hub_does_not_answer(tmp_path):
    dit().save_pretrained(tmp_path / "hub" / "models--us--dit" / "snapshots" / COMMIT)
    (tmp_path / "hub" / "models--us--dit" / "refs").mkdir()
    (tmp_path / "hub" / "models--us--dit" / "refs" / "main").write_text(COMMIT)
    finished = convert_by_command(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert finished.returncode == 0, finished.stderr
    assert DiTModel.from_pretrained(tmp_path / "out", timestep=5).config.vae is not None


def test_auto_backbone_loads_a_repository(outcome):
    assert outcome[0]["backbone"] == ["DiTBackbone", "DiTTransformer2DModel", "torch.float32"]


def test_where_weights_come_from_is_kept(outcome):
    assert outcome[0]["origin"] == outcome[0]["origin of a folder"] == "us/dit"


def test_no_token_is_printed(outcome):
    assert "hf_right" not in outcome[2] and "hf_wrong" not in outcome[2]


def convert_by_command(tmp_path, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), **variables}
    words = ["convert", "us/dit", str(tmp_path / "out")]
    command = [sys.executable, "-c", f"import sys; from hf_aselect.cli import main; sys.exit(main({words!r}))"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.process
@pytest.mark.parametrize(
    "variables",
    [
        {"HF_HUB_OFFLINE": "1"},
        # The client tries for half a minute.
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),
    ],
    ids=["told to be offline", "no answer"],
)
def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path, variables):
    finished = convert_by_command(tmp_path, **variables)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith(
        "hf-aselect: error: 'us/dit' is neither a local folder nor in the cache, and the Hub cannot be reached"
    )
    assert "Run `hf download us/dit` with a network connection" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()


FILES = [
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.fp16-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer/vocab.json",
    "tokenizer_3/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
INDEX = {name: ["diffusers", "Some"] for name in ("transformer", "vae", "scheduler")}
INDEX |= {name: ["transformers", "Some"] for name in ("text_encoder", "text_encoder_3", "tokenizer", "tokenizer_3")}
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_3")


def test_shards_and_their_index_are_needed_of_the_variant_alone():
    found = needed_files(FILES, INDEX, None, TEXT)
    assert found == [name for name in FILES if "fp16" not in name and name != "README.md"]
    files = [*FILES, "transformer/diffusion_pytorch_model.fp16.safetensors"]
    found = needed_files(files, INDEX, "fp16", TEXT)
    assert "transformer/diffusion_pytorch_model.safetensors" not in found
    assert "text_encoder_3/model.fp16-00001-of-00002.safetensors" in found
    assert "text_encoder_3/model.safetensors.index.fp16.json" in found
    # The VAE has no such variant.
    assert "vae/diffusion_pytorch_model.safetensors" in found


def test_diffusers_own_name_wins_where_there_are_two():
    files = [*FILES, "vae/model.safetensors"]
    assert "vae/model.safetensors" not in needed_files(files, INDEX, None, TEXT)


def test_parts_that_a_pipeline_was_saved_without_are_not_needed():
    found = needed_files(FILES, {**INDEX, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}, None, TEXT)
    assert not [name for name in found if "_3" in name]


@pytest.mark.parametrize("text", ["[1, 2]", "{", "\xff"])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"is not valid JSON|must contain a JSON object, got a list"):
        read_json(tmp_path / "config.json")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file. Pass a folder or an id on the Hub"):
        DiTModel.from_pretrained(tmp_path / "model.safetensors")
