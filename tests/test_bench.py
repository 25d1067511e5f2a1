from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from depthprune.bench import bench
from depthprune.errors import OptionError

module = sys.modules["depthprune.bench"]  # as an attribute of the package, the name is the function's

PROMPT, NEW = 12, 5


def llama(blocks: int = 2, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(blocks)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**(sizes | {"num_hidden_layers": blocks, "num_key_value_heads": 2} | changes))
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # tiny fresh models repeat themselves, which hides wrong caches
        for weight in model.parameters():
            weight.mul_(8.0)
    return model


def others() -> Iterator[PreTrainedModel]:
    yield GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    yield MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4))
    yield T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def bert() -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=61, **sizes))


class FakeClock:
    """A clock that moves only when a watched model runs, so that every figure is known in advance."""

    def __init__(self) -> None:
        self.time = 0.0
        self.drift = 1.0
        self.growth = 1.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.time

    def watch(self, name: str, model: PreTrainedModel, prefill: float, decode: float) -> PreTrainedModel:
        def move(_module: nn.Module, _args: Any, keywords: dict[str, Any]) -> None:
            length = keywords["input_ids"].shape[1]
            if length > 1:
                self.drift *= self.growth
            self.calls.append((name, length))
            self.time += (prefill if length > 1 else decode) * self.drift

        model.register_forward_pre_hook(move, with_kwargs=True)
        return model


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPY_BYTES", {"cpu": 2**16})


def runner(model: PreTrainedModel) -> module._Runner:
    return next(iter(module._runners({"it": model}, batch=1, prompt=PROMPT, new=NEW, repeats=1).values()))


def tokens(batch: int = 1) -> torch.Tensor:
    return torch.randint(61, (batch, PROMPT), generator=torch.Generator().manual_seed(3))


def greedy(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The naive way: the whole text again for every token, no cache."""
    seen = tokens_BT
    for _ in range(NEW):
        seen = torch.cat([seen, model(input_ids=seen, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return seen[:, tokens_BT.shape[1] :]


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(str(device)))

    def clock() -> float:
        seen.append("clock")
        return 1.0

    assert module._now(torch.device("cuda", 0), clock) == 1.0 and seen == ["cuda:0", "clock"]
    module._now(torch.device("cpu"), clock)
    assert seen == ["cuda:0", "clock", "clock"]


def test_figures_follow_the_clock() -> None:
    clock = FakeClock()
    models = {"dense": clock.watch("dense", llama(2), 0.4, 0.02), "pruned": clock.watch("pruned", llama(1), 0.3, 0.01)}
    found = bench(models, prompt=PROMPT, new=NEW, repeats=3, clock=clock)
    dense, pruned = found["models"]
    assert dense["prefill_ms"] == pytest.approx(400) and pruned["prefill_ms"] == pytest.approx(300)
    assert dense["decode_ms_per_token"] == pytest.approx(20) and pruned["decode_ms_per_token"] == pytest.approx(10)
    assert pruned["decode_tokens_per_second"] == pytest.approx(100)
    assert pruned["prefill_tokens_per_second"] == pytest.approx(PROMPT / 0.3)
    assert dense["ratio"] == {"prefill": 1.0, "decode": 1.0}
    assert pruned["ratio"]["prefill"] == pytest.approx(0.75) and pruned["ratio"]["decode"] == pytest.approx(0.5)
    assert found["copy_bytes_per_second"] is None  # this clock stood still during the copy
    assert pruned["share_of_copy_bandwidth"] is None


def test_median_and_spread() -> None:
    clock = FakeClock()
    clock.growth = 2.0  # every prefill takes twice the time of the one before; the first is the warm-up
    found = bench({"it": clock.watch("it", llama(1), 1.0, 0.5)}, prompt=PROMPT, new=NEW, repeats=3, clock=clock)
    (entry,) = found["models"]
    assert [entry[f"prefill_ms{end}"] for end in ("_min", "", "_max")] == [4000, 8000, 16000]
    assert [entry[f"decode_ms_per_token{end}"] for end in ("_min", "", "_max")] == [2000, 4000, 8000]


def test_models_take_turns_after_a_warm_up() -> None:
    clock = FakeClock()
    bench({name: clock.watch(name, llama(1), 1, 1) for name in "abc"}, prompt=PROMPT, new=NEW, repeats=3, clock=clock)
    runs = [name for name, length in clock.calls if length == PROMPT]
    assert runs == list("abcabcbcacab")
    assert [length for _, length in clock.calls] == [PROMPT, *[1] * NEW] * 12


def test_drift_hits_all_alike_only_when_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratio() -> float:
        clock = FakeClock()
        clock.growth = 1.1
        same = {name: clock.watch(name, llama(1), 1, 1) for name in ("first", "second")}
        return float(bench(same, prompt=PROMPT, new=2, repeats=8, clock=clock)["models"][1]["ratio"]["prefill"])

    assert ratio() == pytest.approx(1, abs=0.01)
    one_after_the_other = lambda runners, repeats: itertools.chain(*([each] * repeats for each in runners.values()))  # noqa: E731
    monkeypatch.setattr(module, "_turns", one_after_the_other)
    assert ratio() > 1.9


@torch.inference_mode()
def test_decoding_is_the_naive_greedy_decoding() -> None:
    for model in (llama(3), *itertools.islice(others(), 2)):
        model.eval()
        run = runner(model)
        fed = module.decode(run, module.prefill(run, tokens(2)), NEW)
        assert torch.equal(fed, greedy(model, tokens(2))), type(model).__name__


@torch.inference_mode()
def test_decoding_without_the_past_would_be_seen() -> None:
    model = llama(3)
    run = runner(model)
    answer = module.prefill(run, tokens(2))
    first = answer["logits"].argmax(-1)
    lost = model(input_ids=first).logits[:, -1:].argmax(-1)  # what a benchmark that forgets the cache computes
    assert not torch.equal(torch.cat([first, lost], 1), greedy(model, tokens(2))[:, :2])


@torch.inference_mode()
def test_encoder_decoder_decodes_like_generate() -> None:
    *_, model = others()
    model.eval()
    run = runner(model)
    fed = module.decode(run, module.prefill(run, tokens()), NEW)
    made = model.generate(tokens(), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(fed, made[:, 1:])


@torch.inference_mode()
def test_cache_bytes_are_counted() -> None:
    answer = module.prefill(runner(llama(3)), tokens(2))
    per_token = 3 * 2 * 2 * 8 * 4  # blocks, keys and values, heads, width of a head, bytes
    assert module._bytes_in(answer["past_key_values"]) == 2 * PROMPT * per_token
    half = llama(3).to(torch.bfloat16)
    assert module._bytes_in(module.prefill(runner(half), tokens())["past_key_values"]) == PROMPT * per_token // 2
    assert answer["logits"].shape[1] == 1


def test_bytes_per_step_and_share() -> None:
    tied, loose = llama(2, tie_word_embeddings=True), llama(2)
    for model in (tied, loose):
        found = bench({"it": model}, batch=2, prompt=PROMPT, new=NEW, repeats=1)
        (entry,) = found["models"]
        block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
        cache = 2 * (PROMPT + NEW / 2) * 2 * 2 * 2 * 8
        rows = 0 if model is tied else 2 * 32
        assert entry["bytes_per_step"] == 4 * (2 * block + 32 + 61 * 32 + rows + cache)
        rate = entry["bytes_per_step"] / (entry["decode_ms_per_token"] / 1e3)
        assert entry["share_of_copy_bandwidth"] == pytest.approx(rate / found["copy_bytes_per_second"])


@torch.inference_mode()
def test_an_encoder_is_not_read_while_decoding() -> None:
    *_, model = others()
    (entry,) = bench({"it": model}, prompt=PROMPT, new=NEW, repeats=1)["models"]
    read = sum(weight.nbytes for name, weight in model.named_parameters() if not name.startswith("encoder."))
    cross, own = PROMPT, 1 + NEW / 2  # positions; two blocks, keys and values, two heads of width 8, 4 bytes
    assert entry["bytes_per_step"] == read + (cross + own) * 2 * 2 * 2 * 8 * 4


def test_encoders_get_prefill_only() -> None:
    found = bench({"dense": bert(), "pruned": bert()}, prompt=PROMPT, new=NEW, repeats=1)
    for entry in found["models"]:
        assert entry["prefill_ms"] > 0
        assert entry["decode_ms_per_token"] is entry["decode_tokens_per_second"] is entry["bytes_per_step"] is None
        assert entry["ratio"]["decode"] is None


def test_result_is_json_and_says_how_it_was_measured() -> None:
    found = bench(dict(zip(("gpt2", "mamba", "t5"), others(), strict=True)), prompt=PROMPT, new=NEW, repeats=2, seed=7)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    asked = {"batch": 1, "prompt": PROMPT, "new": NEW, "repeats": 2, "seed": 7}
    assert found | asked | {"format": 1, "device": "cpu", "dtype": "float32"} == found
    assert [entry["name"] for entry in found["models"]] == ["gpt2", "mamba", "t5"]
    assert all(entry["decode_ms_per_token"] > 0 and entry["peak_bytes"] is None for entry in found["models"])


def test_modes_are_restored_even_after_a_failure() -> None:
    model = llama(1).train()
    bench({"it": model}, prompt=PROMPT, new=NEW, repeats=1)
    assert model.training

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        bench({"it": model}, prompt=PROMPT, new=NEW, repeats=1)
    assert model.training


@pytest.mark.parametrize("name", ["batch", "prompt", "new", "repeats"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name} must be at least 1, not 0$"):
        bench({"it": llama(1)}, **{name: 0})


def test_models_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(OptionError, match=r"dtypes cannot be compared \(torch.bfloat16, torch.float32\)"):
        bench({"a": llama(1), "b": llama(1).to(torch.bfloat16)}, prompt=PROMPT, new=NEW)
    with pytest.raises(OptionError, match="at least one model"):
        bench({})


def test_more_tokens_than_positions_are_refused() -> None:
    model = llama(1, max_position_embeddings=16)
    with pytest.raises(OptionError, match="prompt 12 \\+ new 5 = 17 tokens, but it has 16 positions"):
        bench({"it": model}, prompt=PROMPT, new=NEW)
    bench({"it": model}, prompt=PROMPT, new=4, repeats=1)
