"""Real servers in threads, over bundles of tiny random models. tests/runtime/conftest.py brings the fixtures to every test."""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.serve import ServeOptions

THINKING = """\
{%- if tools %}{{ '<|im_start|>system\n# Tools\n<tools>\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ '</tools>\n\
Answer with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' }}{% endif -%}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor -%}
{{- '<|im_start|>assistant\n' }}{% if enable_thinking %}{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}"""


@dataclass(frozen=True)
class Running:
    """A server that listens. url: without a slash at its end. call(function, ...): run in the server's event loop."""

    url: str
    port: int
    service: object
    server: object
    loop: asyncio.AbstractEventLoop

    def call(self, function, *arguments):
        async def do():
            result = function(*arguments)
            return await result if asyncio.iscoroutine(result) else result
        return asyncio.run_coroutine_threadsafe(do(), self.loop).result(60)


@contextlib.contextmanager
def running(*bundles: Path, load: bool = True, **options) -> Iterator[Running]:
    """A server over these bundles at a free port; options: fields of ServeOptions. load: whether the first is loaded."""
    from runtime.server import app, connection, service
    started, known = threading.Event(), []

    async def serve() -> None:
        bundled = service.Service(ServeOptions(bundles=bundles, **{"threads": 1, "prefix_mb": 16, **options}))
        server = connection.Server(*app.create_app(bundled), bundled)
        sockets = connection.bind("127.0.0.1", 0)
        if load:
            await bundled.load_first()
        port = sockets[0].getsockname()[1]
        known.append(Running(f"http://127.0.0.1:{port}", port, bundled, server, asyncio.get_running_loop()))
        started.set()
        try:
            await server.serve(sockets)
        finally:
            await bundled.close()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            known.append(error)
            started.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait(60)
    if isinstance(known[0], BaseException):
        raise known[0]
    try:
        yield known[0]
    finally:
        known[0].server.should_exit = known[0].server.force_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
    assert known[1:] == []


@pytest.fixture(scope="session")
def served_bundle(tiny_bundle, tmp_path_factory) -> Path:
    """An int4 bundle of 256 tokens' context, called `tiny`, for the native core."""
    return Path(shutil.copytree(tiny_bundle("smollm2", 4)[1], tmp_path_factory.mktemp("served") / "tiny"))


@pytest.fixture(scope="session")
def server(served_bundle) -> Iterator[Running]:
    """One server for all tests that need nothing special of it."""
    with running(served_bundle) as one:
        yield one


@pytest.fixture
def serve(served_bundle) -> Iterator[Callable[..., Running]]:
    """serve(*bundles, **options) -> a server of its own, with these options (keys, limits), until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *bundles, **options: stack.enter_context(running(*(bundles or [served_bundle]), **options))


@pytest.fixture(scope="session")
def thinking(tiny_checkpoint, tmp_path_factory) -> Iterator[Running]:
    """A server of a bundle called `thinker`: a tiny random model with 4,096 tokens' context, whose chat template knows tools (in
    Hermes' syntax) and thoughts."""
    from export import onnx
    folder = tmp_path_factory.mktemp("thinking")
    shutil.copytree(tiny_checkpoint("smollm2", max_position_embeddings=4096), folder / "checkpoint")
    (folder / "checkpoint" / "chat_template.jinja").write_text(THINKING)
    assert onnx.main([str(folder / "checkpoint"), "-o", str(folder / "thinker")]) == 0
    with running(folder / "thinker") as one:
        yield one
