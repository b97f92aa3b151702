"""Dense models: backbone, decoders, transformers' heads on a DiT, masks and the metric."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import build_transformer, take_one_step
from datasets import Dataset
from datasets import Image as Pictures
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from pipelines import PIPELINES
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTBackbone,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    MeanIoU,
    NoiseSchedule,
    select_timestep,
)
from hf_aselect.cli import main
from hf_aselect.model.modeling_aselect import save_image_processor
from hf_aselect.selection.criteria import PatchProbe
from hf_aselect.selection.images import CalibrationPictures

NUM_LABELS = 3
ZERO = np.zeros((1, 2, 2), dtype=int)
DECODERS = {"linear": {}, "upernet": {"decoder": "upernet", "decoder_hidden_size": 16, "auxiliary_hidden_size": 8}}


SHALLOW = {**build_transformer().config, "_class_name": "DiTTransformer2DModel", "num_layers": 3}


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A DiT of eight blocks on RGB images of 8 × 8: enough for four stages."""
    folder = tmp_path_factory.mktemp("deep")
    transformer = build_transformer(num_layers=8)
    transformer.save_pretrained(folder)
    return folder


@pytest.fixture
def labels():
    generator = torch.Generator().manual_seed(4)
    values = torch.randint(0, NUM_LABELS, (7, 8, 8), generator=generator)
    values[0, 0, 0] = 255
    return values


def load(folder, decoder="linear", **fields):
    torch.manual_seed(0)
    options = {"timestep": 50, "num_labels": NUM_LABELS, **DECODERS[decoder], **fields}
    return DiTForSemanticSegmentation.from_pretrained(folder, **options)


def test_a_backbone_gives_the_maps_of_its_stages_from_one_pass(deep_folder, pixels):
    backbone = DiTBackbone.from_pretrained(deep_folder, timestep=50, out_indices=[0, 2, 8])
    model = DiTModel.from_pretrained(deep_folder, timestep=50)
    calls = []
    backbone.denoiser.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        maps = backbone(pixels).feature_maps
        assert len(calls) == 1
        for found, block in zip(maps[1:], (1, 7), strict=True):
            assert found.shape == (7, 16, 4, 4)
            expected = model.extract_features(pixels, block=block)
            assert torch.equal(found.flatten(2).transpose(1, 2), expected)
        stem = model.denoiser.transformer.pos_embed(model.add_noise(model.encode(pixels), 50))
        assert torch.equal(maps[0].flatten(2).transpose(1, 2), stem)
    assert backbone.channels == [16, 16, 16] and backbone.out_features == ["stem", "stage2", "stage8"]


def test_a_map_of_a_picture_that_is_not_square_keeps_rows_and_columns_apart(deep_folder):
    backbone = DiTBackbone.from_pretrained(deep_folder, timestep=50, out_indices=[3])
    pixel_values = torch.rand(1, 3, 8, 16)
    found = backbone(pixel_values).feature_maps[0]
    assert found.shape == (1, 16, 4, 8)
    tokens = DiTModel.from_pretrained(deep_folder, timestep=50, block=2)(pixel_values).last_hidden_state
    assert torch.equal(found[0, :, 1, 2], tokens[0, 1 * 8 + 2])


def test_no_block_after_the_last_stage_is_run(deep_folder, pixels):
    backbone = DiTBackbone.from_pretrained(deep_folder, timestep=50, out_indices=[1, 3])
    ran = []
    for index, block in enumerate(backbone.denoiser.transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    backbone(pixels)
    assert ran == [0, 1]  # the query of the third is read before it runs


def test_a_backbone_is_loaded_from_what_any_of_our_models_saved(deep_folder, pixels, tmp_path):
    DiTForImageClassification.from_pretrained(deep_folder, timestep=77, num_labels=2, head="linear").save_pretrained(
        tmp_path
    )
    backbone = DiTBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage4"])
    assert backbone.config.timestep == 77
    expected = DiTBackbone.from_pretrained(deep_folder, timestep=77, out_indices=[1, 4])
    for found, other in zip(backbone(pixels).feature_maps, expected(pixels).feature_maps, strict=True):
        assert torch.equal(found, other)
    backbone.save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.out_indices == [1, 4] and config.out_features == ["stage1", "stage4"]
    # Of transformers' `AutoBackbone`, from_pretrained knows ids of the Hub alone: test_diffusers_files.py has one.
    assert isinstance(AutoBackbone.from_config(config), DiTBackbone)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_is_a_backbone(name, tmp_path):
    PIPELINES[name]().save_pretrained(tmp_path)
    backbone = DiTBackbone.from_pretrained(tmp_path, timestep=5, out_indices=[0, 1, 2], feature="key")
    height, width = backbone.config.image_height_width
    maps = backbone(torch.rand(1, 3, height, width), output_hidden_states=True)
    side = backbone.config.patch_pixels
    for found, channels in zip(maps.feature_maps, backbone.channels, strict=True):
        assert found.shape == (1, channels, height // side, width // side)
    assert len(maps.hidden_states) == len(backbone.stage_names)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_segmenter_saves_reloads_and_is_found_by_auto(deep_folder, pixels, tmp_path, decoder):
    model = load(deep_folder, decoder)
    with torch.no_grad():
        expected = model(pixels).logits
    assert expected.shape == (7, NUM_LABELS, 8, 8)
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert isinstance(again, DiTForSemanticSegmentation)
    given = again(pixels, output_hidden_states=True).hidden_states
    assert len(given) == len(again.config.stage_names)
    assert torch.equal(given[2], again.extract_features(pixels, block=1, feature="hidden"))
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, expected)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("decoder", DECODERS)
def test_one_step_moves_what_is_trained_and_nothing_else(deep_folder, pixels, labels, decoder, frozen):
    model = load(deep_folder, decoder, freeze_backbone=frozen).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(pixels, labels=labels).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    # A bias before a batch norm has no gradient but rounding.
    asked = {name for name, value in model.named_parameters() if value.requires_grad}
    assert moved <= asked and len(moved) > 0.8 * len(asked)
    assert any(name.startswith("backbone") for name in moved) != frozen


def test_pixels_of_no_class_have_no_share_in_the_loss(deep_folder, pixels, labels):
    model = load(deep_folder)
    with torch.no_grad():
        logits = model(pixels).logits
        expected = nn.functional.cross_entropy(logits, labels, ignore_index=255)
        torch.testing.assert_close(model(pixels, labels=labels).loss, expected)
        assert float(model(pixels, labels=torch.full_like(labels, 255)).loss) == 0
        other = load(deep_folder, semantic_loss_ignore_index=1)
        changed = torch.where(labels == 255, 1, labels)
        torch.testing.assert_close(
            other(pixels, labels=changed).loss,
            nn.functional.cross_entropy(other(pixels).logits, changed, ignore_index=1),
        )


def test_the_auxiliary_head_counts_in_training_alone(deep_folder, pixels, labels):
    model = load(deep_folder, "upernet")
    for parameter in model.decode_head.auxiliary_head.parameters():
        nn.init.constant_(parameter, 0.3)
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        with_head = float(model(pixels, labels=labels).loss)
        model.config.auxiliary_loss_weight = 0.0
        assert float(model(pixels, labels=labels).loss) < with_head
    assert load(deep_folder, "upernet", auxiliary_hidden_size=0).decode_head.auxiliary_head is None


def test_a_timestep_is_selected_for_a_segmenter_too(deep_folder, pixels):
    model = load(deep_folder, timestep="auto", calibration_images=pixels)
    assert model.config.selection["timestep"] == model.config.timestep
    assert select_timestep(model, pixels, timesteps=[5, 500], criterion="hfr").block == 3


class TellingModel:
    """Tokens that tell the class of their patch at timestep 300, and nothing elsewhere."""

    def __init__(self):
        transformer = {"_class_name": "DiTTransformer2DModel", "num_layers": 4, "num_attention_heads": 1}
        sizes = {"attention_head_dim": 4, "in_channels": 3, "sample_size": 8, "patch_size": 2}
        self.config = ASelectConfig(transformer={**transformer, **sizes}, feature="query", block=1)
        self.noise_schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler"})

    def encode(self, pixel_values):
        return pixel_values

    def _read_taps(self, noised_latents, timesteps, taps):
        clean = nn.functional.avg_pool2d(noised_latents[:, :1], 2).flatten(2).transpose(1, 2)  # (B, N, 1)
        noise = torch.randn(len(clean), clean.shape[1], 4, generator=torch.Generator().manual_seed(0))
        told = noise + 20 * clean * torch.tensor([1.0, 0, 0, 0])
        return {tap: torch.where((timesteps == 300).view(-1, 1, 1), told, noise) for tap in taps}


def halves(count):
    """Images of a bright and a dark half, and their masks; a row of no class."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, 8, 8, dtype=torch.long)
    for mask, side in zip(masks, torch.randint(0, 4, (count,), generator=generator), strict=True):
        mask[[slice(0, 4), slice(4, 8), slice(None), slice(None)][side]] = side < 2
        mask[:, [slice(None), slice(None), slice(0, 4), slice(4, 8)][side]] |= side >= 2
    pictures = (2.0 * masks - 1)[:, None].expand(-1, 3, -1, -1)
    masks[:, :2] = 255
    return pictures, masks


def test_the_probe_of_patches_finds_the_timestep_that_tells_their_class():
    pictures, masks = halves(40)
    model, grid = TellingModel(), [0, 100, 300, 600]
    record = select_timestep(model, pictures, criterion="probe", labels=list(masks), timesteps=grid)
    assert (record.timestep, record.criterion, record.num_images) == (300, "patch_probe", 40)
    assert record.scores[2] > 0.8 > sorted(record.scores)[-2] + 0.15


def test_few_images_with_masks_are_not_advised_to_be_none():
    images, masks = halves(8)
    record = select_timestep(TellingModel(), images, criterion="probe", labels=list(masks), timesteps=[0, 300])
    (few,) = [text for text in record.warnings if text.startswith("it is based on 8 images")]
    assert few.endswith("however confident it seems. Pass more images.")


def test_masks_of_a_dataset_are_cut_and_resized_with_its_pictures(deep_folder):
    model = DiTModel.from_pretrained(deep_folder, timestep=50)
    pictures, masks = halves(12)
    rows = (
        Dataset.from_dict(
            {
                "image": [
                    Image.fromarray(((p + 1) * 127).byte().permute(1, 2, 0).numpy()).resize((24, 16)) for p in pictures
                ],
                "mask": [Image.fromarray(m.byte().numpy()).resize((24, 16), Image.Resampling.NEAREST) for m in masks],
            }
        )
        .cast_column("image", Pictures())
        .cast_column("mask", Pictures())
    )
    options = {"criterion": "probe", "timesteps": [5, 500], "feature": "hidden"}
    by_name = select_timestep(model, rows.select_columns(["image", "mask"]), labels="mask", **options)
    by_value = select_timestep(model, rows.select_columns(["image"]), labels=rows["mask"][:], **options)
    assert by_name.scores == by_value.scores and max(by_name.scores) > 0.8


def test_a_patch_has_the_class_of_most_of_its_pixels(deep_folder):
    config = DiTModel.from_pretrained(deep_folder, timestep=50).config
    pictures = CalibrationPictures(torch.zeros(1, 3, 4, 4), config, 1, 0)
    mask = torch.tensor([[0, 2, 255, 255], [2, 2, 255, 255], [255, 255, 1, 1], [255, 0, 0, 1]])
    assert pictures.patch_labels(0, mask, 2, 2, 255).tolist() == [2, -1, 0, 1]
    with pytest.raises(ValueError, match=r"A mask has shape .4, 3., but its image has .4, 4."):
        pictures.patch_labels(0, mask[:, :3], 2, 2, 255)


def test_a_probe_of_patches_needs_masks(deep_folder, pixels):
    model = DiTModel.from_pretrained(deep_folder, timestep=50)
    with pytest.raises(ValueError, match="needs masks as `labels`"):
        select_timestep(model, pixels, criterion="patch_probe", labels=[0, 1, 0, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="must have one mask per image, got 2 masks for 7 images"):
        select_timestep(model, pixels, criterion="probe", labels=[np.zeros((8, 8), dtype=int)] * 2)
    with pytest.raises(ValueError, match="`num_patches` of 'patch_probe' must be at least 1, got 0"):
        PatchProbe(num_patches=0)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_segmenter_trains_with_trainer_and_segments_in_a_pipeline(
    deep_folder, pixels, labels, tmp_path, decoder, monkeypatch
):
    # Transformers' logger does not propagate.
    complaints = []
    monkeypatch.setattr("transformers.pipelines.base.logger.error", complaints.append)
    model = load(deep_folder, decoder)
    rows = [{"pixel_values": picture, "labels": label} for picture, label in zip(pixels, labels, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    processor = ASelectImageProcessor.from_model_config(model.config)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    segment = pipeline("image-segmentation", model=str(tmp_path / "saved"), device="cpu")
    assert not complaints
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    found = segment(picture)
    assert {each["label"] for each in found} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert all(each["mask"].size == (30, 20) for each in found)


def test_accumulated_gradients_of_a_segmenter_are_those_of_one_batch(deep_folder, pixels, labels, tmp_path):
    # One image, as the decoder's batch norm sees each batch alone.
    rows = [{"pixel_values": pixels[0], "labels": labels[0]}] * 4
    weights = []
    for size in (4, 1):
        torch.manual_seed(0)
        model = load(deep_folder, "linear")
        take_one_step(model, rows, size, tmp_path / "out")
        weights.append({name: value.detach().clone() for name, value in model.decode_head.named_parameters()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name)


def test_upernet_of_the_host_stands_on_a_dit(deep_folder, pixels, labels, tmp_path):
    backbone = DiTBackbone.from_pretrained(deep_folder, timestep=50, out_indices=[2, 4, 6, 7])
    config = UperNetConfig(
        backbone_config=backbone.config, hidden_size=16, auxiliary_channels=8, num_labels=NUM_LABELS
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(backbone.state_dict())
    trains_two_steps(model, pixel_values=pixels, labels=labels)
    model.eval().save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits)


def trains_two_steps(model, **inputs):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    frozen = {name: p.clone() for name, p in model.named_parameters() if ".denoiser." in name}
    assert frozen and not any(p.requires_grad for name, p in model.named_parameters() if ".denoiser." in name)
    losses = []
    for _ in range(2):
        loss = model.train()(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.family
def test_mask2former_of_the_host_stands_on_a_dit(deep_folder):
    # Its pixel decoder wants four scales; the grid of a plain transformer has one, which it takes as well.
    backbone = DiTBackbone.from_pretrained(deep_folder, timestep=50, out_indices=[2, 4, 6, 7], image_size=32)
    config = Mask2FormerConfig(
        backbone_config=backbone.config,
        feature_size=32,  # its norms have 32 groups
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=4,
        num_labels=NUM_LABELS,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    masks = torch.zeros(2, 32, 32)
    masks[0, :16], masks[1, 16:] = 1, 1
    trains_two_steps(
        model,
        pixel_values=torch.rand(2, 3, 32, 32),
        mask_labels=[masks, masks],
        class_labels=[torch.tensor([0, 2]), torch.tensor([1, 2])],
    )


@pytest.mark.family
def test_dpt_of_the_host_stands_on_a_dit(deep_folder):
    backbone = DiTBackbone.from_pretrained(
        deep_folder, timestep=50, out_indices=[2, 4, 6, 7], reshape_hidden_states=False
    )
    tokens = backbone(torch.rand(2, 3, 8, 8)).feature_maps[0]
    assert tokens.shape == (2, 17, 16)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    config = DPTConfig(
        backbone_config=backbone.config,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        readout_type="ignore",
        is_hybrid=False,
    )
    model = DPTForDepthEstimation(config).eval()
    assert isinstance(model.backbone, DiTBackbone)
    depth = model(torch.rand(2, 3, 8, 8)).predicted_depth
    assert depth.shape[0] == 2 and bool(depth.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels[:, :4], r"class indices of shape \(7, 8, 8\), one per pixel, got torch.int64 of shape"),
        (lambda labels: labels.float(), r"got torch.float32"),
        (lambda labels: labels > 0, r"got torch.bool"),
        (lambda labels: labels + 1, r"class indices in \[0, 3\), or 255 for pixels without a class, got \[3, 256\]"),
    ],
    ids=["size", "type", "truth values", "values"],
)
def test_bad_labels_are_refused(deep_folder, pixels, labels, change, message):
    with pytest.raises(ValueError, match=message):
        load(deep_folder)(pixels, labels=change(labels))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_integer_dtype(deep_folder, pixels, labels, dtype):
    model = load(deep_folder).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels, labels=labels.to(dtype)).loss, model(pixels, labels=labels).loss)
    with pytest.raises(ValueError, match=r"class indices in \[0, 3\), or 255 for pixels without a class, got \[77\]"):
        model(pixels, labels=torch.full_like(labels, 77).to(dtype))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_part_of_the_decoder_is_refused(deep_folder, tmp_path, decoder):
    load(deep_folder, decoder=decoder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.startswith("decode_head.") and name.endswith("weight"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"only a part of the decoder: 1 of its \d+ tensors are missing.*{name}"):
        DiTForSemanticSegmentation.from_pretrained(tmp_path)


def test_another_decoder_is_a_new_one_where_that_is_asked_for(deep_folder, pixels, tmp_path):
    load(deep_folder, decoder="linear").save_pretrained(tmp_path)
    other = {"decoder": "upernet", "decoder_hidden_size": 8, "auxiliary_hidden_size": 8}
    with pytest.raises(ValueError, match=r"have another kind of decoder: .*`ignore_mismatched_sizes=True`.*`decoder`"):
        DiTForSemanticSegmentation.from_pretrained(tmp_path, **other)
    model = DiTForSemanticSegmentation.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **other)
    assert model(pixels).logits.shape == (7, 3, 8, 8)


def test_a_classifiers_checkpoint_gives_its_backbone_to_a_segmenter(deep_folder, pixels, tmp_path):
    DiTForImageClassification.from_pretrained(deep_folder, timestep=5, num_labels=3, head="linear").save_pretrained(
        tmp_path
    )
    assert DiTForSemanticSegmentation.from_pretrained(tmp_path)(pixels).logits.shape == (7, 3, 8, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_indices": [3, 1]}, r"`out_indices` must be strictly increasing, got \[3, 1\]"),
        ({"out_indices": [1, 1]}, r"`out_indices` must be strictly increasing"),
        ({"out_indices": [99]}, r"`out_indices` must be integers in \[-9, 9\), got \[99\]"),
        ({"out_features": ["stage99"]}, "out_features must be a subset of stage_names"),
        ({"decoder": "unet"}, "`decoder` must be 'linear' or 'upernet', got 'unet'"),
        ({"decoder": "upernet", "out_indices": [1, 2]}, r"needs four blocks in `out_indices`, got \[1, 2\]"),
        (
            {"decoder": "upernet", "transformer": SHALLOW},
            "reads four blocks, but this transformer has 3. Use",
        ),
        ({"decoder_hidden_size": 0}, "`decoder_hidden_size` must be in .1, 65536., got 0"),
    ],
)
def test_bad_stages_and_decoders_are_refused(deep_folder, fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        if "transformer" in fields:
            ASelectConfig(**fields)
        DiTBackbone.from_pretrained(deep_folder, timestep=5, **fields)


def test_labels_that_disagree_with_their_names_are_refused(deep_folder):
    with pytest.raises(ValueError, match="num_labels"):
        ASelectConfig(num_labels=3, id2label={0: "sky", 1: "road"})


# Masks.


@pytest.fixture
def processor():
    return ASelectImageProcessor(size={"height": 8, "width": 8})


def gradient(height, width):
    """An image whose red is its row and green its column, and a mask of its quarters."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows * 255 // height, columns * 255 // width, 0 * rows], axis=-1).astype(np.uint8)
    mask = (2 * (rows >= height // 2) + (columns >= width // 2)).astype(np.uint8)
    return Image.fromarray(picture), Image.fromarray(mask)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (30, 20)])
@pytest.mark.parametrize("crop", [True, False])
def test_a_mask_is_cut_and_resized_as_its_picture(processor, size, crop):
    picture, mask = gradient(*size)
    batch = processor(picture, mask, do_center_crop=crop, return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 8, 8) and batch.labels.shape == (1, 8, 8)
    assert batch.labels.dtype == torch.int64
    # The image tells where its middle is.
    red, green = batch.pixel_values[0, 0], batch.pixel_values[0, 1]
    expected = 2 * (red > 0).long() + (green > 0).long()
    far = (red.abs() > 0.15) & (green.abs() > 0.15)  # pixels at the border are a matter of rounding
    assert torch.equal(batch.labels[0][far], expected[far]) and float(far.float().mean()) > 0.4


def test_a_mask_keeps_its_values(processor):
    values = np.array([[0, 7], [200, 255]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    for mask in (values, Image.fromarray(values), torch.from_numpy(values), values.astype(np.int64)):
        found = processor([picture], [mask], return_tensors="np").labels
        assert sorted(np.unique(found)) == [0, 7, 200, 255]
    palette = Image.fromarray(values).convert("P")
    palette.putdata(list(values.flatten()))
    assert sorted(np.unique(processor(picture, palette, return_tensors="np").labels)) == [0, 7, 200, 255]


def test_labels_can_be_reduced(processor):
    values = np.array([[0, 1], [5, 255]], dtype=np.uint8)
    options = {"do_reduce_labels": True, "do_resize": False, "do_center_crop": False, "return_tensors": "np"}
    found = processor(np.zeros((2, 2, 3), dtype=np.uint8), values, **options)
    assert found.labels.tolist() == [[[255, 0], [4, 255]]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((8, 9), dtype=np.uint8), r"A mask must have the size of its image, 8×8 pixels, got 8×9"),
        (Image.new("RGB", (8, 8)), "got an image of mode RGB. Map its colors to indices"),
        (np.zeros((8, 8, 3), dtype=np.uint8), r"integers of shape \(H, W\)"),
        (np.zeros((8, 8)), "got float64"),
        (np.zeros((0, 8), dtype=np.uint8), r"A mask must not be empty, got shape \(0, 8\)"),
        (np.full((8, 8), 2**31), "must have class indices in"),
    ],
    ids=["size", "colours", "axes", "floats", "empty", "large"],
)
def test_bad_masks_are_refused(processor, mask, message):
    with pytest.raises(ValueError, match=message):
        processor([np.zeros((8, 8, 3), dtype=np.uint8)], [mask])


def test_as_many_masks_as_pictures_are_wanted(processor):
    with pytest.raises(ValueError, match="got 1 masks for 2 images"):
        processor([np.zeros((8, 8, 3), dtype=np.uint8)] * 2, [np.zeros((8, 8), dtype=np.uint8)])


class Logits:
    """What a model returned: class 1 in the left quarter of what it saw, 2 in the rest."""

    logits = torch.tensor([0.0, 9.0, 0.0] * 16 + [0.0, 0.0, 9.0] * 48).reshape(1, 8, 8, 3).permute(0, 3, 2, 1)


@pytest.mark.parametrize("do_resize", [True, False])
def test_a_mask_lies_where_the_model_saw_the_picture(do_resize):
    """An image of 8 × 24 is cut to its middle third; what is left and right of it was not seen."""
    processor = ASelectImageProcessor(size=8, do_resize=do_resize)
    (mask,) = processor.post_process_semantic_segmentation(Logits, target_sizes=[(8, 24)])
    assert mask.tolist() == [[1] * 10 + [2] * 14] * 8
    (whole,) = processor.post_process_semantic_segmentation(Logits, target_sizes=torch.tensor([[8, 8]]))
    assert whole.tolist() == [[1] * 2 + [2] * 6] * 8
    (both,) = processor.post_process_semantic_segmentation(Logits, [(8, 24)], return_segmentation_scores=True)
    assert torch.equal(both["segmentation"], mask) and both["segmentation_scores"].shape == (3, 8, 24)
    assert torch.equal(both["segmentation_scores"].argmax(0), mask)


def test_a_mask_covers_a_picture_that_was_seen_whole():
    processor = ASelectImageProcessor(size=8, do_center_crop=False)
    (mask,) = processor.post_process_semantic_segmentation(Logits, target_sizes=[(8, 24)])
    assert mask.tolist() == [[1] * 6 + [2] * 18] * 8
    processor = ASelectImageProcessor(size=8)
    tall = processor.post_process_semantic_segmentation(Logits, target_sizes=[(20, 16)])[0]
    assert tall.tolist() == [[1] * 4 + [2] * 12] * 20


def corner(rows, columns):
    """A black image whose left quarter is white."""
    values = np.zeros((rows, columns, 3), dtype=np.uint8)
    values[:, : columns // 4] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize("is_folded", [False, True])
def test_a_published_segmenter_sees_the_whole_of_a_picture(deep_folder, tmp_path, is_folded):
    model = load(deep_folder)
    if is_folded:
        model.save_pretrained(tmp_path / "model")
        assert main(["fold", str(tmp_path / "model"), str(tmp_path / "published")]) == 0
    else:
        model.save_pretrained(tmp_path / "published")
        save_image_processor(model, tmp_path / "published")
    segment = pipeline("image-segmentation", model=str(tmp_path / "published"), device="cpu")
    pixels = segment.preprocess(corner(8, 32))["pixel_values"][0, 0]
    assert bool((pixels[:, : pixels.shape[1] // 4 - 1] > 0.9).all()) and bool((pixels[:, -2:] < -0.9).all())


def test_logits_become_masks_of_the_sizes_asked_for(deep_folder, processor, pixels):
    output = load(deep_folder)(pixels[:2])
    masks = processor.post_process_semantic_segmentation(output, target_sizes=[(20, 30), (5, 7)])
    assert [tuple(mask.shape) for mask in masks] == [(20, 30), (5, 7)]
    assert torch.equal(processor.post_process_semantic_segmentation(output)[0], output.logits[0].argmax(0))


def test_a_saved_processor_reloads(deep_folder, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    ASelectConfig().save_pretrained(tmp_path)
    picture, mask = gradient(16, 16)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(
        again(picture, mask, return_tensors="pt").labels, processor(picture, mask, return_tensors="pt").labels
    )


# The metric.


def masks(seed, shape=(4, 16, 16), classes=5):
    return np.random.default_rng(seed).integers(0, classes, shape)


def figures_of(truth, guess, classes, ignored=255):
    kept = truth != ignored
    counts = confusion_matrix(truth[kept], guess[kept], labels=range(classes))
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    present, true = union > 0, counts.sum(1) > 0
    return {
        "mean_iou": (counts.diagonal()[present] / union[present]).mean(),
        "mean_accuracy": (counts.diagonal()[true] / counts.sum(1)[true]).mean(),
        "overall_accuracy": counts.diagonal().sum() / counts.sum(),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_metric_equals_scikit_learns_confusion_matrix(seed):
    truth, guess = masks(seed), masks(seed + 100)
    truth[0, :3] = 255
    found = MeanIoU(num_labels=5).compute(predictions=guess, references=truth)
    for name, value in figures_of(truth, guess, 5).items():
        assert found[name] == pytest.approx(value), name
    assert found["absent_classes"] == []


@pytest.mark.process
def test_counts_add_up_over_batches(tmp_path):
    truth, guess = masks(0), masks(1)
    metric = MeanIoU(num_labels=5)
    for at in range(0, 4, 2):
        metric.add_batch(predictions=guess[at : at + 2], references=truth[at : at + 2])
    whole = MeanIoU(num_labels=5).compute(predictions=guess, references=truth)
    assert metric.compute() == whole
    for index in range(4):
        metric.add(prediction=guess[index], reference=truth[index])
    assert metric.compute() == whole


def test_counts_add_up_over_processes(tmp_path):
    truth, guess = masks(0), masks(1)
    options = {"num_labels": 5, "num_process": 2, "experiment_id": "pair", "cache_dir": str(tmp_path)}

    def run(rank):
        metric = MeanIoU(process_id=rank, **options)
        metric.add_batch(predictions=guess[rank::2], references=truth[rank::2])
        return metric.compute()

    # They wait for each other, as processes do.
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == MeanIoU(num_labels=5).compute(predictions=guess, references=truth)
    assert second is None


def test_classes_that_neither_has_are_left_out_and_named():
    truth, guess = masks(0, classes=3), masks(1, classes=3)
    guess[0, 0, 0] = 3
    found = MeanIoU(num_labels=6).compute(predictions=guess, references=truth)
    assert found["absent_classes"] == [4, 5]
    assert found["per_category_iou"][3] == 0 and found["per_category_iou"][4] is None
    assert found["per_category_accuracy"][3] is None
    assert found["mean_iou"] == pytest.approx(figures_of(truth, guess, 6)["mean_iou"])


@pytest.mark.parametrize(
    ("truth", "guess", "message"),
    [
        (
            np.zeros((1, 2, 2), int),
            np.zeros((1, 2, 3), int),
            r"got \(2, 3\) and \(2, 2\)",
        ),
        (
            np.full((1, 2, 2), 9),
            np.zeros((1, 2, 2), int),
            r"A reference holds \[9\], expected classes in \[0, 5\) or 255",
        ),
        (np.zeros((1, 2, 2), int), np.full((1, 2, 2), 5), r"A prediction holds \[5\], expected classes in \[0, 5\)\."),
        (np.full((1, 2, 2), 255), np.zeros((1, 2, 2), int), "at least one pixel with a class, got none"),
        (np.zeros((2, 2, 2), int), np.zeros((1, 2, 2), int), "got 1 predicted masks and 2 references"),
    ],
)
def test_bad_masks_are_refused_by_the_metric(truth, guess, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(num_labels=5).compute(predictions=guess, references=truth)


def test_a_metric_of_no_class_is_refused():
    with pytest.raises(ValueError, match="`num_labels` must be at least 1, got 0"):
        MeanIoU(num_labels=0)
