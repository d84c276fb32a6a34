"""Helpers of the API tests: rows, running a program in this process, stored records, requests that were billed."""

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

from parts.files import write_lines

KEY = "sk-THISKEYISSECRET0123456789"


@functools.cache
def server_loop():
    """The event loop of a thread in which all fake servers of this process run: they start within a millisecond."""
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
    write_lines(path, rows)
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
    """kill -9 as soon as `path` has `lines_there` lines."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines_there):
        time.sleep(0.01)
    process.kill()
    process.wait()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored_records(folder, out="o.jsonl"):
    path = folder / f"{out}.partial.jsonl"
    return lines(path) if path.exists() else []


def paid(tmp_path):
    """How many times the server answered each prompt."""
    log = tmp_path / "server.log"
    if not log.exists():
        return {}
    asked = (r["request"] for r in lines(log) if "request" in r)
    return collections.Counter(json.dumps(r.get("messages", r.get("prompt"))) for r in asked)
