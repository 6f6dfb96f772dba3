"""The sharing map as one self-contained HTML page: models as rows, layers as columns, a colour per block.

The trunk that most models share is blue; where models leave it, blocks with the same users have the same
hue, so the eye sees which models stand together.
"""

import html
import json
from collections import defaultdict

from blockzoo.zoo.manifest import BlockRecord, Manifest
from blockzoo.zoo.sharing import SharingMap, sharing_map
from blockzoo.zoo.summary import equivalence_text, human_bytes, sharing_bytes, verification_text

_GOLDEN_ANGLE = 137.508
_TRUNK = 205.0  # hue in degrees
_NAMES = {"embed": "embedding", "attn": "attention", "ffn": "feed-forward", "head": "head"}


def sharing_page(manifest: Manifest, title: str) -> str:
    """The page of a zoo; it loads nothing from elsewhere."""
    shared = sharing_map(manifest)
    unshared, stored = sharing_bytes(manifest)
    colours = _colours(shared)
    saved = f"{1 - stored / unshared:.0%}" if unshared else "0%"
    figures = [
        (str(len(manifest.models)), "models"),
        (str(len(manifest.blocks)), "distinct blocks"),
        (human_bytes(stored), f"stored instead of {human_bytes(unshared)}"),
        (saved, "saved by sharing"),
    ]
    details = {block_id: _details(block_id, manifest, shared) for block_id in manifest.blocks}
    return _PAGE.format(
        title=html.escape(title),
        figures="".join(f"<div><b>{value}</b><span>{said}</span></div>" for value, said in figures),
        stored_share=f"{100 * stored / unshared if unshared else 0:.1f}",
        head=_head_row(shared),
        rows="".join(_row(name, manifest, shared, colours) for name in shared.models),
        legend=_legend(manifest, shared, colours),
        replaced=_replaced(manifest, shared),
        details=json.dumps(details).replace("<", "\\u003c"),
    )


def _colours(shared: SharingMap) -> dict[str, str]:
    """Block id -> CSS colour.

    The blocks of the model that shares most are blue, the deeper the more models use them: the common trunk.
    Others have a hue of their set of users. A shade from the id tells neighbours apart.
    """

    def popularity(name: str) -> int:
        return sum(
            len(shared.users[block_id]) for (owner, _, _), block_id in shared.cells.items() if owner == name
        )

    middle = max(shared.models, key=popularity, default="")
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


def _details(block_id: str, manifest: Manifest, shared: SharingMap) -> list[str]:
    record: BlockRecord = manifest.blocks[block_id]
    users = shared.users[block_id]
    by = f"used by {', '.join(users)}" if len(users) > 1 else f"only in {users[0]}"
    times = sorted((record.latency_us or {}).items())
    timed = ", ".join(f"{tokens} tokens {time / 1000:.3g} ms" for tokens, time in times)
    return [
        f"{_NAMES[record.spec.kind]} block {block_id[:12]}",
        f"{human_bytes(record.num_bytes)} {record.dtype}",
        by,
        timed,
    ]


def _head_row(shared: SharingMap) -> str:
    layers = 1 + max((layer for kind, layer in shared.columns if kind == "attn"), default=-1)
    numbers = "".join(
        f"<th>{layer if layer % 4 == 0 or layers <= 16 else ''}</th>" for layer in range(layers)
    )
    return f"<tr><th></th><th>embed</th>{numbers}<th>head</th><th>own / all</th></tr>"


def _row(name: str, manifest: Manifest, shared: SharingMap, colours: dict[str, str]) -> str:
    layers = 1 + max((layer for kind, layer in shared.columns if kind == "attn"), default=-1)

    def tile(kind: str, layer: int) -> str:
        block_id = shared.cells.get((name, kind, layer))
        if block_id is None:
            return "<i></i>"
        own = " class=own" if len(shared.users[block_id]) == 1 else ""
        where = f"{_NAMES[kind]}, layer {layer}" if kind in ("attn", "ffn") else _NAMES[kind]
        return f'<i{own} data-b={block_id} data-w="{where}" style="background:{colours[block_id]}"></i>'

    cells = f"<td>{tile('embed', 0)}</td>"
    cells += "".join(f"<td>{tile('attn', layer)}{tile('ffn', layer)}</td>" for layer in range(layers))
    cells += f"<td>{tile('head', 0)}</td>"
    own, total = shared.own_bytes[name], shared.all_bytes[name]
    record = manifest.models[name]
    checked = verification_text(record.verification) if record.verification else "not verified"
    tip = html.escape(f"{record.config.architecture}; {checked}", quote=True)
    bar = f'<u><s style="width:{100 * own / total:.1f}%"></s></u>'
    size = f"<td class=size>{bar}{human_bytes(own)} / {human_bytes(total)}</td>"
    return f'<tr><th scope=row title="{tip}">{html.escape(name)}</th>{cells}{size}</tr>'


def _legend(manifest: Manifest, shared: SharingMap, colours: dict[str, str]) -> str:
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for block_id, users in shared.users.items():
        groups[users].append(block_id)
    lines = []
    for users, blocks in sorted(groups.items(), key=lambda item: (-len(item[0]), item[0])):
        size = human_bytes(sum(manifest.blocks[block_id].num_bytes for block_id in blocks))
        who = "all models" if len(users) == len(shared.models) > 1 else ", ".join(users)
        who = f"only {who}" if len(users) == 1 else who
        count = f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}"
        swatch = f'<i style="background:{colours[blocks[0]]}"></i>'
        lines.append(f"<li>{swatch}<b>{html.escape(who)}</b> {count}, {size}</li>")
    return "".join(lines)


def _replaced(manifest: Manifest, shared: SharingMap) -> str:
    """What models with other models' blocks in them lose by it."""
    models = [name for name in shared.models if manifest.models[name].equivalence is not None]
    lines = [
        f"<li><b>{html.escape(name)}</b> {html.escape(equivalence_text(manifest.models[name]))}</li>"
        for name in models
    ]
    return f"<ul class=replaced>{''.join(lines)}</ul>" if lines else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: who shares which block</title>
<style>
:root {{ color-scheme: light dark; --paper: #fbfaf7; --ink: #23272e; --soft: #7a7f87; --line: #e4e1d9; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181c; --ink: #e8e6e1; --soft: #8d9299; --line: #2c3037; }}
}}
body {{ margin: 0; padding: 2.5rem clamp(1rem, 4vw, 4rem) 6rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-weight: 600; font-size: 1.7rem; margin: 0 0 1.2rem; }}
h1 small {{ font-weight: 400; font-size: 1rem; color: var(--soft); margin-left: .6rem; }}
.figures {{ display: flex; flex-wrap: wrap; gap: .8rem 2.6rem; }}
.figures b {{ display: block; font-size: 1.6rem; font-weight: 600; }}
.figures span, th, .size, footer {{ color: var(--soft); }}
.stored {{ height: 8px; max-width: 46rem; margin: 1.2rem 0 2.2rem; border-radius: 4px;
  background: var(--line); }}
.stored div {{ height: 100%; border-radius: 4px; background: hsl(205 60% 52%); }}
.map {{ overflow-x: auto; padding-bottom: .5rem; }}
table {{ border-collapse: separate; border-spacing: 3px 7px; }}
th {{ font-weight: 400; font-size: 12px; text-align: center; min-width: 14px; }}
th[scope=row] {{ position: sticky; left: 0; padding-right: .8rem; background: var(--paper); color: var(--ink);
  font-size: 15px; text-align: right; white-space: nowrap; z-index: 1; }}
td {{ padding: 0; height: 38px; }}
td i {{ display: block; width: 26px; height: 18px; margin-bottom: 2px; border-radius: 4px;
  transition: opacity .12s; }}
td:nth-child(2) i, td:nth-last-child(2) i {{ width: 44px; height: 38px; margin: 0; }}
td i.own {{ background-image: repeating-linear-gradient(45deg, #fff5 0 3px, #fff0 3px 7px) !important; }}
.focus td i {{ opacity: .16; }}
.focus td i.lit {{ opacity: 1; box-shadow: 0 0 0 2px var(--paper), 0 0 0 3.5px var(--ink); }}
.size {{ padding-left: .8rem; font-size: 12px; white-space: nowrap; }}
.size u {{ display: block; width: 9rem; height: 6px; margin-bottom: 3px; border-radius: 3px;
  background: hsl(205 45% 60% / .35); text-decoration: none; }}
.size s {{ display: block; height: 100%; border-radius: 3px; background: hsl(22 75% 55%); }}
ul {{ list-style: none; padding: 0; margin: 1.6rem 0; columns: 22rem; color: var(--soft); }}
ul.replaced {{ columns: auto; }}
li {{ break-inside: avoid; margin-bottom: .35rem; }}
li b {{ color: var(--ink); font-weight: 500; }}
li i {{ display: inline-block; width: 14px; height: 14px; margin-right: .5rem; border-radius: 3px;
  vertical-align: -2px; }}
#details {{ position: fixed; left: 0; right: 0; bottom: 0; padding: .8rem clamp(1rem, 4vw, 4rem);
  background: var(--ink); color: var(--paper); transform: translateY(100%); transition: transform .15s; }}
#details.up {{ transform: none; }}
#details span {{ margin-right: 1.6rem; }}
footer {{ font-size: 13px; }}
</style></head><body>
<h1>{title}<small>who shares which block</small></h1>
<div class="figures">{figures}</div>
<div class="stored" title="stored, of what the models would take apart">
<div style="width:{stored_share}%"></div></div>
<div class="map"><table>{head}{rows}</table></div>
<ul>{legend}</ul>{replaced}
<footer>A column is a layer: attention above, feed-forward below. Blue: the common trunk, deeper where more
models share it. Another hue: blocks with the same users. Striped: one model's own.
Point at a block to see where else it is used.</footer>
<div id="details" role="status"></div>
<script>
const blocks = {details}, table = document.querySelector("table"), panel = document.getElementById("details");
table.addEventListener("pointerover", event => {{
  const id = event.target.dataset.b;
  table.classList.toggle("focus", !!id);
  panel.classList.toggle("up", !!id);
  if (!id) return;
  table.querySelectorAll("i").forEach(tile => tile.classList.toggle("lit", tile.dataset.b === id));
  panel.replaceChildren(...[event.target.dataset.w, ...blocks[id]].filter(Boolean).map(text => {{
    const part = document.createElement("span");
    part.textContent = text;
    return part;
  }}));
}});
table.addEventListener("pointerleave", () => {{
  table.classList.remove("focus");
  panel.classList.remove("up");
}});
</script></body></html>
"""
