"""The fine-tunes compiled by the command: all into one zoo, and each into one of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.finetunes import BASE, MODELS, FineTunes

THRESHOLD = 0.98
"""Of `--share equivalent`, for the lightly tuned models."""


class Zoos:
    """The zoos that are compared: of all models, and of each alone."""

    def __init__(self, models: FineTunes) -> None:
        self.models = models
        self.path = models.path / "zoos"
        self.all, self.distinct = self.path / "all", self.path / "distinct"

    def alone(self, name: str) -> Path:
        """The zoo of one model (of a LoRA: with its base)."""
        return self.path / "alone" / name

    def compile_all(self) -> dict[str, Any]:
        """Make them anew, by the command; seconds of each run, and what they say of sharing."""
        shutil.rmtree(self.path, ignore_errors=True)
        light = self.models.of_kind("light")
        others = [name for name in self.models.names if name not in light]
        separate = {}
        for name in self.models.names:
            needed = [BASE] if MODELS[name].kind == "lora" else []
            separate[name] = self._compile(self.alone(name), [*needed, name])[0]
        first, _ = self._compile(self.all, others)
        shutil.copytree(self.all, self.distinct)
        shared, report = self._compile(
            self.all, light, "--share", "equivalent", "--threshold", str(THRESHOLD)
        )
        unshared, _ = self._compile(self.distinct, light)
        facts = {
            "one_zoo_s": first + shared,
            "one_zoo_without_equivalence_s": first + unshared,
            "separate_s": sum(separate.values()),
            "separate_by_model_s": separate,
            "one_zoo_to_separate": (first + shared) / sum(separate.values()),
        }
        return facts | {"equivalent_blocks": self._equivalent(report)}

    def _compile(self, zoo: Path, names: Sequence[str], *options: str) -> tuple[float, dict[str, Any]]:
        command = [str(Path(sys.executable).parent / "zoo-compile"), "--json", "-o", str(zoo), *options]
        command += [f"{name}={self.models.source(name)}" for name in names]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return time.perf_counter() - start, json.loads(done.stdout)

    @staticmethod
    def _equivalent(report: dict[str, Any]) -> dict[str, Any]:
        """Of the lightly tuned models: blocks reused, of how many, and what is said of it."""
        return {
            model["name"]: {key: model[key] for key in ("num_blocks", "num_reused", "new_bytes", "notes")}
            for model in report["models"]
        }

    def disk(self) -> dict[str, Any]:
        """Bytes of the zoos and of the folders."""
        given = {name: _folder_bytes(self.models.folder(name)) for name in self.models.names}
        full = sum(max(size, given[BASE]) for size in given.values())
        facts: dict[str, Any] = {"as_given": sum(given.values()), "full_checkpoints": full}
        for label, zoo in (("zoo", self.all), ("zoo_without_equivalence", self.distinct)):
            size = _folder_bytes(zoo)
            facts[label] = size
            facts[f"{label}_to_given"] = size / facts["as_given"]
            facts[f"{label}_to_full_checkpoints"] = size / full
        return facts


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
