"""What llama.cpp takes from the number of a block or from how many there are, and would silently get wrong once pruned.

Read in its source (``src/models``): which blocks have sliding windows, which have no rotary positions, and in two
families the scale of the attention. A file can say only the first, and only to some families.
"""

from __future__ import annotations

from typing import Any

from depthprune.errors import ExportError
from depthprune.export.gguf_file import Field, File

PATTERN = "attention.sliding_window_pattern"
LISTED = ("cohere2", "exaone4", "gemma2", "gemma3", "gemma3n", "olmo2")  # read the list of windows from the file
COUNTED = {"exaone4": 64}  # have windows only with this many blocks
UNWINDOWED = ("phi3",)  # whose windows llama.cpp reads from the file and does not use
NORMED = {"command-r": 64}  # with this many blocks and more, queries and keys have norms
UNTURNED = {"smollm3": 4, "llama4": 4}  # every so many blocks one has no rotary positions
SCALED = {"gemma2": 46, "gemma3": 62}  # with this many blocks the scale is that of the largest model
SILU = ("llama", "qwen2", "qwen3", "olmo2", "smollm3")  # whose MLPs are always SiLU
_CAN = "form hf can"


def faithful(file: File, config: Any, windows: str = "refuse") -> File:
    """The file with what llama.cpp has to be told; ``config`` is the decoder's configuration.

    Where llama.cpp has no sliding windows, ``windows="limit"`` makes a file for texts no longer than one window.
    Raises ``ExportError`` where it would compute something else than the model and cannot be told.
    """
    name, blocks = file.architecture, int(file.own("block_count"))
    activation = getattr(config, "hidden_act", "silu")
    if name in SILU and activation not in ("silu", "swish"):
        raise ExportError(f"form gguf: llama.cpp computes {name} with silu, this model has {activation}; {_CAN}")
    normed = any(tensor.endswith("attn_q_norm.weight") for tensor in file.tensors)
    if name in NORMED and normed != (blocks >= NORMED[name]):
        rule = f"{NORMED[name]} blocks or more" if normed else f"fewer than {NORMED[name]} blocks"
        raise ExportError(f"form gguf: llama.cpp takes such a {name} only with {rule}, not {blocks}; {_CAN}")
    _positions(name, config)
    _scale(name, blocks, config)
    return _windows(file, blocks, config, windows == "limit")


def _windows(file: File, blocks: int, config: Any, limit: bool) -> File:
    name, kinds = file.architecture, getattr(config, "layer_types", None)
    size = getattr(config, "sliding_window", None)
    if kinds is None:  # families of one kind
        kinds = ["sliding_attention"] * blocks if size and getattr(config, "use_sliding_window", True) else []
    windows = ["sliding" in kind or "chunked" in kind for kind in kinds]
    key = f"{name}.{PATTERN}"
    if key in file.fields and isinstance(file.fields[key].value, list):
        if [bool(value) for value in file.fields[key].value] != windows:
            raise ExportError(f"form gguf: the converter wrote other sliding windows than the model's; {_CAN}")
    elif name in LISTED and windows and name not in COUNTED:
        file = File(name, {**file.fields, key: Field(windows, "ARRAY", "BOOL")}, file.tensors)
    elif name == "llama4" and any(windows):
        if windows != [(index + 1) % 4 != 0 for index in range(blocks)]:
            raise ExportError(f"form gguf: llama.cpp has every fourth block of {name} read all text; {_CAN}")
    elif any(windows) and not all(windows):
        raise ExportError(f"form gguf: llama.cpp cannot be told which blocks of {name} have sliding windows; {_CAN}")
    elif any(windows) and (name in UNWINDOWED or f"{name}.attention.sliding_window" not in file.fields):
        length = f"{name}.context_length"
        if not limit and (length not in file.fields or file.fields[length].value > size):
            raise ExportError(
                f"form gguf: llama.cpp has no sliding windows for {name}, and reads texts of over {size} tokens in "
                f"another way; gguf:windows=limit makes a file for texts up to that; {_CAN}"
            )
        file = File(name, {**file.fields, length: Field(size, "UINT32")}, file.tensors)
    if any(windows) and COUNTED.get(name, blocks) != blocks:
        raise ExportError(
            f"form gguf: llama.cpp gives {name} sliding windows only with {COUNTED[name]} blocks, not {blocks}; {_CAN}"
        )
    return file


def _positions(name: str, config: Any) -> None:
    turned = getattr(config, "no_rope_layers", None)
    if not turned:
        return
    step = UNTURNED.get(name)
    want = [step is None or (index + 1) % step != 0 for index in range(len(turned))]
    if [bool(value) for value in turned] != want:
        rule = f"every {step}th block" if step else "no block"
        raise ExportError(
            f"form gguf: llama.cpp has {rule} of {name} without rotary positions; what is left of this model does not "
            f"follow that: drop whole groups of {step or 4} blocks; {_CAN}"
        )


def _scale(name: str, blocks: int, config: Any) -> None:
    wanted = getattr(config, "query_pre_attn_scalar", None)
    if name not in SCALED or wanted is None:
        return
    width, heads = config.hidden_size, config.num_attention_heads
    taken = width // heads if blocks == SCALED[name] else config.head_dim
    if taken != wanted:
        raise ExportError(
            f"form gguf: llama.cpp scales the attention of {name} with {blocks} blocks by {taken}, this model by "
            f"{wanted} (it goes by the number of blocks: {SCALED[name]} is the largest model); {_CAN}"
        )
