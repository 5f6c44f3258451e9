"""The LM head as the module that owns the weight: plain logits when called as usual, fused operators when asked more.

It takes the place of `model.lm_head` with the same Parameter under the same name, so tied embeddings stay tied, saved
files do not change and generation works. All reads of the weight happen inside its forward, where sharding hooks fire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrl.models.attention import UnsupportedModelError
from fastrl.objective import LossOutput, Objective
from fastrl.ops import fused_loss, linear_logprobs
from fastrl.tokens import TokenBatch, TokenStats

# Config fields by what the architecture does with them around its head: h * before, then z * scale, then softcap.
SCALES = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
EXCEPTIONS = {  # model_type -> (before: divisor, scale: multiplier, softcap)
    "hyperclovax": (None, "logits_scaling", None),
    "minicpm3": ("logits_scaling", None, None),
    "inkling_text": ("logits_mup_width_multiplier", None, None),
    "gemma3": (None, None, None),  # the text-and-image class leaves the cap out
}


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap * tanh(scale * ((before * h).W + b) / softcap), as the architecture does it around its head."""

    scale: float = 1.0
    softcap: float | None = None
    before: float = 1.0

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read from a transformers config. The parity check at load holds it against the model itself."""
        text = config.get_text_config()

        def read(*names: str | None) -> float | None:
            return next((float(x) for n in names if n is not None and (x := getattr(text, n, None))), None)

        if config.model_type in EXCEPTIONS:
            before, scale, cap = EXCEPTIONS[config.model_type]
            return cls(read(scale) or 1.0, read(cap), 1.0 / (read(before) or 1.0))
        return cls((read(*SCALES) or 1.0) / (read(*DIVISORS) or 1.0), read(*SOFTCAPS))

    def after(self, z: Tensor) -> Tensor:
        """What becomes of the bare output of the linear layer."""
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class LMHead(nn.Linear):
    """forward(hidden) -> output of the bare linear layer, as transformers expects; with keywords, the fused operators.

    head(hidden [..., H], targets=[...], outputs=..., temperature=...) -> TokenStats
    head(hidden [R, H], objective=..., batch=..., temperature=...) -> LossOutput
    The architecture's scale and softcap are applied in both fused forms (transformers applies them itself otherwise).
    """

    takes_objective: ClassVar[bool] = True  # what a head says that takes these keywords
    transform: LogitTransform

    @classmethod
    def from_linear(cls, linear: nn.Linear, transform: LogitTransform) -> LMHead:
        """Same Parameters, no copy."""
        if linear.bias is not None and transform.before != 1.0:
            raise UnsupportedModelError("an LM head with a bias and a scaled input has no fused form")
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.weight, head.bias, head.transform = linear.weight, linear.bias, transform
        return head.train(linear.training)

    def forward(
        self,
        hidden: Tensor,
        *,
        targets: Tensor | None = None,
        objective: Objective | None = None,
        batch: TokenBatch | None = None,
        **options: Any,
    ) -> Tensor | TokenStats | LossOutput:
        if targets is None and objective is None:
            return super().forward(hidden)
        hidden = hidden.to(self.weight.dtype)  # a float32 head over a bfloat16 body, as some architectures have it
        asked = {"targets": targets, "objective": objective, "batch": batch, **options}
        return fused_head(hidden, self.weight, self.bias, self.transform, **asked)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] logits of final hidden states, formed: for checks on a few rows."""
        return self.transform.after(super().forward(hidden.to(self.weight.dtype) * self.transform.before))


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    law: LogitTransform,
    *,
    targets: Tensor | None = None,
    objective: Objective | None = None,
    batch: TokenBatch | None = None,
    **options: Any,
) -> TokenStats | LossOutput:
    """The fused operators on hidden [..., K] and weight [V, K], with the architecture's scale and softcap."""
    if (objective is None) != (batch is None):
        raise ValueError("objective and batch go together; pass both for a loss, or targets alone for log-probs")
    options = {"logit_scale": law.scale * law.before, "softcap": law.softcap} | options
    if objective is not None:
        return fused_loss(objective, hidden, weight, batch, bias, **options)
    return linear_logprobs(hidden, weight, targets, bias, **options)


def install_head(model: nn.Module) -> LMHead:
    """Put an LMHead where the model keeps its output layer, under the same name and with the same Parameters."""
    old, name = model.get_output_embeddings(), type(model).__name__
    if isinstance(old, LMHead):
        return old
    if type(old) is not nn.Linear:
        raise UnsupportedModelError(f"{name} has no plain linear LM head, got {type(old).__name__}")
    path = next((path for path, module in model.named_modules() if module is old), None)
    if path is None:
        raise UnsupportedModelError(f"{name} keeps its LM head outside of its modules")
    parent, _, leaf = path.rpartition(".")
    head = LMHead.from_linear(old, LogitTransform.of(model.config))
    setattr(model.get_submodule(parent), leaf, head)
    return head
