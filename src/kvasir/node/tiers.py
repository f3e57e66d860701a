"""A worker's tiers: what is copied to them, what comes back, and what they hold now.

What is loaded goes into the device's cache, and the attempt goes on as if it had always been there;
what does not come is computed. So a tier can be wrong, slow or broken, and costs time only.
Knows blocks, keys and attempts; must not know how bytes are kept, or what a step does.

    device --block is full--> Store --Stored--> slot with a name --room is needed--> gone
    queue --admitted--> blocks and Restore --Restored--> run, from the first token that is missing
            '--a shared tier may have it--> Ask --Held--> queue

A tier that all workers share is asked what it holds, each time: others write there, and it evicts
what it likes. When it fails it is tried again later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from kvasir.core.effects import (
    NOWHERE,
    AnyEffect,
    Ask,
    Note,
    Reopen,
    Restore,
    Shelf,
    Store,
    Timer,
)
from kvasir.core.events import (
    AnyEvent,
    Recomputed,
    TierBack,
    TierHit,
    TierOff,
    TierPassed,
    TierStored,
)  # fmt: skip
from kvasir.core.ids import BlockId, BlockKey, RequestId
from kvasir.core.message import Tier
from kvasir.core.tiers import Held, Restored, Stored, TierGone, TierReady
from kvasir.kv.tiers import GivesUp, SharedNames, TierCache, Use, anyone
from kvasir.node.blocks import Blocks
from kvasir.node.config import WorkerConfig
from kvasir.node.work import Stage, Work
from kvasir.policy.evict import RANKS
from kvasir.policy.quota import furthest_over
from kvasir.policy.tiers import (
    Choice,
    Offer,
    Pace,
    PrefillCost,
    TierRule,
    asks,
    assumed,
    choose,
    retry_s,
)  # fmt: skip

BATCH = 32  # blocks of one Store
INFLIGHT = 16  # one block in so many of the pool may be on its way to a tier
RETRY = "tier "  # a timer's name begins so


class Writing(NamedTuple):
    """A `Store` that is under way."""

    keys: tuple[BlockKey, ...]
    blocks: tuple[BlockId, ...]
    slots: tuple[int, ...]


class TierState:
    """One tier. `waiting` blocks are to be copied, in this order, `coming` ones are being copied;
    `expected` bytes are asked for and not here yet."""

    def __init__(self, rule: TierRule, gives_up: GivesUp) -> None:
        self.rule = rule
        self.cache: TierCache | SharedNames
        if rule.shared:
            self.cache = SharedNames(rule.blocks)
        else:
            self.cache = TierCache(rule.blocks, RANKS[rule.evict], gives_up)
        self.found: dict[int, BlockKey] = {}  # what an earlier life left, while it is told
        self.waiting: dict[BlockKey, Use] = {}
        self.coming: dict[BlockKey, Use] = {}
        self.writing: dict[int, Writing] = {}
        self.pace: Pace = assumed(rule.bytes_per_s)
        self.expected = 0
        self.found_share = assumed(1.0)  # of what was asked for
        self.asked = assumed(1 / (rule.latency_s or 1.0))  # answers a second
        self.failures = 0  # on end

    def use(self, key: BlockKey, tick: int) -> bool:
        """Whether it is on its way, and now used once more."""
        use = self.waiting.get(key) or self.coming.get(key)
        if use is not None:
            use.tick, use.floor = tick, self.cache.floor
        return use is not None


class Asking(NamedTuple):
    """An `Ask` that is under way."""

    work: Work
    keys: tuple[BlockKey, ...]


class Reading(NamedTuple):
    """A `Restore` that is under way, behind the first `hits` blocks."""

    work: Work
    hits: int
    shelves: Sequence[Shelf]
    choice: Choice


class Tiers:
    """All tiers of one worker; none until the world says that they are ready."""

    def __init__(
        self, blocks: Blocks, config: WorkerConfig, emit: Callable[[AnyEffect], None]
    ) -> None:
        self.rules = {rule.tier: rule for rule in config.tiers.tiers} if config.tiers else {}
        self.states: dict[Tier, TierState] = {}
        self._starting: dict[Tier, TierState] = {}
        self._failed: set[Tier] = set()
        self._resting: dict[Tier, TierState] = {}  # failed, and tried again later
        self.asking: dict[tuple[RequestId, int], Asking] = {}
        self.reading: dict[tuple[RequestId, int], Reading] = {}
        self._blocks, self._config, self._emit = blocks, config, emit
        weights = dict(config.weights)
        self._gives_up = partial(furthest_over, weights=weights) if blocks.fair else anyone
        self._prefill = assumed(1.0)  # seconds that were predicted, in a second that it took
        self._inflight_max = max(1, config.capacity.kv_blocks // INFLIGHT)
        self._tick = 0
        self._store = 0

    # --- life -------------------------------------------------------------------------------------

    def ready(self, event: TierReady) -> None:
        """A tier works, with what an earlier life left in it."""
        rule = self.rules.get(event.tier)
        if rule is None or event.tier in self.states or event.tier in self._failed:
            return
        if event.tier in self._resting:
            self._note(TierBack(self._config.worker, event.tier))
        state = self._resting.pop(event.tier, None)
        state = state or self._starting.setdefault(event.tier, self._new(rule))
        state.found |= dict(zip(event.slots, event.keys, strict=True))
        if event.last:
            self._starting.pop(event.tier, None)
            if isinstance(state.cache, TierCache):
                state.cache.adopt(state.found)
                self._blocks.below[event.tier] = state.cache.pool
            state.found.clear()
            working = {**self.states, event.tier: state}
            self.states = {tier: working[tier] for tier in self.rules if tier in working}
            self._blocks.used = self.used

    def _new(self, rule: TierRule) -> TierState:
        return TierState(rule, self._gives_up)

    def gone(self, event: TierGone, now: float) -> None:
        """Never again, or not for a while. What it held is computed where it is wanted."""
        rule, rested = self.rules.get(event.tier), event.tier in self._resting
        self._starting.pop(event.tier, None)
        state = self.states.pop(event.tier, None)
        if state is not None:
            for writing in state.writing.values():
                self._blocks.pool.unpin(writing.blocks)
            for kept in (state.writing, state.waiting, state.coming):
                kept.clear()
            state.cache.clear()
        if rule is None or not rule.shared:
            self._failed.add(event.tier)
        else:
            state = state or self._resting.get(event.tier) or self._new(rule)
            self._resting[event.tier] = state
            state.failures += 1
            self._emit(Timer(RETRY + event.tier, now + retry_s(state.failures)))
        if not rested:
            self._note(TierOff(self._config.worker, event.tier, event.reason))

    def alarm(self, name: str) -> None:
        """A tier was left alone long enough."""
        for tier in self._resting:
            if name == RETRY + tier:
                self._emit(Reopen(tier))

    # --- to a tier --------------------------------------------------------------------------------

    def used(self, work: Work, first: int, last: int, *, again: bool = False) -> None:
        """Blocks [first, last) of an attempt were filled, hit (`again`) or let go. Tiers that have
        them keep them longer; those that lack them and want them get them."""
        if not self.states or first >= last:
            return
        self._tick += not first
        tick, keys, owner = self._tick, work.keys, self._blocks.owner(work)
        seconds = self._cost(0, work.known) / max(1, work.known // self._blocks.size)
        for state in self.states.values():
            write = state.rule.write
            wanted = write == "always" or (write == "reused" and again)
            for depth in range(first, last):
                key = keys[depth]
                known = state.cache.touch(key, tick, seconds, again=again, owner=owner)
                if known or state.use(key, tick):
                    continue
                if wanted:
                    state.waiting[key] = Use(
                        depth, tick, seconds, 1 + again, state.cache.floor, owner
                    )

    def write(self) -> None:
        """Start copies, as far as the limit on those under way allows."""
        for state in self.states.values():
            while state.waiting and len(state.coming) < self._inflight_max:
                self._write(state)

    def _write(self, state: TierState) -> None:
        """One batch of waiting blocks. Those are left out that the device has lost meanwhile, or
        that are worth less than all that would have to go for them."""
        pool, most = self._blocks.pool, min(BATCH, self._inflight_max - len(state.coming))
        batch: dict[BlockKey, tuple[BlockId, int]] = {}
        slot: int | None = None
        while state.waiting and len(batch) < most:
            key, use = next(iter(state.waiting.items()))
            del state.waiting[key]
            block = pool.find(key)
            slot = state.cache.reserve(use, slot) if block is not None else None
            if block is not None and slot is not None:
                batch[key] = (block, slot)
                state.coming[key] = use
        if not batch:
            return
        self._store += 1
        blocks, slots = zip(*batch.values(), strict=True)
        writing = state.writing[self._store] = Writing(tuple(batch), blocks, slots)
        pool.pin(blocks)
        self._emit(Store(self._store, state.rule.tier, writing.keys, blocks, slots))

    def stored(self, event: Stored) -> None:
        for state in self.states.values():
            writing = state.writing.pop(event.id, None)
            if writing is None:
                continue
            self._blocks.pool.unpin(writing.blocks)
            uses = [state.coming.pop(key) for key in writing.keys]
            for i in range(event.count):
                state.cache.name(writing.slots[i], writing.keys[i], uses[i])
            state.cache.release(writing.slots)
            if event.count:
                state.failures = 0
                tier, worker = state.rule.tier, self._config.worker
                self._note(TierStored(worker, tier, event.count, event.bytes, event.seconds))

    # --- from a tier ------------------------------------------------------------------------------

    def load(self, work: Work, now: float, iteration_s: float, behind: int) -> bool:
        """Whether an admitted attempt waits for blocks of a tier, which it holds from here on.
        `iteration_s`: what a step that runs when they are here still takes. So many attempts wait
        `behind` it."""
        if not self.states:
            return False
        hits = self._blocks.hits(work)
        if not self._blocks.fits(work, hits):
            return False
        shelves = list(self._shelves(work, len(hits)))
        if self._ask(work, len(hits) + sum(len(shelf.slots) for shelf in shelves), iteration_s):
            return True
        if not shelves:
            return False
        assert self._config.tiers is not None
        rules = self._config.tiers
        offers = list(self._offers(shelves, len(hits)))
        choice = choose(offers, iteration_s, behind=behind, always=rules.always)
        if not choice.offers:
            self._passed(work, offers, choice)
            return False
        chosen = shelves[: choice.offers]
        self._blocks.take(work, hits)
        self._read(work, len(hits), chosen, choice, now + choice.worth_s + rules.wait_s)
        return True

    def _shelves(self, work: Work, first: int) -> Iterator[Shelf]:
        """Where the blocks from `first` on are, each at the fastest tier that has it, up to the
        first that none has."""
        tier, slots = None, list[int]()
        for key in self._usable(work, first):
            at, slot = self._find(key, work.shared or ())
            if at != tier and tier is not None:
                yield Shelf(tier, tuple(slots))
                slots = []
            if at is None:
                return
            tier = at
            slots.append(slot)
        if tier is not None:
            yield Shelf(tier, tuple(slots))

    def _usable(self, work: Work, first: int) -> Sequence[BlockKey]:
        """Keys of whole blocks from `first` on. The last known position is always computed."""
        return work.keys[first : min((work.known - 1) // self._blocks.size, len(work.keys))]

    def _find(self, key: BlockKey, shared: Collection[BlockKey]) -> tuple[Tier | None, int]:
        for tier, state in self.states.items():
            if isinstance(state.cache, SharedNames):
                if key in shared:
                    return tier, NOWHERE
                continue
            slot = state.cache.find(key)
            if slot is not None:
                return tier, slot
        return None, NOWHERE

    def _ask(self, work: Work, first: int, iteration_s: float) -> bool:
        """Whether an attempt waits to hear what the shared tier has from block `first` on: once,
        and where that can pay."""
        state = next((s for s in self.states.values() if s.rule.shared), None)
        if state is None or work.shared is not None:
            return False
        keys, size = tuple(self._usable(work, first)), self._blocks.size
        if not keys:
            return False
        assert self._config.tiers is not None
        load_s = (state.expected + self._blocks.bytes(len(keys))) / state.pace.per_s
        gain_s = self._cost(first * size, len(keys) * size) - load_s - iteration_s
        share = state.found_share.per_s
        if not self._config.tiers.always and not asks(gain_s, 1 / state.asked.per_s, share):
            return False
        work.stage = Stage.ASK
        self.asking[work.id, work.attempt] = Asking(work, keys)
        self._emit(Ask(work.id, work.attempt, state.rule.tier, keys))
        return True

    def held(self, event: Held) -> Work | None:
        """Who asked, unless it is dead by now."""
        asking = self.asking.pop((event.request_id, event.attempt), None)
        if asking is None:
            return None
        state, keys = self.states.get(event.tier), asking.keys
        if state is not None and isinstance(state.cache, SharedNames):
            state.cache.found(keys[: event.count])
            state.cache.missed(keys[event.count :])
            state.found_share = state.found_share.measured(event.count / len(keys), 1.0)
            state.asked = state.asked.measured(1.0, event.seconds)
            state.failures = 0 if event.count else state.failures
        asking.work.shared = frozenset(keys[: event.count])
        return None if asking.work.dead else asking.work

    def _offers(self, shelves: Sequence[Shelf], first: int) -> Iterator[Offer]:
        """What each of them takes; a tier serves what was asked of it before first."""
        size, start = self._blocks.size, first * self._blocks.size
        for shelf in shelves:
            state, tokens = self.states[shelf.tier], len(shelf.slots) * size
            nbytes = state.expected + self._blocks.bytes(len(shelf.slots))
            yield Offer(shelf.tier, tokens, nbytes / state.pace.per_s, self._cost(start, tokens))
            start += tokens

    def _cost(self, start: int, count: int) -> float:
        """Seconds to compute so many tokens after `start`."""
        assert self._config.tiers is not None
        return self._config.tiers.cost.more(start, count) / self._prefill.per_s

    def _read(
        self, work: Work, hits: int, shelves: Sequence[Shelf], choice: Choice, deadline: float
    ) -> None:
        count = 0
        for shelf in shelves:
            self.states[shelf.tier].cache.take(shelf.slots)
            self.states[shelf.tier].expected += self._blocks.bytes(len(shelf.slots))
            count += len(shelf.slots)
        work.stage, work.inbound = Stage.TIER, True
        self.reading[work.id, work.attempt] = Reading(work, hits, shelves, choice)
        end = hits + count
        self._emit(Restore(work.id, work.attempt, tuple(work.keys[hits:end]),
                           tuple(work.blocks[hits:end]), tuple(shelves), deadline))  # fmt: skip

    def restored(self, event: Restored) -> Work | None:
        """The attempt whose load is over, with what came in the device's cache."""
        reading = self.reading.pop((event.request_id, event.attempt), None)
        if reading is None:
            return None
        work, bad = reading.work, event.count if event.fault == "damaged" else -1
        work.inbound = False
        for shelf in reading.shelves:
            state, count = self.states.get(shelf.tier), len(shelf.slots)
            if state is not None:
                if 0 <= bad < count:
                    key = work.keys[reading.hits + event.count]
                    state.cache.damaged(shelf.slots[bad], key)
                state.cache.release(shelf.slots)
            state = state or self._resting.get(shelf.tier)
            if state is not None:
                state.expected -= self._blocks.bytes(count)
            bad -= count
        for moved in event.moved:
            state = self.states.get(moved.tier)
            if state is not None:
                nbytes = moved.bytes or self._blocks.bytes(1)  # nothing: less than a block
                state.pace = state.pace.measured(nbytes, moved.seconds)
        if not work.dead:
            came = reading.hits + event.count
            work.computed = came * self._blocks.size
            self._blocks.commit(work)
            self.used(work, 0, came, again=True)
            self._tell(reading, event)
        return work

    def _tell(self, reading: Reading, event: Restored) -> None:
        """What came from where, and what did not."""
        work, worker, left = reading.work, self._config.worker, event.count
        why, size = reading.choice.why, self._blocks.size
        for shelf, moved in zip(reading.shelves, event.moved, strict=False):
            came = min(left, len(shelf.slots))
            left -= came
            if came:
                self._note(TierHit(
                    worker, work.id, shelf.tier, came * size, moved.bytes, moved.seconds,
                    work.preemptions > 0, why,
                ))  # fmt: skip
        missed = sum(len(shelf.slots) for shelf in reading.shelves) - event.count
        if missed:
            self._note(TierPassed(worker, work.id, missed * size, event.fault or "gone", why))

    def _passed(self, work: Work, offers: Sequence[Offer], choice: Choice) -> None:
        """Computing is sooner."""
        for tier in {offer.tier: None for offer in offers}:
            state = self.states[tier]
            state.pace = state.pace.forgiven(state.rule.bytes_per_s)
        tokens = sum(offer.tokens for offer in offers)
        self._note(TierPassed(self._config.worker, work.id, tokens, "sooner", choice.why))

    # --- what steps say ---------------------------------------------------------------------------

    def stepped(self, rows: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step computed so many tokens (start, count) of prompts, and nothing else."""
        if not self.states or not rows:
            return
        assert self._config.tiers is not None
        cost: PrefillCost = self._config.tiers.cost
        predicted = cost.overhead_s + sum(cost.more(start, count) for start, count in rows)
        self._prefill = self._prefill.measured(predicted, seconds)

    def again(self, work: Work) -> None:
        """A preempted attempt goes on: what of its KV was not there has to be made again."""
        tokens, work.lost = max(0, work.lost - work.computed), 0
        if tokens:
            work.recomputed += tokens
            self._note(Recomputed(work.id, tokens, "preempted"))

    @property
    def waiting(self) -> int:
        """Attempts that wait for a tier."""
        return len(self.reading) + len(self.asking)

    def _note(self, event: AnyEvent) -> None:
        self._emit(Note(event))

    def check(self) -> None:
        """Slots that are read or written are held, and nothing else is."""
        for tier, state in self.states.items():
            state.cache.check()
            held = [slot for writing in state.writing.values() for slot in writing.slots]
            for reading in self.reading.values():
                held += [s for shelf in reading.shelves if shelf.tier == tier for s in shelf.slots]
            if isinstance(state.cache, TierCache):
                assert state.cache.pool.held == len(set(held)), tier
            coming = {key for writing in state.writing.values() for key in writing.keys}
            assert state.coming.keys() == coming and not coming & state.waiting.keys()
            assert len(coming) <= self._inflight_max
        for key, reading in self.reading.items():
            assert reading.work.inbound and (reading.work.id, reading.work.attempt) == key
