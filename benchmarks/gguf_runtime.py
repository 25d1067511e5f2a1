"""The part of gguf_files.py that llama.cpp runs: losses and times of several files. Imports nothing of depthprune.

Reads a request (JSON) from its first argument and prints one line. ``{"do": "loss", "file": path, "windows": [[…], …],
"threads": n}`` is answered by the mean loss of a file, ``{"do": "speed", "files": {name: path}, "rounds": n,
"tokens": n, "threads": n, "gpu_layers": n}`` by the seconds of each round of each, by the clock and of the processor's.
"""

import json
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

PROMPT = 16


def load(path: str, length: int, threads: int, gpu_layers: int = 0) -> tuple[Any, Any]:
    """A model, and a context with llama.cpp's own choices."""
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = gpu_layers
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = threads or os.cpu_count() or 1
    return model, llama_cpp.llama_init_from_model(model, settings)


def decode(context: Any, tokens: list[int], position: int, every: bool) -> None:
    """Run tokens; logits after the last, or after every one."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for number, token in enumerate(tokens):
        batch.token[number], batch.pos[number] = token, position + number
        batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
        batch.logits[number] = every or number == len(tokens) - 1
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)


def clear(context: Any) -> None:
    """Forget all tokens."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)


def loss(path: str, windows: list[list[int]], threads: int) -> float:
    """The mean loss of every token but the first of each window."""
    model, context = load(path, len(windows[0]), threads)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    total, count = 0.0, 0
    for window in windows:
        clear(context)
        decode(context, window, 0, True)
        flat = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(window), size))
        logits = flat[:-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        norm = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        total += float((norm - logits[np.arange(len(window) - 1), window[1:]]).sum())
        count += len(window) - 1
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return total / count


def speed(
    files: dict[str, str], rounds: int, tokens: int, threads: int, gpu_layers: int
) -> dict[str, list[tuple[float, float]]]:
    """What each file takes to decode some tokens after a prompt, all files in turn, round by round."""
    contexts = {name: load(path, PROMPT + tokens, threads, gpu_layers)[1] for name, path in files.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for number in range(rounds + 1):
        for name, context in contexts.items():
            clear(context)
            decode(context, list(range(5, 5 + PROMPT)), 0, False)
            began, worked = time.perf_counter(), time.process_time()
            for position in range(PROMPT, PROMPT + tokens):
                decode(context, [position], position, False)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began, time.process_time() - worked))
    return seconds


def main() -> None:
    """Answer the request."""
    quiet = llama_cpp.llama_log_callback(lambda level, text, _: None)
    llama_cpp.llama_log_set(quiet, None)
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    if request["do"] == "loss":
        print(json.dumps({"loss": loss(request["file"], request["windows"], request["threads"])}))
    else:
        del request["do"]
        print(json.dumps(speed(**request)))


if __name__ == "__main__":
    main()
