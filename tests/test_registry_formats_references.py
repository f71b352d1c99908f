"""References: every form, every way to get one wrong, and the order of versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from registry.errors import InvalidReference
from registry.formats.references import (
    Reference,
    bumped,
    check_alias,
    newest_in,
    parse_version,
    tag_of,
    version_text,
    versions_in,
)

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("org/name", "org/name"),
        ("org/name@1.2.0", "org/name@1.2.0"),
        ("org/name@1.2", "org/name@1.2.0"),
        ("org/name@v1.2.0", "org/name@1.2.0"),
        ("org/name@1.2.3-rc.1", "org/name@1.2.3rc1"),
        ("org/name@champion", "org/name@champion"),
        (f"org/name@{COMMIT}", f"org/name@{COMMIT}"),
        (f"org/name@{COMMIT}{COMMIT[:24]}", f"org/name@{COMMIT}{COMMIT[:24]}"),
        ("org/name@" + "1" * 40, "org/name@" + "1" * 40),
        ("org/name>=1.2,<2", "org/name<2,>=1.2"),
        ("org/name >= 1.2, < 2", "org/name<2,>=1.2"),
        ("org/name~=1.2", "org/name~=1.2"),
        ("org/name==1.*", "org/name==1.*"),
        ("a_b.c/D-e_f.1", "a_b.c/D-e_f.1"),
        ("org/name@main", "org/name@main"),
        ("org/name@branch:main", "org/name@main"),
        ("org/name@branch:dev", "org/name@branch:dev"),
        ("org/name@feature/x", "org/name@branch:feature/x"),
        ("org/name@refs/pr/12", "org/name@refs/pr/12"),
        ("org/name@alias:champion", "org/name@alias:champion"),
        ("org/name/more", "org/name/more"),
        ("org/name/a/lora r=16@main", "org/name/a/lora r=16@main"),
        ("org/name/more@dev", "org/name/more@branch:dev"),
        (f"org/name/more@{COMMIT}", f"org/name/more@{COMMIT}"),
    ],
)
def test_forms(text: str, shown: str) -> None:
    assert str(Reference.parse(text)) == shown
    assert Reference.parse(shown) == Reference.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "1 to 512 characters"),
        ("x" * 600, "1 to 512 characters"),
        ("name", r"has to be org/name .*; a folder is given as '\./name'"),
        ("lora-output", r"a folder is given as '\./lora-output'"),
        ("out@1.0.0", r"a folder is given as '\./out'"),
        ("a b", r"a folder is given as '\./a b'"),
        ("org/name/", "has to be org/name"),
        ("org/name//more", "has to be org/name"),
        ("org/name/../more", "is not a valid folder"),
        ("org/name/.git@main", "is not a valid folder"),
        ("org/name/a:b@main", "is not a valid folder"),
        ("org/name/more>=1.2", "A range names releases"),
        ("org/name/more@1.2.0", "Write org/name@1.2.0"),
        ("org/name/more@alias:champion", "aliases point to releases"),
        ("org/name/" + "a/" * 8 + "a@main", "is not a valid folder"),
        ("https://hub/org/name", "has to be org/name"),
        ("/name", "has to be 1 to 96 letters"),
        ("org/", "has to be 1 to 96 letters"),
        ("../name", "has to be 1 to 96 letters"),
        ("org/..", "has to be 1 to 96 letters"),
        ("org/a..b", "neither at an end nor doubled"),
        ("org/a--b", "neither at an end nor doubled"),
        ("org/-a", "neither at an end"),
        ("org/a.git", "neither at an end"),
        ("org/%2e%2e", "letters, digits"),
        ("org/na me", "letters, digits"),
        ("org/näme", "letters, digits"),
        ("org/name#x", "letters, digits"),
        ("org/name\n", "letters, digits"),
        ("org/name\0", "letters, digits"),
        ("org/nul", "a device"),
        ("COM1.txt/name", "a device"),
        ("org/name@", "ends with '@'"),
        ("org/name@>=1.2", "write org/name>=1.2"),
        ("org/name@1.2.3+build", "local part"),
        ("org/name@1.2@3", "neither version"),
        ("org/name@1.2,<2", "neither version"),
        ("org/name@1.x", "is not a valid version"),
        ("org/name@" + "9" * 100, "is not a valid version"),
        ("org/name@abcdef1", "part of a commit"),
        ("org/name@latest", "the newest release is org/name"),
        ("org/name@HEAD", "reserved"),
        ("org/name@refs/pr/0", "neither version"),
        ("org/name@refs/heads/main", "neither version"),
        ("org/name@branch:", "neither version"),
        ("org/name@branch:a..b", "neither version"),
        ("org/name@branch:registry", "holds the state"),
        ("org/name@alias:main", "reserved"),
        ("org/name@a b", "neither version"),
        ("org/name@-x", "is not a valid alias"),
        ("org/name@a..b", "is not a valid alias"),
        ("org/name@\x1b[31m", "neither version"),
        ("org/name>=", "not a valid range"),
        ("org/name=1.2", "not a valid range"),
        ("org/name>=1.2 <2", "not a valid range"),
        ("org/name===1.2", "compares texts"),
        ("org/name@01.2.3", "leading zeros: write 1.2.3"),
        ("org/name@1.02", r"leading zeros: write 1\.2\.0"),
        ("org/name@2024.01.05", r"leading zeros: write 2024\.1\.5"),
        ("org/name@1.2rc01", "leading zeros: write 1.2.0rc1"),
        ("org/name@v01.2.3", "leading zeros"),
        ("org/name>=01.2", "leading zeros"),
        ("org/name==1.02.*", "leading zeros"),
        ("org/name>=1.2@x", "not a valid range"),
        ("org/name^1.2", "letters, digits"),
    ],
)
def test_malformed(text: str, says: str) -> None:
    with pytest.raises(InvalidReference, match=says) as caught:
        Reference.parse(text)
    assert str(caught.value).isprintable()


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for candidate in (text, f"org/name{text}", f"org/name@{text}"):
        try:
            reference = Reference.parse(candidate)
        except InvalidReference:
            continue
        assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize("alias", ["1", "v1", "1.0rc1", "deadbeef", COMMIT, "main", "Latest", "", "a/b", "x" * 65, "é"])
def test_what_an_alias_cannot_be(alias: str) -> None:
    with pytest.raises(InvalidReference):
        check_alias(alias)


@pytest.mark.parametrize("alias", ["champion", "prod-eu", "A", "cafe", "release_x.y"])
def test_what_an_alias_can_be(alias: str) -> None:
    assert check_alias(alias) == alias


@pytest.mark.parametrize(
    ("text", "written"),
    [("1", "1.0.0"), ("1.0", "1.0.0"), ("1.2.0.0", "1.2.0"), ("1.2.0.1", "1.2.0.1"), ("1.0a1", "1.0.0a1"),
     ("1.0.post1", "1.0.0.post1"), ("1.0.dev3", "1.0.0.dev3"), ("2!1.0", "2!1.0.0"), ("1.0-rc.1", "1.0.0rc1")],
)  # fmt: skip
def test_one_way_to_write_a_version(text: str, written: str) -> None:
    assert version_text(parse_version(text)) == written
    assert tag_of(parse_version(text)) == f"v{written}"


@given(
    st.from_regex(r"([0-9]!)?[0-9]{1,3}(\.[0-9]{1,2}){0,4}((a|b|rc)[0-9])?(\.post[0-9])?(\.dev[0-9])?", fullmatch=True)
)
def test_equal_versions_are_written_alike(text: str) -> None:
    version = Version(text)
    assert Version(version_text(version)) == version
    assert versions_in([tag_of(version)]) == {version: tag_of(version)}


def test_only_tags_written_our_way_publish() -> None:
    tags = [
        "v1.0.0",
        "v1.1",
        "1.2.0",
        "v01.3.0",
        "v1.4.0+x",
        "latest",
        "v",
        "v" + "1" * 5000,
        "v1.5.0rc1",
        "v1.6.0-rc1",
    ]
    assert list(versions_in(tags).values()) == ["v1.0.0", "v1.5.0rc1"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", "1.10.0"),
        ("org/name<1.10", "1.9.0"),
        ("org/name~=1.2", "1.10.0"),
        ("org/name==1.9.*", "1.9.0"),
        ("org/name>=2", None),
        ("org/name>=2.0rc1", "2.0.0rc1"),
        ("org/name>1.2,!=1.10", "1.9.0"),
    ],
)
def test_newest_in_a_range(text: str, found: str | None) -> None:
    versions = [Version(version) for version in ("1.9.0", "1.10.0", "2.0.0rc1", "1.2.0")]
    newest = newest_in(Reference.parse(text).range, versions)
    assert (newest and version_text(newest)) == found


def test_pre_releases_alone_are_not_taken() -> None:
    assert newest_in(None, [Version("1.0rc1")]) is None
    assert newest_in(Reference.parse("org/name>=0.5").range, [Version("1.0rc1")]) is None


def test_counting_up() -> None:
    parts = ("patch", "minor", "major")
    assert [version_text(bumped(None, part)) for part in parts] == ["0.0.1", "0.1.0", "1.0.0"]
    assert [version_text(bumped(Version("1.2.3"), part)) for part in parts] == ["1.2.4", "1.3.0", "2.0.0"]
    assert version_text(bumped(Version("2!1.2.3.4"), "patch")) == "2!1.2.4"


def test_what_a_reference_allows() -> None:
    version = Version("1.2.0")
    for text in ("org/name", "org/name@1.2", "org/name@champion", f"org/name@{COMMIT}", "org/name~=1.0"):
        assert Reference.parse(text).allows(version, COMMIT)
    for text in ("org/name@1.2.1", f"org/name@{'0' * 40}", "org/name>=2"):
        assert not Reference.parse(text).allows(version, COMMIT)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("9" * 62, "more than 18 digits"),
        ("0" * 40, "more than 18 digits"),
        ("01.2.3", "leading zeros: write 1.2.3"),
        ("1.2.3rc01", "leading zeros: write 1.2.3rc1"),
        ("2024.01.31", "leading zeros: write 2024.1.31"),
        ("00!1.0", "leading zeros"),
        ("1!" + "1" * 18 + "rc" + "2" * 18 + ".post" + "3" * 17, "more than 64 characters when it is written in full"),
        ("1." + "2" * 19, "more than 18 digits"),
        ("1.2.3-1", "later than 1.2.3 to PEP 440 and earlier to semver: write 1.2.3.post1"),
        ("\uff11.2.3", "not a valid version"),
        ("1.\u0662.3", "not a valid version"),
        ("1.2.3po\u017ft1", "not a valid version"),
        ("1.0 ", "not a valid version"),
        ("", "not a valid version"),
    ],
)
def test_versions_that_others_would_read_differently_are_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidReference, match=says):
        parse_version(text)


@pytest.mark.parametrize(
    "text", ["org/name>=1.\u0662", "org/name>=" + "9" * 62, "org/name==1.0+local", "org/name<1.0-1"]
)
def test_a_range_holds_versions_that_can_exist(text: str) -> None:
    with pytest.raises(InvalidReference):
        Reference.parse(text)


@given(st.text(alphabet="0123456789.abcrpostdev!-_+v \u0661", max_size=70))
def test_every_version_that_is_taken_is_found_again(text: str) -> None:
    try:
        version = parse_version(text)
    except InvalidReference:
        return
    assert versions_in([tag_of(version)]) == {version: tag_of(version)}
    assert parse_version(version_text(version)) == version


@pytest.mark.parametrize("part", ["patch", "minor", "major"])
def test_counting_stops_where_no_version_is_left(part: str) -> None:
    most = "9" * 18
    with pytest.raises(InvalidReference, match="more than 18 digits"):
        bumped(Version(f"{most}.{most}.{most}"), part)
