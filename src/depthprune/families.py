"""What discovery cannot guess from structure alone, one line each.

Names only guess: whatever stands here is proven on the real modules afterwards (see ``layout.py``).
"""

from __future__ import annotations

from depthprune.units import Kind

# Fragments of module names, tried in this order; the first that occurs in the lower-cased child name decides its kind.
KIND_OF_NAME: tuple[tuple[str, Kind], ...] = (
    ("cross", "cross_attention"),
    ("crossattention", "cross_attention"),
    ("encoder_attn", "cross_attention"),
    ("mamba", "mixer"),
    ("linear_attn", "mixer"),
    ("conv", "mixer"),
    ("temporal", "mixer"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("mlp", "mlp"),
    ("moe", "mlp"),
    ("feed_forward", "mlp"),
    ("feedforward", "mlp"),
    ("ffn", "mlp"),
    ("expert", "mlp"),
    ("mixer", "mixer"),
)

# Children that act as one sublayer though they are declared apart: dropped together, in this order of execution.
TOGETHER: tuple[tuple[str, ...], ...] = (("fc1", "fc2"),)
KIND_TOGETHER: Kind = "mlp"

# Config fields that hold a count of blocks.
LAYER_COUNTS: tuple[str, ...] = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
