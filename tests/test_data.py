"""Loading, formats and tokenising: bad files named line by line, and the very tokens that TRL trains on."""

from __future__ import annotations

import json

import pytest

from fastrl.data import DataError, Limits, Rows, detect, encode_dpo, encode_prompts, encode_sft, load
from fastrl.data.formats import normalise, split_prompt
from fastrl.quickstart.model import build_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world this is a test", "user assistant what is life"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE whose tokens span words, so that prompt and completion can merge; pad is eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<eos>", "<|im_start|>", "<|im_end|>", "<bos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS * 5, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = CHATML
    return made


def write(path, lines):
    data = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(data)
    return str(path)


# -- files ---------------------------------------------------------------------------------------------------------
def test_jsonl_with_bom_crlf_blank_lines_and_missing_columns(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "h\xc3\xa9"}\r\n\r\n{"text": "b", "n": 1}\n  \n{"text": "c"}'
    )
    rows = load(path)
    assert [rows[i] for i in range(3)] == [{"text": "hé", "n": None}, {"text": "b", "n": 1}, {"text": "c", "n": None}]
    assert [rows.where(i) for i in range(3)] == [f"{path}:1", f"{path}:3", f"{path}:5"]
    assert rows.fingerprint == load(path).fingerprint != ""


BAD_LINES = {
    b'{"text": "a"': "not JSON",
    b"{'text': 1}": "not JSON",
    b'"just a string"': "a string, expected one object a line",
    b"[1, 2]": "a list, expected one object a line",
    b"null": "a null, expected one object a line",
    b'{"text": "\xff\xfe"}': "not UTF-8 (byte 0xff at column 11)",
    b'{"text": NaN}': "NaN is not a JSON value",
    b'{"text": 5}': "field 'text' is a number (5), but a string in line 1",
    b'{"text": ["a"]}': "field 'text' is a list",
    b'{"text": ' + b"[" * 100000: "nested too deeply",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:14].decode("latin1"))
def test_a_bad_line_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError) as error:
        load(path)
    assert f"{path}:2: " in str(error.value) and BAD_LINES[line] in str(error.value)
    assert len(str(error.value)) < 600
    rows = load(path, on_bad_row="skip")
    assert len(rows) == 2 and len(rows.skipped) == 1 and [rows.where(i) for i in (0, 1)] == [f"{path}:1", f"{path}:3"]


def test_all_bad_lines_are_found_and_twenty_are_shown(tmp_path):
    lines = [b'{"text": "a"}' if i % 2 == 0 else b"{bad" for i in range(60)]
    with pytest.raises(DataError) as error:
        load(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert "30 bad lines" in str(error.value)
    assert str(error.value).count("not JSON") == 20
    assert "a.jsonl:2:" in str(error.value) and "a.jsonl:40:" in str(error.value)


def test_cut_off_last_line_is_said_to_be(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON .*last line is cut off"):
        load(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b'))


def test_numbers_of_both_sorts_and_nulls_are_one_type(tmp_path):
    assert len(load(write(tmp_path / "a.jsonl", [{"x": 1}, {"x": 2.5}, {"x": None}]))) == 3
    with pytest.raises(DataError, match="field 'x' is a boolean"):
        load(write(tmp_path / "a.jsonl", [{"x": 1}, {"x": True}]))


@pytest.mark.parametrize("content, message", [(b"", "0 bytes"), (b"\n\n", "no rows"), (b"\xef\xbb\xbf", "no rows")])
def test_empty_files(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", content))


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load(str(tmp_path / "no.jsonl"))
    path = write(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"is one file.*put train\.jsonl and test\.jsonl into a directory"):
        load(path, "test")
    with pytest.raises(DataError, match=r"no split 'test'.*found \['train\.jsonl'\]"):
        load(str(tmp_path), "test")
    with pytest.raises(DataError, match="ends in '.csv'"):
        load(write(tmp_path / "a.csv", b"a,b"))
    with pytest.raises(DataError, match="is not a parquet file"):
        load(write(tmp_path / "a.parquet", b"hello"))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load(write(tmp_path / "b.parquet", b"PAR1 and then nothing"))
    with pytest.raises(ValueError, match="on_bad_row"):
        load(path, on_bad_row="ignore")


def test_hub_names_fail_as_data_errors(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="dataset 'a/b', split 'train'.*doesn't exist"):
        load("a/b")


def test_directories_shards_parquet_and_saved_datasets(tmp_path):
    import datasets

    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(5)]
    write(tmp_path / "train.jsonl", rows[:3])
    datasets.Dataset.from_list(rows[3:]).to_parquet(tmp_path / "test-00000-of-00002.parquet")
    datasets.Dataset.from_list(rows[:1]).to_parquet(tmp_path / "test-00001-of-00002.parquet")
    assert list(load(str(tmp_path))) == rows[:3]
    test = load(str(tmp_path), "test")
    assert list(test) == [*rows[3:], rows[0]]
    assert test.where(2).endswith("test-00001-of-00002.parquet:0")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    assert list(load(str(tmp_path / "saved"))) == rows
    with pytest.raises(DataError, match=r"no split 'test'; it has \['train'\]"):
        load(str(tmp_path / "saved"), "test")


# -- formats -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "row, stage, kind, conversational",
    [
        ({"text": "a"}, "sft", "text", False),
        ({"messages": [user("a"), assistant("b")]}, "sft", "messages", True),
        ({"conversations": [{"from": "user", "value": "a"}]}, "sft", "messages", True),
        ({"prompt": "a", "completion": "b", "answer": "c"}, "sft", "prompt_completion", False),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, "sft", "prompt_completion", True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", "preference", False),
        ({"chosen": "a b", "rejected": "a c"}, "dpo", "preference", False),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "dpo", "preference", True),
        ({"prompt": "a", "solution": "b"}, "grpo", "prompt", False),
        ({"prompt": "a", "completion": "b", "label": True}, "kto", "unpaired_preference", False),
        ({"prompt": "a", "completion": "b", "label": True}, None, "unpaired_preference", False),
        ({"prompt": "a", "completion": "b", "label": None}, None, "prompt_completion", False),
    ],
)
def test_formats_are_detected(row, stage, kind, conversational):
    form = detect(normalise(row), stage)
    assert (form.kind, form.conversational) == (kind, conversational)


@pytest.mark.parametrize("stage, row", [("sft", {"prompt": "a"}), ("dpo", {"text": "a"}), ("grpo", {"question": "a"})])
def test_wrong_columns_name_those_found_and_those_wanted(stage, row):
    with pytest.raises(DataError, match=rf"columns \['{next(iter(row))}'\]; {stage} needs \("):
        detect(row, stage)


def test_verl_rows():
    row = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0},
    }
    assert normalise(row)["ground_truth"] == "4"
    assert detect(normalise(row), "grpo").conversational
    assert "ground_truth" not in row, "the caller's row must not change"


def test_the_common_beginning_is_the_prompt():
    assert split_prompt("a b c", "a b d") == ("a b", " c", " d")
    assert split_prompt("ab", "abc") == ("a", "b", "bc")
    assert split_prompt("xy", "zw") == ("", "xy", "zw")
    assert split_prompt([user("a"), assistant("b")], [user("a"), assistant("c")])[0] == [user("a")]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a"}, {"text": None}], "row 1: column 'text' is missing"),
        ([{"text": "a"}, {"text": [user("b")]}], "row 1: column 'text' is messages"),
        ([{"messages": [user("a")]}, {"messages": "b"}], "row 1: column 'messages' is str"),
        ([{"messages": [user("a")]}, {"messages": [{"role": "user", "content": 5}]}], "message 0 has content 5"),
        ([{"messages": [user("a")]}, {"messages": [user("b"), {"content": "x"}]}], "message 1 is"),
        ([{"messages": [user("a")], "images": ["x.png"]}], "row 0: has images"),
    ],
)
def test_rows_of_another_sort(tokenizer, rows, message):
    with pytest.raises(DataError, match=message):
        encode_sft(rows, tokenizer)


# -- tokens --------------------------------------------------------------------------------------------------------
SFT_CASES = {
    "text": ([{"text": t} for t in CORPUS] + [{"text": "ends already<eos>"}], {}),
    "prompt and completion": (
        [
            {"prompt": "hello world ", "completion": "this is"},
            {"prompt": "hello wor", "completion": "ld test"},  # the border falls inside a token
            {"prompt": "", "completion": "x y"},
            {"prompt": "a", "completion": ""},
        ],
        {},
    ),
    "prompt trained too": ([{"prompt": "hello ", "completion": "world"}], {"completion_only_loss": False}),
    "messages": ([{"messages": [user("hello"), assistant("world"), user("what"), assistant("is life")]}], {}),
    "assistant only": (
        [{"messages": [user("hello"), assistant("world"), user("what"), assistant("is life")]}],
        {"assistant_only_loss": True},
    ),
    "conversational prompt and completion": (
        [{"prompt": [user("a b"), assistant("c"), user("d")], "completion": [assistant("the fox")]}],
        {},
    ),
    "from and value": ([{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}], {}),
    "cut": (
        [
            {"prompt": "hello world " * 3, "completion": "this is a longer test " * 3},
            {"prompt": "hello " * 20, "completion": "x"},
            {"prompt": "a", "completion": "b"},
        ],
        {"max_length": 12},
    ),
}
DPO_CASES = {
    "explicit": (
        [
            {"prompt": "hello wor", "chosen": "ld this", "rejected": " quick fox"},
            {"prompt": "what is ", "chosen": "life<eos>", "rejected": "a"},
        ],
        {},
    ),
    "implicit": (
        [
            {"chosen": "hello world this is", "rejected": "hello world what"},
            {"chosen": "the fox", "rejected": "the fog is"},
            {"chosen": "ab", "rejected": "abc"},
        ],
        {},
    ),
    "conversations": (
        [
            {"chosen": [user("hello"), assistant("world")], "rejected": [user("hello"), assistant("test")]},
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d e")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("f")],
            },
        ],
        {},
    ),
    "cut": (
        [
            {"prompt": "hello world " * 3, "chosen": "this is a longer test " * 3, "rejected": "x"},
            {"prompt": "hello " * 20, "chosen": "x", "rejected": "y"},
        ],
        {"max_length": 12},
    ),
}


@pytest.fixture(scope="module")
def tiny_model(tokenizer):
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
    }
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, eos_token_id=0, pad_token_id=0, **sizes)
    return lambda: AutoModelForCausalLM.from_config(config)


def trl_options(tmp_path, options):
    plain = {"output_dir": str(tmp_path), "max_length": None, "report_to": "none", "use_cpu": True, "bf16": False}
    return plain | options


def limits(options):
    return Limits(options.get("max_length"), truncation="keep_start")


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_tokens_are_those_of_trl(tmp_path, tokenizer, tiny_model, case):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows, options = SFT_CASES[case]
    config = trl.SFTConfig(**trl_options(tmp_path, options))
    trainer = trl.SFTTrainer(tiny_model(), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    # A label on token 0 is never predicted by anything; TRL's shift drops it.
    theirs = [(r["input_ids"], [False] + [x != -100 for x in r["labels"][1:]]) for r in trainer.train_dataset]
    own = {k: v for k, v in options.items() if k != "max_length"}
    samples, report = encode_sft(rows, tokenizer, limits(options), **own)
    assert [(s.input_ids, s.completion_mask) for s in samples] == theirs
    assert len(samples) + len(report.dropped) == len(rows)


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_tokens_are_those_of_trl(tmp_path, tokenizer, tiny_model, case):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows, options = DPO_CASES[case]
    config = trl.DPOConfig(**trl_options(tmp_path, options))
    data = Dataset.from_list(rows)
    trainer = trl.DPOTrainer(tiny_model(), tiny_model(), config, train_dataset=data, processing_class=tokenizer)
    kept = list(trainer.train_dataset)
    batch = trainer.data_collator(kept)
    theirs = []
    for i in range(len(kept)):
        for j in (i, len(kept) + i):  # TRL: all chosen, then all rejected; here they alternate
            n = int(batch["attention_mask"][j].sum())
            theirs.append((batch["input_ids"][j][:n].tolist(), batch["completion_mask"][j][:n].bool().tolist()))
    samples, _ = encode_dpo(rows, tokenizer, limits(options))
    assert [(s.input_ids, s.completion_mask) for s in samples] == theirs


def test_eos_is_trained_though_pad_is_eos(tokenizer):
    [sample], _ = encode_sft([{"prompt": "a ", "completion": "b"}], tokenizer)
    assert sample.input_ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id and sample.completion_mask[-1]
    [empty], _ = encode_sft([{"prompt": "a", "completion": ""}], tokenizer)
    assert empty.num_trained == 1, "an empty completion teaches to stop"


def test_moved_borders_are_counted(tokenizer):
    rows = [{"prompt": "hello wor", "completion": "ld"}, {"prompt": "hello ", "completion": "x"}]
    [first, _], report = encode_sft(rows, tokenizer)
    assert report.moved_boundaries >= 1 and "merge into one token" in report.lines()[0]
    assert first.prompt_length < len(tokenizer("hello wor")["input_ids"])


def test_long_rows_are_dropped_whole_and_listed(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": "the fox " * 30}]
    samples, report = encode_sft(load(write(tmp_path / "a.jsonl", rows)), tokenizer, Limits(max_length=20))
    assert len(samples) == 3 and [d.where for d in report.dropped] == [str(tmp_path / "a.jsonl:4")]
    assert "dropped 1 of 4 rows" in report.lines()[0] and "limit 20" in report.lines()[0]
    assert len(encode_sft(rows, tokenizer, Limits(context_length=20))[0]) == 3
    with pytest.raises(DataError, match=r"2 of 3 rows do not fit \(at most 50% may be dropped\)"):
        encode_sft([rows[0], rows[3], rows[3]], tokenizer, Limits(max_length=20))
    assert len(encode_sft([rows[0], rows[3], rows[3]], tokenizer, Limits(20, max_dropped_fraction=0.9))[0]) == 1
    with pytest.raises(DataError, match="1 of 1 rows do not fit"):
        encode_sft([rows[3]], tokenizer, Limits(20, max_dropped_fraction=1.0))
    with pytest.raises(ValueError, match="truncation must be"):
        Limits(truncation="keep_end")


def test_a_pair_is_dropped_as_one(tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "the fox " * 30},
    ]
    samples, report = encode_dpo(rows, tokenizer, Limits(max_length=20))
    assert len(samples) == 2 and len(report.dropped) == 1


def test_what_a_tokenizer_cannot_do_is_refused(tokenizer):
    chat = [{"messages": [user("a"), assistant("b")]}]
    plain = build_tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        encode_sft(chat, plain)
    plain.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        encode_sft([{"text": "1"}], plain)
    with pytest.raises(DataError, match="needs conversations"):
        encode_sft([{"text": "1"}], tokenizer, assistant_only_loss=True)
    marked = tokenizer.chat_template
    tokenizer.chat_template = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        with pytest.raises(DataError, match=r"\{% generation %\}"):
            encode_sft(chat, tokenizer, assistant_only_loss=True)
    finally:
        tokenizer.chat_template = marked
    with pytest.raises(DataError, match="row 0: assistant_only_loss is on, but the template marks no assistant token"):
        encode_sft([{"messages": [user("a")]}], tokenizer, assistant_only_loss=True)


def with_template(tokenizer, single):
    """A copy that wraps every string as `single` says."""
    import copy

    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    made.bos_token = "<bos>"
    ids = [(t, made.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return made


def test_two_bos_tokens_are_refused(tokenizer):
    bos = with_template(tokenizer, "<bos> $A")
    [sample], _ = encode_sft([{"prompt": "hello", "completion": " world"}], bos)
    assert sample.input_ids.count(bos.bos_token_id) == 1 and sample.prompt_length > 1
    with pytest.raises(DataError, match="row 1: begins with two BOS tokens"):
        encode_sft([{"text": "fine"}, {"text": "<bos>hello"}], bos)
    with pytest.raises(DataError, match="row 0: begins with two BOS tokens"):
        encode_prompts([{"prompt": "<bos>hello"}], bos)
    bos.chat_template = "{{ bos_token }}" + CHATML
    [chat], _ = encode_prompts([{"prompt": [user("hi")]}], bos)
    assert chat.ids.count(bos.bos_token_id) == 1


def test_prompts_that_end_with_eos_are_refused(tokenizer):
    with pytest.raises(DataError, match="ends every text with '<eos>'"):
        encode_prompts([{"prompt": "hello"}], with_template(tokenizer, "<bos> $A <eos>"))


def test_prompts_keep_their_columns_and_origin(tmp_path, tokenizer):
    rows = [{"prompt": "hello", "answer": "1", "completion": "x"}, {"prompt": "the fox " * 9, "answer": "2"}]
    rows += [{"prompt": "test", "answer": "3"}]
    prompts, report = encode_prompts(load(write(tmp_path / "a.jsonl", rows)), tokenizer, max_length=8)
    assert [p.columns for p in prompts] == [{"answer": "1"}, {"answer": "3"}]
    assert [p.source for p in prompts] == ["hello", "test"] and prompts[1].where.endswith("a.jsonl:3")
    assert prompts[0].ids == tokenizer("hello")["input_ids"]
    assert [d.where for d in report.dropped] == [str(tmp_path / "a.jsonl:2")]
    with pytest.raises(DataError, match="1 prompts are empty.*row 1"):
        encode_prompts([{"prompt": "a"}, {"prompt": ""}], tokenizer)
    with pytest.raises(ValueError, match="leaves 0 tokens"):
        encode_prompts(rows, tokenizer, max_length=0)
    [chat], _ = encode_prompts([{"prompt": [user("hi")], "answer": "1"}], tokenizer)
    assert tokenizer.decode(chat.ids).endswith("<|im_start|>assistant\n")


def test_empty_dataset(tokenizer):
    for encode in (encode_sft, encode_dpo, encode_prompts):
        with pytest.raises(DataError, match="is empty"):
            encode([], tokenizer)
    assert Rows([{"a": 1}]).where(0) == "the dataset row 0"


def test_many_rows_in_chunks_equal_one_by_one(tokenizer):
    rows = [{"prompt": f"{i} the", "completion": f" fox {i * i}"} for i in range(1030)]
    together, _ = encode_sft(rows, tokenizer)
    assert together[1027].input_ids == encode_sft([rows[1027]], tokenizer)[0][0].input_ids
    assert [s.fields["row"] for s in together] == list(range(1030))


# -- the quickstart's data -----------------------------------------------------------------------------------------
def test_shipped_files_are_what_the_script_makes(tmp_path):
    from fastrl.quickstart.make_data import DATA, write

    for path in write(tmp_path):
        assert path.read_bytes() == (DATA / path.name).read_bytes(), (
            f"run python -m fastrl.quickstart.make_data {path.name}"
        )
    assert sum(p.stat().st_size for p in DATA.glob("*.jsonl")) < 1_000_000


def test_held_out_problems_are_nowhere_in_training():
    from fastrl.quickstart.make_data import DATA

    def problems(name):
        return [tuple(map(int, row["prompt"].rstrip("=").split("+"))) for row in load(str(DATA / f"{name}.jsonl"))]

    held_out = problems("test")
    assert len(held_out) == len({frozenset(p) for p in held_out}) >= 500
    trained = {frozenset(p) for name in ("sft", "rl") for p in problems(name)}
    assert not trained & {frozenset(p) for p in held_out}


def test_shipped_answers_are_right_and_most_demonstrations_forget_the_carry():
    from fastrl.quickstart.make_data import DATA, forgetful_sum, needs_carry

    wrong = carries = 0
    for name in ("sft", "rl", "test"):
        for row in load(str(DATA / f"{name}.jsonl")):
            a, b = map(int, row["prompt"].rstrip("=").split("+"))
            assert row["answer"] == str(a + b)
            if name == "sft":
                carries += needs_carry(a, b)
                wrong += row["completion"] != row["answer"]
                assert row["completion"] in (row["answer"], str(forgetful_sum(a, b)))
    assert 0.67 < wrong / carries < 0.73


def test_quickstart_model_loads_with_plain_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastrl.quickstart.model import build_model

    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "a", seed=1))
    again = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "b", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("27+58=85" + tokenizer.eos_token)["input_ids"]
    assert len(ids) == 9 and tokenizer.decode(ids, skip_special_tokens=True) == "27+58=85"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id and len(tokenizer) == model.config.vocab_size
