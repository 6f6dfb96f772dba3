"""Random requests of every kind against a quiet engine, while models, documents and pages come and go.

Exact answers must be those of an engine that caches nothing and runs one request at a time. Approximate ones
too, where all that they take over is computed anew; else they must end as they should.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quiet import Live, Quiet, check_equal, note, params, words

from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.api.errors import RequestError
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.zoo.manifest import Manifest

MODELS = ("base", "solver", "notes", "notes-merged", "base-sharded")


class Fuzz:
    """One engine with random settings, and what is asked of it."""

    def __init__(self, seed: int, zoo: Path, folder: Path, quiet: Quiet) -> None:
        self.draw = random.Random(seed)
        self.quiet, self.zoo = quiet, folder / "zoo"
        shutil.copytree(zoo, self.zoo)
        self.all = Manifest.load(self.zoo / "manifest.json")
        self.names: dict[str, str] = {}
        self.write({name: name for name in MODELS})
        draw = self.draw.choice
        self.full = draw([True, False])  # what approximate requests take over is computed anew
        self.reuse = ReuseConfig(
            selector=draw(["query", "head-of-run", "deviation", "importance*deviation", "random"]),
            recompute=0.999 if self.full else draw([0.0, 0.07, 0.3]),
            edit_recompute=0.999 if self.full else draw([0.0, 0.05, 0.3]),
            refresh=0 if self.full else draw([0, 1, 3, 8]),
            refresh_order=draw(["position", "importance"]),
            rounds=draw([1, 2]),
            unit=draw(["line", "page", "token"]),
            pointed=1.0 if self.full else draw([0.0, 0.07, 1.0]),
            head=draw([0, 4, 16]),
            edit=draw([0, 8, 40]),
        )
        config = EngineConfig(
            precision="f32",
            kv_cache_bytes=draw([3, 4, 6]) << 20,
            kv_sharing=draw(["scope", "scope", "model"]),
            max_num_seqs=draw([4, 8, 16]),
            max_num_batched_tokens=draw([48, 64, 100, 256]),
            approximate=self.reuse,
            published_kv_share=0.3,
            boundary_cache_bytes=draw([0, 1 << 18, 64 << 20]),
            schedule=draw(["hit-first", "fair"]),
            max_span_layers=draw([None, 1, 2]),
            adapter_cache_bytes=draw([1, 256 << 20]),
            enable_lora=True,
        )
        self.engine = LLMEngine(self.zoo, config)
        self.documents = [words(self.draw.randint(20, 260), 100 + i) for i in range(6)]
        self.texts = [self.engine.tokenizer("base").decode(ids) for ids in self.documents]
        self.published: set[int] = set()
        self.live: dict[str, Live] = {}
        self.count = 0
        self.seen: Counter[str] = Counter()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if len(self.live) < 20 and self.draw.random() < 0.5:
                for _ in range(self.draw.randint(1, 4)):
                    self.ask()
            chance = self.draw.random()
            if chance < 0.03:
                self.publish_or_withdraw()
            elif chance < 0.05:
                self.change_models()
            elif chance > 0.97 and self.live:
                name = self.draw.choice(list(self.live))
                self.engine.abort(name)
                del self.live[name]
                self.seen["aborted"] += 1
            self.step()
        while self.engine.has_unfinished():
            self.step()
        assert not self.live
        self.engine.rest()

    def prompt(self) -> list[int]:
        if self.draw.random() < 0.2:
            return words(self.draw.randint(1, 40), self.draw.randint(1, 4))
        parts = [self.draw.choice(self.documents) for _ in range(self.draw.randint(1, 3))]
        cut = self.draw.choice([10000, 10000, self.draw.randint(5, 300)])
        tail = words(self.draw.randint(1, 60), self.draw.choice([1, 2, 3, 1000 + self.count]))
        return [*itertools.chain(*parts)][:cut] + tail

    def ask(self) -> None:
        self.count += 1
        how = self.draw.choice(["exact", "exact", "approx", "off"])
        name = self.draw.choice(list(self.names))
        prompt, num_tokens = self.prompt(), self.draw.choice([1, 3, 12, 40])
        left = max(1, self.engine.max_model_len(name) - len(prompt))  # the pool may be small
        asked = Live(self.names[name], prompt, min(num_tokens, left), how)
        scope = self.draw.choice([None, "a"])
        try:
            self.engine.add_request(
                str(self.count), name, asked.prompt, params(asked.max_tokens), scope=scope, kv_reuse=how
            )
        except RequestError as error:
            self.seen[f"refused: {type(error).__name__}"] += 1
        else:
            self.live[str(self.count)] = asked

    def step(self) -> None:
        for output in self.engine.step():
            live = self.live.get(output.request_id)
            if live is None:
                continue
            if output.error is not None:
                assert "do not fit in the KV cache" in output.error, output.error
                self.seen["too large"] += 1
                del self.live[output.request_id]
                continue
            note(live, output)
            if output.finished:
                self.check(self.live.pop(output.request_id))
        self.engine.check_integrity()

    def check(self, live: Live) -> None:
        self.seen[live.kv_reuse] += 1
        if live.kv_reuse == "approx" and not self.full:
            assert len(live.tokens) == live.max_tokens
            assert np.isfinite(live.logprobs).all()
        else:
            check_equal(live, self.quiet.answer(live))

    def publish_or_withdraw(self) -> None:
        index = self.draw.randrange(len(self.texts))
        try:
            if index in self.published:
                self.engine.withdraw(str(index))
                self.published.discard(index)
            else:
                self.engine.publish(str(index), self.texts[index])
                self.published.add(index)
                self.seen["published"] += 1
        except RequestError:
            self.seen["not published"] += 1

    def change_models(self) -> None:
        """Some go, some come, under new names and old ones."""
        names = self.draw.sample(["base", "one", "two", "three"], self.draw.randint(1, 4))
        self.write({name: self.draw.choice(MODELS) for name in names})
        reloaded = self.engine.reload()
        assert not reloaded.waiting, reloaded.waiting
        assert set(self.engine.models) == set(self.names)
        self.seen["reloaded"] += 1

    def write(self, names: dict[str, str]) -> None:
        models = {name: self.all.models[model] for name, model in names.items()}
        text = replace(self.all, models=models).to_text()
        (self.zoo / "manifest.new").write_text(text)
        (self.zoo / "manifest.new").rename(self.zoo / "manifest.json")
        self.names = names


@pytest.fixture(scope="module")
def quiet(demo_zoo: Path) -> Quiet:
    return Quiet(demo_zoo)


@pytest.mark.parametrize(
    ("seed", "num_steps"),
    [
        (1, 60),
        pytest.param(2, 60, marks=pytest.mark.slow),
        *(pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in range(10, 26)),
    ],
)
def test_answers_do_not_depend_on_what_else_goes_on(
    seed: int, num_steps: int, demo_zoo: Path, tmp_path: Path, quiet: Quiet
) -> None:
    fuzz = Fuzz(seed, demo_zoo, tmp_path, quiet)
    fuzz.run(num_steps)
    assert fuzz.seen["exact"] >= 5, fuzz.seen
    assert fuzz.seen["approx"], fuzz.seen
    assert fuzz.engine.metrics().pages_used == 0
