"""Learned gates: importance by optimisation.

Gradients at the dense model say what the first small step does. Gates go further: units are turned down at random, many
at once, and each gate learns from the loss whether the model misses its unit when a share of all units has to go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from depthprune.data import Data
from depthprune.discover import PROBE, muted
from depthprune.errors import LayoutError, OptionError
from depthprune.layout import Sublayer, blocks_of
from depthprune.metrics.gradient import Gradients, room, sweep, taylor
from depthprune.model import Model
from depthprune.record import Call, first, forwards, record
from depthprune.scores import Scores
from depthprune.units import Unit

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle

BUDGET = 100.0  # how strongly the mean gate is held: nats for a deviation of one, squared

Replaced = tuple[nn.Module, Callable[..., Any]]


def gates(
    oracle: ModelOracle,
    units: Sequence[Unit],
    *,
    keep: float = 0.75,
    steps: int = 200,
    rate: float = 0.05,
    batch: int = 8,
    temperature: float = 0.3,
) -> Scores:
    """How likely the unit's gate is open, from 0 to 1, once gates are learned under a budget with the weights frozen.

    A gate g_u scales the unit's update, y = x + g_u (f_u(x) - x), with x the stream before and f_u(x) after it: 1 is
    the dense model, 0 the model without the unit. It is open with probability p_u = sigmoid(a_u), the score. In each of
    ``steps`` steps, gates are drawn from the concrete distribution (nearly 0 or 1 at a low ``temperature``),

        g_u = sigmoid((a_u + ln e_u - ln(1 - e_u)) / temperature),   e_u uniform on (0, 1),

    and Adam (with ``rate``) lowers ``L(g) + 100 (sum_u w_u p_u - keep)^2`` in a, with L in nats per predicted token of
    ``batch`` sequences, and w_u the unit's share of the parameters of all units: so the share ``keep`` of them stays.
    Sequences come in shuffles; they and the gates are drawn under the data's seed. At the start, p_u is
    ``keep + (r - 1/2) min(keep, 1 - keep)``, where r from 0 to 1 is the unit's rank under ``taylor``.

    Costs ``taylor`` and, a step, four forwards of ``batch`` sequences, in the same bounded memory (block by block).
    Raises ``OptionError`` for options out of range, and for a block asked for together with its own sublayers, whose
    gates would multiply; ``LayoutError`` for a sublayer whose update nothing in the block scales.
    Sources: the concrete distribution as in Louizos et al., L0 regularisation; the start from Taylor is our own.
    """
    _check_options(units, keep=keep, steps=steps, rate=rate, batch=batch, temperature=temperature)
    model, data = oracle.model, oracle.data
    values = _start(taylor(oracle, units), units, keep)
    share = torch.tensor([float(model.layout.freed((unit,))) for unit in units], dtype=torch.float64)
    share /= share.sum()
    logits = torch.logit(values).requires_grad_(True)
    adam = torch.optim.Adam([logits], lr=rate)
    opened = [torch.zeros((), device=_home(model, unit)) for unit in units]
    places = {index: [n for n, unit in enumerate(units) if unit.block == index] for index in {u.block for u in units}}
    taken = torch.zeros_like(values)  # the gradient of the nats with respect to the gates

    def wanted(index: int) -> list[Tensor]:
        return [opened[place] for place in places.get(index, [])]

    def take(index: int, gradients: Gradients) -> None:
        for place, gradient in zip(places.get(index, []), gradients, strict=True):
            taken[place] += 0.0 if gradient is None else gradient.item()

    progress = oracle.progress("learning gates")
    batches, generator = _batches(data, min(batch, data.sequences)), torch.Generator().manual_seed(data.seed)
    rows = room(model, data, 0, oracle.memory)[1]
    with forwards([_gated(model, unit, gate) for unit, gate in zip(units, opened, strict=True)]):
        for step in range(steps):
            part = next(batches)
            with torch.enable_grad():
                drawn = torch.sigmoid((logits + _noise(len(units), generator)) / temperature)
            for gate, value in zip(opened, drawn.tolist(), strict=True):
                gate.fill_(value)
            taken.zero_()
            sweep(model, part, wanted, take, (rows, rows), add=True)
            with torch.enable_grad():
                nats = (drawn * taken).sum() / part.predicted  # as far as its gradient goes
                budget = BUDGET * ((share * torch.sigmoid(logits)).sum() - keep) ** 2
                (logits.grad,) = torch.autograd.grad(nats + budget, logits)
            adam.step()
            if progress is not None:
                progress(float(step + 1), float(steps))
    learned = torch.sigmoid(logits.detach()).tolist()
    return Scores("gates", dict(zip(units, learned, strict=True)), data=data.describe())


def _check_options(
    units: Sequence[Unit], *, keep: float, steps: int, rate: float, batch: int, temperature: float
) -> None:
    if not 0 < keep < 1:
        raise OptionError(f"gates needs keep between 0 and 1, the share of the parameters to stay, not {keep:g}")
    if steps < 1 or batch < 1 or not 0 < rate < math.inf or not 0 < temperature < math.inf:
        raise OptionError("gates needs steps and batch of at least 1, and a finite rate and temperature above 0")
    whole = {unit for unit in units if not unit.sublayer}
    both = next((unit for unit in units if unit.sublayer and unit.whole in whole), None)
    if both is not None:
        raise OptionError(f"gates of a block and of its own sublayers multiply: ask for {both.whole} or {both}")


def _start(importance: Scores, units: Sequence[Unit], keep: float) -> Tensor:
    """The first gates: evenly spread around ``keep``, in the order of importance."""
    last = max(1, len(units) - 1)
    rank = {unit: place / last for place, unit in enumerate(importance.ranked())}
    return torch.tensor([keep + (rank[unit] - 0.5) * min(keep, 1 - keep) for unit in units], dtype=torch.float64)


def _batches(data: Data, size: int) -> Iterator[Data]:
    """Sequences in shuffles under the data's seed, without end; those in which nothing counts are left out."""
    generator = torch.Generator().manual_seed(data.seed)
    counting = data.counted.any(1).nonzero()[:, 0]
    waiting = counting[:0]
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, counting[torch.randperm(len(counting), generator=generator)]])
        yield data.rows(waiting[:size])
        waiting = waiting[size:]


def _noise(count: int, generator: torch.Generator) -> Tensor:
    """Draws from the logistic distribution (count,): added to logits, they make the draws of the gates."""
    even = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.log(even) - torch.log1p(-even)


def _home(model: Model, unit: Unit) -> torch.device:
    return next(blocks_of(model.net, model.layout)[unit.block].parameters()).device


def _gated(model: Model, unit: Unit, gate: Tensor) -> Replaced:
    """The module whose output a gate has to scale, and its forward with the gate."""
    block = blocks_of(model.net, model.layout)[unit.block]
    if not unit.sublayer:
        return block, _mixed(block, gate)
    module = _scaling(model, unit)
    return module, _scaled(module, gate)


def _mixed(block: nn.Module, gate: Tensor) -> Callable[..., Any]:
    """A block's forward with a gate: between the stream before it and the stream after it."""
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        before = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).clone()
        return _onto(own(*args, **kwargs), lambda after: before + gate * (after - before))

    return forward


def _scaled(module: nn.Module, gate: Tensor) -> Callable[..., Any]:
    own = module.forward
    return lambda *args, **kwargs: _onto(own(*args, **kwargs), lambda output: gate * output)


def _onto(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a module returns, with its first tensor changed."""
    return change(output) if isinstance(output, Tensor) else (change(first(output)), *output[1:])


@torch.no_grad()
def _scaling(model: Model, unit: Unit) -> nn.Module:
    """The module in a block that scales a sublayer's update when its output is scaled.

    The sublayer itself, in most families; where a norm follows it and undoes the scale, that norm. Tried in this order
    and proven: with the output halved, and the other sublayers muted, the stream must end halfway between where it
    starts and where the sublayer takes it, up to rounding.
    """
    block, found = blocks_of(model.net, model.layout)[unit.block], model.layout.block(unit)
    sublayer = found.sublayer(unit.sublayer)
    alone = [norm.name for norm in found.serves if norm.served == {sublayer.name}]
    call, stream = _probe(model, unit.block)
    others = muted(block, tuple(other for other in found.sublayers if other is not sublayer))
    for name in (sublayer.members[-1], *alone):
        module = block.get_submodule(name)
        if _halves(block, sublayer, module, others, call, stream):
            return module
    tried = ", ".join((sublayer.members[-1], *alone))
    raise LayoutError(f"no gate can be put on {unit}: its update is not halved by halving the output of {tried}")


def _probe(model: Model, index: int) -> tuple[Call, Tensor]:
    """How a block is called on a few tokens, and a random stream of the size of one for it."""
    arities = [block.arity for block in model.layout.blocks]
    tokens = torch.randint(model.vocabulary, PROBE, generator=torch.Generator().manual_seed(0)).to(model.device)
    recording = record(model.net, blocks_of(model.net, model.layout), arities, tokens, None)
    noise = torch.randn(recording.stream.shape, generator=torch.Generator().manual_seed(1))
    return recording.calls[index], noise.to(recording.stream)


def _halves(
    block: nn.Module, sublayer: Sublayer, module: nn.Module, others: list[Replaced], call: Call, stream: Tensor
) -> bool:
    """Whether halving a module's output halves a sublayer's update, up to the rounding of stream and update."""
    half = torch.full((), 0.5, device=stream.device)
    with forwards([*others, *muted(block, (sublayer,))]):
        before = call.run(block, stream.clone()).float()
    with forwards(others):
        update = call.run(block, stream.clone()).float() - before
        with forwards([(module, _scaled(module, half))]):
            halved = call.run(block, stream.clone()).float() - before
    epsilon = torch.finfo(stream.dtype).eps
    return bool((halved - update / 2).norm() <= 16 * epsilon * update.norm() + epsilon * before.norm())
