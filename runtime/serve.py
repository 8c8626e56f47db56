"""Serve bundles over HTTP, as OpenAI's API does: `python -m runtime.serve BUNDLE [BUNDLE ...]`.

Clients that know OpenAI's API work unchanged: give them the printed address with /v1 as the base URL, and a bundle's folder
name as the model. SIGTERM or Ctrl-C finishes the replies in work, refuses new requests with 503 and ends with exit code 0;
a second one ends at once.
"""

import asyncio
import ipaddress
import logging
import signal
from dataclasses import dataclass
from pathlib import Path

from .cli import arg, run
from .generate import OpeningOptions

EXAMPLES = """examples:
  %(prog)s build/smollm2-135m-int4
  %(prog)s build/smollm2-135m-int4 build/qwen3-0.6b-int4 --max-memory-mb 1500
  %(prog)s build/smollm2-135m-int4 --host 0.0.0.0 --api-keys keys.txt

then:
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
  OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")          # in Python, with pip install openai
"""
LIMITS = "limits"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(OpeningOptions):
    """Serve bundles over HTTP, as OpenAI's API does."""
    bundles: tuple[Path, ...] = arg(positional=True, metavar="BUNDLE", help="folders of bundles, and of encoders for embeddings; clients name them by the folder's "
                                    "name, and the first answers where none is named")
    host: str = arg("127.0.0.1", help="address to listen at; 0.0.0.0 is every one of this machine's", group="who may ask")
    port: int = arg(8080, help="port to listen at; 0: a free one", least=0, most=65535, group="who may ask")
    api_keys: Path | None = arg(None, help="file of API keys, one a line, of which a client must give one", group="who may ask")
    cors: tuple[str, ...] = arg((), metavar="ORIGIN", help="pages that may ask from a browser, such as https://app.example.org, or *",
                                group="who may ask")
    hosts: tuple[str, ...] = arg((), metavar="NAME", help="public names by which a server without keys may be called", group="who may ask")
    max_memory_mb: float | None = arg(None, help="of all loaded bundles, weights and caches: the least recently used is unloaded",
                                      above=0, group=LIMITS)
    rows: int = arg(16, help="replies made at once, a bundle", least=1, most=1024, group=LIMITS)
    queue: int = arg(64, help="requests that may wait, a bundle; more are answered 429", least=0, group=LIMITS)
    max_active: int = arg(256, help="requests in work at once, of all bundles; more are answered 429", least=1, group=LIMITS)
    max_tokens: int | None = arg(None, help="tokens of a reply at most, whatever a client asks", least=1, group=LIMITS)
    max_body_mb: float = arg(2.0, help="of a request; a larger one is answered 413", above=0, most=1024, group=LIMITS)
    cache_mb: float | None = arg(None, help="for the running requests' keys and values, a bundle; default: a part of what is free",
                                 above=0, group=LIMITS)
    prefix_mb: float | None = arg(None, help="for what is kept of earlier prompts, a bundle; default: 512, or a quarter of what is free",
                                  least=0, group=LIMITS)
    client_timeout: float = arg(30.0, help="seconds a client may take to send its request, or not read its reply", above=0, group=LIMITS)
    feedback: Path | None = arg(None, help="SQLite file in which to keep what people say of replies; python -m "
                                           f"{__package__}.feedback exports it to learn from")
    slots_dir: Path | None = arg(None, help="folder into which clients may save what is kept of prompts (POST /slots/0?action=save)")


def main(argv=None) -> int:
    return run(ServeOptions, "serve", argv, epilog=EXAMPLES)


def serve(options: ServeOptions) -> None:
    """Listen until told to stop. Raises UserError, CheckFailed."""
    from .server import connection, logs
    logs.configure()
    if not options.api_keys and not _is_loopback(options.host):
        logs.say(f"anyone who reaches {options.host}:{options.port} may ask, because there are no --api-keys", logging.WARNING)
    connection.most_files()                       # raises the limit, before anything is opened
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    from .server import app, connection, service
    bundles = service.Service(options)
    server = connection.Server(*app.create_app(bundles), bundles)
    sockets = connection.bind(options.host, options.port)
    loop, where = asyncio.get_running_loop(), sockets[0].getsockname()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    print(f"http://{host}:{where[1]} serves {', '.join([*bundles.models, *bundles.encoders])}", flush=True)
    loading = asyncio.create_task(bundles.load_first())
    loading.add_done_callback(lambda done: done.cancelled() or done.exception() and server.stop())
    try:
        await server.serve(sockets)
        if loading.done():
            loading.result()                      # raises why it could not be loaded
    finally:
        await bundles.close()
        if broken_off := server.server_state.tasks:
            await asyncio.wait(broken_off, timeout=1)          # to tell their clients


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    raise SystemExit(main())
