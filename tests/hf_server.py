"""An OpenAI-compatible server around transformers' generate, one request at a time, fp32. For tests only.

    PORT=8000 python tests/hf_server.py FOLDER   serves until it is killed

As vLLM documents it: /v1/completions takes a text (its tokenizer adds special tokens as it is configured to) or a list
of token ids (taken as they are); /v1/chat/completions applies the folder's chat template; answers end at the eos ids of
generation_config.json and at `stop_token_ids`; special tokens are left out of the text, and counted.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch


def make_server(folder, port: int = 0) -> HTTPServer:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(path: str, request: dict) -> dict:
        prompt = request.get("prompt")
        if path.endswith("/chat/completions"):
            chat = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), *request.get("stop_token_ids", [])}
        sampling = {"do_sample": False}
        if request["temperature"] > 0:
            torch.manual_seed(request["seed"])
            sampling = {"do_sample": True, "temperature": request["temperature"], "top_p": request["top_p"]}
        with torch.no_grad():
            made = model.generate(
                torch.tensor([ids]),
                max_new_tokens=request["max_tokens"],
                eos_token_id=sorted(ends),
                pad_token_id=0,
                **sampling,
            )
        new = made[0, len(ids) :].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True)
        choice = {"index": 0, "finish_reason": "stop" if new[-1] in ends else "length"}
        choice |= {"text": text} if prompt is not None else {"message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        return {"model": request["model"], "choices": [choice], "usage": usage}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body = json.dumps(answer(self.path, request)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):  # /v1/models: whether it is there
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    return HTTPServer(("127.0.0.1", port), Handler)


def start(folder) -> HTTPServer:
    """In a thread of this process; its address is server_address."""
    server = make_server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    make_server(sys.argv[1], int(os.environ["PORT"])).serve_forever()
