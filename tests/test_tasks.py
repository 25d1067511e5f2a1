"""Tasks: which tokens are scored, the prompts character for character, and what is said about lines that are none."""

from __future__ import annotations

import gzip
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from depthprune import demo, tasks
from depthprune.data import Data, Mixture, calibrate
from depthprune.errors import DataError, OptionError
from tiny_text import BOS, EOS, FIRST, PAD, make_tokenizer


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerBase:
    """The demo model's tokenizer: byte-level BPE with BOS in front."""
    return AutoTokenizer.from_pretrained(demo.ARCHIVE.parent)  # type: ignore[no-any-return, no-untyped-call]


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task:{path}"


def data_of(source: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Data:
    data = calibrate(source, tokenizer, **options)
    assert isinstance(data, Data)
    return data


def read(data: Data, tokenizer: Any) -> list[tuple[str, str]]:
    """The prompt and the answer of each row, as its marks divide it: real tokens, the scored ones at their end."""
    assert data.scored is not None
    found = []
    for ids, real, scored in zip(data.tokens, data.mask, data.scored, strict=True):
        count, start = int(real.sum()), int(scored.nonzero()[0])
        assert real.tolist() == [at < count for at in range(data.length)]
        assert scored.tolist() == [start <= at < count for at in range(data.length)]
        assert int(ids[0]) == tokenizer.bos_token_id
        found.append((tokenizer.decode(ids[1:start]), tokenizer.decode(ids[start:count])))
    return found


def letters(right: list[bool]) -> str:
    return "".join("ABCDEFGH"[at] for at, marked in enumerate(right) if marked)


SUM = {"question": "What is 2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "elementary_mathematics"}
SHOT = {"question": "What is 1 + 1?", "choices": ["2", "1", "0", "9"], "answer": "A", "subject": SUM["subject"]}
PUBLISHED = (
    "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
    "What is 1 + 1?\nA. 2\nB. 1\nC. 0\nD. 9\nAnswer: A\n\n"
    "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
)


def many(count: int, subject: str = "x") -> list[dict[str, Any]]:
    row = {"choices": ["a", "b", "c", "d"], "subject": subject}
    return [row | {"question": f"{subject} question {at}?", "answer": at % 4} for at in range(count)]


def test_a_choice_is_a_row_and_only_its_tokens_are_scored(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "a.jsonl",
        {"prompt": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 1},
        {"prompt": "w6", "choices": ["w7 w8 w9", "w10", "w11"], "answer": "A"},
    )
    data = data_of(source, make_tokenizer(pad_token="<pad>"), sequences=2, length=16, shuffle=False)
    f, p = FIRST, PAD
    assert data.tokens.tolist() == [
        [BOS, f + 1, f + 2, f + 3, p],
        [BOS, f + 1, f + 2, f + 4, f + 5],
        [BOS, f + 6, f + 7, f + 8, f + 9],
        [BOS, f + 6, f + 10, p, p],
        [BOS, f + 6, f + 11, p, p],
    ]
    assert data.scored is not None and data.choices is not None
    marks = ["...1.", "...11", "..111", "..1..", "..1.."]
    assert data.scored.tolist() == [[mark == "1" for mark in row] for row in marks]
    assert data.mask.tolist() == [[at < count for at in range(5)] for count in (4, 5, 5, 3, 3)]
    assert data.choices.item.tolist() == [0, 0, 1, 1, 1] and data.choices.item.dtype == torch.int64
    assert data.choices.right.tolist() == [False, True, True, False, False]
    assert data.predicted == 8 and data.tokens_total == 20
    assert data.name == "task:a.jsonl" and data.sources == (
        {"path": source, "weight": 1.0, "documents": 2, "tokens": 20, "format": "completion", "questions": 2},
    )
    without = data_of(source, make_tokenizer(bos=()), sequences=2, length=16, shuffle=False)
    assert without.tokens[0].tolist() == [f + 1, f + 2, f + 3, EOS]


def test_one_answer_has_nothing_to_choose_from(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", {"prompt": "w1", "response": "w2 w3"}, {"prompt": "w4 w5", "response": "w6"})
    data = data_of(source, make_tokenizer(), sequences=2, length=8, shuffle=False)
    assert data.tokens.tolist() == [[BOS, FIRST + 1, FIRST + 2, FIRST + 3], [BOS, FIRST + 4, FIRST + 5, FIRST + 6]]
    assert data.scored is not None and data.scored.tolist() == [[False, False, True, True], [False, False, False, True]]
    assert data.choices is None and data.right_only() is data


CASES: dict[str, tuple[dict[str, Any], str, list[str], int]] = {
    "arc": (
        {"question": "Why?", "choices": {"text": ["so", "then"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Why?\nAnswer:",
        [" so", " then"],
        1,
    ),
    "openbookqa": (
        {"question_stem": "The sun is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "A"},
        "The sun is",
        [" hot", " cold"],
        0,
    ),
    "hellaswag": (
        {"query": "He sat", "choices": ["down.", "up.", "off."], "gold": 2},
        "He sat",
        [" down.", " up.", " off."],
        2,
    ),
    "piqa": (
        {"goal": "Eat", "sol1": "a bun", "sol2": "a hat", "label": 0},
        "Question: Eat\nAnswer:",
        [" a bun", " a hat"],
        0,
    ),
    "boolq": (
        {"passage": "Sky.", "question": "is it blue", "answer": True},
        "Sky.\nQuestion: is it blue?\nAnswer:",
        [" yes", " no"],
        0,
    ),
    "plain": ({"prompt": "One and", "choices": ["two", "B"], "answer": "two"}, "One and", [" two", " B"], 0),
    "space": ({"prompt": "Once upon a ", "choices": ["time", "day"], "answer": 0}, "Once upon a", [" time", " day"], 0),
    "line": ({"prompt": "A:\n", "choices": ["yes", "no"], "answer": "B"}, "A:\n", ["yes", "no"], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_known_tasks_with_a_real_tokenizer(case: str, tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    row, prompt, answers, right = CASES[case]
    data = data_of(lines(tmp_path / "a.jsonl", row), bpe, sequences=1)
    assert read(data, bpe) == [(prompt, answer) for answer in answers]
    assert data.choices is not None and data.choices.right.tolist() == [at == right for at in range(len(answers))]
    moved = replace(data, scored=torch.roll(data.scored, -1, 1) if data.scored is not None else None)
    with pytest.raises(AssertionError):  # the twin: marks one token too early are seen
        assert read(moved, bpe) == [(prompt, answer) for answer in answers]


def test_an_option_in_the_prompt_and_one_answer_to_both(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    row = {"sentence": "Ann thanked Bob as _ had helped.", "option1": "Ann", "option2": "Bob", "answer": "2"}
    data = data_of(lines(tmp_path / "a.jsonl", row), bpe, sequences=1)
    assert read(data, bpe) == [(f"Ann thanked Bob as {name}", " had helped.") for name in ("Ann", "Bob")]
    assert data.choices is not None and data.choices.right.tolist() == [False, True]


@pytest.mark.parametrize(
    ("row", "options", "prompt", "answer"),
    [
        ({"question": "2 + 2?", "answer": "It is\n#### 4"}, "", "Question: 2 + 2?\nAnswer:", " It is\n#### 4"),
        ({"prompt": "Say it.", "answer": "Now."}, "", "Say it.", " Now."),
        ({"prompt": "Say it:\n\n", "response": "Now."}, "", "Say it:\n\n", "Now."),
        ({"text": "He came home again \n"}, ":format=last_word", "He came home", " again"),
    ],
)
def test_prompts_and_replies(
    row: dict[str, str], options: str, prompt: str, answer: str, tmp_path: Path, bpe: PreTrainedTokenizerBase
) -> None:
    data = data_of(lines(tmp_path / "a.jsonl", row) + options, bpe, sequences=1)
    assert read(data, bpe) == [(prompt, answer)] and data.choices is None


def test_a_token_across_the_boundary_belongs_to_the_answer() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3, "<s>": 4}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("b", "c")])))
    wanted = tasks.Wanted(tokenizer, (4,), 1, 8, 0, True, True)
    ((row, start),) = tasks._encoded((("aab", "c"),), "here", wanted)
    assert row.tolist() == [4, 0, 0, 3] and start == 3
    ((row, start),) = tasks._encoded((("aab", "a"),), "here", wanted)
    assert row.tolist() == [4, 0, 0, 1, 0] and start == 4
    with pytest.raises(DataError, match="here: the answer 'z' has no token of its own"):
        tasks._encoded((("a", "z"),), "here", wanted)
    with pytest.raises(DataError, match="here: the prompt has no token of its own"):
        tasks._encoded((("z", "a"),), "here", replace(wanted, opening=()))


def test_the_prompt_of_mmlu_is_the_published_one(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    source = lines(tmp_path / "mmlu.jsonl", SHOT, SUM)
    data = data_of(source, bpe, sequences=2, shuffle=False)
    assert read(data, bpe)[4:] == [(PUBLISHED, f" {letter}") for letter in "ABCD"]
    assert data.choices is not None
    assert [letters(data.choices.right[at : at + 4].tolist()) for at in (0, 4)] == ["A", "B"]
    assert data.choices.item.tolist() == [0] * 4 + [1] * 4 and data.predicted == 8


def test_shots_of_a_dev_file_come_in_its_order(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    source = lines(tmp_path / "test.jsonl", *many(2), *many(1, "y"))
    lines(tmp_path / "dev.jsonl", *({**row, "question": f"dev {row['question']}"} for row in (*many(7), *many(1, "y"))))
    asked = read(data_of(f"{source}:dev={tmp_path}/dev.jsonl:shots=3", bpe, sequences=3, shuffle=False), bpe)
    found = [re.findall(r"^(.*question \d)\?$", prompt, re.M) for prompt, _ in asked[::4]]
    assert found[0] == ["dev x question 0", "dev x question 1", "dev x question 2", "x question 0"]
    assert found[1] == [*found[0][:3], "x question 1"]
    assert found[2] == ["dev y question 0", "y question 0"]
    bare = read(data_of(f"{source}:shots=0", bpe, sequences=3, shuffle=False), bpe)
    assert [prompt.count("question ") for prompt, _ in bare] == [1] * 12


def test_a_question_is_never_its_own_shot(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    rows = many(6)
    source = lines(tmp_path / "a.jsonl", *rows, rows[0])  # the twin: it stands in the file a second time
    asked = read(data_of(source, bpe, sequences=7, shuffle=False), bpe)[::4]
    for at, (prompt, _) in enumerate(asked):
        assert prompt.count(f"x question {at % 6}?") == 1 and prompt.count("\n\nx question") == 6
    alone = data_of(lines(tmp_path / "b.jsonl", SUM), bpe, sequences=1)
    assert read(alone, bpe)[0][0] == PUBLISHED.replace(PUBLISHED.split("\n\n")[1] + "\n\n", "")


def test_shots_are_dropped_until_the_question_fits(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    source = lines(tmp_path / "a.jsonl", *many(8))
    fixed = [data_of(f"{source}:shots={shots}", bpe, sequences=8) for shots in range(6)]
    for shots, data in enumerate(fixed):
        for length in (data.length, fixed[shots + 1].length - 1 if shots < 5 else 999):
            assert data_of(source, bpe, sequences=8, length=length).digest == data.digest
    shortest = int(fixed[0].mask.sum(1).min())
    with pytest.raises(DataError) as error:
        calibrate(source, bpe, sequences=8, length=shortest - 1)
    fault = f"none of the 8 questions fits in {shortest - 1} tokens; the shortest needs --length {shortest}"
    assert str(error.value) == f"{source}: {fault}"


def test_what_does_not_fit_is_left_out_with_one_warning(tmp_path: Path) -> None:
    rows = [{"prompt": "w1 " * count, "answer": "w2"} for count in (1, 9, 2, 9, 3)]
    source = lines(tmp_path / "a.jsonl", *rows)
    with pytest.warns(UserWarning) as caught:
        data = data_of(source, make_tokenizer(), sequences=9, length=5, shuffle=False)
    assert [str(warning.message) for warning in caught] == [
        f"{source}: 2 questions longer than 5 tokens left out",
        f"{source}: only 3 questions, not the 9 asked for",
    ]
    assert {warning.filename for warning in caught} == {data_of.__code__.co_filename}
    assert data.mask.sum(1).tolist() == [3, 4, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data_of(source, make_tokenizer(), sequences=1, length=5, shuffle=False).sequences == 1
        assert data_of(source, make_tokenizer(), sequences=5, length=99).sequences == 5


def test_questions_are_drawn_under_the_seed_evenly_and_without_replacement(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", *({"prompt": f"w{at}", "answer": "w0"} for at in range(200)))
    places = np.zeros(4, dtype=int)
    for seed in range(25):
        one, same = (data_of(source, make_tokenizer(), sequences=40, seed=seed) for _ in range(2))
        assert one.digest == same.digest and one.seed == seed
        found = (one.tokens[:, 1] - FIRST).tolist()
        assert len(set(found)) == 40 and found != sorted(found)
        places += np.bincount([at // 50 for at in found], minlength=4)
        assert data_of(source, make_tokenizer(), sequences=20, seed=seed).digest == one.head(20).digest
    # 1000 draws in four equal parts: 250 each, and 5 standard deviations are below 70.
    assert (abs(places - 250) < 70).all(), places
    assert one.digest != data_of(source, make_tokenizer(), sequences=40, seed=0).digest


def test_which_answer_is_right_is_in_the_digest(tmp_path: Path) -> None:
    made = []
    for answer in (0, 1):
        row = {"prompt": "w1", "choices": ["w2", "w3"], "answer": answer}
        made.append(data_of(lines(tmp_path / f"{answer}.jsonl", row), make_tokenizer(), sequences=1))
    assert torch.equal(made[0].tokens, made[1].tokens) and made[0].digest != made[1].digest
    right = made[1].right_only()
    assert right.tokens.tolist() == [[BOS, FIRST + 1, FIRST + 3]] and right.choices is None and right.predicted == 1
    assert right.digest != made[0].right_only().digest and right.right_only() is right


def test_a_format_can_be_forced(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    arc = lines(tmp_path / "arc.jsonl", CASES["arc"][0])
    prompt = "The following are multiple choice questions (with answers).\n\nWhy?\nA. so\nB. then\nAnswer:"
    assert read(data_of(f"{arc}:format=letters", bpe, sequences=1), bpe) == [(prompt, " A"), (prompt, " B")]
    boolq = lines(tmp_path / "boolq.jsonl", CASES["boolq"][0])
    shown = read(data_of(f"{boolq}:format=letters", bpe, sequences=1), bpe)[0][0]
    assert shown.endswith("\n\nSky.\nis it blue?\nA. yes\nB. no\nAnswer:")
    mmlu = lines(tmp_path / "mmlu.jsonl", SUM)
    forced = read(data_of(f"{mmlu}:format=completion", bpe, sequences=1), bpe)
    assert forced == [("Question: What is 2 + 2?\nAnswer:", f" {number}") for number in (3, 4, 5, 6)]
    packed = tmp_path / "mmlu.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "mmlu.jsonl").read_bytes()))
    again = data_of(f"task:{packed}:format=completion", bpe, sequences=1)
    assert read(again, bpe) == forced and again.name == "task:mmlu.jsonl.gz"


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            GOOD | {"answer": 2},
            r"the answer 2 is none of the choices; it must be an index from 0 to 1, or a label \(A, B\)",
        ),
        (GOOD | {"answer": -1}, "the answer -1 is none"),
        (GOOD | {"answer": True}, "the answer True is none"),
        (GOOD | {"answer": "C"}, "the answer 'C' is none of the choices; .*, or the text of a choice"),
        (
            GOOD | {"choices": ["B", "A"], "answer": "A"},
            "the label of one choice and the text of another: give its index",
        ),
        (GOOD | {"choices": ["a"]}, "must be a list of 2 to 26 texts"),
        (GOOD | {"choices": "ab"}, "must be a list of 2 to 26 texts"),
        (GOOD | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "there must be as many labels as choices, 2"),
        (GOOD | {"choices": ["a", 2]}, "the field 'choice 2' holds a int, not text"),
        (GOOD | {"choices": ["a", " "]}, "the field 'choice 2' is empty"),
        (GOOD | {"prompt": ""}, "the field 'prompt' is empty"),
        (GOOD | {"prompt": "a\ud83d"}, "half of a surrogate pair"),
        (
            {"prompt": "p", "answer": 0},
            "there is no field 'choices', which the lines before have; letters needs question",
        ),
        ([1], "a JSON list, but each line must be one object"),
    ],
)
def test_a_bad_line_is_told_by_its_number(line: Any, fault: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", GOOD, line)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{fault}") as error:
        calibrate(source, make_tokenizer())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "the answer -1 is none of the choices; .* 0 to 1$"),
        ({"passage": "p", "question": "q", "answer": "yes"}, "must be true or false, not 'yes'"),
        (
            {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"},
            "must have a blank, _, and words after",
        ),
        ({"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""}, "the answer '' is none .* label"),
        (SUM | {"answer": "4"}, r"the answer '4' is none .* label \(A, B, C, D\)$"),
        (
            {"text": "a b"},
            "the fields 'text' are those of no task; letters needs .*; completion needs .*; answer needs",
        ),
        ({}, "the fields none are those of no task"),
    ],
)
def test_a_line_that_is_no_question(line: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: .*{fault}"):
        calibrate(lines(tmp_path / "a.jsonl", line), make_tokenizer())


def test_files_that_are_no_task(tmp_path: Path) -> None:
    faults = {
        "none.jsonl": "there is no such file; a task is a file of JSON lines",
        ".": "it is a folder; a task is a file of JSON lines",
        "a.txt": r"a task is a file of JSON lines \(\.jsonl or \.json",
        "empty.jsonl": "the file is empty",
        "broken.jsonl": "broken.jsonl, line 1: not JSON",
        "one.jsonl:format=last_word": "line 1: the text needs at least two words",
    }
    contents = {"a.txt": "x", "empty.jsonl": "\n", "broken.jsonl": '{"prompt": ', "one.jsonl": '{"text": "a"}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for name, fault in faults.items():
        with pytest.raises(DataError, match=fault) as error:
            calibrate(f"task:{tmp_path}/{name}", make_tokenizer())
        assert "\n" not in str(error.value)


def test_options_of_a_task(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    mmlu, plain = lines(tmp_path / "mmlu.jsonl", *many(3)), lines(tmp_path / "plain.jsonl", GOOD)
    other = lines(tmp_path / "dev.jsonl", *many(3, "other")).removeprefix("task:")
    for source, fault in {
        f"{mmlu}:shot=5": "unknown option of a task 'shot'. Did you mean 'shots'? Available: dev, format, shots",
        f"{mmlu}:format=letter": "unknown format of a task 'letter'. Did you mean 'letters'? Available: answer, comp",
        f"{mmlu}:shots=-1": "the option shots of a task is a number from 0, not '-1'",
        f"{plain}:shots=5": "plain.jsonl: the option 'shots' belongs to the letters format, not to completion",
        f"{mmlu}:dev=x:format=completion": "the option 'dev' belongs to the letters format",
    }.items():
        with pytest.raises(OptionError, match=re.escape(fault)):
            calibrate(source, bpe)
    with pytest.raises(DataError, match=r"dev\.jsonl: there is no question about 'x', as in .*mmlu\.jsonl, line \d"):
        calibrate(f"{mmlu}:dev={other}", bpe)
    with pytest.raises(DataError, match=r"line 1: the fields .* are those of no task in answer; answer needs prompt"):
        calibrate(lines(tmp_path / "arc.jsonl", CASES["arc"][0]) + ":format=answer", bpe)
    with pytest.raises(DataError, match=r"plain\.jsonl, line 1: .*no task in last_word; last_word needs text$"):
        calibrate(f"{plain}:format=last_word", bpe)


def test_one_task_alone_is_no_mixture(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", GOOD)
    assert type(calibrate(f"{source}=3", make_tokenizer(), sequences=1)) is Data
    assert type(calibrate(f"{source},{source}:format=completion", make_tokenizer(), sequences=2)) is Mixture
