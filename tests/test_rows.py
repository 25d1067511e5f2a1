"""Rows: packing, padding and drawing, against naive loops."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from depthprune import rows as rows_module
from depthprune.data import Data, from_texts
from depthprune.errors import DataError
from tiny_text import BOS, EOS, FIRST, PAD, WORDS, make_tokenizer, random_documents, words


def naive_packing(documents: list[list[int]], front: list[int], between: list[int], length: int) -> list[list[int]]:
    stream: list[int] = []
    for number, document in enumerate(documents):
        if number:
            stream.extend(between)
        stream.extend(document)
    rows = []
    body = length - len(front)
    while len(stream) >= body:
        rows.append(front + stream[:body])
        stream = stream[body:]
    return rows


PACKINGS = {
    "bos": (make_tokenizer(), [BOS], [EOS]),
    "no bos": (make_tokenizer(bos=()), [], [EOS]),
    "bos is eos": (make_tokenizer(eos="<s>"), [BOS], []),
    "no eos": (make_tokenizer(eos=None), [BOS], []),
    "two in front": (make_tokenizer(bos=("<pad>", "<s>")), [PAD, BOS], [EOS]),
    "eos, unused as bos": (make_tokenizer(bos=(), bos_token="</s>"), [], [EOS]),
}


@pytest.mark.parametrize("case", PACKINGS)
@pytest.mark.parametrize("length", [2 + 1, 16, 41])
def test_packing_equals_a_naive_loop(case: str, length: int) -> None:
    tokenizer, front, between = PACKINGS[case]
    documents = random_documents(30, seed=length)
    expected = naive_packing(documents, front, between, length)
    texts = [words(d) for d in documents]
    data = from_texts(texts, tokenizer, sequences=len(expected), length=length, shuffle=False)
    assert data.tokens.tolist() == expected
    assert data.packed and data.tokens_total == data.tokens.numel()
    drawn = from_texts(texts, tokenizer, sequences=len(expected), length=length, seed=3)
    assert drawn.tokens.tolist() != expected
    assert Counter(map(tuple, drawn.tokens.tolist())) == Counter(map(tuple, expected))


def test_a_tokenizer_that_asks_for_bos_without_putting_it_there_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(bos=(), bos_token="<s>")
    assert rows_module.opening(tokenizer) == ()
    monkeypatch.setattr(PreTrainedTokenizerFast, "add_bos_token", True)
    assert tokenizer("w0")["input_ids"] == [FIRST]
    assert rows_module.opening(tokenizer) == (BOS,)


def test_bos_is_found_when_the_probe_text_has_no_tokens() -> None:
    base = Tokenizer(models.BPE({"<s>": 0, "b": 1}, []))
    base.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>")
    assert tokenizer("a")["input_ids"] == [0]
    assert rows_module.opening(tokenizer) == (0,)


@pytest.mark.parametrize(
    ("tokenizer", "front", "padding"),
    [
        (make_tokenizer(), [BOS], EOS),
        (make_tokenizer(pad_token="<pad>"), [BOS], PAD),
        (make_tokenizer(bos=(), eos=None), [], 0),
    ],
)
def test_one_document_a_row(tokenizer: PreTrainedTokenizerFast, front: list[int], padding: int) -> None:
    documents = [*random_documents(25, seed=1, longest=30), [9], [10, 11]]
    length = 12
    rows = [row for row in ((front + d)[:length] for d in documents) if len(row) >= 2]
    texts = [words(d) for d in documents]
    data = from_texts(texts, tokenizer, sequences=len(rows), length=length, pack=False, shuffle=False)
    assert data.tokens.tolist() == [row + [padding] * (length - len(row)) for row in rows]
    assert data.mask.tolist() == [[True] * len(row) + [False] * (length - len(row)) for row in rows]
    assert data.tokens_total == sum(map(len, rows))
    assert data.predicted == sum(len(row) - 1 for row in rows)
    assert not data.packed


def test_long_documents_stay_one_row_and_mask_decides_what_is_predicted() -> None:
    texts = [words([FIRST + i % WORDS for i in range(9000)]), "w1 w2"]
    data = from_texts(texts, make_tokenizer(), sequences=2, length=8, pack=False, shuffle=False)
    assert data.tokens.tolist() == [[BOS, *range(FIRST, FIRST + 7)], [BOS, FIRST + 1, FIRST + 2] + [EOS] * 5]
    mask = torch.tensor([[True, False, True, True], [False, True, False, True]])
    gaps = Data(torch.zeros(2, 4, dtype=torch.int64), mask, "gaps", "", 0, ())
    assert gaps.predicted == 1 and gaps.tokens_total == 5


def test_rows_come_from_the_whole_text_without_replacement() -> None:
    stream = [FIRST + (i // WORDS if i % 2 else i % WORDS) for i in range(2 * 6000)]
    places: Counter[int] = Counter()
    expected = naive_packing([stream], [BOS], [EOS], 5)
    where = {tuple(row): number for number, row in enumerate(expected)}
    assert len(where) == len(expected)
    for seed in range(10):
        data = from_texts([words(stream)], make_tokenizer(), sequences=100, length=5, seed=seed)
        found = [where[tuple(row)] for row in data.tokens.tolist()]
        assert len(set(found)) == 100 and found != sorted(found)
        places.update(10 * number // len(expected) for number in found)
    # 1000 draws in ten equal parts: 100 each, and 5 standard deviations are 47.
    assert all(53 <= places[part] <= 147 for part in range(10)), places


def test_a_seed_gives_one_draw_and_another_seed_another() -> None:
    texts = [words([FIRST + (i * i + j * j) % WORDS for j in range(40)]) for i in range(30)]
    one, same, other = (from_texts(texts, make_tokenizer(), sequences=8, length=16, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens) and one.digest == same.digest
    assert not torch.equal(one.tokens, other.tokens) and one.digest != other.digest
    # Pinned: a plan that records this digest must find the same rows with every later version.
    assert one.digest == "sha256:1cf3ddaff76714f8287531387dcc5ef549ecf3e82c410a53b9f79e7d3b432f7e"


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_SAMPLE", 3000)
    monkeypatch.setattr(rows_module, "_PIECE", 500)


@pytest.mark.usefixtures("small_limits")
def test_a_long_text_is_sampled_everywhere_and_not_tokenized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    count = WORDS * WORDS // 4
    stream = [FIRST + (i // WORDS if i % 2 else i % WORDS) for i in range(count)]
    text = words(stream)
    rows: dict[tuple[int, ...], int] = {tuple(stream[i : i + 7]): i for i in range(count - 6)}
    tokenized: list[str] = []
    plain = rows_module.tokenize

    def counted(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> object:
        tokenized.append("|".join(texts))
        return plain(tokenizer, texts)

    monkeypatch.setattr(rows_module, "tokenize", counted)
    places: Counter[int] = Counter()
    for seed in range(20):
        data = from_texts([text], make_tokenizer(), sequences=5, length=8, seed=seed)
        runs = [row for row in data.tokens[:, 1:].tolist() if EOS not in row]  # eos stands where two stretches meet
        places.update(4 * rows[tuple(row)] // count for row in runs)
    samples = [texts for texts in tokenized if len(texts) > 1]
    assert max(map(len, samples)) < 4000 < len(text) / 10
    assert len(set(samples)) == len(samples) == 20
    assert sum(places.values()) > 80
    assert all(places[part] >= 5 for part in range(4)), places


@pytest.mark.usefixtures("small_limits")
def test_the_pieces_of_a_document_are_joined_again() -> None:
    documents = [[FIRST + i % WORDS for i in range(at, at + 250)] for at in (0, 300)]
    texts = [words(d) for d in documents]
    assert all(rows_module._PIECE * 2 < len(text) < rows_module._SAMPLE / 2 for text in texts)
    expected = naive_packing(documents, [BOS], [EOS], 12)
    data = from_texts(texts, make_tokenizer(), sequences=len(expected), length=12)
    assert Counter(map(tuple, data.tokens.tolist())) == Counter(map(tuple, expected))


@pytest.mark.usefixtures("small_limits")
def test_a_word_cut_where_reading_stopped_is_in_no_row() -> None:
    long = "x" * 600  # longer than a piece
    base = Tokenizer(models.WordLevel({"<unk>": 0, "w": 1, long: 2}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>")
    text = "w " * 15 + long + " w" * 2000
    data = from_texts([text], tokenizer, sequences=1, length=16, shuffle=False)
    assert data.tokens.tolist() == [[1] * 15 + [2]]


@pytest.mark.usefixtures("small_limits")
def test_rows_in_order_do_not_depend_on_how_much_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(400, seed=11)
    expected = naive_packing(documents, [BOS], [EOS], 16)[:20]
    texts = [words(d) for d in documents]
    few = from_texts(texts, make_tokenizer(), sequences=20, length=16, shuffle=False)
    assert few.tokens.tolist() == expected
    read = few.sources[0]["documents"]
    assert isinstance(read, int) and 10 < read < 200


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("shuffle", [True, False])
def test_more_is_read_where_the_first_sample_has_too_few_tokens(shuffle: bool) -> None:
    # 32 characters a token: the first guess of 8 is four times too small.
    text = words(range(FIRST, FIRST + 300)).replace(" ", " " * 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = from_texts([text], make_tokenizer(), sequences=18, length=16, shuffle=shuffle)
    assert data.sequences == 18


def test_too_short_a_text_says_what_would_fit() -> None:
    with pytest.raises(DataError, match=r"texts: 3 tokens of text, but one row needs 511; .* --length 4 or less"):
        from_texts(["w1 w2 w3"], make_tokenizer())
    assert from_texts(["w1 w2 w3"], make_tokenizer(), sequences=1, length=4).tokens_total == 4
    with pytest.raises(DataError, match=r"one row needs 2; give more text$"):
        from_texts(["w1"], make_tokenizer(bos=()), length=2)
    with pytest.raises(DataError, match="no document has the 2 tokens"):
        from_texts(["w1", "w2"], make_tokenizer(bos=()), pack=False)


def test_fewer_rows_than_asked_for_come_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"^texts: only 2 sequences of 4 tokens, not the 64 asked for$") as caught:
        data = from_texts(["w1 w2 w3 w4 w5 w6 w7"], make_tokenizer(), length=4)
    assert data.sequences == 2 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_texts(["w1 w2 w3 w4 w5 w6 w7"], make_tokenizer(), length=4, sequences=2)


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\t"]])
def test_empty_text_is_refused(texts: list[str]) -> None:
    for pack in (True, False):
        with pytest.raises(DataError, match="texts: the text is empty"):
            from_texts(texts, make_tokenizer(), pack=pack)


def test_a_text_longer_than_the_models_context_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(model_max_length=16)
    text = words(range(FIRST, FIRST + 100))
    logger = logging.getLogger("transformers")  # does not hand its records on
    caplog.set_level(logging.WARNING, "transformers")
    logger.addHandler(caplog.handler)
    try:
        from_texts([text], tokenizer, sequences=2, length=8)
        assert not caplog.records
        tokenizer(text)
        assert "longer than" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
