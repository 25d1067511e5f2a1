"""Where text and tasks come from: files, folders, Hub data sets, and mixtures of them.

A *document* is an iterator of strings that belong together, so that a file of any size is read in pieces.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from depthprune import hub
from depthprune.errors import DataError

HUB = "hub:"
TASK = "task:"
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

_READ = 1 << 16  # characters a read
_HUB_BUFFER = 10_000  # documents that a streamed data set holds to shuffle them
_SURROGATE = re.compile("[\ud800-\udfff]")
_OPTION = re.compile(r":(\w+)=([^:=]*)$")  # at the end of a task: what looks like a weight is the value of an option


@dataclass(frozen=True)
class Source:
    """One place to read text or a task from, and its share of the rows (all shares sum to 1)."""

    path: str
    weight: float

    @property
    def name(self) -> str:
        """The file's or folder's own name, ``task:`` before that of a task; the whole address of a Hub data set."""
        if self.path.startswith(HUB):
            return self.path
        if self.is_task:
            return TASK + Path(task(self.path)[0]).name
        return Path(self.path).name or self.path

    @property
    def is_task(self) -> bool:
        """Whether this is a file of questions, ``task:FILE``, not text."""
        return self.path.startswith(TASK)


def parse(source: str | Sequence[str]) -> tuple[Source, ...]:
    """Split a mixture such as ``"a.txt=0.7,b.jsonl=0.3"`` into its sources.

    Weights are normalised; without any weight the shares are equal. What exists under its full name is that file,
    whatever commas or equal signs the name holds. The parts of a list are not split at commas.
    Raises ``DataError`` where weights are missing for some parts, not positive, or no numbers.
    """
    whole = [source] if isinstance(source, str) and _exists(source) else None
    named = whole or (source.split(",") if isinstance(source, str) else list(source))
    parts = [_part(text.strip()) for text in named]
    if not parts:
        raise DataError("no data: name a file, a folder, a hub: data set or a task:FILE")
    paths = [path for path, _ in parts]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise DataError(f"{twice!r} is named twice in the mixture; give it one weight")
    weights = [weight for _, weight in parts if weight is not None]
    if not weights:
        weights = [1.0] * len(parts)
    if len(weights) < len(parts):
        bare = next(path for path, weight in parts if weight is None)
        raise DataError(f"{bare!r} has no weight in the mixture; give every part one (a.txt=0.7) or none of them")
    total = math.fsum(weights)
    return tuple(Source(path, weight / total) for path, weight in zip(paths, weights, strict=True))


def shares(parts: Sequence[Source], sequences: int) -> list[int]:
    """Share ``sequences`` out by weight, by the largest remainder, so that they add up.

    Raises ``DataError`` where a part gets none.
    """
    exact = [part.weight * sequences for part in parts]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: sequences - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        part = parts[counts.index(0)]
        raise DataError(
            f"{part.path}: its weight {part.weight:.3g} gives no row of {sequences}; ask for more sequences"
        )
    return counts


def joined_name(parts: Sequence[Source]) -> str:
    """The name of a mixture, as short as the names of its sources."""
    return ",".join(part.name if len(parts) == 1 else f"{part.name}={part.weight:.4g}" for part in parts)


def documents(path: str, *, field: str = "text", seed: int | None = None) -> Iterator[Iterator[str]]:
    """Read the documents of one source, in order, each an iterator of consecutive strings.

    A text file is one document, a line of JSON or a row of Parquet is one document, and a folder holds those of all
    its files, sorted by path. Only Hub data sets look at ``seed``: they are streamed, shuffled where it is not None.
    ``field`` names the column of JSON and Parquet; ``"prompt+response"`` joins two.
    Finish one document before taking the next. Raises ``DataError``, naming the file and line.
    """
    if path.startswith(HUB):
        yield from _hub(path, field, seed)
        return
    if path.startswith(TASK) and not _exists(path):
        raise DataError(f"{path!r} is a task, and text is needed here; name a text file, a folder or a hub: data set")
    for file in _files(path):
        form = _form(file)
        if form == ".parquet":
            yield from _parquet(file, field)
        elif form in (".jsonl", ".json"):
            yield from _json_lines(file, field)
        else:
            yield _text(file)


def task(path: str) -> tuple[str, dict[str, str]]:
    """Take ``task:FILE:OPTION=VALUE…`` apart: the file, and its options as they are written."""
    rest = path.removeprefix(TASK)
    options: dict[str, str] = {}
    while not _exists(rest) and (found := _OPTION.search(rest)):
        options = {found[1]: found[2]} | options
        rest = rest[: found.start()]
    return rest, options


def records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a file of JSON lines: of each its place, ``"FILE, line 3"``, and its fields. Raises ``DataError``."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        kind = "it is a folder" if file.is_dir() else "there is no such file"
        raise DataError(f"{path[:200]!r}: {kind}; a task is a file of JSON lines, task:FILE or task:FILE:OPTION=VALUE")
    if _form(file) not in (".jsonl", ".json"):
        raise DataError(f"{path!r}: a task is a file of JSON lines (.jsonl or .json, also as .gz or .xz)")
    yield from _json_rows(file)


def whole(text: str, where: str) -> str:
    """The text itself, if a tokenizer takes it. Raises ``DataError`` for half a surrogate pair."""
    if _SURROGATE.search(text):
        raise DataError(f"{where}: the text holds half of a surrogate pair, which no tokenizer takes; remove it")
    return text


def split(document: Iterable[str], size: int) -> Iterator[str]:
    """Cut a document in pieces of at most ``size`` characters, after a line or before a space if there is one."""
    held = ""
    for text in document:
        held += text
        start = 0
        while len(held) - start > size:
            line = held.rfind("\n", start, start + size) + 1
            space = held.rfind(" ", start + 1, start + size)
            cut = line if line > start else space if space > start else start + size
            yield held[start:cut]
            start = cut
        held = held[start:]
    if held:
        yield held


def _part(text: str) -> tuple[str, float | None]:
    if not text:
        raise DataError("an empty name in the data mixture; write it like a.txt=0.7,b.jsonl=0.3")
    if text.startswith("self:"):
        raise DataError(f"{text!r} is text that a model writes itself, only for `recover --data` and `--recover-data`")
    path, equals, number = text.rpartition("=")
    is_option = text.startswith(TASK) and _OPTION.search(text.removeprefix(TASK)) is not None
    if not equals or is_option or _exists(text.removeprefix(TASK)):
        return text, None
    try:
        weight = float(number)
    except ValueError:
        raise DataError(f"there is no file {text!r}, and {number!r} is no weight for {path!r}") from None
    if not (path and 0 < weight < math.inf):
        raise DataError(f"{text!r} in the mixture: a weight is a positive number after a name, as in a.txt=0.7")
    return path, weight


def _exists(path: str) -> bool:
    # os.path, not pathlib: a text given by mistake for a path is "no file", however long.
    return os.path.exists(os.path.expanduser(path))


def _files(path: str) -> list[Path]:
    place = Path(os.path.expanduser(path))
    if os.path.isdir(place):
        found = (file for file in place.rglob("*") if file.is_file() and _form(file) in SUFFIXES)
        files = sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(place).parts))
        if not files:
            raise DataError(f"the folder {path!r} has no file to read ({', '.join(SUFFIXES)}, .txt.gz, .txt.xz)")
        return files
    if not _exists(path):
        raise DataError(f"there is no file or folder {path[:200]!r} (for texts in memory use from_texts)")
    return [place]


def _form(path: Path) -> str:
    return Path(path.stem).suffix.lower() if _packed(path) else path.suffix.lower()


def _packed(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".xz")


def _bytes(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return lzma.open(path, "rb") if suffix == ".xz" else path.open("rb")


@contextmanager
def _lines(path: Path) -> Iterator[io.TextIOWrapper]:
    try:
        with _bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
            try:
                yield stream
            except UnicodeDecodeError:
                place = f"byte {_first_bad_byte(path)}" + (" of the unpacked text" if _packed(path) else "")
                fault = f"{path}: not UTF-8 at {place}; convert it (iconv -f LATIN1 -t UTF-8), or leave it out"
                raise DataError(fault) from None
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _first_bad_byte(path: Path) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0
    with _bytes(path) as raw:
        while True:
            block = raw.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return before - pending + error.start
            assert block, "the file decodes after all"
            before += len(block)


def _text(path: Path) -> Iterator[str]:
    with _lines(path) as stream:
        while text := stream.read(_READ):
            yield text


def _json_lines(path: Path, field: str) -> Iterator[Iterator[str]]:
    for where, row in _json_rows(path):
        yield iter([_row_text(row, field, where)])


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _lines(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error}); each line must be one object") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON {type(row).__name__}, but each line must be one object")
            yield where, row


def _parquet(path: Path, field: str) -> Iterator[Iterator[str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f'{path}: Parquet needs pyarrow: pip install "depthprune[parquet]"') from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = _fields(file.schema_arrow.names, field, str(path))
            rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield iter([_row_text(row, field, f"{path}, row {number}")])
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no readable Parquet file ({_first_line(error)})") from error


def _hub(path: str, field: str, seed: int | None) -> Iterator[Iterator[str]]:
    name, *rest = path.removeprefix(HUB).split(":")
    if not name or len(rest) not in (0, 2, 3):
        raise DataError(f"{path!r}: write a Hub data set as hub:NAME:CONFIG:SPLIT[:COLUMN] (CONFIG may be empty)")
    config, part, column = (*rest, "", "", "")[:3]
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f'{path}: Hub data sets need datasets: pip install "depthprune[hub]"') from None
    if not _exists(name) and (away := hub.away()):
        raise DataError(f"{path}: cannot be loaded ({away}); save the text to a file and name that")
    try:
        rows = load_dataset(name, config or None, split=part or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be loaded ({_first_line(error)})") from error
    if seed is not None:
        rows = rows.shuffle(seed=seed % 2**32, buffer_size=_HUB_BUFFER)
    for number, row in enumerate(rows, start=1):
        yield iter([_row_text(row, column or field, f"{path}, row {number}")])


def _fields(known: Iterable[str], field: str, where: str) -> list[str]:
    names = list(known)
    fields = [field] if field in names else field.split("+")
    missing = next((name for name in fields if name not in names), None)
    if missing is not None:
        raise DataError(f"{where}: there is no field {missing!r}; it has {', '.join(map(repr, names)) or 'none'}")
    return fields


def _row_text(row: Mapping[str, object], field: str, where: str) -> str:
    joined = ""
    for name in _fields(row, field, where):
        value = row[name]
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: the field {name!r} holds a {type(value).__name__}, not text")
        joined += "\n" if joined and value and not joined[-1].isspace() else ""
        joined += value or ""
    return whole(joined, where)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
