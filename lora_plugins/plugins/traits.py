"""Read what servers ask of an adapter, and let their rules judge it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_plugins.errors import ServerConflict
from lora_plugins.plugins.host import plugin_host
from lora_plugins.plugins.servers import AdapterTraits, Server, ServingVerdict

__all__ = ["VARIANTS", "check_servers", "judge", "judge_adapter", "read_traits"]

#: Fields of PEFT's configuration that change the computation and that no rule has a trait of its own for.
VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

_MODULE = re.compile(r"^(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.lora_(?:A|B|embedding_A|embedding_B)\b")
_PREFIX = "base_model.model."
_LAYER = re.compile(r"\.(\d+)\.")
#: Names of the number of layers in configurations of transformers.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def judge_adapter(
    fields: Mapping[str, Any],
    names: Iterable[str],
    base: Mapping[str, Any] | None = None,
    servers: Iterable[str] | None = None,
    *,
    changes_base: bool = False,
) -> list[ServingVerdict]:
    """Return each server's verdict on an adapter that is given by its files. Loads neither torch nor PEFT.

    Args:
        fields: The content of ``adapter_config.json``.
        names: Names of the tensors in its file.
        base: Configuration of the base model, ``None`` if it is not known.
        servers: Names of servers; all of them by default.
        changes_base: Whether the initialization changed the weights of the base, to which the file is relative.

    Raises:
        UnknownServer: A name is not registered.
        ServerConflict: Two plugins register it.
    """
    return judge(read_traits(fields, names, base, changes_base=changes_base), servers)


def judge(traits: AdapterTraits, servers: Iterable[str] | None = None) -> list[ServingVerdict]:
    """Return each server's verdict, sorted by name.

    Args:
        traits: What servers ask of the adapter.
        servers: Names of servers; by default all of them but those that two plugins register.

    Raises:
        UnknownServer: A name is not registered.
        ServerConflict: Two plugins register it.
    """
    found = _list_servers() if servers is None else [plugin_host().server(name) for name in sorted(set(servers))]
    return [server.judge(traits) for server in found]


def check_servers(servers: str | Iterable[str]) -> tuple[str, ...]:
    """Return names of servers, each of which is registered.

    Raises:
        UnknownServer: One is not.
        ServerConflict: Two plugins register one.
    """
    names = (servers,) if isinstance(servers, str) else tuple(servers)
    for name in names:
        plugin_host().server(name)
    return names


def read_traits(
    fields: Mapping[str, Any], names: Iterable[str], base: Mapping[str, Any] | None = None, *, changes_base: bool
) -> AdapterTraits:
    """Return what servers ask of an adapter; for the arguments see `judge_adapter`."""
    names = list(names)
    paths = sorted({found[1] for name in names if (found := _MODULE.match(name))})
    embeddings = sorted({_last(_MODULE.sub(r"\1", name)) for name in names if name.endswith("lora_embedding_A")})
    text = None if base is None else _find_text(base)
    ranks, targets = fields.get("rank_pattern") or {}, fields.get("target_modules")
    return AdapterTraits(
        model_type=None if text is None else text.get("model_type"),
        rank=max([fields.get("r", 8), *ranks.values()]),
        modules=tuple(sorted({_last(path) for path in paths})),
        modules_to_save=tuple(sorted(fields.get("modules_to_save") or ())),
        bias=str(fields.get("bias", "none")),
        init=fields.get("init_lora_weights", True),
        changes_base=changes_base,
        use_dora=bool(fields.get("use_dora")),
        use_rslora=bool(fields.get("use_rslora")),
        lora_bias=bool(fields.get("lora_bias")),
        patterns=bool(ranks or fields.get("alpha_pattern")),
        experts=bool(fields.get("target_parameters")),
        embeddings=tuple(embeddings),
        whole_weights=_find_whole(names, fields.get("modules_to_save") or ()),
        shared_head=_read_flag(text, "tie_word_embeddings"),
        trained_tokens=bool(fields.get("trainable_token_indices")),
        replicated=bool(fields.get("layer_replication")),
        some_layers=_skips_layers(paths, text),
        listed=not isinstance(targets, str) or targets == "all-linear",
        variants=tuple(name for name in VARIANTS if fields.get(name)),
    )


def _list_servers() -> list[Server]:
    host, found = plugin_host(), []
    for name in host.server_names():
        with contextlib.suppress(ServerConflict):
            found.append(host.server(name))
    return found


def _find_text(base: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the text model."""
    inner = base.get("text_config")
    return inner if isinstance(inner, Mapping) else base


def _read_flag(values: Mapping[str, Any] | None, key: str) -> bool | None:
    found = None if values is None else values.get(key)
    return None if found is None else bool(found)


def _find_whole(names: Iterable[str], saved: Iterable[str]) -> tuple[str, ...]:
    """Return the weights in a file that are neither an adapter's nor those of modules that are saved in full."""
    known, found = tuple(saved), []
    for name in names:
        path, _, kind = name.removeprefix(_PREFIX).rpartition(".")
        own = path.endswith(".base_layer") or "lora_" in name or "trainable_tokens" in name
        if kind == "weight" and not own and not any(f".{one}." in f".{path}." for one in known):
            found.append(f"{path}.{kind}")
    return tuple(sorted(found))


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _skips_layers(paths: Iterable[str], text: Mapping[str, Any] | None) -> bool:
    """Whether some kind of module is adapted in fewer layers than the base has."""
    count = next((text[key] for key in _LAYERS if isinstance(text.get(key), int)), None) if text else None
    seen: dict[str, set[str]] = {}
    for path in paths:
        found = _LAYER.search(path)
        if found:
            seen.setdefault(_LAYER.sub(".*.", path, count=1), set()).add(found[1])
    return count is not None and any(len(layers) < count for layers in seen.values())
