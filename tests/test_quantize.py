"""Quantized folders: what is quantized, in groups of what size, what is said where it cannot be, and what lies there.

The libraries are not needed here: a fake stands in for them where a folder is written. The tests that are slow use the
real ones where they are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import naive
from depthprune.data import Data, Mixture, digest
from depthprune.errors import DataError, ExportError, OptionError
from depthprune.export import check, export
from depthprune.export.quantize import (
    LLM_COMPRESSOR,
    WAYS,
    Layers,
    awq_mappings,
    batches,
    group_size,
    linear_layers,
    pairs,
    quantize,
)
from depthprune.model import Model, load, wrap
from depthprune.plan import Plan
from depthprune.surgery import drop
from depthprune.units import parse
from tiny_text import make_tokenizer

MODULE = importlib.import_module("depthprune.export.quantize")
TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
FOUR_BITS = [name for name, way in WAYS.items() if way.grouped]


def smaller(model: Model, *units: str, stand_in: dict[str, str] | None = None) -> Model:
    return drop(model, Plan(model.reference, parse(units), stand_in=stand_in or {}))


def rows(count: int = 4, length: int = 16, padded: bool = False) -> Data:
    tokens = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    if padded:
        mask[1, length // 2 :] = False
    return Data(tokens, mask, "rows", digest(tokens, mask), 0, ())


def wide(seed: int = 0, tied: bool = True) -> Model:
    """A Llama whose widths 64 divides, in bfloat16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip
    return wrap(LlamaForCausalLM(config).eval().bfloat16(), None, "wide")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for llm-compressor: halve the weights and say so in the configuration. Returns what it was asked."""
    asked: list[dict[str, Any]] = []

    def compress(
        library: Any, net: Any, model: Any, way: Any, layers: Layers, size: int, rows: Any, mappings: Any
    ) -> None:
        asked.append({"way": way, "layers": layers, "size": size, "rows": rows, "mappings": mappings})
        with torch.no_grad():
            for name in layers.quantized:
                net.get_submodule(name).weight.mul_(0.5)
        save = net.save_pretrained

        def told(folder: Path) -> None:
            save(folder)
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = {"quant_method": "fake", "ignore": list(layers.kept)}
            (folder / "config.json").write_text(json.dumps(config))

        net.save_pretrained = told

    library = ModuleType(LLM_COMPRESSOR)
    library.__version__ = "1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, LLM_COMPRESSOR, library)
    monkeypatch.setattr(MODULE, "_library", lambda how, way: library)
    monkeypatch.setattr(MODULE, "_compress", compress)
    return asked


# What is asked for


def test_an_unknown_way_lists_the_known_ones(subject: Callable[..., Model], tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"unknown quantization 'w4a61'. Did you mean 'w4a16'\? Available: autoround, awq, "
    ):
        quantize(subject("llama"), tmp_path / "out", "w4a61")


@pytest.mark.parametrize("how", sorted(WAYS))
def test_a_missing_library_is_named_with_its_extra(
    how: str, subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = WAYS[how].library

    def gone(name: str, package: str | None = None) -> ModuleType:
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.__import__(name)

    monkeypatch.setattr(MODULE.importlib, "import_module", gone)
    extra = r"'depthprune\[\w+\]'$"
    with pytest.raises(OptionError, match=rf"^--quantize {how} needs [\w-]+: pip install {extra}"):
        quantize(subject("llama"), tmp_path / "out", how, rows())
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_does_not_go_with_the_rest_says_why(
    subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(name: str, package: str | None = None) -> ModuleType:
        raise ImportError("cannot import name 'x' from 'transformers'")

    monkeypatch.setattr(MODULE.importlib, "import_module", old)
    with pytest.raises(OptionError, match=r"cannot be imported here \(cannot import name 'x' from 'transformers'\)$"):
        quantize(subject("llama"), tmp_path / "out", "w8a8")


@pytest.mark.parametrize("how", ["gptq", "awq", "autoround"])
def test_a_way_that_looks_at_text_asks_for_it(how: str, fake: list[Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"--quantize {how} goes by .* --data$"):
        quantize(wide(), tmp_path / "out", how)
    assert list(tmp_path.iterdir()) == [] and not fake


def test_ways_that_need_no_text_are_given_none(fake: list[Any], tmp_path: Path) -> None:
    quantize(wide(), tmp_path / "out", "w4a16", rows())
    assert fake[0]["rows"] == [] and fake[0]["way"] == WAYS["w4a16"]
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["data"] is None


def test_a_quantized_model_is_not_quantized_again(fake: list[Any], tmp_path: Path) -> None:
    model = wide()
    model.net.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ExportError, match="needs weights that are not quantized yet"):
        quantize(model, tmp_path / "out", "w8a8")
    del model.net.config.quantization_config
    quantize(model, tmp_path / "out", "w8a8")


def test_weights_that_wait_elsewhere_are_refused(
    fake: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "offloaded", lambda net: True)
    with pytest.raises(ExportError, match=r"whole in memory: load it with --place whole$"):
        quantize(wide(), tmp_path / "out", "w8a8")
    assert not fake


# What is quantized


def test_the_blocks_are_quantized_and_the_rest_is_kept(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    layers = linear_layers(model.net, model.layout.path)
    assert len(layers.quantized) == 28 and layers.kept == ("lm_head",)
    assert layers.quantized["model.layers.0.mlp.down_proj"] == 48
    assert layers.quantized["model.layers.3.self_attn.q_proj"] == 32


def test_what_was_dropped_is_in_neither_list(subject: Callable[..., Model]) -> None:
    model = smaller(subject("llama"), "1.self_attn", "2")
    layers = linear_layers(model.net, model.layout.path)
    assert len(layers.quantized) == 28 - 7 - 4 and layers.kept == ("lm_head",)
    assert not any(name.startswith("model.layers.1.self_attn") for name in layers.quantized)


def test_stand_ins_are_kept(subject: Callable[..., Model]) -> None:
    model = smaller(subject("llama"), "1.self_attn", stand_in={"1.self_attn": "lowrank:4"})
    layers = linear_layers(model.net, model.layout.path)
    assert set(layers.kept) == {"lm_head", "model.layers.1.self_attn.down", "model.layers.1.self_attn.up"}
    plain = linear_layers(nn.ModuleDict({"b": nn.ModuleDict({"down": nn.Linear(4, 4, bias=False)})}), "b")
    assert plain == Layers({"b.down": 4}, ()), "a layer of that name that is no stand-in is quantized"


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_weights_outside_of_linear_layers_are_a_reason_to_refuse(family: str, subject: Callable[..., Model]) -> None:
    model = subject(family)
    with pytest.raises(ExportError, match=r"^only \d+% of the blocks' parameters are in linear layers"):
        linear_layers(model.net, model.layout.path)
    if family == "mixtral":
        assert len(linear_layers(model.net, model.layout.path, least=0.0).quantized) == 16


# Groups


@pytest.mark.parametrize(
    ("widths", "size"), [((4096, 14336), 128), ((320, 896), 64), ((192, 512), 64), ((96, 256), 32), ((128,), 128)]
)
def test_the_group_is_the_largest_that_divides_every_width(widths: tuple[int, ...], size: int) -> None:
    layers = Layers({f"layer {width}": width for width in widths}, ())
    for how in FOUR_BITS:
        assert group_size(how, WAYS[how], layers) == size


def test_widths_that_no_group_divides_are_named(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    layers = linear_layers(model.net, model.layout.path)
    wrong = r"^groups of 32 do not divide model.layers.0.mlp.down_proj, which reads 48 numbers; w8a16 and w8a8 need no"
    with pytest.raises(OptionError, match=wrong):
        group_size("w4a16", WAYS["w4a16"], layers)
    assert group_size("w8a8", WAYS["w8a8"], layers) == 0


@pytest.mark.parametrize("asked", [128, 48, -64])
def test_a_group_that_does_not_fit_is_refused(asked: int) -> None:
    layers = Layers({"a": 320, "b": 896}, ())
    with pytest.raises(OptionError, match=rf"^groups of {asked} do not divide a, .* fitting sizes: 64, 32$"):
        group_size("gptq", WAYS["gptq"], layers, asked)
    assert group_size("gptq", WAYS["gptq"], layers, 32) == 32


def test_ways_by_row_take_no_group() -> None:
    with pytest.raises(OptionError, match="w8a8 has one scale for each row of weights and takes no group"):
        group_size("w8a8", WAYS["w8a8"], Layers({"a": 64}, ()), 64)


# Calibration


def test_packed_rows_run_together_and_padding_never_does(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    together = batches(rows(5), model, 2)
    assert [tuple(batch["input_ids"].shape) for batch in together] == [(2, 16), (2, 16), (1, 16)]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in together]), rows(5).tokens)
    alone = batches(rows(3, padded=True), model, 2)
    assert [tuple(batch["input_ids"].shape) for batch in alone] == [(1, 16), (1, 8), (1, 16)]
    both = batches(Mixture((rows(2), rows(1, 8)), (0.5, 0.5), "both"), model)
    assert [tuple(batch["input_ids"].shape) for batch in both] == [(2, 16), (1, 8)]


def test_tokens_of_another_model_are_refused(subject: Callable[..., Model]) -> None:
    data = rows()
    data.tokens[0, 0] = 96
    with pytest.raises(DataError, match="id 96 but the model has 96 embeddings"):
        batches(data, subject("llama"))


# Which layers can take over a scale

LLAMA = [
    ("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
    ("re:.*v_proj$", ["re:.*o_proj$"]),
    ("re:.*post_attention_layernorm$", ["re:.*gate_proj$", "re:.*up_proj$"]),
    ("re:.*up_proj$", ["re:.*down_proj$"]),
]


def found(model: Model, index: int) -> dict[str, list[str]]:
    layers, prefix = linear_layers(model.net, model.layout.path), f"model.layers.{index}"
    block = model.net.get_submodule(prefix)
    short = {before: after for before, after in pairs(prefix, block, LLAMA, layers)}
    return {name.rpartition(".")[2]: [one.rpartition(".")[2] for one in after] for name, after in short.items()}


def test_pairs_are_those_of_the_sublayers_that_are_left(subject: Callable[..., Model]) -> None:
    attention = {"input_layernorm": ["q_proj", "k_proj", "v_proj"], "v_proj": ["o_proj"]}
    mlp = {"post_attention_layernorm": ["gate_proj", "up_proj"], "up_proj": ["down_proj"]}
    model = smaller(subject("llama"), "1.self_attn", "2.mlp")
    assert found(model, 0) == attention | mlp
    assert found(model, 1) == mlp and found(model, 2) == attention


def test_a_tombstone_is_no_layer_that_reads_a_norm(subject: Callable[..., Model]) -> None:
    """The tensor that is kept empty may bear a layer's name; a pattern over the whole model would take it for one."""
    model = smaller(subject("llama"), "1.self_attn")
    spec = model.net.config.depthprune["tombstone"]
    names = [name for name, _ in model.net.named_modules()]
    assert f"model.layers.{spec.removesuffix('.weight')}" in names
    assert not any("layernorm" in name and "post" not in name for name in found(model, 1))


def test_a_norm_that_a_stand_in_may_read_keeps_its_scale(subject: Callable[..., Model]) -> None:
    model = smaller(subject("llama"), "1.self_attn", stand_in={"1.self_attn": "lowrank:4"})
    assert found(model, 1) == {"up_proj": ["down_proj"]}
    assert "post_attention_layernorm" in found(smaller(subject("llama"), "1.self_attn"), 1)


def test_awq_refuses_families_that_it_would_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide()
    one = SimpleNamespace(smooth_layer=LLAMA[3][0], balance_layers=LLAMA[3][1])
    known = SimpleNamespace(AWQ_MAPPING_REGISTRY={"LlamaForCausalLM": [one]})
    dynamic = SimpleNamespace(AWQ_DYNAMIC_MAPPING_REGISTRY={}, get_layer_mappings_from_model=lambda net: [one])
    modules = {"mappings": known, "dynamic_mappings": dynamic}
    monkeypatch.setattr(MODULE.importlib, "import_module", lambda name: modules[name.rpartition(".")[2]])
    layers = linear_layers(model.net, model.layout.path)
    mappings = awq_mappings(model.net, model, layers)
    assert mappings[3] == ("model.layers.3.mlp.up_proj", ["model.layers.3.mlp.down_proj"]) and len(mappings) == 4
    known.AWQ_MAPPING_REGISTRY.clear()
    with pytest.raises(OptionError, match="awq does not know LlamaForCausalLM; --quantize gptq"):
        awq_mappings(model.net, model, layers)


# What lies in the folder


@pytest.mark.parametrize("units", [("1", "3"), ("1.self_attn", "2.mlp")])
def test_the_folder_is_that_of_form_hf_with_other_weights(
    units: tuple[str, ...], fake: list[Any], tmp_path: Path
) -> None:
    model = smaller(wide(), *units)
    want = export(model, tmp_path / "plain")
    have = quantize(model, tmp_path / "out", "w4a16")
    names = {file.name for file in want.iterdir()}
    assert {file.name for file in have.iterdir()} == names | {"quantization.json"}
    assert ("modeling_depthprune.py" in names) == (units != ("1", "3"))
    for name in names - {"config.json", "model.safetensors"}:
        assert (have / name).read_bytes() == (want / name).read_bytes()
    config = json.loads((have / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "fake", "ignore": ["lm_head"]}
    assert config == json.loads((want / "config.json").read_text())
    before, after = (load_file(folder / "model.safetensors") for folder in (want, have))
    assert before.keys() == after.keys() and "lm_head.weight" not in after, "tied weights stay tied"
    halved = {name for name in after if not torch.equal(before[name], after[name])}
    assert halved == {f"{name}.weight" for name in fake[0]["layers"].quantized}
    assert {file.stat().st_mode for file in have.iterdir()} == {(want / "config.json").stat().st_mode}


def test_the_model_stays_as_it_is(fake: list[Any], tmp_path: Path) -> None:
    model = smaller(wide(), "1.self_attn")
    before, logits = dict(vars(model.net.config)), naive.logits(model.net, TOKENS)
    quantize(model, tmp_path / "out", "w4a16")
    assert torch.equal(naive.logits(model.net, TOKENS), logits)
    assert vars(model.net.config).keys() == before.keys()


def test_the_record_says_how(fake: list[Any], tmp_path: Path) -> None:
    folder = quantize(smaller(wide(), "1"), tmp_path / "out", "gptq", rows())
    record = json.loads((folder / "quantization.json").read_text())
    assert record["how"] == "gptq" and record["weights"] == "int4" and record["group"] == 64
    assert record["layers"] == 21 and record["kept"] == ["lm_head"] and 0 < record["logit_error"] < 2
    assert record["data"]["digest"] == rows().digest and set(record["made_by"]) >= {LLM_COMPRESSOR, "torch"}
    assert [tuple(batch["input_ids"].shape) for batch in fake[0]["rows"]] == [(4, 16)]


def test_the_error_is_that_of_the_folder_read_again(
    fake: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may save something else than what it computes with, as bitsandbytes does on a CPU after a forward."""
    honest, compress = quantize(wide(), tmp_path / "honest", "w4a16"), MODULE._compress

    def spoils(library: Any, net: Any, *rest: Any) -> None:
        compress(library, net, *rest)
        save = net.save_pretrained

        def other(folder: Path) -> None:
            with torch.no_grad():
                net.model.norm.weight.neg_()
            save(folder)

        net.save_pretrained = other

    monkeypatch.setattr(MODULE, "_compress", spoils)
    spoiled = quantize(wide(), tmp_path / "spoiled", "w4a16")
    errors = [json.loads((folder / "quantization.json").read_text())["logit_error"] for folder in (honest, spoiled)]
    assert errors[0] < 1 < errors[1]


def test_predictions_that_are_no_numbers_are_not_written(
    fake: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_error", lambda model, net: math.nan)
    with pytest.raises(ExportError, match="whose predictions are no numbers"):
        quantize(wide(), tmp_path / "out", "w4a16")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(fake: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        print("half done")
        raise RuntimeError("broken")

    monkeypatch.setattr(MODULE, "_compress", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        quantize(wide(), tmp_path / "out", "w4a16")
    assert list(tmp_path.iterdir()) == []


def test_the_libraries_are_silent_and_errors_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with MODULE.silence():
        print("a bar")
        print("a log line", file=sys.stderr)
        warnings.warn("a warning", stacklevel=1)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="what fails"), MODULE.silence():
        raise ValueError("what fails")
    print("after")
    assert capsys.readouterr().out == "after\n"


@pytest.mark.parametrize("accelerator", [False, True])
def test_memory_is_pinned_only_where_there_is_an_accelerator(
    accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cache:
        def pin_memory(self, batch: int) -> None:
            raise RuntimeError("Cannot access accelerator device when none is available.")

    original = Cache.pin_memory
    monkeypatch.setattr(MODULE.importlib, "import_module", lambda name: SimpleNamespace(IntermediatesCache=Cache))
    monkeypatch.setattr(MODULE.torch.accelerator, "is_available", lambda: accelerator)
    with MODULE._pinned():
        if accelerator:
            with pytest.raises(RuntimeError):
                Cache().pin_memory(0)
        else:
            Cache().pin_memory(0)
    assert Cache.pin_memory is original


def test_what_a_library_says_when_it_is_imported_is_no_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MODULE.importlib, "import_module", lambda name: print("a log line") or ModuleType(name))
    MODULE._library("w8a8", WAYS["w8a8"])
    assert capsys.readouterr().out == ""


# With the libraries


def needs(how: str) -> Any:
    missing = importlib.util.find_spec(WAYS[how].library) is None
    return pytest.param(how, marks=[pytest.mark.slow, pytest.mark.skipif(missing, reason=f"{how} has no library here")])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("units", [("1", "3"), ("1.self_attn", "2.mlp")])
@pytest.mark.parametrize("how", [needs(how) for how in WAYS])
def test_a_quantized_folder_loads_and_means_what_it_should(how: str, units: tuple[str, ...], tmp_path: Path) -> None:
    model = smaller(wide(), *units)
    before = naive.logits(model.net, TOKENS)
    folder = quantize(model, tmp_path / "out", how, rows(8, 32))
    assert torch.equal(naive.logits(model.net, TOKENS), before)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if WAYS[how].library == LLM_COMPRESSOR:
        assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
        assert config["config_groups"]["group_0"]["weights"]["group_size"] == (64 if WAYS[how].grouped else None)
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state and state["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert sum(t.numel() * t.element_size() for t in state.values()) < 0.75 * model.bytes
    record = json.loads((folder / "quantization.json").read_text())
    assert record["logit_error"] < 0.5
    proofs = check(folder)
    assert {proof.name.partition(" ")[0] for proof in proofs} == {"loads", "cached"}
    assert all(proof.passed for proof in proofs), proofs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [needs("w4a16")])
def test_a_stock_loader_fails_loudly_on_an_uneven_folder(how: str, tmp_path: Path) -> None:
    folder = quantize(smaller(wide(), "1.self_attn"), tmp_path / "out", how)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("depthprune", "per_layer_config", "auto_map"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"missing|mismatch|another shape|incomplete"):
        load(folder, device="cpu")
