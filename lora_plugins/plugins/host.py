"""Load plugins, isolate their failures, settle clashes, list them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from lora_plugins.errors import (
    ArchitectureConflict,
    BrokenBuiltin,
    PluginError,
    PluginWarning,
    QuantizerConflict,
    UnknownQuantizer,
)
from lora_plugins.plugins import hookspecs
from lora_plugins.plugins.hookspecs import PROJECT
from lora_plugins.plugins.table import BLOCK_VARIABLE, PluginInfo, Table
from lora_plugins.plugins.types import Architecture, Quantizer
from lora_plugins.text import did_you_mean, one_line

if TYPE_CHECKING:
    import typer

#: The distribution both import packages come in; its own entry points count as built-in.
DISTRIBUTION = "lora-plugins"

PLUGINS = (
    "lora_plugins.builtin.architectures",
    "lora_plugins.builtin.quantizers.bitsandbytes",
    "lora_plugins.commands.plugin",
    "lora_plugins.builtin.quantizers.hqq",
    "lora_plugins.builtin.quantizers.quanto",
    "lora_plugins.builtin.quantizers.torchao",
)

TRACE_VARIABLE = "LORA_PLUGINS_TRACE"

#: Loading one of these with a plugin delays every command by seconds, which its listing says.
_HEAVY = ("torch", "transformers")

T = TypeVar("T")
Record = TypeVar("Record", Architecture, Quantizer)


@dataclass(slots=True)
class _Loaded:
    """A plugin with a pluggy manager of its own.

    In a common manager one plugin that raises stops the call for all others, one that fails validation
    stays registered, and one that can't be hashed breaks the calls of everybody else.
    """

    info: PluginInfo
    plugin: object
    hooks: pluggy.PluginManager

    def implementations(self, hook: str) -> int:
        """How many functions of the plugin answer a hook."""
        found = getattr(self.hooks.hook, hook).get_hookimpls()
        return sum(not (impl.wrapper or impl.hookwrapper) for impl in found)

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        answers: list[Any] = getattr(self.hooks.hook, hook)(**arguments)
        return answers


class PluginHost:
    """All plugins of one process, and what they registered.

    Args:
        block: Entry-point or distribution names to leave out, beside those in ``LORA_PLUGINS_BLOCK``.
        trace: Print every hook call to stderr; default is whether ``LORA_PLUGINS_TRACE`` is set.

    Attributes:
        plugins: Every plugin found, in the order of loading: the built-ins, then by distribution and name.

    Raises:
        BrokenBuiltin: A plugin that lora-plugins ships does not load.
    """

    def __init__(self, block: Iterable[str] = (), *, trace: bool | None = None) -> None:
        self._trace = os.environ.get(TRACE_VARIABLE, "") not in ("", "0") if trace is None else trace
        self._blocked = {_canonical(name) for name in [*block, *os.environ.get(BLOCK_VARIABLE, "").split(",")]} - {""}
        self._loaded: list[_Loaded] = []
        self.plugins: list[PluginInfo] = []
        self._architectures: Table[Architecture] = Table("architecture", ArchitectureConflict)
        self._quantizers: Table[Quantizer] = Table("quantization backend", QuantizerConflict)
        self._load_builtins()
        self._load_entry_points()
        self._architectures.annotate()
        self._quantizers.annotate()

    # -- what was registered -------------------------------------------------------------------

    def model_types(self) -> list[str]:
        """Every registered ``model_type``, sorted."""
        return self._architectures.names()

    def architecture(self, model_type: str) -> Architecture | None:
        """Return the record of a model type, ``None`` where nobody registered it.

        Raises:
            ArchitectureConflict: Two third-party plugins claim it.
        """
        return self._architectures.get(model_type)

    def scopes(self) -> list[str]:
        """Every name that some architecture has for a group of its modules, sorted."""
        return sorted({scope for record in self._architectures.things() for scope in record.scopes})

    def quantizer_names(self) -> list[str]:
        """Every registered backend name, sorted."""
        return self._quantizers.names()

    def quantizers(self) -> list[Quantizer]:
        """Every backend; a name that two plugins claim is left out, and reported when it is asked for."""
        found = []
        for name in self.quantizer_names():
            with contextlib.suppress(QuantizerConflict):
                found.append(self.quantizer(name))
        return found

    def quantizer(self, name: str) -> Quantizer:
        """Return a quantization backend.

        Raises:
            UnknownQuantizer: No plugin registers it.
            QuantizerConflict: Two third-party plugins claim it.
        """
        found = self._quantizers.get(name)
        if found is not None:
            return found
        known = self.quantizer_names()
        hint = did_you_mean(name, known)
        disabled = [str(info) for info in self.plugins if info.disabled]
        extra = f" Disabled plugins: {', '.join(disabled)}; see `lora-plugins plugins`." if disabled else ""
        raise UnknownQuantizer(f"No quantization backend {name!r}.{hint} Known: {', '.join(known)}.{extra}")

    def unknown_blocks(self) -> list[str]:
        """Names that were to be left out and are neither a plugin nor a distribution with one."""
        known = {_canonical(name) for info in self.plugins for name in (info.name, info.distribution)}
        return sorted(self._blocked - known)

    def build_program(self, app: typer.Typer) -> Any:
        """Build a command-line program from ``app`` and the commands of every plugin.

        A plugin that raises, or whose commands can't be built, is disabled and leaves nothing behind.
        A command that two third parties claim says so when it is called.

        Returns:
            The click group that `typer.main.get_command` makes of ``app``, with the plugins' commands.

        Raises:
            BrokenBuiltin: A plugin that lora-plugins ships fails here.
        """
        import typer

        table: Table[Any] = Table("command", PluginError)
        for loaded in self._loaded:
            if not loaded.implementations("register_commands"):
                continue
            try:
                commands = _collect_commands(loaded, app.rich_markup_mode)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._disable(loaded.info, f"register_commands: {_reason(error)}", error)
                continue
            loaded.info.commands = sorted(commands)
            for name, command in commands.items():
                table.add(name, loaded.info, command)
        table.annotate()
        program = typer.main.get_command(app)
        for name in table.names():
            try:
                command = table.get(name)
            except PluginError as error:
                command = _conflict_command(error)
            program.add_command(command, name)  # type: ignore[attr-defined]
        return program

    # -- loading -------------------------------------------------------------------------------

    def _load_builtins(self) -> None:
        version = _own_version()
        for module_name in PLUGINS:
            info = PluginInfo(module_name.rpartition(".")[2], DISTRIBUTION, version, builtin=True)
            self._add(info, functools.partial(importlib.import_module, module_name))

    def _load_entry_points(self) -> None:
        found = [(_plugin_info(entry), entry) for entry in _entry_points()]
        for info, entry in sorted(found, key=lambda pair: (_canonical(pair[0].distribution), pair[0].name)):
            self._add(info, entry.load)

    def _add(self, info: PluginInfo, load: Callable[[], Any]) -> None:
        """Load, register and read one plugin; whatever goes wrong is its own affair."""
        self.plugins.append(info)
        if self._is_blocked(info):
            info.disabled = f"blocked by {BLOCK_VARIABLE} or block="
            return
        light = [name for name in _HEAVY if name not in sys.modules]
        try:
            loaded = self._register(info, load())
            architectures = _collect(loaded, "register_architectures", Architecture)
            quantizers = _collect(loaded, "register_quantizers", Quantizer)  # type: ignore[type-abstract]
            for quantizer in quantizers:
                _check_name(quantizer)
                _check_requires(quantizer)
            _check_unique("architecture", [item.model_type for item in architectures])
            _check_unique("quantization backend", [item.name for item in quantizers])
        except KeyboardInterrupt:
            raise
        # Not only Exception: sys.exit() in a plugin and a panic in a Rust extension are neither.
        except BaseException as error:
            self._disable(info, _reason(error), error)
            return
        self._loaded.append(loaded)
        for architecture in architectures:
            self._architectures.add(architecture.model_type, info, architecture)
        for quantizer in quantizers:
            self._quantizers.add(quantizer.name, info, quantizer)
        info.architectures = sorted(item.model_type for item in architectures)
        info.quantizers = sorted(item.name for item in quantizers)
        info.requires = {item.name: list(item.requires) for item in sorted(quantizers, key=lambda item: item.name)}
        heavy = [name for name in light if name in sys.modules]
        if heavy:
            info.notes.append(f"imports {' and '.join(heavy)} when it is loaded, which delays every command")

    def _is_blocked(self, info: PluginInfo) -> bool:
        if _canonical(info.name) in self._blocked:
            return True
        # Blocking the distribution "lora-plugins" would leave nothing at all.
        return not info.builtin and _canonical(info.distribution) in self._blocked

    def _register(self, info: PluginInfo, plugin: object) -> _Loaded:
        if plugin is None or isinstance(plugin, (str, bytes, int, float)):
            raise _Rejected(f"its entry point names {plugin!r}, which is neither a module nor an object with hooks")
        twin = next((other.info for other in self._loaded if other.plugin is plugin), None)
        if twin is not None:
            raise _Rejected(f"its entry point names the same object as {twin}")
        loaded = _Loaded(info, plugin, self._new_manager())
        loaded.hooks.register(plugin, f"{info.distribution}:{info.name}")
        _check_hooks(loaded)
        return loaded

    def _new_manager(self) -> pluggy.PluginManager:
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(hookspecs)
        if self._trace:
            manager.trace.root.setwriter(lambda text: sys.stderr.write(text))
            manager.enable_tracing()
        return manager

    def _disable(self, info: PluginInfo, reason: str, error: BaseException) -> None:
        if info.builtin:
            raise BrokenBuiltin(
                f"The built-in plugin {info} does not load: {reason}. Reinstall {DISTRIBUTION}."
            ) from error
        info.disabled = reason
        info.commands = []
        warnings.warn(f"Plugin {info} is disabled: {reason}", PluginWarning, stacklevel=2)


class _Rejected(Exception):
    """A plugin breaks a rule of ours; the text is the whole reason."""


def _collect(loaded: _Loaded, hook: str, record: type[Record]) -> list[Record]:
    answers = loaded.call(hook)
    if len(answers) < loaded.implementations(hook):
        # pluggy leaves `None` out of the answers, and a forgotten `return` would register nothing in silence.
        raise _Rejected(f"{hook} must return a list of {record.__name__}, not None")
    records: list[Record] = []
    for answer in answers:
        if isinstance(answer, (str, bytes, record, Mapping)) or not isinstance(answer, Iterable):
            raise _Rejected(f"{hook} must return a list of {record.__name__}, not {answer!r:.80}")
        for item in answer:
            if not isinstance(item, record):
                raise _Rejected(f"{hook} must return a list of {record.__name__}; it holds {item!r:.80}")
            records.append(item)
    return records


def _collect_commands(loaded: _Loaded, markup: Any) -> dict[str, Any]:
    """Let one plugin write into an empty program and build that, so that its mistakes stay in there."""
    import typer

    scratch = typer.Typer(add_completion=False, rich_markup_mode=markup)
    # Typer makes a program of one command that command itself, unless there is a callback.
    scratch.callback()(_no_options)
    loaded.call("register_commands", app=scratch)
    if scratch.registered_callback is None or scratch.registered_callback.callback is not _no_options:
        raise _Rejected("it sets a callback on `app`, which would replace the program's own options")
    return dict(typer.main.get_command(scratch).commands)  # type: ignore[attr-defined]


def _no_options() -> None:
    """Stand in for the program's options while a plugin's commands are built."""


def _conflict_command(error: PluginError) -> Any:
    import typer

    app = typer.Typer(add_completion=False)

    @app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def conflict() -> None:
        """(Claimed by two plugins; call it to see which.)"""
        raise error

    return typer.main.get_command(app)


def _check_hooks(loaded: _Loaded) -> None:
    """Refuse what pluggy accepts: hooks that do not exist, and a plugin without any."""
    callers = loaded.hooks.get_hookcallers(loaded.plugin) or []
    for caller in callers:
        if not caller.has_spec() and not all(impl.optionalhook for impl in caller.get_hookimpls()):
            known = sorted(name for name, other in vars(loaded.hooks.hook).items() if other.has_spec())
            hint = did_you_mean(caller.name, known) or f" There are {', '.join(known)}."
            raise _Rejected(f"it implements the hook {caller.name!r}, which does not exist.{hint}")
    if not any(caller.has_spec() for caller in callers):
        raise _Rejected("it implements no hook; mark its functions with @lora_plugins.hookimpl")


def _check_name(quantizer: Quantizer) -> None:
    name = getattr(quantizer, "name", None)
    if not isinstance(name, str) or not name:
        raise _Rejected(f"its backend {type(quantizer).__name__} must have a `name` that is a string, not {name!r}")


def _check_requires(quantizer: Quantizer) -> None:
    requires: Any = quantizer.requires
    # A bare string would be read letter by letter.
    if isinstance(requires, str) or not all(isinstance(item, str) for item in requires):
        raise _Rejected(f"its backend {quantizer.name!r} must have a tuple of strings in `requires`, not {requires!r}")


def _check_unique(kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _Rejected(f"it registers the {kind} {', '.join(map(repr, twice))} twice")


def _reason(error: BaseException) -> str:
    if isinstance(error, _Rejected):
        return str(error)
    if isinstance(error, pluggy.PluginValidationError):
        return "wrong signature: " + one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        hint = "" if package in sys.modules else f"; try `pip install {package}`"
        return f"missing dependency: {one_line(error)}{hint}"
    text = one_line(error)
    return f"it raised {type(error).__name__}: {text}" if text else f"it raised {type(error).__name__}"


def _canonical(name: str) -> str:
    """The normal form of a distribution name (PyPA name normalisation), used for plugin names as well."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    """Return all entry points of our group, also when one installed package has unreadable metadata."""
    try:
        return importlib.metadata.entry_points(group=PROJECT)
    except Exception as error:
        warnings.warn(
            f"An installed package has metadata that can't be read ({_reason(error)}); it is left out.",
            PluginWarning,
            stacklevel=2,
        )
        return _readable_entry_points()


def _readable_entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            entries = distribution.entry_points.select(group=PROJECT)
            # As on import, the first of several copies on the path counts.
            name = _canonical(distribution.metadata["Name"])
        except Exception:
            continue
        if name not in seen:
            seen.add(name)
            yield from entries


def _plugin_info(entry: importlib.metadata.EntryPoint) -> PluginInfo:
    """Describe a plugin before it is loaded; its package may lack name or version."""
    try:
        distribution, version = entry.dist.name or "?", entry.dist.version or "?"  # type: ignore[union-attr]
    except Exception:
        distribution, version = "?", "?"
    return PluginInfo(entry.name, distribution, version, builtin=_canonical(distribution) == DISTRIBUTION)


def _own_version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "?"


@functools.lru_cache(maxsize=1)
def plugin_host() -> PluginHost:
    """Return the process's plugin host, loading all plugins at the first call."""
    return PluginHost()


__all__ = ["BLOCK_VARIABLE", "DISTRIBUTION", "PluginHost", "PluginInfo", "plugin_host"]
