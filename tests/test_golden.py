"""The papers' printed figures, computed by the package on models without weights (``golden.py`` holds the figures).

Each check is a function over rows of figures that returns what is wrong, so that its twin can hand it a wrong row and
see it found. Sizes come from the real code on the meta device; only the proof that sublayers may be dropped needs
arithmetic, so a tiny model of the same family is discovered, and its layout takes on the large model's sizes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import golden
from depthprune.budget import Budget
from depthprune.discover import _cache_numbers, discover, size
from depthprune.errors import BudgetError
from depthprune.layout import Layout, blocks_of
from depthprune.plan import Plan, Reference
from depthprune.select.rank import lowest
from depthprune.select.search import greedy
from depthprune.units import Unit, parse
from fakes import FakeOracle
from families import FAMILIES, tiny
from golden import Cache, Count, Deviation, Share

BYTES = 2  # of one number, in the caches and checkpoints that the papers print


# Layouts of models without weights


def resized(like: Layout, net: nn.Module) -> Layout:
    """The layout of a network, given what was proven of a smaller one of the same family."""
    modules = blocks_of(net, like)
    probe = torch.zeros(2, 6, dtype=torch.long, device=next(net.parameters()).device)
    numbers = _cache_numbers(net, modules, probe)
    blocks = []
    for index, module in enumerate(modules):
        block = like.blocks[index % len(like.blocks)]
        norms = tuple(replace(norm, parameters=size(module.get_submodule(norm.name))) for norm in block.serves)
        sublayers = []
        for sublayer in block.sublayers:
            own = sum(size(module.get_submodule(name)) for name in sublayer.members)
            own += sum(norm.parameters for norm in norms if norm.served == {sublayer.name})
            sublayers.append(replace(sublayer, parameters=own))
        cache = numbers[index] * like.element_size
        blocks.append(
            replace(
                block,
                index=index,
                parameters=size(module),
                sublayers=tuple(sublayers),
                serves=norms,
                kv_bytes_per_token=cache,
            )
        )
    return replace(like, blocks=tuple(blocks), outside=size(net) - sum(block.parameters for block in blocks))


@functools.cache
def proven(family: str) -> Layout:
    layout = discover(tiny(family), BYTES)
    assert len({(b.arity, tuple(s.name for s in b.sublayers)) for b in layout.blocks}) == 1, "blocks of several kinds"
    return layout


@functools.cache
def _sized(family: str, sizes: tuple[tuple[str, int], ...]) -> Layout:
    config = getattr(transformers, FAMILIES[family].config)(**dict(sizes))
    with torch.device("meta"), torch.no_grad():
        net = getattr(transformers, FAMILIES[family].network)(config)
        return resized(proven(family), net)


def layout_of(model: str) -> Layout:
    family, sizes = golden.MODELS[model]
    return _sized(family, tuple(sizes.items()))


@pytest.mark.parametrize("family", sorted({family for family, _ in golden.MODELS.values()}))
def test_a_layout_resized_to_its_own_size_is_itself(family: str) -> None:
    with torch.no_grad():
        assert resized(proven(family), tiny(family)) == proven(family)


def test_sizes_are_those_of_the_network() -> None:
    with torch.no_grad():
        biased = resized(proven("llama"), tiny("llama_bias"))
    assert biased == proven("llama_bias") != proven("llama")


# Sizes


def units(text: str) -> tuple[Unit, ...]:
    """The units of a list such as ``A27 M6``, or of counts such as ``A12M5`` and ``B7`` (the first ones of each)."""
    name = {"A": "{}.self_attn", "M": "{}.mlp", "B": "{}"}
    parts = re.findall(r"([AMB])(\d+)", text)
    if " " in text:
        return parse([name[kind].format(number) for kind, number in parts])
    return parse([name[kind].format(block) for kind, number in parts for block in range(int(number))])


def whole(layout: Layout) -> int:
    return layout.parameters + layout.outside


def rounded(printed: str, value: float) -> str:
    """A value with as many decimals as the printed figure has."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


def share(layout: Layout, dropped: Sequence[Unit], how: str = "model") -> float:
    """Per cent of the parameters of the model, or of its blocks, that dropping these units frees."""
    return 100 * layout.freed(tuple(dropped)) / (whole(layout) if how == "model" else layout.parameters)


def wrong_shares(rows: Sequence[Share], how: str = "model") -> list[str]:
    found = []
    for row in rows:
        for counts in row.counts:
            ours = rounded(row.printed, share(layout_of(row.model), units(counts), how))
            if ours != row.printed:
                found.append(f"{row.source}: {row.model} without {counts} is {ours} %, not {row.printed} %")
    return found


def other_counts(rows: Sequence[Share]) -> list[str]:
    """Rows of sublayer counts that are not all, or not the only, ones to give the printed figure."""
    found = []
    for row in rows:
        if row.counts[0].startswith("A"):
            have = {counts for counts, value in _every_share(row.model) if rounded(row.printed, value) == row.printed}
            if have != set(row.counts):
                found.append(f"{row.source}: {row.printed} % of {row.model} is given by {sorted(have)}")
    return found


@functools.cache
def _every_share(model: str) -> list[tuple[str, float]]:
    """The share of every pair of counts of attentions and MLPs, from a sum: one of each, the rest are alike."""
    layout = layout_of(model)
    assert len({b.sublayers for b in layout.blocks}) == 1
    attention, mlp = share(layout, units("A1")), share(layout, units("M1"))
    count = len(layout.blocks) + 1
    return [(f"A{a}M{m}", a * attention + m * mlp) for a in range(count) for m in range(count)]


def test_shares_of_the_model() -> None:
    assert not wrong_shares(golden.SHARES)
    assert not other_counts(golden.SHARES)


def test_shares_of_the_blocks() -> None:
    assert not wrong_shares(golden.BLOCK_SHARES, "blocks")


def test_shares_see_another_count_another_model_and_another_whole() -> None:
    right = Share("Llama-2-7B", "21.99", ("A12M5",), "paper")
    assert not wrong_shares([right])
    for wrong in (
        replace(right, counts=("A11M5",)),
        replace(right, counts=("A12M5", "A14M4")),  # 2 attentions for 1 MLP are nearly the same, but not quite
        replace(right, printed="21.98"),
        replace(right, model="Qwen1.5-7B"),
    ):
        assert len(wrong_shares([wrong])) == 1
    assert other_counts([Share("Baichuan2-13B", "24.19", ("A14M9",), "paper")]) == [
        "paper: 24.19 % of Baichuan2-13B is given by ['A12M10', 'A14M9']"
    ]
    assert len(wrong_shares(golden.SHARES, "blocks")) == len([c for row in golden.SHARES for c in row.counts])


def wrong_parameters(rows: Sequence[Count]) -> list[str]:
    """Rows whose parameters in billions are not the printed ones, or no budget for that many takes so many blocks."""
    found = []
    for row in rows:
        layout = layout_of(row.model)
        left = whole(layout) - layout.freed(units(f"B{row.blocks}"))
        if (ours := rounded(row.printed, left / 1e9)) != row.printed:
            found.append(f"{row.source}: {row.model} without {row.blocks} blocks has {ours} B, not {row.printed} B")
        elif row.blocks:
            budget = Budget.parse(f"params<={float(row.printed) + 0.0005:.4f}b", layout)
            if not budget.met(layout, units(f"B{row.blocks}")) or budget.met(layout, units(f"B{row.blocks - 1}")):
                found.append(f"{row.source}: {budget.text} is not met by exactly {row.blocks} blocks of {row.model}")
    return found


def test_parameters() -> None:
    assert not wrong_parameters(golden.COUNTS)
    layout = layout_of("Llama-2-7B")
    assert whole(layout) == golden.LLAMA_2_7B
    for counts, printed in golden.SUBLAYERS.items():
        assert rounded(printed, layout.freed(units(counts)) / 1e6) == printed
    for model, printed in golden.FULL_SIZE.items():
        assert rounded(printed, whole(layout_of(model)) * BYTES / 1e9) == printed


def test_parameters_see_a_wrong_count_and_a_wrong_figure() -> None:
    assert wrong_parameters([Count("LLaMA-1-7B", 7, "5.524", "paper")]) == [
        "paper: LLaMA-1-7B without 7 blocks has 5.322 B, not 5.524 B"
    ]
    assert len(wrong_parameters([Count("Gemma-2B", 0, "3.030", "paper")])) == 1  # with the tied head counted twice
    assert len(wrong_parameters([Count("Mistral-7B-v0.3", 0, "7.242", "paper")])) == 1  # its vocabulary has grown


def cache(row: Cache) -> tuple[float, float]:
    """GiB of keys and values: of the dense model, and of one with its first attentions gone."""
    layout = layout_of(row.model)
    dropped = units(f"A{len(layout.blocks) - row.kept}")
    scale = golden.CACHE_LENGTH * row.batch / 2**30
    return layout.kv_bytes_per_token * scale, (layout.kv_bytes_per_token - layout.kv_freed(dropped)) * scale


def wrong_caches(rows: Sequence[Cache]) -> list[str]:
    found = []
    for row in rows:
        dense, thin = cache(row)
        ours = rounded(row.dense, dense), rounded(row.thin, thin)
        if ours != (row.dense, row.thin):
            found.append(f"{row.model}: {' -> '.join(ours)} GiB, not {row.dense} -> {row.thin}")
        layout = layout_of(row.model)
        budget = Budget.parse(f"kv<={100 * row.kept / len(layout.blocks)}%", layout)
        fewest = next(n for n in range(len(layout.blocks)) if budget.met(layout, units(f"A{n}")))
        if fewest != len(layout.blocks) - row.kept:
            found.append(f"{row.model}: {budget.text} drops {fewest} attentions")
        if layout.kv_freed(units("M8")) or layout.kv_freed(units("B8")) != layout.kv_freed(units("A8")):
            found.append(f"{row.model}: MLPs have a cache, or blocks another than their attention")
    return found


def test_caches() -> None:
    assert not wrong_caches(golden.CACHES)


def test_caches_see_another_unit_and_another_model() -> None:
    assert wrong_caches([Cache("Mistral-7B-v0.1", 64, 20, "17", "11")]) == [  # decimal GB
        "Mistral-7B-v0.1: 16 -> 10 GiB, not 17 -> 11"
    ]
    assert len(wrong_caches([Cache("Llama-2-7B", 64, 20, "16", "10")])) == 1  # no grouped heads
    assert len(wrong_caches([Cache("Mistral-7B-v0.1", 64, 24, "16", "10")])) == 1


def wrong_deviations(rows: Sequence[Deviation]) -> list[str]:
    """Deviations that are none any more, or others than written down."""
    found = []
    for row in rows:
        layout = layout_of(row.model)
        if row.how in ("dense", "thin"):
            kept = len(layout.blocks) - int(row.counts[1:])
            value = cache(Cache(row.model, 32, kept, "", ""))[row.how == "thin"]
        else:
            value = share(layout, units(row.counts), row.how)
        ours = rounded(row.printed, value)
        if ours == row.printed or ours != row.ours:
            found.append(f"{row.model} without {row.counts}: {ours}; printed {row.printed}, written down {row.ours}")
    return found


def test_known_deviations() -> None:
    assert not wrong_deviations(golden.DEVIATIONS)
    no_count = [rounded("31.6", share(layout_of("Llama-2-7B"), units(f"B{n}"), "blocks")) for n in range(33)]
    assert "31.6" not in no_count and "31.2" in no_count


def test_deviations_that_are_none_are_seen() -> None:
    row = golden.DEVIATIONS[0]
    assert wrong_deviations([replace(row, printed="27.0"), replace(row, ours="27.2")]) == [
        "Llama-2-7B without B9: 27.0; printed 27.0, written down 27.0",
        "Llama-2-7B without B9: 27.0; printed 27.1, written down 27.2",
    ]


# BlockPruner's sequences


def cumulative(sequence: str) -> str:
    """The share of Llama-2-7B after each removal; the same by plain units and in canonical form."""
    layout, order = layout_of("Llama-2-7B"), units(sequence)
    prefixes = [order[:count] for count in range(1, len(order) + 1)]
    for prefix in prefixes:
        assert layout.freed(layout.canonical(prefix)) == layout.freed(prefix)
    return " ".join(f"{share(layout, prefix):.2f}" for prefix in prefixes)


@pytest.mark.parametrize("name", sorted(golden.SEQUENCES))
def test_published_sequences(name: str) -> None:
    sequence = golden.SEQUENCES[name]
    assert cumulative(sequence) == golden.CUMULATIVE[name]
    first = units(sequence)[:17]
    layout = layout_of("Llama-2-7B")
    kinds = [layout.kind(unit) for unit in first]
    assert f"A{kinds.count('attention')}M{kinds.count('mlp')}" == golden.AT_17
    assert layout.freed(first) == layout.freed(units(golden.AT_17))
    assert cumulative(sequence.replace("M6", "A6").replace("M7", "A5")) != golden.CUMULATIVE[name]
    swapped = sequence.split()
    swapped[6:8] = swapped[7:5:-1]  # an MLP before an attention: the sum is the same, the list is not
    assert cumulative(" ".join(swapped)) != golden.CUMULATIVE[name]


def test_the_sequences_agree_on_the_first_six_only() -> None:
    one, other = (Plan(Reference("Llama-2-7B"), units(text)) for text in golden.SEQUENCES.values())
    assert len(one.prefix(golden.AGREED).diff(other.prefix(golden.AGREED))["both"]) == golden.AGREED
    assert one.prefix(golden.AGREED + 1).diff(other.prefix(golden.AGREED + 1))["only_here"] == ["7.self_attn"]


def searched(model: str, what: str, count: int) -> int:
    """How many thinned models an exact greedy search measures; the dense one, which the papers do not count, apart."""
    layout = layout_of(model)
    candidates = layout.units("block")[1:-1] if what == "ends" else layout.units(what)
    rank = {unit: index for index, unit in enumerate(candidates)}
    oracle = FakeOracle(lambda gone: np.array([sum(rank[unit] for unit in gone)] * 2), layout)  # type: ignore[arg-type]
    selection = greedy(oracle, candidates, Budget.parse(f"{count} units", layout), exact=True)
    assert selection.units == candidates[:count]
    return selection.evaluations - 1


@pytest.mark.parametrize(("model", "what", "count", "printed"), golden.EVALUATIONS)
def test_evaluations_of_exact_greedy(model: str, what: str, count: int, printed: int) -> None:
    assert searched(model, what, count) == printed
    assert searched(model, what, count - 1) < printed


# Scores and orders


def ranked(model: str, scores: Mapping[int, float], count: int) -> list[int]:
    """The blocks that ``lowest`` drops, in order."""
    layout = layout_of(model)
    assert len(scores) == len(layout.blocks)
    values = {Unit("", block): score for block, score in scores.items()}
    oracle = FakeOracle(lambda gone: np.zeros(2), layout, scores=values)  # type: ignore[arg-type]
    chosen = lowest(oracle, layout.units("block"), Budget.parse(f"{count} blocks", layout))
    return [unit.block for unit in chosen.units]


def wrong_order(model: str, scores: Sequence[float], published: Sequence[int]) -> list[str]:
    """How an order differs from the one that follows from the scores; blocks whose printed scores tie may swap."""
    have = ranked(model, dict(enumerate(scores)), len(published))
    return [
        f"{model}, place {place}: block {block} ({scores[block]}), published {wanted} ({scores[wanted]})"
        for place, (block, wanted) in enumerate(zip(have, published, strict=True))
        if scores[block] != scores[wanted]
    ] + [f"{model}: block {block} is missing" for block in {*have} - {*published}]


def test_cosine_influences_give_the_published_sets() -> None:
    assert ranked("Llama-2-7B", dict(enumerate(golden.COSINE["Llama-2-7B"])), 9) == golden.COSINE_ORDER
    for model, source, published in golden.COSINE_SETS:
        have = ranked(model, dict(enumerate(golden.COSINE[model])), len(published))
        assert sorted(have) == sorted(published), source
    ours, theirs = (
        Plan(Reference("Llama-2-13B"), tuple(Unit("", block) for block in blocks))
        for blocks in (golden.SHORTGPT_13B, golden.LLM_DROP_13B)
    )
    assert len(ours.prefix(8).diff(theirs)["both"]) == 8 and ours.prefix(8) != theirs


SCORED = [(model, "ppl", scores) for model, scores in golden.PPL.items()] + [("Llama-2-7B", "taylor", golden.TAYLOR)]


@pytest.mark.parametrize(("model", "metric", "scores"), SCORED, ids=lambda value: value if len(value) < 20 else "")
def test_scores_give_the_published_order(model: str, metric: str, scores: list[float]) -> None:
    published = golden.ORDERS[model, metric][:-1]  # something has to be left
    assert not wrong_order(model, scores, published)
    swapped = [published[1], published[0], *published[2:]]
    assert len(wrong_order(model, scores, swapped)) == 2
    assert wrong_order(model, scores, [*published[:-1], golden.ORDERS[model, metric][-1]])


def plus(model: str, metric: str, count: int, protect: bool = True) -> list[int]:
    """What ``lowest`` drops when the first four and the last two blocks have an infinite score, as Taylor+ and Mag+."""
    order = golden.ORDERS[model, metric]
    last = len(order) - 1
    assert sorted(order) == list(range(last + 1))
    scores = {block: float(place) for place, block in enumerate(order)}
    if protect:
        scores |= dict.fromkeys((0, 1, 2, 3, last - 1, last), float("inf"))
    return ranked(model, scores, count)


@pytest.mark.parametrize(("model", "metric"), golden.REMOVED)
def test_protection_gives_the_removed_sets(model: str, metric: str) -> None:
    published = golden.REMOVED[model, metric]
    assert plus(model, metric, len(published)) == published


def test_without_protection_other_blocks_go() -> None:
    for model in ("LLaMA-1-7B", "Llama-2-7B", "Vicuna-7B-v1.3", "Vicuna-13B-v1.3", "CatPPT-base"):
        published = golden.REMOVED[model, "taylor"]
        assert plus(model, "taylor", len(published), protect=False) != published
    for (model, metric), published in golden.REMOVED.items():
        if metric == "ppl":  # the paper protects nothing under PPL, its code does: at these counts it is the same
            assert plus(model, metric, len(published), protect=False) == published
    assert set(golden.ORDERS) == set(golden.REMOVED)


def test_all_but_the_protected() -> None:
    model, count = golden.ALL_BUT_PROTECTED
    assert sorted(plus(model, "ppl", count)) == list(range(4, 30))
    with pytest.raises(BudgetError):
        plus(model, "ppl", count + 1)
