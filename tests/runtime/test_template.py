"""Chat templates: what `transformers` renders, and nothing that reaches out of the sandbox or never ends."""

import os
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import runtime.template
from runtime.errors import UserError
from runtime.template import ChatTemplate

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
    assert template.render(TALK, tools=[{}, {}], add_generation_prompt=False) == "<s>2False"


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


NESTED = "{% set a = [1] %}{% set b = [1] %}" + "{% set a = [a, a] %}{% set b = [b, b] %}" * 40


@pytest.mark.parametrize("source", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x = 3 %}" + "{% set x = x * x %}" * 40 + "{{ x }}", NESTED + "{{ a }}", NESTED + "{{ a == b }}"],
    ids=["loops", "integers", "printing", "comparing"])
def test_what_would_take_for_ever_is_refused(source):
    start = time.perf_counter()
    with pytest.raises(UserError, match="^t: the chat template takes too (long|much memory)"):
        ChatTemplate(source, "t").render(TALK)
    assert time.perf_counter() - start < 60 and ChatTemplate("{{ messages | length }}", "t").render(TALK) == "4"


@pytest.mark.parametrize("source", [
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20000) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'a' * 1000000000000 }}", "{{ 1000000000000 * 'a' }}", "{{ [1] * 1000000000000 }}", "{{ 9 ** (9 ** 9) }}",
    "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "{{ range(10 ** 9) }}",
    "{{ messages | tojson(indent=1500000000) }}", "{{ '%1500000000d' % 1 }}", "{{ '{:1500000000d}'.format(1) }}",
    "{{ 'a' | center(10 ** 10) }}", "{{ 'a\nb' | indent(10 ** 10) }}", "{{ 'ab ab' | wordwrap(1, wrapstring='x' * 10 ** 9) }}",
    "{{ [1] | batch(10 ** 10, 1) | list }}", "{{ (1).to_bytes(1500000000, 'big') }}", "{{ 'a'.join('b' * 1000000) | replace('a', 'c' * 100000) }}"])
def test_what_would_take_all_memory_is_refused(source):
    with pytest.raises(UserError, match="^t: [^\\n]+$"):
        ChatTemplate(source, "t").render(TALK)


def test_a_process_of_its_own_renders_within_its_limits():
    """What that process took at most (KiB), where a template asked for 1.5 GB; and this one is spared Jinja."""
    script = """if True:
        import resource, sys
        from runtime.template import ChatTemplate, UserError, _helper
        try:
            ChatTemplate("{{ messages | tojson(indent=1500000000) }}", "t").render([{"role": "user"}])
        except UserError as error:
            print("took too much memory" if "too much memory" in str(error) else error)
        assert "jinja2" not in sys.modules and resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 700 * 1024"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "took too much memory\n"


def test_templates_are_rendered_from_many_threads_and_in_forks():
    template, wrong = ChatTemplate("{{ messages[0].content }}", "t"), []

    def render(number):
        wrong.extend(n for n in range(50) if template.render([{"role": "user", "content": f"{number} {n}"}]) != f"{number} {n}")

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    if (child := os.fork()) == 0:
        os._exit(template.render([{"role": "user", "content": "in a fork"}]) != "in a fork")
    for thread in threads:
        thread.join()
    assert not wrong and os.waitpid(child, 0)[1] == 0


def test_a_process_that_was_killed_meanwhile_is_started_again():
    template = ChatTemplate("{{ messages[0].role }}", "t")
    process = runtime.template._helper._process
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert template.render([{"role": "user"}]) == "user"


def test_a_template_that_raises_says_what_it_said():
    template = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok", "x.jinja")
    with pytest.raises(UserError, match="x.jinja: .*no system role"):
        template.render(TALK)
    assert template.render(TALK[1:]) == "ok"
    for source in ("{{ 1 / 0 }}", "{{ messages[0].nothing.more }}", "{{ messages + 1 }}"):
        with pytest.raises(UserError, match="^t: "):
            ChatTemplate(source, "t").render(TALK)


@pytest.mark.parametrize("source", ["{% if %}", "{{ ", "{% endfor %}", "{% nothing %}", "{% generation %}x", "{% break %}",
                                    "{{ " + "1" * 5000 + " }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
                                    "{% if 1 %}" * 5000 + "{% endif %}" * 5000, "{{ " + "[" * 50000 + "]" * 50000 + " }}"])
def test_what_is_no_template_is_refused(source):
    with pytest.raises(UserError, match="t.jinja: not a valid chat template"):
        ChatTemplate(source, "t.jinja")


@pytest.mark.parametrize("messages", [[], None, "Hi", ["Hi"], [{"content": "x"}], [{"role": 1, "content": "x"}]])
def test_messages_that_are_none(messages):
    with pytest.raises(UserError, match="message"):
        ChatTemplate(SMOLLM2, "t").render(messages)


def test_a_variable_that_no_template_reads_is_refused():
    template = ChatTemplate("{% if tools %}{{ tools | length }}{% endif %}{{ enable_thinking }}{{ range(2) | length }}", "t")
    assert template.render(TALK, tools=None, documents=None, enable_thinking=True) == "True2"
    with pytest.raises(UserError, match="reads no 'temprature'; besides the messages it reads enable_thinking, tools"):
        template.render(TALK, temprature=0.5)


def test_numbers_and_truths_of_numpy_are_pythons():
    template = ChatTemplate("{{ messages[0].content + 1 }}{{ 'thinks' if enable_thinking }}", "t")
    assert template.render([{"role": "user", "content": np.int64(4)}], enable_thinking=np.False_) == "5"


@pytest.mark.parametrize("messages", [[{"role": "user", "content": object()}], [{"role": "user", "content": ("a", {"b": b"c"})}]])
def test_what_is_no_plain_value_is_shown_by_its_kind(messages):
    assert "object" in ChatTemplate("{{ messages }}", "t").render(messages) or "bytes" in ChatTemplate("{{ messages }}", "t").render(messages)
