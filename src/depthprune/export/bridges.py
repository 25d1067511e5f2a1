"""The same cut by other tools, as text to paste: mergekit, llama.cpp and vLLM, for plans of whole blocks.

How they count, as read in their sources: mergekit's ``layer_range`` is 0-based with an exclusive end, like Python's
ranges; ``llama-quantize --prune-layers`` takes 0-based numbers of the model that goes in, in any order, and renumbers
what is left (block 0 may go). Both lower the number of blocks in the metadata and touch nothing else there, so neither
can be used where a model's configuration goes by block; the text then says so instead.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from depthprune.errors import ExportError, PlanError
from depthprune.files import read_json
from depthprune.plan import Plan
from depthprune.shrink import RULES

TYPE = "Q4_K_M"
_PERIODS = ("sliding_window_pattern", "_interval", "_period", "_every_n_layers", "_layer_step", "_sparse_step")


def bridges(plan: Plan, blocks: int, folder: str | Path) -> dict[str, str]:
    """The commands of other tools that make, or serve, what a plan of whole blocks makes.

    ``blocks`` is the number of blocks of the dense model; ``folder`` the pruned model's, as depthprune writes it: what
    the servers are given, and whose configuration says whether the other tools can make the cut themselves. By name:
    ``mergekit`` (a YAML file), ``llama-quantize``, ``vllm`` and ``llama-server`` (lines of a shell).
    Raises ``ExportError`` where the plan drops parts of blocks or leaves stand-ins, which these tools cannot say, and
    ``PlanError`` where it does not fit the number of blocks.
    """
    gone, folder = dropped(plan, blocks), Path(folder)
    dense = plan.model.id
    gguf, smaller = f"{_last(dense)}-f16.gguf", f"{folder.name}-{TYPE.lower()}.gguf"
    reason = by_block(folder)
    stale = f"# {{}} cannot make this cut: {reason}, and it leaves that as it was.\n" if reason else ""
    note = ""
    if (folder / "recovery.json").is_file():
        note = f"# This makes the cut alone: the weights recovered afterwards are only in {_quoted(folder)}.\n"
    instead = f"# Use the folder itself: {_quoted(folder)}\n"
    convert = f"python convert_hf_to_gguf.py {_quoted(folder)} --outtype f16 --outfile {_quoted(f'{folder.name}.gguf')}"
    prune = f"llama-quantize --prune-layers {','.join(map(str, gone))} {_quoted(gguf)} {_quoted(smaller)} {TYPE}"
    where = _quoted(dense) if Path(dense).is_dir() else f"--remote {_quoted(dense)}"
    whole = f"python convert_hf_to_gguf.py {where} --outtype f16 --outfile {_quoted(gguf)}"
    shaky = f"# Compare its answers with the folder's: {reason}, of which GGUF keeps only part.\n" if reason else ""
    return {
        "mergekit": stale.format("mergekit") + instead if stale else note + passthrough(plan, blocks),
        "llama-quantize": stale.format("llama-quantize") + instead if stale else f"{note}{whole}\n{prune}\n",
        "vllm": f"vllm serve {_quoted(folder)} --served-model-name {_quoted(folder.name)}\n",
        "llama-server": f"{shaky}{convert}\nllama-server -m {_quoted(f'{folder.name}.gguf')}\n",
    }


def passthrough(plan: Plan, blocks: int) -> str:
    """The plan as a file for ``mergekit-yaml``: one slice for each run of blocks that stay.

    Raises ``ExportError`` and ``PlanError`` as ``bridges`` does.
    """
    model: dict[str, str] = {"path": plan.model.id}
    if plan.model.revision:
        model["revision"] = plan.model.revision
    lines = ["# mergekit-yaml THIS_FILE OUT", "merge_method: passthrough", "slices:"]
    for first, end in kept(dropped(plan, blocks), blocks):
        lines += [
            "  - sources:",
            f"      - model: {{model: {json.dumps(model, ensure_ascii=False)}}}",
            f"        layer_range: [{first}, {end}]",
        ]
    return "\n".join(lines) + "\n"


def dropped(plan: Plan, blocks: int) -> list[int]:
    """The numbers of the blocks that a plan drops, ascending. Raises as ``bridges`` does."""
    parts = [str(unit) for unit in plan.drop if unit.sublayer or unit.stack]
    if parts:
        raise ExportError(f"other tools drop whole blocks only, and this plan drops {parts[0]}: form hf can say that")
    if plan.stand_in:
        raise ExportError(
            f"other tools have no stand-ins, and this plan has one for {next(iter(plan.stand_in))}: form hf can hold it"
        )
    gone = sorted(unit.block for unit in plan.drop)
    if gone and gone[-1] >= blocks:
        raise PlanError(f"this plan drops block {gone[-1]}, and the model has blocks 0 to {blocks - 1}")
    if not gone or len(gone) == blocks:
        raise PlanError(f"this plan drops {'nothing' if not gone else 'every block'}: there is no command for that")
    return gone


def kept(gone: list[int], blocks: int) -> list[tuple[int, int]]:
    """The runs of blocks that stay, as 0-based ranges with an exclusive end."""
    stay = [index for index in range(blocks) if index not in gone]
    runs = [[index for _, index in run] for _, run in groupby(enumerate(stay), key=lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1] + 1) for run in runs]


def by_block(folder: Path) -> str:
    """What of a folder's configuration goes by block, in a few words; empty where all blocks are of one kind.

    A folder without a configuration says nothing.
    """
    if not (folder / "config.json").is_file():
        return ""
    config: dict[str, Any] = read_json(folder / "config.json")
    text: Mapping[str, Any] = config.get("text_config") or config
    count = text.get("num_hidden_layers")
    for name, value in text.items():
        if isinstance(value, list) and len(value) == count and len({json.dumps(entry) for entry in value}) > 1:
            return f"{name} goes by block"
        if name in RULES and value:
            return f"{name} goes by block"
        if name.endswith(_PERIODS) and isinstance(value, int) and value > 1:
            return f"{name} makes every {value}th block another"
    if text.get("layer_types") and (text.get("sliding_window") or text.get("attention_chunk_size")):
        return "layer_types goes by block"  # of one kind here, but not where the windows are for others
    return ""


def _last(name: str) -> str:
    return Path(name).name or name


def _quoted(text: str | Path) -> str:
    return shlex.quote(str(text))
