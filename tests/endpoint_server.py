"""Serves the handler of a model's folder as the server of Hugging Face Inference Endpoints does.

    python tests/endpoint_server.py FOLDER

It prints its port and serves one request at a time. It loads `handler.py`, reads bodies of JSON and of sound, takes
parameters also from the query, and answers an exception with `{"error": message}` and status 400, as
huggingface-inference-toolkit does. That server is not on PyPI; nothing here tests its own code.
"""

import importlib.util
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit


def load_handler(folder: str) -> Any:
    """The handler of a folder, which is found on the import path and by a file's name."""
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", Path(folder) / "handler.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(folder)


def parameter(text: str) -> Any:
    """A parameter of the query: an integer, true, false or a text."""
    return int(text) if text.isnumeric() else {"true": True, "false": False}.get(text, text)


class RequestHandler(BaseHTTPRequestHandler):
    handler: Any

    def do_POST(self):
        try:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind = self.headers["Content-Type"].partition(";")[0]
            if kind != "application/json" and not kind.startswith("audio/"):
                raise ValueError(f'Content type "{kind}" not supported.')
            data = json.loads(body) if kind == "application/json" else {"inputs": body}
            query = {name: parameter(value) for name, value in parse_qsl(urlsplit(self.path).query)}
            if query and "parameters" not in data:
                data["parameters"] = query
            status, answer = 200, type(self).handler(data)
        except Exception as error:
            status, answer = 400, {"error": str(error)}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    RequestHandler.handler = load_handler(sys.argv[1])
    with HTTPServer(("127.0.0.1", 0), RequestHandler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
