"""A tokenizer of numbered words and documents made of them: text whose token ids a test knows beforehand."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS, PAD, FIRST = 0, 1, 2, 3, 4
WORDS = 400


def make_tokenizer(
    bos: Sequence[str] = ("<s>",), eos: str | None = "</s>", **options: object
) -> PreTrainedTokenizerFast:
    """Words "w0", "w1", … are the ids 4, 5, …; ``bos`` is put in front by the post-processor."""
    vocabulary = {"<unk>": UNK, "<s>": BOS, "</s>": EOS, "<pad>": PAD} | {f"w{i}": FIRST + i for i in range(WORDS)}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        special = [(token, vocabulary[token]) for token in dict.fromkeys(bos)]
        base.post_processor = processors.TemplateProcessing(single=[*bos, "$A"], special_tokens=special)
    named = {"bos_token": bos[0]} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>", eos_token=eos, **named, **options)


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i - FIRST}" for i in ids)


def random_documents(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(FIRST, FIRST + WORDS) for _ in range(draw.randint(1, longest))] for _ in range(count)]
