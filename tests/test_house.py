"""The house stays as it was planned: small files, short functions, open lines, arrows in one direction."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {"mod": 2300, "model": 4800, "data": 4800, "eval": 4200, "train": 3200,
        "video": 2650}  # tokens, at most
WHOLE, EXTRA = 19_300, 3_500  # tokens of the core without video.py, and of each file in extras
# The ceiling of a file that is over its budget; it may only fall. The features that the plan of the house gives to
# model.py and eval.py had 7,000 and 6,800 tokens before the house was built. In a fork, set your own.
EXCEPTIONS = {"model.py": 6_700, "eval.py": 6_800, "core": 23_800}
SKIP = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENCODING, tokenize.ENDMARKER}
FILES = [*(ROOT / f"{name}.py" for name in CORE), *sorted((ROOT / "extras").glob("*.py"))]
ARROWS = {"mod": set(), "video": set(), "data": {"video"}, "model": {"mod"}, "eval": {"mod", "model", "data", "video"},
          "train": {"mod", "model", "data", "eval"}}
PACKAGES = {"torch", "numpy", "safetensors", "tqdm", "tokenizers", "gguf", "onnx"}


def code_tokens(text: str) -> list[tokenize.TokenInfo]:
    """Python tokens without comments, docstrings and blank lines; an f-string is one token"""
    docs, tokens, depth = set(), [], 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    starts, ends = (getattr(tokenize, f"FSTRING_{name}", None) for name in ("START", "END"))  # from 3.12 on
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth -= token.type == ends
        if token.type not in SKIP and token.start[0] not in docs and depth == 0 and token.type != starts:
            tokens.append(token)
        depth += token.type == starts
    return tokens


def complexity(function: ast.FunctionDef) -> int:
    """McCabe's number, counting comprehensions and ternaries too"""
    branches = 1
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.For | ast.While | ast.ExceptHandler | ast.IfExp | ast.comprehension):
            branches += 1
        if isinstance(node, ast.comprehension):
            branches += len(node.ifs)
        if isinstance(node, ast.BoolOp):
            branches += len(node.values) - 1
    return branches


def imports(node: ast.AST) -> set[str]:
    """The modules that a piece of code imports, inside functions too"""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name for alias in inner.names}
        if isinstance(inner, ast.ImportFrom):
            found.add(inner.module)
            found |= {f"{inner.module}.{alias.name}" for alias in inner.names if inner.module == "extras"}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_keeps_its_budget_of_tokens_and_its_lines_are_open(file):
    text, name = file.read_text(), str(file.relative_to(ROOT))
    tokens = code_tokens(text)
    budget = CORE.get(file.stem, EXTRA) if file.parent == ROOT else EXTRA
    assert len(tokens) <= max(budget, EXCEPTIONS.get(name, 0))
    lines = len({token.start[0] for token in tokens})
    assert not lines or len(tokens) / lines <= 12
    assert max(map(len, text.splitlines()), default=0) <= 100


def test_the_core_keeps_its_budget_and_an_exception_is_little_larger_than_its_file():
    sizes = {f"{name}.py": len(code_tokens((ROOT / f"{name}.py").read_text())) for name in CORE}
    sizes["core"] = sum(sizes.values()) - sizes["video.py"]
    assert sizes["core"] <= max(WHOLE, EXCEPTIONS.get("core", 0))
    for name, allowed in EXCEPTIONS.items():
        assert allowed - sizes[name] < 200, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_function_fits_on_a_screen_and_branches_little(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 40, f"{node.name} is too long"
            assert complexity(node) <= 10, f"{node.name} branches {complexity(node)} ways"


def test_the_arrows_of_the_core_go_one_way_and_two_lazy_doors_lead_to_extras():
    doors = []
    for name, allowed in ARROWS.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        found = {module.split(".")[0] for module in imports(tree)}
        assert found & CORE.keys() <= allowed, name
        assert found <= PACKAGES | CORE.keys() | set(sys.stdlib_module_names) | {"extras"}, name
        for node in tree.body:
            if any(module.split(".")[0] == "extras" for module in imports(node)):
                assert isinstance(node, ast.FunctionDef)  # not when the file is imported
                doors.append(f"{name}.{node.name}")
    assert sorted(doors) == ["data.find_task", "model.load"]


def test_extras_import_each_other_without_a_circle():
    arrows = {}
    for file in (ROOT / "extras").glob("*.py"):
        found = imports(ast.parse(file.read_text()))
        roots = {module.split(".")[0] for module in found}
        assert roots <= PACKAGES | CORE.keys() | set(sys.stdlib_module_names) | {"extras"}, file.name
        arrows[file.stem] = {module.split(".")[1] for module in found if module.startswith("extras.")}
    while arrows:
        leaves = {name for name, others in arrows.items() if not others & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: others for name, others in arrows.items() if name not in leaves}


def test_there_are_six_modules_and_the_lines_of_tests_are_not_too_wide():
    assert {file.stem for file in ROOT.glob("*.py")} == CORE.keys()
    for file in ROOT.glob("tests/**/*.py"):
        assert max(map(len, file.read_text().splitlines()), default=0) <= 130, file.name
