"""The plugin host: loads built-ins and entry points, isolates failures, settles clashes, lists."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from lora_plugins import hookspecs
from lora_plugins.errors import (
    ArchitectureConflict,
    BrokenBuiltin,
    PluginWarning,
    QuantizerConflict,
    UnknownQuantizer,
)
from lora_plugins.hookspecs import PROJECT
from lora_plugins.types import Architecture, Quantizer

if TYPE_CHECKING:
    import typer

#: The distribution both import packages come in; its own entry points count as built-in.
DISTRIBUTION = "lora-plugins"

BUILTIN_MODULES = (
    "lora_plugins.builtin.architectures",
    "lora_plugins.builtin.bitsandbytes",
)

BLOCK_VARIABLE = "LORA_PLUGINS_BLOCK"
TRACE_VARIABLE = "LORA_PLUGINS_TRACE"

Record = TypeVar("Record", Architecture, Quantizer)


@dataclass(slots=True)
class PluginInfo:
    """One plugin, as ``lora-plugins plugins`` lists it.

    Attributes:
        name: Entry-point name, or the last part of the module's name for a built-in.
        distribution: Name of the installed package it comes from.
        version: That package's version, ``"?"`` when unknown.
        builtin: Whether lora-plugins itself ships it.
        architectures: ``model_type`` of each architecture it registers.
        quantizers: Name of each backend it registers.
        commands: Name of each command it adds to the program.
        disabled: Why it is switched off; ``None`` when it works.
        notes: Clashes and overrides that concern it.
    """

    name: str
    distribution: str
    version: str
    builtin: bool
    architectures: list[str] = field(default_factory=list)
    quantizers: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    disabled: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


class _Table(Generic[Record]):
    """Records by name. Third party beats built-in; two third parties for one name are a conflict."""

    def __init__(self, kind: str, conflict: type[Exception]) -> None:
        self._kind = kind
        self._conflict = conflict
        self._offers: dict[str, list[tuple[PluginInfo, Record]]] = {}

    def add(self, name: str, info: PluginInfo, record: Record) -> None:
        self._offers.setdefault(name, []).append((info, record))

    def names(self) -> list[str]:
        return sorted(self._offers)

    def _best(self, name: str) -> list[tuple[PluginInfo, Record]]:
        offers = self._offers.get(name, [])
        return [offer for offer in offers if not offer[0].builtin] or offers

    def get(self, name: str) -> Record | None:
        """The record that counts for a name; raises the table's conflict error where two claim it."""
        best = self._best(name)
        if len(best) > 1:
            raise self._conflict(self._clash(name, [info for info, _ in best]))
        return best[0][1] if best else None

    def _clash(self, name: str, infos: list[PluginInfo]) -> str:
        blocks = " or ".join(f"{BLOCK_VARIABLE}={info.name}" for info in infos)
        return (
            f"{self._kind} {name!r} is registered by {' and by '.join(map(str, infos))}. "
            f"Uninstall one of them, or switch one off with {blocks}."
        )

    def annotate(self) -> None:
        """Write every clash and override into the notes of the plugins concerned."""
        for name, offers in self._offers.items():
            best = self._best(name)
            if len(best) > 1:
                for info, _ in best:
                    info.notes.append("clash: " + self._clash(name, [other for other, _ in best]))
            elif len(offers) > 1:
                best[0][0].notes.append(f"overrides the built-in {self._kind} {name!r}")


class PluginHost:
    """All plugins of one process, and what they registered.

    Args:
        block: Entry-point or distribution names to leave out, beside those in ``LORA_PLUGINS_BLOCK``.
        trace: Print every hook call to stderr; default is whether ``LORA_PLUGINS_TRACE`` is set.

    Raises:
        BrokenBuiltin: A plugin that lora-plugins ships does not load.
    """

    def __init__(self, block: Iterable[str] = (), *, trace: bool | None = None) -> None:
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        if os.environ.get(TRACE_VARIABLE, "") not in ("", "0") if trace is None else trace:
            self._pluggy.trace.root.setwriter(sys.stderr.write)
            self._pluggy.enable_tracing()
        self._blocked = {_canonical(name) for name in [*block, *os.environ.get(BLOCK_VARIABLE, "").split(",")]} - {""}
        self._modules: dict[str, tuple[PluginInfo, object]] = {}
        self.plugins: list[PluginInfo] = []
        self._architectures: _Table[Architecture] = _Table("architecture", ArchitectureConflict)
        self._quantizers: _Table[Quantizer] = _Table("quantizer", QuantizerConflict)
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

    def quantizer_names(self) -> list[str]:
        """Every registered backend name, sorted."""
        return self._quantizers.names()

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
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        disabled = [str(info) for info in self.plugins if info.disabled]
        extra = f" Disabled plugins: {', '.join(disabled)}; see `lora-plugins plugins`." if disabled else ""
        raise UnknownQuantizer(f"No quantization backend {name!r}.{hint} Known: {', '.join(known)}.{extra}")

    def register_commands(self, app: typer.Typer) -> None:
        """Let every plugin add its commands to ``app``; one that raises is disabled and leaves nothing behind."""
        for key, (info, _) in list(self._modules.items()):
            commands, groups = list(app.registered_commands), list(app.registered_groups)
            try:
                self._call(key, "register_commands", app=app)
            except (Exception, SystemExit) as error:
                app.registered_commands[:], app.registered_groups[:] = commands, groups
                self._disable(info, f"register_commands raised {_describe(error)}", error)
                continue
            added = [*app.registered_commands[len(commands) :], *app.registered_groups[len(groups) :]]
            info.commands = sorted(_command_name(item) for item in added)

    # -- loading -------------------------------------------------------------------------------

    def _load_builtins(self) -> None:
        version = _own_version()
        for module_name in BUILTIN_MODULES:
            info = PluginInfo(module_name.rpartition(".")[2], DISTRIBUTION, version, builtin=True)
            self._add(info, functools.partial(importlib.import_module, module_name))

    def _load_entry_points(self) -> None:
        for entry in sorted(importlib.metadata.entry_points(group=PROJECT), key=_entry_key):
            distribution = entry.dist.name if entry.dist else "?"
            version = entry.dist.version if entry.dist else "?"
            builtin = _canonical(distribution) == DISTRIBUTION
            self._add(PluginInfo(entry.name, distribution, version, builtin), entry.load)

    def _add(self, info: PluginInfo, load: Callable[[], Any]) -> None:
        """Load, register and read one plugin; whatever goes wrong is its own affair."""
        self.plugins.append(info)
        if {_canonical(info.name), _canonical(info.distribution)} & self._blocked and not (
            info.builtin and _canonical(info.name) not in self._blocked
        ):
            info.disabled = f"blocked by {BLOCK_VARIABLE}"
            return
        key = f"{info.distribution}:{info.name}"
        try:
            self._register(key, info, load())
            architectures = self._collect(key, "register_architectures", Architecture)
            quantizers = self._collect(key, "register_quantizers", Quantizer)
            _check_unique(info, "architecture", [item.model_type for item in architectures])
            _check_unique(info, "quantizer", [item.name for item in quantizers])
        except (Exception, SystemExit) as error:
            self._forget(key)
            self._disable(info, _reason(error), error)
            return
        for architecture in architectures:
            self._architectures.add(architecture.model_type, info, architecture)
        for quantizer in quantizers:
            self._quantizers.add(quantizer.name, info, quantizer)
        info.architectures = sorted(item.model_type for item in architectures)
        info.quantizers = sorted(item.name for item in quantizers)

    def _register(self, key: str, info: PluginInfo, plugin: object) -> None:
        if plugin is None or isinstance(plugin, (str, bytes, int, float)):
            raise _Rejected(f"its entry point names {plugin!r}, which is neither a module nor an object with hooks")
        twin = next((other for other, known in self._modules.values() if known is plugin), None)
        if twin is not None:
            raise _Rejected(f"its entry point names the same object as {twin}")
        # A validation error leaves the plugin registered in pluggy: `_forget` takes it out.
        self._modules[key] = (info, plugin)
        self._pluggy.register(plugin, key)
        callers = self._pluggy.get_hookcallers(plugin) or []
        for caller in callers:
            mine = [impl for impl in caller.get_hookimpls() if impl.plugin is plugin]
            if not caller.has_spec() and any(not impl.optionalhook for impl in mine):
                known = sorted(name for name, other in vars(self._pluggy.hook).items() if other.has_spec())
                near = difflib.get_close_matches(caller.name, known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise _Rejected(f"it implements the hook {caller.name!r}, which does not exist{hint}")
        if not any(caller.has_spec() for caller in callers):
            raise _Rejected("it implements no hook; mark its functions with @lora_plugins.hookimpl")

    def _forget(self, key: str) -> None:
        self._modules.pop(key, None)
        if self._pluggy.has_plugin(key):
            self._pluggy.unregister(name=key)

    def _call(self, key: str, hook: str, **arguments: Any) -> list[Any]:
        """Call one plugin's implementation of a hook: in a common call, one that raises would stop all others."""
        others = [plugin for other, (_, plugin) in self._modules.items() if other != key]
        return self._pluggy.subset_hook_caller(hook, remove_plugins=others)(**arguments)

    def _collect(self, key: str, hook: str, record: type[Record]) -> list[Record]:
        records: list[Record] = []
        for answer in self._call(key, hook):
            if isinstance(answer, (str, bytes, record, Mapping)) or not isinstance(answer, Iterable):
                raise _Rejected(f"{hook} must return a list of {record.__name__}, not {answer!r:.80}")
            for item in answer:
                if not isinstance(item, record):
                    raise _Rejected(f"{hook} must return a list of {record.__name__}; it holds {item!r:.80}")
                records.append(item)
        return records

    def _disable(self, info: PluginInfo, reason: str, error: BaseException) -> None:
        if info.builtin:
            raise BrokenBuiltin(
                f"The built-in plugin {info} does not load: {reason}. Reinstall {DISTRIBUTION}."
            ) from error
        info.disabled = reason
        info.architectures, info.quantizers, info.commands = [], [], []
        warnings.warn(f"Plugin {info} is disabled: {reason}", PluginWarning, stacklevel=2)


class _Rejected(Exception):
    """A plugin breaks a rule of ours; the text is the whole reason."""


def _reason(error: BaseException) -> str:
    if isinstance(error, _Rejected):
        return str(error)
    if isinstance(error, pluggy.PluginValidationError):
        # pluggy's text repeats the plugin object; its last sentence says what is wrong.
        return "wrong signature: " + " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"missing dependency: {error}; try `pip install {package}`"
    return f"it raised {_describe(error)}"


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_unique(info: PluginInfo, kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _Rejected(f"it registers the {kind} {', '.join(map(repr, twice))} twice")


def _command_name(item: Any) -> str:
    """Typer keeps no name for a command called after its function."""
    if item.name:
        return str(item.name)
    callback = getattr(item, "callback", None)
    return callback.__name__.replace("_", "-") if callback else "?"


def _canonical(name: str) -> str:
    """The normal form of a distribution name (PyPA name normalisation), used for plugin names as well."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _entry_key(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (entry.dist.name if entry.dist else "", entry.name)


def _own_version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "?"


@functools.lru_cache(maxsize=1)
def plugin_host() -> PluginHost:
    """Return the process's plugin host, loading all plugins at the first call."""
    return PluginHost()


__all__ = ["DISTRIBUTION", "PluginHost", "PluginInfo", "plugin_host"]
