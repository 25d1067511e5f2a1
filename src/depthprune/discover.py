"""Discovery: where the blocks of a model are, which sublayers each has, and the proof that they can be dropped.

*Find* the outermost module list as long as the layer count. *Guess* sublayers: a block's weighted children that are
no norms. *Prove*: with every sublayer returning zeros the block must be the identity, exactly. That means residual
branches only, nothing else in the block, zero = absent; it is what dropping a sublayer has to mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from depthprune.errors import LayoutError
from depthprune.families import KIND_OF_NAME, KIND_TOGETHER, LAYER_COUNTS, TOGETHER
from depthprune.layout import Block, Layout, Norm, Sublayer
from depthprune.offload import hold
from depthprune.record import Call, answer, forwards, inputs, record
from depthprune.skip import is_skip
from depthprune.units import Kind

# What model code raises when a configuration or a missing part does not suit it.
REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    StopIteration,
    StrictDataclassError,
)
PROBE = (2, 6)  # sequences and tokens of the probe: more than one of each, so that no axis is taken for another


def find_stack(net: nn.Module) -> str:
    """The path of the outermost module list as long as the layer count that the configuration states.

    Raises ``LayoutError`` where there is none, or more than one.
    """
    config = net.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    if getattr(net.config, "is_encoder_decoder", False):
        raise LayoutError("encoder-decoder models are not supported yet: this release prunes models with one stack")
    counts = {getattr(config, name, None) for name in LAYER_COUNTS}
    found: list[str] = []
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts and not _inside(name, found):
            found.append(name)
    if len(found) > 1:  # a vision tower may be as deep as the text model
        text = [path for path in found if getattr(net.get_submodule(path.rpartition(".")[0]), "config", None) is config]
        found = text or found
    if len(found) != 1:
        what = f"several candidates: {', '.join(found)}" if found else f"no module list of length {_numbers(counts)}"
        raise LayoutError(f"cannot find the stack of blocks in {type(net).__name__}: {what}")
    return found[0]


def _inside(name: str, found: list[str]) -> bool:
    return any(name.startswith(path + ".") for path in found)


def _numbers(counts: set[Any]) -> str:
    return " or ".join(str(count) for count in sorted(c for c in counts if isinstance(c, int)))


def size(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def discover(net: nn.Module, element_size: int | None = None) -> Layout:
    """Find the blocks of a network and prove which of their sublayers can be dropped.

    Runs two plain forwards over a probe of 2 x 6 tokens, then each block a few times by itself. ``element_size`` is the
    bytes of one number in the KV cache, by default that of the loaded weights.
    Raises ``LayoutError`` where the stack cannot be found or blocks cannot be called one by one.
    """
    path = find_stack(net)
    modules = list(net.get_submodule(path).children())
    table = net.get_input_embeddings().weight  # type: ignore[operator]
    device, vocabulary = table.device, table.shape[0]
    tokens = torch.randint(vocabulary, PROBE, generator=torch.Generator().manual_seed(0)).to(device)
    outputs = _watch(net, modules, tokens)
    arities = [_arity(outputs[block][-1][1]) for block in modules]
    recording = record(net, modules, arities, tokens, None)
    size_of = element_size or next(net.parameters()).element_size()
    cache = [numbers * size_of for numbers in _cache_numbers(net, modules, tokens)]
    noise = torch.Generator().manual_seed(1)
    known: dict[tuple[Any, ...], tuple[Norm, ...]] = {}
    blocks = []
    for index, (module, call) in enumerate(zip(modules, recording.calls, strict=True)):
        stream = recording.stream
        stream = stream + torch.randn(stream.shape, generator=noise).to(stream)
        with hold(module):
            guessed = _guess(module, outputs)
            reason = guessed if isinstance(guessed, str) else _prove(module, guessed, call, stream)
            sublayers = () if isinstance(guessed, str) or reason else guessed
            serves: tuple[Norm, ...] = ()
            if sublayers:
                key = (
                    type(module),
                    sublayers,
                    tuple(
                        (name, type(c), bool(size(c)), bool(getattr(c, "down", None)))
                        for name, c in module.named_children()
                    ),
                )
                if key not in known:
                    known[key] = tuple(_serves(module, sublayers, call, stream))
                serves = known[key]
        sublayers = tuple(_with_norms(sublayer, serves) for sublayer in sublayers)
        held = sum(size(part) for part in skips(module))
        blocks.append(Block(index, size(module), arities[index], sublayers, reason, serves, cache[index], held))
    outside = size(net) - sum(block.parameters for block in blocks)
    return Layout(path, tuple(blocks), outside, size_of)


def _watch(net: nn.Module, modules: list[nn.Module], tokens: Tensor) -> dict[nn.Module, list[tuple[int, Any]]]:
    """Run a plain forward and note, for blocks and their children, when each finished and what it returned."""
    seen: dict[nn.Module, list[tuple[int, Any]]] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        seen.setdefault(module, []).append((len(seen), output))

    hooks = [child.register_forward_hook(note) for block in modules for child in (block, *block.children())]
    try:
        net(**inputs(tokens, None), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for index, block in enumerate(modules):
        if len(seen.get(block, ())) != 1:
            raise LayoutError(
                f"this model calls block {index} {len(seen.get(block, ()))} times in one forward, not once"
            )
    return seen


def _arity(output: Any) -> int:
    return len(output) if isinstance(output, (tuple, list)) else 0


def _cache_numbers(net: nn.Module, modules: list[nn.Module], tokens: Tensor) -> list[int]:
    """Numbers that each block adds to the KV cache for one token of one sequence, read from a real cache."""
    cache = getattr(net(**inputs(tokens, None), use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None) or []
    result = []
    for module in modules:
        numbers = (getattr(child, "layer_idx", None) for child in module.modules())
        slots = {number for number in numbers if isinstance(number, int)}
        total = 0
        for slot in slots:
            for name in ("keys", "values"):
                tensor = getattr(layers[slot], name, None) if slot < len(layers) else None
                if isinstance(tensor, Tensor):
                    total += tensor.numel() // tokens.numel()
        result.append(total)
    return result


def _is_norm(name: str, module: nn.Module) -> bool:
    text = f"{name} {type(module).__name__}".lower()
    return "norm" in text or name.lower().startswith("ln_") or name.lower().endswith("_ln")


def _guess(block: nn.Module, outputs: dict[nn.Module, list[tuple[int, Any]]]) -> tuple[Sublayer, ...] | str:
    """The sublayers of a block by names, in execution order, or why none can be named."""
    parts = [(n, m) for n, m in block.named_children() if size(m) and not is_skip(m)]
    children = {n: m for n, m in parts if not _is_norm(n, m) and outputs.get(m)}
    groups: list[tuple[tuple[str, ...], Kind]] = []
    for members in TOGETHER:
        if all(name in children for name in members):
            groups.append((members, KIND_TOGETHER))
    grouped = {name for members, _ in groups for name in members}
    for name in children:
        if name not in grouped:
            kind = next((kind for part, kind in KIND_OF_NAME if part in name.lower()), None)
            if kind is None:
                return f"its part {name!r} is neither attention, nor mlp, nor mixer by name"
            groups.append(((name,), kind))
    for members, _ in groups:
        if any(len(outputs[children[name]]) != 1 for name in members):
            return f"its part {'+'.join(members)!r} runs more than once in one forward"
    groups.sort(key=lambda group: outputs[children[group[0][-1]]][0][0])
    if not groups:
        held = any(size(part) for part in skips(block))
        return f"it has no weighted parts besides norms{' and stand-ins' * held}"
    return tuple(
        Sublayer(
            "+".join(members),
            kind,
            sum(size(children[name]) for name in members),
            _arity(outputs[children[members[-1]]][0][1]),
            members,
        )
        for members, kind in groups
    )


def zeros(arity: int, constant: Tensor | None = None) -> Callable[..., Any]:
    """A ``forward`` for a dropped sublayer: zeros in the shape of the stream it was given, or a constant (D,)."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = (
            args[0]
            if args and isinstance(args[0], Tensor)
            else next(v for v in kwargs.values() if isinstance(v, Tensor))
        )
        nothing = torch.zeros_like(stream)
        return answer(nothing if constant is None else nothing + constant, arity)

    return forward


def through(*args: Any, **kwargs: Any) -> Any:
    """A ``forward`` for a dropped norm: its input."""
    return args[0] if args else next(iter(kwargs.values()))


def muted(block: nn.Module, sublayers: tuple[Sublayer, ...]) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The replacement forwards that make sublayers of a block return zeros, for ``record.forwards``."""
    return [(block.get_submodule(name), zeros(s.arity)) for s in sublayers for name in s.members]


def skips(block: nn.Module) -> list[nn.Module]:
    """The parts of a block that stand where something was dropped."""
    return [module for module in block.modules() if is_skip(module)]


def silent(block: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The replacement forwards that make stand-ins return zeros, for proofs about the sublayers beside them."""
    return [(part, zeros(part.arity)) for part in skips(block) if size(part)]  # type: ignore[arg-type]


def _prove(block: nn.Module, sublayers: tuple[Sublayer, ...], call: Call, stream: Tensor) -> str:
    """Check that the block is the identity when all its sublayers return zeros; say why not."""
    names = ", ".join(s.name for s in sublayers)
    with forwards([*silent(block), *muted(block, sublayers)]):
        try:
            after = call.run(block, stream)
        except (
            TypeError,
            ValueError,
            RuntimeError,
            StopIteration,
            AttributeError,
            LookupError,
            AssertionError,
        ) as error:
            return f"with {names} returning zeros it fails ({type(error).__name__}): no plain residual branches"
    if after.shape != stream.shape:
        return f"with {names} returning zeros it changes the shape of the stream"
    gap = (after - stream).abs().max().item()
    if gap != 0:
        return f"with {names} returning zeros it still changes the stream by {gap:.2g}, so zero is not absent"
    return ""


def _serves(block: nn.Module, sublayers: tuple[Sublayer, ...], call: Call, stream: Tensor) -> Iterator[Norm]:
    """For each norm of a block, the sublayers it works for: those whose update changes when the norm is bypassed.

    A stand-in that is given what the norm returns counts, too: the norm then stays when the sublayers go.
    """
    members = {name for s in sublayers for name in s.members}
    maps = {name: part for name, part in block.named_children() if is_skip(part) and getattr(part, "down", None)}
    for name, child in block.named_children():
        if name in members or not size(child) or is_skip(child):
            continue
        served = set()
        for sublayer in sublayers:
            others = [*silent(block), *muted(block, tuple(s for s in sublayers if s is not sublayer))]
            with forwards(others):
                intact = call.run(block, stream)
            with forwards([*others, (child, through)]):
                bypassed = call.run(block, stream)
            if not torch.equal(intact, bypassed):
                served.add(sublayer.name)
        for stand_in, part in maps.items():
            heard: list[Tensor] = []
            with given(part, heard), forwards([*silent(block), *muted(block, sublayers)]):
                call.run(block, stream)
                with forwards([(child, through)]):
                    call.run(block, stream)
            if not torch.equal(*heard):
                served.add(stand_in)
        yield Norm(name, size(child), frozenset(served))


@contextmanager
def given(part: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Note the input of a part each time it runs."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    hook = part.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _with_norms(sublayer: Sublayer, serves: tuple[Norm, ...]) -> Sublayer:
    own = sum(norm.parameters for norm in serves if norm.served == {sublayer.name})
    return Sublayer(sublayer.name, sublayer.kind, sublayer.parameters + own, sublayer.arity, sublayer.members)
