"""The loop. Read aloud: collect samples, take their loss through the fused head, add the gradients up, step.

Every stage runs through `train`; what differs between them is where prompts and responses come from and the gradient
coefficient, and that lives in fastrl/train/stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fastrl.train.budget import BUDGET, accumulate, budget_state, go_on_with, news, scored
from fastrl.train.checkpoint import CheckpointError, TrainerState, save_checkpoint, save_final
from fastrl.train.config import TrainConfig
from fastrl.train.metrics import MetricsLogger
from fastrl.train.optim import Schedule, StepGuard, build_optimizer, notes_of
from fastrl.train.output_dir import Run, StopRequest, start_run, stopping
from fastrl.train.parallel import ALONE, World, joined
from fastrl.train.plots import plot_run
from fastrl.train.probe import probe
from fastrl.train.step import loss_of, prepare
from fastrl.train.workbench import Workbench, build


@dataclass
class TrainResult:
    """output_dir: holds the model. steps: optimizer steps done. metrics: the last evaluation, or the last record.
    history: every record of metrics.jsonl made by this call. interrupted: stopped by a signal after a checkpoint."""

    output_dir: Path
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    interrupted: bool = False


def train(config: TrainConfig) -> TrainResult:
    """Run one stage from a model directory and a dataset to a better model directory."""
    with joined(config) as world, start_run(config, world) as run, StopRequest() as stop:
        bench = build(config, run, world)
        return fit(bench, config, run, stop, world)


def fit(bench: Workbench, config: TrainConfig, run: Run, stop: StopRequest, world: World = ALONE) -> TrainResult:
    """The loop itself; on every rank."""
    model, stage = bench.model, bench.stage
    watch, unit = getattr(stage, "watch", None), getattr(stage, "unit", 1)
    by = partial(scored, stage.setting, unit=unit)
    total = config.total_steps(stage.steps_per_epoch)
    probe(stage, stage.setting)
    optimizer = build_optimizer(model, config)
    schedule = Schedule.from_config(config, total)
    guard = StepGuard.from_config(optimizer, model, config)
    fresh = TrainerState(stage=config.stage, dataset_fingerprint=bench.fingerprint)
    state = resume(bench, run, optimizer, guard, world) or fresh
    with MetricsLogger(config, total, resume=state if run.resume else None, world=world) as log:
        log.note(*run.notes, *bench.notes, *notes_of(model, config), *news(stage.setting))
        if config.eval_on_start and state.step == 0:
            log.eval(0, 0.0, stage.evaluate(log))

        while state.step < total and not stopping(stop, world):
            lr = schedule.lr(state.step)
            with log.timing("step"):
                micro_batches = stage.collect(log)  # prompts x responses x coefficients, global counts included
                micro_batches = prepare(model, stage.objective, micro_batches, stage.how, world, by=by)
                with log.timing("update"):
                    loss = partial(loss_of, model, stage.objective, how=stage.how)
                    rounds = {"rounds": partial(guard.rounds, lr=lr), "moved": lambda: guard.moved}
                    for micro, out in accumulate(stage.setting, loss, micro_batches, unit, **rounds):
                        log.add({"loss": out.loss, **out.metrics})
                        if micro.empty:
                            continue
                        log.count_tokens(micro.num_tokens)
                        if watch is not None:
                            watch(out, log)
                    outcome = guard.step(lr)
            state.step += 1
            state.epoch = state.step / stage.steps_per_epoch
            if outcome.skipped:
                log.skipped(outcome)
            log.note(*([outcome.note] if outcome.note else []), *news(stage.setting))
            log.end_step(state.step, state.epoch, {"learning_rate": lr, "grad_norm": outcome.grad_norm})
            if config.is_due("eval", state.step, total, stage.steps_per_epoch):
                log.eval(state.step, state.epoch, stage.evaluate(log))
                log.note(*news(stage.setting))
            if config.is_due("save", state.step, total, stage.steps_per_epoch):
                save(bench, run, state, optimizer, guard, log)

        interrupted = state.step < total
        if interrupted:
            save(bench, run, state, optimizer, guard, log, last=True)
            log.note(f"stopped by a signal after step {state.step} of {total}; --resume_from_checkpoint auto goes on")
        else:
            save_final(run.path, bench.save_model, world)
            if world.is_main:
                bench.merge(run.path)
        history = list(log.history)
    if world.is_main:
        plot_run(run.path)
    return TrainResult(run.path, state.step, history[-1] if history else {}, history, interrupted)


def resume(bench: Workbench, run: Run, optimizer, guard: StepGuard, world: World) -> TrainerState | None:
    """Put sampler, optimizer and random generators back as the checkpoint has them, or return None without one."""
    if run.resume is None:
        return None
    sampler = dict(run.resume.state.sampler)
    go_on_with(bench.stage.setting, sampler.pop(BUDGET, None))
    bench.stage.load_state_dict(sampler)
    options = {"generators": bench.generators, "dataset_fingerprint": bench.fingerprint, "world": world}
    run.notes += run.resume.restore(optimizer, guard.named_parameters, **options)
    guard.skipped = run.resume.state.skipped_steps
    return run.resume.state


def save(bench: Workbench, run: Run, state: TrainerState, optimizer, guard, log: MetricsLogger, last=False) -> None:
    """checkpoint-<step>. A disk that refuses is reported and training goes on: earlier checkpoints are untouched.

    last: nothing comes after this save, so a disk that refuses raises CheckpointError.
    """
    state.sampler = {**bench.stage.state_dict(), BUDGET: budget_state(bench.stage.setting)}
    state.metrics = log.state_dict()
    state.num_tokens, state.skipped_steps = log.num_tokens, guard.skipped
    try:
        with log.timing("save"):
            save_checkpoint(
                run.path,
                state,
                bench.save_model,
                optimizer,
                guard.named_parameters,
                generators=bench.generators,
                total_limit=bench.stage.setting.config.save_total_limit,
                world=bench.stage.setting.world,
            )
    except CheckpointError as error:
        if last:
            raise
        log.note(str(error))
