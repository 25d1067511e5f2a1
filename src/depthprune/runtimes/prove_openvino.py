"""What OpenVINO makes of a folder, through optimum-intel. Run as a script by the Python that has both; imports nothing
of depthprune.

Reads a request (JSON) from its first argument, ``{"path": …, "prompt": […], "text": […], …}``, and prints one line,
``{"depthprune": {"version": …, "logprobs": […], "generated": […], "kv_layers": n}}``; with ``repeats`` and ``new`` also
``seconds_per_token``, the least of so many texts of so many tokens. Computes in float32, weights, keys and values too.
"""

import importlib.metadata
import json
import re
import sys
import time
from typing import Any

import torch
from optimum.intel import OVModelForCausalLM

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Convert the folder, score the text, and continue the prompt greedily."""
    model = OVModelForCausalLM.from_pretrained(
        request["path"],
        export=True,
        load_in_8bit=False,
        trust_remote_code=request["trust_remote_code"],
        ov_config=EXACT,
    )
    text, prompt = torch.tensor([request["text"]]), torch.tensor([request["prompt"]])
    scores = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, :-1].float().log_softmax(-1)
    generated = generate(model, prompt, text.shape[1] - prompt.shape[1])[0, prompt.shape[1] :]
    names = [variable.info.variable_id for variable in model.model.get_variables()]
    kept = {found[1] for name in names if (found := re.match(r"past_key_values\.(\d+)\.", name))}
    version = f"openvino {importlib.metadata.version('openvino')}, optimum-intel"
    times = [decode(model, prompt, request["new"]) for _ in range(request.get("repeats", 0))]
    return {
        "version": f"{version} {importlib.metadata.version('optimum-intel')}",
        "logprobs": scores.gather(-1, text[0, 1:, None])[:, 0].tolist(),
        "generated": generated.tolist(),
        "kv_layers": len(kept),
        "seconds_per_token": min(times, default=None),
    }


def generate(model: Any, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy tokens after a prompt, whatever the model's own settings are."""
    lengths = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    made: torch.Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths)
    return made


def decode(model: Any, prompt: torch.Tensor, new: int) -> float:
    """The seconds for each token of a greedy text, but for the first."""
    marks = []
    for length in (1, new + 1):
        began = time.perf_counter()
        generate(model, prompt, length)
        marks.append(time.perf_counter() - began)
    return (marks[1] - marks[0]) / new


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
