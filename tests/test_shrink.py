"""The pruned configuration: what is sliced, what has a rule of its own, and the proof that sees a wrong one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from depthprune.shrink import adopt, prove, shrink
from families import FAMILIES, configuration, names, tiny

KEPT = [0, 3]


def shrunk(name: str, kept: list[int] = KEPT) -> Any:
    config = configuration(FAMILIES[name])
    return shrink(config, kept, 4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "xglm", "ctrl", "falcon"])
def test_the_count_is_lowered_whatever_its_name(name: str) -> None:
    if name in names():
        assert shrunk(name).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("name", "field", "kept", "value"),
    [
        ("qwen2_sliding", "layer_types", [0, 3], ["full_attention", "sliding_attention"]),
        ("exaone4", "layer_types", [1, 3], ["sliding_attention", "full_attention"]),
        ("smollm3", "no_rope_layers", [1, 2], [0, 1]),
        ("gpt_neo", "attention_layers", [0, 3], ["global", "local"]),
        ("gpt_neo", "attention_types", [1, 3], [[["local", "local"], 1]]),
        ("deepseek_v3", "first_k_dense_replace", [1, 2], 0),
        ("deepseek_v3", "first_k_dense_replace", [0, 2], 1),
    ],
)
def test_patterns_follow_the_blocks(name: str, field: str, kept: list[int], value: object) -> None:
    assert getattr(shrunk(name, kept), field) == value


@pytest.mark.parametrize(
    ("fields", "kept", "wanted"),
    [
        ({"mlp_only_layers": [1, 3], "decoder_sparse_step": 1}, [0, 2, 3], {"mlp_only_layers": [2]}),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [0, 1, 3], {"mlp_only_layers": [0]}),
        ({"mlp_only_layers": [3], "decoder_sparse_step": 2}, [1, 2, 3], {"mlp_only_layers": [1, 2]}),
    ],
)
def test_sparse_blocks_stay_sparse(fields: dict[str, Any], kept: list[int], wanted: dict[str, Any]) -> None:
    config = configuration(FAMILIES["qwen2_moe"])
    for key, value in fields.items():
        setattr(config, key, value)
    new = shrink(config, kept, 4)
    assert {key: getattr(new, key) for key in wanted} == wanted and new.decoder_sparse_step == 1


def test_the_original_is_left_alone_and_the_attention_implementation_kept() -> None:
    config = configuration(FAMILIES["qwen2_sliding"])
    config._attn_implementation = "eager"
    before = copy.deepcopy(config.to_dict())
    new = shrink(config, KEPT, 4)
    assert config.to_dict() == before and new._attn_implementation == "eager"
    adopt(config, new)
    assert config.num_hidden_layers == 2 and config.to_dict() == new.to_dict()


def cut(name: str) -> Any:
    """A network with blocks 1 and 2 taken out by hand, and its right configuration."""
    net: Any = tiny(name)
    net.model.layers = nn.ModuleList([net.model.layers[0], net.model.layers[3]])
    net.model.layers[1].self_attn.layer_idx = 1
    net.config = shrink(net.config, KEPT, 4)
    return net


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gemma3_text", "exaone4"])
def test_a_right_configuration_is_proven(name: str) -> None:
    net = cut(name)
    assert prove(net, net.config) == "" or name == "gemma3_text"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 3, "9 tensors that are not there and lack 0"),
        ("num_hidden_layers", 1, "0 tensors that are not there and lack 9"),
        ("intermediate_size", 40, "the shape (40, 32) instead of (48, 32)"),
        ("attention_dropout", 0.5, "attention_dropout to 0.5 instead of 0.0"),
        ("rms_norm_eps", 1e-3, "variance_epsilon to 0.001"),
    ],
)
def test_a_wrong_configuration_is_seen(field: str, value: object, said: str) -> None:
    net = cut("llama")
    config = copy.deepcopy(net.config)
    setattr(config, field, value)
    if field == "num_hidden_layers":
        config.layer_types = None
    assert said in prove(net, config)


def test_a_window_in_the_wrong_block_is_seen() -> None:
    net = cut("qwen2_sliding")
    net.config.layer_types = net.config.layer_types[::-1]
    assert "sliding_window" in prove(net, net.config) or "layer_type" in prove(net, net.config)


def test_an_old_number_is_seen() -> None:
    net = cut("llama")
    net.model.layers[1].self_attn.layer_idx = 3
    assert "layer_idx to 1 instead of 3" in prove(net, net.config)
