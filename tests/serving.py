"""A pico model served on loopback, in a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

import tiny
from respike.loading import Model, load
from respike.server.app import make_app
from respike.server.service import Service
from respike.server.settings import Settings

TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    + tiny.CHAT_TEMPLATE.replace("message['content']", "(message['content'] or '')")
)


def pico_model(folder: Path) -> Model:
    """Llama-like, with a chat template that knows tools."""
    import json

    tiny.save_tiny(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"chat_template": TOOL_TEMPLATE}), encoding="utf-8")
    return load(folder)


class Served:
    """A server that runs."""

    def __init__(self, service: Service, address: str) -> None:
        self.service, self.address = service, address

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **options)

    def idle(self) -> bool:
        """Wait until nothing runs; whether that was so within seconds."""
        for _ in range(200):
            if not self.service.scheduler.load:
                return True
            time.sleep(0.05)
        return False


@contextmanager
def serving(model: Model, name: str = "pico", **changes: Any) -> Iterator[Served]:
    service = Service(model, name, Settings(**changes))
    config = uvicorn.Config(make_app(service), access_log=False, log_level="critical")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(400):
            if server.started:
                break
            time.sleep(0.05)
        try:
            yield Served(service, address)
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()
    assert not service.scheduler.is_alive()
