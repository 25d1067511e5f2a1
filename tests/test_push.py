"""Uploading a folder: what arrives at the Hub, what its card says and does not say, and what is said when it fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import broken
from command import run
from depthprune import hub, options
from depthprune.errors import CheckpointError, DepthpruneError, ExportError
from depthprune.export import export
from depthprune.export.card import WARNING, card, license_of, on_hub, public, scrubbed
from depthprune.export.push import places, push
from depthprune.model import Model
from depthprune.plan import Plan, Reference
from depthprune.surgery import drop
from depthprune.units import parse
from hub_server import READER, TOKEN, Hub, served

PATH = "/srv/ann/models/dense-1b"  # of a machine that is none of the reader's business
EVAL = {
    "text": {"name": "/srv/ann/held-out.txt", "tokens": 4000},
    "models": [
        {"name": "dense", "path": PATH, "perplexity": 12.3456, "parameters": 1000000, "kv_bytes_per_token": 4096},
        {"name": "pruned", "path": "model", "perplexity": 15.0, "parameters": 750000, "kv_bytes_per_token": 2048},
    ],
}
BENCH = {"models": [{"name": "dense", "decode_ms_per_token": 2.0}, {"name": "pruned", "decode_ms_per_token": 1.5}]}
PASSED = {"passed": True, "proofs": [{"name": "loads with plain transformers", "passed": True, "detail": ""}]}


@pytest.fixture
def made(subject: Callable[..., Model], tmp_path: Path) -> Callable[..., Path]:
    """A run folder with a model that was cut, the dense one named as told."""

    def make(*units: str, base: str = "org/dense-1b", name: str = "run") -> Path:
        model = subject("llama")
        why = {"metric": "loss", "select": "greedy", "budget": "25%", "seed": 0}
        why |= {"data": {"name": "/srv/ann/calibration.txt", "tokens": 262144, "sources": [{"path": f"{PATH}.txt"}]}}
        plan = Plan(Reference(base, None, 4), parse(units), frees={"fraction": 0.25, "parameters": 250000}, why=why)
        cut = drop(model, replace(plan, model=model.reference))
        run = tmp_path / name
        export(replace(cut, plan=plan), run / "model")
        for file, value in {"run": {}, "eval": EVAL, "bench": BENCH, "check": PASSED}.items():
            (run / f"{file}.json").write_text(json.dumps(value))
        return run

    return make


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with no proxies before it, no other token, and uploads by the older protocol."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.answers.cache_clear()
    with served() as found:
        yield found
    hub.answers.cache_clear()


def body(text: str) -> str:
    return text.split("---", 2)[2]


def test_a_folder_arrives_with_its_card(made: Callable[..., Path], there: Hub) -> None:
    there.licenses["org/dense-1b"] = "apache-2.0"
    run = made("1", "3")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    where = push(run / "model", "ann/shallow", endpoint=there.address, token=TOKEN)
    assert where == f"{there.address}/ann/shallow"
    files = there.files["ann/shallow", "main"]
    assert sorted(files) == ["README.md", "config.json", "generation_config.json", "model.safetensors", "plan.json"]
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert there.messages == ["Upload run, pruned with depthprune"] and there.repositories == {"ann/shallow": False}
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before, "the folder is left alone"
    text = files["README.md"].decode()
    assert "\n# shallow\n" in text and 'from_pretrained("ann/shallow")' in text and "REPO" not in text
    data = ModelCard(text).data
    assert data.base_model == "org/dense-1b" and data.license == "apache-2.0" and data.library_name == "transformers"
    assert data.tags == ["depth-pruning", "depthprune"] and data.pipeline_tag == "text-generation"


def test_the_card_says_what_was_cut_what_it_cost_and_how_to_load_it(made: Callable[..., Path]) -> None:
    run = made("1", "3")
    text = body(card(run / "model", run=run))
    for part in (
        "# run\n",
        "[org/dense-1b](https://huggingface.co/org/dense-1b) with layers taken out",
        "Gone: 2 of 4 blocks, which frees 25.0% of the parameters of the blocks.",
        "(from 0): `1`, `3`.",
        "metric `loss`, select `greedy`, budget `25%`, on `calibration.txt`, 262,144 tokens",
        "| Perplexity | 12.35 | 15 |",
        "| Parameters | 1,000,000 | 750,000 |",
        "| Decoding, ms a token | 2 | 1.5 |",
        "Perplexity on `held-out.txt`, 4,000 tokens.",
        "Proven when it was written: loads with plain transformers.",
        'AutoModelForCausalLM.from_pretrained("REPO")',
        WARNING,
    ):
        assert part in text, part
    assert "trust_remote_code" not in text and "recovered" not in text
    alone = body(card(run / "model"))
    assert "12.35" not in alone and "Proven" not in alone and "# model\n" in alone


def test_an_uneven_folder_says_how_to_load_it(made: Callable[..., Path]) -> None:
    text = card(made("1.self_attn", "2.mlp", "3") / "model")
    assert "Gone: 1 `self_attn`, 1 `mlp`, 1 of 4 block," in text
    assert 'from_pretrained("REPO", trust_remote_code=True)' in text and "import depthprune\nfrom transformers" in text


def test_folders_that_are_not_shallower_say_what_they_are(made: Callable[..., Path]) -> None:
    folder = made("1") / "model"
    assert "the same architecture, shallower" in card(folder) and "which frees 25.0%" in card(folder)
    (folder / "quantization.json").write_text(
        json.dumps({"how": "w4a16", "weights": "int4", "made_by": {"llmcompressor": "0.14"}})
    )
    broken.configure(folder, quantization_config={"quant_method": "compressed-tensors"})
    text = card(folder)
    assert "quantized afterwards (`w4a16`: int4; llmcompressor 0.14)" in text and "nothing else is needed" not in text
    assert "needs the library for compressed-tensors weights" in text
    fields = json.loads((folder / "plan.json").read_text())
    fields["why"]["form"] = "zeroed"
    (folder / "plan.json").write_text(json.dumps(fields))
    text = card(folder)
    assert "layers set to zero" in text and "shallower" not in text and "frees" not in text
    assert "shallower" not in card(made("1.mlp", name="uneven") / "model")


def test_sources_keep_the_last_part_of_their_paths() -> None:
    """Where a field is known to be a path, blanks and relative folders are no hiding place."""
    given = ["/srv/Ann Smith/cal.txt", "projects/secret/cal.txt", "task:/srv/ann smith/x.jsonl", "~nobody-here/y.txt"]
    clean = scrubbed({"sources": [{"path": path, "weight": 1.0} for path in given]})
    assert [source["path"] for source in clean["sources"]] == ["cal.txt", "cal.txt", "task:x.jsonl", "y.txt"]
    assert scrubbed("~nobody-here/y.txt") == "y.txt", "a home that is nobody's is no error"


def test_a_file_of_llama_cpp_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "load", lambda *_: pytest.fail("loaded"))
    words = ("--form", "gguf", "--push-to-hub", "shallow", "--out", "out")
    for command in (("export", "cut"), ("prune", "model", "--data", "text.txt", "--drop", "1 block")):
        done = run(*command, *words)
        assert done.code == 2 and done.error.startswith("--push-to-hub uploads folders that transformers loads; for a")


def test_recovery_is_said(made: Callable[..., Path]) -> None:
    folder = made("1") / "model"
    stages = [{"how": "refit"}, {"how": "lora", "undone": "the loss was higher"}]
    (folder / "recovery.json").write_text(json.dumps({"stages": stages}))
    assert "recovered after the cut, by `refit`: see" in card(folder)
    (folder / "recovery.json").write_text(json.dumps({"stages": stages[1:]}))
    assert "recovered" not in card(folder)


def test_no_path_of_a_machine_leaves_it(made: Callable[..., Path], there: Hub) -> None:
    run = made("1", base=PATH)
    (run / "model" / "recovery.json").write_text(
        json.dumps({"stages": [{"how": "refit", "note": f"read data:{PATH}/x.txt and C:\\Users\\ann\\y.txt"}]})
    )
    broken.configure(run / "model", _name_or_path=PATH)
    assert "srv" in (run / "model" / "plan.json").read_text(), "else this test shows nothing"
    push(run, "shallow", endpoint=there.address, token=TOKEN)
    files = there.files["ann/shallow", "main"]
    for name in ("README.md", "plan.json", "recovery.json", "config.json"):
        assert not re.search(r"srv|Users|ann[/\\](?!shallow)", files[name].decode()), (name, files[name].decode())
    plan = Plan.from_json(files["plan.json"].decode())
    assert plan.model.id == "dense-1b" and plan.drop == Plan.load(run / "model" / "plan.json").drop
    text = files["README.md"].decode()
    assert "base_model" not in text and "`dense-1b` with layers taken out" in text
    assert json.loads(files["config.json"])["_name_or_path"] == "dense-1b"


def test_a_readme_that_somebody_wrote_stays(made: Callable[..., Path], there: Hub) -> None:
    run = made("1")
    (run / "model" / "README.md").write_text("Mine.")
    push(run, "ann/shallow", endpoint=there.address, token=TOKEN, message="First")
    assert there.files["ann/shallow", "main"]["README.md"] == b"Mine." and there.messages == ["First"]
    (run / "model" / "README.md").unlink()
    push(run, "ann/shallow", endpoint=there.address, token=TOKEN)
    assert b"What was cut" in there.files["ann/shallow", "main"]["README.md"], "the twin: without one a card is written"


def test_branches_and_privacy(made: Callable[..., Path], there: Hub) -> None:
    run = made("1")
    where = push(run, "ann/secret", private=True, revision="v2", endpoint=there.address, token=TOKEN)
    assert where.endswith("/ann/secret/tree/v2") and there.repositories["ann/secret"] is True
    assert list(there.files) == [("ann/secret", "v2")]
    push(run, "ann/open", endpoint=there.address, token=TOKEN)
    count = len(there.messages)
    with pytest.raises(ExportError, match="ann/open is there already and is public"):
        push(run, "ann/open", private=True, endpoint=there.address, token=TOKEN)
    assert len(there.messages) == count, "and nothing was uploaded"


def said(run: Path, there: Hub, **options: Any) -> str:
    """The one line with which an upload fails."""
    with pytest.raises(DepthpruneError) as caught:
        push(run, "ann/shallow", **({"endpoint": there.address, "token": TOKEN} | options))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and not there.messages
    return text


def test_what_goes_wrong_is_one_line(made: Callable[..., Path], there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("1")
    assert said(run, there, token="hf_wrong").endswith("the Hub does not know this token; run `hf auth login`")
    assert "this token may not write there; make one that may (" in said(run, there, token=READER)
    assert "You don't have the rights" in said(run, there, token=READER)
    assert said(run, there, endpoint="http://127.0.0.1:9").endswith("http://127.0.0.1:9 cannot be reached")
    there.broken = True
    assert "the Hub answers 400: the card's metadata is not valid" in said(run, there)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        assert said(run, there, token=None).startswith("no token for the Hub: run `hf auth login`")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
        assert said(run, there).endswith("HF_HUB_OFFLINE is set")
    with pytest.raises(DepthpruneError, match=r"^cannot upload to a/b/c: "):
        push(run, "a/b/c", endpoint=there.address, token=TOKEN)


def test_a_folder_that_fails_its_proofs_stays_here(made: Callable[..., Path], there: Hub, tmp_path: Path) -> None:
    run = made("1")
    failed = {"passed": False, "proofs": [{"name": "logits", "passed": False, "detail": "largest gap 3"}]}
    (run / "check.json").write_text(json.dumps(failed))
    assert said(run, there).endswith("is not uploaded: logits: largest gap 3")
    (run / "check.json").write_text(json.dumps(PASSED))
    sound = shutil.copytree(run / "model", tmp_path / "alone")
    state = load_file(run / "model" / "model.safetensors")
    broken.reweigh(run / "model", {name: None for name in state if name.startswith("model.layers.2.")})
    assert "number of blocks: config.json counts 3 blocks and the weights have 2: 2 would" in said(run, there)
    broken.reweigh(sound, {"model.layers.2.mlp.up_proj.weight": None})
    text = said(sound, there)
    assert "loads with plain transformers: 1 missing keys" in text and not there.asked[1:], "a reload proves the rest"
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        push(tmp_path, "ann/shallow", endpoint=there.address, token=TOKEN)
    broken.reweigh(sound, {"model.layers.2.mlp.up_proj.weight": state["model.layers.2.mlp.up_proj.weight"]})
    push(sound, "ann/shallow", endpoint=there.address, token=TOKEN)
    assert there.messages == ["Upload alone, pruned with depthprune"]


def test_what_is_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert on_hub("org/model-1.5") and on_hub("gpt2")
    for path in ("runs/mine", "/a/b", "./a", "../a", "~/a", "a/b/c", "C:\\a\\b", "C:/a"):
        assert not on_hub(path)
    assert [public(path) for path in ("org/model", "runs/mine", "/a/b/", "C:\\a\\b", "/")] == [
        "org/model", "mine", "b", "b", "a local model",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/srv/ann/x.txt", "x.txt"),
        ("task:/srv/ann/mmlu.jsonl=0.5,/b/c.txt=0.5", "task:mmlu.jsonl=0.5,c.txt=0.5"),
        ("~/x/y and ../z/w", "y and w"),
        ("C:\\Users\\ann\\x.txt", "x.txt"),
        ("hub:allenai/c4:en:train", "hub:allenai/c4:en:train"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("12 MB/s, and/or 1 / 2", "12 MB/s, and/or 1 / 2"),
        ("greedy:per=budget", "greedy:per=budget"),
    ],
)
def test_paths_within_a_text_lose_their_folders(text: str, clean: str) -> None:
    assert scrubbed({"a": [text, 1]}) == {"a": [clean, 1]}


def test_the_licence_of_a_local_model_is_read_from_its_card(made: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "dense"
    base.mkdir()
    assert license_of(str(base)) is None and license_of("org/dense") is None and license_of(None) is None
    (base / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\n# Dense\nlicense: none\n")
    assert license_of(str(base)) == "mit"
    assert ModelCard(card(made("1", base=str(base)) / "model")).data.license == "mit"
    (base / "README.md").write_text("# Dense\nlicense: mit\n")
    assert license_of(str(base)) is None


def test_the_model_of_a_run_is_found(made: Callable[..., Path]) -> None:
    run = made("1")
    assert places(run) == (run / "model", run) and places(run / "model") == (run / "model", run)
    (run / "run.json").unlink()
    assert places(run / "model") == (run / "model", None)
