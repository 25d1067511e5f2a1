"""What vLLM makes of a folder. Run as a script by the Python that has it; imports nothing of depthprune.

Reads a request (JSON) from its first argument, ``{"path": …, "prompt": […], "text": […], "dtype": …, …}``, and prints
one line, ``{"depthprune": {"version": …, "logprobs": […], "generated": […], "kv_layers": n}}``; with ``repeats`` and
``new`` also ``seconds_per_token``, the least of so many texts of so many tokens.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load the folder, score the text, and continue the prompt greedily."""
    import torch
    import vllm

    text, prompt = request["text"], request["prompt"]
    if torch.cuda.is_available():  # the process that asks may hold models there, too
        free, total = torch.cuda.mem_get_info()
        request.setdefault("options", {}).setdefault("gpu_memory_utilization", round(0.9 * free / total, 3))
    llm = vllm.LLM(
        request["path"],
        dtype=request["dtype"],
        max_model_len=max(len(text) + 1, len(prompt) + request.get("new", 0) + 2),
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=request["trust_remote_code"],  # for DeciLM's configuration file
        seed=0,
        **request.get("options", {}),
    )
    scoring = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    [scored] = llm.generate([{"prompt_token_ids": text}], scoring, use_tqdm=False)
    logprobs = [step[token].logprob for step, token in zip(scored.prompt_logprobs[1:], text[1:], strict=True)]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=len(text) - len(prompt), detokenize=False, ignore_eos=True)
    [continued] = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    [spec] = llm.collective_rpc("get_kv_cache_spec")
    generated = list(continued.outputs[0].token_ids)
    version = f"vllm {vllm.__version__}"
    seconds = min((decode(llm, prompt, request["new"]) for _ in range(request.get("repeats", 0))), default=None)
    found = {"version": version, "logprobs": logprobs, "generated": generated, "kv_layers": len(spec)}
    return found | {"seconds_per_token": seconds}


def decode(llm: Any, prompt: list[int], new: int) -> float:
    """The seconds for each token of a greedy text, but for the first."""
    import vllm

    marks = []
    for length in (1, new + 1):
        greedy = vllm.SamplingParams(temperature=0, max_tokens=length, detokenize=False, ignore_eos=True)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
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
