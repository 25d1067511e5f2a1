"""Sources: every kind of file and place, mixtures, and what is said where one cannot be read."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from depthprune import hub, sources
from depthprune.errors import DataError
from depthprune.sources import Source, documents, joined_name, parse, records, shares, split, task


def read(path: str | Path, **options: object) -> list[str]:
    return ["".join(document) for document in documents(str(path), **options)]  # type: ignore[arg-type]


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXT = "Grüße, 世界 🙂\n" * 9000


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str, pack: type[bytes]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(TEXT.encode()))
    assert len(TEXT) > sources._READ
    assert read(path) == [TEXT]


def test_marks_and_line_ends_of_other_systems_are_undone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(tmp_path / "a.txt") == ["one\ntwo\n"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert read(tmp_path / "a.jsonl") == ["one", "two"]


def test_a_file_of_another_suffix_is_plain_text(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text("a b")
    assert read(tmp_path / "wiki.test.raw") == ["a b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_columns(tmp_path: Path, name: str) -> None:
    rows = [
        {"text": "one", "prompt": "Q", "response": "A", "a+b": "plus", "id": 1},
        {"text": None, "prompt": "Q:\n", "response": "B", "a+b": "", "id": 2},
    ]
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert read(path) == ["one", ""]
    assert read(path, field="prompt+response") == ["Q\nA", "Q:\nB"]
    assert read(path, field="a+b") == ["plus", ""]
    place = str(path) if name == "a.parquet" else f"{path}, line 1"
    with pytest.raises(DataError) as error:
        read(path, field="prompt+answer")
    known = "'text', 'prompt', 'response', 'a+b', 'id'"
    assert one_line(error) == f"{place}: there is no field 'answer'; it has {known}"
    with pytest.raises(DataError, match=r"(line|row) 1: the field 'id' holds a int, not text"):
        read(path, field="id")


def test_a_folder_holds_all_its_readable_files(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("b.txt", "z/a.txt", "notes.md", ".hidden.txt", ".cache/c.txt"):
        (tmp_path / name).write_text(name)
    write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "model.gz").write_bytes(gzip.compress(b"no text"))
    parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "d.parquet")
    assert read(tmp_path) == ["one", "two", "b.txt", "packed", "row", "z/a.txt"]


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"the folder '.*' has no file to read \(\.txt, \.jsonl, \.json, \.parquet"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"there is no file or folder '.*no\.txt'"):
        read(tmp_path / "no.txt")
    with pytest.raises(DataError) as error:
        read("a whole text\nby mistake " * 1000)
    assert len(one_line(error)) < 400


@pytest.mark.parametrize("before", [0, 7, (1 << 20) - 1, (1 << 20) + 5])
def test_a_wrong_encoding_is_told_by_its_byte(tmp_path: Path, before: int) -> None:
    good = ("é" * (before // 2 + 1)).encode()[: before - before % 2] + b"x" * (before % 2)
    path = tmp_path / "latin.txt"
    path.write_bytes(good + b"\xe9 la carte")
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}: not UTF-8 at byte {before};" in one_line(error)


def test_a_wrong_encoding_at_the_end_or_in_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes("aé".encode()[:-1])
    with pytest.raises(DataError, match="not UTF-8 at byte 1;"):
        read(path)
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress(b'{"text": "a"}\n{"text": "\xff"}\n'))
    with pytest.raises(DataError, match="not UTF-8 at byte 24 of the unpacked text;"):
        read(packed)


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_damaged_archives(tmp_path: Path, suffix: str, pack: type[bytes]) -> None:
    archive = pack(TEXT.encode())
    path = tmp_path / f"a.txt.{suffix}"
    middle = len(archive) // 2
    flipped = archive[:middle] + bytes(255 - b for b in archive[middle : middle + 40]) + archive[middle + 40 :]
    flooded = archive[:10] + b"\xff" * 8 + archive[18:]
    for defect in (archive[:-20], b"no archive at all", flipped, flooded):
        path.write_bytes(defect)
        with pytest.raises(DataError, match=r"a\.txt\..z: truncated or damaged archive"):
            read(path)


def test_a_directory_cannot_be_opened_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").mkdir()
    monkeypatch.setattr(sources, "_files", lambda path: [Path(path)])
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Is a directory\)"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{'text': 1}", "not JSON .*each line must be one object"),
        ('{"text": "a"', "not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
        ('["a"]', "a JSON list, but each line"),
        ('"a"', "a JSON str, but each line"),
        ('{"body": "a", "id": 1}', "there is no field 'text'; it has 'body', 'id'"),
        ("{}", "there is no field 'text'; it has none"),
        ('{"text": ["a"]}', "the field 'text' holds a list, not text"),
        ('{"text": "a\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude42"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: .*{fault}") as error:
        read(path)
    one_line(error)


def test_what_is_no_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["row"] * 100}), path)
    whole = path.read_bytes()
    for defect in (whole[:-10], b"no table", b""):
        path.write_bytes(defect)
        with pytest.raises(DataError, match=r"a\.parquet: no readable Parquet file") as error:
            read(path)
        one_line(error)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "depthprune\[parquet\]"'):
        read(path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
def test_a_data_set_is_streamed_through_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *({"text": f"t{i}", "body": f"b{i}"} for i in range(50)))
    write_lines(folder / "test.jsonl", {"text": "test", "body": "b"})
    expected = [f"t{i}" for i in range(50)]
    assert read(f"hub:{folder}") == expected
    assert read(f"hub:{folder}::train:body") == [f"b{i}" for i in range(50)]
    assert read(f"hub:{folder}:default:test", field="text") == ["test"]
    shuffled = read(f"hub:{folder}", seed=-1)
    assert shuffled != expected and sorted(shuffled) == sorted(expected)
    assert shuffled == read(f"hub:{folder}", seed=-1) != read(f"hub:{folder}", seed=1)
    with pytest.raises(DataError, match="row 1: there is no field 'content'; it has 'text', 'body'"):
        read(f"hub:{folder}::train:content")
    for missing in (f"hub:{folder}:default:validation", f"hub:{folder}:en:train", f"hub:{tmp_path / 'none'}"):
        with pytest.raises(DataError, match="cannot be loaded") as error:
            read(missing)
        one_line(error)


def test_the_address_of_a_data_set_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments: object, **options: object) -> Iterator[dict[str, str]]:
        calls.append((arguments, options))
        return iter([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "away", lambda: "")
    assert read("hub:allenai/c4:en:validation") == ["a"]
    assert calls == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]
    for wrong in ("hub:", "hub:allenai/c4:en", "hub:a:b:c:d:e"):
        with pytest.raises(DataError, match=r"write a Hub data set as hub:NAME:CONFIG:SPLIT\[:COLUMN\]"):
            read(wrong)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "depthprune\[hub\]"'):
        read("hub:allenai/c4:en:train")


def test_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("a.txt") == (Source("a.txt", 1.0),)
    assert parse("a.txt=3, hub:x/y:en:train=1") == (Source("a.txt", 0.75), Source("hub:x/y:en:train", 0.25))
    assert parse(["a.txt", "b.txt"]) == parse("a.txt,b.txt") == (Source("a.txt", 0.5), Source("b.txt", 0.5))
    assert parse("run=3.txt=2,b=1e0") == (Source("run=3.txt", 2 / 3), Source("b", 1 / 3))
    assert [source.name for source in parse("d/a.txt,hub:x/y")] == ["a.txt", "hub:x/y"]


def test_what_exists_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = "a.txt=0.7,b.jsonl=0.3"
    assert len(parse(odd)) == 2
    Path(odd).write_text("x")
    assert parse(odd) == (Source(odd, 1.0),)
    Path("c=1").write_text("x")
    assert parse("c=1,d") == (Source("c=1", 0.5), Source("d", 0.5))
    assert parse([odd + "=3", "d=1"]) == (Source(odd, 0.75), Source("d", 0.25))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("a.txt=0.7,b.txt", "'b.txt' has no weight"),
        ("a.txt=0,b.txt=1", "'a.txt=0' .*positive number"),
        ("a.txt=-1,b.txt=1", "positive number"),
        ("a.txt=nan,b.txt=1", "positive number"),
        ("a.txt=inf,b.txt=1", "positive number"),
        ("=1,b.txt=1", "positive number after a name"),
        ("a.txt=much,b.txt=1", "'much' is no weight for 'a.txt'"),
        ("a.txt=1,", "an empty name"),
        ("", "an empty name"),
        ([], "no data"),
        ("a.txt=1,a.txt=2", "'a.txt' is named twice"),
    ],
)
def test_bad_mixtures(source: str | list[str], fault: str) -> None:
    with pytest.raises(DataError, match=fault) as error:
        parse(source)
    one_line(error)


def test_tasks_in_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("task:a.jsonl") == (Source("task:a.jsonl", 1.0),)
    assert parse("task:a.jsonl:shots=5") == (Source("task:a.jsonl:shots=5", 1.0),)
    assert parse("task:d/a.jsonl:shots=5=3,b.txt=1") == (
        Source("task:d/a.jsonl:shots=5", 0.75),
        Source("b.txt", 0.25),
    )
    assert parse("task:a.jsonl=3,task:a.jsonl:shots=0=1")[0] == Source("task:a.jsonl", 0.75)
    assert task("task:d/a.jsonl:shots=5:dev=d/dev.jsonl") == ("d/a.jsonl", {"shots": "5", "dev": "d/dev.jsonl"})
    odd = Path("a=1:x=2.jsonl")
    assert task(f"task:{odd}") == ("a=1", {"x": "2.jsonl"})
    odd.write_text("x")
    assert task(f"task:{odd}:shots=1") == (str(odd), {"shots": "1"})
    named = parse("task:d/a.jsonl:dev=d/dev.jsonl=3,d/b.txt=1")
    assert joined_name(named) == "task:a.jsonl=0.75,b.txt=0.25" and joined_name(named[:1]) == "task:a.jsonl"
    assert [source.is_task for source in named] == [True, False]
    assert shares(named, 9) == [7, 2]


def test_a_task_is_no_text_and_a_record_is_told_by_its_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": 3})
    assert list(records(str(path))) == [(f"{path}, line 1", {"prompt": "a"}), (f"{path}, line 2", {"prompt": 3})]
    with pytest.raises(DataError, match="is a task, and text is needed here") as error:
        read(f"task:{path}")
    one_line(error)


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_split_loses_nothing_and_prefers_lines_and_words(size: int) -> None:
    text = "one two three\nfour fivesixseveneightnine\n\n ten" * 5
    for step in (1, 10, 10_000):
        pieces = list(split((text[i : i + step] for i in range(0, len(text), step)), size))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= size for piece in pieces)
    assert list(split(["one two\nthree"], 9)) == ["one two\n", "three"]
    assert list(split(["one two three"], 9)) == ["one two", " three"]
    assert list(split(["onetwothree"], 9)) == ["onetwothr", "ee"]
    assert list(split([""], 9)) == []
