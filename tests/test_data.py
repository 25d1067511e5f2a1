"""Data: provenance, mixtures, digests, overlap and the guards, against naive computations."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from depthprune import sources
from depthprune.data import Data, Mixture, calibrate, check_vocabulary, digest, from_texts, overlap, warn_overlap
from depthprune.errors import DataError, OptionError
from depthprune.sources import Source
from tiny_text import FIRST, make_tokenizer, random_documents, words


def jsonl(path: Path, documents: list[list[int]], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: words(d)}) + "\n" for d in documents))
    return str(path)


def test_files_give_what_their_texts_give(tmp_path: Path) -> None:
    documents = random_documents(60, seed=2)
    texts = [words(d) for d in documents]
    path = jsonl(tmp_path / "a.jsonl", documents)
    from_file = calibrate(path, make_tokenizer(), sequences=10, length=16, seed=4)
    from_list = from_texts(texts, make_tokenizer(), sequences=10, length=16, seed=4)
    assert from_file.digest == from_list.digest
    assert from_file.name == "a.jsonl" and from_list.name == "texts"
    assert from_file.describe() == {
        "name": "a.jsonl",
        "tokens": 160,
        "sequences": 10,
        "length": 16,
        "digest": from_file.digest,
        "seed": 4,
        "sources": [{"path": path, "weight": 1.0, "documents": 60, "tokens": 160}],
    }
    assert json.loads(json.dumps(from_file.describe())) == from_file.describe()


@pytest.mark.parametrize("pack", [True, False])
def test_a_mixture_holds_the_shares_it_names(tmp_path: Path, pack: bool) -> None:
    halves = [[[i] * 20 for i in range(FIRST + at, FIRST + at + 100)] for at in (0, 200)]
    a, b = jsonl(tmp_path / "a.jsonl", halves[0]), jsonl(tmp_path / "b.jsonl", halves[1])
    data = calibrate(f"{a}=2,{b}=1", make_tokenizer(), sequences=20, length=10, pack=pack)
    first = (data.tokens[:, 5] < FIRST + 200).tolist()
    assert sum(first) == 13 and first != sorted(first, reverse=True)
    assert [s["tokens"] for s in data.sources] == [130, 70]
    assert [s["weight"] for s in data.sources] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert [s["documents"] for s in data.sources] == [100, 100]
    assert data.name == "a.jsonl=0.6667,b.jsonl=0.3333"
    in_order = calibrate([a, b], make_tokenizer(), sequences=20, length=10, pack=pack, shuffle=False)
    assert (in_order.tokens[:, 5] < FIRST + 200).tolist() == [True] * 10 + [False] * 10


def test_shares_add_up_to_what_is_asked() -> None:
    for weights in itertools.product([1, 2, 3.7], repeat=3):
        for sequences in range(8, 20):
            parts = [Source(str(i), w / sum(weights)) for i, w in enumerate(weights)]
            shares = sources.shares(parts, sequences)
            assert sum(shares) == sequences
            assert all(abs(share - part.weight * sequences) < 1 for share, part in zip(shares, parts, strict=True))


def test_a_share_below_one_row_is_refused(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / name, random_documents(20, seed=3)) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(DataError, match=r"b\.jsonl: its weight 0\.01 gives no row of 10"):
        calibrate(f"{a}=99,{b}=1", make_tokenizer(), sequences=10, length=8)


def test_head_and_digest() -> None:
    data = from_texts([words(d) for d in random_documents(80, seed=6)], make_tokenizer(), sequences=12, length=16)
    head = data.head(5)
    assert type(head) is Data and torch.equal(head.tokens, data.tokens[:5]) and head.sequences == 5
    assert head.digest == digest(data.tokens[:5], data.mask[:5]) != data.digest
    assert data.head(99).digest == data.digest
    raw = b"(12, 16)" + b"".join(int(i).to_bytes(8, "little") for i in data.tokens.flatten()) + b"\1" * 12 * 16
    assert data.digest == "sha256:" + hashlib.sha256(raw).hexdigest()
    changed_mask = data.mask.clone()
    changed_mask[0, -1] = False
    changed_token = data.tokens.clone()
    changed_token[3, 2] += 1
    digests = [digest(data.tokens, changed_mask), digest(changed_token, data.mask)]
    digests.append(digest(data.tokens.view(24, 8), data.mask.view(24, 8)))
    assert len({data.digest, *digests}) == 4
    with pytest.raises(OptionError, match="at least one row"):
        data.head(0)


def make_data(rows: list[list[int]], mask: list[list[bool]] | None = None) -> Data:
    tokens = torch.tensor(rows)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return Data(tokens, real, "rows", digest(tokens, real), 0, ())


def naive_overlap(a: Data, b: Data, n: int) -> float:
    def windows(data: Data) -> list[tuple[int, ...]]:
        found = []
        for row, mask in zip(data.tokens.tolist(), data.mask.tolist(), strict=True):
            found += [tuple(row[i : i + n]) for i in range(len(row) - n + 1) if all(mask[i : i + n])]
        return found

    known, asked = set(windows(a)), windows(b)
    return sum(window in known for window in asked) / len(asked) if asked else 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_overlap_equals_sets_of_windows(n: int) -> None:
    draw = random.Random(n)
    seen = set()
    for _ in range(10):
        made = []
        for rows, length in ((6, 14), (5, 11)):
            ids = [[draw.randrange(3) for _ in range(length)] for _ in range(rows)]
            made.append(make_data(ids, [[i < draw.randint(2, 2 * length) for i in range(length)] for _ in range(rows)]))
        a, b = made
        assert overlap(a, b, n=n) == pytest.approx(naive_overlap(a, b, n))
        seen.add(overlap(a, b, n=n))
    assert n < 3 or len(seen) > 3


def test_overlap_is_all_or_nothing_for_equal_or_different_text() -> None:
    texts = [words(d) for d in random_documents(80, seed=7)]
    other = [words(d) for d in random_documents(80, seed=8)]
    a, b = (from_texts(t, make_tokenizer(), sequences=20, length=32, name=n) for t, n in ((texts, "a"), (other, "b")))
    assert overlap(a, a) == 1.0 and overlap(a, b) == 0.0
    assert warn_overlap(a, b) is None
    mixed = from_texts([*texts[:4], *other], make_tokenizer(), sequences=70, length=32, name="mixed")
    whole = from_texts(texts, make_tokenizer(), sequences=45, length=48, name="whole")
    assert 0.01 < overlap(whole, mixed) < 0.2
    warning = warn_overlap(whole, mixed)
    assert warning is not None and "of mixed also occurs in whole" in warning and "\n" not in warning


def test_padding_is_no_overlap() -> None:
    mask = [[True] * 4 + [False] * 28]
    a, b = make_data([[5, 6, 7, 8] + [0] * 28], mask), make_data([[9, 10, 11, 12] + [0] * 28], mask)
    assert overlap(a, b, n=3) == 0.0
    everything = [[True] * 32]
    assert overlap(make_data(a.tokens.tolist(), everything), make_data(b.tokens.tolist(), everything), n=3) > 0.8


def test_rows_shorter_than_the_window_are_still_compared() -> None:
    a, b = make_data([[5, 6, 7, 8]]), make_data([[5, 6, 7, 8], [5, 6, 7, 9]])
    assert overlap(a, b) == 0.5


def test_vocabulary() -> None:
    data = make_data([[1, 2, 9]])
    check_vocabulary(data, 10)
    check_vocabulary(torch.tensor([0, 9]), 10)
    check_vocabulary(torch.tensor([], dtype=torch.int64), 10)
    with pytest.raises(DataError, match=r"id 9 but the model has 9 embeddings: tokenizer of another model\?"):
        check_vocabulary(data, 9)
    with pytest.raises(DataError, match="id -1 "):
        check_vocabulary(torch.tensor([-1, 2]), 10)
    padded = make_data([[1, 2, 9]], [[True, True, False]])
    with pytest.raises(DataError, match="id 9 "):
        check_vocabulary(padded, 9)


def test_data_that_is_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="all masked"):
        make_data([[1, 2, 3]], [[False, False, False]])
    with pytest.raises(DataError, match="all masked"):
        make_data([[1, 2, 3]], [[True, False, True]])
    with pytest.raises(DataError, match="one shape"):
        make_data([[1, 2, 3]], [[True, True]])
    with pytest.raises(DataError, match="must be int64 and mask bool"):
        Data(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), "x", "", 0, ())


def make_task(path: Path, count: int = 10) -> str:
    rows = ({"prompt": f"w{i} w{i}", "choices": ["w300", "w301 w302"], "answer": i % 2} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task:{path}"


def test_text_and_tasks_are_the_parts_of_a_mixture(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / f"{name}.jsonl", random_documents(60, seed=n)) for n, name in enumerate("ab"))
    one, two = make_task(tmp_path / "one.jsonl"), make_task(tmp_path / "two.jsonl", 20)
    options = {"length": 8, "seed": 3}
    mixed = calibrate(f"{one}=2,{a}=3,{two}:format=completion=4,{b}=1", make_tokenizer(), sequences=20, **options)
    assert isinstance(mixed, Mixture)
    text, first, second = mixed.parts
    assert mixed.weights == (pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0.4))
    assert text.digest == calibrate(f"{a}=3,{b}=1", make_tokenizer(), sequences=8, **options).digest
    assert text.name == "a.jsonl=0.75,b.jsonl=0.25" and text.scored is None
    assert first.digest == calibrate(one, make_tokenizer(), sequences=4, **options).digest
    assert second.digest == calibrate(two, make_tokenizer(), sequences=8, **options).digest
    assert mixed.name == "task:one.jsonl=0.2,a.jsonl=0.3,task:two.jsonl=0.4,b.jsonl=0.1"
    assert (mixed.sequences, mixed.length, mixed.seed) == (8 + 2 * 4 + 2 * 8, 8, 3)
    assert mixed.tokens_total == sum(part.tokens_total for part in mixed.parts)
    assert mixed.predicted == 8 * 7 + 4 * 3 + 8 * 3
    described = mixed.describe()
    assert json.loads(json.dumps(described)) == described
    assert [*described] == [*text.describe(), "parts"]
    parts = described["parts"]
    assert parts == [{**part.describe(), "weight": w} for part, w in zip(mixed.parts, mixed.weights, strict=True)]
    weights = [source["weight"] for source in described["sources"]]  # type: ignore[attr-defined]
    assert weights == [pytest.approx(w) for w in (0.3, 0.1, 0.2, 0.4)]


def test_what_a_mixture_is_made_of_is_in_its_digest(tmp_path: Path) -> None:
    a, one = jsonl(tmp_path / "a.jsonl", random_documents(60, seed=1)), make_task(tmp_path / "one.jsonl")
    made = calibrate(f"{a},{one}", make_tokenizer(), sequences=8, length=8)
    assert isinstance(made, Mixture)
    right = made.right_only()
    assert [part.sequences for part in right.parts] == [4, 4] and right.parts[0] is made.parts[0]
    others = [replace(made, weights=(0.25, 0.75)), replace(made, parts=made.parts[::-1]), right]
    assert len({made.digest, *(other.digest for other in others)}) == 4
    for weights in ((0.5,), (0.5, 0.6), (0.0, 1.0)):
        with pytest.raises(AssertionError):
            replace(made, weights=weights)


def test_a_mixture_is_checked_and_compared_like_its_parts(tmp_path: Path) -> None:
    a, one = jsonl(tmp_path / "a.jsonl", random_documents(60, seed=1)), make_task(tmp_path / "one.jsonl")
    made = calibrate(f"{a},{one}", make_tokenizer(), sequences=8, length=32)
    assert isinstance(made, Mixture)
    text, task = made.parts
    assert overlap(made, text) == overlap(text, made) == 1.0 and overlap(made, task, n=4) == 1.0
    assert overlap(text, task, n=4) == 0.0 and warn_overlap(made, text) is not None
    check_vocabulary(made, FIRST + 400)
    with pytest.raises(DataError, match=f"id {FIRST + 302} but"):
        check_vocabulary(replace(made, parts=(task, text)), FIRST + 302)


def test_options_are_checked(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", random_documents(20, seed=1))
    with pytest.raises(OptionError, match="sequences must be at least 1, not 0"):
        calibrate(path, make_tokenizer(), sequences=0)
    with pytest.raises(OptionError, match="length must be at least 2 tokens, not 1"):
        calibrate(path, make_tokenizer(), length=1)
    with pytest.raises(OptionError, match="length must be at least 3 tokens, not 2"):
        calibrate(path, make_tokenizer(bos=("<pad>", "<s>")), length=2)
    with pytest.raises(OptionError, match="not one string"):
        from_texts("w1 w2", make_tokenizer())
    assert calibrate(path, make_tokenizer(), length=2, sequences=4).length == 2
