"""What the sweeps run on: the plans that each family gets, and the families that are rightly refused, with reasons.

Nothing is left out silently: a refusal listed here must really happen, and one that is not listed fails the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from depthprune.data import Data, digest
from depthprune.layout import Layout
from depthprune.model import Model, wrap
from depthprune.plan import Plan
from depthprune.units import Unit
from families import tiny

PLANS = ("block", "blocks", "attention", "mlp", "mixed", "mixer")


def model(name: str) -> Model:
    """A fresh tiny model of a family."""
    return wrap(tiny(name), None, name)


def plans(layout: Layout) -> dict[str, tuple[Unit, ...]]:
    """One plan of each sort that the layout has units for; the attention of block 0 is always among them."""
    blocks, attention, mlp = layout.units("block"), layout.units("attention"), layout.units("mlp")
    found = {"block": blocks[1:2], "blocks": (blocks[0], blocks[2]), "mixer": layout.units("mixer")[:1]}
    if attention:
        found["attention"] = attention[: max(1, min(2, len(attention) - 1))]
    if mlp:
        found["mlp"] = (mlp[0], mlp[-1])
    if attention and mlp:
        found["mixed"] = (blocks[2], *(unit for unit in (attention[0], mlp[-1]) if unit.block != 2))
    return {sort: found[sort] for sort in PLANS if found.get(sort)}


def plan(subject: Model, units: Sequence[Unit]) -> Plan:
    """A plan for these units of this model."""
    return Plan(subject.reference, tuple(units))


def text(*, padded: bool = False, rows: int = 3, length: int = 20, seed: int = 0) -> Data:
    """Random tokens; ``padded`` leaves the second row 13 tokens and the last 2."""
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[1, 13:] = False
        mask[-1, 2:] = False
        tokens = tokens * mask
    return Data(tokens, mask, "random", digest(tokens, mask), seed, ())


# Families with blocks whose sublayers cannot be proven, and what the reason given must say.
NO_SUBLAYERS: dict[str, str] = {
    "gemma3n_text": "'laurel'",  # several streams run side by side; a block mixes them
    "gemma4_text": "'per_layer_input_gate'",  # each block also adds a per-layer embedding
    "openai_gpt": "no plain residual branches",  # the block's norms come after the addition
    "opt_postnorm": "zero is not absent",  # as openai_gpt
    "bloom": "zero is not absent",  # its sublayers add the residual themselves
    "mpt": "zero is not absent",  # its MLP adds the residual itself
    "dbrx": "zero is not absent",  # its attention lies inside a part that is called a norm
    "doge": "zero is not absent",  # it scales the residual
    "rwkv": "zero is not absent",  # block 0 has a norm of its own for the embedding; the others are proven
    "zamba": "'shared_transf'",  # blocks with the shared transformer add its output before their mixer
    "zamba2": "'linear'",  # as zamba
    "minimax": "zero is not absent",  # what it adds to is the output of its norms, not the stream
    "bert": "'intermediate'",  # post-norm; its parts are spread over three children
    "roberta": "'intermediate'",
    "electra": "'intermediate'",
    "deberta_v2": "'intermediate'",
    "distilbert": "zero is not absent",  # post-norm
}
SOME_SUBLAYERS = {"rwkv", "zamba", "zamba2"}  # those of the above where other blocks are proven

ONE_ATTENTION = "every attention"  # the positions of the cache are counted where keys are written
# Plans that ``drop`` refuses, and what it must say.
REFUSED: dict[tuple[str, str], str] = {
    ("gemma3n_text", "block"): "the shape (96, 40)",  # its embeddings hold a slice for every block
    ("gemma3n_text", "blocks"): "no model can be built",
    ("gemma4_text", "block"): "cannot be shortened",  # head sizes live in a per-layer configuration
    ("gemma4_text", "blocks"): "cannot be shortened",
    ("rwkv", "block"): "layers_are_rescaled",  # it counts on rescaling every sixth block
    ("rwkv", "blocks"): "tensors that are not there",  # the first block has one norm more
    ("rwkv", "attention"): "does not run",  # a state goes from part to part
    ("rwkv", "mlp"): "does not run",
    ("rwkv", "mixed"): "layers_are_rescaled",
    ("zamba", "blocks"): "no model can be built",  # the shared block's weights are tied by number
    ("zamba2", "block"): "does not run",  # the shared blocks take turns by number
    ("zamba2", "blocks"): "something else",
    ("zamba2", "mixer"): "does not run",
    ("lfm2", "blocks"): ONE_ATTENTION,
    ("lfm2", "attention"): ONE_ATTENTION,
    ("lfm2", "mixed"): ONE_ATTENTION,
    ("lfm2_moe", "blocks"): ONE_ATTENTION,
    ("lfm2_moe", "attention"): ONE_ATTENTION,
    ("lfm2_moe", "mixed"): ONE_ATTENTION,
    ("qwen3_next", "blocks"): ONE_ATTENTION,
    ("qwen3_next", "attention"): ONE_ATTENTION,
    ("qwen3_next", "mixed"): ONE_ATTENTION,
    ("qwen3_5_text", "blocks"): ONE_ATTENTION,
    ("qwen3_5_text", "attention"): ONE_ATTENTION,
    ("qwen3_5_text", "mixed"): ONE_ATTENTION,
    ("olmo_hybrid", "blocks"): ONE_ATTENTION,
    ("olmo_hybrid", "attention"): ONE_ATTENTION,
    ("olmo_hybrid", "mixed"): ONE_ATTENTION,
    ("minimax", "block"): "num_hidden_layers to 3",  # its attention scales with the number of blocks
    ("distilbert", "block"): "n_layers to 3",  # the stack keeps the count that it was built with
    ("distilbert", "blocks"): "n_layers to 2",
}
# Plans that can be dropped and written, but whose folder is not right: the check after writing must say so.
FAILED_PROOF: dict[tuple[str, str], str] = {
    ("falcon_h1", "mixer"): "mup_vector",  # the model reaches into its mixers while it is built
    ("falcon_h1", "attention"): "step by step",  # block 0's Mamba keeps the slot that positions are counted by
    ("falcon_h1", "mixed"): "step by step",
}
# Families where a block alone is not what the model computes: one plain forward for each variant.
PLAIN_FORWARDS: dict[str, str] = {"gemma3n_text": "later blocks read the keys of earlier ones"}
# Blocks without which a family does not run at all.
NOT_WITHOUT: dict[str, set[int]] = {"gemma3n_text": {2, 3}}  # they make the keys that the last two read
# Attention and Mamba of a block share one slot of the cache: without its attention, a block keeps the slot.
KEEPS_SLOT = {"falcon_h1"}
