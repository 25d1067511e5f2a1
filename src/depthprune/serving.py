"""The commands for folders that are to be served: ``check``, ``export``, ``push``, ``bridges``. Torch only when run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprune import options, registry
from depthprune.console import Console
from depthprune.errors import CheckpointError, OptionError, unknown
from depthprune.files import place
from depthprune.options import Calibration, Common, FormOption, Loading, OutOption, option
from depthprune.plan import Plan

if TYPE_CHECKING:
    from depthprune.model import Model

QUANTIZE_HELP = (
    "Fewer bits: `w4a16` (rounded), `gptq`, `awq`, `autoround` (these need --data), `w8a16`, `w8a8`, `fp8` by "
    "llm-compressor, which vLLM serves; `int8` by torchao; `nf4`, `int8-bnb` by bitsandbytes."
)
PushOption = Annotated[str | None, option("--push-to-hub", "Upload the folder to this repository of the Hub.")]
PrivateOption = Annotated[bool, option("--private", "Make the repository a private one.")]

RUNTIME_HELP = (
    "Where to run it: transformers (the default), vllm, llama.cpp, mlx, openvino; may be given several times. "
    "`vllm=PATH` names the Python that has it, as does DEPTHPRUNE_VLLM (_LLAMA, _MLX, _OPENVINO) in the environment."
)


AGAINST_HELP = "The dense model that the folder's plan.json is for, or the pruned folder that it was made from."


@options.command(options.app)
def check(
    console: Console,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a model.")],
    loading: Loading,
    common: Common,
    against: Annotated[str | None, option("--against", AGAINST_HELP)] = None,
    runtime: Annotated[list[str] | None, option("--runtime", RUNTIME_HELP)] = None,
) -> None:
    """Prove that a folder loads, runs, and means what its plan says; in the runtimes that serve it, too.

    A folder that another tool wrote is examined for what such folders get wrong: blocks that come up random, lists that
    do not follow the blocks, cache slots of blocks that are gone.
    """
    from depthprune import runtimes
    from depthprune.export import check as examine
    from depthprune.model import where

    wanted = runtime or (["transformers"] if "transformers" in runtimes.readers(folder) else ["llama.cpp"])
    others = [name for name in wanted if name != "transformers"]
    runtimes.asked_for(folder, others)
    dense = None if against is None else _opened(against, common, loading)
    proofs = (
        []
        if wanted == others
        else examine(folder, dense, device=where(common.device or "cpu"), trust_remote_code=loading.trust_remote_code)
    )
    if others:
        proofs = proofs + runtimes.prove_asked(folder, others, dense, loading.trust_remote_code)
    judged(console, proofs, f"{folder}:")


def _opened(folder: str, common: Common, loading: Loading) -> Model:
    """A model, with the plan and the recovery that lie beside it, where it is a pruned one."""
    from depthprune import recovering

    model = options.load(folder, common, loading)
    return recovering.reopen(model, Path(folder)) if (Path(folder) / "plan.json").is_file() else model


def judged(console: Console, proofs: Any, title: str) -> None:
    """Print proofs; exit with 1 unless all of them hold. ``passed`` is null where there are none."""
    passed = all(proof.passed for proof in proofs) if proofs else None
    lines = [title, *(f"  {'ok  ' if proof.passed else 'FAIL'} {proof.name}: {proof.detail}" for proof in proofs)]
    console.result({"passed": passed, "proofs": [proof.to_json() for proof in proofs]}, "\n".join(lines))
    if passed is False:
        raise typer.Exit(1)


@options.command(options.app)
def export(
    console: Console,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder with a pruned model.")],
    out: OutOption,
    loading: Loading,
    common: Common,
    calibration: Calibration,
    form: FormOption = "hf",
    quantize: Annotated[str | None, option("--quantize", QUANTIZE_HELP)] = None,
    data: Annotated[
        str | None, option("--data", "Text that gptq, awq and autoround look at: " + options.DATA_HELP)
    ] = None,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
) -> None:
    """Write a model again in another form, with its plan, and prove it where that form runs."""
    registry.find("forms", form)
    if quantize is not None:
        from depthprune.export.ways import WAYS

        if form != "hf":
            raise OptionError(f"--quantize is for --form hf, not {form}; GGUF types are --form gguf:type=q4_k_m")
        if quantize not in WAYS:
            raise unknown("way to quantize", quantize, WAYS)
        if WAYS[quantize].needs_data and data is None:
            raise OptionError(f"--quantize {quantize} looks at text: give --data FILE")
    elif data is not None:
        raise OptionError("--data is what --quantize gptq, awq and autoround look at")
    place(out, folder=True)
    if push_to_hub:
        uploads(form)
    from depthprune.export import check_many, expect_as_it_is, write
    from depthprune.runtimes import prove_written

    made = _opened(folder, common, loading)
    if quantize is None:
        write.export(made, out, form)
        proofs = prove_written(out, made, expect_as_it_is(made), console.say)
    else:
        from depthprune.export.quantize import quantize as pack

        rows = None if data is None else options.text(data, made, calibration, common)
        pack(made, out, quantize, rows)
        # Its numbers are others: those of its perplexity are to be compared.
        proofs = check_many({out: None}, device=str(made.device))[out]
    judged(console, proofs, f"written to {out}")
    if push_to_hub:
        from depthprune.export.push import push as upload

        console.say(f"uploaded to {upload(out, push_to_hub, private=private)}")


def uploads(form: str) -> None:
    """Refuse to upload what is no folder that transformers loads. Raises ``OptionError``."""
    if form.partition(":")[0] == "gguf":
        raise OptionError("--push-to-hub uploads folders that transformers loads; for a GGUF file: hf upload NAME DIR")


@options.command(options.app)
def push(
    console: Console,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A written folder, or a run folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to: `name` or `organization/name`.")],
    common: Common,
    private: PrivateOption = False,
    revision: Annotated[str | None, option("--revision", "A branch; made where there is none.")] = None,
    message: Annotated[str | None, option("--message", "The commit's message.")] = None,
) -> None:
    """Upload a folder to the Hub, with a model card that says what was cut, what it cost, and how to load it."""
    from depthprune.export.push import push as upload

    address = upload(folder, repo, private=private, revision=revision, message=message)
    console.result({"pushed": address}, f"uploaded to {address}")


@options.command(options.app)
def bridges(
    console: Console,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json of whole blocks.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that was written for it.")],
    common: Common,
    blocks: Annotated[int | None, option("--blocks", "Blocks of the dense model; default: what the plan says.")] = None,
) -> None:
    """Print what other tools are told to make the same cut, or to serve it: mergekit, llama.cpp, vLLM."""
    from depthprune.export.bridges import bridges as spell
    from depthprune.export.push import places

    asked = Plan.load(plan)
    count = blocks or asked.model.blocks
    if count is None:
        raise OptionError(f"{plan} does not say how many blocks its model has: give --blocks")
    place = places(folder)[0]
    if not (place / "config.json").is_file():  # which says whether the others can make this cut
        raise CheckpointError(f"{folder} is no model: it has no config.json")
    found = spell(asked, count, place)
    console.result(found, "\n".join(f"# {name}\n{text}" for name, text in found.items()))
