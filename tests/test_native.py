"""Uneven folders in plain transformers, once depthprune is imported: other heads, and every way to generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import naive
from depthprune.export import hf
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.surgery import drop
from depthprune.units import parse

TOKENS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
NEW = 10
UNITS = {
    "attention 0 gone": ("0.self_attn", "2.self_attn"),
    "mixed": ("0.self_attn", "1.mlp", "2.self_attn", "2.mlp"),
    "all but one attention gone": ("0.self_attn", "1.self_attn", "2.self_attn"),
}
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "mistral", "olmo2", "phi3", "smollm3")
CASES = [(family, cut) for family in FAMILIES for cut in (UNITS if family == "llama" else ["mixed"])]


@dataclass
class Saved:
    """A folder, the network that was written to it, which computes without any loader having a say, and the dense."""

    folder: Path
    net: Any
    dense: Any


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def saved(request: pytest.FixtureRequest, subject: Callable[..., Model], tmp_path: Path) -> Saved:
    family, cut = request.param
    model = subject(family)
    smaller = drop(model, Plan(model.reference, parse(UNITS[cut])))
    return Saved(hf.write(smaller, tmp_path / "out"), smaller.net, model.net)


def load(auto: str, folder: Path, **options: Any) -> Any:
    return getattr(transformers, auto).from_pretrained(folder, **options).eval()


def greedy(net: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Token by token without any cache: what every way to generate has to come to."""
    mask = options.get("mask", torch.ones_like(tokens))
    with torch.no_grad():
        for _ in range(NEW):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = net(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return tokens


def generate(net: Any, tokens: Tensor, **options: Any) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(tokens))
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    made: Tensor = net.generate(tokens, attention_mask=mask, pad_token_id=0, **given)
    return made


@torch.no_grad()
def test_the_model_without_a_head(saved: Saved) -> None:
    net = load("AutoModel", saved.folder)
    want = saved.net.model(TOKENS, use_cache=False).last_hidden_state
    assert torch.equal(net(TOKENS, use_cache=False).last_hidden_state, want)
    assert {**net.state_dict()}.keys() == saved.net.model.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_heads_of_tasks(head: str, saved: Saved) -> None:
    auto = getattr(transformers, f"AutoModelFor{head}")
    if type(saved.net.config) not in auto._model_mapping:
        pytest.skip(f"transformers has no {head} for this family")
    net, told = auto.from_pretrained(saved.folder, output_loading_info=True)
    if net.base_model_prefix != "model":
        pytest.skip(f"{type(net).__name__} has another prefix than its family, and reads no dense checkpoint either")
    assert all(not name.startswith("model.") for name in told["missing_keys"]), "only the head is new"
    assert not told["mismatched_keys"]
    base = getattr(net, net.base_model_prefix)
    seen = base.eval()(TOKENS, use_cache=False).last_hidden_state
    assert torch.equal(seen, saved.net.model(TOKENS, use_cache=False).last_hidden_state)
    assert net.eval()(TOKENS).to_tuple()[0].isfinite().all()


def test_a_dynamic_and_a_static_cache(saved: Saved) -> None:
    net, want = load("AutoModelForCausalLM", saved.folder), greedy(saved.net, TOKENS)
    assert torch.equal(generate(net, TOKENS), want)
    assert torch.equal(generate(net, TOKENS, cache_implementation="static"), want)


@torch.no_grad()
def test_a_compiled_forward(saved: Saved) -> None:
    net = load("AutoModelForCausalLM", saved.folder)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, naive.logits(saved.net, TOKENS))


def test_assisted_generation(saved: Saved) -> None:
    net, row = load("AutoModelForCausalLM", saved.folder), TOKENS[:1]
    assert torch.equal(generate(net, row, assistant_model=saved.dense), greedy(saved.net, row))
    assert torch.equal(generate(saved.dense, row, assistant_model=net), greedy(saved.dense, row)), "as the draft"


def test_padding_on_the_left(saved: Saved) -> None:
    net = load("AutoModelForCausalLM", saved.folder)
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    tokens[1, :5], mask[1, :5] = 0, 0
    made = generate(net, tokens, attention_mask=mask)
    assert torch.equal(made, greedy(saved.net, tokens, mask=mask))
    assert torch.equal(made[1:2, 5:], generate(net, TOKENS[1:2, 5:])), "padding changes nothing"


def test_beams(saved: Saved) -> None:
    net = load("AutoModelForCausalLM", saved.folder)
    made = generate(net, TOKENS, num_beams=3)
    assert torch.equal(made, generate(net, TOKENS, num_beams=3, use_cache=False))
    assert torch.equal(made, generate(saved.net, TOKENS, num_beams=3, use_cache=False))
