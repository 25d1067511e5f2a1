"""Scaling what comes before a cut: the fused weights do what hooks that multiply the stream at each cut do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import naive
from cuts import as_data, cut, model_of, moved, multiplied, repair, rows, see, weights
from depthprune.errors import DepthpruneError, LayoutError
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.recover.pair import join
from depthprune.recover.scale import _scale, scale
from families import EXACT

FIT, HELD = rows(10, 16, padding=5), rows(4, 16, seed=1)
TEXT = join(FIT, HELD)
# What each sublayer adds is the output of this module, times this; untied, tied, scaled residuals, norms that multiply
# by 1 + weight, learned positions, LayerNorm and biases, norms that write, parallel blocks.
ADDS: dict[str, tuple[tuple[str, str], float]] = {
    "llama": (("self_attn", "mlp"), 1.0),
    "llama_tied": (("self_attn", "mlp"), 1.0),
    "llama_bias": (("self_attn", "mlp"), 1.0),
    "granite": (("self_attn", "mlp"), 0.8),
    "gemma": (("self_attn", "mlp"), 1.0),
    "gemma2": (("post_attention_layernorm", "post_feedforward_layernorm"), 1.0),
    "gpt2": (("attn", "mlp"), 1.0),
    "gpt_neox": (("attention", "mlp"), 1.0),
    "opt": (("self_attn", "fc2"), 1.0),
    "stablelm": (("self_attn", "mlp"), 1.0),
}
PARALLEL = ("gpt_neox",)  # both sublayers read the stream before the block, so a cut between them is none


def streams(name: str, teacher: Model) -> list[Tensor]:
    """The size of the dense stream at every real token, before each step and after the last."""
    saw, (adds, factor), path = see(teacher.net, TEXT), ADDS[name], teacher.layout.path
    found = [saw.into(f"{path}.0")]
    for index in range(4):
        stream = saw.into(f"{path}.{index}")
        for part in adds:
            stream = stream + factor * saw.out(f"{path}.{index}.{part}").reshape(stream.shape)
            found.append(stream)
    return [stream[TEXT.mask].double().norm(dim=-1) for stream in found]


def growth(name: str, teacher: Model, start: int, stop: int) -> float:
    """By how much the steps from ``start`` up to ``stop`` make the stream grow."""
    sizes = streams(name, teacher)
    return float((sizes[stop] / sizes[start]).mean())


Hooked = tuple[list[int], list[int], list[tuple[int, int]]]
# Units (a: the first sublayer, m: the second); before which blocks of the cut model, or after which, the stream is
# multiplied; by the growth over which steps. Cuts within a block are where its own first or last step is gone.
CUTS: dict[str, tuple[list[str], list[tuple[int, bool, tuple[int, int]]]]] = {
    "a block": (["1"], [(1, False, (2, 4))]),
    "two blocks": (["1", "2"], [(1, False, (2, 6))]),
    "far apart": (["1", "3.a"], [(1, False, (2, 4)), (2, False, (6, 7))]),
    "the first block": (["0"], [(0, False, (0, 2))]),
    "the last block": (["3"], [(2, True, (6, 8))]),
    "a first sublayer": (["2.a"], [(2, False, (4, 5))]),
    "a last sublayer": (["1.m"], [(1, True, (3, 4))]),
    "over an edge": (["1.m", "2.a"], [(2, False, (3, 5))]),
}


def units(model: Model, texts: list[str]) -> list[str]:
    first, last = (s.name for s in model.layout.blocks[0].sublayers)
    return [text.replace("a", first, 1) if text.endswith(".a") else text.replace(".m", f".{last}") for text in texts]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sort"),
    [
        *((name, sort) for name in ("llama", "llama_tied", "gpt2") for sort in CUTS),
        *((name, sort) for name in ADDS for sort in ("far apart", "a last sublayer") if name not in PARALLEL),
        *((name, sort) for name in PARALLEL for sort in ("two blocks", "the first block")),
    ],
)
def test_fused_is_as_hooks_that_multiply_the_stream(name: str, sort: str) -> None:
    teacher, (texts, places) = model_of(name), CUTS[sort]
    gone = units(teacher, texts)
    model, plain = cut(teacher, *gone), cut(teacher, *gone)
    before = weights(model)
    factors = [growth(name, teacher, *steps) for _, _, steps in places]
    record = scale(repair(teacher, model, FIT, HELD))["factors"]
    assert [one["before"] for one in record] == [steps[1] for _, _, steps in places]
    assert [one["factor"] for one in record] == pytest.approx(factors, rel=1e-4)
    assert all(abs(factor - 1) > 0.02 for factor in factors)
    blocks = blocks_of(plain.net, plain.layout)
    hooks = [(blocks[at], factor, after) for (at, after, _), factor in zip(places, factors, strict=True)]
    bare = naive.logits(plain.net, TEXT.tokens, TEXT.mask)
    with (
        multiplied([(block, factor) for block, factor, after in hooks if not after]),
        multiplied([(block, factor) for block, factor, after in hooks if after], after=True),
    ):
        want = naive.logits(plain.net, TEXT.tokens, TEXT.mask)
    have = naive.logits(model.net, TEXT.tokens, TEXT.mask)
    gap = (have - want)[TEXT.mask].abs().max()
    assert gap <= 2 * EXACT * want[TEXT.mask].abs().max()
    if sort not in ("the first block", "the last block"):  # scaled as a whole, the stream is normalised again
        assert gap < 0.05 * (bare - want)[TEXT.mask].abs().max()
    assert moved(model, before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", r"nothing that is scaled alone writes the update of \d\.mlp"),
        ("nanochat", "the stream before the first block holds more than embeddings"),
        ("olmo2", r"0\.mlp reads the stream as it is, so its size matters to it"),
        ("bloom", "the stream before the first block holds more than embeddings"),
    ],
)
def test_what_cannot_be_scaled_is_refused(name: str, message: str) -> None:
    teacher = model_of(name)
    model = cut(teacher, "2")
    with pytest.raises(LayoutError, match=f"^scale: .*{message}"):
        scale(repair(teacher, model, FIT, HELD))


def test_tied_embeddings_need_a_last_norm() -> None:
    teacher = model_of("llama_tied")
    teacher.net.model.norm = nn.Identity()
    with pytest.raises(LayoutError, match="the embeddings are also the head, and no last norm can undo"):
        scale(repair(teacher, cut(teacher, "1"), FIT, HELD))


def test_the_dense_model_and_weights_after_the_cut_stay() -> None:
    teacher = model_of("llama_tied")
    model = cut(teacher, "1.mlp")
    before = weights(teacher), weights(model)
    scale(repair(teacher, model, FIT, HELD))
    assert not moved(teacher, before[0])
    first = {"self_attn.o_proj", "mlp.down_proj"}
    want = {f"model.layers.{part}.weight" for part in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj")}
    assert len(first) == 2
    assert moved(model, before[1]) == want | {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert model.net.lm_head.weight is model.net.model.embed_tokens.weight


def test_padding_does_not_count() -> None:
    teacher = model_of("llama")
    found = []
    for mask in (TEXT.mask, TEXT.mask, torch.ones_like(TEXT.mask)):
        tokens = TEXT.tokens.clone()
        if found:
            tokens[~TEXT.mask] = 50
        found.append(scale(repair(teacher, cut(teacher, "1"), as_data(tokens, mask), HELD))["factors"][0]["factor"])
    assert found[0] == found[1] != found[2]


def test_streams_that_are_not_finite_are_one_line() -> None:
    teacher = model_of("llama")
    model = cut(teacher, "2.mlp")
    with torch.no_grad():
        teacher.net.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(DepthpruneError, match="scale: streams are not finite"):
        scale(repair(teacher, model, FIT, HELD))


@torch.no_grad()
@pytest.mark.parametrize(("name", "path"), [
    ("llama", "model.norm"), ("gemma", "model.norm"), ("gpt2", "transformer.ln_f"), ("nemotron", "model.norm"),
    ("olmo2", "model.norm"), ("qwen3_next", "model.norm"), ("recurrent_gemma", "model.final_norm"),
    ("gpt2", "transformer.h.0.attn.c_proj"), ("llama_bias", "model.layers.0.mlp.down_proj"),
])  # fmt: skip
def test_a_scaled_module_gives_so_many_times_as_much(name: str, path: str) -> None:
    """Whether the family's norms multiply by the weight or by 1 + weight, and whatever the weight starts from."""
    module: Any = model_of(name).net.get_submodule(path)
    width = module.nx if hasattr(module, "nx") else module.weight.shape[-1]
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    want = 1.7 * module(x)
    old, kept = module.weight, module.weight.clone()
    _scale(module, 1.7)
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(old, kept) and module.weight is not old
