"""Say which servers take an adapter, before it is brought to one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import cast

from lora_plugins.adapters.traits import read_live_traits
from lora_plugins.errors import MergeError, UnsupportedExport
from lora_plugins.plugins.servers import ServingVerdict
from lora_plugins.plugins.traits import check_servers, judge
from lora_plugins.serving.source import MERGED, Source, read_source
from registry import diagnose

__all__ = ["check_export", "check_serving"]


def check_serving(
    adapter: str | os.PathLike[str],
    servers: str | Iterable[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> list[ServingVerdict]:
    """Return for each server whether it takes an adapter, by the rules that were read from the server's source.

    Without ``base``, and where the base's configuration is not at hand, what the adapter's files and the release's
    manifest say is judged; what the rules do not learn from them is among the verdict's ``not_known``.

    Args:
        adapter: Adapter folder, or a registry reference.
        servers: Names of servers; all that are registered by default.
        base: Base model; default is the one that the adapter names.
        revision: Revision of the base model.

    Raises:
        UnknownServer: A name is not registered.
        MergeError: The configuration of ``base`` or of this ``revision`` cannot be read, or the adapter is broken.
        MismatchedBase: The adapter was trained on another base.
    """
    names = None if servers is None else check_servers(servers)
    try:
        source = read_source(adapter, base, revision)
    except MergeError:
        known = () if base is not None or revision is not None else diagnose(adapter).servers
        if not known:
            raise
        return [cast("ServingVerdict", one) for one in known if names is None or one.server in names]
    return judge(read_live_traits(source.job.config, source.job.shapes, source.base_config), names)


def check_export(source: Source, server: str) -> None:
    """Refuse to export an adapter to a server that does not take it.

    Raises:
        UnsupportedExport: The server does not take it; the message says why.
    """
    (verdict,) = judge(read_live_traits(source.job.config, source.job.shapes, source.base_config), [server])
    if not verdict.served:
        raise UnsupportedExport(f"{source.title}: {verdict}. {MERGED}")
