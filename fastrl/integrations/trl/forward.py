"""The forward that stands in for the one TRL gave its models: `model(..., labels=..., fused_lm_head=True)`.

TRL 1.16 asks every model of its trainers, policy and reference alike, for per-token statistics through that one call,
and makes losses and logs of them itself. Here the statistics come from fastrl's head: only scored rows are multiplied
with it, only real tokens go through the body, and TRL's loss code stays in charge of what becomes of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.integrations.trl.head import Asked, statistics
from fastrl.integrations.trl.one_pass import Guess
from fastrl.integrations.trl.rows import PackedBody, RealTokens

MORE = ("inputs_embeds", "position_ids", "token_type_ids", "past_key_values")  # with any of these the body stays padded


class FusedForward:
    """Installed on one causal LM; `close` gives it back what it had. context: the precision it is to run in.

    guess: mask of scored rows -> what is expected of the loss (fastrl.integrations.trl.one_pass); a wrong one costs a
    second pass over the head, so after two there are no more.
    """

    def __init__(self, model: nn.Module, asked: Asked, pack: bool | None, context: Callable = contextlib.nullcontext):
        self.model, self.asked, self.pack, self.context, self.active = model, asked, pack, context, True
        self.theirs = model.forward
        self.body = None if pack is False else PackedBody(model)
        if self.body is not None and not self.body.works:
            said = f"{type(model).__name__} cannot read packed rows: {self.body.trouble}"
            if pack:
                raise ValueError(f"pack=True, but {said}")
            warnings.warn(f"{said}; its body goes on reading padded ones", stacklevel=3)
        self.draws = has_dropout(model)
        self.guess: Callable[[Tensor], Guess] | None = None
        self.misses: list[str] = []
        self.covered: Callable | None = None  # what stands in for the trainer's _compute_loss
        self.uncovered: Callable | None = None  # what the trainer itself had there
        self.warned = False
        model.forward = types.MethodType(self._entry(), model)
        self.mine = model.forward

    def _entry(self) -> Callable:
        @functools.wraps(type(self.model).forward)  # generate() holds its keywords against this signature
        def forward(model, *args, fused_lm_head=False, **kwargs):
            if model is not self.model:  # a copy of the patched model
                theirs = getattr(self.theirs, "__func__", type(model).forward)
                return theirs(model, *args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)
            if not fused_lm_head:
                self.say_if_training()
                return self.theirs(*args, **kwargs)
            if not self.active:
                return self.theirs(*args, fused_lm_head=True, **kwargs)
            with self.context():
                return self.score(*args, **kwargs)

        return forward

    def say_if_training(self) -> None:
        """Once: a plain call with gradients forms logits."""
        if self.active and not self.warned and self.model.training and torch.is_grad_enabled():
            self.warned = True
            warnings.warn(
                f"{type(self.model).__name__} was called in training without fused_lm_head=True: that forms logits "
                "as before the patch; see docs/integrations.md",
                stacklevel=4,
            )

    def close(self) -> None:
        """Accelerate may have wrapped the forward since: then what it wraps hands over to TRL's."""
        self.active = False
        if self.model.forward == self.mine:
            self.model.forward = self.theirs
        if self.body is not None:
            self.body.close()

    # -- one call -----------------------------------------------------------------------------------------------------
    def score(self, *args, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs) -> Any:
        """FusedCausalLMOutput of labels [B, L] with [B, L-1] fields, or of shift_labels [B, L] with [B, L]; 0 where the
        label is -100."""
        from trl.trainer.utils import FusedCausalLMOutput

        if kwargs.get("output_router_logits"):
            raise NotImplementedError("a router's load-balancing loss is not made here; set router_aux_loss_coef=0")
        kwargs["use_cache"] = False
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        mask = targets != -100
        b, t = mask.nonzero(as_tuple=True)
        width = targets.shape[1] + (shift_labels is None)
        hidden = self.hidden(args, kwargs, b * width + t)
        made = statistics(self.model, self.asked, hidden, targets[mask], self._expected(mask))
        made = {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in made.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -made["log_probs"].sum() / count
        return FusedCausalLMOutput(loss=loss, label_mask=mask, **made)

    def _expected(self, mask: Tensor) -> Guess | None:
        if self.guess is None or not torch.is_grad_enabled() or len(self.misses) > 1:
            return None
        return dataclasses.replace(self.guess(mask), misses=self.misses)

    def hidden(self, args: tuple, kwargs: dict, scored: Tensor) -> Tensor:
        """[N, H] final hidden states at these places [N] of the batch laid out flat."""
        real = self._real(args, kwargs)
        places = scored if real is None else real.places(scored)
        if real is not None and not bool((places < 0).any()):
            rest = {k: x for k, x in kwargs.items() if k not in ("input_ids", "attention_mask")}
            return self.body(kwargs["input_ids"], real, **rest).index_select(0, places)
        states = self.model.base_model(*args, **kwargs).last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, scored.to(states.device))

    def _real(self, args: tuple, kwargs: dict) -> RealTokens | None:
        """The real tokens, if the body can run over them alone with the same result."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if self.body is None or not self.body.ready or args or any(kwargs.get(name) is not None for name in MORE):
            return None
        if ids is None or mask is None or mask.shape != ids.shape:  # a learned prefix makes the mask longer
            return None
        if self.pack is None and self.draws and self.model.training:
            return None  # dropout draws per place of the batch: other places, other draws
        return RealTokens.of(mask)


def has_dropout(model: nn.Module) -> bool:
    """Whether any layer, or attention by its config, drops at random while training."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return True
    numbers = vars(model.config.get_text_config()).items()
    return any("drop" in name and isinstance(x, float) and x > 0 for name, x in numbers)
