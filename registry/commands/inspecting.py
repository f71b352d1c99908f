"""``lora-plugins versions``, ``show`` and ``diff``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import registry
from registry.checks.lineage import list_lineage
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
from registry.formats.references import check_name

if TYPE_CHECKING:
    from registry.catalog.comparison import Difference
    from registry.catalog.index import Release
    from registry.formats.manifest import Manifest

__all__ = ["COMMANDS", "diff", "list_", "show", "versions"]


def versions(
    name: Annotated[str, typer.Argument(help="org/name.")],
    hub: HubOption = None,
    as_json: Json = False,
) -> None:
    """List the versions of an adapter, oldest first.

    \b
    Examples:
      lora-plugins versions org/name
      lora-plugins versions org/name --hub ./registry --json
    """
    from registry.catalog.index import read_index
    from registry.hubs import open_hub

    with waiting(f"Reading {visible(name)} …"):
        index = read_index(open_hub(hub), check_name(name))
        found, foreign = index.releases(), index.foreign_tags()
    if as_json:
        print_json(found)
        return
    releases = [
        (
            release.version,
            release.commit[:12],
            ", ".join(release.aliases),
            _describe_release(release),
        )
        for release in found
    ]
    tags = [(tag, commit[:12], "", "foreign tag, not a release") for tag, commit in foreign.items()]
    print_rows(("version", "commit", "aliases", "notes"), [*releases, *tags])


def _describe_release(release: Release) -> str:
    state = f"withdrawn: {release.yanked}" if release.yanked else "pre-release" if release.prerelease else ""
    tags = f"[{', '.join(release.tags)}]" if release.tags else ""
    return "; ".join(part for part in (state, tags, release.note or "") if part)


def list_(
    base: Annotated[str | None, typer.Option(help="Only adapters of this base model.", show_default=False)] = None,
    search: Annotated[
        str | None,
        typer.Option(help="Words in name, base, aliases, tags, note or task.", show_default=False),
    ] = None,
    hub: HubOption = None,
    as_json: Json = False,
) -> None:
    """List the adapters of a registry with their newest stable version.

    \b
    Examples:
      lora-plugins list --hub ./registry
      lora-plugins list --base org/base --search "summary reviewed"
    """
    from registry.catalog.listing import list_adapters

    with waiting("Reading …"):
        found = list(list_adapters(base, search=search, hub=hub))
    if as_json:
        fields = ("base", "metrics", "created")
        print_json([{**asdict(each.release), **{k: getattr(each.manifest, k) for k in fields}} for each in found])
        return
    print_rows(
        ("adapter", "version", "base", "aliases", "notes"),
        (
            (r.name, r.version, each.manifest.base.id or "-", ", ".join(r.aliases), _describe_release(r))
            for each in found
            for r in (each.release,)
        ),
    )


def show(
    reference: Annotated[str, typer.Argument(help="org/name, with @version, @alias, @commit, @branch or a range.")],
    hub: HubOption = None,
    as_json: Json = False,
) -> None:
    """Show the manifest of a release, or what is known about an unversioned adapter.

    \b
    Examples:
      lora-plugins show org/name
      lora-plugins show org/name@1.2.0 --json
    """
    from registry.catalog.listing import show as described

    with waiting(f"Reading {visible(reference)} …"):
        found = described(reference, hub=hub)
    if as_json:
        manifest = json.loads(found.manifest.to_bytes())
        print_json({"release": found.release, "digest": found.manifest.digest, "manifest": manifest})
        return
    say(f"{found.release} ({'unversioned' if found.release.unversioned else found.release.commit[:12]})")
    if found.release.note or found.release.tags:
        say(f"  {'note':<14} {visible(_describe_release(replace(found.release, yanked=None)))}")
    if found.release.yanked:
        say(f"withdrawn: {visible(found.release.yanked)}")
    for key, value in _list_facts(found.manifest):
        say(f"  {key:<14} {visible(value)}")


def _list_facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    base, kind = manifest.base, manifest.architecture
    at = f" at {base.commit}" if base.commit else ""
    unnamed = "known by its fingerprint" if base.fingerprint else "not named"
    seen = "identity not recorded" if manifest.unversioned else kind.class_name or kind.model_type or "unknown"
    yield "base", f"{base.id or unnamed}{at} ({seen})"
    yield "digest", manifest.digest
    if not manifest.unversioned:
        yield "created", manifest.created
    if manifest.parent_version:
        yield "parent", manifest.parent_version
    yield "files", ", ".join(f"{name} ({record.size:,})" for name, record in manifest.files.items())
    yield "tensors", f"{len(manifest.tensors)}"
    for title, values in (("config", manifest.config), ("metrics", manifest.metrics), ("training", manifest.training)):
        for key, value in _flatten(values):
            yield title, f"{key} = {value}"
            title = ""
    for key, text in list_lineage(manifest.lineage):
        yield "lineage" if key == "lineage" else f"lineage: {key}", text


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def diff(
    before: Annotated[str, typer.Argument(help="org/name@1.0.0.")],
    after: Annotated[str, typer.Argument(help="org/name@1.1.0.")],
    hub: HubOption = None,
    page: Annotated[
        Path | None, typer.Option(help="Also write the comparison to this HTML file.", show_default=False)
    ] = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Compare two releases: configuration, metrics, lineage, and how much each layer changed.

    \b
    Examples:
      lora-plugins diff org/name@1.1.0 org/name@1.2.0
      lora-plugins diff org/name@1.1.0 org/name@1.2.0 --page diff.html
    """
    with progress() as advance:
        # A lock file holds one of the two.
        one, two = (
            registry.pull_adapter(ref, hub=hub, lock=False, cache_dir=cache_dir, progress=advance)
            for ref in (before, after)
        )
    found = registry.compare_adapters(one, two)
    if page is not None:
        registry.write_page(registry.render_difference(found), page, "diff.html")
    if as_json:
        print_json(found)
    else:
        _print_difference(found)
        if page is not None:
            say(f"Page in {visible(page)}")


def _print_difference(found: Difference) -> None:
    say(f"{found.before} -> {found.after}")
    for title, pairs in (("base", found.base), ("config", found.config), ("metrics", found.metrics)):
        for key, (old, new) in pairs.items():
            if key == "fingerprint":
                old, new = "one", "another"
            change = _show_change(old, new) if title == "metrics" else ""
            say(f"  {title}: {visible(key)} {visible(_show_value(old))} -> {visible(_show_value(new))}{change}")
    if found.lineage:
        sides = ((key, _show_value(old), _show_value(new)) for key, (old, new) in found.lineage.items())
        print_rows(("trained from", found.before, found.after), sides)
    norms = ("norm before", "norm after", "norm of change")
    rows = ((c.name, f"{c.before:.4g}", f"{c.after:.4g}", f"{c.change:.4g}") for c in found.layers)
    print_rows(("layer", *norms), rows, figures=norms)


def _show_value(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else value


def _show_change(old: float | None, new: float | None) -> str:
    return "" if old is None or new is None else f" ({new - old:+.4g})"


#: Commands that this module adds to the program.
COMMANDS = (list_, versions, show, diff)
