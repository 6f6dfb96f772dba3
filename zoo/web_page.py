"""Web pages in one file: style and script inside, and a policy under which nothing else loads or runs."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

_STYLE, _SCRIPT = "/* style */", "/* script */"


def part(package: str, name: str) -> str:
    """The text of a file in the folder `page` of a package."""
    return (files(package) / "page" / name).read_text("utf-8")


def assemble(html: str, styles: Sequence[str], scripts: Sequence[str]) -> tuple[str, str]:
    """A page whose one `<style>` and one `<script>` have all of these in them, and its
    Content-Security-Policy: it may speak to its own server, and makes elements from text by no other way
    than setting text."""
    style, script = "\n".join(styles), "\n".join(scripts)
    for place in (_STYLE, _SCRIPT):
        assert html.count(place) == 1, place
    assert "</script" not in script  # it would end there
    assert "</style" not in style
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    return html.replace(_STYLE, style).replace(_SCRIPT, script), policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
