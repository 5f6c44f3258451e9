"""Adapters of PEFT inside a packed model: the base stays frozen, and is the reference when they are off.

PEFT puts its layers into transformers' model in place, so PackedModel calls the body as ever; its own wrapper is kept
beside the model, for saving and merging alone. What the wrapper's forward would add (prompts of its own, adapters by
row) is refused. An adapter on the LM head makes it a LoraHead, which the fused operators see.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models.attention import UnsupportedModelError
from fastrl.models.check import check_parity, evaluating
from fastrl.models.head import LMHead
from fastrl.models.linear import parts_of
from fastrl.models.outline import believed
from fastrl.models.packed import PackedModel
from fastrl.models.score import HEADS, ScoreModel

TRAINED, REFERENCE = "default", "ref"  # PEFT's and TRL's names
WEIGHTS = "adapter_model.safetensors"
MERGED = "merged"  # folder of the merged model, inside the adapters' own
# What makes more of a model than sums over its layers, or would import a module that the file names.
REFUSED = ("megatron_config", "alora_invocation_tokens", "arrow_config", "layer_replication", "monteclora_config")


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA's numbers. target_modules: names, one regular expression, or all-linear (every linear layer but the head).

    target_parameters: names of bare parameters, such as those of experts. modules_to_save: trained whole.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False


@dataclass
class Adapters:
    """The adapters of a model. handle: PEFT's wrapper, whose parameters are the model's. layers: PEFT's, in the model.

    No module, so that the parameters keep their names.
    """

    handle: Any
    layers: list[nn.Module] = field(default_factory=list)

    def find_layers(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self.layers = [m for m in self.handle.base_model.model.modules() if isinstance(m, kinds)]

    @property
    def names(self) -> list[str]:
        return list(self.handle.peft_config)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Adapter `name` in place of the trained one; None: the bare base.

        PEFT's own switches also turn requires_grad off and on; here it stays, so that gradients that wait for their
        optimizer step and weights that are sharded notice nothing.
        """
        before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        for layer, _, active in before:
            layer._disable_adapters, layer._active_adapter = name is None, active if name is None else [name]
        try:
            yield
        finally:
            for layer, disabled, active in before:
                layer._disable_adapters, layer._active_adapter = disabled, active

    def saved(self, name: str) -> bool:
        """Whether transformers' parameter of this name belongs to what `save` writes."""
        return f".{TRAINED}." in f"{name}." and any(part in name for part in ("lora_", "modules_to_save"))

    def save(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """adapter_config.json and adapter_model.safetensors, as PEFT writes them.

        state_dict: by transformers' names, where the weights were gathered elsewhere; `saved` says which are needed.
        """
        gathered = None if state_dict is None else {f"base_model.model.{n}": x for n, x in state_dict.items()}
        self.handle.save_pretrained(
            str(directory), selected_adapters=[TRAINED], save_embedding_layers=False, state_dict=gathered
        )


# -- on the model ------------------------------------------------------------------------------------------------------
def add_adapters(packed: PackedModel, options: AdapterOptions) -> None:
    """New adapters, which change nothing yet. Trainable afterwards: they, the modules_to_save, a score head.

    Raises UnsupportedModelError for a name that no module has, and for what cannot be on the LM head.
    """
    import peft

    for flag, names in (("target_modules", options.target_modules), ("modules_to_save", options.modules_to_save)):
        check_names(packed, flag, names or [])
    whole = list(options.modules_to_save or [])
    if isinstance(packed, ScoreModel):
        whole += [name for name in HEADS if getattr(packed.model, name, None) is packed.head and name not in whole]
    more = {} if options.target_parameters is None else {"target_parameters": options.target_parameters}
    config = peft.LoraConfig(
        task_type=task_of(packed),
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        modules_to_save=whole or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        bias="none",
        **more,
    )
    _inject(packed, config)
    _accept_head(packed)


def load_adapters(packed: PackedModel, directory: str | Path) -> None:
    """The adapters of a directory that PEFT wrote, trainable.

    Raises UnsupportedModelError for another kind than LoRA; ValueError if the weights are no safetensors, or not those
    that the configuration describes.
    """
    config, weights = _read(directory)
    _inject(packed, config)
    _fill(packed, weights, TRAINED, directory)
    _accept_head(packed)


def load_reference_adapter(packed: PackedModel, directory: str | Path) -> None:
    """The adapters of a directory once more, frozen: what the trained ones are held against."""
    config, weights = _read(directory)
    config.inference_mode = True
    adapters = packed.adapters
    with quiet():
        adapters.handle.add_adapter(REFERENCE, config)
    _fill(packed, weights, REFERENCE, directory)
    for name, x in packed.named_parameters():
        if f".{REFERENCE}." in name:
            x.requires_grad_(False)
    adapters.find_layers()


def task_of(packed: PackedModel) -> str:
    """PEFT's name of what the model is for."""
    if not isinstance(packed, ScoreModel):
        return "CAUSAL_LM"
    return "TOKEN_CLS" if packed.name.endswith("ForTokenClassification") else "SEQ_CLS"


def check_names(packed: PackedModel, flag: str, names: str | list[str]) -> None:
    """Raises UnsupportedModelError for a name (or regular expression) that fits no module."""
    if names == "all-linear":
        return
    known = [name for name, _ in packed.model.named_modules()]
    if isinstance(names, str):
        lacking = [] if any(re.fullmatch(names, name) for name in known) else [names]
    else:
        lacking = [n for n in names if not any(name == n or name.endswith(f".{n}") for name in known)]
    if lacking:
        linear = {name.rpartition(".")[2] for name, m in packed.model.named_modules() if isinstance(m, nn.Linear)}
        there = f"its linear layers are {', '.join(sorted(linear))}"
        raise UnsupportedModelError(f"{flag}: {packed.name} has no module {', '.join(lacking)}; {there}")


def _inject(packed: PackedModel, config: Any) -> None:
    import peft

    if packed.adapters is not None:
        raise UnsupportedModelError(f"{packed.name} has adapters already; merge them first (--merge_adapters true)")
    config.base_model_name_or_path, config.inference_mode = None, False
    with quiet():
        handle = peft.get_peft_model(packed.model, config)
    base = packed.model.name_or_path or None
    config.base_model_name_or_path = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    packed.adapters = Adapters(handle)
    packed.adapters.find_layers()


def _accept_head(packed: PackedModel) -> None:
    """Make a LoRA layer around the LM head callable as the head is, and hold it against transformers' own logits.

    Raises UnsupportedModelError for anything else there.
    """
    from peft.utils import ModulesToSaveWrapper

    from fastrl.models.lora_head import LoraHead, LoraLinear

    if isinstance(packed, ScoreModel):
        return
    head = packed.model.get_output_embeddings()
    if isinstance(head, LMHead):
        return
    parts_of(head)  # refuses DoRA and other tuners by name
    if type(head) is LoraLinear and isinstance(head.base_layer, LMHead):
        head.__class__ = LoraHead
    elif not (isinstance(head, ModulesToSaveWrapper) and isinstance(head.original_module, LMHead)):
        raise UnsupportedModelError(
            f"the LM head of {packed.name} is wrapped by PEFT's {type(head).__name__}, which has no fused form here; "
            "LoRA on the head and modules_to_save with lm_head have"
        )
    believed(packed, lambda: check_parity(packed))


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of tied embeddings, which are handled here (see merge_adapters)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- files -------------------------------------------------------------------------------------------------------------
def _read(directory: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """LoRA's configuration and weights."""
    import peft
    from safetensors.torch import load_file

    directory = Path(directory)
    said = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    if said.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{directory} holds {said.get('peft_type')} adapters; LORA ones are trained here")
    if odd := [name for name in REFUSED if said.get(name)]:
        raise UnsupportedModelError(f"{directory}: adapters with {', '.join(odd)} are not trained here; plain LoRA is")
    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"{directory} has no {WEIGHTS}; adapters in other formats (pickles) are not read")
    return peft.LoraConfig.from_pretrained(str(directory)), load_file(directory / WEIGHTS)


def _fill(packed: PackedModel, weights: dict[str, Tensor], name: str, directory: str | Path) -> None:
    """Raises ValueError unless `weights` are just those of the adapter `name`."""
    import peft

    handle = packed.adapters.handle
    known = peft.get_peft_model_state_dict(handle, adapter_name=name, save_embedding_layers=False)
    lacking, odd = sorted(known.keys() - weights.keys()), sorted(weights.keys() - known.keys())
    if lacking or odd:
        said = [f"lack {', '.join(lacking[:3])}"] if lacking else []
        said += [f"have {', '.join(odd[:3])}, which this base has no place for"] if odd else []
        raise ValueError(f"the adapters of {directory} {' and '.join(said)}")
    with quiet():  # of a model without weights: nothing is filled
        peft.set_peft_model_state_dict(handle, weights, adapter_name=name)


def saved_labels(directory: str | Path, heads: tuple[str, ...]) -> int | None:
    """Outputs of the score head that lies among the adapters, or None if there is none."""
    from safetensors import safe_open

    with safe_open(Path(directory) / WEIGHTS, "pt") as file:
        ends = tuple(f".{head}.weight" for head in heads)
        found = [file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(ends)]
    return found[0] if found else None


def merge_adapters(directory: str | Path, dtype: torch.dtype | str | None = None, tokenizer: Any = None) -> Path:
    """A plain model from the adapters of a directory and their base, in the folder `merged` inside; returns that.

    The base is loaded anew, whole and not quantised. Tied embeddings of which an adapter has changed one side are
    stored apart. Raises as the loaders.
    """
    from fastrl.models.load import load_causal_lm
    from fastrl.models.score import load_reward_model, load_token_classifier

    directory = Path(directory)
    task = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    load = {"SEQ_CLS": load_reward_model, "TOKEN_CLS": load_token_classifier}.get(task, load_causal_lm)
    packed = load(directory, dtype)
    apart = _untie(packed.model)
    with quiet():
        model = packed.adapters.handle.merge_and_unload()
    if apart:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    model.save_pretrained(directory / MERGED)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory / MERGED)
    return directory / MERGED


def _untie(model: nn.Module) -> bool:
    """Give the head a weight of its own where it shares one and an adapter is on either side."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if None in ends:
        return False
    embedding, head = (_bottom(m) for m in ends)
    if embedding.weight is not head.weight or (embedding, head) == ends:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _bottom(module: nn.Module) -> nn.Module:
    """What PEFT's layers are around."""
    while (inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None)) is not None:
        module = inner
    return module


# -- the reference -----------------------------------------------------------------------------------------------------
class AdapterReference:
    """The start of an adapted model, from the same weights: its base, or the adapters that it was started from.

    Called as the model is: without gradient and without dropout. Anything else is asked of the model itself.
    """

    def __init__(self, model: PackedModel):
        self.model = model
        self.adapter = REFERENCE if REFERENCE in model.adapters.names else None

    @contextmanager
    def active(self) -> Iterator[PackedModel]:
        """The model as it was at the start, for as long as the block runs."""
        with evaluating(self.model), self.model.adapters.using(self.adapter):
            yield self.model

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self.active() as model:
            return model(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # of an unfinished copy
            raise AttributeError(name)
        return getattr(self.model, name)
