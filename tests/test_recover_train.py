"""Training recovers what a cut cost: the right weights move, nothing that is shared does, and a killed run goes on."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from depthprune.data import Data, digest
from depthprune.errors import DataError, DepthpruneError, OptionError, PlanError
from depthprune.layout import blocks_of
from depthprune.model import Model, wrap
from depthprune.plan import Plan
from depthprune.recover import distill as distilling
from depthprune.recover import loop as looping
from depthprune.recover.arguments import unlaunched
from depthprune.recover.distill import Distill, distill
from depthprune.recover.feed import IGNORED, Stream, labels, order
from depthprune.recover.loop import by_parts, cross_entropy, held_loss, language, last_checkpoint
from depthprune.recover.lora import linear_layers, lora
from depthprune.recover.pair import kept_blocks
from depthprune.recover.repair import Repair
from depthprune.recover.settings import Settings, count, settled
from depthprune.recover.train import full, tail, train
from depthprune.registry import find
from depthprune.surgery import drop
from depthprune.units import Unit, parse
from families import tiny
from tiny_text import FIRST, make_tokenizer, words

QUICK: dict[str, Any] = {"tokens": "3k", "batch": 8, "evaluations": 3, "rate": 3e-3}
CPU = torch.device("cpu")


def text(rows: int = 24, length: int = 16, *, padded: bool = False, seed: int = 0, vocabulary: int = 90) -> Data:
    """Rows that count in steps of one: a few dozen updates learn them."""
    start = torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(seed))
    tokens = 3 + (start + torch.arange(length)) % vocabulary
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[::2, length // 2 :] = False
        tokens[~mask] = 0
    return Data(tokens, mask, "counting", digest(tokens, mask), 0, ())


def cut(model: Model, *units: str, **stand_in: str) -> Model:
    return drop(model, Plan(model.reference, parse(units or ("1", "2.self_attn")), stand_in))


def repair(teacher: Model, model: Model | None = None, data: Data | None = None, **options: Any) -> Repair:
    model = cut(teacher, "1") if model is None else model
    return Repair(model, teacher, text() if data is None else data, text(6, seed=1), **options)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.net.state_dict().items()}


def moved(model: Model, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.net.state_dict().items() if not torch.equal(tensor, before[name])}


RECOVERERS: dict[str, Callable[..., dict[str, Any]]] = {
    "full": full,
    "tail": partial(tail, blocks=2),
    "lora": lora,
    "distill": partial(distill, hard=1.0, features=0.1),
    "distill_top": partial(distill, hard=1.0, top=8, cache=True),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", RECOVERERS)
def test_training_lowers_the_held_loss_and_touches_nothing_shared(
    how: str, family: str, subject: Callable[..., Model]
) -> None:
    teacher = subject(family)
    model = cut(teacher, "1", f"2.{teacher.layout.blocks[2].sublayers[0].name}")
    own, dense = weights(model), weights(teacher)
    tied = model.net.config.tie_word_embeddings
    shown: list[float] = []
    said: list[str] = []
    mine = repair(teacher, model, text(padded=True), say=said.append, show=lambda what, done, total: shown.append(done))
    found = RECOVERERS[how](mine, **QUICK)
    assert found["held_loss_after"] < found["held_loss_before"] and found["kept"] == "best"
    assert found["held_loss_after"] == pytest.approx(held_loss(model.net, mine.held, 4, CPU))
    assert found["held_loss_after"] == pytest.approx(min(point["held_loss"] for point in found["history"]), rel=1e-4)
    assert json.loads(json.dumps(found)) == found and shown[-1] == found["steps"] and said
    assert [set(point) for point in found["history"]] == [{"step", "tokens", "held_loss", "train_loss"}] * 3
    assert found["tokens"] == found["history"][-1]["tokens"] and 0 < found["trainable"] <= model.parameters * 2
    assert not moved(teacher, dense) and moved(model, own)
    assert not model.net.training and all(parameter.requires_grad for parameter in model.net.parameters())
    same = model.net.get_input_embeddings().weight is model.net.get_output_embeddings().weight
    assert same == tied and set(model.net.state_dict()) == set(own)


def test_the_same_seed_gives_the_same_weights(subject: Callable[..., Model]) -> None:
    found = []
    for seed in (0, 0, 1):
        mine = repair(subject("llama"), seed=seed)
        lora(mine, **QUICK)
        found.append(weights(mine.model))
    assert not [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    assert [name for name in found[0] if not torch.equal(found[0][name], found[2][name])]


def test_what_makes_it_worse_is_not_kept(subject: Callable[..., Model]) -> None:
    said: list[str] = []
    mine = repair(subject("llama"), say=said.append)
    own, objects = weights(mine.model), dict(mine.model.net.named_parameters())
    found = full(mine, **QUICK | {"rate": 3.0, "schedule": "constant", "patience": 1, "evaluations": 12})
    assert found["kept"] == "before" and found["held_loss_after"] == found["held_loss_before"]
    assert found["stopped_early"] and found["steps"] < 23 and "no better" in said[-1]
    assert not moved(mine.model, own)
    assert all(parameter is objects[name] for name, parameter in mine.model.net.named_parameters())


def test_a_loss_that_is_not_finite_ends_it(subject: Callable[..., Model]) -> None:
    mine = repair(subject("llama"))
    own = weights(mine.model)
    with pytest.raises(DepthpruneError, match="not finite at step 1"):
        train(mine, lambda net, batch: language(net, batch) * math.nan, Settings(**QUICK), list(own))
    assert not moved(mine.model, own) and not mine.model.net.training


def test_only_predictions_that_count_do(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = subject("llama").net, text(padded=True)
    scored = torch.zeros_like(data.mask)
    scored[:, 5:9] = True
    data = replace(data, scored=scored)
    logits = net(input_ids=data.tokens, attention_mask=data.mask.long()).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), data.tokens[:, 1:], reduction="none")[data.counted]
    batch = {"input_ids": data.tokens, "attention_mask": data.mask, "labels": labels(data)}
    whole = language(net, batch)
    assert whole.item() == pytest.approx(nll.sum().item(), rel=1e-5)
    assert held_loss(net, data, 5, CPU) == pytest.approx(nll.mean().item(), rel=1e-5)
    (want,) = torch.autograd.grad(whole, net.lm_head.weight)
    monkeypatch.setattr(looping, "NUMBERS", 96 * 50)
    (have,) = torch.autograd.grad(language(net, batch), net.lm_head.weight)
    assert torch.allclose(have, want, atol=1e-5)


def test_a_step_is_the_gradient_of_the_mean_however_it_is_split(subject: Callable[..., Model]) -> None:
    found = []
    for micro in (1, 3, 6):
        mine = repair(subject("llama"), data=text(padded=True))
        full(mine, tokens="500", batch=6, micro=micro, rate=1e-3, clip=0.0)
        found.append(weights(mine.model))
    for other in found[1:]:
        assert all(torch.allclose(found[0][name], other[name], atol=1e-5) for name in other)


def test_rows_come_in_shuffled_passes() -> None:
    data = text(10, padded=True)
    assert torch.equal(order(data, 25, 3), order(data, 25, 3)) and not torch.equal(
        order(data, 25, 3), order(data, 25, 4)
    )
    first, second, _ = order(data, 25, 3).split(10)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()


class Killed(Exception):
    """What a test interrupts a run with."""


def interrupted(how: Callable[..., Any], mine: Repair, at: int) -> None:
    def show(what: str, done: float, total: float) -> None:
        if what == "training" and done == at:
            raise Killed

    with pytest.raises(Killed):
        how(replace(mine, show=show), **QUICK)


@pytest.mark.parametrize("how", ["full", "lora", "distill_top"])
def test_a_killed_run_goes_on_to_the_same_weights(how: str, subject: Callable[..., Model], tmp_path: Path) -> None:
    teacher = subject("llama")
    whole, killed = (repair(teacher, cut(teacher, "1"), folder=tmp_path / name) for name in ("whole", "killed"))
    want = RECOVERERS[how](whole, **QUICK)
    interrupted(RECOVERERS[how], killed, 13)
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-8"]
    said: list[str] = []
    shown: list[float] = []
    again = replace(killed, resume=True, say=said.append, show=lambda what, done, total: shown.append(done))
    have = RECOVERERS[how](again, **QUICK)
    assert shown[0] == 9 and len(said) == 1
    assert have["history"] == want["history"] and have["held_loss_after"] == want["held_loss_after"]
    for name, tensor in weights(whole.model).items():
        assert torch.allclose(tensor, killed.model.net.state_dict()[name], atol=1e-6), name
    fresh = repair(teacher, cut(teacher, "1"), folder=tmp_path / "killed", resume=True)
    again = RECOVERERS[how](fresh, **QUICK)  # done already: nothing is trained
    assert again["history"] == want["history"] and not moved(fresh.model, weights(killed.model))
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2


def test_broken_checkpoints_are_passed_over(subject: Callable[..., Model], tmp_path: Path) -> None:
    teacher, said = subject("llama"), list[str]()
    mine = repair(teacher, folder=tmp_path, say=said.append)
    interrupted(full, mine, 17)
    first, second = (tmp_path / f"checkpoint-{step}" for step in (8, 15))
    content = (second / "trained.safetensors").read_bytes()
    (second / "trained.safetensors").write_bytes(content[:-100])
    said.clear()
    interrupted(full, replace(mine, resume=True), 14)
    assert said[0] == "checkpoint-15 is incomplete; going on from checkpoint-8"
    (first / "complete.json").unlink()
    said.clear()
    have = full(replace(mine, resume=True), **QUICK)
    assert said[0] == "checkpoint-15 is incomplete; starting again"
    other = repair(teacher)
    assert have["history"] == full(other, **QUICK)["history"]
    assert last_checkpoint(tmp_path, {"options": "others"})[1].endswith("is of another run; starting again")


def test_a_bfloat16_model_stays_one(subject: Callable[..., Model]) -> None:
    net = tiny("llama").to(torch.bfloat16)
    mine = repair(wrap(net, None, "half"))
    for how in (full, lora, partial(tail, precision="float32"), distill):
        found = how(mine, **QUICK | {"rate": 1e-3})
        assert found["held_loss_after"] <= found["held_loss_before"]
        assert {parameter.dtype for parameter in mine.model.net.parameters()} == {torch.bfloat16}


def test_checkpointing_changes_no_weight(subject: Callable[..., Model]) -> None:
    found = []
    for checkpointing in (False, True):
        mine = repair(subject("llama"))
        distill(mine, **QUICK, features=1.0, checkpointing=checkpointing)
        found.append(weights(mine.model))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_tail_is_the_last_blocks_the_norm_and_an_untied_head(family: str, subject: Callable[..., Model]) -> None:
    stack, norm = {"gpt2": ("transformer.h", "transformer.ln_f")}.get(family, ("model.layers", "model.norm"))
    for head in ("auto", "true", "false"):
        mine = repair(subject(family))
        own, tied = weights(mine.model), mine.model.net.config.tie_word_embeddings
        tail(mine, **QUICK, blocks=1, head=head)
        names = {name for name in moved(mine.model, own) if not name.startswith(f"{stack}.2.")}
        embeddings = {"model.embed_tokens.weight", "transformer.wte.weight"} & set(own)
        want = (
            {} if head == "false" or (head == "auto" and tied) else {"lm_head.weight"} | (embeddings if tied else set())
        )
        assert {name for name in names if not name.startswith(norm)} == set(want)
        assert any(name.startswith(norm) for name in names)
        assert all(f"{stack}.{index}." not in name for name in names for index in (0, 1))
    with pytest.raises(OptionError, match="1 to 3 blocks"):
        tail(mine, blocks=9)


def test_lora_takes_layers_by_kind_and_by_name(subject: Callable[..., Model]) -> None:
    model = cut(subject("llama"), "1", "2.mlp")
    assert len(linear_layers(model, "all")) == 4 * 3 + 3 * 2
    assert linear_layers(model, "mlp")[0] == "model.layers.0.mlp.gate_proj" and len(linear_layers(model, "mlp")) == 6
    assert [path.split(".")[2:] for path in linear_layers(model, "q_proj+up_proj")][1] == ["0", "mlp", "up_proj"]
    with pytest.raises(OptionError, match=r"'q_prj' .* they have: down_proj, gate_proj"):
        linear_layers(model, "q_prj")


def test_stand_ins_are_trained_alone_and_no_adapter_goes_there(subject: Callable[..., Model]) -> None:
    teacher = subject("llama")
    model = drop(teacher, Plan(teacher.reference, parse(("1.mlp", "2")), {"1.mlp": "lowrank:4", "2": "bias"}))
    own = weights(model)
    for how in (full, partial(distill, hard=1.0)):
        how(repair(teacher, model), **QUICK, only="stand-ins")
    names = moved(model, own)
    assert {"model.layers.1.mlp.up.weight", "model.layers.1.mlp.down.weight"} < names and len(names) == 3
    assert not [path for path in linear_layers(model, "all") if path.startswith("model.layers.1.mlp")]
    assert lora(repair(teacher, model), **QUICK)["kept"] == "best"
    with pytest.raises(OptionError, match="no stand-in"):
        full(repair(teacher), only="stand-ins")


def test_distillation_measures_the_distance_to_the_teacher(subject: Callable[..., Model]) -> None:
    teacher, data = subject("llama"), text(5, padded=True)
    model = cut(teacher, "1")
    batch = {"input_ids": data.tokens, "attention_mask": data.mask, "labels": labels(data)}
    p, q = (net(input_ids=data.tokens, attention_mask=data.mask.long()).logits for net in (teacher.net, model.net))

    def loss(student: Model, **options: Any) -> float:
        kept = kept_blocks(teacher, student) if options.get("features") else []
        return distilling._loss(student, teacher, Distill(**options), kept, None, student.net, batch).item()

    for t in (1.0, 2.0):
        each = F.kl_div((q / t).log_softmax(-1), (p / t).log_softmax(-1), reduction="none", log_target=True).sum(-1)
        want = t * t * each[:, :-1][data.counted].sum().item()
        assert loss(model, temperature=t) == pytest.approx(want, rel=1e-4)
        assert loss(model, temperature=t, top=95) == pytest.approx(want, rel=1e-3)
        assert 0 < loss(model, temperature=t, top=4) < want
        assert loss(teacher, temperature=t, top=4, features=1.0) == pytest.approx(0, abs=1e-3)
    plain = loss(model)
    nats = by_parts(cross_entropy, q, F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)).item()
    assert loss(model, hard=0.5) == pytest.approx(plain + 0.5 * nats, rel=1e-4)
    real = data.mask
    gaps = []
    with distilling._streams(blocks_of(model.net, model.layout)) as mine:
        model.net(input_ids=data.tokens, attention_mask=data.mask.long())
    with distilling._streams(blocks_of(teacher.net, teacher.layout)) as dense:
        teacher.net(input_ids=data.tokens, attention_mask=data.mask.long())
    for number, index in enumerate((0, 2, 3)):
        a, b = mine[number][real], dense[index][real]
        gaps.append((((a - b) ** 2).mean() / (b**2).mean()).item())
    assert gaps[0] == 0 < gaps[1]
    assert loss(model, features=2.0) == pytest.approx(plain + 2 * sum(gaps) / 3 * data.predicted, rel=1e-4)
    with pytest.raises(PlanError, match="not the plan it was cut by"):
        kept_blocks(teacher, replace(model, plan=None))


def test_text_is_streamed_without_what_is_held_out(subject: Callable[..., Model], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    stories = [[FIRST + (7 * story + step) % 88 for step in range(60)] for story in range(40)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": words(story)}) + "\n" for story in stories), encoding="utf-8")
    held = torch.tensor([[1, *stories[3][:31]]])
    held_data = Data(held, torch.ones_like(held, dtype=torch.bool), "held", "", 0, ())
    teacher = replace(subject("llama"), tokenizer=tokenizer)
    mine = replace(repair(teacher, data=text(length=32)), held=held_data, source=str(file))
    rows = [row["input_ids"].tolist() for row, _ in zip(Stream(mine), range(200), strict=False)]
    assert all(len(row) == 32 and row[0] == 1 and row[1:] != held[0, 1:].tolist() for row in rows)
    assert any(stories[5][0] in row for row in rows)
    found = full(mine, **QUICK, stream=True)
    assert found["steps"] == 12 and found["tokens"] == 12 * 8 * 32
    with pytest.raises(OptionError, match="needs the name of a text"):
        full(repair(teacher), stream=True)


def test_options_are_those_of_the_signature_and_presets_give_way() -> None:
    _, function, options = find(
        "recoverers", "full:tokens=500k,batch=8,fsdp=false,rate=1e-4,preset=shortened-llama-cpt"
    )
    assert function is full and options["batch"] == 8 and options["fsdp"] is False
    with pytest.raises(OptionError, match="no option 'targets'"):
        find("recoverers", "tail:targets=all")
    from depthprune.recover.lora import Lora, presets

    assert settled(Lora, presets, {"preset": "gromov", "rank": 2}).rank == 2
    assert settled(Lora, presets, {"preset": "blockpruner"}).alpha == 10
    assert [count(text) for text in ("2M", "500k", "8e6", "1B", "1.5m", "7")] == [
        2_000_000, 500_000, 8_000_000, 1_000_000_000, 1_500_000, 7,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [
        (full, {"tokens": "many"}, "500k, 2M or 1B, not 'many'"),
        (full, {"tokens": "0"}, "tokens"),
        (full, {"warmup": 2.0}, "warmup is a share from 0 to 1, not 2.0"),
        (full, {"schedule": "cosin"}, "Did you mean 'cosine'"),
        (full, {"precision": "int8"}, "precision"),
        (full, {"log": "printer"}, "unknown log"),
        (full, {"log": "mlflow"}, "pip install mlflow"),
        (full, {"only": "some"}, "stand-ins"),
        (full, {"preset": "blockpruner"}, "Available: shortened-llama-cpt"),
        (full, {"fsdp": True}, "torchrun"),
        (full, {"target": 1}, "unknown option 'target'"),
        (tail, {"head": "maybe"}, "auto, false, true"),
        (lora, {"rank": 0}, "rank of at least 1"),
        (distill, {"temperature": 0.0}, "temperature above 0"),
        (distill, {"top": 96}, "0 to 95"),
        (distill, {"cache": True}, "set top"),
    ],
)
def test_wrong_options_say_what_is_right(
    how: Callable[..., Any], options: dict[str, Any], words: str, subject: Callable[..., Model]
) -> None:
    with pytest.raises(OptionError, match=words) as raised:
        how(repair(subject("llama")), **options)
    assert "\n" not in str(raised.value)


def test_foreign_and_long_rows_are_refused(subject: Callable[..., Model]) -> None:
    teacher = subject("llama")
    with pytest.raises(DataError, match="tokenizer of another model"):
        full(repair(teacher, data=text(vocabulary=200, length=100)))
    with pytest.raises(DataError, match="130 tokens exceed the model's 128 positions"):
        full(repair(teacher, data=text(length=130)))


def test_a_launcher_s_settings_are_hidden_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with unlaunched():
        assert "ACCELERATE_USE_FSDP" not in os.environ
        os.environ["FSDP_VERSION"] = "2"
    assert os.environ["ACCELERATE_USE_FSDP"] == "true" and "FSDP_VERSION" not in os.environ


def test_lora_says_how_to_get_peft(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match=r"pip install 'depthprune\[lora\]'"):
        lora(repair(subject("llama")))


def test_a_kept_block_is_found_by_the_plan(subject: Callable[..., Model]) -> None:
    teacher = subject("llama")
    assert kept_blocks(teacher, cut(teacher, "0", "2.mlp")) == [1, 2, 3]
    assert kept_blocks(teacher, drop(teacher, Plan(teacher.reference, (Unit("", 1, "mlp"),)))) == [0, 1, 2, 3]
