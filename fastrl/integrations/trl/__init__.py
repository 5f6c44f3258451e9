"""One line for an existing TRL trainer: `fastrl.integrations.trl.patch(trainer)`.

TRL 1.16 reads log-probs, entropies and their kin of policy and reference through one call of the model. `patch` answers
that call with fastrl's head, and lets the body run over real tokens alone where that gives the same numbers. The
trainer's own code goes on making losses and logs: every option of it and every metric stays what it was. Served:
SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer, with or without PEFT adapters. What could not be honoured
is refused by name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from fastrl.integrations.heads import causal_lm_of
from fastrl.integrations.linear import parts_of
from fastrl.integrations.trl import one_pass
from fastrl.integrations.trl.forward import FusedForward
from fastrl.integrations.trl.head import Asked
from fastrl.integrations.trl.refuse import UnsupportedTrainerError, check_head, kind_of, refuse

__all__ = ["UnsupportedTrainerError", "build", "patch", "unpatch"]

# What each trainer reads of the policy beside log-probs; of a reference model all read log-probs alone.
OUTPUTS = {
    "SFT": ("entropy", "is_top1"),
    "DPO": ("entropy", "mean_logits", "is_top1"),
    "KTO": ("entropy", "mean_logits"),
    "GRPO": ("entropy",),
    "RLOO": ("entropy",),
}


def patch(trainer: Any, *, pack: bool | None = None, workspace_bytes: int | None = None) -> Any:
    """Let this TRL trainer's losses come from fastrl's head. Returns the trainer; call it before `train()`.

    Args:
        trainer: an SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer of TRL 1.16.
        pack: whether the body runs over real tokens alone, without padding. None: where a short check finds the same
            hidden states, no dropout is drawn in training (whose draws would fall elsewhere), no quantile of entropies
            is taken (which rounding decides among ties), no NEFTune noise is added and generation is not by continuous
            batching. True: wherever the model can, ValueError where it cannot, or under the last two. False: never.
        workspace_bytes: of logits that may exist at once; None as in `fastrl.linear_logprobs`.

    Raises: TypeError on anything else; UnsupportedTrainerError naming what cannot be honoured. A trainer patched again
        takes the new options.
    """
    kind = kind_of(trainer)
    refuse(trainer, kind)
    policy, reference = models_of(trainer)
    for model in (policy, reference):
        check_head(model)
    padded = _padded_only(trainer)
    if pack and padded:
        raise UnsupportedTrainerError(f"pack=True, but {padded}")
    _close(trainer)
    outputs = OUTPUTS[kind]
    if getattr(trainer, "use_weighting", False):
        outputs += ("log_sum_sq_probs",)
    common = dict(
        temperature=getattr(trainer, "temperature", 1.0),
        fp32_head=getattr(trainer.args, "cast_lm_head_to_fp32", False),
        workspace_bytes=workspace_bytes,
        invariant=getattr(trainer, "top_entropy_quantile", 1.0) < 1.0,
    )
    pack = False if pack is None and (padded or common["invariant"]) else pack
    forward = FusedForward(policy, Asked(outputs, **common), pack, _precision(trainer, policy))
    trainer._fastrl = [forward]
    if reference is not None:
        trainer._fastrl.append(FusedForward(reference, Asked(**common), pack, _precision(trainer, reference)))
    if kind == "SFT":
        forward.guess = one_pass.of_sft(trainer)
    if kind == "GRPO":
        _expect_own_samples(trainer, forward)
    return trainer


def unpatch(trainer: Any) -> Any:
    """TRL's own head again, and the model's own attention. A trainer that was not patched stays as it is.

    Raises: UnsupportedTrainerError while an adapter lies on the head, which TRL's own head would pass by.
    """
    for forward in vars(trainer).get("_fastrl", []):
        if parts_of(forward.model.get_output_embeddings()).adapters:
            raise UnsupportedTrainerError(
                "an adapter lies on the LM head, and TRL's own head would pass it by; merge or remove it before unpatch"
            )
    _close(trainer)
    return trainer


def _close(trainer: Any) -> None:
    own = vars(trainer)
    for forward in own.pop("_fastrl", []):
        forward.close()
        if forward.covered is None or own.get("_compute_loss") is not forward.covered:
            continue
        del own["_compute_loss"]
        if forward.uncovered is not None:
            own["_compute_loss"] = forward.uncovered


def _padded_only(trainer: Any) -> str | None:
    """Why the body must go on reading padded rows, or None."""
    if getattr(trainer, "neftune_noise_alpha", None) is not None:
        return "NEFTune's noise is scaled by the padded length (neftune_noise_alpha); leave pack at None"
    if getattr(trainer, "use_transformers_continuous_batching", False):
        return "continuous batching generates under transformers' own attention alone; leave pack at None"
    return None


def _expect_own_samples(trainer: Any, forward: FusedForward) -> None:
    """While GRPO makes its loss, its model's forward knows of what."""
    theirs = trainer._compute_loss

    def compute_loss(model, inputs):
        guess = one_pass.of_grpo(trainer, inputs) if forward.active else None
        with one_pass.expecting(forward, guess):
            return theirs(model, inputs)

    forward.uncovered = vars(trainer).get("_compute_loss")
    trainer._compute_loss = forward.covered = compute_loss


def build(trainer_class: type, *args: Any, pack: bool | None = None, workspace_bytes: int | None = None, **kwargs: Any):
    """`patch(trainer_class(*args, **kwargs))` with two things that come too late afterwards.

    Adapters may lie on the LM head: TRL refuses such a model because its own head would pass them by; fastrl's does
    not. It is never left with TRL's head: what patch refuses is raised, and no trainer comes back. And the reference
    log-probs of `precompute_ref_log_probs`, which are made while the trainer is, come from fastrl's head too.
    """

    def patched(trainer):
        return patch(trainer, pack=pack, workspace_bytes=workspace_bytes)

    with _adapted_head_allowed(trainer_class), _before_precomputing(trainer_class, patched):
        trainer = trainer_class(*args, **kwargs)
    return patched(trainer)


@contextlib.contextmanager
def _adapted_head_allowed(trainer_class: type):
    """TRL's constructors ask whether the head is a BaseTunerLayer by the name in their module; here none is."""
    homes = [sys.modules[c.__module__] for c in trainer_class.__mro__]
    kept = [(home, home.BaseTunerLayer) for home in dict.fromkeys(homes) if hasattr(home, "BaseTunerLayer")]
    try:
        for home, _ in kept:
            home.BaseTunerLayer = type("NoLayer", (), {})
        yield
    finally:
        for home, layer in kept:
            home.BaseTunerLayer = layer


@contextlib.contextmanager
def _before_precomputing(trainer_class: type, patched: Callable):
    """Trainers that score their rows while they are made are patched just before."""
    home = next((c for c in trainer_class.__mro__ if "_precompute_ref_logps" in vars(c)), None)
    if home is None:
        yield
        return
    original = home._precompute_ref_logps
    try:
        home._precompute_ref_logps = lambda trainer, *args, **kwargs: original(patched(trainer), *args, **kwargs)
        yield
    finally:
        home._precompute_ref_logps = original


def models_of(trainer: Any) -> tuple[Any, Any | None]:
    """(policy, reference or None): the causal LMs whose forward TRL calls, below adapters and wrappers."""
    reference = getattr(trainer, "ref_model", None)
    return causal_lm_of(trainer.model), None if reference is None else causal_lm_of(reference)


def _precision(trainer: Any, model: Any):
    """Where accelerate has wrapped the forward already, what takes its place runs in the same precision."""
    return trainer.accelerator.autocast if hasattr(model, "_original_forward") else contextlib.nullcontext
