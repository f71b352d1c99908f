"""Remove each check of the verifying modules, one at a time, and see that a test fails.

A mutant takes one thing away or turns it round: a `raise`, the condition of an `if` that raises, a call whose result
nobody uses, an operand of `and` or `or`, a comparison. Each runs the module's own tests in a forked process, where the
function at hand gets other code. A mutant that all tests pass is a check that no test needs; it is printed, and the
program fails.

    python tools/mutations.py                          # all modules
    python tools/mutations.py registry.pulling.cache   # one of them
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
#: Seconds after which a mutant counts as noticed: it waits for something that never comes.
PATIENCE = 120

#: The verifying modules, each with its tests (files, and an expression for pytest's -k).
MODULES = {
    "registry.pulling.cache": (("pulling_cache",), ""),
    "registry.pulling.content": (("pulling_content",), ""),
    "registry.pulling.lockfile": (("pulling_lockfile",), ""),
    "registry.pulling.signatures": (("signing",), ""),
    "registry.pulling.fetch": (("pulling", "pulling_fetch", "catalog_index"), "not loopback"),
    "registry.signing.signatures": (("signing",), "not loopback"),
    "registry.signing.keys": (("signing",), "not loopback"),
    "registry.catalog.memory": (("catalog_memory",), ""),
    "registry.formats.agreement": (("formats_agreement",), ""),
    "registry.formats.manifest": (("formats_manifest",), "not data and not schema"),
    "registry.formats.tensors": (("formats_tensors", "publishing_source"), "not loopback"),
    "registry.formats.weights": (("formats_weights",), "not million and not thousand and not every_file and not chunk"),
    "registry.base.contract": (("base_contract",), ""),
}

#: Mutants that change nothing anybody could see, by module, function and what was done, with the reason.
EQUIVALENT: dict[tuple[str, str, str], str] = {}

_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        module: The module's name.
        function: The function or method, dotted.
        line: Line of the source.
        what: What was done.
        code: The function's other code.
    """

    module: str
    function: str
    line: int
    what: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.function}: {self.what}"


def main(names: list[str]) -> int:
    """Run the mutants of some modules, or of all; return 1 if one survives."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(TESTS))
    os.chdir(ROOT)
    survivors: list[Mutant] = []
    for name in names or MODULES:
        survivors += run_module(name)
    for mutant in survivors:
        print(f"SURVIVED {mutant}")
    print(f"{len(survivors)} mutants survive")
    return 1 if survivors else 0


def run_module(name: str) -> list[Mutant]:
    """Run the mutants of one module and return those that no test notices."""
    files, expression = MODULES[name]
    arguments = [str(path) for file in files if (path := TESTS / f"test_registry_{file}.py").exists()]
    arguments += [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not slow",
        *(["-k", expression] if expression else []),
    ]
    module, started = importlib.import_module(name), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*arguments, "--collect-only"])  # what is imported here is not imported again for each mutant
    if outcome := run_tests(None, module, arguments):
        raise SystemExit(f"The tests of {name} fail without any change (exit code {outcome})")
    mutants = list(find_mutants(name, Path(module.__file__ or "").read_text(encoding="utf-8")))
    survivors = []
    for mutant in mutants:
        outcome = run_tests(mutant, module, arguments)
        known = (mutant.module, mutant.function, mutant.what) in EQUIVALENT
        if not outcome and not known:
            survivors.append(mutant)
            print(f"  survived: {mutant}", flush=True)
    seconds = time.monotonic() - started
    print(f"{name:32} {len(mutants):4} mutants, {len(survivors):3} survive, {seconds:6.0f} s", flush=True)
    return survivors


def run_tests(mutant: Mutant | None, module: ModuleType, arguments: list[str]) -> int:
    """Run tests in a forked process; return pytest's exit code, or 99 after `PATIENCE`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        outcome = 98
        try:
            if mutant is not None:
                find_function(module, mutant.function).__code__ = mutant.code
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcome = int(pytest.main(arguments))
        finally:
            os._exit(outcome)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end or mutant is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99


def find_function(module: ModuleType, dotted: str) -> FunctionType:
    """Return a function or method of a module, without what decorators put around it."""
    found: Any = module
    for part in dotted.split("."):
        found = vars(found)[part]
    if isinstance(found, property):
        found = found.fget
    found = getattr(found, "__func__", found)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    assert isinstance(found, FunctionType)  # noqa: S101 - narrows a type
    return found


def find_mutants(module: str, source: str) -> Iterator[Mutant]:
    """Yield the mutants of a module."""
    tree = ast.parse(source)
    for path, function in _find_functions(tree):
        count = len(list(_find_changes(function)))
        for index in range(count):
            changed = copy.deepcopy(tree)
            twin = next(node for name, node in _find_functions(changed) if name == path)
            line, what, apply = list(_find_changes(twin))[index]
            apply()
            code = compile(ast.fix_missing_locations(changed), f"<{module}>", "exec", dont_inherit=True)
            yield Mutant(module, path, line, what, _find_code(code, path.split(".")))


def _find_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name != "__repr__":
                    yield f"{node.name}.{inner.name}", inner


def _find_code(code: CodeType, path: list[str]) -> CodeType:
    for part in path:
        code = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == part)
    return code


def _find_changes(function: ast.FunctionDef) -> Iterator[tuple[int, str, Any]]:
    """Yield line, description and action of each change to a function."""
    for node in _walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield from _find_statements(block)
        if isinstance(node, ast.If) and any(isinstance(each, ast.Raise) for each in ast.walk(node)):
            yield node.lineno, f"never: if {_show(node.test)}", _setter(node, "test", ast.Constant(False))
        if isinstance(node, ast.BoolOp):
            for number, value in enumerate(node.values):
                neutral = ast.Constant(isinstance(node.op, ast.And))
                yield node.lineno, f"without the operand {_show(value)}", _replacer(node.values, number, neutral)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            opposite = _OPPOSITE[type(node.ops[0])]()
            yield node.lineno, f"the opposite of {_show(node)}", _setter(node, "ops", [opposite])


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and those below it, but for the words of messages."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from _walk(child)


def _find_statements(block: list[Any]) -> Iterator[tuple[int, str, Any]]:
    for number, statement in enumerate(block):
        is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        if is_call or isinstance(statement, ast.Raise):
            nothing = ast.copy_location(ast.Pass(), statement)
            yield statement.lineno, f"without: {_show(statement)}", _replacer(block, number, nothing)


def _setter(node: ast.AST, field: str, value: Any) -> Any:
    return lambda: setattr(node, field, value)


def _replacer(block: list[Any], number: int, node: ast.AST) -> Any:
    return lambda: block.__setitem__(number, node)


def _show(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:89]}…"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
