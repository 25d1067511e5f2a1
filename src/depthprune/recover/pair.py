"""The dense and the cut model side by side: both read the same text, sublayer by sublayer, and only as far as asked.

All batches go through a sublayer before the next one is touched, so each weight is read once per pass, and what has
been learned at one sublayer can change the cut model before the text goes on. Streams wait on the device, in the CPU's
memory or in files, whichever has room, so memory does not grow with the text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from depthprune.data import Data
from depthprune.discover import muted
from depthprune.errors import DepthpruneError, PlanError
from depthprune.files import why
from depthprune.layout import Sublayer, blocks_of
from depthprune.model import Model
from depthprune.offload import hold
from depthprune.record import TOKENS, answer, forwards, record, slices
from depthprune.skip import is_skip
from depthprune.standin import stand_ins
from depthprune.writers import Seen, Writer, watched, with_weight, written

SIDES = 2
WAITING = 3  # streams that wait at most on each side, as (B, T, D): before the block, now, after an earlier sublayer


@dataclass(frozen=True)
class Step:
    """A sublayer of the dense model, or a block that has only itself to drop; ``at`` is its block in the cut model.

    ``at`` is None where the step was dropped; ``name`` is empty for a block without sublayers.
    """

    block: int
    name: str
    at: int | None


def steps(teacher: Model, model: Model) -> tuple[Step, ...]:
    """Every step of the dense model, in execution order, with its place in the cut one.

    Raises ``PlanError`` where the cut model is not what its plan says.
    """
    dense, cut = teacher.layout.blocks, model.layout.blocks
    gone = teacher.layout.gone(model.plan.drop if model.plan else ())
    place = {index: number for number, index in enumerate(kept_blocks(teacher, model))}
    found = []
    for block in dense:
        lost = gone.get(block.index, frozenset())
        names = [s.name for s in block.sublayers] or [""]
        left = [] if lost is None else [name for name in names if name not in lost]
        if block.index in place:
            have = [s.name for s in cut[place[block.index]].sublayers]
            if have != [name for name in left if name]:
                where = f"block {block.index}: the plan leaves {', '.join(left) or 'nothing'}"
                raise PlanError(f"{where}, the pruned model has {', '.join(have) or 'nothing'}: another plan's model?")
        found += [Step(block.index, name, place[block.index] if name in left else None) for name in names]
    return tuple(found)


def kept_blocks(teacher: Model, model: Model) -> list[int]:
    """Which block of the dense model each block of the cut one was, shells among them.

    Raises ``PlanError`` where the plan leaves another number of blocks than there are.
    """
    count, cut = len(teacher.layout.blocks), len(model.layout.blocks)
    gone = teacher.layout.gone(model.plan.drop if model.plan else ())
    shells = set(range(count)) if cut == count else _shells(model)
    kept = [index for index in range(count) if index in shells or gone.get(index, frozenset()) is not None]
    if len(kept) != cut:
        raise PlanError(f"the plan leaves {len(kept)} blocks, the pruned model has {cut}: not the plan it was cut by")
    return kept


def _shells(model: Model) -> set[int]:
    """Dropped blocks that stay because a ``Skip`` in them holds what stands in for them."""
    whole = [one for one in stand_ins(model) if not one.unit.sublayer]
    return {
        one.unit.block for one in whole if one.rank or is_skip(model.net.get_submodule(one.names[0].rpartition(".")[0]))
    }


class _Enough(Exception):
    """Raised where the rest of a block is not needed."""


class Store:
    """Where streams wait: on the device, in the CPU's memory, or in files that go when the store is closed."""

    def __init__(self, need: int, device: torch.device, memory: int | None) -> None:
        self.device = device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
        self._place = "device" if need <= (free // 2 if memory is None else memory) else "files"
        if self._place == "files" and device.type != "cpu" and memory is None:
            self._place = "cpu" if need <= psutil.virtual_memory().available // 2 else "files"
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="depthprune-") if self._place == "files" else None
        except OSError as error:
            raise DepthpruneError(
                f"no room for streams in {error.filename or 'a temporary folder'}: {why(error)}"
            ) from None
        self._count = 0

    def put(self, stream: Tensor) -> Any:
        """Keep a tensor; the answer is a handle for ``get``."""
        if self._folder is None:
            return stream if self._place == "device" else stream.cpu()
        path = Path(self._folder.name) / f"{self._count}.pt"
        self._count += 1
        try:
            torch.save(stream, path)
        except (OSError, RuntimeError) as error:
            raise DepthpruneError(f"no room for streams in {self._folder.name}: {error}; use less text") from None
        return path

    def get(self, handle: Any) -> Tensor:
        """The tensor again, on the device."""
        if isinstance(handle, Path):
            handle = torch.load(handle, map_location=self.device, weights_only=True)
        assert isinstance(handle, Tensor)
        return handle.to(self.device)

    def drop(self, handle: Any) -> None:
        """Forget a tensor."""
        if isinstance(handle, Path):
            handle.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()


class Side:
    """One of the two models, and how far the text has come in it.

    ``at`` is the block that comes next, ``done`` how many of its sublayers are behind, and ``position`` the number of
    the sublayer that comes next, counted through all blocks (one for a block without). The weights of that block are
    held until the text is past it, so they are moved once however many batches there are.
    """

    @torch.no_grad()
    def __init__(self, model: Model, data: Data, rows: list[slice], store: Store) -> None:
        self.model, self.store, self.at, self.done, self.position = model, store, 0, 0, 0
        self._modules = blocks_of(model.net, model.layout)
        arities = [block.arity for block in model.layout.blocks]
        self._calls, self._now, self.masks = [], [], []
        for some in rows:
            mask = data.mask[some].to(model.device)
            recording = record(model.net, self._modules, arities, data.tokens[some].to(model.device), mask)
            self._calls.append(recording.calls)
            self._now.append(store.put(recording.stream))
            self.masks.append(mask)
        self.whole = [bool(mask.all()) for mask in self.masks]
        self._entry = list(self._now)
        self._replays: list[list[Any]] = [[] for _ in rows]
        self._held, self._holding = ExitStack(), -1

    def stream(self, batch: int) -> Tensor:
        """The stream (B, T, D) of a batch, here and now."""
        return self.store.get(self._now[batch])

    @property
    def block(self) -> nn.Module:
        """The module of the block that comes next, with its weights."""
        if self._holding != self.at:
            self.release()
            self._held.enter_context(hold(self._modules[self.at]))
            self._holding = self.at
        return self._modules[self.at]

    def release(self) -> None:
        """Let go of the weights of the block that is held."""
        self._holding = -1
        self._held.close()

    @property
    def sublayer(self) -> Sublayer | None:
        """The sublayer that comes next; None in a block without."""
        found = self.model.layout.blocks[self.at].sublayers
        return found[self.done] if self.done < len(found) else None

    @torch.no_grad()
    def ahead(self, batch: int, *, idle: bool = False) -> tuple[Tensor, list[Seen]]:
        """The stream after the next sublayer, and what every module of the block took and gave; nothing moves on.

        With ``idle`` that sublayer is left out, so only what stands in for earlier ones acts.
        """
        with self._only_next(batch, idle=idle), watched(self.block) as seen:
            return self._run(batch), seen

    @torch.no_grad()
    def given(self, batch: int) -> Tensor:
        """What the next sublayer is given: its input (B, T, D), as a rule the normalised stream."""
        found: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            found.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))
            raise _Enough

        sublayer = self.sublayer
        assert sublayer is not None
        first = self.block.get_submodule(sublayer.members[0])
        with self._only_next(batch), forwards([(first, stop)]), suppress(_Enough):
            self._run(batch)
        return found[0]

    def writes(self, batch: int, writer: Writer, path: str, weight: Tensor) -> Tensor:
        """What the next sublayer's writer gives where one of its maps has another weight and no bias."""
        with self._only_next(batch), forwards([with_weight(self.block, path, weight)]):
            return written(self._calls[batch][self.at], self.block, self.store.get(self._entry[batch]), writer)

    @torch.no_grad()
    def advance(self) -> None:
        """Take all batches past the next sublayer."""
        sublayers = self.model.layout.blocks[self.at].sublayers
        last = self.done + 1 >= len(sublayers)
        for batch in range(len(self._now)):
            after, seen = self.ahead(batch)
            if self._now[batch] is not self._entry[batch]:
                self.store.drop(self._now[batch])
            self._now[batch] = self.store.put(after)
            if last:
                for handle in (self._entry[batch], *self._replays[batch]):
                    self.store.drop(handle)
                self._entry[batch], self._replays[batch] = self._now[batch], []
            else:
                own = next(made for path, _, _, made in seen if path == sublayers[self.done].members[-1])
                self._replays[batch].append(self.store.put(own))
        if last:
            self.release()
        self.at, self.done = (self.at + 1, 0) if last else (self.at, self.done + 1)
        self.position += 1

    def until(self, position: int) -> None:
        """Advance to just before a step."""
        while self.position < position:
            self.advance()

    def reach(self, block: int | None) -> None:
        """Advance to a block, past shells in which nothing is left but what stands in for their sublayers."""
        while block is not None and self.at < block:
            self.advance()

    def _run(self, batch: int) -> Tensor:
        return self._calls[batch][self.at].run(self.block, self.store.get(self._entry[batch]))

    def _only_next(self, batch: int, *, idle: bool = False) -> Any:
        """Earlier sublayers of the block answer what they did before, later ones zeros; with ``idle`` the next too."""
        sublayers, module = self.model.layout.blocks[self.at].sublayers, self.block
        replaced = muted(module, (*sublayers[: self.done], *sublayers[self.done + (not idle) :]))
        for sublayer, handle in zip(sublayers[: self.done], self._replays[batch], strict=True):
            replaced.append((module.get_submodule(sublayer.members[-1]), self._replay(handle, sublayer.arity)))
        return forwards(replaced)

    def _replay(self, handle: Any, arity: int) -> Any:
        return lambda *args, **kwargs: answer(self.store.get(handle), arity)


@dataclass(frozen=True, eq=False)
class Pair:
    """Both sides on one text. ``held`` is the first batch of rows held out, ``tokens`` are those of a whole batch."""

    dense: Side
    cut: Side
    batches: int
    held: int
    tokens: int
    store: Store

    def real(self, batch: int, tensor: Tensor) -> Tensor:
        """The rows (N, K) of the real tokens in a tensor that has a row for every token of a batch."""
        mask = self.cut.masks[batch]
        flat = tensor.reshape(mask.numel(), -1)
        return flat if self.cut.whole[batch] else flat[mask.flatten()]

    def weight(self, batch: int) -> Tensor:
        """What the error of each real token (N, 1) counts: 1 / the root mean square of the dense stream."""
        stream = self.real(batch, self.dense.stream(batch)).float()
        return stream.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()

    def missing(self, batch: int, after: Tensor) -> Tensor:
        """The dense stream less the cut one ``after`` a sublayer, of the real tokens (N, D), weighted."""
        gap = self.real(batch, self.dense.stream(batch)).float() - self.real(batch, after).float()
        return gap * self.weight(batch)

    def close(self) -> None:
        """Let go of the streams and of the weights."""
        try:
            self.dense.release()
            self.cut.release()
        finally:
            self.store.close()


def pair(teacher: Model, model: Model, data: Data, held: Data, memory: int | None = None) -> Pair:
    """Set both models before the first block of all rows, those held out last."""
    both = join(data, held)
    step = max(1, TOKENS.get(model.device.type, 4096) // both.length)
    rows = slices(data.sequences, step)
    start = len(rows)
    rows += [slice(s.start + data.sequences, s.stop + data.sequences) for s in slices(held.sequences, step)]
    width = model.net.get_input_embeddings().weight.shape[1]
    size = torch.empty((), dtype=next(model.net.parameters()).dtype).element_size()
    store = Store(SIDES * WAITING * both.tokens.numel() * width * size, model.device, memory)
    try:
        dense, cut = (Side(one, both, rows, store) for one in (teacher, model))
    except BaseException:
        store.close()
        raise
    return Pair(dense, cut, len(rows), start, step * both.length, store)


def join(data: Data, held: Data) -> Data:
    """Two sets of rows of one length as one."""
    tokens, mask = torch.cat([data.tokens, held.tokens]), torch.cat([data.mask, held.mask])
    return Data(tokens, mask, data.name, data.digest, data.seed, data.sources)


def batches(pair: Pair) -> Iterator[tuple[int, int]]:
    """Every batch, with 0 for one to fit on and 1 for one held out."""
    for batch in range(pair.batches):
        yield batch, int(batch >= pair.held)
