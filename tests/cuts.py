"""A model, a cut of it and rows of text: what every test of recovery starts from; and what hooks see of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from depthprune.data import Data, digest
from depthprune.model import Model, wrap
from depthprune.plan import Plan, with_stand_ins
from depthprune.recover.repair import Repair
from depthprune.surgery import drop
from depthprune.units import parse
from families import EXACT, tiny

# By family: what each sublayer adds to the stream is the output of this module, times this.
ADDS: dict[str, tuple[dict[str, str], float]] = {
    "llama": ({"self_attn": "self_attn", "mlp": "mlp"}, 1.0),
    "llama_bias": ({"self_attn": "self_attn", "mlp": "mlp"}, 1.0),
    "granite": ({"self_attn": "self_attn", "mlp": "mlp"}, 0.8),
    "gpt2": ({"attn": "attn", "mlp": "mlp"}, 1.0),
    "opt": ({"self_attn": "self_attn", "fc1+fc2": "fc2"}, 1.0),
    "gemma2": ({"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}, 1.0),
    "mixtral": ({"self_attn": "self_attn", "mlp": "mlp"}, 1.0),
    "gpt_neox": ({"attention": "attention", "mlp": "mlp"}, 1.0),  # parallel from here on
    "phi": ({"self_attn": "self_attn", "mlp": "mlp"}, 1.0),
    "cohere": ({"self_attn": "self_attn", "mlp": "mlp"}, 1.0),
    "stablelm_parallel": ({"self_attn": "self_attn", "mlp": "mlp"}, 1.0),
}


def model_of(name: str, seed: int = 0) -> Model:
    """A tiny model of a family."""
    return wrap(tiny(name, seed=seed), None, name)


def rows(count: int = 16, length: int = 24, *, seed: int = 0, vocabulary: int = 96, padding: int = 0) -> Data:
    """Rows of random tokens; every second one ends in ``padding`` tokens that do not count."""
    tokens = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padding:
        mask[::2, length - padding :] = False
    return as_data(tokens, mask)


def as_data(tokens: Tensor, mask: Tensor | None = None) -> Data:
    """Tokens as rows of text."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return Data(tokens, mask, "random", digest(tokens, mask), 0, ())


def cut(model: Model, *units: str, form: str = "") -> Model:
    """The model without some units; with a stand-in for each where ``form`` names one."""
    plan = Plan(model.reference, model.layout.canonical(parse(units)))
    return drop(model, with_stand_ins(plan, form) if form else plan)


def repair(teacher: Model, model: Model, data: Data | None = None, held: Data | None = None, **options: Any) -> Repair:
    """One recovery, on random rows unless told otherwise."""
    return Repair(model, teacher, data or rows(), held or rows(6, seed=1), **options)


def weights(model: Model) -> dict[str, Tensor]:
    """A copy of all that is saved of a model."""
    return {name: tensor.clone() for name, tensor in model.net.state_dict().items()}


def moved(model: Model, before: dict[str, Tensor]) -> set[str]:
    """The weights that are no longer, bit for bit, what they were."""
    now = model.net.state_dict()
    assert now.keys() == before.keys()
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


class Saw(dict[str, Any]):
    """By the path of a module: its input and its output in one forward."""

    def into(self, path: str) -> Tensor:
        """The input of a module."""
        found = self[path][0]
        assert isinstance(found, Tensor)
        return found

    def out(self, path: str) -> Tensor:
        """The output of a module."""
        found = self[path][1]
        assert isinstance(found, Tensor)
        return found


@torch.no_grad()
def see(net: nn.Module, data: Data) -> Saw:
    """The input and the output of every module in one plain forward of all rows."""
    saw = Saw()

    def watch(path: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            saw[path] = (given, output[0] if isinstance(output, (tuple, list)) else output)

        return note

    hooks = [m.register_forward_hook(watch(path), with_kwargs=True) for path, m in net.named_modules()]
    masked = {} if data.packed else {"attention_mask": data.mask.long()}
    try:
        net(input_ids=data.tokens, **masked, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return saw


def streams_of(model: Model, name: str, data: Data) -> list[Tensor]:
    """The stream before the first sublayer and after each (N, T, D): what a block is given and what hooks see added."""
    saw, (adds, factor), path = see(model.net, data), ADDS[name], model.layout.path
    found = [saw.into(f"{path}.0")]
    for block in model.layout.blocks:
        stream = saw.into(f"{path}.{block.index}")
        for sublayer in block.sublayers:
            stream = stream + factor * saw.out(f"{path}.{block.index}.{adds[sublayer.name]}").reshape(stream.shape)
            found.append(stream)
        torch.testing.assert_close(stream, saw.out(f"{path}.{block.index}"), rtol=EXACT, atol=EXACT)
    return found


@contextmanager
def multiplied(places: list[tuple[nn.Module, float]], *, after: bool = False) -> Iterator[None]:
    """Multiply the stream before (or after) some blocks, for a moment."""

    def before_it(factor: float) -> Any:
        def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (args[0] * factor, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * factor}

        return change

    def after_it(factor: float) -> Any:
        def change(_: nn.Module, __: Any, output: Any) -> Any:
            return output * factor if isinstance(output, Tensor) else (output[0] * factor, *output[1:])

        return change

    if after:
        hooks = [module.register_forward_hook(after_it(factor)) for module, factor in places]
    else:
        hooks = [module.register_forward_pre_hook(before_it(factor), with_kwargs=True) for module, factor in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
