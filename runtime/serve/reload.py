"""A zoo that changed on disk, taken over by engines that run.

What needs no engine of its own is served at once: LoRAs over chains that are loaded, where their spans take
adapters on those projections, and models whose chain is loaded already. Engines, pools and cached KV are not
touched. Chains are only ever added, so requests under way keep theirs: a model that was removed or replaced
is no longer found by name, while its requests go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from blockzoo.runtime.exec.segments import Variant, layer_keys, steps
from blockzoo.runtime.exec.topology import ChainPlan, Topology
from blockzoo.runtime.kv.sequence import Segment
from blockzoo.runtime.serve.loading import LoadedModel, LoadedZoo
from blockzoo.runtime.serve.model_files import reason
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.errors import StoreError, ZooError
from blockzoo.zoo.generation_defaults import sampling_defaults
from blockzoo.zoo.manifest import Manifest, ModelRecord
from blockzoo.zoo.store import Zoo


class RestartNeededError(ValueError):
    """A model cannot be served by the engines that are loaded; the message says why."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload found changed in the zoo.

    Attributes:
        added, replaced, removed: names of models, sorted. Requests to a model that was replaced or removed
            end as they would have.
        waiting: models of the zoo that are served after a restart only, and why; where there is an older one
            of the name, it is served until then.
        left_out: models of the zoo that cannot be served as they are, and why; with older ones as above.
    """

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


class ServedZoo:
    """The zoo that an engine serves, and the one owner of what changes in it.

    Args:
        zoo: as it was loaded.
        loaded: from it.

    Attributes:
        current: what is served now. It is replaced whole, so whoever reads it once sees one state.
    """

    def __init__(self, zoo: Zoo, loaded: LoadedZoo) -> None:
        self.current = loaded
        self._path = zoo.path
        self._served = {name: zoo.manifest.models[name] for name in loaded.models}
        self._left_out = {name: zoo.manifest.models[name] for name in loaded.left_out}
        # of every chain that was ever loaded, what its models have in common
        self._of_chain: dict[int, LoadedModel] = {m.chain_index: m for m in loaded.models.values()}
        self._adapters = dict(zoo.manifest.adapters)
        self._tokenizers = {zoo.tokenizer_dir(name): m.tokenizer for name, m in loaded.models.items()}
        self._lock = Lock()
        self._num_begun = 0
        self._last: Reloaded | Exception = Reloaded()  # what the latest reload came to

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
            if isinstance(self._last, Exception):
                raise self._last
            return self._last

    def _reload(self) -> Reloaded:
        loaded, zoo = self.current, Zoo.open(self._path)
        if not zoo.manifest.models:
            raise StoreError(f"{zoo.path} holds no models any more; what was loaded is still served")
        models, waiting, left_out = dict(loaded.models), {}, {}
        changed = [n for n, r in zoo.manifest.models.items() if not _same(r, self._served.get(n))]
        removed = sorted(models.keys() - zoo.manifest.models.keys())
        topology = loaded.topology
        self._adapters |= zoo.manifest.adapters  # those of models that are gone may be in use still
        manifest = replace(zoo.manifest, adapters=dict(self._adapters))
        loaded.adapters.read = Zoo(zoo.path, manifest).read_adapter
        for name in changed:
            record = zoo.manifest.models[name]
            known = _same(record, self._left_out.get(name))
            if known and name in loaded.unsound:  # it would not become better by joining now
                left_out[name] = loaded.left_out[name]
                continue
            try:
                index, joined = join(topology, record, zoo.manifest)
                for adapter_id in record.adapters.values():
                    zoo.read_adapter(adapter_id).drop_pages()
                tokenizer = self._tokenizer(zoo.tokenizer_dir(name))
            except RestartNeededError as error:
                if known:
                    left_out[name] = loaded.left_out[name]
                else:
                    waiting[name] = str(error)
                continue
            except ZooError as error:
                left_out[name] = reason(error, zoo.path)
                continue
            topology = joined
            twin = self._of_chain[_first_of(topology, index)]
            models[name] = replace(
                twin,
                name=name,
                chain_index=index,
                chain=topology.chains[index],
                tokenizer=tokenizer,
                eos_token_ids=record.end_ids,
                generation_defaults=sampling_defaults(record.generation_defaults),
                max_len=min(twin.max_len, record.config.max_length),
            )
        return self._commit(zoo, topology, models, removed, waiting, left_out)

    def _tokenizer(self, folder: Path) -> Tokenizer:
        if folder not in self._tokenizers:
            self._tokenizers[folder] = Tokenizer.load(folder)
        return self._tokenizers[folder]

    def _commit(
        self,
        zoo: Zoo,
        topology: Topology,
        models: dict[str, LoadedModel],
        removed: list[str],
        waiting: dict[str, str],
        left_out: dict[str, str],
    ) -> Reloaded:
        loaded = self.current
        for index in range(len(loaded.topology.chains), len(topology.chains)):
            for executor in loaded.executors.values():
                added = executor.add_chain(topology.chains[index], _first_of(topology, index))
                assert added == index, f"chain {index} of the topology is number {added} of an executor"
        joined = {n for n, model in models.items() if loaded.models.get(n) is not model}
        for name in removed:
            del models[name]
            del self._served[name]
        self._left_out = {name: zoo.manifest.models[name] for name in left_out}
        self._served |= {name: zoo.manifest.models[name] for name in joined}
        self.current = replace(loaded, models=models, topology=topology, left_out=left_out)
        return Reloaded(
            tuple(sorted(joined - loaded.models.keys())),
            tuple(sorted(joined & loaded.models.keys())),
            tuple(removed),
            waiting,
            left_out,
        )


def join(topology: Topology, model: ModelRecord, manifest: Manifest) -> tuple[int, Topology]:
    """The model's chain index, and the topology with its chain in it.

    Segments of the chains there stay as they are; the new chain shares those that it has whole, and has the
    layers above to itself.

    Raises:
        RestartNeededError: its chain is not loaded, or not with adapters where it has some.
    """
    variant = Variant(model.chain, tuple(sorted(model.adapters.items())))
    alike = [i for i, chain in enumerate(topology.chains) if topology.chain_ids(chain) == model.chain]
    if not alike:
        loaded = {i for span in topology.spans for i in span.block_ids}
        own = sum(block_id not in loaded for block_id in model.chain[1:])
        what = f"{own} of its {len(model.chain)} blocks are" if own else "its chain of blocks is"
        raise RestartNeededError(f"{what} not loaded")
    for index in alike:
        if topology.chains[index].adapters == variant.adapters:
            return index, topology
    _check_adapters(topology, topology.chains[alike[0]], variant, manifest)
    keys = layer_keys(variant, manifest.blocks)
    best, shared = topology.chains[alike[0]], 0
    for index in alike:
        chain = topology.chains[index]
        theirs = layer_keys(Variant(model.chain, chain.adapters), manifest.blocks)
        count = sum(keys[s.end_layer - 1] == theirs[s.end_layer - 1] for s in chain.segments)
        if count > shared:
            best, shared = chain, count
    segments, entries = list(best.segments[:shared]), list(best.entries[:shared])
    if shared < len(best.segments):
        key = hashlib.sha256("\n".join(["layers of", *steps(variant)]).encode()).hexdigest()
        segments.append(Segment(best.segments[shared].first_layer, best.num_layers, key))
        entries.append(0)
    chain = replace(best, adapters=variant.adapters, segments=tuple(segments), entries=tuple(entries))
    return len(topology.chains), replace(topology, chains=(*topology.chains, chain))


def _check_adapters(topology: Topology, chain: ChainPlan, variant: Variant, manifest: Manifest) -> None:
    taken = {use.position + i: names for use in chain.uses for i, names in topology.spans[use.span].lora}
    missing = {
        lora.projection
        for position, key in variant.adapters
        for lora in manifest.adapters[key].spec.loras
        if lora.projection not in taken.get(position, ())
    }
    if missing:
        raise RestartNeededError(
            f"its base is loaded without inputs for LoRAs on {', '.join(sorted(missing))} (see enable_lora)"
        )


def _first_of(topology: Topology, index: int) -> int:
    """The first chain of the same blocks: one that was loaded from the start."""
    uses, embed = topology.chains[index].uses, topology.chains[index].embed_id
    return next(i for i, c in enumerate(topology.chains) if (c.uses, c.embed_id) == (uses, embed))


def _same(one: ModelRecord, other: ModelRecord | None) -> bool:
    def content(record: ModelRecord) -> object:
        text = record.tokenizer, record.end_ids, record.generation_defaults
        return record.config, record.chain, record.adapters, text

    return other is not None and content(one) == content(other)
