"""Datasets from JSONL, parquet, a directory of either, or a name that `datasets` knows; wrong files fail at the door.

A JSONL file is scanned to its end before anything else happens, so that every bad line is reported at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrl.data.types import SHOWN, DataError, excerpt

LINES, PARQUET = (".jsonl", ".json", ".ndjson"), (".parquet",)
_JSON_NAMES = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}


@dataclass
class Rows(Sequence):
    """Rows of a dataset, and where each came from.

    rows         dicts by number (a list, or a `datasets.Dataset`)
    name         for messages
    places       (file, line) of each row, or None
    fingerprint  of the content, for resuming
    skipped      lines left out under on_bad_row="skip"
    """

    rows: Any
    name: str = "the dataset"
    places: list[tuple[str, int]] | None = None
    fingerprint: str = ""
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    def where(self, i: int) -> str:
        """file:line, or the row's number (from 0)."""
        return f"{self.name} row {i}" if self.places is None else "{}:{}".format(*self.places[i])


def load(name: str, split: str = "train", config: str | None = None, *, on_bad_row: str = "raise") -> Rows:
    """The rows of one split.

    Args:
        name: a .jsonl or .parquet file (its rows are split "train"); a directory with `train.jsonl`, `test.parquet`,
            `train-00000-of-00002.parquet`, ... or one written by `datasets.save_to_disk`; or a hub dataset.
        split: which.
        config: configuration of a hub dataset.
        on_bad_row: "raise" lists up to 20 bad lines; "skip" leaves them out and lists them in `Rows.skipped`.

    Raises DataError: nothing there, no such split, unreadable lines, fields of mixed types, no rows.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be 'raise' or 'skip', got {on_bad_row!r}")
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _directory(path, split, on_bad_row)
    elif path.is_file():
        if split != "train":
            raise DataError(
                f"{path} is one file, its rows are split 'train'; for a split {split!r} put train{path.suffix} and "
                f"{split}{path.suffix} into a directory and give that"
            )
        rows = _files([path], on_bad_row)
    elif path.suffix in LINES + PARQUET or name.startswith((".", "/", "~")):
        raise DataError(f"{path} does not exist")
    else:
        rows = _hub(name, split, config)
    if not len(rows):
        raise DataError(f"{rows.name} has no rows")
    return rows


def _directory(path: Path, split: str, on_bad_row: str) -> Rows:
    names = [f"{split}{suffix}" for suffix in LINES + PARQUET]
    names += [f"{split}-*{suffix}" for suffix in LINES + PARQUET] + [f"data/{split}-*{suffix}" for suffix in PARQUET]
    for pattern in names:
        found = sorted(path.glob(pattern))
        if found:
            return _files(found, on_bad_row)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved(path, split)
    there = sorted(p.name for p in path.iterdir())
    raise DataError(f"{path} has no split {split!r}: expected {split}.jsonl or {split}.parquet, found {there[:SHOWN]}")


def _files(paths: list[Path], on_bad_row: str) -> Rows:
    """One split in one or more files of the same kind."""
    rows: list[dict] = []
    places: list[tuple[str, int]] = []
    errors, digest = _Errors(), hashlib.sha256()
    for path in paths:
        if path.suffix in PARQUET:
            _read_parquet(path, rows, places, digest)
        elif path.suffix in LINES:
            _read_lines(path, rows, places, digest, errors)
        else:
            raise DataError(f"{path} ends in {path.suffix!r}; expected .jsonl or .parquet")
    _check_types(rows, places, errors)
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
    if errors.count and on_bad_row == "raise":
        raise DataError(f"{errors.count} bad lines in {name}:\n" + "\n".join(errors.shown))
    if errors.bad_rows:
        keep = [i for i in range(len(rows)) if i not in errors.bad_rows]
        rows, places = [rows[i] for i in keep], [places[i] for i in keep]
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [row if len(row) == len(columns) else {key: row.get(key) for key in columns} for row in rows]
    return Rows(rows, name, places, digest.hexdigest(), errors.shown)


# -- JSON lines --------------------------------------------------------------------------------------------------
@dataclass
class _Errors:
    """How many lines are bad, and the first of them."""

    count: int = 0
    shown: list[str] = field(default_factory=list)
    bad_rows: set[int] = field(default_factory=set)

    def add(self, path: str, line: int, what: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{path}:{line}: {what}")


def _read_lines(path: Path, rows: list[dict], places: list, digest: Any, errors: _Errors) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            digest.update(raw)
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            row = _parse_line(raw)
            if isinstance(row, str):
                cut = "" if raw.endswith(b"\n") else "; the file's last line is cut off"
                errors.add(str(path), number, row + cut)
            else:
                rows.append(row)
                places.append((str(path), number))


def _parse_line(raw: bytes) -> dict | str:
    """The object on a line, or what is wrong with it."""
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}): {excerpt(raw)}"
    try:
        row = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        return f"nested too deeply: {excerpt(text)}"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno}): {excerpt(text[max(0, error.pos - 30) :])}"
    except ValueError as error:
        return f"not JSON ({error}): {excerpt(text)}"
    if not isinstance(row, dict):
        return f"a {_JSON_NAMES.get(type(row), 'null')}, expected one object a line: {excerpt(text)}"
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _check_types(rows: list[dict], places: list, errors: _Errors) -> None:
    """A field has one type throughout (null apart); the first row that has it decides."""
    first: dict[str, tuple[str, int]] = {}
    for i, row in enumerate(rows):
        for key, value in row.items():
            if value is None:
                continue
            kind = _JSON_NAMES.get(type(value), type(value).__name__)
            known, at = first.setdefault(key, (kind, i))
            if known != kind:
                path, line = places[i]
                errors.add(
                    path, line, f"field {key!r} is a {kind} ({excerpt(value)}), but a {known} in line {places[at][1]}"
                )
                errors.bad_rows.add(i)


# -- other sources -----------------------------------------------------------------------------------------------
def _read_parquet(path: Path, rows: list[dict], places: list, digest: Any) -> None:
    with path.open("rb") as file:
        head = file.read(4)
        digest.update(head + file.read())
    if head != b"PAR1":
        raise DataError(f"{path} is not a parquet file (it begins with {head!r}, expected b'PAR1')")
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error
    rows += table.to_pylist()
    places += [(str(path), i) for i in range(table.num_rows)]


def _saved(path: Path, split: str) -> Rows:
    """A directory written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split!r}; it has {sorted(found)}")
        found = found[split]
    return Rows(found, str(path), None, found._fingerprint)


def _hub(name: str, split: str, config: str | None) -> Rows:
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"dataset {name!r}, split {split!r}: no such file or directory, and {error}") from error
    return Rows(found, f"{name}[{split}]", None, found._fingerprint)
