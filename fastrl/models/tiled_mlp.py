"""MLPs of decoder layers, tile by tile over tokens: their wide activations never exist for all tokens at once.

y_t = mlp(x_t) for each token t by itself, so a tile of tokens needs nothing of the others. The forward keeps x alone;
the backward makes one tile's activations again, takes its gradients, and goes on to the next. Idea: Arctic Long
Sequence Training (arXiv 2506.13996), TiledMLP.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastrl.models.check import AGREES, evaluating, row_error
from fastrl.models.outline import fact

NAMES = ("mlp", "feed_forward", "ffn", "ff", "mlp_block")  # what transformers calls the module in its layers
AUTO = -1
AUTO_TOKENS = 2048  # in a tile: large enough that its products still fill a device

_state = threading.local()


def is_running() -> bool:
    """Whether this thread is in the forward of a tile, of which nothing should be kept."""
    return getattr(_state, "depth", 0) > 0


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """What transformers does not split between devices."""
    names = {n for m in model.modules() for n in (getattr(m, "_no_split_modules", None) or ())}
    return [m for m in model.modules() if type(m).__name__ in names]


# -- finding and checking ----------------------------------------------------------------------------------------------
def tile_layers(model: nn.Module, tiles: int) -> list[str]:
    """Make every layer's MLP a TiledMLP, in place, parameters and names as they were. Returns notes.

    An MLP is taken only if it treats tokens one by one, which is tried out on a few random ones. Mixtures of experts
    are left alone: their tokens are sorted by expert, and no token's activations are wide.
    """
    taken, left, known = 0, {}, {}
    for layer in decoder_layers(model):
        for name, module in _mlps(layer):
            shape = (type(module), tuple((n, p.shape) for n, p in module.named_parameters()))
            if shape not in known:
                width = model.config.get_text_config().hidden_size
                known[shape] = fact(functools.partial(why_not, module, width))
            if known[shape] is None:
                tile(module, tiles)
                taken += 1
            else:
                left[name] = f"{type(module).__name__} {known[shape]}"
    notes = [f"--tiled_mlp leaves {name} alone: {why}" for name, why in left.items()]
    if not taken and not left:
        notes.append(f"--tiled_mlp does nothing: {type(model).__name__} has no layer with a {', '.join(NAMES)}")
    return notes


def _mlps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = ()
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in NAMES and not (inside and name.startswith(inside)):
            inside = (*inside, f"{name}.")
            yield name, module


def why_not(module: nn.Module, hidden_size: int) -> str | None:
    """In words what keeps an MLP from being tiled, or None."""
    names = [n for n, _ in module.named_modules()] + [n for n, _ in module.named_parameters()]
    if any("expert" in n or "router" in n for n in names):
        return "is a mixture of experts"
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, hidden_size, generator=generator).to(like.device, like.dtype)
    try:
        with evaluating(module):
            whole = module(x)
            parts = torch.cat([module(x[:, :2]), module(x[:, 2:])], dim=1)
    except Exception as error:  # it wants more arguments, gives a tuple, ...
        return f"does not run on hidden states alone ({type(error).__name__})"
    if whole.shape[:2] != x.shape[:2]:
        return f"gives {list(whole.shape)} for hidden states {list(x.shape)}"
    off = row_error(parts, whole).max()
    return None if off <= AGREES[x.dtype] else f"is not a function of each token by itself (off by {off:.1e})"


def tile(module: nn.Module, tiles: int) -> None:
    """Make `module` a TiledMLP in place."""
    if not isinstance(module, TiledMLP):
        module.__class__ = _tiled(type(module))
    module.tiles = tiles


@functools.cache
def _tiled(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Tiled{kind.__name__}", (TiledMLP, kind), {"whole": staticmethod(kind.forward)})


class TiledMLP(nn.Module):
    """Before an MLP's own class among its bases: hidden [..., T, H] -> [..., T, H], `tiles` stretches of T in turn.

    whole: the forward of the MLP's own class. tiles: AUTO or 0 and 1 for the whole at once.
    """

    whole: Callable[..., Tensor]
    tiles: int = 0

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[-2]
        count = -(-tokens // AUTO_TOKENS) if self.tiles == AUTO else min(self.tiles, tokens)
        if count <= 1:
            return self.whole(self, hidden)
        return run_tiled(self, hidden, count)


# -- running -----------------------------------------------------------------------------------------------------------
def run_tiled(module: TiledMLP, hidden: Tensor, count: int) -> Tensor:
    """`module.whole` over `count` tiles of hidden [..., T, H]; gradients for hidden and the module's parameters."""
    law = functools.partial(module.whole, module)
    trained = [p for p in module.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        return _forward(law, hidden, count)
    replay = Replay(hidden.device, module.training)
    if not hidden.requires_grad:
        return Tiles.apply(law, count, replay, None, hidden, *trained)
    kept = Keep.apply(hidden)
    return Tiles.apply(law, count, replay, kept.grad_fn, kept, *trained)


def _spans(tokens: int, count: int) -> list[tuple[int, int]]:
    """[0, tokens) in `count` stretches whose lengths differ by one at most."""
    at = [i * tokens // count for i in range(count + 1)]
    return list(zip(at, at[1:], strict=False))


def _forward(law: Callable[[Tensor], Tensor], hidden: Tensor, count: int) -> Tensor:
    out = None
    for a, b in _spans(hidden.shape[-2], count):
        y = law(hidden[..., a:b, :])
        if out is None:
            out = y.new_empty((*hidden.shape[:-1], y.shape[-1]))
        out[..., a:b, :] = y
    return out


class Keep(torch.autograd.Function):
    """hidden as it is, saved before any tile runs.

    A checkpoint around the layer stops recomputing at the last tensor that the layer saved. That is this one where
    nothing but a residual sum follows the MLP, and then the recomputation runs no tile.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> Tensor:
        return d_hidden


class Tiles(torch.autograd.Function):
    """(law, count, replay, the node of Keep or None, hidden, *parameters) -> law(hidden), tile by tile.

    Parameters are inputs, so that each gets one gradient, summed over the tiles, and its hooks run once.
    """

    @staticmethod
    def forward(ctx: Any, law, count: int, replay: Replay, keep: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.law, ctx.count, ctx.replay, ctx.keep, ctx.parameters = law, count, replay, keep, parameters
        if keep is None:
            ctx.save_for_backward(hidden)
        _state.depth = getattr(_state, "depth", 0) + 1
        try:
            with replay.autocast():
                return _forward(law, hidden, count)
        finally:
            _state.depth -= 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = (ctx.keep or ctx).saved_tensors
        wanted = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[5:], strict=True) if needed]
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[4] else None
        sums: list[Tensor | None] = [None] * len(wanted)
        with ctx.replay.again():
            for a, b in _spans(hidden.shape[-2], ctx.count):
                x = hidden[..., a:b, :].detach().requires_grad_(d_hidden is not None)
                with torch.enable_grad():
                    y = ctx.law(x)
                inputs = [x, *wanted] if d_hidden is not None else wanted
                grads = list(torch.autograd.grad(y, inputs, d_out[..., a:b, :], allow_unused=True))
                if d_hidden is not None:
                    d_hidden[..., a:b, :] = grads.pop(0)
                sums = [_added(total, new) for total, new in zip(sums, grads, strict=True)]
        made = iter(total if total is None else total.to(p.dtype) for p, total in zip(wanted, sums, strict=True))
        d_parameters = [next(made) if needed else None for needed in ctx.needs_input_grad[5:]]
        return None, None, None, None, d_hidden, *d_parameters


def _added(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    """total + new, in place, in float32 at least: one rounding per tile would be seen in bfloat16."""
    if total is None or new is None:
        wide = None if new is None else torch.promote_types(new.dtype, torch.float32)
        return total if new is None else new.to(wide, copy=True)
    return total.add_(new)


class Replay:
    """What surrounded the forward, put in place again for the backward: autocast, and in training the random state."""

    def __init__(self, device: torch.device, training: bool):
        self.device = device
        self.autocast_on = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)
        self.cpu = torch.get_rng_state() if training else None
        self.own = None
        if training and device.type != "cpu":
            self.own = torch.get_device_module(device.type).get_rng_state(device)

    def autocast(self) -> torch.autocast:
        """Without its cache: a weight cast where no gradient is taken must not be met again where one is."""
        on, dtype = self.autocast_on, self.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=on, cache_enabled=False)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Tiles run in the order of the forward draw the numbers that it drew."""
        devices = [] if self.own is None else [self.device]
        with torch.random.fork_rng(devices, enabled=self.cpu is not None), self.autocast():
            if self.cpu is not None:
                torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.get_device_module(self.device.type).set_rng_state(self.own, self.device)
            yield
