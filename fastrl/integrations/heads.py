"""The LM head of any transformers causal LM, as the fused operators see it: adapters, scales and caps included.

    head = head_of(model)                                   # plain, under DDP or torch.compile, or with PEFT
    head.logprobs(hidden, targets, outputs=("entropy",))    # hidden [..., H], targets [...] -> TokenStats
    head.loss(objective, hidden, batch)                     # hidden [T, H] -> LossOutput
    head.form(hidden)                                       # (hidden', weight', bias) for any other operator

Hidden states are what the model hands to its head; `deferring(model)` gets them from the model's own forward. Weights
are read at each call, so adapters may be switched in between, and inside the module's own call, where the hooks of
sharding and offloading have brought them in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastrl.integrations.linear import LinearForm, linear_form, parts_of
from fastrl.models import LogitTransform, UnsupportedModelError
from fastrl.objective import LossOutput, Objective
from fastrl.ops import fused_loss, linear_cross_entropy, linear_logprobs
from fastrl.tokens import TokenBatch, TokenStats


@dataclass(frozen=True)
class Head:
    """A head module and what the architecture does with its output.

    module: torch.nn.Linear, or PEFT's wrapper of one. transform: scale, softcap and factor before the head.
    """

    module: nn.Module
    transform: LogitTransform = LogitTransform()

    def form(self, hidden: Tensor) -> LinearForm:
        """(hidden [..., K], weight [V, K], bias): raw logits are hidden . weight^T + bias. `transform` comes after."""
        before = self.transform.before
        return linear_form(self.module, hidden if before == 1.0 else hidden * before)

    def logprobs(self, hidden: Tensor, targets: Tensor, **options: Any) -> TokenStats:
        """Statistics [...] of targets [...] under hidden [..., H]. options: of `linear_logprobs`."""
        return self.call(hidden, options, lambda f, how: linear_logprobs(f.hidden, f.weight, targets, f.bias, **how))

    def loss(self, objective: Objective, hidden: Tensor, batch: TokenBatch, **options: Any) -> LossOutput:
        """The objective's loss of hidden [T, H] in one pass. options: of `fused_loss`."""
        return self.call(
            hidden, options, lambda f, how: fused_loss(objective, f.hidden, f.weight, batch, f.bias, **how)
        )

    def cross_entropy(self, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """torch's cross-entropy of hidden [..., H] and targets [...]. options: of `linear_cross_entropy`."""
        return self.call(
            hidden, options, lambda f, how: linear_cross_entropy(f.hidden, f.weight, targets, f.bias, **how)
        )

    def call(self, hidden: Tensor, options: dict, operator: Callable[[LinearForm, dict], Any]) -> Any:
        """operator((hidden', weight', bias), options with the transform), inside the head module's own call."""
        how = {"logit_scale": self.transform.scale, "softcap": self.transform.softcap} | options
        with forward_as(self.module, lambda h: operator(self.form(h), how)):
            return self.module(hidden)


@contextmanager
def forward_as(module: nn.Module, function: Callable) -> Iterator[None]:
    """For a while module(...) calls `function` in place of its forward, between the same hooks as ever."""
    own = vars(module)
    name = "_old_forward" if "_hf_hook" in own else "forward"  # accelerate moves weights around the older one
    before = own.get(name)
    own[name] = function
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def causal_lm_of(model: nn.Module) -> nn.Module:
    """transformers' own model inside DDP, torch.compile, PEFT or fastrl's PackedModel.

    Raises UnsupportedModelError if there is none.
    """
    from transformers import PreTrainedModel

    inner, seen = model, []
    while not isinstance(inner, PreTrainedModel) or hasattr(inner, "_orig_mod"):
        seen.append(type(inner).__name__)
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        names = [n for n in ("_orig_mod", "module", "model") if isinstance(getattr(inner, n, None), nn.Module)]
        if not names:
            raise UnsupportedModelError(f"there is no transformers model inside {' > '.join(seen)}")
        inner = getattr(inner, names[0])
    return inner


def head_module(lm: nn.Module) -> nn.Module:
    """The module that makes the model's logits. Raises UnsupportedModelError if it has none, or is no linear map."""
    module = lm.get_output_embeddings()
    if module is None:
        raise UnsupportedModelError(f"{type(lm).__name__} has no LM head: get_output_embeddings() is None")
    parts_of(module)
    return module


def head_of(model: nn.Module) -> Head:
    """The model's head with its adapters as they are now. Raises UnsupportedModelError for one that is not linear.

    The transform is read from the config (fastrl.models.LogitTransform.of), where `deferring` records what the model
    really does.
    """
    lm = causal_lm_of(model)
    return Head(head_module(lm), LogitTransform.of(lm.config))
