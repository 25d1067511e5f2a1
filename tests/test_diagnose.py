"""Broken folders of other tools: each defect is named from the files, and nothing is said of its sound twin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import broken
from broken import cut, saved
from depthprune.errors import CheckpointError
from depthprune.export import check, export
from depthprune.export.check import check_many
from depthprune.export.contents import header, read
from depthprune.export.diagnose import diagnose, inferred
from depthprune.export.origin import origins
from depthprune.model import Model, wrap
from depthprune.plan import Plan
from depthprune.surgery import drop
from depthprune.units import parse
from families import names, tiny

S, F = "sliding_attention", "full_attention"


def smaller(model: Model, *units: str) -> Model:
    return drop(model, Plan(model.reference, parse(units)))


def lines(folder: Path, against: Model | None = None) -> list[str]:
    """The findings as a person reads them; all of them say that something is wrong."""
    found = diagnose(folder, against)
    assert not any(proof.passed for proof in found) and all("\n" not in proof.detail for proof in found)
    return [f"{proof.name}: {proof.detail}" for proof in found]


# By name: the family, the blocks kept, what a sound configuration says, what a broken one says (and how weights are
# numbered), the finding from the files alone ("" where they cannot tell), and the finding with the dense model.
COUNT2, COUNT3 = {"num_hidden_layers": 2}, {"num_hidden_layers": 3}
DEFECTS: dict[str, tuple[str, list[int], dict[str, Any], dict[str, Any], str, str]] = {
    "weights of all blocks, a lower count": (
        "llama", [0, 1, 2, 3], {}, COUNT3,
        "number of blocks: config.json counts 3 blocks and the weights have 4: 3 would be left out", "",
    ),
    "Quark: the count of before": (
        "llama", [0, 3], COUNT2, {},
        "number of blocks: config.json counts 4 blocks and the weights have 2: 2, 3 would come up random", "",
    ),
    "not renumbered": (
        "llama", [0, 3], COUNT2, {**COUNT2, "renumber": False},
        "numbers of the blocks: the weights have blocks 0, 3, not renumbered, and config.json counts 0 to 1; "
        "blocks 1 would come up random; 3 would be left out", "",
    ),
    "mergekit: layer_types of before": (
        "gemma2", [0, 1, 3], {**COUNT3, "layer_types": [S, F, F]}, COUNT3,
        "layer_types: it has 4 entries for 3 blocks", "",
    ),
    "layer_types of the first blocks": (
        "gemma2", [1, 2], {**COUNT2, "layer_types": [F, S]}, {**COUNT2, "layer_types": [S, F]},
        "", f"layer_types: block 0 is dense block 1, which was {F}; config.json says {S} (as for 1 more)",
    ),
    "layer_types left to a period": (
        "gemma2", [1, 2], {**COUNT2, "layer_types": [F, S]}, {**COUNT2, "layer_types": ...},
        "", f"layer_types: block 0 is dense block 1, which was {F}; config.json says {S} (as for 1 more)",
    ),
    "rotary positions of another block": (
        "smollm3", [1, 2], {**COUNT2, "layer_types": [F, F], "no_rope_layers": [0, 1]},
        {**COUNT2, "layer_types": [F, F], "no_rope_layers": [1, 0]},
        "", "no_rope_layers: block 0 is dense block 1, which was 0; config.json says 1 (as for 1 more)",
    ),
    "Qwen3-MoE: mlp_only_layers of before": (
        "qwen3_moe", [1, 2], {**COUNT2, "mlp_only_layers": [0]}, COUNT2,
        "mlp_only_layers: by it block 0 has experts, and the weights have none there; block 1 has no experts, and the "
        "weights have some there",
        "mlp_only_layers: block 0 is dense block 1, which has no experts; by config.json it has some (as for 1 more)",
    ),
    "Qwen3-MoE: a block that is gone": (
        "qwen3_moe", [0], {"num_hidden_layers": 1, "mlp_only_layers": []},
        {"num_hidden_layers": 1}, "mlp_only_layers: it names block 1, and the blocks are 0 to 0", "",
    ),
    "DeepSeek: first_k_dense_replace of before": (
        "deepseek_v3", [1, 2], {**COUNT2, "first_k_dense_replace": 0}, COUNT2,
        "first_k_dense_replace: by it block 0 has no experts, and the weights have some there",
        "first_k_dense_replace: block 0 is dense block 1, which has experts; by config.json it has none",
    ),
    "GLM4-MoE: first_k_dense_replace of before": (
        "glm4_moe", [2, 3], {**COUNT2, "first_k_dense_replace": 0}, COUNT2,
        "first_k_dense_replace: by it block 0 has no experts, and the weights have some there", "first_k_dense_replace",
    ),
    "Llama4: moe_layers of before": (
        "llama4_text", [1, 2],
        {**COUNT2, "moe_layers": [0], "no_rope_layers": [1, 1], "layer_types": ["chunked_attention"] * 2},
        {**COUNT2, "moe_layers": [1], "no_rope_layers": [1, 1], "layer_types": ["chunked_attention"] * 2},
        "moe_layers: by it block 1 has experts, and the weights have none there; block 0 has no experts, and the "
        "weights have some there",
        "moe_layers: block 0 is dense block 1, which has experts; by config.json it has none (as for 1 more)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """By defect: the folders of the dense model, of the sound twin and of the broken one."""
    root = tmp_path_factory.mktemp("folders")

    def make(name: str) -> tuple[Path, Path, Path]:
        family, kept, right, wrong, _, _ = DEFECTS[name]
        place = root / str(list(DEFECTS).index(name))
        if not place.exists():
            dense = saved(family, place / "dense")
            cut(dense, place / "sound", kept, **right)
            cut(dense, place / "broken", kept, **wrong)
        return place / "dense", place / "sound", place / "broken"

    return make


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_and_its_sound_twin_passes(
    name: str, folders: Callable[[str], tuple[Path, Path, Path]]
) -> None:
    family, _, _, _, alone, known = DEFECTS[name]
    _, sound, wrong = folders(name)
    dense = wrap(tiny(family), None, family)
    assert lines(sound) == [] and lines(sound, dense) == []
    assert lines(wrong) == ([alone] if alone else [])
    with_dense = lines(wrong, dense)
    assert any(line.startswith(known or alone) for line in with_dense), with_dense
    assert len({line.partition(":")[0] for line in with_dense}) == len(with_dense)


# What a reload in a fresh process says of each; "" where even that is silent and only the dense model tells.
RELOADED = {
    "weights of all blocks, a lower count": "unexpected keys",
    "Quark: the count of before": "missing keys",
    "not renumbered": "missing keys",
    "mergekit: layer_types of before": "must be equal to the number of `layer_types`",
    "layer_types of the first blocks": "",
    "layer_types left to a period": "",
    "rotary positions of another block": "",
    "Qwen3-MoE: a block that is gone": "",
}


def test_a_reload_finds_what_it_can_and_passes_every_sound_twin(
    folders: Callable[[str], tuple[Path, Path, Path]],
) -> None:
    pairs = {name: folders(name)[1:] for name in DEFECTS}
    proofs = check_many(dict.fromkeys(folder for pair in pairs.values() for folder in pair))
    for name, (sound, wrong) in pairs.items():
        assert all(proof.passed for proof in proofs[sound]), (name, proofs[sound])
        failed = " ".join(proof.detail for proof in proofs[wrong] if not proof.passed)
        wanted = RELOADED.get(name, "missing keys")
        assert (wanted in failed and failed) if wanted else not failed, (name, proofs[wrong])


def test_the_check_compares_logits_without_a_plan(folders: Callable[[str], tuple[Path, Path, Path]]) -> None:
    _, sound, wrong = folders("layer_types of the first blocks")
    dense = wrap(tiny("gemma2"), None, "gemma2")
    proofs = check(sound, dense)
    assert [proof.name for proof in proofs if "logits" in proof.name] == ["logits (plain transformers)"]
    assert all(proof.passed for proof in proofs)
    failed = [proof.name for proof in check(wrong, dense) if not proof.passed]
    assert failed == ["layer_types", "logits (plain transformers)"]


def test_a_folder_without_a_configuration_is_read_all_the_same(tmp_path: Path) -> None:
    """mergekit on Qwen3: the weights are written, then the configuration is refused."""
    dense = wrap(tiny("qwen3"), None, "qwen3")
    out = cut(saved("qwen3", tmp_path / "dense"), tmp_path / "out", [0, 3], num_hidden_layers=2, layer_types=[F, F])
    files = broken.shard(out)
    assert lines(out, dense) == [] and len(files) == 2
    (out / "config.json").unlink()
    found = check(out, dense)
    assert [(proof.name, proof.passed) for proof in found] == [("config.json", False)]
    plan = inferred(out, dense)
    assert plan is not None and [str(unit) for unit in plan.drop] == ["1", "2"]
    for file in (*files, "model.safetensors.index.json"):
        (out / file).unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check(out, dense)


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON: "),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: it holds no JSON object"),
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            "model.safetensors.index.json: it names model-00002-of-00002.safetensors, which is not there",
        ),
        (
            lambda f: broken_file(f / "model-00001-of-00002.safetensors", -100),
            "model-00001-of-00002.safetensors: it is truncated: ",
        ),
        (
            lambda f: broken_file(f / "model-00001-of-00002.safetensors", 50),
            "model-00001-of-00002.safetensors: it is truncated, or no safetensors file: 50 bytes",
        ),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").write_text("version https://git-lfs\noid sha256:0"),
            "model-00001-of-00002.safetensors: it is a Git LFS pointer",
        ),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope"),
            "model-00001-of-00002.safetensors: it is no safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weights": 1}'),
            "model.safetensors.index.json: it is damaged",
        ),
        (
            lambda f: swap(f / "model.safetensors.index.json"),
            "model.safetensors.index.json: it names 1 tensors that the files do not hold, such as lm_head.bias in ",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").rename(f / "pytorch_model.bin"),
            "weights: there is neither model.safetensors nor model.safetensors.index.json; there is model-00001",
        ),
    ],
)
def test_damaged_files_are_named(spoil: Callable[[Path], Any], finding: str, tmp_path: Path) -> None:
    out = saved("llama", tmp_path / "out")
    broken.shard(out)
    assert lines(out) == []
    spoil(out)
    assert any(line.startswith(finding) for line in lines(out)), lines(out)
    assert all("random" not in line or "index" in finding or "model-" in finding for line in lines(out))
    lines(out, wrap(tiny("llama"), None, "llama"))


def broken_file(file: Path, length: int) -> None:
    """Keep the first bytes of a file, or all but the last ones."""
    file.write_bytes(file.read_bytes()[:length])


def swap(index: Path) -> None:
    fields = json.loads(index.read_text())
    fields["weight_map"]["lm_head.bias"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(fields))


def test_foreign_weights_are_named_unless_they_were_recovered(tmp_path: Path) -> None:
    dense = wrap(tiny("llama"), None, "llama")
    out = cut(saved("llama", tmp_path / "dense"), tmp_path / "out", [0, 1, 3], num_hidden_layers=3)
    assert lines(out, dense) == []
    other = load_file(saved("llama", tmp_path / "other", seed=1) / "model.safetensors")
    broken.reweigh(out, {name: other[name] for name in other if name.startswith("model.layers.1.")})
    assert lines(out) == [] and inferred(out, dense) is None
    assert lines(out, dense) == ["weights: block 1 is none of the dense model's: random, or of another model"]
    failed = [proof.name for proof in check(out, dense) if not proof.passed]
    assert failed == ["weights"]
    (out / "recovery.json").write_text("{}")
    assert lines(out, dense) == []


def test_trained_weights_are_told_from_foreign_ones(tmp_path: Path) -> None:
    dense = wrap(tiny("llama"), None, "llama")
    out = cut(saved("llama", tmp_path / "dense"), tmp_path / "out", [0, 3], num_hidden_layers=2)
    state = load_file(out / "model.safetensors")
    mine = {name: tensor for name, tensor in state.items() if name.startswith("model.layers.1.")}
    broken.reweigh(out, {name: t + 0.1 * t.std() * torch.randn(t.shape) for name, t in mine.items()})
    (line,) = lines(out, dense)
    assert line.startswith("weights: block 1 is dense block 3, but 9 of its tensors differ, such as ")
    plan = inferred(out, dense)
    assert plan is not None and [str(unit) for unit in plan.drop] == ["1", "2"]
    broken.reweigh(out, {name: state[name] for name in mine if "mlp.down" not in name})
    (line,) = lines(out, dense)
    assert line == "weights: block 1 is dense block 3, but 1 of its tensors differ, such as mlp.down_proj.weight"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_another_type_is_no_other_weight(kind: torch.dtype, tmp_path: Path) -> None:
    dense = wrap(tiny("llama"), None, "llama")
    out = cut(saved("llama", tmp_path / "dense"), tmp_path / "out", [0, 3], num_hidden_layers=2)
    broken.reweigh(out, {name: tensor.to(kind) for name, tensor in load_file(out / "model.safetensors").items()})
    assert lines(out, dense) == []


def test_blocks_twice_or_in_another_order_are_named(tmp_path: Path) -> None:
    dense, source = wrap(tiny("llama"), None, "llama"), saved("llama", tmp_path / "dense")
    twice = cut(source, tmp_path / "twice", [0, 1, 1], num_hidden_layers=3)
    assert lines(twice, dense) == ["order of the blocks: blocks 1 and 2 both are dense block 1"]
    turned = cut(source, tmp_path / "turned", [0, 3, 2], num_hidden_layers=3)
    assert lines(turned, dense) == ["order of the blocks: blocks 1 and 2 are dense blocks 3 and dense block 2"]
    assert inferred(turned, dense) is None


def test_a_plan_that_is_not_the_folders_is_named(subject: Callable[..., Model], tmp_path: Path) -> None:
    dense = subject("llama")
    folder = export(smaller(dense, "1", "3"), tmp_path / "out")
    assert lines(folder, dense) == []
    Plan(dense.reference, parse(["1", "2"])).save(folder / "plan.json")
    assert lines(folder, dense) == ["plan.json: by it dense blocks 0, 3 are left, and the weights are 0, 2"]
    (folder / "plan.json").write_text("{}")
    assert "plan.json: " in lines(folder, dense)[0]


def test_sublayers_that_are_missing_in_silence_are_named(subject: Callable[..., Model], tmp_path: Path) -> None:
    """LLM-Drop: a folder without some attentions, which needs its own code; stock classes fill them at random."""
    dense = subject("llama")
    folder = export(smaller(dense, "2.self_attn"), tmp_path / "out")
    assert lines(folder) == [] and lines(folder, dense) == []
    assert all(proof.passed for proof in check(folder, dense))
    broken.configure(folder, depthprune=..., per_layer_config=..., auto_map=..., kv_sharing_modes=...)
    tomb = {"model.layers.2.input_layernorm.weight": torch.ones(32)}
    broken.reweigh(folder, tomb)
    found = "sublayers: block 2 (dense block 2) has no weights of self_attn, and config.json does not say so"
    assert [line for line in lines(folder, dense) if line.startswith(found)]
    failed = {proof.name: proof.detail for proof in check(folder, dense) if not proof.passed}
    assert "4 missing keys" in failed["loads with plain transformers"]


def test_stale_cache_slots_of_remote_code_are_found_by_running_it(tmp_path: Path) -> None:
    dense, source = wrap(tiny("llama"), None, "llama"), saved("llama", tmp_path / "dense")
    right = broken.remote(source, tmp_path / "right", [0, 3], [0, 1])
    wrong = broken.remote(source, tmp_path / "wrong", [0, 3], [0, 3])
    shared = broken.remote(source, tmp_path / "shared", [0, 3], [0, 0])
    assert [lines(folder, dense) for folder in (right, wrong, shared)] == [[], [], []], "files cannot tell"
    assert all(proof.passed for proof in check(right, dense, trust_remote_code=True))
    failed = [proof for proof in check(wrong, dense, trust_remote_code=True) if not proof.passed]
    assert [proof.name for proof in failed] == ["cached generation (trust_remote_code)"]
    assert failed[0].detail.startswith("IndexError")
    failed = [proof for proof in check(shared, dense, trust_remote_code=True) if not proof.passed]
    assert any(proof.name.startswith("cached") for proof in failed)


def test_code_of_a_folder_is_not_run_unless_it_is_trusted(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    folder = broken.remote(source, tmp_path / "out", [0, 3], [0, 1])
    mark = tmp_path / "ran"
    code = (folder / "modeling_shallow.py").read_text()
    (folder / "modeling_shallow.py").write_text(f"open({str(mark)!r}, 'w')\n{code}")
    check(folder)
    assert not mark.exists()
    assert all(proof.passed for proof in check(folder, trust_remote_code=True)) and mark.exists()


def test_heads_that_predict_further_tokens_are_no_blocks(tmp_path: Path) -> None:
    dense = wrap(tiny("deepseek_v3"), None, "deepseek_v3")
    out = saved("deepseek_v3", tmp_path / "out")
    state = load_file(out / "model.safetensors")
    last = {name.replace(".3.", ".4.", 1): t.clone() for name, t in state.items() if name.startswith("model.layers.3.")}
    broken.reweigh(out, last)
    assert any("4 would be left out" in line for line in lines(out))
    broken.reweigh(out, {"model.layers.4.eh_proj.weight": torch.zeros(32, 64)})
    assert lines(out) == [] and lines(out, dense) == []


def test_other_towers_and_quantized_weights_say_nothing(tmp_path: Path) -> None:
    dense = wrap(tiny("llama"), None, "llama")
    out = cut(saved("llama", tmp_path / "dense"), tmp_path / "out", [0, 3], num_hidden_layers=2)
    broken.reweigh(out, {f"vision_tower.layers.{n}.weight": torch.zeros(400, 400) for n in range(9)})
    assert lines(out, dense) == []
    state = load_file(out / "model.safetensors")
    packed = {name: torch.ones_like(t, dtype=torch.uint8) for name, t in state.items() if "proj" in name}
    broken.reweigh(out, packed)
    broken.configure(out, quantization_config={"quant_method": "bitsandbytes"})
    assert lines(out, dense) == []
    assert [origin.block for origin in origins(read(out), dense).values()] == [0, 3]


def test_a_header_says_what_lies_in_a_file(tmp_path: Path) -> None:
    out = saved("llama", tmp_path / "out")
    entries, fault = header(out / "model.safetensors")
    assert fault == "" and entries["model.norm.weight"].shape == (32,) and entries["model.norm.weight"].bytes == 128


SOME = ("llama_tied", "gpt2", "gpt_neo", "gemma3_text", "mixtral", "qwen3_moe", "llama4_text", "nemotron_h", "jamba")


def every_cut(name: str, folder: Path) -> None:
    """Write some cuts of a family and expect not one finding, and the plan back from the weights."""
    dense = wrap(tiny(name), None, name)
    inside = [f"2.{sublayer.name}" for sublayer in dense.layout.blocks[2].sublayers]
    cuts = [(), ("1",), ("0", "2"), *((unit,) for unit in inside), *((unit, "1") for unit in inside[-1:])]
    for number, units in enumerate(cuts):
        try:
            made = smaller(dense, *units)
        except Exception:  # a cut that this family does not allow, which other tests are about
            continue
        out = export(made, folder / str(number))
        assert lines(out) == [] and lines(out, dense) == [], (name, units)
        (out / "plan.json").unlink(missing_ok=True)
        plan = inferred(out, dense)
        assert plan is not None and set(plan.drop) == set(dense.layout.canonical(parse(units))), (name, units)
        shutil.rmtree(out)


@pytest.mark.parametrize("name", SOME)
def test_nothing_is_said_of_our_own_folders(name: str, tmp_path: Path) -> None:
    every_cut(name, tmp_path)


@pytest.mark.parametrize("form", ["zeroed", "nemotron-nas"])
def test_nothing_is_said_of_other_forms(form: str, subject: Callable[..., Model], tmp_path: Path) -> None:
    dense = subject("llama")
    form += f":dense={saved('llama', tmp_path / 'dense')}" if form == "zeroed" else ""
    folder = export(smaller(dense, "1.self_attn", "1.mlp", "2.self_attn", "3.mlp"), tmp_path / "out", form=form)
    assert lines(folder) == [] and lines(folder, dense) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names("decoder") if name not in SOME])
def test_nothing_is_said_of_our_own_folders_of_any_family(name: str, tmp_path: Path) -> None:
    every_cut(name, tmp_path)
