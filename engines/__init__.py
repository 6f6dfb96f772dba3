"""Engines: loaded, runnable blocks. One protocol (`base`), one sub-package a maker."""
