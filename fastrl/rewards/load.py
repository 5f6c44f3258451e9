"""From what stands after --reward_funcs to functions: built-in names, dotted paths, file.py:name, callables, or
directories of reward models.

Reward functions are the user's own code and are trusted; what they judge is not.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl.rewards.builtin import PLAIN, WITH_NUMBERS
from fastrl.rewards.score import RewardError, RewardFunction, Scorer


def load_rewards(
    specs: Sequence[str | Callable],
    weights: Sequence[float] | None,
    tokenizer: Any,
    open_model: Callable[[str], Callable] | None = None,
) -> Scorer:
    """The scorer of a run: what each spec names, and its weight (1 each if None). open_model: see resolve.

    Raises RewardError naming the spec that cannot be found.
    """
    functions = [resolve(spec, open_model) for spec in specs]
    seen: dict[str, int] = {}
    for function in functions:  # two functions of one name are two metrics
        seen[function.name] = seen.get(function.name, 0) + 1
        if seen[function.name] > 1:
            function.name = f"{function.name}_{seen[function.name]}"
    return Scorer(functions, weights, tokenizer)


def resolve(spec: str | Callable, open_model: Callable[[str], Callable] | None = None) -> RewardFunction:
    """One reward function.

    Args:
        spec: a callable; a built-in name, with numbers where it takes some ("soft_overlong:max_length=512,buffer=64");
            "path/to/file.py:name"; "package.module.name"; or the directory of a reward model.
        open_model: makes a reward function of such a directory; a trainer has one.

    A function with a parameter `solution_str` is verl's `compute_score` and is called once for each completion.
    """
    if callable(spec):
        return _wrap(spec, getattr(spec, "__name__", type(spec).__name__))
    name, _, rest = spec.partition(":")
    if name in PLAIN and not rest:
        return _wrap(PLAIN[name], name)
    if name in PLAIN or name in WITH_NUMBERS:
        return _with_numbers(name, rest)
    path, _, attribute = spec.rpartition(":")
    if path.endswith(".py"):
        return _wrap(_attribute(_from_file(path), attribute, spec), attribute)
    if spec.endswith(".py"):
        raise RewardError(f"reward {spec!r} names a file; say which function in it: {spec}:name")
    if Path(spec).is_dir():
        if open_model is None:
            raise RewardError(f"reward {spec!r} is a directory: a trainer opens reward models; give a function here")
        model = open_model(spec)
        return _wrap(model, model.__name__)
    module, _, attribute = spec.rpartition(".")
    if module:
        return _wrap(_attribute(_import(module, spec), attribute, spec), attribute)
    known = [*PLAIN, *WITH_NUMBERS]
    close = difflib.get_close_matches(spec, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"built in are {', '.join(known)}."
    raise RewardError(f"no reward {spec!r}: {hint} Your own: file.py:name or package.module.name")


def _with_numbers(name: str, text: str) -> RewardFunction:
    """A built-in with "key=1,key=2" behind its name."""
    factory = WITH_NUMBERS.get(name)
    wanted = list(inspect.signature(factory).parameters) if factory else []
    example = f"{name}:{','.join(f'{p}=...' for p in wanted)}" if wanted else name
    pairs = dict(part.partition("=")[::2] for part in text.split(",") if part)
    if set(pairs) != set(wanted) or not all(v.isdigit() and len(v) < 10 for v in pairs.values()):
        raise RewardError(
            f"reward {name}:{text} should read {example}, whole numbers, or {name} alone if it takes none"
        )
    return RewardFunction(name, factory(**{k: int(v) for k, v in pairs.items()}))


def _from_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise RewardError(f"reward file {file} does not exist")
    name = f"fastrl_reward_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import(module: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise RewardError(f"reward {spec!r}: there is no module {error.name!r} on the Python path") from error


def _attribute(module: ModuleType, name: str, spec: str) -> Callable:
    found = getattr(module, name, None)
    if not callable(found):
        there = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
        raise RewardError(f"reward {spec!r}: {module.__name__} has no function {name!r}; it has {there}")
    return found


def _wrap(function: Callable, name: str) -> RewardFunction:
    parameters = inspect.signature(function).parameters
    if "solution_str" in parameters:
        return RewardFunction(name, function, one_by_one=True)
    return RewardFunction(name, function)
