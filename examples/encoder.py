"""An encoder learns to tell sentiment, similarity and entities, shrinks to int8 and to half its layers, and runs without PyTorch.

    python -m models.get all-minilm-l6-v2 -o build/minilm
    python -m examples.encoder --model build/minilm -o build/example-encoder

Of each task: fine-tuned in full; a student with every other layer, distilled from that; both in 8 bits. Told are the score on texts
that were not learned from, with its 95% interval, the size, and the time, of checkpoints in PyTorch and of bundles in one interleaved
run; then what the smallest bundle answers from Python.

Docs: docs/example-encoder.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from examples.story import Story
from models.judging.page import Section
from runtime.benching.statistics import estimate, ratio
from runtime.cli import Checked, arg, run
from runtime.errors import UserError

DATA = Path("../shared/data")
PYTORCH = "fp32, PyTorch"


@dataclass(frozen=True)
class Recipe:
    """What worked for MiniLM: the words that models.finetune and compress.distill get."""
    title: str
    metric: str
    tuning: tuple
    distilling: tuple


RECIPES = {
    "classify": Recipe("Sentiment", "accuracy", ("--learning-rate", 1e-4, "--epochs", 2, "--batch", 32),
                       ("--hidden-weight", 1, "--learning-rate", 2e-4, "--steps", 1500, "--batch", 32)),
    "similarity": Recipe("Similarity", "spearman", ("--learning-rate", 5e-5, "--epochs", 1, "--batch", 32),
                         ("--hidden-weight", 1, "--learning-rate", 3e-4, "--steps", 300, "--batch", 32)),
    "ner": Recipe("Entities", "entity_f1", ("--learning-rate", 2e-4, "--epochs", 4, "--batch", 16),
                  ("--hidden-weight", 1, "--learning-rate", 3e-4, "--steps", 500, "--batch", 16)),
}


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Fine-tune an encoder on three tasks, distill, quantize, export: score, size and time of each step."""
    model: Path = arg(Path("build/minilm"), help="checkpoint of an encoder")
    classify: tuple[Path, ...] = arg((DATA / "classify/sst2-train.tsv", DATA / "classify/sst2-dev.tsv"), help="two files, to learn from and to "
                                     "judge on: texts with labels")
    similarity: tuple[Path, ...] = arg((DATA / "similarity/stsb-en-train.csv", DATA / "similarity/stsb-en-dev.csv"), help="the same: pairs of "
                                       "texts with a score")
    ner: tuple[Path, ...] = arg((DATA / "ner/wnut17-train.conll", DATA / "ner/wnut17-dev.conll"), help="the same: CoNLL")
    tasks: tuple[str, ...] = arg(tuple(RECIPES), help=f"of {', '.join(RECIPES)}")
    out: Path = arg(Path("build/example-encoder"), short="-o", help="folder for everything that is made; what is there is not made again")
    steps: int | None = arg(None, help="updates of the weights of every training, in place of the recipes' own", least=1)
    layers: int = arg(3, help="of the student", least=1)
    tokens: int = arg(64, help="of the longest text where time is measured; the shortest has an eighth", least=8)
    rounds: int = arg(5, help="in which time is measured", least=1)


def main(argv=None) -> int:
    return run(Options, tell, argv)


def tell(options: Options) -> None:
    if unknown := next((task for task in options.tasks if task not in RECIPES), None):
        raise UserError(f"--tasks {unknown}: unknown; give some of {', '.join(RECIPES)}")
    for task in options.tasks:
        files = getattr(options, task)
        if len(files) != 2 or not all(file.is_file() for file in files):
            raise UserError(f"--{task} {' '.join(map(str, files))}: give two files, one to learn from and one to judge on")
    story, rows, plots = Story("One encoder, three tasks", options.out), [], []
    for task in options.tasks:
        its_rows, its_plots = one_task(story, task, options)
        rows += its_rows
        plots += its_plots
    story.tell("Score, size, time", "Of texts that were not learned from: accuracy, Spearman's correlation, F1 of entities. Points lost are "
               "hundredths of that, against the fine-tuned checkpoint. Milliseconds are the median of one text alone, texts a second of many "
               f"together, of {options.tokens // 8} to {options.tokens} tokens.", rows)
    story.sections += plots
    ask(story, options)
    story.finish()


def one_task(story: Story, task: str, options: Options) -> tuple[list[dict], list[Section]]:
    """Fine-tune, distill, export, judge, measure. Returns the rows of the table, and the plots."""
    recipe, (learn, judge) = RECIPES[task], getattr(options, task)
    steps = () if options.steps is None else ("--steps", options.steps)
    tuned, student = story.path(f"{task}-run/last"), story.path(f"{task}-student-run/last")
    once = "--eval-every", 10**6                                          # saved at the end alone: what is there is whole
    story.run("models.finetune", options.model, "--task", task, "--data", learn, "--valid", judge, "--method", "full", *recipe.tuning, *steps,
              *once, "-o", tuned.parent, makes=tuned / "config.json")
    story.run("compress.distill", "--teacher", tuned, "--layers", options.layers, "--data", learn, *recipe.distilling, *steps, *once, "-o",
              student.parent, makes=student / "config.json")
    models = {PYTORCH: tuned, "fp32": story.path(task), "int8": story.path(f"{task}-int8"),
              f"{options.layers} layers, {PYTORCH}": student, f"{options.layers} layers, int8": story.path(f"{task}-student-int8")}
    story.run("export.onnx", tuned, "-o", models["fp32"], makes=models["fp32"] / "manifest.json")
    for checkpoint, bundle in ((tuned, models["int8"]), (student, models[f"{options.layers} layers, int8"])):
        codes = story.path(f"{bundle.name}-checkpoint")
        story.run("compress.quantize", checkpoint, "-o", codes, "--bits", 8, "--group", 0, makes=codes / "config.json")
        story.run("export.onnx", codes, "-o", bundle, makes=bundle / "manifest.json")
    found = {name: story.figures(f"{task}-{number}", model, "--task", task, "--data", judge)
             for number, (name, model) in enumerate(models.items())}
    timed = speeds(story, task, models, options)
    rows = []
    for (name, model), (figures, rates) in zip(models.items(), timed):
        score = found[name][recipe.metric]
        lost = found[PYTORCH][recipe.metric] - score
        teacher = {3: 0, 4: 2}.get(len(rows), len(rows))                  # the same with all layers
        rows.append({"task": recipe.title, "model": name, "score": f"{score:.4f}", "lost, points": f"{100 * lost:.1f}",
                     "MB": f"{size_bytes(model) / 1e6:.1f}", "ms a text": f"{figures['ms_p50']:.2f}", "texts/s": f"{figures['sentences_per_s']:.0f}",
                     "times PyTorch": f"{ratio(rates, timed[0][1]).median:.2f}", "times all layers": f"{ratio(rates, timed[teacher][1]).median:.2f}"})
    short = [{"model": row["model"], "score": row["score"]} for row in rows]
    fast = [{"model": row["model"], "texts/s": row["texts/s"]} for row in rows]
    return rows, [
        Section(f"{recipe.title}: {recipe.metric}", f"On the texts of {judge.name}; the line is the 95% interval over them.", short,
                [(found[name][recipe.metric], *found[name][f"{recipe.metric}_interval"]) for name in models]),
        Section(f"{recipe.title}: texts a second", "Many together; the line is the 95% interval of the median over the rounds.", fast,
                [tuple(estimate(rates)) for _, rates in timed])]


def speeds(story: Story, task: str, models: dict[str, Path], options: Options) -> list[tuple[dict, list[float]]]:
    """Of each model the medians, and the texts a second of each round, all measured in one run."""
    file = story.path(f"{task}-speed.json")
    story.run("models.encoder_bench", *models.values(), "--prompt-tokens", options.tokens, "--repeat", options.rounds, "--json", file, makes=file)
    systems = json.loads(file.read_text("utf-8"))["systems"].values()
    return [(one["figures"], one["samples"]["sentences_per_s"]) for one in systems]


def size_bytes(folder: Path) -> int:
    """What one ships: a bundle's files, or a checkpoint's weights and tokenizer."""
    names = ("*.safetensors", "tokenizer.json", "config.json") if (folder / "config.json").is_file() else ("*",)
    return sum(file.stat().st_size for name in names for file in folder.glob(name))


def ask(story: Story, options: Options) -> None:
    from runtime import Encoder
    rows = []
    for task in options.tasks:
        with Encoder(story.path(f"{task}-student-int8")) as encoder:
            if task == "classify":
                text = "a warm , funny and quietly moving film"
                label, = encoder.classify([text])
                rows.append({"asked": f"classify: {text}", "answer": f"{label.label} ({label.score:.2f})"})
            elif task == "similarity":
                pair = "A man is playing a guitar.", "Someone plays an instrument."
                rows.append({"asked": "similarity: " + " / ".join(pair), "answer": f"{encoder.similarity([pair[0]], [pair[1]])[0]:.2f}"})
            else:
                text = "Ada Lovelace flew from London to New York with Delta last night"
                told = ", ".join(f"{one.text} = {one.label}" for one in encoder.entities([text])[0])
                rows.append({"asked": f"entities: {text}", "answer": told or "none"})
    story.tell("Asked from Python", f"The student of {options.layers} layers in 8 bits, through runtime.Encoder.", rows)


if __name__ == "__main__":
    raise SystemExit(main())
