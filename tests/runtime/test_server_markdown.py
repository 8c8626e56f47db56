"""The page's Markdown, in the browser: against markdown-it (CommonMark and GitHub's tables), and against attacks."""

import random
import re
import time
from html.parser import HTMLParser

import pytest

from page_fixtures import say

RENDER = """async (texts) => { const { render } = await import("/page/markdown.js");
    return texts.map(text => { const node = document.createElement("div"); render(node, text); return [node.innerHTML, node.textContent]; }); }"""
DOCUMENTS = [
    "# One\n## Two ##\n###### Six\nand words\nin two lines\n\nanother", "a **bold** and *italic*, __bold__ and _italic_, **bold *and italic* in it**, ~~gone~~",
    "`code`, `` a ` tick ``, `**not bold**`, \\*not italic\\*, snake_case_name, 2 * 3 * 4, 5*6*7", "- one\n- two\n  - in two\n    - in in two\n- three\n\nafter",
    "1. one\n2. two\n   - a\n   - b\n3. three", "7. seven\n8. eight", "* a\n* b\n\n+ other\n+ list", "1. one\n\n   more of one\n\n2. two", "- a\n\n  ```py\n  x = 1\n    y\n  ```\n- b",
    "```python\ndef f():\n    return '<b>'\n\n# end\n```\nafter", "~~~\ntildes ``` in it\n~~~", "````\n```\nin it\n```\n````", "```\nnever closed\n\n- no list",
    "> quote\n> **more**\n\n> other\n>> deeper", "| a | b | c |\n|:--|:-:|--:|\n| 1 | `x` | **3** |\n| only |\n\nafter", "a | b\n--|--\n1 | 2 \\| 3",
    "one\n***\ntwo\n\n---\n\n___", "[words](https://example.org/a_b_(c)?x=1&y=2 \"title\") and <https://example.org/> and [m](mailto:a@example.org)",
    "[**bold** `code`](http://example.org/)", "In the year\n1990. It was\n- a list", "Text:\n1. one\n2. two\n\nEnd", "a<b and b>c & d", "* * *", "#no heading", "",
    "今天**天气**很好。*好*", "- [x] done\n- [ ] not", "**a**b and b**c**", "[not a link] (x) and [y]", "line one  \nline two\\\nline three"]


class Tree(HTMLParser):
    """What a text comes to: tags with their texts, without what only the look needs."""

    LEFT_OUT = {"figure", "div", "thead", "tbody", "svg", "use", "input"}

    def __init__(self, html):
        super().__init__()
        self.found, self.skipped = [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.skipped += tag == "figcaption"
        if not self.skipped and tag not in self.LEFT_OUT:
            self.found.append(f"<{tag} {attributes['href']}>" if tag == "a" else f"<{tag} {attributes.get('start', '1')}>" if tag == "ol" else f"<{tag}>")

    def handle_endtag(self, tag):
        if not self.skipped and tag not in self.LEFT_OUT and tag not in ("br", "hr"):
            self.found.append(f"</{tag}>")
        self.skipped -= tag == "figcaption"

    def handle_data(self, data):
        if not self.skipped:
            self.found.append(data)

    def text(self, ours):
        text = "".join(self.found).replace("<s>", "<del>").replace("</s>", "</del>")
        text = text if ours else re.sub(r"<(/?)h([1-5])>", lambda match: f"<{match[1]}h{int(match[2]) + 1}>", text)      # the page has an h1
        text = re.sub(r"(?:\s*</?p>\s*)+", " ", text)                            # tight or loose is the look's
        text = re.sub(r"\[[ x]\]", "", text) if not ours else text
        return re.sub(r"\s*(</?[^>]*>)\s*", r"\1", re.sub(r"\n(?=</code>)", "", text)).strip()


def test_as_markdown_it_reads_it(script, visit):
    markdown_it = pytest.importorskip("markdown_it")
    oracle = markdown_it.MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    found = visit(script.url).evaluate(RENDER, DOCUMENTS)
    pairs = {document: (Tree(html).text(ours=True), Tree(oracle.render(document)).text(ours=False)) for document, (html, _) in zip(DOCUMENTS, found)}
    assert {document: pair for document, pair in pairs.items() if pair[0] != pair[1]} == {}


ATTACKS = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><svg onload="window.hacked=1"><iframe src="javascript:window.hacked=1">

[a](javascript:window.hacked=1) [b](JaVaScRiPt:window.hacked=1) [c](java&#115;cript:x) [d](data:text/html,<script>x</script>) [e](vbscript:x) [f](//evil.example/x)
[g](  javascript:window.hacked=1) [h](<javascript:window.hacked=1>) [i](file:///etc/passwd) ![j](https://evil.example/pixel.png) [k](https://ok.example/"onclick="window.hacked=1)
<https://ok.example/"><img src=x onerror=window.hacked=1> [l](javascript\\:x) [m](https:javascript:window.hacked=1) [n](\x01javascript:window.hacked=1)

| <img src=x onerror=window.hacked=1> | [o](javascript:x) |
|---|---|
| <b>x</b> | `<script>` |

```html"onmouseover="window.hacked=1
</code></pre><script>window.hacked=1</script>
```

<style>body{display:none}</style> &lt;script&gt; __proto__ constructor"""


def test_attacks_are_texts(script, visit):
    """In a reply, a thought, a schema's reply, a call, the name of a conversation, an error and a model's name."""
    name = "<img src=x onerror=window.hacked=1>"
    call = {"index": 0, "id": name, "type": "function", "function": {"name": name, "arguments": '{"<img src=x onerror=window.hacked=1>": "<script>window.hacked=1</script>", "__proto__": {"x": 1}}'}}
    script.scripts = [[{"reasoning_content": ATTACKS}, *say(ATTACKS), {"tool_calls": [call]}], [{"error": {"message": name}}]]
    page = visit(script.url)
    page.on("dialog", lambda dialog: pytest.fail("a dialog"))
    for text in (ATTACKS, name):
        page.get_by_label("Message", exact=True).fill(text)
        page.keyboard.press("Enter")
        page.locator("#send[aria-label=Send]").wait_for()
    page.locator("nav li").first.wait_for()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main iframe, main style, main svg:not(button svg)").count() == 0
    assert page.evaluate("[...document.querySelectorAll('main *')].flatMap(one => [...one.attributes]).filter(one => one.name.startsWith('on')).length") == 0
    links = page.evaluate("[...document.querySelectorAll('main a')].map(one => [one.protocol, one.rel, one.target])")
    assert links and all(protocol in ("http:", "https:", "mailto:") and "noopener" in rel and target == "_blank" for protocol, rel, target in links)
    assert "<script>window.hacked=1</script>" in page.locator(".assistant > .prose").first.inner_text()
    page.reload()
    assert page.evaluate("window.hacked") is None and page.locator(".bubble").first.inner_text() == ATTACKS


HEAVY = ["*a " * 20000, "**a " * 20000, "_a_" * 20000, "`" * 50000, "`a``b" * 10000, "[" * 50000, "[a](" * 20000, "![" * 20000, ">" * 50000, "> " * 20000 + "a", "- " * 20000,
         "\n".join("  " * n + "- a" for n in range(1000)), "|" * 50000 + "\n" + "|-" * 50000, " " * 100000 + "\n" + " " * 50000, "https://" * 10000, "~~a" * 20000, "<" * 50000,
         "1. a\n" * 20000, "```\n" * 20000, "\\" * 50000, "[a" * 20000 + "](x)", "a\n" * 50000, "(" * 30000 + ")" * 30000, "[a](" + "(" * 20000, "#" * 50000, "- [ ] " * 10000]


def test_nothing_takes_long(script, visit):
    page = visit(script.url)
    for text in HEAVY:
        begun = time.monotonic()
        page.evaluate(RENDER, [text])
        assert time.monotonic() - begun < 10, text[:20]


def test_any_text_grows_to_what_it_is_at_once(script, visit):
    """A reply that comes a piece at a time ends as one that came whole; no letter is lost, whatever the marks."""
    rng = random.Random(5)
    marks = ["*", "**", "_", "`", "```", "\n", "\n\n", "- ", "1. ", "> ", "# ", "|", "|-|-|", "  ", "[", "](", ")", "<", ">", "~~", "\\", "https://x.org", "    "]
    texts = ["".join(rng.choice([*marks, f"w{n}", f"w{n} "]) for n in range(60)) for _ in range(150)]
    found = visit(script.url).evaluate("""async (texts) => { const { render } = await import("/page/markdown.js");
        return texts.map(text => { const once = document.createElement("div"), grown = document.createElement("div");
            render(once, text);
            for (let end = 0; end < text.length; end += 7) render(grown, text.slice(0, end));
            render(grown, text);
            return [once.innerHTML === grown.innerHTML, once.textContent]; }); }""", texts)
    for text, (same, shown) in zip(texts, found):
        assert same, text
        missing = [word for word in re.findall(r"w\d+", text) if word not in shown]
        assert not missing or "```" in text or "](" in text or "|" in text, (text, missing)          # a fence's language, a link's target, a cell too many
