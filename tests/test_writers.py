"""Writers, readers and inner maps: what running a block finds is what the family's code says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cuts import model_of
from depthprune import record, writers
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.writers import Ends, bias_of, ends, mapped, set_bias, set_weight, weight_of
from families import EXACT

# By sublayer: its writer (with what multiplies it; a norm is marked), its readers, and the inner maps on which its
# update depends linearly. As the modelling files of transformers say it.
Expected = dict[str, tuple[str, float, str, str]]
QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GATED = "mlp.gate_proj mlp.up_proj"
LLAMA: Expected = {
    "self_attn": ("self_attn.o_proj", 1.0, QKV, "self_attn.v_proj"),
    "mlp": ("mlp.down_proj", 1.0, GATED, "mlp.up_proj"),
}
SANDWICH: Expected = {
    "self_attn": ("post_attention_layernorm norm", 1.0, QKV, ""),
    "mlp": ("post_feedforward_layernorm norm", 1.0, GATED, ""),
}
FALCON: Expected = {
    "self_attention": ("self_attention.dense", 1.0, "self_attention.query_key_value", ""),
    "mlp": ("mlp.dense_4h_to_h", 1.0, "mlp.dense_h_to_4h", ""),
}
BLOCKS: dict[tuple[str, int], Expected] = {
    ("llama", 0): LLAMA,
    ("llama", 3): LLAMA,
    ("llama_tied", 1): LLAMA,
    ("llama_bias", 1): LLAMA,
    ("gemma", 1): LLAMA,
    ("granite", 1): {name: (writer, 0.8, *rest) for name, (writer, _, *rest) in LLAMA.items()},  # type: ignore[misc]
    ("phi3", 0): {
        "self_attn": ("self_attn.o_proj", 1.0, "self_attn.qkv_proj", ""),
        "mlp": ("mlp.down_proj", 1.0, "mlp.gate_up_proj", ""),
    },
    ("gpt2", 2): {
        "attn": ("attn.c_proj", 1.0, "attn.c_attn", ""),
        "mlp": ("mlp.c_proj", 1.0, "mlp.c_fc", ""),
    },
    ("opt", 1): {
        "self_attn": ("self_attn.out_proj", 1.0, QKV, "self_attn.v_proj"),
        "fc1+fc2": ("fc2", 1.0, "fc1", ""),  # ReLU doubles what is doubled, but is not linear
    },
    ("persimmon", 1): {  # so does the norm of queries and keys: twice the weight leaves them, and doubles the values
        "self_attn": ("self_attn.dense", 1.0, "self_attn.query_key_value", ""),
        "mlp": ("mlp.dense_4h_to_h", 1.0, "mlp.dense_h_to_4h", ""),
    },
    ("gemma2", 1): SANDWICH,
    ("olmo2", 1): SANDWICH,
    ("mixtral", 0): {"self_attn": LLAMA["self_attn"], "mlp": ("", 0.0, "", "")},
    ("phimoe", 1): {"self_attn": LLAMA["self_attn"], "mlp": ("", 0.0, "mlp.router", "")},
    ("qwen2_moe", 0): {
        "self_attn": LLAMA["self_attn"],
        "mlp": ("", 0.0, "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert_gate", ""),
    },
    ("deepseek_v3", 0): {
        "self_attn": ("self_attn.o_proj", 1.0, "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa", ""),
        "mlp": LLAMA["mlp"],
    },
    ("falcon", 1): FALCON,
    ("falcon_alibi", 1): FALCON,
    ("cohere", 0): LLAMA,
    ("gptj", 0): {
        "attn": ("attn.out_proj", 1.0, "attn.q_proj attn.k_proj attn.v_proj", "attn.v_proj"),
        "mlp": ("mlp.fc_out", 1.0, "mlp.fc_in", ""),
    },
    ("mamba", 0): {"mixer": ("mixer.out_proj", 1.0, "mixer.in_proj", "")},
    ("falcon_h1", 0): {  # feed_forward is multiplied by 0.9 at its end; mamba's input before its map, so it has none
        "mamba": ("mamba.out_proj", 1.0, "", ""),
        "self_attn": LLAMA["self_attn"],
        "feed_forward": (
            "feed_forward.down_proj", 0.9, "feed_forward.up_proj feed_forward.gate_proj", "feed_forward.up_proj"
        ),
    },
    ("lfm2", 0): {
        "conv": ("conv.out_proj", 1.0, "conv.in_proj", ""),
        "feed_forward": ("feed_forward.w2", 1.0, "feed_forward.w1 feed_forward.w3", "feed_forward.w3"),
    },
    ("bloom", 0): {},
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Callable[[str], list[tuple[Ends, ...]]]:
    known: dict[str, list[tuple[Ends, ...]]] = {}
    return lambda name: known[name] if name in known else known.setdefault(name, ends(model_of(name)))


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=lambda part: str(part))
def test_what_is_found_is_what_the_code_says(name: str, block: int, found: Any) -> None:
    expected = BLOCKS[name, block]
    have = {one.sublayer.name: one for one in found(name)[block]}
    assert list(have) == list(expected)
    for sublayer, (path, scale, readers, inner) in expected.items():
        one = have[sublayer]
        assert (one.readers, set(one.inner)) == (tuple(readers.split()), set(inner.split())), sublayer
        assert bool(one.reason) == (not path)
        if path:
            assert one.writer is not None
            assert (one.writer.path, one.writer.diagonal) == (path.split()[0], path.endswith(" norm"))
            assert one.writer.scale == pytest.approx(scale, rel=1e-3)
        else:
            assert one.writer is None and "no single map" in one.reason


@torch.no_grad()
@pytest.mark.parametrize("name", sorted({name for name, _ in BLOCKS} - {"bloom"}))
def test_what_a_writer_gives_is_what_the_stream_gains(name: str, found: Any) -> None:
    """Take a writer's output away, times its scale, and the block does what it does without the sublayer."""
    model = model_of(name)
    modules = blocks_of(model.net, model.layout)
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    calls = record.record(model.net, modules, [b.arity for b in model.layout.blocks], tokens, None)
    stream = calls.stream + torch.randn(calls.stream.shape, generator=torch.Generator().manual_seed(4))
    for block, call, these in zip(modules, calls.calls, found(name), strict=True):
        after = call.run(block, stream)
        last = these[-1]
        if last.writer is None:
            continue
        made: list[Tensor] = []
        note = block.get_submodule(last.writer.path).register_forward_hook(
            lambda _, __, out, to=made: to.append(out.clone())  # Falcon adds to it in place
        )
        call.run(block, stream)
        note.remove()
        gone = [block.get_submodule(member) for member in last.sublayer.members[-1:]]
        zero = gone[0].register_forward_hook(
            lambda _, __, out: torch.zeros_like(out) if isinstance(out, Tensor) else (0 * out[0], *out[1:])
        )
        if last.writer.diagonal:  # the norm that follows makes zero of zero, but for its bias
            assert bias_of(block.get_submodule(last.writer.path)) is None
        without = call.run(block, stream)
        zero.remove()
        gap = after - without - last.writer.scale * made[0].reshape(after.shape)
        assert gap.abs().max() <= EXACT * after.abs().max()


# Planted defects: each makes one map of a llama's block something else than its writer, reader or inner map


def llama(change: Callable[[Any], None]) -> Ends:
    model = model_of("llama")
    change(blocks_of(model.net, model.layout)[1])
    return ends(model)[1][1]


class Curved(nn.Linear):
    """A linear map by its type, but not by what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Bent(nn.Module):
    """Something without weights after a map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.tanh(self.inner(x))
        return made


class Sum(nn.Module):
    """Two maps, of which none is all that is written."""

    def __init__(self, one: nn.Linear) -> None:
        super().__init__()
        self.one, self.two = one, nn.Linear(one.in_features, one.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.one(x) + self.two(x)
        return made


class Positive(nn.Module):
    """A gated MLP with ReLU on the side that llama leaves linear."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(torch.sigmoid(self.gate_proj(x)) * torch.relu(self.up_proj(x)))
        return made


def curved(linear: nn.Linear) -> Curved:
    made = Curved(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def share(block: Any, *paths: str) -> None:
    """Let another module of the network hold the same weights."""
    for path in paths:
        module = block.get_submodule(path)
        twin = nn.Linear(*reversed(module.weight.shape), bias=False)
        twin.weight = module.weight
        block.add_module(f"twin_of_{path.replace('.', '_')}", twin)


def test_without_a_defect_all_ends_are_found() -> None:
    mlp = llama(lambda block: None)
    assert mlp.writer is not None and mlp.writer.path == "mlp.down_proj"
    assert mlp.readers == tuple(GATED.split()) and mlp.inner == ("mlp.up_proj",)


@pytest.mark.parametrize(
    "defect",
    [
        lambda block: share(block, "mlp.down_proj"),
        lambda block: setattr(block.mlp, "down_proj", curved(block.mlp.down_proj)),
        lambda block: setattr(block.mlp, "down_proj", Bent(block.mlp.down_proj)),
        lambda block: setattr(block.mlp, "down_proj", Sum(block.mlp.down_proj)),
        lambda block: block.mlp.register_forward_hook(lambda _, __, out: torch.tanh(out)),
        lambda block: block.mlp.register_forward_hook(lambda _, __, out: out + 1),
    ],
    ids=["shared", "curved type", "nonlinearity", "sum of two", "nonlinearity after it", "constant after it"],
)
def test_what_is_no_writer_is_not_taken_for_one(defect: Callable[[Any], None]) -> None:
    mlp = llama(defect)
    assert mlp.writer is None and mlp.reason == "no single map of it writes to the stream"


@pytest.mark.parametrize(
    "defect",
    [
        lambda block: share(block, "mlp.up_proj"),
        lambda block: setattr(block.mlp, "up_proj", curved(block.mlp.up_proj)),
        lambda block: setattr(
            block.mlp, "up_proj", nn.Sequential(nn.LayerNorm(32, elementwise_affine=False), block.mlp.up_proj)
        ),
    ],
    ids=["shared", "curved type", "another input"],
)
def test_what_is_no_reader_is_not_taken_for_one(defect: Callable[[Any], None]) -> None:
    mlp = llama(defect)
    assert mlp.writer is not None and mlp.readers == ("mlp.gate_proj",)


def test_what_only_scales_is_no_inner_map() -> None:
    mlp = llama(lambda block: setattr(block, "mlp", Positive(block.mlp)))
    assert mlp.writer is not None and mlp.writer.path == "mlp.down_proj"
    assert mlp.readers == tuple(GATED.split()) and mlp.inner == ()


def test_a_constant_factor_after_the_writer_is_found() -> None:
    mlp = llama(lambda block: block.mlp.register_forward_hook(lambda _, __, out: -0.25 * out))
    assert mlp.writer is not None and mlp.writer.path == "mlp.down_proj"
    assert mlp.writer.scale == pytest.approx(-0.25, rel=1e-3)


# Reading and setting maps, whichever way they are stored


@pytest.mark.parametrize(("name", "path"), [("gpt2", "attn.c_attn"), ("llama_bias", "mlp.up_proj")])
def test_weights_are_given_as_outputs_by_inputs(name: str, path: str) -> None:
    model = model_of(name)
    module = blocks_of(model.net, model.layout)[0].get_submodule(path)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weight, bias = weight_of(module), bias_of(module)
    assert weight.shape[1] == 32 and weight.shape[0] != 32 and bias is not None
    torch.testing.assert_close(mapped(module, x), module(x).detach())
    torch.testing.assert_close(module(x).detach(), x @ weight.T + bias)
    old, kept = module.weight, module.weight.detach().clone()
    with torch.no_grad():
        set_weight(module, 2 * weight.double())
        set_bias(module, bias - 1)
    torch.testing.assert_close(module(x).detach(), 2 * x @ weight.T + bias - 1)
    assert torch.equal(old, kept) and module.weight is not old and module.weight.dtype == torch.float32


def test_finding_leaves_no_trace(subject: Callable[[str], Model]) -> None:
    for name in ("llama", "gemma2", "mixtral"):
        model = subject(name)
        before = {key: tensor.clone() for key, tensor in model.net.state_dict().items()}
        writers.ends(model)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.net.state_dict().items())
        assert not any(m._forward_hooks or "forward" in vars(m) for m in model.net.modules())


def test_a_sublayer_that_gives_nan_has_no_writer_and_the_reason_says_so() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.net.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    attention, mlp = ends(model)[1]
    assert attention.writer is not None and not attention.reason
    assert mlp.writer is None and mlp.reason.endswith("as what it gives is not finite (NaN or infinite)")
