"""Remove each check of the verifying modules, one at a time, and see that a test fails.

A mutant takes one thing away or turns it round: a `raise`, the condition of an `if` that raises, a call whose result
nobody uses, an operand of `and` or `or`, a comparison. The module's own tests run once to see which of them reach which
lines; each mutant then runs those that reach it, until one fails, in a forked process, where the function at hand gets
other code. A mutant that all tests pass is a check that no test needs; it is printed, and the program fails.

    python tools/mutations.py                          # all modules
    python tools/mutations.py registry.pulling.cache   # one of them
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import copy
import gc
import importlib
import math
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
#: Where it is said which test fails without any change; a forked process is otherwise silent.
STDERR = os.dup(2)

#: The verifying modules, each with its tests (files, and an expression for pytest's -k).
MODULES = {
    "registry.pulling.cache": (("pulling_cache",), ""),
    "registry.pulling.content": (("pulling_content",), ""),
    "registry.pulling.lockfile": (("pulling_lockfile",), ""),
    "registry.pulling.signatures": (("signing",), "not loopback"),
    "registry.pulling.fetch": (
        ("pulling", "pulling_fetch", "catalog_index", "catalog_plain"),
        "not loopback and not thousand and not sixteen and not eight and not values_and_shapes and not hostile_names "
        "and not at_once and not malformed and not sparse and not killed",
    ),
    "registry.signing.signatures": (("signing",), "not loopback"),
    "registry.signing.keys": (("signing",), "not loopback"),
    "registry.catalog.memory": (("catalog_memory",), ""),
    "registry.formats.agreement": (("formats_agreement",), ""),
    "registry.formats.manifest": (("formats_manifest",), "not data and not schema"),
    "registry.formats.tensors": (("formats_tensors", "publishing_source"), "not loopback"),
    "registry.formats.weights": (("formats_weights",), "not million and not thousand and not every_file"),
    "registry.checks.tensors": (("checks_tensors", "formats_tensors"), ""),
    "registry.checks.configuration": (("checks_configuration",), ""),
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
        lines: Lines of the source that are changed.
        what: What was done.
        code: The function's other code.
    """

    module: str
    function: str
    lines: range
    what: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.module}:{self.lines.start} {self.function}: {self.what}"


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
    arguments = [str(TESTS / f"test_registry_{file}.py") for file in files]
    arguments += ["-qq", "-x", "--no-header", "--no-summary", "--capture=no", "--tb=native", "-m", "not slow"]
    arguments += ["-p", "no:cacheprovider", "-p", "no:xdist", *(["-k", expression] if expression else [])]
    run = Run(name, importlib.import_module(name))
    pytest.main(arguments, plugins=[run])
    if not run.finished:
        raise SystemExit(f"The tests of {name} fail without any change")
    return run.survivors


class Run:
    """A plugin of pytest: in place of running the tests once it runs, for each mutant, those that reach its lines.

    Attributes:
        survivors: Mutants that no test notices.
        finished: Whether all mutants were run.
    """

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self.module = name, module
        self.survivors: list[Mutant] = []
        self.finished = False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Find out which test reaches which line, then run each mutant in a process that has everything loaded."""
        started = time.monotonic()
        mutants = list(find_mutants(self.name, Path(self.module.__file__ or "").read_text(encoding="utf-8")))
        reach = measure(session, self.module)
        if reach is None:
            return True
        load(reach.modules)
        unreached, noticed = 0, Counter[tuple[str, int]]()
        for mutant in mutants:
            # Those that noticed another change of this function come first, then the fastest.
            chosen = reach.find_tests(mutant.lines)
            chosen.sort(key=lambda test: -noticed[mutant.function, test])
            unreached += not chosen
            outcome = run_tests(session, chosen, mutant, self.module, 60 + 3 * reach.seconds_of(chosen))
            if 0 < outcome <= len(chosen):
                noticed[mutant.function, chosen[outcome - 1]] += 1
            if not outcome and (mutant.module, mutant.function, mutant.what) not in EQUIVALENT:
                self.survivors.append(mutant)
                print(f"  survived{'' if chosen else ', and no test comes there'}: {mutant}", flush=True)
        seconds = time.monotonic() - started
        counts = f"{len(mutants):4} mutants, {len(self.survivors):3} survive ({unreached} where no test comes)"
        print(f"{self.name:32} {counts}, {seconds:6.0f} s", flush=True)
        self.finished = True
        return True


@dataclass(frozen=True)
class Reach:
    """What each test reaches.

    Attributes:
        lines: By test: the lines of the module that it ran.
        seconds: By test: how long it took.
        modules: What had been imported in the end.
    """

    lines: dict[int, set[int]]
    seconds: dict[int, float]
    modules: list[str]

    def find_tests(self, wanted: range) -> list[int]:
        """Return the tests that run one of some lines, the fastest first."""
        found = [test for test, lines in self.lines.items() if not lines.isdisjoint(wanted)]
        return sorted(found, key=self.seconds_of_one)

    def seconds_of_one(self, test: int) -> float:
        """Return how long a test took."""
        return self.seconds[test]

    def seconds_of(self, tests: list[int]) -> float:
        """Return how long several tests took."""
        return sum(map(self.seconds_of_one, tests))


class Watch:
    """A plugin of pytest that notes which lines of a module each test runs, and the fixtures that it shares."""

    def __init__(self, session: pytest.Session, module: ModuleType) -> None:
        self.items, self.file = session.items, module.__file__
        self.lines: dict[int, set[int]] = {number: set() for number in range(len(session.items))}
        self.seconds: dict[int, float] = {}
        self.shared: dict[str, set[int]] = {}
        self.now: set[int] = set()
        self.failed: set[int] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Set up a fixture."""
        before = self.now
        if fixturedef.scope != "function":
            self.now = self.shared.setdefault(fixturedef.argname, set())
        try:
            return (yield)
        finally:
            self.now = before

    def run(self, session: pytest.Session) -> Reach | None:
        """Run all tests; return `None` if more than a tenth of them fails."""
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        for number, item in enumerate(self.items):
            self.now, started = self.lines[number], time.monotonic()
            run_item(session, self.items, number)
            self.seconds[number] = time.monotonic() - started
            if session.testsfailed:
                # It may wait for something, and the machine be busy; without it more mutants survive, never fewer.
                os.write(STDERR, f"  left out, it fails without any change: {item.nodeid}\n".encode())
                session.testsfailed = 0
                self.failed.add(number)
        if len(self.failed) > len(self.items) // 10:
            return None
        for number, item in enumerate(self.items):
            for name in set(self.shared) & set(getattr(item, "fixturenames", ())):
                self.lines[number] |= self.shared[name]
        lines = {number: found for number, found in self.lines.items() if number not in self.failed}
        return Reach(lines, self.seconds, list(sys.modules))

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """Note a line; frames of other modules are left alone."""
        if frame.f_code.co_filename != self.file:
            return None
        self.now.add(frame.f_lineno)
        return self.trace


def measure(session: pytest.Session, module: ModuleType) -> Reach | None:
    """Run the tests without any change in a forked process, and find what each one reaches."""
    with tempfile.TemporaryFile() as answer:

        def run() -> int:
            watch = Watch(session, module)
            session.config.pluginmanager.register(watch)
            pickle.dump(watch.run(session), answer)
            answer.flush()
            return 0

        if fork(run, None):
            return None
        answer.seek(0)
        reach: Reach | None = pickle.load(answer)  # noqa: S301 - our own process wrote it
    return reach


def load(modules: list[str]) -> None:
    """Import what the tests import while they run, so that no process for a mutant has to."""
    for name in set(modules) - set(sys.modules):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page


def run_tests(session: pytest.Session, chosen: list[int], mutant: Mutant, module: ModuleType, patience: float) -> int:
    """Run tests on a mutant in a forked process; return 0 if all pass, else the number of the one that fails."""

    def run() -> int:
        find_function(module, mutant.function).__code__ = mutant.code
        items = [session.items[number] for number in chosen]
        for number in range(len(items)):
            run_item(session, items, number)
            if session.testsfailed:
                return min(number + 1, 97)
        return 0

    return fork(run, patience) if chosen else 0


def run_item(session: pytest.Session, items: list[pytest.Item], number: int) -> None:
    """Run one test, as pytest's own loop does it."""
    following = items[number + 1] if number + 1 < len(items) else None
    items[number].config.hook.pytest_runtest_protocol(item=items[number], nextitem=following)


def fork(action: Callable[[], int], patience: float | None) -> int:
    """Do something silently in a forked process; return its result, 98 if it raises, 99 after `patience` seconds."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        outcome = 98
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), sys.stdout.fileno())
                os.dup2(nothing.fileno(), sys.stderr.fileno())
                outcome = action()
        finally:
            os._exit(outcome)
    end = time.monotonic() + (patience or math.inf)
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
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
    for path, function, owner in _find_functions(ast.parse(source)):
        for index in range(len(list(_find_changes(function)))):
            twin = copy.deepcopy(function)
            node, what, apply = list(_find_changes(twin))[index]
            apply()
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield Mutant(module, path, lines, what, _find_code(_compile(module, twin, owner), path.split(".")))


def _find_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, ast.ClassDef | None]]:
    """Yield name and node of each function and method, and the class of a method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node, None
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name != "__repr__":
                    yield f"{node.name}.{inner.name}", inner, node


def _compile(module: str, function: ast.FunctionDef, owner: ast.ClassDef | None) -> CodeType:
    """Compile one function, in its class if it has one: the rest of the module stays as it is."""
    body: list[ast.stmt] = [function]
    if owner is not None:
        body = [ast.ClassDef(owner.name, owner.bases, owner.keywords, body, [])]
    tree = ast.fix_missing_locations(ast.Module(body, []))
    return compile(tree, f"<{module}>", "exec", dont_inherit=True, flags=__future__.annotations.compiler_flag)


def _find_code(code: CodeType, path: list[str]) -> CodeType:
    for part in path:
        code = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == part)
    return code


def _find_changes(function: ast.FunctionDef) -> Iterator[tuple[Any, str, Any]]:
    """Yield node, description and action of each change to a function."""
    for node in _walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield from _find_statements(block)
        if isinstance(node, ast.If) and any(isinstance(each, ast.Raise) for each in ast.walk(node)):
            yield node.test, f"never: if {_show(node.test)}", _setter(node, "test", ast.Constant(False))
        if isinstance(node, ast.BoolOp):
            for number, value in enumerate(node.values):
                neutral = ast.Constant(isinstance(node.op, ast.And))
                yield value, f"without the operand {_show(value)}", _replacer(node.values, number, neutral)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            opposite = _OPPOSITE[type(node.ops[0])]()
            yield node, f"the opposite of {_show(node)}", _setter(node, "ops", [opposite])


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and those below it, but for the words of messages."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from _walk(child)


def _find_statements(block: list[Any]) -> Iterator[tuple[Any, str, Any]]:
    for number, statement in enumerate(block):
        is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        if is_call or isinstance(statement, ast.Raise):
            nothing = ast.copy_location(ast.Pass(), statement)
            yield statement, f"without: {_show(statement)}", _replacer(block, number, nothing)


def _setter(node: ast.AST, field: str, value: Any) -> Any:
    return lambda: setattr(node, field, value)


def _replacer(block: list[Any], number: int, node: ast.AST) -> Any:
    return lambda: block.__setitem__(number, node)


def _show(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:89]}…"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
