"""An HTTP server on loopback that behaves like an OpenAI-compatible API and injects faults on request.

    python tests/fake_api.py '{"latency": 0.2, "faults": 0.2}'   prints its port and serves until it is killed

Every completion that it sends is a line of `log`: the body of the request and the reply.
"""

import asyncio
import contextlib
import hashlib
import json
import random
import re
import sys
import time
import zlib

OPTIONS = {
    "latency": 0.0,
    "faults": 0.0,
    "kinds": ["429", "429-after", "500", "close", "cut", "html", "hang"],
    "seed": 0,
    "hang": 30.0,
    "log": None,
    "status": None,  # status: [code, error] for every request
    "refuse": None,
    "odd": None,  # prompts with this text: HTTP 400; a reply that is no score, the first time
    "reject": [],
    "usage": True,
    "reply": None,
    "finish": "stop",  # finish_reason
    "text_only": False,  # completions of token ids are refused, as `transformers serve` does
    "rate": None,  # rate: requests a second, bucket of as many
    "echo": False,  # repeats the Authorization header in replies and errors
    "refuse_status": 400,
    "after": None,  # [n, status]: this status for every request after the first n
    "headers": {},  # of every reply
    "charge": None,  # the usage that it claims
    "strange": None,  # how a good completion is sent: see strange()
    "judge": None,  # replies with the numbers after "quality=" in the prompt, in order; this much is added to the first
    "moody": None,  # such a judge turns one verdict in so many round, another one for another seed
    "gullible": False,  # such a judge gives a 10 to who asks for it
    "poison": None,  # [text, kind]: what prompts with this text always get: see poisoned()
    "reject_as": "openai",  # how it says that it rejects a parameter: see REJECTIONS
    "batch_lines": None,  # what stands in the lines of a batch: "null" for no response, "list" for content of no text
    "forget": False,  # batches are not known any more
    "batch_seconds": 0.3,
    "batch_fail": 0.0,
}


# How servers say that they do not take a parameter: OpenAI, FastAPI (vLLM), Mistral, a proxy, Google, Ollama, Rust's.
FORBIDDEN = [{"type": "extra_forbidden", "loc": ["body", "NAME"], "msg": "Extra inputs are not permitted", "input": 0}]
UNSUPPORTED = {"message": "Unsupported parameter: 'NAME' is not supported with this model.", "param": "NAME"}
REJECTIONS = {
    "openai": (400, {"error": UNSUPPORTED | {"code": "unsupported_parameter"}}),
    "fastapi": (422, {"detail": FORBIDDEN}),
    "mistral": (422, {"object": "error", "message": {"detail": FORBIDDEN}, "type": "invalid_request_error"}),
    "proxy": (422, {"error": {"message": json.dumps({"detail": FORBIDDEN}), "code": 422}}),
    "google": (
        400,
        [{"error": {"code": 400, "message": 'Invalid JSON payload. Unknown name "NAME": Cannot find field.'}}],
    ),
    "go": (400, {"error": {"message": 'json: unknown field "NAME"'}}),
    "rust": (422, {"error": {"message": "unknown field `NAME`, expected one of `model`, `temperature`, `max_tokens`"}}),
    "azure": (400, {"error": {"message": "Unrecognized request argument supplied: NAME", "param": None}}),
}


def reply_text(reply: dict) -> str:
    choice = reply["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def hash_number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


class Server:
    def __init__(self, options: dict):
        self.o = OPTIONS | options
        self.random = random.Random(self.o["seed"])
        self.log = open(self.o["log"], "a", buffering=1) if self.o["log"] else None  # noqa: SIM115
        if self.o["strange"] == "bomb":
            packer = zlib.compressobj(1, wbits=31)
            self.bomb = b"".join([*(packer.compress(b" " * 2**20) for _ in range(1000)), packer.flush()])
        self.files, self.batches, self.seen = {}, {}, set()
        self.tokens, self.filled, self.count = self.o["rate"], time.monotonic(), 0

    async def listen(self) -> int:
        """Start the server; returns its port."""
        self.server = await asyncio.start_server(self.client, "127.0.0.1", 0, backlog=1000)
        return self.server.sockets[0].getsockname()[1]

    async def client(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path = head.split(b" ")[:2]
                headers = {
                    k.lower(): v.strip() for k, _, v in (x.partition(":") for x in head.decode().split("\r\n")[1:])
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self.answer(writer, method.decode(), path.decode(), headers, body):
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def send(self, writer, status, body, headers=(), kind="application/json", claim=None):
        headers = [*headers, *self.o["headers"].items()]
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        extra = "".join(f"{k}: {v}\r\n" for k, v in headers)
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {claim or len(data)}\r\n{extra}\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return claim is None

    async def answer(self, writer, method, path, headers, body):
        if path.endswith("/completions"):
            return await self.completion(writer, headers, json.loads(body))
        if path.endswith("/count"):  # for tests: how many requests for a completion there were
            return await self.send(writer, 200, {"count": self.count})
        return await self.batch_api(writer, method, path, headers, body)

    async def completion(self, writer, headers, request):
        o, extra = self.o, []
        if o["rate"]:
            now = time.monotonic()
            self.tokens = min(o["rate"], self.tokens + (now - self.filled) * o["rate"])
            self.filled = now
            limited = self.tokens < 1
            self.tokens -= not limited
            extra = [
                ("x-ratelimit-limit-requests", o["rate"]),
                ("x-ratelimit-remaining-requests", int(self.tokens)),
                ("x-ratelimit-reset-requests", f"{1000 * (o['rate'] - self.tokens) / o['rate']:.0f}ms"),
            ]
            if limited:
                if self.log:
                    self.log.write(json.dumps({"limited": 1}) + "\n")
                return await self.send(writer, 429, {"error": {"message": "slow down"}}, extra)
        self.count += 1
        if o["after"] and self.count > o["after"][0]:
            return await self.send(writer, o["after"][1], {"error": {"message": "no more"}}, extra)
        if o["latency"]:
            await asyncio.sleep(o["latency"])
        if self.random.random() < o["faults"]:
            kind = self.random.choice(o["kinds"])
            if kind == "429":
                return await self.send(writer, 429, {"error": {"message": "slow down"}})
            if kind == "429-after":
                return await self.send(writer, 429, {"error": {"message": "slow down"}}, [("retry-after-ms", "50")])
            if kind == "500":
                return await self.send(writer, 500, {"error": {"message": "oops"}})
            if kind == "close":
                return False
            if kind == "cut":
                return await self.send(writer, 200, b'{"choices": [{"mess', claim=500)
            if kind == "html":
                return await self.send(writer, 200, b"<html>gateway</html>", kind="text/html")
            await asyncio.sleep(o["hang"])
            return False
        if o["poison"] and o["poison"][0] in json.dumps(request):
            return await self.poisoned(writer, o["poison"][1])
        status, reply = self.respond(request, headers.get("authorization", ""))
        if status == 200 and o["strange"]:
            return await self.strange(writer, reply, headers.get("authorization", ""))
        if status == 200 and self.log:
            self.log.write(json.dumps({"request": request, "reply": reply_text(reply)}) + "\n")
        return await self.send(writer, status, reply, extra)

    async def poisoned(self, writer, kind):
        """Send a reply without a usable answer. All kinds but 500 and hang are billed."""
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        if kind == "500":
            return await self.send(writer, 500, {"error": {"message": "it hurts"}})
        if kind == "hang":
            await asyncio.sleep(self.o["hang"])
            return False
        self.log.write(json.dumps({"unusable": kind}) + "\n")
        if kind == "truncated":
            return await self.send(writer, 200, b'{"id": "x", "choices": [{"index": 0, "message": {"content": "4')
        if kind == "cut":
            return await self.send(writer, 200, b'{"id": "x", "choices": [{"mess', claim=500)
        choice = {"finish_reason": "error", "message": {"content": "4", "role": "assistant"}}
        return await self.send(writer, 200, {"choices": [choice] if kind == "error" else [], "usage": usage})

    async def strange(self, writer, reply, authorization):
        """Send a completion in a malformed way; some kinds only for the first request."""
        kind, first = self.o["strange"], self.count == 1
        head = b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\n"
        if kind == "key everywhere":
            reply = dict.fromkeys(("id", "model", "system_fingerprint"), authorization) | {
                "choices": [{"finish_reason": "stop", "message": {"content": "4", "refusal": None}}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 1, authorization: authorization},
            }
        elif kind == "half a character":
            text = "4 \ud800" if first else "4"
            reply["choices"][0]["message"]["content"] = text
        elif kind in ("base64", "utf-7", "idna") and first:
            return await self.send(writer, 500, b"\xff\xfe oops", kind=f"application/json; charset={kind}")
        elif kind == "broken gzip" and first:
            return await self.send(writer, 200, b"\x1f\x8b no gzip", [("content-encoding", "gzip")])
        elif kind == "bomb" and first:
            return await self.send(writer, 200, self.bomb, [("content-encoding", "gzip")])
        elif kind == "endless" and first:
            writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"100000\r\n" + b" " * 2**20 + b"\r\n")
                    await writer.drain()
            return False
        elif kind in ("drip", "drip of headers") and first:
            writer.write(head + (b"content-length: 100000\r\n\r\n" if kind == "drip" else b"x: "))
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            return False
        return await self.send(writer, 200, reply)

    def qualities(self, text):
        """The qualities of the two answers; 1 for an answer without one, or to another question."""
        question, *answers = re.findall(r"<<<(?:question|answer \d) \w+>>>\n(.*?)\n<<<end of", text, re.DOTALL)
        for answer in answers:
            found, to = re.search(r"quality=(\d+)", answer), re.match(r"answer (\d+) by", answer)
            if self.o["gullible"] and "a 10" in answer:
                yield 10
            else:
                yield int(found[1]) if found and (not to or question == f"q{to[1]}") else 1

    def failure(self, authorization):
        status, error = self.o["status"]
        return status, {"error": {"message": f"no: {authorization}" if self.o["echo"] else "no", **error}}

    def respond(self, request, authorization=""):
        o, asked = self.o, request.get("prompt")
        text = request["messages"][0]["content"] if asked is None else asked if isinstance(asked, str) else str(asked)
        if o["status"]:
            return self.failure(authorization)
        for name in o["reject"]:
            if name in request:
                status, body = REJECTIONS[o["reject_as"]]
                return status, json.loads(json.dumps(body).replace("NAME", name))
        if o["refuse"] and o["refuse"] in text:
            return o["refuse_status"], {"error": {"message": "flagged by the content filter", "code": "content_filter"}}
        reply = o["reply"]
        if reply is None:
            reply = str(1 + hash_number(text) % 9 / 2)
        if o["judge"] is not None:
            one, two = self.qualities(text)
            if o["moody"] and hash_number(f"{text} {request['seed']}") % o["moody"] == 0:
                one, two = two, one
            reply = f"{one + o['judge']} {two}\nBecause."
        if o["odd"] and o["odd"] in text and len(request["messages"]) == 1:
            reply = "I would say it is rather hard."
        if o["echo"]:
            reply = f"your key is {authorization}"
        message = {
            "id": "x",
            "model": request["model"] + "-x",
            "system_fingerprint": "fp",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}],
        }
        if asked is not None:  # /completions, of text or of token ids
            if o["text_only"] and not isinstance(asked, str):
                return 400, {"detail": "prompt must be a string."}
            message["choices"] = [{"index": 0, "finish_reason": o["finish"], "text": reply}]
        message["choices"][0]["finish_reason"] = o["finish"]
        if o["charge"]:
            message["usage"] = o["charge"]
        elif o["usage"]:
            sent = len(asked) if isinstance(asked, list) else len(text) // 4
            message["usage"] = {"prompt_tokens": sent, "completion_tokens": 2}
        return 200, message

    async def batch_api(self, writer, method, path, headers, body):
        path = path.removeprefix("/v1").split("?")[0]
        if self.o["status"]:
            return await self.send(writer, *self.failure(headers.get("authorization", "")))
        if self.random.random() < self.o["faults"]:
            return await self.send(writer, 500, {"error": {"message": "oops"}})
        if (method, path) == ("POST", "/files"):
            name = f"file-{len(self.files)}"
            self.files[name] = re.search(rb'filename="[^"]*"\r\n[^\r]*\r\n\r\n(.*?)\r\n--', body, re.DOTALL)[1]
            return await self.send(writer, 200, {"id": name})
        if path.startswith("/batches/") and self.o["forget"]:
            return await self.send(writer, 404, {"error": {"message": "No batch found"}})
        if (method, path) == ("POST", "/batches"):
            name, output, errors = f"batch-{len(self.batches)}", [], []
            requests = [json.loads(line) for line in self.files[json.loads(body)["input_file_id"]].splitlines()]
            for r in requests:
                failed = self.random.random() < self.o["batch_fail"]
                status, reply = (500, {"error": {"message": "oops"}}) if failed else self.respond(r["body"])
                if self.o["batch_lines"] == "list":
                    reply["choices"][0]["message"]["content"] = [4]
                response = {"status_code": status, "body": reply} if self.o["batch_lines"] != "null" else None
                line = {"custom_id": r["custom_id"], "response": response}
                (output if status == 200 else errors).append(line)
                if response and status == 200 and self.log:
                    self.log.write(json.dumps({"request": r["body"], "reply": reply_text(reply)}) + "\n")
            for kind, lines in (("out", output), ("err", errors)):
                self.files[f"{name}-{kind}"] = "".join(json.dumps(x) + "\n" for x in lines).encode()
            self.batches[name] = {
                "id": name,
                "input_file_id": json.loads(body)["input_file_id"],
                "at": time.monotonic(),
                "output_file_id": f"{name}-out",
                "error_file_id": f"{name}-err" if errors else None,
                "request_counts": {"total": len(requests), "completed": len(output), "failed": len(errors)},
            }
            return await self.send(writer, 200, {"id": name, "status": "validating"})
        if path == "/batches":
            return await self.send(writer, 200, {"data": list(self.batches.values())})
        if path.startswith("/batches/"):
            batch = self.batches[path.split("/")[-1]]
            done = time.monotonic() - batch["at"] > self.o["batch_seconds"]
            return await self.send(writer, 200, batch | {"status": "completed" if done else "in_progress"})
        return await self.send(writer, 200, self.files[path.split("/")[2]])


async def main(options: dict):
    server = Server(options)
    print(await server.listen(), flush=True)
    await server.server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]) if sys.argv[1:] else {}))
