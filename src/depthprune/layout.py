"""Layout: the nouns for what was found in a model: sublayers, norms, blocks, and the stack of them.

``discover.py`` finds and proves them; everything else counts and names with what stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from torch import nn

from depthprune.errors import PlanError
from depthprune.units import Kind, Unit


@dataclass(frozen=True)
class Sublayer:
    """A residual branch of a block: what is dropped together when its unit is dropped."""

    name: str
    kind: Kind
    parameters: int  # its norms included, where they serve it alone
    arity: int  # 0: returns a tensor; n: a tuple of n with the tensor first
    members: tuple[str, ...]  # children that return zeros when it is dropped


@dataclass(frozen=True)
class Norm:
    """A weighted child of a block that is no sublayer, and the sublayers it works for."""

    name: str
    parameters: int
    served: frozenset[str]


@dataclass(frozen=True)
class Block:
    """One block: its sublayers in execution order, or the reason why it has only itself to drop."""

    index: int
    parameters: int
    arity: int
    sublayers: tuple[Sublayer, ...]
    reason: str = ""
    serves: tuple[Norm, ...] = ()  # other children, and the sublayers each works for
    kv_bytes_per_token: int = 0
    held: int = 0  # parameters of stand-ins for what was dropped from it before

    @property
    def everything(self) -> set[str] | None:
        """The sublayers that together are the block; None where a stand-in would be left."""
        return None if self.held else {sublayer.name for sublayer in self.sublayers}

    def idle(self, gone: frozenset[str]) -> tuple[str, ...]:
        """The norms that work for nobody once the sublayers ``gone`` are dropped."""
        return tuple(norm.name for norm in self.serves if norm.served and norm.served <= gone)

    def sublayer(self, name: str) -> Sublayer:
        """The sublayer of that name. Raises ``PlanError`` where there is none."""
        for sublayer in self.sublayers:
            if sublayer.name == name:
                return sublayer
        have = ", ".join(s.name for s in self.sublayers) or f"none ({self.reason})"
        raise PlanError(f"block {self.index} has no droppable sublayer {name!r}; it has: {have}")


@dataclass(frozen=True)
class Layout:
    """What was found in a model: the stack of blocks, and each block's sublayers.

    ``path`` is the module path of the stack, such as ``"model.layers"``; ``outside`` counts the parameters that belong
    to no block (embeddings, final norm, head).
    """

    path: str
    blocks: tuple[Block, ...]
    outside: int
    element_size: int  # bytes of one number in the KV cache

    @property
    def parameters(self) -> int:
        """Parameters in the stack."""
        return sum(block.parameters for block in self.blocks)

    def units(self, kind: str = "any") -> tuple[Unit, ...]:
        """The droppable units of a kind, in execution order.

        ``block``, ``attention``, ``mlp``, ``mixer``: all of that kind. ``any``: every sublayer, and the whole block
        where a block has no sublayer that could be proven.
        """
        found = []
        for block in self.blocks:
            if kind == "block" or (kind == "any" and not block.sublayers):
                found.append(Unit("", block.index))
            elif kind != "block":
                found += [Unit("", block.index, s.name) for s in block.sublayers if kind in ("any", s.kind)]
        return tuple(found)

    def kind(self, unit: Unit) -> Kind:
        """The kind of a unit. Raises ``PlanError`` where the model has no such unit."""
        block = self.block(unit)
        return block.sublayer(unit.sublayer).kind if unit.sublayer else "block"

    def block(self, unit: Unit) -> Block:
        """The block of a unit. Raises ``PlanError`` where the model has no such block."""
        if unit.stack or unit.block >= len(self.blocks):
            raise PlanError(f"there is no unit {unit}: this model has blocks 0 to {len(self.blocks) - 1}")
        return self.blocks[unit.block]

    def gone(self, units: Set[Unit] | tuple[Unit, ...]) -> dict[int, frozenset[str] | None]:
        """What each touched block loses: the names of its dropped sublayers, or ``None`` for the whole block.

        This is the canonical form: all sublayers of a block are the block, unless it also holds a stand-in, which
        only goes with the block itself.
        Raises ``PlanError`` for units that do not exist.
        """
        lost: dict[int, set[str] | None] = {}
        for unit in units:
            block = self.block(unit)
            if not unit.sublayer:
                lost[unit.block] = None
            else:
                block.sublayer(unit.sublayer)
                names = lost.setdefault(unit.block, set())
                if names is not None:
                    names.add(unit.sublayer)
        return {
            index: None if names is None or names == self.blocks[index].everything else frozenset(names)
            for index, names in sorted(lost.items())
        }

    def canonical(self, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """The same removals in their shortest form: where the last sublayer of a block goes, the block goes."""
        units = tuple(units)
        gone, order = self.gone(units), []
        for number, unit in enumerate(units):
            whole = gone[unit.block] is None
            last = all(other.block != unit.block for other in units[number + 1 :])
            order += [unit.whole] if whole and last else [] if whole else [unit]
        return tuple(order)

    def freed(self, units: Set[Unit] | tuple[Unit, ...]) -> int:
        """How many parameters dropping these units frees: a shared norm goes when the last one it serves goes."""
        total = 0
        for index, names in self.gone(units).items():
            block = self.blocks[index]
            if names is None:
                total += block.parameters
            else:
                total += sum(block.sublayer(name).parameters for name in names)
                total += sum(norm.parameters for norm in block.serves if len(norm.served) > 1 and norm.served <= names)
        return total

    def kv_freed(self, units: Set[Unit] | tuple[Unit, ...]) -> int:
        """Bytes of KV cache per token that dropping these units frees."""
        freed = 0
        for index, names in self.gone(units).items():
            block = self.blocks[index]
            attentions = {s.name for s in block.sublayers if s.kind == "attention"}
            if names is None or (attentions and attentions <= names):
                freed += block.kv_bytes_per_token
        return freed

    def viable(self, units: Set[Unit] | tuple[Unit, ...]) -> bool:
        """Whether something worth the name is left: a block, and an attention if the model has any."""
        gone = self.gone(units)
        attentions = {block.index for block in self.blocks if "attention" in {s.kind for s in block.sublayers}}
        return sum(names is None for names in gone.values()) < len(self.blocks) and not (
            attentions and attentions <= self.cacheless(gone)
        )

    def cacheless(self, gone: dict[int, frozenset[str] | None]) -> set[int]:
        """Blocks that write no keys any more: gone whole, or their attention and mixers are."""
        return {
            index
            for index, names in gone.items()
            if names is None
            or ({s.name for s in self.blocks[index].sublayers if s.kind in ("attention", "mixer")} or {""}) <= names
        }

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one more token adds to the KV cache of the dense model."""
        return sum(block.kv_bytes_per_token for block in self.blocks)


def blocks_of(net: nn.Module, layout: Layout) -> list[nn.Module]:
    """The block modules of a network, in order."""
    return list(net.get_submodule(layout.path).children())
