"""Thoughts and answers told apart, in replies that begin one themselves and in those whose prompt did."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer as HfTokenizer, decoders, models, pre_tokenizers

from runtime import decode
from runtime.reply import Draft
from runtime.sampling import Sampler, SamplingOptions
from runtime.text import ReplyText, Tokenizer
from runtime.thoughts import KNOWN, thoughts_of

MARKS = [mark for known in KNOWN for mark in (known.begin, known.end)]


@pytest.fixture(params=["text", "added", "special"])
def tokenizer(request, tmp_path):
    """The delimiters are spelled in bytes, or tokens that show, or control tokens that do not."""
    tokens = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())] if request.param != "text" else sorted(pre_tokenizers.ByteLevel.alphabet())
    made = HfTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if request.param != "text":
        special = request.param == "special"
        (made.add_special_tokens if special else made.add_tokens)([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    made.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer.json")


def told_apart(tokenizer, known, prompt, said, stop=()):
    """(thought, answer) of a reply that says this after that prompt, as a draft gives them."""
    prompt, tokens = (tokenizer.encode(text, control_tokens=True) for text in (prompt, said))
    sequence = decode.Sequence(prompt, Sampler(SamplingOptions(), prompt), len(tokens), frozenset())
    draft = Draft(sequence, ReplyText(tokenizer, stop), known)
    draft.start = 0.0
    for token in tokens.tolist():
        sequence.tokens.append(token)
        sequence.times.append(0.0)
        draft.advance()
        if sequence.finish_reason:
            break
    return draft.reply.thought, draft.reply.answer


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.begin)
def test_thoughts_and_answers(tokenizer, known):
    b, e, t = known.begin, known.end, known.title
    asked, opened = "<user>hm?\n<assistant>\n", f"<user>hm?\n<assistant>\n{b}{t or chr(10)}"
    for prompt, said, thought, answer in [
            (asked, f"{b}{t}\nI must.\n{e}\n\nYes 日本.\n", "I must.", "Yes 日本.\n"),
            (asked, f" \n{b}{t} I must. {e}Yes", "I must.", "Yes"),
            (opened, f"I must.\n{e}\n\nYes.", "I must.", "Yes."),
            (opened, f"{b}{t}I must.\n{e}\n\nYes.", "I must.", "Yes."),
            (opened, "I must", "I must", ""), (asked, f"{b}{t}I must", "I must", ""), (opened, "", None, ""),
            (opened, f"\n\n{e}\n\nYes.", None, "Yes."), (asked, f"{b}{t}\n\n{e}\n\nYes.", None, "Yes."),
            (opened, f"a{e}b{e}c", "a", tokenizer.decode(tokenizer.encode(f"b{e}c", control_tokens=True))),
            (asked, "Yes.", None, "Yes."), (opened + f"\n{e}\n\n", "Yes.", None, "Yes."),
            (asked + f"{b}{t}old{e} said<user>more<assistant>", "Yes", None, "Yes")]:
        assert told_apart(tokenizer, known, prompt, said) == (thought, answer), (prompt, said)
        assert told_apart(tokenizer, None, prompt, said)[0] is None


def test_a_delimiter_inside_an_answer_is_none(tokenizer):
    known = KNOWN[0]
    said = "Write </think> or <think>x</think>."
    shown = tokenizer.decode(tokenizer.encode(said, control_tokens=True))
    assert told_apart(tokenizer, known, "q", said) == (None, shown)


def test_a_stop_string_is_in_neither(tokenizer):
    assert told_apart(tokenizer, KNOWN[0], "q", "<think>a</think>yes STOP no", ("STOP",)) == ("a", "yes ")
    assert told_apart(tokenizer, KNOWN[0], "q", "<think>a STOP b</think>yes", ("STOP",)) == ("a", "")


def test_which_delimiters_a_model_has(tokenizer):
    for known in KNOWN:
        assert thoughts_of(f"{{{{ m.content.split('{known.end}') }}}}", tokenizer) == known
    assert thoughts_of("{{ m.content }}", tokenizer) == (None if tokenizer.token_id("</think>") is None else KNOWN[0])


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.begin)
def test_a_stream_gives_what_the_whole_gives(tokenizer, known):
    """However the text is cut: marks, titles and white space too."""
    random, spelled, cases = np.random.default_rng(0), known.spelled(tokenizer), 0
    parts = [known.begin, known.end, known.title, known.title[:4], known.begin[:3], known.end[:-1], " ", "\n\n", "I must", "Yes.", "<", "日本"]
    for prompt in ("<user>hm?", f"hm?{known.begin}{known.title or chr(10)}", f"{known.begin}a{known.end}"):
        prompt = tokenizer.encode(prompt, control_tokens=True)
        for _ in range(300):
            said = "".join(random.choice(parts, random.integers(0, 9)))
            tokens = tokenizer.encode(said, control_tokens=True).tolist()
            reply = ReplyText(tokenizer, (), spelled)
            text = "".join(reply.push(token)[0] for token in tokens) + reply.finish()[0]
            whole = known.split(tokenizer, prompt, tokens, text, spelled)
            stream, found, place = known.stream(tokenizer, prompt), [], 0
            while place < len(text):
                step = int(random.integers(1, 7))
                found += stream.push(text[place:place + step])
                place += step
            found += stream.finish()
            assert all(piece for _, piece in found)
            joined = {kind: "".join(piece for k, piece in found if k == kind) for kind in ("thought", "answer")}
            assert (joined["thought"] or None, joined["answer"]) == whole, (text, found)
            assert [k for k, _ in found] == sorted((k for k, _ in found), reverse=True)      # thoughts first
            cases += whole[0] is not None and whole[1] != ""
    assert cases > 20
