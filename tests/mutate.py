"""Change mod.py in one place at a time, and see that a test fails for each: `python tests/mutate.py [JOBS]`.

Each operator, comparison, condition and constant is replaced by others. A mutant that no test notices is
printed, and why, if EQUIVALENT says why none could. Exit status 1 if one is left without a reason.
"""

import ast
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["capacity.py", "routing.py", "update.py", "gamma.py", "arank.py", "reference.py", "streaming.py"]
SWAPS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
         ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*", ast.Lt: "<=", ast.LtE: "<",
         ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in",
         ast.And: "or", ast.Or: "and"}
NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "tril": "triu", "triu": "tril",
         "ones_like": "zeros_like", "zeros_like": "ones_like", "double": "float"}
EQUIVALENT: dict[tuple[str, str], str] = {  # beginning of a line, change: why no test could notice
    ("PADDING = 2**62", "62 -> 61"): "as far beyond any stream",
    ("return 1.0 if ratio > 0.85", "> -> >="): "no cosine of a rational angle is 0.7 (Niven)",
    ("@dataclass(frozen=True)", "True -> False"): "nobody writes to a field",
    ("k = torch.tensor([capacity", "1 -> 2"): "an entry more than is ever looked up",
    ("\"interleaved-deep\"", "1 -> 2"): "an odd number above 1 is above 2",
    ("n = size.where", "0 -> 1"): "nobody looks up the quota of a token without a group",
}
SECONDS = 300  # that the tests of a mutant may take; one that hangs is noticed too


class Source:
    """A file, and what can be changed in it"""

    def __init__(self, text: str) -> None:
        self.raw = text.encode()
        lines = self.raw.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:n])) for n in range(len(lines))]

    def span(self, node: ast.AST) -> tuple[int, int]:
        start, end = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return start + node.col_offset, end + node.end_col_offset

    def operators(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        """An operator is what stands between its operands, brackets aside."""
        operands, ops = [], []
        if isinstance(node, ast.BinOp):
            operands, ops = [node.left, node.right], [node.op]
        elif isinstance(node, ast.Compare):
            operands, ops = [node.left, *node.comparators], node.ops
        elif isinstance(node, ast.BoolOp):
            operands, ops = node.values, [node.op] * (len(node.values) - 1)
        for (left, right), op in zip(pairwise(operands), ops, strict=True):
            if type(op) in SWAPS:
                gap = self.raw[self.span(left)[1] : self.span(right)[0]].decode()
                old = gap.strip(" ()\n")
                start = self.span(left)[1] + gap.index(old)
                yield start, start + len(old), SWAPS[type(op)]

    def others(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        start, end = self.span(node)
        if isinstance(node, ast.UnaryOp):
            yield start, self.span(node.operand)[0] if isinstance(node.op, ast.Not) else start + 1, ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield start, end, repr(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            values = {node.value + 1, max(0, node.value - 1)} - {node.value}
            yield from ((start, end, repr(value)) for value in values)
        elif isinstance(node, ast.IfExp | ast.If):
            yield from ((*self.span(node.test), value) for value in ("True", "False"))
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if name in NAMES:
            yield end - len(name), end, NAMES[name]

    def mutants(self) -> Iterator[tuple[int, str, str]]:
        """The line of each place, the change in words, and the whole text so changed; those that compile"""
        tree = ast.parse(self.raw)
        untouched = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Raise)
                     or (isinstance(node, ast.arg) and node.annotation) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in untouched or not hasattr(node, "lineno"):
                continue
            for start, end, new in (*self.operators(node), *self.others(node)):
                text = (self.raw[:start] + new.encode() + self.raw[end:]).decode()
                if parses(text):
                    old = self.raw[start:end].decode()
                    yield self.raw[:start].count(b"\n") + 1, f"{old} -> {new or 'nothing'}", text


def begin(changed: str, copy: Path) -> int:
    """Run the tests on a copy of the project with this mod.py -> the process; its status says if one fails"""
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(file, copy)
    (copy / "mod.py").write_text(changed)
    if child := os.fork():  # it need not import torch again, which takes longer than most of the tests
        return child
    signal.alarm(SECONDS)
    os.chdir(copy)
    sys.path[0] = str(copy)
    for out in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    status = 1
    try:
        tests = [f"tests/test_{name}" for name in TESTS]
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", "few", *tests])
    finally:
        os._exit(int(status))


def notice(sources: list[str], jobs: int) -> list[bool]:
    """Which of these make a test fail, hang or crash?"""
    running, noticed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for n, source in enumerate(sources):
            running[begin(source, Path(folder) / str(n))] = n
            while len(running) == jobs or (running and n + 1 == len(sources)):
                child, status = os.wait()
                noticed[done := running.pop(child)] = status != 0
                shutil.rmtree(Path(folder) / str(done))
                print(f"\r{len(noticed)} of {len(sources)}", end="", file=sys.stderr)
    return [noticed[n] for n in range(len(sources))]


def main() -> None:
    source, jobs = (ROOT / "mod.py").read_text(), int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
    found = list(Source(source).mutants())
    if notice([source], 1) != [False]:
        sys.exit("the tests must pass before anything is changed")
    noticed = notice([changed for *_, changed in found], jobs)
    left = [mutant[:2] for mutant, seen in zip(found, noticed, strict=True) if not seen]
    print(f"{len(found)} mutants of mod.py, {sum(noticed)} noticed by a test, {len(left)} not:")
    unknown = 0
    for number, change in left:
        line = source.splitlines()[number - 1].strip()
        why = "".join(reason for (begin, to), reason in EQUIVALENT.items()
                      if line.startswith(begin) and to == change)
        unknown += not why
        print(f"  {number}: {change} in {line[:60]}\n      {why}")
    if unknown:
        sys.exit(1)
    sys.path.append(str(ROOT))
    from strategies import (
        keep,  # not before: it imports mod.py, which a mutant must not find imported
    )

    keep("`mod.py` changed in one place", f"{len(found)} mutants: {sum(noticed)} make a test fail, "
         f"{len(left)} cannot matter, for reasons that `tests/mutate.py` gives")


def parses(source: str) -> bool:
    try:
        compile(source, "mod.py", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


if __name__ == "__main__":
    import pytest
    import torch
    import torch._subclasses.fake_tensor

    torch.set_num_threads(1)
    main()
