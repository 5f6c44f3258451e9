"""Checkpoints: whole or not there. checkpoint-N/ is a model directory; training_state/ inside it is the rest.

Commit order: write into a hidden directory -> fsync every file -> manifest with sizes and SHA-256, fsynced -> fsync the
directories -> rename to checkpoint-N -> fsync the parent -> only then delete what --save_total_limit lets go. A kill at
any point leaves every earlier checkpoint as it was. Tensors are safetensors, the rest is JSON; nothing is pickled.

On several ranks the directory is one that all of them see. Rank 0 writes the model and commits; each rank writes its
rows of the optimizer's state and its random generators. Any number of ranks resumes what any other has saved.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastrl.train.durable import MANIFEST, differences, fsync, read_json, umask, write_json, write_manifest
from fastrl.train.optim_state import StateFiles, pack_optimizer, unpack_optimizer
from fastrl.train.parallel import ALONE, World
from fastrl.train.rng import derive_rng_state, rng_state, set_rng_state
from fastrl.train.together import on_main, together

FORMAT = 1
STATE, INNER, CONFIG = "trainer_state.json", "training_state", "config_fastrl.yaml"
TMP_PREFIX, TRASH_PREFIX = ".tmp-checkpoint-", ".trash-checkpoint-"
NAME = re.compile(r"checkpoint-\d+")

ModelSaver = Callable[[Path], Any]
NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or the one asked for is missing, damaged or of another run."""


@dataclass
class TrainerState:
    """Where the run is. Everything here is JSON; `sampler`, `metrics` and `extra` belong to those who fill them.

    step: optimizer steps done. epoch: passes over the data. num_tokens: tokens seen. dataset_fingerprint: of the
    training data, compared on resume. extra: whatever else must come back (a half-used batch of samples, ...).
    """

    step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0
    stage: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    best_metric: float | None = None
    best_step: int | None = None
    skipped_steps: int = 0
    dataset_fingerprint: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """A verified checkpoint. path: loads with from_pretrained. config: the settings it was saved with (redacted)."""

    path: Path
    state: TrainerState
    config: dict[str, Any]

    def restore(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        named_parameters: NamedParameters = (),
        *,
        generators: dict[str, torch.Generator] | None = None,
        dataset_fingerprint: str = "",
        world: World = ALONE,
    ) -> list[str]:
        """Put back optimizer state (by parameter name, bitwise) and every random generator. Call it last.

        Returns: notes for the reader. Raises: CheckpointError listing parameters whose name, shape or dtype differ, or
        when the data is not the data the run was started with.
        """
        saved = self.state.dataset_fingerprint
        if saved and dataset_fingerprint and saved != dataset_fingerprint:
            raise CheckpointError(
                f"{self.path} was trained on other data (fingerprint {saved}, now {dataset_fingerprint}); "
                "resume with the same dataset, or start anew with --model_name_or_path set to the checkpoint"
            )
        inner = self.path / INNER
        if optimizer is not None:
            plain = read_json(inner / "optimizer.json")
            files = StateFiles(saved_parts(inner, "optimizer"), plain["parameters"])
            problems = unpack_optimizer(optimizer, named_parameters, files, plain)
            if problems:
                raise CheckpointError(f"{self.path} does not fit this model and optimizer:{listed(problems)}")
        return self._restore_rng(inner, generators, world)

    def _restore_rng(self, inner: Path, generators, world: World) -> list[str]:
        """Each rank takes back its own generators; a rank that was not there derives its own, which is noted."""
        parts = saved_parts(inner, "rng")
        if world.rank < len(parts):
            mine = parts[world.rank]
            set_rng_state(load_file(mine), read_json(mine.with_suffix(".json")), generators)
        else:
            derive_rng_state((self.config.get("seed", 0), self.state.step, world.dp_rank), generators)
        if world.size <= len(parts):
            return []
        return [
            f"{self.path.name} has random generators of {len(parts)} of the {world.size} processes; those of the "
            "others (dropout) start from the seed, the step and their rank"
        ]


def saved_parts(inner: Path, kind: str) -> list[Path]:
    """kind.safetensors of one process, or kind-0000k-of-0000n.safetensors of several, in rank order."""
    alone = inner / f"{kind}.safetensors"
    return [alone] if alone.exists() else sorted(inner.glob(f"{kind}-*-of-*.safetensors"))


def part_name(kind: str, at: int, count: int) -> str:
    return kind if count == 1 else f"{kind}-{at + 1:05d}-of-{count:05d}"


def listed(problems: list[str], most: int = 20) -> str:
    """Indented lines for the end of a message."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {line}" for line in [*problems[:most], *more])


# -- saving ------------------------------------------------------------------------------------------------------
def save_checkpoint(
    run_path: Path | str,
    state: TrainerState,
    model_saver: ModelSaver,
    optimizer: torch.optim.Optimizer | None = None,
    named_parameters: NamedParameters = (),
    *,
    generators: dict[str, torch.Generator] | None = None,
    total_limit: int | None = None,
    world: World = ALONE,
) -> Path:
    """Write run_path/checkpoint-<state.step>; returns its path. A complete one of that step is left as it is.

    model_saver(directory), called on every rank, writes the model and tokenizer on rank 0. Raises, on every rank:
    CheckpointError when the disk refuses on one of them (earlier checkpoints are untouched and nothing half-written
    stays); otherwise whatever model_saver raises.
    """
    run_path, parameters = Path(run_path), list(named_parameters)
    target = run_path / f"checkpoint-{state.step}"
    refused = f"could not save {target}: {{}}; earlier checkpoints are untouched"

    def step(work: Callable[[], Any]) -> Any:
        return together(world, lambda: on_disk(work, refused), (CheckpointError,))

    tmp = on_main(world, lambda: on_disk(lambda: _begin(target, optimizer, parameters), refused), (CheckpointError,))
    if tmp is None:
        return target
    tmp = Path(tmp)
    try:
        step(lambda: model_saver(tmp))
        step(lambda: _write_own_state(tmp / INNER, optimizer, parameters, generators, world))
        step(lambda: _finish(tmp, target, state) if world.is_main else None)
    except BaseException:
        if world.is_main:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    together(world, lambda: _delete_old(run_path, state.step, total_limit) if world.is_main else None)
    return target


def on_disk(work: Callable[[], Any], refused: str) -> Any:
    """work(); a disk that refuses is a CheckpointError, `refused` with its reason."""
    try:
        return work()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(refused.format(error)) from error


def _begin(target: Path, optimizer, parameters) -> str | None:
    """A hidden directory to write into; None if the checkpoint is there."""
    if is_complete(target):
        return None
    _check_space(target.parent, optimizer, parameters)
    tmp = tempfile.mkdtemp(prefix=TMP_PREFIX, dir=target.parent)
    Path(tmp, INNER).mkdir()
    return tmp


def _write_own_state(inner: Path, optimizer, parameters, generators, world: World) -> None:
    """This rank's rows of the optimizer's state, if it is of the first copy of them, and its random generators."""
    written = []
    if optimizer is not None and world.rank < world.shards:
        packed = pack_optimizer(optimizer, parameters, first=world.is_main)
        written.append(inner / f"{part_name('optimizer', world.rank, world.shards)}.safetensors")
        save_file(packed.tensors, written[-1], packed.metadata)
        if world.is_main:
            write_json(inner / "optimizer.json", packed.plain)
    tensors, plain = rng_state(generators)
    written.append(inner / f"{part_name('rng', world.rank, world.size)}.safetensors")
    save_file(tensors, written[-1])
    written.append(written[-1].with_suffix(".json"))
    write_json(written[-1], plain)
    for path in () if world.is_main else written:  # rank 0 syncs what it sees, which may be on another machine
        fsync(path)


def _finish(tmp: Path, target: Path, state: TrainerState) -> None:
    write_json(tmp / STATE, dataclasses.asdict(state))
    config = tmp.parent / CONFIG
    if config.exists():
        shutil.copyfile(config, tmp / CONFIG)
    _commit(tmp, target, state.step)


def _commit(tmp: Path, target: Path, step: int) -> None:
    write_manifest(tmp, {"format": FORMAT, "step": step})
    tmp.chmod(0o777 & ~umask())  # mkdtemp made it private
    if target.exists():  # an incomplete one: is_complete() said so
        target.rename(Path(tempfile.mkdtemp(prefix=TRASH_PREFIX, dir=target.parent)) / target.name)
    os.replace(tmp, target)
    fsync(target.parent)


def _delete_old(run_path: Path, step: int, total_limit: int | None) -> None:
    """Drop the oldest beyond the limit. Renamed first, so that a half-deleted one is never mistaken for whole."""
    whole = [path for n, path in list_checkpoints(run_path) if n <= step and is_complete(path)]
    for path in whole[:-total_limit] if total_limit else []:
        trash = Path(tempfile.mkdtemp(prefix=TRASH_PREFIX, dir=run_path))
        path.rename(trash / path.name)
    drop_partials(run_path, TRASH_PREFIX)


def _check_space(run_path: Path, optimizer, parameters) -> None:
    need = sum(p.nbytes for _, p in parameters)
    for values in optimizer.state.values() if optimizer is not None else ():
        need += sum(v.nbytes for v in values.values() if isinstance(v, torch.Tensor))
    free = shutil.disk_usage(run_path).free
    if free < need:
        sizes = f"{need / 2**20:.0f} MiB are needed, {free / 2**20:.0f} are free"
        raise CheckpointError(f"could not save in {run_path}: {sizes}")


def save_final(run_path: Path | str, model_saver: ModelSaver, world: World = ALONE) -> None:
    """The model into run_path itself. config.json lands last: until then the directory does not load as a model.

    model_saver: as in `save_checkpoint`. Raises: CheckpointError on every rank when the disk refuses.
    """
    run_path, known = Path(run_path), (CheckpointError,)
    refused = f"could not save the model in {run_path}: {{}}"
    begin = lambda: tempfile.mkdtemp(prefix=TMP_PREFIX, dir=run_path)  # noqa: E731
    tmp = Path(on_main(world, lambda: on_disk(begin, refused), known))
    try:
        together(world, lambda: on_disk(lambda: model_saver(tmp), refused), known)
        on_main(world, lambda: on_disk(lambda: _move_in(tmp, run_path), refused), known)
    finally:
        if world.is_main:
            shutil.rmtree(tmp, ignore_errors=True)


def _move_in(tmp: Path, run_path: Path) -> None:
    files = sorted(tmp.rglob("*"), key=lambda p: (p.name == "config.json", p.suffix == ".json", p.name))
    files = [p for p in files if p.is_file()]
    for path in files:
        fsync(path)
    new = {p.relative_to(tmp).as_posix() for p in files}
    (run_path / "config.json").unlink(missing_ok=True)
    for path in files:
        place = run_path / path.relative_to(tmp)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    for old in run_path.glob("model*.safetensors*"):  # shards of an earlier, differently cut save
        if old.name not in new:
            old.unlink()
    fsync(run_path)


# -- finding and loading -----------------------------------------------------------------------------------------
def list_checkpoints(run_path: Path | str) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint-N directory, complete or not, oldest first."""
    places = [p for p in Path(run_path).glob("checkpoint-*") if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted((int(p.name.partition("-")[2]), p) for p in places)


def is_complete(path: Path) -> bool:
    """Quick look: the manifest is there and every file in it has its size."""
    return not _problems(path, hashes=False)


def find_checkpoint(run_path: Path | str, resume_from: str, notes: list[str] | None = None) -> Checkpoint | None:
    """The checkpoint that --resume_from_checkpoint names: a directory, or auto = the newest complete one in run_path.

    auto gives None only if run_path holds no checkpoint at all; damaged ones are passed over and told in `notes`.
    Raises: CheckpointError for a path that is missing or damaged, and when every checkpoint is damaged.
    """
    if resume_from != "auto":
        return load_checkpoint(resume_from)
    candidates, notes = list_checkpoints(run_path)[::-1], [] if notes is None else notes
    for _, path in candidates:
        problems = _problems(path)
        if not problems:
            return read_checkpoint(path)
        notes.append(f"passed over {path.name}, it is incomplete or damaged: {problems[0]}")
    if candidates:
        raise CheckpointError(f"no checkpoint in {run_path} is whole; not starting again from 0:{listed(notes)}")
    return None


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Verify a checkpoint against its manifest (sizes and SHA-256) and read its state.

    Raises: CheckpointError naming what is missing or changed.
    """
    path = Path(path)
    if not path.is_dir():
        near = [p.name for _, p in list_checkpoints(path.parent)] if path.parent.is_dir() else []
        hint = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise CheckpointError(f"--resume_from_checkpoint {path}: no such directory{hint}")
    inside = list_checkpoints(path)
    if inside and not (path / MANIFEST).exists():
        raise CheckpointError(f"{path} is not a checkpoint; did you mean {inside[-1][1]}?")
    problems = _problems(path)
    if problems:
        raise CheckpointError(f"{path} is incomplete or damaged:{listed(problems)}")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """State and config of a checkpoint that is known to be whole."""
    raw, known = read_json(path / STATE), {f.name for f in dataclasses.fields(TrainerState)}
    config = yaml.safe_load((path / CONFIG).read_text()) if (path / CONFIG).exists() else {}
    return Checkpoint(path, TrainerState(**{k: v for k, v in raw.items() if k in known}), config)


def _problems(path: Path, hashes: bool = True) -> list[str]:
    return differences(path, {"format": FORMAT}, required=(STATE,), hashes=hashes)


def drop_partials(run_path: Path, *prefixes: str) -> list[str]:
    """Remove what a killed save or deletion left behind. Only for the holder of the directory's lock."""
    left = [p for prefix in prefixes or (".tmp-", ".trash-") for p in Path(run_path).glob(f"{prefix}*")]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]
