"""Reward models, token classifiers and critics: a packed body under a small linear head, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrl.models.attention import NAMES, UnsupportedModelError
from fastrl.models.check import AGREES, APART, ON_DEVICE, _groups_tokens, check_sharing, evaluating, row_error
from fastrl.models.load import base_of, is_packed, read_model, refuse_foreign_code, with_adapters
from fastrl.models.outline import believed
from fastrl.models.packed import PackedModel
from fastrl.models.split import deal
from fastrl.objective import LossOutput, Objective
from fastrl.ops.scores import loss_from_scores
from fastrl.tokens import HeadStats, TokenBatch

HEADS = ("score", "classifier")  # where transformers' classes keep their output layer


class ScoreHead(nn.Linear):
    """forward(hidden) -> the bare layer's output, as transformers expects; with keywords, in float32 at least:

    head(hidden [R, H], reads="scores" or "values") -> HeadStats
    head(hidden [R, H], objective=..., batch=...)   -> LossOutput
    """

    takes_objective: ClassVar[bool] = True

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> ScoreHead:
        """Same Parameters, no copy."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(
        self,
        hidden: Tensor,
        *,
        objective: Objective | None = None,
        batch: TokenBatch | None = None,
        reads: str = "",
        aggregate: Any = None,
        temperature: float = 1.0,
        outputs: tuple[str, ...] = (),
        debug_checks: bool = False,
    ) -> Tensor | HeadStats | LossOutput:
        if objective is None and not reads:
            return super().forward(hidden)
        if temperature != 1.0 or outputs:
            raise ValueError(
                f"a score head knows no temperature ({temperature}) and no statistics of tokens ({outputs})"
            )
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(wide)
            out = F.linear(hidden.to(wide), self.weight.to(wide), bias)  # [R, K]
        if debug_checks and not bool(out.isfinite().all()):
            raise ValueError(f"{int((~out.isfinite()).sum())} of {out.numel()} outputs of the head are not finite")
        reads = reads or getattr(objective, "reads", "")
        stats = head_stats(out, reads, getattr(objective, "mean_variance", False))
        return stats if objective is None else loss_from_scores(objective, stats, batch, aggregate=aggregate)


def head_stats(out: Tensor, reads: str, mean_variance: bool = False) -> HeadStats:
    """The outputs [R, K] under the name that a loss reads them by; two outputs may be mean and log-variance.

    Raises ValueError for another name than scores or values, or a mean-variance head without two outputs.
    """
    if reads not in ("scores", "values"):
        raise ValueError(f"this loss reads {reads or 'log-probs'!r}, a score head gives scores or values")
    if mean_variance:
        if out.shape[1] != 2:
            raise ValueError(f"a mean-variance head has 2 outputs, this one {out.shape[1]}; load it with num_labels=2")
        return HeadStats(**{reads: out[:, 0]}, log_variance=out[:, 1])
    return HeadStats(**{reads: out.squeeze(1) if out.shape[1] == 1 else out})


class ScoreModel(PackedModel):
    """Wraps a transformers model with a linear head of K outputs; `model` is transformers' own but for that module.

    model(input_ids [T], cu_seqlens, rows=[R], objective=..., batch=...) -> LossOutput, and the other calls of
    ScoreHead; without keywords the final hidden states, as PackedModel. Dropout before the head is left out.
    """

    def __init__(self, model: nn.Module):
        nn.Module.__init__(self)
        install_score_head(model)
        self.model = model
        self.packed = model.config._attn_implementation in NAMES.values()
        self.adapters = None
        self.notes: list[str] = []
        self._covered: str | None = None

    @property
    def head(self) -> ScoreHead:
        heads = (getattr(self.model, name, None) for name in HEADS)
        head = next((h for h in heads if getattr(h, "takes_objective", False)), None)
        if head is None:
            raise UnsupportedModelError(f"the head of {self.name} has been replaced; the fused calls would not see it")
        return head

    @property
    def body(self) -> nn.Module:
        return self.model.base_model

    def _split_head(
        self,
        hidden: Tensor,
        rows: Tensor,
        *,
        objective: Objective | None = None,
        batch: TokenBatch | None = None,
        reads: str = "",
        aggregate: Any = None,
        **options: Any,
    ) -> HeadStats | LossOutput:
        own, share = deal(hidden, rows, self.split)
        out = share.whole(self.head(own, reads="values", **options).values)
        out = out if out.dim() == 2 else out[:, None]
        stats = head_stats(out, reads or getattr(objective, "reads", ""), getattr(objective, "mean_variance", False))
        return stats if objective is None else loss_from_scores(objective, stats, batch, aggregate=aggregate)

    def scores(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[S] (or [S, K]) scores of packed sequences, float32, read where transformers reads them (`last_rows`)."""
        rows = last_rows(input_ids, cu_seqlens, self.pad_token_id)
        return self(input_ids, cu_seqlens, rows=rows, reads="scores").scores

    def values(self, input_ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None = None) -> Tensor:
        """[R] (or [R, K]) outputs at these rows, or at all of them; float32."""
        return self(input_ids, cu_seqlens, rows=rows, reads="values").values

    @property
    def pad_token_id(self) -> int | None:
        return self.model.config.get_text_config().pad_token_id


def last_rows(input_ids: Tensor, cu_seqlens: Tensor, pad_token_id: int | None) -> Tensor:
    """[S] the last row of each sequence whose token is not the padding token, or its first row where all are.

    This is where transformers reads a sequence's score, also when the padding token doubles as the end of a text.
    """
    bounds = cu_seqlens.to(input_ids.device).long()
    if pad_token_id is None:
        return (bounds[1:] - 1).clamp(min=0)
    at = torch.arange(1, input_ids.shape[0] + 1, device=input_ids.device)
    filled = torch.where(input_ids != pad_token_id, at, 0).cummax(0).values  # 1 + the last such row so far
    last = filled[bounds[1:] - 1] - 1 if len(filled) else bounds[1:] * 0
    return torch.maximum(last, bounds[:-1]).clamp(max=max(0, input_ids.shape[0] - 1))


def install_score_head(model: nn.Module) -> ScoreHead:
    """Put a ScoreHead where the model keeps its output layer, under the same name and with the same Parameters."""
    for name in HEADS:
        old = getattr(model, name, None)
        if isinstance(old, ScoreHead):
            return old
        if type(old) is nn.Linear:
            head = ScoreHead.from_linear(old)
            setattr(model, name, head)
            return head
    raise UnsupportedModelError(f"{type(model).__name__} has no linear head called {' or '.join(HEADS)}")


# -- loading -----------------------------------------------------------------------------------------------------------
def load_reward_model(path: str | Path, dtype=None, attn_implementation: str | None = None, **options) -> ScoreModel:
    """AutoModelForSequenceClassification, packed; also a critic (its head read at every row).

    Args:
        path: directory or hub name of a sequence classifier, or of any model with such a body (a causal LM, ...): the
            head is then new, drawn from torch's random generator.
        dtype, attn_implementation, revision, tokenizer: as load_causal_lm. The tokenizer's pad token becomes the
            model's where it has none.
        num_labels: outputs; default: those of the saved head, 1 for a new one.

    Raises: as load_causal_lm.
    """
    return _load("ForSequenceClassification", path, 1, dtype, attn_implementation, **options)


def load_token_classifier(
    path: str | Path, dtype=None, attn_implementation: str | None = None, **options
) -> ScoreModel:
    """AutoModelForTokenClassification, packed: a process reward model. As load_reward_model, but with 2 outputs."""
    return _load("ForTokenClassification", path, 2, dtype, attn_implementation, **options)


def is_reward_model(path: str | Path) -> bool:
    """Whether a directory holds a sequence classifier."""
    import json

    config = Path(path) / "config.json"
    kinds = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds or ())


def _load(
    kind: str,
    path,
    new_labels: int,
    dtype,
    attn_implementation,
    *,
    revision="main",
    tokenizer=None,
    num_labels=None,
    quantisation=None,
) -> ScoreModel:
    import transformers

    packs = is_packed(attn_implementation)
    if (base := base_of(path)) is not None:
        from fastrl.models.adapters import saved_labels

        how = {"revision": base.revision, "tokenizer": tokenizer, "quantisation": quantisation}
        labels = num_labels or saved_labels(path, HEADS) or new_labels
        return with_adapters(_load(kind, base.path, labels, dtype, attn_implementation, num_labels=labels, **how), path)
    refuse_foreign_code(path, revision)
    config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    auto = getattr(transformers, f"AutoModel{kind}")
    if type(config) not in auto._model_mapping:
        raise UnsupportedModelError(f"{path} is a {config.model_type!r} model; transformers has no {kind[3:]} of it")
    saved = any(str(name).endswith(kind) for name in config.architectures or ())
    if num_labels is None:
        num_labels = config.num_labels if saved else new_labels
    if quantisation:  # of token classifiers transformers would quantise the head too
        quantisation["quantization_config"].llm_int8_skip_modules = list(HEADS)
    model = read_model(
        auto,
        path,
        revision=revision,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantisation=quantisation,
        fresh=() if saved else tuple(f"{name}." for name in HEADS),
        num_labels=num_labels,
    )
    _give_pad_token(model, tokenizer)
    packed = ScoreModel(model)
    return pack_score_model(packed) if packs else packed


def _give_pad_token(model: nn.Module, tokenizer: Any) -> None:
    """transformers cannot score a batch without one; TRL falls back to the end-of-sequence token likewise."""
    text = model.config.get_text_config()
    if tokenizer is not None and text.pad_token_id is None:
        pad = tokenizer.pad_token_id
        text.pad_token_id = model.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad


# -- held against transformers -----------------------------------------------------------------------------------------
def pack_score_model(packed: ScoreModel) -> ScoreModel:
    """Packed attention on, and believed only if two packed documents get transformers' own outputs.

    A pack that mixes documents falls back to one sequence at a time, with a note. Raises UnsupportedModelError.
    """
    believed(packed, lambda: _pack(packed))
    return packed


def _pack(packed: ScoreModel) -> None:
    documents = _documents(packed.model)
    with evaluating(packed.model):
        want = [packed.model(ids[None], use_cache=False).logits.flatten(0, -2)[-1] for ids in documents[:2]]
    packed.use_packed_attention()
    with evaluating(packed):
        trouble = _trouble(packed, documents, want)
        if trouble and packed.packed:
            packed.use_plain_attention(f"packed sequences mix or fail ({trouble})")
            trouble = _trouble(packed, documents, want)
    if trouble:
        raise UnsupportedModelError(f"{packed.name} cannot be trained here: {trouble}")
    check_sharing(packed, documents[1], documents[3])


def _documents(model: nn.Module) -> list[Tensor]:
    """Two documents and their stand-ins, without special tokens."""
    embedding, config = model.get_input_embeddings().weight, model.config.get_text_config()
    special = [v for k, v in vars(config).items() if k.endswith("token_id") and isinstance(v, int)]
    words = torch.arange(embedding.shape[0])
    words = words[~torch.isin(words, torch.tensor(special, dtype=torch.long))]
    window = getattr(config, "sliding_window", None)
    length = min(9 + (window if isinstance(window, int) and window <= 64 else 0), _positions(config))
    generator = torch.Generator().manual_seed(0)
    lengths = (min(7, length), length) * 2
    return [words[torch.randint(len(words), (n,), generator=generator)].to(embedding.device) for n in lengths]


def _positions(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20


def _trouble(packed: ScoreModel, documents: list[Tensor], want: list[Tensor]) -> str | None:
    """What is wrong, in words, or None. Anything that this short run raises counts as wrong."""
    try:
        return _difference(packed, documents, want)
    except Exception as error:  # the body takes no such mask, no extra keywords, one sequence only, ...
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _difference(packed: ScoreModel, documents: list[Tensor], want: list[Tensor]) -> str | None:
    first, second, *others = documents
    n, dtype = first.shape[0], packed.head.weight.dtype
    cu_seqlens = torch.tensor([0, n, n + second.shape[0]], dtype=torch.int32)
    ends = torch.tensor([n - 1, n + second.shape[0] - 1], device=first.device)
    h = packed.hidden(torch.cat([first, second]), cu_seqlens)
    out = packed.head(h[ends], reads="values").values.view(2, -1)
    # A score may be near 0: its error is held against the length of what is multiplied.
    size = h[ends].float().norm(dim=1) * packed.head.weight.float().norm()
    error = ((out - torch.stack(want).float()).norm(dim=1) / size.clamp(min=1e-30)).max()
    limit = AGREES[dtype] if first.device.type == "cpu" else max(AGREES[dtype], ON_DEVICE.get(dtype, 0.0))
    if not error <= limit:
        return f"body and head give scores {error:.1e} (relative) from its own, allowed {limit:.0e}"
    left = packed.hidden(torch.cat([first, others[1]]), cu_seqlens)[:n]
    right = packed.hidden(torch.cat([others[0], second]), cu_seqlens)[n:]
    leak = row_error(torch.cat([left, right]), h).max()
    if not leak <= (APART[dtype] if _groups_tokens(packed.model) else 0.0):
        return f"changing one packed document changes hidden states of the other by {leak:.1e} (relative)"
    return None
