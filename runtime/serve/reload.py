"""A zoo that changed on disk, taken over by engines that run.

    read what came -> plan -> compile what is new -> change over between two steps -> let go of what was

Models that come are planned together with all that are served, also those that go: their requests end as they
would have, so until then their engines stay. Then the zoo is planned again without them (`settle`). Engines
of spans that are the same before and after are taken over as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING

from blockzoo.engines.base import activation_dtype
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.adapters import AdapterUnavailableError
from blockzoo.runtime.exec.segments import Variant
from blockzoo.runtime.exec.topology import Copy, Family, Topology, with_copies
from blockzoo.runtime.serve.change_over import NoRoomError, StillUsedError
from blockzoo.runtime.serve.loaded import LoadedZoo, UnsoundError
from blockzoo.runtime.serve.making import Making, check_all
from blockzoo.runtime.serve.memory import engine_bytes
from blockzoo.runtime.serve.model_files import ModelFiles, reason
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.available_memory import available_memory
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.errors import StoreError, ZooError
from blockzoo.zoo.manifest import Manifest, ModelRecord
from blockzoo.zoo.store import Zoo

if TYPE_CHECKING:
    from blockzoo.runtime.serve.over_workers import Workers

_LOG = logging.getLogger(__name__)
_STILL_USED = (
    "requests to models that were removed or replaced are under way; over workers, the change of the zoo "
    "waits until they have ended"
)
_RETRY_S = 30.0  # after a settling that could not be done


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload found changed in the zoo.

    Attributes:
        added, replaced, removed: names of models, sorted. Requests to a model that was replaced or removed
            end as they would have.
        waiting: models of the zoo for which there is no memory now, and why; where there is an older one of
            the name, it is served meanwhile. The next reload tries them again.
        left_out: models of the zoo that cannot be served as they are, and why; with older ones as above.
    """

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Found:
    """What a reload makes of the models that changed, as it goes on."""

    coming: dict[str, ModelRecord] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unsound: set[str] = field(default_factory=set)


class ServedZoo:
    """The zoo that an engine serves, and the one owner of what changes in it.

    Args:
        zoo: as it was loaded.
        make: made it, and makes what follows.
        loaded: from it.
        change: (old, new, take) puts a loaded zoo in the place of another between two steps, and hands what
            is loaded then to `take`; raises as `change_over`.
        in_use: what stands for the chains (`ChainPlan.key`) that requests and documents use.

    Attributes:
        current: what is served now. It is replaced whole, so whoever reads it once sees one state.
    """

    def __init__(
        self,
        zoo: Zoo,
        make: Making,
        loaded: LoadedZoo,
        change: Callable[[LoadedZoo, LoadedZoo, Callable[[LoadedZoo], None]], None],
        in_use: Callable[[], Collection[str]],
    ) -> None:
        self.current = loaded
        self._path, self._make, self._change, self._in_use = zoo.path, make, change, in_use
        self._left_out = {name: zoo.manifest.models[name] for name in loaded.left_out}
        self._tokenizers = {zoo.tokenizer_dir(name): m.tokenizer for name, m in loaded.models.items()}
        self._lock = Lock()
        self._num_begun = self._num_gone = 0
        self._last: Reloaded | Exception = Reloaded()  # what the latest reload came to
        self._settle_after = 0.0

    def reload(self) -> Reloaded:
        """Take over what has changed on disk; thread-safe.

        Who asks while a reload runs waits for the next one, which serves all who wait.

        Raises:
            ManifestError, StoreError: the zoo cannot be read; nothing has changed.
        """
        seen = self._num_begun
        with self._lock:
            if self._num_begun <= seen:  # none that began after this was asked for
                self._num_begun += 1
                try:
                    self._last = self._reload()
                except Exception as error:
                    self._last = error
                else:
                    self._try_to_settle()
            if isinstance(self._last, Exception):
                raise self._last
            return self._last

    # ---- models come

    def _reload(self) -> Reloaded:
        before, zoo = self.current, Zoo.open(self._path)
        if not zoo.manifest.models:
            raise StoreError(f"{zoo.path} holds no models any more; what was loaded is still served")
        files = ModelFiles(zoo, before.blocks, before.manifest, self._make.with_surrogates)
        found = self._find(zoo, files)
        self._make.maker.follow(zoo)
        self._serve(zoo, files, found)
        self._left_out = {name: zoo.manifest.models[name] for name in found.left_out}
        unsound = frozenset(found.unsound)
        self.current = after = replace(self.current, left_out=found.left_out, unsound=unsound)
        joined = {name for name in found.coming if name in after.models}
        return Reloaded(
            tuple(sorted(joined - before.models.keys())),
            tuple(sorted(joined & before.models.keys())),
            tuple(sorted(before.models.keys() - zoo.manifest.models.keys())),
            found.waiting,
            found.left_out,
        )

    def _find(self, zoo: Zoo, files: ModelFiles) -> _Found:
        """The models that are not served as they are in the zoo, and what is wrong with their files."""
        before, found = self.current, _Found()
        for name, record in zoo.manifest.models.items():
            if name in before.models and _same(record, before.manifest.models[name]):
                continue
            if name in before.unsound and _same(record, self._left_out.get(name)):
                found.left_out[name] = before.left_out[name]  # it would not become better by joining now
                found.unsound.add(name)
                continue
            error = files.damage(name)
            if error is None:
                found.coming[name] = record
            else:
                found.left_out[name] = reason(error, zoo.path)
        return found

    def _serve(self, zoo: Zoo, files: ModelFiles, found: _Found) -> None:
        """Change over to a zoo with what comes, and without what went, of which the engines stay; models that
        cannot come are moved from `found.coming` to where they belong."""
        before = self.current
        engines = dict(before.engines)
        tokenizers = {name: model.tokenizer for name, model in before.models.items()}
        while True:
            self._leave_waiting(before, zoo, files, found)
            if not found.coming and before.models.keys() <= zoo.manifest.models.keys():
                break
            manifest, gone = self._union(before, zoo.manifest, found.coming)
            topology = self._make.plan(manifest, before.topology.spans)
            self._check_unused(before, topology)
            tokenizers |= {name: self._tokenizer(zoo, files, name) for name in found.coming}
            try:
                self._make.compile(topology, engines, files.block, runs_once=True)
                self._make.adapters.read = Zoo(zoo.path, manifest).read_adapter
                new = self._make.put_together(
                    manifest, gone, topology, engines, files.blocks, tokenizers, before
                )
                self._change_to(new)
                break
            except UnsoundError as error:
                # what fails in the spans of others does so since they are cut for those that come
                guilty = error.models.keys() & found.coming.keys() or set(found.coming)
                if not guilty:
                    raise
                for name in guilty:
                    del found.coming[name]
                    why = error.models.get(name) or next(iter(error.models.values()))
                    found.left_out[name] = reason(why, zoo.path)
                    if name in error.models and not isinstance(why, (ZooError, AdapterUnavailableError)):
                        found.unsound.add(name)  # no file that could be mended
            except NoRoomError as error:
                for name, family in self._families(topology).items():
                    if family in error.families and name in found.coming:
                        del found.coming[name]
                        found.waiting[name] = str(error)
            except StillUsedError:  # a request came meanwhile, as `_check_unused` had seen
                raise InvalidRequestError(_STILL_USED) from None
        files.drop_pages()

    def _union(
        self, before: LoadedZoo, manifest: Manifest, coming: Mapping[str, ModelRecord]
    ) -> tuple[Manifest, frozenset[str]]:
        """A manifest of the models that are served then, and of those whose requests may be under way."""
        models = {
            name: record
            for name, record in before.manifest.models.items()
            if name in before.models and name in manifest.models
        } | dict(coming)
        variants = {_variant(record) for record in models.values()}
        gone = set()
        # workers read the files anew, and of models that went there are none
        before_models = before.manifest.models.values() if before.workers is None else ()
        for record in before_models:
            if _variant(record) not in variants:
                variants.add(_variant(record))
                self._num_gone += 1
                name = f"#{self._num_gone}"  # no name of a model
                models[name] = record
                gone.add(name)
        return _manifest_of(models, before.manifest, manifest), frozenset(gone)

    def _check_unused(self, before: LoadedZoo, topology: Topology) -> None:
        """Raise where workers are to lose a chain that is in use."""
        going = before.chain_index.keys() - {chain.key for chain in topology.chains}
        if going & set(self._in_use()):
            raise InvalidRequestError(_STILL_USED)

    def _leave_waiting(self, before: LoadedZoo, zoo: Zoo, files: ModelFiles, found: _Found) -> None:
        """Move the models to `found.waiting` that would take more memory than there is."""
        accepted: dict[str, ModelRecord] = {}
        if self._what_lacks(before, zoo, files, found.coming) is None:
            return
        for name in sorted(found.coming):
            why = self._what_lacks(before, zoo, files, {**accepted, name: found.coming[name]})
            if why is None:
                accepted[name] = found.coming[name]
            else:
                found.waiting[name] = why
        found.coming = accepted

    def _what_lacks(
        self, before: LoadedZoo, zoo: Zoo, files: ModelFiles, coming: Mapping[str, ModelRecord]
    ) -> str | None:
        """Why so many models cannot come together; None where they can."""
        topology = self._make.plan(self._union(before, zoo.manifest, coming)[0], before.topology.spans)
        lacking = self._lacking_memory(before, topology, files.blocks)
        if lacking is not None:
            return lacking
        if {chain.family for chain in topology.chains} <= before.caches.keys():
            return None
        if not self._make.maker.arrays.is_lazy:
            return (
                "it needs a KV pool of its own (it has another hidden size, number of KV heads or head size "
                "than those served), and this backend divides its memory at the start only: restart"
            )
        try:
            self._make.pages(topology, before)
        except InvalidRequestError as error:
            return str(error)
        return None

    def _lacking_memory(
        self, before: LoadedZoo, topology: Topology, blocks: Mapping[str, Block]
    ) -> str | None:
        """Why there is too little memory for the engines that are not there yet, beside those that are."""
        if not self._make.maker.arrays.is_lazy:  # not in this machine's memory
            return None
        size = activation_dtype(self._make.maker.precision).itemsize
        spans = [span for span in topology.spans if span not in before.engines]
        needs = [engine_bytes((blocks[i] for i in span.block_ids), size) for span in spans]
        # one that is being compiled has its weights twice
        need, available = sum(needs) + max(needs, default=0), available_memory()
        if need <= available:
            return None
        return (
            f"{len(spans)} engines would take about {need >> 20} MiB beside those that run, and "
            f"{available >> 20} MiB of memory are available"
        )

    def _families(self, topology: Topology) -> dict[str, Family]:
        return {name: topology.chains[index].family for name, index in topology.chain_of_model.items()}

    def _tokenizer(self, zoo: Zoo, files: ModelFiles, name: str) -> Tokenizer:
        return self._tokenizers.setdefault(zoo.tokenizer_dir(name), files.tokenizer(name))

    # ---- spans get copies

    def take_copies(self, workers: Workers, copies: Sequence[Copy], homes: Sequence[int]) -> bool:
        """Have workers go over to other copies of spans (`with_copies`), and homes; thread-safe.

        Returns False where other workers serve by now; nothing has changed.
        """
        with self._lock:
            old = self.current
            if old.workers is not workers:
                return False
            topology = with_copies(old.topology, copies, old.manifest.blocks)
            models = {
                name: replace(model, chain=topology.chains[model.chain_index])
                for name, model in old.models.items()
            }

            def take(loaded: LoadedZoo) -> None:
                workers.go_over(homes, topology)
                self.current = loaded

            self._change(old, replace(old, topology=topology, models=models), take)
            return True

    def _change_to(self, new: LoadedZoo) -> None:
        """Change over, and let go of what was. Raises as `change_over`."""
        old = self.current

        def take(loaded: LoadedZoo) -> None:
            self.current = replace(loaded, left_out=old.left_out, unsound=old.unsound)

        if new.workers is not None:
            check_all(new)  # all its engines are new: they are ready before anything waits for them
        try:
            self._change(old, new, take)
        except BaseException:
            new.close_workers()
            raise
        old.close_workers()
        for executor in old.local_executors.values():
            executor.close()
        self._make.maker.arrays.trim()
        used = {id(model.tokenizer) for model in self.current.models.values()}
        self._tokenizers = {f: t for f, t in self._tokenizers.items() if id(t) in used}

    # ---- models have gone

    @property
    def may_settle(self) -> bool:
        """Whether there is something that `settle` could do, and it has not failed just now."""
        return bool(self.current.gone) and time.monotonic() >= self._settle_after

    def settle(self) -> bool:
        """Let go of what only models needed that are gone and whose requests have ended; thread-safe.

        Returns whether anything has changed.
        """
        with self._lock:
            return self._try_to_settle()

    def _try_to_settle(self) -> bool:
        try:
            return self._settle()
        except StillUsedError:  # a request came late
            return False
        except UnsoundError as error:
            problem: Exception = next(iter(error.models.values()))
        except Exception as error:  # what is loaded is served on
            problem = error
        self._put_off(problem)
        return False

    def _put_off(self, problem: object) -> None:
        self._settle_after = time.monotonic() + _RETRY_S
        _LOG.warning("engines of models that are gone are kept for now: %s", problem)

    def _settle(self) -> bool:
        before = self.current
        if not before.gone:
            return False
        in_use = self._in_use()
        keys = {name: before.topology.chains[i].key for name, i in before.topology.chain_of_model.items()}
        gone = frozenset(name for name in before.gone if keys[name] in in_use)
        if gone == before.gone:
            return False
        kept = {n: r for n, r in before.manifest.models.items() if n in before.models or n in gone}
        manifest = _manifest_of(kept, before.manifest)
        topology = self._make.plan(manifest, before.topology.spans)
        lacking = self._lacking_memory(before, topology, before.blocks)
        if lacking is not None:
            self._put_off(lacking)
            return False
        engines = dict(before.engines)
        files = ModelFiles(Zoo.open(self._path), before.blocks, before.manifest)
        tokenizers = {name: model.tokenizer for name, model in before.models.items()}
        self._make.compile(topology, engines, files.block, runs_once=True)
        new = self._make.put_together(manifest, gone, topology, engines, before.blocks, tokenizers, before)
        self._change_to(new)
        files.drop_pages()
        return True


def _manifest_of(models: Mapping[str, ModelRecord], *manifests: Manifest) -> Manifest:
    """A manifest of some models, with what they use of several; of those that have it, the last."""
    blocks = {i: r for manifest in manifests for i, r in manifest.blocks.items()}
    adapters = {i: r for manifest in manifests for i, r in manifest.adapters.items()}
    used = {i for record in models.values() for i in record.block_ids}
    placed = {i for record in models.values() for i in record.adapters.values()}
    return replace(
        manifests[-1],
        models=dict(models),
        blocks={i: record for i, record in blocks.items() if i in used},
        adapters={i: record for i, record in adapters.items() if i in placed},
    )


def _variant(record: ModelRecord) -> Variant:
    return Variant(record.chain, tuple(sorted(record.adapters.items())))


def _same(one: ModelRecord, other: ModelRecord | None) -> bool:
    def content(record: ModelRecord) -> object:
        text = record.tokenizer, record.end_ids, record.generation_defaults
        return record.config, record.chain, record.adapters, record.reuse, record.surrogate, text

    return other is not None and content(one) == content(other)
