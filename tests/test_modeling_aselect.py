import logging

import pytest
import torch
from conftest import HEAD, NUM_BLOCKS
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from hf_aselect import ASelectConfig, ASelectImageProcessor, DiTForImageClassification, DiTModel
from hf_aselect.model.layouts import FEATURES


def same_weights(one, other):
    theirs = dict(other.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in one.named_parameters())


def test_the_outputs_are_tokens_and_their_mean(model, pixels):
    output = model(pixels)
    assert output.last_hidden_state.shape == (7, 16, 16)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(1))


def test_a_picture_gives_the_same_tokens_in_any_batch(model, pixels):
    together = model(pixels).last_hidden_state
    for index in range(7):
        alone = model(pixels[index : index + 1]).last_hidden_state
        torch.testing.assert_close(alone[0], together[index], rtol=1e-5, atol=1e-5 * float(together.abs().max()))


def test_repeating_gives_the_same_bits(model, pixels):
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_tokens_are_those_of_the_steps_one_by_one(model, pixels):
    noised = model.add_noise(model.encode(pixels), 50)
    expected = model._base().denoiser(noised, torch.full((7,), 50), 1, "query")
    assert torch.equal(model(pixels).last_hidden_state, expected)


def test_noise_draws_are_averaged(model, pixels):
    latents, timesteps = model.encode(pixels), torch.full((7,), 50)
    each = [model._base().denoiser(model.add_noise(latents, 50, draw), timesteps, 1, "query") for draw in range(3)]
    found = model.extract_features(pixels, num_noise_draws=3)
    torch.testing.assert_close(found, torch.stack(each).mean(0))


def test_the_noise_seed_changes_the_tokens(model, pixels):
    before = model(pixels).last_hidden_state
    model.config.noise_seed = 1
    assert (model(pixels).last_hidden_state - before).abs().max() > 1e-3


@pytest.mark.parametrize("feature", FEATURES)
def test_a_tap_can_be_asked_for(model, pixels, feature):
    found = model.extract_features(pixels, timestep=7, block=-1, feature=feature)
    noised = model.add_noise(model.encode(pixels), 7)
    expected = model._base().denoiser(noised, torch.full((7,), 7), NUM_BLOCKS - 1, feature)
    assert torch.equal(found, expected)


def test_wide_pictures_are_read(model):
    assert model(torch.zeros(1, 3, 4, 10)).last_hidden_state.shape == (1, 10, 16)


def test_a_training_model_may_draw_fresh_noise(model, pixels):
    model.train()
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    model.config.resample_noise_in_training = True
    assert not torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    model.eval()
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_a_saved_classifier_reloads_to_the_bit(classifier, pixels, tmp_path):
    classifier.save_pretrained(tmp_path)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, classifier(pixels).logits)
    buffers = dict(classifier.named_buffers())
    assert buffers.keys() == dict(again.named_buffers()).keys()
    assert all(torch.equal(value, buffers[name]) for name, value in again.named_buffers())
    before, after = classifier.config.to_dict(), again.config.to_dict()
    assert {k: v for k, v in before.items() if k != "_name_or_path"} == {
        k: v for k, v in after.items() if k != "_name_or_path"
    }


def test_the_position_table_survives_loading(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    table = DiTModel.from_pretrained(tmp_path).denoiser.patch_embedding.pos_embed
    assert bool(table.isfinite().all())
    assert table.abs().max() == 1


def test_a_classifier_saved_in_shards_reloads(classifier, pixels, tmp_path):
    classifier.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(DiTForImageClassification.from_pretrained(tmp_path)(pixels).logits, classifier(pixels).logits)


def test_the_auto_classes_know_the_models(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    ASelectImageProcessor.from_model_config(classifier.config).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ASelectConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), DiTModel)
    assert isinstance(AutoModelForImageClassification.from_pretrained(tmp_path), DiTForImageClassification)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ASelectImageProcessor)


def test_from_config_builds_a_model_with_new_weights(model):
    built = AutoModel.from_config(model.config)
    assert bool(built(torch.zeros(1, 3, 8, 8)).last_hidden_state.isfinite().all())
    assert not same_weights(built, model)


def test_of_a_base_checkpoint_only_the_head_is_missing(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = DiTForImageClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True, **HEAD)
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    assert info["missing_keys"]
    assert same_weights(loaded.backbone, model)


def test_who_asks_for_the_loading_info_is_told_what_is_missing(model, tmp_path):
    model.save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit their configuration"):
        DiTModel.from_pretrained(tmp_path)
    loaded, info = DiTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(loaded.state_dict())
    assert info["unexpected_keys"] == {"other"}


def test_without_a_checkpoint_the_weights_are_those_given(model):
    loaded = DiTModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert same_weights(loaded, model)


def test_there_is_no_text_configuration(model):
    # Transformers takes a field of the name `decoder` for one.
    assert model.config.get_text_config(decoder=True) is model.config


@pytest.mark.parametrize("is_in_config", [False, True])
def test_hidden_states_are_those_of_every_block(model, pixels, is_in_config):
    asked = {} if is_in_config else {"output_hidden_states": True}
    model.config.output_hidden_states = is_in_config
    output = model(pixels, **asked)
    stem, *blocks = output.hidden_states
    noised = model.add_noise(model.encode(pixels), 50)
    timesteps = torch.full((7,), 50)
    assert torch.equal(stem, model._base().denoiser(noised, timesteps, -1, "hidden"))
    assert len(blocks) == NUM_BLOCKS
    for block, hidden_states in enumerate(blocks):
        assert torch.equal(hidden_states, model.extract_features(pixels, block=block, feature="hidden"))
    model.config.output_hidden_states = False
    assert torch.equal(output.last_hidden_state, model(pixels).last_hidden_state)


def test_a_classifier_gives_the_hidden_states_of_its_backbone(classifier, pixels):
    given = classifier(pixels, output_hidden_states=True).hidden_states
    expected = classifier.backbone(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
    assert classifier(pixels).hidden_states is None
    assert classifier(features=classifier.extract_features(pixels), output_hidden_states=True).hidden_states is None


def test_a_folded_model_gives_the_hidden_states_that_it_has(classifier, pixels):
    classifier.config.feature, classifier.config.zeroed_channels = "hidden", []
    folded = classifier.fold()
    (given,) = folded(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(given, folded.extract_features(pixels))


def test_what_a_folded_model_does_not_have_is_said(classifier, pixels):
    classifier.config.feature = "key"
    folded = classifier.fold()
    with pytest.raises(ValueError, match=r"folded at \d\.key\. Use the model it was folded from"):
        folded(pixels, output_hidden_states=True)
    folded.config.output_hidden_states = True  # nobody asked this model
    assert folded(pixels).hidden_states is None


@pytest.mark.parametrize("is_folded", [False, True])
def test_attention_weights_are_not_given_without_a_word(model, pixels, is_folded):
    """A sibling: of a model that is not folded, too."""
    with pytest.raises(ValueError, match="most attention kernels return no weights"):
        (model.fold() if is_folded else model)(pixels, output_attentions=True)


@pytest.mark.skipif(not hasattr(DiTModel, "activation_checkpointing_enable"), reason="of later transformers")
def test_every_other_block_is_checkpointed_where_the_host_says_so(pixel_folder, pixels):
    model = DiTModel.from_pretrained(pixel_folder, timestep=50, block=2, feature="key", freeze_backbone=False).train()
    model(pixels).last_hidden_state.sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.activation_checkpointing_enable(every_n_layers=2)
    assert [step.gradient_checkpointing for step in model.denoiser.steps] == [True, False, True]
    model.zero_grad()
    model(pixels).last_hidden_state.sum().backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_a_classifiers_checkpoint_gives_its_backbone(classifier, pixels, tmp_path):
    classifier.save_pretrained(tmp_path)
    tokens = DiTModel.from_pretrained(tmp_path)(pixels).last_hidden_state
    assert torch.equal(tokens, classifier.extract_features(pixels))


def test_the_number_of_labels_can_change_on_loading(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    # The kind of error that transformers raises, which is no ValueError.
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes=True"):
        DiTForImageClassification.from_pretrained(tmp_path, num_labels=7)
    again = DiTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert again.classifier.output_projection.out_features == 7


def test_a_new_attention_head_starts_with_xaviers_range(classifier):
    for layer in classifier.classifier.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is None or not layer.bias.any()


def test_another_number_of_labels_says_how_to_start_anew(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected \(7.*Pass `ignore_mismatched_sizes=True` to start with a new head"
    ):
        DiTForImageClassification.from_pretrained(tmp_path, num_labels=7)


def test_the_linear_head_is_built(pixel_folder, pixels):
    model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, num_labels=4, head="linear")
    assert model(pixels).logits.shape == (7, 4)


@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_a_training_step_moves_what_is_trainable_and_nothing_else(pixel_folder, pixels, freeze_backbone):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=50, num_labels=4, block=1, freeze_backbone=freeze_backbone, **HEAD
    ).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    # Two steps: the class token is zero at first, and so is the gradient of what multiplies it.
    for _ in range(2):
        optimizer.zero_grad()
        model(pixels, labels=torch.arange(7) % 4).loss.backward()
        optimizer.step()
    for name, value in model.named_parameters():
        in_backbone = name.startswith("backbone.")
        after_tap = "transformer_blocks.2" in name or "proj_out" in name or "blocks.1.ff" in name
        after_tap |= any(
            part in name for part in ("blocks.1.attn1.to_k", "blocks.1.attn1.to_v", "blocks.1.attn1.to_out")
        )
        expected = not in_backbone or (not freeze_backbone and not after_tap)
        assert value.requires_grad == expected, name
        # The label table has a row for each class, and only the null label's is read.
        assert torch.equal(value, before[name]) != expected, name


def test_freezing_survives_a_reload(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert {name.split(".")[0] for name, value in again.named_parameters() if value.requires_grad} == {"classifier"}


def test_a_frozen_backbone_stays_in_eval_mode(classifier):
    classifier.train()
    assert classifier.classifier.training
    assert not any(module.training for module in classifier.backbone.denoiser.transformer.modules())


def test_gradients_of_a_batch_are_those_of_its_pictures(classifier, pixels):
    labels = torch.arange(7) % 4
    classifier(pixels, labels=labels).loss.backward()
    together = classifier.classifier.output_projection.weight.grad.clone()
    classifier.zero_grad()
    for index in range(7):
        (classifier(pixels[index : index + 1], labels=labels[index : index + 1]).loss / 7).backward()
    torch.testing.assert_close(classifier.classifier.output_projection.weight.grad, together, rtol=1e-4, atol=1e-6)


def test_features_give_the_logits_of_their_pictures(classifier, pixels):
    features = classifier.extract_features(pixels)
    assert torch.equal(classifier(features=features).logits, classifier(pixels).logits)


def test_the_loss_is_cross_entropy(classifier, pixels):
    labels = torch.arange(7) % 4
    output = classifier(pixels, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


def test_an_unresolved_model_refuses_to_read_and_says_what_to_do(model, pixels):
    model.config.timestep = "auto"
    with pytest.raises(ValueError, match="still 'auto': pass `calibration_images=` to `from_pretrained`, call"):
        model(pixels)


def test_an_unresolved_model_can_be_read_at_a_named_timestep(model, pixels):
    model.config.timestep = "auto"
    assert model.extract_features(pixels, timestep=3).shape == (7, 16, 16)


def test_loading_without_pictures_chooses_from_those_that_the_transformer_makes(pixel_folder, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_aselect"):
        model = DiTModel.from_pretrained(pixel_folder, timestep="auto")
    assert model.config.timestep == model.config.selection["timestep"]
    assert model.config.selection["pictures"] == "generated"
    assert "No images were given to select a timestep on, so the transformer generates" in caplog.text
    assert "Your own images may give another timestep, above all where they look different" in caplog.text


def test_loading_with_pictures_chooses_and_records(pixel_folder, pictures):
    model = DiTModel.from_pretrained(pixel_folder, timestep="auto", calibration_images=pictures)
    assert model.config.timestep == model.config.selection["timestep"]
    assert model.config.selection["num_images"] == 6


def test_a_resolved_checkpoint_keeps_its_timestep_and_record(pixel_folder, pictures, tmp_path):
    model = DiTModel.from_pretrained(pixel_folder, timestep="auto", calibration_images=pictures)
    model.save_pretrained(tmp_path)
    again = DiTModel.from_pretrained(tmp_path)
    assert again.config.timestep == model.config.timestep
    assert again.config.selection == model.config.selection


def test_a_resolved_checkpoint_is_searched_again_when_asked(model, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    again = DiTModel.from_pretrained(tmp_path, timestep="auto", calibration_images=pictures)
    assert again.config.selection["num_images"] == 6


def test_pictures_for_a_fixed_timestep_are_refused(model, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the timestep is fixed at 50. Pass `timestep='auto'`"):
        DiTModel.from_pretrained(tmp_path, calibration_images=pictures)


@pytest.mark.parametrize("change", [{"timestep": 3}, {"block": 0}, {"feature": "key"}])
def test_a_record_that_no_longer_fits_is_dropped(pixel_folder, pictures, tmp_path, change):
    model = DiTModel.from_pretrained(pixel_folder, timestep="auto", calibration_images=pictures)
    model.save_pretrained(tmp_path)
    assert model.config.timestep != 3
    assert DiTModel.from_pretrained(tmp_path, **change).config.selection is None


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 8, 8), "must have 3 channels, got 1"),
        ((2, 3, 8, 9), "must be multiples of 2 pixels .a token's size., got 8×9"),
        ((2, 3, 0, 8), "got 0×8"),
        ((3, 8, 8), r"must have shape \(B, C, H, W\), got \(3, 8, 8\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(model, shape, words):
    with pytest.raises(ValueError, match=words):
        model(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_with_holes_are_refused(model, pixels, value):
    pixels[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"must be finite and in \[-1, 1\], got NaN or infinite values"):
        model(pixels)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"timestep": 1000}, r"`timestep` must be an integer in \[0, 1000\).*got 1000"),
        ({"timestep": -1}, "got -1"),
        ({"timestep": 5.0}, r"got 5\.0"),
        ({"block": 3}, r"`block` must be in \[-3, 3\) for a transformer of 3 blocks, got 3"),
        ({"feature": "logits"}, "`feature` must be one of hidden, .*, got 'logits'"),
        ({"num_noise_draws": 0}, "`num_noise_draws` must be a positive integer, got 0"),
    ],
)
def test_taps_that_do_not_exist_are_refused(model, pixels, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.extract_features(pixels, **arguments)


def test_a_label_outside_the_classes_is_refused(classifier, pixels):
    with pytest.raises(ValueError, match=r"class indices in \[0, 4\), got \[4\]"):
        classifier(pixels, labels=torch.tensor([0, 1, 2, 3, 4, 0, 1]))


def test_a_label_that_is_to_be_ignored_is_left_out(classifier, pixels):
    labels = torch.tensor([0, 1, -100, 3, 0, 1, 2])
    kept = labels != -100
    torch.testing.assert_close(
        classifier(pixels, labels=labels).loss, classifier(pixels[kept], labels=labels[kept]).loss
    )


def test_neither_pictures_nor_features_is_refused(classifier, pixels):
    for arguments in ({}, {"pixel_values": pixels, "features": torch.zeros(7, 16, 16)}):
        with pytest.raises(ValueError, match="exactly one of `pixel_values`, `features` and `latents`"):
            classifier(**arguments)


def test_features_of_another_width_are_refused(classifier):
    with pytest.raises(ValueError, match=r"tokens of shape \(B, N, 16\), got \(2, 16, 8\)"):
        classifier(features=torch.zeros(2, 16, 8))


@pytest.mark.parametrize("named", [{"timestep": 5}, {"block": 0, "feature": "key"}])
def test_a_timestep_or_tap_in_forward_is_refused(model, classifier, pixels, named):
    for each in (model, classifier):
        with pytest.raises(
            ValueError, match=f"takes no {', '.join(named)}. Set them in `model.config`, or call `extr"
        ):
            each(pixels, **named)


def test_a_tuple_can_be_asked_for(model, classifier, pixels):
    assert model(pixels, return_dict=False)[0].equal(model(pixels).last_hidden_state)
    assert classifier(pixels, return_dict=False)[0].equal(classifier(pixels).logits)


def test_a_record_is_not_saved_beside_a_timestep_set_by_hand(pixel_folder, pictures, tmp_path):
    model = DiTModel.from_pretrained(pixel_folder, timestep="auto", calibration_images=pictures)
    model.config.timestep += 1
    model.save_pretrained(tmp_path)
    assert DiTModel.from_pretrained(tmp_path).config.selection is None
