"""What is wrong with a folder, read from its files: the ways in which pruned models break, one line for each.

``diagnose`` finds what a loader passes over in silence: blocks that the configuration counts and the weights lack (they
come up random), numbers with gaps, lists by block that do not follow the blocks. With the dense model at hand it also
says which of its blocks each block is (``origin.py``), and compares the configuration with that of the same cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from depthprune.discover import REFUSALS
from depthprune.errors import PlanError
from depthprune.export.contents import AHEAD, Contents, read, shown, without_weights
from depthprune.export.origin import Origin, origins
from depthprune.export.proof import Proof
from depthprune.families import LAYER_COUNTS
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.shrink import RULES, shrink
from depthprune.units import Unit

# Fields with one entry for each block, and fields that list numbers of blocks, where no dense model says which are so.
BY_BLOCK = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "indexer_types",
    "attention_layers",
    "hybrid_override_pattern",
)
NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")


def diagnose(path: str | Path, against: Model | None = None) -> list[Proof]:
    """Say what is wrong with a folder, from its files alone; nothing for a sound one.

    Reads ``config.json``, the headers of the weights and their index; with the dense model also a few numbers of each
    tensor, to tell which dense block it is. Loads nothing and runs no code of the folder. Raises nothing for a broken
    folder: that is what the findings are for.
    """
    contents = read(path)
    found = list(contents.faults)
    experts: list[Proof] = []
    if contents.config is not None and not contents.config.get("is_encoder_decoder"):
        found += _blocks(contents)
        experts += [] if found else _experts(contents)
        found += _lists(contents)
    if against is not None and contents.blocks:
        known = origins(contents, against)
        found += [*_weights(contents, known), *_plan(contents, known, against)]
        told = {each.name for each in found}.intersection(BY_BLOCK)
        found += [each for each in _patterns(contents, known, against) if each.name not in told]
    return found + [each for each in experts if each.name not in {other.name for other in found}]


def inferred(path: str | Path, against: Model) -> Plan | None:
    """The plan that leads from the dense model to a folder without a ``plan.json``, as its weights tell.

    None where blocks are not the dense model's, or stand in another order.
    """
    contents = read(path)
    known = origins(contents, against)
    kept = [origin.block for origin in known.values() if origin.block is not None]
    if not kept or len(kept) < len(known) or any(a >= b for a, b in pairwise(kept)):
        return None
    gone = [Unit("", block.index) for block in against.layout.blocks if block.index not in kept]
    gone += [Unit("", o.block, name) for o in known.values() if o.block is not None for name in o.lacks]
    return Plan(against.reference, against.layout.canonical(gone))


def depth(text: Mapping[str, Any]) -> int | None:
    """How many blocks a configuration counts; None where it does not say."""
    counts = [text[name] for name in LAYER_COUNTS if isinstance(text.get(name), int)]
    lists = [text[name] for name in ("layer_types", "layers_block_type") if isinstance(text.get(name), list)]
    return counts[0] if counts else len(lists[0]) if lists else None


def _blocks(contents: Contents) -> Iterator[Proof]:
    """Whether the weights have the blocks that the configuration counts."""
    count, text = depth(contents.text), contents.text
    if count is None or not contents.blocks or text.get("num_hidden_groups"):  # groups: blocks that share weights
        return
    lacking = without_weights(text)
    numbers = [
        n for n, names in contents.blocks.items() if n < count or not any(name.startswith(AHEAD) for name in names)
    ]
    missing = [n for n in range(count) if n not in contents.blocks and n not in lacking]
    beyond = [n for n in numbers if n >= count]
    last = f"0 to {count - 1}"
    holes = [n for n in range(max(numbers, default=-1)) if n not in contents.blocks and n not in lacking]
    if holes:
        effect = f"; blocks {shown(missing)} would come up random" if missing else ""
        effect += f"; {shown(beyond)} would be left out" if beyond else ""
        detail = f"the weights have blocks {shown(numbers)}, not renumbered, and config.json counts {last}{effect}"
        yield Proof("numbers of the blocks", False, detail)
    elif missing:
        detail = f"config.json counts {count} blocks and the weights have {len(numbers)}"
        yield Proof("number of blocks", False, f"{detail}: {shown(missing)} would come up random")
    elif beyond:
        detail = f"config.json counts {count} blocks and the weights have {len(numbers)}"
        yield Proof("number of blocks", False, f"{detail}: {shown(beyond)} would be left out")


def _lists(contents: Contents) -> Iterator[Proof]:
    """Whether lists by block are as long as the stack, and lists of numbers name blocks that there are."""
    text, count = contents.text, depth(contents.text)
    if count is None:
        return
    for name in BY_BLOCK:
        if isinstance(value := text.get(name), list | str) and len(value) != count:
            yield Proof(name, False, f"it has {len(value)} entries for {count} blocks")
    for name in NUMBERS:
        value = text.get(name)
        if absent := [n for n in value if isinstance(n, int) and n >= count] if isinstance(value, list) else []:
            yield Proof(name, False, f"it names block {shown(absent)}, and the blocks are 0 to {count - 1}")


def _experts(contents: Contents) -> Iterator[Proof]:
    """Whether the blocks that have experts are those of which the configuration says so."""
    count = depth(contents.text)
    name, sparse = sparse_blocks(contents.text, count or 0)
    have = {n for n, names in contents.blocks.items() if any(".experts." in f".{rest}" for rest in names)}
    if not name or not have:
        return
    numbers = [n for n in contents.blocks if n < (count or 0) and n not in without_weights(contents.text)]
    bare, extra = [n for n in numbers if n in sparse - have], [n for n in numbers if n in have - sparse]
    parts = [f"block {shown(bare)} has experts, and the weights have none there"] if bare else []
    parts += [f"block {shown(extra)} has no experts, and the weights have some there"] if extra else []
    if parts:
        yield Proof(name, False, f"by it {'; '.join(parts)}")


def sparse_blocks(text: Mapping[str, Any], count: int) -> tuple[str, set[int]]:
    """Which field of a configuration says which blocks have experts, and which they are; no name where none does."""
    blocks = range(count)
    if isinstance(kinds := text.get("mlp_layer_types"), list):
        return "mlp_layer_types", {i for i, kind in enumerate(kinds) if kind == "sparse"}
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(first := text.get(name), int):
            return name, {i for i in blocks if i >= first}
    if isinstance(listed := text.get("moe_layers"), list):
        return "moe_layers", set(listed)
    if isinstance(dense := text.get("mlp_only_layers"), list):
        step = text.get("decoder_sparse_step") or 1
        return "mlp_only_layers", {i for i in blocks if i not in dense and (i + 1) % step == 0}
    return "", set()


def _weights(contents: Contents, known: Mapping[int, Origin]) -> Iterator[Proof]:
    """Whether every block is one of the dense model's, unchanged, in order and whole."""
    trained = (contents.path / "recovery.json").is_file() or (contents.config or {}).get("quantization_config")
    if not trained:
        if foreign := [n for n, origin in known.items() if origin.block is None and origin.compared]:
            what = "is none of the dense model's" if len(foreign) == 1 else "are none of the dense model's"
            yield Proof("weights", False, f"block {shown(foreign)} {what}: random, or of another model")
        changed = {n: origin for n, origin in known.items() if origin.block is not None and origin.changed}
        for number, origin in list(changed.items())[:3]:
            what = f"{len(origin.changed)} of its tensors differ, such as {origin.changed[0]}"
            more = f" ({len(changed)} such blocks)" if len(changed) > 1 else ""
            yield Proof("weights", False, f"block {number} is dense block {origin.block}, but {what}{more}")
    kept = [(number, origin.block) for number, origin in known.items() if origin.block is not None]
    for (first, old), (second, other) in pairwise(kept):
        if other <= old:
            what = "both are" if other == old else f"are dense blocks {old} and"
            yield Proof("order of the blocks", False, f"blocks {first} and {second} {what} dense block {other}")
            break
    lacking = without_weights(contents.text)
    for number, origin in known.items():
        said = lacking.get(number, frozenset())
        if gone := [name for name in origin.lacks if "" not in said and not said.issuperset(name.split("+"))]:
            detail = f"block {number} (dense block {origin.block}) has no weights of {shown(gone)}, and config.json"
            yield Proof("sublayers", False, f"{detail} does not say so: they would come up random")


def _plan(contents: Contents, known: Mapping[int, Origin], against: Model) -> Iterator[Proof]:
    """Whether the blocks that are left are those that the folder's plan leaves."""
    if not (contents.path / "plan.json").is_file() or without_weights(contents.text):
        return
    try:
        gone = against.layout.gone(Plan.load(contents.path / "plan.json").drop)
    except PlanError as error:
        yield Proof("plan.json", False, str(error))
        return
    kept = [origin.block for origin in known.values() if origin.block is not None]
    left = [block.index for block in against.layout.blocks if gone.get(block.index, ()) is not None]
    if len(kept) == len(known) and kept != left:
        yield Proof("plan.json", False, f"by it dense blocks {shown(left)} are left, and the weights are {shown(kept)}")


def _patterns(contents: Contents, known: Mapping[int, Origin], against: Model) -> Iterator[Proof]:
    """Whether each field of the configuration that goes by block follows the blocks that were kept."""
    config = against.net.config
    dense = config.get_text_config(decoder=True)
    if contents.text.get("model_type") != dense.model_type:
        return
    text, refusal = built(contents, config)
    if refusal and not list(_lists(contents)):
        yield Proof("config.json", False, f"transformers refuses it: {refusal}")
    total, fields = len(against.layout.blocks), dense.to_dict()
    # Where a block will stand: at its number, or where numbers have gaps that nothing explains in order.
    gaps = set(range(max(known, default=0))) - known.keys() - without_weights(contents.text).keys()
    places = zip(range(len(known)) if gaps else known, known.values(), strict=True)
    kept = {place: origin.block for place, origin in places if origin.block is not None}
    for name, values in fields.items():
        value = text.get(name)
        if name in RULES or not isinstance(values, list | tuple) or len(values) != total or not isinstance(value, list):
            continue
        wrong = [(new, old) for new, old in kept.items() if new < len(value) and value[new] != values[old]]
        if wrong:
            new, old = wrong[0]
            detail = f"block {new} is dense block {old}, which was {values[old]}; config.json says {value[new]}"
            more = f" (as for {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            yield Proof(name, False, detail + more)
    if len(kept) == len(known) and not without_weights(contents.text):
        order = list(kept.values())
        try:
            wanted = shrink(config, order, total).get_text_config(decoder=True).to_dict()
        except REFUSALS:  # a cut that this family's configuration cannot say
            return
        yield from _rules(text, wanted, order)


def _rules(text: Mapping[str, Any], wanted: Mapping[str, Any], kept: list[int]) -> Iterator[Proof]:
    """Compare the fields that are no lists by block: numbers of blocks, and counts of the first ones."""
    name, sparse = sparse_blocks(wanted, len(kept))
    wrong = sorted((sparse_blocks(text, len(kept))[1] ^ sparse) & set(range(len(kept))))
    if name and name not in BY_BLOCK and wrong:
        new, has = wrong[0], wrong[0] in sparse
        detail = f"block {new} is dense block {kept[new]}, which has {'' if has else 'no '}experts; by config.json it"
        more = f" (as for {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield Proof(name, False, f"{detail} has {'none' if has else 'some'}{more}")
    for field in RULES:
        if field in (name, "attention_types") or not isinstance(wanted.get(field), list) or field == "mlp_only_layers":
            continue
        if text.get(field) != wanted[field]:
            yield Proof(field, False, f"it is {text.get(field)}, and should be {wanted[field]}")


def built(contents: Contents, like: Any) -> tuple[Mapping[str, Any], str]:
    """The decoder's part of a configuration with what transformers derives, and why it is refused (empty: it is not).

    Where it is refused the fields come back as they are written.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = type(like).from_pretrained(str(contents.path))
            return made.get_text_config(decoder=True).to_dict(), ""
    except (OSError, *REFUSALS) as error:
        return contents.text, " ".join(str(error).split())[:200]
