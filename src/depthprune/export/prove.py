"""The proof that a folder loads and runs, made in a fresh process. Run as a script; imports nothing of depthprune.

Reads a request (JSON) from its first argument and prints one JSON line per folder. Each item of the request:

    {"path": …, "auto": "AutoModelForCausalLM", "route": "plain", "device": …, "dtype": …, "probe": …, "places": null}

Route ``plain`` loads with stock transformers alone, ``remote`` with ``trust_remote_code=True``, ``aware`` after
``import depthprune``. ``places`` is a device map for models larger than memory. ``probe`` is a safetensors file with
``tokens`` (B, T) and, if there is a reference, ``logits``; for models with sliding windows also a ``long`` text (1, T)
and the ``late_logits`` at its end.
"""

import contextlib
import importlib
import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

NEW = 12  # generated tokens
LATE = 24  # positions compared at the end of a long text


@torch.no_grad()
def late_logits(net: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits (B, 24, V) of the last positions of a text that is longer than the sliding windows."""
    keep = {"logits_to_keep": LATE} if "logits_to_keep" in inspect.signature(net.forward).parameters else {}
    return net(tokens, use_cache=False, **keep).logits[:, -LATE:].float().cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def generation_gap(net: Any, tokens: torch.Tensor) -> float | None:
    """How far the logits of cached greedy generation are from those of a full forward over the same tokens.

    None for models that do not generate. Source of the check: positions are silently wrong when the cache counts them
    by a layer that never writes.
    """
    if not net.can_generate():
        return None
    prompt = tokens[:, : tokens.shape[1] // 2]
    out = net.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    cached = torch.stack(out.logits, 1)
    full = net(out.sequences, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
    return float((cached.float() - full.float()).abs().max())


@torch.no_grad()
def stepping_gap(net: Any, tokens: torch.Tensor) -> float | None:
    """The same for a loop that feeds token by token and the cache, and leaves the positions to the model.

    ``generate`` passes positions along, so it cannot see a cache that counts them wrong. None without such a cache.
    """
    if not net.can_generate():
        return None
    start = tokens.shape[1] // 2
    out = net(tokens[:, :start], use_cache=True)
    if getattr(out, "past_key_values", None) is None:
        return None
    logits = [out.logits]
    for position in range(start, tokens.shape[1]):
        out = net(tokens[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    full = net(tokens, use_cache=False).logits
    return float((torch.cat(logits, 1).float() - full.float()).abs().max())


@torch.no_grad()
def examine(item: dict[str, Any]) -> dict[str, Any]:
    """Load one folder as its route says and measure it."""
    if item["route"] == "aware":
        importlib.import_module("depthprune")
    options: dict[str, Any] = {"trust_remote_code": item["route"] == "remote"}
    if item["places"]:
        scratch = str(Path(item["probe"]).with_suffix(".offload"))  # in the folder of the request, which goes
        places = {name: place if place == "disk" else item["device"] for name, place in item["places"].items()}
        options |= {"device_map": places, "offload_folder": scratch}
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, info = getattr(transformers, item["auto"]).from_pretrained(
            item["path"], dtype=getattr(torch, item["dtype"]), output_loading_info=True, **options
        )
    net = net.eval() if item["places"] else net.eval().to(item["device"])
    result: dict[str, Any] = {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    item["found"] = {**result, "stage": "a forward"}  # what is known should the rest fail
    probe = load_file(item["probe"])
    tokens = probe["tokens"].to(item["device"])
    logits = net(tokens, use_cache=False).logits
    result["parameters"] = sum(parameter.numel() for parameter in net.parameters())
    result["scale"] = logits.float().abs().max().item()
    if "logits" in probe:
        result["gap"] = (logits.float().cpu() - probe["logits"].float()).abs().max().item()
    if "long" in probe:
        late = late_logits(net, probe["long"].to(item["device"]))
        late_gap = (late - probe["late_logits"]).abs().max().item()
        result["gap"] = torch.tensor([result["gap"], late_gap]).max().item()  # NaN, if either is
    item["found"]["stage"] = "cached generation"
    result["generation_gap"] = generation_gap(net, tokens)
    result["stepping_gap"] = stepping_gap(net, tokens)
    return result


def main() -> None:
    """Examine every folder of the request; a folder that cannot be loaded is an answer too."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    for item in request:
        try:
            try:
                result = examine(item)
            except torch.OutOfMemoryError:  # the process that asks holds the dense model; a CPU is slow but has room
                result = examine({**item, "device": "cpu"})
        except Exception as error:  # whatever the loader says is the finding
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            result = {**item.get("found", {}), "error": text}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
