"""Serving until told to stop."""

import ipaddress
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from respike.errors import BackendError, UsageError

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def check_extra() -> None:
    """Whether what serving needs is installed.

    Raises:
        BackendError: It is not.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"serving needs {', '.join(missing)}, not installed",
            hint="run `pip install 'respike[serve]'`",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, api_key: str | None) -> None:
    """Refuse to be reachable by others without a key.

    Raises:
        UsageError: It would be.
    """
    if not is_loopback(host) and not api_key:
        raise UsageError(
            f"--host {host} can be reached by others, and there is no API key",
            hint="set RESPIKE_API_KEY or --api-key, or leave --host at 127.0.0.1",
        )


def serve(
    model: Any,
    host: str,
    port: int,
    settings: Any,
    *,
    states: list[Path],
    ready: Callable[[str, list[Any]], None],
) -> None:
    """Serve a loaded model until SIGINT or SIGTERM; running answers are finished first.

    Args:
        model: A `respike.Model`.
        host: Address to listen at.
        port: 0 takes any that is free.
        settings: `respike.server.settings.Settings`.
        states: State files of `respike read`, offered as documents.
        ready: Told the address and these documents, once requests can come.

    Raises:
        UsageError: The address cannot be had.
        DataError: A state file is not of this model.
    """
    import socket

    import uvicorn

    from respike.documents.reading import load_reading
    from respike.server.app import make_app
    from respike.server.heap import return_freed_memory
    from respike.server.service import Service

    return_freed_memory()
    service = Service(model, model.path.stem if model.path.is_file() else model.path.name, settings)
    documents = [service.add_reading(path.name, load_reading(path, model)) for path in states]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}") from None
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listener.getsockname()[1]}", documents)
        config = uvicorn.Config(
            make_app(service),
            access_log=False,
            log_level="critical",
            timeout_graceful_shutdown=int(settings.grace_seconds),
            lifespan="on",
        )
        uvicorn.Server(config).run(sockets=[listener])
