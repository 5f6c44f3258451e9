"""Files that survive a kill: written aside, fsynced, renamed into place, and a manifest that tells if they changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old bytes or the new."""
    handle, tmp = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(tmp, 0o666 & ~umask())
    os.replace(tmp, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# -- manifests ---------------------------------------------------------------------------------------------------
def write_manifest(directory: Path, header: dict[str, Any]) -> None:
    """fsync every file, list them with size and SHA-256 in manifest.json, fsync that and every directory."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        fsync(path)
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(directory / MANIFEST, {**header, "files": files})
    fsync(directory / MANIFEST)
    for inner in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
        fsync(inner)


def differences(
    path: Path, header: dict[str, Any], required: tuple[str, ...] = (), hashes: bool = True
) -> list[str]:
    """What is wrong with `path` against its manifest, [] if nothing; no file outside it is ever opened."""
    if not (path / MANIFEST).is_file():
        return [f"{MANIFEST} is missing"]
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        listed = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read: {error!r}"]
    for key, value in header.items():
        if manifest.get(key) != value:
            return [f"{MANIFEST} has {key} {manifest.get(key)!r}, this fastrl reads {value!r}"]
    problems = [f"{name} is not in {MANIFEST}" for name in required if name not in listed]
    for name, (size, digest) in listed.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts or file.is_symlink():
            problems.append(f"{name} points outside the checkpoint")
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, {size} were written")
        elif hashes and sha256(file) != digest:
            problems.append(f"{name} has changed since it was written (SHA-256 differs)")
    return problems
