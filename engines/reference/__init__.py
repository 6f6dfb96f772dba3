"""Reference engines: plain torch, on the CPU or on a GPU. The oracle of the others."""

from blockzoo.engines.reference.engine import ReferenceEngine, ReferenceEngines

__all__ = ["ReferenceEngine", "ReferenceEngines"]
