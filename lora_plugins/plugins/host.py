"""Load plugins, isolate their failures, resolve name conflicts, list them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from lora_plugins.plugins.loading import (
    Loaded,
    check_quantizers,
    check_unique,
    collect,
    describe_plugin,
    find_entry_points,
    load_plugin,
    normalize,
    read_own_version,
)
from lora_plugins.plugins.rejection import Rejected, explain
from lora_plugins.plugins.servers import Server
from lora_plugins.plugins.table import BLOCK_VARIABLE, DISTRIBUTION, PluginInfo, Table
from lora_plugins.plugins.types import AdapterCheck, Architecture, Quantizer
from lora_plugins.text import did_you_mean

if TYPE_CHECKING:
    import typer

__all__ = ["BLOCK_VARIABLE", "DISTRIBUTION", "PluginHost", "PluginInfo", "plugin_checks", "plugin_host"]

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


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a hook registers.

    Attributes:
        hook: Name of the hook.
        record: Class of what it returns a list of.
        noun: What one is called in messages.
        key: Attribute that names one.
        listed: Attribute of `PluginInfo` that lists the names.
        conflict: Error for two plugins that claim one name; ``None`` if both are used.
    """

    hook: str
    record: type[Any]
    noun: str
    key: str
    listed: str
    conflict: type[PluginError] | None = None


_KINDS = (
    _Kind("register_architectures", Architecture, "architecture", "model_type", "architectures", ArchitectureConflict),
    _Kind("register_quantizers", Quantizer, "quantization backend", "name", "quantizers", QuantizerConflict),
    _Kind("register_checks", AdapterCheck, "check", "name", "checks"),
    _Kind("register_formats", Format, "storage format", "method", "formats", FormatConflict),
    _Kind("register_servers", Server, "server", "name", "servers", ServerConflict),
)


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
        self._blocked = {normalize(name) for name in [*block, *os.environ.get(BLOCK_VARIABLE, "").split(",")]} - {""}
        self._loaded: list[Loaded] = []
        self.plugins: list[PluginInfo] = []
        self._tables: dict[str, Table[Any]] = {
            kind.listed: Table(kind.noun, kind.conflict) for kind in _KINDS if kind.conflict is not None
        }
        self._architectures: Table[Architecture] = self._tables["architectures"]
        self._quantizers: Table[Quantizer] = self._tables["quantizers"]
        self._formats: Table[Format] = self._tables["formats"]
        self._servers: Table[Server] = self._tables["servers"]
        self._checks: list[tuple[PluginInfo, AdapterCheck]] = []
        self._format_layers: frozenset[str] | None = None
        self._load_builtins()
        self._load_entry_points()
        for table in self._tables.values():
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

    def architecture_plugin(self, model_type: str) -> PluginInfo | None:
        """Return the plugin whose record `architecture` returns, ``None`` if no plugin registers the type.

        Raises:
            ArchitectureConflict: Two third-party plugins claim it.
        """
        return self._architectures.owner(model_type)

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
        known = {normalize(name) for info in self.plugins for name in (info.name, info.distribution)}
        return sorted(self._blocked - known)

    def build_program(self, app: typer.Typer, called: str | None = None) -> Any:
        """Build a command-line program from ``app`` and the commands of every plugin.

        A plugin that raises, or whose commands cannot be built, is disabled and adds no command.
        A command that two third-party plugins claim raises the conflict when it is called.

        Args:
            app: The program's own options.
            called: The command that is to run. If this distribution has it, its other commands are left out: to build
                them all takes a fifth of the time of a short command.

        Returns:
            The click group that `typer.main.get_command` makes from ``app``, with the plugins' commands.

        Raises:
            BrokenBuiltin: A plugin that lora-plugins ships fails here.
        """
        from lora_plugins.plugins.program import build_program

        hook = "register_commands"
        adding = [(one.info, functools.partial(one.call, hook)) for one in self._loaded if one.implementations(hook)]
        return build_program(app, adding, self._disable, called)

    # -- loading -------------------------------------------------------------------------------

    def _load_builtins(self) -> None:
        version = read_own_version()
        for module_name in PLUGINS:
            info = PluginInfo(module_name.rpartition(".")[2], DISTRIBUTION, version, builtin=True)
            self._add(info, functools.partial(importlib.import_module, module_name))

    def _load_entry_points(self) -> None:
        found = [(describe_plugin(entry), entry) for entry in find_entry_points(PROJECT)]
        for info, entry in sorted(found, key=lambda pair: (normalize(pair[0].distribution), pair[0].name)):
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
            found = {kind: _read_kind(loaded, kind) for kind in _KINDS}
        except KeyboardInterrupt:
            raise
        # sys.exit() in a plugin and a panic in a Rust extension are not subclasses of Exception.
        except BaseException as error:
            self._disable(info, explain(error), error)
            return
        self._loaded.append(loaded)
        for kind, records in found.items():
            self._take(info, kind, records)
        heavy = [name for name in light if name in sys.modules]
        if heavy:
            info.notes.append(f"imports {' and '.join(heavy)} when it is loaded, which delays every command")

    def _take(self, info: PluginInfo, kind: _Kind, records: list[Any]) -> None:
        """List what a plugin registers, and put it into its table."""
        setattr(info, kind.listed, sorted(getattr(record, kind.key) for record in records))
        if kind.conflict is None:
            self._checks += [(info, check) for check in records]
        else:
            for record in records:
                self._tables[kind.listed].add(getattr(record, kind.key), info, record)
        if kind.record is Quantizer:
            info.requires = {item.name: list(item.requires) for item in sorted(records, key=lambda item: item.name)}

    def _is_blocked(self, info: PluginInfo) -> bool:
        if normalize(info.name) in self._blocked:
            return True
        # Blocking the distribution "lora-plugins" must not switch off all built-ins.
        return not info.builtin and normalize(info.distribution) in self._blocked

    def _register(self, info: PluginInfo, plugin: object) -> Loaded:
        twin = next((other.info for other in self._loaded if other.plugin is plugin), None)
        if twin is not None:
            raise Rejected(f"its entry point names the same object as {twin}")
        return load_plugin(info, plugin, self._make_manager())

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


def _read_kind(loaded: Loaded, kind: _Kind) -> list[Any]:
    records = collect(loaded, kind.hook, kind.record)
    if kind.record is Quantizer:
        check_quantizers(records)
    check_unique(kind.noun, [getattr(record, kind.key) for record in records])
    return records


@functools.lru_cache(maxsize=1)
def plugin_host() -> PluginHost:
    """Return the process's plugin host; the first call loads all plugins."""
    return PluginHost()


def plugin_checks() -> list[tuple[PluginInfo, AdapterCheck]]:
    """Return the checks of adapters that the installed plugins add, each with its plugin."""
    return plugin_host().checks()
