"""References to adapters: ``org/name``, optionally with a release.

The name is followed by nothing, ``@version``, ``@alias``, ``@commit`` or a range. An adapter that was never published
as a version is named by a commit, a branch or a change request (``@main``, ``@refs/pr/3``), and by its folder if it is
not at the top of the repository: ``org/name/folder@main``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from registry.errors import InvalidReference, MachineError

__all__ = [
    "BUMPS",
    "Reference",
    "bumped",
    "check_alias",
    "check_folder",
    "check_name",
    "expand_path",
    "is_in",
    "is_path",
    "newest_in",
    "parse_version",
    "split_key",
    "tag_of",
    "version_of_commit",
    "version_text",
    "versions_in",
]

#: Values of ``version=`` that increment a part of the newest version.
BUMPS = ("patch", "minor", "major")

# Names of accounts and repositories that the Hub accepts.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOOKS_LIKE_COMMIT = re.compile(r"[0-9a-fA-F]{7,64}")
_OPERATORS = "<>=!~"
_LONGEST_VERSION = 64
# Different strings must not denote the same version, and every reader must be able to represent the numbers.
_LEADING_ZERO = re.compile(r"(?<![0-9])0[0-9]")
_LONG_NUMBER = re.compile(r"[0-9]{19}")
_IMPLICIT_POST = re.compile(r"[0-9]-[0-9]")
_LONGEST_REFERENCE = 512
#: Names with another meaning in git, other registries or ``version=``.
_RESERVED = frozenset({"head", "latest", "main", "master", "refs", "registry", *BUMPS})
#: File names that some systems reserve.
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
_FORMS = "org/name, org/name@1.2.0, org/name@alias, org/name@<commit> or org/name>=1.2,<2"
#: Branches with these names need no prefix: no alias can have them.
_TRUNKS = ("main", "master")
_REQUEST = re.compile(r"refs/pr/[1-9][0-9]{0,8}")
#: A branch name that git allows, without the characters that have a meaning in references.
_BRANCH = re.compile(r"(?!.*(?:\.\.|//))[A-Za-z0-9_][\w.+#%/-]{0,199}(?<![/.])", re.ASCII)
#: A part of a folder's path: no hidden folders, and nothing that a file system or a reference reads otherwise.
_FOLDER = re.compile(r"(?![. ])[^\\:*?\"<>|!~@/]{1,128}(?<![. ])")
_MOST_FOLDERS = 8


def is_path(value: object) -> bool:
    r"""Whether a value is visibly a path: not a reference, the id of a model or data set, or the name of a registry.

    A path object is one, and a string that is absolute, begins with ``/``, ``.`` or ``~``, or has a ``\\`` in it, which
    no name on a hub has. Decided by its form, not by what exists on disk.
    """
    if isinstance(value, str):
        return value.startswith(("/", ".", "~")) or "\\" in value or os.path.isabs(value)
    return isinstance(value, os.PathLike)


def expand_path(path: str | os.PathLike[str], variable: str | None = None) -> Path:
    """Return a path with a leading ``~`` or ``~user`` replaced by the home folder.

    Args:
        path: A path.
        variable: The environment variable that it may come from, for the error.

    Raises:
        MachineError: The home folder is not known: ``HOME`` is not set and the user is not in the user database, as
            in some containers. A folder that is called ``~`` is never meant.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, OSError) as error:
        cure = "Write the whole path" if variable is None else f"Set {variable} to a folder that can be written"
        raise MachineError(
            f"{os.fspath(path)!r} cannot be found: the home folder is not known ({error}). {cure}, or set HOME"
        ) from None


@dataclass(frozen=True)
class Reference:
    """An adapter repository and one of its releases; at most one of version, alias, commit, range and branch is set.

    Attributes:
        name: ``org/name``.
        version: Exactly this version.
        alias: The release that an alias points to, or a branch of that name; which one, is known when it is resolved.
        commit: The release in this commit, or the unversioned adapter in it.
        range: The newest release in a range.
        folder: Path of the folder of an unversioned adapter; empty at the top of the repository.
        branch: The unversioned adapter or the release at the head of a branch, or of a change request (``refs/pr/3``).
        exact: Whether ``alias`` can only be an alias.
    """

    name: str
    version: Version | None = None
    alias: str | None = None
    commit: str | None = None
    range: SpecifierSet | None = None
    folder: str = ""
    branch: str | None = None
    exact: bool = False

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse a reference.

        Raises:
            InvalidReference: It is malformed; the message shows the valid forms.
        """
        if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_REFERENCE:
            raise InvalidReference(f"A reference is a text of 1 to {_LONGEST_REFERENCE} characters: {_FORMS}")
        head, at, pin = text.partition("@")
        if head.count("/") > 1:
            return _parse_in_folder(head, pin.strip(" ") if at else None, text)
        cut = next((index for index, char in enumerate(text) if char in f"@{_OPERATORS}"), len(text))
        name, rest = check_name(text[:cut].rstrip(" ")), text[cut:].strip(" ")
        if not rest:
            return cls(name)
        if rest[0] != "@":
            return cls(name, range=_parse_range(rest, text))
        return _parse_pin(name, rest[1:], text)

    def __str__(self) -> str:
        if self.range is not None:
            return f"{self.name}{self.range}"
        if self.version is not None:
            return f"{self.name}@{version_text(self.version)}"
        pinned = self.commit or self._write_name()
        return f"{self.key}@{pinned}" if pinned else self.key

    @property
    def key(self) -> str:
        """The name with the folder: ``org/name`` or ``org/name/folder``."""
        return f"{self.name}/{self.folder}" if self.folder else self.name

    @property
    def bare(self) -> bool:
        """Whether it names no release, commit or branch."""
        return self.range is None and (self.version or self.alias or self.commit or self.branch) is None

    def _write_name(self) -> str | None:
        if self.branch is None:
            return f"alias:{self.alias}" if self.exact else self.alias
        plain = self.branch in _TRUNKS or _REQUEST.fullmatch(self.branch)
        return self.branch if plain else f"branch:{self.branch}"

    def allows(self, version: Version, commit: str) -> bool:
        """Whether a release may match the reference, as far as is known without asking the hub."""
        if self.version is not None:
            return version == self.version
        if self.commit is not None:
            return commit == self.commit
        if self.range is not None:
            return is_in(self.range, version)
        # An alias or a branch may have pointed to any release, and every release may have been the newest one.
        return True


def check_name(name: str) -> str:
    """Return ``name`` if it is a valid repository name.

    Raises:
        InvalidReference: It is not.
    """
    parts = name.split("/")
    if len(parts) != 2:
        folder = f"; a folder is given as {f'./{name[:200]}'!r}" if len(parts) == 1 and name else ""
        raise InvalidReference(f"{name[:200]!r} is not a valid adapter name: it has to be org/name ({_FORMS}){folder}")
    for part in parts:
        if _PART.fullmatch(part) is None or ".." in part or "--" in part or part.endswith((".git", ".ipynb")):
            raise InvalidReference(
                f"{name[:200]!r} is not a valid adapter name: {part[:100]!r} has to be 1 to 96 letters, digits, '.', "
                "'_' and '-', with '.' and '-' neither at an end nor doubled"
            )
        if _DEVICES.fullmatch(part):
            raise InvalidReference(f"{name!r} is not a valid adapter name: {part!r} is a device on some systems")
    return name


def check_folder(folder: str) -> str:
    """Return the path of a folder in a repository if it is valid.

    Raises:
        InvalidReference: It is not.
    """
    parts = folder.split("/")
    if len(parts) > _MOST_FOLDERS or not folder.isprintable() or not all(_FOLDER.fullmatch(part) for part in parts):
        raise InvalidReference(
            f"{folder[:200]!r} is not a valid folder of a repository: it must be at most {_MOST_FOLDERS} names, none "
            'with a dot or a space at an end or with any of \\ : * ? " < > | ! ~ @. A range names releases, which are '
            "at the top of a repository"
        )
    return folder


def split_key(key: str) -> tuple[str, str]:
    """Return the name and the folder of ``org/name`` or ``org/name/folder``.

    Raises:
        InvalidReference: It is malformed.
    """
    org, _, rest = key.partition("/")
    repository, _, folder = rest.partition("/")
    if "" in key.split("/")[1:]:
        raise InvalidReference(f"{key[:200]!r} is not a valid adapter name: it has to be org/name ({_FORMS})")
    return check_name(f"{org}/{repository}"), check_folder(folder) if folder else ""


def parse_version(text: str) -> Version:
    """Parse a PEP 440 version; semver's ``1.2.3-rc.1`` is read as ``1.2.3rc1``.

    The tag of the returned version is read as the same version on every hub and by every reader.

    Raises:
        InvalidReference: It is not a version, or one that readers interpret differently: with a local part
            (``+build``), numbers with leading zeros or of more than 18 digits, or semver's ``1.2.3-1``, which is later
            than ``1.2.3`` in PEP 440 and earlier in semver.
    """
    try:
        if len(text) > _LONGEST_VERSION or not text.isascii() or text != text.strip():
            raise InvalidVersion(text)
        version = Version(text)
    except InvalidVersion:
        raise InvalidReference(
            f"{text[:100]!r} is not a valid version: give one like 1.2.0 or 2.0.0rc1 (PEP 440, at most "
            f"{_LONGEST_VERSION} characters)"
        ) from None
    if version.local is not None:
        raise InvalidReference(f"{text!r} has the local part '+{version.local}', which released versions cannot have")
    if _LONG_NUMBER.search(text):
        raise InvalidReference(f"{text!r} has a number of more than 18 digits, which a version must not have")
    if _IMPLICIT_POST.search(text):
        raise InvalidReference(
            f"{text!r} is later than {version.base_version} to PEP 440 and earlier to semver: write "
            f"{version_text(version)}, or {version.base_version}rc1"
        )
    if len(version_text(version)) > _LONGEST_VERSION:
        raise InvalidReference(f"{text!r} has more than {_LONGEST_VERSION} characters when it is written in full")
    if _LEADING_ZERO.search(text):
        raise InvalidReference(f"{text!r} is not valid with its leading zeros: write {version_text(version)}")
    return version


def version_text(version: Version) -> str:
    """Return the canonical form of a version: three numbers, more only if they are not zero. ``1.0`` is ``1.0.0``."""
    numbers = list(version.release)
    while len(numbers) > 3 and numbers[-1] == 0:
        numbers.pop()
    numbers += [0] * (3 - len(numbers))
    epoch = f"{version.epoch}!" if version.epoch else ""
    pre = "".join(map(str, version.pre)) if version.pre else ""
    post = f".post{version.post}" if version.post is not None else ""
    dev = f".dev{version.dev}" if version.dev is not None else ""
    return f"{epoch}{'.'.join(map(str, numbers))}{pre}{post}{dev}"


def version_of_commit(commit: str) -> str:
    """Return the version by which an unversioned adapter is recorded: ``0+g<commit>``, which cannot be published."""
    return f"0+g{commit}"


def tag_of(version: Version) -> str:
    """Return the tag that publishes a version."""
    return f"v{version_text(version)}"


def versions_in(tags: Iterable[str]) -> dict[Version, str]:
    """Return the versions that tags publish, each with its tag. Tags in another form publish nothing."""
    found: dict[Version, str] = {}
    for tag in tags:
        if not tag.startswith("v") or len(tag) > _LONGEST_VERSION + 1:
            continue
        try:
            version = parse_version(tag[1:])
        except InvalidReference:
            continue
        if tag_of(version) == tag:
            found[version] = tag
    return found


def newest_in(range_: SpecifierSet | None, versions: Iterable[Version]) -> Version | None:
    """Return the newest version in a range, or of all without one; no pre-release unless the range names one."""
    allowed = [version for version in versions if is_in(range_, version)]
    return max(allowed, default=None)


def bumped(newest: Version | None, part: str) -> Version:
    """Return ``newest`` with its ``"patch"``, ``"minor"`` or ``"major"`` part incremented.

    Without a version yet, the result is 0.0.1, 0.1.0 or 1.0.0.

    Raises:
        InvalidReference: The number cannot be incremented any more.
    """
    numbers = [0, 0, 0] if newest is None else [newest.major, newest.minor, newest.micro]
    index = {"major": 0, "minor": 1, "patch": 2}[part]
    numbers = [*numbers[:index], numbers[index] + 1, *([0] * (2 - index))]
    epoch = f"{newest.epoch}!" if newest is not None and newest.epoch else ""
    return parse_version(epoch + ".".join(map(str, numbers)))


def check_alias(alias: str) -> str:
    """Return ``alias`` if it is valid and unambiguous.

    Raises:
        InvalidReference: It is not.
    """
    if _is_version(alias) or _LOOKS_LIKE_COMMIT.fullmatch(alias):
        raise InvalidReference(f"{alias[:100]!r} is not a valid alias: it looks like a version or a commit")
    if alias.lower() in _RESERVED:
        hint = "; the newest release is org/name without anything behind it" if alias.lower() == "latest" else ""
        raise InvalidReference(f"{alias!r} is not a valid alias: that name is reserved{hint}")
    if _ALIAS.fullmatch(alias) is None or ".." in alias or alias.endswith("."):
        raise InvalidReference(
            f"{alias[:100]!r} is not a valid alias: it must be a letter and up to 63 letters, digits, '.', '_' and '-'"
        )
    return alias


def _parse_pin(name: str, pin: str, text: str) -> Reference:
    if not pin:
        raise InvalidReference(f"{text!r} ends with '@': a version, an alias or a commit has to follow")
    if pin[0] in _OPERATORS:
        raise InvalidReference(f"{text!r} has '@' before a range: write {name}{pin}")
    if _COMMIT.fullmatch(pin):
        return Reference(name, commit=pin)
    if _is_version(pin):
        return Reference(name, version=parse_version(pin))
    if _LOOKS_LIKE_COMMIT.fullmatch(pin):
        raise InvalidReference(f"{text!r}: {pin!r} looks like part of a commit, and a commit has to be given in full")
    if pin.startswith("branch:") or "/" in pin or pin in _TRUNKS:
        return Reference(name, branch=_check_branch(pin.removeprefix("branch:"), text))
    if pin.startswith("alias:"):
        return Reference(name, alias=check_alias(pin.removeprefix("alias:")), exact=True)
    if any(char in pin for char in f"@{_OPERATORS},") or not pin.isprintable() or " " in pin:
        raise InvalidReference(f"{text!r}: what follows '@' is neither version, alias nor commit ({_FORMS})")
    if pin[0].isdigit():
        parse_version(pin)  # raises with the reason
    return Reference(name, alias=check_alias(pin))


def _parse_in_folder(head: str, pin: str | None, text: str) -> Reference:
    """Parse the reference of an unversioned adapter in a folder."""
    name, folder = split_key(head.rstrip(" "))
    if pin is None:
        return Reference(name, folder=folder)
    found = _parse_pin(name, pin, text)
    if found.version is not None:
        raise InvalidReference(
            f"{text!r} names a version in a folder: releases are at the top of a repository. Write "
            f"{name}@{version_text(found.version)}, or {name}/{folder}@<commit> for what the folder holds there"
        )
    # Aliases point to releases, so here it can only be a branch.
    branch = found.alias if found.alias is not None and not found.exact else found.branch
    if branch is None and found.commit is None:
        raise InvalidReference(f"{text!r} names an alias in a folder: aliases point to releases. Write {name}@{pin}")
    return Reference(name, commit=found.commit, folder=folder, branch=branch)


def _check_branch(branch: str, text: str) -> str:
    if _REQUEST.fullmatch(branch):
        return branch
    if _BRANCH.fullmatch(branch) is None or branch.startswith("refs/"):
        raise InvalidReference(
            f"{text!r}: {branch[:100]!r} is neither version, alias, commit, branch nor refs/pr/<number> ({_FORMS}, "
            "org/name@main, org/name@refs/pr/3)"
        )
    if branch == "registry":
        raise InvalidReference(f"{text!r}: the branch {branch!r} holds the state of the repository, not an adapter")
    return branch


def _parse_range(rest: str, text: str) -> SpecifierSet:
    try:
        found = SpecifierSet(rest)
    except InvalidSpecifier:
        raise InvalidReference(
            f"{text!r}: {rest[:100]!r} is not a valid range of versions: give one like >=1.2,<2 or ~=1.2 or ==1.* "
            "(PEP 440)"
        ) from None
    for part in found:
        if part.operator == "===":
            raise InvalidReference(f"{text!r}: '===' compares texts, not versions; write @{part.version}")
        parse_version(part.version.removesuffix(".*"))
    return found


def is_in(range_: SpecifierSet | None, version: Version) -> bool:
    """Whether a range contains a version; without a range, whether the version is stable."""
    if range_ is None:
        return not version.is_prerelease
    return range_.contains(version, prereleases=bool(range_.prereleases))


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except ValueError:  # InvalidVersion, or a number of thousands of digits
        return False
    return True
