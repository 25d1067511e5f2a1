"""Shapley and Banzhaf values: the samplers against exact enumeration, and honest errors over many seeds.

The games are plain tables of numbers; a tiny real network and plain forwards of it are the last word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

import naive
from depthprune import demo
from depthprune.data import Data, calibrate
from depthprune.errors import CheckpointError, OptionError
from depthprune.metrics import shapley as module
from depthprune.metrics.shapley import banzhaf, shapley
from depthprune.model import Model, load
from depthprune.oracle import ModelOracle
from depthprune.scores import Array, Losses, Scores
from depthprune.units import Unit, parse
from families import tiny
from invariants import cases

Value = Callable[[frozenset[int]], float]
# Student's t: the value that 97.5 % lie below, by degrees of freedom. With few pairs, 2 is too small a multiple.
QUANTILES = {3: 3.182, 7: 2.365, 11: 2.201, 15: 2.131, 19: 2.093, 23: 2.069, 27: 2.052, 31: 2.040}
NEVER = 2.0  # a ranking is never settled that much: every permutation is drawn


@dataclass(frozen=True)
class Facts:
    """What the metrics ask about the data."""

    seed: int

    def describe(self) -> dict[str, object]:
        return {"seed": self.seed}


@dataclass
class Game:
    """The value of every set of players that are gone, as an oracle answers; ``noise`` (sequences, sets) if any."""

    table: Array
    seed: int = 0
    noise: Array | None = None
    asked: list[frozenset[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shown: list[tuple[float, float]] = field(default_factory=list)

    @property
    def data(self) -> Facts:
        return Facts(self.seed)

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(Unit("", index) for index in range(len(self.table).bit_length() - 1))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str) -> Callable[[float, float], None]:
        return lambda done, total: self.shown.append((done, total))

    def places(self, gone: Sequence[frozenset[Unit]]) -> list[int]:
        self.asked += [frozenset(unit.block for unit in units) for units in gone]
        return [sum(1 << unit.block for unit in units) for units in gone]

    def losses(self, gone: Sequence[frozenset[Unit]], *, measure: str) -> Losses:
        assert measure == "loss"
        return Losses(5 * self.table[self.places(gone)][:, None], np.array([5.0]))

    def sequences_of(self, measure: str) -> int:
        return 8 if self.noise is None else len(self.noise)

    def sample(self, gone: Sequence[frozenset[Unit]], sequence: int, measure: str) -> Losses:
        places, tokens = self.places(gone), 5.0 + sequence % 3
        values = self.table[places] + (0 if self.noise is None else self.noise[sequence, places])
        return Losses(tokens * values[:, None], np.array([tokens]))


def game(kind: str, count: int, seed: int) -> Game:
    """Games with more than pairs of players in them: antithetic pairs are exact for those that are quadratic."""
    draw = np.random.default_rng([seed, count, zlib(kind)])
    bits = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    if kind == "saturating":  # as losses do: a few units do most of the damage, the rest finds it done
        return Game(2 + 6 * np.tanh(bits @ np.exp(draw.normal(size=count)) / 4), seed)
    if kind == "growing":
        return Game(2 + np.exp(bits @ draw.uniform(0, 0.8, count)), seed)
    if kind == "rough":
        return Game(2 + bits @ np.exp(draw.normal(size=count)) + 0.5 * draw.normal(size=1 << count), seed)
    return Game(2 + draw.normal(size=1 << count), seed)  # noise


def zlib(kind: str) -> int:
    return sum(map(ord, kind))


KINDS = ("saturating", "growing", "rough", "noise")


def exact(table: Array) -> Array:
    """The Shapley values from the definition: every set that a player can join, with its weight."""
    count = len(table).bit_length() - 1
    values = np.zeros(count)
    for gone in range(1 << count):
        size = gone.bit_count()
        weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count) if size < count else 0
        for player in range(count):
            if not gone >> player & 1:
                values[player] += weight * (table[gone | 1 << player] - table[gone])
    return values


def array(values: Mapping[Unit, float]) -> Array:
    return np.array(list(values.values()))


def pairs_of(made: Game) -> int:
    return int(made.notes[-1].split()[1]) // 2


# The sampler against enumeration


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 5, 8])
def test_it_is_within_three_standard_errors_of_the_exact_value(kind: str, count: int) -> None:
    made = game(kind, count, 1)
    found = shapley(made, made.units, permutations=400, settled=NEVER, truncate=0)
    errors = array(found.errors) if found.errors else np.zeros(count)
    assert tuple(found.values) == made.units and found.metric == "shapley" and found.data == {"seed": 1}
    assert found.dense == pytest.approx(made.table[0])
    assert (np.abs(array(found.values) - exact(made.table)) <= 3 * errors + 1e-9).all()


def test_a_quadratic_game_takes_a_single_pair() -> None:
    """An order and its reverse see every pair of players both ways round: twice a marginal, exactly."""
    draw = np.random.default_rng(4)
    bits = (np.arange(64)[:, None] >> np.arange(6)) & 1
    both = bits @ np.triu(draw.normal(size=(6, 6)))
    made = Game(1 + (both * bits).sum(1))
    found = shapley(made, made.units, permutations=2, truncate=0)
    np.testing.assert_allclose(array(found.values), exact(made.table), atol=1e-9)
    assert not found.errors  # one pair tells nothing of its own error


@dataclass(frozen=True)
class Coverage:
    """The share of values within two standard errors, within Student's 95 % and within three; and the pairs drawn."""

    two: float
    student: float
    three: float
    pairs: float


def coverage(kind: str, *, seeds: int = 200, count: int = 7, **options: Any) -> Coverage:
    two, student, three, pairs = [], [], [], []
    for seed in range(seeds):
        made = game(kind, count, seed)
        found = shapley(made, made.units, **options)
        off = np.abs(array(found.values) - exact(made.table)) / np.maximum(array(found.errors), 1e-12)
        pairs.append(pairs_of(made))
        two.append((off <= 2).mean())
        student.append((off <= QUANTILES[pairs[-1] - 1]).mean())
        three.append((off <= 3).mean())
    return Coverage(*(float(np.mean(each)) for each in (two, student, three, pairs)))


def honest(found: Coverage) -> bool:
    return 0.88 <= found.two <= 0.99 and 0.91 <= found.student <= 0.985 and found.three >= 0.95


@pytest.mark.parametrize("options", [{}, {"settled": NEVER}, {"settled": 0.98}, {"truncate": 0.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_honest_over_seeds(kind: str, options: dict[str, float]) -> None:
    assert honest(coverage(kind, **options))


@pytest.mark.parametrize("kind", ["saturating", "growing"])
def test_errors_that_are_too_small_are_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module._mean
    monkeypatch.setattr(module, "_mean", lambda pairs: (own(pairs)[0], own(pairs)[1] / 2))
    assert not honest(coverage(kind, settled=NEVER))


def test_errors_that_are_too_large_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module._mean
    monkeypatch.setattr(module, "_mean", lambda pairs: (own(pairs)[0], own(pairs)[1] * 2))
    assert not honest(coverage("saturating", settled=NEVER))


def test_believing_four_pairs_would_not_be_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why ``LEAST`` is what it is."""
    monkeypatch.setattr(module, "LEAST", 4)
    assert not honest(coverage("saturating"))


def test_errors_over_single_orders_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order and its reverse are not two draws: a standard error over both is far too large."""
    own = module._marginals
    halves: list[Array] = []

    def kept(*args: Any) -> Array:
        halves.append(own(*args))
        return halves[-1]

    def single(pairs: Array) -> tuple[Array, Array]:
        every = np.concatenate(halves)
        return pairs.mean(0), every.std(0, ddof=1) / math.sqrt(len(every))

    monkeypatch.setattr(module, "_marginals", kept)
    monkeypatch.setattr(module, "_mean", single)
    inside = []
    for seed in range(60):
        halves.clear()
        made = game("growing", 7, seed)
        found = shapley(made, made.units, settled=NEVER)
        inside.append((np.abs(array(found.values) - exact(made.table)) <= 2 * array(found.errors)).mean())
    assert np.mean(inside) > 0.99


@pytest.mark.parametrize("defect", ["of the reverse", "of the whole order", "before and after swapped"])
def test_wrong_marginals_are_seen(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module._marginals

    def wrong(oracle: Any, units: Any, orders: Sequence[Any], *rest: Any) -> Array:
        if defect == "of the reverse":
            return own(oracle, units, orders, *rest)[:, ::-1]
        if defect == "before and after swapped":
            return -own(oracle, units, orders, *rest)
        return own(oracle, units, [np.arange(len(units)) for _ in orders], *rest)

    monkeypatch.setattr(module, "_marginals", wrong)
    off = []
    for seed in range(10):
        made = game("saturating", 7, seed)
        found = shapley(made, made.units, settled=NEVER)
        errors = array(found.errors)
        off += list(np.abs(array(found.values) - exact(made.table)) > 3 * errors + 1e-9)
    assert np.mean(off) > 0.4


# What is always true


@pytest.mark.parametrize("truncate", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_values_add_up(kind: str, truncate: float) -> None:
    for seed in range(5):
        made = game(kind, 7, seed)
        found = shapley(made, made.units, permutations=8, truncate=truncate)
        assert sum(found.values.values()) == pytest.approx(made.table[-1] - made.table[0], abs=1e-9)


def orders_drawn(made: Game, **options: Any) -> list[list[int]]:
    """The orders in which units went, as they were handed on."""
    seen: list[list[int]] = []
    own = module._marginals
    with pytest.MonkeyPatch.context() as patch:

        def noted(oracle: Any, units: Any, orders: Sequence[Any], *rest: Any) -> Array:
            seen.extend(order.tolist() for order in orders)
            return own(oracle, units, orders, *rest)

        patch.setattr(module, "_marginals", noted)
        shapley(made, made.units, **options)
    return seen


def test_pairs_are_an_order_and_its_reverse() -> None:
    seen = orders_drawn(game("noise", 8, 0), permutations=22, settled=NEVER)
    assert len(seen) == 22 and all(sorted(order) == list(range(8)) for order in seen)
    assert all(two == one[::-1] for one, two in zip(seen[::2], seen[1::2], strict=True))
    assert len({tuple(order) for order in seen}) == 22
    assert len(orders_drawn(game("noise", 8, 0), permutations=23, settled=NEVER)) == 22  # an odd one has no partner


def test_every_set_asked_lies_on_an_order() -> None:
    made = game("noise", 6, 2)
    orders = orders_drawn(made, permutations=4, settled=NEVER, truncate=0)
    beginnings = {frozenset(order[:length]) for order in orders for length in range(7)}
    assert set(made.asked) == beginnings


def test_it_is_deterministic_under_a_seed() -> None:
    def made(drawn: int, **options: Any) -> Mapping[Unit, float]:
        one = game("saturating", 7, 0)
        one.seed = drawn
        return shapley(one, one.units, **options).values

    assert made(3) == made(3) == made(99, seed=3) != made(4)
    assert made(3, seed=0) == made(0) != made(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("permutations", [2, 7, 40])
def test_it_asks_no_more_than_it_said(kind: str, permutations: int) -> None:
    made = game(kind, 8, 5)
    shapley(made, made.units, permutations=permutations, settled=NEVER, truncate=0)
    said = int(made.notes[0].split("at most ")[1].split(" evaluations")[0].replace(",", ""))
    assert said == 2 * (permutations // 2) * 7 + 2
    assert len(set(made.asked)) <= len(made.asked) == said


def test_it_stops_when_the_ranking_is_settled() -> None:
    def drawn(settled: float, kind: str = "saturating") -> int:
        made = game(kind, 8, 1)
        shapley(made, made.units, settled=settled, permutations=256)
        assert made.shown[-1] == (128, 128)
        assert [done for done, _ in made.shown] == sorted(done for done, _ in made.shown)
        return pairs_of(made)

    assert drawn(0.0) == module.LEAST
    assert drawn(0.0) <= drawn(0.9) <= drawn(0.99) < drawn(NEVER) == 128
    assert drawn(0.9) < drawn(0.9, "noise")  # where units hardly differ, it takes longer


def test_what_settled_promises() -> None:
    """``settled`` is the squared correlation with the exact values, or more, in the mean over games."""
    for kind in ("saturating", "rough"):
        squares = []
        for seed in range(60):
            made = game(kind, 8, seed)
            found = shapley(made, made.units, settled=0.9, permutations=256)
            squares.append(np.corrcoef(array(found.values), exact(made.table))[0, 1] ** 2)
        assert np.mean(squares) > 0.9


@pytest.mark.parametrize("table", [np.zeros(16), np.arange(16).astype(float) * 0 + 7], ids=["zero", "seven"])
def test_units_that_are_all_alike_are_no_error(table: Array) -> None:
    made = Game(table)
    found = shapley(made, made.units)
    assert set(found.values.values()) == {0.0} and pairs_of(made) == module.LEAST
    steps = Game(np.array([gone.bit_count() for gone in range(16)], dtype=float))
    assert set(shapley(steps, steps.units).values.values()) == {1.0}


# Truncation


def test_truncation_saves_evaluations_and_moves_little() -> None:
    """In a game that only rises, what is shared out is at most ``truncate`` of the way, and so is the bias."""
    for seed in range(20):
        whole, cut = game("saturating", 8, seed), game("saturating", 8, seed)
        plain = shapley(whole, whole.units, truncate=0, settled=NEVER)
        short = shapley(cut, cut.units, truncate=0.05, settled=NEVER)
        way = cut.table[-1] - cut.table[0]
        assert np.abs(array(plain.values) - array(short.values)).max() <= 0.05 * way
        assert len(cut.asked) <= len(whole.asked)
    early = Game(2 + 6 * np.tanh(((np.arange(256)[:, None] >> np.arange(8)) & 1).sum(1)))
    shapley(early, early.units, truncate=0.05, settled=NEVER)
    assert len(early.asked) == 2 + 64 * 2  # with two of eight gone, all is lost
    assert all(len(gone) in (0, 1, 2, 8) for gone in early.asked)


def test_what_is_left_is_shared_out_evenly() -> None:
    made = Game(np.where(np.arange(32) > 0, 9.96, 1.0))
    made.table[-1] = 10
    found = shapley(made, made.units, permutations=2, truncate=0.01)
    first = {made.asked[2], made.asked[3]}  # the first of the order and of its reverse
    (a,), (b,) = first
    for unit, value in found.values.items():
        others = 0.04 / 4
        assert value == pytest.approx((8.96 + others) / 2 if unit.block in (a, b) else others)


# Losses that are not finite


def test_a_loss_that_is_not_finite_counts_as_everything_gone() -> None:
    for broken in (math.inf, math.nan):
        made, plain = (game("saturating", 6, 3) for _ in range(2))
        for one, value in ((made, broken), (plain, made.table[-1])):
            one.table[[gone for gone in range(63) if gone & 4]] = value  # without unit 2 there is no model
        values = [array(shapley(one, one.units, settled=NEVER).values) for one in (made, plain)]
        np.testing.assert_allclose(values[0], values[1])
        assert values[0].argmax() == 2 and np.isfinite(values[0]).all()


def test_where_nothing_can_be_measured_without_any_unit_that_is_said() -> None:
    def broken(oracle: Any, units: Sequence[Unit]) -> Scores:
        made = game("saturating", 4, 0)
        made.table[-1] = math.nan
        return shapley(made, made.units)

    oracle = ModelOracle(cases.model("llama"), cases.text(), metric=broken)
    with pytest.raises(CheckpointError, match="is not a number"):
        oracle.scores()


@pytest.mark.parametrize(
    "options", [{"permutations": 1}, {"permutations": 0}, {"truncate": 1.0}, {"truncate": -0.1}], ids=str
)
def test_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    made = game("noise", 4, 0)
    with pytest.raises(OptionError, match=r"^shapley needs a unit, two permutations, and truncate from 0 "):
        shapley(made, made.units, **options)
    with pytest.raises(OptionError, match="not 0 units"):
        shapley(made, ())
    assert not made.asked


def test_a_unit_alone_is_left_out() -> None:
    made = game("noise", 4, 0)
    one = made.units[0]
    without, dense = made.losses([frozenset((one,)), frozenset()], measure="loss").mean()
    assert shapley(made, [one]).values[one] == pytest.approx(float(without - dense))


# A real network


def table_of(model: Model, data: Data, units: Sequence[Unit], net: torch.nn.Module) -> Array:
    """The loss without each set of units, from plain forwards."""
    found = np.empty(1 << len(units))
    for gone in range(len(found)):
        with naive.removed(net, [unit for place, unit in enumerate(units) if gone >> place & 1]):
            found[gone] = float(naive.loss(net, data.tokens, data.mask).sum()) / data.predicted
    return found


def test_shapley_values_of_a_real_network() -> None:
    model, data = cases.model("llama"), cases.text(padded=True)
    units = parse(["0.self_attn", "0.mlp", "1", "2.self_attn", "2.mlp", "3.mlp"])
    table = table_of(model, data, units, tiny("llama"))
    want = exact(table)
    oracle = ModelOracle(model, data, metric="shapley:permutations=128,settled=2,truncate=0", units=units)
    found = oracle.scored()
    assert (np.abs(array(found.values) - want) <= 3 * array(found.errors) + 1e-5).all()
    assert sum(found.values.values()) == pytest.approx(table[-1] - table[0], abs=1e-5)
    assert oracle.evaluations <= 64 and found.dense == pytest.approx(table[0], abs=1e-5)
    np.testing.assert_allclose(array(found.values), want, atol=0.1 * np.abs(want).max())
    again = ModelOracle(model, data, metric="shapley:permutations=128,settled=2,truncate=0", units=units)
    assert again.scored() == found


def test_other_measures_are_games_too() -> None:
    model, data = cases.model("gpt2"), cases.text()
    oracle = ModelOracle(model, data, metric="shapley:permutations=4,of=kl", units=model.layout.units("block"))
    whole = oracle.losses([frozenset(model.layout.units("block"))], measure="kl").mean()[0]
    assert sum(oracle.scores().values()) == pytest.approx(whole, rel=1e-6)  # the dense model's is zero


# Banzhaf


def halves(table: Array) -> Array:
    """The exact value: mean where a player is gone, less mean where it is there, over all sets with half of them."""
    count = len(table).bit_length() - 1
    present = [frozenset(some) for some in combinations(range(count), count // 2)]
    value = {some: table[sum(1 << player for player in range(count) if player not in some)] for some in present}
    means = [
        [np.mean([value[some] for some in present if (player in some) == there]) for there in (False, True)]
        for player in range(count)
    ]
    return np.array([gone - there for gone, there in means])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 6, 8])
def test_banzhaf_is_within_three_standard_errors_of_the_exact_value(kind: str, count: int) -> None:
    made = game(kind, count, 1)
    made.noise = np.zeros((40, len(made.table)))
    found = banzhaf(made, made.units)
    assert (np.abs(array(found.values) - halves(made.table)) <= 3 * array(found.errors)).all()
    assert len(made.asked) == 400 and {len(gone) for gone in made.asked} == {count - count // 2}
    assert made.notes == ["banzhaf: 10 sub-networks for each of 40 sequences, the work of 10 evaluations"]


def banzhaf_coverage(kind: str, spread: float, seeds: int = 200) -> tuple[float, float]:
    """The share of values within two and three standard errors; sequences differ by ``spread``."""
    two, three = [], []
    for seed in range(seeds):
        made = game(kind, 6, seed)
        made.noise = spread * np.random.default_rng(seed).normal(size=(24, len(made.table)))
        found = banzhaf(made, made.units, subsets=4, seed=seed)
        off = np.abs(array(found.values) - halves(made.table)) / array(found.errors)
        two.append((off <= 2).mean())
        three.append((off <= 3).mean())
    return float(np.mean(two)), float(np.mean(three))


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_banzhaf_errors_are_honest_over_seeds(kind: str, spread: float) -> None:
    two, three = banzhaf_coverage(kind, spread)
    assert 0.88 <= two <= 0.99 and three >= 0.96


def test_half_the_jackknife_would_not_be_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    own = np.sqrt
    monkeypatch.setattr(module.np, "sqrt", lambda value: own(value) / 2)
    two, _ = banzhaf_coverage("saturating", 0.0)
    assert two < 0.8


def naive_banzhaf(net: torch.nn.Module, data: Data, units: Sequence[Unit], subsets: int, of: str) -> Array:
    """The estimator of the paper's code, with plain forwards: the same draws, one sequence at a time."""
    count, draw = len(units), np.random.default_rng(43)
    sums, numbers = np.zeros((2, count)), np.zeros((2, count))
    for row in range(data.sequences):
        tokens, mask = data.tokens[row : row + 1], data.mask[row : row + 1]
        real = (mask[:, 1:] & mask[:, :-1])[0]
        dense = naive.logits(net, tokens, mask)[0, :-1].double()
        for _ in range(subsets):
            present = set(draw.choice(count, count // 2, replace=False).tolist())
            with naive.removed(net, [unit for place, unit in enumerate(units) if place not in present]):
                if of == "loss":
                    value = float(naive.loss(net, tokens, mask)[0])
                else:
                    thin = naive.logits(net, tokens, mask)[0, :-1].double()
                    value = float((thin - dense)[real].norm(dim=-1).sum())
            for place in range(count):
                sums[int(place in present), place] += value
                numbers[int(place in present), place] += int(real.sum())
    means: Array = sums / numbers
    return means[0] - means[1]


@pytest.mark.parametrize("of", ["loss", "logit_distance"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_banzhaf_is_what_a_naive_one_computes(family: str, of: str) -> None:
    model, data = cases.model(family), cases.text(padded=True, rows=4)
    units = model.layout.units("block") if of == "loss" else model.layout.units("any")
    found = ModelOracle(model, data, metric=f"banzhaf:of={of}", units=units).scored()
    want = naive_banzhaf(tiny(family), data, units, 10, of)
    np.testing.assert_allclose(array(found.values), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert tuple(found.values) == units and (array(found.errors) > 0).all()


def test_banzhaf_of_the_real_model(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(demo.unpack(tmp_path_factory.mktemp("demo")))
    monkeypatch.setattr(naive, "stack_of", lambda net: net.model.layers)
    data = calibrate(str(demo.CALIBRATION), model.tokenizer, sequences=3, length=16)
    assert isinstance(data, Data)
    units = model.layout.units("block")
    for of in ("loss", "logit_distance"):
        oracle = ModelOracle(model, data, metric=f"banzhaf:of={of},subsets=6", units=units)
        want = naive_banzhaf(model.net, data, units, 6, of)
        np.testing.assert_allclose(array(oracle.scores()), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
        assert oracle.evaluations <= 18 and oracle.work == pytest.approx(6, abs=0.5)


def test_a_wrong_draw_is_seen() -> None:
    model, data = cases.model("llama"), cases.text(rows=4)
    units = model.layout.units("block")
    found = ModelOracle(model, data, metric="banzhaf:seed=42", units=units).scores()
    assert np.abs(array(found) - naive_banzhaf(tiny("llama"), data, units, 10, "loss")).max() > 1e-2


def test_banzhaf_options_that_mean_nothing_are_refused() -> None:
    made = game("noise", 4, 0)
    for units, subsets in ((made.units[:1], 10), (made.units, 0)):
        with pytest.raises(OptionError, match=r"^banzhaf needs at least two units and one subset"):
            banzhaf(made, units, subsets=subsets)


def test_a_unit_that_no_subset_left_out_must_stay() -> None:
    """One subset of one sequence: a unit is either there or not, so nothing can be compared."""
    made = game("growing", 4, 0)
    made.noise = np.zeros((1, 16))
    found = banzhaf(made, made.units, subsets=1)
    assert set(found.values.values()) == {math.inf} and not found.errors


def test_banzhaf_leaves_out_what_is_not_finite() -> None:
    """One broken sub-network says nothing of the units in it; a unit that breaks every one it is absent from stays."""
    for broken in (math.inf, math.nan):
        made, plain = (game("saturating", 6, 3) for _ in range(2))
        for one in (made, plain):
            one.noise = np.zeros((40, 64))
        made.noise[0] = broken
        found, want = (array(banzhaf(one, one.units).values) for one in (made, plain))
        assert np.isfinite(found).all() and np.abs(found - want).max() < 0.5
        made.noise[:, [gone for gone in range(64) if gone & 4]] = broken  # without unit 2 there is no model
        found = array(banzhaf(made, made.units).values)
        assert found[2] == math.inf and np.isfinite(np.delete(found, 2)).all()


@pytest.mark.parametrize("metric", [shapley, banzhaf])
def test_a_negative_seed_is_that_of_the_data(metric: Any) -> None:
    made = [replace(game("noise", 4, 5), seed=seed) for seed in (5, 6, -1)]
    one, other, _ = (array(metric(each, each.units, seed=-1).values) for each in made)
    np.testing.assert_array_equal(one, array(metric(made[0], made[0].units, seed=5).values))
    assert (one != other).any()
