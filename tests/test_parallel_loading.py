"""Weights that one rank reads and all ranks hold: what one process loads, in little memory, and errors for everyone."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from ranks import run_ranks, tell
from safetensors.torch import load_file, save_file
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

from fastrl.models import load_causal_lm, load_reward_model
from fastrl.models.outline import conform, fact, keeping_facts, named_tensors, table, without_weights
from fastrl.train import config as configs
from fastrl.train import loop, run, workbench
from fastrl.train.output_dir import start_run
from fastrl.train.parallel import full, joined, roots
from fastrl.train.together import whole

LORA = {"use_peft": True, "lora_r": 3}
CASES = {  # name -> (stage, options)
    "tied": ("sft", {}),
    "untied": ("sft", {"model": "untied"}),
    "bfloat16": ("sft", {"model": "untied", "dtype": "bfloat16"}),
    "dtype as saved": ("sft", {"model": "half", "dtype": "auto"}),
    "said to be tied": ("sft", {"model": "apart"}),
    "a copy on every rank": ("sft", {"model": "untied", "sharding": "none"}),
    "packs that ranks share": ("reward", {"sequence_parallel_size": 2}),  # of one data rank: equal random numbers
    "switches": ("sft", {"tiled_mlp": 2, "fp32_modules": ["*norm"]}),
    "plain attention": ("sft", {"attn_implementation": "eager"}),
    "reference": ("dpo", {"model": "untied"}),
    "score": ("reward", {}),
    "actor and critic": ("ppo", {"max_completion_length": 5}),
    "lora": ("sft", {**LORA, "model": "untied", "lora_target_modules": ["q_proj", "lm_head"]}),
    "lora, tied": ("sft", {**LORA, "lora_target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "dora": ("dpo", {**LORA, "use_dora": True}),
    "lora on a score model": ("reward", LORA),
    "saved adapters": ("dpo", {**LORA, "model": "adapters"}),
    "four bits": ("sft", {**LORA, "load_in_4bit": True}),
}
READ_BY_ALL = ("four bits",)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("loading")
    tiny.make_data(root)
    tiny.make_model(root / "model")
    untied = tiny.make_model(root / "untied", seed=1, tie_word_embeddings=False)
    transformers.GenerationConfig(eos_token_id=[1, 7]).save_pretrained(untied)
    tiny.make_model(root / "deep", num_hidden_layers=12, tie_word_embeddings=False)
    half = transformers.AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(untied)
    for path in (root / "half", root / "adapters", root / "apart", root / "broken"):
        tokenizer.save_pretrained(path)
    half.save_pretrained(root / "half")
    for name, config in (("apart", {"tie_word_embeddings": True}), ("broken", {})):
        said = json.loads((untied / "config.json").read_text()) | config
        (root / name / "config.json").write_text(json.dumps(said))
        weights = load_file(untied / "model.safetensors")
        if name == "broken":
            del weights["model.norm.weight"]
        save_file(weights, root / name / "model.safetensors", {"format": "pt"})
    rewards = "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    (root / "rewards.py").write_text(rewards)
    return root


def config_of(root: Path, out: Path, stage: str = "sft", **options):
    data = {"reward": "dpo", "ppo": "grpo"}.get(stage, stage)
    paths = {"model_name_or_path": root / options.pop("model", "model"), "dataset_name": root / data, "output_dir": out}
    flags = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    if stage == "ppo":
        flags["reward_funcs"] = [f"{root / 'rewards.py'}:length"]
    return configs.CONFIGS[stage](**{**flags, **{name: str(path) for name, path in paths.items()}, **options})


# -- what the ranks do -------------------------------------------------------------------------------------------------
class OnlyRank0Reads:
    """On other ranks, reading weights is an error."""

    def __enter__(self):
        self.own = transformers.PreTrainedModel.__dict__["from_pretrained"]
        if os.environ.get("RANK", "0") != "0":
            transformers.PreTrainedModel.from_pretrained = self.refused

    def __exit__(self, *_):
        transformers.PreTrainedModel.from_pretrained = self.own

    @staticmethod
    def refused(*_, **__):
        raise AssertionError("this rank reads weights")


def look_at(out: Path, name: str, model: torch.nn.Module, **told) -> None:
    """Write down every tensor of a model, whole, what it says of a few tokens, and what was found out about it."""
    rank = os.environ.get("RANK", "0")
    seen = {n: full(x.detach()).clone().contiguous() for n, x in named_tensors(model).items()}
    ids = torch.arange(2, 12)[None]
    with whole(model), torch.no_grad():
        for i, root in enumerate(roots(model)):
            seen[f"logits {i}"] = root.eval().model(input_ids=ids, use_cache=False).logits.clone()
    for i, root in enumerate(roots(model)):
        found = root.findings()
        generation = getattr(root.model, "generation_config", None)
        told |= {f"found {i}": found, f"eos {i}": generation and generation.eos_token_id}
    trained = sorted(n for n, x in model.named_parameters() if x.requires_grad)
    told |= {"trained": trained, "tied": sorted(n for n, (_, _, first) in table(model).items() if n != first)}
    save_file(seen, out / f"{name}-{rank}.safetensors")
    (out / f"{name}-{rank}.json").write_text(json.dumps(told))


def build_all(root: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name in CASES:
        if name in READ_BY_ALL:
            build(root, out, name)
        else:
            with OnlyRank0Reads():
                build(root, out, name)


def build(root: Path, out: Path, name: str) -> None:
    stage, options = CASES[name]
    options = dict(options)
    if os.environ["WORLD_SIZE"] == "1":
        options.pop("sequence_parallel_size", None)
    config = config_of(root, out / name, stage, **options)
    with joined(config) as world, start_run(config, world) as begun:
        bench = workbench.build(config, begun, world)
        random = torch.get_rng_state().tolist() if world.dp_rank == 0 else None
        look_at(out, name, bench.model, random=random)
        if stage == "dpo" and not config.use_peft:
            look_at(out, f"{name}, frozen", bench.stage.setting.reference)


def on_one(root: Path) -> None:
    build_all(root, root / "on-1")


def on_two(root: Path) -> None:
    loop.plot_run = lambda path: None
    build_all(root, root / "on-2")
    with OnlyRank0Reads():
        run(config_of(root, root / "first", model="untied", save_strategy="steps", save_steps=2))
        at = str(root / "first" / "checkpoint-2")
        config = config_of(root, root / "again", model="untied", resume_from_checkpoint=at)
        with joined(config) as world, start_run(config, world) as begun:
            look_at(root, "resumed", workbench.build(config, begun, world).model)
        run(config_of(root, root / "second", model="untied", resume_from_checkpoint=at))
        for name, options in WRONG.items():
            tell(root, name, lambda options=options, name=name: run(config_of(root, root / f"{name} run", **options)))
    weigh(root, "weight")
    own, workbench.loaded = workbench.loaded, lambda world, load: load()
    weigh(root, "weight, planted")
    workbench.loaded = own


WRONG = {  # what rank 0 alone finds out -> options
    "lacking": {"model": "broken"},
    "unknown module": {"fp32_modules": ["no_such_module"]},
}


# -- memory ------------------------------------------------------------------------------------------------------------
def held() -> int:
    """Bytes behind all tensors of this process."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and not issubclass(type(x), DTensor) and not x.is_meta:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def weigh(root: Path, name: str) -> None:
    """Write down the most that this rank held each time that a layer was about to be split, in whole models."""
    before, own, peaks = held(), fsdp.fully_shard, []

    def watched(module, **how):
        peaks.append(held() - before)
        return own(module, **how)

    config = config_of(root, root / f"{name} run", model="deep")
    fsdp.fully_shard = watched
    with joined(config) as world:
        model = workbench.load_model(config, config.model_name_or_path, None, world, None)
    fsdp.fully_shard = own
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    (root / f"{name}-{os.environ['RANK']}").write_text(str(max(peaks) / size))


# -- tests -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(place) -> Path:
    adapters = config_of(place, place / "trained", **LORA, model="untied", max_steps=1)
    plot, loop.plot_run = loop.plot_run, lambda path: None
    out = run(adapters).output_dir
    loop.plot_run = plot
    for file in out.glob("adapter_*"):
        (place / "adapters" / file.name).write_bytes(file.read_bytes())
    run_ranks(1, on_one, place)
    run_ranks(2, on_two, place)
    return place


def read(path: Path, name: str, rank: int) -> tuple[dict, dict]:
    return load_file(path / f"{name}-{rank}.safetensors"), json.loads((path / f"{name}-{rank}.json").read_text())


@pytest.mark.parametrize("name", [*CASES, "reference, frozen"])
def test_two_ranks_hold_what_one_process_loads(name, runs):
    """Weights, buffers, logits, what the checks have found, and the random numbers that come next."""
    want, told = read(runs / "on-1", name, 0)
    for rank in (0, 1):
        got, said = read(runs / "on-2", name, rank)
        assert got.keys() == want.keys() and any(n.startswith("logits") for n in got)
        for n, x in want.items():
            assert got[n].dtype == x.dtype and torch.equal(got[n], x), n
        if said.get("random") is None:
            said["random"] = told.get("random")
        assert said == told | {"random": told.get("random")}


def test_the_cases_hold_what_they_are_for(runs):
    """Buffers that no file holds, several ties, random parts, attention of both kinds, saved dtypes, tiles."""
    tensors, told = read(runs / "on-2", "tied", 1)
    assert any("inv_freq" in n for n in tensors) and told["tied"]
    assert told["found 0"]["packed"] and told["found 0"]["attention"] == "fastrl_packed"
    assert not read(runs / "on-2", "said to be tied", 1)[1]["tied"]
    assert not read(runs / "on-2", "plain attention", 1)[1]["found 0"]["packed"]
    assert read(runs / "on-2", "untied", 1)[1]["eos 0"] == [1, 7]
    assert read(runs / "on-2", "dtype as saved", 1)[0]["model.model.norm.weight"].dtype == torch.bfloat16
    assert read(runs / "on-2", "packs that ranks share", 1)[1]["random"]
    lora = {n: x for n, x in read(runs / "on-2", "lora", 1)[0].items() if "lora_A" in n}
    assert lora and all(x.any() for x in lora.values())
    assert read(runs / "on-2", "score", 1)[0]["model.score.weight"].any()


def test_a_rank_that_reads_nothing_holds_its_part_and_a_layer(runs):
    """In whole models: two ranks hold a half each, and one of twelve layers is whole at a time."""
    planted = [float((runs / f"weight, planted-{rank}").read_text()) for rank in (0, 1)]
    assert min(planted) > 0.95, "every rank loads the whole, and the measure sees it"
    main, other = (float((runs / f"weight-{rank}").read_text()) for rank in (0, 1))
    assert main > 0.95 and 0.5 < other < 0.7


@pytest.mark.parametrize(
    ("name", "words"), [("lacking", "lacks 1 weights of the model"), ("unknown module", "matches no module")]
)
def test_what_rank_0_finds_wrong_is_raised_on_all(name, words, runs):
    told = [(runs / f"{name}-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and told[0].startswith("ValueError") and words in told[0]


def test_a_run_goes_on_from_a_checkpoint(runs):
    saved = load_file(runs / "first" / "checkpoint-2" / "model.safetensors")
    for rank in (0, 1):
        got, _ = read(runs, "resumed", rank)
        assert all(torch.equal(got[f"model.{n}"], x) for n, x in saved.items())
    a, b = (json.loads((runs / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("first", "second"))
    assert a["step"] == b["step"] == 3 and a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    a, b = (load_file(runs / n / "model.safetensors") for n in ("first", "second"))
    assert all(torch.equal(a[n], b[n]) for n in a)


# -- without weights ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("load", [load_causal_lm, load_reward_model])
def test_a_model_without_weights_is_the_same_model(load, place):
    with keeping_facts() as facts:
        model = load(place / "model")
    state = torch.get_rng_state()
    with without_weights(json.loads(json.dumps(facts))):
        made = load(place / "model")
    assert all(x.is_meta for x in [*made.parameters(), *made.buffers()]) and torch.equal(state, torch.get_rng_state())
    assert table(made) == table(model) and made.findings() == model.findings()
    assert [type(m) for m in made.modules()] == [type(m) for m in model.modules()]
    assert [m.training for m in made.modules()] == [m.training for m in model.modules()]


def test_dtypes_and_ties_are_taken_over(place):
    with keeping_facts() as facts:
        model = load_causal_lm(place / "model")
    with without_weights(facts):
        made = load_causal_lm(place / "model")
    model.model.model.norm.double()
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone(), requires_grad=False)
    assert table(made) != table(model)
    conform(made, table(model))
    assert table(made) == table(model) and made.model.model.norm.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="another model: 2 tensors differ: more, odd"):
        conform(made, {**table(model), "odd": [[1], "float32", "odd"], "more": [[2], "float32", "more"]})


def test_facts_that_nobody_asks_for_are_a_mistake():
    with without_weights([1]):
        assert fact(lambda: 2) == 1
    with pytest.raises(RuntimeError, match="1 facts of a model were not asked for"), without_weights([1, 2]):
        fact(lambda: 3)
