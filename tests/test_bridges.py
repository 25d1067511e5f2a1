"""The same cut by other tools: what is written for them, how they count, and what they cannot do.

The tools themselves are asked where they are: ``DEPTHPRUNE_MERGEKIT`` and ``DEPTHPRUNE_LLAMA`` name Pythons that have
mergekit, and llama-cpp-python with gguf.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from broken import saved
from command import run
from depthprune.errors import ExportError, PlanError
from depthprune.export import export
from depthprune.export.bridges import bridges, by_block, kept, passthrough
from depthprune.export.diagnose import diagnose
from depthprune.model import Model, wrap
from depthprune.plan import Plan, Reference
from depthprune.surgery import drop
from depthprune.units import parse
from families import tiny
from tiny_text import make_tokenizer


def plan(*units: str, id: str = "org/dense-8b", **fields: object) -> Plan:
    return Plan(Reference(id, blocks=6), parse(units), **fields)  # type: ignore[arg-type]


def test_every_tool_gets_its_text(tmp_path: Path) -> None:
    made = bridges(plan("3", "1"), 6, tmp_path / "my model")
    assert list(made) == ["mergekit", "llama-quantize", "vllm", "llama-server"]
    assert made["mergekit"].splitlines()[1:] == [
        "merge_method: passthrough",
        "slices:",
        "  - sources:",
        '      - model: {model: {"path": "org/dense-8b"}}',
        "        layer_range: [0, 1]",
        "  - sources:",
        '      - model: {model: {"path": "org/dense-8b"}}',
        "        layer_range: [2, 3]",
        "  - sources:",
        '      - model: {model: {"path": "org/dense-8b"}}',
        "        layer_range: [4, 6]",
    ]
    line = shlex.split(made["llama-quantize"].splitlines()[-1])
    assert line == ["llama-quantize", "--prune-layers", "1,3", "dense-8b-f16.gguf", "my model-q4_k_m.gguf", "Q4_K_M"]
    assert shlex.split(made["vllm"])[:3] == ["vllm", "serve", str(tmp_path / "my model")]
    assert shlex.split(made["llama-server"].splitlines()[-1]) == ["llama-server", "-m", "my model.gguf"]
    assert "--remote org/dense-8b" in made["llama-quantize"], "the converter reads a folder unless told otherwise"
    (tmp_path / "here").mkdir()
    local = bridges(plan("3", id=str(tmp_path / "here")), 6, tmp_path / "out")
    assert "--remote" not in local["llama-quantize"]
    revised = Plan(Reference("org/dense-8b", "v2"), parse(["0"]))
    assert '{"path": "org/dense-8b", "revision": "v2"}' in bridges(revised, 6, tmp_path)["mergekit"]


@pytest.mark.parametrize(
    ("gone", "ranges"),
    [([0], [(1, 6)]), ([5], [(0, 5)]), ([1, 2], [(0, 1), (3, 6)]), ([0, 2, 4], [(1, 2), (3, 4), (5, 6)])],
)
def test_ranges_begin_at_zero_and_end_before_their_end(gone: list[int], ranges: list[tuple[int, int]]) -> None:
    assert kept(gone, 6) == ranges
    assert sorted([*gone, *(index for first, end in ranges for index in range(first, end))]) == list(range(6))


def test_what_they_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"whole blocks only, and this plan drops 2\.mlp: form hf can say that$"):
        bridges(plan("1", "2.mlp"), 6, tmp_path)
    with pytest.raises(ExportError, match=r"this plan has one for 1: form hf can hold it$"):
        bridges(plan("1", stand_in={"1": "bias"}), 6, tmp_path)
    with pytest.raises(PlanError, match=r"drops block 6, and the model has blocks 0 to 5$"):
        bridges(plan("6"), 6, tmp_path)
    for units in ((), tuple("012345")):
        with pytest.raises(PlanError, match="there is no command for that"):
            bridges(plan(*units), 6, tmp_path)


@pytest.mark.parametrize(
    ("family", "units", "reason"),
    [
        ("llama", ("1",), ""),
        ("qwen2", ("1",), ""),
        ("mixtral", ("1",), ""),
        ("gemma2", ("1",), "layer_types goes by block"),
        ("gemma2", ("1", "3"), "layer_types goes by block"),
        ("gemma3_text", ("0", "1", "3"), "_sliding_window_pattern makes every 6th block another"),
        ("smollm3", ("1",), "no_rope_layer_interval makes every 4th block another"),
        ("smollm3", ("1", "3"), "no_rope_layer_interval makes every 4th block another"),
        ("qwen3_moe", ("2",), "mlp_only_layers goes by block"),
        ("deepseek_v3", ("2",), "first_k_dense_replace goes by block"),
    ],
)
def test_tools_that_would_leave_a_stale_configuration_are_not_offered(
    family: str, units: tuple[str, ...], reason: str, subject: Callable[..., Model], tmp_path: Path
) -> None:
    model = subject(family)
    cut = Plan(model.reference, parse(units))
    folder = export(drop(model, cut), tmp_path / "out")
    made = bridges(cut, 4, folder)
    assert by_block(folder) == reason
    for name in ("mergekit", "llama-quantize"):
        lines = made[name].splitlines()
        assert all(line.startswith("#") for line in lines) == bool(reason)
        assert not reason or lines[0].startswith(f"# {name} cannot make this cut: {reason}")
    assert made["vllm"].startswith("vllm serve ") and made["llama-server"].startswith("#") == bool(reason)


def test_recovered_weights_are_not_promised(subject: Callable[..., Model], tmp_path: Path) -> None:
    model = subject("llama")
    cut = Plan(model.reference, parse(["1"]))
    folder = export(drop(model, cut), tmp_path / "out")
    assert "the weights recovered" not in "".join(bridges(cut, 4, folder).values())
    (folder / "recovery.json").write_text("{}")
    made = bridges(cut, 4, folder)
    assert all(made[name].startswith("# This makes the cut alone") for name in ("mergekit", "llama-quantize"))
    assert made["vllm"].startswith("vllm")


def other(variable: str) -> str:
    """The Python of a tool. Skips the test where there is none."""
    python = os.environ.get(variable, "")
    if not Path(python).is_file():
        pytest.skip(f"{variable} names no Python")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("units", [("1",), ("0", "2"), ("3",), ("1", "2")])
def test_mergekit_makes_the_same_weights(units: tuple[str, ...], tmp_path: Path) -> None:
    python = other("DEPTHPRUNE_MERGEKIT")
    dense = saved("llama", tmp_path / "dense")
    make_tokenizer().save_pretrained(dense)
    model = wrap(tiny("llama"), None, str(dense))
    cut = Plan(model.reference, parse(units))
    ours = export(drop(model, cut), tmp_path / "ours")
    (tmp_path / "recipe.yml").write_text(bridges(cut, 4, ours)["mergekit"])
    command = [Path(python).parent / "mergekit-yaml", tmp_path / "recipe.yml", tmp_path / "theirs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "theirs" / "model.safetensors").is_file(), done.stderr[-2000:]
    theirs, mine = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(ours / "model.safetensors")
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_hidden_layers"] == 4 - len(units)
    assert diagnose(tmp_path / "theirs", model) == []


@pytest.mark.slow
def test_mergekit_leaves_no_configuration_where_we_say_so(tmp_path: Path) -> None:
    python = other("DEPTHPRUNE_MERGEKIT")
    dense = saved("qwen3_sliding", tmp_path / "dense")
    make_tokenizer().save_pretrained(dense)
    model = wrap(tiny("qwen3_sliding"), None, str(dense))
    cut = Plan(model.reference, parse(["1"]))
    ours = export(drop(model, cut), tmp_path / "ours")
    assert bridges(cut, 4, ours)["mergekit"].startswith("# mergekit cannot make this cut: layer_types goes by block")
    (tmp_path / "recipe.yml").write_text(passthrough(cut, 4))
    command = [Path(python).parent / "mergekit-yaml", tmp_path / "recipe.yml", tmp_path / "theirs"]
    subprocess.run(command, capture_output=True, text=True, check=False)
    names = [proof.name for proof in diagnose(tmp_path / "theirs", model)]
    assert names and set(names) <= {"config.json", "layer_types"}


# Makes a GGUF of six blocks, prunes it as the command line does (0-based numbers, ended by -1), and reads it again.
PRUNE = """
import ctypes, json, sys
import gguf, llama_cpp, numpy
folder, pruned, arrays = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "arrays"
writer, random = gguf.GGUFWriter(folder + "/in.gguf", "llama"), numpy.random.default_rng(0)
writer.add_block_count(6); writer.add_context_length(64); writer.add_embedding_length(32)
writer.add_feed_forward_length(64); writer.add_rope_dimension_count(8); writer.add_vocab_size(8)
writer.add_head_count([4] * 6 if arrays else 4); writer.add_head_count_kv([2] * 6 if arrays else 2)
writer.add_layer_norm_rms_eps(1e-6); writer.add_file_type(0); writer.add_tokenizer_model("llama")
writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"]); writer.add_token_scores([0.0] * 8)
writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
block |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
shapes = {"token_embd": (8, 32), "output_norm": (32,), "output": (8, 32)}
shapes |= {f"blk.{n}.{name}": shape for n in range(6) for name, shape in block.items()}
for name, shape in shapes.items():
    writer.add_tensor(name + ".weight", random.standard_normal(shape).astype("float32"))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
options = llama_cpp.llama_model_quantize_default_params()
options.only_copy = True
options.prune_layers = ctypes.cast((ctypes.c_int32 * (len(pruned) + 1))(*pruned, -1), ctypes.POINTER(ctypes.c_int32))
given, made = folder + "/in.gguf", folder + "/out.gguf"
code = llama_cpp.llama_model_quantize(given.encode(), made.encode(), ctypes.byref(options))
reader = gguf.GGUFReader(made)
before = {tensor.name: tensor.data for tensor in gguf.GGUFReader(given).tensors}
after = {tensor.name: tensor.data for tensor in reader.tensors}
origin = [next(o for o in range(6) if numpy.array_equal(after[f"blk.{n}.ffn_up.weight"],
          before[f"blk.{o}.ffn_up.weight"])) for n in range(6) if f"blk.{n}.ffn_up.weight" in after]
loaded = llama_cpp.llama_model_load_from_file(made.encode(), llama_cpp.llama_model_default_params())
print(json.dumps({"code": code, "origin": origin, "blocks": int(reader.fields["llama.block_count"].contents()),
                  "loads": bool(loaded)}))
"""


def pruned(python: str, folder: Path, gone: list[int], kind: str) -> dict[str, object]:
    command = [python, "-c", PRUNE, str(folder), json.dumps(gone), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("gone", [[3], [0], [0, 1], [5], [2, 4, 5]])
def test_llama_quantize_counts_as_we_do(gone: list[int], tmp_path: Path) -> None:
    python = other("DEPTHPRUNE_LLAMA")
    line = bridges(plan(*map(str, gone)), 6, tmp_path)["llama-quantize"].splitlines()[-1]
    given = [int(number) for number in shlex.split(line)[2].split(",")]
    stay = [index for index in range(6) if index not in gone]
    wanted = {"code": 0, "origin": stay, "blocks": len(stay), "loads": True}
    assert pruned(python, tmp_path, given, "plain") == wanted
    # Why nothing is offered where metadata goes by block: llama-quantize leaves lists as long as they were.
    assert pruned(python, tmp_path, given, "arrays") == wanted | {"loads": False}


def test_the_command_needs_the_folder(desk: Path) -> None:
    """Its configuration says whether the others can make the cut; without it nothing would warn."""
    Path("plan.json").write_text(json.dumps({"format": 1, "model": {"id": "model", "blocks": 4}, "drop": ["1"]}))
    refused = run("bridges", "plan.json", "nowhere")
    assert refused.code == 1 and refused.error == "nowhere is no model: it has no config.json"
    Path("a-run").mkdir()
    Path("a-run/model").symlink_to(Path("model").resolve())
    assert "layer_range: [0, 1]" in run("bridges", "plan.json", "a-run").out, "a run has its model in it"
