"""Data: load rows, detect their format, tokenise them as TRL does, pack them to a token budget, order them."""

from fastrl.data.formats import Format, detect
from fastrl.data.load import Rows, load
from fastrl.data.packing import collate, pack
from fastrl.data.sampler import IndexSampler
from fastrl.data.tokenize import Limits, encode_dpo, encode_kto, encode_prompts, encode_sft
from fastrl.data.types import DataError, Dropped, Prompt, Report, Sample

__all__ = [
    "DataError",
    "Dropped",
    "Format",
    "IndexSampler",
    "Limits",
    "Prompt",
    "Report",
    "Rows",
    "Sample",
    "collate",
    "detect",
    "encode_dpo",
    "encode_kto",
    "encode_prompts",
    "encode_sft",
    "load",
    "pack",
]
