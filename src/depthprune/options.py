"""Options that several commands share, each written once. No torch.

A command takes a group of options as one argument, ``common: Common``; ``command`` unfolds the group into options of
the command line and folds them up again.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from depthprune import recipes, registry
from depthprune.budget import Budget
from depthprune.console import Console
from depthprune.errors import DepthpruneError, OptionError, unknown
from depthprune.sizes import budgets
from depthprune.sizes import size as bytes_of
from depthprune.units import UNITS, Unit

if TYPE_CHECKING:
    from depthprune.data import Data, Mixture
    from depthprune.model import Model


app = typer.Typer(
    name="depthprune",
    help="Make language models shallower: find the layers one can do without, drop them, prove that the result loads.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def option(flag: str, help: str, least: int | None = None) -> Any:
    """A command-line option with its help; a number may have a least value."""
    return typer.Option(flag, help=help, min=least)


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    seed: Annotated[int | None, option("--seed", "Seed of every random choice; default: the recipe's, or 0.")] = None
    device: Annotated[str | None, option("--device", "cpu, cuda, cuda:1; default: the GPU if there is one.")] = None
    dtype: Annotated[
        str | None,
        option("--dtype", "float32, bfloat16, float16; default: the checkpoint's on a GPU, float32 on a CPU."),
    ] = None
    quiet: Annotated[bool, option("--quiet", "Only results, warnings and errors.")] = False
    as_json: Annotated[bool, option("--json", "The result as JSON on standard output.")] = False

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise OptionError(f"--seed must be from 0 to 2**63 - 1, not {self.seed}")


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    tokenizer: Annotated[str | None, option("--tokenizer", "Another folder or Hub id to take the tokenizer from.")] = (
        None
    )
    revision: Annotated[str | None, option("--revision", "Branch, tag or commit on the Hub.")] = None
    allow_pickle: Annotated[bool, option("--allow-pickle", "Also read .bin weights, which can run code.")] = False
    trust_remote_code: Annotated[
        bool, option("--trust-remote-code", "Run the modelling code that comes with a checkpoint.")
    ] = False
    place: Annotated[
        str,
        option(
            "--place",
            "Where weights are: `whole`, all on the device; `auto`, for models larger than memory: the first blocks on "
            "the device, the next in the CPU's memory, the rest on disk, each on the device while it is used. It takes "
            "40 % of what is free unless told: `auto:cuda=10GB,cpu=20GB`. Slower; not for training.",
        ),
    ] = "whole"

    def __post_init__(self) -> None:
        budgets(self.place)


@dataclass(frozen=True)
class Calibration:
    """How calibration text is read."""

    sequences: Annotated[
        int | None,
        option("--sequences", "Sequences of text, or questions of a task; default: 64, and for recover more.", least=1),
    ] = None
    length: Annotated[int | None, option("--length", "Tokens of a calibration sequence; default: 512.", least=2)] = None
    field: Annotated[str, option("--field", "Field of JSONL and Parquet rows; `prompt+response` joins two.")] = "text"
    memory: Annotated[
        str | None, option("--memory", "Bound of the engine's streams, such as `4GB`; default: half of what is free.")
    ] = None

    def __post_init__(self) -> None:
        size(self.memory)


@dataclass(frozen=True)
class Choice:
    """What may be dropped, and how it is chosen. What is not given comes from the recipe, or is the default."""

    unit: Annotated[
        str | None,
        option("--unit", "What may go: block, attention, mlp, mixer or any (every sublayer); default: any."),
    ] = None
    metric: Annotated[
        str | None,
        option(
            "--metric",
            "How units are scored: `loss`, `cosine`, `taylor`, `shapley:of=kl`, …; `list metrics`; default: loss.",
        ),
    ] = None
    select: Annotated[
        str | None,
        option(
            "--select",
            "How units are chosen: `greedy` (lazy), `greedy:exact=true`, `lowest`, `joint`, `iterative`, `beam`, …; "
            "`list selectors`; default: greedy:per=budget for loss and its like, lowest for the rest.",
        ),
    ] = None
    protect: Annotated[
        str | None,
        option(
            "--protect",
            "Units that must stay too, as `3,1.mlp`; `ends`: the first and last block; `plus`: the first four and last "
            "two. Block 0's attention stays by default; `none` lifts that.",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        option("--recipe", "A paper's settings by name, or a TOML file; `list recipes`. Other options win over it."),
    ] = None
    stability: Annotated[
        int,
        option(
            "--stability", "Choose again on so many other draws of calibration rows; report how often each unit is.", 0
        ),
    ] = 0


def settled(choice: Choice, calibration: Calibration, common: Common) -> tuple[Choice, Calibration, Common]:
    """What was asked for, where it was not from the recipe if there is one, and else the default.

    Raises ``OptionError`` for a recipe that does not exist.
    """
    recipe = None if choice.recipe is None else recipes.load(choice.recipe)

    def given(name: str, group: Any, default: Any) -> Any:
        mine = getattr(group, name)
        theirs = getattr(recipe, name, None)
        return mine if mine is not None else theirs if theirs is not None else default

    defaults = {"unit": "any", "metric": "loss", "select": None, "protect": None}
    return (
        replace(choice, **{name: given(name, choice, default) for name, default in defaults.items()}),
        replace(
            calibration,
            sequences=given("sequences", calibration, 64),
            length=given("length", calibration, 512),
        ),
        replace(common, seed=given("seed", common, 0), dtype=given("dtype", common, None)),
    )


GROUPS = (Common, Loading, Calibration, Choice)

NO_MODEL = """no MODEL given. prune takes a model (folder or Hub id), how much to drop, text to choose by, a run folder:

    depthprune prune MODEL --drop 25% --unit any --data TEXT --out RUN

To see it work first, try the small model that comes with depthprune:

    depthprune prune --demo --out runs/demo"""
MODEL_HELP = "A folder with config.json and safetensors, or a Hub id."
DATA_HELP = (
    "Calibration text: a text, JSONL or Parquet file, a folder, `hub:NAME:CONFIG:SPLIT`, a task `task:mmlu.jsonl`, or "
    "a mixture `a.txt=0.7,task:b.jsonl=0.3`."
)
DROP_HELP = (
    "How much: `25%` of the block parameters, `8 blocks`, `12 attention`, `params<=6e9`, `kv<=50%`, `loss<=+5%`."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
DataOption = Annotated[str, option("--data", DATA_HELP)]
DropOption = Annotated[str, option("--drop", DROP_HELP)]
OutOption = Annotated[Path, option("--out", "Where to write the result.")]
FORM_HELP = (
    "The form to write: `hf`; `plain` (whole blocks only); `nemotron-nas` (vLLM, MLX-LM, …; Llama-shaped models); "
    "`gguf` (llama.cpp; `gguf:type=q4_k_m`); `zeroed` (the dense shape, saves nothing)."
)
FormOption = Annotated[str, option("--form", FORM_HELP)]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; its first argument is the console, groups of options are unfolded."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, type] = {}
        own: list[inspect.Parameter] = []
        shared: list[inspect.Parameter] = []
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            kind = hints[parameter.name]
            if kind in GROUPS:
                groups[parameter.name] = kind
                inner = get_type_hints(kind, include_extras=True)
                for field in fields(kind):
                    assert field.default is not MISSING
                    shared.append(_keyword(field.name, inner[field.name], field.default))
            else:
                own.append(_keyword(parameter.name, kind, parameter.default))
        parameters = own + shared

        @functools.wraps(function)
        def run(**given: Any) -> None:
            made = {
                argument: group(**{field.name: given.pop(field.name) for field in fields(group)})
                for argument, group in groups.items()
            }
            common: Common = made["common"]
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            console = Console(quiet=common.quiet, as_json=common.as_json)
            try:
                with console.warnings():
                    function(console, **given, **made)
            except DepthpruneError as error:
                console.note(f"error: {error}")
                raise
            finally:
                console.close()

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del run.__wrapped__
        app.command(name)(run)
        return run

    return register


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def load(model: str, common: Common, loading: Loading, dequantize: bool = True) -> Model:
    """The model that a command was given; what is only measured is not dequantized."""
    from depthprune.model import load as load_model

    return load_model(
        model,
        device=common.device,
        dtype=common.dtype,
        tokenizer=loading.tokenizer,
        revision=loading.revision,
        allow_pickle=loading.allow_pickle,
        trust_remote_code=loading.trust_remote_code,
        place=loading.place,
        dequantize=dequantize,
    )


def clipped(calibration: Calibration, choice: Choice, model: Model) -> Calibration:
    """A recipe's calibration, in rows no longer than the model's positions: papers had longer models."""
    most = model.positions
    if choice.recipe is None or most is None or (calibration.length or 512) <= most:
        return calibration
    return replace(calibration, length=most)


def text(source: str, model: Model, calibration: Calibration, common: Common) -> Data | Mixture:
    """The calibration text or task that a command was given."""
    from depthprune.data import calibrate

    return calibrate(
        source,
        model.tokenizer,
        sequences=calibration.sequences or 64,
        length=calibration.length or 512,
        seed=common.seed or 0,
        field=calibration.field,
    )


def check(choice: Choice, drop: str) -> None:
    """Refuse names that do not exist or go together, and a budget that no model could meet, before loading a model."""
    metric, *_ = registry.find("metrics", choice.metric or "loss")
    if choice.select is not None:
        selector, *_ = registry.find("selectors", choice.select)
        registry.agree(selector, metric, choice.unit or "any")
    if choice.unit is not None and choice.unit not in UNITS:
        raise unknown("unit", choice.unit, UNITS)
    Budget.parse(drop, _Vast())


class _Vast:
    """A ledger of a model larger than any, to which every budget that is one applies."""

    blocks: Sequence[object] = ()
    parameters = outside = kv_bytes_per_token = 1 << 62

    def freed(self, units: frozenset[Unit]) -> int:
        return self.parameters

    kv_freed = freed

    def viable(self, units: frozenset[Unit]) -> bool:
        return True


def size(written: str | None) -> int | None:
    """A size such as ``4GB`` in bytes. Raises ``OptionError`` for anything else."""
    return None if written is None else bytes_of(written, "--memory")
