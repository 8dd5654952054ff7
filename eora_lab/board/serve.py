"""The board of a store on this machine, as long as somebody looks: it follows sweeps, whoever runs them."""

import hashlib
import json
import threading
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from eora_lab.board.data import board, now
from eora_lab.board.page import page
from eora_lab.experiment.store import CELL, ResultStore

HOST = "127.0.0.1"  # nobody else's machine can ask


class Server(ThreadingHTTPServer):
    """Answers with the page of a store and with its values as they are now. port: 0 for one that is free.

    Raises OSError when the port is taken.
    """

    daemon_threads = True

    def __init__(self, store: ResultStore, port: int = 0):
        self.store = store
        self._lock = threading.Lock()
        self._known: dict[str, int] | None = None  # files of cells, and when they were written
        self._board: dict = {}
        super().__init__((HOST, port), _Answer)
        self.address = f"http://{HOST}:{self.server_port}/"

    def data(self) -> dict:
        """The values of the board now. Cells are read again where one is new; what runs is, always."""
        with self._lock:
            there = {path.name: path.stat().st_mtime_ns for path in self.store.folder.glob(CELL)}
            if there != self._known:
                self._board, self._known = board(self.store), there
            return self._board | {"running": now(self.store)}


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """The page, or its values, which are sent again only where they changed."""
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self.send_error(403)  # a page of another site that has this address in its name
        if self.path == "/":
            return self._send("text/html; charset=utf-8", page(self.server.data()).encode())
        if self.path != "/board.json":
            return self.send_error(404)
        content = json.dumps(self.server.data(), allow_nan=False).encode()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            return self.end_headers()
        return self._send("application/json", content, tag)

    def _send(self, kind: str, content: bytes, tag: str = "") -> None:
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-cache", "ETag": tag}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Nothing: the terminal is for what a user should read."""


def serve(store: ResultStore, port: int = 0, window: bool = True) -> None:
    """Serve the board until Ctrl-C. window: open the browser."""
    with Server(store, port) as server:
        print(f"the board of {store.folder} is at {server.address} (Ctrl-C ends it)", flush=True)
        if window:
            webbrowser.open(server.address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
