"""The configuration of DeciLM (``nemotron-nas``): a Llama in which any attention and any MLP may be missing.

This file also travels with exported models, so it imports nothing of depthprune. Runtimes read ``block_configs`` by
attribute (``block_configs[3].attention.no_op``) and JSON holds plain objects; ``Part`` is both.
"""

from typing import Any

from transformers import LlamaConfig


class Part(dict):  # type: ignore[type-arg]
    """A JSON object whose fields are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """A Llama's configuration with one entry for each block that says what it has."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.block_configs = [Part({name: Part(part) for name, part in one.items()}) for one in block_configs or ()]

    @property
    def depthprune(self) -> dict[str, Any]:
        """What is missing, as the modelling file builds it."""
        skip: dict[str, dict[str, int]] = {}
        for index, block in enumerate(self.block_configs):
            parts = {"self_attn": 2, "input_layernorm": -1} if block.attention.no_op else {}
            parts |= {"mlp": 0, "post_attention_layernorm": -1} if block.ffn.no_op else {}
            if parts:
                skip[str(index)] = parts
        no_cache = [index for index, block in enumerate(self.block_configs) if block.attention.no_op]
        return {"version": 1, "block": "LlamaDecoderLayer", "skip": skip, "no_cache": no_cache} if skip else {}
