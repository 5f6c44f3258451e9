"""`patch(model)`: a transformers causal LM whose loss comes straight from hidden states.

    fastrl.integrations.transformers.patch(model)         # once, before or after PEFT, Trainer, DDP
    loss = model(input_ids, attention_mask=mask, labels=labels).loss

The model's own forward runs, so positions, masks, caches, auxiliary losses and output classes are its own. Two things
in it are exchanged, and only while labels are given: its head hands on hidden states in place of logits
(fastrl.integrations.deferred), and its loss function is the same cross-entropy computed from those. Calls without
labels, generation among them, are untouched.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl import losses
from fastrl.integrations.deferred import DeferredLogits, deferring
from fastrl.integrations.heads import causal_lm_of, head_module
from fastrl.models import LogitTransform, UnsupportedModelError
from fastrl.tokens import TokenBatch

KEY = "_fastrl_patch"
FP16_ROWS = 1024


@dataclass(frozen=True)
class CausalLMLoss:
    """transformers' ForCausalLMLoss of deferred logits: same shift, same ignore_index, same reduction, float32."""

    workspace_bytes: int | None = None
    label_smoothing: float = 0.0

    @torch.compiler.disable
    def __call__(
        self,
        logits: DeferredLogits,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Scalar: the sum over num_items_in_batch, or the mean over the labels that count (NaN if there are none).

        logits: [B, L, V]. labels: [B, L], or shift_labels [B, L], shifted already. others: ignored, as they are there.
        """
        if not isinstance(logits, DeferredLogits):
            raise UnsupportedModelError("the model's loss got logits that did not come from its LM head")
        if shift_labels is None:
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        rows, vocabulary = logits.shape[:-1].numel(), logits.shape[-1]
        if targets.shape[0] != rows or vocab_size not in (None, vocabulary):
            raise ValueError(
                f"logits are {list(logits.shape)} but labels {list(shift_labels.shape)}, of {vocab_size} words"
            )
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=logits.device).reshape(())
        loss = self._sum_over(logits, targets.long(), count, ignore_index).float()
        return torch.where(count > 0, loss, torch.nan)  # the mean of nothing, as torch has it

    def _sum_over(self, logits: DeferredLogits, targets: Tensor, count: Tensor, ignore_index: int) -> Tensor:
        how = {"workspace_bytes": self.workspace_bytes, "ignore_index": ignore_index}
        if not self.label_smoothing and logits.dtype == torch.float16:
            # A GradScaler multiplies only after the gradients are made, and 1 / count of a small probability is 0 by
            # then. Nearly a sum in place of the mean; more than FP16_ROWS rows are scaled so that dW does not overflow.
            unit = max(1.0, targets.shape[0] / FP16_ROWS)
            made = logits.loss(losses.get("nll"), TokenBatch(targets=targets, num_tokens=unit), **how).loss
            return made.float() * (unit / count)
        if not self.label_smoothing:
            return logits.loss(losses.get("nll"), TokenBatch(targets=targets, num_tokens=count), **how).loss
        flat = logits.flatten()
        smooth = flat.cross_entropy(targets, reduction="sum", label_smoothing=self.label_smoothing, **how)
        return smooth / count


@dataclass(frozen=True)
class Patch:
    """What stands in a patched model's attributes.

    own: an instance's forward from before (accelerate's), if any. loss: None once it is unpatched inside a wrapper.
    """

    own: Callable | None
    loss: CausalLMLoss | None
    only_training: bool = False


def patch(
    model: nn.Module,
    *,
    workspace_bytes: int | None = None,
    label_smoothing: float = 0.0,
    only_training: bool = False,
) -> nn.Module:
    """The same model, whose loss no longer forms logits: outputs.logits is then a DeferredLogits, which says so.

    Args:
        model: any causal LM of transformers with a linear head and transformers' causal LM loss; plain, with PEFT
            adapters (on the head too), under DDP or torch.compile. It is changed in place and returned.
        workspace_bytes: bytes of logits that may exist at once; None: chosen by device and vocabulary.
        label_smoothing: in place of the Trainer's label_smoothing_factor, which takes the labels away from the model.
        only_training: leave eval mode alone, for a Trainer whose compute_metrics reads logits.

    Raises: UnsupportedModelError for a head that is not linear, or a loss function of the model's own, by name;
        ValueError if it is patched already.
    """
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "torch.nn.DataParallel copies would call the first copy's forward; use one process a GPU"
        )
    lm = causal_lm_of(model)
    before = vars(lm).get(KEY)
    if before is not None and before.loss is not None:
        raise ValueError(f"this {type(lm).__name__} is patched already; unpatch(model) first to change its options")
    if lm.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(lm).__name__} is an encoder-decoder, whose labels are not shifted")
    head_module(lm)
    check_loss(lm)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing and LogitTransform.of(lm.config).softcap is not None:
        raise ValueError(
            f"{type(lm).__name__} caps its logits, and label_smoothing has no logits-free form under a cap"
        )
    own = vars(lm).get("forward") if before is None else before.own
    setattr(lm, KEY, Patch(own, CausalLMLoss(workspace_bytes, label_smoothing), only_training))
    if before is None:
        lm.forward = types.MethodType(_fused_forward(type(lm)), lm)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """The model as it was before `patch`. Raises ValueError if it is not patched.

    Where someone has wrapped its forward since (accelerate does for mixed precision), the wrapper stays and what it
    wraps is from now on the model's own.
    """
    lm = causal_lm_of(model)
    patched = vars(lm).get(KEY)
    if patched is None or patched.loss is None:
        raise ValueError(f"this {type(lm).__name__} is not patched")
    if getattr(lm.forward, "__func__", None) is not _fused_forward(type(lm)):
        setattr(lm, KEY, Patch(patched.own, None))
        return model
    delattr(lm, KEY)
    del lm.forward
    if patched.own is not None:
        lm.forward = patched.own
    return model


def check_loss(lm: nn.Module) -> None:
    """Raises UnsupportedModelError unless the model's loss is transformers' causal LM loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if lm.loss_function is not ForCausalLMLoss:
        name = getattr(lm.loss_function, "__name__", type(lm.loss_function).__name__)
        raise UnsupportedModelError(
            f"{type(lm).__name__} computes its loss with {name}, which reads logits; transformers' ForCausalLMLoss "
            "alone has a logits-free form here. For another law use fastrl.fused_loss on its hidden states"
        )


@functools.cache
def _fused_forward(kind: type) -> Callable:
    """The forward of every patched model of this class; it shows the signature of the class's own."""
    own = kind.forward
    names = list(inspect.signature(own).parameters)[1:]
    place = names.index("labels") if "labels" in names else None

    @functools.wraps(own)
    @functools.partial(torch.compiler.disable, recursive=False)
    def forward(self, *args, **kwargs):
        patched = vars(self).get(KEY)
        call = types.MethodType(own, self) if patched is None or patched.own is None else patched.own
        labels = kwargs.get("labels", args[place] if place is not None and len(args) > place else None)
        off = patched is None or patched.loss is None or (patched.only_training and not self.training)
        if off or labels is None:
            return call(*args, **kwargs)
        check_loss(self)
        with deferring(self), _loss_as(self, patched.loss):
            return _checked(call(*args, **kwargs), self)

    return forward


def _checked(outputs: Any, lm: nn.Module) -> Any:
    """Raises UnsupportedModelError if the model made logits in some other way than by calling its head."""
    made = outputs.values() if isinstance(outputs, dict) else outputs
    if not any(isinstance(x, DeferredLogits) for x in made):
        raise UnsupportedModelError(f"{type(lm).__name__} makes its logits without calling its LM head as a module")
    return outputs


@contextmanager
def _loss_as(lm: nn.Module, loss: Callable) -> Iterator[None]:
    own = vars(lm)
    before = own.get("_loss_function")
    own["_loss_function"] = loss
    try:
        yield
    finally:
        if before is None:
            del own["_loss_function"]
        else:
            own["_loss_function"] = before
