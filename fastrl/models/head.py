"""The LM head as the module that owns the weight: plain logits when called as usual, fused operators when asked more.

It takes the place of `model.lm_head` with the same Parameter under the same name, so tied embeddings stay tied, saved
files do not change and generation works. All reads of the weight happen inside its forward, where sharding hooks fire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.objective import LossOutput, Objective
from fastrl.ops import fused_loss, linear_logprobs
from fastrl.tokens import TokenBatch, TokenStats

# Config fields that multiply or divide the logits of an architecture after its head.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
TIMES_LOGITS_SCALING = ("hyperclovax",)  # the one architecture that multiplies by what the others divide by


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap * tanh(scale * (h.W + b) / softcap), as the architecture does it after its head."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read from a transformers config. What it misses is caught by the parity check at load."""
        text = config.get_text_config()
        scale = 1.0
        for name in MULTIPLIERS:
            scale *= getattr(text, name, None) or 1.0
        for name in DIVISORS:
            divisor = getattr(text, name, None) or 1.0
            scale = scale * divisor if text.model_type in TIMES_LOGITS_SCALING else scale / divisor
        caps = [cap for name in SOFTCAPS if (cap := getattr(text, name, None))]
        return cls(float(scale), float(caps[0]) if caps else None)


class LMHead(nn.Linear):
    """forward(hidden) -> logits of the bare linear layer, as transformers expects; with keywords, the fused operators.

    head(hidden [R, H], targets=[R], outputs=..., temperature=...) -> TokenStats
    head(hidden [R, H], objective=..., batch=..., temperature=...) -> LossOutput
    The architecture's scale and softcap are applied in both fused forms.
    """

    transform: LogitTransform

    @classmethod
    def from_linear(cls, linear: nn.Linear, transform: LogitTransform) -> LMHead:
        """Same Parameters, no copy."""
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
        options |= {"logit_scale": self.transform.scale, "softcap": self.transform.softcap}
        if objective is not None:
            return fused_loss(objective, hidden, self.weight, batch, self.bias, **options)
        return linear_logprobs(hidden, self.weight, targets, self.bias, **options)
