"""Recovery by low-rank adapters: trained beside frozen weights, and added to them at the end."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from depthprune.errors import OptionError
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.recover.loop import language
from depthprune.recover.repair import Repair
from depthprune.recover.settings import Settings, settled, takes
from depthprune.recover.train import train
from depthprune.skip import is_skip

# BlockPruner, appendix H (8,000 Alpaca rows); Shortened LLaMA, lora_retrain.py with its scripts' overrides (two passes
# of Alpaca, 100 warm-up steps of about 1,560); Gromov et al., appendix (5,000 steps with 100 of warm-up; alpha = rank;
# 64 is the rank of most of its models, 2 that of Llama-2-7B; it trains over 4-bit weights, this does not).
# What they do not say of Adam and the schedule is the default of the Trainer that they use.
presets: dict[str, dict[str, Any]] = {
    "blockpruner": {
        "rank": 32, "alpha": 10, "dropout": 0.0, "targets": "all",
        "rate": 2e-4, "schedule": "linear", "batch": 4, "warmup": 0.0, "beta2": 0.999,
    },
    "shortened-llama": {
        "rank": 8, "alpha": 16, "dropout": 0.05, "targets": "all",
        "rate": 1e-4, "schedule": "linear", "batch": 64, "warmup": 0.064, "beta2": 0.999,
    },
    "gromov": {
        "rank": 64, "alpha": 64, "dropout": 0.05, "targets": "mlp",
        "rate": 3e-4, "schedule": "cosine", "batch": 16, "warmup": 0.02, "beta2": 0.999,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lora(Settings):
    """What ``lora`` takes besides."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str = "all"
    preset: str = ""


@takes(Lora)
def lora(repair: Repair, **options: Any) -> dict[str, Any]:
    """Train a low-rank update of the blocks' matrices to predict the next token, and add it to them.

    A matrix W becomes ``W + (alpha / rank) B A`` with B zero at the start; ``dropout`` acts on what enters A.
    ``targets`` are ``all`` linear layers of the blocks, those of every ``attention`` or ``mlp``, or layers by name,
    joined by plus signs (``gate_proj+up_proj``). ``preset`` is blockpruner, shortened-llama or gromov: the settings of
    that paper (but for the number of tokens), of which those that you set win. The rate is 2e-4 unless set. The other
    options are those of ``Settings``. Experts that are kept as one tensor have no linear layers and stay as they are.
    Raises ``OptionError`` where peft is missing, or where no layer has such a name.
    """
    settings = settled(Lora, presets, options)
    if settings.rank < 1 or settings.alpha <= 0 or not 0 <= settings.dropout < 1:
        raise OptionError("lora needs a rank of at least 1, an alpha above 0, and a dropout from 0 to below 1")
    settings = dataclasses.replace(settings, rate=settings.rate or 2e-4)
    try:
        import peft
    except ImportError:
        raise OptionError("lora needs peft: pip install 'depthprune[lora]'") from None
    layers = linear_layers(repair.model, settings.targets)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=layers, bias="none"
    )

    def adapt(net: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that store their matrix the other way round: peft copes
            try:
                peft.inject_adapter_in_model(config, net)
            except ValueError as error:
                raise OptionError(f"lora cannot adapt this model ({' '.join(str(error).split())})") from None
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @torch.no_grad()
    def merge(net: nn.Module) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        for path in layers:
            layer = net.get_submodule(path)
            update = layer.get_delta_weight("default")  # type: ignore[operator]
            merged[f"{path}.weight"] = layer.get_base_layer().weight.float() + update.float()  # type: ignore[operator]
        return merged

    return train(repair, language, settings, (), adapt=adapt, merge=merge)


def linear_layers(model: Model, targets: str) -> list[str]:
    """The paths of the blocks' linear layers that ``targets`` means; stand-ins are left out.

    Raises ``OptionError`` where there is none of that name.
    """
    wanted, found = set(targets.split("+")), []
    names: set[str] = set()
    for block, known in zip(blocks_of(model.net, model.layout), model.layout.blocks, strict=True):
        kinds = {member: sublayer.kind for sublayer in known.sublayers for member in sublayer.members}
        start = model.layout.path + f".{known.index}"
        skipped = [path for path, module in block.named_modules() if is_skip(module)]
        for path, module in block.named_modules():
            inside = any(path == skip or path.startswith(f"{skip}.") for skip in skipped)
            if inside or not isinstance(module, (nn.Linear, Conv1D)):
                continue
            kind = next((kind for member, kind in kinds.items() if f"{path}.".startswith(f"{member}.")), "")
            names.add(path.rpartition(".")[2])
            if wanted & {"all", kind, path.rpartition(".")[2]}:
                found.append(f"{start}.{path}")
    missing = sorted(wanted - names - {"all", "attention", "mlp"})
    if missing or not found:
        have = ", ".join(sorted(names)) or "none"
        what = f"no linear layer {missing[0]!r}" if missing else f"no linear layer for targets={targets}"
        raise OptionError(f"{what} in the blocks of this model; they have: {have} (or all, attention, mlp)")
    return found
