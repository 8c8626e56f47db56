"""Descriptions become one-line summaries: a small model learns to write them, shrinks, is served, and its variety is told.

    python -m examples.nlg --model build/smollm2-135m --data debian-descriptions.jsonl -o build/example-nlg

LoRA on the model's own template; BLEU, ROUGE and METEOR before, after, and of the compressed bundle; several summaries of each text
drawn at a temperature, and how different they are; the bundle asked from Python and through the server.

Docs: docs/example-nlg.md.
"""

from dataclasses import dataclass
from pathlib import Path

from examples.story import Story, post, scored, server
from models.tasks import read_examples
from models.tasks.examples import split_shots
from runtime.cli import Checked, arg, run
from runtime.errors import UserError
from runtime.task import read_task

METRICS = ("bleu", "rouge1", "rouge2", "rougeL", "meteor")
VARIETY = ("rougeL", "distinct1", "distinct2", "self_bleu")


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Fine-tune on summaries, compress, serve: the figures of each step, and how varied the summaries are."""
    model: Path = arg(Path("build/smollm2-135m"), help="checkpoint with a chat template")
    data: Path = arg(Path("../shared/data/summarize/debian-descriptions.jsonl"), help="records with text and summary")
    out: Path = arg(Path("build/example-nlg"), short="-o", help="folder for everything that is made; what is there is not made again")
    learned: int = arg(600, help="texts to learn from", least=1)
    judged: int = arg(80, help="texts to judge on", least=2)
    steps: int = arg(60, help="updates of the weights", least=3)
    batch: int = arg(8, help="texts that one update learns from", least=1)
    context: int = arg(384, help="tokens of a text with its summary, at most", least=16)
    drawn: int = arg(4, help="summaries of each text, where variety is measured", least=2)
    temperature: float = arg(0.8, help="at which they are drawn", above=0)


def main(argv=None) -> int:
    return run(Options, tell, argv)


def tell(options: Options) -> None:
    if not options.data.is_file():
        raise UserError(f"{options.data}: not there; give records with text and summary with --data")
    story = Story("Summaries of descriptions", options.out)
    judge, learn = split_shots(read_examples("summarize", [options.data]), options.judged, options.learned, 0)
    files = {name: story.write(f"{name}.jsonl", [{"text": e.fields["text"], "summary": e.answers[0]} for e in part])
             for name, part in (("learn", learn), ("judge", judge))}
    asked = ("--task", "summarize", "--chat", "--shots", 0, "--data", files["judge"])
    found = {"before": story.figures("before", options.model, *asked)}
    tuned = story.path("run") / "last"
    story.run("models.finetune", options.model, "--task", "summarize", "--chat", "--data", files["learn"], "--valid", files["judge"], "--batch",
              options.batch, "--context", options.context, "--eval-rows", 32, "--steps", options.steps, "--eval-every", options.steps, "-o",
              story.path("run"), makes=tuned / "config.json")
    found["after LoRA"] = story.figures("after", tuned, *asked)
    bundle = story.bundle(tuned, "small", "summarize", files["learn"])
    found["compressed"] = story.figures("small", bundle, *asked)
    story.tell("The summaries", f"Of {len(judge)} descriptions that were not learned from, against one right summary each. BLEU is of 100, the others "
               "of 1. The bars show ROUGE-L with its 95% interval.", *scored(found, METRICS, "rougeL"))

    drawn = story.figures("drawn", bundle, *asked, "--n", options.drawn, "--temperature", options.temperature, "--top-p", 0.95)
    story.tell("Variety", f"Greedy, all summaries beside each other; and {options.drawn} of each description, drawn at temperature {options.temperature:g}, "
               "beside each other: the share of different words and pairs of words, and the BLEU of one against the others (100: all alike).",
               *scored({"greedy": found["compressed"], "drawn": drawn}, VARIETY, "rougeL"))
    ask(story, bundle, judge[:4])
    story.finish()


def ask(story: Story, bundle: Path, examples: list) -> None:
    from runtime import Engine
    task, rows = read_task(bundle / "task.json"), []
    with Engine(bundle) as engine, server(bundle) as url:
        for example in examples:
            reply = post(f"{url}/v1/chat/completions", {"messages": task.messages(example.fields), "max_tokens": task.max_new_tokens, "temperature": 0})
            rows.append({"text": example.fields["text"][:70], "right": example.answers[0], "Engine.solve": engine.solve(example.fields).text,
                         "server": reply["choices"][0]["message"]["content"].strip()})
    story.tell("Asked from Python and through the server", "The compressed bundle. Both ways ask the same tokens.", rows)


if __name__ == "__main__":
    raise SystemExit(main())
