"""The page in real headless Chromium: over a server of the test's script, and over the real one."""

import json
import re

import pytest

from page_fixtures import HELD, say

WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def settle(page):
    """Wait until no reply is being made."""
    page.locator("#send[aria-label=Send]").wait_for()
    assert page.locator("[aria-busy=true]").count() == 0


def messages(page):
    return [item.inner_text().strip() for item in page.locator("#messages .bubble, #messages .assistant > .prose").all()]


def set_up(page, **values):
    if not page.locator("dialog[open]").count():
        page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"dialog [name={name}]").fill(value)
    page.get_by_role("button", name="Done", exact=True).click()


def test_the_files_and_no_others(script):
    httpx = pytest.importorskip("httpx")
    from runtime.server.page import FILES
    with httpx.Client(base_url=script.url) as client:
        for name in FILES:
            answer = client.get("/" if name == "index.html" else f"/page/{name}")
            assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
            assert "script-src 'self'" in answer.headers["content-security-policy"] and "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["content-type"].split(";")[0] == {"html": "text/html", "js": "text/javascript", "css": "text/css",
                                                                   "svg": "image/svg+xml"}[name.rpartition(".")[2]]
            assert client.get(answer.url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
            assert not re.search(r"https?://(?!www\.w3\.org/(2000/svg|1999))[\w.]", answer.text), name         # no foreign host
        for path in ("/page/", "/page/index.html", "/page/page.py", "/page/../page.py", "/page/%2e%2e/page.py", "/page//etc/passwd", "/page/chat.js/"):
            assert client.get(path).status_code == 404, path


def test_a_conversation(script, visit):
    """Typed, streamed, retried, edited, and there again after a reload."""
    script.scripts = [[{"reasoning_content": "Let me "}, {"reasoning_content": "see"}, *say("It is **Rome**."), HELD, *say(" Surely.")], say("Rome again"), say("Paris")]
    page = visit(script.url)
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("What is the capital")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("of Italy?")
    page.keyboard.press("Enter")
    page.locator("strong", has_text="Rome").wait_for()
    assert messages(page) == ["What is the capital\nof Italy?", "It is Rome."] and page.locator("#send").get_attribute("aria-label") == "Stop"
    assert page.locator(".thought .prose").is_hidden() and page.locator("summary").inner_text() == "Thought"
    page.locator("summary").click()
    assert page.locator(".thought .prose").inner_text() == "Let me see"
    script.go.set()
    settle(page)
    assert messages(page)[-1] == "It is Rome. Surely." and page.locator(".thought .prose").is_visible()      # still unfolded
    assert re.fullmatch(r"first token \d+\.\d\d s · [\d.]+ tokens/s · \d+ tokens", page.locator(".figures").inner_text())
    assert page.locator("#said").inner_text() == "It is **Rome**. Surely."                       # what a screen reader hears
    request = script.asked[0]
    assert request["messages"] == [{"role": "user", "content": "What is the capital\nof Italy?"}] and request["stream"] is True and request["model"] == "one"
    assert not {"temperature", "seed", "max_tokens", "tools", "response_format", "chat_template_kwargs"} & set(request)
    page.get_by_role("button", name="Retry").click()
    settle(page)
    assert messages(page)[1:] == ["Rome again"] and script.asked[1]["messages"] == request["messages"]
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("The message").fill("And of France?")
    page.keyboard.press("Enter")
    settle(page)
    assert messages(page) == ["And of France?", "Paris"] and script.asked[2]["messages"] == [{"role": "user", "content": "And of France?"}]
    page.reload()
    assert messages(page) == ["And of France?", "Paris"] and page.title() == "What is the capital"


def test_stop(script, visit):
    """By Escape and by the button; the server hears of it, and what had been said stays and is sent along."""
    script.scripts = [[*say("One, two"), HELD], [*say("Three"), HELD], say("Four")]
    page = visit(script.url)
    for text, said, how in (("a", "One, two", lambda: page.keyboard.press("Escape")), ("b", "Three", lambda: page.get_by_role("button", name="Stop").click())):
        send(page, text)
        page.locator(".prose", has_text=said).wait_for()
        page.get_by_label("Message", exact=True).fill("not yet")
        page.keyboard.press("Enter")                                     # nothing is sent meanwhile
        how()
        settle(page)
        assert messages(page)[-1] == said and page.locator(".note").last.inner_text() == "Stopped."
    send(page, "c")
    settle(page)
    assert [one["content"] for one in script.asked[2]["messages"]] == ["a", "One, two", "b", "Three", "c"] and script.gone == 2


def test_reload_in_the_middle_keeps_what_there_was(script, visit):
    script.scripts = [[*say("Half of"), HELD]]
    page = visit(script.url)
    send(page, "a")
    page.locator(".prose", has_text="Half of").wait_for()
    page.reload()
    assert messages(page) == ["a", "Half of"] and page.locator(".note").inner_text() == "Stopped."


def test_settings_and_a_schema(script, visit):
    script.scripts = [say('{"name": "Ada", "tags": ["a", "b"], "age": 36, "at": {"city": null}}'), say("plain")]
    page = visit(script.url)
    page.get_by_label("Model").select_option("two")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("JSON schema").fill("{")
    page.get_by_role("button", name="Done").click()
    assert "not JSON" in page.get_by_label("JSON schema").evaluate("field => field.validationMessage")
    page.keyboard.press("Escape")
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    set_up(page, schema=json.dumps(schema), system="Be brief.", temperature="0.5", top_p="0.9", top_k="40", max_tokens="64", seed="7", key="secret")
    assert page.locator("#active").inner_text() == "system prompt, schema"
    page.reload()                                                            # the settings stay
    send(page, "Who?")
    settle(page)
    request = script.asked[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."} and request["model"] == "two"
    assert [request[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")] == [0.5, 0.9, 40, 64, 7]
    assert request["response_format"] == {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    assert page.locator(".values dt").all_inner_texts() == ["name", "tags", "age", "at", "city"]
    assert page.locator(".values dd").first.inner_text() == "Ada" and page.locator(".values li").all_inner_texts() == ["a", "b"]
    assert script.keys[-1] == "Bearer secret" and "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Empty all").click()
    page.get_by_role("button", name="Done").click()
    send(page, "And now?")
    settle(page)
    assert set(script.asked[1]) == {"model", "messages", "stream", "stream_options"} and messages(page)[-1] == "plain"


def test_calls_of_tools(script, visit):
    """Shown readably; results are written by hand and sent."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    script.scripts = [[{"tool_calls": [call]}, *({"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"city": "Be', 'rn"}'))], say("Sunny")]
    page = visit(script.url)
    set_up(page, tools=json.dumps(WEATHER))
    send(page, "Weather in Bern?")
    settle(page)
    assert script.asked[0]["tools"] == WEATHER and page.locator(".card dd").inner_text() == "Bern"
    page.get_by_label("Result of weather").fill('{"sky": "clear"}')
    page.get_by_role("button", name="Send the results").click()
    page.locator(".prose", has_text="Sunny").wait_for()
    settle(page)
    asked, said, result = script.asked[1]["messages"]
    assert said["tool_calls"] == [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}]
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear"}'}
    page.reload()
    assert page.locator(".card summary").all_inner_texts() == ["Calls weather", "Result of weather"] and page.locator("form.ask").count() == 0


def test_two_conversations(script, visit, tmp_path):
    """One goes on while the other is looked at; they are renamed, exported for models.finetune, deleted and brought back."""
    from models.data.records import as_messages, read_records
    script.scripts = [[*say("First"), HELD, *say(" reply")], say("Second reply")]
    page = visit(script.url)
    send(page, "one")
    page.locator(".prose", has_text="First").wait_for()
    page.get_by_role("button", name="New conversation").first.click()
    assert page.locator("#empty").is_visible()
    send(page, "two")
    settle(page)
    assert messages(page) == ["two", "Second reply"]
    script.go.set()
    page.locator("nav .running").wait_for(state="detached")
    page.locator("nav li button", has_text="one").click()
    assert messages(page) == ["one", "First reply"]
    page.get_by_label("Name of the conversation").fill("Nearly")
    page.keyboard.press("Enter")
    assert page.locator("nav li").all_inner_texts() == ["Nearly", "two"] and page.evaluate("document.activeElement.id") == "text"
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "x.json")
    assert download.value.suggested_filename == "Nearly.json"
    assert as_messages(*read_records([str(tmp_path / "x.json")])) == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "First reply"}]
    page.get_by_role("button", name="Delete").click()
    assert page.locator("nav li").all_inner_texts() == ["two"]
    page.get_by_role("button", name="Undo").click()
    assert page.locator("nav li").all_inner_texts() == ["Nearly", "two"] and messages(page) == ["one", "First reply"]
    page.get_by_role("button", name="Delete").click()
    page.reload()
    assert page.locator("nav li").all_inner_texts() == ["two"]


def test_two_tabs(script, visit):
    """What one writes the other shows, without touching what is being written there; a reply of a deleted conversation brings nothing back."""
    script.scripts = [say("First"), say("Second"), [*say("Third"), HELD]]
    page = visit(script.url)
    send(page, "one")
    settle(page)
    other = page.context.new_page()
    other.goto(script.url)
    page.get_by_role("button", name="Edit").click()
    send(other, "two")
    settle(other)
    page.locator("nav li", has_text="two").wait_for()
    assert page.get_by_label("The message").input_value() == "one"
    other.locator("nav li button", has_text="one").click()
    send(other, "three")
    other.locator(".prose", has_text="Third").wait_for()
    other.get_by_role("button", name="Delete").click()
    script.go.set()
    page.locator("nav li", has_text="one").wait_for(state="detached")
    other.wait_for_timeout(200)
    assert other.locator("nav li").all_inner_texts() == page.locator("nav li").all_inner_texts() == ["two"]
    assert len(other.evaluate("Object.keys(localStorage).filter(one => one.includes('chat'))")) == 1


def test_the_oldest_make_room(script, visit):
    script.scripts = [say("new")]
    page = visit(script.url)
    page.evaluate("""() => { for (let n = 0; n < 4; n++) localStorage.setItem("edgewright:chat:" + n, JSON.stringify(
        {id: String(n), title: "old " + n, at: n, messages: [{role: "user", content: "x".repeat(1e6)}]})); localStorage.setItem("edgewright:chat:bad", "{"); }""")
    page.reload()
    assert page.locator("nav li").all_inner_texts() == ["old 3", "old 2", "old 1", "old 0"]
    send(page, "hello")
    settle(page)
    assert page.locator("nav li").all_inner_texts() == ["hello", "old 3", "old 2", "old 1"] and "the oldest went: old 0" in page.locator(".notice").inner_text()


def test_errors_in_words(script, visit):
    script.scripts = [400, [*say("Well"), {"error": {"message": "The model fell over."}}], [*say("Hm"), None], say("fine")]
    page = visit(script.url, allowed="ailed to load resource")
    for said, kept in (("refused with 400, for a reason", ""), ("The model fell over.", "Well"), ("The connection broke before the reply was whole.", "Hm")):
        send(page, "a")
        page.locator(".error").last.wait_for()
        settle(page)
        assert page.locator(".error").last.inner_text() == said and messages(page)[-1] == kept
    send(page, "b")
    settle(page)
    assert [one["content"] for one in script.asked[-1]["messages"]] == ["a\n\na", "Well", "a", "Hm", "b"] and messages(page)[-1] == "fine"
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Retry").last.click()
    page.locator(".error", has_text="The server does not answer").wait_for()


def test_a_server_with_keys(script, visit):
    script.key, script.scripts = "sesame", [say("open")]
    page = visit(script.url, allowed="401")
    page.get_by_label("API key").wait_for()
    assert page.evaluate("document.activeElement.name") == "key"
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    page.locator("#model option").first.wait_for(state="attached")
    send(page, "a")
    settle(page)
    assert messages(page) == ["a", "open"] and page.evaluate("Object.values(localStorage).join().includes('sesame')") is False


def test_feedback(script, visit):
    script.scripts = [say("Paris"), say("Lyon")]
    page = visit(script.url)
    set_up(page, system="Be brief.")
    for text in ("of France?", "of Italy?"):
        send(page, text)
        settle(page)
    page.locator(".assistant").first.hover()
    page.get_by_role("button", name="Good reply").first.click()
    page.locator("[aria-pressed=true]").wait_for()
    page.get_by_role("button", name="Bad reply").last.click()
    page.get_by_label("What the reply should have been").fill("Rome")
    page.keyboard.press("Enter")
    page.locator("form.ask").wait_for(state="detached")
    from runtime.feedback import checked
    first, second, third = map(checked, script.feedback)
    assert first["rating"] == 1 and first["reply"] == {"role": "assistant", "content": "Paris"} and first["id"] == "chatcmpl-1" and first["model"] == "one"
    assert [one["content"] for one in first["messages"]] == ["Be brief.", "of France?"]
    assert second["rating"] == third["rating"] == -1 and third["correction"] == "Rome" and third["id"] == second["id"] == "chatcmpl-2"
    assert [one["content"] for one in third["messages"]] == ["Be brief.", "of France?", "Paris", "of Italy?"]


LONG = "# A heading\n" + "word " * 50 + "\n```\n" + "x" * 300 + "\n```\n|a|b|c|d|e|f|g|h|\n|-|-|-|-|-|-|-|-|\n" + "|long words|" * 8 + "\n\n" + "y" * 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(script, visit, scheme):
    """360 pixels: nothing is wider, the list is behind a button; texts stand out from what is behind them."""
    script.scripts = [say(LONG, 50)]
    page = visit(script.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    page.get_by_label("Message", exact=True).fill("a")
    page.keyboard.press("Enter")                                  # a new line: there is no Shift
    assert script.asked == []
    page.get_by_role("button", name="Send").tap()
    settle(page)
    assert page.evaluate("[document.documentElement, document.getElementById('scroll')].every(one => one.scrollWidth <= one.clientWidth)")
    assert page.locator("nav").is_hidden()
    page.get_by_role("button", name="Conversations").tap()
    page.locator("nav").wait_for()
    page.get_by_role("button", name="New conversation").first.tap()
    assert page.locator("nav").is_hidden() and page.locator("#empty").is_visible()
    page.get_by_role("button", name="Settings").tap()
    assert page.evaluate("document.documentElement.scrollWidth <= 360 && document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth")
    colors = page.evaluate("""() => { const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(["paper", "side", "raised", "bubble", "ink", "quiet", "accent", "on-accent", "wrong"].map(one => [one, style.getPropertyValue("--" + one).trim()])) }""")

    def light(name):
        digits = colors[name][1:] if len(colors[name]) == 7 else "".join(2 * digit for digit in colors[name][1:])
        parts = [int(digits[at:at + 2], 16) / 255 for at in (0, 2, 4)]
        return sum(weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4) for weight, part in zip((0.2126, 0.7152, 0.0722), parts))
    assert (light("paper") > 0.5) == (scheme == "light")
    for ink, paper in [(ink, paper) for ink in ("ink", "quiet", "accent", "wrong") for paper in ("paper", "side", "raised")] + [("ink", "bubble"), ("on-accent", "accent")]:
        low, high = sorted((light(ink), light(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)           # WCAG 2.2, AA


def test_by_keyboard_alone(script, visit):
    """Every control is reached by Tab, has a name and shows its focus; a whole turn, a retry and an edit without a mouse."""
    script.scripts = [say("```py\ncode\n```\n[link](https://example.org/)"), say("again"), say("edited")]
    page = visit(script.url)
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    settle(page)
    seen = []
    page.locator(".skip").focus()
    while not page.evaluate("document.activeElement === document.body"):
        name, outline = page.evaluate("""() => { const at = document.activeElement, style = getComputedStyle(at);
            return [at.ariaLabel || at.innerText || at.tagName, style.outlineStyle !== "none" || at.id === "text"] }""")
        assert outline and len(seen) < 40, name
        seen.append(name.strip())
        page.keyboard.press("Tab")
    assert seen.index("New conversation") < seen.index("hello") < seen.index("Message")
    assert {"Name of the conversation", "Export the conversation", "Delete the conversation", "Settings", "Edit", "Copy the code", "link", "Retry", "Good reply", "Model",
            "Message", "Send"} <= set(seen)
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, dialog")].filter(one =>
        !(one.ariaLabel || one.innerText || one.labels?.length || one.getAttribute("aria-labelledby"))).map(one => one.outerHTML)""")
    assert unnamed == []
    for label, expected in (("Retry", "again"), ("Edit", "edited")):
        page.get_by_role("button", name=label).focus()
        page.keyboard.press("Enter")
        if label == "Edit":
            assert page.evaluate("document.activeElement.value") == "hello"
            page.keyboard.press("Escape")
            assert page.evaluate("document.activeElement.ariaLabel") == "Edit"
            page.keyboard.press("Enter")
            page.keyboard.type(" you")
            page.keyboard.press("Enter")
        settle(page)
        assert messages(page)[-1] == expected and page.evaluate("document.activeElement.id") == "text"
    assert messages(page)[0] == "hello you"


def test_with_a_real_model(serve, visit, tmp_path):
    """A key, a seed, a schema, an edit and a rating over the real server; the reply is the one that the API gives."""
    httpx = pytest.importorskip("httpx")
    (tmp_path / "keys").write_text("sesame\n")
    server = serve(api_keys=tmp_path / "keys", feedback=tmp_path / "said.db")
    page = visit(server.url, allowed="401")
    page.get_by_label("API key").wait_for()
    set_up(page, key="sesame", temperature="0.7", seed="3", max_tokens="24")
    page.locator("#model option").first.wait_for(state="attached")
    assert page.locator("#where").inner_text() == f"tiny on 127.0.0.1:{server.port}"
    send(page, "Once upon a time")
    settle(page)
    request = {"messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0.7, "seed": 3, "max_tokens": 24}
    want = httpx.post(f"{server.url}/v1/chat/completions", json=request, headers={"Authorization": "Bearer sesame"}).json()
    [kept] = page.evaluate("Object.keys(localStorage).filter(one => one.includes('chat')).map(one => JSON.parse(localStorage[one]))")
    assert kept["messages"][1]["content"] == want["choices"][0]["message"]["content"]
    assert kept["messages"][1]["usage"]["completion_tokens"] == want["usage"]["completion_tokens"] and "tokens/s" in page.locator(".figures").inner_text()
    page.get_by_role("button", name="Good reply").click()
    page.locator("[aria-pressed=true]").wait_for()
    [said] = list(server.service.feedback.records())
    assert said["rating"] == 1 and said["reply"]["content"] == kept["messages"][1]["content"] and said["model"] == "tiny"
    set_up(page, schema='{"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": false}')
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("The message").fill("Yes?")
    page.keyboard.press("Enter")
    settle(page)
    assert page.locator(".values dt").inner_text() == "yes" and page.locator(".values dd").inner_text() in ("true", "false")
