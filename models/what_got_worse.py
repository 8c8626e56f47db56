"""What a smaller model lost: hold it against the one it came from, by domain, by prompt, by answer and by habit.

    python -m models.what_got_worse build/smollm2-135m build/smollm2-135m-int4 --data wiki.txt speeches.txt zh.txt \\
        --prompts alpaca-en.json --labelled sst2-dev.tsv --html report.html

- Domains: for each text, KL(before || after), top-1 agreement, and both perplexities (models/judging/fidelity.py).
- Prompts: ln p of the file's own reply under each model; the prompts where the reply became least likely come first.
- Answers: classification examples that were right and are wrong now, and the other way round.
- Habits: refusals and repetition over greedy replies to the prompts, and valid JSON where JSON was asked for
  (models/judging/behaviour.py).

Prints tables; `--html` writes one self-contained page with plots (models/judging/page.py).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.device import DeviceOptions
from models.judging import behaviour
from models.progress import progress
from models.tasks.defaults import SHOTS
from models.tasks.examples import Example, read_examples, split_shots
from models.tasks.options import TaskOptions, open_task, with_shots
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import write
from runtime.task import Task


@dataclass(frozen=True)
class Options(DeviceOptions):
    """Compare a model before and after: what got worse, where, and by how much."""
    before: Path = arg(positional=True, help="checkpoint or bundle to hold the other against")
    after: Path = arg(positional=True, help="checkpoint or bundle that was made from it")
    data: tuple[Path, ...] = arg((), help="texts or chats, a file a domain")
    prompts: Path | None = arg(None, help="instructions with replies: Alpaca, or prompt and completion")
    labelled: Path | None = arg(None, help="texts with labels, such as a TSV of sentence TAB label")
    windows: int = arg(20, help="windows of 512 tokens a text, at most", least=1)
    limit: int = arg(40, help="prompts and labelled examples, at most", least=1)
    new_tokens: int = arg(96, help="tokens of each reply whose habits are judged", least=1)
    worst: int = arg(8, help="prompts to show", least=0)
    seed: int = arg(0, help="draws prompts and examples", least=0, most=2**63 - 1)
    json: Path | None = arg(None, help="write everything to this file")
    html: Path | None = arg(None, help="write a self-contained page to this file")
    threads: int | None = arg(None, help="CPU threads (default: those available)", least=1)

    def __post_init__(self):
        super().__post_init__()
        if not (self.data or self.prompts or self.labelled):
            raise UserError("nothing to compare on: give --data, --prompts or --labelled")


def main(argv=None) -> int:
    return run(Options, "compare", argv)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())


from models.judging import fidelity, texts
from models.evaluate import write_json
from models.judging.language_model import LanguageModel, check_same_tokenizer, judging_on
from models.judging.page import page, report


def compare(options: Options) -> None:
    instructions = read_examples("instruct", [options.prompts]) if options.prompts else []
    labelled = read_examples("classify", [options.labelled]) if options.labelled else []
    with judging_on(options.device, options.before, options.after) as opened:
        before, after = (opened(model, threads=options.threads) for model in (options.before, options.after))
        shared = check_same_tokenizer(after, before)

        result = {"before": options.before.name, "after": options.after.name}
        if options.data:
            read = [(file.name, texts.read(file, after.tokenizer, lambda: after.chat)) for file in options.data]
            result["domains"] = [domain(name, text, before, after, options.windows, shared) for name, text in read]
        if instructions:
            _, chosen = split_shots(instructions, 0, options.limit, options.seed)
            result["prompts"] = prompts(chosen, before, after)
            result["habits"] = habits(chosen, before, after, options.new_tokens)
        if labelled:
            result["answers"] = answers(labelled, before, after, options)
    print(report(result, options.worst))
    if options.json:
        write_json(options.json, result)
    if options.html:
        write(options.html, page(result, options.worst))
        print(f"\n{options.html}: open it in a browser")


def domain(name: str, text: texts.Text, before: LanguageModel, after: LanguageModel, limit: int, shared: int | None) -> dict:
    size = min(512, before.context, after.context)
    windows = fidelity.cut_windows(text, size, size // 2, limit)
    old = fidelity.measure(before.backend, windows, label=f"{name}, before").metrics()
    moved = fidelity.measure(after.backend, windows, before.backend, shared=shared, label=f"{name}, after")
    new = moved.metrics()
    worst_kl, ids = max((window.worst for window in moved.windows), key=lambda worst: worst[0])
    return {"domain": name, "tokens": new["tokens"], "kl": new["kl"], "kl_interval": new["kl_interval"],
            "top1_agreement": new["top1_agreement"], "perplexity_before": old["perplexity"],
            "perplexity_after": new["perplexity"], "worst_kl": worst_kl, "worst_after": after.tokenizer.decode(ids)}


def instructing(model: LanguageModel) -> Task:
    """How the model is asked for a reply: through its template, where it has one."""
    return Task(name="instruct", example="{prompt}" if model.chat else "{prompt}\n", chat=model.chat is not None)


def _ids(model: LanguageModel, fields: dict) -> np.ndarray:
    return instructing(model).prompt(fields, model.tokenizer, model.chat)


def prompts(examples: list[Example], before: LanguageModel, after: LanguageModel) -> list[dict]:
    """Mean ln p of a token of each file's own reply, before and after; largest loss first."""
    rows = []
    for example in progress(examples, label="replies", unit="prompt"):
        asked = _ids(before, example.fields)
        tail = instructing(before).tail(example.fields, example.answers[0], before.tokenizer, before.chat)[:before.context // 2]
        if not len(tail) or len(asked) + len(tail) >= min(before.context, after.context):
            continue
        old, new = (m.score_tails(asked, [tail])[0][0] / len(tail) for m in (before, after))
        rows.append({"prompt": example.fields["prompt"], "before": old, "after": new, "loss": old - new})
    return sorted(rows, key=lambda r: -r["loss"])


def habits(examples: list[Example], before: LanguageModel, after: LanguageModel, new_tokens: int) -> list[dict]:
    """Rates of refusing, repeating and valid JSON, before and after, over the same prompts."""
    asked = [e.fields for e in examples if len(_ids(before, e.fields)) + new_tokens < min(before.context, after.context)]
    rows = []
    for records, kinds in ((asked, {"refuses": behaviour.refuses, "repeats itself": behaviour.repeats}),
                            ([{"prompt": prompt} for prompt in behaviour.JSON_PROMPTS], {"valid JSON when asked": behaviour.valid_json})):
        old, new = (model.generate([_ids(model, fields) for fields in records], new_tokens, label=label)
                    for model, label in ((before, "before"), (after, "after")))
        for name, judge in kinds.items():
            was, now = ([judge(reply.text) for reply in replies] for replies in (old, new))
            rows.append({"habit": name, "prompts": len(was), "before": float(np.mean(was)), "after": float(np.mean(now)),
                         "changed": int(np.sum(np.array(was) != np.array(now)))})
    return rows


def answers(examples: list[Example], before: LanguageModel, after: LanguageModel, options: Options) -> dict:
    """Accuracy before and after, and the examples that flipped."""
    task = open_task("classify", TaskOptions(), examples, options.before)
    solved, rest = split_shots(examples, 0 if task.shots else SHOTS["classify"], options.limit, options.seed)
    task = task if task.shots else with_shots(task, solved)
    flips, right = [], np.zeros(2)
    for example in progress(rest, label="answers", unit="example"):
        old, new = (model.answer(task, example.fields) for model in (before, after))
        right += [old == example.answers[0], new == example.answers[0]]
        if old != new:
            flips.append({"example": example.fields["text"], "right": example.answers[0], "before": old, "after": new})
    return {"examples": len(rest), "accuracy_before": right[0] / len(rest), "accuracy_after": right[1] / len(rest),
            "flipped": len(flips), "flips": flips}
