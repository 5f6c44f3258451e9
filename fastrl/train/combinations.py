"""What goes together: stages, memory switches and devices. One table of switches, one list of rules, one written page.

`check` is called by every config, before anything is loaded; `check_model` once the model and the ranks are known.
`python -m fastrl.train.combinations` prints docs/combinations.md: a cell is "yes" where the config is accepted, and
tests/test_combinations.py trains a step in every such cell. Nothing here imports torch by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from fastrl.train.flags import ConfigError


@dataclass(frozen=True)
class Rule:
    """Refused where `applies`. flags: what is said to be given. why: the reason. instead: the nearest that works."""

    flags: tuple[str, ...]
    applies: Callable[[Any], bool]
    why: str
    instead: str

    def message(self, config: Any) -> str:
        given = " ".join(f"--{name} {shown(getattr(config, name))}" for name in self.flags)
        return f"{given}: {self.why}; {self.instead}"


def shown(value: Any) -> str:
    """As on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


# -- of flags alone ----------------------------------------------------------------------------------------------------
# Each flag's own file checks what concerns that file alone.
RULES: tuple[Rule, ...] = (
    Rule(
        ("bf16_update", "use_peft"),
        lambda c: c.use_peft and c.bf16_update != "none",
        "adapters are trained in float32 beside a bfloat16 base and lose no update",
        "drop --bf16_update",
    ),
    Rule(
        ("optim", "use_peft"),
        lambda c: c.use_peft and c.optim == "muon" and not c.lora_modules_to_save,
        "Muon moves whole matrices of linear layers, and none of those is trained",
        "use --optim adamw_torch",
    ),
    Rule(
        ("load_in_8bit", "use_dora"),
        lambda c: c.load_in_8bit and c.use_dora,
        "DoRA reads the norms of the base weights, and bitsandbytes' 8-bit layers do not bear being read",
        "use --load_in_4bit true, or LoRA",
    ),
)


def check(config: Any) -> None:
    """Raises ConfigError for flags that do not go together."""
    for rule in RULES:
        if all(hasattr(config, name) for name in rule.flags) and rule.applies(config):
            raise ConfigError(rule.message(config))


# -- of flags and where they run ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Facts:
    """What is known once the run has started: the device's type and the number of ranks."""

    device: str = "cpu"
    ranks: int = 1


def check_model(config: Any, facts: Facts) -> list[str]:
    """Lines about switches that do nothing here. What a model or a device cannot do is refused where it is loaded."""
    if facts.ranks > 1:
        return []
    only = {"sharding": "full", "shard_size": None, "cpu_offload": False}
    changed = [name for name, off in only.items() if getattr(config, name) != off]
    return [f"--{name} {shown(getattr(config, name))} does nothing on one process" for name in changed]


# -- the table ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Switch:
    """flags: what turns it on. ranks: processes that it needs. cuda: whether it needs a GPU to do anything."""

    flags: dict[str, Any]
    ranks: int = 1
    cuda: bool = False
    extra: str = ""  # a package that is not among the requirements


SWITCHES: dict[str, Switch] = {
    "no checkpointing": Switch({"gradient_checkpointing": False}),
    "selective checkpointing": Switch({"gradient_checkpointing_policy": "selective"}),
    "activation_offloading": Switch({"activation_offloading": True}, cuda=True),
    "tiled_mlp": Switch({"tiled_mlp": 3}),
    "torch_compile": Switch({"torch_compile": True}),
    "fp8": Switch({"fp8": "tensorwise"}, cuda=True, extra="torchao"),
    "bf16": Switch({"bf16": True}),
    "fp32_modules": Switch({"bf16": True, "fp32_modules": ["*norm"]}),
    "adamw 8bit": Switch({"optim": "adamw_torch_8bit"}, extra="torchao"),
    "adamw 4bit": Switch({"optim": "adamw_torch_4bit"}, extra="torchao"),
    "muon": Switch({"optim": "muon"}),
    "sgd": Switch({"optim": "sgd"}),
    "adafactor": Switch({"optim": "adafactor"}),
    "adamw bnb 8bit": Switch({"optim": "adamw_bnb_8bit"}, cuda=True, extra="bitsandbytes"),
    "optim_offload": Switch({"optim_offload": True}, cuda=True),
    "optimizer_in_backward": Switch({"optimizer_in_backward": True, "max_grad_norm": 0.0}),
    "clip_two_pass": Switch({"optimizer_in_backward": True, "clip_two_pass": True, "max_grad_norm": 1.0}),
    "stochastic rounding": Switch({"dtype": "bfloat16", "bf16_update": "stochastic"}),
    "Kahan sums": Switch({"dtype": "bfloat16", "bf16_update": "kahan"}),
    "LoRA": Switch({"use_peft": True}, extra="peft"),
    "DoRA": Switch({"use_peft": True, "use_dora": True}, extra="peft"),
    "QLoRA 4bit": Switch({"use_peft": True, "load_in_4bit": True}, extra="bitsandbytes"),
    "QLoRA 8bit": Switch({"use_peft": True, "load_in_8bit": True}, extra="bitsandbytes"),
    "no shared prompts": Switch({"share_prompts": False}),
    "probe_memory": Switch({"probe_memory": True}),
    "precomputed reference": Switch({"precompute_ref_log_probs": True}),
    "sharding full": Switch({}, ranks=2),
    "sharding none": Switch({"sharding": "none"}, ranks=2),
    "sharding hybrid": Switch({"sharding": "hybrid", "shard_size": 1}, ranks=2),
    "cpu_offload": Switch({"cpu_offload": True}, ranks=2, cuda=True),
    "sequence_parallel_size": Switch({"sequence_parallel_size": 2}, ranks=2),
}
# What a stage needs to be told before anything else, for the table; files are not looked for.
NEEDS: dict[str, dict[str, Any]] = {
    "grpo": {"reward_funcs": ["length"], "num_generations": 2},
    "rloo": {"reward_funcs": ["length"], "num_generations": 2},
    "ppo": {"reward_funcs": ["length"]},
    "distill": {"teacher_model_name_or_path": "teacher"},
}


SPLIT = "--optim adafactor does not know weights that are split over ranks"
# Switches that are refused together only once the number of ranks is known -> how the message begins.
LATER: dict[tuple[str, ...], str] = {
    ("adafactor", "sharding full"): SPLIT,
    ("adafactor", "sequence_parallel_size"): SPLIT,
    ("muon", "optimizer_in_backward", "sharding full"): "--optim muon gathers each matrix from all ranks",
}


def refusal(stage: str, *switches: str, **more: Any) -> str | None:
    """Why `fastrl stage` with these switches is refused; "" where it is accepted, None where the stage lacks a flag."""
    from fastrl.train.config import CONFIGS

    cls, flags = CONFIGS[stage], {}
    for name in switches:
        for flag, value in SWITCHES[name].flags.items():
            if flags.setdefault(flag, value) != value:
                return None  # two settings of one flag
    known = {f.name for f in fields(cls)}
    if not known >= flags.keys():
        return None
    paths = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "out"}
    try:
        cls(**{**paths, **NEEDS.get(stage, {}), **flags, **more})
    except ConfigError as error:
        return "" if "pip install" in str(error) else str(error)  # with the package it is accepted
    return ""


def table_of_stages(notes: list[str]) -> list[str]:
    """Stages down, switches across, turned: a line for each switch."""
    from fastrl.train.config import CONFIGS

    lines = ["| | " + " | ".join(CONFIGS) + " |", "|-" * (len(CONFIGS) + 1) + "|"]
    for name in SWITCHES:
        cells = [cell(refusal(stage, name), notes) for stage in CONFIGS]
        lines.append(f"| {titled(name)} | " + " | ".join(cells) + " |")
    return lines


def table_of_pairs(notes: list[str], stage: str = "sft") -> list[str]:
    """Switch by switch: only the pairs that are refused, as a list would be long and a square unreadable."""
    lines, names = [], list(SWITCHES)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if refusal(stage, a) == refusal(stage, b) == "" and (why := refusal(stage, a, b)):
                lines.append(f"| {titled(a)} | {titled(b)} | {cell(why, notes)} |")
    return ["| | | |", "|-|-|-|", *lines] if lines else ["Every two switches go together."]


def titled(name: str) -> str:
    """A name that is a flag is set as one."""
    return f"`--{name}`" if name in SWITCHES[name].flags else name


def cell(why: str | None, notes: list[str]) -> str:
    if why is None:
        return ""
    if not why:
        return "yes"
    if why not in notes:
        notes.append(why)
    return f"no ({notes.index(why) + 1})"


PAGE = """\
# What goes together

Made by `python -m fastrl.train.combinations`; `tests/test_combinations.py` holds this page to it and trains a step in
every cell that says yes (`--torch_compile`: with `sft` alone). An empty cell: the stage has no such flag. A number in
brackets: refused before anything is loaded, with the message below.

Only on a GPU, and without effect or refused elsewhere: {cuda}.

## Stages and switches

{stages}

## Switches that exclude each other

Shown for `fastrl sft`; what is not listed goes together, and every two of them have trained a step side by side.

{pairs}

Refused once the ranks are there:

{later}

## Messages

{notes}
"""


def page() -> str:
    """docs/combinations.md."""
    notes: list[str] = []
    stages, pairs = table_of_stages(notes), table_of_pairs(notes)
    cuda = ", ".join(titled(name) for name, switch in SWITCHES.items() if switch.cuda)
    listed = [f"{i}. {note}" for i, note in enumerate(notes, 1)] or ["None."]
    later = "\n".join(f"- {', '.join(map(titled, names))}: {why}" for names, why in LATER.items())
    return PAGE.format(
        stages="\n".join(stages), pairs="\n".join(pairs), notes="\n".join(listed), cuda=cuda, later=later
    )


if __name__ == "__main__":
    print(page(), end="")
