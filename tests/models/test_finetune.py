"""Fine-tuning: loss on replies alone, LoRA merged exactly, labels judged by likelihood, bad input refused."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny import EVERY_FAMILY
from tokenizers import Tokenizer

from models.checkpoint import load_decoder, open_checkpoint
from models.data.corpus import IGNORE
from models.formats.chat import chat_encoder
from models.data.examples import Examples, encode_chat
from models.finetune import main
from models.tasks import Example
from models.tasks.defaults import DEFAULTS
from models.tasks.examples import read_examples
from models.tasks.learning import accuracy, encode
from models.training.lora import add_lora, check_adapters, merged_tensors, save_adapter
from models.training.memory import training_bytes
from runtime.chat_tokens import ChatEncoder
from runtime.errors import UserError
from runtime.task import Task
from runtime.template import ChatTemplate
from runtime.text import Tokenizer

CHAT = [{"role": "user", "content": "Add 1 and 2 🙂"}, {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, 今天"}]


@pytest.fixture
def parts(tiny_checkpoint):
    folder = tiny_checkpoint("smollm2")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    return folder, tokenizer, chat_encoder(folder, tokenizer)


@pytest.fixture
def chats(tmp_path):
    items = [{"instruction": f"say {i}", "input": "", "output": "so it is said"} for i in range(40)]
    (tmp_path / "chats.json").write_text(json.dumps(items))
    return str(tmp_path / "chats.json")


@pytest.fixture
def labelled(tmp_path):
    lines = [f"{'good fine' if i % 2 else 'bad poor'} {i}\t{i % 2}" for i in range(40)]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    (tmp_path / "valid.tsv").write_text("\n".join(line.replace(" ", " old ", 1) for line in lines[:20]))
    return str(tmp_path / "train.tsv"), str(tmp_path / "valid.tsv")


def arguments(checkpoint, out, *more):
    return [str(checkpoint), "-o", str(out), "--batch", "4", "--steps", "24", "--eval-every", "12", *more]


def rows(out, kind):
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def test_replies_alone_are_learned_as_transformers_tells_them(parts):
    """transformers marks the assistant's tokens through the template's `generation` blocks."""
    folder, _, chat = parts
    (ids, learned), = encode_chat(CHAT, chat)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    oracle.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}")
    expected = oracle.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == expected["input_ids"]
    assert learned.astype(int).tolist() == list(expected["assistant_masks"])
    assert oracle.decode(ids[learned].tolist()) == "It is 3.<|im_end|>Yes, 今天<|im_end|>"


def test_a_reply_of_weight_0_is_read_and_not_learned(parts):
    """OpenAI's files have it so. The ids stay, and what is learned is the other reply."""
    _, tokenizer, chat = parts
    (ids, learned), = encode_chat([CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]], chat)
    (plain, both), = encode_chat(CHAT, chat)
    assert ids.tolist() == plain.tolist() and tokenizer.decode(plain[both]) == "It is 3.Yes, 今天"
    assert tokenizer.decode(ids[learned]) == "Yes, 今天" and not (learned & ~both).any() and ids[learned][-1] == tokenizer.token_id("<|im_end|>")


def test_a_template_that_rewrites_earlier_turns_is_refused(parts, tmp_path):
    rewriting = ChatTemplate("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "t")
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode_chat(CHAT, ChatEncoder(rewriting, parts[1]))


@pytest.mark.parametrize("opens", ["<think>\n", "<think>", "A thought: ", "<|im_end|>"])
@pytest.mark.parametrize("reply", ["yes", "<think>\nhm\n</think>\n\nyes", "<b>A thought", "<", "yes<|im_end|> no"])
def test_a_prompt_that_opens_a_thought_takes_nothing_from_a_reply_without_one(parts, opens, reply):
    """The oracle marks the assistant's turn in the template; where the reply begins as the prompt does, that was not its own."""
    source = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n" + opens + "{% endif %}")
    chat, tokenizer = ChatEncoder(ChatTemplate(source, "t"), parts[1]), parts[1]
    messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": reply}]
    (ids, learned), = encode_chat(messages, chat)
    end = tokenizer.token_id("<|im_end|>")
    own = reply[len(opens):] if reply.startswith(opens) else reply
    assert tokenizer.decode(ids[learned][:-1]) == own and ids[learned][-1] == end
    assert (ids == end).sum() == 2 and ids[~learned][-1] != end


def encoded_chat(record, source, tokenizer, folder):
    (folder / "c.json").write_text(json.dumps([record]))
    example, = read_examples("chat", [folder / "c.json"])
    return encode(DEFAULTS["chat"], example, tokenizer, ChatEncoder(ChatTemplate(source, "t"), tokenizer), None)


def test_calls_of_tools_are_learned_as_transformers_tells_them(parts, tmp_path):
    source = ("{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
              "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>"
              "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "x"}}}
    record = {"tools": [{"type": "function", "function": {"name": "now"}}], "messages": [
        {"role": "user", "content": "hi", "tool_calls": None}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "noon"}, {"role": "assistant", "content": "It is noon"}]}
    (ids, learned), = encoded_chat(record, source, parts[1], tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(parts[0])
    oracle.chat_template = source
    expected = oracle.apply_chat_template(record["messages"], tools=record["tools"], return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == expected["input_ids"] and learned.astype(int).tolist() == list(expected["assistant_masks"])


THINKS = ("{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
          "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content.split('</think>')[-1].lstrip('\n') if m.content is string else m.content[0].text %}"
          "{% if m.role == 'assistant' %}{% generation %}{% if loop.index0 > ns.last %}{{ BEGIN }}{{ m.reasoning_content or "
          "(m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '') }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>{% endgeneration %}"
          "{% else %}{{ c }}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ PROMPT }}{% endif %}")
QUESTIONS = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}]
REPLIES = [{"role": "assistant", "content": "one", "reasoning": "hm"}, {"role": "assistant", "content": "<think>\nwell\n</think>\n\ntwo"},
           {"role": "assistant", "content": "three"}]


@pytest.mark.parametrize("opens", [False, True], ids=["the model opens the thought", "the prompt does"])
def test_thoughts_that_are_left_out_later_are_learned_where_they_stood(parts, opens):
    """Each reply after the prompt that inference gives it: `transformers` tells the ids, and which of them the assistant's are."""
    source = THINKS.replace("BEGIN", "'<think>\\n'").replace("PROMPT", "'<think>\\n'" if opens else "''")
    folder, tokenizer, _ = parts
    messages = [m for pair in zip(QUESTIONS, REPLIES) for m in pair]
    found = encode_chat(messages, ChatEncoder(ChatTemplate(source, "t"), tokenizer))
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    oracle.chat_template = source
    assert len(found) == 3
    for number, (ids, learned) in enumerate(found):
        part = messages[:2 * number + 2]
        expected = oracle.apply_chat_template(part, return_dict=True, return_assistant_tokens_mask=True)
        asked = oracle.apply_chat_template(part[:-1], add_generation_prompt=True, return_dict=False)
        assert ids.tolist() == expected["input_ids"] and ids[~learned].tolist()[:len(asked)] == asked
        assert not learned[:len(asked)].any() and learned[len(asked):].tolist() == [bool(one) for one in expected["assistant_masks"][len(asked):]]
        thought = ("hm", "well", "")[number]
        assert oracle.decode(ids[learned]) == ("" if opens else "<think>\n") + thought + f"\n</think>\n\n{('one', 'two', 'three')[number]}<|im_end|>"


def test_a_record_brings_tools_as_json_and_what_the_template_reads(parts, tmp_path):
    source = "{{ tools[0].name }}{{ mood }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    fields = {"messages": [CHAT[0], CHAT[1]], "tools": '[{"name": "now"}]', "chat_template_kwargs": {"mood": "gay"}}
    (ids, learned), = encoded_chat(fields, source, parts[1], tmp_path)
    assert parts[1].decode(ids[~learned]).startswith("nowgay") and parts[1].decode(ids[learned]) == "It is 3."
    for wrong, message in (({"tools": "now"}, "tools: not JSON"), ({"chat_template_kwargs": ["mood"]}, "chat_template_kwargs is"), ({"tools": "[1]"}, "tools must be"),
                           ({"chat_template_kwargs": None}, "t: the chat template needs 'mood'"), ({"chat_template_kwargs": {"mod": 1}}, "t: .*reads no 'mod'")):
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/c.json:record 0: {message}"):
            encoded_chat(fields | wrong, source, parts[1], tmp_path)


LABELS = Task(name="classify", example="Text: {text}\nLabel:", answer="label", labels={"0": "bad news", "1": "yes"})


def test_rows_are_padded_to_the_right_with_no_loss_there(parts):
    _, tokenizer, _ = parts
    encoded = [row for text in ("a", "a much longer text") for row in encode(LABELS, Example({"text": text}, ("1",)), tokenizer, None, None)]
    input_ids, labels = Examples(encoded, pad=2).rows(np.array([0, 1]))
    length = len(encoded[0][0]) - 1
    assert (input_ids[0, length:] == 2).all() and (labels[0, length:] == IGNORE).all()
    for row, (ids, learned) in enumerate(encoded):
        assert labels[row][labels[row] != IGNORE].tolist() == ids[learned].tolist()


@pytest.mark.parametrize("family", ["smollm2", "gpt2"])
def test_chat_with_lora_learns_and_merges(tiny_checkpoint, chats, tmp_path, family):
    source, out = tiny_checkpoint(family), tmp_path / "out"
    assert main(arguments(source, out, "--task", "chat", "--data", chats, "--learning-rate", "0.01")) == 0
    losses = [row["valid_loss"] for row in rows(out, "valid")]
    assert losses[-1] < losses[0] - 0.3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "last")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(load_decoder(out / "last")(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert [s["stage"] for s in json.loads((out / "last/lineage.json").read_text())["stages"]][-1] == "finetune"
    assert (out / "last/chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


def test_merged_weights_give_the_adapters_logits(parts):
    decoder = load_decoder(parts[0])
    model = add_lora(decoder, rank=4, alpha=8.0, source=parts[0])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(40)[None]
    with_adapter, plain = model(ids), load_decoder(parts[0])
    assert not torch.allclose(plain(ids), with_adapter, atol=1e-2)
    plain.load_state_dict(dict(merged_tensors(model, open_checkpoint(parts[0]))))
    torch.testing.assert_close(plain(ids), with_adapter, rtol=1e-4, atol=1e-4)


def test_weights_frozen_in_bf16_are_merged_from_the_checkpoints_own(parts):
    model = add_lora(load_decoder(parts[0]), rank=4, alpha=8.0, source=parts[0], frozen=torch.bfloat16)
    kept = load_decoder(parts[0]).state_dict()
    assert any(not torch.equal(p, kept[name.removeprefix("base_model.model.").replace(".base_layer", "")])
               for name, p in model.named_parameters() if ".base_layer." in name)
    for name, tensor in merged_tensors(model, open_checkpoint(parts[0])):           # the adapter is still 0
        assert torch.equal(tensor, kept[name])


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_kept_adapter_opens_with_peft_in_transformers(family, tiny_checkpoint, tmp_path):
    """Against the merged weights, themselves held against the adapter above."""
    source = tiny_checkpoint(family)
    checkpoint = open_checkpoint(source)
    model = add_lora(load_decoder(source), rank=4, alpha=8.0, source=source)
    beside = {name.partition(".lora_A")[0] for name, p in model.named_parameters() if p.requires_grad and ".lora_A" in name}
    assert {name.removeprefix("base_model.model.") for name in beside} == {
        name for name, module in load_decoder(source).model.layers.named_modules(prefix="model.layers")
        if isinstance(module, torch.nn.Linear) and not name.endswith("router")}
    if any(layer.experts for layer in checkpoint.config.layers):
        with pytest.raises(UserError, match="--keep-adapter: .* keeps its experts in one tensor"):
            check_adapters(checkpoint, True)
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter", checkpoint.hf_config)
    base, merged = transformers.AutoModelForCausalLM.from_pretrained(source), load_decoder(source)
    ids = torch.arange(40)[None]
    plain = base(ids).logits
    merged.load_state_dict(dict(merged_tensors(model, open_checkpoint(source))))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert not torch.allclose(plain, theirs, atol=1e-1)
    torch.testing.assert_close(theirs, merged(ids), rtol=1e-3, atol=1e-3 * float(theirs.abs().max().clamp_min(1)))


@pytest.mark.parametrize("family", ["smollm2", "gpt2"])
def test_keep_adapter_is_what_merging_would_give(family, tiny_checkpoint, chats, tmp_path):
    source, out = tiny_checkpoint(family), tmp_path / "out"
    common = ("--task", "chat", "--data", chats, "--learning-rate", "0.01")
    assert main(arguments(source, out, *common, "--keep-adapter")) == 0
    assert main(arguments(source, tmp_path / "merged", *common)) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, out / "last")(ids).logits,
                               load_decoder(tmp_path / "merged/last")(ids), rtol=1e-3, atol=1e-3)


def test_full_fine_tuning_resumes_exactly(parts, chats, tmp_path):
    """Two halves of the same run: the first stopped by an error in the data's place, the second resumed."""
    common = ("--task", "chat", "--data", chats, "--method", "full", "--learning-rate", "0.001")
    assert main(arguments(parts[0], tmp_path / "whole", *common)) == 0
    import models.training.trainer
    step, left = models.training.trainer.Trainer.train_step, iter(range(20))
    try:
        models.training.trainer.Trainer.train_step = lambda self: (step(self), next(left))[0]
        with pytest.raises(StopIteration):
            main(arguments(parts[0], tmp_path / "cut", *common))
    finally:
        models.training.trainer.Trainer.train_step = step
    assert main(arguments(parts[0], tmp_path / "cut", *common, "--resume")) == 0
    assert [r["loss"] for r in rows(tmp_path / "cut", "train")] == [r["loss"] for r in rows(tmp_path / "whole", "train")]


def test_classification_learns_and_reports_accuracy(parts, labelled, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(parts[0], out, "--task", "classify", "--data", labelled[0], "--valid", labelled[1], "--labels",
                          "0=not good", "1=yes", "--prompt", "{text}\\nIs it?", "--learning-rate", "0.02")) == 0
    report = capsys.readouterr().out
    before, after = (float(word.split("%")[0]) for word in report.split("accuracy on 20 examples: ")[1].split() if "%" in word)
    assert after == 100.0 > before


def test_accuracy_is_that_of_the_likeliest_label_one_example_at_a_time(parts):
    """Against whole-row log-softmax, for labels of several tokens."""
    decoder, right, encoded = load_decoder(parts[0]), [], []
    answers = [LABELS.tail({}, words, parts[1]) for words in LABELS.labels.values()]
    for i in range(21):
        row, = encode(LABELS, Example({"text": f"text number {i}"}, (str(i % 2),)), parts[1], None, None)
        encoded.append(row)
        question, scores = row[0][~row[1]], []
        for tail in answers:
            ids = np.concatenate((question, tail))
            logp = decoder(torch.from_numpy(ids[None])).double().log_softmax(-1)[0]
            scores.append(sum(logp[k - 1, ids[k]].item() for k in range(len(question), len(ids))))
        right.append(int(np.argmax(scores)) == i % 2)
    from types import SimpleNamespace
    stub = SimpleNamespace(tensors=lambda rows: map(torch.from_numpy, rows), accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
                           module=decoder)
    assert 0 < sum(right) < 21
    assert accuracy(stub, encoded, answers, 2) == pytest.approx(np.mean(right))


@pytest.mark.parametrize("change, message", [
    (["--context", "100000"], "--context 100000: the model's context is 256"),
    (["--context", "5"], "none of .* examples has an answer within --context 5"),
    (["--prompt", "no place"], r"has no \{text\}"),
    (["--labels", "0"], "--labels 0: give each label as NAME=WORDS"),
    (["--labels", "0=bad"], "an answer that is a label needs labels to choose from, two or more"),
    (["--labels", "0=bad", "2=odd"], r"train.tsv:2: label '1' was never seen; known are 0, 2"),
    (["--task", "similarity"], "--task similarity: compares the embeddings of an encoder"),
    (["--method", "full", "--keep-adapter"], "--keep-adapter is for --method lora"),
    (["--task", "chat"], "train.tsv:1: not a chat or instruction record"),
])
def test_input_of_no_use_is_refused(parts, labelled, tmp_path, capsys, change, message):
    command = arguments(parts[0], tmp_path / "out", "--task", "classify", "--data", labelled[0], "--valid", labelled[1], *change)
    assert main(command) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_label_never_seen_in_training_is_named_with_its_place(parts, labelled, tmp_path, capsys):
    with open(labelled[1], "a") as file:
        file.write("\nodd\t7")
    assert main(arguments(parts[0], tmp_path / "out", "--task", "classify", "--data", labelled[0], "--valid", labelled[1])) == 2
    assert "valid.tsv:21: label '7' was never seen; known are 0, 1" in capsys.readouterr().err


def test_examples_beyond_the_context_are_counted(parts, labelled, tmp_path, capsys):
    with open(labelled[0], "a") as file:
        file.write("\n" + "long " * 200 + "\t1")
    assert main(arguments(parts[0], tmp_path / "out", "--task", "classify", "--data", labelled[0], "--valid",
                          labelled[1], "--context", "100")) == 0
    assert "training data: 1 of 41 examples left out: longer than 100 tokens" in capsys.readouterr().out


def test_memory_counts_what_is_trained(parts):
    config = open_checkpoint(parts[0]).config
    decoder = load_decoder(parts[0])
    count = sum(p.numel() for p in decoder.parameters())
    full = training_bytes(decoder, config, 4, 32, 32, checkpointing=False)
    assert (full["weights"], full["gradients and optimizer"]) == (4 * count, 12 * count)
    less = training_bytes(decoder, config, 4, 32, 32, checkpointing=True)
    assert less["activations"] < full["activations"]
    lora = training_bytes(add_lora(decoder, 2, 4.0, parts[0]), config, 4, 32, 32, checkpointing=False)
    assert lora["gradients and optimizer"] < full["gradients and optimizer"] / 5


def test_weights_frozen_in_bf16_let_go_of_the_file(parts, tmp_path):
    source = shutil.copytree(parts[0], tmp_path / "source")

    def mapped():
        return str(source) in Path("/proc/self/maps").read_text()

    decoder = load_decoder(source)
    assert mapped()
    model = add_lora(decoder, rank=4, alpha=8.0, source=source, frozen=torch.bfloat16)
    assert model is not None and not mapped()


def test_columns_are_named_in_any_case_and_no_header_becomes_a_label(parts, tmp_path, capsys):
    rows = [f'{i},"good, fine {i}",up' if i % 2 else f"{i},bad poor {i},down" for i in range(12)]
    (tmp_path / "t.csv").write_text("\ufeff" + "\r\n".join(["Number,Review,Mood", *rows]), "utf-8")
    command = [str(parts[0]), "-o", str(tmp_path / "out"), "--batch", "4", "--steps", "1", "--task", "classify", "--data",
               str(tmp_path / "t.csv"), "--valid", str(tmp_path / "t.csv")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "columns Number, Review, Mood, named by the first row" in said
    assert "t.csv:2: no text and label; it has Number, Review, Mood: name them with --field and --label-field" in said
    assert main([*command, "--field", "review", "--label-field", "MOOD"]) == 0
    assert "12 training and 12 validation examples" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("text,label\ngood it is,up\nfine it is,up\n")
    assert main([*command[:2], str(tmp_path / "other"), *command[3:]]) == 2
    assert "every example has the label up" in capsys.readouterr().err
