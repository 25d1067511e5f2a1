"""llama.cpp's own tools: its converter, its quantizer, its tokenizer; each in a process of its own."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthprune import demo, runtimes
from depthprune.errors import ExportError, OptionError
from depthprune.export.run_converter import UNPROVEN

SCRIPT = "convert_hf_to_gguf.py"
HERE = Path(__file__).parent  # with the scripts that run elsewhere
RULES = (
    "gpt-2", "llama-bpe", "qwen2", "smollm", "starcoder", "gpt-4o", "tekken", "deepseek-llm", "deepseek-v3",
    "command-r", "olmo", "stablelm2", "default", "falcon", "mpt", "dbrx", "exaone", "chatglm-bpe", "refact", "viking",
    "bloom",
)  # fmt: skip
"""Splitting rules of llama.cpp that a byte-level tokenizer may follow, by name, the commonest first."""

SAMPLES = (
    "Hello, world! It's 3 o'clock; we'll see 1,024 of them\tin 2024...",
    "I'VE  two  spaces,\nnew\n\nlines, trailing blanks   \n  and (brackets) {x: [1, 22, 333, 4444]} #tags @names",
    "def f(x):\n    return x ** 2 - 1.5e-3  # comment\n\nif __name__ == '__main__':\n\tprint(f(10))",
    "Ärger, naïve café, Übermut; el niño; Привет, мир; Γειά σου; 你好，世界；こんにちは；안녕하세요; مرحبا; שלום; नमस्ते",  # noqa: RUF001
    "🚀 (rocket) 😶‍🌫️ ✅ — “quoted” ‘text’ … ½ € £ ¥ × ÷ ≤ ≥ →",  # noqa: RUF001
)
BOOK = 6000  # letters of a book besides


def converter(named: str = "") -> Path:
    """Find llama.cpp's converter: a script or a checkout that is named, ``$LLAMA_CPP``, or on the path.

    Raises ``OptionError`` where there is none.
    """
    for source in filter(None, (named, os.environ.get("LLAMA_CPP"))):
        place = Path(source).expanduser()
        script = place / SCRIPT if place.is_dir() else place
        if script.is_file():
            return script.absolute()
        raise OptionError(f"there is no {SCRIPT} at {source}: name a checkout of llama.cpp")
    found = shutil.which(SCRIPT)
    if found is None:
        raise OptionError(
            f"form gguf needs llama.cpp's {SCRIPT}: name a checkout of llama.cpp with gguf:converter=PATH or "
            "LLAMA_CPP=PATH (the source archive of llama-cpp-python holds one, in vendor/llama.cpp)"
        )
    return Path(found)


def convert(script: Path, folder: Path, target: Path, kind: str, vocabulary: bool) -> Path:
    """Convert a plain folder. Raises ``ExportError`` with what the converter says."""
    options = [] if vocabulary else ["--without-vocabulary"]
    command = [sys.executable, "-P", str(HERE / "run_converter.py"), str(script), *options, str(folder)]
    command += ["--outfile", str(target), "--outtype", kind]
    done = _run(command)
    if done.returncode or not target.is_file():
        raise ExportError(f"llama.cpp's converter cannot write this model: {_last(done)}")
    return target


def quantize(source: Path, target: Path, kind: str) -> Path:
    """Quantize a file with llama.cpp, through llama-cpp-python or the program ``llama-quantize``.

    Raises ``OptionError`` where neither is there, ``ExportError`` with what it says where it fails.
    """
    program = shutil.which("llama-quantize")
    try:
        answer = ask({"do": "quantize", "source": str(source), "target": str(target), "type": kind})
    except OptionError:
        if program is None:
            raise OptionError(
                f"gguf:type={kind} is quantized by llama.cpp: pip install 'depthprune[llama-cpp]', "
                "put llama-quantize on the path, or choose f32, f16, bf16 or q8_0"
            ) from None
        done = _run([program, "--allow-requantize", str(source), str(target), kind])
        answer = {"error": _last(done)} if done.returncode else {}
    if "error" in answer or not target.is_file():
        raise ExportError(f"llama.cpp cannot quantize this model to {kind}: {answer.get('error', 'it wrote nothing')}")
    return target


def splitting(file: Path, rule: str, tokenizer: Any) -> tuple[str, str]:
    """The splitting rule under which llama.cpp makes the tokens of a tokenizer, and a warning (empty: none).

    ``rule`` is the one that the converter chose. Compared are texts of many kinds and a book.
    Raises ``ExportError`` where the converter knows none and no rule of llama.cpp's is the right one.
    """
    lines = texts()
    want = [list(tokenizer(line)["input_ids"]) for line in lines]
    rules = RULES if rule == UNPROVEN else (rule,)
    try:
        answer = ask({"do": "tokens", "path": str(file), "texts": lines, "rules": rules})
    except OptionError as error:
        if rule != UNPROVEN:
            return rule, ""
        raise ExportError(
            "llama.cpp's converter does not know this tokenizer, and which of llama.cpp's rules it follows can only be "
            f"told by trying: {error}"
        ) from None
    if "error" in answer:
        raise ExportError(f"llama.cpp cannot read the tokenizer that its converter wrote: {answer['error']}")
    wrong = {name: _differ(lines, want, answer["rules"].get(name)) for name in rules}
    best = min(rules, key=lambda name: len(wrong[name]))
    if not wrong[best]:
        return best, ""
    what = f"{len(wrong[best])} of {len(lines)} texts, such as {wrong[best][0][:40]!r}"
    if rule == UNPROVEN:
        raise ExportError(
            f"llama.cpp has no rule for this tokenizer: with its nearest, {best}, other tokens come out for {what}; "
            "form hf can"
        )
    return rule, f"llama.cpp makes other tokens than the model's tokenizer of {what}"


def texts() -> list[str]:
    """The texts that tokenizers are compared on: samples of scripts, code and signs, and paragraphs of a book."""
    book = lzma.decompress(demo.TEST.read_bytes()).decode("utf-8")
    paragraphs = [part for part in book[:BOOK].split("\n\n") if part.strip()]
    return [*SAMPLES, *paragraphs]


def scores(tokenizer_json: Mapping[str, Any], tokens: Sequence[str]) -> list[float] | None:
    """The scores by which sentencepiece merges, from the order of merges in a tokenizer.json; None where it has none.

    The converter reads them from ``tokenizer.model`` only, and gives all tokens the same where that is missing.
    """
    model = tokenizer_json.get("model", {})
    if model.get("type") != "BPE" or not model.get("merges"):
        return None
    rank: dict[str, int] = {}
    for number, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), number)
    return [-float(rank[token]) if token in rank else -float(len(model["merges"]) + 1) for token in tokens]


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the Python that has llama-cpp-python. Raises ``OptionError`` where none has it."""
    python = runtimes.python("llama.cpp")
    with tempfile.TemporaryDirectory(prefix="depthprune-") as scratch:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        done = _run([python, "-P", str(HERE / "run_llama_cpp.py"), str(file)])
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"depthprune"')]
    answer: dict[str, Any] = json.loads(lines[-1])["depthprune"] if lines else {"error": _last(done)}
    return answer


def _differ(lines: Sequence[str], want: Sequence[Sequence[int]], have: Sequence[Sequence[int]] | None) -> list[str]:
    """The texts of which other tokens come out; all where none do."""
    return [line for number, line in enumerate(lines) if have is None or list(have[number]) != want[number]]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that says something, which is the error's."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("INFO", 'File "', "^", "~"))]
    return ((said or lines or [f"exit {done.returncode}"])[-1]).removeprefix("ERROR:hf-to-gguf:")[:300]
