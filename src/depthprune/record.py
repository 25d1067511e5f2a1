"""Recordings: what a model passes to each of its blocks, captured without family code.

A model's own forward prepares masks, rotary tables and layer-specific extras, then calls block after block. With each
block's ``forward`` replaced by a recorder that returns its input, one cheap forward captures all of it; afterwards any
block can be called alone on any stream.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthprune.errors import LayoutError

TOKENS = {"cpu": 4096, "cuda": 32768}  # tokens of one call of a block


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one block besides the stream: ``block(stream, *args, **kwargs)`` in effect."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str = ""  # the name under which the family passes the stream, if it does not pass it first

    def run(self, block: nn.Module, stream: Tensor) -> Tensor:
        """Call the block on a stream and return the stream after it."""
        if self.keyword:
            return first(block(*self.args, **{self.keyword: stream}, **self.kwargs))
        return first(block(stream, *self.args, **self.kwargs))

    def tiled(self, times: int, rows: Sequence[bool]) -> Call:
        """Repeat the arguments that carry one row per sequence (``rows``, in the order of ``leaves``)."""
        if times == 1:
            return self
        flags = iter(rows)

        def tile(leaf: Tensor) -> Tensor:
            return leaf.repeat(times, *[1] * (leaf.dim() - 1)) if next(flags) else leaf

        return Call(change(self.args, tile), change(self.kwargs, tile), self.keyword)


@dataclass(frozen=True, eq=False)
class Recording:
    """The stream that enters the first block, and the call of every block, for one batch of tokens."""

    stream: Tensor  # (B, T, D)
    calls: tuple[Call, ...]

    def rows_of(self, doubled: Recording) -> list[list[bool]]:
        """Which tensors of each call carry one row per sequence: those that grew when the batch was doubled."""
        flags = []
        for call, twice in zip(self.calls, doubled.calls, strict=True):
            pairs = zip(leaves((call.args, call.kwargs)), leaves((twice.args, twice.kwargs)), strict=True)
            flags.append([a.dim() > 0 and a.shape[0] != b.shape[0] for a, b in pairs])
        return flags


def first(output: Any) -> Tensor:
    """The stream in what a block returns: the tensor itself, or the head of a tuple."""
    stream = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(stream, Tensor)
    return stream


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item)


def change(tree: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor replaced by ``to(tensor)``, visited in the order of ``leaves``."""
    if isinstance(tree, Tensor):
        return to(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([change(item, to) for item in tree])
    if isinstance(tree, dict):
        return {key: change(item, to) for key, item in tree.items()}
    return tree


@contextmanager
def forwards(replaced: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another ``forward`` for a moment; every one gets its own back, whatever happens.

    Setting the attribute on the instance keeps the module itself in place, so code that reads other attributes of a
    block (its attention type, say) still works.
    """
    before = [(module, module.__dict__.get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def close(have: Tensor, want: Tensor) -> bool:
    """Whether two computations of the same logits agree, up to the rounding of their type in another order of sums.

    Logits that are NaN leave nothing to compare; the loss will say so.
    """
    exact = want.dtype in (torch.float32, torch.float64)
    gap, largest = (have.float() - want.float()).abs().max(), want.float().abs().max()
    return bool(largest.isnan()) or bool(gap <= (1e-3 if exact else 5e-2) * largest + 1e-5)


class _Enough(Exception):
    """Raised by the last recorder: nothing after the blocks is needed."""


def once(module: nn.Module, key: Hashable, kept: dict[Hashable, Any]) -> Callable[..., Any]:
    """A ``forward`` that computes the module's output the first time and replays it afterwards."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if key not in kept:
            kept[key] = own(*args, **kwargs)
        return kept[key]

    return forward


def slices(total: int, step: int) -> list[slice]:
    """``range(total)`` cut in pieces of at most ``step``."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def answer(stream: Tensor, arity: int) -> Any:
    """A block's or sublayer's answer in the shape its callers expect: a tensor (arity 0) or a tuple of that length."""
    return stream if arity == 0 else (stream, *[None] * (arity - 1))


@torch.no_grad()
def record(
    net: nn.Module, blocks: Sequence[nn.Module], arities: Sequence[int], tokens: Tensor, mask: Tensor | None
) -> Recording:
    """Run one forward in which every block only writes down its arguments.

    ``tokens`` and ``mask`` are (B, T). Costs the embedding and the masks, no block and no head.
    Raises ``LayoutError`` where the model does not call each block once, in order.
    """
    calls: list[Call] = []
    streams: list[Tensor] = []

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(calls) != index:
                raise LayoutError(f"this model does not call its blocks once each and in order (block {index})")
            if args and isinstance(args[0], Tensor):
                stream, call = args[0], Call(args[1:], kwargs)
            else:
                keyword = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), "")
                if not keyword:
                    raise LayoutError(f"block {index} is called without a stream of hidden states")
                stream = kwargs[keyword]
                call = Call(args, {key: value for key, value in kwargs.items() if key != keyword}, keyword)
            calls.append(call)
            streams.append(stream)
            if index == len(blocks) - 1:
                raise _Enough
            return answer(stream, arities[index])

        return forward

    with forwards([(block, recorder(index)) for index, block in enumerate(blocks)]), suppress(_Enough):
        net(**inputs(tokens, mask), use_cache=False)
    if len(calls) != len(blocks):
        raise LayoutError(f"this model called {len(calls)} of its {len(blocks)} blocks")
    return Recording(streams[0], tuple(calls))


def inputs(tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """The arguments of a plain forward: without a mask where every token is real, as that is the fast path."""
    if mask is None or bool(mask.all()):
        return {"input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": mask.long()}


@torch.no_grad()
def head(net: nn.Module, blocks: Sequence[nn.Module], arities: Sequence[int], stream: Tensor) -> Tensor:
    """The logits (B, T, V) of a stream that has left the last block, through the model's own norm and head.

    The blocks are bypassed and the stream put in for the first one's output, so no norm, head, scale or soft cap has
    to be known by name. What follows the blocks must act on each position alone.
    """

    def start(*args: Any, **kwargs: Any) -> Any:
        return answer(stream, arities[0])

    def onward(arity: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(args[0] if args else kwargs["hidden_states"], arity)

    replaced: list[tuple[nn.Module, Callable[..., Any]]] = [(blocks[0], start)]
    replaced += [(block, onward(arity)) for block, arity in zip(blocks[1:], arities[1:], strict=True)]
    dummy = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
    with forwards(replaced):
        logits = net(input_ids=dummy, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits
