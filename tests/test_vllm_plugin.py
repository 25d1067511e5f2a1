"""The plug-in for vLLM, on a stand-in of the parts of vLLM that it builds on; ``test_serving.py`` runs the real one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from depthprune import vllm_plugin
from depthprune.decilm import DeciLMConfig


class Backend(nn.Module):
    """What the Transformers backend of vLLM 0.32 does: a holder of KV cache for every block, or an error."""

    def __init__(self, attentions: Iterable[int], blocks: int, no_cache: list[int]) -> None:
        super().__init__()
        self.text_config = SimpleNamespace(num_hidden_layers=blocks, depthprune={"no_cache": no_cache})
        self.compilation_config = SimpleNamespace(static_forward_context={})
        self.blocks = nn.ModuleDict({str(index): nn.Module() for index in attentions})
        asked = SimpleNamespace(scale=lambda module: 0.5, sinks=lambda module: None)
        self.attention_fusers: dict[int, Any] = {index: (f"blocks.{index}", asked) for index in attentions}
        self._create_attention_instances()

    def _create_attention_instances(self, prefix: str = "") -> None:
        for index in range(self.text_config.num_hidden_layers):
            if index not in self.attention_fusers:
                raise ValueError(f"Layer {index} does not dispatch through the Transformers attention interface")
            path, asked = self.attention_fusers[index]
            module = self.get_submodule(path)
            assert isinstance(asked.scale(module), float) and asked.sinks(module) is None
            module.attn = nn.Identity()
            self.compilation_config.static_forward_context[f"{prefix}{path}.attn"] = module.attn

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return {name for name, _ in weights}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    found: dict[str, str] = {}
    registry = SimpleNamespace(
        get_supported_archs=lambda: {"LlamaForCausalLM", *found}, register_model=found.__setitem__
    )
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models")}
    modules["vllm"].ModelRegistry = registry  # type: ignore[attr-defined]
    backend = ModuleType("vllm.model_executor.models.transformers")
    backend.TransformersForCausalLM = Backend  # type: ignore[attr-defined]
    modules["vllm.model_executor.models"].transformers = backend  # type: ignore[attr-defined]
    for name, module in (modules | {backend.__name__: backend}).items():
        monkeypatch.setitem(sys.modules, name, module)
    yield found
    vars(vllm_plugin).pop("DepthpruneForCausalLM", None)


def test_it_registers_the_architecture_and_the_configuration(registered: dict[str, str]) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    assert registered == {"DepthpruneForCausalLM": "depthprune.vllm_plugin:DepthpruneForCausalLM"}
    assert isinstance(transformers.AutoConfig.for_model("nemotron-nas"), DeciLMConfig)


@pytest.mark.parametrize("missing", [[], [0], [1, 3]])
def test_only_attentions_that_are_left_hold_a_cache(registered: dict[str, str], missing: list[int]) -> None:
    left = [index for index in range(4) if index not in missing]
    made = vllm_plugin.DepthpruneForCausalLM(left, 4, missing)
    assert list(made.compilation_config.static_forward_context) == [f"blocks.{index}.attn" for index in left]
    assert sorted(made.attention_fusers) == left and not hasattr(made, "empty")


def test_attentions_may_be_counted_anew(registered: dict[str, str]) -> None:
    """The folder names blocks; where what is left is numbered without gaps, vLLM misses the last ones."""
    made = vllm_plugin.DepthpruneForCausalLM([0, 1, 2], 4, [1])
    assert list(made.compilation_config.static_forward_context) == [f"blocks.{index}.attn" for index in range(3)]


def test_the_backend_alone_refuses_and_the_plug_in_refuses_what_the_folder_does_not_say(
    registered: dict[str, str],
) -> None:
    """The twins: without the plug-in an attention that is missing is an error, and with it one that should be there."""
    with pytest.raises(ValueError, match="Layer 1 does not dispatch"):
        Backend([0, 2], 3, [1])
    with pytest.raises(ValueError, match=r"blocks \[1\] have no attention that vLLM can find; the folder says \[\]"):
        vllm_plugin.DepthpruneForCausalLM([0, 2], 3, [])


def test_the_tombstone_is_not_loaded(registered: dict[str, str]) -> None:
    made = vllm_plugin.DepthpruneForCausalLM([0], 1, [])
    weights = {"model.layers.1.input_layernorm.weight": torch.empty(0), "model.norm.weight": torch.ones(4)}
    assert made.load_weights(weights.items()) == {"model.norm.weight"}


def test_without_vllm_there_is_nothing_of_it() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = vllm_plugin.Other  # type: ignore[attr-defined]
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        _ = vllm_plugin.DepthpruneForCausalLM
