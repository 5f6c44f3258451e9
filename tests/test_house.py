"""The house: who may import whom, and that every way of installing finds every room."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> the rooms of fastrl that it may import beside itself. A file's room is the longest entry that fits its path.
CORE = {"kernels", "tokens", "objective", "ops", "losses", "advantages", "rewards", "data", "models", "rollout"}
MAY_IMPORT = {
    "kernels": set(),
    "tokens": set(),
    "ops.reference": set(),
    "objective": {"tokens"},
    "ops": {"kernels", "tokens", "objective", "advantages"},
    "losses": {"tokens", "objective"},
    "advantages": {"tokens"},
    "rewards": {"tokens"},
    "data": {"tokens"},
    "models": {"ops", "data", "tokens", "objective"},
    "rollout": {"ops", "data", "tokens", "objective"},
    "train": CORE | {""},
    "bench": {"kernels", "tokens", "objective", "ops", "losses", ""},
}
ANYTHING = {"", "__main__", "cli", "quickstart", "integrations"}
OUTSIDE = {  # what these rooms may import from outside the standard library; rooms not named here: anything
    "kernels": {"torch", "triton"},
    "tokens": {"torch"},
    "ops.reference": {"torch"},
    "objective": {"torch"},
    "ops": {"torch", "triton"},
    "losses": {"torch"},
    "advantages": {"torch"},
}


def room_of(module: str, rooms: dict | set) -> str | None:
    """`ops.reference` for fastrl.ops.reference, `ops` for fastrl.ops.linear, None if there is no such room."""
    parts = module.split(".")[1:]
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in rooms:
            return ".".join(parts[:n])
    return "" if module == "fastrl" else None


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, in functions too, and of names given to importlib as strings."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and re.fullmatch(r"fastrl(\.\w+)+\.?", str(part.value)):
                    yield node.lineno, part.value.rstrip(".")


def violations(root: Path) -> list[str]:
    """`file:line: room imports what it may not`, for the tree that holds fastrl/ and kernels/."""
    files = [(p, f"fastrl.{p.relative_to(root / 'fastrl').with_suffix('').as_posix()}") for p in rooms_files(root)]
    files += [(p, f"fastrl.kernels.{p.stem}") for p in sorted((root / "kernels").glob("*.py"))]
    found, rooms = [], {**MAY_IMPORT, **{name: None for name in ANYTHING}}
    for path, dotted in files:
        module = dotted.replace("/", ".").removesuffix(".__init__")
        room = room_of(module, rooms)
        where = path.relative_to(root)
        if room is None:
            found.append(f"{where}: {module} is in no room of the table; add it there")
            continue
        for line, name in imports(path, module):
            top = name.split(".")[0]
            if top in ("tests", "bench"):
                found.append(f"{where}:{line}: nothing imports {top}")
            elif top == "fastrl" and room in MAY_IMPORT:
                target = room_of(name, rooms) or ""
                own = room.split(".")[0] if room != "ops.reference" else room
                if target.split(".")[0] != own and target.split(".")[0] not in MAY_IMPORT[room]:
                    found.append(f"{where}:{line}: {room} may not import {name}")
            elif room in OUTSIDE and top not in OUTSIDE[room] and top not in sys.stdlib_module_names:
                if top not in ("fastrl", "__future__"):
                    found.append(f"{where}:{line}: {room} may not import {top}")
    return found


def rooms_files(root: Path) -> list[Path]:
    found = sorted((root / "fastrl").rglob("*.py"))
    return [p for p in found if "kernels" not in p.relative_to(root / "fastrl").parts]


def test_nobody_imports_what_they_may_not():
    assert violations(ROOT) == []


PLANTED = {
    "kernels/a.py": ["import numpy", "from fastrl.tokens import TokenBatch", "from ..ops import linear"],
    "fastrl/tokens.py": ["from fastrl import ops", "import triton"],
    "fastrl/ops/reference.py": ["from fastrl.ops import linear", "from .head import HeadSpec"],
    "fastrl/ops/linear.py": ["import fastrl.losses", "def f():\n    from fastrl.train import run", "import numpy"],
    "fastrl/losses/policy.py": ["from fastrl.ops import fused", "from ..ops.head import HeadSpec"],
    "fastrl/rewards/a.py": ["from fastrl.data import types"],
    "fastrl/data/a.py": ["import importlib\nimportlib.import_module('fastrl.ops')"],
    "fastrl/models/a.py": ["from fastrl.train.config import TrainConfig"],
    "fastrl/rollout/a.py": ["from fastrl.losses import get"],
    "fastrl/train/a.py": ["from fastrl import cli", "import tests.x", "from bench import common"],
    "fastrl/ops/fused.py": ["from fastrl.bench import machine"],
    "fastrl/bench/a.py": ["from fastrl.train import run"],
    "fastrl/attic/a.py": ["import torch"],
}
FINE = {
    "kernels/a.py": "import torch, triton\nfrom triton import language\nfrom .b import x\nimport math",
    "fastrl/ops/linear.py": "from fastrl.kernels import a\nfrom fastrl import tokens\nfrom .head import x",
    "fastrl/train/a.py": "import fastrl\nfrom fastrl import losses\nfrom fastrl.models import x\nimport transformers",
    "fastrl/cli.py": "from fastrl.train import run\nimport rich",
}


def plant(root: Path, name: str, code: str) -> None:
    (root / "kernels").mkdir(parents=True, exist_ok=True)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(code + "\n")


@pytest.mark.parametrize(("name", "code"), [(n, c) for n, codes in PLANTED.items() for c in codes])
def test_a_planted_violation_is_found(tmp_path, name, code):
    plant(tmp_path, name, code)
    assert len(violations(tmp_path)) == 1, violations(tmp_path)


def test_what_is_allowed_passes(tmp_path):
    for name, code in FINE.items():
        plant(tmp_path, name, code)
    assert violations(tmp_path) == []


# -- packages --------------------------------------------------------------------------------------------------------
def listed_packages() -> list[str]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "PACKAGES"]
    return ast.literal_eval(values[0])


def test_every_package_is_listed():
    folders = {p.parent.relative_to(ROOT) for p in rooms_files(ROOT)} | {Path("fastrl/kernels")}
    assert sorted(listed_packages()) == sorted(".".join(f.parts) for f in folders)
    assert (ROOT / "fastrl/kernels").is_symlink() and os.readlink(ROOT / "fastrl/kernels") == "../kernels"
    for folder in folders:
        assert (ROOT / folder / "__init__.py").exists() == (folder.name != "kernels"), folder


def clean_environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "PYTHONHOME"))}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def python(code: str, cwd: Path, *options: str, **environment: str) -> str:
    arguments = [sys.executable, *options, "-c", code]
    done = subprocess.run(arguments, cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_kernels_folder_hides_nobody(tmp_path):
    """transformers looks for a PyPI package called kernels; our folder of that name must not be taken for it."""
    code = "import transformers.utils as u; print(u.is_kernels_available())"
    assert python(code, tmp_path) == python(code, tmp_path, PYTHONPATH=str(ROOT))


WHERE = """
import importlib.util, pathlib, fastrl
for name in {modules}:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin, f"{{name}} is missing, or has no __init__.py"
    print(pathlib.Path(spec.origin).resolve())
print(fastrl.__version__)
from fastrl.cli import main
assert main(["grpo", "--help"]) == 0
"""


def modules() -> list[str]:
    """One module of every package."""
    kernels = [f"fastrl.kernels.{p.stem}" for p in sorted((ROOT / "kernels").glob("*.py"))]
    return [name for name in listed_packages() if name != "fastrl.kernels"] + kernels


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked part of the tree that packaging sees, so that nothing is built inside the repository."""
    root = tmp_path_factory.mktemp("copy") / "repo"
    root.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, root / name)
    left = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("fastrl", "kernels", "csrc"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=left)
    return root


def test_it_runs_uninstalled(copy, tmp_path):
    shown = python(WHERE.format(modules=modules()), tmp_path, PYTHONPATH=str(copy)).splitlines()
    assert all(line.startswith(str(copy.resolve())) for line in shown[: len(modules())])


def test_the_wheel_holds_everything_as_real_files(copy, tmp_path):
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)]
    build = [sys.executable, "-m", "pip", "wheel", *options]
    done = subprocess.run(build, capture_output=True, text=True, env=clean_environment(PIP_NO_INDEX="1"))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fastrl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {i.filename: archive.read(i) for i in archive.infolist() if ".dist-info/" not in i.filename}
        assert not [i for i in archive.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]  # no symlinks
        assert [n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE")]
        archive.extractall(tmp_path / "site")
    expected = [p for p in (copy / "fastrl").rglob("*") if p.suffix in (".py", ".jsonl")]
    expected = {p.relative_to(copy).as_posix(): p.read_bytes() for p in expected if "kernels" not in p.parts}
    expected |= {f"fastrl/kernels/{p.name}": p.read_bytes() for p in (copy / "kernels").glob("*.py")}
    compiled = [name for name in held if name.startswith("fastrl/_native") and name.endswith(".so")]
    assert len(compiled) == bool(shutil.which("g++"))
    assert {name: data for name, data in held.items() if name not in compiled} == expected
    shown = python(WHERE.format(modules=modules()), tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert all(line.startswith(str((tmp_path / "site").resolve())) for line in shown[: len(modules())])


def test_an_editable_install_finds_everything(copy, tmp_path):
    build = "import setuptools.build_meta as b, sys; print(b.build_editable(sys.argv[1]))"
    environment = clean_environment(PYTHONPATH="")
    arguments = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(arguments, cwd=copy, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fastrl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # -S, and our folder first: an editable install of the repository itself must not answer for this one
    code = f"import site, sys; site.addsitedir({str(tmp_path / 'site')!r})\n"
    code += f"sys.path.append({sysconfig.get_path('purelib')!r})\n"
    shown = python(code + WHERE.format(modules=modules()), tmp_path, "-S").splitlines()
    assert all(line.startswith(str(copy.resolve())) for line in shown[: len(modules())])
