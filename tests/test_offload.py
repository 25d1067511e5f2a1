"""Models larger than memory: what is done with blocks on disk gives what it gives in memory, and few blocks come in."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import load_file
from torch import Tensor, nn

from command import copy, run
from command import hold as assumed
from cuts import cut, rows
from cuts import repair as repair_of
from depthprune import offload, runtimes
from depthprune.discover import find_stack
from depthprune.errors import DepthpruneError, OptionError
from depthprune.evaluate import Windows, perplexity
from depthprune.export import hf
from depthprune.export.check import check_many, expect, expect_as_it_is
from depthprune.layout import blocks_of
from depthprune.metrics import weight
from depthprune.model import Model, fingerprint, load
from depthprune.offload import Stored, hold, numbers, offloaded, stored, swap
from depthprune.oracle import ModelOracle
from depthprune.recover import closed, fill, scale
from depthprune.recover import pair as pairing
from depthprune.recover.apply import recover
from depthprune.recover.repair import Repair
from depthprune.sizes import budgets
from depthprune.surgery import clone
from depthprune.units import parse
from depthprune.variants import losses
from depthprune.walk import walk
from families import tiny
from tiny_text import make_tokenizer

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral")
CUT = ("1.mlp", "2")
DATA = rows(12, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family, saved by transformers."""
    place = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        tiny(name).save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)
    return {name: place / name for name in FAMILIES}


@pytest.fixture(scope="module")
def both(folders: dict[str, Path]) -> Callable[[str], tuple[Model, Model]]:
    """A model in memory, and the same with all blocks but the first on disk."""
    made: dict[str, tuple[Model, Model]] = {}

    def of(name: str) -> tuple[Model, Model]:
        if name not in made:
            made[name] = (load(folders[name], device="cpu"), on_disk(folders[name]))
        return made[name]

    return of


def on_disk(folder: Path, blocks: int = 1) -> Model:
    """The model in a folder with memory for its outside and some blocks."""
    whole = load(folder, device="cpu")
    room = 4 * (whole.layout.outside + sum(block.parameters for block in whole.layout.blocks[:blocks])) + 2000
    return load(folder, device="cpu", place=f"auto:cpu={room}")


def weights(model: Model | nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, read where they wait."""
    net = model.net if isinstance(model, Model) else model
    return {name: numbers(parameter).clone() for name, parameter in net.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], within: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(float((a[n].float() - b[n].float()).abs().max()) <= within for n in a)


def waiting(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if parameter.is_meta]


# Looking


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_on_disk_is_the_model_in_memory(name: str, both: Callable[[str], tuple[Model, Model]]) -> None:
    whole, auto = both(name)
    away = {name for name, _ in auto.net.named_parameters()} & set(waiting(auto.net))
    stack = auto.layout.path
    first, *others = blocks_of(auto.net, auto.layout)
    assert not waiting(first) and all(parameter.is_meta for block in others for parameter in block.parameters())
    assert away == {n for n, _ in auto.net.named_parameters() if n.startswith(stack) and f"{stack}.0." not in n}
    assert offloaded(auto.net) and not offloaded(whole.net)
    assert auto.reference.fingerprint == whole.reference.fingerprint and auto.layout == whole.layout
    assert (auto.parameters, auto.bytes, auto.device) == (whole.parameters, whole.bytes, whole.device)
    variants = [[], parse(["1"]), parse(["2.mlp" if name == "gpt2" else whole.layout.units()[-1].__str__()])]
    assert (losses(auto, DATA, variants).nll == losses(whole, DATA, variants).nll).all()
    padded = rows(9, 12, seed=2, padding=4)
    text = Windows(padded, padded.mask.clone(), 12)
    text.scored[:, 0] = False
    assert perplexity(auto, text).loss == pytest.approx(perplexity(whole, text).loss, abs=1e-9)
    assert same(weights(auto), weights(whole)) and set(waiting(auto.net)) == away


def test_the_walk_and_the_weights_are_those_in_memory(both: Callable[[str], tuple[Model, Model]]) -> None:
    whole, auto = both("llama")
    for one, other in zip(walk(whole, DATA, tokens_per_call=32), walk(auto, DATA, tokens_per_call=32), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.streams, other.streams, strict=True))
    units = whole.layout.units()
    found = [weight.magnitude(ModelOracle(model, DATA), units).values for model in (whole, auto)]
    assert found[0] == found[1]


def test_generation_is_that_in_memory(both: Callable[[str], tuple[Model, Model]]) -> None:
    whole, auto = both("gemma2")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    made = [model.net.generate(DATA.tokens[:2], **options) for model in (whole, auto)]
    assert torch.equal(*made)


# Changing


WAYS: dict[str, tuple[str, Callable[[Repair], Any]]] = {
    "refit": ("", lambda repair: closed.refit(repair)),
    "linear": ("", lambda repair: closed.linear(repair)),
    "scale": ("", lambda repair: scale.scale(repair)),
    "mean": ("bias", lambda repair: fill.mean(repair)),
    "lstsq": ("lowrank:4", lambda repair: fill.lstsq(repair)),
    "mse": ("lowrank:4", lambda repair: fill.mse(repair, epochs=1)),
}
# A mixture of experts has no single writer, so nothing before a cut can be scaled.
CASES = [(name, way) for name in FAMILIES for way in WAYS if (name, way) != ("mixtral", "scale")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_recovery_on_disk_is_recovery_in_memory(
    name: str, way: str, both: Callable[[str], tuple[Model, Model]]
) -> None:
    form, function = WAYS[way]
    units = ("1.mlp", "2") if name != "gpt2" else ("1.attn", "2")
    made, records = [], []
    for teacher in both(name):
        small = cut(teacher, *(units if way != "scale" else ("2",)), form=form)
        before = weights(teacher), weights(small), fingerprint(small.net)
        mine = Model(**{**vars(small), "net": clone(small.net)})
        records.append(function(repair_of(teacher, mine, DATA, rows(4, 16, seed=1))))
        assert same(weights(teacher), before[0]) and same(weights(small), before[1])
        assert fingerprint(small.net) == before[2] and not same(weights(mine), before[1])
        made.append(mine)
    assert records[0] == records[1]
    assert same(weights(made[0]), weights(made[1]), within=1e-6)
    changed = [n for n, p in made[1].net.named_parameters() if n.startswith(made[1].layout.path) and not p.is_meta]
    first = f"{made[1].layout.path}.0."
    assert all(n.startswith(first) or "bias" in n or ".up." in n or ".down." in n for n in changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_recover_and_export_are_those_in_memory(
    name: str, both: Callable[[str], tuple[Model, Model]], tmp_path: Path
) -> None:
    written, said = [], []
    for number, teacher in enumerate(both(name)):
        made = recover(cut(teacher, "2"), teacher, DATA, "refit")
        written.append(hf.write(made, tmp_path / str(number)))
        assert made.recovery is not None
        said.append(made.recovery["held_loss"])
    assert said[0] == pytest.approx(said[1], abs=1e-6)
    one, other = (
        {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}
        for folder in written
    )
    assert same(one, other, within=1e-6) and len(list(written[1].glob("*.safetensors"))) > 2
    assert (written[0] / "config.json").read_text() == (written[1] / "config.json").read_text()
    assert same(weights(load(written[0], device="cpu")), weights(load(written[1], device="cpu")), within=1e-6)
    again = on_disk(written[1], 0)
    assert same(weights(again), one_model := weights(load(written[1], device="cpu"))) and one_model


def test_a_written_model_is_proven_with_its_blocks_on_disk(
    both: Callable[[str], tuple[Model, Model]], tmp_path: Path
) -> None:
    teacher = both("llama")[1]
    small = cut(teacher, "1.mlp", "2")
    assert small.plan is not None
    expected, planned = expect_as_it_is(small), expect(teacher, small.plan)
    for one in (expected, planned):
        assert one.places is not None and one.places[f"{teacher.layout.path}.0"] == "disk"
    assert torch.equal(expected.tensors["logits"], planned.tensors["logits"])
    sound = hf.write(small, tmp_path / "sound")
    swap(small.net.get_submodule(f"{small.layout.path}.1.self_attn.o_proj"), "weight", torch.ones(32, 32))
    broken = hf.write(small, tmp_path / "broken")
    proofs = check_many({sound: planned, broken: planned})
    assert [proof for proof in proofs[sound] if not proof.passed] == []
    names = [proof.name for proof in proofs[sound]]
    assert "logits (trust_remote_code)" in names and "logits (import depthprune)" in names
    assert {proof.name for proof in proofs[broken] if not proof.passed} == {name for name in names if "logits" in name}


def test_the_commands_take_models_larger_than_memory(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtimes, "check_many", assumed)
    Path("text.txt").write_text(" ".join(f"w{number * 7 % 90}" for number in range(2000)), encoding="utf-8")
    place, model = ("--device", "cpu", "--place", f"auto:cpu={4 * 3072 + 30000}"), folders["llama"]
    hf.write(cut(on_disk(model), "2"), "cut")
    text = ("--data", "text.txt", "--sequences", "16", "--length", "16", "--out", "new")
    done = run("recover", "cut", "--teacher", model, *text, *place)
    assert done.code == 0, done.err
    assert len(list(Path("new").glob("*.safetensors"))) == 4
    shown = run("inspect", model, *place, "--json").out
    assert shown and shown == run("inspect", model, "--device", "cpu", "--json").out
    assert "unknown place 'nowhere'" in run("inspect", model, "--place", "nowhere").error


# Holding


def test_what_is_replaced_while_held_lasts_and_others_keep_theirs(folders: dict[str, Path]) -> None:
    auto = on_disk(folders["llama"])
    other = clone(auto.net)
    before = weights(auto)
    path = f"{auto.layout.path}.2"
    block, norm = auto.net.get_submodule(path), auto.net.get_submodule(f"{path}.input_layernorm")
    old: Any = norm.weight
    with hold(block):
        assert not waiting(block) and torch.equal(norm.weight, before[f"{path}.input_layernorm.weight"])
        with hold(norm):
            pass
        assert not waiting(block)
        norm.weight = nn.Parameter(torch.full((32,), 3.0))
    assert norm.weight is not old and norm.weight.is_meta and torch.equal(numbers(norm.weight), torch.full((32,), 3.0))
    swap(norm, "weight", torch.full((32,), 4.0))
    assert torch.equal(numbers(norm.weight), torch.full((32,), 4.0))
    assert same(weights(other), before) and waiting(other) == waiting(auto.net)
    everything = weights(auto)
    assert [name for name in before if not torch.equal(before[name], everything[name])] == [
        f"{path}.input_layernorm.weight"
    ]


def test_weights_go_back_whatever_happens(folders: dict[str, Path]) -> None:
    auto = on_disk(folders["gpt2"])
    away = waiting(auto.net)
    for block in blocks_of(auto.net, auto.layout):
        with pytest.raises(ZeroDivisionError), hold(block):
            raise ZeroDivisionError
        with pytest.raises(TypeError):
            block(nothing=1)
    assert waiting(auto.net) == away


def test_no_weight_is_read_again_while_it_is_held(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    auto = on_disk(folders["llama"])
    read, count = Stored.read, [0]

    def counted(self: Stored) -> Tensor:
        count[0] += 1
        return read(self)

    monkeypatch.setattr(Stored, "read", counted)
    away = len(waiting(auto.net))
    with hold(auto.net):
        auto.net(DATA.tokens)
        auto.net(DATA.tokens)
    assert count[0] == away
    auto.net(DATA.tokens)
    assert count[0] == 2 * away
    many = rows(64, 16)
    monkeypatch.setattr(pairing, "TOKENS", {"cpu": 32})
    seen = []
    for data in (many.head(8), many):
        count[0] = 0
        closed.linear(repair_of(auto, cut(auto, "2"), data, rows(4, 16, seed=1)))
        seen.append(count[0])
    assert seen[0] == seen[1]  # however many batches there are


def test_files_go_with_the_last_network_that_needs_them(folders: dict[str, Path]) -> None:
    auto = on_disk(folders["mixtral"])  # whose weights are converted as they are loaded, into a folder of ours
    norm = blocks_of(auto.net, auto.layout)[2].get_submodule("input_layernorm")
    swap(norm, "weight", torch.ones(32))
    new: Any = norm.weight
    place, experts = stored(new), [p for n, p in auto.net.named_parameters() if "experts" in n and p.is_meta]
    assert place is not None and place.folder is not None and experts
    converted = stored(experts[0])
    assert converted is not None and converted.folder is not None
    paths = [place.folder.path, converted.folder.path]
    other = clone(auto.net)
    del auto, norm, new, place, experts, converted
    gc.collect()
    assert all(path.is_dir() for path in paths) and float(weights(other)[next(iter(weights(other)))].sum())
    del other
    gc.collect()
    assert not any(path.exists() for path in paths)


# How much comes in


class Counted(bytearray):
    """Memory that is counted until nobody refers to it."""


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The most bytes of weights that wait elsewhere which were in memory at once, since the last question."""
    now, peak = [0], [0]
    read = Stored.read

    def counted(self: Stored) -> Tensor:
        tensor = read(self)
        memory = Counted(tensor.contiguous().numpy().tobytes())
        now[0] += len(memory)
        peak[0] = max(peak[0], now[0])
        weakref.finalize(memory, gone, len(memory))
        return torch.frombuffer(memory, dtype=tensor.dtype).reshape(tensor.shape)

    def gone(size: int) -> None:
        now[0] -= size

    def asked() -> int:
        gc.collect()
        found, peak[0] = peak[0], now[0]
        return found

    monkeypatch.setattr(Stored, "read", counted)
    return asked


def holds_everything(repair: Repair) -> dict[str, Any]:
    """Recover as ``linear`` does, with the whole model in memory."""
    with hold(repair.model.net):
        return closed.linear(repair)


def keeps_everything(repair: Repair) -> dict[str, Any]:
    """Recover as ``linear`` does, with a list of all weights."""
    kept = [numbers(parameter) for parameter in repair.model.net.parameters()]
    return closed.linear(repair) | {"kept": len(kept)}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_few_blocks_are_in_memory_at_once(
    name: str, folders: dict[str, Path], most: Callable[[], int], tmp_path: Path
) -> None:
    auto = on_disk(folders[name], 0)
    block = 4 * max(block.parameters for block in auto.layout.blocks)
    assert 0 < most() <= block
    small = cut(auto, "2")
    assert most() <= block
    losses(auto, DATA, [[], parse(["1"])])
    assert most() <= block
    for way in ("refit", "linear", *(("scale",) if name == "llama" else ())):
        made = recover(small, auto, DATA, way)
        assert most() <= 2 * block, way  # that of the teacher and that of the cut model
    hf.write(made, tmp_path / "made")
    assert most() <= block
    for form, way in (("bias", "mean"), ("lowrank:4", "lstsq")):
        recover(cut(auto, "1", "2", form=form), auto, DATA, way)
        assert most() <= 2 * block, way


@pytest.mark.parametrize("planted", [holds_everything, keeps_everything])
def test_a_recoverer_that_takes_all_in_is_seen(
    planted: Callable[[Repair], Any], folders: dict[str, Path], most: Callable[[], int]
) -> None:
    auto = on_disk(folders["llama"], 0)
    small = cut(auto, "2")
    most()
    recover(small, auto, DATA, planted)
    assert most() > 2 * 4 * max(block.parameters for block in auto.layout.blocks)


# Refusing


def test_places_are_read() -> None:
    assert budgets("whole") is None and budgets("auto") == {}
    assert budgets("auto:cuda=10GB,cpu=1.5GB") == {"cuda": 10**10, "cpu": 15 * 10**8}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("disk", "unknown place 'disk'"),
        ("whole:cpu=1GB", "unknown place"),
        ("auto:cpu", "'cpu' is no DEVICE=SIZE"),
        ("auto:cpu=1GB,cpu=2GB", "'cpu=2GB' is no DEVICE=SIZE"),
        ("auto:cpu=much", "'much' is no size"),
        ("auto:cpu=0GB", "must be more than nothing"),
        ("auto:mps=1GB", "computed on cpu; name cpu"),
        ("auto:cpu=1KB", "which have to fit on cpu; allow more with --place auto:cpu=SIZE"),
    ],
)
def test_places_that_are_none_are_refused(place: str, said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        load(folders["llama"], device="cpu", place=place)
    assert "\n" not in str(caught.value)


def test_what_fits_stays_in_memory(folders: dict[str, Path]) -> None:
    assert not offloaded(load(folders["llama"], device="cpu", place="auto").net)


def test_blocks_that_share_weights_are_refused() -> None:
    net = tiny("llama")
    stack = find_stack(net)
    first, second, *_ = net.get_submodule(stack).children()
    second.mlp.up_proj.weight = first.mlp.up_proj.weight  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="its blocks share weights; use --place whole"):
        offload.places(net, stack, torch.device("cpu"), {"cpu": 30_000})


def test_a_full_disk_is_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    auto = on_disk(folders["llama"])
    monkeypatch.setattr(offload, "save_file", full)
    with pytest.raises(DepthpruneError, match="no room for a changed weight"):
        swap(blocks_of(auto.net, auto.layout)[2].get_submodule("input_layernorm"), "weight", torch.ones(32))


def test_blocks_go_to_the_device_then_to_memory_then_to_disk() -> None:
    net = tiny("llama")
    stack, (block, *_) = find_stack(net), net.get_submodule(find_stack(net)).children()
    size = 4 * sum(parameter.numel() for parameter in block.parameters())
    outside = sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers())) - 4 * size
    room = {"cuda": outside + 2 * size, "cpu": size + 1}
    found = offload.places(net, stack, torch.device("cuda:1"), room)
    assert [found.pop(f"{stack}.{index}") for index in range(4)] == [1, 1, "cpu", "disk"]
    assert set(found.values()) == {1} and {"model.embed_tokens", "model.norm", "lm_head"} <= set(found)
    assert offload.places(net, stack, torch.device("cuda:1"), {"cuda": outside + 4 * size, "cpu": 1}) == {"": 1}


def test_weights_that_wait_in_memory_are_taken_over_from_accelerate() -> None:
    whole, net = tiny("llama"), tiny("llama")
    stack = find_stack(net)
    waits = OffloadedWeightsLoader(state_dict={name: t.clone() for name, t in net.state_dict().items()})
    for index in (1, 2):
        options: dict[str, Any] = {"weights_map": waits, "module_name": f"{stack}.{index}", "execution_device": "cpu"}
        attach_align_device_hook(net.get_submodule(f"{stack}.{index}"), offload=True, **options)
    offload.adopt(net, stack, torch.device("cpu"), offload.Folder())
    away = waiting(net)
    assert {name.split(".")[2] for name in away} == {"1", "2"} and len(away) == 18
    assert same(weights(net), weights(whole)) and not any(hasattr(module, "_hf_hook") for module in net.modules())
    assert torch.equal(net(DATA.tokens).logits, whole(DATA.tokens).logits) and waiting(net) == away
    lost = tiny("llama")
    lost.get_submodule(f"{stack}.1").to("meta")
    with pytest.raises(OptionError, match="was left out; use --place whole"):
        offload.adopt(lost, stack, torch.device("cpu"), offload.Folder())


def test_a_model_that_writes_to_its_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    auto = on_disk(folders["llama"])
    offload.unwritten(auto.net)
    with torch.no_grad():
        blocks_of(auto.net, auto.layout)[2].get_submodule("mlp").down_proj.weight.div_(2)  # type: ignore[union-attr, operator]
    with pytest.raises(OptionError, match=r"2\.mlp\.down_proj\.weight; use --place whole"):
        offload.unwritten(auto.net)
    sizes = {"vocab_size": 96, "hidden_size": 32, "attention_hidden_size": 32, "context_length": 128}
    config = transformers.RwkvConfig(num_hidden_layers=7, **sizes)  # it rescales every sixth block as it runs
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="RwkvForCausalLM cannot be offloaded: it writes to"):
        on_disk(tmp_path)


@pytest.mark.parametrize("how", ["full", "lora", "distill"])
def test_training_is_refused(how: str, both: Callable[[str], tuple[Model, Model]]) -> None:
    teacher = both("llama")[1]
    with pytest.raises(OptionError, match="whole model"):
        recover(cut(teacher, "2"), teacher, DATA, how)


def test_quantized_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["llama"], tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(OptionError, match="quantized"):
        load(folder, device="cpu", place="auto")
