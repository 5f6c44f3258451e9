"""The trackers of --report_to: anything with log(record) and close(). Loaded only when asked for."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

from fastrl.train.config import TrainConfig
from fastrl.train.flags import ConfigError


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorboardTracker:
    """Event files in output_dir/tensorboard."""

    def __init__(self, config: TrainConfig):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(f"{config.output_dir}/tensorboard")

    def log(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                group = "eval" if name.startswith("eval_") else "train"
                self.writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, int(record["step"]))

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A Weights & Biases run; project, mode and key come from the WANDB_* environment variables."""

    def __init__(self, config: TrainConfig):
        import wandb

        from fastrl.train.output_dir import redact

        self.run = wandb.init(name=config.run_name or config.output_dir, config=redact(config.to_dict()))

    def log(self, record: dict[str, Any]) -> None:
        self.run.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorboardTracker, "wandb": WandbTracker}


def open_trackers(config: TrainConfig) -> list[Tracker]:
    """Those named in --report_to; `all` means those that are installed.

    Raises: ConfigError if one that is named is not installed.
    """
    installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
    names = installed if "all" in config.report_to else [n for n in config.report_to if n != "none"]
    for name in names:
        if name not in installed:
            raise ConfigError(f"--report_to {name}: {name} is not installed; pip install {name}, or drop it")
    return [TRACKERS[name](config) for name in names]
