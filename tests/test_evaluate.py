"""Perplexity equals a loop that predicts one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import naive
from depthprune.errors import DataError, OptionError
from depthprune.evaluate import Windows, perplexity, windows
from depthprune.model import Model, wrap
from families import tiny
from tiny_text import BOS, FIRST, WORDS, make_tokenizer, words

IDS = [FIRST + (37 * i * i + 11 * i) % 80 for i in range(53)]


def one_by_one(net: Any, ids: Sequence[int], front: Sequence[int], room: int, stride: int) -> list[float]:
    """The negative log-likelihood of each token, given the tokens before it in the first window that holds it."""
    result = []
    for position in range(len(ids)):
        start = next(s for s in range(0, len(ids), stride) if s <= position < s + room)
        context = [*front, *ids[start:position]]
        if not context:
            continue  # the very first token, where nothing comes before it
        logits = naive.logits(net, torch.tensor([context]))[0, -1]
        result.append(F.cross_entropy(logits.double(), torch.tensor(ids[position])).item())
    return result


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no_bos"])
@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 5), (16, 1), (20, 13), (60, None), (53, 7)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_windows_equal_a_loop_over_tokens(
    name: str, window: int, stride: int | None, bos: bool, subject: Callable[..., Model]
) -> None:
    model, tokenizer = subject(name), make_tokenizer(bos=("<s>",) if bos else ())
    text = windows([words(IDS)], tokenizer, window=window, stride=stride)
    got = perplexity(model, text)
    room = window - bos
    # without BOS a window's first token is only read: windows share it, and only the text's very first is not predicted
    want = one_by_one(model.net, IDS, [BOS] * bos, room, stride or (room if bos else room - 1))
    assert got.tokens == len(want) == len(IDS) - (not bos)
    assert got.loss == pytest.approx(sum(want) / len(want), abs=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))
    assert got.windows == len(text.data.tokens)


def test_the_comparison_sees_a_token_predicted_twice(subject: Callable[..., Model]) -> None:
    model, tokenizer = subject("llama"), make_tokenizer()
    text = windows([words(IDS)], tokenizer, window=16, stride=5)
    twice = text.scored.clone()
    twice[1] = text.data.mask[1]
    twice[1, 0] = False
    wrong = perplexity(model, Windows(text.data, twice, text.stride))
    want = one_by_one(model.net, IDS, [BOS], 15, 5)
    assert wrong.tokens != len(want)
    assert wrong.loss != pytest.approx(sum(want) / len(want), abs=1e-5)


def test_each_token_is_scored_once_and_padding_never() -> None:
    text = windows([words(IDS)], make_tokenizer(), window=16, stride=5)
    assert int(text.scored.sum()) == len(IDS)
    assert not (text.scored & ~text.data.mask).any()
    assert text.data.tokens[text.scored].tolist() == IDS
    assert not text.scored[:, 0].any()


def test_documents_files_and_limits(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(words(IDS))
    tokenizer = make_tokenizer()
    from_file, from_list = windows(str(file), tokenizer, window=16), windows([words(IDS)], tokenizer, window=16)
    assert torch.equal(from_file.data.tokens, from_list.data.tokens)
    few = windows([words(IDS)], tokenizer, window=16, limit=2)
    assert torch.equal(few.data.tokens, from_list.data.tokens[:2])
    assert int(few.scored.sum()) == 30


def test_batches_do_not_matter_and_progress_reaches_the_end(
    subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = subject("llama"), windows([words(IDS)], make_tokenizer(), window=16, stride=3)
    whole = perplexity(model, text)
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr("depthprune.evaluate.LOGITS", 96 * 16 * 2)
    parts = perplexity(model, text, show=lambda _, done, total: seen.append((done, total)))
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert len(seen) > 3 and seen[-1][0] == seen[-1][1] == len(text.data.tokens)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 17), (16, 0), (2, None), (16, -1)])
def test_impossible_strides_are_refused(window: int, stride: int | None) -> None:
    if (window, stride) == (16, 16):  # a stride of the whole window is what is meant by none
        assert windows([words(IDS)], make_tokenizer(), window=16, stride=16).stride == 15
        return
    with pytest.raises(OptionError, match=r"^a window of \d+ tokens takes a stride from 1 to \d+, not -?\d+$"):
        windows([words(IDS)], make_tokenizer(), window=window, stride=stride)


def test_text_that_does_not_fit_is_refused(subject: Callable[..., Model]) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="nothing to predict"):
        windows([words(IDS[:1])], tokenizer)
    with pytest.raises(DataError, match="the model's 128 positions; pass --window 128"):
        perplexity(subject("llama"), windows([words(IDS * 4)], tokenizer, window=160))
    with pytest.raises(DataError, match=rf"id {FIRST + WORDS - 1} but the model has 96 embeddings"):
        perplexity(subject("llama"), windows([words([FIRST, FIRST + WORDS - 1])], tokenizer))


def test_a_hopeless_model_does_not_overflow() -> None:
    net: Any = tiny("llama")
    with torch.no_grad():
        net.lm_head.weight.mul_(1e5)
    got = perplexity(wrap(net, None, "llama"), windows([words(IDS)], make_tokenizer(), window=16))
    assert got.loss > 700 and math.isfinite(got.perplexity)
