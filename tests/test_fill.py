"""Filled stand-ins: means, least squares of their rank and training, against what hooks see of the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cuts import ADDS, as_data, cut, model_of, moved, repair, rows, see, streams_of, weights
from depthprune.errors import DepthpruneError, OptionError
from depthprune.model import Model
from depthprune.recover.apply import recover
from depthprune.recover.fill import lstsq, mean, mse
from depthprune.recover.normal import RIDGES
from depthprune.recover.pair import join
from depthprune.skip import is_skip
from depthprune.standin import StandIn, parameters, stand_ins

FIT, HELD = rows(20, 16, padding=5), rows(8, 16, seed=1)
TEXT = join(FIT, HELD)
IS_HELD = (torch.arange(28) >= 20)[:, None].expand(TEXT.mask.shape)[TEXT.mask]
CUTS = {"sublayers": ["1.a", "2.m"], "a block": ["1"], "two blocks": ["1", "2"], "first and some": ["0", "2.m", "3.a"]}


def units(model: Model, sort: str) -> list[str]:
    first, last = (s.name for s in model.layout.blocks[0].sublayers)
    return [u.partition(".")[0] + {"": "", "a": f".{first}", "m": f".{last}"}[u.partition(".")[2]] for u in CUTS[sort]]


def real(stream: Tensor) -> Tensor:
    return stream[TEXT.mask].double()


def ends_of(teacher: Model, one: StandIn) -> tuple[int, int]:
    """Before and after which of the eight sublayers a unit is."""
    names = [s.name for s in teacher.layout.blocks[one.unit.block].sublayers]
    first = 2 * one.unit.block + (names.index(one.unit.sublayer) if one.unit.sublayer else 0)
    return first, first + (1 if one.unit.sublayer else 2)


# Biases


@pytest.mark.parametrize("sort", CUTS)
@pytest.mark.parametrize("name", ["llama", "llama_bias", "granite", "gpt2", "opt", "gemma2"])
def test_mean_is_the_mean_update_of_the_dense_unit(name: str, sort: str) -> None:
    teacher = model_of(name)
    model = cut(teacher, *units(teacher, sort), form="bias")
    before = weights(model)
    found = mean(repair(teacher, model, FIT, HELD))
    assert found == {"filled": [str(one.unit) for one in stand_ins(model)]}
    streams = [real(stream) for stream in streams_of(teacher, name, TEXT)]
    want: dict[str, Tensor] = {}
    for one in stand_ins(model):
        start, stop = ends_of(teacher, one)
        update = (streams[stop] - streams[start]).mean(0) / one.scale
        assert update.norm() > 0.05
        want[one.names[0]] = want.get(one.names[0], torch.zeros(32).double()) + update
    assert moved(model, before) == set(want)
    for path, value in want.items():
        torch.testing.assert_close(model.net.get_parameter(path) - before[path], value.float(), rtol=2e-4, atol=2e-5)


def test_the_cases_above_hold_shared_biases_maps_with_a_bias_and_scales() -> None:
    """The twin: what the cases are made for is really in them."""
    shared, own, scaled, skips = False, False, False, False
    for name in ("llama", "granite", "gpt2"):
        teacher = model_of(name)
        for sort in CUTS:
            model = cut(teacher, *units(teacher, sort), form="bias")
            ins = stand_ins(model)
            shared |= len({one.names for one in ins}) < len(ins)
            scaled |= any(abs(one.scale - 0.8) < 1e-3 for one in ins)
            own |= any(bool(model.net.get_parameter(path).any()) for path in parameters(model))
            skips |= any(is_skip(model.net.get_submodule(path.rpartition(".")[0])) for path in parameters(model))
    assert shared and own and scaled and skips


def test_padding_does_not_count_in_means() -> None:
    teacher = model_of("llama")
    filled = []
    for token, counts in ((3, False), (50, False), (50, True)):
        tokens = FIT.tokens.clone()
        tokens[~FIT.mask] = token
        data = as_data(tokens, torch.ones_like(FIT.mask) if counts else FIT.mask)
        model = cut(teacher, "1", form="bias")
        mean(repair(teacher, model, data, HELD))
        filled.append(model.net.get_parameter(parameters(model)[0]))
    torch.testing.assert_close(filled[0], filled[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(filled[0], filled[2], rtol=1e-2, atol=1e-3)


# Least squares


def damped(x: Tensor, ridge: float) -> Tensor:
    return (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)


def reduced(x: Tensor, r: Tensor, ridge: float, rank: int) -> Tensor:
    """The map of a rank that is best on a taller system, where the damping is rows: cut by a full SVD."""
    tall = torch.cat([x, damped(x, ridge)])
    full = torch.linalg.lstsq(tall, torch.cat([r, torch.zeros(x.shape[1], r.shape[1]).double()])).solution
    directions = torch.linalg.svd(tall @ full, full_matrices=False).Vh[:rank]
    return directions.T @ directions @ full.T


def best(x: Tensor, r: Tensor, rank: int) -> Tensor | None:
    errors = {
        ridge: float((r[IS_HELD] - x[IS_HELD] @ reduced(x[~IS_HELD], r[~IS_HELD], ridge, rank).T).square().sum())
        for ridge in RIDGES
    }
    ridge = min(errors, key=lambda ridge: errors[ridge])
    return reduced(x[~IS_HELD], r[~IS_HELD], ridge, rank) if errors[ridge] < float(r[IS_HELD].square().sum()) else None


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("unit", ["1.m", "2.a", "1", "0"])
@pytest.mark.parametrize("name", ["granite", "gpt2"])
def test_lstsq_is_reduced_rank_regression(name: str, unit: str, rank: int) -> None:
    """Of what is missing in the stream after it, on what it is given, both in the cut model."""
    teacher = model_of(name)
    first, last = ADDS[name][0]
    unit = unit.replace(".m", f".{last}").replace(".a", f".{first}")
    model = cut(teacher, unit, form=f"lowrank:{rank}" if rank else "bias")
    (one,) = stand_ins(model)
    before, saw = weights(model), see(model.net, TEXT)
    start, stop = ends_of(teacher, one)
    dense = [real(stream) for stream in streams_of(teacher, name, TEXT)]
    # Up to the unit both are the same model, and the stand-in does nothing yet.
    target, stream = dense[stop], dense[start]
    size = target.square().mean(-1, keepdim=True).rsqrt()
    skip = one.names[0].removesuffix(".down.weight")
    given = real(saw.into(skip)) if rank else torch.ones_like(target[:, :1])
    want = best(size * given, size * (target - stream), rank or 1)
    record = lstsq(repair(teacher, model, FIT, HELD))["maps"]
    assert len(record) == 1 and record[0]["unit"] == str(one.unit)
    if want is None:
        assert "kept" in record[0] and not moved(model, before)
        return
    assert 0 < record[0]["gain"] < 1
    values = [model.net.get_parameter(path).detach().double() for path in one.names]
    if rank:
        assert values[0].shape == (rank, 32) and values[1].shape == (32, rank)
        have = one.scale * values[1] @ values[0]
        assert values[0].norm() == pytest.approx(float(values[1].norm() * one.scale), rel=1e-3)  # evenly shared out
    else:
        have = (one.scale * (values[0] - before[one.names[0]].double()))[:, None]
    assert (have - want).norm() <= 1e-2 * want.norm()
    assert moved(model, before) == set(one.names)


def test_several_stand_ins_each_make_up_for_what_is_left() -> None:
    """The second sees the stream that the first one made; with both the last stream is closer than with one."""
    teacher = model_of("llama")
    want = real(see(teacher.net, TEXT).out("model.layers.3"))

    def gap(form: str, how: Callable[..., Any]) -> float:
        model = cut(teacher, "1", "2.mlp", form=form)
        how(repair(teacher, model, FIT, HELD))
        last = f"model.layers.{len(model.layout.blocks) - 1}"
        return float((real(see(model.net, TEXT).out(last)) - want).square().mean())

    nothing, bias, some, more = (
        gap(form, how)
        for form, how in (("bias", lambda _: None), ("bias", lstsq), ("lowrank:2", lstsq), ("lowrank:8", lstsq))
    )
    assert more < some < bias < nothing


@pytest.mark.parametrize("form", ["bias", "lowrank:3"])
def test_filling_again_starts_from_nothing(form: str) -> None:
    teacher = model_of("llama_bias")
    model = cut(teacher, "1.mlp", "2", form=form)
    lstsq(repair(teacher, model, FIT, HELD))
    once = weights(model)
    lstsq(repair(teacher, model, FIT, HELD))
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-4, atol=1e-5)


def test_what_removes_no_error_is_kept_at_nothing_and_said() -> None:
    teacher = model_of("llama")
    with torch.no_grad():
        teacher.net.model.layers[1].mlp.down_proj.weight.zero_()
    model = cut(teacher, "1.mlp", form="lowrank:2")
    bare = weights(model)
    for how in (lstsq, mse):
        (record,) = how(repair(teacher, model, FIT, HELD))["maps"]
        assert record["kept"].endswith("removes error on the rows held out") and record["unit"] == "1.mlp"
        assert not moved(model, bare)


# Training


@pytest.mark.parametrize("form", ["bias", "lowrank:4"])
def test_mse_lowers_the_error_to_the_dense_update(form: str) -> None:
    teacher = model_of("granite")
    model = cut(teacher, "1.mlp", form=form)
    (one,) = stand_ins(model)
    before = weights(model)
    record = mse(repair(teacher, model, FIT, HELD), epochs=40, rate=1e-2)["maps"][0]
    streams = [real(stream) for stream in streams_of(teacher, "granite", TEXT)]
    update = streams[4] - streams[3]
    values = [model.net.get_parameter(path).detach().double() for path in one.names]
    if form == "bias":
        made = (one.scale * values[0]).expand_as(update)
    else:
        given = real(see(model.net, TEXT).into(one.names[0].removesuffix(".down.weight")))
        made = one.scale * given @ values[0].T @ values[1].T
    for rows_of in (IS_HELD, ~IS_HELD):
        assert (update - made)[rows_of].square().mean() < (0.995 if form == "bias" else 0.97) * update[
            rows_of
        ].square().mean()
    gain = 1 - float((update - made)[IS_HELD].square().mean() / update[IS_HELD].square().mean())
    assert record["gain"] == pytest.approx(gain, abs=1e-3)
    assert moved(model, before) == set(one.names)
    again = cut(teacher, "1.mlp", form=form)
    mse(repair(teacher, again, FIT, HELD), epochs=40, rate=1e-2)
    assert not moved(again, weights(model))


def test_mse_keeps_the_best_epoch_and_none_that_is_worse_than_nothing() -> None:
    teacher = model_of("llama")
    model = cut(teacher, "1.mlp", form="bias")
    before = weights(model)
    record = mse(repair(teacher, model, FIT, HELD), rate=1e3)["maps"][0]
    assert record == {"unit": "1.mlp", "kept": "no epoch removes error on the rows held out"}
    assert not moved(model, before)


# Mistakes


@pytest.mark.parametrize("how", ["mean", "lstsq", "mse", "lm"])
def test_a_cut_without_stand_ins_is_refused(how: str) -> None:
    teacher = model_of("llama")
    with pytest.raises(OptionError, match=r"no stand-in.*drop.*--stand-in"):
        recover(cut(teacher, "1"), teacher, rows(), how)


def test_what_the_ways_cannot_do_is_refused() -> None:
    teacher = model_of("llama")
    low = repair(teacher, cut(teacher, "1", form="lowrank:2"))
    with pytest.raises(OptionError, match="mean fills biases; a low-rank stand-in is filled by lstsq, mse, lm"):
        mean(low)
    for options in ({"epochs": 0}, {"rate": 0.0}, {"rate": -1.0}):
        with pytest.raises(OptionError, match=r"epochs must be at least 1 and the rate above 0"):
            mse(low, **options)


@pytest.mark.parametrize("how", [mean, lstsq])
def test_updates_that_are_not_finite_are_one_line(how: Callable[..., Any]) -> None:
    teacher = model_of("llama")
    model = cut(teacher, "1.mlp", form="bias")
    with torch.no_grad():
        teacher.net.model.layers[1].mlp.down_proj.weight[3, 3] = math.inf
    with pytest.raises(DepthpruneError, match=r"the update of 1\.mlp.* not finite"):
        how(repair(teacher, model))
