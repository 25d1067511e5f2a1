"""The ways to quantize, by name, and the libraries that do it. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """One way to quantize: the library that does it, the bits of weights and activations, and how both are chosen.

    ``grouped`` ways have a scale for each group of a row's weights, the others one for each row.
    """

    library: str
    weights: int
    activations: int = 16
    kind: str = "int"
    grouped: bool = False
    method: str = "nearest"

    @property
    def needs_data(self) -> bool:
        """Whether it looks at what the layers are given on a text."""
        return self.method != "nearest"


LLM_COMPRESSOR, TORCHAO, BITSANDBYTES = "llmcompressor", "torchao", "bitsandbytes"
WAYS = {
    "w4a16": Way(LLM_COMPRESSOR, 4, grouped=True),
    "gptq": Way(LLM_COMPRESSOR, 4, grouped=True, method="gptq"),
    "awq": Way(LLM_COMPRESSOR, 4, grouped=True, method="awq"),
    "autoround": Way(LLM_COMPRESSOR, 4, grouped=True, method="autoround"),
    "w8a16": Way(LLM_COMPRESSOR, 8),
    "w8a8": Way(LLM_COMPRESSOR, 8, 8),
    "fp8": Way(LLM_COMPRESSOR, 8, 8, "float"),
    "int8": Way(TORCHAO, 8),
    "int8-bnb": Way(BITSANDBYTES, 8, 8),
    "nf4": Way(BITSANDBYTES, 4, kind="float"),
}
NEEDS = {
    LLM_COMPRESSOR: "llm-compressor: pip install 'depthprune[quantize]'",
    TORCHAO: "torchao: pip install 'depthprune[torchao]'",
    BITSANDBYTES: "bitsandbytes: pip install 'depthprune[bitsandbytes]'",
}
