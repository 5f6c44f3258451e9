"""Bytes of every phase of a run on one device, for any number of tokens in a micro-batch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property

import torch

from fastrl.train.config import TrainConfig
from fastrl.train.plan.curves import Curve
from fastrl.train.plan.device import Device
from fastrl.train.plan.head import HeadShape, workspace
from fastrl.train.plan.measure import curve_of, kv_bytes
from fastrl.train.plan.optimizer import state_bytes, step_bytes
from fastrl.train.plan.shape import Shape, shape_of
from fastrl.train.plan.skeleton import Sizes, architecture, needs_reference, parts_of, sizes
from fastrl.train.plan.trace import How

QUANTISED = {"load_in_4bit": 0.5 + 4 / 64, "load_in_8bit": 1.0}  # bytes an entry, scales of 64 included
NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)
LOGITS_BYTES, CACHED_TOKENS = 1 << 30, 131072  # fastrl.rollout.transformers
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Phase:
    """rows: what fills the device, by name, in bytes."""

    name: str
    rows: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.rows.values())


@dataclass(frozen=True)
class Estimate:
    """tokens: of a micro-batch. phases: in the order of a step; the largest decides."""

    tokens: int
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def total(self) -> int:
        return self.peak.total


@dataclass
class MemoryModel:
    """What a config takes on a device, of `ranks` equal ones. Curves are kept in `cache`, which trials may share."""

    config: TrainConfig
    device: Device
    ranks: int = 1
    shape: Shape | None = None
    cache: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.parts = parts_of(self.config)
        self.architectures = {
            p.role: self._kept(("architecture", p.path, p.revision), architecture, p) for p in self.parts
        }
        if self.shape is None:
            self.shape = shape_of(self.config, self.architectures["policy"])
        self.notes = list(dict.fromkeys([*self.notes, *self.shape.notes]))

    def _kept(self, key: tuple, make, *args):
        if key not in self.cache:
            self.cache[key] = make(*args)
        return self.cache[key]

    # -- what is there all the time ------------------------------------------------------------------------------------
    @cached_property
    def sizes(self) -> dict[str, Sizes]:
        flags = _subset(self.config, SIZED)
        made = {}
        for part in self.parts:
            key = ("sizes", part, flags)
            made[part.role] = self._kept(key, sizes, part, self.architectures[part.role], self.config)
        return made

    @cached_property
    def autocast(self) -> torch.dtype | None:
        asked = self.device.kind == "cuda" if self.config.bf16 is None else self.config.bf16
        return torch.bfloat16 if asked else None

    @cached_property
    def split(self) -> int:
        """Ranks that share one copy of the weights."""
        kind = self.config.sharding
        if self.ranks == 1 or kind == "none":
            return 1
        return self.ranks if kind == "full" else min(self.ranks, self.config.shard_size or self.ranks)

    @property
    def trained(self) -> list[Sizes]:
        return [self.sizes[p.role] for p in self.parts if p.trained]

    @cached_property
    def weights(self) -> dict[str, int]:
        """By role; of a split model with the layers that are whole while they run."""
        made = {}
        for part in self.parts:
            own = self.sizes[part.role]
            total = own.weights
            if part.role == "policy" and (rate := self._quantised_rate()) is not None:
                size = own.weights / max(1, own.parameters)
                total = int(own.weights - own.quantised * (size - rate)) + 2 * own.widest
            if self.split > 1:
                total = total // self.split + own.outside + 2 * own.layer
            made[part.role] = 0 if self.config.cpu_offload and self.device.kind == "cuda" else total
        return made

    def _quantised_rate(self) -> float | None:
        config = self.config
        if config.load_in_4bit and config.use_bnb_nested_quant:
            return NESTED
        return next((rate for name, rate in QUANTISED.items() if getattr(config, name)), None)

    @cached_property
    def optimizer(self) -> int:
        if self.device.kind == "cuda" and (self.config.optim_offload or self.config.cpu_offload):
            return 0
        return sum(state_bytes(self.config, s.shapes) for s in self.trained) // self.split

    # -- phases --------------------------------------------------------------------------------------------------------
    def estimate(self, tokens: int | None = None, longest: int | None = None) -> Estimate:
        """tokens: of a micro-batch, longest: of a sequence in it; None: what the config says."""
        tokens = self.shape.tokens if tokens is None else tokens
        longest = min(self.shape.longest if longest is None else longest, tokens)
        made = [self._loading()] if self.device.kind == "cpu" else []
        if self.shape.new_tokens:
            made.append(self._sampling())
        if self._scored():
            made.append(self._scoring(tokens, longest))
        made += [self._update(tokens, longest), self._step()]
        return Estimate(tokens, tuple(Phase(p.name, {n: int(x) for n, x in p.rows.items() if x}) for p in made))

    def _standing(self, *roles: str) -> dict[str, int]:
        """Weights of the policy, and of the other parts that are there in this phase; none named: all."""
        kept = {"weights": self.weights["policy"]}
        kept |= {r: x for r, x in self.weights.items() if r != "policy" and (not roles or r in roles)}
        return kept | {"runtime": self.device.base}

    def _resident(self) -> dict[str, int]:
        """Of the update: a reference that has scored the data before the first step is gone."""
        gone = getattr(self.config, "precompute_ref_log_probs", False)
        roles = [p.role for p in self.parts if not (gone and p.role == "reference")]
        return self._standing(*roles, "policy")

    def _loading(self) -> Phase:
        """A model is copied out of its files, which are mapped into memory while that goes on."""
        last = self.parts[-1].role
        return Phase("loading", self._standing() | {"files": self.weights[last]})

    def _scoring(self, tokens: int, longest: int) -> Phase:
        role = self._scored()
        curve = self._curve((role,), How(False, **self._common()))
        head = self._workspace(role, tokens, trained=False)
        moment = curve.peak(tokens // self._sequence, longest // self._sequence, head)
        first = getattr(self.config, "precompute_ref_log_probs", False)  # before there are states
        rows = {"activations": moment.others, "head workspace": head if moment.head else 0}
        return Phase("scoring", self._standing() | {"optimizer": 0 if first else self.optimizer} | rows)

    def _update(self, tokens: int, longest: int) -> Phase:
        roles = tuple(p.role for p in self.parts if p.trained)
        several = self.shape.step_tokens > tokens
        config = self.config
        how = How(True, accumulate=several, in_backward=config.optimizer_in_backward, **self._common())
        curve = self._curve(roles, how)
        head = self._workspace("policy", tokens, trained=True)
        tokens, longest = tokens // self._sequence, longest // self._sequence
        moment = curve.peak(tokens, longest, head, 1 / self.split)
        work = step_bytes(config, self.device.kind, self._all_shapes()) if config.optimizer_in_backward else 0
        rows = {
            "gradients": moment.gradients / self.split + self._whole_gradients(),
            "optimizer": self.optimizer,
            "optimizer's work": work // self.split,
            "activations": max(0, moment.others - self._offloaded(tokens)),
            "head workspace": head if moment.head else 0,
        }
        return Phase("update", self._resident() | rows)

    def _step(self) -> Phase:
        config = self.config
        gradients = sum(s.gradients for s in self.trained) // self.split
        if config.optimizer_in_backward:
            gradients = max(s.largest for s in self.trained)
        work = step_bytes(config, self.device.kind, self._all_shapes()) // self.split
        rows = {"gradients": gradients, "optimizer": self.optimizer, "optimizer's work": work}
        return Phase("optimizer step", self._resident() | rows)

    def _all_shapes(self) -> list:
        return [shape for s in self.trained for shape in s.shapes]

    def _sampling(self) -> Phase:
        """A batch of the sampler: its KV cache at full length, and the next tokens' logits."""
        shape, arch = self.shape, self.architectures["policy"]
        words = arch.get_text_config().vocab_size
        width = shape.prompt + shape.new_tokens
        rows = max(1, min(shape.sampled, LOGITS_BYTES // (16 * words), CACHED_TOKENS // width))
        key = self._key(("cache",), SIZED)
        fixed, each = self._kept(key, kv_bytes, self.parts[0], arch, self.config, self.autocast)
        copies = self.sizes["policy"].weights // 2 if self.autocast and self.config.dtype == "float32" else 0
        rows_of = {"KV cache": rows * (fixed + each * width), "logits": 16 * rows * words, "bf16 weights": copies}
        return Phase("sampling", self._standing() | {"optimizer": self.optimizer} | rows_of)

    # -- their parts ---------------------------------------------------------------------------------------------------
    @property
    def _sequence(self) -> int:
        return self.config.sequence_parallel_size

    def _scored(self) -> str | None:
        """Who scores samples before an update, if anybody does."""
        there = {p.role for p in self.parts}
        found = next((r for r in ("reference", "teacher", "reward model") if r in there), None)
        online = getattr(self.config, "updates_per_generation", 1) > 1
        own = online or self.config.stage == "ppo" or needs_reference(self.config)  # its base may be the reference
        return found or ("policy" if own else None)

    def _common(self) -> dict:
        return {
            "autocast": self.autocast,
            "share": self.shape.trained,
            "lengths": self.shape.layout(self.device.kind),
            "parents": self.shape.parents(self.device.kind),
        }

    def _key(self, head: tuple, flags: tuple[str, ...]) -> tuple:
        return (*head, self.autocast, _subset(self.config, flags))

    def _curve(self, roles: tuple[str, ...], how: How) -> Curve:
        parts = [p for r in roles for p in self.parts if p.role == r]
        key = self._key(("curve", tuple(parts), how), TRACED if how.backward else SCORED)
        architectures = [self.architectures[r] for r in roles]
        curve = self._kept(key, curve_of, parts, architectures, self.config, how)
        self.notes += [note for note in curve.notes if note not in self.notes]
        return curve

    def _workspace(self, role: str, tokens: int, trained: bool) -> int:
        part, arch = next(p for p in self.parts if p.role == role), self.architectures[role].get_text_config()
        if not part.auto.endswith("CausalLM"):
            return 0
        dtype = self.autocast or getattr(torch, self.config.dtype if self.config.dtype != "auto" else "float32")
        rows = max(1, round(tokens // self._sequence * self.shape.trained))
        return workspace(HeadShape(rows, arch.hidden_size, arch.vocab_size, dtype, self.device.kind, trained))

    def _offloaded(self, tokens: int) -> float:
        """Bytes of layers' inputs that are in CPU memory when most lives: all but two."""
        config, arch = self.config, self.architectures["policy"].get_text_config()
        if not (config.activation_offloading and config.gradient_checkpointing) or self.device.kind == "cpu":
            return 0.0
        size = 2 if self.autocast or config.dtype == "bfloat16" else 4
        return max(0, arch.num_hidden_layers - 2) * tokens * arch.hidden_size * size

    def _whole_gradients(self) -> int:
        """Of a split model: gradients of the head and of one layer before they are summed over the ranks."""
        return 0 if self.split == 1 else sum(s.outside + s.layer for s in self.trained)

    # -- the other way round -------------------------------------------------------------------------------------------
    def fits(self, tokens: int | None = None, longest: int | None = None) -> bool:
        return self.estimate(tokens, longest).total <= self.device.usable

    def most_tokens(self, as_one: bool = False) -> int:
        """Most tokens of a micro-batch that fit, to 1%; in one sequence, or in sequences as the config has them."""

        def good(tokens: int) -> bool:
            return self.fits(tokens, tokens if as_one else None)

        low, high = 0, 256
        while good(high) and high < MOST_TOKENS:
            low, high = high, high * 2
        while high - low > max(16, high // 128):
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low


# Flags that change the sizes of weights, and what a trace sees.
SIZED = (
    "dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_rslora",
    "use_dora",
)  # fmt: skip
SCORED = (*SIZED, "tiled_mlp", "fp32_modules", "attn_implementation")
TRACED = (*SCORED, "lora_dropout", "gradient_checkpointing", "gradient_checkpointing_policy", "disable_dropout")


def _subset(config: TrainConfig, names: tuple[str, ...]) -> str:
    return json.dumps({n: getattr(config, n, None) for n in names})
