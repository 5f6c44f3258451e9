"""The loop. Read aloud: collect samples, take their loss through the fused head, add the gradients up, step.

Every stage runs through `train`; what differs between them is where prompts and responses come from and the gradient
coefficient, and that lives in fastrl/train/stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastrl.train.checkpoint import CheckpointError, TrainerState, save_checkpoint, save_final
from fastrl.train.config import TrainConfig
from fastrl.train.metrics import MetricsLogger
from fastrl.train.optim import Schedule, StepGuard, build_optimizer
from fastrl.train.output_dir import Run, StopRequest, start_run
from fastrl.train.plots import plot_run
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
    with start_run(config) as run, StopRequest() as stop:
        bench = build(config, run)
        return fit(bench, config, run, stop)


def fit(bench: Workbench, config: TrainConfig, run: Run, stop: StopRequest) -> TrainResult:
    """The loop itself."""
    model, stage = bench.model, bench.stage
    watch = getattr(stage, "watch", None)
    total = config.total_steps(stage.steps_per_epoch)
    optimizer = build_optimizer(model, config)
    schedule = Schedule.from_config(config, total)
    guard = StepGuard(optimizer, list(model.named_parameters()), config.max_grad_norm, config.max_skipped_steps)
    fresh = TrainerState(stage=config.stage, dataset_fingerprint=bench.fingerprint)
    state = resume(bench, run, optimizer, guard) or fresh
    with MetricsLogger(config, total, resume=state if run.resume else None) as log:
        log.note(*run.notes, *bench.notes)
        if config.eval_on_start and state.step == 0:
            log.eval(0, 0.0, stage.evaluate(log))

        while state.step < total and not stop.requested:
            lr = schedule.lr(state.step)
            with log.timing("step"):
                micro_batches = stage.collect(log)  # prompts x responses x coefficients, global counts included
                micro_batches = prepare(model, stage.objective, micro_batches, stage.how)
                with log.timing("update"):
                    for micro in micro_batches:
                        out = loss_of(model, stage.objective, micro, stage.how)
                        out.loss.backward()
                        log.add({"loss": out.loss.detach(), **out.metrics})
                        log.count_tokens(micro.input_ids.shape[0])
                        if watch is not None:
                            watch(out, log)
                    outcome = guard.step(lr)
            state.step += 1
            state.epoch = state.step / stage.steps_per_epoch
            if outcome.skipped:
                log.skipped(outcome)
            log.end_step(state.step, state.epoch, {"learning_rate": lr, "grad_norm": outcome.grad_norm})
            if config.is_due("eval", state.step, total, stage.steps_per_epoch):
                log.eval(state.step, state.epoch, stage.evaluate(log))
            if config.is_due("save", state.step, total, stage.steps_per_epoch):
                save(bench, run, state, optimizer, guard, log)

        interrupted = state.step < total
        if interrupted:
            save(bench, run, state, optimizer, guard, log, last=True)
            log.note(f"stopped by a signal after step {state.step} of {total}; --resume_from_checkpoint auto goes on")
        else:
            save_final(run.path, bench.save_model)
        history = list(log.history)
    plot_run(run.path)
    return TrainResult(run.path, state.step, history[-1] if history else {}, history, interrupted)


def resume(bench: Workbench, run: Run, optimizer, guard: StepGuard) -> TrainerState | None:
    """Put sampler, optimizer and random generators back as the checkpoint has them, or return None without one."""
    if run.resume is None:
        return None
    bench.stage.load_state_dict(run.resume.state.sampler)
    run.resume.restore(
        optimizer, guard.named_parameters, generators=bench.generators, dataset_fingerprint=bench.fingerprint
    )
    guard.skipped = run.resume.state.skipped_steps
    return run.resume.state


def save(bench: Workbench, run: Run, state: TrainerState, optimizer, guard, log: MetricsLogger, last=False) -> None:
    """checkpoint-<step>. A disk that refuses is reported and training goes on: earlier checkpoints are untouched.

    last: nothing comes after this save, so a disk that refuses raises CheckpointError.
    """
    state.sampler, state.metrics = bench.stage.state_dict(), log.state_dict()
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
            )
    except CheckpointError as error:
        if last:
            raise
        log.note(str(error))
