"""What MLX-LM makes of a folder. Run as a script by the Python that has it; imports nothing of depthprune.

Reads a request (JSON) from its first argument, ``{"path": …, "prompt": […], "text": […], …}``, and prints one line,
``{"depthprune": {"version": …, "logprobs": […], "generated": […], "kv_layers": n}}``; with ``repeats`` and ``new`` also
``seconds_per_token``, the least of so many texts of so many tokens.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.models.cache import make_prompt_cache


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load the folder, score the text, and continue the prompt greedily."""
    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.utils.load_model(Path(request["path"]), lazy=False)
    model.set_dtype(getattr(mx, request["dtype"]))
    text, prompt = request["text"], request["prompt"]
    logits = model(mx.array([text]))[0].astype(mx.float32)
    chosen = mx.take_along_axis(logits[:-1], mx.array(text[1:])[:, None], -1)[:, 0]
    logprobs = chosen - mx.logsumexp(logits[:-1], -1)
    generated: list[int] = []
    cache, step = make_prompt_cache(model), mx.array([prompt])
    while len(generated) < len(text) - len(prompt):
        token = mx.argmax(model(step, cache=cache)[0, -1]).item()
        generated.append(token)
        step = mx.array([[token]])
    seconds = min((decode(model, prompt, request["new"]) for _ in range(request.get("repeats", 0))), default=None)
    kept = sum(getattr(layer, "keys", None) is not None for layer in cache)
    version = f"mlx-lm {importlib.metadata.version('mlx-lm')}, mlx {importlib.metadata.version('mlx')}"
    found = {"version": version, "logprobs": logprobs.tolist(), "generated": generated, "kv_layers": kept}
    return found | {"seconds_per_token": seconds}


def decode(model: Any, prompt: list[int], new: int) -> float:
    """The seconds for each token of a greedy text."""
    cache = make_prompt_cache(model)
    token = mx.argmax(model(mx.array([prompt]), cache=cache)[0, -1]).item()
    began = time.perf_counter()
    for _ in range(new):
        token = mx.argmax(model(mx.array([[token]]), cache=cache)[0, -1]).item()
    return (time.perf_counter() - began) / new


def main() -> None:
    """Answer the request; what the loader says is an answer too."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    try:
        found = answer(request)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps({"depthprune": found}), flush=True)


if __name__ == "__main__":
    main()
