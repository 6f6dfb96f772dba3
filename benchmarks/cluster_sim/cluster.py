"""A simulated cluster: lanes whose steps run through spans on workers, and a router that chooses lanes.

A step of a lane runs as a row program does: at each position one call for each span and worker, with the
rows of all applications whose chains use it there; a call starts when its rows have come, and its worker is
free. Hidden states that go to another worker take the link's time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from benchmarks.cluster_sim.devices import Link, Machines, Piece
from benchmarks.cluster_sim.events import Clock, Worker
from benchmarks.cluster_sim.lanes import Lane, Work, work_of
from benchmarks.cluster_sim.traffic import Request
from blockzoo.runtime.serve.scheduler import Scheduled

Coordination = Literal["best", "stay", "move", "anew"]
HEAD_S, HEAD_SEQ_S = 1e-3, 10e-6  # of a step, of a sequence in it: scheduling, sampling, text


class Stage(NamedTuple):
    """A span of a chain, and where it runs."""

    span: str
    worker: int


Route = tuple[Stage, ...]


@dataclass(eq=False, slots=True)
class Place:
    """A lane that serves an application, and the KV bytes of a token there.

    Attributes:
        prefill_s, decode_s: rough seconds that a token of a prompt, and one that is generated, keep it busy.
    """

    lane: Lane
    worker: int
    kv_bytes: int
    prefill_s: float
    decode_s: float


@dataclass(eq=False, slots=True)
class _Call:
    stage: Stage
    apps: list[str]
    missing: int


@dataclass(eq=False, slots=True)
class _Step:
    works: dict[str, Work]
    routes: dict[str, Route]
    calls: dict[tuple[int, Stage, str], _Call]
    left: int
    done: Callable[[], None]
    num_seqs: int


@dataclass(slots=True)
class Cluster:
    """Workers, links, spans and the applications' routes.

    Attributes:
        machines: what there is.
        pieces: by span.
        routes: by lane, those of its applications.
        ended: the same of lanes that get no more requests.
        adapter_bytes: by application, of its adapters on all layers; no entry: none.
        head: the worker beside which heads run; None: each beside its lane's first.
        head_link: beyond that link, instead.
        per_block: one call for all applications that use a span; False: one for each.
    """

    machines: Machines
    pieces: Mapping[str, Piece]
    adapter_bytes: Mapping[str, int] = field(default_factory=dict)
    head: int | None = None
    head_link: Link | None = None
    per_block: bool = True
    clock: Clock = field(default_factory=Clock)
    routes: dict[Lane, Mapping[str, Route]] = field(default_factory=dict)
    ended: dict[Lane, Mapping[str, Route]] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    workers: list[Worker] = field(init=False)
    links: list[list[Link]] = field(init=False)

    def __post_init__(self) -> None:
        self.workers = [Worker(self.clock) for _ in range(self.machines.num_gpus)]
        self.links = self.machines.links()

    # ---- steps

    def run_step(self, lane: Lane, items: Sequence[Scheduled], done: Callable[[], None]) -> None:
        """See `lanes.RunStep`."""
        works: dict[str, Work] = {}
        for item in items:
            app, work = item.seq.model, work_of(item)
            works[app] = works[app] + work if app in works else work
        served = self.routes.get(lane) or self.ended[lane]
        routes = {app: served[app] for app in works}
        calls: dict[tuple[int, Stage, str], _Call] = {}
        for app in sorted(works):
            for position, stage in enumerate(routes[app]):
                call = calls.setdefault(self._key(position, stage, app), _Call(stage, [], 0))
                call.apps.append(app)
                call.missing += 1
        step = _Step(works, routes, calls, len(works), done, len(items))
        at = {stage.worker for route in routes.values() for stage in route}
        if len(at) == 1:
            self._run_in_one(step, at.pop())
            return
        firsts: dict[tuple[int, Stage, str], list[str]] = defaultdict(list)
        for app in works:
            firsts[self._key(0, routes[app][0], app)].append(app)
        for key, apps in firsts.items():
            self.clock.after(self._to_head(key[1].worker), partial(self._arrive, step, key, len(apps)))

    def _key(self, position: int, stage: Stage, app: str) -> tuple[int, Stage, str]:
        return position, stage, "" if self.per_block else app

    def _run_in_one(self, step: _Step, worker: int) -> None:
        """All calls one after the other."""
        seconds, flops = 0.0, 0.0
        for call in step.calls.values():
            took, did = self._cost(step, call)
            seconds, flops = seconds + took, flops + did
        away = 2 * self._to_head(worker) + HEAD_S + HEAD_SEQ_S * step.num_seqs
        self.workers[worker].run(seconds, flops, partial(self.clock.after, away, step.done))

    def _cost(self, step: _Step, call: _Call) -> tuple[float, float]:
        work = step.works[call.apps[0]]
        for app in call.apps[1:]:
            work = work + step.works[app]
        piece = self.pieces[call.stage.span]
        share = piece.layers / piece.shape.layers
        adapters = share * sum(self.adapter_bytes.get(app, 0) for app in call.apps)
        seconds = piece.seconds(
            self.machines.device, work.rows, work.logit_rows, work.attended, work.context, adapters
        )
        return seconds, piece.flops(work.rows, work.logit_rows, work.attended)

    def _arrive(self, step: _Step, key: tuple[int, Stage, str], count: int) -> None:
        call = step.calls[key]
        call.missing -= count
        if call.missing == 0:
            seconds, flops = self._cost(step, call)
            worker = self.workers[call.stage.worker]
            worker.run(seconds, flops, partial(self._finished, step, key))

    def _finished(self, step: _Step, key: tuple[int, Stage, str]) -> None:
        call = step.calls[key]
        onward: dict[tuple[int, Stage, str], list[str]] = defaultdict(list)
        for app in call.apps:
            route = step.routes[app]
            if key[0] + 1 < len(route):
                onward[self._key(key[0] + 1, route[key[0] + 1], app)].append(app)
            else:
                step.left -= 1
        for following, apps in onward.items():
            hidden = self.pieces[call.stage.span].shape.hidden
            rows = sum(step.works[app].rows for app in apps)
            hop = self.links[call.stage.worker][following[1].worker].seconds(2 * hidden * rows)
            self.clock.after(hop, partial(self._arrive, step, following, len(apps)))
        if step.left == 0:
            away = self._to_head(call.stage.worker) + HEAD_S + HEAD_SEQ_S * step.num_seqs
            self.clock.after(away, step.done)

    def _to_head(self, worker: int) -> float:
        """Seconds of a message of ints between the head and a worker."""
        if self.head_link is not None:
            return self.head_link.seconds(0)
        return 0.0 if self.head is None else self.links[self.head][worker].seconds(0)


class Router:
    """Sends requests to lanes, by what they hold and how busy they are.

    Args:
        cluster: with its places.
        coordination: of a session's next turn: "stay" with the lane that has its KV, "move" the KV to the
            least busy one, compute it "anew" there, or what is "best" by estimate.
    """

    def __init__(self, cluster: Cluster, coordination: Coordination = "best") -> None:
        self._cluster, self._coordination = cluster, coordination
        self._owners: dict[int, Place] = {}  # by session
        self.moved_bytes = 0.0

    def submit(self, request: Request) -> None:
        """Send a request where it is to be served."""
        places = self._cluster.places[request.app]
        owner = self._owners.get(request.session)
        if owner is not None and owner not in places:
            owner = None
        if len(places) == 1 or (owner is not None and self._coordination == "stay"):
            self._send(request, owner or places[0], None)
            return
        held = 0 if owner is None else owner.lane.cache.probe(owner.lane.sequence(request))
        if self._coordination == "best":
            place, moves = min(self._choices(request, places, owner, held), key=lambda c: c[0])[1:]
        else:
            place = min(places, key=_backlog)
            moves = self._coordination == "move"
        source = owner if moves and held and owner is not None and place is not owner else None
        self._send(request, place, source, held)

    def _choices(
        self, request: Request, places: Sequence[Place], owner: Place | None, held: int
    ) -> list[tuple[float, Place, bool]]:
        """(seconds, where, whether the KV is moved there)."""
        prompt, found = len(request.tokens), []
        for place in places:
            wait = _backlog(place)
            if place is owner:
                found.append((wait + (prompt - held) * place.prefill_s, place, False))
                continue
            found.append((wait + prompt * place.prefill_s, place, False))
            if held and owner is not None:
                moving = self._link(owner, place).seconds(held * place.kv_bytes)
                found.append((wait + moving + (prompt - held) * place.prefill_s, place, True))
        return found

    def _link(self, owner: Place, place: Place) -> Link:
        return self._cluster.links[owner.worker][place.worker]

    def _send(self, request: Request, place: Place, source: Place | None, held: int = 0) -> None:
        self._owners[request.session] = place
        if source is None:
            place.lane.submit(request)
            return
        size = held * place.kv_bytes
        self.moved_bytes += size

        def arrived() -> None:
            place.lane.take_in(request, held)
            place.lane.submit(request)

        self._cluster.clock.after(self._link(source, place).seconds(size), arrived)


def _backlog(place: Place) -> float:
    """Seconds of work that a lane has, roughly."""
    prompts = sum(len(request.tokens) for request in place.lane.requests.values() if not request.first_token)
    left = sum(len(request.answer) for request in place.lane.requests.values())
    return prompts * place.prefill_s + left * place.decode_s
