"""How fast models are, side by side: prefill, decoding with the KV cache, and memory.

The models take turns, repeat by repeat, so that a machine that slows down or speeds up hits all of them alike.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from depthprune.errors import OptionError

Clock = Callable[[], float]

_CACHES = ("past_key_values", "cache_params")  # attention models and state-space models name it differently
_COPY_BYTES = {"cuda": 2**28, "cpu": 2**26}


@dataclass(frozen=True, eq=False)
class _Runner:
    """A model with the arguments that its forward takes, and what was measured so far."""

    model: PreTrainedModel
    parameters: frozenset[str]
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    @property
    def cache_name(self) -> str:
        """The keyword of the forward that takes the cache; empty where there is none."""
        return next((name for name in _CACHES if name in self.parameters), "")


def bench(
    models: Mapping[str, PreTrainedModel],
    *,
    batch: int = 1,
    prompt: int = 256,
    new: int = 32,
    repeats: int = 5,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Time several models side by side and return what ``bench.json`` holds.

    Prefill is one forward with cache over ``prompt`` random tokens (the last logits only, where the forward allows
    it); decode is ``new`` greedy steps of one token each on that cache. After a warm-up of each model come ``repeats``
    rounds; in every round each model is measured once, and the first to go changes from round to round. Figures are
    medians; ``*_min`` and ``*_max`` give the spread; ``ratio`` divides by the first model, so below 1 is faster.

    ``bytes_per_step`` is what one decode step must read at least: every parameter once (of an input embedding that
    is not tied, only the rows of the batch; of an encoder, nothing) and the cache, at its mean length.
    ``share_of_copy_bandwidth`` compares that with a large copy on the same device (read and written bytes both
    counted): near 1 the floor is reached and only fewer bytes can help. It is an upper bound for mixtures of experts,
    which read only some, and can pass 1 where the weights fit into the processor's caches.

    Models without a cache (encoders) get prefill only: their decode figures are ``None``. Encoder-decoders read the
    prompt in the encoder. ``peak_bytes`` is the model's own weights plus what its run allocated, on CUDA only.
    Leaves each model in the mode (train or eval) it was in.

    Raises ``OptionError`` for counts below 1, models on several devices or of several dtypes, or more positions than
    a model has.
    """
    runners = _runners(models, batch=batch, prompt=prompt, new=new, repeats=repeats)
    first = next(iter(runners.values())).model
    device = first.device
    vocabulary = min(runner.model.config.get_text_config().vocab_size for runner in runners.values())
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(vocabulary, (batch, prompt), generator=generator).to(device)
    modes = {name: runner.model.training for name, runner in runners.items()}
    try:
        with torch.inference_mode():
            for runner in runners.values():
                runner.model.train(False)
                _measure(runner, tokens_BT, new, clock, keep=False)
            for runner in _turns(runners, repeats):
                _measure(runner, tokens_BT, new, clock, keep=True)
            bandwidth = _copy_bandwidth(device, clock)
    finally:
        for name, runner in runners.items():
            runner.model.train(modes[name])
    figures = [_figures(name, runner, batch, prompt, new, bandwidth) for name, runner in runners.items()]
    for entry in figures:
        entry["ratio"] = {
            "prefill": _ratio(entry["prefill_ms"], figures[0]["prefill_ms"]),
            "decode": _ratio(entry["decode_ms_per_token"], figures[0]["decode_ms_per_token"]),
        }
    return {
        "format": 1,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "repeats": repeats,
        "seed": seed,
        "copy_bytes_per_second": bandwidth,
        "models": figures,
    }


def _runners(models: Mapping[str, PreTrainedModel], **counts: int) -> dict[str, _Runner]:
    if not models:
        raise OptionError("bench needs at least one model")
    for name, count in counts.items():
        if count < 1:
            raise OptionError(f"{name} must be at least 1, not {count}")
    for what in ("device", "dtype"):
        found = {str(getattr(model, what)) for model in models.values()}
        if len(found) > 1:
            raise OptionError(
                f"models of several {what}s cannot be compared ({', '.join(sorted(found))}); load all alike"
            )
    needed = counts["prompt"] + counts["new"]
    for name, model in models.items():
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and needed > positions:
            raise OptionError(
                f"prompt {counts['prompt']} + new {counts['new']} = {needed} tokens, "
                f"but {name} has {positions} positions; ask for fewer"
            )
    return {
        name: _Runner(model, frozenset(inspect.signature(model.forward).parameters)) for name, model in models.items()
    }


def _turns(runners: Mapping[str, _Runner], repeats: int) -> Iterator[_Runner]:
    """Every model once a round, the first to go rotating, so that none always runs on a cold or a hot machine."""
    order = list(runners.values())
    for repeat in range(repeats):
        shift = repeat % len(order)
        yield from order[shift:] + order[:shift]


def prefill(runner: _Runner, tokens_BT: Tensor) -> dict[str, Any]:
    """Run the prompt once, filling a cache where the model has one."""
    model, takes = runner.model, runner.parameters
    extras: dict[str, Any] = {"use_cache": True} if runner.cache_name else {}
    if "logits_to_keep" in takes:
        extras["logits_to_keep"] = 1
    if model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None) or 0
        extras["decoder_input_ids"] = tokens_BT.new_full((len(tokens_BT), 1), start)
    return dict(model(input_ids=tokens_BT, **extras))


def decode(runner: _Runner, answer: Mapping[str, Any], new: int) -> Tensor:
    """Take ``new`` greedy steps of one token on the cache of a prefill; returns the tokens fed, ``(B, new)``."""
    model, encoder_decoder = runner.model, runner.model.config.is_encoder_decoder
    extras: dict[str, Any] = {"use_cache": True, runner.cache_name: answer[runner.cache_name]}
    if encoder_decoder:
        # a tuple, as the model takes it; so the encoder does not run again
        extras["encoder_outputs"] = (answer["encoder_last_hidden_state"],)
    fed: list[Tensor] = []
    logits_BTV = answer["logits"]
    for _ in range(new):
        fed.append(logits_BTV[:, -1:].argmax(-1))
        logits_BTV = model(**{"decoder_input_ids" if encoder_decoder else "input_ids": fed[-1]}, **extras).logits
    return torch.cat(fed, dim=1)


def _measure(runner: _Runner, tokens_BT: Tensor, new: int, clock: Clock, *, keep: bool) -> None:
    device = tokens_BT.device
    before = _reset_peak(device)
    started = _now(device, clock)
    answer = prefill(runner, tokens_BT)
    filled = _now(device, clock)
    cache = answer.get(runner.cache_name)
    decodes = cache is not None and "logits" in answer
    empty = _bytes_in(cache) if decodes else 0
    begun = _now(device, clock)
    if decodes:
        decode(runner, answer, new)
    ended = _now(device, clock)
    if not keep:
        return
    runner.prefill.append(filled - started)
    if decodes:
        runner.decode.append((ended - begun) / new)
        runner.cache_bytes.append((empty + _bytes_in(cache)) // 2)
    if before is not None:
        runner.peak.append(torch.cuda.max_memory_allocated(device) - before)


def _now(device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _reset_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _bytes_in(cache: object) -> int:
    """Bytes of all tensors that a cache holds, whatever its layers keep."""
    if isinstance(cache, Tensor):
        return cache.nbytes
    if isinstance(cache, list | tuple):
        return sum(map(_bytes_in, cache))
    if isinstance(cache, dict):
        return sum(map(_bytes_in, cache.values()))
    return sum(map(_bytes_in, vars(cache).values())) if isinstance(cache, Cache | CacheLayerMixin) else 0


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _bytes_per_step(runner: _Runner, batch: int) -> int:
    model: Any = runner.model
    total = _weight_bytes(model) + int(median(runner.cache_bytes))
    table: Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is not None and head.weight is not table:
        total -= table.nbytes - min(batch, len(table)) * table[0].nbytes
    if model.config.is_encoder_decoder:
        decoder = set(model.get_decoder().parameters())
        total -= sum(weight.nbytes for weight in model.get_encoder().parameters() if weight not in decoder)
    return total


def _copy_bandwidth(device: torch.device, clock: Clock) -> float | None:
    """Bytes read plus bytes written per second by a large copy; ``None`` if the clock did not move."""
    source = torch.ones(_COPY_BYTES.get(device.type, 2**26), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(6):
        started = _now(device, clock)
        target.copy_(source)
        seconds.append(_now(device, clock) - started)
    typical = median(seconds[1:])
    return 2 * source.nbytes / typical if typical > 0 else None


def _figures(name: str, runner: _Runner, batch: int, prompt: int, new: int, bandwidth: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name}
    entry |= _spread("prefill_ms", runner.prefill)
    entry["prefill_tokens_per_second"] = _ratio(batch * prompt, median(runner.prefill))
    entry |= _spread("decode_ms_per_token", runner.decode)
    seconds = median(runner.decode) if runner.decode else None
    entry["decode_tokens_per_second"] = _ratio(batch, seconds)
    entry["bytes_per_step"] = _bytes_per_step(runner, batch) if runner.decode else None
    rate = _ratio(entry["bytes_per_step"], seconds)
    entry["share_of_copy_bandwidth"] = _ratio(rate, bandwidth)
    entry["peak_bytes"] = max(runner.peak) + _weight_bytes(runner.model) if runner.peak else None
    return entry


def _spread(name: str, seconds: list[float]) -> dict[str, float | None]:
    if not seconds:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: 1e3 * median(seconds), f"{name}_min": 1e3 * min(seconds), f"{name}_max": 1e3 * max(seconds)}


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other
