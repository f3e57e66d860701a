"""Messages between processes: msgpack envelopes over ZeroMQ. Knows addresses, not meanings.

Every process binds one ROUTER and dials one DEALER per peer. An envelope is one frame, typed,
versioned and size-capped; what cannot be read is counted and dropped, and the socket goes on.
ZeroMQ keeps the order between two living processes; what was sent to a dead one is lost, as nodes
expect. Addresses are `ipc://FILE`, or `tcp://HOST:PORT`, which is neither encrypted nor asks who
dials: for networks that only these processes reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from kvasir.core.errors import ConfigError
from kvasir.core.events import AnyEvent
from kvasir.core.ids import NodeId
from kvasir.core.messages import WIRE_VERSION, AnyMessage

QUEUE_MAX = 100_000  # envelopes waiting for one peer
LINGER_MS = 200
HEARTBEAT_MS = 2000  # over TCP: a peer whose host vanished without a word is noticed


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Messages of one node to another, in order, and events for whoever observes."""

    version: int
    src: NodeId
    dst: NodeId
    messages: tuple[AnyMessage, ...] = ()
    events: tuple[AnyEvent, ...] = ()


Deliver = Callable[[Envelope], None]


class Wire:
    """One process's end. All methods run on the event loop's thread."""

    def __init__(
        self, bind: str, deliver: Deliver, address_of: Callable[[NodeId], str],
        message_bytes_max: int,
    ) -> None:  # fmt: skip
        self.unreadable = 0
        self._deliver = deliver
        self._address_of = address_of
        self._bytes_max = message_bytes_max
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Envelope)
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._inbox = self._socket(zmq.ROUTER, bind)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, message_bytes_max)
        self._inbox.setsockopt(zmq.RCVHWM, QUEUE_MAX)
        self._bind(bind)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inbox.fileno(), self._readable)
        self._loop.call_soon(self._readable)
        self._closed = False

    def _socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, LINGER_MS)
        if address.startswith("tcp:"):
            made.setsockopt(zmq.IPV6, 1)
            made.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        return made

    def _bind(self, address: str) -> None:
        """Raises ConfigError when the address cannot be had."""
        try:
            self._inbox.bind(address)
        except zmq.ZMQError as error:
            self._inbox.close()
            self._context.term()
            raise ConfigError(
                f"messages cannot come in there: {error.strerror}",
                where=address,
                next_step="an address of this host and a free port, under endpoints",
            ) from error

    def send(
        self, src: NodeId, dst: NodeId, messages: tuple[AnyMessage, ...],
        events: tuple[AnyEvent, ...] = (),
    ) -> None:  # fmt: skip
        """Queue an envelope; never waits. Dropped when the peer's queue is full, or too large."""
        if self._closed:
            return
        data = self._encoder.encode(Envelope(WIRE_VERSION, src, dst, messages, events))
        if len(data) > self._bytes_max:
            self.unreadable += 1
            return
        try:
            self._peer(self._address_of(dst)).send(data, zmq.NOBLOCK)
        except zmq.Again:
            self.unreadable += 1

    def _peer(self, address: str) -> zmq.Socket[bytes]:
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = self._socket(zmq.DEALER, address)
            peer.setsockopt(zmq.SNDHWM, QUEUE_MAX)
            peer.setsockopt(zmq.RECONNECT_IVL, 20)
            peer.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
            peer.connect(address)
        return peer

    def forget(self, node: NodeId) -> None:
        """The node's process is gone: what is queued for it dies with it."""
        peer = self._peers.pop(self._address_of(node), None)
        if peer is not None:
            peer.close(linger=0)

    def _readable(self) -> None:
        """The descriptor is edge-triggered: read until there is nothing."""
        for _ in range(1000):
            if self._closed or not int(self._inbox.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            frames = self._inbox.recv_multipart(zmq.NOBLOCK)
            try:
                self._take(frames)
            except BaseException:  # what else waits here is not announced again
                self._loop.call_soon(self._readable)
                raise
        self._loop.call_soon(self._readable)

    def _take(self, frames: list[Any]) -> None:
        try:
            envelope = self._decoder.decode(frames[-1])
        except msgspec.DecodeError:
            self.unreadable += 1
            return
        if abs(envelope.version - WIRE_VERSION) > 1:
            self.unreadable += 1
            return
        self._deliver(envelope)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._inbox.fileno())
        for peer in self._peers.values():
            peer.close()
        self._inbox.close()
        self._context.term()
