"""Finding and comparing final answers in text a model wrote: pure string work, nothing is ever evaluated.

Every function is linear in the text and looks at no more than its last LOOKED_AT characters; a number with more than
DIGITS characters is compared as text. So no completion can cost more than milliseconds, whatever it says.
"""

from __future__ import annotations

import re
from fractions import Fraction

LOOKED_AT = 4096
DIGITS = 64
MARKERS = ("####", "final answer is", "final answer:", "answer is", "answer:")

_SIGNED = r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+"
_NUMBER = re.compile(rf"(?:{_SIGNED})(?:/\d+)?", re.ASCII)
_WHOLE = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?(?:/(\d+))?", re.ASCII)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", re.ASCII)
_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", re.ASCII)


def final_answer(text: str) -> str | None:
    """What the text states as its answer: the last \\boxed{...}, what follows the last marker ("####", "answer:"),
    or else the last number. None if there is nothing of the kind."""
    text = text[-LOOKED_AT:]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    low = text.lower()
    at = max((low.rfind(m) + len(m) for m in MARKERS if m in low), default=-1)
    if at >= 0:
        stated = text[at:].strip().split("\n", 1)[0].strip(" \t*$:.")
        if stated:
            return stated
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def last_boxed(text: str) -> str | None:
    """The inside of the last \\boxed{...}, braces balanced; None if there is none or it does not close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i].strip()
    return None


def same_answer(given: str, truth: str) -> bool:
    """Equal as numbers if both are numbers (1,000 = 1000.0; 1/2 = 0.5 = \\frac{1}{2}), else equal as tidied text."""
    given, truth = tidy(given), tidy(truth)
    if given == truth:
        return True
    a, b = number(given), number(truth)
    return a is not None and a == b


def tidy(text: str) -> str:
    """Without surrounding space, $, full stop, \\text{} and inner spaces; lower case."""
    text = text.strip().strip("$").strip().rstrip(".").replace("\\left", "").replace("\\right", "")
    text = text.removesuffix("\\%").removesuffix("%")
    if text.startswith("\\text{") and text.endswith("}"):
        text = text[6:-1]
    return "".join(text.split()).lower()


def number(text: str) -> Fraction | None:
    """A plain decimal, a fraction of integers or a \\frac of integers; None for all else (exponents, operators)."""
    if len(text) > DIGITS:
        return None
    latex = _FRACTION.fullmatch(text)
    if latex:
        sign, top, bottom = latex.groups()
        text = f"{'-' if (sign == '-') != top.startswith('-') else ''}{top.lstrip('-')}/{bottom}"
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    plain = _WHOLE.fullmatch(text)
    if not plain:
        return None
    sign, whole, decimals, bottom = plain.groups()
    if not (whole or decimals) or (bottom is not None and int(bottom) == 0):
        return None
    decimals = decimals or ""
    value = Fraction(int((whole or "") + decimals or "0"), 10 ** len(decimals) * int(bottom or 1))
    return -value if sign == "-" else value
