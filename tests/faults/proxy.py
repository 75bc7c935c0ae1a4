"""A TCP proxy before a Postgres: a network that fails when a test wants it to, and in the way that it wants."""

import asyncio
import contextlib
import ctypes
import socket
import struct
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path

#: Of Linux (asm-generic/socket.h); Python doesn't name them.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
#: A filter of one instruction, "return 0": the kernel drops every packet before TCP could acknowledge it.
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
_RESET = struct.pack("ii", 1, 0)
#: What asks for a commit, and what says that it is done.
_COMMIT = {"request": b"COMMIT\0", "answer": b"C\0\0\0\x0bCOMMIT\0"}


class Proxy:
    """A port of 127.0.0.1 that leads to a server's Unix socket. Thread-safe."""

    def __init__(self, target: Path) -> None:
        #: Where new connections lead.
        self.target = target
        #: How many COMMITs were lost on their way, or their answers.
        self.lost = 0
        self._reserved = self._bind(0)
        self.port = self._reserved.getsockname()[1]
        self._passing = {"request": asyncio.Event(), "answer": asyncio.Event()}
        self._links: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._listening: socket.socket | None = None
        self._dropping, self._cuts = False, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self.heal()

    def heal(self) -> None:
        """From now on everything passes, and what was held arrives."""
        self._swallows, self._delay, self._loses = False, 0.0, ""
        self._run(self._heal())

    def cut(self) -> None:
        """Reset every connection; new ones may be made."""
        self._run(self._cut())

    def refuse(self) -> None:
        """Reset every connection, and listen no more."""
        self._run(self._refuse())

    def blackhole(self) -> None:
        """Drop every packet of every connection and of new ones, so that nothing is acknowledged.

        Only where `can_drop_packets`.
        """
        self._run(self._blackhole())

    def hold_answers(self) -> None:
        """Acknowledge packets, and keep what the server says."""
        self._run(self._hold("answer"))

    def swallow_answers(self) -> None:
        """Acknowledge packets, and throw away what the server says."""
        self._swallows = True

    def slow_down(self, seconds: float) -> None:
        """Everything is under way for that long, in each direction."""
        self._delay = seconds

    def lose_commit(self, what: str) -> None:
        """Lose the next COMMIT, or its answer, and refuse from then on.

        Args:
            what: "request" or "answer".
        """
        self._loses = what

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def _run(self, coroutine: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _bind(self, port: int) -> socket.socket:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # it stays ours while nothing listens
        bound.bind(("127.0.0.1", port))
        return bound

    # What follows runs in the loop.

    async def _heal(self) -> None:
        for each in self._sockets() if self._dropping else []:
            each.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        self._dropping = False
        for passing in self._passing.values():
            passing.set()
        if self._listening is None:
            self._listening = self._bind(self.port)
            self._listening.setblocking(False)
            self._listening.listen()
            self._loop.add_reader(self._listening, self._accept, self._listening)

    def _accept(self, listening: socket.socket) -> None:
        # Not asyncio.start_server: as it is closed, it forgets the connections that it has just accepted.
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # whoever wanted it has left
            accepted, _ = listening.accept()
            link = self._loop.create_task(self._link(accepted))
            self._links.add(link)
            link.add_done_callback(self._links.discard)

    async def _cut(self) -> None:
        self._cuts += 1
        for client in self._open():
            _reset(client)

    async def _refuse(self) -> None:
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        await self._cut()

    async def _hold(self, *ways: str) -> None:
        for way in ways:
            self._passing[way].clear()

    async def _blackhole(self) -> None:
        await self._hold("request", "answer")
        self._dropping = True
        for each in self._sockets():
            _drop(each)

    async def _end(self) -> None:
        for passing in self._passing.values():
            passing.set()
        await self._refuse()
        await asyncio.gather(*self._links)

    def _open(self) -> list[asyncio.StreamWriter]:
        return [client for client in self._clients if not client.is_closing()]

    def _sockets(self) -> list[socket.socket]:
        clients = [client.get_extra_info("socket") for client in self._open()]
        return clients if self._listening is None else [self._listening, *clients]

    async def _link(self, accepted: socket.socket) -> None:
        cuts = self._cuts
        if self._dropping:
            _drop(accepted)
        reader, client = await asyncio.open_connection(sock=accepted)
        self._clients.add(client)
        try:
            if cuts != self._cuts:
                _reset(client)
                return
            answers, server = await asyncio.open_unix_connection(str(self.target))
            pumps = [
                asyncio.create_task(self._pump("request", reader, server)),
                asyncio.create_task(self._pump("answer", answers, client)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            server.close()
        except OSError:  # nothing listens at the target
            pass
        finally:
            client.close()
            self._clients.remove(client)

    async def _pump(self, way: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        end = b""
        while piece := await source.read(65536):
            end = end[-16:] + piece
            if self._loses == way and _COMMIT[way] in end:
                self.lost += 1
                await self._refuse()
                return
            await self._passing[way].wait()
            if self._swallows and way == "answer":
                continue
            if self._delay:
                self._loop.call_later(self._delay, sink.write, piece)
            else:
                sink.write(piece)
        await asyncio.sleep(self._delay)


def can_drop_packets() -> bool:
    """Say whether the kernel lets us: it is Linux, and here and there one has to be root."""
    with socket.socket() as probe:
        try:
            _drop(probe)
        except OSError:
            return False
    return sys.platform == "linux"


def _reset(client: asyncio.StreamWriter) -> None:
    client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.transport.abort()


def _drop(each: socket.socket) -> None:
    program = struct.pack("HP", 1, ctypes.addressof(_DROP))
    each.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
