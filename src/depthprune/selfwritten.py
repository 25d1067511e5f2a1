"""Text that a model writes itself, to recover on: ``self:`` as a source, alone or with prompts.

What a model writes is spread as the model expects, so weights that are fitted to it keep skills that other text would
wear away. Rows are full: where the model ends a text, the row goes on with another prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, LogitsProcessor

from depthprune.data import Data, check_vocabulary, digest
from depthprune.dist import rank, total, world
from depthprune.errors import DataError, DepthpruneError, OptionError
from depthprune.files import why
from depthprune.model import Model
from depthprune.oracle import Show
from depthprune.prompts import SELF, Prompts, Settings, read, settings_of
from depthprune.record import slices
from depthprune.recover.repair import silent
from depthprune.rows import wanted_rows

TOKENS = {"cpu": 1 << 14, "cuda": 1 << 18}  # to write, unless told otherwise: writing is slow
ROWS = 64  # at a time, at the most
CACHE = {"cpu": 1 << 30, "cuda": 1 << 32}  # bytes of keys and values at a time, unless told otherwise
ATTENTION = [kind for kind in SDPBackend.__members__.values() if kind.name not in ("ERROR", "CUDNN_ATTENTION")]
_MEASURED = 8  # steps by which the time is told


def write(
    model: Model,
    source: str = SELF,
    *,
    sequences: int | None = None,
    length: int = 512,
    seed: int = 0,
    field: str = "text",
    memory: int | None = None,
    show: Show | None = None,
    say: Callable[[str], None] = silent,
    keep: Path | None = None,
) -> Data:
    """Let a model write rows of tokens, one choice after the other by its own predictions.

    ``source`` is ``self:`` with options as ``Settings`` has them. Without prompts a row begins with BOS, or, where the
    tokenizer has none, with any token that is not special. With prompts it begins with ``prompt`` tokens of text read
    as ``calibrate`` reads it; prompts that are fewer than rows are used again. After an end-of-text token come the
    tokens of another prompt, until the row is full, so nothing is masked. All tokens count, of prompts too.

    By default 16 thousand tokens are written on a CPU, 256 thousand on a GPU. Every row has its own random numbers
    under ``seed``, whatever is written beside it; several processes share the writing, and all have all rows.
    ``memory`` bounds the keys and values in bytes. ``keep`` is a file that the rows are kept in: asked for the same
    again, they are read from there.

    Raises ``OptionError`` for a model that does not write and for options that make no sense, ``DataError`` for prompts
    that are missing, empty or longer than a row, and for predictions that are not finite.
    """
    settings = settings_of(source)
    config = model.net.config
    if config.is_encoder_decoder or not model.net.can_generate():
        raise OptionError(f"{model.reference.id} writes no text, only decoders do; name a text instead of {SELF}")
    if settings.prompts and not settings.chat and settings.prompt >= length:
        raise OptionError(f"a prompt of {settings.prompt} tokens fills a row of {length}; use a smaller prompt=…")
    rows = max(2 * world(), TOKENS.get(model.device.type, TOKENS["cpu"]) // length) if sequences is None else sequences
    wanted_rows(model.tokenizer, rows, length, seed, True, True)
    prompts = read(model, settings, rows, length, seed, field)
    check_vocabulary(torch.tensor([token for ids in prompts.ids for token in ids]), model.vocabulary)
    ends = _ends(model)
    same = {
        "format": 1,
        "teacher": model.reference.fingerprint,
        "settings": asdict(settings),
        "rows": [rows, length],
        "seed": seed,
        "prompts": hashlib.sha256(repr((prompts.ids, prompts.front, sorted(ends))).encode()).hexdigest(),
    }
    found = _recall(keep, same) if keep is not None and rank() == 0 else None
    # Whether there are rows is for the first process to say: the others may not see its files.
    kept = bool(total(torch.tensor([int(found is not None)]).to(model.device)))
    if kept:
        say(f"{rows} rows were written before, and are read from {keep}")
    else:
        found = _all_rows(model, settings, prompts, ends, (rows, length), seed, memory, show, say)
    tokens, own = (part.cpu() for part in _everywhere(found, (rows, length), model.device))
    if keep is not None and rank() == 0 and not kept:
        _keep(keep, same, tokens, own)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    record: dict[str, object] = {
        "path": source,
        "weight": 1.0,
        "documents": len(prompts.ids),
        "tokens": tokens.numel(),
        "written": int(own.sum()),
        "teacher": {"id": model.reference.id, "fingerprint": model.reference.fingerprint},
        "prompts": None if prompts.described is None else dict(prompts.described),
        **{name: value for name, value in asdict(settings).items() if name != "prompts"},
    }
    return Data(tokens, mask, prompts.name, digest(tokens, mask), seed, (record,))


def pick(logits_BV: Tensor, noise_B: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Choose a token for each row: the first up to which ``softmax(logits / temperature)`` sums to ``noise``.

    ``noise_B`` is in (0, 1]. Below a ``top_p`` of 1 the tokens are left out before which likelier ones sum to it.
    A row whose logits are not finite gets -1.
    """
    scaled = (logits_BV.float() - logits_BV.float().amax(-1, keepdim=True)) / max(temperature, 1e-9)
    probabilities = scaled.softmax(-1)
    if top_p < 1:
        ordered = probabilities.sort(-1, descending=True).values
        before = _sums(ordered) - ordered
        least = ordered.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    up_to = _sums(probabilities)
    whole = up_to[:, -1]
    chosen = torch.searchsorted(up_to, (noise_B.to(up_to) * whole)[:, None]).squeeze(-1)
    return chosen.masked_fill(~whole.isfinite(), -1)


def _sums(values_BV: Tensor) -> Tensor:
    """Running sums, the same whenever they are asked for: CUDA adds up a single row in an order that varies."""
    return values_BV.cumsum(-1) if len(values_BV) > 1 else torch.cat((values_BV, values_BV)).cumsum(-1)[:1]


class Pen(LogitsProcessor):
    """Chooses every next token of some rows: that of a prompt where one is to be read, else one that is drawn.

    ``written`` (B, T) bool says which tokens were drawn. ``waiting`` holds the tokens of prompts that are still to
    come, row by row; ``following`` gives those of the next prompt once a row has drawn one of ``ends``.
    """

    def __init__(
        self,
        waiting: list[list[int]],
        noise_BT: Tensor,
        settings: Settings,
        *,
        following: Callable[[int], list[int]],
        ends: frozenset[int],
        known: int,
        step: Callable[[], None],
    ) -> None:
        self.waiting, self.noise, self.settings = waiting, noise_BT, settings
        self.following, self.ends, self.known, self.step = following, ends, known, step
        self.written = torch.zeros(noise_BT.shape, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with one token left to choose."""
        at = input_ids.shape[1]
        how: dict[str, float] = {"temperature": self.settings.temperature, "top_p": self.settings.top_p}
        # Embeddings are often padded to a round number; nothing was learned of the tokens beyond the tokenizer's.
        chosen = pick(scores[:, : self.known], self.noise[:, at], **how).tolist()
        if -1 in chosen:
            raise DataError("the model predicts numbers that are not finite, so it writes no text; try another --dtype")
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if not self.waiting[row] and last in self.ends and self.written[row, at - 1]:
                self.waiting[row] = self.following(row)
            self.written[row, at] = not self.waiting[row]
            if self.waiting[row]:
                chosen[row] = self.waiting[row].pop(0)
        self.step()
        left = torch.full_like(scores, -math.inf)
        return left.scatter(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


def _all_rows(
    model: Model,
    settings: Settings,
    prompts: Prompts,
    ends: frozenset[int],
    shape: tuple[int, int],
    seed: int,
    memory: int | None,
    show: Show | None,
    say: Callable[[str], None],
) -> tuple[Tensor, Tensor]:
    """The rows that this process writes, and which of their tokens were drawn; zeros in place of those of others."""
    rows, length = shape
    width = torch.empty((), dtype=model.net.dtype).element_size() / torch.empty((), dtype=model.dtype).element_size()
    bound = memory or CACHE.get(model.device.type, CACHE["cpu"])
    fitting = int(bound / max(1.0, length * model.layout.kv_bytes_per_token * width))
    batches = list(slices(rows, max(1, min(ROWS, fitting, -(-rows // world())))))[rank() :: world()]
    starts = [prompts.ids[row % len(prompts.ids)] for row in range(rows)]
    given = [min(len(start) for start in starts[batch]) for batch in batches]
    pace = _Pace(sum(length - size for size in given), rows * length, show, say)
    tokens, own = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    known = min(model.vocabulary, 1 + max(model.tokenizer.get_vocab().values()))
    for batch, size in zip(batches, given, strict=True):
        numbers = range(*batch.indices(rows))
        draws = [random.Random(f"write {seed} {number}") for number in numbers]
        noise = torch.tensor([[1.0 - draw.random() for _ in range(length)] for draw in draws]).to(model.device)

        def following(row: int, draws: list[random.Random] = draws) -> list[int]:
            return prompts.later(int(draws[row].random() * len(prompts.ids)))

        waiting = [start[size:] for start in starts[batch]]
        pen = Pen(waiting, noise, settings, following=following, ends=ends, known=known, step=pace.step)
        ids = torch.tensor([start[:size] for start in starts[batch]], device=model.device)
        with _own_settings(model.net, max_new_tokens=length - size, do_sample=False, use_cache=True) as how:
            real = torch.ones_like(ids)
            made = model.net.generate(ids, how, logits_processor=[pen], attention_mask=real)
        assert made.shape == (len(numbers), length), "rows are full"
        tokens[batch], own[batch] = made.cpu(), pen.written
    return tokens, own


@contextmanager
def _own_settings(net: Any, **settings: Any) -> Iterator[GenerationConfig]:
    """Write by these settings alone: a model's own may stop at its end of text, or penalise repetition.

    cuDNN's attention is left out: over more than 128 tokens its last bits vary from run to run, and so would the text.
    """
    before, how = net.generation_config, GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    net.generation_config = how
    try:
        with sdpa_kernel(ATTENTION):
            yield how
    finally:
        net.generation_config = before


def _everywhere(
    found: tuple[Tensor, Tensor] | None, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rows of all processes in each of them: what one has, the others have zeros for."""
    tokens, own = found or (torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool))
    if world() == 1:
        return tokens, own
    return total(tokens.to(device)), total(own.long().to(device)).bool()


class _Pace:
    """Tells of progress, and once, after a few steps, how long the writing is likely to take."""

    def __init__(self, steps: int, tokens: int, show: Show | None, say: Callable[[str], None]) -> None:
        self.steps, self.tokens, self.show, self.say = steps, tokens, show, say
        self.done, self.began = 0, 0.0

    def step(self) -> None:
        self.done += 1
        if self.done == 1:
            self.began = time.perf_counter()  # reading the prompts is no measure of writing
        if self.done == min(_MEASURED, self.steps):
            each = (time.perf_counter() - self.began) / max(1, self.done - 1)
            self.say(f"the model writes {self.tokens:,} tokens itself, in about {_span(each * self.steps)}")
        if self.show is not None:
            self.show("writing", float(self.done), float(self.steps))


def _span(seconds: float) -> str:
    for size, name in ((3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {name}s"
    return f"{max(1, round(seconds))} second{'s' * (round(seconds) > 1)}"


def _ends(model: Model) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those at which the model itself would stop."""
    own = model.net.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in (model.tokenizer.eos_token_id, *listed) if token is not None)


def _recall(keep: Path, same: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The rows in a file, if it holds those that are asked for."""
    if not keep.is_file():
        return None
    try:
        with safe_open(keep, framework="pt") as file:
            if (file.metadata() or {}).get("asked") != json.dumps(same, sort_keys=True):
                return None
            return file.get_tensor("tokens").long(), file.get_tensor("written")
    except SafetensorError:
        return None  # damaged: written again


def _keep(keep: Path, same: Mapping[str, Any], tokens: Tensor, own: Tensor) -> None:
    part = keep.with_name(f".{keep.name}.part")
    try:
        keep.parent.mkdir(parents=True, exist_ok=True)
        values = {"tokens": tokens.int(), "written": own}
        save_file(values, part, metadata={"asked": json.dumps(same, sort_keys=True)})
        os.replace(part, keep)
    except OSError as error:
        raise DepthpruneError(f"cannot write {keep}: {why(error)}") from None
    finally:
        part.unlink(missing_ok=True)
