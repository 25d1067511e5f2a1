"""What a selector may ask, what it answers, and the selectors that only rank. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from depthprune.budget import Budget, Ledger
from depthprune.errors import BudgetError, OptionError
from depthprune.scores import Losses
from depthprune.select.cost import one_of, prices, rank
from depthprune.units import Unit


class Oracle(Protocol):
    """What a selector may ask about a model.

    Losses are in the measure of the oracle's metric: nats per token where that is ``loss`` or a one-pass metric, the
    divergence from the dense model for ``kl``, and so on.
    """

    @property
    def ledger(self) -> Ledger:
        """What budgets count with."""

    @property
    def evaluations(self) -> int:
        """How many thinned models were measured so far."""

    @property
    def sequences(self) -> int:
        """How many calibration sequences there are."""

    def scores(self, gone: frozenset[Unit] = frozenset()) -> Mapping[Unit, float]:
        """The score of every unit that is left once ``gone`` are dropped, low goes first; infinite: must stay."""

    def windows(self, windows: Sequence[tuple[Unit, ...]]) -> Sequence[float]:
        """The score of dropping several consecutive units together."""

    def losses(self, gone: Sequence[frozenset[Unit]], *, rows: int | None = None) -> Losses:
        """The losses of the model without each of these sets of units, on the first ``rows`` sequences or all."""

    def milliseconds(self) -> Mapping[Unit, float]:
        """The time that each unit takes in one forward over one sequence."""

    def note(self, text: str) -> None:
        """Say in a line what was decided."""


@dataclass(frozen=True)
class Step:
    """One removal: the unit, the loss after it (or its score), the standard error of the rise, and its ties."""

    unit: Unit
    loss: float | None = None
    error: float | None = None
    ties: tuple[Unit, ...] = ()
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The step as plain values for the plan."""
        fields: dict[str, Any] = {"unit": str(self.unit)}
        for name, value in (("loss", self.loss), ("score", self.score), ("se", self.error)):
            fields[name] = value if value is not None and math.isfinite(value) else None  # JSON has no others
        fields["ties"] = [str(unit) for unit in self.ties] or None
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Selection:
    """The chosen units in order of removal; ``nested`` if every prefix is the choice for a smaller budget.

    ``evaluations`` is how many thinned models were measured, the dense one included where it was; ``expected`` the
    most that the selector said before it started that it would ask for itself, besides those behind ``oracle.scores``.
    """

    steps: tuple[Step, ...]
    evaluations: int
    nested: bool
    dense: float | None = None
    expected: int | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """The chosen units, in order of removal."""
        return tuple(step.unit for step in self.steps)


def lowest(oracle: Oracle, candidates: Sequence[Unit], budget: Budget, *, per: str = "none") -> Selection:
    """Drop the units with the lowest scores, measured once on the dense model, until the budget is met.

    ``per`` divides the scores by what a unit saves: ``parameters``, ``kv`` or ``time``. Units with an infinite score
    stay. Under a budget on the loss it drops as many as the loss allows, found by bisection.
    Source: ShortGPT, Shortened LLaMA, LLM-Drop (one-shot ranking).
    """
    return _one_shot("lowest", oracle, candidates, budget, per)


def joint(oracle: Oracle, candidates: Sequence[Unit], budget: Budget, *, per: str = "none") -> Selection:
    """Rank attention and MLP sublayers together by their raw scores and drop the lowest, in one shot.

    ``per`` normalises by what a unit saves, as the paper does not. Raises ``OptionError`` for whole blocks.
    Source: LLM-Drop (joint layer drop).
    """
    if blocks := [unit for unit in candidates if not unit.sublayer]:
        raise OptionError(
            f"joint ranks attention and MLP sublayers, and {blocks[0]} is a whole block; "
            "use --unit any, or --select lowest where blocks have no sublayers"
        )
    return _one_shot("joint", oracle, candidates, budget, per)


def iterative(oracle: Oracle, candidates: Sequence[Unit], budget: Budget, *, per: str = "none") -> Selection:
    """Drop the unit with the lowest score, score the rest again without it, and so on until the budget is met.

    For any metric that scores cheaply. ``per`` and infinite scores as for ``lowest``. Under a budget on the loss it
    stops before the removal that would break it.
    """
    price = prices("iterative", per, candidates, oracle.ledger, oracle.milliseconds)
    most, on_loss = budget.most(oracle.ledger, candidates), budget.measure == "loss"
    expected = 1 + most if on_loss else 0
    oracle.note(f"iterative: scores at most {most} times, {_besides(expected)}")
    start, place = oracle.evaluations, {unit: index for index, unit in enumerate(candidates)}
    dense = float(oracle.losses([frozenset()]).mean()[0]) if on_loss else None
    steps: list[Step] = []
    stuck: list[Unit] = []
    gone: tuple[Unit, ...] = ()
    while not budget.met(oracle.ledger, gone):
        left = [u for u in candidates if u not in gone and oracle.ledger.viable(frozenset((*gone, u)))]
        scores = oracle.scores(frozenset(gone)) if left else {}
        stuck = [unit for unit in left if not math.isfinite(scores[unit])]
        if len(stuck) == len(left):
            break
        free = [unit for unit in left if math.isfinite(scores[unit])]
        chosen = min(free, key=lambda unit: (rank(scores[unit], price[unit]), place[unit]))
        loss = None
        if dense is not None:
            loss = float(oracle.losses([frozenset((*gone, chosen))]).mean()[0])
            if not loss <= budget.limit(dense):
                if not gone:
                    raise budget.broken(dense, [chosen], loss)
                break
        gone = (*gone, chosen)
        steps.append(Step(chosen, loss, score=scores[chosen]))
    budget.insist(oracle.ledger, gone, stuck)
    return Selection(tuple(steps), oracle.evaluations - start, True, dense, expected)


def contiguous(oracle: Oracle, candidates: Sequence[Unit], budget: Budget, *, rule: str = "distance") -> Selection:
    """Drop the run of consecutive candidates with the lowest score that meets the budget.

    Every run is as short as the budget allows. Blocks under a one-pass metric are compared across the whole run, as in
    Gromov et al.; other units by the sum of their scores; under ``loss`` by the loss without the run.
    ``rule=last`` takes the deepest run that leaves out the final block instead, and needs no score (their simple
    rule). Under a budget on the loss the length of the run is found by bisection.
    Raises ``BudgetError`` where protected units leave no run that is long enough.
    """
    one_of("contiguous:rule", rule, ("distance", "last"))
    if rule == "last":
        final = len(oracle.ledger.blocks) - 1
        candidates = [unit for unit in candidates if unit.block < final]
    runs = [_run(oracle.ledger, candidates[first:]) for first in range(len(candidates))]
    start, scored = oracle.evaluations, rule == "distance"
    if budget.measure == "loss":
        return _longest_run(oracle, budget, runs, scored)
    windows = [window for run in runs if (window := _enough(oracle.ledger, budget, run))]
    if not windows:
        raise BudgetError(
            f"no run of consecutive units meets --drop {budget.text!r}; protect fewer units or use --select lowest"
        )
    expected = len(windows) + 1 if scored else 0  # under the loss, with the dense model that it rises from
    said = f"{len(windows)} windows, at most {expected} evaluations" if scored else "0 evaluations"
    oracle.note(f"contiguous: {said}")
    best, score = _best(oracle, windows) if scored else (windows[-1], None)
    if score == math.inf:
        raise BudgetError(
            f"--drop {budget.text!r} cannot be met: each of the {len(windows)} runs that are long enough holds a unit "
            "that must stay, as its score is infinite"
        )
    return Selection(tuple(Step(u, score=score) for u in best), oracle.evaluations - start, False, expected=expected)


def _one_shot(name: str, oracle: Oracle, candidates: Sequence[Unit], budget: Budget, per: str) -> Selection:
    """Rank once and drop from the front until the budget is met, or while the loss allows."""
    price = prices(name, per, candidates, oracle.ledger, oracle.milliseconds)
    on_loss = budget.measure == "loss"
    expected = 1 + len(candidates).bit_length() if on_loss else 0
    oracle.note(f"{name}: {_besides(expected)}")
    start, scores = oracle.evaluations, oracle.scores()
    order = {unit: position for position, unit in enumerate(candidates)}
    free = [unit for unit in candidates if math.isfinite(scores[unit])]
    gone: list[Unit] = []
    for unit in sorted(free, key=lambda unit: (rank(scores[unit], price[unit]), order[unit])):
        if budget.met(oracle.ledger, gone):
            break
        if oracle.ledger.viable(frozenset((*gone, unit))):
            gone.append(unit)
    budget.insist(oracle.ledger, gone, [unit for unit in candidates if unit not in free])
    steps, dense = [Step(unit, score=scores[unit]) for unit in gone], None
    if on_loss:
        kept, loss, dense = _bisect(oracle, budget, len(gone), lambda count: tuple(gone[:count]))
        steps = [*steps[: len(kept) - 1], Step(kept[-1], loss, score=scores[kept[-1]])]
    return Selection(tuple(steps), oracle.evaluations - start, True, dense, expected)


def _longest_run(oracle: Oracle, budget: Budget, runs: Sequence[tuple[Unit, ...]], scored: bool) -> Selection:
    """The longest run that the loss allows: the best of its length, or the deepest."""
    runs = [run for run in runs if run]
    if not scored:
        runs = [run for run in runs if run[-1] == runs[-1][-1]]  # the one of length n is the n-th from the end
    start, most = oracle.evaluations, max(map(len, runs), default=0)
    windows = {length: [run[:length] for run in runs if len(run) >= length] for length in range(1, most + 1)}
    probes = most.bit_length()
    costs = sorted((len(some) for some in windows.values()), reverse=True)[:probes]
    expected = 1 + (sum(costs) if scored else probes)
    oracle.note(f"contiguous: at most {expected} evaluations")
    score: dict[tuple[Unit, ...], float] = {}

    def at(length: int) -> tuple[Unit, ...]:
        if not scored:
            return runs[-length]
        best, value = _best(oracle, windows[length])
        score[best] = value
        return best if value < math.inf else ()

    kept, loss, dense = _bisect(oracle, budget, most, at)
    steps = [Step(unit, score=score.get(kept)) for unit in kept]
    steps[-1] = Step(kept[-1], loss, score=score.get(kept))
    return Selection(tuple(steps), oracle.evaluations - start, False, dense, expected)


def _bisect(
    oracle: Oracle, budget: Budget, most: int, at: Callable[[int], tuple[Unit, ...]]
) -> tuple[tuple[Unit, ...], float, float]:
    """The longest of the choices ``at(1)`` to ``at(most)`` within a budget on the loss, its loss, and the dense one.

    Right where the loss grows with the length; elsewhere a choice that is within, while the next one is not. An empty
    choice is one that cannot be. Measures the dense model and at most ``most.bit_length()`` others.
    """
    dense = float(oracle.losses([frozenset()]).mean()[0])
    limit, low, high = budget.limit(dense), 0, most + 1
    best: tuple[tuple[Unit, ...], float] = ((), dense)
    beyond = best
    while high - low > 1:
        middle = (low + high) // 2
        units = at(middle)
        loss = float(oracle.losses([frozenset(units)]).mean()[0]) if units else math.inf
        if loss <= limit:
            low, best = middle, (units, loss)
        else:
            high, beyond = middle, (units, loss)
    if not low:
        if beyond[0]:
            raise budget.broken(dense, *beyond)
        raise BudgetError(f"--drop {budget.text!r} cannot be met: every unit must stay, or is needed for a model")
    return *best, dense


def _run(ledger: Ledger, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The longest run of consecutive units that starts with the first: no block between them is missing."""
    stop = next((i + 1 for i, (one, two) in enumerate(pairwise(units)) if two.block - one.block > 1), len(units))
    while stop and not ledger.viable(frozenset(units[:stop])):
        stop -= 1
    return tuple(units[:stop])


def _enough(ledger: Ledger, budget: Budget, run: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The shortest beginning of a run that meets the budget, or nothing."""
    lengths = range(1, len(run) + 1)
    return run[: next((length for length in lengths if budget.met(ledger, run[:length])), 0)]


def _best(oracle: Oracle, windows: Sequence[tuple[Unit, ...]]) -> tuple[tuple[Unit, ...], float]:
    """The window with the lowest score, and its score: infinite where none is finite."""
    scores = [score if math.isfinite(score) else math.inf for score in oracle.windows(windows)]
    best = min(range(len(windows)), key=lambda index: scores[index])
    return windows[best], float(scores[best])


def _besides(expected: int) -> str:
    return f"{'at most ' if expected else ''}{expected} evaluations besides those of the scores"
