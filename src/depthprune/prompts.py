"""What a model's own text begins with: the options of ``self:``, and the prompts it names, as tokens."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from depthprune import sources
from depthprune.data import Mixture, calibrate
from depthprune.errors import DataError, OptionError, unknown
from depthprune.model import Model
from depthprune.rows import opening, shuffled

SELF = "self:"
_READ = 64  # documents that may be looked at for each prompt of a conversation


@dataclass(frozen=True)
class Settings:
    """How a model is to write: ``self:PROMPTS:prompt=32:temperature=1:top_p=1:chat=false``.

    ``prompts`` is a source of text, or empty. The first ``prompt`` tokens of a row are taken from it; with ``chat`` a
    document is what a user says, whole, in the tokenizer's chat template. ``temperature`` divides the logits, and only
    the likeliest tokens that sum to ``top_p`` are drawn from.
    """

    prompts: str = ""
    prompt: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    chat: bool = False


@dataclass(frozen=True)
class Prompts:
    """What rows begin with: ``ids`` of each prompt, the ``front`` that the tokenizer wants before a text among them."""

    ids: list[list[int]]
    front: tuple[int, ...]
    name: str
    described: Mapping[str, object] | None

    def later(self, number: int) -> list[int]:
        """A prompt as it stands within a row, where nothing goes in front."""
        ids, size = self.ids[number], len(self.front)
        return ids[size:] if tuple(ids[:size]) == self.front else list(ids)


def _number(least: float, most: float) -> Callable[[str], float]:
    def one(text: str) -> float:
        value = float(text)
        if not least < value <= most:
            raise ValueError
        return value

    return one


_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "prompt": (int, "a number of tokens"),
    "temperature": (_number(0, 1e6), "a number above 0"),
    "top_p": (_number(0, 1), "a number above 0, up to 1"),
    "chat": ({"true": True, "false": False}.__getitem__, "true or false"),
}


def asked(source: str) -> bool:
    """Whether a source is what the model writes. Raises ``OptionError`` where only a part of it is."""
    parts = [part.strip().startswith(SELF) for part in source.split(",")]
    if any(parts[1:]):
        raise OptionError(f"{SELF} stands alone and is no part of a mixture: {SELF}, or {SELF}PROMPTS")
    return parts[0]


def settings_of(source: str) -> Settings:
    """Read ``self:PROMPTS:OPTION=VALUE…``. Raises ``OptionError`` for options that do not exist or make no sense."""
    rest = source.strip().removeprefix(SELF)
    if any(part.strip().startswith(sources.TASK) for part in rest.split(",")):
        raise OptionError(f"{SELF} takes plain text as prompts, and {rest} is or holds a task")
    prompts, written = sources.task(rest)
    bare, first = sources.task(f":{prompts}")  # without prompts, the first option looks like a file
    if not bare:
        prompts, written = "", first | written
    options: dict[str, Any] = {"prompts": prompts}
    for name, value in written.items():
        if name not in _OPTIONS:
            raise unknown(f"option of {SELF}", name, _OPTIONS)
        reader, what = _OPTIONS[name]
        try:
            options[name] = reader(value)
        except (KeyError, ValueError):
            raise OptionError(f"the option {name} of {SELF} is {what}, not {value!r}") from None
    needless = [name for name in ("prompt", "chat") if name in options]
    if needless and not prompts:
        raise OptionError(f"the option {needless[0]} of {SELF} needs prompts: {SELF}FILE:{needless[0]}=…")
    if options.get("chat") and "prompt" in options:
        raise OptionError(f"with chat=true prompts are whole; leave the option prompt of {SELF} out")
    return Settings(**options)


def read(model: Model, settings: Settings, rows: int, length: int, seed: int, field: str) -> Prompts:
    """As many prompts as rows, or fewer where there are no more, for rows of ``length`` tokens.

    Raises ``OptionError`` for a prompt of no tokens or a missing chat template, ``DataError`` for prompts that are
    missing, empty or too long.
    """
    tokenizer = model.tokenizer
    front = opening(tokenizer)
    if settings.chat:
        return _conversations(model, settings, rows, length, seed, field)
    if settings.prompts:
        if settings.prompt < max(2, len(front) + 1):
            raise OptionError(f"the option prompt of {SELF} is at least {max(2, len(front) + 1)} here")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* not the .* asked for", category=UserWarning)
            how: dict[str, Any] = {"sequences": rows, "length": settings.prompt, "seed": seed, "field": field}
            try:
                data = calibrate(settings.prompts, tokenizer, **how)
            except DataError as error:
                raise DataError(str(error).replace("--length ", "prompt=")) from None
        assert not isinstance(data, Mixture) and data.scored is None, "tasks were refused"
        return Prompts(data.tokens.tolist(), front, f"self({data.name})", data.describe())
    if not front and tokenizer.bos_token_id is not None:
        front = (int(tokenizer.bos_token_id),)
    if front:
        return Prompts([list(front)], front, "self", None)
    special = set(tokenizer.all_special_ids)
    plain = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special and i < model.vocabulary]
    draw = random.Random(f"first {seed}")
    return Prompts([[plain[int(draw.random() * len(plain))]] for _ in range(rows)], (), "self", None)


def _conversations(model: Model, settings: Settings, rows: int, length: int, seed: int, field: str) -> Prompts:
    """What users say, in the tokenizer's chat template, each with room for an answer."""
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(f"{SELF}…:chat=true needs a chat template, and the tokenizer has none; leave chat out")
    part, *more = sources.parse(settings.prompts)
    if more or part.is_task:
        raise OptionError(f"chat=true takes prompts from one file, folder or hub: data set, not {settings.prompts}")
    documents = islice(sources.documents(part.path, field=field, seed=seed), _READ * rows)
    texts = [text for text in map("".join, documents) if text.strip()]
    if not texts:
        raise DataError(f"{part.path}: there are no prompts, or all are empty")
    ids: list[list[int]] = []
    for number in shuffled(len(texts), f"prompts {seed}"):
        said = [{"role": "user", "content": texts[number]}]
        one = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        if len(one) < length and len(ids) < rows:
            ids.append([int(token) for token in one])
    if not ids:
        raise DataError(f"{part.path}: every prompt fills a row of {length} tokens; use a larger --length")
    described = {"path": part.path, "documents": len(texts), "used": len(ids), "field": field}
    return Prompts(ids, opening(tokenizer), f"self({part.name})", described)
