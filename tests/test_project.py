"""The frame of the project: what README, CHANGELOG, constraints and the import layers say is so.

Each check is a function over a project's root that returns what is wrong, so that its twin can plant the defect in a
small project and see it found.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]

# Imports go downwards or sideways; a module of a sub-package has that package's level unless it is listed itself.
LEVELS = {
    name: level
    for level, names in enumerate(
        (
            "errors files registry units scores budget sizes plan select recipes",
            "layout discover families record offload model surgery shrink skip standin writers decilm "
            "vllm_plugin dequantize data tasks rows sources hub dist demo",
            "walk measures timing variants oracle mixed metrics recover prompts selfwritten export runtimes "
            "evaluate bench",
            "run charts report compare planning pruning claim recovering orders stages console options tables serving "
            "jobs cli __init__ __main__",
        )
    )
    for name in names.split()
}
HEAVY = {"accelerate", "datasets", "matplotlib", "safetensors", "torch", "transformers"}
LONGEST = 400

# Spelt in pieces, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.~{}$/-])/(?:" + "|".join(("work", "root", "home", "tmp", "Users", "opt")) + r")/\w")
REGISTRY = re.compile(
    r"pypi\." + r"org|python" + r"hosted|registry\.npm" + r"js|download\.py" + r"torch|conda\." + r"anaconda"
)


# What a project holds


def tracked(root: Path) -> list[Path]:
    """List the files that git knows or would take; without git, all files."""
    if not (root / ".git").exists():
        return sorted(path for path in root.rglob("*") if path.is_file())
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [root / name for name in names if name and (root / name).is_file()]


def sources(root: Path) -> list[Path]:
    """List the Python files of the package."""
    return sorted((root / "src" / "depthprune").rglob("*.py"))


def module(root: Path, path: Path) -> str:
    """Name a source file without the package: ``metrics/loss.py`` is ``metrics.loss``, the package ``__init__``."""
    parts = path.relative_to(root / "src" / "depthprune").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def version(root: Path) -> str:
    """Read ``__version__`` without importing the package."""
    tree = ast.parse((root / "src" / "depthprune" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name("__version__")], value=ast.Constant(str() as value)):
                return value
    raise AssertionError("no __version__ in src/depthprune/__init__.py")


def readme_tree(root: Path) -> list[Path]:
    """Read the annotated file tree of the README: every path in it, folders too."""
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    found: list[Path] = []
    folders: list[str] = []
    for line in lines:
        if re.fullmatch(r"src/depthprune/", line.split("  ")[0].strip()):
            folders = ["src/depthprune"]
        elif match := re.match(r"((?:│   |    )*)[├└]── (\S+)", line):
            assert folders, "the README's tree does not begin with src/depthprune/"
            folders = folders[: len(match[1]) // 4 + 1]
            found.append(root.joinpath(*folders, match[2]))
            if match[2].endswith("/"):
                folders.append(match[2].rstrip("/"))
    return found


# The checks


def wrong_version(root: Path) -> list[str]:
    newest = re.search(r"^## \[?(\d[^\s\]]*)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    says = newest[1] if newest else "nothing"
    return [] if says == version(root) else [f"CHANGELOG.md says {says}, the package {version(root)}"]


def wrong_tree(root: Path) -> list[str]:
    listed = readme_tree(root)
    problems = [f"README lists {path.relative_to(root)}, which does not exist" for path in listed if not path.exists()]
    twice = {path for path in listed if listed.count(path) > 1}
    problems += [f"README lists {path.relative_to(root)} more than once" for path in sorted(twice)]
    # An empty __init__.py has nothing to say.
    modules = [path for path in sources(root) if path.name != "__init__.py" or path.read_bytes()]
    missing = [
        path for path in modules if path not in listed and not (path.name == "__init__.py" and path.parent in listed)
    ]
    return problems + [f"README does not list {path.relative_to(root)}" for path in missing]


def wrong_constraints(root: Path) -> list[str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins: dict[str, Version] = {}
    problems = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        if match := re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([\w.!]+)", line):
            pins[canonicalize_name(match[1])] = Version(match[2])
        else:
            problems.append(f"constraints.txt: {line!r} is no plain name==version")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        need = Requirement(text)
        pin = pins.get(canonicalize_name(need.name))
        if pin is None:
            problems.append(f"constraints.txt has no {need.name}")
        elif pin not in need.specifier:
            problems.append(f"constraints.txt pins {need.name} {pin}, pyproject.toml wants {need.specifier}")
    return problems


def machine_traces(root: Path) -> list[str]:
    problems = []
    for path in tracked(root):
        if path.suffix == ".xz" or path.name in ("LICENSE", "tokenizer.json"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := MACHINE_PATH.search(line) or REGISTRY.search(line):
                problems.append(f"{path.relative_to(root)}:{number} names {match[0]}")
    return problems


def long_files(root: Path) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    return [f"{path.relative_to(root)} has {length} lines" for path, length in lengths.items() if length > LONGEST]


def level(name: str) -> int | None:
    """Look up the level of a module of the package; ``None`` where it has none."""
    while name not in LEVELS and "." in name:
        name = name.rpartition(".")[0]
    return LEVELS.get(name)


def imports(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything that a file imports, inside functions too.

    ``depthprune.__version__`` is left out: it is a constant that any module may write down.
    """
    known = {module(root, file) for file in sources(root)} | {file.parent.name for file in sources(root)}
    # What a relative import of one dot starts from.
    package = ["depthprune", *path.parent.relative_to(root / "src" / "depthprune").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full == "depthprune.__version__":
                    continue
                yield node.lineno, full if full.removeprefix("depthprune.") in known else base


def wrong_layers(root: Path) -> list[str]:
    problems = []
    for path in sources(root):
        where, name = path.relative_to(root), module(root, path)
        own = level(name)
        if own is None:
            problems.append(f"{where} has no level: add it to LEVELS")
            continue
        for line, imported in imports(root, path):
            top, _, rest = imported.partition(".")
            if top == "depthprune":
                other = level(rest or "__init__")
                if other is not None and other > own:
                    problems.append(f"{where}:{line} is of level {own} and imports {imported} of level {other}")
            elif own == 0 and top in HEAVY:
                problems.append(f"{where}:{line} is of level 0 and imports {top}")
    return problems


CHECKS: list[Callable[[Path], list[str]]] = [
    wrong_version,
    wrong_tree,
    wrong_constraints,
    machine_traces,
    long_files,
    wrong_layers,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_project(check: Callable[[Path], list[str]]) -> None:
    assert check(ROOT) == []


# Their twins

SOUND = {
    "CHANGELOG.md": "# Changelog\n\n## 1.2.3\n\nNew.\n\n## 1.2.2\n",
    "README.md": """
```
src/depthprune/
├── __init__.py   names
├── plan.py       the plan
├── metrics/
│   └── loss.py   the loss
└── cli.py
```
""",
    "constraints.txt": "# tested\nnumpy==2.1.0\nsome-tool==3.0\n",
    "pyproject.toml": (
        '[project]\ndependencies = ["numpy>=2.0"]\n[project.optional-dependencies]\ndev = ["Some_Tool>=2,<4"]\n'
    ),
    "src/depthprune/__init__.py": '__version__ = "1.2.3"\n',
    "src/depthprune/plan.py": "import json\nfrom depthprune import __version__\n",
    "src/depthprune/cli.py": "from depthprune import plan\nimport torch\n",
    "src/depthprune/metrics/__init__.py": "",
    "src/depthprune/metrics/loss.py": "import torch\nfrom depthprune.plan import Plan\nfrom .. import plan\n",
}


def plant(root: Path, changes: dict[str, str]) -> Path:
    """Write the sound small project with some files changed."""
    for name, text in {**SOUND, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sound_project_passes(check: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert check(plant(tmp_path, {})) == []


DEFECTS: list[tuple[Callable[[Path], list[str]], str, str, str]] = [
    (wrong_version, "CHANGELOG.md", "## 1.2.4\n\n## 1.2.3\n", "says 1.2.4"),
    (wrong_version, "CHANGELOG.md", "# Changelog\n", "says nothing"),
    (wrong_tree, "README.md", SOUND["README.md"].replace("plan.py", "plans.py"), "plans.py, which does not exist"),
    (
        wrong_tree,
        "README.md",
        SOUND["README.md"].replace("│   └── loss.py", "├── loss.py"),
        "loss.py, which does not exist",
    ),
    (
        wrong_tree,
        "README.md",
        SOUND["README.md"].replace("├── metrics/", "├── plan.py\n├── metrics/"),
        "plan.py more than once",
    ),
    (wrong_tree, "src/depthprune/metrics/weight.py", "", "does not list src/depthprune/metrics/weight.py"),
    (wrong_constraints, "constraints.txt", "numpy==2.1.0\n", "has no Some_Tool"),
    (wrong_constraints, "constraints.txt", "numpy==1.9\nsome-tool==3.0\n", "pins numpy 1.9"),
    (wrong_constraints, "constraints.txt", SOUND["constraints.txt"] + "torch @ file:x\n", "no plain name==version"),
    (wrong_constraints, "constraints.txt", SOUND["constraints.txt"] + "--index-url x\n", "no plain name==version"),
    (machine_traces, "notes.md", "see `" + "/work" + "/main`\n", "notes.md:1 names /work"),
    (machine_traces, "notes.md", "\nin " + "/home" + "/ann/x\n", "notes.md:2 names"),
    (machine_traces, "setup.cfg", "index = https://" + "pypi." + "org/simple\n", "setup.cfg:1 names pypi"),
    (long_files, "src/depthprune/plan.py", "\n" * (LONGEST + 1), "has 401 lines"),
    (wrong_layers, "src/depthprune/plan.py", "from depthprune.cli import main\n", "imports depthprune.cli of level 3"),
    (wrong_layers, "src/depthprune/plan.py", "from depthprune import cli\n", "imports depthprune.cli of level 3"),
    (wrong_layers, "src/depthprune/plan.py", "from depthprune import load\n", "imports depthprune of level 3"),
    (
        wrong_layers,
        "src/depthprune/plan.py",
        "from .metrics import loss\n",
        "imports depthprune.metrics.loss of level 2",
    ),
    (wrong_layers, "src/depthprune/metrics/loss.py", "from ..cli import main\n", "imports depthprune.cli of level 3"),
    (
        wrong_layers,
        "src/depthprune/plan.py",
        "def f():\n    import torch.nn\n",
        "plan.py:2 is of level 0 and imports torch",
    ),
    (wrong_layers, "src/depthprune/plan.py", "from transformers import x\n", "imports transformers"),
    (wrong_layers, "src/depthprune/magic.py", "", "magic.py has no level"),
]


@pytest.mark.parametrize(
    ("check", "file", "text", "finding"), DEFECTS, ids=lambda part: getattr(part, "__name__", None)
)
def test_planted_defect_is_found(
    check: Callable[[Path], list[str]], file: str, text: str, finding: str, tmp_path: Path
) -> None:
    problems = check(plant(tmp_path, {file: text}))
    assert len(problems) >= 1
    assert any(finding in problem for problem in problems), problems


def test_files_that_git_ignores_are_not_looked_at(tmp_path: Path) -> None:
    plant(tmp_path, {".gitignore": "/runs/\n", "runs/log.txt": "from " + "/root" + "/x\n", "kept.txt": "clean\n"})
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert tmp_path / "kept.txt" in tracked(tmp_path)
    assert machine_traces(tmp_path) == []
    (tmp_path / ".gitignore").write_text("", encoding="utf-8")
    assert machine_traces(tmp_path) == ["runs/log.txt:1 names " + "/root" + "/x"]
