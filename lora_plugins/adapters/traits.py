"""Read what servers ask of an adapter: from a file, or from a live model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel

from lora_plugins.adapters.files import adapter_shapes
from lora_plugins.errors import ServingWarning
from lora_plugins.models.wrapping import base_of
from lora_plugins.plugins.host import plugin_host
from lora_plugins.plugins.servers import AdapterTraits, ServingVerdict
from registry import changes_base

__all__ = ["judge", "read_servers", "read_traits", "traits_of", "warn_unserved"]

#: Fields of PEFT's configuration that change the computation and that no rule has a trait of its own for.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

_MODULE = re.compile(r"^(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.lora_(?:A|B|embedding_A|embedding_B)\b")
_LAYER = re.compile(r"\.(\d+)\.")


def read_traits(config: LoraConfig, names: Iterable[str], base_config: Any = None) -> AdapterTraits:
    """Return what servers ask of an adapter.

    Args:
        config: Its configuration.
        names: Names of the tensors in its file.
        base_config: Configuration of the base model, ``None`` if it is not known.
    """
    names = list(names)
    paths = sorted({found[1] for name in names if (found := _MODULE.match(name))})
    embeddings = sorted({_last(_MODULE.sub(r"\1", name)) for name in names if name.endswith("lora_embedding_A")})
    text = None if base_config is None else base_config.get_text_config()
    return AdapterTraits(
        model_type=None if text is None else text.model_type,
        rank=max([config.r, *config.rank_pattern.values()]),
        modules=tuple(sorted({_last(path) for path in paths})),
        modules_to_save=tuple(sorted(config.modules_to_save or ())),
        bias=str(config.bias),
        init=config.init_lora_weights,
        changes_base=changes_base(config.init_lora_weights),
        use_dora=bool(config.use_dora),
        use_rslora=bool(config.use_rslora),
        lora_bias=bool(config.lora_bias),
        patterns=bool(config.rank_pattern or config.alpha_pattern),
        experts=bool(config.target_parameters),
        embeddings=tuple(embeddings),
        shared_head=None if text is None else bool(getattr(text, "tie_word_embeddings", False)),
        trained_tokens=bool(config.trainable_token_indices),
        replicated=bool(config.layer_replication),
        some_layers=_skips_layers(paths, text),
        listed=not isinstance(config.target_modules, str) or config.target_modules == "all-linear",
        variants=tuple(name for name in _VARIANTS if getattr(config, name, None)),
    )


def traits_of(model: PeftModel, adapter_name: str = "default") -> AdapterTraits:
    """Return what servers will ask of a live model's adapter."""
    config: Any = model.peft_config[adapter_name]
    return read_traits(config, adapter_shapes(model, adapter_name), getattr(base_of(model), "config", None))


def judge(traits: AdapterTraits, servers: Iterable[str] | None = None) -> list[ServingVerdict]:
    """Return each server's verdict, sorted by name.

    Args:
        traits: What servers ask of the adapter.
        servers: Names of servers; all of them by default.

    Raises:
        UnknownServer: A name is not registered.
        ServerConflict: Two plugins register it.
    """
    host = plugin_host()
    names = host.server_names() if servers is None else sorted(set(servers))
    return [host.server(name).judge(traits) for name in names]


def read_servers(servers: str | Iterable[str]) -> tuple[str, ...]:
    """Return names of servers, each of which is registered.

    Raises:
        UnknownServer: One is not.
    """
    names = (servers,) if isinstance(servers, str) else tuple(servers)
    for name in names:
        plugin_host().server(name)
    return names


def warn_unserved(model: Any, adapter_name: str, servers: Iterable[str]) -> None:
    """Warn for each server that will not take the adapter of a prepared model."""
    names = tuple(servers)
    for verdict in judge(traits_of(model, adapter_name), names) if names else ():
        if not verdict.served:
            warnings.warn(f"The adapter is for {verdict.server}: {verdict}", ServingWarning, stacklevel=2)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _skips_layers(paths: Iterable[str], text: Any) -> bool:
    """Whether some kind of module is adapted in fewer layers than the base has."""
    count = getattr(text, "num_hidden_layers", None)
    seen: dict[str, set[str]] = {}
    for path in paths:
        found = _LAYER.search(path)
        if found:
            seen.setdefault(_LAYER.sub(".*.", path, count=1), set()).add(found[1])
    return count is not None and any(len(layers) < count for layers in seen.values())
