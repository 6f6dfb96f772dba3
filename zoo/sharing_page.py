"""The sharing map as data, and as one self-contained HTML page: models as rows, layers as columns, a colour
per block. `page/sharing.js` draws it, here and on the server's page.

The trunk that most models share is blue; where models leave it, blocks with the same users have the same
hue, so the eye sees which models stand together.
"""

import html
import json
from collections import defaultdict
from typing import Any

from blockzoo.zoo.manifest import Manifest, ModelRecord
from blockzoo.zoo.sharing import SharingMap, sharing_map
from blockzoo.zoo.summary import (
    adapters_text,
    delta_text,
    equivalence_text,
    human_bytes,
    sharing_bytes,
    verification_text,
)
from blockzoo.zoo.web_page import assemble, part

_GOLDEN_ANGLE = 137.508
_TRUNK = 205.0  # hue in degrees
_NAMES = {"embed": "embedding", "attn": "attention", "ffn": "feed-forward", "head": "head"}
_PACKAGE = "blockzoo.zoo"
STYLES = tuple(part(_PACKAGE, name) for name in ("base.css", "sharing.css"))
SCRIPT = part(_PACKAGE, "sharing.js")
"""Of whichever page draws the map."""


def sharing_page(manifest: Manifest, title: str) -> str:
    """The page of a zoo; it loads nothing from elsewhere."""
    page, policy = assemble(part(_PACKAGE, "inspect.html"), STYLES, [SCRIPT, part(_PACKAGE, "inspect.js")])
    data = json.dumps(sharing_data(manifest), ensure_ascii=False).replace("<", "\\u003c")
    for place, text in (("TITLE", html.escape(title)), ("POLICY", policy), ("DATA", data)):
        page = page.replace(f"<!--{place}-->", text)
    return page


def sharing_data(manifest: Manifest) -> dict[str, Any]:
    """What `drawSharing` in page/sharing.js draws. Blocks, groups and models refer to each other by index."""
    shared = sharing_map(manifest)
    unshared, stored = sharing_bytes(manifest)
    colours = _colours(shared)
    index = {block_id: number for number, block_id in enumerate(shared.users)}
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for block_id, users in shared.users.items():
        groups[users].append(block_id)
    by_size = sorted(groups, key=lambda users: (-len(users), users))
    group_of = {users: number for number, users in enumerate(by_size)}
    place = {name: number for number, name in enumerate(shared.models)}
    saved = f"{1 - stored / unshared:.0%}" if unshared else "0%"
    return {
        "said": f"{len(manifest.models)} models, {len(index)} distinct blocks: {human_bytes(stored)} stored "
        f"instead of {human_bytes(unshared)}, {saved} saved",
        "stored_share": round(stored / unshared, 4) if unshared else 0,
        "layers": 1 + max((layer for kind, layer in shared.columns if kind == "attn"), default=-1),
        "models": [_model(name, manifest, shared, index) for name in shared.models],
        "blocks": [
            [block_id[:12], *_block(block_id, manifest), colours[block_id], group_of[users]]
            for block_id, users in shared.users.items()
        ],
        "groups": [
            {"models": [place[name] for name in users], "said": _sizes(groups[users], manifest)}
            for users in by_size
        ],
    }


def _model(name: str, manifest: Manifest, shared: SharingMap, index: dict[str, int]) -> dict[str, Any]:
    record = manifest.models[name]
    own, total = shared.own_bytes[name], shared.all_bytes[name]
    return {
        "name": name,
        "about": _about(name, record, manifest),
        "replaced": None if record.equivalence is None else equivalence_text(record),
        "chain": [index[block_id] for block_id in record.chain],
        "adapters": sorted(record.adapters),
        "own": human_bytes(own),
        "all": human_bytes(total),
        "own_share": round(own / total, 4),
    }


def _about(name: str, record: ModelRecord, manifest: Manifest) -> list[str]:
    """Lines on a model."""
    checked = verification_text(record.verification) if record.verification else "not verified"
    lines = [f"{record.config.architecture}, {checked}"]
    if record.adapters:
        lines.append(adapters_text(manifest, name))
    if record.delta is not None:
        lines.append(delta_text(record))
    return lines


def _block(block_id: str, manifest: Manifest) -> tuple[str, str]:
    """(what kind of block, size and times)."""
    record = manifest.blocks[block_id]
    times = sorted((record.latency_us or {}).items())
    timed = "".join(f", {tokens} tokens {time / 1000:.3g} ms" for tokens, time in times)
    return _NAMES[record.spec.kind], f"{human_bytes(record.num_bytes)} {record.dtype}{timed}"


def _sizes(blocks: list[str], manifest: Manifest) -> str:
    size = human_bytes(sum(manifest.blocks[block_id].num_bytes for block_id in blocks))
    return f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}, {size}"


def _colours(shared: SharingMap) -> dict[str, str]:
    """Block id -> CSS colour.

    The blocks of the model that shares most are blue, the deeper the more models use them: the common trunk.
    Others have a hue of their set of users. A shade from the id tells neighbours apart.
    """
    popularity = dict.fromkeys(shared.models, 0)
    for (name, _, _), block_id in shared.cells.items():
        popularity[name] += len(shared.users[block_id])
    middle = max(popularity, key=popularity.__getitem__, default="")
    trunk = {block_id for (name, _, _), block_id in shared.cells.items() if name == middle}
    hues: dict[tuple[str, ...], float] = {}
    colours = {}
    for block_id, users in shared.users.items():
        shade = int(block_id[:4], 16) / 0xFFFF
        if block_id in trunk and len(users) > 1:
            depth = len(users) / len(shared.models)
            colours[block_id] = f"hsl({_TRUNK:.0f} {38 + 22 * depth:.0f}% {70 - 24 * depth + 5 * shade:.0f}%)"
            continue
        hue = hues.setdefault(users, (_TRUNK + _GOLDEN_ANGLE * (1 + len(hues))) % 360)
        colours[block_id] = f"hsl({hue:.0f} {50 + 10 * shade:.0f}% {54 + 9 * shade:.0f}%)"
    return colours
