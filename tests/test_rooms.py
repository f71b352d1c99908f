"""The house rules: which room may import which, what may load torch, how deep imports go, how large rooms are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Rooms of each package on their floor. A room imports from lower floors only, never from one beside it.
FLOORS = {
    "lora_plugins": (
        ("errors", "logs", "text"),
        ("models",),
        ("plugins",),
        ("quantization", "targets"),
        ("adapters",),
        ("trainer", "merging"),
        ("planning", "serving"),
        ("recipe",),
        ("commands",),
    ),
    "registry": (
        ("text",),
        ("errors",),
        ("formats", "disk"),
        ("hubs", "checks", "pages"),
        ("catalog",),
        ("base", "signing"),
        ("pulling", "publishing"),
        ("upkeep", "health", "adopting", "web"),
        ("commands",),
        ("plugin",),
    ),
}

#: Modules that hand out names which have moved: they import `text` only.
FORMER = ("lora_plugins.cli", "lora_plugins.packing")

#: Loads a model's libraries never, or only inside functions.
LIGHT = (
    "lora_plugins.errors",
    "lora_plugins.logs",
    "lora_plugins.text",
    "lora_plugins.plugins",
    "lora_plugins.builtin",
    "lora_plugins.commands",
    "lora_plugins.recipe.arguments",
    "lora_plugins.recipe.config_file",
    "lora_plugins.recipe.files",
    "lora_plugins.recipe.parser",
    "registry",
)
#: Files of light rooms that are loaded only where a live model is at hand.
HEAVY_FILES = ("_layer",)
HEAVY_MODULES = (
    "registry.adopting.unpickle",
    "registry.base.restoring",
    "registry.hubs.client",
    "registry.publishing.callback",
)
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "bitsandbytes", "matplotlib"}

#: Where imports inside functions are allowed in rooms that load torch: optional, or not part of every build.
OPTIONAL = ("bitsandbytes", "deepspeed", "gguf", "hqq", "matplotlib", "optimum", "torch.distributed", "torchao", "trl")
#: Private modules of these libraries come and go between releases; they are imported where they are used.
PRIVATE = ("peft.utils.transformers_weight_conversion", "torch.utils._python_dispatch", "torch.utils._pytree")

MOST_MODULES = 14
MOST_FLOORS_IN_A_ROOM = 4
MOST_IMPORTS_IN_FUNCTIONS = 200


@dataclass(frozen=True)
class Import:
    """One imported module: where it stands, and whether it is loaded with the file."""

    source: str
    target: str
    line: int
    in_function: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def _modules() -> dict[str, Path]:
    found = {}
    for package in FLOORS:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, in_function, for_types
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        yield from _walk(child, inside, types)


def read_imports(name: str, source: str) -> list[Import]:
    """Return every import of a module, the ones inside functions and under ``TYPE_CHECKING`` too."""
    found = []
    for node, in_function, for_types in _walk(ast.parse(source), False, False):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno} has a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [path if path in MODULES else str(node.module) for path in inner]
        found += [Import(name, target, node.lineno, in_function, for_types) for target in dict.fromkeys(targets)]
    return found


IMPORTS = [found for name, path in MODULES.items() for found in read_imports(name, path.read_text())]


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _floor(module: str) -> int | None:
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    return next((floor for floor, rooms in enumerate(FLOORS.get(package, ())) if first in rooms), None)


def find_forbidden(imports: Iterable[Import]) -> list[str]:
    """Return the imports that go against the direction, each with the rule that it breaks."""
    found = []
    for item in imports:
        rule = _broken_rule(item)
        if rule:
            found.append(f"{item}: {rule}")
    return found


def _broken_rule(item: Import) -> str:
    source, target = item.source, item.target
    package, other = source.split(".")[0], target.split(".")[0]
    if other not in FLOORS or _room(source) == _room(target):
        return ""
    if package != other:
        return _broken_rule_between_packages(source, target)
    if source == package or _room(source) in ("lora_plugins.__main__", "lora_plugins.testing"):
        return ""
    if source in FORMER:
        return "" if target == "lora_plugins.text" else "former places only hand names on"
    if _room(source) == "lora_plugins.builtin":
        return "" if target == "lora_plugins" else "built-in plugins use the public names of lora_plugins only"
    if _room(source) == "registry.testing":
        return "the test kit imports nothing of the rest"
    if _room(target) in ("lora_plugins.builtin", "lora_plugins.testing", "registry.testing"):
        return "nobody imports the built-in plugins or the test kits"
    mine, its = _floor(source), _floor(target)
    if target == other:
        return ""
    if mine is None or its is None:
        return "this room has no floor yet: add it to FLOORS"
    return "" if its < mine else "a room imports from lower floors only"


def _broken_rule_between_packages(source: str, target: str) -> str:
    if source.startswith("lora_plugins."):
        allowed = ("adapters", "merging", "recipe", "commands", "serving", "doctor")
        if source.split(".")[1] not in allowed:
            return f"of lora_plugins only {', '.join(allowed)} use registry"
        return "" if target == "registry" else "lora_plugins uses the public names of registry only"
    if _room(source) != "registry.plugin":
        return "of registry only plugin.py uses lora_plugins"
    return "" if target == "lora_plugins" else "registry uses the public names of lora_plugins only"


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_the_page_for_contributors_shows_this_direction(package: str) -> None:
    line = re.search(rf"^ +{package}: +(.+)$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert line is not None
    assert line[1] == " <- ".join(" | ".join(rooms) for rooms in FLOORS[package])


def test_imports_go_in_one_direction() -> None:
    assert find_forbidden(IMPORTS) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lora_plugins.models.structure", "from lora_plugins.trainer.seam import put_model"),
        ("lora_plugins.targets.resolver", "from lora_plugins.quantization.walk import quantize_in_place"),
        ("lora_plugins.trainer.liveness", "from registry import pull_adapter"),
        ("lora_plugins.adapters.files", "from registry.base.contract import Check"),
        ("lora_plugins.builtin.quantizers.hqq", "from lora_plugins.quantization.walk import quantize_in_place"),
        ("lora_plugins.packing", "from lora_plugins.recipe.packing import pack"),
        ("registry.catalog.listing", "from registry.pulling.fetch import Fetcher"),
        ("registry.formats.manifest", "import registry.hubs.folder"),
        ("registry.pulling.pull", "from lora_plugins import prepare_model"),
        ("registry.testing.store", "from registry.errors import RegistryError"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    assert find_forbidden(read_imports(module, line))
    inside_function = f"def run():\n    {line}\n"
    assert find_forbidden(read_imports(module, inside_function))


def _is_light(module: str) -> bool:
    if module.endswith(HEAVY_FILES) or module in HEAVY_MODULES:
        return False
    if module in FORMER:
        return True
    return any(module == room or module.startswith(room + ".") for room in LIGHT) or module == "lora_plugins"


def _is_heavy(target: str) -> bool:
    return target.split(".")[0] in HEAVY or (target.split(".")[0] in FLOORS and not _is_light(target))


def test_light_rooms_load_no_torch() -> None:
    loaded = [item for item in IMPORTS if not item.in_function and not item.for_types]
    assert [str(item) for item in loaded if _is_light(item.source) and _is_heavy(item.target)] == []


def test_heavy_rooms_import_at_the_top_of_the_file() -> None:
    inside = [item for item in IMPORTS if item.in_function and not _is_light(item.source)]
    reasons = (*OPTIONAL, *PRIVATE)
    without = [str(item) for item in inside if not item.target.startswith(reasons)]
    assert without == []


def test_few_imports_stand_inside_functions() -> None:
    places = {(item.source, item.line) for item in IMPORTS if item.in_function}
    assert len(places) <= MOST_IMPORTS_IN_FUNCTIONS


def _edges(nodes: Iterable[str], *, rooms: bool = False) -> dict[str, set[str]]:
    known = {_room(name) if rooms else name for name in nodes}
    edges: dict[str, set[str]] = {name: set() for name in known}
    for item in IMPORTS:
        source, target = (_room(item.source), _room(item.target)) if rooms else (item.source, item.target)
        if source in known and target in known and source != target:
            edges[source].add(target)
    return edges


def _depth(edges: dict[str, set[str]], node: str, path: tuple[str, ...] = ()) -> int:
    """Return the number of modules on the longest way down from a module. Raises on a cycle."""
    if node in path:
        raise AssertionError(f"a cycle of imports: {' -> '.join((*path[path.index(node) :], node))}")
    return 1 + max((_depth(edges, below, (*path, node)) for below in edges[node]), default=0)


def test_no_cycle_of_imports() -> None:
    # The packages themselves load their public names lazily, by text.
    edges = _edges(name for name in MODULES if name not in FLOORS)
    done: dict[str, int] = {}

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, f"a cycle of imports: {' -> '.join((*path[path.index(node) :], node))}"
        if node not in done:
            for below in sorted(edges[node]):
                visit(below, (*path, node))
            done[node] = 1

    for name in sorted(edges):
        visit(name, ())
    assert len(done) == len(edges) > 150


def test_rooms_are_not_deep() -> None:
    """The longest chain of imports inside a folder."""
    folders: dict[str, list[str]] = {}
    for name in MODULES:
        if name.count(".") > 1:
            folders.setdefault(name.rpartition(".")[0], []).append(name)
    depths = {}
    for folder, names in folders.items():
        edges = _edges(names)
        depths[folder] = max(_depth(edges, name) for name in names)
    assert {folder: depth for folder, depth in depths.items() if depth > MOST_FLOORS_IN_A_ROOM} == {}


@pytest.mark.parametrize(("package", "most"), [("lora_plugins", 10), ("registry", 9)])
def test_rooms_do_not_pile_up(package: str, most: int) -> None:
    """The longest chain of imports from room to room."""
    rooms = [name for name in MODULES if name != package and name.split(".")[0] == package]
    edges = _edges(rooms, rooms=True)
    assert max(_depth(edges, room) for room in edges) <= most


def test_no_folder_is_crowded() -> None:
    counts: dict[str, int] = {}
    for path in MODULES.values():
        if path.name not in ("__init__.py", "__main__.py"):
            folder = path.parent.relative_to(ROOT).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_no_module_is_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_functions_are_short() -> None:
    """Nine of ten functions have at most 24 lines, in each package."""
    for package in FLOORS:
        lengths = sorted(
            node.end_lineno - node.lineno + 1
            for name, path in MODULES.items()
            if name.split(".")[0] == package
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
        )
        assert lengths[int(len(lengths) * 0.9)] <= 24, package


def test_every_room_says_what_it_is_for() -> None:
    for name, path in MODULES.items():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{name} has no docstring"


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_first_lines_are_short(package: str) -> None:
    """The first line of a module's docstring has at most 72 characters."""
    first = {
        name: str(ast.get_docstring(ast.parse(path.read_text()))).splitlines()[0]
        for name, path in MODULES.items()
        if name.split(".")[0] == package
    }
    assert {name: line for name, line in first.items() if len(line) > 72} == {}
