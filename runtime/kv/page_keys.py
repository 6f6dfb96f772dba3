"""The keys of pages: who reads whose KV.

scope -> root key -> page key -> page key -> ...               a scope's own pages
PUBLIC_ROOT ------> page key -> page key                       what an operator published, for every scope
                                   \\-> branch key -> page key  a scope's own pages behind it
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

# Keyed per process, so that no tenant can look for collisions offline; so keys are never stored.
_HASH_KEY = os.urandom(16)


def _hash(person: bytes, data: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=_HASH_KEY, person=person).digest()


PUBLIC_ROOT = _hash(b"published")
"""The key before the first page of what is published; that of no scope, whatever its name."""


def root_key(scope: str) -> bytes:
    """The key before the first page: what keeps scopes apart."""
    return _hash(b"scope", scope.encode("utf-8", "surrogatepass"))


def branch_key(root: bytes, published: bytes) -> bytes:
    """The key before the first page of a scope's own behind published ones: what keeps scopes apart there."""
    return _hash(b"branch", root + published)


def page_key(parent: bytes, token_ids: np.ndarray) -> bytes:
    """The key of a full page, so of all tokens up to its end. `token_ids` int32 [32]."""
    return _hash(b"page", parent + token_ids.tobytes())
