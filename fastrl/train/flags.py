"""Flags: one dataclass field = one command-line flag = one YAML key, checked the same way from all three.

A field is declared with `flag(default, help, choices=..., above=..., at_least=..., at_most=...)`. Its annotation is its
type: str, int, float, bool, `X | None`, `list[str]`, `list[float]` or `float | int`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")
MAX_YAML_BYTES = 1 << 20


class ConfigError(ValueError):
    """A setting is wrong: the message names the flag, what came, what was expected, and the fix."""


def flag(default: Any, help: str, **limits: Any) -> Any:
    """A config field. limits: choices=(...), above=, at_least=, below=, at_most= (numbers)."""
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean x?` or nothing, for the end of an error message."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


# -- types -------------------------------------------------------------------------------------------------------
@functools.cache
def field_types(cls: type) -> dict[str, tuple[type, ...]]:
    """name -> the plain types its annotation allows; `list[X]` stays whole."""
    hints = typing.get_type_hints(cls)
    out = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        out[f.name] = typing.get_args(hint) if union else (hint,)
    return out


def type_name(allowed: tuple[type, ...]) -> str:
    names = ["none" if t is type(None) else str(t) if typing.get_origin(t) else t.__name__ for t in allowed]
    return " or ".join(names)


def fits(value: Any, kind: type) -> bool:
    """Is `value` of `kind`? An int is a float; a bool is neither."""
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return isinstance(value, list) and all(fits(v, inner) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def number(text: str, kind: type) -> int | float | None:
    """`text` as int or float, or None if it is not one."""
    try:
        return kind(text)
    except ValueError:
        return None


def from_text(cls: type, name: str, words: list[str]) -> Any:
    """The words that followed --name on the command line, as a value of the field's type."""
    allowed = field_types(cls)[name]
    many = next((t for t in allowed if typing.get_origin(t) is list), None)
    if many is not None and not (type(None) in allowed and words in (["none"], ["null"])):
        numbers = [number(w, float) if many == list[float] else None for w in words]
        return [w if n is None else n for w, n in zip(words, numbers, strict=True)]
    if not words and bool in allowed:
        return True
    if len(words) != 1:
        raise ConfigError(f"--{name} takes one value ({type_name(allowed)}), got {len(words)}: {' '.join(words)!r}")
    return _one(words[0], allowed, cls, name)


def _one(word: str, allowed: tuple[type, ...], cls: type, name: str) -> Any:
    choices = _field(cls, name).metadata.get("choices", ())
    if type(None) in allowed and word.lower() in ("none", "null") and word not in choices:
        return None
    for kind in (int, float):
        if kind in allowed and (value := number(word, kind)) is not None:
            return value
    if bool in allowed and word.lower() in (*TRUE, *FALSE):
        return word.lower() in TRUE
    return word  # a str field, or a wrong type that the check names


def from_yaml(cls: type, name: str, value: Any) -> Any:
    """YAML 1.1 reads `no` as false and `1e-6` as a string; give back what the writer meant."""
    allowed = field_types(cls)[name]
    choices = _field(cls, name).metadata.get("choices", ())
    if isinstance(value, str) and float in allowed and str not in allowed:
        read = number(value, float)
        return value if read is None else read
    if value is False and bool not in allowed and "no" in choices:
        return "no"
    if isinstance(value, str) and any(typing.get_origin(t) is list for t in allowed) and str not in allowed:
        return [value]
    return value


def _field(cls: type, name: str) -> dataclasses.Field:
    return cls.__dataclass_fields__[name]


# -- checks ------------------------------------------------------------------------------------------------------
def check_fields(config: Any) -> None:
    """Types, choices and bounds of every field; raises ConfigError at the first that is wrong. Ints become floats."""
    cls = type(config)
    for f in dataclasses.fields(cls):
        value, allowed = getattr(config, f.name), field_types(cls)[f.name]
        if isinstance(value, tuple):
            value = list(value)
        if not any(fits(value, kind) for kind in allowed):
            raise ConfigError(f"--{f.name} must be {type_name(allowed)}, got {type(value).__name__} {value!r}")
        if float in allowed and int not in allowed and isinstance(value, int):
            value = float(value)
        setattr(config, f.name, value)
        _check_limits(f, value)


def _check_limits(f: dataclasses.Field, value: Any) -> None:
    limits = f.metadata
    choices = limits.get("choices")
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if choices and item not in choices:
            hint = nearest(str(item), map(str, choices))
            raise ConfigError(f"--{f.name} must be one of {', '.join(map(str, choices))}, got {item!r}{hint}")
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(f"--{f.name} must be a finite number, got {item}")
        for word, holds in _BOUNDS.items():
            bound = limits.get(word)
            if bound is not None and not isinstance(item, str) and not holds(item, bound):
                raise ConfigError(f"--{f.name} must be {word.replace('_', ' ')} {bound}, got {item}")


_BOUNDS = {
    "above": lambda x, b: x > b,
    "at_least": lambda x, b: x >= b,
    "below": lambda x, b: x < b,
    "at_most": lambda x, b: x <= b,
}


# -- YAML and the command line -----------------------------------------------------------------------------------
class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, and aliases (a config has no use for them; bombs do)."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(f"{mark.name}:{mark.line + 1}: YAML aliases are not accepted in a config; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if str(key) in seen:
                where = f"{key_node.start_mark.name}:{line}"
                raise ConfigError(f"{where}: key {key!r} was already given at line {seen[str(key)]}; keep one")
            seen[str(key)] = line
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A flat mapping from a YAML file. Raises ConfigError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"--config {path}: {path.stat().st_size} bytes; a config is at most {MAX_YAML_BYTES}")
    with path.open("rb") as stream:
        loader = _StrictLoader(stream)
        try:
            data = loader.get_single_data()
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path} is not valid YAML: {error}") from None
        finally:
            loader.dispose()
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} must hold `key: value` lines, got a {type(data).__name__}")
    return data


def split_flags(argv: list[str]) -> dict[str, list[str]]:
    """`--a 1 --b=2 --c x y` -> {"a": ["1"], "b": ["2"], "c": ["x", "y"]}; dashes in names become underscores."""
    flags: dict[str, list[str]] = {}
    words = None
    for arg in argv:
        if arg.startswith("--") and len(arg) > 2:
            name, has_value, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            if name in flags:
                raise ConfigError(f"--{name} is given twice; keep one")
            words = flags[name] = [value] if has_value else []
        elif words is None:
            raise ConfigError(f"expected a flag (--name value), got {arg!r}")
        else:
            words.append(arg)
    return flags


def parse(cls: type, argv: list[str], hints: dict[str, str] | None = None) -> Any:
    """An instance of the config dataclass `cls` from flags and an optional --config file; flags win.

    hints: names that are not flags here but that users of other trainers write -> what to do instead.
    """
    flags = split_flags(argv)
    values: dict[str, Any] = {}
    if "config" in flags:
        words = flags.pop("config")
        if len(words) != 1:
            raise ConfigError(f"--config takes one file, got {len(words)}")
        for key, value in load_yaml(words[0]).items():
            name = str(key).replace("-", "_")
            _known(cls, name, f"{words[0]}: key {name}", hints or {})
            if name in values:
                raise ConfigError(f"{words[0]}: key {name} is given twice; keep one")
            values[name] = from_yaml(cls, name, value)
    for name, words in flags.items():
        _known(cls, name, f"--{name}", hints or {})
        values[name] = from_text(cls, name, words)
    return cls(**values)


def _known(cls: type, name: str, shown: str, hints: dict[str, str]) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    if name in names:
        return
    if name in hints:
        raise ConfigError(f"{shown} is not a flag of `fastrl {cls.stage}`: {hints[name]}")
    raise ConfigError(f"{shown} is not a flag of `fastrl {cls.stage}`{nearest(name, names)}")


def help_text(cls: type) -> str:
    """Every flag of a stage with its type, default, choices and meaning, those of one matter together."""
    groups: dict[str, list[str]] = {"": []}  # flags of no group of their own come first
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        kind = "|".join(map(str, f.metadata["choices"])) if "choices" in f.metadata else type_name(_shown(cls, f.name))
        line = f"  --{f.name} {kind}  [{_plain(default)}]\n      {f.metadata['help']}"
        groups.setdefault(_group(cls, f.name), []).append(line)
    return "\n".join("\n".join([f"\n{title}:" if title else "", *lines]) for title, lines in groups.items()).strip("\n")


def _group(cls: type, name: str) -> str:
    """The title of the class that has the flag first, however its default changed since."""
    first = next(c for c in reversed(cls.__mro__) if name in c.__dict__.get("__annotations__", {}))
    return first.__dict__.get("title", "")


def _shown(cls: type, name: str) -> tuple[type, ...]:
    return tuple(t for t in field_types(cls)[name] if t is not type(None))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value) or "required"
