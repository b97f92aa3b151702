import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

import hf_aselect
from hf_aselect import ASelectConfig
from hf_aselect.model.configuration_aselect import DIT_XL_2

PACKAGE = Path(hf_aselect.__file__).parent
FIELDS = [name for name in ASelectConfig.__annotations__ if name != "model_type" and not name.startswith("_")]


def test_the_default_tap_is_the_authors_place():
    sd3 = {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
    }
    config = ASelectConfig(transformer={**sd3, "in_channels": 16, "sample_size": 64, "patch_size": 2})
    assert (config.block, config.feature) == (9, "query")


def test_sizes_are_read_off_the_transformer():
    config = ASelectConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1152, 28, 16)
    assert config.image_size == 32


def test_the_picture_is_larger_than_its_latents():
    vae = {"_class_name": "AutoencoderKL", "in_channels": 3, "block_out_channels": [8, 8, 8, 8]}
    config = ASelectConfig(vae=vae)
    assert (config.image_size, config.num_channels, config.patch_pixels) == (256, 3, 16)


def test_a_configuration_comes_back_as_it_was_saved(tmp_path):
    config = ASelectConfig(timestep=7, block=-1, feature="key", head="linear", num_labels=3, image_size=[32, 64])
    config.save_pretrained(tmp_path)
    again = ASelectConfig.from_pretrained(tmp_path)
    for name in (*FIELDS, "id2label"):
        assert getattr(again, name) == getattr(config, name), name


def test_a_keyword_takes_the_place_of_a_saved_value(tmp_path):
    ASelectConfig(timestep=7).save_pretrained(tmp_path)
    assert ASelectConfig.from_pretrained(tmp_path, timestep=9).timestep == 9


def test_a_keyword_beside_a_saved_configuration_is_checked(tmp_path):
    ASelectConfig().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"integer in \[0, 1000\) or 'auto'.*got 1000"):
        ASelectConfig.from_pretrained(tmp_path, timestep=1000)


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_read_somewhere(name):
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    reads = rf"(config|self)\.{name}\b"
    # Transformers reads this one.
    assert name == "initializer_range" or any(re.search(reads, source) for source in sources)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"timestep": 1000}, r"`timestep` must be an integer in \[0, 1000\) or 'auto'.*got 1000"),
        ({"timestep": -1}, "got -1"),
        ({"timestep": "soon"}, "got 'soon'"),
        ({"timestep": 3.0}, "'timestep'"),
        ({"timestep": True}, "'timestep'"),
        ({"block": 28}, r"`block` must be in \[-28, 28\) for a transformer of 28 blocks, got 28"),
        ({"block": -29}, "got -29"),
        ({"feature": "q"}, "`feature` must be one of hidden, normed, query, key, value, attention, got 'q'"),
        ({"head": "mlp"}, "`head` must be 'linear' or 'attention', got 'mlp'"),
        ({"head_hidden_size": 30}, r"\(30\) must be a multiple of `head_num_attention_heads` \(8\)"),
        ({"head_num_layers": 0}, r"`head_num_layers` must be in \[1, 1000\], got 0"),
        ({"num_noise_draws": 0}, r"`num_noise_draws` must be in \[1, 1000\], got 0"),
        ({"noise_seed": -1}, r"`noise_seed` must be in \[0, 4294967295\], got -1"),
        ({"noise_seed": "a"}, "'noise_seed'"),
        ({"image_size": 33}, "must be a multiple of 2 pixels.*got 33"),
        ({"image_size": [32, 32, 32]}, r"an integer or \[height, width\]"),
        ({"timestep_embedding": "sine"}, "'timestep_embedding'"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, words):
    with pytest.raises(StrictDataclassError, match=f"(?s){words}"):
        ASelectConfig(**values)


@pytest.mark.parametrize(("name", "near"), [("timestp", "timestep"), ("num_noise_draw", "num_noise_draws")])
def test_a_misspelt_keyword_is_refused_with_the_nearest_field(name, near):
    with pytest.raises(ValueError, match=f"has no field `{name}` .did you mean `{near}`"):
        ASelectConfig(**{name: 5})


def test_what_the_host_writes_into_a_configuration_is_let_in():
    config = ASelectConfig(use_cache=False, torch_dtype="float16", _name_or_path="x", output_attentions=False)
    assert str(config.dtype).removeprefix("torch.") == "float16"
    assert config.name_or_path == "x"


def test_a_misspelt_keyword_is_refused_on_loading(tmp_path):
    ASelectConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no field `timestp` .did you mean `timestep`"):
        ASelectConfig.from_pretrained(tmp_path, timestp=5)


def test_a_transformer_without_its_sizes_is_refused():
    with pytest.raises(
        ValueError, match=r"`transformer` lacks sample_size. Pass the transformer itself, or the whole"
    ):
        ASelectConfig(transformer={name: value for name, value in DIT_XL_2.items() if name != "sample_size"})


@pytest.mark.parametrize("found", [2, "1", True, 0, None])
def test_records_of_a_later_format_ask_for_an_upgrade(model, found):
    folded = model.fold().config.to_dict()
    assert folded["folded_layout"]["format"] == 1
    for field, record in (("folded_layout", folded["folded_layout"]), ("selection", {"timestep": 5})):
        message = rf"`{field}` has format '{found}', but this version of hf_aselect reads formats up to 1"
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            ASelectConfig.from_dict({**folded, field: {**record, "format": found}})


def test_records_without_a_format_are_of_the_first(model):
    folded = model.fold().config.to_dict()
    del folded["folded_layout"]["format"]
    assert ASelectConfig.from_dict(folded).folding == model.fold().config.folding
