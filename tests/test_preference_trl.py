"""Every preference loss of TRL 1.16 against its own code: value, gradient and metrics on the same log-probs."""

from __future__ import annotations

import collections
import contextlib
import os
from types import SimpleNamespace

import pytest
import tiny
import torch
from oracle import assert_same
from torch import Tensor

from fastrl import TokenBatch, TokenStats, loss_from_logprobs, losses
from fastrl.data import encode_kto
from fastrl.models import load_tokenizer
from fastrl.train.stages.kto import mismatched

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", minversion="1.16")
from trl.experimental.cpo.cpo_trainer import CPOTrainer  # noqa: E402
from trl.experimental.orpo.orpo_trainer import ORPOTrainer  # noqa: E402
from trl.experimental.tpo.tpo_trainer import TPOTrainer  # noqa: E402
from trl.trainer import dpo_trainer, kto_trainer  # noqa: E402

LENGTHS = (5, 2, 8, 7, 1, 3, 9, 4)  # completion tokens, interleaved pairs
PROMPT = 2
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # TRL lays all chosen, then all rejected


class Case:
    """The same random completions as a packed batch and as TRL's padded one."""

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        rows = sum(LENGTHS)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        self.logp = (-1 - draw(rows).abs()).requires_grad_()
        self.ref = self.logp.detach() + 0.4 * draw(rows)
        self.log_sum_sq = -0.5 - draw(rows).abs()
        self.labels = torch.rand(len(LENGTHS), generator=g) < 0.5
        self.labels[:2] = torch.tensor([True, False])
        self.kl, self.ref_kl = draw(len(LENGTHS)) + 0.8, draw(len(LENGTHS)) * 0.2

    def padded(self, per_token: Tensor, order=ORDER) -> Tensor:
        """[R] -> [S, PROMPT - 1 + longest] in TRL's order: TRL's log-probs predict the next token."""
        width = PROMPT - 1 + max(LENGTHS)
        parts = per_token.split(LENGTHS)
        made = [torch.nn.functional.pad(parts[i], (PROMPT - 1, width - PROMPT + 1 - LENGTHS[i])) for i in order]
        return torch.stack(made)

    def inputs(self, order=ORDER) -> dict:
        ones = self.padded(torch.ones(sum(LENGTHS)), order).long()
        mask = torch.nn.functional.pad(ones, (1, 0))
        return {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}

    def model(self, log_probs: Tensor, order=ORDER):
        """A model whose fused head gives these log-probs."""
        log_probs = self.padded(log_probs, order)
        zeros = torch.zeros_like(log_probs)
        out = SimpleNamespace(
            log_probs=log_probs, log_sum_sq_probs=self.padded(self.log_sum_sq, order), entropy=zeros,
            mean_logits=zeros, is_top1=zeros.bool(),
        )  # fmt: skip

        class Model:
            training, is_gradient_checkpointing = True, False

            def __call__(self, **kwargs):
                return out

        return Model()

    def trainer(self, **options) -> SimpleNamespace:
        """What TRL's loss reads of its trainer."""
        same = lambda x: x  # noqa: E731
        return SimpleNamespace(
            model=self.model(self.logp), ref_model=self.model(self.ref), aux_loss_enabled=False, _tp_size=1,
            precompute_ref_logps=False, _total_train_tokens=0, _metrics=collections.defaultdict(
                lambda: collections.defaultdict(list)), args=SimpleNamespace(gradient_checkpointing_kwargs=None,
                discopop_tau=options.pop("tau", 0.05)),
            accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same), **options,
        )  # fmt: skip

    def ours(self, objective, **fields):
        cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        batch = TokenBatch(torch.zeros(sum(LENGTHS), dtype=torch.long), cu_seqlens=cu, ref_logprobs=self.ref, **fields)
        return loss_from_logprobs(objective, TokenStats(logprobs=self.logp, log_sum_sq_probs=self.log_sum_sq), batch)

    def agree(self, out, loss: Tensor, metrics: dict | None = None) -> None:
        assert_same("loss", out.loss, loss, 1e-6)  # TRL makes some numbers float32
        [mine], [theirs] = (torch.autograd.grad(x, self.logp, retain_graph=True) for x in (out.loss, loss))
        assert theirs.any()
        assert_same("gradient", mine, theirs, 1e-6)
        shared = {n: v[0] for n, v in (metrics or {}).items() if n.startswith(("rewards/", "logps/", "kl"))}
        assert metrics is None or len(shared) >= 5
        for name, value in shared.items():
            assert_same(name, out.metrics[name].double(), torch.tensor(value).double(), 1e-5)


# -- DPO ---------------------------------------------------------------------------------------------------------------
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
DPO = [(name, {}) for name in (
    "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft", "sigmoid_norm",
)] + [
    ("exo_pair", {"label_smoothing": 0.01}), ("robust", {"label_smoothing": 0.2}), ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.1}), ("discopop", {"tau": 0.3, "beta": 0.5}), ("robust", {}),
    *[(name, {"use_weighting": True}) for name in ("sigmoid", "ipo", "apo_down", "sppo_hard")],
    *[(name, {"ld_alpha": 0.3}) for name in ("sigmoid", "nca_pair", "aot", "ipo")],
    *[(name, {"f_divergence": f, "beta": 0.3}) for f in DIVERGENCES for name in ("sigmoid", "hinge", "ipo")],
]  # fmt: skip


def trl_dpo(case: Case, names: list[str], weights: list[float], options: dict, patch) -> tuple[Tensor, dict]:
    patch.setattr(dpo_trainer, "is_peft_model", lambda model: False)
    patch.setattr(dpo_trainer, "disable_gradient_checkpointing", lambda *args: contextlib.nullcontext())
    plain = {"label_smoothing": 0.0, "beta": 0.1, "ld_alpha": None, "use_weighting": False, "f_alpha": 0.5} | options
    trainer = case.trainer(
        loss_types=names, loss_weights=weights, f_divergence_type=plain.pop("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=plain.pop("f_alpha"), **plain,
    )  # fmt: skip
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, trainer.model, case.inputs(), False)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize("name,options", DPO)
def test_dpo(name, options, monkeypatch):
    # TRL exponentiates alpha divergences in float32 only, and clamps: cases stay where neither matters.
    case = Case(1)
    if options.get("f_divergence") == "alpha_divergence":
        case.logp = case.logp.detach().float().requires_grad_()
        case.ref = case.ref.float()
    loss, metrics = trl_dpo(case, [name], [1.0], options, monkeypatch)
    own = {"label_smoothing": 0.0, **options} if name == "robust" else options
    out = case.ours(losses.get(name, **own))
    case.agree(out, loss, None if name == "sft" else metrics)


def test_several_losses_with_weights(monkeypatch):
    case, names, weights = Case(2), ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]  # MPO
    loss, metrics = trl_dpo(case, names, weights, {"beta": 0.3}, monkeypatch)
    case.agree(case.ours(losses.combined(names, weights, beta=0.3)), loss, metrics)


# -- KTO ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.7, "desirable_weight": 1.4, "undesirable_weight": 0.6}])
def test_kto(name, options, monkeypatch):
    monkeypatch.setattr(kto_trainer, "is_peft_model", lambda model: False)
    monkeypatch.setattr(kto_trainer, "disable_gradient_checkpointing", lambda *args: contextlib.nullcontext())
    case, same_order = Case(3), tuple(range(len(LENGTHS)))
    plain = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | options
    trainer = case.trainer(loss_type=name, calculate_KL=name == "kto", **plain)
    trainer.model, trainer.ref_model = (case.model(x, same_order) for x in (case.logp, case.ref))
    trainer._compute_kl_logps = lambda model, batch: case.kl if model is trainer.model else case.ref_kl
    inputs = {**case.inputs(same_order), "label": case.labels}
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    columns = {"per_sequence": {"kl": case.kl - case.ref_kl}} if name == "kto" else {}
    out = case.ours(losses.get(name, **options), labels=case.labels, **columns)
    metrics = dict(trainer._metrics["train"])
    if name != "kto":
        metrics.pop("kl")
    case.agree(out, loss, metrics)


# -- CPO, SimPO, AlphaPO, ORPO, TPO ------------------------------------------------------------------------------------
def sums(case: Case, mean: bool) -> tuple[Tensor, Tensor]:
    each = torch.stack([x.mean() if mean else x.sum() for x in case.logp.split(LENGTHS)])
    return each[0::2], each[1::2]


CPO = [
    ("cpo", {}, {"loss_type": "sigmoid"}),
    ("cpo", {"label_smoothing": 0.2, "beta": 0.4}, {"loss_type": "sigmoid"}),
    ("cpo", {"kind": "hinge"}, {"loss_type": "hinge"}),
    ("cpo", {"kind": "ipo", "length_normalised": True}, {"loss_type": "ipo"}),
    ("simpo", {"gamma": 0.7}, {"loss_type": "simpo", "simpo_gamma": 0.7}),
    ("alphapo", {"gamma": 0.5, "alpha": 0.3}, {"loss_type": "simpo", "simpo_gamma": 0.5, "alpha": 0.3}),
    ("alphapo", {"gamma": 0.0, "alpha": -0.2, "length_normalised": False}, {"loss_type": "sigmoid", "alpha": -0.2}),
]


@pytest.mark.parametrize("name,options,theirs", CPO)
def test_cpo(name, options, theirs):
    case = Case(4)
    beta = options.get("beta", 0.1)
    plain = {"label_smoothing": options.get("label_smoothing", 0.0), "alpha": 0.0, "beta": beta, **theirs}
    trainer = case.trainer(**plain)
    values, chosen, rejected = CPOTrainer.cpo_loss(trainer, *sums(case, theirs["loss_type"] in ("ipo", "simpo")))
    without = {"nll_coef": 0.0} if name == "cpo" else {}
    out = case.ours(losses.get(name, **{"beta": beta, **options, **without}))
    case.agree(out, values.mean())
    assert_same("rewards", out.metrics["rewards/chosen"], chosen.mean(), 1e-6)
    assert_same("rewards", out.metrics["rewards/rejected"], rejected.mean(), 1e-6)


def test_orpo():
    case = Case(5)
    trainer = case.trainer(beta=0.3)
    values, chosen, rejected, ratio, odds = ORPOTrainer.odds_ratio_loss(trainer, *sums(case, True))
    out = case.ours(losses.get("orpo", beta=0.3, nll_coef=0.0))
    case.agree(out, -values.mean().double())
    assert_same("rewards", out.metrics["rewards/chosen"], chosen.mean(), 1e-6)
    assert_same("log_odds_ratio", out.metrics["log_odds_ratio"], ratio.double(), 1e-6)
    assert_same("log_odds_chosen", out.metrics["log_odds_chosen"], odds.double(), 1e-6)


TPO = [
    ({}, {"loss_type": "sigmoid"}),
    ({"beta": 0.5, "gamma": 0.5, "length_normalised": True}, {"loss_type": "tpo-l", "tpo_l_gamma": 0.5}),
    ({"kind": "hinge", "nll_coef": 0.3}, {"loss_type": "hinge"}),
    ({"kind": "ipo", "length_normalised": True}, {"loss_type": "ipo"}),
]


@pytest.mark.parametrize("options,theirs", TPO)
def test_tpo(options, theirs):
    """Through logits, whose log-softmax is in turn what the packed log-probs are taken from."""
    g = torch.Generator().manual_seed(6)
    lengths, v = (4, 3, 6, 2, 5, 7), 11  # two triples: chosen, rejected, gold
    ids = torch.randint(0, v, (6, PROMPT + 7), generator=g)
    mask = torch.stack([torch.arange(PROMPT + 7).sub(PROMPT).ge(0) & torch.arange(PROMPT + 7).lt(PROMPT + n)
                        for n in lengths]).long()  # fmt: skip
    logits = torch.randn(6, PROMPT + 7, v, generator=g, dtype=torch.float64, requires_grad=True)
    order = [0, 3, 1, 4, 2, 5]
    plain = {"beta": options.get("beta", 0.01), "tpo_alpha": options.get("nll_coef", 1.0), "label_smoothing": 0.0}
    trainer = Case().trainer(**plain, **theirs)
    model = lambda **kwargs: SimpleNamespace(logits=logits[order])  # noqa: E731
    trainer.model = SimpleNamespace(training=True)
    inputs = {"input_ids": ids[order], "attention_mask": torch.ones_like(ids), "completion_mask": mask[order]}
    loss = TPOTrainer._compute_loss(trainer, model, inputs, False)
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][mask[:, 1:].bool()]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = TokenBatch(torch.zeros(sum(lengths), dtype=torch.long), cu_seqlens=cu,
                       group_ids=torch.tensor([5, 5, 5, 1, 1, 1]))  # fmt: skip
    out = loss_from_logprobs(losses.get("tpo", **options), logp, batch)
    assert_same("loss", out.loss, loss, 1e-6)
    [mine], [other] = (torch.autograd.grad(x, logits, retain_graph=True) for x in (out.loss, loss))
    assert_same("gradient", mine, other, 1e-6)
    for name, value in trainer._metrics["train"].items():
        if name.startswith(("rewards/", "logps/")):
            assert_same(name, out.metrics[name].double(), torch.tensor(value[0]).double(), 1e-5)


# -- rows of `fastrl kto` ----------------------------------------------------------------------------------------------
PAIRED = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "3 ?"}, {"prompt": "2+7=", "chosen": "9", "rejected": "27"},
    {"prompt": "a b", "chosen": " c", "rejected": "ab"}, {"chosen": "3+4=7", "rejected": "3+4=8"},
]  # fmt: skip
SINGLE = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}", "label": i % 2 == 0} for i in range(5)]


@pytest.mark.parametrize("rows", [PAIRED, PAIRED[3:], SINGLE], ids=["pairs", "implicit prompt", "single"])
def test_rows_of_kto(rows, tmp_path):
    """The same tokens, labels and mismatched answers."""
    datasets = pytest.importorskip("datasets")
    rows = [r for r in rows if ("prompt" in r) == ("prompt" in rows[0])]
    tokenizer = load_tokenizer(tiny.make_model(tmp_path))
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    args = SimpleNamespace(max_length=64, dataset_num_proc=None, per_device_train_batch_size=100)
    table = datasets.Dataset.from_list(rows)
    theirs = kto_trainer.KTOTrainer._prepare_dataset(trainer, table, tokenizer, args, "train")
    ours, _ = encode_kto(rows, tokenizer)
    other = sorted((r["prompt_ids"] + r["completion_ids"], r["label"]) for r in theirs)
    assert sorted((s.input_ids, s.fields["label"]) for s in ours) == other
    lengths = {tuple(r["prompt_ids"] + r["completion_ids"]): len(r["prompt_ids"]) for r in theirs}
    assert all(s.prompt_length == lengths[tuple(s.input_ids)] for s in ours)
    by_ids = {(tuple(s.input_ids), s.fields["label"]): s for s in ours}
    in_order = [by_ids[tuple(r["prompt_ids"] + r["completion_ids"]), r["label"]] for r in theirs]
    for i, row in enumerate(theirs):
        made = mismatched(in_order[i], in_order[i - 1], None)
        assert made.input_ids == row["prompt_ids"] + row["KL_completion_ids"]
