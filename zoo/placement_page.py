"""A placement in words, as data, and as one self-contained page that `page/placement.js` draws: a box for
each worker with the spans that it holds, and each model's way through them."""

import html
import json
from typing import Any

from blockzoo.zoo.cluster import ZooTask
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.placement import Plan
from blockzoo.zoo.sharing_page import SCRIPT, STYLES
from blockzoo.zoo.summary import human_bytes
from blockzoo.zoo.web_page import assemble, part

_GOLDEN_ANGLE, _TRUNK = 137.508, 205.0  # degrees
_PACKAGE = "blockzoo.zoo"


def placement_page(manifest: Manifest, placed: ZooTask, plan: Plan, title: str) -> str:
    """The page; it loads nothing from elsewhere."""
    scripts = [SCRIPT, part(_PACKAGE, "placement.js")]
    styles = [STYLES[0], part(_PACKAGE, "placement.css")]
    page, policy = assemble(part(_PACKAGE, "placement.html"), styles, scripts)
    data = json.dumps(placement_data(manifest, placed, plan), ensure_ascii=False).replace("<", "\\u003c")
    for place, text in (("TITLE", html.escape(title)), ("POLICY", policy), ("DATA", data)):
        page = page.replace(f"<!--{place}-->", text)
    return page


def placement_data(manifest: Manifest, placed: ZooTask, plan: Plan) -> dict[str, Any]:
    """What is printed as JSON and drawn; spans, workers and models refer to each other by name."""
    task = placed.task
    names = [worker.name for worker in placed.cluster.workers]
    users = {span: [n for n, chain in task.chains.items() if span in chain.spans] for span in task.spans}
    spans = {
        span: {
            "what": _what(manifest, placed, span),
            "num_bytes": record.num_bytes,
            "size": human_bytes(record.num_bytes),
            "token_us": round(record.seconds * 1e6, 1),
            "call_us": round(record.call_seconds * 1e6, 1),
            "blocks": list(placed.blocks[span]),
            "models": users[span],
            "workers": [names[worker] for worker in sorted(plan.homes.get(span, ()))],
            "colour": _colour(number, len(users[span]), len(task.chains)),
        }
        for number, (span, record) in enumerate(task.spans.items())
    }
    workers = []
    for number, (worker, record) in enumerate(zip(task.workers, placed.cluster.workers, strict=True)):
        held = [span for span, places in plan.homes.items() if number in places]
        held.sort(key=lambda span: -task.spans[span].num_bytes)
        used = sum(task.spans[span].num_bytes for span in held)
        workers.append(
            {
                "name": record.name,
                "speed": record.speed,
                "num_bytes": worker.num_bytes,
                "used_bytes": used,
                "said": f"{human_bytes(used)} of {human_bytes(worker.num_bytes)}",
                "busy": round(plan.loads[number], 4),
                "tokens": round(plan.tokens[number], 3),
                "spans": held,
                "is_head": number == task.head,
            }
        )
    models = {
        name: {
            "tokens_per_s": float(f"{chain.rate:.4g}"),
            "route": [[span, names[at]] for span, at in zip(chain.spans, plan.routes[name], strict=True)],
        }
        for name, chain in task.chains.items()
    }
    return {"said": said(placed, plan), "workers": workers, "spans": spans, "models": models}


def said(placed: ZooTask, plan: Plan) -> list[str]:
    """A placement in some sentences."""
    task = placed.task
    once = sum(span.num_bytes for span in task.spans.values())
    held = sum(task.spans[span].num_bytes * len(places) for span, places in plan.homes.items())
    twice = [span for span, places in plan.homes.items() if len(places) > 1]
    copies = f"{', '.join(twice)} on several workers" if twice else "each on one worker"
    lines = [
        f"{len(task.chains)} models in {len(task.spans)} spans, {human_bytes(once)}; "
        f"{human_bytes(held)} are held by {len(task.workers)} workers, {copies}",
        f"{sum(plan.tokens) + plan.wire:.3g} tokens are under way on average, {plan.wire:.2g} of them on "
        "wires",
    ]
    if placed.even_rates:
        lines.append("no rates were given: all models are taken to be asked alike, workers to be half busy")
    if not placed.timed:
        lines.append("blocks without measured times are taken to be read at 10 GB/s")
    lines.append(
        "embeddings are looked up beside the scheduler; adapters and KV come on top of what is shown"
    )
    return lines


def _what(manifest: Manifest, placed: ZooTask, span: str) -> str:
    """Which part of its models a span is."""
    blocks = placed.blocks[span]
    model = next(m for m in manifest.models.values() if blocks[0] in m.chain)
    first = model.chain.index(blocks[0])
    kinds = [manifest.blocks[block].spec.kind for block in blocks]
    layers = [(first + i - 1) // 2 for i, kind in enumerate(kinds) if kind != "head"]
    parts = []
    if layers:
        parts.append(
            f"layer {layers[0]}" if layers[0] == layers[-1] else f"layers {layers[0]} to {layers[-1]}"
        )
        if kinds[0] == "ffn":
            parts[0] += " (from its feed-forward on)" if len(kinds) > 1 else " (feed-forward)"
        elif len([kind for kind in kinds if kind != "head"]) % 2:
            parts[0] += " (without its feed-forward)" if len(layers) > 1 else " (attention)"
    if kinds[-1] == "head":
        parts.append("head")
    return ", ".join(parts)


def _colour(number: int, users: int, models: int) -> str:
    """What most models use is blue, as in the sharing map."""
    if users > 1 and 2 * users >= models:
        depth = users / models
        return f"hsl({_TRUNK:.0f} {38 + 22 * depth:.0f}% {58 - 12 * depth + number % 3 * 5:.0f}%)"
    return f"hsl({(_TRUNK + _GOLDEN_ANGLE * (1 + number)) % 360:.0f} 52% 58%)"
