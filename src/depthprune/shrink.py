"""The pruned model's configuration, and the proof that it fits.

The rule is generic: lower the count, slice every list that is as long as the stack. The few families that store their
pattern as a count, a list of indices or a nested form have a rule here. Nothing of it is trusted: ``prove`` builds a
model from the new configuration on the meta device and compares every name, shape and plain attribute.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from depthprune.discover import REFUSALS
from depthprune.families import LAYER_COUNTS

Fields = dict[str, Any]
Flagged = tuple[dict[str, tuple[int, ...]], list[tuple[str, str]]]  # biases by name and shape; modules' attributes


def _remap(key: str) -> Callable[[Fields, Sequence[int]], None]:
    def rule(fields: Fields, kept: Sequence[int]) -> None:
        if fields.get(key):
            fields[key] = [kept.index(i) for i in fields[key] if i in kept]

    return rule


def _first_dense(fields: Fields, kept: Sequence[int]) -> None:
    if fields.get("first_k_dense_replace"):
        fields["first_k_dense_replace"] = sum(i < fields["first_k_dense_replace"] for i in kept)


def _sparse_step(fields: Fields, kept: Sequence[int]) -> None:
    """A period of sparse blocks cannot be sliced: name the dense ones instead, and make every other one sparse."""
    step, dense = fields.get("decoder_sparse_step"), fields.get("mlp_only_layers")
    if isinstance(step, int) and step > 1 and dense is not None:
        fields["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in dense or (old + 1) % step]
        fields["decoder_sparse_step"] = 1
    else:
        _remap("mlp_only_layers")(fields, kept)


def _attention_types(fields: Fields, kept: Sequence[int]) -> None:
    """GPT-Neo: ``[[["global", "local"], 2]]`` unrolls to a list; keep the list, once."""
    unrolled = [kind for kinds, times in fields["attention_types"] for _ in range(times) for kind in kinds]
    fields["attention_types"] = [[[unrolled[i] for i in kept], 1]]


# Fields that look per-layer but are not, or are not lists: field -> rule.
RULES: dict[str, Callable[[Fields, Sequence[int]], None]] = {
    "mlp_only_layers": _sparse_step,
    "first_k_dense_replace": _first_dense,
    "moe_layers": _remap("moe_layers"),
    "attn_layer_indices": _remap("attn_layer_indices"),
    "full_attn_idxs": _remap("full_attn_idxs"),
    "cross_attention_layers": _remap("cross_attention_layers"),
    "attention_types": _attention_types,
}


def shrink(config: Any, kept: Sequence[int], total: int) -> Any:
    """A configuration for the blocks ``kept`` of ``total``, made anew so that derived fields follow."""
    fields = config.to_dict()
    text = config.get_text_config(decoder=True)
    key = next((name for name in fields if getattr(config, name, None) is text), None)
    part = fields if text is config else fields[key]
    for name in LAYER_COUNTS:
        if part.get(name) == total:
            part[name] = len(kept)
    for name, value in list(part.items()):
        if name in RULES:
            RULES[name](part, kept)
        elif isinstance(value, (list, tuple)) and len(value) == total:
            part[name] = [value[i] for i in kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new = type(config).from_dict(fields)
    new._attn_implementation = getattr(config, "_attn_implementation", None)
    return new


def adopt(config: Any, new: Any) -> None:
    """Make a configuration object equal to another in place, as every module of a network refers to it."""
    for name, value in vars(new).items():
        own = vars(config).get(name)
        if hasattr(value, "to_dict") and own is not None and type(own) is type(value):
            adopt(own, value)
        else:
            vars(config)[name] = copy.deepcopy(value)


def prove(net: nn.Module, config: Any) -> str:
    """Compare a pruned network with one built from its configuration alone; say what differs, or nothing.

    Names and shapes of all weights must agree, and every plain attribute (sliding window, attention type, layer index,
    …) of every module, as those decide the arithmetic where no weight does.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = type(net)(copy.deepcopy(config))
    want = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    if missing or extra:
        return f"its configuration would build {len(missing)} tensors that are not there and lack {len(extra)} that are"
    for name, shape in want.items():
        if have[name] != shape:
            return f"its configuration would give {name} the shape {shape} instead of {have[name]}"
    others = dict(built.named_modules())
    for name, module in net.named_modules():
        for field, value in vars(module).items():
            if (
                field.startswith("_")
                or not isinstance(value, (bool, int, float, str, type(None)))
                or field == "training"
            ):
                continue
            other = vars(others[name]).get(field)
            if other != value and not (value is None and field not in vars(others[name])):
                return f"its configuration would set {name}.{field} to {other!r} instead of {value!r}"
    return ""


def bias_flags(net: Any) -> Iterator[tuple[str, Flagged]]:
    """The flags of a configuration that, set, add biases to the model and nothing else.

    With what each adds: the biases, and the attributes of modules that say so.
    """
    have = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    modules = dict(net.named_modules())
    for flag, value in vars(net.config.get_text_config(decoder=True)).items():
        if value is not False or "bias" not in flag:
            continue
        config = copy.deepcopy(net.config)
        setattr(config.get_text_config(decoder=True), flag, True)
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built = type(net)(config)
        except REFUSALS:
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        new = {name: shape for name, shape in shapes.items() if name not in have}
        if new and all(name.endswith(".bias") for name in new) and have == {n: shapes.get(n) for n in have}:
            marks = [
                (name, mark)
                for name, module in built.named_modules()
                for mark, set_ in vars(module).items()
                if set_ is True and "bias" in mark and name in modules and vars(modules[name]).get(mark) is False
            ]
            yield flag, (new, marks)
