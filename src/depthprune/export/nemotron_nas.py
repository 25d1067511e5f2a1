"""Writing a Llama-shaped model as DeciLM (``nemotron-nas``), which stock runtimes run with sublayers missing.

vLLM and MLX-LM have it built in, and it is what TensorRT-LLM and SGLang read: ``block_configs`` in the configuration
says of each block whether it has an attention and an MLP; tensors keep Llama's names. vLLM and SGLang need the folder's
small configuration file (``--trust-remote-code``) or depthprune installed beside them; MLX-LM needs neither.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from depthprune import decilm, skip
from depthprune.errors import ExportError
from depthprune.export import hf
from depthprune.files import place, write_json
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.offload import offloaded

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
MULTIPLE = 256  # runtimes compute the width of an MLP from a ratio and round it up to this
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write(model: Model, path: str | Path, *, stub: bool = False) -> Path:
    """Write a folder of the DeciLM architecture, for vLLM, MLX-LM, TensorRT-LLM and SGLang without code of ours.

    MLPs are padded with zeros to a width that is a multiple of 256, as the format demands; that is exact. With ``stub``
    a dropped attention of block 0 stays as zeros, with its layer of KV cache: vLLM cannot run DeciLM without it.
    Raises ``ExportError`` for families that are not shaped like Llama, and for stand-ins that have no bias to lie in.
    """
    refuse(model)
    path = place(path, folder=True)
    hf.room(model, path)
    state, config = _state(model, stub), _config(model, stub)
    with hf.filled(path) as folder:
        write_json(folder / "config.json", config)
        save_torch_state_dict(state, folder, metadata={"format": "pt"})
        for name, text in code().items():
            (folder / name).write_text(text, encoding="utf-8")
        if getattr(model.net, "generation_config", None) is not None:
            model.net.generation_config.save_pretrained(folder)
        hf.companions(model, folder)
    return path


def refuse(model: Model) -> None:
    """Raise ``ExportError`` where a model cannot be written as DeciLM, naming the reason and the form that can."""
    name, config = hf.stock(model.net).__name__, model.net.config
    reason = ""
    if offloaded(model.net):
        reason = "its weights wait outside of memory: load it with --place whole"
    elif name not in FAMILIES:
        reason = f"{name} is not shaped like Llama, Mistral or Qwen2; form hf can, and zeroed"
    elif config.hidden_act not in ("silu", "swish"):
        reason = f"its MLPs use {config.hidden_act}, not silu; form hf can"
    elif _window(config):
        reason = f"it has sliding windows of {_window(config)} tokens; form hf can"
    elif (kind := _rope(config).get("rope_type", "default")) not in ("default", "llama3"):
        reason = f"its rotary scaling {kind!r} is not read alike by the runtimes; form hf can"
    else:
        held = [
            f"{index}.{name}"
            for index, block in enumerate(blocks_of(model.net, model.layout))
            for name, part in block.named_modules()
            if skip.is_skip(part) and any(p.numel() for p in part.parameters())
        ]
        if held:
            reason = f"the stand-in for {held[0]} lies in no bias of a part that is left; form hf can"
    if reason:
        raise ExportError(f"form nemotron-nas cannot express this model: {reason}")


def _window(config: Any) -> int | None:
    """The width of the sliding windows, where any block has one."""
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = "sliding_attention" in kinds if kinds is not None else getattr(config, "use_sliding_window", True)
    return size if size and used else None


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters, ``rope_theta`` and the scaling's."""
    return dict(getattr(config, "rope_parameters", None) or {})


def _config(model: Model, stub: bool) -> dict[str, Any]:
    """The configuration: Llama's fields in the old and the new spelling, and what each block has."""
    own, names = model.net.config, set(model.net.state_dict())
    stack, blocks = model.layout.path, blocks_of(model.net, model.layout)
    heads, groups = own.num_attention_heads, own.num_key_value_heads
    entries = []
    for index in range(len(blocks)):
        attention = f"{stack}.{index}.self_attn.q_proj.weight" in names or (stub and index == 0)
        ffn = f"{stack}.{index}.mlp.up_proj.weight" in names
        entries.append(
            {
                "attention": {
                    "n_heads_in_group": heads // groups if attention else None,
                    "no_op": not attention,
                    "replace_with_linear": False,
                },
                "ffn": {
                    "ffn_mult": ratio(own) if ffn else None,
                    "no_op": not ffn,
                    "replace_with_linear": False,
                },
            }
        )
    rope = _rope(own)
    scaled = rope.get("rope_type", "default") != "default"
    copied = (
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "max_position_embeddings",
        "num_attention_heads",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
    )
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        **{key: getattr(own, key) for key in copied if hasattr(own, key)},
        "head_dim": getattr(own, "head_dim", None) or own.hidden_size // heads,
        "num_hidden_layers": len(blocks),
        "intermediate_size": _width(own),
        "attention_bias": _biased(names, "self_attn.q_proj"),
        "mlp_bias": _biased(names, "mlp.up_proj"),
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "use_cache": True,
        "block_configs": entries,
    }


def ratio(config: Any) -> float:
    """The ``ffn_mult`` of which runtimes compute the width of an MLP: in the middle of what they round up to it."""
    return 1.5 * (_width(config) - MULTIPLE / 2) / float(config.hidden_size)


def _width(config: Any) -> int:
    width: int = config.intermediate_size
    return math.ceil(width / MULTIPLE) * MULTIPLE


def _biased(names: set[str], part: str) -> bool:
    return any(name.endswith(f"{part}.bias") for name in names)


def _state(model: Model, stub: bool) -> dict[str, Tensor]:
    """The weights under Llama's names, MLPs padded, with zeros for biases that the format has and the model has not."""
    net, config = model.net, model.net.config
    width = _width(config)
    state = {name: tensor.to(model.dtype) for name, tensor in net.state_dict().items() if tensor.numel()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    first = f"{model.layout.path}.0"
    if stub and f"{first}.self_attn.q_proj.weight" not in state:
        state |= _zeros(model, first)
    for name, tensor in list(state.items()):
        part = name.split(".")[-2]
        if ".mlp." in name and part in ("gate_proj", "up_proj", "down_proj"):
            state[name] = _padded(tensor, width - config.intermediate_size, part, name)
        elif name.endswith("q_proj.bias"):  # DeciLM's o_proj has one where the others do
            own = name.replace("q_proj", "o_proj")
            state.setdefault(own, torch.zeros(config.hidden_size, dtype=model.dtype))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _padded(tensor: Tensor, more: int, part: str, name: str) -> Tensor:
    """A map of an MLP with inner channels that are always zero."""
    if not more or (part == "down_proj" and name.endswith("bias")):
        return tensor
    if part == "down_proj":
        return torch.nn.functional.pad(tensor, (0, more))
    return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])


def _zeros(model: Model, first: str) -> Mapping[str, Tensor]:
    """An attention that adds nothing, in the shapes of another block's."""
    state, path = model.net.state_dict(), model.layout.path
    index = next((n for n in range(len(model.layout.blocks)) if f"{path}.{n}.self_attn.q_proj.weight" in state), None)
    if index is None:
        raise ExportError("form nemotron-nas: no attention is left whose shapes a stub could have")
    prefix = f"{path}.{index}."
    names = [f"self_attn.{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")] + ["input_layernorm.weight"]
    return {
        f"{first}.{name}": torch.zeros_like(state[prefix + name], dtype=model.dtype)
        for name in names
        if prefix + name in state
    }


def code() -> dict[str, str]:
    """The code that a folder carries, by file: DeciLM's configuration, and Llama less what that says is missing."""
    modelling = "\n".join(
        [
            inspect.getsource(skip).rstrip(),
            "",
            "",
            "from transformers import LlamaForCausalLM  # noqa: E402",
            "",
            "from .configuration_decilm import DeciLMConfig  # noqa: E402",
            "",
            "",
            "class DeciLMForCausalLM(LlamaForCausalLM):",
            '    """A Llama without the attentions and MLPs that its configuration calls no-ops."""',
            "",
            "    config_class = DeciLMConfig",
            "",
            "    def __init__(self, config: DeciLMConfig) -> None:",
            "        super().__init__(config)",
            "        skip_sublayers(self)",
            "",
        ]
    )
    return {"configuration_decilm.py": inspect.getsource(decilm), "modeling_decilm.py": modelling}
