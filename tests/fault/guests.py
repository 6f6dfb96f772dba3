"""LoRAs that come, change and go in the zoo of a running server."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file
from traffic import Guest

SEEN_WITHIN_S = 60.0


def zoo_compile(zoo: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blockzoo.build.cli", *arguments, "-o", str(zoo)]
    command += ["--no-verify", "--no-profile"]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=120)


def make_variants(
    lora: Path, folder: Path, strengths: tuple[float, ...] = (-0.8, 0.6, 1.4)
) -> dict[str, Path]:
    """LoRA folders like `lora`, each of another strength, by name."""
    made = {}
    for i, strength in enumerate(strengths):
        made[f"variant{i}"] = Path(shutil.copytree(lora, folder / f"variant{i}"))
        weights = load_file(lora / "adapter_model.safetensors")
        weights |= {k: (v * strength).astype(v.dtype) for k, v in weights.items() if "lora_B" in k}
        save_file(weights, folder / f"variant{i}" / "adapter_model.safetensors", {"format": "pt"})
    return made


class Changes(threading.Thread):
    """Adds, replaces and removes `guests` by zoo-compile, one change at a time.

    Args:
        guests: their state, kept up to date for `Traffic`.
        variants: LoRA folders by name.
    """

    def __init__(
        self, server: Any, zoo: Path, guests: dict[str, Guest], variants: dict[str, Path], every_s: float
    ) -> None:
        super().__init__(daemon=True)
        self.server, self.zoo, self.guests, self.variants = server, zoo, guests, variants
        self.every_s = every_s
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.seconds: list[float] = []
        """From the end of zoo-compile to the change being served."""
        self._draw = random.Random(1)
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(self.every_s):
            try:
                self.change(self._draw.choice(sorted(self.guests)))
            except Exception as error:
                said = getattr(error, "stderr", "")
                self.problems.append(f"{error!r} {said}")
                return

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(SEEN_WITHIN_S + 130)
        assert not self.is_alive()

    def change(self, name: str, new: str | None = None) -> None:
        """To the variant `new`; else to another one, or to none, by chance."""
        old = self.guests[name].variant
        removed = new is None and old is not None and self._draw.random() < 0.5
        kind = "added" if old is None else "removed" if removed else "replaced"
        new = new or self._draw.choice(sorted(self.variants.keys() - {old}))
        self.guests[name] = Guest(old, False)
        before = self._said(f"{kind} {name}")
        if kind == "removed":
            zoo_compile(self.zoo, "--remove", name)
        else:
            zoo_compile(self.zoo, "--replace", f"{name}={self.variants[new]}@base")
        began = time.monotonic()
        self.server.wait_for(lambda: self._said(f"{kind} {name}") > before, SEEN_WITHIN_S)
        if kind != "replaced":  # Triton looks through the repository every second
            self.server.wait_for(
                lambda: self._status(name) == (200 if kind == "added" else 404), SEEN_WITHIN_S
            )
        self.seconds.append(time.monotonic() - began)
        self.guests[name] = Guest(None if kind == "removed" else new, True)
        self.counts[kind] += 1

    def _said(self, message: str) -> int:
        return sum(message in line for line in list(self.server.err))

    def _status(self, name: str) -> int:
        return self.server.post(name, {"text_input": "x", "max_tokens": 1}, timeout=30)[0]
