"""No step of `forward` and of the loss waits for a value of the device: nothing asks a tensor what it holds.

On an accelerator each such question (`bool(tensor)`, `.item()`, a mask as an index) lets the CPU wait until all that
was asked of the device before is computed. Here tensors that raise when they are asked stand for those on a device.
"""

import pytest
import torch
from conftest import DESCRIBED
from generic_pipelines import GENERIC_PIPELINES
from pipelines import PIPELINES
from torch.utils._python_dispatch import TorchDispatchMode

from hf_aselect import DiTBackbone, DiTForImageClassification, DiTForSemanticSegmentation, DiTModel

# In Python: the question itself, which no operator stands for.
QUESTIONS = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"),
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose", "cpu", "unique"),
}
# Operators whose result, or whose size, the CPU has to know.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "is_nonzero",
    "repeat_interleave.Tensor",
)


class OnDevice(torch.Tensor):
    """A tensor whose values are not to be asked for; so is all that is computed from it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in QUESTIONS, f"{name} was asked of a tensor on the device"
        if name in ("__getitem__", "__setitem__"):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [each for each in places if isinstance(each, torch.Tensor) and each.dtype == torch.bool]
            assert not masks, "a mask is an index, whose number of values the CPU has to know"
        return super().__torch_function__(function, types, args, kwargs or {})


class NoWaiting(TorchDispatchMode):
    """Raises where an operator lets the CPU wait, whatever tensor it is of."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        assert not name.startswith(WAITING), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def on_device(values):
    return values.as_subclass(OnDevice)


def images(model, count=2):
    height, width = model.config.image_height_width
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, model.config.num_channels, height, width, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A folder of each family, saved by diffusers when it is asked for."""
    saved = {}

    def folder(family):
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp(family)
            {**PIPELINES, **GENERIC_PIPELINES}[family]().save_pretrained(saved[family])
        return saved[family]

    return folder


def load(folder, kind, **fields):
    torch.manual_seed(0)
    sizes = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1}
    return kind.from_pretrained(folder, timestep=141, image_size=32, num_labels=3, **sizes, **fields)


def check_step(model, labels=None, train=False):
    """Take one step of inference, or of training, in which nothing may be asked; return what comes out."""
    pixel_values = on_device(images(model))
    given = {} if labels is None else {"labels": on_device(labels)}
    with NoWaiting():
        found = model.train(train)(pixel_values, **given)
        if train:
            found.loss.backward()
    first = found[0][0] if isinstance(found[0], tuple) else found[0]
    assert isinstance(first, OnDevice), "what comes out is no longer known to be on the device"
    return found


@pytest.mark.family
@pytest.mark.parametrize("family", [*PIPELINES, *DESCRIBED])
def test_tokens_of_every_family(pipelines, family):
    model = load(pipelines(family), DiTModel, block=1, zeroed_channels=[3], feature="hidden")
    check_step(model)


@pytest.mark.parametrize("folded", [False, True], ids=["whole", "folded"])
@pytest.mark.parametrize("head", ["linear", "attention"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("what", ["pixel_folder", "latent_folder"])
def test_a_classifier_and_its_loss(request, what, frozen, head, folded):
    folder = request.getfixturevalue(what)
    model = DiTForImageClassification.from_pretrained(
        folder, timestep=50, num_labels=3, head=head, freeze_backbone=frozen, num_noise_draws=2,
        head_hidden_size=16, head_num_attention_heads=2,
    )  # fmt: skip
    model = model.fold() if folded else model
    labels = torch.tensor([2, -100])
    expected = model(images(model), labels=labels).loss
    assert torch.equal(torch.Tensor(check_step(model, labels).loss), expected)
    check_step(model, labels, train=True)


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_a_classifier_that_reads_several(pixel_folder, head):
    fields = {"timestep": [50, 5], "block": "all", "feature": ["hidden", "key"], "zeroed_channels": {"1.hidden": [3]}}
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, num_labels=3, head=head, head_hidden_size=16, head_num_attention_heads=2, **fields
    )
    model.standardize(images(model, 4))
    check_step(model, torch.tensor([2, -100]), train=True)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([-100, -100])),
        ("multi_label_classification", torch.tensor([[0, 1, 1], [0, 0, 1]])),
        ("regression", torch.tensor([[0.5, 1, 1], [0, 0, 1]])),
    ],
)
def test_the_losses_of_other_problems(pixel_folder, problem, labels):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=50, num_labels=3, head="linear", problem_type=problem
    )
    check_step(model, labels, train=True)


def test_cached_features_of_a_classifier(classifier, pixels):
    features = classifier.extract_features(pixels)
    labels = on_device(torch.zeros(len(pixels), dtype=torch.long))
    with NoWaiting():
        assert isinstance(classifier(latents=on_device(pixels)).logits, OnDevice)
        assert isinstance(classifier(features=on_device(features), labels=labels).loss, OnDevice)


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_a_segmenter_and_its_loss(latent_folder, pixel_folder, decoder, resampled, tmp_path):
    from conftest import build_transformer
    from diffusers import DDPMScheduler

    build_transformer(num_layers=4).save_pretrained(tmp_path / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    model = DiTForSemanticSegmentation.from_pretrained(
        tmp_path, timestep=50, num_labels=3, decoder=decoder, decoder_hidden_size=8, auxiliary_hidden_size=8,
        resample_noise_in_training=resampled,
    )  # fmt: skip
    labels = torch.zeros(2, *model.config.image_height_width, dtype=torch.uint8)
    labels[0] = 255
    check_step(model, labels)
    check_step(model, labels, train=True)


def test_a_backbone(latent_folder):
    model = DiTBackbone.from_pretrained(latent_folder, timestep=50, out_indices=[0, 2])
    check_step(model)


@pytest.mark.parametrize(
    "ask",
    [bool, float, torch.Tensor.tolist, lambda each: each[each > 0], lambda each: each.nonzero(), torch.Tensor.item],
    ids=["bool", "float", "tolist", "mask", "nonzero", "item"],
)
def test_what_would_wait_is_found(ask):
    """The tensors and the mode that the tests above rest on raise at each kind of question."""
    with pytest.raises(AssertionError), NoWaiting():
        ask(on_device(torch.ones(1)))


def test_values_on_the_cpu_are_still_looked_at(classifier, pixels):
    pixels[0, 0, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"`pixel_values` must be finite and in \[-1, 1\], got NaN or infinite values"
    ):
        classifier(pixels)
    with pytest.raises(ValueError, match=r"`labels` must be class indices in \[0, 4\), got \[7\]"):
        classifier(pixels[1:], labels=torch.full((6,), 7))
