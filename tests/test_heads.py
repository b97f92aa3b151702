import pytest
import torch

from hf_aselect import ASelectConfig, DiTForImageClassification
from hf_aselect.model.heads import AttentionHead, LinearHead


def default_head(input_size=1536, num_labels=200):
    config = ASelectConfig()
    return AttentionHead(
        input_size,
        num_labels,
        config.head_hidden_size,
        config.head_num_layers,
        config.head_num_attention_heads,
        config.head_mlp_ratio,
    )


def test_the_default_head_is_the_papers():
    assert sum(parameter.numel() for parameter in default_head().parameters()) == 16_766_600


def test_the_class_token_starts_at_zero():
    assert not default_head(8, 2).class_token.any()


def test_the_attention_head_does_not_see_the_order_of_tokens():
    head, tokens = AttentionHead(6, 3, 16, 2, 2, 4), torch.randn(2, 9, 6)
    torch.testing.assert_close(head(tokens), head(tokens.flip(1)), rtol=1e-4, atol=1e-5)


def test_the_attention_head_sees_each_token():
    head, tokens = AttentionHead(6, 3, 16, 2, 2, 4), torch.randn(1, 9, 6, requires_grad=True)
    head(tokens).sum().backward()
    assert bool((tokens.grad.abs().sum(-1) > 0).all())


def test_leaving_out_what_is_not_read_changes_nothing():
    head = AttentionHead(6, 3, hidden_size=8, num_layers=2, num_attention_heads=2, mlp_ratio=2)
    tokens = torch.randn(5, 7, 6)
    hidden_states = torch.cat([head.class_token.expand(5, -1, -1), head.input_projection(tokens)], dim=1)
    for block in head.blocks:
        hidden_states = block(hidden_states)
    assert hidden_states.shape == (5, 8, 8)
    torch.testing.assert_close(head(tokens), head.output_projection(hidden_states[:, 0]))


def test_the_linear_head_reads_the_mean():
    head, tokens = LinearHead(6, 3), torch.randn(2, 9, 6)
    pooled = tokens.mean(1, keepdim=True)
    torch.testing.assert_close(head(tokens), head(pooled))
    assert head(tokens).shape == (2, 3)


def test_a_linear_head_may_read_the_mean_without_a_norm():
    head, tokens = LinearHead(6, 3, has_norm=False), torch.randn(2, 9, 6)
    torch.testing.assert_close(head(tokens), head.output_projection(tokens.mean(1)))
    assert {name for name, _ in head.named_parameters()} == {"output_projection.weight", "output_projection.bias"}


def test_a_head_is_not_loaded_without_the_norm_it_was_trained_with(pixel_folder, tmp_path):
    given = {"timestep": 5, "num_labels": 3, "head": "linear"}
    model = DiTForImageClassification.from_pretrained(pixel_folder, **given)
    model.save_pretrained(tmp_path / "normed")
    with pytest.raises(
        ValueError,
        match=r"have another kind of head: .*and \['classifier.norm.bias', 'classifier.norm.weight'\] are unexpected",
    ):
        DiTForImageClassification.from_pretrained(tmp_path / "normed", head_norm=False)
    model = DiTForImageClassification.from_pretrained(pixel_folder, head_norm=False, **given)
    model.save_pretrained(tmp_path / "plain")
    assert not DiTForImageClassification.from_pretrained(tmp_path / "plain").config.head_norm
    with pytest.raises(ValueError, match="have only a part of the head"):
        DiTForImageClassification.from_pretrained(tmp_path / "plain", head_norm=True)
