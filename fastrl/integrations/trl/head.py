"""What TRL reads of a head, from fastrl's operators: statistics of [N] scored rows, in the fields of TRL's output."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrl.integrations.heads import Head
from fastrl.integrations.linear import LinearForm
from fastrl.integrations.trl.one_pass import Guess, one_pass
from fastrl.models import LogitTransform
from fastrl.ops import linear_logprobs

FIELDS = {"log_probs": "logprobs", "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "is_top1": "is_argmax"}
WORKSPACE = 64 << 20


@dataclass(frozen=True)
class Asked:
    """What a trainer wants of a model's head.

    outputs: fields of TRL's FusedCausalLMOutput beside log_probs. fp32_head: hidden states widened, autocast off.
    invariant: equal rows get equal bits wherever they stand: GRPO's entropy quantile often falls among tokens that tie,
    the first ones of a prompt's answers.
    """

    outputs: tuple[str, ...] = ()
    temperature: float = 1.0
    fp32_head: bool = False
    workspace_bytes: int | None = None
    invariant: bool = False


def statistics(
    model: nn.Module, asked: Asked, hidden: Tensor, targets: Tensor, guess: Guess | None = None
) -> dict[str, Tensor]:
    """hidden [N, H], targets [N] -> {field of FusedCausalLMOutput: [N]}, by the head as it is now.

    guess: at the loss; then only log_probs has a graph, with gradients made here and now.
    """
    head = Head(model.get_output_embeddings(), LogitTransform.of(model.config))
    device = next(head.module.parameters()).device
    hidden, targets = hidden.to(device), targets.to(device)
    names = {theirs: ours for theirs, ours in FIELDS.items() if theirs in ("log_probs", *asked.outputs)}
    options = dict(outputs=tuple(names.values()), temperature=asked.temperature, workspace_bytes=asked.workspace_bytes)

    def operator(form: LinearForm, how: dict) -> dict[str, Tensor]:
        if guess is not None:
            made = one_pass(form, targets, guess, how)
        else:
            made = linear_logprobs(form.hidden, form.weight, targets, form.bias, batch_invariant=asked.invariant, **how)
        fields = {theirs: getattr(made, ours) for theirs, ours in names.items()}
        if "mean_logits" in asked.outputs:
            fields["mean_logits"] = mean_logits(form, head.transform, asked)
        return fields

    with torch.autocast(device.type, enabled=False) if asked.fp32_head else contextlib.nullcontext():
        return head.call(hidden.float() if asked.fp32_head else hidden, options, operator)


@torch.no_grad()
def mean_logits(form: LinearForm, law: LogitTransform, asked: Asked) -> Tensor:
    """[N] mean over the vocabulary of the logits. Uncapped it is h . mean_v(W_v), and no logit is made for it."""
    hidden, weight, bias = form
    acc = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        if law.softcap is None:
            summed = sum(rows.sum(0, dtype=acc) for rows in weight.split(4096))  # no wide copy of the whole head
            mean = hidden.to(acc) @ (summed / weight.shape[0])
            mean = mean if bias is None else mean + bias.to(acc).mean()
            return mean * law.scale / asked.temperature
        rows = max(1, (asked.workspace_bytes or WORKSPACE) // (3 * acc.itemsize * weight.shape[0]))
        parts = [law.after(nn.functional.linear(h, weight, bias).to(acc)).mean(1) for h in hidden.split(rows)]
    return torch.cat(parts) / asked.temperature
