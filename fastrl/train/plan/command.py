"""fastrl plan STAGE: where the bytes of a run will go. Nothing is trained and no weights are read.

  fastrl plan STAGE --model_name_or_path M [the stage's flags]
      --device D     h200, h100-80, a100-80, a100-40, l40s, rtx4090, cpu, or a size such as 48GiB  [what is here]
      --devices N    ranks that share the weights  [--num_processes, or 1]
      --fit          pick switches until it fits, the cheapest first, and print the flags to add
      --json         numbers for a program
      --brief        the table alone: no switches are tried

--dataset_name, --output_dir and --reward_funcs are not needed here. The exit code is 1 if the run does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastrl.train.config import CONFIGS, TrainConfig
from fastrl.train.flags import ConfigError, load_yaml, nearest, parse, split_flags

OWN = ("device", "devices", "fit", "json", "brief")
UNREAD = {"dataset_name": ["not-read"], "output_dir": ["not-read"], "reward_funcs": ["not-read"]}


def main(argv: list[str], hints: dict[str, str] | None = None) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print((__doc__ or "").strip())
        return 0
    stage, *rest = argv
    if stage not in CONFIGS:
        raise ConfigError(
            f"fastrl plan takes a stage first ({', '.join(CONFIGS)}), got {stage!r}{nearest(stage, CONFIGS)}"
        )
    own, flags = _own(split_flags(rest))
    config = _config(stage, flags, hints)

    from fastrl.train.plan import MemoryModel, device_of, report
    from fastrl.train.plan.switches import fit, tried

    ranks = own.get("devices") or config.num_processes or 1
    model = MemoryModel(config, device_of(own.get("device")), ranks)
    trials = [] if own.get("brief") else tried(model)
    found = fit(model) if own.get("fit") else None
    if own.get("json"):
        print(json.dumps(report.record(model, trials, found), indent=1))
    else:
        print(report.text(model, trials, found))
    return 0 if model.fits() else 1


def _own(flags: dict[str, list[str]]) -> tuple[dict, dict[str, list[str]]]:
    """(the flags of `plan` itself, the stage's). Raises ConfigError for a bad number of devices."""
    own: dict = {}
    for name in OWN:
        if name not in flags:
            continue
        words = flags.pop(name)
        if name in ("fit", "json", "brief"):
            own[name] = words in ([], ["true"])
        elif len(words) != 1:
            raise ConfigError(f"--{name} takes one value, got {len(words)}")
        else:
            own[name] = words[0]
    if "devices" in own:
        if not own["devices"].isdigit() or int(own["devices"]) < 1:
            raise ConfigError(f"--devices must be a whole number of at least 1, got {own['devices']!r}")
        own["devices"] = int(own["devices"])
    return own, flags


def _config(stage: str, flags: dict[str, list[str]], hints: dict[str, str] | None) -> TrainConfig:
    """The stage's config; flags that a plan does not read may be missing."""
    cls = CONFIGS[stage]
    given = set(flags)
    if "config" in flags and len(flags["config"]) == 1 and Path(flags["config"][0]).is_file():
        given |= {str(key).replace("-", "_") for key in load_yaml(flags["config"][0])}
    missing = {n: w for n, w in UNREAD.items() if n in cls.__dataclass_fields__ and n not in given}
    argv = [word for name, words in {**flags, **missing}.items() for word in (f"--{name}", *words)]
    return parse(cls, argv, hints)
