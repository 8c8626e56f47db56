"""What chat templates in use do (counted in 55 of them: tojson, namespaces, macros, thinking switches, calls of tools ...), a
small template each, held against `transformers`; and where this house is kinder to an app than `transformers`."""

import dataclasses
import types

import pytest
import tokenizers
import transformers

from runtime.errors import UserError
from runtime.template import ChatTemplate

TOOLS = [{"type": "function", "function": {"name": "now", "description": "The time <in> \"é\"", "parameters": {
    "type": "object", "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}, "at": {"type": ["integer", "null"]}},
    "required": ["zone"]}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "now", "arguments": {"zone": "Zürich", "at": 3, "deep": {"a": [1, None, True]}}}}
PARTS = [{"type": "text", "text": " What "}, {"type": "text", "text": "time?\n"}]
CHAT = [{"role": "system", "content": "Be brief. /no_think\n"}, {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "reasoning_content": "\nI must ask.\n", "tool_calls": [CALL]},
        {"role": "tool", "name": "now", "tool_call_id": "c1", "content": "{\"noon\": true}"},
        {"role": "assistant", "content": "<think>\nIt said noon.\n</think>\n\nNoon.", "tool_calls": None},
        {"role": "user", "content": "  Sure? "}]
DOCUMENTS = [{"title": "A", "text": "one"}, {"title": "B", "text": "two"}]
EACH = "{%- for m in messages %}\n"

FEATURES = {
    "tojson": "{{ tools | tojson }}{{ 'é<&>' | tojson }}",
    "tojson, ascii": "{{ tools[0] | tojson(ensure_ascii=True) }}",
    "tojson, indent": "{{ tools | tojson(indent=4) }}",
    "tojson, separators": "{{ tools | tojson(separators=(',', ':')) }}",
    "tojson, sorted": "{{ tools | tojson(sort_keys=True) }}",
    "namespace": "{% set ns = namespace(last=0, names=[]) %}" + EACH + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
                 "{% set ns.names = ns.names + [m.role] %}{% endfor %}{{ ns.last }}{{ ns.names | join('-') }}",
    "is string": EACH + "{% if m.content is string %}{{ m.content }}{% else %}(none){% endif %}{% endfor %}",
    "is mapping": "{{ tools[0] is mapping }}{{ tools is mapping }}{{ messages[2].tool_calls[0].function.arguments is mapping }}",
    "is iterable": "{{ tools is iterable and tools is not string and tools is not mapping }}{{ 'a' is iterable }}{{ 3 is iterable }}",
    "is defined, is none": "{{ nothing is defined }}{{ tools is none }}{{ messages[2].content is defined }}{{ documents is none }}",
    "is sequence, boolean, number": "{{ tools is sequence }}{{ true is boolean }}{{ 3 is number }}{{ 'a' is number }}{{ 3 is integer }}{{ true is true }}",
    "macros": "{% macro kind(p, depth=0) %}{{ p.type }}@{{ depth }}{% if p.properties is defined %}{% for k, v in p.properties.items() %}"
              "[{{ k }}:{{ kind(v, depth + 1) }}]{% endfor %}{% endif %}{% endmacro %}{{ kind(tools[0].function.parameters) }}",
    "call blocks": "{% macro turn(role) %}<{{ role }}>{{ caller() }}</{{ role }}>{% endmacro %}" + EACH
                   + "{% call turn(m.role) %}{{ m.content }}{% endcall %}{% endfor %}",
    "split": EACH + "{% if m.content and '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}|"
             "{{ m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}{% endif %}{% endfor %}",
    "strip and trim": EACH + "[{{ (m.content or '').strip() }}|{{ m.content | default('') | trim }}|{{ (m.content or '').rstrip('? ') }}]{% endfor %}",
    "upper, title, replace": EACH + "{{ m.role | upper }}{{ m.role.capitalize() }}{{ (m.content or '') | replace('\\n', '\\\\n') }}{% endfor %}",
    "items": "{% for k, v in tools[0].function.items() %}{{ k }}={{ v }};{% endfor %}",
    "arguments | items": EACH + "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}"
                         "<parameter={{ k }}>\n{{ v | tojson if v is mapping or v is not string else v }}\n</parameter>{% endfor %}{% endfor %}{% endfor %}",
    "arguments | dictsort": "{% for k, v in messages[2].tool_calls[0].function.arguments | dictsort %}{{ k }}:{{ v }},{% endfor %}",
    "arguments | tojson": "{{ messages[2].tool_calls[0].function.arguments | tojson }}{{ messages[2].tool_calls | tojson }}{{ messages[2].tool_calls[0] }}",
    "startswith, endswith": EACH + "{{ (m.content or '').startswith('<think>') }}{{ (m.content or '').endswith('?') }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y') }}{{ strftime_now('%d %b').split(' ') | length }}",
    "raise_exception not reached": "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}ok",
    "previtem and nextitem": EACH + "{{ loop.previtem.role if loop.previtem is defined }}>{{ m.role }}>{{ loop.nextitem.role if not loop.last }};{% endfor %}",
    "reversed": "{% for m in messages[::-1] %}{{ m.role }}{{ loop.revindex }}{% endfor %}{{ (messages | reverse | list)[0].role }}{{ messages[1:-1] | length }}",
    "selectattr, rejectattr, map": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}"
                                   "{{ messages | rejectattr('role', 'in', ['user', 'tool']) | list | length }}{{ messages | map(attribute='role') | unique | list }}",
    "break and continue": EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "filtered loop and else": "{% for m in messages if m.role == 'none' %}x{% else %}nobody{% endfor %}{% for m in messages if m.tool_calls %}{{ loop.length }}{% endfor %}",
    "dict and namespace": "{% set d = dict(a=1, **{'b': 2}) %}{{ d.a + d['b'] }}{{ dict([('x', 1)]).get('y', 'z') }}{{ d | length }}{{ d.keys() | list }}",
    "trim_blocks": "  {% if true %}  \n  a\n    {%- if true -%}\n  b  {% endif %}\n\n  {# note #}\n{% endif %}  \n c\n",
    "generation": EACH + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% set x = 1 %}<e>{% endgeneration %}{% endif %}\n{% endfor %}",
    "slices and arithmetic": "{{ messages[0].content[:2] }}{{ messages | length // 4 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ '=' * 3 }}{{ 1 ~ 'a' ~ none }}{{ '%s-%d' % ('a', 3) }}",
    "inline if, in, not in": EACH + "{{ 'u' if m.role in ['user', 'human'] else 'o' if 'tool_calls' not in m }}{% endfor %}",
    "set blocks": "{% set text %}{% for t in tools %}{{ t.function.name }}{% endfor %}\n{% endset %}[{{ text }}]{{ text | length }}",
    "scopes": "{% set seen = 0 %}" + EACH + "{% set seen = loop.index %}{% endfor %}{{ seen }}{% if true %}{% set seen = 9 %}{% endif %}{{ seen }}",
    "first, last, default, join, list, int, string, abs": "{{ (messages | first).role }}{{ (messages | last).role }}{{ none_such | default('d') }}"
        "{{ none_such.x if none_such is defined else 'e' }}{{ '3' | int + 1 }}{{ 3 | string + '1' }}{{ -3 | abs }}{{ 'abc' | list | join('.') }}",
    "indent, wordcount, sort, groupby": "{{ 'a\nb' | indent(2) }}{{ [3, 1, 2] | sort | join }}{% for k, g in messages | groupby('role') %}{{ k }}{{ g | length }}{% endfor %}",
    "reasoning_content": EACH + "{% if m.reasoning_content is defined and m.reasoning_content %}<think>\n{{ m.reasoning_content.strip('\\n') }}\n</think>{% endif %}{% endfor %}",
    "thinking": EACH + "{% if m.thinking %}<|channel|>{{ m.thinking }}{% endif %}{% endfor %}",
    "add_generation_prompt": "{{ add_generation_prompt }}{% if add_generation_prompt %}<a>\n{% endif %}",
    "special tokens": "{{ bos_token }}{{ messages[1].content + eos_token }}{{ pad_token }}"}
SWITCHED = {
    "enable_thinking": ("{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}",
                        [{}, {"enable_thinking": True}, {"enable_thinking": False}]),
    "thinking": ("{% if thinking %}Think.{% endif %}", [{}, {"thinking": True}]),
    "reasoning_effort": ("{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}Reasoning: {{ reasoning_effort }}",
                         [{}, {"reasoning_effort": "high"}]),
    "preserve_thinking": (EACH + "{% if m.reasoning_content and (preserve_thinking | default(false) or clear_thinking is defined and not clear_thinking) %}"
                          "{{ m.reasoning_content }}{% endif %}{% endfor %}", [{}, {"preserve_thinking": True}, {"clear_thinking": False}]),
    "documents": ("{% if documents %}{% for d in documents %}{{ loop.index }}. {{ d.title }}: {{ d['text'] }}\n{% endfor %}{% endif %}", [{}, {"documents": DOCUMENTS}]),
    "no tools": ("{% if tools %}{{ tools | length }}{% else %}none{% endif %}{{ tools is not none }}", [{"tools": None}, {"tools": []}]),
    "dates": ("{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{% endif %}{{ date_string }}",
              [{}, {"date_string": "26 Jul 2024"}])}
TAKES_PARTS = {
    "loop": EACH + "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}{% if p.type == 'text' %}{{ p.text }}"
            "{% elif 'image' in p %}<image>{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "macro": "{% macro shown(c) %}{% if c is string %}{{ c }}{% elif c is iterable and c is not mapping %}{% for p in c %}{{ p.text | trim }} {% endfor %}{% endif %}"
             "{% endmacro %}" + EACH + "{{ shown(m.content).strip() }}|{% endfor %}",
    "selectattr": EACH + "{{ m.content if m.content is string else m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') }}{% endfor %}"}


@pytest.fixture(scope="module")
def theirs():
    """`transformers`' own rendering of a template."""
    empty = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1}, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=empty, bos_token="<s>", eos_token="</s>")

    def render(source, messages, **more):
        return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **{"add_generation_prompt": True} | more)
    return render


def ours(source, messages, **more):
    return ChatTemplate(source, "t", {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **more)


@pytest.mark.parametrize("source", FEATURES.values(), ids=FEATURES)
def test_what_templates_do_is_done_as_transformers_does_it(source, theirs):
    more = {"tools": TOOLS} if "tools" in source else {}
    want = theirs(source, CHAT, **more)
    assert ours(source, CHAT, **more) == want != ""


@pytest.mark.parametrize("source, given", SWITCHED.values(), ids=SWITCHED)
def test_switches_of_templates(source, given, theirs):
    found = [ours(source, CHAT, **more) for more in given]
    assert found == [theirs(source, CHAT, **more) for more in given] and len(set(found)) > 1


@pytest.mark.parametrize("source", TAKES_PARTS.values(), ids=TAKES_PARTS)
@pytest.mark.parametrize("roles", [("user",), ("system", "user", "assistant"), ("tool",)], ids="-".join)
def test_contents_in_parts_reach_templates_that_take_them(source, roles, theirs):
    messages = [{"role": m["role"], "content": PARTS if m["role"] in roles else m["content"] or ""} for m in CHAT]
    assert ours(source, messages) == theirs(source, messages)


@pytest.mark.parametrize("source", [EACH + "{{ m.content }};{% endfor %}", EACH + "{{ m['content'] + ';' }}{% endfor %}", EACH + "{{ m.content.split('|')[0] }};{% endfor %}",
                                    EACH + "{{ (m.content | trim) if m.content is not string else m.content }};{% endfor %}",
                                    EACH + "{{ m.content if m.content is string else '' }};{% endfor %}",
                                    EACH + "{{ m.content if m.content is string else m.content | tojson }};{% endfor %}"])
def test_contents_in_parts_are_joined_for_templates_that_take_texts(source):
    assert ours(source, [{"role": "system", "content": PARTS}, {"role": "user", "content": "x"}]).strip(" ") in ("What time?\n;x;", "What time?;x;")


def test_contents_in_parts_are_judged_by_role():
    """As in templates that join the parts of the user and trim what the system says."""
    source = EACH + "{% if m.role == 'system' %}{{ m.content | trim }};{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    assert ours(source, [{"role": "system", "content": PARTS}, {"role": "user", "content": PARTS}]) == "What time?;[ What ][time?\n]"


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_parts_that_are_no_text_are_refused(kind):
    with pytest.raises(UserError, match=f"message 2 has a part of type '{kind}', and the model reads text alone"):
        ours(TAKES_PARTS["loop"], [CHAT[0], {"role": "user", "content": [*PARTS, {"type": kind, kind: "x"}]}])
    with pytest.raises(UserError, match="part of type 'thinking', and the chat template takes texts alone"):
        ours(EACH + "{{ m.content }}{% endfor %}", [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}])


@pytest.mark.parametrize("text, source", [
    ('{"zone": "Zürich", "at": 3, "deep": {"a": [1, null, true]}}', FEATURES["arguments | items"]),
    ('{"zone":"Zürich","at":3,"deep":{"a":[1,null,true]}}', FEATURES["arguments | tojson"]),
    ('{"zone":"Zürich","at":3,"deep":{"a":[1,null,true]}}', FEATURES["arguments | dictsort"]),
    ('{"zone": "Zürich", "at": 3, "deep": {"a": [1, null, true]}}',
     "{% set a = messages[2].tool_calls[0].function.arguments %}{{ a if a is string else a | tojson }}")])
def test_arguments_as_text_are_read_for_templates_that_want_objects(text, source, theirs):
    told = [{**m, "tool_calls": [{**CALL, "function": {"name": "now", "arguments": text}}]} if m.get("tool_calls") else m for m in CHAT]
    assert ours(source, told) == theirs(source, CHAT) == ours(source, CHAT)


@pytest.mark.parametrize("source", ["{{ a }}", "{{ 'x' + a + 'y' }}", "{{ 'x' ~ a }}", "{{ a | trim }}", "{{ '%s' % a }}", "{{ [a, 'b'] | join(',') }}"])
@pytest.mark.parametrize("text", ['{"b":1, "a":"é"}', "", "no JSON", '["a"]', '"{}"', "{" * 100_000, '{"a": "</b>'])
def test_arguments_as_text_stay_as_they_are_for_templates_that_write_them(source, text, theirs):
    source = "{% set a = messages[0].tool_calls[0].arguments %}" + source
    messages = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": text}]}]
    assert ours(source, messages) == theirs(source, messages)
    messages[0]["tool_calls"][0]["arguments"] = {"b": 1, "a": "é"}
    assert '{"b": 1, "a": "é"}' in ours(source, messages)


def test_arguments_that_are_no_object_are_named_where_the_template_fails_on_them():
    messages = [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now", "arguments": '{"zone": '}}]}]
    with pytest.raises(UserError, match=r"item pairs from a mapping. \(the arguments of the call of 'now' are no JSON object\)$"):
        ours(FEATURES["arguments | items"], messages)
    messages[0]["tool_calls"] = [CALL]
    with pytest.raises(UserError, match="by zero$"):
        ours("{{ 1 / 0 }}", messages)


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_every_name(given):
    source = "{{ messages[0].reasoning_content }},{{ messages[0].reasoning }},{{ messages[0].thinking }}"
    assert ours(source, [{"role": "assistant", "content": "x", given: "hm"}]) == "hm,hm,hm"


def test_messages_may_be_objects(theirs):
    """As the OpenAI SDK's are, which a caller appends as it got them."""
    @dataclasses.dataclass
    class Call:
        name: str
        arguments: str

    class Message:
        def __init__(self, **fields):
            self.fields = fields

        def model_dump(self):
            return self.fields

    source = EACH + "{{ m.role }}{% if m.content is defined %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{{ c.name }}{{ c.arguments }}{% endfor %};{% endfor %}"
    objects = [Message(role="assistant", content=None, refusal=None, tool_calls=[Call("f", '{"a": 1}')]), types.MappingProxyType({"role": "user", "content": "x"})]
    assert ours(source, objects) == 'assistantf{"a": 1};userx;'


@pytest.mark.parametrize("source", ["{{ mood }}", "{{ 'a' ~ mood }}", "{{ mood + 'a' }}", "{{ mood.upper() }}", "{{ mood | tojson }}", "{{ mood() }}", "{{ [mood] | join }}",
                                    "{% for m in messages %}{{ m.content | trim ~ (mood | trim) }}{% endfor %}", "{{ mood | upper }}", "{{ 1 if mood > 3 }}"])
def test_an_argument_that_nobody_gave_is_named(source):
    with pytest.raises(UserError, match=r"^t: the chat template needs 'mood', which is not given; give it as template=\{'mood': ...\}, on the command line as --template mood=...$"):
        ours(source, CHAT)


@pytest.mark.parametrize("source", ["{% if mood %}{{ mood }}{% endif %}x", "{{ mood | default('x') }}", "{{ mood if mood is defined else 'x' }}", "x{% for m in mood %}{% endfor %}",
                                    "{{ 'a' if mood == 'b' else 'x' }}", "{{ mood or 'x' }}", "x{{ bos_token if mood }}{{ sep_token }}",
                                    "{% if false %}{% set mood = 1 %}{% endif %}x{{ mood }}", "{{ messages[0].mood }}x", "{% macro f(mood) %}{{ mood }}{% endmacro %}x{{ f() }}"])
def test_an_argument_that_a_template_does_without_need_not_be_given(source, theirs):
    assert ours(source, CHAT) == theirs(source, CHAT) == "x"


@pytest.mark.parametrize("given", [{"tools": [print]}, {"tools": "now"}, {"tools": {"name": "now"}}, {"documents": ["text"]}])
def test_tools_and_documents_are_lists_of_dicts(given):
    with pytest.raises(UserError, match="must be a list of dicts"):
        ours("{{ tools }}{{ documents }}", CHAT, **given)


def test_what_holds_itself_is_refused():
    message = {"role": "user", "content": []}
    message["content"].append(message)
    with pytest.raises(UserError, match="holds itself"):
        ours("x", [message])
