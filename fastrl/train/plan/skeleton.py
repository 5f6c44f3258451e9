"""The models of a run without their weights: of full depth to count parameters, of a few layers to run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastrl.models.packed import PackedModel
from fastrl.train.config import TrainConfig

# stage -> transformers' auto class of the model that is trained
CLASSIFIERS = {"reward": "AutoModelForSequenceClassification", "prm": "AutoModelForTokenClassification"}
CAUSAL, SCORED = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Part:
    """One model of a run. role: policy, critic, reference, teacher or reward model. auto: transformers' class."""

    role: str
    path: str
    auto: str = CAUSAL
    revision: str = "main"
    dtype: str | None = None  # none: the config's

    @property
    def trained(self) -> bool:
        return self.role in ("policy", "critic")


def parts_of(config: TrainConfig) -> list[Part]:
    """The policy first."""
    path, revision = config.model_name_or_path, config.model_revision
    made = [Part("policy", path, CLASSIFIERS.get(config.stage, CAUSAL), revision)]
    if config.stage == "ppo":
        critic = config.value_model_path or config.reward_model_path or path
        made.append(Part("critic", critic, SCORED, revision if critic == path else "main"))
        if config.reward_model_path:
            made.append(Part("reward model", config.reward_model_path, SCORED))
    if needs_reference(config) and not getattr(config, "use_peft", False):
        made.append(Part("reference", path, CAUSAL, revision))
    if config.stage == "distill" and config.teacher_model_name_or_path:
        teacher = (config.teacher_model_name_or_path, CAUSAL, config.teacher_model_revision, config.teacher_dtype)
        made.append(Part("teacher", *teacher))
    return made


def needs_reference(config: TrainConfig) -> bool:
    return bool(getattr(config, "needs_reference", getattr(config, "beta", 0.0)))


# -- configurations ----------------------------------------------------------------------------------------------------
def architecture(part: Part) -> Any:
    """transformers' config of a part; nothing else of the model is read."""
    from transformers import AutoConfig

    from fastrl.models.load import base_of, refuse_foreign_code

    path, revision = base_of(part.path) or (part.path, part.revision)  # the base of a directory of adapters
    refuse_foreign_code(path, revision)
    return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)


def depth(arch: Any) -> int:
    """Layers of the body."""
    return arch.get_text_config().num_hidden_layers


def period(arch: Any) -> int:
    """Layers after which the kinds of layers repeat; 1 where all are alike."""
    text, layers = arch.get_text_config(), depth(arch)
    kinds = next((k for n in KINDS if (k := getattr(text, n, None)) and len(k) == layers), None)
    if kinds is None:
        return 1
    return next(p for p in range(1, layers + 1) if all(kinds[i] == kinds[i % p] for i in range(layers)))


KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")


def shrunken(arch: Any, layers: int, words: int | None = None, experts: int | None = None) -> Any:
    """The same architecture with so many layers (and words, and experts), every width as it was."""
    made = copy.deepcopy(arch)
    text, old = made.get_text_config(), depth(arch)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == old and name != "architectures":
            setattr(text, name, type(value)(value[:layers]))
    text.num_hidden_layers = layers
    if words is not None:
        text.vocab_size = words
        for name, value in list(vars(text).items()):
            if name.endswith("token_id") and isinstance(value, int) and value >= words:
                setattr(text, name, None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if experts is not None and isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), experts))
    return made


# -- models ------------------------------------------------------------------------------------------------------------
def build(part: Part, arch: Any, config: TrainConfig) -> PackedModel:
    """A part with the weights that the surrounding mode or device gives it (fake, meta, random), packed."""
    import transformers

    from fastrl.models.attention import NAMES
    from fastrl.models.score import ScoreModel

    own = config.attn_implementation
    ours = own is None or own in NAMES.values()
    auto = getattr(transformers, part.auto)
    if part.auto != CAUSAL:
        arch = copy.deepcopy(arch)
        if not any(str(name).endswith(part.auto.removeprefix("AutoModel")) for name in arch.architectures or ()):
            arch.num_labels = 2 if part.auto.endswith("TokenClassification") else 1
    options = {} if ours or own.startswith("flash") else {"attn_implementation": own}
    model = auto.from_config(arch, dtype=weights_dtype(part, arch, config), trust_remote_code=False, **options)
    packed = PackedModel(model) if part.auto == CAUSAL else ScoreModel(model)
    if ours or own.startswith("flash"):
        packed.use_packed_attention()
    return packed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No messages of transformers about the random weights and the plain attention of a sketch."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def weights_dtype(part: Part, arch: Any, config: TrainConfig) -> torch.dtype:
    name = part.dtype or config.dtype
    if name != "auto":
        return getattr(torch, name)
    saved = getattr(arch, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else getattr(torch, str(saved).removeprefix("torch."), torch.float32)


def dressed(packed: PackedModel, part: Part, config: TrainConfig) -> PackedModel:
    """As the trainer has it: adapters, what saves activations, dropout; a frozen part in eval mode."""
    from fastrl.models import activations
    from fastrl.train.adapted import adapt
    from fastrl.train.workbench import disable_dropout, switches_of

    if config.tiled_mlp:
        _tile(packed.model, config.tiled_mlp)
    if not part.trained:
        return packed.requires_grad_(False).eval()
    packed.train()
    if part.role == "policy" and config.use_peft:
        adapt(packed, config, with_reference=False)
    rest = {"offload": False, "tiled_mlp": 0, "compile": False, "fp8": None}  # done by hand, or without weight here
    activations.apply(packed, dataclasses.replace(switches_of(config), **rest))
    if getattr(config, "disable_dropout", False):
        disable_dropout(packed)
    return packed


def without_data(model: nn.Module) -> nn.Module:
    """Weights and buffers of the meta device become tensors of the mode that is on, in place; shared ones stay so."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, x in kept.items():
                if x is not None and id(x) not in made:
                    y = torch.empty(x.shape, dtype=x.dtype)
                    made[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
                kept[name] = None if x is None else made[id(x)]
    return model


def _tile(model: nn.Module, tiles: int | str) -> None:
    """Every MLP in tiles. The trainer tries each out on numbers first, which there are none of here."""
    from fastrl.models import tiled_mlp

    for layer in tiled_mlp.decoder_layers(model):
        for name, module in layer.named_modules():
            routed = any("expert" in n or "router" in n for n, _ in module.named_modules())
            if name.rpartition(".")[2] in tiled_mlp.NAMES and not routed:
                tiled_mlp.tile(module, tiled_mlp.AUTO if tiles == "auto" else tiles)


# -- sizes -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sizes:
    """Of one part on one device. Bytes, but for parameters and trained (numbers of weights).

    shapes: (shape, dtype) of each trained weight, and whether Muon would move it.
    layer, outside: bytes of the largest layer, and of what is in no layer. quantised: entries of the body's linears.
    """

    parameters: int
    weights: int
    trained: int
    gradients: int
    shapes: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]
    layer: int
    outside: int
    quantised: int
    widest: int  # entries of the largest of these linears

    @property
    def largest(self) -> int:
        """Bytes of the largest trained weight."""
        return max((math.prod(shape) * dtype.itemsize for shape, dtype, _ in self.shapes), default=0)


def sizes(part: Part, arch: Any, config: TrainConfig) -> Sizes:
    """Counted on the meta device at full depth."""
    from fastrl.train.optim import muon_names

    with quiet(), torch.device("meta"):
        packed = dressed(build(part, arch, config), part, changed(config, **PLAIN))
    kept = {id(x): x for x in [*packed.parameters(), *packed.buffers()]}.values()
    parameters = list(packed.named_parameters())
    trained = [(n, p) for n, p in parameters if p.requires_grad]
    blocks = layers(packed.model, depth(arch))
    inside = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    linears = [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear) and _is_base(m)]
    weights = sum(x.nbytes for x in kept)
    matrices = muon_names(packed)
    return Sizes(
        parameters=sum(p.numel() for _, p in parameters),
        weights=weights,
        trained=sum(p.numel() for _, p in trained),
        gradients=sum(p.nbytes for _, p in trained),
        shapes=tuple((tuple(p.shape), p.dtype, n in matrices) for n, p in trained),
        layer=max(inside, default=0),
        outside=max(0, weights - sum(inside)),
        quantised=sum(w.numel() for w in linears),
        widest=max((w.numel() for w in linears), default=0),
    )


# What changes no size and may not run without weights.
PLAIN: dict[str, Any] = {
    "gradient_checkpointing": False, "gradient_checkpointing_policy": "full", "activation_offloading": False,
    "tiled_mlp": 0, "torch_compile": False, "fp8": None,
}  # fmt: skip


def changed(config: TrainConfig, **flags: Any) -> TrainConfig:
    """The same with other flags, of those that its stage has. Raises ConfigError where they do not go together."""
    return dataclasses.replace(config, **{n: x for n, x in flags.items() if n in config.__dataclass_fields__})


def _is_base(linear: nn.Linear) -> bool:
    """Whether a linear layer is of the model, not of an adapter."""
    return not linear.weight.requires_grad


def layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The body's layers, in order; the whole model as one where they stand in no list of their own."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(found[0]) if found else [model]
