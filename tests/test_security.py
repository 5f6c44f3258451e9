"""What never appears in the package: pickles, code from data, shells. And what it refuses at run time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
CALLS = {  # dotted names as they end in the source: torch.load also as `t.load` after `import torch as t`
    "torch.load": "use safetensors",
    "torch.save": "use safetensors",
    "torch.hub.load": "fetches and runs code",
    "numpy.load": "may unpickle; use safetensors",
    "yaml.load": "use fastrl.train.flags.load_yaml",
    "yaml.unsafe_load": "use fastrl.train.flags.load_yaml",
    "yaml.full_load": "use fastrl.train.flags.load_yaml",
    "os.system": "use subprocess with a list",
    "os.popen": "use subprocess with a list",
    "sympy.sympify": "evaluates its input",
    "sympy.parse_expr": "evaluates its input",
    "pandas.read_pickle": "unpickles",
}
PARSERS = {"sympify", "parse_expr"}
NAMES = {"eval", "exec", "compile", "__import__"} | PARSERS
KEYWORDS = {"shell": True, "trust_remote_code": True, "weights_only": False, "allow_pickle": True}


def problems(source: str, name: str = "file.py") -> list[str]:
    """`file:line: what` for everything banned in `source`."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    found = []
    for node in ast.walk(tree):
        line = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found += [f"{line}: imports {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            origin = [f"{node.module}.{a.name}" for a in node.names]
            bad = [o for o in origin if o.split(".")[0] in MODULES or o in CALLS or o.split(".")[-1] in PARSERS]
            found += [f"{line}: imports {o}" for o in bad]
        elif isinstance(node, ast.Attribute):
            dotted = _dotted(node, aliases)
            if dotted in CALLS:
                found.append(f"{line}: {dotted}: {CALLS[dotted]}")
        elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
            found.append(f"{line}: {node.id}")
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is not KEYWORDS[node.arg]):
                found.append(f"{name}:{node.value.lineno}: {node.arg}={ast.unparse(node.value)}")
        elif isinstance(node, ast.Dict):
            keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
            found += [f"{line}: {k!r} as a keyword in a dict" for k in keys if k in ("shell", "weights_only")]
    return found


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> module, for `import torch as t` and `from sympy.parsing import x`."""
    out = {"np": "numpy", "pd": "pandas"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out.update({a.asname: a.name for a in node.names if a.asname})
    return out


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    return f"{_dotted(node.value, aliases)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def sources() -> list[Path]:
    kernels = (ROOT / "kernels").rglob("*.py")
    package = [p for p in (ROOT / "fastrl").rglob("*.py") if "kernels" not in p.relative_to(ROOT / "fastrl").parts]
    return sorted([*package, *kernels])


def test_the_package_is_clean():
    assert len(sources()) > 30
    found = [line for path in sources() for line in problems(path.read_text(), str(path.relative_to(ROOT)))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "import dill as d",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nt.save({}, 'x')",
        "from torch import load",
        "import numpy as np\nnp.load('x')",
        "eval('1')",
        "f = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import yaml\nyaml.load(s)",
        "from yaml import unsafe_load",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import os\nos.system('ls')",
        "from os import system",
        "from sympy import sympify",
        "from sympy.parsing.sympy_parser import parse_expr",
        "import sympy\nsympy.sympify('1')",
        "AutoModel.from_pretrained(m, trust_remote_code=True)",
        "AutoModel.from_pretrained(m, trust_remote_code=config.trust)",
        "subprocess.run('ls', **{'shell': True})",
    ],
)
def test_each_banned_thing_is_found(code):
    assert len(problems(code)) == 1, problems(code)


@pytest.mark.parametrize(
    "code",
    [
        "AutoModel.from_pretrained(m, trust_remote_code=False)",
        "import re\nre.compile('x')",
        "model.eval()",
        "import yaml\nyaml.safe_load(s)",
        "import json\njson.load(f)",
        "from safetensors.torch import load_file, save_file",
    ],
)
def test_harmless_things_pass(code):
    assert problems(code) == []


def test_no_stage_has_a_flag_that_runs_foreign_code():
    from fastrl.train.config import CONFIGS

    for cls in CONFIGS.values():
        assert "trust_remote_code" not in cls.__dataclass_fields__
