"""Change the core in one place at a time, and see that a test fails for each: `python tests/mutate.py [JOBS] [FILE ...]`.

Each operator, comparison, condition and constant is replaced by others; a sample of all these is tried. A mutant that no
test notices is printed, and why, if EQUIVALENT says why none could. Exit status 1 if one is left without a reason.
"""

import ast
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FILES = {  # file -> the share of its mutants that is tried, and the tests that guard it, quick ones first; see SLOW
    "mod.py": (1.0, ["capacity", "routing", "arank", "reference", "gamma", "streaming", "update"]),
    "model.py": (0.2, ["init", "arank", "cli", "stops", "reference", "loss", "resume", "muon", "endless", "streaming",
                        "eval", "gamma"]),
    "data.py": (0.25, ["data", "gamma", "tasks"]),
    "eval.py": (0.25, ["metrics", "arank", "eval", "gamma", "endless"]),
    "train.py": (0.2, ["muon", "loss", "cli", "resume", "gamma", "stops"]),
}
LEFT_OUT = {  # of a file, sections, functions and tables that are not changed, and why
    "data.py": {"COLOURS": "a choice"},
    "eval.py": dict.fromkeys(("what a run shows", "narrate", "command line"), "it prints, draws, reads flags"),
}
SLOW = (  # parts of the names of tests that are not run, but for train.py, which they guard
    "video_is_watched", "memory_and_time", "killed_and_resumed", "neither_overwritten", "begun_from_another",
    "command_line_prints", "trained_evaluated", "dense_run_is_converted", "no_number_is_told",
    "second_training", "full_disk", "default_model_learn", "are_clipped", "span_is_exactly")
SWAPS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
         ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*", ast.Lt: "<=", ast.LtE: "<",
         ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in",
         ast.And: "or", ast.Or: "and"}
NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "tril": "triu", "triu": "tril",
         "ones_like": "zeros_like", "zeros_like": "ones_like", "double": "float"}
EQUIVALENT: dict[tuple[str, str], str] = {  # beginning of a line, change: why no test could notice
    # mod.py
    ("PADDING = 2**62", "62 -> 61"): "as far beyond any stream",
    ("return 1.0 if ratio > 0.85", "> -> >="): "no cosine of a rational angle is 0.7 (Niven)",
    ("@dataclass(frozen=True)", "True -> False"): "nobody writes to a field",
    ("k = torch.tensor([capacity", "1 -> 2"): "an entry more than is ever looked up",
    ("\"interleaved-deep\"", "1 -> 2"): "an odd number above 1 is above 2",
    ("n = size.where", "0 -> 1"): "nobody looks up the quota of a token without a group",
    # model.py
    ("if k.shape[2] == K", "k.shape[2] == K -> False"): "a shortcut: attend_to_past gives the same",
    ("position = torch.ones_like(inputs.tokens)", "- -> +"): "RoPE is relative: a shift of all positions changes nothing",
    ("position = torch.ones_like(inputs.tokens)", "1 -> 0"): "RoPE is relative: a shift of all positions changes nothing",
    ("if rows >= room", ">= -> >"): "how much room is spare; torch.compile alone sees it",
    ("more = max(rows + 1", "1 -> 2"): "how much room is spare",
    ("more = max(rows + 1", "64 -> 63"): "how much room is spare",
    ("position = weight.new_empty(streams", "0 -> 1"): "reserve always leaves a row that is not written",
    ("if bool((gets_frame & (oldest", "& -> |"): "a shortcut: drop finds nothing else to drop",
    ("layer.reserve(layer.length + (T if r == 1", "1 -> 2"): "a chunk is as wide as its longest stream",
    ("text = json.dumps(values, indent=1)", "1 -> 0"): "how a file is indented",
    # data.py
    ("CLIP = 2**33", "2 -> 3"): "a limit far beyond the clips of a test",
    ("CLIP = 2**33", "33 -> 34"): "a limit far beyond the clips of a test",
    ("need_time(f\"{where} start\"", "1e9 -> 1000000001.0"): "30 years, a choice",
    ("need_time(f\"{where} end\"", "1e9 -> 1000000001.0"): "30 years, a choice",
    ("decision = (tokens == tokenizer.frame)", "0 -> 1"): "a decision is <assistant> or <silent>, never token 0",
    ("cells = S // 4 + 1", "1 -> 2"): "what stands out is cut off",
    ("frames += 40 + 25", "+ -> -"): "drawn from a distribution that is the same on both sides of zero",
    ("inside = (abs(u) * 2 <= v + 1)", "<= -> <"): "no pixel lies exactly on an edge",
    ("centre = (np.array([row, column])", "2 -> 1"): "shaken by the same along both axes, a shape is as much in its cell",
    ("frames = list(islice(video, most + 1))", "1 -> 2"): "one more is decoded before it is refused",
    ("return [self.sample(seed, \"train\"", "4096 -> 4095"): "as far from any number of streams in a batch",
    # train.py
    ("CLIP = 1.0", "1.0 -> 2.0"): "a choice",
    ("compute_loss = torch.compile", "cfg.compile -> False"): "the same numbers, more slowly",
    ("compute_loss = torch.compile", "True -> False"): "the same numbers, more slowly",
    ("bar = tqdm(range(first", "80 -> 79"): "how wide the bar is",
    ("bar = tqdm(range(first", "80 -> 81"): "how wide the bar is",
    ("source.batch(cfg.seed, 0, cfg.batch)", "0 -> 1"): "a choice: any batch may hold a bad clip",
    ("if not math.isfinite(streaming + routing", "+ -> -"): "a difference is finite where the sum is",
    ("torch.manual_seed(cfg.seed << 32", "32 -> 33"): "a choice: it seeds dropout alone",
    ("torch.manual_seed(cfg.seed << 32", "8 -> 9"): "a choice: it seeds dropout alone",
    # eval.py
    ("model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]", "16 -> 17"): "any number of streams at a time",
    ("model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]", "16 -> 15"): "any number of streams at a time",
    ("model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]", "32 -> 33"): "any number of streams at a time",
    ("model: VideoLM, tokenizer: Tokenizer, samples: list[Sample]", "32 -> 31"): "any number of streams at a time",
    ("right = (logits.argmax(-1)", "- -> nothing"): "the last of two dimensions",
    ("batch: int = 32", "32 -> 33"): "any number of streams at a time",
    ("batch: int = 32", "32 -> 31"): "any number of streams at a time",
    ("limit: int = 200", "200 -> 199"): "a choice",
    ("self.next_group = 0", "0 -> 1"): "numbers of groups need only grow",
    ("x = prepare(batch, model.config, device", ">= -> >"): "group 0 is of the first chunk, which is not decoded text",
    ("x = prepare(batch, model.config, device", "0 -> 1"): "group 0 is of the first chunk, which is not decoded text",
    ("group.append(min(row.group[-1]", "0 -> 1"): "numbers of groups need only grow",
    ("share = computed[:, routed]", "1 -> 0"): "a dense model has no share: it is not read",
}
SECONDS = 25  # of a processor, that the tests of a mutant may take, of train.py six times as many; one that hangs is noticed


class Mutant(NamedTuple):
    file: str
    line: int
    change: str
    text: str  # the whole file, so changed


class Source:
    """A file, and what can be changed in it"""

    def __init__(self, name: str) -> None:
        self.name, self.raw = name, (ROOT / name).read_bytes()
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

    def untouched(self, tree: ast.Module) -> Iterator[ast.AST]:
        """Texts of errors, types, `strict`, defaults of fields, which are a choice, and what is left out"""
        out, section = LEFT_OUT.get(self.name, {}), ""
        lines = self.raw.decode().splitlines()
        headings = [re.sub("^# --- (.*?) -+$", r"\1", line) if line.startswith("# --- ") else "" for line in lines]
        for top in tree.body:
            section = next(filter(None, reversed(headings[: top.lineno])), "")
            name = getattr(top.targets[0], "id", "") if isinstance(top, ast.Assign) else getattr(top, "name", "")
            if section in out or name in out:
                yield top
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise | ast.JoinedStr):
                yield node
            elif isinstance(node, ast.keyword) and node.arg == "strict":
                yield node
            elif isinstance(node, ast.ClassDef):
                yield from (field.value for field in node.body if isinstance(field, ast.AnnAssign) and field.value)
            yield from filter(None, (getattr(node, "annotation", None), getattr(node, "returns", None)))

    def mutants(self) -> Iterator[Mutant]:
        """All that compile"""
        tree, lines = ast.parse(self.raw), self.raw.decode().splitlines()
        untouched = {id(inner) for node in self.untouched(tree) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in untouched or not hasattr(node, "lineno"):
                continue
            for start, end, new in (*self.operators(node), *self.others(node)):
                text = (self.raw[:start] + new.encode() + self.raw[end:]).decode()
                if parses(text):
                    number = self.raw[:start].count(b"\n")
                    change = f"{self.raw[start:end].decode()} -> {new or 'nothing'}"
                    # Drawn by what it is, so that a change elsewhere in the file leaves the sample as it was
                    if Random(f"{lines[number].strip()} {change}").random() < FILES[self.name][0]:
                        yield Mutant(self.name, number, change, text)


def begin(mutant: Mutant, copy: Path) -> int:
    """Run the tests of a file on a copy of the project with the mutant -> the process; its status says if one fails"""
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("extras"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(file, copy)
    (copy / mutant.file).write_text(mutant.text)
    if child := os.fork():  # it need not import torch again, which takes longer than most of the tests
        return child
    of_train = mutant.file == "train.py"
    seconds = 6 * SECONDS if of_train else SECONDS
    signal.alarm(10 * seconds)  # it may also wait for something that never comes
    signal.setitimer(signal.ITIMER_PROF, seconds)
    os.chdir(copy)
    sys.path[0] = str(copy)
    for out in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    status, slow = 0, "" if of_train else " and ".join(f"not {name}" for name in SLOW)
    usual = ["-x", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "--hypothesis-profile=few", "-k", slow]
    try:
        for name in FILES[mutant.file][1]:  # one by one: the first may suffice, and then no other is imported
            if not status:
                status = 1  # unless pytest says that all is well
                status = pytest.main([*usual, f"tests/test_{name}.py"])
    finally:
        os._exit(int(status))


def notice(mutants: list[Mutant], jobs: int) -> list[bool]:
    """Which of these make a test fail, hang or crash?"""
    running, noticed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for n, mutant in enumerate(mutants):
            running[begin(mutant, Path(folder) / str(n))] = n
            while len(running) == jobs or (running and n + 1 == len(mutants)):
                child, status = os.wait()
                noticed[done := running.pop(child)] = status != 0
                if status == 0 and mutants[done].change:
                    print(f"  {describe(mutants[done])}", flush=True)
                shutil.rmtree(Path(folder) / str(done))
                print(f"\r{len(noticed)} of {len(mutants)}", end="", file=sys.stderr, flush=True)
    return [noticed[n] for n in range(len(mutants))]


def reason(mutant: Mutant) -> str:
    line = (ROOT / mutant.file).read_text().splitlines()[mutant.line].strip()
    return "".join(why for (begin, change), why in EQUIVALENT.items()
                   if line.startswith(begin) and change == mutant.change)


def describe(mutant: Mutant) -> str:
    line = mutant.text.splitlines()[mutant.line].strip()
    return f"{mutant.file}, line {mutant.line + 1}: {mutant.change} gives {line}\n      {reason(mutant)}"


def main(argv: list[str]) -> None:
    jobs = int(argv[0]) if argv else os.cpu_count()
    counts, known, unknown, files = [], 0, 0, argv[1:] or list(FILES)
    for name in files:
        found, unchanged = list(Source(name).mutants()), Mutant(name, 0, "", (ROOT / name).read_text())
        print(f"{name}, unchanged and in {len(found)} mutants; no test notices:", flush=True)
        if notice([unchanged], 1) != [False]:
            sys.exit("the tests must pass before anything is changed")
        noticed = notice(found, jobs)
        left = [mutant for mutant, seen in zip(found, noticed, strict=True) if not seen]
        counts.append(f"{len(found)} of {name}")
        known += sum(bool(reason(mutant)) for mutant in left)
        unknown += sum(not reason(mutant) for mutant in left)
    if unknown:
        sys.exit(1)
    if files != list(FILES):
        return
    sys.path.append(str(ROOT))
    from strategies import (
        keep,  # not before: it imports mod.py, which a mutant must not find imported
    )

    total = sum(int(count.split()[0]) for count in counts)
    keep("the core changed in one place", f"{total} mutants, {', '.join(counts)}: {total - known} make a test fail, "
         f"{known} cannot matter, for reasons that `tests/mutate.py` gives")


def parses(source: str) -> bool:
    try:
        compile(source, "mod.py", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


if __name__ == "__main__":
    import gc
    from importlib import import_module

    import pytest
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    for module in ("hypothesis.strategies", "numpy.random", "safetensors.torch", "tqdm"):
        import_module(module)  # once, not in each fork
    with FakeTensorMode():
        torch.zeros(1, requires_grad=True).sum().backward()  # the first time takes long
    torch.set_num_threads(1)
    gc.freeze()
    main(sys.argv[1:])
