"""Chat templates: what `transformers` renders, and nothing that reaches out of the sandbox or never ends."""

import pytest

from runtime import template as template_module
from runtime.errors import UserError
from runtime.template import ChatTemplate, open_template

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = """{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if loop.index0 > 20 %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN = """{%- macro render(m) %}{{ m.content if m.content is string else m.content|tojson }}{% endmacro -%}
{%- set ns = namespace(last=0, seen=[]) %}
{%- for m in messages[::-1] %}{% if m.role == "user" and not ns.last %}{% set ns.last = loop.revindex %}{% endif %}{% endfor %}
{%- for m in messages %}
<|im_start|>{{ m.role }}{{ "*" * loop.index }}
{% generation %}{{ render(m) }}{% endgeneration %}<|im_end|>
{% endfor %}{{ ns.last }}{{ dict(a=1, b="é")|tojson(indent=1) }}{{ eos_token }}"""
TALK = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi <b>&amp;</b> {{ 7 * 7 }}"},
        {"role": "assistant", "content": "日本 👋"}, {"role": "user", "content": "\n x \n"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [SMOLLM2, LLAMA3, QWEN], ids=["smollm2", "llama3", "qwen"])
@pytest.mark.parametrize("messages", [TALK, TALK[1:2], TALK * 8], ids=["talk", "one", "long"])
def test_renders_as_transformers_does(source, messages):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    want = utils._compile_jinja_template(source).render(messages=messages, add_generation_prompt=True, **TOKENS)
    assert ChatTemplate(source, "t", TOKENS).render(messages) == want


def test_variables_reach_the_template():
    template = ChatTemplate("{{ bos_token }}{{ tools|length }}{{ add_generation_prompt }}", "t", TOKENS)
    assert template.render(TALK, tools=[1, 2], add_generation_prompt=False) == "<s>2False"


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ namespace.mro() }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ dict.update(messages[0], {'a': 1}) }}",
    "{{ '{0.__class__}'.format(1).x }}{{ '{0.__class__.__mro__}'.format(1) ~ raise_exception('unreached') }}",
    "{{ self._TemplateReference__context.x }}",
    "{{ lipsum() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}"])
def test_reaching_for_python_is_refused(source):
    with pytest.raises(UserError, match="^t: "):
        ChatTemplate(source, "t").render(TALK)
    assert TALK[0] == {"role": "system", "content": "Be brief. "}


@pytest.mark.parametrize("source", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 1000000000000 }}",
    "{{ 1000000000000 * 'a' }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ range(10 ** 9) }}"])
def test_what_would_never_end_is_refused(source, monkeypatch):
    monkeypatch.setattr(template_module, "MAX_TURNS", 20_000)
    with pytest.raises(UserError, match="^t: "):
        ChatTemplate(source, "t").render(TALK)


def test_turns_are_counted_for_each_prompt_anew(monkeypatch):
    monkeypatch.setattr(template_module, "MAX_TURNS", 6)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}", "t")
    for _ in range(5):
        assert template.render(TALK) == "".join(m["content"] for m in TALK)


def test_a_template_that_raises_says_what_it_said():
    template = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok", "x.jinja")
    with pytest.raises(UserError, match="x.jinja: .*no system role"):
        template.render(TALK)
    assert template.render(TALK[1:]) == "ok"
    for source in ("{{ 1 / 0 }}", "{{ messages[0].nothing.more }}", "{{ messages + 1 }}"):
        with pytest.raises(UserError, match="^t: "):
            ChatTemplate(source, "t").render(TALK)


@pytest.mark.parametrize("source", ["{% if %}", "{{ ", "{% endfor %}", "{% nothing %}", "{% generation %}x"])
def test_what_is_no_template_is_refused(source):
    with pytest.raises(UserError, match="t.jinja: not a valid chat template"):
        ChatTemplate(source, "t.jinja")


@pytest.mark.parametrize("messages", [[], None, "Hi", ["Hi"], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}]])
def test_messages_that_are_none(messages):
    with pytest.raises(UserError, match="message"):
        ChatTemplate(SMOLLM2, "t").render(messages)


@pytest.mark.parametrize("files, rendered", [
    ({"chat_template.jinja": "{{ eos_token }}a{{ bos_token }}", "tokenizer_config.json": '{"chat_template": "b"}'}, "</s>a"),
    ({"tokenizer_config.json": '{"chat_template": "b"}'}, "b"),
    ({"tokenizer_config.json": '{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}'}, "d"),
    ({"tokenizer_config.json": "{}"}, None), ({}, None)])
def test_where_a_folder_keeps_its_template(tmp_path, files, rendered):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    template = open_template(tmp_path, {"eos_token": "</s>", "bos_token": None})
    assert (template and template.render([{"role": "user", "content": "Hi"}])) == rendered


@pytest.mark.parametrize("name, data", [("chat_template.jinja", b"\xff"), ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"[]")])
def test_a_template_that_cannot_be_read_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="cannot be read|holds list"):
        open_template(tmp_path, {})
