"""What llama.cpp makes of a folder. Run as a script by the Python that has it; imports nothing of depthprune.

Reads a request (JSON) from its first argument, ``{"path": …, "prompt": […], "text": […], "dtype": …, …}``; the path is
a folder with ``model.gguf``, or a file. Prints one line,
``{"depthprune": {"version": …, "logprobs": […], "generated": […], "kv_layers": n, "kv_bytes": n, "dtype": …}}``.

Keys and values are kept in float32, and flash attention, which rounds to float16, is off. How many layers have keys is
read off the bytes that llama.cpp says it allocated for them; ``kv_bytes`` are those of keys and values for each token,
as llama.cpp allocates them by default. With ``repeats`` and ``new`` in the request there is also ``seconds_per_token``,
the least of so many texts of so many tokens. ``dtype`` is there where the file, or llama.cpp's way to compute, is
coarser than float32: float16, or quantized for less than 8 bits.
"""

import ctypes
import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

CELLS = 4096  # tokens with room in the cache: sizes are printed in hundredths of a MiB, so there have to be some
MIB = 1 << 20
ROUNDING = 0.006 * MIB
GELU = re.compile(
    r"bert|bloom|falcon|gemma|gpt2|gptj|gptneox|mpt|phi2|starcoder"
)  # ggml has it from a table of float16
HALF = ("1", "7", "32")  # file types f16, q8_0 and bf16
CACHE = re.compile(r"size = +\S+ MiB \( *(\d+) cells.*?K \(f32\): +(\S+) MiB, V \(f32\): +(\S+) MiB")


def answer(request: dict[str, Any], log: list[str]) -> dict[str, Any]:
    """Load the file, score the text, and continue the prompt greedily."""
    path = Path(request["path"])
    path = path / "model.gguf" if path.is_dir() else path
    text, prompt = request["text"], request["prompt"]
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise RuntimeError(next((line for line in reversed(log) if "error" in line), "it does not load"))
    loaded = "".join(log)
    del log[:]
    usual = begin(model, len(text) + request.get("new", 0), log, llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO)
    kept = caches(log)
    times = [decode(model, usual, prompt, request["new"]) for _ in range(request.get("repeats", 0))]
    llama_cpp.llama_free(usual)
    context = begin(model, len(text), log, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
    scores = step(model, context, text, 0, True)
    chosen = scores[np.arange(len(text) - 1), text[1:]]
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    generated: list[int] = []
    tokens, position = list(prompt), 0
    while len(generated) < len(text) - len(prompt):
        generated.append(int(step(model, context, tokens, position, False)[-1].argmax()))
        tokens, position = generated[-1:], position + len(tokens)
    kind = meta(model, "general.file_type")
    exact = kind == "0" and not GELU.search(meta(model, "general.architecture"))
    found = {
        "version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
        "logprobs": chosen.tolist(),
        "generated": generated,
        "kv_layers": layers(loaded, kept),
        "kv_bytes": round(sum((keys + values) / cells for cells, keys, values in kept)),
        "seconds_per_token": min(times, default=None),
    }
    return found if exact else found | {"dtype": "float16" if kind in ("0", *HALF) else "quantized"}


def begin(model: Any, length: int, log: list[str], flash: int) -> Any:
    """A context for a text, with or without flash attention."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = max(length, min(CELLS, llama_cpp.llama_model_n_ctx_train(model)))
    settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = 2
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = flash
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError(next((line for line in reversed(log) if "error" in line or "fail" in line), "no context"))
    return context


def step(model: Any, context: Any, tokens: list[int], position: int, every: bool) -> Any:
    """The log-probabilities after the last token, or after every one."""
    scores = logits(model, context, tokens, position, every).astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def logits(model: Any, context: Any, tokens: list[int], position: int, every: bool) -> Any:
    """The logits after the last token, or after every one."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for number, token in enumerate(tokens):
        batch.token[number], batch.pos[number] = token, position + number
        batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
        batch.logits[number] = every or number == len(tokens) - 1
    failed = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if failed:
        raise RuntimeError(f"llama_decode gives up ({failed})")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = range(len(tokens)) if every else [len(tokens) - 1]
    return np.stack([np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (size,)) for row in rows])


def decode(model: Any, context: Any, prompt: list[int], new: int) -> float:
    """The seconds for each token of a greedy text, but for the first."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    token, began = int(logits(model, context, prompt, 0, False)[-1].argmax()), time.perf_counter()
    for position in range(len(prompt), len(prompt) + new):
        token = int(logits(model, context, [token], position, False)[-1].argmax())
    return (time.perf_counter() - began) / new


def caches(log: list[str]) -> list[tuple[int, float, float]]:
    """The caches that llama.cpp says it has, one for each kind of attention: cells, bytes of keys, bytes of values."""
    lines = "".join(log).splitlines()
    return [(int(m[1]), float(m[2]) * MIB, float(m[3]) * MIB) for line in lines if (m := CACHE.search(line))]


def layers(loaded: str, kept: list[tuple[int, float, float]]) -> int | None:
    """How many layers have keys: by the heads that llama.cpp has read, which have to make up the bytes of the cache.

    None where they do not, as in families with more than one kind of layer.
    """
    said = dict(re.findall(r"print_info: +(n_layer|n_head_kv|n_embd_head_k) += (\d+|\[.*\])", loaded))
    if len(said) < 3 or not kept:
        return None
    heads, size = said["n_head_kv"], int(said["n_embd_head_k"])
    every: list[int] = json.loads(heads) if heads.startswith("[") else [int(heads)] * int(said["n_layer"])
    numbers = sum(keys / (4 * cells) for cells, keys, _ in kept)
    error = sum(ROUNDING / (4 * cells) for cells, _, _ in kept)
    smallest = min((n for n in every if n), default=0) * size
    if error >= smallest / 2 or abs(numbers - sum(every) * size) > error:
        return None
    return sum(n > 0 for n in every)


def meta(model: Any, key: str) -> str:
    """A field of the file as text, empty where there is none."""
    room = ctypes.create_string_buffer(1 << 16)
    size = llama_cpp.llama_model_meta_val_str(model, key.encode(), room, len(room))
    return room.value.decode() if size >= 0 else ""


def main() -> None:
    """Answer the request; what llama.cpp says is an answer too."""
    log: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, _: log.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, None)
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    try:
        found = answer(request, log)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps({"depthprune": found}), flush=True)


if __name__ == "__main__":
    main()
