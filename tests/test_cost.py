"""What a call may cost: GEMMs counted by their multiply-adds, memory by the tensors that live at once. No clocks."""

from __future__ import annotations

import pytest
import torch
from oracle import Watch
from test_losses import own_batch, own_group, own_sequence

from fastrl import TokenBatch, fused_loss, linear_logprobs, losses

T, H, V = 32, 16, 64
GEMM = T * H * V


def call(objective, needs=(True, True), mask=None, advantages=None, workspace_bytes=10 * V * 4, **how) -> int:
    """GEMMs (in units of one of T x H x V) that loss and backward take."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=g).requires_grad_(a) for n, a in zip((T, V), needs, strict=True))
    batch = TokenBatch(
        targets=torch.randint(0, V, (T,), generator=g),
        mask=mask,
        cu_seqlens=torch.tensor([0, 5, 12, 20, 32]),
        advantages=torch.randn(T, generator=g) if advantages is None else advantages,
        ref_logprobs=torch.randn(T, generator=g),
        group_ids=torch.tensor([0, 0, 1, 1]),
        rewards=torch.randn(4, generator=g),
    )
    with Watch() as watch:
        out = fused_loss(objective, hidden, weight, batch, workspace_bytes=workspace_bytes, **how)
        if out.loss.requires_grad:
            out.loss.backward()
    return watch.macs / GEMM


@pytest.mark.parametrize("name", ["nll", "reinforce", "ppo_clip", "grpo", "dapo"])
@pytest.mark.parametrize(
    "needs,gemms", [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_token_scope_takes_one_pass(name, needs, gemms):
    assert call(losses.get(name), needs) == gemms


@pytest.mark.parametrize(
    "objective", [losses.get("dpo"), own_sequence, own_group, own_batch], ids=["dpo", "sequence", "group", "batch"]
)
@pytest.mark.parametrize(
    "needs,gemms", [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_wider_scopes_take_one_pass_where_their_unit_fits(objective, needs, gemms):
    """The logits of all 32 rows are there; of a unit that does not fit, tests/test_strategies.py counts the rest."""
    assert call(objective, needs, workspace_bytes=1 << 20) == gemms
    if any(needs):
        assert gemms < call(objective, needs) < gemms + 1
        assert call(objective, needs, strategy="two_pass") == gemms + 1


@pytest.mark.parametrize("name", ["nll", "dapo", "dpo"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_one_gemm(name, context):
    with context():
        assert call(losses.get(name)) == 1


@pytest.mark.parametrize("workspace,rows", [(1, 1), (4 * V * 4, 3), (1 << 20, 32)])
def test_the_workspace_changes_the_flops_of_units_only(workspace, rows):
    """Pairs of 12 and 20 rows: what does not fit is made again."""
    assert call(losses.get("nll"), workspace_bytes=workspace) == 3
    assert call(losses.get("dpo"), workspace_bytes=workspace) == 3 + (max(0, 12 - rows) + max(0, 20 - rows)) / 32
    assert call(losses.get("dpo"), workspace_bytes=workspace, strategy="two_pass") == 4


def test_rows_without_advantage_are_dropped_from_the_gradient_gemms():
    advantages = torch.where(torch.arange(T) % 4 == 0, 1.0, 0.0)
    assert call(losses.get("grpo"), advantages=advantages) == 1 + 2 / 4
    assert call(losses.get("grpo"), advantages=torch.zeros(T)) == 1
    with_kl = losses.get("grpo", kl_coef=0.1)
    assert call(with_kl, advantages=advantages) == 3  # the KL term trains them all the same


def test_masked_rows_cost_nothing():
    mask = torch.arange(T) % 2 == 0
    assert call(losses.get("nll"), mask=mask) == 3 / 2
    assert call(losses.get("dpo"), mask=mask, workspace_bytes=1 << 20) == 3 / 2
    assert call(losses.get("dpo"), mask=mask, strategy="two_pass") == 4 / 2
    assert call(losses.get("nll"), mask=torch.zeros(T, dtype=torch.bool)) == 0


# -- memory --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["nll", "dapo", "dpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_stays_within_workspace_and_gradients(name, dtype):
    """At 512 x 32768 the logits would take 64 MiB. One block of rows (2 MiB) may have two temporaries beside it."""
    n, h, v, workspace = 512, 64, 32768, 4 << 20
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, h, generator=g).to(dtype).requires_grad_() for k in (n, v))
    mask = torch.rand(n, generator=g) < 0.9
    batch = TokenBatch(
        targets=torch.randint(0, v, (n,), generator=g),
        mask=mask,
        cu_seqlens=torch.arange(0, n + 1, 32),
        advantages=torch.where(torch.arange(n) % 3 == 0, 0.0, 1.0),
        ref_logprobs=torch.full((n,), -9.0),
    )
    options = {"entropy_coef": 0.1} if name == "dapo" else {}
    with Watch() as watch:
        out = fused_loss(losses.get(name, **options), hidden, weight, batch, workspace_bytes=workspace)
        out.loss.backward()
    gradients = (n + v) * h * 4 + (0 if dtype == torch.float32 else (n + v) * h * 2)
    widened = 0 if dtype == torch.float32 else 8 << 20
    rows = 6 * n * h * 4  # kept rows of hidden and their gradients
    assert watch.largest < n * v // 4
    assert watch.peak <= workspace + gradients + widened + rows + 3 * (2 << 20), f"{watch.peak / 2**20:.1f} MiB"


def test_scoring_needs_no_more_than_the_workspace():
    n, h, v, workspace = 512, 64, 32768, 4 << 20
    hidden, weight, targets = torch.randn(n, h), torch.randn(v, h), torch.randint(0, v, (n,))
    with Watch() as watch, torch.no_grad():
        linear_logprobs(hidden, weight, targets, outputs=("logprobs", "entropy"), workspace_bytes=workspace)
    assert watch.peak <= workspace + 3 * (2 << 20), f"{watch.peak / 2**20:.1f} MiB"


def test_the_watch_sees_what_it_is_there_to_see():
    """Negative control: materialised logits are caught by both measures, and their GEMMs are counted."""
    hidden, weight = torch.randn(T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    with Watch() as watch:
        torch.log_softmax(hidden @ weight.t(), -1)[:, 0].sum().backward()
    assert watch.macs == 3 * GEMM and watch.largest >= T * V and watch.peak >= 2 * T * V * 4
