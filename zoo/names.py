"""Names of models and of what is stored: parts of paths, of URLs, and of a server's model repository."""

import re

RESERVED_NAMES = ("blockzoo", "blockzoo_unary", "preprocessing", "postprocessing")
"""What `zoo-serve` calls its own models on the server, beside those of the zoo."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(text: str) -> bool:
    """Whether a text can be a file name and part of a URL whatever surrounds it."""
    return _NAME.fullmatch(text) is not None
