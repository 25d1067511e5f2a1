"""Skips: what stands for a dropped part, and the slots of the cache that it leaves."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import cache_utils

import naive
from depthprune.model import wrap
from depthprune.plan import Plan
from depthprune.skip import Skip, cache_slots, skip_sublayers
from depthprune.surgery import drop
from depthprune.units import parse
from families import EXACT, cache_gap, tiny

TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def test_what_it_returns() -> None:
    stream = torch.ones(2, 3)
    assert Skip(-1)(stream) is stream and Skip(-1)(1, hidden=stream) is stream
    assert torch.equal(Skip(0)(stream), torch.zeros(2, 3))
    zeros, *rest = Skip(3)(hidden_states=stream)
    assert torch.equal(zeros, torch.zeros(2, 3)) and rest == [None, None]


def test_it_holds_nothing_but_a_tombstone() -> None:
    assert dict(Skip(0).state_dict()) == {}
    state = Skip(0, "c_attn.weight").state_dict()
    assert list(state) == ["c_attn.weight"] and state["c_attn.weight"].numel() == 0
    assert sum(p.numel() for p in Skip(0, "weight").parameters()) == 0


def test_building_from_the_configuration_is_dropping() -> None:
    model = wrap(tiny("gpt2"), None, "gpt2")
    smaller = drop(model, Plan(model.reference, parse(["0.attn", "2.mlp", "3"])))
    built: Any = type(model.net)(smaller.net.config)
    skip_sublayers(built)
    assert list(built.state_dict()) == list(smaller.net.state_dict())
    built.load_state_dict(smaller.net.state_dict())
    built.eval()
    assert torch.equal(naive.logits(built, TOKENS), naive.logits(smaller.net, TOKENS))
    parts = [built.get_submodule("transformer.h.0.attn"), built.get_submodule("transformer.h.0.ln_1")]
    skip_sublayers(built)
    assert parts == [built.get_submodule("transformer.h.0.attn"), built.get_submodule("transformer.h.0.ln_1")]
    assert all(isinstance(part, Skip) for part in parts)


def test_the_configuration_says_it_twice() -> None:
    model = wrap(tiny("llama"), None, "llama")
    config = drop(model, Plan(model.reference, parse(["1", "2.self_attn", "3.mlp"]))).net.config
    assert config.depthprune["block"] == "LlamaDecoderLayer"
    assert config.depthprune["skip"] == {
        "1": {"input_layernorm": -1, "self_attn": 2},
        "2": {"post_attention_layernorm": -1, "mlp": 0},
    }
    assert config.depthprune["no_cache"] == [1]
    assert config.depthprune["tombstone"] == "1.input_layernorm.weight"
    written = json.loads(config.to_json_string())["per_layer_config"]
    assert {int(index): fields["skip"] for index, fields in written.items()} == {1: ["attention"], 2: ["mlp"]}


def test_a_model_without_skips_is_left_alone() -> None:
    net: Any = tiny("llama")
    before = list(net.modules())
    skip_sublayers(net)
    net.config.depthprune = {"version": 1, "block": "LlamaDecoderLayer", "skip": {}, "tombstone": ""}
    skip_sublayers(net)
    assert list(net.modules()) == before


def numbers(net: Any) -> list[int]:
    return [block.self_attn.layer_idx for block in net.model.layers]


def test_slots_where_transformers_knows_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_utils, "DummyLayer", object, raising=False)
    net: Any = tiny("llama")
    config = SimpleNamespace()
    cache_slots(config, list(net.model.layers), {0, 2})
    assert config.kv_sharing_modes == ["reuse", None, "reuse", None] and numbers(net) == [0, 1, 2, 3]


def test_slots_in_older_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cache_utils, "DummyLayer", raising=False)
    net: Any = tiny("llama")
    one_kind = SimpleNamespace(layer_types=["full_attention"] * 4)
    cache_slots(one_kind, list(net.model.layers), set())
    assert numbers(net) == [0, 1, 2, 3]
    cache_slots(one_kind, list(net.model.layers), {0, 2})
    assert numbers(net) == [0, 0, 1, 1] and not hasattr(one_kind, "kv_sharing_modes")
    cache_slots(one_kind, list(net.model.layers), {0, 2})
    assert numbers(net) == [0, 0, 1, 1]
    mixed: Any = tiny("qwen2_sliding")
    cache_slots(mixed.config, list(mixed.model.layers), {0})
    assert numbers(mixed) == [0, 1, 2, 3]


def test_decoding_in_older_releases_is_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprune.skip.cache_utils", SimpleNamespace())
    model = wrap(tiny("llama"), None, "llama")
    smaller = drop(model, Plan(model.reference, parse(["0.self_attn", "2.self_attn"])))
    assert numbers_of(smaller.net) == [0, 1]
    assert cache_gap(smaller.net, positions=False) <= EXACT


def numbers_of(net: Any) -> list[int]:
    found = [getattr(block.self_attn, "layer_idx", None) for block in net.model.layers]
    return [number for number in found if number is not None]
