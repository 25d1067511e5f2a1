"""Reading checkpoints whose weights are quantized: as plain weights, which can be scored, dropped and recovered.

What a quantized weight stands for, scale times integer, becomes an ordinary weight of the checkpoint's own type, and
the configuration forgets that there was anything else; rounding of activations is left out. A model that was pruned so
is written unquantized, or quantized anew. Only compressed-tensors is read so; other checkpoints are what transformers
makes of them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import transformers

from depthprune.errors import OptionError

METHOD = "compressed-tensors"


def reading(source: str, config: Any) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told to read a checkpoint as plain weights; nothing for others.

    Raises ``OptionError`` where the library for it is missing.
    """
    told = getattr(config, "quantization_config", None) or {}
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    if str(getattr(method, "value", method)) != METHOD:
        return {}
    if importlib.util.find_spec("compressed_tensors") is None:
        raise OptionError(f"{source} is quantized: to read it needs pip install 'depthprune[compressed]'")
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


def plain(net: Any) -> None:
    """Take from a network that was read so what is left of its quantization, in itself and its configuration."""
    for module in net.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        for name in [*module._parameters, *module._buffers]:
            if name not in ("weight", "bias"):
                delattr(module, name)
        for name in [name for name in vars(module) if name.startswith("quantization_")]:
            delattr(module, name)
        vars(module).pop("forward", None)  # the one that rounds activations
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        vars(net).pop(name, None)
    vars(net.config).pop("quantization_config", None)
