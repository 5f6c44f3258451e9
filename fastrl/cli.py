"""The `fastrl` command: one for each stage, and quickstart, losses, doctor, bench. Torch loads when there is work."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable

import fastrl
from fastrl.train.config import CONFIGS
from fastrl.train.flags import ConfigError, help_text, nearest, parse

USAGE = """\
fastrl: post-training of language models; logits never formed

  fastrl sft   --model_name_or_path M --dataset_name D --output_dir O   likelihood of completions
  fastrl dpo   --model_name_or_path M --dataset_name D --output_dir O   preference pairs
  fastrl kto   --model_name_or_path M --dataset_name D --output_dir O   single answers, good or bad
  fastrl reward --model_name_or_path M --dataset_name D --output_dir O  a reward model from preference pairs
  fastrl prm   --model_name_or_path M --dataset_name D --output_dir O   a reward model of steps
  fastrl grpo  --model_name_or_path M --dataset_name D --output_dir O --reward_funcs F ...
                                                                        sampled, scored, reinforced
  fastrl rloo  --model_name_or_path M --dataset_name D --output_dir O --reward_funcs F ...
                                                                        the same, whole completions as actions
  fastrl ppo   --model_name_or_path M --dataset_name D --output_dir O --reward_model_path R
                                                                        sampled, scored, against a critic
  fastrl distill --model_name_or_path M --dataset_name D --output_dir O --teacher_model_name_or_path T
                                                                        towards a teacher, on its texts or one's own
  fastrl plan STAGE --model_name_or_path M [the stage's flags] [--device D] [--devices N] [--fit]
                                  bytes by phase, what fits, which switch buys most; nothing is loaded
  fastrl quickstart [--short]     a small model learns arithmetic: SFT, then GRPO, with plots
  fastrl losses [NAME]            every loss: paper, formula, scope, cost; one in full
  fastrl doctor                   versions, devices, optional packages
  fastrl bench [--what all]       the head against bare GEMMs and against rivals
  fastrl COMMAND --help           every flag with its default
  fastrl --version

Flags: --name value, --name=value, or name: value in a YAML file given as --config; the command line wins.
FASTRL_DEBUG=1 shows tracebacks.
"""
BAD_INPUT, INTERRUPTED = 2, 130
NOISY = ("torchao", "torch.utils._pytree")  # they warn of their own libraries while they load: nothing about the run

# Flags of other trainers that have no counterpart here -> what to do instead.
FOREIGN = {
    "trust_remote_code": "fastrl never runs code that comes with a model; use an architecture transformers knows",
    "packing": "sequences are always packed without padding; drop it",
    "packing_strategy": "sequences are always packed whole; drop it",
    "padding_free": "there is never any padding; drop it",
    "pad_to_multiple_of": "there is never any padding; drop it",
    "use_liger_kernel": "the fused head is always on; drop it",
    "generation_batch_size": "use --steps_per_generation",
    "max_tokens_per_gpu": "use --max_tokens_per_device",
    "max_seq_length": "use --max_length",
    "response_length": "use --max_completion_length",
    "total_episodes": "use --max_steps or --num_train_epochs",
    "evaluation_strategy": "use --eval_strategy",
    "torch_dtype": "use --dtype",
    "fp16": "use --bf16, or --dtype float32",
    "use_vllm": "sampling is by transformers' generation; drop it",
    "lora_task_type": "it follows the stage; drop it",
    "label_smoothing_factor": "use --label_smoothing (dpo), or `fastrl sft`",
    "push_to_hub": "nothing is uploaded; push output_dir with `hf upload`",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. 2: what was asked for cannot be done, and the message says why."""
    argv = sys.argv[1:] if argv is None else argv
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return dispatch(argv)
    except KeyboardInterrupt:
        print("fastrl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("FASTRL_DEBUG") == "1" or not is_ours(error):
            raise
        print(f"fastrl: error: {error}", file=sys.stderr)
        return BAD_INPUT


def is_ours(error: BaseException) -> bool:
    """Errors whose type fastrl defines, and those it raises of python's input-error types, are for the user to read."""
    if type(error).__module__.split(".")[0] == "fastrl":
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return isinstance(error, (ValueError, TypeError, FileNotFoundError)) and raised_in.split(".")[0] == "fastrl"


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, *rest = argv
    if command in ("-V", "--version"):
        print(f"fastrl {fastrl.__version__}")
        return 0
    if command in CONFIGS:
        return train(command, rest)
    if command in COMMANDS:
        return COMMANDS[command](rest)
    near = nearest(command, [*CONFIGS, *COMMANDS])
    raise ConfigError(f"{command!r} is not a command of fastrl (see fastrl --help){near}")


def train(command: str, argv: list[str]) -> int:
    cls = CONFIGS[command]
    if "--help" in argv or "-h" in argv:
        print(f"fastrl {command}: {(cls.__doc__ or '').partition(': ')[2]}\n\n{help_text(cls)}")
        return 0
    config = parse(cls, argv, FOREIGN)
    from fastrl.train import launch, run

    if (code := launch.start(config, command, argv)) is not None:
        return code
    result = run(config)
    if getattr(result, "interrupted", False):
        return 128 + 15
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.output_dir}: {result.steps} steps; loads with from_pretrained", file=sys.stderr)
    return 0


def quickstart(argv: list[str]) -> int:
    return importlib.import_module("fastrl.quickstart").main(argv)


def plan(argv: list[str]) -> int:
    return importlib.import_module("fastrl.train.plan.command").main(argv, FOREIGN)


def losses(argv: list[str]) -> int:
    return importlib.import_module("fastrl.losses.card").main(argv)


def bench(argv: list[str]) -> int:
    return importlib.import_module("fastrl.bench").main(argv)


def doctor(argv: list[str]) -> int:
    """What this machine has. Exit code 1 if something that fastrl needs is missing."""
    if argv:
        raise ConfigError(f"fastrl doctor takes no arguments, got {' '.join(argv)}")
    print(f"fastrl        {fastrl.__version__}\npython        {platform.python_version()} on {platform.platform()}")
    missing = [name for name in NEEDED if not _report(name, "MISSING")]
    for name, use in OPTIONAL.items():
        _report(name, f"not installed ({use})")
    _devices()
    free = shutil.disk_usage(".").free / 2**30
    print(f"disk          {free:.1f} GiB free here")
    if missing:
        print(f"\nneeded and missing: pip install {' '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


NEEDED = ("torch", "transformers", "safetensors", "pyyaml", "rich", "datasets", "matplotlib", "numpy")
OPTIONAL = {
    "triton": "fused kernels on a GPU",
    "flash-attn": "packed attention on a GPU; torch's own is used without it",
    "tensorboard": "--report_to tensorboard",
    "wandb": "--report_to wandb",
    "trl": "drop-ins for its trainers, fastrl bench",
    "peft": "--use_peft true, and adapters in the drop-ins",
    "bitsandbytes": "--load_in_4bit true, --load_in_8bit true, --optim adamw_bnb_8bit",
    "torchao": "--optim adamw_torch_8bit and adamw_torch_4bit",
    "liger-kernel": "fastrl bench",
}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": plan,
    "quickstart": quickstart,
    "losses": losses,
    "doctor": doctor,
    "bench": bench,
}


def _report(name: str, otherwise: str) -> bool:
    installed = [d for d in (name, name.replace("-", "_")) if _version(d)]
    print(f"{name:13} {_version(installed[0]) if installed else otherwise}")
    return bool(installed)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> None:
    if not importlib.util.find_spec("torch"):
        return
    import torch

    from fastrl.ops.rows_native import library

    print(f"cpu           {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    lib, state = library()
    print(f"native head   {state if lib else f'not there ({state}); the torch backend runs'}")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"cuda:{i}        {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    if not torch.cuda.device_count():
        print("cuda          no device: training runs on the CPU")
