"""The plug-in that lets vLLM serve uneven folders of any family that its Transformers backend serves.

vLLM loads it by itself, in every process, where depthprune is installed (entry point ``vllm.general_plugins``). It
registers the architecture that uneven folders name, ``DepthpruneForCausalLM``: the model is built by transformers, with
``Skip`` where something was dropped, and only the attentions that are left are given a KV cache. It also registers the
configuration of DeciLM, so that ``nemotron-nas`` folders need no ``--trust-remote-code``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def register() -> None:
    """Tell vLLM of the architecture and the configuration. Safe to call twice."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from depthprune.decilm import DeciLMConfig

    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    if "DepthpruneForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("DepthpruneForCausalLM", "depthprune.vllm_plugin:DepthpruneForCausalLM")


class _Nothing:
    """What vLLM asks of the attention of a block that has none."""

    def scale(self, module: Any) -> float:
        return 1.0

    def sinks(self, module: Any) -> None:
        return None


def __getattr__(name: str) -> Any:
    """The class that vLLM builds; made when it is asked for, as vLLM need not be installed."""
    if name != "DepthpruneForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch
    from vllm.model_executor.models import transformers as backend

    import depthprune.skip

    class DepthpruneForCausalLM(backend.TransformersForCausalLM):  # type: ignore[misc]
        """vLLM's Transformers backend, for models in which some blocks have no attention."""

        def _create_attention_instances(self, prefix: str = "") -> None:
            """Make the holders of the KV cache, and take those of blocks without attention away again."""
            blocks = range(self.text_config.num_hidden_layers)
            missing = [index for index in blocks if index not in self.attention_fusers]
            said = (getattr(self.text_config, "depthprune", None) or {}).get("no_cache", ())
            if len(missing) != len(said):  # by number they need not agree: what is left may be counted anew
                raise ValueError(f"blocks {missing} have no attention that vLLM can find; the folder says {list(said)}")
            self.empty = torch.nn.ModuleDict({str(index): depthprune.skip.Skip(0) for index in missing})
            self.attention_fusers |= {index: (f"empty.{index}", _Nothing()) for index in missing}
            context = self.compilation_config.static_forward_context
            super()._create_attention_instances(prefix)
            for name in [name for name in context if name.startswith(f"{prefix}.empty." if prefix else "empty.")]:
                del context[name]
            del self.empty
            for index in missing:
                del self.attention_fusers[index]

        def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
            """Load what has numbers: the tombstone has none."""
            return super().load_weights((name, weight) for name, weight in weights if weight.numel())  # type: ignore[no-any-return]

    globals()[name] = DepthpruneForCausalLM
    return DepthpruneForCausalLM
