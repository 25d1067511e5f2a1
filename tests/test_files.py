"""Files and folders appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from depthprune.errors import DepthpruneError
from depthprune.files import new_folder, read_json, to_json, why, write_json, write_text

FULL = OSError(errno.ENOSPC, "No space left on device")


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fails_at(call: int, original: Callable[..., None]) -> Callable[..., None]:
    """The function, with a full disk at one of its calls."""
    calls = 0

    def maybe(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise FULL
        original(*args, **options)

    return maybe


def test_text_is_written_with_the_folders_above_it(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "text.txt"
    assert write_text(str(file), "ümläut\n") == file
    assert write_text(file, "second\n") == file
    assert listing(tmp_path) == {"a/b/text.txt": "second\n"}


@pytest.mark.parametrize("broken", ["os.replace", "pathlib.Path.write_text"])
def test_a_full_disk_keeps_the_old_text_and_leaves_no_part(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text.txt", "old")

    def full(*args: object, **_: object) -> None:
        if broken.endswith("write_text"):
            with open(str(args[0]), "w") as part:
                part.write("ha")  # half a file, then no room
        raise FULL

    monkeypatch.setattr(broken, full)
    with pytest.raises(DepthpruneError) as caught:
        write_text(tmp_path / "text.txt", "new")
    assert str(caught.value) == f"cannot write {tmp_path / 'text.txt'}: No space left on device"
    assert listing(tmp_path) == {"text.txt": "old"}


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_place_that_is_no_name_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    write_text(here / "precious.txt", "precious")
    monkeypatch.chdir(here)
    with pytest.raises(DepthpruneError, match="cannot write"):
        write_text(path, "text")
    with pytest.raises(DepthpruneError, match="cannot write"), new_folder(path) as folder:
        (folder / "x").write_text("x")
    assert listing(tmp_path) == {"here/precious.txt": "precious"}


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ümläut"], "b": {}}
    write_json(tmp_path / "x.json", value)
    assert read_json(str(tmp_path / "x.json")) == value
    assert (tmp_path / "x.json").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot read .*: No such file"), (b"{", "is not JSON: .*line 1"), (b"\xff", "is not JSON: 'utf-8' codec")],
)
def test_json_that_is_missing_or_damaged(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DepthpruneError, match=says) as caught:
        read_json(tmp_path / "x.json")
    assert "x.json" in str(caught.value) and "\n" not in str(caught.value)


def fill(path: Path, text: str, fail: BaseException | None = None) -> None:
    with new_folder(path) as folder:
        write_text(folder / "deep" / "file.txt", text)
        assert folder.parent == path.parent  # beside its place, so that renaming cannot run out of disk
        if fail is not None:
            raise fail


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "above" / "model"
    with new_folder(place) as folder:
        (folder / "file.txt").write_text("new")
        assert not place.exists()
    assert listing(tmp_path) == {"above/model/file.txt": "new"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "model" / "left over.txt", "old")
    fill(tmp_path / "model", "new")
    assert listing(tmp_path) == {"model/deep/file.txt": "new"}


@pytest.mark.parametrize("failure", [RuntimeError("crash"), KeyboardInterrupt(), DepthpruneError("refused")], ids=repr)
@pytest.mark.parametrize("old", [False, True])
def test_a_crash_leaves_nothing_and_keeps_the_old_folder(failure: BaseException, old: bool, tmp_path: Path) -> None:
    if old:
        fill(tmp_path / "model", "old")
    before = listing(tmp_path)
    with pytest.raises(type(failure)) as caught:
        fill(tmp_path / "model", "new", failure)
    assert caught.value is failure
    assert listing(tmp_path) == before and (tmp_path / "model").exists() == old


def test_a_full_disk_while_filling_is_one_line(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    with pytest.raises(DepthpruneError) as caught:
        fill(tmp_path / "model", "new", FULL)
    assert str(caught.value) == f"cannot write {tmp_path / 'model'}: No space left on device"
    assert listing(tmp_path) == {"model/deep/file.txt": "old"}


def test_a_rename_that_fails_keeps_the_old_folder_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "model", "old")
    failures = 0
    for call in range(1, 10):
        calls_of_text = 1  # writing the file in the folder renames too
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", fails_at(calls_of_text + call, os.replace))
            try:
                fill(tmp_path / "model", "new")
            except DepthpruneError as error:
                assert str(error) == f"cannot write {tmp_path / 'model'}: No space left on device"
                assert listing(tmp_path) == {"model/deep/file.txt": "old"}
                failures += 1
            else:
                break
    assert failures >= 2 and listing(tmp_path) == {"model/deep/file.txt": "new"}


def test_what_a_killed_run_left_behind_is_cleared_away(tmp_path: Path) -> None:
    """A kill leaves a part; between the two renames it leaves the old folder aside, and nothing in its place."""
    fill(tmp_path / "model", "old")
    shutil.copytree(tmp_path / "model", tmp_path / ".model.part")
    write_text(tmp_path / ".model.part" / "stale.txt", "stale")
    fill(tmp_path / "model", "new")
    assert listing(tmp_path) == {"model/deep/file.txt": "new"}

    os.rename(tmp_path / "model", tmp_path / ".model.replaced")
    with pytest.raises(DepthpruneError):
        fill(tmp_path / "model", "newer", FULL)
    assert listing(tmp_path) == {"model/deep/file.txt": "new"}
    shutil.copytree(tmp_path / "model", tmp_path / ".model.replaced")
    fill(tmp_path / "model", "newer")
    assert listing(tmp_path) == {"model/deep/file.txt": "newer"}


def test_a_file_in_the_way_of_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(DepthpruneError, match=r"cannot write .*model: Not a directory"):
        fill(tmp_path / "model", "new")
    with pytest.raises(DepthpruneError, match=r"cannot write .*below: "):
        fill(tmp_path / "model" / "below", "new")
    assert listing(tmp_path) == {"model": "a file"}


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    fill(tmp_path / "large disk" / "model", "old")
    (tmp_path / "model").symlink_to(tmp_path / "large disk" / "model")
    with new_folder(tmp_path / "model") as folder:
        (folder / "file.txt").write_text("new")
    assert (tmp_path / "model").is_symlink()
    assert listing(tmp_path / "large disk") == {"model/file.txt": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"large disk", "model"}


def test_why_says_it_in_the_words_of_the_system() -> None:
    assert why(FULL) == "No space left on device"
    assert why(OSError("something else")) == "something else"


def test_a_figure_that_is_not_finite_is_null(tmp_path: Path) -> None:
    given = {
        "a": math.inf,
        "b": [math.nan, 1.5, (-math.inf, 2)],
        "c": {"d": math.nan, "e": True, "f": None, "g": "nan"},
    }
    assert "NaN" in json.dumps(given) and "Infinity" in json.dumps(given)  # what would be written otherwise
    text = write_json(tmp_path / "value.json", given).read_text()
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read == {"a": None, "b": [None, 1.5, [None, 2]], "c": {"d": None, "e": True, "f": None, "g": "nan"}}
    assert to_json(read) + "\n" == text
