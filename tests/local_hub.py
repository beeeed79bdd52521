"""A hub on this machine, as far as uploads need one: it takes commits of small files and keeps the last of each."""

import base64
import json
import threading
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        place = self.path.split("?")[0].strip("/").split("/")
        if place[-1] == "create":
            name = json.loads(body)
            self._answer(200, {"url": self._url(f"{name['organization']}/{name['name']}")})
            return
        if place[-1] == "validate-yaml":
            self.server.checked.append(json.loads(body)["content"])
            self._answer(200, {"errors": [], "warnings": []})
            return
        repository, kind = "/".join(place[2:4]), place[4]
        if kind == "preupload":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer(200, {"files": [{k: v for k, v in file.items() if k != "sample"} for file in files]})
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[repository][line["value"]["path"]] = content
        commit = "0" * 40
        self._answer(200, {"commitOid": commit, "commitUrl": self._url(f"{repository}/commit/{commit}")})

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def _url(self, path):
        return f"http://127.0.0.1:{self.server.server_port}/{path}"

    def _answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Requests are not printed."""


@contextmanager
def local_hub():
    """Its address, the files of each repository by name, and the texts whose metadata it was asked to check."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repositories, server.checked = defaultdict(dict), []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.repositories, server.checked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
