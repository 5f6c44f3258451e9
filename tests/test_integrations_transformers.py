"""A patched transformers model against the same model unpatched: losses, gradients, memory, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
import zoo
from oracle import Watch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

import fastrl
from fastrl import losses
from fastrl.integrations import DeferredLogits, causal_lm_of, deferring, head_of
from fastrl.integrations.transformers import CausalLMLoss, patch, unpatch
from fastrl.models import UnsupportedModelError, pack_model
from fastrl.tokens import TokenBatch

ROWS, LENGTH = 3, 14


def inputs(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> dict:
    """Padded on the left in the first row and on the right in the second, with a masked prompt in the last."""
    ids = torch.stack(zoo.documents((length,) * rows, seed))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 9:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pair(name: str, dtype: torch.dtype = torch.float32, **overrides):
    plain = zoo.make(name, dtype, **overrides)
    return plain, patch(copy.deepcopy(plain))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_training(plain, mine, given: dict, tolerance: float = 5e-6) -> None:
    want, got = plain(**given), mine(**given)
    assert type(got) is type(want) and list(got) == list(want)
    assert got.loss.dtype == want.loss.dtype and isinstance(got.logits, DeferredLogits)
    assert got.logits.shape == want.logits.shape and got.logits.dtype == want.logits.dtype
    torch.testing.assert_close(got.loss, want.loss, atol=0, rtol=tolerance)
    theirs, ours = gradients(plain, want.loss), gradients(mine, got.loss)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        error = (ours[name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error <= tolerance, (name, float(error))


# -- the same loss and gradients ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(zoo.ALL))
def test_loss_and_every_gradient(name):
    plain, mine = pair(name)
    assert_same_training(plain, mine, inputs())
    assert_same_training(plain, mine, {**inputs(1), "num_items_in_batch": 57})
    assert_same_training(plain, mine, {**inputs(2), "num_items_in_batch": torch.tensor(31)})


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "phi"])
def test_float64_keeps_its_own_dtypes(name):
    """transformers' loss is float32 even then, and its norms and rotations; ours rounds the loss alone."""
    assert_same_training(*pair(name, torch.float64), inputs(), 3e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "cohere", "gpt2"])
def test_bfloat16_is_as_exact_as_unpatched(name):
    truth = zoo.make(name, torch.bfloat16).float()
    plain, mine = pair(name, torch.bfloat16)
    made = []
    for model in (truth, plain, mine):
        loss = model(**inputs()).loss
        assert loss.dtype == torch.float32
        made.append((loss.double(), gradients(model, loss)))
    (want, exact), (theirs, plain_grads), (ours, own_grads) = made
    assert (ours - want).abs() <= 1.5 * (theirs - want).abs() + 1e-3 * want.abs()
    head = "lm_head.weight" if "lm_head.weight" in exact else next(iter(exact))  # or the embedding that it is tied to
    for names, k in (([head], 1.25), (list(exact), 1.5)):
        flat = [torch.cat([g[n].float().flatten() for n in names]) for g in (own_grads, plain_grads, exact)]
        error, allowed = ((x - flat[2]).norm() for x in flat[:2])
        assert error <= k * allowed, (names[0], float(error), float(allowed))


def test_under_autocast():
    plain, mine = pair("gemma2")
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(**inputs()), mine(**inputs())
    assert got.loss.dtype == want.loss.dtype and got.logits.dtype == want.logits.dtype
    torch.testing.assert_close(got.loss, want.loss, atol=0, rtol=5e-3)
    theirs, ours = gradients(plain, want.loss), gradients(mine, got.loss)
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 3e-2 * grad.norm(), name


def test_float16_gradients_do_not_underflow_before_they_are_scaled():
    """A GradScaler's factor comes after the gradients are made: 1 / num_items must not flush them to 0 until then."""
    truth, mine = pair("llama")
    unpatch(mine)
    patch(mine.half())
    given, scale, count = inputs(), 2.0**16, 2_000_000
    made = []
    for model in (truth, mine):
        loss = model(**given, num_items_in_batch=count).loss
        made.append((loss.detach(), gradients(model, loss * scale)["lm_head.weight"].float()))
    (want, exact), (got, grad) = made
    torch.testing.assert_close(got, want, atol=0, rtol=1e-2)
    assert (grad - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_embeddings_as_inputs(name):
    plain, mine = pair(name)
    given = inputs()
    ids, grads = given.pop("input_ids"), []
    for model in (plain, mine):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, **given).loss
        grads.append((loss.detach(), torch.autograd.grad(loss, embedded)[0]))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain, mine = pair("qwen3")
    for model in (plain, mine):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_same_training(plain, mine, {**inputs(), "use_cache": False})


def test_the_routers_loss_is_added():
    sizes = zoo.SIZES | zoo.EXPERTS | {"router_aux_loss_coef": 0.7, "output_router_logits": True}
    torch.manual_seed(0)
    plain = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    mine = patch(copy.deepcopy(plain))
    given = inputs()
    assert plain(**given).aux_loss > 0
    assert_same_training(plain, mine, given)
    assert_same_training(*pair("gpt_oss", output_router_logits=True), given)
    loss, aux_loss, logits, *_ = mine(**given, return_dict=False)
    assert aux_loss > 0 and isinstance(logits, DeferredLogits) and loss == mine(**given).loss


def test_shifted_labels_and_the_rows_kept():
    plain, mine = pair("llama")
    given = inputs()
    labels = given.pop("labels")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert_same_training(plain, mine, {**given, "labels": labels, "shift_labels": shifted.roll(1, 0)})
    assert_same_training(plain, mine, {**given, "labels": labels[:, -6:], "logits_to_keep": 6})
    with pytest.raises(ValueError, match=r"logits are \[3, 6, 97\] but labels \[3, 14\]"):
        mine(**given, labels=labels, logits_to_keep=6)


def test_nothing_to_learn_is_what_torch_makes_of_it():
    plain, mine = pair("llama")
    given = inputs() | {"labels": torch.full((ROWS, LENGTH), -100)}
    assert plain(**given).loss.isnan() and mine(**given).loss.isnan()
    loss = mine(**given, num_items_in_batch=5).loss
    assert loss == 0 == plain(**given, num_items_in_batch=5).loss
    assert all((grad == 0).all() for grad in gradients(mine, loss).values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_labels_by_place_and_tuples(name):
    plain, mine = pair(name)
    given = inputs()
    names = list(inspect.signature(type(plain).forward).parameters)[1:]
    values = [given.get(n) for n in names[: names.index("labels") + 1]]
    want, got = plain(*values, return_dict=False), mine(*values, return_dict=False)
    assert isinstance(got, tuple) and len(got) == len(want) and isinstance(got[1], DeferredLogits)
    torch.testing.assert_close(got[0], want[0], atol=0, rtol=5e-6)
    assert inspect.signature(mine.forward) == inspect.signature(plain.forward)  # the Trainer reads it


# -- what stays as it was ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_calls_without_labels_and_generation(name):
    plain, mine = pair(name)
    given = inputs()
    given.pop("labels")
    assert torch.equal(mine(**given).logits, plain(**given).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    left = {k: v[:1] for k, v in given.items()}
    assert torch.equal(mine.generate(**left, **options), plain.generate(**left, **options))


def test_it_is_found_from_the_package():
    """Nothing heavy is imported before it is asked for."""
    code = "import sys, fastrl.integrations; assert not {'torch', 'transformers', 'trl', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert fastrl.integrations.transformers.patch is patch


def test_unpatch_restores_everything():
    model = zoo.make("cohere")
    before, head = dict(vars(model)), dict(vars(model.lm_head))
    patch(model)(**inputs()).loss.backward()
    assert unpatch(model) is model and vars(model) == before and vars(model.lm_head) == head
    assert isinstance(model(**inputs()).logits, torch.Tensor)
    with pytest.raises(ValueError, match="CohereForCausalLM is not patched"):
        unpatch(model)
    patch(model)
    with pytest.raises(ValueError, match="CohereForCausalLM is patched already"):
        patch(model)


def test_a_forward_that_raises_leaves_nothing_behind():
    model = patch(zoo.make("llama"))
    before, head = dict(vars(model)), dict(vars(model.lm_head))
    with pytest.raises(ValueError, match="outside"):
        model(**inputs() | {"labels": torch.full((ROWS, LENGTH), 97)})
    assert vars(model) == before and vars(model.lm_head) == head


def test_a_copy_is_patched_by_itself():
    first = patch(zoo.make("llama"))
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.lm_head.weight.mul_(2)
    assert first(**inputs()).loss != second(**inputs()).loss
    unpatch(first)
    assert isinstance(second(**inputs()).logits, DeferredLogits) and isinstance(first(**inputs()).logits, torch.Tensor)


def test_a_forward_wrapped_since_stays_wrapped():
    """accelerate wraps model.forward in a mixed-precision context when it prepares a model."""
    model, plain = patch(zoo.make("llama")), zoo.make("llama")
    inner, calls = model.forward, []
    model.forward = lambda *a, **k: (calls.append(1), inner(*a, **k))[1]
    unpatch(model)
    assert torch.equal(model(**inputs()).logits, plain(**inputs()).logits) and calls
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    assert isinstance(patch(model)(**inputs()).logits, DeferredLogits)
    model.forward = inner
    assert unpatch(model).forward.__func__ is plain.forward.__func__


def test_weights_moved_in_by_hooks():
    """accelerate's offloading keeps a head's weight elsewhere until its module is called."""
    from accelerate import cpu_offload

    plain, mine = zoo.make("llama"), zoo.make("llama")
    cpu_offload(mine, torch.device("cpu"))
    assert mine.lm_head.weight.device.type == "meta"
    with torch.no_grad():
        loss = patch(mine)(**inputs()).loss
    torch.testing.assert_close(loss, plain(**inputs()).loss.detach(), atol=0, rtol=5e-6)
    unpatch(mine)
    assert torch.equal(mine(**inputs()).logits, plain(**inputs()).logits)


def test_a_patched_model_saves_and_loads(tmp_path):
    model = patch(zoo.make("qwen3"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs()).loss, unpatch(model)(**inputs()).loss)


def test_only_training():
    model = patch(zoo.make("llama"), only_training=True)
    assert isinstance(model(**inputs()).logits, torch.Tensor)
    assert isinstance(model.train()(**inputs()).logits, DeferredLogits)


def test_a_packed_model_can_be_patched_too():
    plain, packed = zoo.make("gemma2"), pack_model(zoo.make("gemma2"))
    patch(packed)
    assert causal_lm_of(packed) is packed.model
    assert_same_training(plain, packed.model, inputs(), 2e-5)


# -- memory ------------------------------------------------------------------------------------------------------------
def test_no_logits_are_formed():
    size, rows, length = 4001, 4, 64
    given = inputs(rows=rows, length=length)
    largest = {}
    for kind, model in zip(("plain", "mine"), pair("llama", vocab_size=size), strict=True):
        if kind == "mine":
            patch(unpatch(model), workspace_bytes=1 << 18)
        with Watch() as watch:
            model(**given).loss.backward()
        largest[kind] = watch.largest
    logits = rows * length * size
    assert largest["plain"] >= logits
    assert largest["mine"] <= size * 32  # the head's own gradient


# -- under other wrappers ----------------------------------------------------------------------------------------------
def test_compiled():
    from torch._dynamo.utils import counters

    plain, mine = pair("llama", num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(mine, backend="eager")
    assert causal_lm_of(compiled) is mine and head_of(compiled).module is mine.lm_head
    graphs = []
    for seed in range(3):
        want, got = plain(**inputs(seed)), compiled(**inputs(seed))
        torch.testing.assert_close(got.loss, want.loss, atol=0, rtol=5e-6)
        theirs, ours = gradients(plain, want.loss), gradients(mine, got.loss)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0  # the body is compiled, once
    torch._dynamo.reset()


def test_under_ddp(tmp_path):
    import torch.distributed as dist

    plain, mine = pair("qwen3")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(mine)
        assert causal_lm_of(wrapped) is mine
        want, got = plain(**inputs()).loss, wrapped(**inputs()).loss
        theirs, ours = gradients(plain, want), gradients(mine, got)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # an own head, a tied one
def test_sharded(name, tmp_path):
    """Over one rank: outside of its module's call a sharded weight is a DTensor, which no operator takes."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain, mine = pair(name)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        own = [] if mine.config.tie_word_embeddings else [mine.lm_head]
        for module in (*mine.model.layers, *own, mine):
            fully_shard(module, mesh=mesh)
        want, got = plain(**inputs()).loss, mine(**inputs()).loss
        theirs, ours = gradients(plain, want), gradients(mine, got)
        torch.testing.assert_close({n: g.full_tensor() for n, g in ours.items()}, theirs, atol=1e-6, rtol=1e-5)
    finally:
        dist.destroy_process_group()


# -- deferred logits ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "minicpm3", "phi"])
def test_deferred_logits_and_head_give_log_probs(name):
    model, given = zoo.make(name), inputs()
    ids = given["input_ids"]
    logits = model(**given).logits[:, :-1].double()
    want = (logits / 0.7).log_softmax(-1)
    with deferring(model):
        deferred = model(input_ids=ids, attention_mask=given["attention_mask"]).logits
        hidden = model.get_decoder()(input_ids=ids, attention_mask=given["attention_mask"])[0][:, :-1]
    asked = {"outputs": ("logprobs", "entropy"), "temperature": 0.7}
    for stats in (deferred[:, :-1].logprobs(ids[:, 1:], **asked), head_of(model).logprobs(hidden, ids[:, 1:], **asked)):
        torch.testing.assert_close(stats.logprobs.double(), want.gather(2, ids[:, 1:, None])[..., 0], atol=2e-5, rtol=0)
        torch.testing.assert_close(stats.entropy.double(), -(want * want.exp()).sum(-1), atol=2e-5, rtol=0)
    batch = TokenBatch(targets=ids[:, 1:].reshape(-1))
    loss = deferred[..., :-1, :].float().loss(losses.get("nll"), batch).loss
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets)
    torch.testing.assert_close(loss.double(), want, atol=0, rtol=1e-5)


def test_slices_of_deferred_logits():
    with deferring(model := zoo.make("llama")):
        deferred = model(inputs()["input_ids"]).logits
    mask = torch.rand(ROWS, LENGTH) < 0.5
    full = deferred.hidden
    rows = torch.tensor([2, 0])
    for index in (1, slice(1, 2), (0, 3), (slice(None), -1), (..., slice(2, 5), slice(None)), mask, rows):
        assert torch.equal(deferred[index].hidden, full[index]) and deferred[index].shape[-1] == zoo.VOCABULARY
    for index in ((0, 1, 2), (..., slice(0, 5)), (..., 3), (0, None), (0, 0, 0, 0)):
        with pytest.raises(UnsupportedModelError, match="the slice"):
            deferred[index]


TOUCHES = {
    "attribute 'argmax'": lambda x: x.argmax(-1),
    "attribute 'detach'": lambda x: x.detach(),
    "attribute 'view'": lambda x: x.view(-1),
    "softmax": lambda x: torch.softmax(x, -1),
    "add": lambda x: torch.ones(3) + x,
    "product with a tensor": lambda x: x * torch.ones(97),
    "second tanh": lambda x: torch.tanh(torch.tanh(x)),
    "argmax": lambda x: torch.argmax(x),
}


@pytest.mark.parametrize(("what", "touch"), TOUCHES.items(), ids=TOUCHES)
def test_touching_deferred_logits_says_why_there_are_none(what, touch):
    logits = patch(zoo.make("llama"))(**inputs()).logits
    why = rf"{what}.* of logits \[3, 14, 97\] that were not formed"
    with pytest.raises((UnsupportedModelError, AttributeError), match=why):
        touch(logits)


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_a_loss_of_ones_own_is_refused():
    model = zoo.make("llama")

    def focal_loss(logits, labels, vocab_size, **kwargs):
        return logits.mean()

    model.loss_function = focal_loss
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM computes its loss with focal_loss"):
        patch(model)
    del model._loss_function
    patch(model).loss_function = focal_loss
    with pytest.raises(UnsupportedModelError, match="focal_loss"):
        model(**inputs())


def test_heads_that_are_not_linear_are_refused():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = zoo.make("llama")
    model.lm_head = Scaled(32, 97)
    with pytest.raises(UnsupportedModelError, match="Scaled"):
        patch(model)
    with pytest.raises(UnsupportedModelError, match="no transformers model inside Linear"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no LM head"):
        patch(zoo.make("llama").model)
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        patch(torch.nn.DataParallel(zoo.make("llama")))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        patch(t5)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.5"):
        patch(zoo.make("llama"), label_smoothing=1.5)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its logits, and label_smoothing"):
        patch(zoo.make("gemma2"), label_smoothing=0.1)


def test_logits_by_another_way_are_refused():
    model = zoo.make("llama")

    class Odd(type(model)):
        def forward(self, input_ids, labels=None, **kwargs):
            made = super().forward(input_ids)
            made.loss = self.loss_function(made.logits + 0 if made.logits.__class__ is torch.Tensor else None, labels)
            return made

    model.__class__ = Odd
    with pytest.raises(UnsupportedModelError, match="did not come from its LM head"):
        patch(model)(**inputs())


# -- mistakes that must not pass ---------------------------------------------------------------------------------------
MUTANTS = {
    "shift by two": ("llama", lambda m: m.setattr(DeferredLogits, "loss", _one_row_on)),
    "scale lost": ("cohere", lambda m: m.setattr(DeferredLogits, "__mul__", lambda self, x: self)),
    "cap lost": ("gemma2", lambda m: m.setattr(DeferredLogits, "tanh", lambda self: self)),
    "mean for sum": ("items", lambda m: m.setattr(CausalLMLoss, "_sum_over", _mean)),
}


def _one_row_on(self, objective, batch, **options):
    batch = dataclasses.replace(batch, targets=batch.targets.roll(-1))
    return self.head.loss(objective, self.flatten().hidden, batch, **options)


def _mean(self, logits, targets, count, ignore_index):
    return logits.loss(losses.get("nll"), TokenBatch(targets=targets), ignore_index=ignore_index).loss


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_planted_mistake_is_seen(mutant, monkeypatch):
    name, plant = MUTANTS[mutant]
    plain, mine = pair(name if name in zoo.ALL else "llama")
    given = inputs() | ({"num_items_in_batch": 57} if name == "items" else {})
    want = plain(**given).loss
    assert (mine(**given).loss - want).abs() <= 1e-5 * want
    plant(monkeypatch)
    assert (mine(**given).loss - want).abs() > 1e-4 * want
