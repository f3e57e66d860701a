"""The live world around a worker node: engine thread, KV sender and receiver, token ids.

Performs the node's effects. Decides nothing: which blocks, when and to whom is in the effects.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from kvasir.core import effects as fx
from kvasir.core.codec import Sent
from kvasir.core.copies import Leave
from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.events import AnyEvent
from kvasir.core.ids import CONDUCTOR, NodeId, RequestId, WorkerId
from kvasir.core.message import Tier
from kvasir.core.messages import (
    AnyMessage,
    Dispatch,
    Drawn,
    KvWant,
    Logprobs,
    Prompt,
    Received,
    SendOver,
    StepDone,
    Tokens,
)  # fmt: skip
from kvasir.core.request import Adapter
from kvasir.core.specs import TransportSpec
from kvasir.engine.base import Runner, RunnerSpec, Sampled
from kvasir.node.worker import Worker
from kvasir.transfer import (
    ANY_PORT,
    KvForm,
    Receiver,
    ReceiveResult,
    Trailer,
    make_receiver,
    make_sender,
    open_media,
)
from kvasir.world.journal import Journal
from kvasir.world.live.engine import EngineThread, Stream
from kvasir.world.live.host import Bus, Host
from kvasir.world.live.tiers import Answer, LiveTiers, Open
from kvasir.world.live.ways import Ways

if TYPE_CHECKING:
    from kvasir.transfer.arena import Arena

Key = tuple[RequestId, int]
PERFORMS = (
    fx.Tell, fx.Step, fx.Cut, fx.Send, fx.Fetch, fx.Store, fx.Ask, fx.Reopen, fx.Restore,
    fx.Release, fx.Quit, fx.Timer, fx.Note,
)  # fmt: skip
NO_TIERS: Final[Mapping[Tier, Open]] = MappingProxyType({})


class Opening(NamedTuple):
    """What a dispatch says of its attempt: for `Runner.open`, and where tokens go from which
    output index on."""

    keys_count: int
    salt: bytes
    gateway: NodeId
    emitted: int
    ships: bool  # what is prefilled here goes on elsewhere


class LiveWorker:
    """One worker process's inside. Build on a running loop; `start`, then `close`."""

    def __init__(
        self, node: Worker, runner: Runner, bus: Bus, transport: TransportSpec, run_dir: str,
        *, journal: Journal | None, on_failure: Callable[[BaseException], None],
        observer: NodeId | None = None, kv_host: str = "",
        shelves: Mapping[Tier, Open] = NO_TIERS, arena: Arena | None = None,
        on_quit: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`kv_host`: where KV comes in over TCP, loopback unless given. `shelves`: how to open each
        tier. `arena`: where the runner's cache stands, if peers may map it. Raises ConfigError when
        `kv_host` is no address of this host."""
        fx.require("the live worker", PERFORMS, ())
        self.id: WorkerId = node.config.worker
        self.leaving = False
        self.runner = runner
        self._bus = bus
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._layers = len(runner.spec.layers)
        self._openings: dict[Key, Opening] = {}
        self._prompts: dict[Key, Prompt] = {}
        self._sampled: dict[Key, Sampled] = {}  # by prefill: goes along with the KV
        self._sending: set[Key] = set()
        planes = runner.planes()
        media = open_media(
            transport.kind, planes, run_dir=run_dir, bind=_any_port(kv_host), arena=arena
        )
        self._ways = Ways(self.id, [medium.kind for medium in media])
        form = kv_form(runner.spec) if node.config.codec is not None else None
        self.sender = make_sender(
            media, planes, on_over=self._on_over, form=form, on_sent=self._on_sent,
            bytes_per_s_max=transport.bytes_per_s_max, frame_bytes_max=transport.frame_bytes_max,
            streams=transport.streams,
        )  # fmt: skip
        self.receiver: Receiver = make_receiver(
            media, planes, on_received=self._on_received, form=form, streams=transport.streams
        )
        self._loads = ThreadPoolExecutor(1, "adapters")
        self.engine = EngineThread(
            runner, self._loop, push=self._push_layer, on_tokens=self._tokens,
            on_step=self._step_done, on_failure=on_failure,
        )  # fmt: skip
        self.tiers = LiveTiers(
            planes, shelves, self._on_tier, lambda error: self._call(lambda: on_failure(error))
        )
        self.host = Host(
            self.id, node, bus, journal, arriving=self._arriving,
            perform={
                fx.Tell: self._tell, fx.Step: self._step, fx.Cut: self._cut, fx.Send: self._send,
                fx.Fetch: self._fetch, fx.Store: self.tiers.store, fx.Restore: self.tiers.restore,
                fx.Ask: self.tiers.ask, fx.Reopen: self.tiers.reopen,
                fx.Release: self._release, fx.Note: self._note,
                fx.Quit: lambda effect: on_quit(),
            },
        )  # fmt: skip

    def close(self) -> None:
        self.host.close()
        self.engine.close()
        self.runner.stop()
        self._loads.shutdown(cancel_futures=True)
        self.tiers.close()
        self.sender.close()
        self.receiver.close()

    def leave(self, within_s: float) -> None:
        """Ask to be let go, as `core.copies.Leave` says."""
        self.leaving = True
        self._bus.tell(self.id, CONDUCTOR, Leave(self.id, within_s))

    # --- messages in: take off what the node must not see -----------------------------------------

    def _arriving(self, message: AnyMessage) -> bool:
        if isinstance(message, Dispatch):
            request = message.request
            key = (request.id, message.attempt)
            self._openings[key] = Opening(
                len(request.keys), request.salt, request.gateway, message.emitted,
                message.phase == "prefill",
            )  # fmt: skip
            self._maybe_open(key)
        elif isinstance(message, Prompt):
            return self._prompted(message)
        elif isinstance(message, KvWant):
            self._ways.learn(message.target, message.addresses)
        return True

    def _prompted(self, prompt: Prompt) -> bool:
        """False: its adapter is read first, beside the steps that run, and it comes again."""
        key = (prompt.request_id, prompt.attempt)
        if prompt.fault:
            return True
        if prompt.adapter is not None and not self.runner.adapters.take(key, prompt.adapter):
            self._loads.submit(self._load, prompt, prompt.adapter)
            return False
        self._prompts[key] = prompt
        self._maybe_open(key)
        return True

    def _load(self, prompt: Prompt, adapter: Adapter) -> None:
        """On the thread that loads. The node hears of a fault with the prompt."""
        try:
            self.runner.adapters.load(adapter, (prompt.request_id, prompt.attempt))
        except Exception as error:
            what = error.what if isinstance(error, ModelError) else repr(error)
            fault = f"the adapter {adapter.name!r} cannot be loaded: {what}"
            prompt = msgspec.structs.replace(prompt, adapter=None, fault=fault)
        self._call(lambda: self.host.feed(prompt))

    def _maybe_open(self, key: Key) -> None:
        if key not in self._openings or key not in self._prompts:
            return
        opening, prompt = self._openings[key], self._prompts.pop(key)
        tokens = array("I", prompt.tokens).tolist()
        known = (opening.keys_count, opening.salt)
        self.engine.do(lambda: self.runner.open(*key, tokens, *known, prompt.steering))

    # --- effects ----------------------------------------------------------------------------------

    def _tell(self, effect: fx.Tell) -> None:
        message = effect.message
        if isinstance(message, KvWant):
            message = msgspec.structs.replace(message, addresses=self.receiver.addresses)
        self._bus.tell(self.id, effect.to, message)

    def _step(self, effect: fx.Step) -> None:
        self.engine.step(effect)

    def _cut(self, effect: fx.Cut) -> None:
        self.engine.cut(effect.step)

    def _send(self, effect: fx.Send) -> None:
        key = (effect.request_id, effect.attempt)
        if key not in self._sending:
            self._sending.add(key)
            address, said = self._ways.open(key, effect.to, effect.bytes, effect.last)
            if said is not None:
                self.observe(said)
            self.sender.open(*key, address, effect.deadline)
        if effect.step is not None:
            stream = Stream(*key, effect.first_block, effect.blocks, effect.codec)
            self.engine.stream(effect.step, stream)
        elif effect.blocks:
            self.sender.push(
                *key, effect.first_block, effect.blocks, range(self._layers), effect.codec,
                tell=bool(effect.codec),
            )  # fmt: skip
        if effect.last:
            first = self._sampled.get(key)
            tokens = (first.token,) if first is not None else ()
            logprobs = _told(first) if first is not None else ()
            trailer = Trailer(tokens=tokens, report=effect.report, logprobs=logprobs)
            self.sender.finish(*key, trailer)

    def _push_layer(self, stream: Stream, layer: int) -> None:
        self.sender.push(
            stream.request_id, stream.attempt, stream.first_block, stream.blocks, layer,
            stream.codec, tell=bool(stream.codec) and layer == self._layers - 1,
        )  # fmt: skip

    def _fetch(self, effect: fx.Fetch) -> None:
        key = (effect.request_id, effect.attempt)
        self.engine.do(lambda: self.runner.adopt(*key, effect.table))
        self.receiver.expect(
            *key, effect.first_block, effect.blocks, self._layers, effect.deadline
        )

    def _release(self, effect: fx.Release) -> None:
        key = (effect.request_id, effect.attempt)
        for held in (self._openings, self._prompts, self._sampled):
            held.pop(key, None)
        if key in self._sending:
            self.sender.stop(*key)
        self.receiver.forget(*key)
        self.tiers.release(*key)
        self.engine.do(lambda: self.runner.close(*key))

    def _note(self, effect: fx.Note) -> None:
        self.observe(effect.event)

    def observe(self, event: AnyEvent) -> None:
        if self._bus.observe is not None:
            self._bus.observe(event)
        elif self._observer is not None and self._bus.wire is not None:
            self._bus.wire.send(self.id, self._observer, (), (event,))

    # --- what the engine and the transport say (engine: on the loop; transport: on its thread) ----

    def _tokens(self, batch: Sequence[Sampled]) -> None:
        by_gateway: dict[NodeId, list[Drawn]] = {}
        for key, group in groupby(batch, key=lambda one: (one.request_id, one.attempt)):
            row = list(group)
            first, last = row[0], row[-1]
            opening = self._openings.get(key)
            if opening is not None and opening.ships:
                self._sampled[key] = last
            tokens = array("I", [one.token for one in row]).tobytes()
            logprobs = tuple([told for one in row for told in _told(one)])
            drawn = Drawn(*key, first.index, len(row), tokens, last.end, logprobs)
            by_gateway.setdefault(first.gateway, []).append(drawn)
        for gateway, rows in by_gateway.items():
            self._bus.tell(self.id, gateway, Tokens(tuple(rows)))

    def _step_done(self, done: StepDone) -> None:
        self.host.feed(done)

    def _on_sent(self, sent: Sent) -> None:
        self._call(lambda: self.host.feed(sent))

    def _on_over(self, request_id: RequestId, attempt: int, ok: bool, reason: str) -> None:
        self._call(lambda: self._over(SendOver(request_id, attempt, ok), reason))

    def _over(self, message: SendOver, reason: str) -> None:
        key = (message.request_id, message.attempt)
        self._sending.discard(key)
        self._ways.over(key, message.ok, reason, self.sender.timeline(*key))
        self.host.feed(message)

    def _on_received(self, result: ReceiveResult) -> None:
        self._call(lambda: self._received(result))

    def _received(self, result: ReceiveResult) -> None:
        key = (result.request_id, result.attempt)
        trailer, opening = result.trailer, self._openings.get(key)
        if result.ok and trailer is not None and opening is not None:  # not released meanwhile
            for token in trailer.tokens:
                self.engine.do(lambda token=token: self.runner.append(*key, token))  # type: ignore[misc]
            self._repeat(key, opening, trailer)
        self.host.feed(
            Received(
                *key, result.ok, result.bytes, result.seconds, result.transport, result.reason,
                trailer.report if trailer is not None else None, result.by_sender,
                result.coded,
            )
        )  # fmt: skip

    def _repeat(self, key: Key, opening: Opening, trailer: Trailer) -> None:
        """What prefill sampled, once more: on this connection no later token can overtake it."""
        tokens = trailer.tokens
        if tokens:
            data = array("I", tokens).tobytes()
            drawn = Drawn(
                *key, opening.emitted, len(tokens), data, logprobs=trailer.logprobs
            )
            self._bus.tell(self.id, opening.gateway, Tokens((drawn,)))

    def _on_tier(self, answer: Answer) -> None:
        self._call(lambda: self.host.feed(answer))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed: the process is going down
            return


def kv_form(spec: RunnerSpec) -> KvForm:
    """How a runner's KV lies in its blocks. Raises ConfigError for KV that has no coded form."""
    dtypes = {layer.dtype for layer in spec.layers}
    if len(dtypes) > 1 or any(layer.scale_bytes for layer in spec.layers):
        raise ConfigError(
            f"no codec for KV of {', '.join(sorted(dtypes))} with scales",
            where="transport.codec", next_step="leave the codec off, or keep KV as floats",
        )  # fmt: skip
    return KvForm(dtypes.pop(), spec.block_size)


def _told(one: Sampled) -> tuple[Logprobs, ...]:
    return (one.logprobs,) if one.logprobs is not None else ()


def _any_port(host: str) -> str:
    if not host:
        return ANY_PORT
    return f"[{host}]:0" if ":" in host else f"{host}:0"
