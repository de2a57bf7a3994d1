"""A dataset streamed from a hub: a server on the loopback address that answers as the Hugging Face hub does."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TEXTS = [f"row {number} " * 20 for number in range(3000)]
COMMIT = "a" * 40


class Hub:
    """One dataset, `me/ds`, of one Parquet file. `broken` answers about the file break off first."""

    def __init__(self):
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": TEXTS}), sink, row_group_size=500)
        data = sink.getvalue()
        self.broken = 0
        self.asked = []
        hub = self
        file = {"type": "file", "path": "data/train-0.parquet", "size": len(data)}
        file["oid"] = hashlib.sha1(data).hexdigest()
        folder = {"type": "directory", "path": "data", "oid": "b" * 40, "size": 0}
        about = {"id": "me/ds", "_id": "x", "sha": COMMIT, "private": False, "gated": False, "disabled": False}
        about |= {"tags": [], "siblings": [{"rfilename": file["path"]}], "downloads": 0, "likes": 0}

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def send(self, status, headers, body=b""):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def send_json(self, content):
                self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

            def do_GET(self):
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if path.startswith("/api/datasets/me/ds/tree/"):
                    self.send_json([file] if path.endswith("/data") else [folder])
                elif path.startswith("/api/datasets/me/ds"):
                    self.send_json(about)
                elif path.endswith(file["path"]):
                    self.send_file()
                else:
                    self.send(404, {"X-Error-Code": "EntryNotFound"})

            do_HEAD = do_GET

            def send_file(self):
                asked = self.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").split("-")
                part = data[int(asked[0]) : int(asked[1] or len(data)) + 1]
                headers = {"Content-Range": f"bytes {asked[0]}-{int(asked[0]) + len(part) - 1}/{len(data)}"}
                headers |= {"ETag": '"e"', "X-Repo-Commit": COMMIT, "X-Linked-Size": len(data)}
                if hub.broken and self.command == "GET":
                    hub.broken -= 1
                    self.send(206, {**headers, "Content-Length": len(part)}, part[: len(part) // 2])
                    self.close_connection = True
                else:
                    self.send(206, headers, part)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


# In a process of its own: where the hub is, is read when its client is imported.
PROGRAM = """
import json, sys
import nmoe.data.hub
from nmoe.data import DataError, open_source
from nmoe.data.remote import Patience

nmoe.data.hub.BLOCK_BYTES = 50_000
notices = []
try:
    source = open_source("hf", sys.argv[1:], patience=Patience(notices.append, lambda seconds: None))
    cuts = list(source.blocks())
    texts = [list(cut.block.documents()) for cut in cuts]
    middle = len(cuts) // 2
    rest = [text for cut in source.blocks(cuts[middle].after) for text in cut.block.documents()]
    assert rest == [text for part in texts[middle + 1 :] for text in part]
    told = {"source": source.describe(), "texts": [text for part in texts for text in part]}
except DataError as error:
    told = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps({**told, "notices": notices}))
"""


def read(hub, tmp_path, name="me/ds"):
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    command = [sys.executable, "-c", PROGRAM, name]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=300)
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def test_a_dataset_is_streamed_from_the_commit_that_its_branch_has(hub, tmp_path):
    told = read(hub, tmp_path)
    assert told["texts"] == TEXTS
    assert told["source"]["revision"] == COMMIT
    assert told["notices"] == []
    assert all(COMMIT in path for path in hub.asked if path.endswith(".parquet"))


def test_broken_answers_are_told_and_change_nothing(hub, tmp_path):
    hub.broken = 2
    told = read(hub, tmp_path)
    assert told["texts"] == TEXTS
    assert hub.broken == 0
    # By the hub's client, which has five attempts of its own, or by ours after them.
    assert "peer closed connection" in told["stderr"] + " ".join(told["notices"])


def test_a_dataset_that_is_not_there(hub, tmp_path):
    told = read(hub, tmp_path, "me/other")
    assert told["error"].startswith("SourceError: me/other")
    assert told["notices"] == []
