"""``lora-plugins adopt``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.commands.terminal import HubOption, Json, print_json, print_rows, say, visible, waiting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from registry.adopting.adopt import Adopted

__all__ = ["COMMANDS", "adopt"]

_SHOWN = 10


def adopt(
    source: Annotated[
        str,
        typer.Argument(help="org/name, org/name@<commit>, @branch, org/name/folder@…; or a folder (./… or /…)."),
    ],
    name: Annotated[str, typer.Argument(help="Name of the release: org/name.")],
    version: Annotated[str, typer.Option(help="Version, or 'patch', 'minor', 'major' to increment it.")],
    hub: HubOption = None,
    source_hub: Annotated[
        str | None,
        typer.Option(
            "--from-hub",
            help="Registry of the source; default is --hub if that is on the network, else the Hugging Face Hub.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Adopt all adapters in and below the source, as org/name-<folder>.")
    ] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Folder that --all leaves out; repeatable.")] = None,
    from_pickle: Annotated[
        bool,
        typer.Option("--from-pickle", help="Convert adapter_model.bin in a separate process that builds tensors only."),
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="org/base or org/base@revision, if the adapter names another base or none.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="License id, if the original card names none.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="Module that may have large tensors that are not LoRA's; repeatable.")
    ] = None,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.", show_default=False)] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish even into a base model's repository, or over other files.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show names and changes, and publish nothing.")
    ] = False,
    sign: Annotated[
        str | None, typer.Option(help="PEM file of the private key to sign with.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish an adapter that any tool saved: from a repository, a folder, a checkpoint or the Hub's cache.

    \b
    Examples:
      lora-plugins adopt org/plain@main org/name --version 1.0.0
      lora-plugins adopt ./run org/name --version 1.0.0 --all --dry-run
      lora-plugins adopt org/old org/name --version 1.0.0 --from-pickle
    """
    from registry.adopting.adopt import adopt as publish

    with waiting(f"Checking and publishing {visible(source)} …"):
        done = publish(
            source,
            name,
            version=version,
            hub=hub,
            source_hub=source_hub,
            every=every,
            skip=skip or (),
            from_pickle=from_pickle,
            base_model=base_model,
            license=license_,
            allow=allow or (),
            private=private,
            force=force,
            dry_run=dry_run,
            sign=sign,
        )
    if as_json:
        print_json([_describe(each) for each in done])
    else:
        _print_all(done, dry_run=dry_run)


def _describe(adopted: Adopted) -> dict[str, object]:
    published = adopted.published
    return {
        "source": adopted.source,
        "name": published.name,
        "version": published.version,
        "commit": published.commit,
        "created": published.created,
        "digest": published.manifest.digest,
        "license": adopted.license,
        "changes": adopted.changes,
        "renamed": adopted.renamed,
        "dropped": adopted.dropped,
        "files": published.changes,
    }


def _print_all(done: Sequence[Adopted], *, dry_run: bool) -> None:
    for adopted in done:
        for row in _list_changes(adopted):
            say(visible(row))
    state = "would be published" if dry_run else ""
    rows = [
        (
            each.source,
            str(each.published),
            each.license or "not stated",
            len(each.renamed),
            state or ("published" if each.published.created else "was there"),
        )
        for each in done
    ]
    print_rows(("source", "release", "license", "renamed", "result"), rows, figures=("renamed",))


def _list_changes(adopted: Adopted) -> Iterator[str]:
    for change in adopted.changes:
        yield f"{adopted.source}: {change}"
    for before, after in list(adopted.renamed.items())[:_SHOWN]:
        yield f"  {before} -> {after}"
    if len(adopted.renamed) > _SHOWN:
        yield f"  and {len(adopted.renamed) - _SHOWN} more (--json lists all)"
    for name in adopted.dropped[:_SHOWN]:
        yield f"  {name} left out"


#: Commands that this module adds to the program.
COMMANDS = (adopt,)
