"""Tasks as rows of tokens: every row is a prompt and one answer, and only the tokens of the answer are scored.

A task is a file of JSON lines, one question each. The fields of its first line tell how it is asked:

    letters      the choices are listed in the prompt, an answer is a letter (MMLU)
    completion   every choice continues the prompt (ARC, OpenBookQA, HellaSwag, PIQA, WinoGrande, BoolQ)
    answer       there is one answer, and nothing to choose from (GSM8K, instructions)
    last_word    the last word of a text is its answer (LAMBADA); only where ``format=last_word`` asks for it
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from string import ascii_uppercase as LETTERS
from typing import Any

import numpy as np

from depthprune import sources
from depthprune.errors import DataError, OptionError, unknown
from depthprune.rows import Bools, Ids, Wanted, padded, shuffled, tokenize

SHOTS = 5  # worked examples in front of a question of MMLU

Record = Mapping[str, Any]
Pairs = tuple[tuple[str, str], ...]
Encoded = tuple[Ids, int]  # a row, and where in it the answer begins


@dataclass(frozen=True)
class Question:
    """One line of a task: the prompt and answer of each of its rows, in ``pairs``, of which ``right`` is correct.

    ``asked``, ``choices`` and ``subject`` are what the letters format shows; without choices there is one pair.
    """

    where: str
    pairs: Pairs
    right: int = 0
    asked: str = ""
    choices: tuple[str, ...] = ()
    subject: str = ""


@dataclass(frozen=True)
class Settings:
    """The options of a task: ``task:FILE:shots=5:dev=FILE:format=letters``."""

    format: str
    shots: int
    dev: str | None


@dataclass(frozen=True)
class Answers:
    """The rows drawn from a task, (N, T) each; without choices ``right`` is None.

    ``item`` (N,) numbers the questions from 0, whose rows stand together; ``documents`` is how many the file holds.
    """

    tokens: Ids
    mask: Bools
    scored: Bools
    item: Ids
    right: Bools | None
    documents: int
    format: str


def draw(part: sources.Source, wanted: Wanted) -> Answers:
    """Rows of ``wanted.sequences`` questions of a task, padded on the right to the longest of them.

    In the letters format as many shots stand before a question as fit in ``wanted.length``. Warns where questions
    are too long even so, which are left out, and where there are fewer than wanted.
    """
    file, written = sources.task(part.path)
    questions, settings = read(file, written)
    pool = questions if settings.dev is None else read(settings.dev, {"format": "letters"})[0]
    by_subject: dict[str, list[Question]] = {}
    for question in pool:
        by_subject.setdefault(question.subject, []).append(question)
    order = shuffled(len(questions), f"questions {wanted.seed}") if wanted.shuffle else range(len(questions))
    kept: list[tuple[Question, list[Encoded]]] = []
    too_long: list[int] = []
    for question in (questions[at] for at in order):
        if len(kept) == wanted.sequences:
            break
        rows = _fitting(question, settings, by_subject, wanted)
        longest = max(len(row) for row, _ in rows)
        if longest <= wanted.length:
            kept.append((question, rows))
        else:
            too_long.append(longest)
    if not kept:
        fault = f"none of the {len(questions)} questions fits in {wanted.length} tokens"
        raise DataError(f"{part.path}: {fault}; the shortest needs --length {min(too_long)}")
    if too_long:
        fault = f"{len(too_long)} question{'s' * (len(too_long) != 1)} longer than {wanted.length} tokens left out"
        warnings.warn(f"{part.path}: {fault}", UserWarning, stacklevel=3)
    if len(kept) < wanted.sequences:
        fault = f"only {len(kept)} questions, not the {wanted.sequences} asked for"
        warnings.warn(f"{part.path}: {fault}", UserWarning, stacklevel=3)
    every = [row for _, rows in kept for row, _ in rows]
    starts = np.asarray([start for _, rows in kept for _, start in rows])
    tokens, mask = padded(every, max(map(len, every)), wanted.tokenizer)
    scored = mask & (np.arange(tokens.shape[1]) >= starts[:, None])
    item = np.repeat(np.arange(len(kept), dtype=np.int64), [len(rows) for _, rows in kept])
    right = np.concatenate([np.arange(len(rows)) == question.right for question, rows in kept])
    chosen = right if kept[0][0].choices else None
    return Answers(tokens, mask, scored, item, chosen, len(questions), settings.format)


def read(file: str, written: Mapping[str, str]) -> tuple[list[Question], Settings]:
    """The questions of a file, under the options as they were written, and what the options mean.

    Raises ``OptionError`` for an option that does not exist or does not belong to the format, and ``DataError``, with
    the file and line, for a line that is no question.
    """
    for name in written:
        if name not in ("format", "shots", "dev"):
            raise unknown("option of a task", name, ("format", "shots", "dev"))
    wish = written.get("format")
    if wish is not None and wish not in FORMATS:
        raise unknown("format of a task", wish, FORMATS)
    shape: Shape | None = None
    questions = []
    for where, row in sources.records(file):
        shape = _shape(row, wish, where) if shape is None else shape
        missing = [name for name in shape.fields if name not in row]
        if missing:
            raise DataError(f"{where}: there is no field {missing[0]!r}, which the lines before have; {_known(wish)}")
        questions.append(shape.read(row, where))
    if shape is None:
        raise DataError(f"{file}: the file is empty")
    settings = Settings(wish or shape.formats[0], _shots(written.get("shots")), written.get("dev"))
    given = [name for name in ("shots", "dev") if name in written]
    if settings.format != "letters" and given:
        raise OptionError(f"{file}: the option {given[0]!r} belongs to the letters format, not to {settings.format}")
    return questions, settings


def lettered(question: Question, shots: Sequence[Question]) -> Pairs:
    """The prompt of MMLU (Hendrycks et al. 2021), worked examples in front, with each letter for an answer.

    A subject is written with spaces for underscores. (The authors' script puts a second space before it, which the
    paper does not.) A question without a subject leaves out the words ``about …``.
    """
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    prompt = f"The following are multiple choice questions (with answers){about}.\n\n"
    for shot in shots:
        prompt += f"{_listed(shot)} {LETTERS[shot.right]}\n\n"
    prompt += _listed(question)
    return tuple((prompt, f" {letter}") for letter in LETTERS[: len(question.choices)])


def _listed(question: Question) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.asked, *lines, "Answer:"])


def _asked(question: Question, settings: Settings, pool: Mapping[str, Sequence[Question]]) -> Iterator[Pairs]:
    """The ways to ask a question, from the longest to the shortest: with all shots down to none."""
    if settings.format != "letters":
        yield question.pairs
        return
    if settings.dev is not None and settings.shots and question.subject not in pool:
        subject = f"about {question.subject!r}" if question.subject else "without a subject"
        raise DataError(f"{settings.dev}: there is no question {subject}, as in {question.where}")
    itself = (question.asked, question.choices)
    others = (other for other in pool.get(question.subject, ()) if (other.asked, other.choices) != itself)
    shots = list(islice(others, settings.shots))
    for count in range(len(shots), -1, -1):
        yield lettered(question, shots[:count])


def _fitting(
    question: Question, settings: Settings, pool: Mapping[str, Sequence[Question]], wanted: Wanted
) -> list[Encoded]:
    """The rows of a question with as many shots as fit; with none, where it does not fit even so."""
    for pairs in _asked(question, settings, pool):
        rows = _encoded(pairs, question.where, wanted)
        if all(len(row) <= wanted.length for row, _ in rows):
            break
    return rows


def _encoded(pairs: Pairs, where: str, wanted: Wanted) -> list[Encoded]:
    """Tokenize prompt + answer, once for every pair: the row, and where in it the answer begins.

    That is where the row first differs from the prompt alone: a token across the boundary belongs to the answer.
    """
    texts = list(dict.fromkeys(text for prompt, answer in pairs for text in (prompt, prompt + answer)))
    ids = dict(zip(texts, tokenize(wanted.tokenizer, texts), strict=True))
    front = np.asarray(wanted.opening, dtype=np.int64)
    rows = []
    for prompt, answer in pairs:
        alone, row = ids[prompt].tolist(), np.concatenate([front, ids[prompt + answer]])
        same = 0
        while same < min(len(alone), len(row) - len(front)) and alone[same] == row[len(front) + same]:
            same += 1
        start = len(front) + same
        if start == 0 or start == len(row):
            side = "prompt" if start == 0 else f"answer {answer[:40]!r}"
            raise DataError(f"{where}: the {side} has no token of its own with this tokenizer")
        rows.append((row, start))
    return rows


def _joined(prompt: str, answer: str) -> tuple[str, str]:
    """An answer continues its prompt after a space, unless either brings its own."""
    apart = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return prompt, answer if apart else f" {answer}"


@dataclass(frozen=True)
class Shape:
    """A set of fields that tells a task, how it can be asked (its own format first), and how a line is read."""

    fields: tuple[str, ...]
    formats: tuple[str, ...]
    read: Callable[[Record, str], Question]


def _choice(stem: str, answer: str, *, prompt: str = "{}", texts: bool = False) -> Callable[[Record, str], Question]:
    """Read lines of a question, its choices, and which is right: an index or a label, or with ``texts`` a choice."""

    def one(row: Record, where: str) -> Question:
        asked = _text(row, stem, where)
        choices, labels = _choices(row["choices"], where)
        right = _right(row[answer], choices, labels, texts, where)
        pairs = tuple(_joined(prompt.format(asked), choice) for choice in choices)
        return Question(where, pairs, right, asked, choices, str(row.get("subject") or ""))

    return one


def _reply(stem: str, answer: str, *, prompt: str = "{}") -> Callable[[Record, str], Question]:
    """Read lines of a prompt and its answer."""

    def one(row: Record, where: str) -> Question:
        return Question(where, (_joined(prompt.format(_text(row, stem, where)), _text(row, answer, where)),))

    return one


def _piqa(row: Record, where: str) -> Question:
    asked, choices = _text(row, "goal", where), (_text(row, "sol1", where), _text(row, "sol2", where))
    pairs = tuple(_joined(f"Question: {asked}\nAnswer:", choice) for choice in choices)
    return Question(where, pairs, _right(row["label"], choices, (), False, where), asked, choices)


def _boolq(row: Record, where: str) -> Question:
    passage, asked = _text(row, "passage", where), _text(row, "question", where)
    if not isinstance(row["answer"], bool):
        raise DataError(f"{where}: the answer must be true or false, not {row['answer']!r}")
    asked += "" if asked.endswith("?") else "?"
    pairs = tuple((f"{passage}\nQuestion: {asked}\nAnswer:", answer) for answer in (" yes", " no"))
    return Question(where, pairs, int(not row["answer"]), f"{passage}\n{asked}", ("yes", "no"))


def _winogrande(row: Record, where: str) -> Question:
    """The option stands in the prompt, and what follows it is the same answer for both (partial scoring)."""
    asked, choices = _text(row, "sentence", where), (_text(row, "option1", where), _text(row, "option2", where))
    before, blank, after = asked.partition("_")
    if not blank or not after.strip():
        raise DataError(f"{where}: the sentence must have a blank, _, and words after it")
    right = _right(row["answer"], choices, ("1", "2"), False, where)
    return Question(where, tuple((before + choice, after) for choice in choices), right, asked, choices)


def _last_word(row: Record, where: str) -> Question:
    words = _text(row, "text", where).rstrip().rsplit(maxsplit=1)
    if len(words) < 2:
        raise DataError(f"{where}: the text needs at least two words")
    return Question(where, (_joined(words[0], words[1]),))


_CHOOSE = ("completion", "letters")
_ASK = "Question: {}\nAnswer:"
# The first whose fields a line has. The prompts of the known tasks are those of lm-evaluation-harness.
SHAPES = (
    Shape(("prompt", "choices", "answer"), _CHOOSE, _choice("prompt", "answer", texts=True)),
    Shape(("question", "choices", "answerKey"), _CHOOSE, _choice("question", "answerKey", prompt=_ASK)),
    Shape(("question_stem", "choices", "answerKey"), _CHOOSE, _choice("question_stem", "answerKey")),
    Shape(("query", "choices", "gold"), _CHOOSE, _choice("query", "gold")),
    Shape(("question", "choices", "answer"), ("letters", "completion"), _choice("question", "answer", prompt=_ASK)),
    Shape(("goal", "sol1", "sol2", "label"), _CHOOSE, _piqa),
    Shape(("sentence", "option1", "option2", "answer"), _CHOOSE, _winogrande),
    Shape(("passage", "question", "answer"), _CHOOSE, _boolq),
    Shape(("prompt", "answer"), ("answer",), _reply("prompt", "answer")),
    Shape(("prompt", "response"), ("answer",), _reply("prompt", "response")),
    Shape(("question", "answer"), ("answer",), _reply("question", "answer", prompt=_ASK)),
    Shape(("text",), ("last_word",), _last_word),
)
FORMATS = ("letters", "completion", "answer", "last_word")


def _shape(row: Record, wish: str | None, where: str) -> Shape:
    for shape in SHAPES:
        # Any text has the field of LAMBADA, so that one is taken only where it is asked for.
        fits = wish in shape.formats if wish is not None else shape.formats != ("last_word",)
        if fits and all(name in row for name in shape.fields):
            return shape
    have = ", ".join(map(repr, row)) or "none"
    raise DataError(f"{where}: the fields {have} are those of no task{f' in {wish}' if wish else ''}; {_known(wish)}")


def _known(wish: str | None) -> str:
    lines = []
    for form in FORMATS if wish is None else (wish,):
        ways = [" + ".join(s.fields) for s in SHAPES if form == s.formats[0] or (wish and form in s.formats)]
        lines.append(f"{form} needs {' or '.join(ways)}")
    return "; ".join(lines)


def _choices(value: object, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts of the choices and their labels: A, B, … where the line gives none."""
    texts, labels = value, None
    if isinstance(value, dict):
        texts, labels = value.get("text"), value.get("label")
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise DataError(f'{where}: the choices must be a list of 2 to 26 texts, or {{"text": [...], "label": [...]}}')
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(texts)):
        raise DataError(f"{where}: there must be as many labels as choices, {len(texts)}")
    choices = tuple(_text({f"choice {at}": text}, f"choice {at}", where) for at, text in enumerate(texts, start=1))
    return choices, tuple(LETTERS[: len(texts)]) if labels is None else tuple(map(str, labels))


def _right(answer: object, choices: tuple[str, ...], labels: tuple[str, ...], texts: bool, where: str) -> int:
    found = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        found = {labels.index(answer)} if answer in labels else set()
        found |= {choices.index(answer)} if texts and answer in choices else set()
    if len(found) > 1:
        raise DataError(
            f"{where}: the answer {answer!r} is the label of one choice and the text of another: give its index"
        )
    if not found:
        ways = [f"an index from 0 to {len(choices) - 1}", *([f"a label ({', '.join(labels)})"] if labels else [])]
        ways += ["the text of a choice"] if texts else []
        raise DataError(f"{where}: the answer {answer!r} is none of the choices; it must be {', or '.join(ways)}")
    return found.pop()


def _text(row: Record, name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {name!r} holds a {type(value).__name__}, not text")
    if not value.strip():
        raise DataError(f"{where}: the field {name!r} is empty")
    return sources.whole(value, where)


def _shots(written: str | None) -> int:
    if written is None:
        return SHOTS
    if not written.isdecimal():
        raise OptionError(f"the option shots of a task is a number from 0, not {written!r}")
    return int(written)
