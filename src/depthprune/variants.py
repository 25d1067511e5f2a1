"""The engine: the losses of many thinned models in one pass over the weights.

Every question about a thinner model goes through ``losses``: leave-one-out, greedy, Shapley values, beams, evolution.
Variants that agree up to some unit run it once (a trie over execution order); within a block, a sublayer's output that
two variants share is computed once and replayed; the rows of variants with the same block run together; each block is
visited once per shard of sequences, however many variants there are. The loss, or the distance of the logits from those
of the dense model, comes from the model's own norm and head, in chunks, and only where a prediction counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from depthprune.data import Data, check_vocabulary
from depthprune.discover import REFUSALS, muted
from depthprune.errors import DataError, LayoutError, unknown
from depthprune.layout import Layout, blocks_of
from depthprune.measures import MEASURES
from depthprune.model import Model
from depthprune.offload import hold
from depthprune.record import TOKENS, Call, Recording, close, forwards, head, inputs, leaves, once, record, slices
from depthprune.scores import Losses
from depthprune.surgery import mutes
from depthprune.units import Unit, parse

Gone = dict[int, frozenset[str] | None]
Progress = Callable[[float, float], None]

# Bytes of the float32 logits of one head chunk: on a CPU so few that they stay in cache and memory is used again.
LOGITS = {"cpu": 8 << 20, "cuda": 1 << 30}

_EXACT: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()  # network -> packed -> engine is exact


@dataclass
class _Node:
    """Variants that agree so far, and their stream: one tensor per batch."""

    variants: list[int]
    streams: list[Tensor]


@dataclass
class _Batch:
    """Some sequences, what the model passes to its blocks for them, and which of it grows with the batch."""

    rows: slice
    recording: Recording
    grows: list[list[bool]]

    def call(self, block: int, times: int) -> Call:
        """The call of a block for ``times`` variants of this batch at once."""
        if times == 1:
            return self.recording.calls[block]
        return self.recording.calls[block].tiled(times, self.grows[block])


@torch.no_grad()
def losses(
    model: Model,
    data: Data,
    variants: Sequence[Iterable[Unit]],
    *,
    measure: str = "loss",
    memory: int | None = None,
    progress: Progress | None = None,
    tokens_per_call: int | None = None,
) -> Losses:
    """The loss of every variant of a model on every sequence of the data.

    A variant is a set of dropped units. For sequence s and variant v the result holds ``sum_t -log p_v(x_t | x_<t)``
    in nats, over the predictions that count, and their number; float32 logits, float64 sums. Equal to a plain forward
    of the model with those units dropped. ``measure`` may be ``kl``, ``js`` or ``logit_distance`` instead: how far the
    variant's prediction is from that of the dense model. ``memory`` bounds the bytes of the stored streams;
    ``progress(done, total)`` is called with work measured in blocks times sequences.
    Raises ``DataError`` for text that does not fit the model, ``PlanError`` for units it does not have,
    ``OptionError`` for another measure.
    """
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    gone = [model.layout.gone(parse(units)) for units in variants]
    check(model, data)
    result = Losses.empty(len(gone), data.counted.sum(1).double().numpy())
    if not gone:
        return result
    if measure != "loss":  # the dense model comes along as the first variant
        gone = [Gone(), *gone]
    run = _Run(model, data, gone, progress, tokens_per_call or TOKENS.get(model.device.type, 4096), measure)
    room = memory or _memory(model.device)
    if run.engine_is_exact():
        if len(variants) > 1 and run.bytes_per_sequence() > room:  # not even one sequence of all variants fits
            half = len(variants) // 2
            for part, done in ((slice(0, half), 0.0), (slice(half, len(variants)), 0.5)):
                some = list(variants)[part]
                found = losses(model, data, some, measure=measure, memory=room, progress=_part(progress, done))
                result.nll[part] = found.nll
            return result
        measured = run.sweep(room)
    else:
        name = type(model.net).__name__
        warnings.warn(
            f"the blocks of {name} cannot be called one by one; using plain forwards, which is slower", stacklevel=2
        )
        measured = run.plainly()
    result.nll[:] = measured[len(gone) - len(variants) :]
    return result


def check(model: Model, data: Data) -> None:
    """Check that text fits a model. Raises ``DataError`` for foreign token ids, long rows, or non-finite positions."""
    check_vocabulary(data, model.vocabulary)
    limit = model.positions
    if limit is not None and limit < data.length:
        raise DataError(
            f"sequences of {data.length} tokens exceed the {limit} positions of {model.reference.id}; "
            f"pass --length {limit}"
        )


def _part(progress: Progress | None, done: float) -> Progress | None:
    return None if progress is None else lambda now, total: progress(done + now / total / 2, 1.0)


def _memory(device: torch.device) -> int:
    """Half of what is free, for the streams."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(psutil.virtual_memory().available) // 2


def trie(layout: Layout, gone: Sequence[Gone]) -> tuple[list[int], float]:
    """How many distinct streams are alive after each block, and how many block forwards the sweep makes."""
    alive, made, group = [], 0, [0] * len(gone)
    for index in range(len(layout.blocks)):
        keys = [(before, _key(g, index)) for before, g in zip(group, gone, strict=True)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        made += sum(mode != "block" for _, mode in numbers)
        group = [numbers[key] for key in keys]
        alive.append(len(numbers))
    return alive, float(made)


def _key(gone: Gone, index: int) -> Any:
    return ("block" if gone[index] is None else gone[index]) if index in gone else frozenset()


class _Run:
    """One call of ``losses``: the model's blocks, the data, and how far we are."""

    def __init__(
        self,
        model: Model,
        data: Data,
        gone: list[Gone],
        progress: Progress | None,
        tokens_per_call: int,
        measure: str,
    ) -> None:
        self.net, self.layout, self.data, self.gone = model.net, model.layout, data, gone
        self.measure = measure
        self.device = model.device
        self.blocks = blocks_of(model.net, model.layout)
        self.arities = [block.arity for block in model.layout.blocks]
        self.rows = max(1, tokens_per_call // data.length)
        chunk = max(64, LOGITS.get(self.device.type, 8 << 20) // (4 * model.vocabulary))
        self.chunk = min(chunk, model.positions or chunk)
        self.alive, self.total = trie(model.layout, gone)
        self.total = (self.total + len(gone)) * data.sequences
        self.done = 0.0
        self.progress = progress

    def advance(self, work: float) -> None:
        self.done += work
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def batch(self, rows: slice, tokens: Tensor | None = None, mask: Tensor | None = None) -> _Batch:
        tokens = (self.data.tokens if tokens is None else tokens)[rows].to(self.device)
        mask = (self.data.mask if mask is None else mask)[rows].to(self.device)
        recording = record(self.net, self.blocks, self.arities, tokens, mask)
        doubled = record(self.net, self.blocks, self.arities, tokens.repeat(2, 1), mask.repeat(2, 1))
        return _Batch(rows, recording, recording.rows_of(doubled))

    def engine_is_exact(self) -> bool:
        """Prove on a short piece of the data that blocks called alone compute what the model computes.

        Several variants are compared with plain forwards, with their rows run together and one after the other, so that
        blocks which hand each other something in secret are found out. Once per network, with and without padding, as
        it is the structure that decides.
        """
        length, packed = min(self.data.length, 16), self.data.packed
        if packed in _EXACT.get(self.net, {}):
            return _EXACT[self.net][packed]
        progress, rows, self.progress = self.progress, self.rows, None
        exact = self._compare(length, 2) and self._compare(length, 2 * len(self.blocks))
        self.progress, self.rows, self.done = progress, rows, 0.0
        _EXACT.setdefault(self.net, {})[packed] = exact
        return exact

    def _tried(self) -> list[Gone]:
        """Variants that use every way through a block: whole, bypassed, and each sublayer gone, early and late."""
        found = self.layout.blocks
        single = [
            Gone({index: frozenset((sublayer.name,))})
            for index in sorted({0, len(found) // 2, len(found) - 1})
            for sublayer in found[index].sublayers
            if len(found[index].sublayers) > 1
        ]
        several = Gone({index: names for one in single for index, names in one.items()})
        return [Gone(), Gone({0: None}), *single, several]

    def _compare(self, length: int, rows: int) -> bool:
        self.rows = rows
        tokens, mask = self.data.tokens[:2, :length], self.data.mask[:2, :length]
        chosen = self._tried()
        try:
            batch = self.batch(slice(0, len(tokens)), tokens, mask)
            nodes = [_Node(list(range(len(chosen))), [batch.recording.stream])]
            for index, block in enumerate(self.blocks):
                with hold(block):
                    nodes = self.block(index, nodes, [batch], chosen)
            for node in nodes:
                logits = head(self.net, self.blocks, self.arities, node.streams[0])
                with forwards(mutes(self.blocks, self.layout, chosen[node.variants[0]])):
                    plain = self.net(**inputs(tokens.to(self.device), mask.to(self.device)), use_cache=False).logits
                real = mask.to(self.device)
                if not close(logits[real], plain[real]):
                    return False
        except torch.OutOfMemoryError:
            raise
        except (LayoutError, *REFUSALS):
            return False
        return True

    def plainly(self) -> np.ndarray:
        """One plain forward per variant: for models whose blocks cannot be called alone."""
        self.total = float(len(self.gone) * self.data.sequences)
        result = np.empty((len(self.gone), self.data.sequences))
        for rows in slices(self.data.sequences, max(1, min(self.rows, self.chunk * 8 // self.data.length))):
            tokens, mask = self.data.tokens[rows].to(self.device), self.data.mask[rows].to(self.device)
            places, wanted = self._places(rows)
            dense = torch.empty(0)
            for variant, gone in enumerate(self.gone):
                with forwards(mutes(self.blocks, self.layout, gone)):
                    logits = self._plain(variant, tokens, mask).flatten(0, 1)[places].float()
                dense = logits if variant == 0 else dense
                found = MEASURES[self.measure](logits, wanted, dense)
                result[variant, rows] = self._sums([found], places, rows)
                self.advance(tokens.shape[0])
        return result

    def _plain(self, variant: int, tokens: Tensor, mask: Tensor) -> Tensor:
        try:
            logits: Tensor = self.net(**inputs(tokens, mask), use_cache=False).logits
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # blocks can share more than a stream
            blocks = ", ".join(str(index) for index in self.gone[variant])
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise LayoutError(f"this model does not run with units of block {blocks} dropped ({reason})") from None
        return logits

    def bytes_per_sequence(self) -> int:
        """What one sequence takes: a stream for every variant alive, and what the model passes to its blocks."""
        recording = self.batch(slice(0, 1)).recording
        tensors = {leaf.data_ptr(): leaf for call in recording.calls for leaf in leaves((call.args, call.kwargs))}
        passed = sum(leaf.numel() * leaf.element_size() for leaf in tensors.values())
        return (max(self.alive) + 3) * recording.stream.numel() * recording.stream.element_size() + passed

    def sweep(self, memory: int) -> np.ndarray:
        """All blocks once per shard of sequences; shards as large as the memory for streams allows."""
        result = np.empty((len(self.gone), self.data.sequences))
        shard = max(1, memory // self.bytes_per_sequence())
        self.rows = min(self.rows, shard)
        shard = shard // self.rows * self.rows
        for start in range(0, self.data.sequences, shard):
            stop = min(start + shard, self.data.sequences)
            batches = [self.batch(slice(start + r.start, start + r.stop)) for r in slices(stop - start, self.rows)]
            nodes = [_Node(list(range(len(self.gone))), [batch.recording.stream for batch in batches])]
            for index, block in enumerate(self.blocks):
                with hold(block):
                    nodes = self.block(index, nodes, batches, self.gone)
            for number, batch in enumerate(batches):
                nodes.sort(key=lambda node: min(node.variants))  # the dense model first
                found = self.measured([node.streams[number] for node in nodes], batch.rows)
                for node, sums in zip(nodes, found, strict=True):
                    result[node.variants, batch.rows] = sums
                self.advance(len(self.gone) * (batch.rows.stop - batch.rows.start))
        return result

    def block(self, index: int, nodes: list[_Node], batches: list[_Batch], gone: Sequence[Gone]) -> list[_Node]:
        """Take every node through one block, splitting those whose variants differ in it."""
        after: list[_Node] = []
        alone: list[_Node] = []  # nodes that keep the block whole: their rows can run together
        for node in nodes:
            modes: dict[Any, list[int]] = {}
            for variant in node.variants:
                modes.setdefault(_key(gone[variant], index), []).append(variant)
            if list(modes) == [frozenset()]:
                alone.append(node)
            else:
                after += self.split(index, node, modes, batches)
        after += self.together(index, alone, batches)
        return after

    def together(self, index: int, nodes: list[_Node], batches: list[_Batch]) -> list[_Node]:
        block = self.blocks[index]
        after = [_Node(node.variants, []) for node in nodes]
        for number, batch in enumerate(batches):
            rows = batch.rows.stop - batch.rows.start
            times = max(1, self.rows // rows)
            for some in slices(len(nodes), times):
                streams = [node.streams[number] for node in nodes[some]]
                for node in nodes[some]:
                    node.streams[number] = streams[0][:0]  # what is used up makes room for what comes out
                joined = streams[0] if len(streams) == 1 else torch.cat(streams)
                out = batch.call(index, len(streams)).run(block, joined)
                for node, stream in zip(after[some], torch.split(out, rows), strict=True):
                    node.streams.append(stream)
                self.advance(rows * len(streams))
        return after

    def split(self, index: int, node: _Node, modes: dict[Any, list[int]], batches: list[_Batch]) -> list[_Node]:
        """One stream becomes several: each mode of the block runs, but no shared sublayer output is computed twice."""
        after = []
        chosen = [mode for mode in modes if mode != "block"]
        streams: dict[Any, list[Tensor]] = {mode: [] for mode in chosen}
        for number, batch in enumerate(batches):
            stream, call = node.streams[number], batch.recording.calls[index]
            kept: dict[Hashable, Any] = {}
            for mode in sorted(chosen, key=sorted):
                with forwards(self._replaced(index, mode, chosen, kept)):
                    streams[mode].append(call.run(self.blocks[index], stream))
                self.advance(batch.rows.stop - batch.rows.start)
        for mode, variants in modes.items():
            after.append(_Node(variants, node.streams if mode == "block" else streams[mode]))
        return after

    def _replaced(
        self, index: int, mode: frozenset[str], modes: list[Any], kept: dict[Hashable, Any]
    ) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The forwards for one mode: muted sublayers, and those whose output another mode shares, computed once.

        A sublayer's output depends on which sublayers before it are gone, and on nothing later.
        """
        block, sublayers = self.blocks[index], self.layout.blocks[index].sublayers
        replaced = muted(block, tuple(s for s in sublayers if s.name in mode))
        for position, sublayer in enumerate(sublayers):
            before = frozenset(s.name for s in sublayers[:position])
            key = (sublayer.name, mode & before)
            sharing = sum(sublayer.name not in other and other & before == key[1] for other in modes)
            if sublayer.name not in mode and sharing > 1 and len(sublayer.members) == 1:
                module = block.get_submodule(sublayer.name)
                replaced.append((module, once(module, key, kept)))
        return replaced

    def _places(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Where predictions count in a batch, as places in its tokens laid end to end, and what is wanted there."""
        tokens, counted = self.data.tokens[rows], self.data.counted[rows]
        places = torch.nn.functional.pad(counted, (0, 1)).flatten().nonzero()[:, 0]
        return places.to(self.device), tokens[:, 1:][counted].to(self.device)

    def _sums(self, found: list[Tensor], places: Tensor, rows: slice) -> np.ndarray:
        """What was found at the places, summed over each sequence of a batch."""
        every = torch.zeros(self.data.tokens[rows].shape, dtype=torch.float64, device=self.device)
        every.view(-1)[places] = torch.cat(found).double()
        result: np.ndarray = every.sum(1).cpu().numpy()
        return result

    def measured(self, streams: list[Tensor], rows: slice) -> list[np.ndarray]:
        """Per final stream of a batch and per sequence, the summed measure, head chunk by head chunk.

        What follows the blocks acts on each position alone, so positions of all sequences are taken in one row. The
        first stream is that of the dense model where the measure needs one.
        """
        places, wanted = self._places(rows)
        found: list[list[Tensor]] = [[] for _ in streams]
        outer = slices(len(places), self.chunk) or [slice(0, 0)]
        for some in outer:
            dense = torch.empty(0)
            for number, stream in enumerate(streams):
                chosen = stream.flatten(0, 1)[places[some]][None]
                logits = head(self.net, self.blocks, self.arities, chosen)[0].float()
                dense = logits if number == 0 else dense
                found[number].append(MEASURES[self.measure](logits, wanted[some], dense))
        return [self._sums(values, places, rows) for values in found]
