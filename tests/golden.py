"""What the papers print, as data: sizes, shares, caches, scores, orders; and the models they print it of.

Nothing here is computed. ``test_golden.py`` computes it with the package, on models without weights. What a paper
prints and our counting does not give stands in a ``Deviation``, with our figure and the reason. Left out is only what
layers do not decide: measured quality and time, and methods that cut widths (SliceGPT, LLM-Pruner, Wanda).

Units are written as the papers count them: ``12A+5M`` for 12 attentions and 5 MLPs, ``7B`` for 7 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def _sizes(vocabulary: int, width: int, ffn: int, blocks: int, heads: int, kv_heads: int = 0, **more: Any) -> Any:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        **more,
    }


# The family in tests/families.py that a model is of, and what its config.json says of its sizes. Baichuan 2 has no
# class in transformers; it is shaped like Llama (its one projection for query, key and value is as large as three).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2-7B": ("llama", _sizes(32000, 4096, 11008, 32, 32)),
    "Llama-2-13B": ("llama", _sizes(32000, 5120, 13824, 40, 40)),
    "Llama-2-70B": ("llama", _sizes(32000, 8192, 28672, 80, 64, 8)),
    "Llama-3-8B": ("llama", _sizes(128256, 4096, 14336, 32, 32, 8)),
    "Llama-3-70B": ("llama", _sizes(128256, 8192, 28672, 80, 64, 8)),
    "Mistral-7B-v0.1": ("mistral", _sizes(32000, 4096, 14336, 32, 32, 8)),
    "Mistral-7B-v0.3": ("mistral", _sizes(32768, 4096, 14336, 32, 32, 8)),
    "Qwen1.5-7B": ("qwen2", _sizes(151936, 4096, 11008, 32, 32)),
    "Qwen1.5-14B": ("qwen2", _sizes(152064, 5120, 13696, 40, 40)),
    "Gemma-2B": ("gemma", _sizes(256000, 2048, 16384, 18, 8, 1, head_dim=256)),
    "Gemma-7B": ("gemma", _sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256)),
    "Baichuan2-7B": ("llama", _sizes(125696, 4096, 11008, 32, 32)),
    "Baichuan2-13B": ("llama", _sizes(125696, 5120, 13696, 40, 40)),
}
# The same sizes under other names.
MODELS["LLaMA-1-7B"] = MODELS["Vicuna-7B-v1.3"] = MODELS["Llama-2-7B"]
MODELS["Vicuna-13B-v1.3"] = MODELS["Llama-2-13B"]
MODELS["CatPPT-base"] = MODELS["Mistral-7B-v0.1"]


# Sizes


@dataclass(frozen=True)
class Share:
    """Per cent of the parameters of the whole model, embeddings and head too, that dropping ``counts`` frees.

    Where more than one pair of counts prints the same figure, all of them are given.
    """

    model: str
    printed: str
    counts: tuple[str, ...]
    source: str


def _shares(model: str, source: str, **printed: str) -> list[Share]:
    """``A12M5="21.99"`` or ``B7="21.02"``, and ``_or_`` between counts that print the same."""
    return [Share(model, figure, tuple(counts.split("_or_")), source) for counts, figure in printed.items()]


SHARES: list[Share] = [
    # BlockPruner: whole blocks, as ShortGPT, RM and LaCo drop them.
    *_shares("Llama-2-7B", "BlockPruner, Tables 1, 5 and 6", B7="21.02", B8="24.03", B10="30.03", B12="36.04"),
    *_shares("Llama-2-7B", "BlockPruner, Table 5", B14="42.05"),
    *_shares("Llama-2-13B", "BlockPruner, Tables 1, 5 and 6", B9="21.93", B10="24.37", B13="31.68", B15="36.56"),
    *_shares("Llama-2-13B", "BlockPruner, Table 5", B17="41.43"),
    *_shares("Baichuan2-7B", "BlockPruner, Table 1", B8="21.57"),
    *_shares("Baichuan2-13B", "BlockPruner, Table 1", B10="22.68"),
    *_shares("Qwen1.5-7B", "BlockPruner, Table 1", B8="20.97"),
    *_shares("Qwen1.5-14B", "BlockPruner, Table 1", B10="22.25"),
    *_shares("Mistral-7B-v0.3", "BlockPruner, Table 9", B8="24.07", B9="27.08", B10="30.09", B12="36.11"),
    *_shares("Llama-3-8B", "BlockPruner, Table 9", B9="24.45", B10="27.16", B11="29.88", B13="35.31"),
    # BlockPruner: sublayers. The paper prints shares only; these counts are the only ones that give them.
    *_shares("Llama-2-7B", "BlockPruner, Tables 1, 5 and 6", A12M5="21.99", A12M6="24.00", A14M8="30.00"),
    *_shares("Llama-2-7B", "BlockPruner, Table 5", A15M11="37.02", A17M13="43.03"),
    *_shares("Llama-2-7B", "BlockPruner, Table 4", A11M3="16.98", A13M6="24.99"),
    *_shares("Llama-2-7B", "BlockPruner, Table 4 (JS)", A9M3="14.99", A12M7="26.00", A13M8="29.01"),
    *_shares("Llama-2-13B", "BlockPruner, Tables 1, 5 and 6", A17M7="25.12", A16M5="21.05", A19M10="31.62"),
    *_shares("Llama-2-13B", "BlockPruner, Tables 4 and 5", A19M13="36.52", A21M15="41.39", A14M2="14.54"),
    *_shares("Llama-2-13B", "BlockPruner, Table 4", A19M12="34.88"),
    *_shares("Baichuan2-7B", "BlockPruner, Table 1", A11M7="22.45"),
    *_shares("Baichuan2-13B", "BlockPruner, Table 1", A14M9_or_A12M10="24.19"),
    *_shares("Qwen1.5-7B", "BlockPruner, Table 1", A11M7="21.83"),
    *_shares("Qwen1.5-14B", "BlockPruner, Table 1", A18M7_or_A16M8_or_A20M6="23.72"),
    *_shares("Mistral-7B-v0.3", "BlockPruner, Table 9", A14M7="25.12", A14M8="27.55", A14M9="29.98", A16M11="36.00"),
    *_shares("Llama-3-8B", "BlockPruner, Table 9", A14M8="24.86", A15M9="27.58", A16M10="30.30", A18M12="35.73"),
    # Shortened LLaMA prints parameters; these shares follow from them (its own labels are in DEVIATIONS).
    *_shares("LLaMA-1-7B", "Shortened LLaMA", B6="18.0", B9="27.0", B11="33.0", B15="45.1", B20="60.1", B26="78.1"),
    *_shares("Vicuna-13B-v1.3", "Shortened LLaMA", B8="19.5", B11="26.8", B15="36.6"),
]

# Per cent of the *blocks*: how ShortGPT's comparison and SLEB count.
BLOCK_SHARES: list[Share] = [
    *_shares("Llama-2-7B", "ShortGPT, 5 tasks", B7="21.9", B8="25.0"),
    *_shares("Llama-2-13B", "ShortGPT, 5 tasks; SLEB, 8 of 40", B8="20.0", B10="25.0", B12="30.0"),
    *_shares("Llama-2-70B", "SLEB, 16 of 80", B16="20.0"),
]


@dataclass(frozen=True)
class Count:
    """Parameters of a model without ``blocks`` of its blocks, in units of ``scale``."""

    model: str
    blocks: int
    printed: str
    source: str


def _counts(model: str, source: str, **printed: str) -> list[Count]:
    return [Count(model, int(blocks[1:]), figure, source) for blocks, figure in printed.items()]


# In billions.
COUNTS: list[Count] = [
    *_counts("LLaMA-1-7B", "Shortened LLaMA", B0="6.738", B6="5.524", B9="4.917", B11="4.512"),
    *_counts("Vicuna-7B-v1.3", "Shortened LLaMA", B0="6.738", B6="5.524", B15="3.703", B20="2.691", B26="1.476"),
    *_counts("Vicuna-13B-v1.3", "Shortened LLaMA", B8="10.478", B11="9.527", B15="8.258"),
    *_counts("Llama-3-8B", "Shortened LLaMA", B0="8.030"),
    *_counts("CatPPT-base", "Shortened LLaMA", B0="7.242"),
    *_counts("Gemma-2B", "Shortened LLaMA", B0="2.506"),
    *_counts("Gemma-7B", "Shortened LLaMA", B0="8.538"),
]
LLAMA_2_7B = 6_738_415_616  # printed in full (BlockPruner)
SUBLAYERS = {"A1": "67.11", "M1": "135.27"}  # millions of parameters of a sublayer of Llama-2-7B, norm included
# Gigabytes of the checkpoints that LLM-Drop published, 16 bit: the dropped tensors are still in them.
FULL_SIZE = {"Mistral-7B-v0.1": "14.5", "Llama-2-13B": "26.0"}


@dataclass(frozen=True)
class Cache:
    """LLM-Drop, Table 4: GiB of keys and values in 16 bit at 2048 tokens, dense and with ``kept`` attentions.

    The paper writes GB and means units of 2^30 bytes. It does not give the batch of Llama-3-70B; that of 70B fits.
    """

    model: str
    batch: int
    kept: int
    dense: str
    thin: str


CACHES: list[Cache] = [
    Cache("Mistral-7B-v0.1", 64, 20, "16", "10"),
    Cache("Llama-3-8B", 64, 20, "16", "10"),
    Cache("Llama-2-70B", 32, 40, "20", "10"),
    Cache("Llama-3-70B", 32, 40, "20", "10"),
]
CACHE_LENGTH = 2048


@dataclass(frozen=True)
class Deviation:
    """A figure that is printed and that our counting does not give: ``how`` it is counted, what we get, and why."""

    model: str
    counts: str
    how: str  # "model" or "blocks" per cent; "dense" or "thin" GiB of cache
    printed: str
    ours: str
    why: str


_SHORTGPT = (
    "ShortGPT's own table; no counting of parameters (with or without embeddings and head) gives all four of its "
    "figures, while BlockPruner prints ours for the same counts of blocks of the 13B models"
)
_LABEL = "a label for the target, not a measurement: the parameter count printed beside it is the one in COUNTS"
_KV = (
    "2 x 5120 numbers in 40 blocks at 32 x 2048 tokens in 16 bit are 50 GiB (53.7 decimal, 51.2 in units of "
    "1000 x 2^20); the other rows of the table fit in GiB, and the ratio of one half is right"
)
DEVIATIONS: list[Deviation] = [
    Deviation("Llama-2-7B", "B9", "model", "27.1", "27.0", _SHORTGPT),
    Deviation("Llama-2-13B", "B10", "model", "24.6", "24.4", _SHORTGPT),
    Deviation("Baichuan2-7B", "B9", "model", "24.2", "24.3", _SHORTGPT),
    Deviation("Baichuan2-13B", "B10", "model", "24.7", "22.7", _SHORTGPT),
    Deviation("Llama-2-7B", "B10", "blocks", "31.6", "31.2", "ShortGPT, 5 tasks: no count of 32 blocks is 31.6 %"),
    Deviation("Vicuna-7B-v1.3", "B6", "model", "20", "18", _LABEL),
    Deviation("Vicuna-7B-v1.3", "B11", "model", "35", "33", _LABEL),
    Deviation("Vicuna-7B-v1.3", "B26", "model", "80", "78", _LABEL),
    Deviation("Vicuna-13B-v1.3", "B8", "model", "21", "19", _LABEL),
    Deviation("Vicuna-13B-v1.3", "B11", "model", "29", "27", _LABEL),
    Deviation("Llama-2-7B", "B7", "blocks", "20", "22", "SLEB drops 7 of 32 blocks for 20 %: the next whole number"),
    Deviation("Llama-2-13B", "A20", "dense", "52", "50", _KV),
    Deviation("Llama-2-13B", "A20", "thin", "26", "25", _KV),
]


# BlockPruner's published searches of Llama-2-7B: the order of removal, and the share of the model after each.

SEQUENCES: dict[str, str] = {
    "ns32": "A27 A25 A28 A23 A24 A29 A7 M6 A18 A19 M26 A30 A21 M23 M24 A12 M12 M9 A10 M18",
    "ns64": "A25 A27 A24 A23 A28 A29 A8 M7 A19 A30 M22 A21 M27 A18 M21 M11 A12 A14 M14 M24",
}
CUMULATIVE: dict[str, str] = {
    "ns32": "1.00 1.99 2.99 3.98 4.98 5.98 6.97 8.98 9.98 10.97 12.98 13.97 14.97 16.98 18.99 19.98 21.99 24.00 24.99 "
    "27.00",
    "ns64": "1.00 1.99 2.99 3.98 4.98 5.98 6.97 8.98 9.98 10.97 12.98 13.97 15.98 16.98 18.99 20.99 21.99 22.98 24.99 "
    "27.00",
}
AT_17 = "A12M5"  # what either list has dropped after 17 removals, for 21.99 %
AGREED = 6  # the lists agree on the set of the first six

# How many thinned models an exact greedy search measures: the model, its units, how many go, and the printed number.
EVALUATIONS: list[tuple[str, str, int, int]] = [
    ("Llama-2-7B", "any", 17, 952),  # BlockPruner
    ("Llama-2-7B", "any", 20, 1090),
    ("Llama-2-13B", "any", 24, 1644),
    ("Llama-2-7B", "ends", 7, 189),  # SLEB: blocks, but the first and the last
    ("Llama-2-70B", "ends", 16, 1128),
]


# Scores, and the orders that follow from them


def _scores(text: str) -> list[float]:
    """``0:1.5, 1:2.5`` in any order, or plain numbers from block 0 on."""
    if ":" not in text:
        return [float(part) for part in text.split()]
    found = dict(part.split(":") for part in text.replace(",", " ").split())
    return [float(found[str(block)]) for block in range(len(found))]


def order(text: str) -> list[int]:
    """Block numbers from a list such as ``24,26,25``."""
    return [int(part) for part in text.split(",")]


def _table(text: str) -> dict[tuple[str, str], list[int]]:
    """Lines of model, metric and block numbers, by the first two."""
    rows = (line.split() for line in text.strip().splitlines())
    return {(model, metric): order(blocks) for model, metric, blocks in rows}


# Cosine block influence on OpenWebText (A deeper look at depth pruning of LLMs).
COSINE: dict[str, list[float]] = {
    "Llama-2-7B": _scores(
        ".40655 .24990 .14538 .14624 .15152 .15010 .14364 .14199 .13387 .12874 .12481 .11314 .10922 .11000 .10580 "
        ".10590 .10622 .08393 .07560 .06369 .06161 .04661 .04402 .03651 .03473 .03079 .03321 .02987 .03320 .03373 "
        ".06029 .30719"
    ),
    "Mistral-7B-v0.1": _scores(
        ".41315 .22294 .18502 .15421 .15791 .16194 .15580 .15514 .14192 .13151 .12525 .11694 .11012 .10614 .11162 "
        ".11074 .10947 .10528 .10620 .09696 .07502 .06127 .04937 .04654 .04156 .03952 .03852 .04080 .05036 .06017 "
        ".06129 .17413"
    ),
}
COSINE_ORDER = order("27,25,28,26,29,24,23,22,21")  # Llama-2-7B, ascending
# Sets that other papers drop, found by the same measure on other text.
COSINE_SETS: list[tuple[str, str, list[int]]] = [
    ("Llama-2-7B", "ShortGPT, Table 9 (PG19)", order("27,26,25,28,24,29,23,21,22")),
    ("Llama-2-7B", "unofficial ShortGPT", order("25,27,24,26,28,29,23,22,21")),
    ("Llama-2-7B", "BlockPruner and Prune&Comp, 7 blocks", order("23,24,25,26,27,28,29")),
    ("Mistral-7B-v0.1", "LLM-Drop, Block-4 (C4)", order("26,25,24,27")),
]
# Llama-2-13B: ShortGPT's ten (PG19) begin with LLM-Drop's eight (C4), in another order.
SHORTGPT_13B = order("33,31,32,30,29,34,28,35,27,26")
LLM_DROP_13B = order("33,32,31,34,30,35,29,28")

# Shortened LLaMA: perplexity without each block (BookCorpus 10 x 128, seed 1234).
PPL: dict[str, list[float]] = {
    "LLaMA-1-7B": _scores(
        "0:8276, 1:29.15, 2:718.7, 3:23.16, 4:23.17, 5:22.08, 6:21.97, 7:21.94, 8:21.86, 9:21.74, 10:21.41, 11:22.24, "
        "12:21.77, 13:21.58, 14:21.72, 15:21.81, 16:22.02, 17:22.59, 18:22.07, 19:22.29, 20:22.1, 21:21.91, 22:21.61, "
        "23:22.07, 24:21.13, 25:21.31, 26:21.28, 27:21.45, 28:21.95, 29:21.76, 30:25.5, 31:40.2"
    ),
    "Llama-2-7B": _scores(
        "0:19178, 1:14743, 2:26.34, 3:24.89, 4:23.44, 5:22.49, 6:22.11, 7:21.56, 8:21.48, 9:21.58, 10:21.61, 11:21.36, "
        "12:21.54, 13:22.16, 14:21.71, 15:21.86, 16:23.54, 17:22.05, 18:21.61, 19:22.36, 20:21.96, 21:21.5, 22:22.31, "
        "23:21.75, 24:21.49, 25:21.76, 26:22.03, 27:21.68, 28:22.27, 29:22.98, 30:24.12, 31:45.74"
    ),
    "Llama-3-8B": _scores(
        "0:4907, 1:717.4, 2:29.76, 3:26.31, 4:26.44, 5:27.01, 6:26.92, 7:25.99, 8:24.76, 9:25.16, 10:25.24, 11:25.18, "
        "12:25.39, 13:26.57, 14:25.97, 15:26.32, 16:26.6, 17:26.64, 18:26.39, 19:25.92, 20:26.62, 21:26.21, 22:25.78, "
        "23:25.15, 24:25.93, 25:25.3, 26:25.32, 27:26.74, 28:26.49, 29:28.71, 30:35.67, 31:81.63"
    ),
    "Vicuna-7B-v1.3": _scores(
        "0:12122, 1:38.35, 2:4464, 3:30.44, 4:29.4, 5:27.96, 6:27.82, 7:28.08, 8:27.77, 9:28.06, 10:27.6, 11:27.63, "
        "12:28.26, 13:28.48, 14:29.75, 15:28.11, 16:28.3, 17:30.19, 18:28.32, 19:29.36, 20:27.66, 21:28.42, 22:28.05, "
        "23:29.7, 24:27.62, 25:27.15, 26:28.01, 27:27.37, 28:28.64, 29:27.8, 30:29.92, 31:51.31"
    ),
    "Gemma-2B": _scores(
        "0:1.1e65, 1:47.44, 2:45.09, 3:43.96, 4:38.41, 5:37.6, 6:36.44, 7:34.98, 8:35.95, 9:36.44, 10:39.17, "
        "11:39.87, 12:39.63, 13:45.18, 14:69.29, 15:52.92, 16:1.2e6, 17:1.4e19"
    ),
}
# Shortened LLaMA: Taylor scores of the blocks of Llama-2-7B.
TAYLOR = _scores(
    "0:45.08 1:100.18 2:131.84 3:142.44 4:137.66 5:128.27 6:120.81 7:111.08 8:110.82 9:105.23 10:99.54 11:94.07 "
    "12:87.98 13:87.25 14:86.59 15:88.78 16:86.92 17:81.84 18:79.19 19:76.52 20:75.21 21:67.73 22:69.01 23:66.96 "
    "24:65.90 25:64.91 26:65.15 27:64.46 28:63.63 29:65.12 30:71.26 31:92.13"
)

# Shortened LLaMA, block_order.csv: ascending importance, before protection.
ORDERS = _table("""
LLaMA-1-7B ppl 24,26,25,10,27,13,22,14,9,29,12,15,8,21,7,28,6,16,18,23,5,20,11,19,17,3,4,30,1,31,2,0
LLaMA-1-7B taylor 0,27,24,26,25,29,28,23,22,21,30,20,19,18,17,15,14,13,16,31,1,12,11,10,9,8,7,6,5,3,2,4
LLaMA-1-7B mag 0,1,9,8,10,5,7,3,12,4,6,13,14,15,11,2,18,17,16,19,21,23,20,22,24,25,26,28,27,30,29,31
Llama-2-7B ppl 11,8,24,21,12,7,9,10,18,27,14,23,25,15,20,26,17,6,13,28,22,19,5,29,4,16,30,3,2,31,1,0
Llama-2-7B taylor 0,28,27,25,29,26,24,23,21,22,30,20,19,18,17,14,16,13,12,15,31,11,10,1,9,8,7,6,5,2,4,3
Llama-3-8B ppl 8,23,9,11,10,25,26,12,22,19,24,14,7,21,3,15,18,4,28,13,16,20,17,27,6,5,29,2,30,31,1,0
Llama-3-8B taylor 24,25,26,28,29,23,27,22,20,19,21,30,18,17,16,13,14,15,12,11,10,9,8,7,6,5,31,4,3,0,2,1
Vicuna-7B-v1.3 ppl 25,27,10,24,11,20,8,29,6,5,26,22,9,7,15,12,16,18,21,13,28,19,4,23,14,30,17,3,1,31,2,0
Vicuna-7B-v1.3 taylor 0,27,26,24,25,29,28,23,30,21,22,31,20,19,18,17,1,15,14,16,13,12,11,10,9,8,7,6,3,2,5,4
Vicuna-7B-v1.3 mag 0,1,9,8,10,5,7,3,12,4,6,13,14,15,11,2,18,17,16,19,21,23,20,22,24,25,26,28,27,30,29,31
Vicuna-13B-v1.3 ppl 35,32,24,12,34,20,26,36,9,31,13,27,21,25,14,29,37,30,18,19,28,23,38,15,33,5,16,10,4,22,8,7,11,3,17,6,39,1,2,0
Vicuna-13B-v1.3 taylor 0,36,33,32,34,37,35,31,30,29,38,27,39,28,26,24,25,23,22,21,19,20,1,18,17,16,15,14,13,12,11,8,10,9,7,6,5,2,4,3
Vicuna-13B-v1.3 mag 0,1,5,8,6,3,4,7,10,9,2,11,13,12,15,14,19,18,16,17,21,22,20,24,25,23,28,26,27,39,30,29,31,38,32,35,36,37,33,34
CatPPT-base ppl 15,14,11,12,25,9,10,13,24,7,8,22,17,23,19,21,16,27,6,5,28,18,26,20,3,4,29,30,2,31,1,0
CatPPT-base taylor 0,28,30,29,27,26,25,24,22,23,31,21,20,19,18,17,15,16,14,12,11,13,1,10,9,8,2,6,7,5,4,3
CatPPT-base mag 0,1,4,2,5,6,12,7,9,10,8,3,11,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
Gemma-2B ppl 7,8,6,9,5,4,10,12,11,3,2,13,1,15,14,16,17,0
Gemma-2B taylor 10,9,8,11,15,12,7,14,13,16,6,5,4,3,2,17,1,0
Gemma-7B ppl 14,15,13,18,7,12,11,16,9,5,10,17,20,6,21,4,8,22,19,23,3,24,2,1,25,26,27,0
Gemma-7B taylor 14,15,22,16,13,12,18,17,23,24,11,8,21,10,9,20,19,7,6,5,2,25,3,26,4,0,27,1
""")  # noqa: E501
# What remains to be dropped once the first four blocks and the last two are protected, in order.
REMOVED = _table("""
LLaMA-1-7B ppl 24,26,25,10,27,13,22,14,9,29,12
LLaMA-1-7B taylor 27,24,26,25,29,28,23,22,21,20,19
LLaMA-1-7B mag 9,8,10,5,7,12
Llama-2-7B ppl 11,8,24,21,12,7
Llama-2-7B taylor 28,27,25,29,26,24
Llama-3-8B ppl 8,23,9,11,10,25
Llama-3-8B taylor 24,25,26,28,29,23
Vicuna-7B-v1.3 ppl 25,27,10,24,11,20,8,29,6,5,26,22,9,7,15,12,16,18,21,13
Vicuna-7B-v1.3 taylor 27,26,24,25,29,28
Vicuna-7B-v1.3 mag 9,8,10,5,7,12
Vicuna-13B-v1.3 ppl 35,32,24,12,34,20,26,36,9,31,13,27,21,25,14
Vicuna-13B-v1.3 taylor 36,33,32,34,37,35,31,30
Vicuna-13B-v1.3 mag 5,8,6,4,7,10,9,11
CatPPT-base ppl 15,14,11,12,25,9
CatPPT-base taylor 28,29,27,26,25,24
CatPPT-base mag 4,5,6,12,7,9
Gemma-2B ppl 7,8,6,9
Gemma-2B taylor 10,9,8,11
Gemma-7B ppl 14,15,13,18,7
Gemma-7B taylor 14,15,22,16,13
""")
ALL_BUT_PROTECTED = ("Vicuna-7B-v1.3", 26)  # "80 %": exactly the six protected blocks remain
