"""The names that users type are listed, importable and documented, and importing them costs little."""

import importlib.metadata
import inspect
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
)
from transformers.utils.import_utils import is_torchvision_available

import hf_aselect

# Seconds to import, and not needed by everyone. accelerate is not among them: transformers itself imports it.
HEAVY = ("datasets", "diffusers", "evaluate", "matplotlib")
# Before 5.23 transformers imports it where it is installed.
HEAVY += ("sklearn",) if Version(transformers.__version__) >= Version("5.23") else ()


def test_the_public_list_is_sorted():
    assert hf_aselect.__all__ == sorted(hf_aselect.__all__)


def test_the_public_list_names_all_that_is_public():
    # Submodules become attributes once imported, whether or not anybody lists them.
    own = {
        name
        for name, value in vars(hf_aselect).items()
        if getattr(value, "__module__", "").startswith("hf_aselect.") and not name.startswith("_")
    }
    assert own <= set(hf_aselect.__all__)


@pytest.mark.parametrize("name", hf_aselect.__all__)
def test_every_public_name_is_importable_and_documented(name):
    value = getattr(hf_aselect, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert value.__doc__, f"{name} has no docstring"
    # A dataclass without a docstring gets its signature as one.
    assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'select_timestp'"):
        hf_aselect.select_timestp  # noqa: B018 - the access is what fails


def test_the_version_is_the_installed_one():
    assert hf_aselect.__version__ == importlib.metadata.version("hf_aselect")


@pytest.mark.process
def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, hf_aselect; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_auto_classes_know_the_model_type():
    config_class = hf_aselect.ASelectConfig
    assert config_class.model_type == "aselect_dit"
    assert CONFIG_MAPPING["aselect_dit"] is config_class
    assert type(AutoConfig.for_model("aselect_dit")) is config_class
    assert MODEL_MAPPING[config_class] is hf_aselect.DiTModel
    assert MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config_class] is hf_aselect.DiTForImageClassification
    by_torchvision = {"torchvision": hf_aselect.ASelectImageProcessor} if is_torchvision_available() else {}
    assert IMAGE_PROCESSOR_MAPPING[config_class] == {**by_torchvision, "pil": hf_aselect.ASelectImageProcessorPil}
