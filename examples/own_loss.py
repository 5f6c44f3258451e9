"""An objective of one's own: a function of per-token statistics with a scope. No kernel, no registration."""

from dataclasses import dataclass

import torch

import fastrl


@dataclass(frozen=True)
class Focal:
    """-(1 - p)^gamma log p: easy tokens weigh less (Lin et al. 2017, arXiv:1708.02002, eq. 4)."""

    gamma: float = 2.0
    scope = "token"

    def __call__(self, stats, batch):  # [T]
        return -((-torch.expm1(stats.logprobs)) ** self.gamma) * stats.logprobs


torch.manual_seed(0)
hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
batch = fastrl.TokenBatch(targets=torch.randint(0, 1000, (40,)))
out = fastrl.fused_loss(Focal(gamma=1.5), hidden, weight, batch)
out.loss.backward()

logits = (hidden @ weight.T).detach().requires_grad_()  # the same from logits, to see that it is
logp = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
want = (-((1 - logp.exp()) ** 1.5) * logp).mean()
want.backward()
torch.testing.assert_close(out.loss, want)
torch.testing.assert_close(hidden.grad, logits.grad @ weight.detach())
print(f"focal loss {out.loss:.3f}, as from logits")
