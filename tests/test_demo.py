from __future__ import annotations

import hashlib
import lzma
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthprune import demo
from depthprune.errors import CheckpointError, DepthpruneError


def read(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.unpack(tmp_path_factory.mktemp("demo") / "model")


def copy_of_package(destination: Path) -> Path:
    """Copy the packed model, and return the copy's archive."""
    shutil.copytree(demo.ARCHIVE.parent, destination)
    return destination / demo.ARCHIVE.name


def test_unpacks_the_recorded_bytes_and_nothing_else(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with lzma.open(demo.ARCHIVE) as archive, (folder / "model.safetensors").open("rb") as weights:
        assert hashlib.file_digest(archive, "sha256").hexdigest() == demo.SHA256
        assert hashlib.file_digest(weights, "sha256").hexdigest() == demo.SHA256


def test_second_call_changes_no_file_and_mends_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    (mine / "notes.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in mine.iterdir()}
    assert demo.unpack(mine) == mine
    assert {path.name: path.stat().st_mtime_ns for path in mine.iterdir()} == before

    (mine / "model.safetensors").write_bytes(b"half a model")
    (mine / "config.json").write_text("{}")
    demo.unpack(mine)
    for name in ("model.safetensors", "config.json"):
        assert (mine / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in mine.iterdir()) == sorted(before)


@pytest.mark.parametrize("defect", ["a flipped byte", "cut short", "empty", "another file"])
def test_damaged_archive_is_refused(defect: str, tmp_path: Path) -> None:
    archive = copy_of_package(tmp_path / "package")
    content = bytearray(archive.read_bytes())
    if defect == "a flipped byte":
        content[len(content) // 2] ^= 1
    archive.write_bytes(
        {
            "a flipped byte": bytes(content),
            "cut short": bytes(content[: len(content) // 2]),
            "empty": b"",
            "another file": lzma.compress(b"some other model"),
        }[defect]
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.xz: the demo model is") as caught:
        demo.unpack(tmp_path / "out", archive=archive)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "out").iterdir() if "safetensors" in path.name]


def test_intact_copy_is_accepted(tmp_path: Path) -> None:
    demo.unpack(tmp_path / "out", archive=copy_of_package(tmp_path / "package"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DepthpruneError, match=r"cannot unpack the demo model into .*: Not a directory"):
        demo.unpack(tmp_path / "file" / "model")


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache() == tmp_path / "depthprune" / "demo" / demo.NAME
    assert demo.unpack() == demo.cache()
    assert (demo.cache() / "model.safetensors").stat().st_mode & 0o777 == 0o644
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.cache() == tmp_path / "home" / ".cache" / "depthprune" / "demo" / demo.NAME


def test_texts_are_long_and_share_no_paragraph() -> None:
    calibration, test = read(demo.CALIBRATION), read(demo.TEST)
    assert len(calibration) > 550_000
    assert len(test) > 280_000
    # Short lines of dialogue ("Yes.") occur in any book; a long paragraph in both would be a leak.
    shared = {paragraph for paragraph in calibration.split("\n\n") if len(paragraph) > 60} & set(test.split("\n\n"))
    assert not shared


def test_model_reads_the_test_text_far_better_than_chance(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = read(demo.TEST)[:6000]
    ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert model.config.num_hidden_layers == 16
    assert loss.exp() < 80  # chance is 8192
