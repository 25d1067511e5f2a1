"""The tiny models are what the other tests take them for: small, strong, random throughout, and the same every time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import (
    CACHE_GAP,
    CACHE_GAP_BEFORE_5_23,
    EXACT,
    FAMILIES,
    MAX_PARAMETERS,
    NEEDS_POSITIONS,
    cache_gap,
    configuration,
    example,
    names,
    shake,
    tiny,
)

GENERATORS = names("decoder") + names("encoder-decoder")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def fresh(name: str) -> PreTrainedModel:
    """A family's model as transformers initialises it: what every check here must refuse."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, family.network)(configuration(family))
    model.eval()
    return model


def plain_vectors(model: nn.Module) -> list[str]:
    """Trained vectors with values that repeat: no random numbers."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and parameter.requires_grad and parameter.unique().numel() < parameter.numel()
    ]


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost module lists that hold blocks: as many as the blocks of a stack."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) >= 4 and not inside:
            found[path] = module
    return list(found.values())


def spread(model: PreTrainedModel) -> float:
    """How much the logits depend on the text: the deviation of each over positions, averaged. All finite."""
    logits: Tensor = model(**example(model)).logits
    assert logits.isfinite().all()
    return float(logits.std(dim=(0, 1)).mean())


def changes(model: PreTrainedModel) -> list[float]:
    """How much each block changes the stream: |after - before| / |before|."""
    seen: list[float] = []

    def record(
        _: nn.Module, given: tuple[Tensor, ...], options: dict[str, Tensor], answer: Tensor | tuple[Tensor]
    ) -> None:
        before = given[0] if given else options["hidden_states"]
        after = answer if isinstance(answer, Tensor) else answer[0]
        seen.append(float((after - before).norm() / before.norm()))

    blocks = [block for stack in stacks(model) for block in stack]
    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    model(**example(model))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(blocks) >= 4
    return seen


def kinds(stack: nn.ModuleList) -> int:
    """How many kinds of block a stack has: by their modules and by the settings that these carry, save the index."""
    return len({_settings(block) for block in stack})


def _settings(block: nn.Module) -> tuple[object, ...]:
    simple = (bool, int, float, str, type(None))
    return (
        repr(block),
        *(
            (path, key, value)
            for path, module in block.named_modules()
            for key, value in sorted(vars(module).items())
            if isinstance(value, simple) and key not in {"layer_idx", "layer_id", "block_id", "layer_number"}
        ),
    )


def test_there_are_many_families() -> None:
    assert len(names("decoder")) >= 40
    assert len(names("encoder")) >= 6
    assert len(names("encoder-decoder")) >= 4
    assert sorted(names()) == sorted(names("decoder") + names("encoder") + names("encoder-decoder"))


def test_a_family_that_transformers_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "of_tomorrow", FAMILIES["llama"].__class__("decoder", "TomorrowLM", "LlamaConfig"))
    assert "of_tomorrow" not in names()
    assert "llama" in names()


@pytest.mark.parametrize("name", names())
def test_a_tiny_model_is_small_strong_and_random(name: str) -> None:
    model = tiny(name)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) <= MAX_PARAMETERS
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert spread(model) > 0.35
    assert plain_vectors(model) == []
    assert min(changes(model)) > 0.2
    tokens = model.generation_config if model.can_generate() else model.config
    assert all(
        token is None or 0 <= token < 96 for token in (tokens.pad_token_id, tokens.bos_token_id, tokens.eos_token_id)
    )


@pytest.mark.parametrize("name", names())
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    torch.manual_seed(1)
    one = tiny(name)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    first, again, other = one.state_dict(), tiny(name).state_dict(), tiny(name, seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    trained = [key for key, parameter in one.named_parameters() if parameter.requires_grad]
    assert not any(torch.equal(first[key], other[key]) for key in trained)


@pytest.mark.parametrize("name", [name for name in names() if FAMILIES[name].hybrid])
def test_a_hybrid_has_blocks_of_more_than_one_kind(name: str) -> None:
    assert max(kinds(stack) for stack in stacks(tiny(name))) > 1


def test_a_plain_model_has_blocks_of_one_kind() -> None:
    assert [kinds(stack) for stack in stacks(tiny("llama"))] == [1]


@pytest.mark.parametrize("name", GENERATORS)
def test_the_cache_is_as_exact_as_documented(name: str) -> None:
    model = tiny(name)
    allowed = CACHE_GAP.get(name, EXACT)
    assert cache_gap(model) <= allowed
    assert cache_gap(model, tokens=24, prefill=12) <= allowed


@pytest.mark.parametrize("name", sorted(set(CACHE_GAP) - set(CACHE_GAP_BEFORE_5_23)))
def test_a_documented_gap_is_still_there(name: str) -> None:
    gap = cache_gap(tiny(name))
    assert gap > EXACT
    assert math.isinf(gap) == math.isinf(CACHE_GAP[name])


@pytest.mark.parametrize("name", sorted(NEEDS_POSITIONS))
def test_a_model_that_needs_position_ids_goes_wrong_without(name: str) -> None:
    assert cache_gap(tiny(name), positions=False) > 0.1


def test_a_model_as_transformers_makes_it_is_refused() -> None:
    model = fresh("llama_bias")
    assert "model.norm.weight" in plain_vectors(model)
    assert "model.layers.0.mlp.down_proj.bias" in plain_vectors(model)
    assert spread(model) < 0.35
    assert min(changes(fresh("gpt2"))) < 0.2


def test_a_wrong_cache_slot_is_seen() -> None:
    model = tiny("llama")
    model.model.layers[2].self_attn.layer_idx = 1
    assert cache_gap(model) > 100 * EXACT


def test_shaking_leaves_frozen_parameters_and_integers_alone() -> None:
    module = nn.Linear(4, 4)
    module.weight.requires_grad_(False)
    module.register_buffer("steps", torch.arange(4))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    shake(module, seed=0)
    assert torch.equal(before["weight"], module.weight)
    assert torch.equal(before["steps"], module.steps)
    assert not torch.equal(before["bias"], module.bias)
