"""The page in real headless Chromium, over a server that says what a test scripts."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HELD = "held"                     # in a script: wait until the test lets go on


def say(text: str, size: int = 7) -> list[dict]:
    """Deltas of a text in pieces."""
    return [{"content": text[at:at + size]} for at in range(0, len(text), size)]


class Scripted:
    """A server of the page whose replies are `script`s, one a request: lists of deltas, HELD, a dict with "error" (a chunk of
    its own), a number (HTTP status, with an error in OpenAI's shape) or None (the connection breaks off). asked: the bodies of
    requests; feedback: the records; key: what is asked for; gone: replies that the client left."""

    def __init__(self):
        self.scripts, self.asked, self.feedback, self.key, self.gone, self.keys = [], [], [], None, 0, []
        self.go = threading.Event()
        self.url = ""

    def app(self):
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, StreamingResponse
        from runtime.server import page
        app = FastAPI(redirect_slashes=False)
        app.include_router(page.router)

        def refused(status: int) -> JSONResponse:
            return JSONResponse({"error": {"message": f"refused with {status}, for a reason", "type": "x", "param": None, "code": None}}, status)

        def known(request: Request) -> bool:
            self.keys.append(request.headers.get("authorization"))
            return self.key is None or self.keys[-1] == f"Bearer {self.key}"

        @app.get("/v1/models")
        async def models(request: Request):
            return {"data": [{"id": "one"}, {"id": "two"}]} if known(request) else refused(401)

        @app.get("/v1/feedback")
        async def offered(request: Request):
            return {"enabled": True} if known(request) else refused(401)

        @app.post("/v1/feedback")
        async def keep(request: Request):
            self.feedback.append(await request.json())
            return {}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            if not known(request):
                return refused(401)
            self.asked.append(await request.json())
            script = self.scripts.pop(0)
            return refused(script) if isinstance(script, int) else StreamingResponse(self._stream(script, request), media_type="text/event-stream")
        return app

    async def _stream(self, script: list, request):
        def line(**chunk) -> str:
            return f"data: {json.dumps({'id': f'chatcmpl-{len(self.asked)}', 'object': 'chat.completion.chunk', **chunk})}\n\n"

        try:
            yield ": ping\n\n" + line(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            calls = False
            for part in script:
                if part is None:
                    await asyncio.sleep(0.1)              # what was said before is to arrive
                    raise ConnectionError
                if part == HELD:
                    while not self.go.is_set():
                        await asyncio.sleep(0.01)
                        if await request.is_disconnected():
                            self.gone += 1
                            return
                elif "error" in part:
                    yield line(**part)
                    return
                else:
                    calls = calls or "tool_calls" in part
                    yield line(choices=[{"index": 0, "delta": part, "finish_reason": None}])
            yield line(choices=[{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}])
            yield line(choices=[], usage={"prompt_tokens": 5, "completion_tokens": len(script), "total_tokens": 5 + len(script)})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone += 1
            raise


@pytest.fixture(scope="session")
def scripting():
    uvicorn = pytest.importorskip("uvicorn", reason="the page is served by uvicorn: pip install '.[serve]'")
    script = Scripted()
    server = uvicorn.Server(uvicorn.Config(script.app(), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    script.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield script
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture
def script(scripting) -> Scripted:
    url = scripting.url
    scripting.__init__()
    scripting.url = url
    return scripting


@pytest.fixture(scope="module")             # while it is open, this thread is in an event loop
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    with playwright.sync_playwright() as drivers:
        browser = drivers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser) -> Callable:
    """visit(url, **options of a context) -> the page, ready to be used. At the end nothing may have been complained of in its console
    but what `allowed` says, no exception may have come out, and the policy may have refused nothing."""
    opened, said = [], []

    def visit(url: str, allowed: str = "\0", **options):
        context = browser.new_context(**{"reduced_motion": "reduce", "viewport": {"width": 1100, "height": 800}, **options})
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        context.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") and allowed not in message.text else None)
        context.on("weberror", lambda error: said.append(str(error.error)))
        page.goto(url)
        page.locator("#model option, dialog[open], .notice").first.wait_for(state="attached")         # it has asked the server
        return page

    yield visit
    for context in opened:
        context.close()
    assert said == []
