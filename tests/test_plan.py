"""The plan: what a file may say, what it may not, and which model it fits."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from depthprune.errors import DepthpruneError, PlanError
from depthprune.plan import Plan, Reference, with_stand_ins
from depthprune.units import parse

STEPS = [{"unit": "2.self_attn", "loss": 2.5, "se": 0.01}, {"unit": "1", "loss": 2.75}, {"unit": "3.mlp", "loss": 3.0}]
PLAN = Plan(
    Reference("some/model", "main", 4, "sha256:" + "ab" * 32),
    parse(["2.self_attn", "1", "3.mlp"]),
    frees={"parameters": 12345, "fraction": 0.25, "kv_bytes_per_token": 64},
    why={"metric": "loss", "select": "greedy", "budget": "25%", "nested": True, "steps": STEPS, "seed": 0},
    made_by={"depthprune": "0.1.0", "torch": "2"},
)
MINIMAL = {"format": 1, "model": {"id": "m"}, "drop": ["1"]}


def test_round_trip(tmp_path: Path) -> None:
    assert PLAN.save(tmp_path / "new" / "plan.json") == tmp_path / "new" / "plan.json"
    again = Plan.load(tmp_path / "new" / "plan.json")
    assert again == PLAN and again.made_by == PLAN.made_by
    assert again.to_json() == PLAN.to_json()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Reference("m"), ()),
        Plan(Reference("m"), parse(["1"])),
        Plan(Reference("m", blocks=0), parse(["decoder.1.mlp", "decoder.1"])),
        Plan(Reference("m"), parse(["1"]), why={"steps": STEPS}),
        Plan(Reference("m"), parse(["1"]), why={"steps": []}),
        Plan(Reference("m"), parse(["1"]), why={"steps": STEPS[:1], "metric": "loss"}),
        Plan(Reference('quotes "and" \\ ümläuts \n'), parse(["1"]), stand_in={"1": "bias"}),
    ],
    ids=["empty", "least", "stack", "only steps", "no steps", "steps first", "odd id"],
)
def test_any_plan_makes_the_round_trip(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["drop"] == [str(unit) for unit in plan.drop]


def test_a_file_has_one_unit_and_one_step_per_line() -> None:
    lines = [line.strip().rstrip(",") for line in PLAN.to_json().splitlines()]
    assert [line for line in lines if line in ('"2.self_attn"', '"1"', '"3.mlp"')] == [
        '"2.self_attn"',
        '"1"',
        '"3.mlp"',
    ]
    assert [json.loads(line) for line in lines if line.startswith('{"unit"')] == STEPS


def test_a_file_is_what_the_design_says() -> None:
    fields = json.loads(PLAN.to_json())
    assert list(fields) == ["format", "model", "drop", "stand_in", "frees", "why", "made_by"]
    assert fields["format"] == 1
    assert fields["model"] == {
        "id": "some/model",
        "revision": "main",
        "blocks": 4,
        "fingerprint": "sha256:" + "ab" * 32,
    }
    assert fields["why"] == PLAN.why and fields["frees"] == PLAN.frees


def test_equality_ignores_who_made_it_and_nothing_else() -> None:
    assert replace(PLAN, made_by={"depthprune": "9"}) == PLAN
    for other in (
        replace(PLAN, drop=PLAN.drop[::-1]),
        replace(PLAN, model=replace(PLAN.model, revision="other")),
        replace(PLAN, why={}),
        replace(PLAN, frees={}),
        replace(PLAN, stand_in={"1": "bias"}),
    ):
        assert other != PLAN


def test_a_hand_written_plan_needs_three_fields() -> None:
    plan = Plan.from_json(json.dumps(MINIMAL))
    assert plan == Plan(Reference("m"), parse(["1"]))
    assert plan.model == Reference("m", None, None, None)
    plan.fits(Reference("anything", "main", 40, "sha256:00"))
    loose = '{"drop": [" 1 ", "0.mlp"], "model": {"id": "m"}, "format": 1, "why": null}'
    assert Plan.from_json(loose).drop == parse(["1", "0.mlp"])


MALFORMED = {
    "nothing": ("", "is not JSON"),
    "cut short": (PLAN.to_json()[:100], "is not JSON"),
    "comma too many": ('{"format": 1,}', "is not JSON"),
    "a list": ("[]", 'it needs "format", "model" and a list "drop"'),
    "a number": ("1", 'it needs "format", "model" and a list "drop"'),
    "null": ("null", 'it needs "format", "model" and a list "drop"'),
    "no drop": ('{"format": 1, "model": {"id": "m"}}', 'it needs "format", "model" and a list "drop"'),
    "text as drop": (MINIMAL | {"drop": "12"}, 'it needs "format", "model" and a list "drop"'),
    "no format": ('{"model": {"id": "m"}, "drop": []}', "has format None; this release reads format 1"),
    "later format": (MINIMAL | {"format": 2}, "has format 2; this release reads format 1"),
    "format as text": (MINIMAL | {"format": "1"}, "has format '1'; this release reads format 1"),
    "no model": ('{"format": 1, "drop": []}', "does not name its model"),
    "model as text": (MINIMAL | {"model": "m"}, "does not name its model"),
    "no id": (MINIMAL | {"model": {"blocks": 4}}, "does not name its model"),
    "id as number": (MINIMAL | {"model": {"id": 4}}, "does not name its model"),
    "more in model": (
        MINIMAL | {"model": {"id": "m", "sha": "1", "layers": 2}},
        "unknown fields in model: layers, sha",
    ),
    "blocks as text": (MINIMAL | {"model": {"id": "m", "blocks": "36"}}, "model.blocks must be a number, not '36'"),
    "blocks as truth": (MINIMAL | {"model": {"id": "m", "blocks": True}}, "model.blocks must be a number, not True"),
    "print as number": (MINIMAL | {"model": {"id": "m", "fingerprint": 1}}, "model.fingerprint must be text, not 1"),
    "revision a list": (MINIMAL | {"model": {"id": "m", "revision": []}}, "model.revision must be text, not []"),
    "number as unit": (MINIMAL | {"drop": [12]}, '"drop" must list units as text'),
    "null as unit": (MINIMAL | {"drop": ["1", None]}, '"drop" must list units as text'),
    "no unit": (MINIMAL | {"drop": ["self_attn"]}, "'self_attn' is no unit"),
    "twice": (MINIMAL | {"drop": ["1", "2", "1"]}, "drops 1 twice"),
    "twice by another spelling": (MINIMAL | {"drop": ["1.mlp", " 01.mlp"]}, "drops 1.mlp twice"),
    "after its block": (MINIMAL | {"drop": ["1", "2", "1.mlp"]}, "drops 1.mlp after its whole block 1"),
    "stand-ins as list": (MINIMAL | {"stand_in": ["1"]}, "stand_in must be an object"),
    "frees as number": (MINIMAL | {"frees": 0.25}, "frees must be an object"),
    "why as text": (MINIMAL | {"why": "because"}, "why must be an object"),
    "steps as text": (MINIMAL | {"why": {"steps": "1"}}, "why.steps must be a list"),
    "made_by as list": (MINIMAL | {"made_by": [1]}, "made_by must be an object"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_plans_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, says = MALFORMED[case]
    (tmp_path / "plan.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path / "plan.json")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_file_is_named_where_it_is_not_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"cannot read the plan .*plan\.json: No such file"):
        Plan.load(file)
    file.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(PlanError, match=r"cannot read the plan .*plan\.json: 'utf-8' codec"):
        Plan.load(file)
    file.write_text("{")
    with pytest.raises(PlanError, match=r"plan\.json is not JSON: .*line 1 column 2"):
        Plan.load(file)
    with pytest.raises(PlanError, match="Is a directory"):
        Plan.load(tmp_path)


def test_a_block_may_go_after_its_sublayers() -> None:
    assert Plan(Reference("m"), parse(["1.mlp", "1"])).drop == parse(["1.mlp", "1"])
    assert Plan(Reference("m"), parse(["1", "decoder.1.mlp"])).describe() == "2 units (1, decoder.1.mlp)"


def test_a_prefix_is_a_plan_with_the_steps_so_far() -> None:
    for count in range(4):
        prefix = PLAN.prefix(count)
        assert prefix.drop == PLAN.drop[:count]
        assert prefix.why["steps"] == STEPS[:count]
        assert prefix.frees == {}  # what it frees was counted for the whole plan
        assert prefix.model == PLAN.model and prefix.why["metric"] == "loss"
        assert Plan.from_json(prefix.to_json()) == prefix
    assert len(PLAN.why["steps"]) == 3  # the whole plan is untouched
    assert Plan.from_json(json.dumps(MINIMAL)).prefix(0).drop == ()


def test_there_is_no_prefix_of_other_plans_or_lengths() -> None:
    for count in (-1, 4):
        with pytest.raises(PlanError, match=f"drops 3 units; it has no prefix of {count}"):
            PLAN.prefix(count)
    with pytest.raises(PlanError, match="not nested"):
        replace(PLAN, why={"nested": False}).prefix(1)


def test_diff_names_what_differs() -> None:
    other = replace(PLAN, drop=parse(["10", "1", "9.mlp", "2.self_attn"]))
    assert PLAN.diff(other) == {"only_here": ["3.mlp"], "only_there": ["9.mlp", "10"], "both": ["1", "2.self_attn"]}
    assert other.diff(PLAN)["only_here"] == ["9.mlp", "10"]
    assert PLAN.diff(PLAN) == {"only_here": [], "only_there": [], "both": ["1", "2.self_attn", "3.mlp"]}


def test_a_plan_fits_its_model_wherever_that_lies() -> None:
    PLAN.fits(PLAN.model)
    PLAN.fits(replace(PLAN.model, id="copy/of/it", revision=None))
    PLAN.fits(Reference("unknown"))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"blocks": 36}, "this plan is for some/model (blocks 4), not for else (blocks 36)"),
        (
            {"fingerprint": "sha256:" + "cd" * 32},
            "this plan is for some/model (fingerprint sha256:abababababab), not for else "
            "(fingerprint sha256:cdcdcdcdcdcd)",
        ),
    ],
)
def test_a_plan_for_another_model_is_refused_with_both_values(other: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        PLAN.fits(replace(PLAN.model, id="else", **other))  # type: ignore[arg-type]
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("stand_in", "says"),
    [
        ({"2.mlp": "bias"}, "the plan has a stand-in for 2.mlp, which it does not drop"),
        ({"0": "bias"}, "the plan has a stand-in for 0, which it does not drop"),
        ({"1.mlp": "bias"}, "the plan has a stand-in for 1.mlp, which it does not drop"),
        ({"one": "bias"}, "'one' is no unit; write a block as '12' or a sublayer as '12.self_attn'"),
        *(
            ({"1": form}, f"{form!r} is no stand-in; write bias, or lowrank:16 for a map of rank 16")
            for form in ("none", "lowrank", "lowrank:0", "lowrank:-1", "lowrank:4.5", "Bias", "", 16, None, ["bias"])
        ),
    ],
)
def test_impossible_stand_ins_are_refused(stand_in: dict[str, str], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        replace(PLAN, stand_in=stand_in)
    assert str(caught.value) == says
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(MINIMAL | {"drop": ["2.self_attn", "1", "3.mlp"], "stand_in": stand_in}))


def test_every_unit_gets_a_stand_in() -> None:
    plan = with_stand_ins(PLAN, "lowrank:4")
    assert plan.stand_in == {"2.self_attn": "lowrank:4", "1": "lowrank:4", "3.mlp": "lowrank:4"}
    assert replace(plan, stand_in={}) == PLAN == with_stand_ins(plan, "none")
    plan.fits(PLAN.model)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match=r"^'zero' is no stand-in; [^\n]*$"):
        with_stand_ins(PLAN, "zero")


def test_a_prefix_keeps_the_stand_ins_of_what_it_drops() -> None:
    assert with_stand_ins(PLAN, "bias").prefix(2).stand_in == {"2.self_attn": "bias", "1": "bias"}
    parts = Plan(Reference("m"), parse(["1.a", "2", "1.b"]), stand_in={"1": "bias", "2": "bias"})
    assert parts.prefix(3) == parts
    assert parts.prefix(2).stand_in == {"2": "bias"}, "a part of block 1 is left"


def test_describe_names_the_first_six() -> None:
    model = Reference("m")
    assert Plan(model, ()).describe() == "nothing"
    assert Plan(model, parse(["7.mlp"])).describe() == "1 unit (7.mlp)"
    assert Plan(model, parse(list("123456"))).describe() == "6 units (1, 2, 3, 4, 5, 6)"
    assert Plan(model, parse(list("1234567"))).describe() == "7 units (1, 2, 3, 4, 5, 6, …)"


def test_a_full_disk_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAN.save(tmp_path / "plan.json")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DepthpruneError, match=r"cannot write .*: No space left on device"):
        PLAN.prefix(1).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
