"""Which models share KV, and in which of their layers, as the router follows it: lanes of a zoo's models."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

from blockzoo.runtime.exec.segments import Variant, plan_segments
from blockzoo.server_config.replicas.prefixes import Lane
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.store import Zoo, manifest_stamp

_MOST_LANES = 8  # of a model: each costs a hash per chunk of a prompt
_LOOK_EVERY_S = 1.0


class Lanes:
    """Of the models of a zoo, read again in a thread when it has changed.

    Args:
        zoo: path; None: every model shares KV with itself alone (`EngineConfig.kv_sharing`).
    """

    def __init__(self, zoo: str | None) -> None:
        self._zoo = None if zoo is None else Path(zoo)
        self._lanes: Mapping[str, tuple[Lane, ...]] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked = float("-inf")
        self._reading: threading.Thread | None = None

    def of(self, model: str) -> tuple[Lane, ...]:
        """A model's; as they were while the zoo is being read."""
        self._look()
        return self._lanes.get(model, (Lane(f"model {model}", 1.0),))

    def read(self) -> None:
        """Read the zoo where it has changed. Raises ZooError where it cannot be read."""
        if self._zoo is None:
            return
        stamp = manifest_stamp(self._zoo)
        if stamp is not None and stamp != self._stamp:
            self._lanes = lanes_of(Zoo.open(self._zoo).manifest)
            self._stamp = stamp

    def _look(self) -> None:
        now = time.monotonic()
        if self._zoo is None or now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        if self._reading is None or not self._reading.is_alive():
            self._reading = threading.Thread(target=self._try, name="blockzoo-lanes", daemon=True)
            self._reading.start()

    def _try(self) -> None:
        try:
            self.read()
        except ZooError:  # the lanes stay as they were: the replicas say what is wrong
            return


def lanes_of(manifest: Manifest) -> dict[str, tuple[Lane, ...]]:
    """The lanes of each model: the layer ranges in which it shares KV with one and the same models."""
    variants = {
        name: Variant(model.chain, tuple(sorted(model.adapters.items())))
        for name, model in manifest.models.items()
    }
    segments = plan_segments(sorted(set(variants.values())), manifest.blocks)
    found = {}
    for name, variant in variants.items():
        ranges, _ = segments[variant]
        layers = ranges[-1].end_layer
        lanes = [Lane(part.key, (part.end_layer - part.first_layer) / layers) for part in ranges]
        if len(lanes) > _MOST_LANES:
            rest = lanes[_MOST_LANES - 1 :]
            lanes[_MOST_LANES - 1 :] = [Lane(rest[-1].key, sum(lane.share for lane in rest))]
        found[name] = tuple(lanes)
    return found
