"""An HTTP proxy in front of an S3 server: it counts what passes and spoils answers when told to.

A fault takes the answer's place: it sends what it likes to the caller, then the connection ends.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def head(self) -> bytes:
        """Status and headers as they go over the wire."""
        lines = [f"HTTP/1.1 {self.status} -", *(f"{name}: {value}" for name, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


Fault = Callable[[socket.socket, Answer], None]


def refusal(status: int, code: str) -> Fault:
    """An S3 error instead of the answer."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>-</Message></Error>".encode()
    headers = (("Content-Type", "application/xml"), ("Content-Length", str(len(body))))

    def refuse(caller: socket.socket, _: Answer) -> None:
        caller.sendall(Answer(status, headers, body).head() + body)

    return refuse


def hang(caller: socket.socket, _: Answer) -> None:
    """No answer, until the caller hangs up."""
    with suppress(OSError):
        caller.recv(1)


def trickle(caller: socket.socket, answer: Answer) -> None:
    """The answer at ten bytes a second, until the caller hangs up."""
    caller.sendall(answer.head())
    with suppress(OSError):
        for place in range(len(answer.body)):
            caller.sendall(answer.body[place : place + 1])
            time.sleep(0.1)


def stall(caller: socket.socket, answer: Answer) -> None:
    """Half of the body, then nothing more."""
    _send_half(caller, answer)
    hang(caller, answer)


def truncate(caller: socket.socket, answer: Answer) -> None:
    """Half of the body that was announced, then the end of the connection."""
    _send_half(caller, answer)


def reset(caller: socket.socket, answer: Answer) -> None:
    """Half of the body, then a reset connection."""
    _send_half(caller, answer)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def shorten(caller: socket.socket, answer: Answer) -> None:
    """Half of the body, announced as if it were all."""
    half = len(answer.body) // 2
    kept = [header for header in answer.headers if header[0].lower() != "content-length"]
    headers = (*kept, ("Content-Length", str(half)))
    caller.sendall(Answer(answer.status, headers, b"").head() + answer.body[:half])


def flip(caller: socket.socket, answer: Answer) -> None:
    """The answer with one bit in the middle of the body flipped."""
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    caller.sendall(answer.head() + body)


def _send_half(caller: socket.socket, answer: Answer) -> None:
    caller.sendall(answer.head() + answer.body[: len(answer.body) // 2])


@dataclass(frozen=True)
class Request:
    """One request that came by."""

    method: str
    path: str
    """Decoded, without the query."""
    num_bytes: int
    """Of the server's body."""
    fault: Fault | None
    at: float
    """When it came; monotonic seconds."""


@dataclass
class FaultProxy:
    """What came by, and what is to befall the next requests."""

    endpoint: str
    _seen: list[Request] = field(default_factory=list)
    _faults: Iterator[Fault | None] = field(default_factory=lambda: iter(()))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, faults: Iterable[Fault | None]) -> None:
        """Gives each of the next requests its fault, or none, and forgets what came by."""
        with self._lock:
            self._faults = iter(faults)
            self._seen.clear()

    @property
    def seen(self) -> list[Request]:
        """The requests since the last injection."""
        with self._lock:
            return list(self._seen)

    def note(self, method: str, path: str, num_bytes: int, at: float) -> Fault | None:
        """Writes a request down; the fault that befalls it."""
        with self._lock:
            fault = next(self._faults, None)
            self._seen.append(Request(method, path, num_bytes, fault, at))
            return fault


@contextmanager
def fault_proxy(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy on loopback in front of the server at `endpoint`."""
    upstream = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            at = time.monotonic()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = _ask(upstream, self.command, self.path, list(self.headers.items()), body)
            path = unquote(urlsplit(self.path).path)
            fault = proxy.note(self.command, path, len(answer.body), at)
            if fault is None:
                self.connection.sendall(answer.head() + answer.body)
            else:
                self.close_connection = True
                fault(self.connection, answer)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing: `seen` is the log."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def shutdown_request(self, request: socket.socket) -> None:
            self.close_request(request)  # a plain end would come before a reset

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


def _ask(
    upstream: str, method: str, path: str, headers: list[tuple[str, str]], body: bytes
) -> Answer:
    """The server's answer to a request whose Host, which is signed, stays the caller's."""
    with closing(HTTPConnection(upstream, timeout=60)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            if name.lower() != "expect":
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        read = response.read()
    names = ("connection", "transfer-encoding", "keep-alive")
    kept = tuple(header for header in response.getheaders() if header[0].lower() not in names)
    if method != "HEAD" and response.headers.get("Content-Length") is None:
        kept = (*kept, ("Content-Length", str(len(read))))
    return Answer(response.status, kept, read)


class Line:
    """A line to a server that can be cut, or fall silent; it counts whom it has failed."""

    def __init__(self, uri: str) -> None:
        self._server, self._open = ("127.0.0.1", urlsplit(uri).port), []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.state, self.failed = "up", 0

    def become(self, state: str) -> None:
        """From now on it is up, cut or mute; who speaks through it now is cut off."""
        self.state = state
        while self._open:
            with suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        """Takes callers until the end."""
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self.failed += self.state != "up"
                if self.state == "cut":
                    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    caller.close()
                    continue
                self._open.append(caller)
                if self.state == "up":
                    self._open.append(socket.create_connection(self._server))
                    ends = self._open[-2:]
                    for pair in (ends, ends[::-1]):
                        threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Nobody is answered any more."""
        self.become("cut")
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def line_to(uri: str) -> Iterator[Line]:
    """A line on loopback to the server at a URI."""
    line = Line(uri)
    thread = threading.Thread(target=line.serve, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        line.end()
        thread.join()
