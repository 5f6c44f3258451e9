"""What every loss is, as text: `fastrl losses`, `fastrl losses NAME` and docs/losses.md, from the classes themselves.

Costs are products of the size tokens x hidden x vocabulary ("GEMMs") of one loss with its gradients.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from fastrl.losses import ALIASES, TABLE, law

FIELDS = {
    **dict.fromkeys(("old_logprobs", "ref_logprobs", "rollout_logprobs"), "[T]"),
    "advantages": "[T] or [S]",
    **dict.fromkeys(("labels", "rewards", "group_ids"), "[S]"),
    "margins": "[P]",
}
OFF = ("False", "None", "()", "0.0", "0")
BAR = "\\|"  # within a cell of a markdown table
LETTERS = {"per_token": "[T]", "per_sequence": "[S]", "token": "[T]", "sequence": "[S]"}
KNOWN_ONCE = {
    "token": "the token itself is",
    "sequence": "its whole sequence is",
    "pair": "both sequences of its pair are",
    "group": "every sequence of its group is",
    "batch": "the whole step is",
}


@dataclass(frozen=True)
class Card:
    """One loss. options: (name, type, default as written in python)."""

    name: str
    kind: type
    scope: str
    unit: str
    aggregate: str
    gemms: str
    frozen: str
    options: tuple[tuple[str, str, str], ...]

    @property
    def defaults(self) -> str:
        """Those that are not off."""
        return ", ".join(f"{name}={value}" for name, _, value in self.options if value not in OFF)

    @property
    def reads(self) -> list[str]:
        """Columns of the batch that the law may read, with their shapes."""
        return columns(self.kind())


def card(name: str) -> Card:
    """The card of the loss called `name` (or an alias). Raises ValueError for an unknown name, with the nearest."""
    kind = law(name)
    own = kind()
    options = tuple((f.name, str(f.type), repr(getattr(own, f.name))) for f in dataclasses.fields(kind))
    unit = getattr(own, "unit", own.scope)
    aggregate = getattr(own, "aggregate", None) or ("token_mean" if unit == "token" else "sequence_mean_token_mean")
    return Card(ALIASES.get(name, name), kind, own.scope, unit, aggregate, *cost(own), options)


def cost(objective) -> tuple[str, str]:
    """(GEMMs, GEMMs with a frozen head): of a loss of this scope and these statistics; see docs/kernels.md."""
    if getattr(objective, "reads", None) in ("scores", "values"):
        return "none", "none"
    if "divergence" in getattr(objective, "outputs", ()):
        own = (4, 3) if getattr(objective, "linear_in_divergence", False) else (6, 5)
        head = (3, 2) if getattr(objective, "reads_logprobs", True) else (0, 0)
        return tuple(str(a + b) for a, b in zip(own, head, strict=True))
    scored = " + 1" if getattr(objective, "needs_scores", False) else ""
    return ("3" if objective.scope == "token" else "3 to 4") + scored, (
        "2" if objective.scope == "token" else "2 to 3"
    ) + scored


# -- the columns that a law reads, from its source ---------------------------------------------------------------------
def columns(objective) -> list[str]:
    """Columns of the batch that the law may read under some options: fields of the batch, then others by name."""
    seen: dict[str, str] = {}
    inside: set[str] = set()
    made: set[str] = set()
    for function in functions_of(type(objective)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        found = dict(_reads(tree, objective))
        seen.update(found)
        if function.__name__.endswith("columns"):
            inside |= found.keys()
            made |= set(_made(tree))
    own = {f'{where}["{name}"]' for name in made for where in ("per_token", "per_sequence")}
    kept = {name: shape for name, shape in seen.items() if name in inside or name not in own}
    ordered = [n for n in FIELDS if n in kept] + sorted(kept.keys() - FIELDS.keys())
    return [f"{name} {kept[name]}" for name in ordered]


def functions_of(kind: type) -> Iterator:
    """Every function of fastrl's losses that the class's methods call, they themselves first."""
    queue, done = list(methods_of(kind)), set()
    while queue:
        function = queue.pop()
        if not inspect.isfunction(function) or function in done or not _ours(function):
            continue
        done.add(function)
        yield function
        queue += [function.__globals__.get(name) for name in function.__code__.co_names]


def methods_of(kind: type) -> Iterator:
    """Methods and properties as the class has them, and those that they override but call through super()."""
    for name in sorted({name for owner in kind.__mro__ for name in vars(owner)}):
        for owner in kind.__mro__:
            found = vars(owner).get(name)
            found = found.fget if isinstance(found, property) else inspect.unwrap(found) if callable(found) else found
            if not inspect.isfunction(found) or not _ours(found):
                continue
            yield found
            if "super" not in found.__code__.co_names:
                break


def _ours(function) -> bool:
    """A function written in the losses or beside them (what a dataclass generates has no source)."""
    module = sys.modules.get(function.__module__)
    near = function.__module__.startswith(("fastrl.losses", "fastrl.objective"))
    return near and function.__code__.co_filename == module.__file__


def _reads(tree: ast.AST, objective) -> Iterator[tuple[str, str]]:
    """(column, shape) of batch.field, batch.token("x"), batch.sequence("x"), batch.per_token["x"], .get("x")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "batch":
            field = node.attr.removeprefix("token_")
            if field in FIELDS and node.attr in (field, "token_advantages"):
                yield field, FIELDS[field]
        where, key = None, None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            where, key = node.func, node.args[0]
            where = where.value if where.attr == "get" else where
        elif isinstance(node, ast.Subscript):
            where, key = node.value, node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            where, key = node.comparators[0], node.left
        name = _text(key, objective)
        if name and isinstance(where, ast.Attribute) and where.attr in LETTERS:
            yield f'per_{where.attr.removeprefix("per_")}["{name}"]', LETTERS[where.attr]


def _text(node: ast.AST | None, objective) -> str | None:
    """The string that an expression is: a literal, or an option of the loss."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        value = getattr(objective, node.attr, None)
        return value if isinstance(value, str) else None
    return None


def _made(tree: ast.AST) -> Iterator[str]:
    """Names of the columns that a `columns` method makes: keys of its dicts and keywords of its calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (k.value for k in node.keys if isinstance(k, ast.Constant))
        elif isinstance(node, ast.Call):
            yield from (k.arg for k in node.keywords if k.arg)
        elif (
            isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant)
        ):
            yield node.slice.value


# -- as text -----------------------------------------------------------------------------------------------------------
def families() -> dict[tuple[str, str], list[str]]:
    """(what a file of losses is about, its notation), by its first paragraph -> its names, in the table's order."""
    made: dict[tuple[str, str], list[str]] = {}
    for name, kind in TABLE.items():
        about = (sys.modules[kind.__module__].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        title, *note = re.split(r"(?<!et al)\. ", about, maxsplit=1)
        made.setdefault((title.rstrip("."), "".join(note)), []).append(name)
    return made


def table_text() -> str:
    """Every loss in two lines: name, scope, GEMMs, paper; formula and defaults."""
    lines = [f"{len(TABLE)} losses; `fastrl losses NAME` prints one in full", ""]
    lines.append(f"{'name':20} {'scope':8} {'GEMMs':10} paper")
    for (title, note), names in families().items():
        lines += ["", f"-- {title}", *([f"   {note}"] if note else [])]
        for one in map(card, names):
            lines.append(f"{one.name:20} {one.scope:8} {one.gemms:10} {one.kind.paper}")
            lines.append(f"    {one.kind.formula}" + (f"   [{one.defaults}]" if one.defaults else ""))
    return "\n".join(lines) + "\n"


def card_text(name: str) -> str:
    """One loss in full. Raises ValueError for an unknown name, with the nearest that exists."""
    one = card(name)
    aliases = [a for a, known in ALIASES.items() if known == one.name]
    rows = [
        ("paper", one.kind.paper),
        ("formula", one.kind.formula),
        ("scope", f"{one.scope}: the gradient of a token is known once {KNOWN_ONCE[one.scope]}"),
        ("values", "a weighted sum" if one.unit == "total" else f"one for each {one.unit}"),
        ("aggregate", one.aggregate),
        ("GEMMs", one.gemms if one.gemms == one.frozen else f"{one.gemms}; {one.frozen} with a frozen head"),
        ("may read", ", ".join(one.reads) or "log-probs alone"),
    ]
    lines = [one.name + (f" (also: {', '.join(aliases)})" if aliases else ""), ""]
    lines += [textwrap.indent(inspect.getdoc(one.kind) or "", "  "), ""]
    lines += [f"  {key:10} {value}" for key, value in rows]
    if one.options:
        width = max(len(o[0]) for o in one.options)
        kinds = max(len(o[1]) for o in one.options)
        lines += ["", "  options"]
        lines += [f"    {option:{width}}  {kind:{kinds}}  {value}" for option, kind, value in one.options]
    lines += ["", f'  fastrl.losses.get("{one.name}", ...)']
    return "\n".join(line.rstrip() for line in lines) + "\n"


HEAD = """\
# Losses

Made by `python -m fastrl.losses.card > docs/losses.md`; the same as `fastrl losses`. `fastrl losses NAME` prints one in
full, with its options and the columns that it reads. `fastrl.losses.get(name, option=value)` makes one, for
`fastrl.fused_loss` and `fastrl.loss_from_logprobs`.

*Scope*: what must be known before a token's gradient is. *GEMMs*: matrix products over the head for a loss with its
gradients. One more scores the step first where the loss takes a statistic of all of it (`+ 1`); a frozen head takes one
less; where a unit of the scope is larger than the workspace its logits are made again, up to one GEMM more. `none`:
the loss of a head of its own (a reward or a value), which no vocabulary takes part in. *Defaults*: options that are off
by default (0, none) are left out.
"""


def markdown() -> str:
    """docs/losses.md."""
    lines = [HEAD]
    for (title, note), names in families().items():
        lines += [f"## {title}", ""] + ([note, ""] if note else [])
        lines += ["| name | formula | scope | GEMMs | paper | defaults |", "|---|---|---|---|---|---|"]
        for one in map(card, names):
            cells = (f"`{one.name}`", f"`{one.kind.formula}`", one.scope, one.gemms, one.kind.paper)
            defaults = f"`{one.defaults}`" if one.defaults else ""
            lines.append(f"| {' | '.join(x.replace('|', BAR) for x in (*cells, defaults))} |")
        lines.append("")
    others = ", ".join(f"`{a}` is `{name}`" for a, name in ALIASES.items())
    lines.append(f"Names of other trainers: {others}.")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """`fastrl losses [NAME ...]`. Raises ValueError for an unknown name."""
    if not argv:
        print(table_text(), end="")
    elif argv[0] in ("-h", "--help"):
        print("fastrl losses: every loss with its paper, formula, scope and cost\nfastrl losses NAME: one in full")
    else:
        print("\n".join(card_text(name) for name in argv), end="")
    return 0


if __name__ == "__main__":
    print(markdown(), end="")
