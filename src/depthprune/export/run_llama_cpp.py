"""What writing GGUF files asks of llama.cpp. Run as a script by the Python that has it; imports nothing of depthprune.

Reads a request (JSON) from its first argument and prints one line, ``{"depthprune": {…}}``:

    {"do": "quantize", "source": …, "target": …, "type": "q4_k_m"}
    {"do": "tokens", "path": …, "texts": […], "rules": ["gpt-2", …]}   answered by {"rules": {"gpt-2": [[…], …]}}
"""

import ctypes
import json
import sys
from typing import Any

import llama_cpp

STRING = 3  # the tag of a text among the fields that can be overridden


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize a file."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['type'].upper()}")
    options.allow_requantize = True  # for stubs, which are zeros in any type
    failed = llama_cpp.llama_model_quantize(
        request["source"].encode(), request["target"].encode(), ctypes.byref(options)
    )
    return {"error": f"it gives up ({failed})"} if failed else {}


def tokens(request: dict[str, Any]) -> dict[str, Any]:
    """The tokens of all texts under each rule that llama.cpp knows, as a model is given them."""
    found = {}
    for rule in request["rules"]:
        override = (llama_cpp.llama_model_kv_override * 2)()  # ends in an empty one
        override[0].tag, override[0].key = STRING, b"tokenizer.ggml.pre"
        override[0].value.val_str = rule.encode()
        options = llama_cpp.llama_model_default_params()
        options.vocab_only, options.kv_overrides = True, override
        model = llama_cpp.llama_model_load_from_file(request["path"].encode(), options)
        if model:
            vocabulary = llama_cpp.llama_model_get_vocab(model)
            found[rule] = [tokenize(vocabulary, text) for text in request["texts"]]
            llama_cpp.llama_model_free(model)
    return {"rules": found} if found else {"error": "it does not load the file"}


def tokenize(vocabulary: Any, text: str) -> list[int]:
    """The tokens of a text, with those that the file says come first or last."""
    data = text.encode()
    room = len(data) + 16
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, room, True, False)
    return list(ids[:count])


def main() -> None:
    """Answer the request; what goes wrong is an answer too."""
    lines: list[str] = []
    log = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(log, None)
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    try:
        answer = {"quantize": quantize, "tokens": tokens}[request["do"]](request)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    if "error" in answer and (said := [line.strip() for line in lines if "fail" in line or "error" in line]):
        answer["error"] = said[-1][:300]
    print(json.dumps({"depthprune": answer}), flush=True)


if __name__ == "__main__":
    main()
