"""Both ends of what a primary and a secondary say to each other: the client that asks, and the secondary's answers.

Owns nothing of the volumes: a :class:`PeerClient` owns its connection, a :class:`PeerSession` answers for a secondary, whose state
it changes under its ``control_lock`` only. Of several sessions the one that has said hello last is the primary's.
"""

import errno
from typing import TYPE_CHECKING, TypeVar

import trio

from replfs.block.nbd import connected
from replfs.block.replication.lineage import Ids
from replfs.block.replication.rules import Stage
from replfs.errors import ReplfsError, Unreachable, printable
from replfs.protocol import peer
from replfs.protocol.nbd.client import PeerNegotiation
from replfs.protocol.nbd.uri import Target

if TYPE_CHECKING:
    from replfs.volume.secondary import SecondaryVolume

_RECEIVE_SIZE = 64 << 10
_MOST_RUNS = 4096  # of blocks, in one answer
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)

Answer = TypeVar("Answer", bound=peer.Message)


async def _negotiate(stream: trio.SocketStream, target: Target) -> PeerNegotiation:
    negotiation = PeerNegotiation(target.export)
    while not negotiation.done:
        data = await stream.receive_some(_RECEIVE_SIZE)
        if not data:
            if not negotiation.greeted:
                raise trio.BrokenResourceError  # it is full, or ends: that says nothing of its kind
            break  # some servers leave when they are asked for what they do not know
        await stream.send_all(negotiation.receive(data))
    return negotiation


class PeerClient:
    """The primary's end. Requests are asked one at a time; the first that fails to be answered ends the connection."""

    def __init__(self, target: Target, stream: trio.SocketStream, rest: bytes, timeout: float) -> None:
        self._target = target
        self._stream = stream
        self._timeout = timeout
        self._lines = peer.Lines()
        self._received = self._lines.receive(rest)
        self._lock = trio.Lock()

    @classmethod
    async def connect(cls, target: Target, timeout: float, *, known: bool = False) -> "PeerClient | None":
        """None if that is a server of another kind. Raises Unreachable, ReplfsError.

        One that leaves instead of an answer is of another kind if it does so again, and was not ``known`` to be of this one.
        """
        for _ in range(2):
            stream, negotiation = await connected(target, timeout, _negotiate)
            if negotiation.agreed:
                return cls(target, stream, negotiation.rest, timeout)
            stream.socket.close()
            if negotiation.done:
                return None
            if known:
                raise Unreachable(f"cannot replicate to {printable(str(target))}: it closed the connection")
        return None

    async def ask(self, request: peer.Request, kind: type[Answer]) -> Answer:
        """Raises ReplfsError with what the other side says when it fails there; Unreachable if there is no answer in time."""
        shown = printable(str(self._target))
        async with self._lock:
            try:
                with trio.fail_after(self._timeout):
                    await self._stream.send_all(peer.encode(request))
                    answer = peer.answer(await self._line())
            except BaseException as error:
                self.close()  # what comes next would be the answer to this
                if isinstance(error, trio.TooSlowError):
                    raise Unreachable(f"{shown}: it did not answer within {self._timeout:g} seconds") from None
                if isinstance(error, _GONE):
                    raise Unreachable(f"{shown}: the connection broke") from None
                raise
        if isinstance(answer, peer.Failed):
            raise ReplfsError(f"{shown}: {printable(answer.why)}", errno.EBUSY)
        if not isinstance(answer, kind):
            self.close()
            raise ReplfsError(f"{shown}: it answered with a {type(answer).__name__}")
        return answer

    async def _line(self) -> bytes:
        while not self._received:
            data = await self._stream.receive_some(_RECEIVE_SIZE)
            if not data:
                raise trio.BrokenResourceError
            self._received += self._lines.receive(data)
        return self._received.pop(0)

    def close(self) -> None:
        self._stream.socket.close()


class PeerSession:
    """The secondary's end, for one connection."""

    def __init__(self, volume: "SecondaryVolume") -> None:
        self._volume = volume
        self._node = ""  # who is there

    async def answer(self, line: bytes) -> bytes:
        request = peer.request(line)
        try:
            return peer.encode(await self._answer(request))
        except (OSError, ReplfsError) as error:
            return peer.encode(peer.Failed(str(error)))

    def leave(self) -> None:
        if self._volume.primary is self:
            self._volume.primary = None

    async def _answer(self, request: peer.Request) -> peer.Message:
        volume = self._volume
        if isinstance(request, peer.Hello):
            return self._hello(request)
        if isinstance(request, peer.Ping):
            return peer.Done(volume.state.generation)
        async with volume.control_lock:
            if volume.primary is not self:
                raise ReplfsError("another primary has come since, or this one did not say who it is", errno.EBUSY)
            with trio.CancelScope(shield=True):  # what has begun is finished, whatever becomes of the connection
                answer = await self._change(request)
            return answer

    def _hello(self, hello: peer.Hello) -> peer.Message:
        volume = self._volume
        if hello.version != peer.VERSION:
            raise ReplfsError(f"it speaks version {peer.VERSION}, and this side {hello.version}: use the same replfs on both sides")
        self._node = hello.node
        volume.primary = self
        state = volume.state
        return peer.Welcome(
            version=peer.VERSION,
            node=state.node,
            peer=state.peer,
            size=volume.view.size,
            ids=state.ids,
            mode=volume.config.mode,
            stage=state.stage,
            tracked=volume.tracking is not None and bool(volume.tracking.stale),
        )

    def _blocks(self, start: int) -> peer.Message:
        tracking = self._volume.tracking
        if tracking is None or not 0 <= start < tracking.blocks:
            raise ReplfsError("there are no such blocks")
        runs: list[tuple[int, int]] = []
        position = start
        while tracking.stale and position <= tracking.stale.max():
            first = tracking.stale.next_set_bit(position)
            last = tracking.end_of_run(first)
            if len(runs) == _MOST_RUNS:
                return peer.Found(runs, first)
            runs.append((first, last + 1 - first))
            position = last + 1
        return peer.Found(runs, -1)

    async def _change(self, request: peer.Request) -> peer.Message:
        volume, state = self._volume, self._volume.state
        if state.stage not in (Stage.NONE, Stage.RUNNING):
            raise ReplfsError(f"this side has taken over: its stage is {state.stage}", errno.EBUSY)
        if isinstance(request, peer.Attach):
            await volume.attached(self._node, syncing=request.syncing, ids=Ids() if request.first else state.ids)
        elif isinstance(request, peer.Blocks):
            return self._blocks(request.start)
        elif isinstance(request, peer.Clear):
            await volume.server.close_connections(but=self)
        elif state.peer != self._node:
            raise ReplfsError("this side belongs to another primary", errno.EBUSY)
        elif isinstance(request, peer.Agreed):
            await volume.agreed(request.ids, checkpoint=request.checkpoint)
        elif isinstance(request, peer.Checkpoint):
            await volume.checkpoint_for_primary()
        else:
            raise ReplfsError("this cannot be asked of this side")
        return peer.Done(volume.state.generation)
