"""A model writes its own text: by its own predictions, from its prompts, in full rows, the same for the same seed."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from command import hold, run
from depthprune import runtimes, selfwritten
from depthprune.data import Data, calibrate, digest
from depthprune.errors import DataError, DepthpruneError, OptionError
from depthprune.export import export
from depthprune.model import Model, load, wrap
from depthprune.plan import Plan
from depthprune.prompts import Settings, asked, settings_of
from depthprune.recovering import Asked, text_of
from depthprune.selfwritten import Pen, pick, write
from depthprune.surgery import drop
from depthprune.units import parse
from families import tiny
from tiny_text import BOS, EOS, FIRST, make_tokenizer, words

SHORT: dict[str, Any] = {"sequences": 6, "length": 24}
LOW = "temperature=0.000001"
TEMPLATE = "w1 {{ messages[0].content }} w2{% if add_generation_prompt %} w3{% endif %}"


def author(family: str = "llama", *, seed: int = 0, ends: bool = False, **options: Any) -> Model:
    """A tiny model with a tokenizer; without ``ends`` it never ends a text."""
    made = wrap(tiny(family, seed=seed), make_tokenizer(**options), family)
    if not ends:
        made.tokenizer.eos_token = None
        if made.net.can_generate():
            made.net.generation_config.eos_token_id = None
    return made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 2000 words that the tiny models know."""
    path = tmp_path / "prompts.txt"
    path.write_text(words([FIRST + (7 * i * i) % 90 for i in range(2000)]), encoding="utf-8")
    return path


@torch.no_grad()
def greedy(model: Model, start: list[int], length: int) -> list[int]:
    """The likeliest token, one after the other, each by a forward of all that is there and without a cache."""
    row = list(start)
    while len(row) < length:
        row.append(int(model.net(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row


def test_the_seed_decides_what_is_written() -> None:
    model = author()
    first, again, other = (write(model, **SHORT, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens) and first.digest == again.digest
    assert not torch.equal(first.tokens, other.tokens) and first.digest != other.digest
    assert first.tokens.shape == (6, 24) and first.packed and first.scored is None
    assert first.digest == digest(first.tokens, first.mask) and first.seed == 0
    assert len({tuple(row) for row in first.tokens.tolist()}) == 6


def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = author()
    together = write(model, **SHORT)
    assert torch.equal(write(model, **SHORT, memory=1).tokens, together.tokens)
    monkeypatch.setattr(selfwritten, "ROWS", 4)
    assert torch.equal(write(model, **SHORT).tokens, together.tokens)


def test_the_random_numbers_and_settings_of_others_stay_as_they_were() -> None:
    model = author()
    model.net.generation_config.repetition_penalty = 5.0
    model.net.generation_config.top_k = 1
    before, state = model.net.generation_config, torch.random.get_rng_state()
    found = write(model, **SHORT)
    assert model.net.generation_config is before and torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found.tokens, write(author(), **SHORT).tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "mamba", "jamba"])
def test_at_a_low_temperature_it_is_the_likeliest_token_after_the_other(family: str, text: Path) -> None:
    model = author(family)
    found = write(model, f"self:{text}:prompt=7:{LOW}", sequences=3, length=20)
    wanted = calibrate(str(text), model.tokenizer, sequences=3, length=7).tokens
    assert torch.equal(found.tokens[:, :7], wanted)
    assert found.tokens.tolist() == [greedy(model, row, 20) for row in wanted.tolist()]


def test_prompts_are_read_as_calibration_text_is(text: Path) -> None:
    model = author()
    found = write(model, f"self:{text}:prompt=9:top_p=0.9", **SHORT, seed=3)
    wanted = calibrate(str(text), model.tokenizer, sequences=6, length=9, seed=3)
    assert torch.equal(found.tokens[:, :9], wanted.tokens) and (found.tokens[:, 0] == BOS).all()
    assert found.name == "self(prompts.txt)"
    (record,) = found.sources
    assert record["prompts"] == wanted.describe() and record["path"] == f"self:{text}:prompt=9:top_p=0.9"
    assert record["tokens"] == 6 * 24 and record["written"] == 6 * 15 and record["documents"] == 6
    assert (record["prompt"], record["temperature"], record["top_p"], record["chat"]) == (9, 1.0, 0.9, False)
    assert record["teacher"] == {"id": "llama", "fingerprint": model.reference.fingerprint}
    assert json.loads(json.dumps(found.describe()))["sources"] == [record]


def test_prompts_are_used_again_where_they_are_few(text: Path) -> None:
    text.write_text(words(range(FIRST, FIRST + 16)), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = write(author(), f"self:{text}:prompt=9", **SHORT)
    starts = [tuple(row) for row in found.tokens[:, :9].tolist()]
    assert starts[:2] * 3 == starts and len(set(starts)) == 2
    assert len({tuple(row) for row in found.tokens.tolist()}) == 6


def test_without_prompts_rows_begin_with_bos_or_with_any_plain_token() -> None:
    found = write(author(), sequences=4, length=12)
    assert (found.tokens[:, 0] == BOS).all() and found.name == "self" and found.sources[0]["written"] == 4 * 11
    model = author(bos=())
    assert model.tokenizer.bos_token_id is None
    first = write(model, sequences=40, length=2).tokens[:, 0]
    assert len(first.unique()) > 10 and first.min() >= FIRST - 1 and first.max() < model.vocabulary


def test_a_row_goes_on_with_another_prompt_where_a_text_ends(text: Path) -> None:
    model = author(ends=True)
    head = model.net.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.full((model.vocabulary,), 0.0))
    with torch.no_grad():
        head.bias[EOS] = 9.0  # likely, but not always
    found = write(model, f"self:{text}:prompt=5", sequences=8, length=40)
    texts = {tuple(row[1:5]) for row in found.tokens.tolist()}
    ended, cut = 0, 0
    for row in found.tokens.tolist():
        at = 4  # of the last token of a prompt
        while EOS in row[at + 1 :]:
            ended += 1
            at = row.index(EOS, at + 1)
            following = tuple(row[at + 1 : at + 5])
            if len(following) < 4:
                cut += 1
                assert any(one[: len(following)] == following for one in texts)
            else:
                assert following in texts
            at += 4
    assert ended > 8 and cut and found.packed
    assert found.sources[0]["written"] < 8 * 35
    # Without prompts the model goes on by itself.
    free = write(model, sequences=8, length=40)
    assert (free.tokens == EOS).any() and free.sources[0]["written"] == 8 * 39


def test_a_model_ends_texts_where_its_own_settings_say(text: Path) -> None:
    model = author()
    plain = write(model, f"self:{text}:prompt=5", sequences=8, length=40)
    model.net.generation_config.eos_token_id = [int(plain.tokens[0, 10]), 50]
    found = write(model, f"self:{text}:prompt=5", sequences=8, length=40)
    assert torch.equal(found.tokens[0, :11], plain.tokens[0, :11])
    assert not torch.equal(found.tokens[0, 11:], plain.tokens[0, 11:])
    assert tuple(found.tokens[0, 11:15].tolist()) in {tuple(row[1:5]) for row in found.tokens.tolist()}


def test_questions_are_asked_whole_in_the_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    said = [[FIRST + 10 + i] * (3 + i) for i in range(4)]
    lines = [json.dumps({"prompt": words(ids)}) for ids in said]
    path.write_text("\n".join([*lines, json.dumps({"prompt": words([FIRST] * 60)}), '{"prompt": " "}']))
    model = author()
    model.tokenizer.chat_template = TEMPLATE
    found = write(model, f"self:{path}:chat=true:{LOW}", **SHORT, field="prompt")
    starts = [[FIRST + 1, *ids, FIRST + 2, FIRST + 3] for ids in said]
    assert found.packed and found.name == "self(asked.jsonl)"
    used = []
    for row in found.tokens.tolist():
        (start,) = [start for start in starts if row[: len(start)] == start]
        used.append(tuple(start))
        assert row == greedy(model, start, 24)
    assert len(set(used)) == 4 and found.sources[0]["documents"] == 4
    assert found.sources[0]["prompts"] == {"path": str(path), "documents": 5, "used": 4, "field": "prompt"}


def test_tokens_that_the_tokenizer_does_not_know_are_not_written() -> None:
    model = author()
    known = dict(list(model.tokenizer.get_vocab().items()))
    model.tokenizer.get_vocab = lambda: {word: i for word, i in known.items() if i < 40}
    assert write(model, **SHORT).tokens.max() < 40


def test_what_was_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, keep = author(), tmp_path / "new" / "written.safetensors"
    said: list[str] = []
    first = write(model, **SHORT, keep=keep)
    with monkeypatch.context() as patch:
        patch.setattr(model.net, "generate", None)
        again = write(model, **SHORT, keep=keep, say=said.append)
    assert torch.equal(first.tokens, again.tokens) and first.describe() == again.describe()
    assert "written before" in said[0] and os.listdir(keep.parent) == [keep.name]
    for other in (author(seed=1), model):
        found = write(other, **SHORT, seed=int(other is model), keep=keep)
        assert not torch.equal(first.tokens, found.tokens)
    assert torch.equal(write(model, **SHORT, keep=keep).tokens, first.tokens)
    keep.write_bytes(b"damaged")
    assert torch.equal(write(model, **SHORT, keep=keep).tokens, first.tokens)


def test_progress_and_the_time_it_takes_are_told() -> None:
    shown: list[tuple[float, float]] = []
    said: list[str] = []
    write(author(), **SHORT, memory=1, show=lambda what, done, total: shown.append((done, total)), say=said.append)
    assert shown[-1] == (6 * 23, 6 * 23) and [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert said == ["the model writes 144 tokens itself, in about 1 second"]
    assert [selfwritten._span(seconds) for seconds in (0.1, 80, 600, 9000)] == [
        "1 second",
        "80 seconds",
        "10 minutes",
        "2.5 hours",
    ]


def test_how_much_is_written_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selfwritten.TOKENS, "cpu", 100)
    assert write(author(), length=20).tokens.shape == (5, 20)
    assert write(author(), length=90).tokens.shape == (2, 90)


# How a token is chosen


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    noise = torch.linspace(1e-6, 1, 10_000)
    chosen = pick(logits.expand(10_000, 4), noise, temperature=0.7)
    torch.testing.assert_close(chosen.bincount(minlength=4) / 10_000, (logits / 0.7).softmax(0), atol=2e-4, rtol=0)


def test_top_p_leaves_the_unlikely_out() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    noise = torch.linspace(1e-6, 1, 1000)
    for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3}), (0.95, {0, 1, 2, 3})):
        assert set(pick(logits.expand(1000, 4), noise, top_p=top_p).tolist()) == kept


def test_what_is_impossible_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf], [-math.inf, 1e4, 0.0]])
    for noise in (1e-30, 1.0):
        assert pick(logits, torch.full((2,), noise), temperature=1e-30).tolist() == [1, 1]
    assert pick(torch.tensor([[math.nan, 0.0], [math.inf, 0.0]]), torch.ones(2)).tolist() == [-1, -1]


def test_a_pen_reads_prompts_before_it_writes() -> None:
    steps: list[int] = []
    pen = Pen(
        [[5, 6], []],
        torch.ones(2, 8),
        Settings(),
        following=lambda row: [7],
        ends=frozenset({2}),
        known=9,
        step=lambda: steps.append(1),
    )
    certain = torch.full((2, 10), -math.inf)
    certain[:, 2] = 0.0
    ids = torch.tensor([[1], [2]])  # an end that was given, not written, ends nothing
    for _ in range(4):
        ids = torch.cat([ids, pen(ids, certain).argmax(-1, keepdim=True)], 1)
    assert ids.tolist() == [[1, 5, 6, 2, 7], [2, 2, 7, 2, 7]]
    assert pen.written[:, :5].tolist() == [[False, False, False, True, False], [False, True, False, True, False]]
    assert len(steps) == 4


# What is asked for


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("self:", Settings()),
        ("self:temperature=0.5", Settings(temperature=0.5)),
        ("self:temperature=0.5:top_p=0.9", Settings(temperature=0.5, top_p=0.9)),
        ("self::top_p=1", Settings()),
        ("self:a.txt", Settings("a.txt")),
        ("self:a.jsonl:prompt=16:temperature=2", Settings("a.jsonl", 16, 2.0)),
        ("self:a.jsonl:chat=true", Settings("a.jsonl", chat=True)),
        ("self:a.txt=0.7,b.txt=0.3:prompt=4", Settings("a.txt=0.7,b.txt=0.3", 4)),
        ("self:hub:allenai/c4:en:train:prompt=4", Settings("hub:allenai/c4:en:train", 4)),
    ],
)
def test_options_are_read(source: str, wanted: Settings) -> None:
    assert asked(source) and settings_of(source) == wanted


def test_other_sources_are_not_its_own() -> None:
    assert not asked("a.txt=0.7,b.txt=0.3") and not asked("myself:") and not asked("task:a.jsonl:shots=2")


REFUSED: list[tuple[str, str]] = [
    ("self:temperature=0", "temperature of self: is a number above 0, not '0'"),
    ("self:temperature=-1", "a number above 0"),
    ("self:temperature=nan", "a number above 0"),
    ("self:temperature=hot", "not 'hot'"),
    ("self:top_p=1.5", "a number above 0, up to 1"),
    ("self:top_p=0", "a number above 0, up to 1"),
    ("self:topp=0.5", "unknown option of self: 'topp'. Did you mean 'top_p'? Available: chat, prompt"),
    ("self:prompt=4", "prompt of self: needs prompts"),
    ("self:chat=true", "chat of self: needs prompts"),
    ("self:TEXT:chat=yes", "true or false, not 'yes'"),
    ("self:TEXT:chat=true", "the tokenizer has none"),
    ("self:TEXT:chat=true:prompt=4", "prompts are whole"),
    ("self:TEXT:prompt=x", "prompt of self: is a number of tokens"),
    ("self:TEXT:prompt=1", "prompt of self: is at least 2"),
    ("self:TEXT", "a prompt of 32 tokens fills a row of 24"),
    ("self:TEXT:prompt=24", "use a smaller prompt="),
    ("self:EMPTY:prompt=4", "the text is empty"),
    ("self:FEW:prompt=9", "3 tokens of text, but one row needs 8; give more text, or prompt=4 or less"),
    ("self:nowhere.txt:prompt=4", "there is no file or folder 'nowhere.txt'"),
    ("self:WIDE:prompt=4", "the model has 96 embeddings"),
    ("self:task:TASK:prompt=4", "is or holds a task"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED)
def test_refusals(source: str, message: str, text: Path, tmp_path: Path) -> None:
    places = {"TEXT": text, "EMPTY": tmp_path / "empty", "FEW": tmp_path / "few", "WIDE": tmp_path / "wide"}
    places["TASK"] = tmp_path / "task.jsonl"
    places["EMPTY"].write_text(" ")
    places["FEW"].write_text("w1 w2 w3")
    places["WIDE"].write_text("w399 " * 100)
    places["TASK"].write_text('{"question": "w1", "answer": "w2"}\n' * 8)
    for name, path in places.items():
        source = source.replace(name, str(path))
    with pytest.raises(DepthpruneError) as caught:
        write(author(), source, **SHORT)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_only_decoders_write() -> None:
    pair = author()
    pair.net.config.is_encoder_decoder = True
    for model in (author("bert"), pair):
        with pytest.raises(OptionError, match=f"{model.reference.id} writes no text, only decoders do"):
            write(model, **SHORT)


def test_questions_that_are_no_questions(tmp_path: Path) -> None:
    model = author()
    model.tokenizer.chat_template = TEMPLATE
    for lines, message in (
        ('{"text": ""}', "there are no prompts, or all are empty"),
        (json.dumps({"text": words([FIRST] * 60)}), "every prompt fills a row of 24 tokens; use a larger --length"),
    ):
        (tmp_path / "asked.jsonl").write_text(lines)
        with pytest.raises(DataError, match=message):
            write(model, f"self:{tmp_path / 'asked.jsonl'}:chat=true", **SHORT)
    with pytest.raises(OptionError, match="prompts from one file"):
        write(model, "self:a.txt,b.txt:chat=true", **SHORT)


def test_counts_out_of_range() -> None:
    with pytest.raises(OptionError, match="sequences must be at least 1"):
        write(author(), sequences=0)
    with pytest.raises(OptionError, match="length must be at least 2"):
        write(author(), length=1)


def test_predictions_that_are_not_finite(text: Path) -> None:
    model = author()
    with torch.no_grad():
        model.net.get_output_embeddings().weight[3] = math.nan
    before = model.net.generation_config
    with pytest.raises(DataError, match="not finite, so it writes no text; try another --dtype"):
        write(model, **SHORT)
    assert model.net.generation_config is before


# Where it is used


def test_recovery_asks_for_it_by_name(text: Path) -> None:
    model = author()
    found = text_of(Asked(f"self:{text}:prompt=4", 3, 16, seed=2), model)
    assert isinstance(found, Data) and found.tokens.shape == (3, 16)
    assert found.digest == write(model, f"self:{text}:prompt=4", sequences=3, length=16, seed=2).digest
    long = text_of(Asked("self:", 2, 4096), model)
    assert long.length == model.positions
    with pytest.raises(OptionError, match="self: stands alone"):
        text_of(Asked(f"{text}=0.5,self:=0.5", 3, 16), model)


def test_the_recover_command_reads_what_the_model_writes(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "check_many", hold)
    dense = load("model")
    export(drop(dense, Plan(dense.reference, parse(("1", "2.self_attn")))), desk / "cut")
    how = ("recover", "cut", "--teacher", "model", "--sequences", 24, "--length", 32, "--json")
    done = run(*how, "--data", "self:text.txt:prompt=8", "--out", "better")
    assert done.code == 0 and json.loads(done.out)["passed"], done.err
    assert "the model writes 768 tokens itself, in about" in done.err
    (record,) = json.loads((desk / "better" / "recovery.json").read_text())["data"]["sources"]
    assert record["path"] == "self:text.txt:prompt=8" and record["written"] <= 24 * 24
    assert record["teacher"]["fingerprint"] == dense.reference.fingerprint
    assert not [path.name for path in desk.iterdir() if path.name.startswith(".")]
    refused = run(*how, "--data", "self:text.txt:prompt=40", "--out", "worse")
    assert refused.code
    assert refused.error == "a prompt of 40 tokens fills a row of 32; use a smaller prompt=…"
    assert not (desk / "worse").exists()


def test_other_commands_do_not_take_it(desk: Path) -> None:
    refused = run("plan", "model", "--drop", "1 blocks", "--data", "self:", "--out", "plan.json")
    assert "self:" in refused.error and refused.code


FORKED = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from depthprune import dist
from depthprune.model import wrap
from depthprune.selfwritten import write
from families import tiny
from tiny_text import make_tokenizer
there = Path(sys.argv[2])
child = os.fork()  # one import for both
os.environ |= {"WORLD_SIZE": "2", "RANK": "0" if child else "1"}
dist.start("cpu")
model = wrap(tiny("llama"), make_tokenizer(), "llama")
batches = []
generate = model.net.generate
model.net.generate = lambda ids, *args, **more: batches.append(len(ids)) or generate(ids, *args, **more)
data = write(model, sequences=5, length=12, keep=there / "kept")
(there / str(dist.rank())).write_text(f"{data.digest} {data.sources[0]['written']} {batches}")
if child:
    os.waitpid(child, 0)
"""


def test_several_processes_write_what_one_does(tmp_path: Path) -> None:
    model = author(ends=True)
    wanted = write(model, sequences=5, length=12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", FORKED, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, env=os.environ | place, check=True, timeout=100)
    found = [(tmp_path / rank).read_text() for rank in ("0", "1")]
    assert found == [f"{wanted.digest} {5 * 11} [{rows}]" for rows in (3, 2)]
    model.net.generate = None
    assert write(model, sequences=5, length=12, keep=tmp_path / "kept").digest == wanted.digest
