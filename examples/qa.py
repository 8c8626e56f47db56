"""Questions about a text: a small model learns to answer them, shrinks, is asked over HTTP, and learns from corrections.

    python -m examples.qa --model build/smollm2-135m --data xquad-en.json -o build/example-qa

1. Questions with their texts are split by text: half to learn from, half to judge on, and of the first some are set aside.
2. LoRA on the model's own template; exact match, F1 and BLEU before, after, and of the compressed bundle.
3. The bundle is asked from Python and through the server, greedily and with top-k and temperature.
4. It answers the questions set aside; the right answers of those it got wrong are sent as corrections, exported, and learned,
   with old examples mixed in and without. Told are the share of corrected answers that are right then, and what the old set gives.

Docs: docs/example-qa.md.
"""

from dataclasses import dataclass
from pathlib import Path

from examples.story import Story, post, scored, server
from models.data.corpus import Split
from models.judging.metrics import exact_match
from models.tasks import Example, read_examples
from runtime.cli import Checked, arg, run
from runtime.errors import UserError
from runtime.task import read_task

METRICS = ("exact_match", "f1", "bleu")


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Fine-tune on questions about texts, compress, serve, and learn from corrections: the figures of each step."""
    model: Path = arg(Path("build/smollm2-135m"), help="checkpoint with a chat template")
    data: Path = arg(Path("../shared/data/qa/xquad-en.json"), help="questions, as SQuAD has them")
    out: Path = arg(Path("build/example-qa"), short="-o", help="folder for everything that is made; what is there is not made again")
    steps: int = arg(40, help="updates of the weights in fine-tuning; two thirds of it in learning from corrections", least=3)
    batch: int = arg(8, help="questions that one update learns from", least=1)
    judged: int = arg(60, help="questions to judge on", least=2)
    aside: int = arg(30, help="questions to be corrected", least=1)
    context: int = arg(384, help="tokens of a text with its question, at most", least=16)


def main(argv=None) -> int:
    return run(Options, tell, argv)


def tell(options: Options) -> None:
    if not options.data.is_file():
        raise UserError(f"{options.data}: not there; give questions in SQuAD's format with --data")
    story = Story("Questions about a text", options.out)
    learn, judge = halves(read_examples("qa", [options.data]))
    aside, learn = learn[:options.aside], learn[options.aside:]
    files = {name: story.write(f"{name}.jsonl", [example.fields | {"answers": list(example.answers)} for example in part])
             for name, part in (("learn", learn), ("judge", judge[:options.judged]), ("aside", aside))}
    asked = ("--task", "qa", "--chat", "--shots", 0, "--data")
    learned = ("--task", "qa", "--chat", "--data", files["learn"], "--valid", files["judge"], "--batch", options.batch, "--context",
               options.context, "--eval-rows", 32)

    found = {"before": story.figures("before", options.model, *asked, files["judge"])}
    tuned = story.path("run") / "last"
    story.run("models.finetune", options.model, *learned, "--steps", options.steps, "--eval-every", options.steps, "-o", story.path("run"),
              makes=tuned / "config.json")
    found["after LoRA"] = story.figures("after", tuned, *asked, files["judge"])
    bundle = story.bundle(tuned, "small", "qa", files["learn"])
    found["compressed"] = story.figures("small", bundle, *asked, files["judge"])
    story.tell("The answers", f"Of {len(judge[:options.judged])} questions about texts that were not learned from. Exact match and F1 are SQuAD's, of 1; "
               "BLEU of 100. The bars show F1 with its 95% interval.", *scored(found, METRICS, "f1"))

    corrected = ask(story, bundle, aside)
    feedback = story.path("feedback.jsonl")
    story.run("runtime.feedback", "export", story.path("feedback.db"), "-o", feedback, "--corrected-only", makes=feedback)
    steps = max(3, options.steps * 2 // 3)
    more = ("--steps", steps, "--eval-every", steps)
    replay, alone = story.path("with-replay"), story.path("without-replay")
    # As many corrections as old examples.
    story.run("models.finetune", tuned, *learned, "--mix", f"chat@1={feedback}", *more, "-o", replay, makes=replay / "last/config.json")
    story.run("models.finetune", tuned, "--task", "chat", "--data", feedback, "--valid", feedback, "--batch", options.batch, "--context",
              options.context, *more, "-o", alone, makes=alone / "last/config.json")
    corrections = story.write("corrected.jsonl", [example.fields | {"answers": list(example.answers)} for example in corrected])
    rows, bars = [], []
    for name, model in (("before the corrections", tuned), ("corrections and old examples", replay / "last"), ("corrections alone", alone / "last")):
        short = name.replace(" ", "-")
        right = story.figures(f"{short}-corrected", model, *asked, corrections)
        old = found["after LoRA"] if model == tuned else story.figures(f"{short}-old", model, *asked, files["judge"])
        rows.append({"learned": name, "corrected answers right": f"{right['exact_match']:.0%}", "old questions, F1": f"{old['f1']:.3f}"})
        bars.append((old["f1"], *old["f1_interval"]))
    story.tell(f"What {len(corrected)} corrections taught", "The share of the corrected questions that are answered right, and F1 on the questions "
               "judged above, which should not fall; the bars show that.", rows, bars)
    story.finish()


def halves(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """To learn from and to judge on; the questions about one text are on one side."""
    return tuple([example for example in examples if Split(part, 0.5, 0).has(example.fields["context"])] for part in ("train", "valid"))


def ask(story: Story, bundle: Path, aside: list[Example]) -> list[Example]:
    """Ask from Python and through the server, and send corrections. Returns the examples that were corrected."""
    from runtime import Engine
    task, rows, wrong = read_task(bundle / "task.json"), [], []
    with Engine(bundle) as engine:
        from_python = [engine.solve(example.fields).text for example in aside[:4]]
        drawn = [engine.solve(example.fields, temperature=0.8, top_k=20, seed=1).text for example in aside[:4]]
    with server(bundle, "--feedback", story.path("feedback.db")) as url:
        for number, example in enumerate(aside):
            body = {"messages": task.messages(example.fields), "max_tokens": task.max_new_tokens, "temperature": 0}
            reply = post(f"{url}/v1/chat/completions", body)
            text = reply["choices"][0]["message"]["content"].strip()
            if not exact_match(text, example.answers):
                wrong.append(example)
                post(f"{url}/v1/feedback", {"id": reply["id"], "messages": body["messages"], "reply": text, "rating": "down",
                                            "correction": example.answers[0]})
            if number < 4:
                warm = post(f"{url}/v1/chat/completions", body | {"temperature": 0.8, "top_k": 20, "seed": 1})["choices"][0]["message"]["content"]
                rows.append({"question": example.fields["question"], "right": example.answers[0], "Engine.solve": from_python[number], "server": text,
                             "solve, drawn": drawn[number], "server, drawn": warm.strip()})
    story.tell("Asked from Python and through the server", "The compressed bundle, greedily, and drawn among 20 tokens at temperature 0.8 with seed 1. "
               "Both ways ask the same tokens.", rows)
    if not wrong:
        raise UserError(f"all {len(aside)} questions set aside were answered right, so there is nothing to correct; give more with --aside")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
