"""What lies in a model folder, read without loading it: configuration, and names, shapes and places of the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthprune.errors import DepthpruneError
from depthprune.export.proof import Proof
from depthprune.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
AHEAD = ("eh_proj", "enorm", "hnorm", "shared_head")  # blocks with these predict further tokens; numbered last
SHOWN = 6  # of a list, in a message

_NUMBERED = re.compile(r"(?P<stack>.+?)\.(?P<number>\d+)\.(?P<rest>.+)")
_ASIDE = re.compile(r"vision|visual|audio|speech|(^|[._])mtp([._]|$)")  # towers and heads beside the decoder


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and how large it is there."""

    file: Path
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, eq=False)
class Contents:
    """A folder as its files describe it; ``faults`` are those of the files themselves.

    ``blocks`` has, by number and by what follows the number, the full names of the tensors of the largest stack.
    """

    path: Path
    config: Mapping[str, Any] | None
    tensors: Mapping[str, Entry]
    blocks: Mapping[int, Mapping[str, str]]
    faults: tuple[Proof, ...]

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of the configuration that is the decoder's."""
        config = self.config or {}
        part = config.get("text_config")
        return part if isinstance(part, dict) else config


def read(path: str | Path) -> Contents:
    """Read the headers of a folder's files. Nothing is raised for a broken folder: what is wrong is in ``faults``."""
    path = Path(path)
    faults: list[Proof] = []
    config = _config(path, faults)
    tensors = _tensors(path, faults)
    return Contents(path, config, tensors, _stack(tensors), tuple(faults))


def split(name: str) -> tuple[str, int, str] | None:
    """The stack, the number and the rest of a tensor's name; None for a tensor outside of all blocks."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (match["stack"], int(match["number"]), match["rest"])


def shown(values: Any) -> str:
    """The first few of a list, as text."""
    values = [str(value) for value in values]
    return ", ".join(values[:SHOWN]) + (", …" if len(values) > SHOWN else "")


def without_weights(config: Mapping[str, Any]) -> dict[int, frozenset[str]]:
    """Blocks that a configuration says lack parts, and which; ``{""}`` where nothing is said of which.

    Read from depthprune's own note, from transformers' ``per_layer_config`` and from ``block_configs`` of Nemotron-NAS.
    """
    lacking: dict[int, frozenset[str]] = {}
    skipped = (config.get("depthprune") or {}).get("skip") or {}
    for index, parts in skipped.items():
        lacking[int(index)] = frozenset(parts)
    for index, block in (config.get("per_layer_config") or {}).items():
        if isinstance(block, dict) and block.get("skip"):
            lacking.setdefault(int(index), frozenset({""}))
    for number, block in enumerate(config.get("block_configs") or ()):
        if isinstance(block, dict) and any(isinstance(p, dict) and p.get("no_op") for p in block.values()):
            lacking[number] = frozenset({""})
    return lacking


def _config(path: Path, faults: list[Proof]) -> Mapping[str, Any] | None:
    file = path / "config.json"
    if not file.is_file():
        faults.append(Proof("config.json", False, "there is none, so nothing can load this folder"))
        return None
    try:
        config = read_json(file)
    except DepthpruneError as error:
        faults.append(Proof("config.json", False, str(error).removeprefix(f"{file} ")))
        return None
    if not isinstance(config, dict):
        faults.append(Proof("config.json", False, "it holds no JSON object"))
        return None
    return config


def _tensors(path: Path, faults: list[Proof]) -> dict[str, Entry]:
    """The tensors of all files that transformers would read: one file of weights, or those that an index names."""
    wanted: Mapping[str, Any] = {}
    if (path / WEIGHTS).is_file():
        files = [path / WEIGHTS]
    elif (path / INDEX).is_file():
        try:
            wanted = read_json(path / INDEX)["weight_map"]
            files = [path / name for name in sorted(set(wanted.values()))]
        except (DepthpruneError, KeyError, TypeError, AttributeError):
            faults.append(Proof(INDEX, False, 'it is damaged: it needs "weight_map", with a file for each tensor'))
            return {}
    else:
        other = sorted(file.name for file in path.glob("*") if file.suffix in (".safetensors", ".bin", ".gguf", ".pt"))
        has = f"; there is {shown(other)}" if other else ""
        faults.append(Proof("weights", False, f"there is neither {WEIGHTS} nor {INDEX}{has}"))
        return {}
    if absent := [file.name for file in files if not file.is_file()]:
        verb = "is" if len(absent) == 1 else "are"
        faults.append(Proof(INDEX, False, f"it names {shown(absent)}, which {verb} not there"))
    tensors: dict[str, Entry] = {}
    damaged = set(absent)
    for file in files:
        if file.is_file():
            found, fault = header(file)
            tensors |= found
            if fault:
                damaged.add(file.name)
                faults.append(Proof(file.name, False, fault))
    if lost := [name for name, file in wanted.items() if name not in tensors and file not in damaged]:
        where = f"{lost[0]} in {wanted[lost[0]]}"
        faults.append(Proof(INDEX, False, f"it names {len(lost)} tensors that the files do not hold, such as {where}"))
    return tensors


def header(file: Path) -> tuple[dict[str, Entry], str]:
    """The tensors that the header of a safetensors file names, and what is wrong with the file (empty: nothing)."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            return {}, "it is a Git LFS pointer, not the weights: fetch them with git lfs pull"
        if len(start) < 8 or not 2 <= length <= size - 8:
            return {}, f"it is truncated, or no safetensors file: {size:,} bytes do not hold its header"
        text = opened.read(length)
    try:
        fields = json.loads(text)
        tensors = {
            name: Entry(file, tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in fields.items()
            if name != "__metadata__"
        }
        end = 8 + length + max((e["data_offsets"][1] for n, e in fields.items() if n != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}, "it is no safetensors file: its header cannot be read"
    return tensors, f"it is truncated: {end:,} bytes by its header, {size:,} on disk" if end > size else ""


def _stack(tensors: Mapping[str, Entry]) -> dict[int, dict[str, str]]:
    """The stack of blocks with the most bytes, leaving out those of other towers."""
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    sizes: dict[str, int] = {}
    for name, entry in tensors.items():
        if (parts := split(name)) is not None and not _ASIDE.search(parts[0]):
            stack, number, rest = parts
            stacks.setdefault(stack, {}).setdefault(number, {})[rest] = name
            sizes[stack] = sizes.get(stack, 0) + entry.bytes
    if not stacks:
        return {}
    found = stacks[max(stacks, key=lambda stack: sizes[stack])]
    return {number: found[number] for number in sorted(found)}
