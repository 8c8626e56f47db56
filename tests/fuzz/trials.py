"""What is damaged, and how it is used afterwards: the originals (folders, made once), the `damage` of a copy, and the `trial`,
which is what a user would do with it and gives plain JSON."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
from pathlib import Path

from tests.fuzz.mutate import fix_hashes, mutate_bytes, mutate_folder, mutate_json_file, mutate_safetensors

SANITIZED = "asan" in os.environ.get("EDGEWRIGHT_NATIVE", "")
IDS = [[5, 17, 300, 42, 9], [260, 3, 3, 77]]
TEXTS = ["The capital of France is", "Once upon a time, 12 machines\n", "今天天气 🙂 ok"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"}]
TEMPLATE_PIECES = (
    "{% set x = 9 %}", "{% for i in range(99999999) %}x{% endfor %}", "{{ x*x }}", "{% set x = x*x %}" * 40, "{{ messages }}", "{{ self.body() }}",
    "{% break %}", "{{ '%1500000000d' % 1 }}", "{{ messages|tojson(indent=1500000000) }}", "{{ 9" + "9" * 5000 + " }}", "{{ 'x' * 10**10 }}",
    "{{ ''.join(messages) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages[0].__class__.__mro__ }}", "{{ undefined.x }}",
    "{% block b %}{{ self.b() }}{% endblock %}", "{% for m in messages %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}",
    "{% if messages[0]['role'] == 'user' %}A{% else %}B{% endif %}", "{{ bos_token }}", "{{ eos_token }}", "{% include 'x' %}", "{{ raise_exception('no') }}",
    "{{ 'abc'|center(2000000000) }}", "{{ range(10**12)|list }}", "{{ 'a'|indent(10**9) }}", "{{ strftime_now('%Y') }}", "{% generation %}x{% endgeneration %}",
    "{% set ns = namespace(a=[]) %}{% for i in range(30) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a == ns.a }}", "{{ (1).__init__ }}",
    "{{ 'x'|replace('', 'y'*1000)|replace('', 'z'*1000)|length }}", "{{ messages|map(attribute='content')|join }}", "{{ 1 // 0 }}", "{{ 2**99999999 }}",
    "{{ 'a'.format(1) }}", "{{ '{:1000000000}'.format(1) }}", "{%- for m in messages -%}{{ loop.index ~ m.role }}{%- endfor -%}", "{{ messages|sort|first }}")


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


# ---- originals

NEWER = ("gemma3", "gemma4", "qwen3_5", "lfm2", "granite4_tiny", "phi3", "olmo3", "qwen3_moe")


def _checkpoint(place: Path, family: str, *words: str) -> Path:
    """A tiny checkpoint, through models.get as a user's would come, quantized where `words` say how."""
    from compress import quantize
    from models import get
    from tiny import write_tiny
    plain = place.with_name(place.name + "-plain")
    write_tiny(plain, family)
    assert get.main([str(plain), "-o", str(place)]) == 0
    if words:
        get_out = place.rename(place.with_name(place.name + "-dense"))
        assert quantize.main([str(get_out), "-o", str(place), *words]) == 0
        shutil.rmtree(get_out)
    shutil.rmtree(plain)
    return place


def _bundle(place: Path, family: str, *words: str) -> Path:
    from export import onnx, ort, verify
    checkpoint = _checkpoint(place.with_name(place.name + "-checkpoint"), family, *words)
    assert onnx.main([str(checkpoint), "-o", str(place), "--dtype", "fp32"]) == 0
    if json.loads((place / "manifest.json").read_text())["graphs"]:
        assert ort.main([str(place)]) == 0
    assert verify.main([str(checkpoint), str(place), "--threads", "1"]) == 0
    shutil.rmtree(checkpoint)
    return place


def bundles(place: Path) -> list[Path]:
    return [_bundle(place / "int4", "smollm2", "--bits", "4"), _bundle(place / "dense", "qwen2")]


def native_bundles(place: Path) -> list[Path]:
    return [_bundle(place / "int3", "smollm2", "--bits", "3"), _bundle(place / "int6", "qwen3", "--bits", "6"),
            _bundle(place / "int4", "llama", "--bits", "4", "--no-symmetric"), _bundle(place / "int8", "gpt2", "--bits", "8"),
            _bundle(place / "rows", "smollm2", "--bits", "8", "--activations", "8")]


def checkpoints(place: Path) -> list[Path]:
    return [_checkpoint(place / "dense", "smollm2"), _checkpoint(place / "gpt2", "gpt2"), _checkpoint(place / "qwen3", "qwen3"),
            _checkpoint(place / "llama", "llama"), *(_checkpoint(place / family, family) for family in NEWER), _checkpoint(place / "int4", "smollm2", "--bits", "4", "--no-symmetric"),
            _checkpoint(place / "int3", "qwen2", "--bits", "3", "--group", "0")]


def ggufs(place: Path) -> list[Path]:
    from tiny import tiny_model, tiny_tokenizer
    from tiny_gguf import SAID, write_gguf
    made = []
    for family, kind in (("smollm2", "F32"), ("smollm2", "Q8_0"), ("qwen2", "Q4_0"), ("gpt2", "F16"), ("lfm2", "F32"), ("olmoe", "Q8_0"),
                         ("exaone4", "F32")):
        folder = place / f"{family}-{kind}"
        folder.mkdir(parents=True)
        write_gguf(folder / "model.gguf", tiny_model(family, **SAID.get(family, {})), tiny_tokenizer(), kind, "qwen2" if family == "qwen2" else "smollm")
        made.append(folder)
    return made


def foreign(place: Path) -> list[Path]:
    from test_foreign import make
    from tiny import write_tiny
    place.mkdir(parents=True, exist_ok=True)
    plain, made = write_tiny(place / "plain", "smollm2"), []
    for kind, symmetric in (("gptq", True), ("gptq", False), ("awq", False), ("compressed-tensors", True)):
        make(plain, place / f"{kind}-{symmetric}", kind, symmetric)
        made.append(place / f"{kind}-{symmetric}")
    shutil.rmtree(plain)
    return made


def tokenizers(place: Path) -> list[Path]:
    from tiny import tiny_tokenizer
    made = []
    for name in ("smollm", "qwen2", "llama-bpe"):
        folder = place / name
        folder.mkdir(parents=True)
        tiny_tokenizer(name).backend_tokenizer.save(str(folder / "tokenizer.json"))
        made.append(folder)
    return made


def templates(place: Path) -> list[Path]:
    from tiny import CHAT_TEMPLATE
    sources = {"chatml": CHAT_TEMPLATE, "turns": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m.content|trim }}{% elif m.role "
               "== 'system' %}[S]{{ m['content'] }}{% else %}[A]{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}",
               "macros": "{% macro turn(m, n=1) %}<{{ m.role|upper }} {{ n }}>{{ m.content }}{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}"
               "{% set ns.n = ns.n + 1 %}{{ turn(m, ns.n) }}{% if not loop.last %}\n{% endif %}{% endfor %}{{ messages|length }}"}
    for name, source in sources.items():
        (place / name).mkdir(parents=True)
        (place / name / "chat_template.jinja").write_text(source)
    return [place / name for name in sources]


DATA = {"a.jsonl": '{"text": "One."}\n{"prompt": "Q", "completion": "A"}\n{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}\n'
        '{"instruction": "Do", "input": "", "output": "Done"}\n{"text": "good", "label": 1}\n',
        "b.json": '{"data": [{"title": "t", "paragraphs": [{"context": "c d e", "qas": [{"id": "1", "question": "q?", "answers": [{"text": "d", '
        '"answer_start": 2}]}]}]}]}', "c.csv": 'text,label\n"a, b",pos\nc,neg\n', "d.txt": "Some text.\n\nMore of it.\n", "e.tsv": "sentence\tlabel\ngood\t1\nbad\t0\n",
        "f.conll": "EU B-ORG\nrejects O\n\nPeter B-PER\n", "g.toml": 'about = "x"\n[[stages]]\nstage = "quantize"\nbits = 4\nmethod = "gptq"\n[[stages]]\nstage = '
        '"recover"\nsteps = 4\n', "h.toml": 'instruction = "Say"\nexample = "Q: {question}\\nA:"\nmax_new_tokens = 2\nstop = ["\\n"]\n', "i.json": '[{"text": "a"}, {"text": "b"}]'}


def data_files(place: Path) -> list[Path]:
    for name, text in DATA.items():
        (place / name).mkdir(parents=True)
        (place / name / name).write_text(text)
    return [place / name for name in DATA]


# ---- damage

def damage_bundle(rng: random.Random, folder: Path, originals: list[Path], only: tuple[str, ...] = ()) -> list:
    touched = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and (not only or path.name in only)]
        weights = [6 if path.name == "manifest.json" else 2 for path in files]
        if not files or rng.random() < 0.06 and not only:
            touched.append(mutate_folder(rng, folder, originals))
            continue
        file, = rng.choices(files, weights)
        if file.suffix == ".json":
            touched.append(mutate_json_file(rng, file))
        elif file.suffix == ".jinja":
            touched.append(damage_template(rng, folder, originals)[0])
        else:
            file.write_bytes(mutate_bytes(rng, file.read_bytes()))
            touched.append((file.name, ()))
    if rng.random() < 0.95:
        fix_hashes(folder)
    return touched


def damage_checkpoint(rng: random.Random, folder: Path, originals: list[Path]) -> list:
    touched = []
    for _ in range(rng.choice((1, 1, 2))):
        match rng.randrange(10):
            case 0: touched.append(mutate_folder(rng, folder, originals))
            case 1 | 2 | 3 if (folder / "model.safetensors").is_file(): touched.append(mutate_safetensors(rng, folder / "model.safetensors"))
            case 4 if (folder / "generation_config.json").is_file(): touched.append(mutate_json_file(rng, folder / "generation_config.json"))
            case 5 if (folder / "lineage.json").is_file(): touched.append(mutate_json_file(rng, folder / "lineage.json"))
            case 6 if (folder / "tokenizer_config.json").is_file(): touched.append(mutate_json_file(rng, folder / "tokenizer_config.json"))
            case _ if (folder / "config.json").is_file(): touched.append(mutate_json_file(rng, folder / "config.json"))
            case _: touched.append(mutate_folder(rng, folder, originals))
    return touched


def damage_bytes(rng: random.Random, folder: Path, originals: list[Path]) -> list:
    """Any file; of a large one mostly the beginning, where its structure is."""
    file = rng.choice(sorted(folder.iterdir()))
    data = file.read_bytes()
    head = len(data) if rng.random() < 0.3 else min(len(data), 20_000)
    file.write_bytes(mutate_bytes(rng, data[:head]) + data[head:] if rng.random() < 0.95 else data[:rng.randrange(len(data))])
    return [(file.name, ())]


def damage_json(rng: random.Random, folder: Path, originals: list[Path]) -> list:
    return [mutate_json_file(rng, folder / "tokenizer.json") for _ in range(rng.choice((1, 1, 2, 3)))]


def damage_data(rng: random.Random, folder: Path, originals: list[Path]) -> list:
    file, = folder.iterdir()
    if file.suffix == ".json" and rng.random() < 0.6:
        return [mutate_json_file(rng, file)]
    file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return [(file.name, ())]


def damage_template(rng: random.Random, folder: Path, originals: list[Path]) -> list:
    file = folder / "chat_template.jinja"
    text = file.read_bytes()
    if rng.random() < 0.6:
        at = rng.randrange(len(text) + 1)
        piece = "".join(rng.choices(TEMPLATE_PIECES, k=rng.choice((1, 1, 2)))).encode()
        file.write_bytes(rng.choice((text[:at] + piece + text[at:], piece + text, text + piece, piece)))
    else:
        file.write_bytes(mutate_bytes(rng, text))
    return [(file.name, ())]


# ---- trials

def run_bundle(folder: Path, provider: str | None = None) -> dict:
    from runtime import Engine
    with Engine(folder, provider=provider, threads=1) as engine:
        plain = dict(temperature=0, ignore_model_stop=True)
        result = {"tokens": [reply.tokens for reply in engine.generate(IDS, max_new_tokens=8, **plain)],
                  "encoded": [engine.tokenizer.encode(text).tolist() for text in TEXTS],
                  "text": engine.generate(TEXTS[0], max_new_tokens=4, temperature=0)[0].text}
        engine.generate(IDS[0], max_new_tokens=4, seed=1)
        # The process that renders templates has a memory limit, below what AddressSanitizer's shadow takes.
        result["chat"] = None if SANITIZED else engine.chat_tokens(CHAT).tolist()
    return result


def run_golden(folder: Path) -> dict:
    from runtime.errors import CheckFailed, UserError
    from runtime.verify import Options, verify
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            verify(Options(bundle=folder, threads=1))
    except CheckFailed as error:
        raise UserError(f"a check failed: {error}") from None
    return {"compared": shown.getvalue().count(": kept"), "prompts": shown.getvalue().count("\np")}


def run_checkpoint(folder: Path) -> dict:
    import torch
    from models.formats import lineage
    from models.formats.chat import chat_encoder, special_ids
    from models.checkpoint import load_decoder, open_checkpoint
    from runtime.text import Tokenizer
    decoder = load_decoder(folder)
    with torch.no_grad():
        logits = decoder(torch.tensor(IDS[:1]))[0]
    lineage.read(folder)
    special_ids(open_checkpoint(folder).config, folder)
    chat = chat_encoder(folder, Tokenizer(folder / "tokenizer.json"))
    return {"logits": logits.tolist(), "chat": chat and chat.template.render(CHAT)}


def run_gguf(folder: Path) -> dict:
    from models.formats.gguf_file import GGUFFile
    from models.formats.gguf_tokenizer import write_tokenizer
    path = folder / "model.gguf"
    file = GGUFFile(path)
    tensors = {name: hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest() for name, tensor in file.tensors()}
    out = folder / "tokenizer"
    out.mkdir()
    write_tokenizer(file.metadata, path, out)
    written = {item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in out.iterdir()}
    return {"config": repr(file.config), "tensors": tensors, "tokenizer": written}


def run_foreign(folder: Path) -> dict:
    from compress.foreign import Options, adopt
    with quiet():
        adopt(Options(checkpoint=folder, out=folder / "out"))
    from models.checkpoint import load_decoder
    state = load_decoder(folder / "out").state_dict()
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}


def run_tokenizer(folder: Path) -> dict:
    from runtime.text import Tokenizer
    tokenizer = Tokenizer(folder / "tokenizer.json")
    ids = [tokenizer.encode(text).tolist() for text in TEXTS]
    return {"ids": ids, "texts": [tokenizer.decode(i) for i in ids], "token": tokenizer.token_text(5)}


def run_template(folder: Path) -> dict:
    from models.formats.chat import template_source
    from runtime.template import ChatTemplate
    template = ChatTemplate(template_source(folder), "chat_template.jinja", {"bos_token": "<s>", "eos_token": "</s>"})
    return {"text": template.render(CHAT)}


def run_data(folder: Path) -> dict:
    from compress.recipe import open_recipe
    from models.data import records as data_formats
    from models.tasks.options import TaskOptions, open_task
    from models.data.corpus import DataOptions, read_documents
    file, = folder.iterdir()
    if file.suffix == ".toml":
        return {"recipe": repr(open_recipe(file))} if file.name == "g.toml" else {"task": repr(open_task("qa", TaskOptions(task_file=file), []))}
    sources = data_formats.find_sources([file])
    records = list(data_formats.read_records(sources))
    counts, options = __import__("collections").Counter(), DataOptions(data=(str(file),))
    documents = list(read_documents(options, sources, counts, "read"))
    for record in records:
        for view in (data_formats.as_messages, data_formats.as_labelled):
            with contextlib.suppress(__import__("runtime.errors").errors.UserError):
                view(record)
    return {"documents": len(documents), "records": len(records)}
