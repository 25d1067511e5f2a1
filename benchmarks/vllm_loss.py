"""The mean loss of windows of text in vLLM. Run as a script by the Python that has it; imports nothing of depthprune.

python vllm_loss.py REQUEST

Reads a request (JSON), ``{"path": …, "windows": [[…], …], "dtype": …}``, and prints one line, ``{"loss": …}``: of every
token but the first of each window, which vLLM scores as a prompt.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    """Answer the request."""
    import vllm

    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    windows = request["windows"]
    llm = vllm.LLM(
        request["path"],
        dtype=request["dtype"],
        max_model_len=len(windows[0]) + 1,
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        seed=0,
    )
    scoring = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    scored = llm.generate([{"prompt_token_ids": tokens} for tokens in windows], scoring, use_tqdm=False)
    total, count = 0.0, 0
    for answer, tokens in zip(scored, windows, strict=True):
        for step, token in zip(answer.prompt_logprobs[1:], tokens[1:], strict=True):
            total, count = total - step[token].logprob, count + 1
    print(json.dumps({"loss": total / count, "tokens": count, "version": f"vllm {vllm.__version__}"}))


if __name__ == "__main__":
    main()
