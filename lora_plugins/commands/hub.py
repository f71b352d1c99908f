"""``--hub`` of the commands that load an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry import Adapter

__all__ = ["HubOption", "check_hub", "find_adapter"]

HubOption = Annotated[
    str | None,
    typer.Option(
        "--hub",
        help="Registry of org/name: https://…, s3://bucket/prefix, or a folder (./…); default is LORA_REGISTRY, else "
        "the Hugging Face Hub.",
        show_default=False,
    ),
]


def check_hub(adapter: str | None, hub: str | None) -> None:
    """Refuse ``--hub`` where no registry is asked.

    Raises:
        typer.BadParameter: The adapter is a folder, or there is none.
    """
    if hub is None:
        return
    from registry import is_path

    if adapter is None:
        raise typer.BadParameter("needs an adapter in that registry", param_hint="--hub")
    if is_path(adapter):
        raise typer.BadParameter(f"{adapter} is a folder: leave --hub out, or write org/name", param_hint="--hub")


def find_adapter(adapter: str, hub: str | None) -> str | Adapter:
    """Return an adapter as the library takes it: as the user wrote it, or pulled from the registry in ``--hub``.

    Raises:
        typer.BadParameter: It is a folder, and there is a ``--hub``.
        RegistryError: The registry does not have it, or it fails a check.
    """
    check_hub(adapter, hub)
    if hub is None:
        return adapter
    from registry import pull_adapter

    return pull_adapter(adapter, hub=hub)
