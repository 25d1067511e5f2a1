"""A model that is more than its decoder: the text part of an image-and-text model is pruned like any other."""

from __future__ import annotations

from pathlib import Path

from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from depthprune.export import check_many, expect, export
from depthprune.model import Model, wrap
from depthprune.plan import Plan
from depthprune.surgery import drop
from depthprune.units import parse
from families import shake

PLANS = {"attention": ["0.self_attn"], "mlp": ["3.mlp"], "block": ["1"], "mixed": ["1", "0.self_attn", "3.mlp"]}


def images_and_text() -> Model:
    text = Gemma3TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    ids = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    net = Gemma3ForConditionalGeneration(config).eval()
    shake(net, 0)
    return wrap(net, None, "images-and-text")


def test_the_text_part_is_pruned_and_comes_back(tmp_path: Path) -> None:
    model = images_and_text()
    assert model.layout.path == "model.language_model.layers"
    expected = {}
    for name, units in PLANS.items():
        plan = Plan(model.reference, parse(units))
        folder = export(drop(model, plan), tmp_path / name)
        expected[folder] = expect(model, plan)
        assert "long" in expected[folder].tensors  # it has windows, so a text longer than they are is compared, too
    for folder, proofs in check_many(expected).items():
        assert all(proof.passed for proof in proofs), (folder, proofs)
