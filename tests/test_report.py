from __future__ import annotations

import json
import math
import random
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from depthprune.charts import Scale, Score, Step, bars, curve, scale
from depthprune.errors import DepthpruneError, PlanError
from depthprune.report import _environment as environment
from depthprune.report import report
from depthprune.run import show
from depthprune.select.rank import Step as Removal
from depthprune.units import Unit

BLOCKS = 24
BLOCK_SIZE = {"self_attn": 245_760, "mlp": 860_160}
KINDS = {"self_attn": "attention", "mlp": "mlp"}
UNEVEN = [f"{block}.self_attn" for block in (11, 16, 4, 13, 22, 9, 20, 3, 18, 6, 14, 1)]
WHOLE = ["4", "11", "16", "9", "6", "3"]
DIGEST = "sha256:9f2c61d07b5c3f51a2b4b6d2c0f1e8a7d6c5b4a39281706f5e4d3c2b1a09f8e7"


def layout() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in range(BLOCKS):
        found.append({"unit": str(block), "kind": "block", "parameters": sum(BLOCK_SIZE.values())})
        found += [{"unit": f"{block}.{name}", "kind": KINDS[name], "parameters": BLOCK_SIZE[name]} for name in KINDS]
    return found


def scores() -> dict[str, Any]:
    """Scores shaped like those of a real 24-block model: most units cost little, the first MLP is vital."""
    chance = random.Random(0)
    loss = {each["unit"]: 0.006 * math.exp(chance.gauss(0.6, 0.7)) for each in layout()}
    loss |= {"0.mlp": 3.9, "0": 4.31, "23.mlp": 0.15, "23": 0.21, "5.self_attn": 0.107, "7.self_attn": 0.093}
    cosine = {unit: 0.02 + 0.3 * chance.random() for unit in loss if "." not in unit}
    data = {"name": "calibration.txt", "tokens": 32768, "digest": DIGEST}
    measured = {unit: {"score": value, "se": 0.08 * value + 0.0004} for unit, value in loss.items()}
    return {
        "format": 1,
        "model": {"id": "books-24l", "blocks": BLOCKS},
        "layout": layout(),
        "protected": ["0.self_attn"],
        "metrics": {
            "cosine": {"data": data, "units": {unit: {"score": value} for unit, value in cosine.items()}},
            "loss": {"data": data, "dense": {"loss": 3.3612}, "units": measured},
        },
    }


def plan(drop: list[str], **why: Any) -> dict[str, Any]:
    steps, loss = [], 3.3612
    for index, unit in enumerate(drop):
        loss += 0.006 + 0.0016 * index
        steps.append({"unit": unit, "loss": loss, "se": 0.0008 + 0.0003 * index})
    return {
        "format": 1,
        "model": {"id": "books-24l", "revision": "main", "blocks": BLOCKS, "fingerprint": "sha256:0d4e" + "7a" * 30},
        "drop": drop,
        "stand_in": {},
        "frees": {"parameters": 2_949_120, "fraction": 0.111, "kv_bytes_per_token": 3072},
        "why": {
            "metric": "loss",
            "select": "greedy",
            "budget": f"{len(drop)} units",
            "nested": True,
            "evaluations": 97,
            "steps": steps,
            "data": {"name": "calibration.txt", "tokens": 32768, "digest": DIGEST},
            "seed": 0,
            "recipe": None,
        }
        | why,
        "made_by": {"depthprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }


def evaluation(pruned: float = 36.04, **changes: Any) -> dict[str, Any]:
    dense = {"name": "dense", "path": "books-24l", "perplexity": 30.45, "loss": math.log(30.45)}
    result = {"name": "pruned", "path": "model", "perplexity": pruned, "loss": math.log(pruned)}
    dense |= {"parameters": 29_165_120, "bytes": 58_330_240, "kv_bytes_per_token": 6144}
    result |= {"parameters": 26_216_000, "bytes": 52_432_000, "kv_bytes_per_token": 3072}
    return {
        "format": 1,
        "text": {"name": "test.txt", "tokens": 65536, "digest": "sha256:" + "3b" * 32},
        "window": 512,
        "stride": 512,
        "overlap": 0.0,
        "models": [dense, result],
    } | changes


def unmeasurable() -> dict[str, Any]:
    """An evaluation of a model that gives no numbers, as ``write_json`` writes it."""
    told = evaluation()
    told["models"][1] |= {"perplexity": None, "loss": None}
    return told


def timing(prefill: float = 151.3, decode: float = 8.41) -> dict[str, Any]:
    def entry(name: str, first: float, each: float, size: int) -> dict[str, Any]:
        return {
            "name": name, "prefill_ms": first, "prefill_ms_min": first * 0.98, "prefill_ms_max": first * 1.07,
            "decode_ms_per_token": each, "decode_ms_per_token_min": each * 0.97, "decode_ms_per_token_max": each * 1.1,
            "decode_tokens_per_second": 1000 / each, "bytes_per_step": size, "share_of_copy_bandwidth": 0.62,
            "peak_bytes": None,
        }  # fmt: skip

    head = {"format": 1, "device": "cpu", "dtype": "float32", "batch": 1, "prompt": 256, "new": 32, "repeats": 5}
    models = [entry("dense", 181.9, 10.32, 117_800_000), entry("pruned", prefill, decode, 105_400_000)]
    return head | {"seed": 0, "models": models}


def checks(failed: str = "") -> dict[str, Any]:
    details = {
        "names and shapes": "186 tensors, as the config asks for",
        "reload in a fresh process": "0 missing, 0 unexpected keys",
        "equal logits": "largest difference 0.0",
        "cached decoding": "largest difference 3.1e-06, intact model 2.9e-06",
    }
    proofs = [{"name": name, "passed": name != failed, "detail": detail} for name, detail in details.items()]
    return {"format": 1, "passed": not failed, "proofs": proofs}


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def config(folder: Path, **fields: Any) -> None:
    write(folder / "model", config={"architectures": ["LlamaForCausalLM"]} | fields)


def uneven(folder: Path) -> Path:
    steps = plan(UNEVEN)["why"]["steps"]
    steps[3]["ties"], steps[5]["ties"] = ["22.self_attn"], ["20.self_attn", "3.self_attn"]
    config(folder, auto_map={"AutoModelForCausalLM": "modeling.X"})
    return write(
        folder, plan=plan(UNEVEN, steps=steps, budget="12 attention"), scores=scores(), eval=evaluation(),
        bench=timing(), check=checks(), run={"command": ["depthprune", "prune", "books-24l", "--drop", "12 attention"]},
    )  # fmt: skip


def whole(folder: Path) -> Path:
    config(folder)
    made = plan(WHOLE, budget="25%")
    made["frees"] = {"parameters": 6_635_520, "fraction": 0.25, "kv_bytes_per_token": 1536}
    told = evaluation(35.91)
    told["models"][1] |= {"parameters": 22_529_600, "bytes": 45_059_200, "kv_bytes_per_token": 4608}
    return write(folder, plan=made, scores=scores(), eval=told, bench=timing(138.2, 7.71), check=checks())


def minimal_plan() -> dict[str, Any]:
    return {"format": 1, "model": {"id": "some/model"}, "drop": ["7", "3.mlp"]}


def minimal(folder: Path) -> Path:
    return write(folder, plan=minimal_plan())


class Page(HTMLParser):
    """The page as a reader of HTML sees it: every start tag with its attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def having(self, attribute: str) -> list[dict[str, str]]:
        return [found for _, found in self.tags if attribute in found]

    @property
    def warnings(self) -> int:
        return sum(found.get("class") == "warning" for _, found in self.tags)


def page(folder: Path) -> Page:
    return Page(report(folder))


def test_every_scored_unit_is_in_the_charts_with_its_score_and_state(tmp_path: Path) -> None:
    shown = page(uneven(tmp_path)).having("data-unit")
    expected = []
    for metric in ("loss", "cosine"):  # the metric of the plan comes first
        for unit, entry in scores()["metrics"][metric]["units"].items():
            state = "dropped" if unit in UNEVEN else "protected" if unit == "0.self_attn" else "kept"
            expected.append((unit, entry["score"], state))
    got = [(mark["data-unit"], float(mark["data-score"]), mark["data-state"]) for mark in shown]
    assert sorted(got) == sorted(expected)


def test_dropped_units_are_marked_by_more_than_colour(tmp_path: Path) -> None:
    found = page(uneven(tmp_path))
    crosses = found.source.count('<path class="cross" d="M') - found.source.count(
        'aria-hidden="true"><rect class="dropped"'
    )
    assert crosses == len(UNEVEN)
    assert "fill: url(#hatch)" in found.source and 'id="hatch"' in found.source
    for unit in UNEVEN:
        assert f"<title>{unit}: " in found.source


def test_a_dropped_block_drops_its_sublayers(tmp_path: Path) -> None:
    found = page(whole(tmp_path))
    states = {mark["data-unit"]: mark["data-state"] for mark in found.having("data-unit")}
    assert {unit for unit, state in states.items() if state == "dropped"} == {
        name for block in WHOLE for name in (block, f"{block}.self_attn", f"{block}.mlp")
    }
    assert "Cut: 6 of 24 blocks ." in found.text


def test_the_share_removed_is_of_the_parameters_in_the_blocks(tmp_path: Path) -> None:
    assert "25.0 % of the parameters in the blocks, 6 units" in page(whole(tmp_path)).text
    (tmp_path / "scores.json").unlink()
    assert "6 units 6.64 M parameters" in page(tmp_path).text


def test_a_block_without_sublayers_counts_as_a_block(tmp_path: Path) -> None:
    made = plan(["4.self_attn", "4.mlp", "9.mlp"])
    found = page(write(tmp_path, plan=made, scores=scores()))
    assert "Cut: 1 of 24 blocks and 1 of 24 MLP sublayers ." in found.text
    states = {mark["data-unit"]: mark["data-state"] for mark in found.having("data-unit")}
    assert states["4"] == "dropped" and states["9"] == "kept"


def test_the_strip_has_one_cell_for_each_sublayer_in_execution_order(tmp_path: Path) -> None:
    cells = page(uneven(tmp_path)).having("data-cell")
    assert [cell["data-cell"] for cell in cells] == [each["unit"] for each in layout() if each["kind"] != "block"]
    assert {cell["data-cell"] for cell in cells if cell["class"] == "cell dropped"} == set(UNEVEN)
    assert [cell["data-cell"] for cell in cells if cell["class"] == "cell protected"] == ["0.self_attn"]


def test_without_layout_the_strip_has_blocks(tmp_path: Path) -> None:
    made = {"format": 1, "model": {"id": "x", "blocks": 5}, "drop": ["3", "1.mlp"]}
    cells = [(cell["data-cell"], cell["class"]) for cell in page(write(tmp_path, plan=made)).having("data-cell")]
    assert cells == [
        ("0", "cell kept"), ("1.mlp", "cell dropped"), ("the rest of block 1", "cell kept"), ("2", "cell kept"),
        ("3", "cell dropped"), ("4", "cell kept"),
    ]  # fmt: skip


def test_figures_equal_the_json(tmp_path: Path) -> None:
    found = page(uneven(tmp_path))
    values = [float(data["value"]) for data in found.having("value")]
    expected = []
    for file, keys in (
        (evaluation(), ("perplexity", "loss", "parameters", "bytes", "kv_bytes_per_token")),
        (timing(), ("prefill_ms", "decode_ms_per_token", "decode_tokens_per_second", "bytes_per_step")),
        (timing(), ("share_of_copy_bandwidth",)),
    ):
        expected += [float(model[key]) for key in keys for model in file["models"]]
    assert values == expected
    assert "perplexity went from 30.45 to 36.04 (×1.18)" in found.text.replace(" ( ", " (")  # noqa: RUF001
    assert "29.2 M → 26.2 M" in found.text and "58.3 MB → 52.4 MB" in found.text and "6.14 kB → 3.07 kB" in found.text
    assert "−50.0 %" in found.text  # noqa: RUF001
    assert "loads and runs : all 4 proofs held" in found.text


def test_steps_show_loss_rise_and_ties(tmp_path: Path) -> None:
    found = page(uneven(tmp_path))
    rows = [row["data-step"] for tag, row in found.tags if tag == "tr" and "data-step" in row]
    assert rows == UNEVEN
    points = [point["data-step"] for tag, point in found.tags if tag == "g" and "data-step" in point]
    assert points == ["intact", *UNEVEN]
    assert "3.3672 +0.0060 0.0008" in found.text and "3.3748 +0.0076 0.0011" in found.text
    assert "2 of the 12 choices were ties" in found.text and found.warnings == 1
    assert "20.self_attn, 3.self_attn" in found.text


def test_steps_are_read_as_the_selectors_write_them(tmp_path: Path) -> None:
    written = [
        Removal(Unit("", 4), loss=3.4, error=0.002, ties=(Unit("", 5), Unit("", 7))).to_json(),
        Removal(Unit("", 5), score=0.125).to_json(),
    ]
    made = {"format": 1, "model": {"id": "x", "blocks": 9}, "drop": ["4", "5"], "why": {"steps": written}}
    found = page(write(tmp_path, plan=made))
    assert "1 of the 2 choices was a tie" in found.text and "5, 7" in found.text and "0.125" in found.text


def test_the_intact_point_needs_the_same_text(tmp_path: Path) -> None:
    other = scores()
    other["metrics"]["loss"]["data"]["digest"] = "sha256:another"
    found = page(write(tmp_path, plan=plan(UNEVEN), scores=other))
    assert "intact" not in [point["data-step"] for point in found.having("data-step")]


def test_missing_files_are_said_to_be_missing(tmp_path: Path) -> None:
    found = page(minimal(tmp_path))
    for sentence in (
        "Cut: 1 block and 1 sublayer .",
        "What that costs in perplexity was not measured.",
        "Whether it loads was not checked.",
        "Quality and size were not measured: this run has no eval.json",
        "Speed and memory were not measured: this run has no bench.json",
        "The importance of the units was not measured: this run has no scores.json",
        "The loss after each removal was not measured",
        "Not checked: this run has no check.json",
        "This run has no model folder yet",
        "only the removed units can be listed",
    ):
        assert sentence in found.text, sentence
    assert [row["data-step"] for row in found.having("data-step")] == ["7", "3.mlp"]
    full = page(whole(tmp_path / "full")).text
    assert "not measured" not in full and "not checked" not in full and "this run has no" not in full


@pytest.mark.parametrize("gone", ["scores", "eval", "bench", "check"])
def test_each_file_may_be_missing(tmp_path: Path, gone: str) -> None:
    (uneven(tmp_path) / f"{gone}.json").unlink()
    assert f"no {gone}.json" in page(tmp_path).text


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    made = plan(UNEVEN, recipe=evil)
    made["model"]["id"] = evil
    told = evaluation()
    told["models"][0]["name"] = told["text"]["name"] = evil
    failing = checks("equal logits")
    failing["proofs"][0]["detail"] = evil
    measured = scores()
    measured["metrics"][evil] = measured["metrics"].pop("cosine")
    files = {"scores": measured, "bench": timing(), "check": failing, "run": {"command": evil}}
    found = page(write(tmp_path, plan=made, eval=told, **files))
    assert "<script" not in found.source.lower()
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert found.text.count(evil) >= 7


def test_without_escaping_a_name_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = environment()
    planted.autoescape = False
    monkeypatch.setattr(sys.modules["depthprune.report"], "_environment", lambda: planted)
    made = minimal_plan() | {"model": {"id": "<script>alert(1)</script>"}}
    assert "script" in [tag for tag, _ in page(write(tmp_path, plan=made)).tags]


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    for make in (uneven, whole, minimal):
        found = page(make(tmp_path / make.__name__))
        assert not [tag for tag, _ in found.tags if tag in ("script", "img", "iframe", "object", "embed", "base")]
        links = [value for _, tag in found.tags for name, value in tag.items() if name in ("src", "href", "srcset")]
        assert links == ["data:,"]
        for sign in ("http:", "https:", "@import", "url(//"):
            assert sign not in found.source
        assert found.source.count("url(") == found.source.count("url(#hatch)")
        assert "default-src 'none'" in found.source


def test_the_page_stays_small_for_deep_models(tmp_path: Path) -> None:
    units = [f"{block}.{name}" for block in range(160) for name in KINDS] + [str(block) for block in range(160)]
    measured = {unit: {"score": 0.1234567890123 * index, "se": 0.0123456789} for index, unit in enumerate(units)}
    metrics = {name: {"units": measured} for name in ("loss", "cosine", "taylor")}
    wide = [{"unit": unit, "kind": KINDS.get(unit.partition(".")[2], "block")} for unit in sorted(units)]
    deep = {"format": 1, "model": {"id": "x", "blocks": 160}, "layout": wide, "protected": [], "metrics": metrics}
    made = page(write(tmp_path, plan=plan(units[:80]), scores=deep))
    assert len(made.having("data-unit")) == 3 * len(units)
    assert len(made.source.encode()) < 1_000_000


def test_a_clean_run_has_no_warnings_but_the_standing_one(tmp_path: Path) -> None:
    found = page(whole(tmp_path))
    assert found.warnings == 0 and "Before you ship it" in found.text
    assert "Perplexity says little about skills such as arithmetic" in found.text


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"eval": evaluation(46.5)}, "Perplexity is 1.53 times that of the intact model."),
        ({"eval": evaluation(math.inf)}, "Perplexity is inf times"),
        ({"eval": evaluation(math.nan)}, "Perplexity is nan times"),
        ({"eval": unmeasurable()}, "The perplexity of the pruned model is not a number"),
        ({"check": checks("equal logits")}, "The check “equal logits” failed: largest difference 0.0."),
        ({"check": {"format": 1, "passed": False}}, "The check failed."),
        ({"eval": evaluation(overlap=0.25)}, "25 % of the evaluation text also occurs in the calibration text"),
        ({"eval": evaluation(text={"digest": DIGEST})}, "The evaluation text is the calibration text"),
        ({"bench": timing(prefill=182.0)}, "Prefill got slower, not faster: 181.9 ms before, 182.0 ms after."),
        ({"bench": timing(decode=12.0)}, "Decoding got slower, not faster: 10.32 ms before, 12.00 ms after."),
        ({"plan": plan(WHOLE, steps=[{"unit": "4", "loss": 3.4, "ties": ["5"]}])}, "1 of the 1 choices was a tie"),
    ],
)
def test_warnings(tmp_path: Path, files: dict[str, Any], sentence: str) -> None:
    found = page(write(whole(tmp_path), **files))
    assert sentence in found.text and found.warnings == 1 and "Read this first" in found.text


def test_a_ratio_at_the_limit_and_a_chance_overlap_do_not_warn(tmp_path: Path) -> None:
    assert page(write(whole(tmp_path), eval=evaluation(30.45 * 1.5, overlap=0.01))).warnings == 0


def test_a_failed_proof_wins_over_a_passed_flag(tmp_path: Path) -> None:
    lying = checks("equal logits") | {"passed": True}
    found = page(write(whole(tmp_path), check=lying))
    assert "failed its check : do not deploy it." in found.text and "3 of 4 proofs held" in found.text


def test_how_to_load(tmp_path: Path) -> None:
    even = page(whole(tmp_path / "even")).text
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'even' / 'model'}')" in even
    assert "trust_remote_code" not in even and "import depthprune" not in even
    coded = page(uneven(tmp_path / "coded"))
    assert "/model', trust_remote_code=True)" in coded.text
    config(tmp_path / "coded")  # the same without code in the folder
    assert "import depthprune #" in page(tmp_path / "coded").text
    config(tmp_path / "coded", architectures=["BertModel"])
    assert "AutoModel.from_pretrained" in page(tmp_path / "coded").text
    assert "depthprune drop books-24l" in coded.text


@pytest.mark.parametrize("model", ["/models/books-24l/", "../books-24l", "./my models/books-24l"])
def test_a_folder_is_named_by_its_name_but_replayed_by_its_place(model: str, tmp_path: Path) -> None:
    made = plan(WHOLE)
    made["model"]["id"] = model
    found = page(write(tmp_path, plan=made)).text
    assert "books-24l, made shallower" in found and f"{model}, made shallower" not in found
    line = next(line for line in found.splitlines() if "depthprune drop" in line)
    words = shlex.split(line[line.index("depthprune drop") :])
    assert words[:5] == ["depthprune", "drop", model, str(tmp_path / "plan.json"), "--out"]


def test_the_command_line_and_provenance_are_shown(tmp_path: Path) -> None:
    found = page(uneven(tmp_path)).text
    for piece in (
        "depthprune prune books-24l --drop '12 attention'",
        DIGEST,
        "calibration.txt",
        "5.23.0",
        "sha256:0d4e",
    ):
        assert piece in found


def test_unusual_numbers_do_not_break_the_charts(tmp_path: Path) -> None:
    odd = scores()
    units = odd["metrics"]["loss"]["units"]
    units["5"] = {"score": math.inf, "se": math.nan}
    units["6"] = {"score": math.nan}
    units["7"] = {"score": -0.004}
    made = plan(WHOLE)
    made["why"]["steps"][2] |= {"loss": math.inf, "se": math.nan}
    found = page(write(tmp_path, plan=made, scores=odd))
    assert {mark["data-unit"] for mark in found.having("data-unit")} >= {"5", "6", "7"}
    places = [
        tag[name] for _, tag in found.tags for name in ("x", "y", "width", "height", "cx", "cy", "y1") if name in tag
    ]
    assert len(places) > 200 and all(math.isfinite(float(place)) for place in places)
    assert "nan" not in "".join(tag.get("d", "") + tag.get("points", "") for _, tag in found.tags)
    assert "16" not in [point["data-step"] for tag, point in found.tags if tag == "g" and "data-step" in point]


def test_steps_may_name_sublayers_of_a_block_that_went_whole(tmp_path: Path) -> None:
    steps = [{"unit": "1.mlp", "loss": 3.0}, {"unit": "1.self_attn", "loss": 3.1}]
    made = {"format": 1, "model": {"id": "x", "blocks": 3}, "drop": ["1"], "why": {"steps": steps}}
    found = page(write(tmp_path, plan=made))
    cells = [(cell["data-cell"], cell["class"]) for cell in found.having("data-cell")]
    assert cells == [("0", "cell kept"), ("1", "cell dropped"), ("2", "cell kept")]
    assert "Cut: 1 of 3 blocks ." in found.text


def test_encoder_decoders_keep_their_stacks_apart(tmp_path: Path) -> None:
    units = [f"encoder.{block}.attention" for block in range(2)] + [f"decoder.{block}.cross" for block in range(2)]
    kinds = ["attention"] * 2 + ["cross_attention"] * 2
    table = [{"unit": unit, "kind": kind} for unit, kind in zip(units, kinds, strict=True)]
    metrics = {"loss": {"units": {unit: {"score": 0.1} for unit in units}}}
    measured = {"format": 1, "layout": table, "protected": [], "metrics": metrics}
    made = {"format": 1, "model": {"id": "t5", "blocks": 2}, "drop": ["decoder.1.cross"]}
    found = page(write(tmp_path, plan=made, scores=measured))
    assert [cell["data-cell"] for cell in found.having("data-cell")] == units
    assert {mark["data-unit"] for mark in found.having("data-unit")} == set(units)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"plan\.json does not exist"),
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"format": 2, "drop": []}', "format 2 is not 1"),
        ('{"format": 1}', "'drop' is missing"),
        ('{"format": 1, "drop": "7"}', "'drop' must be a list of units"),
        ('{"format": 1, "drop": [7]}', "'drop' must be a list of units"),
        ('{"format": 1, "drop": ["x y"]}', "'x y' is no unit"),
        (
            '{"format": 1, "drop": [], "why": {"steps": [{"unit": "1", "loss": "high"}]}}',
            r"steps\[0\]: 'loss' must be a num",
        ),
    ],
)
def test_a_damaged_plan_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["scores", "eval", "bench", "check", "run", "model/config"])
def test_other_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    (whole(tmp_path) / f"{name}.json").write_text('{"models": [')
    with pytest.raises(DepthpruneError, match=rf"{name}\.json cannot be read"):
        report(tmp_path)


def test_a_wrong_field_names_file_and_field(tmp_path: Path) -> None:
    told = evaluation()
    told["models"][1]["perplexity"] = "36"
    with pytest.raises(DepthpruneError, match=r"eval\.json, models\[1\]: 'perplexity' must be a number, not \"36\""):
        report(write(whole(tmp_path), eval=told))


def test_a_failing_report_leaves_the_last_one_and_no_rest(tmp_path: Path) -> None:
    before = page(whole(tmp_path)).source
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(DepthpruneError):
        report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    assert page(whole(tmp_path)).source == page(tmp_path).source


def test_importing_it_needs_no_torch() -> None:
    code = "import sys, depthprune.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_linear_bars_have_heights_in_proportion() -> None:
    made = bars([Score(Unit("", block), "block", "kept", block / 10) for block in range(1, 5)], ["block"], places(1, 5))
    (panel,) = made.panels
    heights = [mark.height for mark in panel.marks]
    assert made.threshold == 0 and [height / heights[0] for height in heights] == pytest.approx([1, 2, 3, 4])
    assert all(mark.y + mark.height == pytest.approx(panel.zero) for mark in panel.marks)
    assert [float(tick.text) for tick in panel.ticks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_a_giant_bends_the_scale_and_nothing_else_does() -> None:
    small = [0.01, 0.012, 0.015, 0.02, 0.03]
    assert scale(small).threshold == 0 and scale([*small, 0.2]).threshold == 0
    bent = scale([*small, 3.9])
    assert bent.threshold == 0.01
    top = [bent.place(value, 0, 100) for value in (0, 0.01, 0.03, 3.9)]
    assert top == pytest.approx(
        [100 - 100 * math.log10(1 + value / 0.01) / math.log10(391) for value in (0, 0.01, 0.03, 3.9)]
    )
    assert [tick.text for tick in bent.ticks(0, 200)] == ["0", "0.01", "0.1", "1"]
    assert [tick.text for tick in bent.ticks(0, 100)] == ["0", "0.1", "1"]  # labels never overlap


def test_negative_scores_hang_below_zero() -> None:
    values = [-0.5, 0.5]
    panel = bars(
        [Score(Unit("", i), "mlp", "kept", value) for i, value in enumerate(values)], ["mlp"], places(0, 2)
    ).panels[0]
    below, above = panel.marks
    assert below.y == pytest.approx(panel.zero) == pytest.approx(above.y + above.height)
    assert scale([0.0, 0.0]).high == 1.0


def test_two_units_of_a_kind_share_a_column() -> None:
    twins = [Score(Unit("", 0, name), "mlp", "kept", 1.0) for name in ("mlp", "moe")]
    first, second = bars(twins, ["mlp"], places(0, 1)).panels[0].marks
    assert first.x + first.width == pytest.approx(second.x)


def test_the_curve_rises_with_the_loss_and_labels_perplexity() -> None:
    made = curve([Step("intact", 3.0), Step("4", 3.1, 0.02), Step("9", 3.3)])
    assert made.points[0].y > made.points[1].y > made.points[2].y
    step = made.points[1]
    assert step.low - step.y == pytest.approx(step.y - step.high) and step.low - step.high > 0
    assert step.low - step.high == pytest.approx(0.08 * (made.points[0].y - made.points[2].y) / 0.3)
    for loss, perplexity in zip(made.losses, made.perplexities, strict=True):
        assert float(perplexity.text) == pytest.approx(math.exp(float(loss.text)), rel=1e-3)
    assert len(curve([Step("4", 3.0)]).points) == 1


def test_values_beyond_the_scale_stay_on_the_page() -> None:
    axis = Scale(0, 1)
    assert [axis.place(value, 10, 20) for value in (-5, math.inf, 0.5)] == [20, 10, 15]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (7_900_000, "count", "7.90 M"), (8_190_735_360, "count", "8.19 B"), (15_800_000, "bytes", "15.8 MB"),
        (4096, "bytes", "4.10 kB"), (512, "bytes", "512 B"), (38.9, "", "38.90"), (1234.5, "ms", "1234 ms"),
        (0.62, "share", "62 %"), (math.inf, "", "inf"), (None, "ms", "not measured"), (123456.0, "", "1.235e+05"),
    ],
)  # fmt: skip
def test_numbers_as_shown(value: float | None, unit: str, text: str) -> None:
    assert show(value, unit) == text


def places(first: int, last: int) -> list[tuple[str, int]]:
    return [("", block) for block in range(first, last)]
