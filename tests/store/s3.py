"""An S3 server on a socket (moto's), and a proxy before it that fails as told."""

import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

BUCKET = "bucket"
# Status, headers, body.
Answer = tuple[int, list[tuple[str, str]], bytes]
_HOP_HEADERS = ("connection", "transfer-encoding", "keep-alive")


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a server with an empty bucket `BUCKET`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    post(f"{endpoint}/{BUCKET}", method="PUT")
    try:
        yield endpoint
    finally:
        server.stop()


def post(url: str, data: bytes = b"", *, method: str = "POST") -> None:
    headers = {"content-type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url, data=data, method=method, headers=headers)):
        pass


@dataclass
class Proxy:
    """What goes through; `fault(method, number)` says what befalls a request.

    "" nothing, "503" an answer without asking the server, "drop" the connection before it is asked, "lose" its answer.
    """

    fault: Callable[[str, int], str] = lambda method, number: ""
    # Seconds that each request takes at least.
    delay: float = 0.0
    # (method, path, bytes of the answer's body) of those that were answered.
    answered: list[tuple[str, str, int]] = field(default_factory=list)
    faults: int = 0
    number: int = 0
    at_once: int = 0
    most_at_once: int = 0
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    handler: type[BaseHTTPRequestHandler] = BaseHTTPRequestHandler
    _port: int = 0
    _server: ThreadingHTTPServer | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Listens, where it listened before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self.handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nobody listens any more: connections are refused. Those that are open are dropped at their next request."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def away(self) -> bool:
        """Whether nobody listens."""
        return self._server is None


@contextmanager
def proxy_to(
    endpoint: str, admit: Callable[[str, Message], Answer | None] = lambda method, headers: None
) -> Iterator[Proxy]:
    """A proxy on a socket of its own. `admit` is shown each request, may change its headers, and may refuse it."""
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body are two writes: the second would wait 40 ms for the client to have acknowledged the first.
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:
                # The client went away.
                self.close_connection = True

        def _any(self) -> None:
            _forward(self, proxy, lambda body: admit(self.command, self.headers) or _ask(self, endpoint, body))

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _any

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    proxy.handler = Handler
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def _forward(handler: BaseHTTPRequestHandler, proxy: Proxy, ask: Callable[[bytes], Answer]) -> None:
    body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
    with proxy.lock:
        proxy.number += 1
        number = proxy.number
        proxy.at_once += 1
        proxy.most_at_once = max(proxy.most_at_once, proxy.at_once)
    fault = ""
    try:
        time.sleep(proxy.delay)
        fault = "drop" if proxy.away() else proxy.fault(handler.command, number)
        answer = None if fault in {"503", "drop"} else ask(body)
    finally:
        with proxy.lock:
            proxy.faults += bool(fault)
            # Before the client has its answer: it asks for more then.
            proxy.at_once -= 1
    if fault == "503":
        handler.send_response(503)
        handler.send_header("content-length", "0")
        handler.end_headers()
        return
    if answer is None or fault == "lose":
        handler.close_connection = True
        return
    status, headers, data = answer
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()
    with proxy.lock:
        proxy.answered.append((handler.command, handler.path, len(data)))
    handler.wfile.write(data)


def _ask(handler: BaseHTTPRequestHandler, endpoint: str, body: bytes) -> Answer:
    connection = HTTPConnection(endpoint.removeprefix("http://"))
    try:
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP_HEADERS}
        connection.request(handler.command, handler.path, body=body, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS]
        if handler.command != "HEAD" and not any(name.lower() == "content-length" for name, _ in kept):
            kept.append(("content-length", str(len(data))))
        return answer.status, kept, data
    finally:
        connection.close()
