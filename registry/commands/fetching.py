"""``lora-plugins pull``, ``lock``, ``verify`` and ``gc``."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.commands.terminal import (
    CacheDir,
    HubOption,
    Json,
    print_json,
    print_rows,
    progress,
    say,
    visible,
    waiting,
)

__all__ = ["COMMANDS", "gc", "lock", "pull", "verify"]

_LockFile = Annotated[
    str | None, typer.Option("--lock-file", help="Default is adapters.lock in this folder.", show_default=False)
]
_RequireSignature = Annotated[
    list[str] | None,
    typer.Option(
        "--require-signature",
        help="PEM file of a public key or certificate; the release must be signed by it, or by one of several.",
        show_default=False,
    ),
]


def pull(
    reference: Annotated[
        str,
        typer.Argument(
            help="org/name, org/name@1.2.0, @alias, 'org/name>=1.2,<2'; unversioned @<commit>, @main, org/name/dir@main"
        ),
    ],
    hub: HubOption = None,
    lock: Annotated[bool, typer.Option("--lock", help="Record the pulled release in the lock file.")] = False,
    lock_file: _LockFile = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Refuse what is not in the lock file.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use the cache only, no network.")] = False,
    require_signature: _RequireSignature = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Download a release or an unversioned adapter, check every byte, and print its folder.

    \b
    Examples:
      lora-plugins pull org/name
      lora-plugins pull 'org/name>=1.2,<2' --lock
      lora-plugins pull org/name@champion --hub ./registry --json
      lora-plugins pull org/name/checkpoint-500@main --lock
    """
    from registry.pulling.pull import pull_adapter

    with progress() as advance:
        adapter = pull_adapter(
            reference,
            hub=hub,
            lock=(lock_file or True) if lock else lock_file if frozen else None,
            frozen=frozen,
            offline=offline,
            cache_dir=cache_dir,
            progress=advance,
            require_signature=require_signature,
        )
    if as_json:
        fields = {"name": adapter.name, "version": adapter.version, "commit": adapter.commit}
        print_json({**fields, "digest": adapter.manifest.digest, "path": adapter.path})
    else:
        say(adapter.path)


def lock(
    references: Annotated[
        list[str] | None, typer.Argument(help="References to lock again. Without any, the locked releases are pulled.")
    ] = None,
    hub: HubOption = None,
    lock_file: _LockFile = None,
    require_signature: _RequireSignature = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Record in a lock file the versions that references resolve to now.

    \b
    Examples:
      lora-plugins lock org/name org/other@2.0.0
      lora-plugins lock
    """
    from registry.pulling.pull import lock_adapters

    with waiting("Locking …"):
        entries = lock_adapters(
            references or (),
            hub=hub,
            lock=lock_file or True,
            cache_dir=cache_dir,
            require_signature=require_signature,
        )
    if as_json:
        print_json(entries)
    else:
        rows = [
            (name, "unversioned" if entry.unversioned else entry.version, entry.commit[:12], entry.base or "-")
            for name, entry in entries.items()
        ]
        print_rows(("adapter", "version", "commit", "base"), rows)


def verify(
    reference: Annotated[str, typer.Argument(help="org/name@version.")],
    hub: HubOption = None,
    require_signature: _RequireSignature = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Download a release and compare every byte with its manifest, the lock file and earlier pulls.

    \b
    Examples:
      lora-plugins verify org/name@1.2.0
      lora-plugins verify org/name@1.2.0 --require-signature team.pub
    """
    from registry.upkeep.verification import verify as look

    with waiting(f"Checking {visible(reference)} …"):
        found = look(reference, hub=hub, cache_dir=cache_dir, require_signature=require_signature)
    if as_json:
        digest = found.manifest.digest if found.manifest else None
        fields = {"release": str(found.release), "ok": found.ok, "digest": digest, "problems": found.problems}
        print_json({**fields, "others": found.others})
    else:
        for problem in found.problems:
            say(visible(problem))
        for path in found.others:
            say(f"{visible(path)} is in the commit and not in the manifest: not part of the release")
        files = len(found.manifest.files) if found.manifest else 0
        meant = "the commit says" if found.release.unversioned else "published"
        say(f"{found.release}: {f'{files} files, all as {meant}' if found.ok else f'NOT as {meant}'}")
    if not found.ok:
        raise typer.Exit(1)


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Delete what was found, instead of listing it.")] = False,
    hub: HubOption = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """List, or delete, what no version, alias or recent pull refers to, in a registry and in the cache.

    \b
    Examples:
      lora-plugins gc --hub ./registry
      lora-plugins gc --hub ./registry --delete
    """
    from registry.upkeep.cleanup import collect_garbage

    with waiting("Looking …"):
        found = collect_garbage(hub, dry_run=not delete, cache_dir=cache_dir)
    if as_json:
        print_json(found)
        return
    for problem in found.problems:
        say(visible(problem))
    for path in found.paths:
        say(visible(path))
    what = "deleted" if found.deleted else "could be deleted; --delete does it"
    say(f"{len(found.paths)} folders, {found.size:,} bytes: {what if found.paths else 'nothing to do'}")


#: Commands that this module adds to the program.
COMMANDS = (pull, verify, lock, gc)
