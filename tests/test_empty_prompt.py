"""The empty prompt of the families that are described: what their pipelines encode, without what is not read."""

import json
import sys

import pytest
import torch
from generic_pipelines import GENERIC_PIPELINES

from hf_aselect.checkpoints.empty_prompt import encode_empty_prompt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each pipeline, and the folder that diffusers saved it in; made when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            pipe = GENERIC_PIPELINES[name]()
            folder = tmp_path_factory.mktemp(name)
            pipe.save_pretrained(folder)
            made[name] = pipe, folder
        return made[name]

    return get


def transformer_of(pipe):
    return {**pipe.transformer.config, "_class_name": type(pipe.transformer).__name__}


@torch.no_grad()
def of_pipeline(name, pipe):
    """What the pipeline gives its transformer of an empty prompt: embeddings and, where it has one, a mask."""
    plain = {"do_classifier_free_guidance": False}
    if name in ("flux2", "longcat"):
        return pipe.encode_prompt("")[0], None
    if name == "z_image":
        return pipe.encode_prompt("")[0][0][None], None
    if name == "qwen_image":
        return pipe.encode_prompt("")
    if name == "chroma":
        prompt, _, mask, *_ = pipe.encode_prompt("")
        return prompt, mask
    if name in ("aura_flow", "cogview4"):
        return pipe.encode_prompt("", **plain)[0], None
    if name == "wan":
        # What a call of the pipeline says.
        return pipe.encode_prompt("", max_sequence_length=512)[0], None
    if name == "prx":
        # Cleaned by hand: the pipeline needs ftfy.
        ids, mask = pipe.tokenizer("", padding="max_length", max_length=16, return_tensors="pt").values()
        return pipe.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask
    return pipe.encode_prompt("", **plain)[::2] if name == "hunyuan_dit" else pipe.encode_prompt("", **plain)[:2]


# Tokens of an empty prompt that are attended to.
LENGTHS = {"flux2": 512, "chroma": 2, "aura_flow": 256, "cogview4": 16, "wan": 512, "longcat": 512, "lumina_next": 1}


@pytest.mark.parametrize("name", [name for name in GENERIC_PIPELINES if name != "hunyuan_dit"])
def test_the_embeddings_are_the_pipelines(saved, name):
    pipe, folder = saved(name)
    embeddings = encode_empty_prompt(folder, transformer_of(pipe))
    assert list(embeddings) == ["prompt_embeds"]
    expected, mask = of_pipeline(name, pipe)
    if mask is not None:
        assert expected.shape[1] > mask.sum()
        expected = expected[:, mask[0].bool()]
    assert expected.shape[1] == LENGTHS.get(name, expected.shape[1]) > 0
    assert torch.equal(embeddings["prompt_embeds"], expected)


def test_hunyuan_dit_has_two_encoders_with_their_masks(saved):
    pipe, folder = saved("hunyuan_dit")
    embeddings = encode_empty_prompt(folder, transformer_of(pipe))
    assert list(embeddings) == ["prompt_embeds", "prompt_mask", "prompt_embeds_2", "prompt_mask_2"]
    for index, suffix, length, kept in ((0, "", 77, 2), (1, "_2", 256, 1)):
        with torch.no_grad():
            prompt, _, mask, _ = pipe.encode_prompt("", text_encoder_index=index)
        assert embeddings[f"prompt_embeds{suffix}"].shape[1] == length
        assert torch.equal(embeddings[f"prompt_embeds{suffix}"], prompt)
        assert torch.equal(embeddings[f"prompt_mask{suffix}"].long(), mask)
        assert mask.sum() == kept


def test_only_what_encodes_the_prompt_is_loaded(saved, tmp_path):
    pipe, folder = saved("longcat")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    # As it is published; it needs torchvision, and is not there.
    index["text_processor"] = ["transformers", "Qwen2_5_VLProcessor"]
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(folder / part)
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    embeddings = encode_empty_prompt(tmp_path, transformer_of(pipe))
    assert embeddings["prompt_embeds"].shape == (1, 512, 32)


@pytest.mark.parametrize("error", [AttributeError("no attribute"), RuntimeError("Failed to import")])
def test_a_pipeline_that_an_older_diffusers_lacks_is_named(saved, monkeypatch, error):
    pipe, folder = saved("z_image")

    class Older:
        __version__ = "0.36.0"
        ZImageTransformer2DModel = type(pipe.transformer)

        def __getattr__(self, name):
            raise error if name.endswith("Pipeline") else AttributeError(name)

    monkeypatch.setitem(sys.modules, "diffusers", Older())
    with pytest.raises(ValueError, match=f"has no ZImagePipeline,.*{error}.*pip install -U diffusers"):
        encode_empty_prompt(folder, transformer_of(pipe))


def test_the_other_flux2_is_refused(saved):
    pipe, folder = saved("flux2")
    with pytest.raises(ValueError, match=r"`guidance_embeds`, such as FLUX.2 .dev.*`prompt_embeds=`"):
        encode_empty_prompt(folder, {**transformer_of(pipe), "guidance_embeds": True})
