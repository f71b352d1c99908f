"""Commands that change a registry: push, yank, alias, mirror."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.commands.terminal import CacheDir, HubOption, Json, print_json, print_rows, say, visible, waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.publishing.changes import Changes
    from registry.signing.keys import SigningKey

__all__ = ["COMMANDS", "alias", "mirror", "note", "push", "yank"]


def push(
    source: Annotated[Path, typer.Argument(help="Folder with an adapter, or a Trainer's checkpoint.")],
    name: Annotated[str, typer.Argument(help="org/name.")],
    version: Annotated[str, typer.Option(help="Version, or 'patch', 'minor', 'major' to increment it.")] = "patch",
    hub: HubOption = None,
    base_model: Annotated[
        str | None, typer.Option(help="org/base or org/base@revision, if the adapter names another base or none.")
    ] = None,
    base_alias: Annotated[
        list[str] | None, typer.Option(help="Another id of the base, used if its own is gone; repeatable.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric as name=number; repeatable.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="Module that may have large tensors that are not LoRA's; repeatable.")
    ] = None,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of publishing.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Publish even into a base model's repository, or over other files with a release's names."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be written, replaced, deleted and left; change nothing.")
    ] = False,
    sign: Annotated[
        str | None, typer.Option(help="PEM file of the private key to sign with.", show_default=False)
    ] = None,
    certificate: Annotated[
        str | None, typer.Option(help="PEM file of that key's certificate.", show_default=False)
    ] = None,
    chain: Annotated[
        list[str] | None, typer.Option(help="PEM file of an intermediate certificate; repeatable.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="For the card: license id, such as apache-2.0.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="For the card: id of a training data set; repeatable.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="For the card: language code, such as en; repeatable.")
    ] = None,
    serve: Annotated[
        list[str] | None,
        typer.Option(help="Server that must accept the adapter, such as vllm, else the push is refused; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish an adapter as a version that never changes.

    \b
    Examples:
      lora-plugins push ./adapter org/name
      lora-plugins push run/checkpoint-500 org/name --metric f1=0.9
      lora-plugins push ./adapter org/name --hub ./registry --dry-run
      lora-plugins push ./adapter org/name --serve vllm
    """
    from registry.publishing.push import push_adapter

    with waiting(f"Checking and publishing {visible(source)} …"):
        done = push_adapter(
            source,
            name,
            version=version,
            hub=hub,
            base_model=base_model,
            base_aliases=base_alias or (),
            metrics=_read_metrics(metric) if metric else None,
            allow=allow or (),
            private=private,
            commit_message=message,
            create_pr=create_pr,
            force=force,
            dry_run=dry_run,
            sign=_make_signing_key(sign, certificate, chain or ()),
            license=license_,
            datasets=dataset or (),
            language=language,
            serve=serve or (),
        )
    if as_json:
        fields = {"name": done.name, "version": done.version, "commit": done.commit, "created": done.created}
        print_json({**fields, "digest": done.manifest.digest, "url": done.url, "changes": done.changes})
    elif done.dry_run and done.changes is not None:
        print_rows(("file", "what happens"), _list_changes(done.changes))
        say(f"Nothing was changed; this would publish {done}")
    elif done.url:
        say(f"Proposed {done} at {visible(done.url)}")
    else:
        say(f"Published {done} ({done.commit[:12]})" if done.created else f"{done} has this content already")


def _make_signing_key(key: str | None, certificate: str | None, chain: Sequence[str]) -> SigningKey | None:
    if key is None:
        if certificate or chain:
            raise typer.BadParameter("a certificate needs the private key: --sign", param_hint="--certificate")
        return None
    from registry.signing.keys import PASSWORD_VARIABLE, SigningKey

    return SigningKey(key, certificate, tuple(chain), os.environ.get(PASSWORD_VARIABLE))


def _list_changes(changes: Changes) -> list[tuple[str, str]]:
    return [(path, what) for what, paths in asdict(changes).items() for path in paths]


def _read_metrics(given: list[str]) -> dict[str, float]:
    metrics = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            metrics[name] = float(value)
        except ValueError:
            raise typer.BadParameter(f"{item!r} is not name=number", param_hint="--metric") from None
    return metrics


def yank(
    reference: Annotated[str, typer.Argument(help="org/name@version.")],
    reason: Annotated[str | None, typer.Option(help="One line, shown to everybody who uses the version.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Undo the withdrawal.")] = False,
    hub: HubOption = None,
    as_json: Json = False,
) -> None:
    """Withdraw a version: ranges skip it; exact references and locks still get it, with a warning.

    \b
    Examples:
      lora-plugins yank org/name@1.2.0 --reason "trained on the test set"
      lora-plugins yank org/name@1.2.0 --undo
    """
    from registry.catalog.withdrawal import unyank
    from registry.catalog.withdrawal import yank as withdraw

    if undo == (reason is not None):
        raise typer.BadParameter("give --reason to withdraw a version, or --undo", param_hint="--reason")
    with waiting(f"Changing {visible(reference)} …"):
        release = unyank(reference, hub=hub) if reason is None else withdraw(reference, reason, hub=hub)
    if as_json:
        print_json(release)
    else:
        say(f"{release} is offered again" if undo else f"{release} is withdrawn: {visible(release.yanked)}")


def alias(
    reference: Annotated[str, typer.Argument(help="org/name@version; org/name to list or remove.")],
    name: Annotated[str | None, typer.Argument(help="The alias. Without it, all aliases are listed.")] = None,
    expect: Annotated[
        str | None, typer.Option(help="Version that it must point to now, or 'none'.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    if_better: Annotated[
        str | None,
        typer.Option("--if-better", help="Move it only if this metric is better.", show_default=False),
    ] = None,
    better: Annotated[
        str | None,
        typer.Option(help="'lower' or 'higher', if the metric's name does not tell.", show_default=False),
    ] = None,
    hub: HubOption = None,
    as_json: Json = False,
) -> None:
    """Point an alias such as 'champion' to a version, or list aliases with their history.

    \b
    Examples:
      lora-plugins alias org/name@1.2.0 champion
      lora-plugins alias org/name@1.3.0 champion --expect 1.2.0
      lora-plugins alias org/name@1.3.0 champion --if-better eval_loss
      lora-plugins alias org/name
    """
    from registry.catalog.aliases import ANY, remove_alias, set_alias

    if name is None:
        _list_aliases(reference, hub, as_json=as_json)
        return
    if if_better is not None:
        if remove or expect is not None:
            raise typer.BadParameter("goes with neither --expect nor --remove", param_hint="--if-better")
        _move_if_better(reference, name, if_better, better, hub, as_json=as_json)
        return
    expected = ANY if expect is None else None if expect == "none" else expect
    if remove:
        remove_alias(reference, name, expect=expected, hub=hub)
        if as_json:
            print_json({"name": reference, "alias": name, "version": None})
        else:
            say(f"{visible(reference)}@{visible(name)} stands for nothing any more")
        return
    release = set_alias(reference, name, expect=expected, hub=hub)
    if as_json:
        print_json({"name": release.name, "alias": name, "version": release.version, "commit": release.commit})
    else:
        say(f"{release.name}@{visible(name)} is {release.version}")


def _move_if_better(
    reference: str, alias: str, metric: str, better: str | None, hub: str | None, *, as_json: bool
) -> None:
    from registry.catalog.aliases import move_if_better

    found = move_if_better(reference, alias, metric, better=better, hub=hub)
    if as_json:
        print_json(found)
        return
    name, values = f"{found.release.name}@{visible(alias)}", f"{visible(metric)} ({found.better} is better)"
    if found.standing is None:
        say(f"{name} is {found.release.version}: it is new. {values}: {found.after:g}")
    elif found.before is None:
        say(f"{name} is {found.standing} already. {values}: {found.after:g}")
    else:
        now = f"is {found.release.version} now" if found.moved else f"stays {found.standing}"
        compared = f"{found.standing} {found.before:g}, {found.release.version} {found.after:g}"
        say(f"{name} {now}. {values}: {compared}")


def note(
    reference: Annotated[str, typer.Argument(help="org/name@version.")],
    text: Annotated[str | None, typer.Argument(help="One line; '' removes the note.", show_default=False)] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag to add; repeatable.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="Tag to remove; repeatable.")] = None,
    hub: HubOption = None,
    as_json: Json = False,
) -> None:
    """Add a note or tags to a version. The release itself does not change.

    \b
    Examples:
      lora-plugins note org/name@1.2.0 "better on long texts" --tag reviewed
      lora-plugins note org/name@1.2.0 --untag reviewed
    """
    from registry.catalog.notes import annotate

    if text is None and not tag and not untag:
        raise typer.BadParameter("give a text, --tag or --untag", param_hint="TEXT")
    with waiting(f"Changing {visible(reference)} …"):
        release = annotate(reference, text, add_tags=tag or (), remove_tags=untag or (), hub=hub)
    if as_json:
        print_json(release)
    else:
        say(f"{release}: {visible(release.note or 'no note')}; tags {', '.join(release.tags) or 'none'}")


def _list_aliases(name: str, hub: str | None, *, as_json: bool) -> None:
    from registry.catalog.aliases import aliases

    known = aliases(name, hub=hub)
    if as_json:
        print_json({alias: list(moves) for alias, moves in known.items()})
        return
    print_rows(
        ("alias", "version", "since", "before"),
        (
            (alias, moves[-1].version or "-", moves[-1].time, ", ".join(m.version or "-" for m in reversed(moves[:-1])))
            for alias, moves in sorted(known.items())
        ),
    )


def mirror(
    reference: Annotated[str, typer.Argument(help="org/name for all its releases, or one release.")],
    target: Annotated[str, typer.Argument(help="Registry to copy to: https://…, s3://…, or a folder.")],
    hub: HubOption = None,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.", show_default=False)] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Copy even into a base model's repository, or over other files with a release's names."
        ),
    ] = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Copy releases to another registry, byte by byte, with withdrawals and aliases.

    \b
    Examples:
      lora-plugins mirror org/name ./registry
      lora-plugins mirror org/name@1.2.0 https://hub.example.org --hub ./registry
    """
    from registry.upkeep.mirroring import mirror as copy

    with waiting(f"Copying {visible(reference)} …"):
        done = copy(reference, target, hub=hub, private=private, force=force, cache_dir=cache_dir)
    rows = [(str(each), each.manifest.digest, "copied" if each.created else "was there") for each in done]
    if as_json:
        print_json([dict(zip(("release", "digest", "state"), row, strict=True)) for row in rows])
    else:
        print_rows(("release", "digest", "result"), rows)


#: Commands that this module adds to the program.
COMMANDS = (push, yank, alias, note, mirror)
