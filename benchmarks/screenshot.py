"""A picture of a running server's page, with several tenants in the middle of their answers.

    zoo-serve out/demo/zoo --kv-sharing scope
    python -m benchmarks.screenshot http://127.0.0.1:9000/ docs/page.png --ask base notes solver

The page asks the same tenants for some seconds before, so that its figures have something to show.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks.browser import Browser, Tab

PROMPT = "Let a = 3.\nLet b = a + 5.\nQ: In full: b?\nA:"
LONGER = (
    "Note. The baker Tessa owns the jade lamp. It was found at the old mill.\n" * 4 + "Q: Who is Tessa?\nA:"
)
MAX_BYTES = 300_000
_ANSWERS = "[...document.querySelectorAll('#answers pre')].map(e => e.textContent.length)"


def main() -> int:
    """Take it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--ask", nargs="+", metavar="MODEL", help="tenants (default: the page's own choice)")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--warm-up", nargs="+", metavar="PROMPT", default=[PROMPT, LONGER])
    parser.add_argument("--seconds", type=float, default=25.0, help="of warming up")
    parser.add_argument("--characters", type=int, default=150, help="of an answer before the picture")
    parser.add_argument("--width", type=int, default=1280, help="in CSS pixels; up to 600 it is a phone")
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    with Browser() as browser:
        tab = browser.open(args.url, args.width, args.height, args.dark)
        tab.wait_for("!document.getElementById('main').hidden")
        chosen = args.ask or tab.evaluate("[...playground.chosen]")
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            for prompt in args.warm_up:
                ask(tab, chosen, prompt, 64)
                tab.wait_for("!playground.running", 120)
        ask(tab, chosen, args.prompt, 160)
        tab.wait_for(f"!playground.running || {_ANSWERS}.some(length => length >= {args.characters})", 120)
        tab.evaluate("scrollTo(0, 0); document.activeElement.blur()")
        tab.screenshot(args.picture, whole=True)
        for problem in tab.problems:
            print(problem)
    size = args.picture.stat().st_size
    print(f"{args.picture}: {size / 1000:.0f} kB")
    return 0 if size <= MAX_BYTES and not tab.problems else 1


def ask(tab: Tab, models: list[str], prompt: str, max_tokens: int) -> None:
    """Send a prompt to some of the tenants."""
    tab.evaluate(
        "document.querySelectorAll('#choices input').forEach(box => { "
        f"if (box.checked !== {json.dumps(models)}.includes(box.value)) box.click(); }})"
    )
    tab.type("#prompt", prompt)
    tab.type("#max-tokens", str(max_tokens))
    tab.click("#send")


if __name__ == "__main__":
    raise SystemExit(main())
