"""Tiny random models of many families: the subjects of every test that must hold for "any model".

A fresh model makes proofs pass by accident: its norm weights are all one, its biases all zero, its blocks change the
stream by next to nothing. So every vector is made random here, the matrices are scaled up, and what is left of the
family's own initialisation is only what must keep a sign or a range (the decay rates of state-space layers).
"""

from __future__ import annotations

import inspect
import math
import re
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from packaging import version
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

FamilyKind = Literal["decoder", "encoder", "encoder-decoder"]

MAX_PARAMETERS = 250_000
WINDOW = 8

# Sizes that most configurations spell the same way; a family gets those that its configuration declares.
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

S, F, L, M, A = "sliding_attention", "full_attention", "linear_attention", "mamba", "attention"
# Mixture-of-experts sizes, as the Qwen, the Mixtral and the DeepSeek lines spell them.
QWEN_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTRAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
DEEPSEEK_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
MAMBA: dict[str, Any] = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2: dict[str, Any] = MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}
GPT2_SIZES: dict[str, Any] = {"n_positions": 128, "n_embd": 32, "n_layer": 4, "n_head": 4}
BART_SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5_SIZES: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
}


@dataclass(frozen=True)
class Family:
    """How to build one family: its class and configuration by their names in transformers, and the sizes it needs.

    ``hybrid`` promises that the blocks are of more than one kind. ``gain`` scales the matrices: 1.25 makes each block
    of a pre-norm stream matter; post-norm streams forget their tokens at that gain, and get less.
    """

    kind: FamilyKind
    network: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    hybrid: bool = False
    gain: float = 1.25


def _decoder(
    stem: str,
    network: str | None = None,
    config: str | None = None,
    *,
    hybrid: bool = False,
    gain: float = 1.25,
    **options: Any,
) -> Family:
    return Family("decoder", network or f"{stem}ForCausalLM", config or f"{stem}Config", options, hybrid, gain)


def _encoder(stem: str, *, hybrid: bool = False, gain: float = 0.5, **options: Any) -> Family:
    return Family("encoder", f"{stem}ForMaskedLM", f"{stem}Config", options, hybrid, gain)


def _pair(stem: str, network: str | None = None, *, gain: float = 1.25, **options: Any) -> Family:
    network = network or f"{stem}ForConditionalGeneration"
    return Family("encoder-decoder", network, f"{stem}Config", options, gain=gain)


# fmt: off
FAMILIES: dict[str, Family] = {
    # Llama and its close relatives.
    "llama": _decoder("Llama"),
    "llama_tied": _decoder("Llama", tie_word_embeddings=True),
    "llama_bias": _decoder("Llama", attention_bias=True, mlp_bias=True),
    "mistral": _decoder("Mistral", sliding_window=WINDOW),
    "ministral": _decoder("Ministral", hybrid=True, sliding_window=WINDOW, layer_types=[S, F, S, F]),
    "qwen2": _decoder("Qwen2"),
    "qwen2_sliding": _decoder(
        "Qwen2", hybrid=True, use_sliding_window=True, sliding_window=WINDOW, layer_types=[F, S, F, S]
    ),
    "qwen3": _decoder("Qwen3"),
    "qwen3_sliding": _decoder(
        "Qwen3", hybrid=True, use_sliding_window=True, sliding_window=WINDOW, layer_types=[S, S, F, F]
    ),
    "smollm3": _decoder("SmolLM3", hybrid=True, no_rope_layers=[1, 0, 1, 0]),
    "granite": _decoder(
        "Granite", embedding_multiplier=2.0, logits_scaling=0.5, residual_multiplier=0.8, attention_multiplier=0.4
    ),
    "arcee": _decoder("Arcee"),
    "helium": _decoder("Helium"),
    "ernie4_5": _decoder("Ernie4_5", use_bias=True),
    "hunyuan_v1_dense": _decoder("HunYuanDenseV1"),
    "seed_oss": _decoder("SeedOss", attention_out_bias=True),
    "apertus": _decoder("Apertus", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "exaone4": _decoder("Exaone4", hybrid=True, sliding_window=WINDOW, layer_types=[S, S, S, F]),
    "cwm": _decoder("Cwm", hybrid=True, sliding_window=WINDOW, layer_types=[F, S, S, S]),
    "jais2": _decoder("Jais2"),
    "nanochat": _decoder("NanoChat"),
    "nemotron": _decoder("Nemotron"),
    "diffllama": _decoder("DiffLlama"),
    "phi3": _decoder("Phi3", sliding_window=WINDOW, original_max_position_embeddings=128),
    "starcoder2": _decoder("Starcoder2", sliding_window=WINDOW),
    "stablelm": _decoder("StableLm", use_qkv_bias=True),
    "stablelm_parallel": _decoder("StableLm", use_parallel_residual=True, qk_layernorm=True),
    "minicpm3": _decoder("MiniCPM3", **LATENT, dim_model_base=16, scale_emb=2),
    # Norms in other places: sandwich, post-norm, parallel.
    "gemma": _decoder("Gemma"),
    "gemma2": _decoder("Gemma2", hybrid=True, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3_text": _decoder(
        "Gemma3", config="Gemma3TextConfig", hybrid=True,
        sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=[S, S, F, S],
    ),
    "gemma3n_text": _decoder(
        "Gemma3n", config="Gemma3nTextConfig", hybrid=True, num_hidden_layers=6, intermediate_size=[48] * 6,
        sliding_window=WINDOW, layer_types=[S, S, F, S, S, F], num_kv_shared_layers=2, vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8, laurel_rank=8, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    ),
    "gemma4_text": _decoder(
        "Gemma4", config="Gemma4TextConfig", hybrid=True, sliding_window=WINDOW, layer_types=[S, F, S, F],
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, global_head_dim=16,
    ),
    "vaultgemma": _decoder("VaultGemma", hybrid=True, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "glm": _decoder("Glm"),
    "glm4": _decoder("Glm4"),
    "olmo": _decoder("Olmo", clip_qkv=4.0),
    "olmo2": _decoder("Olmo2"),
    "olmo3": _decoder("Olmo3", hybrid=True, sliding_window=WINDOW, layer_types=[S, S, S, F]),
    "cohere": _decoder("Cohere", use_qk_norm=True, logit_scale=0.5),
    "cohere2": _decoder("Cohere2", hybrid=True, sliding_window=WINDOW, layer_types=[S, S, S, F], logit_scale=0.5),
    "phi": _decoder("Phi"),
    "persimmon": _decoder("Persimmon"),
    # The older lines, with learned or ALiBi positions.
    "openai_gpt": _decoder("OpenAIGPT", "OpenAIGPTLMHeadModel", **GPT2_SIZES),
    "gpt2": _decoder("GPT2", "GPT2LMHeadModel", **GPT2_SIZES),
    "gpt_bigcode": _decoder("GPTBigCode", **GPT2_SIZES),
    "gpt_neo": _decoder(
        "GPTNeo", hybrid=True, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=WINDOW,
    ),
    "gpt_neox": _decoder("GPTNeoX"),
    "gpt_neox_sequential": _decoder("GPTNeoX", use_parallel_residual=False),
    "gptj": _decoder("GPTJ", **GPT2_SIZES, rotary_dim=4),
    "codegen": _decoder("CodeGen", **GPT2_SIZES, n_ctx=128, rotary_dim=4),
    "opt": _decoder("OPT", ffn_dim=48),
    "opt_postnorm": _decoder("OPT", ffn_dim=48, do_layer_norm_before=False, word_embed_proj_dim=16),
    "bloom": _decoder("Bloom", n_layer=4, n_head=4),
    "falcon": _decoder("Falcon", ffn_hidden_size=48),
    "falcon_new": _decoder("Falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=48),
    "falcon_alibi": _decoder(
        "Falcon", alibi=True, bias=True, multi_query=False, parallel_attn=False, ffn_hidden_size=48
    ),
    "mpt": _decoder("Mpt", d_model=32, n_heads=4, n_layers=4, max_seq_len=128, use_cache=True),
    "biogpt": _decoder("BioGpt"),
    "xglm": _decoder("XGLM", d_model=32, num_layers=4, attention_heads=4, ffn_dim=48),
    "modernbert_decoder": _decoder("ModernBertDecoder", hybrid=True, local_attention=WINDOW, layer_types=[F, S, S, F]),
    # Mixtures of experts.
    "mixtral": _decoder("Mixtral", **MIXTRAL_EXPERTS),
    "qwen2_moe": _decoder("Qwen2Moe", **QWEN_EXPERTS, shared_expert_intermediate_size=24),
    "qwen3_moe": _decoder("Qwen3Moe", hybrid=True, **QWEN_EXPERTS, mlp_only_layers=[1]),
    "olmoe": _decoder("Olmoe", num_experts=4, num_experts_per_tok=2, intermediate_size=24),
    "flex_olmo": _decoder("FlexOlmo", num_experts=4, num_experts_per_tok=2, intermediate_size=24),
    "phimoe": _decoder("Phimoe", **MIXTRAL_EXPERTS, attention_bias=True, lm_head_bias=True),
    "granitemoe": _decoder("GraniteMoe", **MIXTRAL_EXPERTS, attention_multiplier=0.4),
    "granitemoeshared": _decoder(
        "GraniteMoeShared", **MIXTRAL_EXPERTS, attention_multiplier=0.4, shared_intermediate_size=24
    ),
    "dbrx": _decoder(
        "Dbrx", d_model=32, n_heads=4, n_layers=4, max_seq_len=128,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek_v2": _decoder("DeepseekV2", hybrid=True, **LATENT, **DEEPSEEK_EXPERTS, head_dim=4),
    "deepseek_v3": _decoder("DeepseekV3", hybrid=True, **LATENT, **DEEPSEEK_EXPERTS),
    "dots1": _decoder("Dots1", hybrid=True, **DEEPSEEK_EXPERTS, sliding_window=WINDOW, layer_types=[F, S, F, S]),
    "glm4_moe": _decoder("Glm4Moe", hybrid=True, **DEEPSEEK_EXPERTS, use_qk_norm=True),
    "gpt_oss": _decoder("GptOss", hybrid=True, **MIXTRAL_EXPERTS, sliding_window=WINDOW, layer_types=[S, F, S, F]),
    "llama4_text": _decoder(
        "Llama4", config="Llama4TextConfig", hybrid=True, num_local_experts=4, intermediate_size=24,
        intermediate_size_mlp=48, moe_layers=[1, 3], no_rope_layers=[1, 1, 1, 0], attention_chunk_size=WINDOW,
    ),
    "jetmoe": _decoder("JetMoe", kv_channels=8, num_local_experts=4, intermediate_size=24),
    "doge": _decoder("Doge", keep_window_size=128),
    # State-space, recurrent and linear-attention mixers, alone or mixed with attention.
    "mamba": _decoder("Mamba", gain=1.0, state_size=4, time_step_rank=4),
    "mamba2": _decoder("Mamba2", state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "falcon_mamba": _decoder("FalconMamba", state_size=4, time_step_rank=4),
    "rwkv": _decoder("Rwkv", attention_hidden_size=32, context_length=128),
    "jamba": _decoder(
        "Jamba", hybrid=True, **MAMBA, mamba_dt_rank=4, num_experts=4, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
    ),
    "bamba": _decoder("Bamba", hybrid=True, **MAMBA2, attn_layer_indices=[1, 3]),
    "granitemoehybrid": _decoder(
        "GraniteMoeHybrid", hybrid=True, **MAMBA2, **MIXTRAL_EXPERTS, shared_intermediate_size=24,
        attention_multiplier=0.4, layer_types=[M, A, M, A],
    ),
    "falcon_h1": _decoder(
        "FalconH1", **MAMBA2, mamba_d_ssm=64, mamba_rms_norm=True, ssm_multipliers=[1.1, 0.9, 1.2, 0.8, 1.0],
        mlp_multipliers=[1.1, 0.9],
    ),
    "nemotron_h": _decoder(
        "NemotronH", hybrid=True, layers_block_type=["mamba", "mlp", "attention", "mamba", "moe", "attention"],
        ssm_state_size=4, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, chunk_size=8, n_routed_experts=4,
        moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, use_mamba_kernels=False,
    ),
    "zamba": _decoder(
        "Zamba", hybrid=True, gain=1.0, **MAMBA, mamba_dt_rank=4, num_key_value_heads=4, use_mamba_kernels=False,
        layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"], num_hidden_layers=6,
    ),
    "zamba2": _decoder(
        "Zamba2", hybrid=True, **MAMBA, mamba_ngroups=1, n_mamba_heads=8, chunk_size=8, num_key_value_heads=4,
        layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"], num_hidden_layers=6,
        use_mamba_kernels=False, adapter_rank=8, num_mem_blocks=1,
    ),
    "recurrent_gemma": _decoder(
        "RecurrentGemma", hybrid=True, num_hidden_layers=6, lru_width=32, attention_window_size=WINDOW,
    ),
    "lfm2": _decoder(
        "Lfm2", hybrid=True, block_auto_adjust_ff_dim=False, layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "lfm2_moe": _decoder(
        "Lfm2Moe", hybrid=True, **QWEN_EXPERTS, num_dense_layers=1,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "minimax": _decoder("MiniMax", hybrid=True, **MIXTRAL_EXPERTS, layer_types=[L, F, L, F], block_size=8),
    "qwen3_next": _decoder(
        "Qwen3Next", hybrid=True, **LINEAR, **QWEN_EXPERTS, shared_expert_intermediate_size=16,
        layer_types=[L, L, F, L],
    ),
    "qwen3_5_text": _decoder(
        "Qwen3_5", config="Qwen3_5TextConfig", hybrid=True, **LINEAR, layer_types=[L, L, F, L]
    ),
    "olmo_hybrid": _decoder("OlmoHybrid", hybrid=True, **LINEAR, layer_types=[L, L, F, L]),
    # Encoders.
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "electra": _encoder("Electra", embedding_size=16),
    "distilbert": _encoder("DistilBert", dim=32, hidden_dim=48, n_layers=4, n_heads=4),
    "modernbert": _encoder(
        "ModernBert", hybrid=True, gain=1.25, local_attention=WINDOW, layer_types=[F, S, S, F],
        cls_token_id=1, sep_token_id=2,
    ),
    "deberta_v2": _encoder(
        "DebertaV2", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
    # Encoder-decoders.
    "t5": _pair("T5", **T5_SIZES, decoder_start_token_id=0),
    "t5_gated": _pair(
        "T5", **T5_SIZES, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "umt5": _pair("UMT5", **T5_SIZES, decoder_start_token_id=0),
    "bart": _pair("Bart", gain=0.5, **BART_SIZES),
    "mbart": _pair("MBart", **BART_SIZES),
    "pegasus": _pair("Pegasus", **BART_SIZES),
    "marian": _pair("Marian", "MarianMTModel", gain=0.5, **BART_SIZES),
    "blenderbot": _pair("Blenderbot", **BART_SIZES),
}
# fmt: on

# What transformers itself gets wrong: a bound on the |cached - full| logit of the intact model, as `cache_gap` measures
# it. Infinite: there is no cache to compare with. Every other family stays below EXACT: chunked scans round differently
# from single steps, up to 3e-4 here, while one wrong cache slot moves logits by about one.
EXACT = 5e-4
CACHE_GAP: dict[str, float] = {
    "nemotron_h": 5e-2,  # its time step has a floor when it reads many tokens, and none when it reads one
    "zamba2": 5e-1,  # as nemotron_h
    "rwkv": math.inf,  # a single step mixes up the rows of a batch; right for one row
    "openai_gpt": math.inf,  # no cache at all
}
# Wrong in transformers 5.17, right in 5.23.
CACHE_GAP_BEFORE_5_23: dict[str, float] = {
    "doge": 10.0,
    "umt5": 10.0,
    "falcon_h1": math.inf,  # mixes up the rows of a batch; right for one row
}
if version.parse(transformers.__version__) < version.parse("5.23"):
    CACHE_GAP |= CACHE_GAP_BEFORE_5_23
# Takes a cache without handing it back; the rest of its state lies in its modules.
KEEPS_CACHE = {"recurrent_gemma"}
# Without position ids, a cached step takes itself for the first token: always hand them over, as `generate` does.
NEEDS_POSITIONS = {"bamba", "minimax"}


def names(kind: FamilyKind | None = None) -> list[str]:
    """The families that the installed transformers has, optionally of one kind, in the order of the table."""
    return [
        name
        for name, family in FAMILIES.items()
        if kind in (None, family.kind) and all(hasattr(transformers, part) for part in (family.network, family.config))
    ]


def tiny(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a tiny random model of a family: float32, on the CPU, in evaluation mode; same seed, same weights."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, family.network)(configuration(family))
    shake(model, seed, family.gain)
    model.float()
    model.eval()
    return model


def configuration(family: Family) -> transformers.PretrainedConfig:
    """The family's configuration: the common sizes that it declares, its own options, no dropout and no jitter."""
    build = getattr(transformers, family.config)
    declared = inspect.signature(build.__init__).parameters
    noise = {key: 0.0 for key, parameter in declared.items() if _is_noise(key, parameter.default)}
    common = {key: value for key, value in COMMON.items() if key in declared or key in build.attribute_map}
    named_otherwise = {key for key in common if build.attribute_map.get(key) in family.options}
    common = {key: value for key, value in common.items() if key not in named_otherwise}
    config: transformers.PretrainedConfig = build(**(noise | common | family.options))
    return config


def _is_noise(key: str, default: object) -> bool:
    return re.search(r"drop|jitter", key) is not None and isinstance(default, float)


# Parameters that must keep a sign or a range: the decay rates, time steps and mixing weights of recurrent layers.
_DELICATE = re.compile(
    r"(^|[._])(A_log|A|dt_bias|dt_proj_?\.?bias|recurrent_param|time_decay|time_first|time_mix\w*|alpha_[pn]|lambda_\w+)$"
)


def shake(model: nn.Module, seed: int, gain: float = 1.25) -> None:
    """Make every weight of a fresh model matter, in place.

    Vectors get norm weights in 1 ± 0.5 (0 ± 0.5 where the family stores them minus one) and biases of standard
    deviation 0.3; matrices are drawn anew at gain/sqrt(fan); delicate ones move by 0.1. Frozen parameters (computed
    position tables, which families do not save) stay. Each weight has its own generator: its value depends on its name.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.6 if id(parameter) in embeddings else gain * _fan(parameter) ** -0.5
            if parameter.requires_grad:
                parameter.copy_(_shaken(name, parameter, scale, _generator(name, seed)))
        for name, buffer in _saved_vectors(model):
            buffer.copy_(_nudged(buffer, _generator(name, seed)))


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _fan(matrix: Tensor) -> float:
    """The geometric mean of inputs and outputs: families disagree on which comes first."""
    return float((matrix.shape[-1] * matrix.shape[-2]) ** 0.5) if matrix.ndim >= 2 else 1.0


def _shaken(name: str, fresh: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    normal = torch.randn(fresh.shape, generator=generator)
    if _DELICATE.search(name):
        return fresh + 0.1 * normal
    if name.endswith("bias"):
        return 0.3 * normal
    if bool((fresh == 1).all()) or (fresh.ndim == 1 and name.endswith("weight")):
        return fresh + torch.rand(fresh.shape, generator=generator) - 0.5
    if fresh.ndim >= 2:
        return scale * normal
    return fresh + 0.3 * normal


def _saved_vectors(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    return [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name in saved and buffer.ndim == 1 and buffer.is_floating_point()
    ]


def _nudged(buffer: Tensor, generator: torch.Generator) -> Tensor:
    factor = 0.8 + 0.4 * torch.rand(buffer.shape, generator=generator)
    return buffer * factor + (buffer == 0) * (factor - 1) / 2


def example(model: PreTrainedModel, *, batch: int = 2, tokens: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens as the keyword arguments of a forward: no special tokens; longer than every sliding window."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(3, COMMON["vocab_size"], (2, batch, tokens), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": draw[0], "decoder_input_ids": draw[1]}
    return {"input_ids": draw[0]}


@torch.no_grad()
def cache_gap(
    model: PreTrainedModel, *, batch: int = 2, tokens: int = 16, prefill: int = 8, positions: bool = True, seed: int = 0
) -> float:
    """The largest |cached - full| logit: one forward, against a prefill and then token after token with the cache.

    Position ids are handed over where the model takes them, as ``generate`` does.
    Infinite where the model has no cache, or none that works for this batch.
    """
    inputs = example(model, batch=batch, tokens=tokens, seed=seed)
    accepted = inspect.signature(model.forward).parameters
    slots = [slot for slot in ("cache_params", "past_key_values", "state") if slot in accepted]
    if not slots:
        return math.inf
    stepped = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    rows = {stepped: inputs.pop(stepped)}
    if positions and "position_ids" in accepted:
        rows["position_ids"] = torch.arange(tokens).expand(batch, -1)
    full = model(**inputs, **rows, use_cache=False).logits
    # Some take a cache but do not return it.
    given = {slots[0]: DynamicCache(config=model.config)} if model.config.model_type in KEEPS_CACHE else {}
    gap = 0.0
    for start, end in [(0, prefill), *((index, index + 1) for index in range(prefill, tokens))]:
        piece = {key: value[:, start:end] for key, value in rows.items()}
        answer = model(**inputs, **piece, **given, use_cache=True)
        if answer.logits.shape != full[:, start:end].shape:
            return math.inf
        gap = max(gap, float((answer.logits - full[:, start:end]).abs().max()))
        given = given if slots[0] not in answer else {slots[0]: answer[slots[0]]}
    return gap
