"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Have glibc return what it keeps of freed memory (milliseconds); nothing under other C libraries."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
