"""Load plugins, isolate their failures, resolve name conflicts, list them."""

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
    FormatConflict,
    PluginError,
    PluginWarning,
    QuantizerConflict,
    ServerConflict,
    UnknownQuantizer,
    UnknownServer,
)
from lora_plugins.plugins import hookspecs
from lora_plugins.plugins.formats import Format
from lora_plugins.plugins.hookspecs import PROJECT
from lora_plugins.plugins.servers import Server
from lora_plugins.plugins.table import BLOCK_VARIABLE, PluginInfo, Table
from lora_plugins.plugins.types import AdapterCheck, Architecture, Quantizer
from lora_plugins.text import did_you_mean, one_line

if TYPE_CHECKING:
    import typer

#: The distribution of both import packages; its own entry points count as built-in.
DISTRIBUTION = "lora-plugins"

PLUGINS = (
    "lora_plugins.builtin.architectures",
    "lora_plugins.builtin.quantizers.bitsandbytes",
    "lora_plugins.commands",
    "lora_plugins.builtin.quantizers.hqq",
    "lora_plugins.builtin.quantizers.quanto",
    "lora_plugins.builtin.quantizers.torchao",
    "lora_plugins.builtin.quantizers.compressed_tensors",
    "lora_plugins.builtin.formats",
    "lora_plugins.builtin.servers",
)

TRACE_VARIABLE = "LORA_PLUGINS_TRACE"

#: A plugin that imports one of these delays every command by seconds; its listing says so.
_HEAVY = ("torch", "transformers")

T = TypeVar("T")
Record = TypeVar("Record", Architecture, Format, Quantizer, AdapterCheck, Server)


@dataclass(slots=True)
class _Loaded:
    """A plugin with its own pluggy manager.

    In a shared manager (pluggy 1.7.0), a plugin that raises ends the call for all others, one that fails
    validation stays registered, and one that cannot be hashed breaks the calls of all others.
    """

    info: PluginInfo
    plugin: object
    hooks: pluggy.PluginManager

    def implementations(self, hook: str) -> int:
        """Return how many functions of the plugin implement a hook."""
        found = getattr(self.hooks.hook, hook).get_hookimpls()
        return sum(not (impl.wrapper or impl.hookwrapper) for impl in found)

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        answers: list[Any] = getattr(self.hooks.hook, hook)(**arguments)
        return answers


class PluginHost:
    """All plugins of one process, and what they registered.

    Args:
        block: Entry-point or distribution names to skip, in addition to those in ``LORA_PLUGINS_BLOCK``.
        trace: Print every hook call to stderr; by default, if ``LORA_PLUGINS_TRACE`` is set.

    Attributes:
        plugins: Every plugin found, in the order of loading: the built-ins, then by distribution and name.

    Raises:
        BrokenBuiltin: A plugin that lora-plugins ships does not load.
    """

    def __init__(self, block: Iterable[str] = (), *, trace: bool | None = None) -> None:
        self._trace = os.environ.get(TRACE_VARIABLE, "") not in ("", "0") if trace is None else trace
        self._blocked = {_normalize(name) for name in [*block, *os.environ.get(BLOCK_VARIABLE, "").split(",")]} - {""}
        self._loaded: list[_Loaded] = []
        self.plugins: list[PluginInfo] = []
        self._architectures: Table[Architecture] = Table("architecture", ArchitectureConflict)
        self._quantizers: Table[Quantizer] = Table("quantization backend", QuantizerConflict)
        self._checks: list[tuple[PluginInfo, AdapterCheck]] = []
        self._formats: Table[Format] = Table("storage format", FormatConflict)
        self._format_layers: frozenset[str] | None = None
        self._servers: Table[Server] = Table("server", ServerConflict)
        self._load_builtins()
        self._load_entry_points()
        for table in (self._architectures, self._quantizers, self._formats, self._servers):
            table.annotate()

    # -- what was registered -------------------------------------------------------------------

    def model_types(self) -> list[str]:
        """Return every registered ``model_type``, sorted."""
        return self._architectures.names()

    def architecture(self, model_type: str) -> Architecture | None:
        """Return the record of a model type, ``None`` if no plugin registers it.

        Raises:
            ArchitectureConflict: Two third-party plugins claim it.
        """
        return self._architectures.get(model_type)

    def scopes(self) -> list[str]:
        """Return every scope name that some architecture defines, sorted."""
        return sorted({scope for record in self._architectures.things() for scope in record.scopes})

    def quantizer_names(self) -> list[str]:
        """Return every registered backend name, sorted."""
        return self._quantizers.names()

    def quantizers(self) -> list[Quantizer]:
        """Return every backend except those whose name is in conflict; `quantizer` raises for such a name."""
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

    def checks(self) -> list[tuple[PluginInfo, AdapterCheck]]:
        """Return the checks of adapters that plugins add, each with its plugin."""
        return list(self._checks)

    def formats(self) -> list[Format]:
        """Return the record of every storage format, by ``quant_method``, except those whose name is in conflict."""
        found = []
        for method in self._formats.names():
            with contextlib.suppress(FormatConflict):
                record = self._formats.get(method)
                found += [record] if record is not None else []
        return found

    def format_layers(self) -> frozenset[str]:
        """Return the classes of the layers of every storage format, as top-level package and class name."""
        if self._format_layers is None:
            self._format_layers = frozenset(layer for record in self.formats() for layer in record.layers)
        return self._format_layers

    def format(self, method: str) -> Format | None:
        """Return the record of a storage format, ``None`` if no plugin registers it.

        Raises:
            FormatConflict: Two third-party plugins claim it.
        """
        return self._formats.get(method)

    def server_names(self) -> list[str]:
        """Return the name of every registered server, sorted."""
        return self._servers.names()

    def server(self, name: str) -> Server:
        """Return a server's rules.

        Raises:
            UnknownServer: No plugin registers it.
            ServerConflict: Two third-party plugins claim it.
        """
        found = self._servers.get(name)
        if found is None:
            known = self.server_names()
            raise UnknownServer(f"No server {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        return found

    def unknown_blocks(self) -> list[str]:
        """Return the blocked names that match neither a plugin nor the distribution of one."""
        known = {_normalize(name) for info in self.plugins for name in (info.name, info.distribution)}
        return sorted(self._blocked - known)

    def build_program(self, app: typer.Typer) -> Any:
        """Build a command-line program from ``app`` and the commands of every plugin.

        A plugin that raises, or whose commands cannot be built, is disabled and adds no command.
        A command that two third-party plugins claim raises the conflict when it is called.

        Returns:
            The click group that `typer.main.get_command` makes from ``app``, with the plugins' commands.

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
                self._disable(loaded.info, f"register_commands: {_explain(error)}", error)
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
                command = _make_conflict_command(error)
            program.add_command(command, name)  # type: ignore[attr-defined]
        return program

    # -- loading -------------------------------------------------------------------------------

    def _load_builtins(self) -> None:
        version = _read_own_version()
        for module_name in PLUGINS:
            info = PluginInfo(module_name.rpartition(".")[2], DISTRIBUTION, version, builtin=True)
            self._add(info, functools.partial(importlib.import_module, module_name))

    def _load_entry_points(self) -> None:
        found = [(_describe_plugin(entry), entry) for entry in _find_entry_points()]
        for info, entry in sorted(found, key=lambda pair: (_normalize(pair[0].distribution), pair[0].name)):
            self._add(info, entry.load)

    def _add(self, info: PluginInfo, load: Callable[[], Any]) -> None:
        """Load, register and read one plugin; a failure disables no other plugin."""
        self.plugins.append(info)
        if self._is_blocked(info):
            info.disabled = f"blocked by {BLOCK_VARIABLE} or block="
            return
        light = [name for name in _HEAVY if name not in sys.modules]
        try:
            loaded = self._register(info, load())
            architectures = _collect(loaded, "register_architectures", Architecture)
            quantizers = _collect(loaded, "register_quantizers", Quantizer)  # type: ignore[type-abstract]
            checks = _collect(loaded, "register_checks", AdapterCheck)  # type: ignore[type-abstract]
            formats = _collect(loaded, "register_formats", Format)
            servers = _collect(loaded, "register_servers", Server)
            for quantizer in quantizers:
                _check_name(quantizer)
                _check_requires(quantizer)
            _check_unique("storage format", [item.method for item in formats])
            _check_unique("architecture", [item.model_type for item in architectures])
            _check_unique("quantization backend", [item.name for item in quantizers])
            _check_unique("check", [item.name for item in checks])
            _check_unique("server", [item.name for item in servers])
        except KeyboardInterrupt:
            raise
        # sys.exit() in a plugin and a panic in a Rust extension are not subclasses of Exception.
        except BaseException as error:
            self._disable(info, _explain(error), error)
            return
        self._loaded.append(loaded)
        for architecture in architectures:
            self._architectures.add(architecture.model_type, info, architecture)
        for quantizer in quantizers:
            self._quantizers.add(quantizer.name, info, quantizer)
        self._checks += [(info, check) for check in checks]
        info.checks = sorted(item.name for item in checks)
        for form in formats:
            self._formats.add(form.method, info, form)
        info.formats = sorted(item.method for item in formats)
        for server in servers:
            self._servers.add(server.name, info, server)
        info.servers = sorted(item.name for item in servers)
        info.architectures = sorted(item.model_type for item in architectures)
        info.quantizers = sorted(item.name for item in quantizers)
        info.requires = {item.name: list(item.requires) for item in sorted(quantizers, key=lambda item: item.name)}
        heavy = [name for name in light if name in sys.modules]
        if heavy:
            info.notes.append(f"imports {' and '.join(heavy)} when it is loaded, which delays every command")

    def _is_blocked(self, info: PluginInfo) -> bool:
        if _normalize(info.name) in self._blocked:
            return True
        # Blocking the distribution "lora-plugins" must not switch off all built-ins.
        return not info.builtin and _normalize(info.distribution) in self._blocked

    def _register(self, info: PluginInfo, plugin: object) -> _Loaded:
        if plugin is None or isinstance(plugin, (str, bytes, int, float)):
            raise _Rejected(f"its entry point names {plugin!r}, which is neither a module nor an object with hooks")
        twin = next((other.info for other in self._loaded if other.plugin is plugin), None)
        if twin is not None:
            raise _Rejected(f"its entry point names the same object as {twin}")
        loaded = _Loaded(info, plugin, self._make_manager())
        loaded.hooks.register(plugin, f"{info.distribution}:{info.name}")
        _check_hooks(loaded)
        return loaded

    def _make_manager(self) -> pluggy.PluginManager:
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
    """A plugin breaks one of the host's rules; the message is the full reason."""


def _collect(loaded: _Loaded, hook: str, record: type[Record]) -> list[Record]:
    answers = loaded.call(hook)
    if len(answers) < loaded.implementations(hook):
        # pluggy drops `None` from the results, so a forgotten `return` would silently register nothing.
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
    """Build one plugin's commands in an empty program, which contains its mistakes."""
    import typer

    scratch = typer.Typer(add_completion=False, rich_markup_mode=markup)
    # Without a callback, Typer turns a program with a single command into that command.
    scratch.callback()(_accept_no_options)
    loaded.call("register_commands", app=scratch)
    if scratch.registered_callback is None or scratch.registered_callback.callback is not _accept_no_options:
        raise _Rejected("it sets a callback on `app`, which would replace the program's own options")
    return dict(typer.main.get_command(scratch).commands)  # type: ignore[attr-defined]


def _accept_no_options() -> None:
    """Stand in for the program's options while a plugin's commands are built."""


def _make_conflict_command(error: PluginError) -> Any:
    import typer

    app = typer.Typer(add_completion=False)

    @app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def conflict() -> None:
        """(Claimed by two plugins; call it to see which.)"""
        raise error

    return typer.main.get_command(app)


def _check_hooks(loaded: _Loaded) -> None:
    """Reject what pluggy accepts: unknown hooks, and a plugin without hooks."""
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


def _explain(error: BaseException) -> str:
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


def _normalize(name: str) -> str:
    """Return the normalized form of a distribution name (PyPA rules), also used for plugin names."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _find_entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    """Return all entry points of our group, even if an installed package has unreadable metadata."""
    try:
        return importlib.metadata.entry_points(group=PROJECT)
    except Exception as error:
        warnings.warn(
            f"An installed package has metadata that cannot be read ({_explain(error)}); it is left out.",
            PluginWarning,
            stacklevel=2,
        )
        return _find_readable_entry_points()


def _find_readable_entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            entries = distribution.entry_points.select(group=PROJECT)
            # As on import, the first of several copies on the path counts.
            name = _normalize(distribution.metadata["Name"])
        except Exception:  # noqa: S112 - a distribution that cannot be read is no plugin
            continue
        if name not in seen:
            seen.add(name)
            yield from entries


def _describe_plugin(entry: importlib.metadata.EntryPoint) -> PluginInfo:
    """Describe a plugin before it is loaded; its package may lack a name or version."""
    try:
        distribution, version = entry.dist.name or "?", entry.dist.version or "?"  # type: ignore[union-attr]
    except Exception:
        distribution, version = "?", "?"
    return PluginInfo(entry.name, distribution, version, builtin=_normalize(distribution) == DISTRIBUTION)


def _read_own_version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "?"


@functools.lru_cache(maxsize=1)
def plugin_host() -> PluginHost:
    """Return the process's plugin host; the first call loads all plugins."""
    return PluginHost()


def plugin_checks() -> list[tuple[PluginInfo, AdapterCheck]]:
    """Return the checks of adapters that the installed plugins add, each with its plugin."""
    return plugin_host().checks()


__all__ = ["BLOCK_VARIABLE", "DISTRIBUTION", "PluginHost", "PluginInfo", "plugin_checks", "plugin_host"]
