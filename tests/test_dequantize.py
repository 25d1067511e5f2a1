"""Quantized checkpoints are read as plain weights, or refused in one line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import naive
from depthprune import dequantize
from depthprune.dequantize import plain, reading
from depthprune.errors import OptionError
from depthprune.export import hf
from depthprune.model import Model, load, wrap
from depthprune.plan import Plan
from depthprune.surgery import drop
from depthprune.units import parse

TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def told(method: Any) -> Any:
    return SimpleNamespace(quantization_config={"quant_method": method})


def test_plain_checkpoints_are_read_as_they_are() -> None:
    assert reading("here", SimpleNamespace()) == {}
    assert reading("here", SimpleNamespace(quantization_config=None)) == {}


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", None])
def test_other_forms_are_what_transformers_makes_of_them(method: str | None) -> None:
    assert reading("here", told(method)) == {}


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'depthprune\[compressed\]'$"):
        reading("here", told("compressed-tensors"))
    monkeypatch.setattr(dequantize.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dequantize.transformers, "CompressedTensorsConfig", dict)
    assert reading("here", told("compressed-tensors")) == {"quantization_config": {"dequantize": True}}


def marked(model: Model) -> Model:
    """A network with what some releases of transformers leave of a quantization: scales, a scheme, another forward."""
    for name, module in model.net.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_parameter("weight_scale", nn.Parameter(torch.ones(module.out_features, 1)))
            module.register_buffer("weight_shape", torch.tensor(module.weight.shape))
            module.quantization_scheme = module.quantization_status = "some"  # type: ignore[assignment]
            module.forward = lambda x, module=module: nn.functional.linear(x, module.weight).round()  # type: ignore[method-assign]
    model.net.is_quantized = False
    model.net.config.quantization_config = {"quant_method": "compressed-tensors"}
    return model


def test_nothing_is_left_of_the_quantization(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    want, names = naive.logits(model.net, TOKENS), list(model.net.state_dict())
    net = marked(model).net
    assert not torch.equal(naive.logits(net, TOKENS), want) and list(net.state_dict()) != names
    plain(net)
    assert torch.equal(naive.logits(net, TOKENS), want) and list(net.state_dict()) == names
    assert "quantization_config" not in vars(net.config)
    assert not any("quantization" in key for module in net.modules() for key in vars(module))


@pytest.fixture
def folder(subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that says it is quantized; reading it leaves what some releases of transformers leave."""
    path = hf.write(subject("llama"), tmp_path / "model")
    vocabulary = Tokenizer(WordLevel({f"w{n}": n for n in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    )
    real = LlamaForCausalLM.from_pretrained

    def read(source: str, **options: Any) -> Any:
        asked = options.pop("quantization_config", {})
        options["config"] = LlamaConfig.from_pretrained(source)
        del options["config"].quantization_config
        net, info = real(source, **options)
        if asked == {"dequantize": True}:
            marked(wrap(net, None, "read"))
        return net, info

    monkeypatch.setattr(dequantize.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dequantize.transformers, "CompressedTensorsConfig", dict)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    return path


def test_load_reads_plain_weights_unless_told_not_to(folder: Path, subject: Callable[..., Model]) -> None:
    model = load(folder, device="cpu")
    assert torch.equal(naive.logits(model.net, TOKENS), naive.logits(subject("llama").net, TOKENS))
    assert "quantization_config" not in vars(model.net.config)
    assert drop(model, Plan(model.reference, parse(["1"]))).net.config.num_hidden_layers == 3


def test_blocks_can_be_taken_out_of_what_was_quantized(subject: Callable[..., Model]) -> None:
    plan = parse(["1"])
    model = marked(subject("llama"))
    whole = wrap(model.net, None, "left")
    assert drop(whole, Plan(whole.reference, plan)).net.config.num_hidden_layers == 4, "shells: scales are in the way"
    plain(model.net)
    clean = wrap(model.net, None, "clean")
    assert clean.parameters == subject("llama").parameters
    assert drop(clean, Plan(clean.reference, plan)).net.config.num_hidden_layers == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["w4a16", "w8a8"])
def test_a_checkpoint_of_llm_compressor_is_read(how: str, tmp_path: Path) -> None:

    from depthprune.export.quantize import quantize
    from test_quantize import wide

    dense = wide()
    folder = quantize(dense, tmp_path / "out", how)
    vocabulary = Tokenizer(WordLevel({f"w{n}": n for n in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder)
    again = load(folder, device="cpu")
    net = again.net
    assert again.parameters == dense.parameters and net.lm_head.weight is net.model.embed_tokens.weight
    gap = naive.logits(net, TOKENS) - naive.logits(dense.net, TOKENS).float()
    assert gap.norm() < 0.3 * naive.logits(net, TOKENS).norm()
    assert drop(again, Plan(again.reference, parse(["1"]))).net.config.num_hidden_layers == 3
