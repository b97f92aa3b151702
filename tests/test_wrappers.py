"""Public functions take a model whatever is wrapped around it, and whichever copy of this code it is of."""

import importlib.util
import sys
from pathlib import Path

import datasets
import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

import hf_aselect
from hf_aselect import ASelectCallback, DiTForImageClassification, cache_features, select_timestep
from hf_aselect.folding.fold import fold_model
from hf_aselect.hub.push import write_model_card
from hf_aselect.selection.apply import apply_selection, standardize
from hf_aselect.selection.distribution import unwrapped
from hf_aselect.training.fit import FitOptions, fit_head

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def linear_classifier(folder):
    torch.manual_seed(0)
    return DiTForImageClassification.from_pretrained(folder, timestep=50, head="linear", num_labels=2)


@pytest.fixture
def dataset(pictures):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 3}, features=features)


def by_peft(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=model.lora_targets()))


WRAPPERS = {
    "nothing": lambda model: model,
    "ddp": nn.parallel.DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "peft": by_peft,
    # Siblings.
    "data_parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "ddp_peft": lambda model: nn.parallel.DistributedDataParallel(by_peft(model)),
    "compile_ddp": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_is_taken_whatever_is_around_it(pixel_folder, dataset, tmp_path, wrapper):
    plain, wrapped = linear_classifier(pixel_folder), WRAPPERS[wrapper](linear_classifier(pixel_folder))
    options = {"timesteps": [100, 500]}
    selection = select_timestep(wrapped, dataset, **options)
    assert selection.scores == select_timestep(plain, dataset, **options).scores
    apply_selection(wrapped, selection)
    inner = unwrapped(wrapped)
    assert inner.config.timestep == selection.timestep
    standardize(wrapped, dataset, 6)
    plain.apply_selection(selection)
    cached, expected = (cache_features(each, dataset, tmp_path / "cache") for each in (wrapped, plain))
    # An adapter that is new changes nothing, but is among the weights.
    assert torch.equal(cached["features"][:], expected["features"][:])
    if "peft" not in wrapper:
        assert cached.cache_files == expected.cache_files
        assert fit_head(wrapped, dataset, FitOptions()).num_images == 6
        assert torch.isfinite(fold_model(wrapped)(torch.zeros(1, 3, 8, 8)).logits).all()
    write_model_card(wrapped, tmp_path / "card")
    assert (tmp_path / "card" / "README.md").is_file()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrapper", ["ddp", "compile", "ddp_peft"])
def test_the_callback_takes_it_too(pixel_folder, dataset, pixels, tmp_path, wrapper):
    model = linear_classifier(pixel_folder)
    model.config.timestep = "auto"
    rows = [{"pixel_values": value, "labels": index % 2} for index, value in enumerate(pixels)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = Trainer(model, arguments, train_dataset=rows)
    callback = ASelectCallback(timesteps=[100, 500])
    given = {"model": WRAPPERS[wrapper](model), "train_dataloader": trainer.get_train_dataloader()}
    callback.on_train_begin(arguments, trainer.state, trainer.control, **given)
    assert model.config.timestep in (100, 500)


def test_a_model_of_others_is_rejected_with_what_would_do(pixel_folder, pictures):
    with pytest.raises(ValueError, match=r"must be an hf_aselect model, or one wrapped by DDP.*, got a Linear"):
        select_timestep(nn.Linear(2, 2), pictures)
    composite = nn.ModuleDict({"eyes": linear_classifier(pixel_folder)})
    with pytest.raises(ValueError, match=r"must be an hf_aselect model, got a ModuleDict. Pass its `model\.eyes`"):
        select_timestep(composite, pictures)


@pytest.fixture(scope="module")
def copied():
    """The package's code a second time, as a checkpoint's own code is: each class is another one."""
    name = "copy_of_model"
    folder = Path(hf_aselect.__file__).parent / "model"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield importlib.import_module(f"{name}.modeling_classification")
    for each in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[each]


def test_a_model_of_a_copy_of_this_code_is_taken(copied, pixel_folder, dataset, pixels, tmp_path):
    ours = linear_classifier(pixel_folder)
    ours.save_pretrained(tmp_path / "saved")
    model = copied.DiTForImageClassification.from_pretrained(tmp_path / "saved")
    assert not isinstance(model, DiTForImageClassification)
    selection = select_timestep(model, dataset, timesteps=[100, 500])
    apply_selection(model, selection)
    assert model.config.timestep == selection.timestep
    assert len(cache_features(model, dataset, tmp_path / "cache")) == 6
    assert fit_head(model, dataset, FitOptions()).num_images == 6
    assert torch.isfinite(fold_model(model)(torch.zeros(1, 3, 8, 8)).logits).all()
    rows = [{"pixel_values": value, "labels": index % 2} for index, value in enumerate(pixels)]
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=1)
    model.config.timestep = "auto"
    Trainer(model, arguments, train_dataset=rows, callbacks=[ASelectCallback(timesteps=[100, 500])]).train()
    assert (tmp_path / "out" / "README.md").is_file()
    # A configuration of the copy, where diffusers saved the model: a sibling.
    again = DiTForImageClassification.from_pretrained(pixel_folder, config=model.config)
    assert again.config.timestep == model.config.timestep


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # of one process
@pytest.mark.usefixtures("group")
def test_the_first_version_of_fsdp_is_rejected_in_a_line(pixel_folder, dataset, tmp_path):
    wrapped = FullyShardedDataParallel(
        linear_classifier(pixel_folder), device_id=torch.device("cpu"), use_orig_params=True
    )
    for call in (
        lambda: select_timestep(wrapped, dataset),
        lambda: cache_features(wrapped, dataset, tmp_path),
        lambda: fit_head(wrapped, dataset, FitOptions()),
    ):
        with pytest.raises(ValueError, match=r"FSDP version 1 flattens the weights.*use FSDP2"):
            call()
