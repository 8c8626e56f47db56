"""Judge a checkpoint (in PyTorch) or a bundle (through the runtime) by the same lines of code.

    python -m models.evaluate CKPT --task perplexity --data wiki.txt speeches.txt --reference ORIGINAL
    python -m models.evaluate BUNDLE --task kl --reference CACHE
    python -m models.evaluate BUNDLE --task qa --data xquad-en.json --limit 100 --examples answers.jsonl

`perplexity` reports perplexity and bits per byte and, with a reference, its KL divergence and top-1 agreement, for each
text apart and pooled (models/judging/fidelity.py); `kl` is the same pass and insists on the reference. That is a
checkpoint, a bundle, or a cache of compress.teacher, whose own text is then the one measured on. The labelled tasks and
their files are in models/judging/tasks.py; every number has its 95% bootstrap interval beside it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.progress import progress
from models.data.tables import HEADERS
from models.judging import metrics, tasks
from runtime.backends import PROVIDERS
from runtime.cli import Checked, arg, run, table
from runtime.errors import UserError
from runtime.files import write

LIKELIHOOD = ("perplexity", "kl")
TASKS = (*LIKELIHOOD, *tasks.PROMPTS)
EXAMPLES = """tasks and their files:
  perplexity   plain UTF-8 text; with --reference also kl and top1_agreement
  kl           the same, --reference needed; without --data where that is a cache of compress.teacher
  qa           SQuAD JSON                     summarize  JSONL with text, summary
  translate    TSV: source TAB target         generate   Alpaca JSON or JSONL with instruction, output
  classify     TSV: sentence TAB label

examples:
  python -m models.evaluate build/smollm2-135m-int4 --task perplexity --data wiki.txt --reference build/smollm2-135m
  python -m models.evaluate build/smollm2-135m --task classify --data sst2-dev.tsv --shots 4 --limit 200
  python -m models.evaluate build/smollm2-135m --task qa --data xquad-en.json --show-prompt
"""


@dataclass(frozen=True)
class Options(Checked):
    """Measure a model: perplexity and fidelity to a reference, or a labelled task."""
    model: Path = arg(positional=True, help="checkpoint or bundle folder")
    data: tuple[Path, ...] = arg((), help="files to measure on")
    task: str = arg("perplexity", help="what to measure", choices=TASKS)
    reference: Path | None = arg(None, help="checkpoint, bundle or teacher's cache whose predictions the model's are held against")
    json: Path | None = arg(None, help="write the metrics to this file")
    window: int | None = arg(None, help="perplexity: tokens a window (default: 512, or the cache's)",
                             least=2, group="perplexity and kl")
    stride: int | None = arg(None, help="perplexity: tokens between windows (default: half a window)",
                             least=1, group="perplexity and kl")
    max_windows: int | None = arg(None, help="perplexity: windows a text, at most", least=1, group="perplexity and kl")
    shots: int | None = arg(None, help="solved examples in each prompt (default: the task's)", least=0, group="labelled tasks")
    prompt: Path | None = arg(None, help="TOML file that changes the task's prompt (see models/judging/tasks.py)", group="labelled tasks")
    show_prompt: bool = arg(False, help="print the first prompt and stop", group="labelled tasks")
    limit: int | None = arg(None, help="solve this many examples at most, drawn by seed", least=1, group="labelled tasks")
    header: str = arg("auto", help="whether the first row of CSV and TSV files names the columns", choices=HEADERS)
    seed: int = arg(0, help="draws the shots and the examples", least=0, most=2**63 - 1, group="labelled tasks")
    examples: Path | None = arg(None, help="write each example with its answer and scores to this JSONL file",
                                group="labelled tasks")
    provider: str | None = arg(None, help="bundle: the engine that runs it (default: the best here)", choices=PROVIDERS,
                               group="bundles")
    graph: str | None = arg(None, help="bundle: this graph of it, on ONNX Runtime's CPU", choices=("portable", "fast"),
                            group="bundles")
    exact: bool = arg(False, help="bundle: on ONNX Runtime without int8 kernels, PyTorch's numbers up to rounding", group="bundles")
    threads: int | None = arg(None, help="CPU threads (default: those available)", least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.reference and self.task not in LIKELIHOOD:
            raise UserError(f"--reference belongs to the tasks {' and '.join(LIKELIHOOD)}, not to {self.task}")
        if self.task == "kl" and not self.reference:
            raise UserError("task kl needs --reference: a checkpoint, a bundle or a cache of compress.teacher")


def main(argv=None) -> int:
    return run(Options, "evaluate", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())


from models.judging import fidelity
from models.judging.language_model import LanguageModel, check_same_tokenizer, open_model
from models.formats.teacher_cache import TeacherCache, is_cache, open_cache, tokenizer_digest


def evaluate(options: Options) -> None:
    likelihood, cached = options.task in LIKELIHOOD, bool(options.reference) and is_cache(options.reference)
    if cached and options.data:
        raise UserError(f"{options.reference}: is a teacher's cache, which brings its own text; leave --data out")
    if not (cached or options.data):
        raise UserError("give the files to measure on with --data")
    texts = [(file, tasks.read_text(file)) for file in options.data] if likelihood else []
    if options.show_prompt and not likelihood:
        print(_prompts(options)[2][0])
        return
    cache = open_cache(options.reference) if cached else None
    model = open_model(options.model, threads=options.threads, graph=options.graph, exact=options.exact,
                       provider=options.provider)
    if cache:
        result = on_cache(options, model, cache)
    else:
        result = perplexity(options, model, texts) if likelihood else labelled(options, model)
    result = {"model": options.model.name, "task": options.task, "backend": model.backend.name, **result}
    print(report(result))
    if options.json:
        write_json(options.json, result)


def perplexity(options: Options, model: LanguageModel, texts: list[tuple[Path, str]]) -> dict:
    """Pooled metrics, and those of each text under "texts"."""
    reference = shared = None
    if options.reference:
        reference = open_model(options.reference, threads=options.threads)
        shared = check_same_tokenizer(model, reference)
    window = min(options.window or 512, model.context)
    stride = window // 2 if options.stride is None else options.stride
    parts = []
    for file, text in texts:
        windows = fidelity.cut_windows(model.tokenizer, text, window, stride, options.max_windows)
        part = fidelity.measure(model.backend, windows, reference and reference.backend, shared=shared, label=file.name)
        parts.append((file.name, part))
    pooled = fidelity.Fidelity([window for _, part in parts for window in part.windows])
    return {**pooled.metrics(), "texts": {name: part.metrics() for name, part in parts}}


def on_cache(options: Options, model: LanguageModel, cache: TeacherCache) -> dict:
    """The metrics of `perplexity` over a teacher's cache, its text and its predictions."""
    length, state = cache.ids.shape[1], cache.state
    if state["tokenizer"] != tokenizer_digest(model.folder):
        raise UserError(f"{cache.folder}: has another tokenizer than {model.folder}; a reference must share the vocabulary")
    if options.window not in (None, length):
        raise UserError(f"--window is {options.window}, but {cache.folder} has windows of {length} tokens; leave it out")
    if length > model.context:
        raise UserError(f"{cache.folder}: has windows of {length} tokens, more than the context of {model.context}")
    stride = length // 2 if options.stride is None else options.stride
    windows = fidelity.cached_windows(cache, model.tokenizer, stride, options.max_windows)
    print(f"on the text of {cache.folder}, against the top {state['k']} tokens that {state['teacher']} expected there")
    return fidelity.measure(model.backend, windows, cache, label=cache.folder.name).metrics()


def _prompts(options: Options) -> tuple[tasks.Prompt, list[tasks.Example], list[str], list[str]]:
    """How to ask, the examples to solve, the text of each, and every answer that the files have, sorted."""
    prompt = tasks.load_prompt(options.task, options.prompt)
    shots = prompt.shots if options.shots is None else options.shots
    examples = [e for file in options.data for e in tasks.read_examples(options.task, file, options.header)]
    solved, rest = tasks.split_shots(examples, shots, options.limit, options.seed)
    return prompt, rest, [tasks.render(prompt, solved, e) for e in rest], sorted({e.answers[0] for e in examples})


def labelled(options: Options, model: LanguageModel) -> dict:
    """Metrics of a task with right answers."""
    prompt, examples, texts, labels = _prompts(options)
    if options.task == "classify":
        unnamed = [x for x in labels if prompt.labels and x not in prompt.labels]
        if unnamed:
            raise UserError(f"label {unnamed[0]!r} has no words in the prompt; it names {', '.join(prompt.labels)}: "
                            "give its labels with --prompt")
        texts = progress(texts, label="classify", unit="example")
        answers = [model.classify(text, labels, prompt.labels) for text in texts]
    else:
        replies = model.generate(texts, prompt.max_new_tokens, prompt.stop, label=options.task)
        answers = [reply.text.strip() for reply in replies]
    result, rows = score(options.task, answers, examples)
    if options.examples:
        write(options.examples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return result


def score(task: str, answers: list[str], examples: list[tasks.Example]) -> tuple[dict, list[dict]]:
    """A task's metrics with intervals, and a row an example."""
    rights = [list(e.answers) for e in examples]
    pairs = [(answer, right[0]) for answer, right in zip(answers, rights)]
    rows = [{"fields": e.fields, "references": r, "answer": a} for e, r, a in zip(examples, rights, answers)]
    result = {"examples": len(rows)}

    def mean(name: str, values: list[float]) -> None:
        result[name], result[f"{name}_interval"] = float(np.mean(values)), list(metrics.bootstrap(values))
        for row, value in zip(rows, values):
            row[name] = value

    def corpus(name: str, function, resamples: int = 200) -> None:
        statistic = lambda some: function(*zip(*some))    # noqa: E731
        result[name] = statistic(pairs)
        result[f"{name}_interval"] = list(metrics.bootstrap(pairs, statistic, resamples=resamples))

    if task == "qa":
        mean("exact_match", [metrics.exact_match(a, r) for a, r in zip(answers, rights)])
        mean("f1", [metrics.token_f1(a, r) for a, r in zip(answers, rights)])
    if task == "classify":
        for name in ("accuracy", "precision", "recall", "f1"):
            corpus(name, lambda a, r, n=name: metrics.classification(a, r)[n], resamples=1000)
        result |= {name: metrics.classification(*zip(*pairs))[name] for name in ("labels", "confusion")}
    if task in ("qa", "summarize", "generate"):
        scores = [metrics.rouge(a, r) for a, r in zip(answers, rights)]
        for kind in ("rougeL",) if task == "qa" else ("rouge1", "rouge2", "rougeL"):
            mean(kind, [s[kind] for s in scores])
    if task in ("translate", "generate"):
        chinese = any("\u4e00" <= c <= "\u9fff" for r in rights for c in r[0])
        corpus("bleu", lambda a, r: metrics.bleu(a, r, chinese=chinese))
    if task == "translate":
        corpus("chrf", metrics.chrf)
    if task == "generate":
        mean("meteor", [metrics.meteor(*pair) for pair in pairs])
    return result, rows


def report(result: dict) -> str:
    """The metrics as a table, a row a text where there are several."""
    def shown(part: dict) -> dict[str, str]:
        return {name: "{:.4f} [{:.4f}, {:.4f}]".format(value, *part[f"{name}_interval"])
                for name, value in part.items() if f"{name}_interval" in part}
    texts, of, parts = result.get("texts", {}), "tokens" if "tokens" in result else "examples", []
    if len(texts) > 1:
        parts.append(table([{"text": name, "tokens": part["tokens"], **shown(part)} for name, part in texts.items()]))
    parts.append(table([{"metric": name, "value [95% interval]": text} for name, text in shown(result).items()],
                       title=f"{result['model']} on {result['backend']}: {result['task']}, {result[of]} {of}"))
    if "confusion" in result:
        parts.append(table([{"actual \\ predicted": label, **dict(zip(result["labels"], row))}
                            for label, row in zip(result["labels"], result["confusion"])]))
    return "\n\n".join(parts)


def write_json(file: Path, result: dict) -> None:
    """Metrics as JSON; a figure that does not exist (an interval of one window) becomes null, as JSON has no NaN."""
    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value
    write(file, json.dumps(clean(result), indent=1, ensure_ascii=False) + "\n")
