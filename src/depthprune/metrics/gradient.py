"""First-order importance, and the block-by-block backward that it comes from.

A plain backward needs the weights, all their gradients and all activations at once. Here the streams between blocks are
kept instead: from the last block to the first, each runs once more on its stream, with gradients for that stream and
for what is asked of that block only, which are handed over and forgotten. So beyond the weights there are, at any time,
one block's gradients, one block's activations, and the streams.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from depthprune import variants
from depthprune.data import Data
from depthprune.discover import REFUSALS
from depthprune.errors import LayoutError, OptionError
from depthprune.layout import blocks_of
from depthprune.metrics.weight import PIECE, assemble, belongs, tensors_of
from depthprune.model import Model
from depthprune.record import TOKENS, Call, Recording, close, forwards, head, inputs, leaves, record, slices
from depthprune.scores import Scores
from depthprune.units import Unit
from depthprune.walk import Progress

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle

ACCUMULATE = ("absolute", "signed")
PROBE = 31  # tokens of the probe that measures activations: a prime, so that no other axis is taken for it
USABLE = 0.9  # of what is free

Gradients = Sequence[Tensor | None]  # None: the loss does not depend on it
Wanted = Callable[[int], Sequence[Tensor]]  # what gradients are wanted of, by the index of the block
Take = Callable[[int, Gradients], None]  # receives a block's index and its gradients; they are not to be kept

# ``head`` refuses gradients, as losses need none; here they are the point.
_head: Callable[..., Tensor] = inspect.unwrap(head)


def taylor(
    oracle: ModelOracle,
    units: Sequence[Unit],
    *,
    accumulate: str = "absolute",
    tensors: str = "matrices",
    plus: bool = False,
) -> Scores:
    """How much the loss would change, to first order, if the weights of a unit were zero, each on its own.

    With ``L = sum_s L_s`` the mean negative log-likelihood over the N predictions that count, and L_s the part of
    sequence s in it (its summed nats / N), a unit with weight tensors W^k scores

        absolute (the paper):  sum_k sum_ij sum_s |dL_s/dW^k_ij W^k_ij|
        signed (its code):     sum_k sum_ij |sum_s dL_s/dW^k_ij W^k_ij| = sum_k sum_ij |dL/dW^k_ij W^k_ij|

    so ``absolute`` is the mean over sequences, weighted by their predictions, of what each gives alone. Neither depends
    on how sequences are batched; ``absolute`` is never below ``signed``, and equal to it for one sequence.
    ``tensors``: ``matrices`` (the paper) or ``weights`` (its code: norms too), see ``weight.tensors_of``; ``plus``
    keeps the first four and last two blocks, see ``weight.assemble``. ``detail`` holds the sum of every tensor. Weights
    that several blocks share count in each block with the gradient that comes through it.

    Costs about four forwards. Beyond the weights it needs room for the gradients of the largest block (in the model's
    type; ``signed`` adds as many float32 numbers), the activations of one block, one chunk of logits, and the streams
    between all blocks: of one sequence at least for ``absolute``, which takes as many at a time as there is room for;
    of all sequences for ``signed``. Products are float32, sums float64.
    Raises ``OptionError`` where that does not fit, before it starts, and for weights that have no gradient;
    ``LayoutError`` where blocks cannot be called one by one.
    Source: Shortened LLaMA, "Taylor" and "Taylor+".
    """
    if accumulate not in ACCUMULATE:
        raise OptionError(f"unknown accumulate={accumulate!r} for taylor. Available: {', '.join(ACCUMULATE)}")
    model, data, signed = oracle.model, oracle.data, accumulate == "signed"
    named: dict[int, dict[str, Tensor]] = {}
    for index in sorted({model.layout.block(unit).index for unit in units}):
        block, asked = model.layout.blocks[index], [unit for unit in units if unit.block == index]
        found = tensors_of(blocks_of(model.net, model.layout)[index], tensors)
        named[index] = {n: tensor for n, tensor in found.items() if any(belongs(n, block, unit) for unit in asked)}
    parts = {index: dict.fromkeys(found, 0.0) for index, found in named.items()}

    def wanted(index: int) -> list[Tensor]:
        return list(named.get(index, {}).values())

    def take(index: int, gradients: Gradients) -> None:
        for (name, weight), gradient in zip(named.get(index, {}).items(), gradients, strict=True):
            if gradient is not None:
                parts[index][name] += _products(weight, gradient) / data.predicted

    check(model, data)
    largest = max((_bytes(wanted(index), extra=4 * signed) for index in named), default=0)
    temporary = 12 * min(PIECE, largest)
    share = room(model, data, largest + temporary, oracle.memory, every=signed, single=not signed)
    sweep(model, data, wanted, take, share, add=signed, progress=oracle.progress("taking gradients"))
    return assemble("taylor", model.layout, units, parts, plus=plus, data=data.describe())


def _products(weight: Tensor, gradient: Tensor) -> float:
    """``sum_ij |gradient_ij weight_ij|``, a piece at a time."""
    flat = (torch.split(tensor.detach().reshape(-1), PIECE) for tensor in (gradient, weight))
    pieces = zip(*flat, strict=True)
    return math.fsum((g.float() * w.float()).abs().sum(dtype=torch.float64).item() for g, w in pieces)


def _bytes(tensors: Sequence[Tensor], extra: int = 0) -> int:
    return sum(tensor.numel() * (tensor.element_size() + extra) for tensor in tensors)


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient for a moment; each is as before afterwards, whatever happens."""
    before = [parameter for parameter in net.parameters() if parameter.requires_grad]
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in before:
            parameter.requires_grad_(True)


@contextmanager
def asking(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Some tensors ask for gradients for a moment, and not afterwards."""
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


@dataclass(eq=False)
class _Batch:
    """Some sequences on their way: the streams (B, T, D) before each block so far, and the gradient on its way back."""

    tokens: Tensor
    counted: Tensor
    recording: Recording
    streams: list[Tensor]
    gradient: Tensor


def sweep(
    model: Model,
    data: Data,
    wanted: Wanted,
    take: Take,
    share: tuple[int, int],
    *,
    add: bool = False,
    progress: Progress | None = None,
) -> float:
    """One forward and one backward, block by block; the result is the summed negative log-likelihood in nats.

    The gradients handed to ``take`` are those of that sum. ``share`` is how many sequences go through all blocks at a
    time, and how many through one block at a time (see ``room``). ``take`` is called for each such few sequences, or
    with ``add`` once per block and share, with their gradients added up in float32.
    Whatever ``wanted`` gives asks for gradients only while its block runs; nothing else does, and no ``.grad`` is set.
    """
    held, rows = share
    modules, total, done = blocks_of(model.net, model.layout), 0.0, 0
    steps = len(modules) * data.sequences
    with frozen(model.net):
        for start in range(0, data.sequences, held):
            part = data.rows(slice(start, start + held))
            batches = [_start(model, part, some) for some in slices(part.sequences, rows)]
            for index, module in enumerate(modules):
                for batch in batches:
                    with torch.no_grad():
                        batch.streams.append(batch.recording.calls[index].run(module, batch.streams[-1]))
            for batch in batches:
                nats, batch.gradient = _top(model, batch.streams.pop(), batch.tokens, batch.counted)
                total += nats
            for index, module in reversed(list(enumerate(modules))):
                sums: Gradients = ()
                for batch in batches:
                    call, stream = batch.recording.calls[index], batch.streams.pop()
                    batch.gradient, *found = gradients(module, call, stream, batch.gradient, wanted(index))
                    if add:
                        sums = _added(sums, found) if sums else found
                    else:
                        take(index, found)
                    del found
                    done += len(batch.tokens)
                    if progress is not None:
                        progress(float(done), float(steps))
                if add:
                    take(index, sums)
    return total


def _start(model: Model, data: Data, rows: slice) -> _Batch:
    tokens, mask, counted = (x[rows].to(model.device) for x in (data.tokens, data.mask, data.counted))
    arities = [block.arity for block in model.layout.blocks]
    recording = record(model.net, blocks_of(model.net, model.layout), arities, tokens, mask)
    return _Batch(tokens, counted, recording, [recording.stream], recording.stream)


def _added(sums: Gradients, found: Gradients) -> Gradients:
    """Two lists of gradients, added in float32."""
    pairs = zip(sums, found, strict=True)
    return [b if a is None else a if b is None else a.float() + b.float() for a, b in pairs]


def gradients(
    block: nn.Module, call: Call, stream: Tensor, onward: Tensor, wanted: Sequence[Tensor]
) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
    """The gradients with respect to the stream before a block and to tensors in it, given that of the stream after."""
    leaf = stream.detach()
    with asking([leaf, *wanted]):
        after = call.run(block, leaf.clone())  # a copy, as some blocks write into the stream they are given
        found = torch.autograd.grad(after, [leaf, *wanted], onward, allow_unused=True)
    return found[0] if found[0] is not None else torch.zeros_like(stream), *found[1:]


def _top(model: Model, stream: Tensor, tokens: Tensor, counted: Tensor) -> tuple[float, Tensor]:
    """The summed nats of the predictions that count, and its gradient with respect to the last stream (B, T, D).

    What follows the blocks acts on each position alone, so those that count are taken in one row, chunk by chunk.
    """
    modules, arities = blocks_of(model.net, model.layout), [block.arity for block in model.layout.blocks]
    flat, following = stream[:, :-1][counted], tokens[:, 1:][counted]
    total, found = 0.0, torch.zeros_like(flat)
    for some in slices(len(flat), _chunk(model)):
        leaf = flat[None, some].detach()
        with asking([leaf]):
            logits = _head(model.net, modules, arities, leaf.clone())
            nats = nn.functional.cross_entropy(logits[0].float(), following[some], reduction="sum")
            found[some] = torch.autograd.grad(nats, leaf)[0][0]
        total += nats.item()
    gradient = torch.zeros_like(stream)
    gradient[:, :-1][counted] = found
    return total, gradient


def _chunk(model: Model) -> int:
    """Tokens of one head chunk: its logits, their float32 copy, and the gradients of both must fit."""
    chunk = max(64, variants.LOGITS.get(model.device.type, 8 << 20) // (16 * model.vocabulary))
    return min(chunk, model.positions or chunk)


def check(model: Model, data: Data) -> None:
    """Check that every weight can have a gradient, and that blocks called one by one give the model's gradients.

    Proven on a short piece of the data, from the loss to the stream before the first block, against a plain backward:
    blocks that hand each other something besides the stream are found out.
    Raises ``OptionError`` for weights that are quantized or not in memory, ``LayoutError`` for such blocks.
    """
    modules, arities = blocks_of(model.net, model.layout), [block.arity for block in model.layout.blocks]
    for name, weight in model.net.get_submodule(model.layout.path).named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            fault = "is not in memory" if weight.is_meta else f"is quantized ({weight.dtype})"
            raise OptionError(f"gradients need plain weights in memory; {model.layout.path}.{name} {fault}")
    some = data.mask[:, :16].sum(1).argsort(descending=True, stable=True)[:2]
    short = data.tokens[some, :16], data.mask[some, :16], torch.ones_like(data.mask[some, 1:16])
    tokens, mask, counted = (x.to(model.device) for x in short)
    counted &= mask[:, 1:] & mask[:, :-1]
    name, reason = type(model.net).__name__, "its blocks hand each other more than the stream"
    try:
        with frozen(model.net):
            start = record(model.net, modules, arities, tokens, mask)
            stream, streams = start.stream, []
            if stream.dim() != 3:
                raise LayoutError(f"its stream has the shape {tuple(stream.shape)}")
            for module, call in zip(modules, start.calls, strict=True):
                streams.append(stream)
                with torch.no_grad():
                    stream = call.run(module, stream)
            found = _top(model, stream, tokens, counted)[1]
            for module, call, stream in reversed(list(zip(modules, start.calls, streams, strict=True))):
                found = gradients(module, call, stream, found, ())[0]
            want = _plain(model, tokens, mask, counted, start.stream)
            same = close(found / want.abs().max(), want / want.abs().max())  # what is not finite passes, and will show
    except torch.OutOfMemoryError:
        raise
    except (LayoutError, *REFUSALS) as error:
        same, reason = False, " ".join(str(error).split())
    if not same:
        raise LayoutError(
            f"gradients of {name} cannot be taken block by block: {reason}; "
            "use a metric without gradients, such as loss or cosine"
        )


def _plain(model: Model, tokens: Tensor, mask: Tensor, counted: Tensor, stream: Tensor) -> Tensor:
    """The gradient of the summed nats with respect to the stream before the first block, by a plain backward."""
    first = blocks_of(model.net, model.layout)[0]
    own, leaf = first.forward, stream.detach()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            return own(leaf.clone(), *args[1:], **kwargs)
        keyword = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return own(*args, **{**kwargs, keyword: leaf.clone()})

    with asking([leaf]), forwards([(first, forward)]):
        logits = model.net(**inputs(tokens, mask), use_cache=False).logits[:, :-1]
        nats = nn.functional.cross_entropy(logits[counted].float(), tokens[:, 1:][counted], reduction="sum")
        return torch.autograd.grad(nats, leaf)[0]


def room(
    model: Model, data: Data, fixed: int, memory: int | None, *, every: bool = False, single: bool = False
) -> tuple[int, int]:
    """How many sequences can go through all blocks at a time, and how many of them through one block at a time.

    ``fixed`` is what the gradients wanted of one block take; ``memory`` bounds all there is beyond the weights, by
    default what is free. With ``every`` all sequences go together, with ``single`` one at a time through a block.
    Raises ``OptionError`` where there is no room for even one, saying what is needed and what is free.
    """
    free = _free(model.device) if memory is None else memory
    streams, activations = _per_sequence(model, data)
    held = data.sequences if every else 1
    need = fixed + 16 * _chunk(model) * model.vocabulary + activations + held * streams
    left = int(USABLE * free) - need
    if left < 0:
        together = f" for {held} sequences together" if held > 1 else ""
        raise OptionError(
            f"gradients block by block need about {_size(need / USABLE)} beyond the weights{together}, but "
            f"{_size(free)} are {'free' if memory is None else 'allowed'}; use {'fewer or ' * every}shorter sequences"
        )
    if single:
        return min(data.sequences, 1 + left // streams), 1
    most = max(1, TOKENS.get(model.device.type, 4096) // data.length)
    rows = min(most, data.sequences, 1 + left // (activations + (0 if every else streams)))
    return held if every else rows, rows


def _per_sequence(model: Model, data: Data) -> tuple[int, int]:
    """Bytes of the streams around all blocks for one sequence, with all that blocks are passed, and of activations.

    Activations are what autograd keeps of a block, the hungriest one, on a short probe: all of it grows with the
    length at least, and whatever has two axes of length (plain attention) with its square. Doubled, for what comes and
    goes besides.
    """
    modules, arities = blocks_of(model.net, model.layout), [block.arity for block in model.layout.blocks]
    row = data.mask.sum(1).argmin()[None]  # a padded one, if there is any: it brings a mask along
    tokens, mask = data.tokens[row].to(model.device), data.mask[row].to(model.device)
    whole = record(model.net, modules, arities, tokens, mask)
    passed = {leaf.data_ptr(): leaf for call in whole.calls for leaf in leaves((call.args, call.kwargs))}
    streams = (len(modules) + 3) * _bytes([whole.stream]) + _bytes(list(passed.values()))
    length = min(data.length, PROBE)
    short = record(model.net, modules, arities, tokens[:, :length], mask[:, :length])
    kept: dict[int, float] = {}

    def keep(tensor: Tensor) -> Tensor:
        axes = max(1, sum(size % length == 0 for size in tensor.shape if size))
        kept[tensor.untyped_storage().data_ptr()] = _bytes([tensor]) * (data.length / length) ** axes
        return tensor

    most = 0.0
    tried: set[Hashable] = set()
    for module, call in zip(modules, short.calls, strict=True):
        kind = (type(module), sum(parameter.numel() for parameter in module.parameters()))
        if kind in tried:
            continue
        tried.add(kind)
        kept.clear()
        weights = [*module.parameters()]
        with frozen(model.net), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), asking(weights):
            call.run(module, short.stream.clone())
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        most = max(most, sum(size for storage, size in kept.items() if storage not in own))
    return streams, int(2 * most)


def _free(device: torch.device) -> int:
    """Bytes that nobody uses."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return int(psutil.virtual_memory().available)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
