"""What the tests of paid work share: rows, a program's main in this process, what the fake server was paid for."""

import asyncio
import collections
import contextlib
import functools
import io
import json
import os
import threading
import time
from types import SimpleNamespace
from unittest import mock

from fake_api import Server

KEY = "sk-THISKEYISSECRET0123456789"


@functools.cache
def server_loop():
    """A thread in which all fake servers of this process live: one of them is there within a millisecond."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def start_server(options: dict) -> Server:
    server = Server(options)
    server.port = asyncio.run_coroutine_threadsafe(server.listen(), server_loop()).result(10)
    return server


def stop_server(server: Server) -> None:
    server_loop().call_soon_threadsafe(server.server.close)


def make_rows(path, n=60):
    row = {"input": ""}
    rows = (row | {"id": f"r{i}", "instruction": f"Do thing number {i}.", "output": f"Done {i}."} for i in range(n))
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def run(program, env, *arguments, expect=0):
    """`program.main(arguments)` in this process, in the environment `env`: its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    environment = mock.patch.dict(os.environ, dict(env), clear=True)
    with environment, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program.main([str(a) for a in arguments])
    done = SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
    assert code == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr
    return done


def kill_after(process, path, lines_there: int):
    """kill -9 as soon as `path` has so many lines."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines_there):
        time.sleep(0.01)
    process.kill()
    process.wait()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def paid(tmp_path):
    """How often each prompt was really answered by the server."""
    log = tmp_path / "server.log"
    if not log.exists():
        return {}
    asked = (r["request"] for r in lines(log) if "request" in r)
    return collections.Counter(json.dumps(r.get("messages", r.get("prompt"))) for r in asked)
