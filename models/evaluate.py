"""Judge a checkpoint (in PyTorch) or a bundle (through the runtime) by the same lines of code.

    python -m models.evaluate CKPT --task perplexity --data wiki.txt speeches.txt --reference ORIGINAL
    python -m models.evaluate BUNDLE --task kl --reference CACHE
    python -m models.evaluate BUNDLE --task qa --data xquad-en.json --limit 100 --examples answers.jsonl

`perplexity` reports perplexity and bits per byte and, with a reference, its KL divergence and top-1 agreement, for each
text apart and pooled (models/judging/fidelity.py), chats through the model's template (texts.py); `kl` is the same pass and insists
on the reference. That is a
checkpoint, a bundle, or a cache of compress.teacher, whose own text is then the one measured on. The other tasks, their files
and prompts are in models/tasks/defaults.py; a model that was fine-tuned on one is asked as it was trained. Answers are greedy
unless sampling is asked for, and several to an example with --n. Every number has its 95% bootstrap interval beside it, but for the
variety of all answers together. Encoders are judged by models/encoders/evaluate.py.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.progress import progress
from models.device import DeviceOptions
from models.tasks.defaults import DECODER_TASKS
from models.tasks.defaults import TASKS as ALL_TASKS
from models.tasks.options import TaskOptions, default_shots, examples_of, open_task, own_task, with_shots
from runtime.backends import PROVIDERS
from runtime.cli import arg, run, table
from runtime.errors import UserError
from runtime.files import write
from runtime.sampling import SamplingOptions

LIKELIHOOD = ("perplexity", "kl")
TASKS = (*LIKELIHOOD, *ALL_TASKS)
EXAMPLES = """tasks and their files:
  perplexity   UTF-8 text, or JSON, JSONL and tables with texts or chats; with --reference also kl and top1_agreement
  kl           the same, --reference needed; without --data where that is a cache of compress.teacher
  qa           SQuAD JSON                     summarize  text, summary               translate  source TAB target
  classify     sentence TAB label             pair       two texts and a label       regress    two texts and a number
  ner          CoNLL: token TAB BIO tag       instruct   Alpaca, prompt completion   chat       messages, ShareGPT, Alpaca
  continue     texts, whose first half is shown
Records may be JSON, JSONL, TSV or CSV, with or without a header, CoNLL, or hf:NAME@SPLIT.

examples:
  python -m models.evaluate build/smollm2-135m-int4 --task perplexity --data wiki.txt --reference build/smollm2-135m
  python -m models.evaluate build/smollm2-135m --task classify --data sst2-dev.tsv --shots 4 --limit 200
  python -m models.evaluate build/smollm2-135m --task qa --data xquad-en.json --chat --show-prompt
  python -m models.evaluate build/smollm2-135m --task summarize --data descriptions.jsonl --n 4 --temperature 0.8 --top-p 0.95
"""


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions, DeviceOptions):
    """Measure a model: perplexity and fidelity to a reference, or a task with right answers."""
    model: Path = arg(positional=True, help="checkpoint or bundle folder")
    data: tuple[str, ...] = arg((), help="files to measure on; of tasks with right answers also folders, globs and hf:NAME@SPLIT")
    task: str = arg("perplexity", help="what to measure", choices=TASKS)
    reference: Path | None = arg(None, help="checkpoint, bundle or teacher's cache whose predictions the model's are held against")
    json: Path | None = arg(None, help="write the metrics to this file")
    window: int | None = arg(None, help="perplexity: tokens a window (default: 512, or the cache's)",
                             least=2, group="perplexity and kl")
    stride: int | None = arg(None, least=1, group="perplexity and kl", help="perplexity: tokens between windows (default: half a window); "
                             "ner with an encoder: tokens that windows over a long text share")
    max_windows: int | None = arg(None, help="perplexity: windows a text, at most", least=1, group="perplexity and kl")
    show_prompt: bool = arg(False, help="print the first prompt and stop", group="the task")
    limit: int | None = arg(None, help="solve this many examples at most, drawn by seed", least=1, group="the task")
    seed: int = arg(0, help="draws the shots and the examples, and what is sampled", least=0, most=2**63 - 1, group="the task")
    examples: Path | None = arg(None, help="write each example with its answers and scores to this JSONL file", group="the task")
    n: int = arg(1, help="answers to each example", least=1, most=64, group="sampling")
    temperature: float = arg(0.0, help="0: the likeliest token", least=0, group="sampling")
    top_k: int = arg(0, help="choose among this many tokens; 0: all", least=0, group="sampling")
    top_p: float = arg(1.0, help="choose among the likeliest tokens with this much probability", above=0, most=1, group="sampling")
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
        if self.n > 1 and not self.temperature:
            raise UserError(f"--n {self.n}: without --temperature all answers to an example are the same one")
        if self.task == "kl" and not self.reference:
            raise UserError("task kl needs --reference: a checkpoint, a bundle or a cache of compress.teacher")


def main(argv=None) -> int:
    return run(Options, "evaluate", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())


from models.encoders.evaluate import evaluate_encoder, is_any_encoder
from models.judging import fidelity, texts
from models.tasks.examples import Example, split_shots
from models.tasks.scoring import Solved, score
from runtime.task import Task
from models.judging.language_model import LanguageModel, check_same_tokenizer, judging_on
from models.formats.teacher_cache import TeacherCache, is_cache, open_cache, tokenizer_digest


def evaluate(options: Options) -> None:
    likelihood, cached = options.task in LIKELIHOOD, bool(options.reference) and is_cache(options.reference)
    if cached and options.data:
        raise UserError(f"{options.reference}: is a teacher's cache, which brings its own text; leave --data out")
    if not (cached or options.data):
        raise UserError("give the files to measure on with --data")
    if is_any_encoder(options.model):
        result = {"model": options.model.name, "task": options.task, **evaluate_encoder(options)}
        print(report(result))
        if result["truncated"]:
            print(f"{result['truncated']} texts were longer than the model's positions, and were cut there")
        if options.json:
            write_json(options.json, result)
        return
    if options.task not in (*LIKELIHOOD, *DECODER_TASKS):
        raise UserError(f"--task {options.task}: compares the embeddings of an encoder, which {options.model} is not; a decoder has --task regress")
    task, examples = (None, []) if likelihood else _asked(options)
    if options.show_prompt and task and not task.chat:
        print(task.text(examples[0].fields))
        return
    cache = open_cache(options.reference) if cached else None
    with judging_on(options.device, options.model, *([options.reference] if options.reference else [])) as opened:
        model = opened(options.model, threads=options.threads, graph=options.graph, exact=options.exact, provider=options.provider)
        if options.show_prompt and task:
            print(model.tokenizer.decode(task.prompt(examples[0].fields, model.tokenizer, model.chat), control_tokens=True))
            return
        if cache:
            result = on_cache(options, model, cache)
        else:
            windows = cut_texts(options, model) if likelihood else {}               # all are read before the first is measured
            reference = opened(options.reference, threads=options.threads) if options.reference else None
            result = perplexity(model, reference, windows) if likelihood else labelled(options, model, task, examples)
    result = {"model": options.model.name, "task": options.task, "backend": model.backend.name, **result}
    print(report(result))
    if options.json:
        write_json(options.json, result)


def cut_texts(options: Options, model: LanguageModel) -> dict[str, list[fidelity.Window]]:
    """The windows of each file, by its name (its path, where two have one name). Raises UserError for a file that cannot be used."""
    window = min(options.window or 512, model.context)
    stride = window // 2 if options.stride is None else options.stride
    enough = None if options.max_windows is None else window + stride * options.max_windows
    files = [Path(file) for file in options.data]
    names, found = Counter(file.name for file in files), {}
    for file in files:
        text = texts.read(file, model.tokenizer, lambda: model.chat, enough)
        found[file.name if names[file.name] == 1 else str(file)] = fidelity.cut_windows(text, window, stride, options.max_windows)
    return found


def perplexity(model: LanguageModel, reference: LanguageModel | None, windows: dict[str, list[fidelity.Window]]) -> dict:
    """Pooled metrics, and those of each text under "texts"."""
    shared = reference and check_same_tokenizer(model, reference)
    parts = {name: fidelity.measure(model.backend, cut, reference and reference.backend, shared=shared, label=name)
             for name, cut in windows.items()}
    pooled = fidelity.Fidelity([window for part in parts.values() for window in part.windows])
    return {**pooled.metrics(), "texts": {name: part.metrics() for name, part in parts.items()}}


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


def _asked(options: Options) -> tuple[Task, list[Example]]:
    """The task and the examples to solve. Raises UserError, before a model is opened."""
    if not options.model.is_dir():
        raise UserError(f"{options.model} does not exist; give the folder of a checkpoint or bundle")
    examples = examples_of(options, options.data)
    task = open_task(options.task, options, examples, options.model)
    brought = options.shots is None and (task.shots or own_task(options.task, options.model))      # what was learned with none is asked with none
    shots = 0 if brought else default_shots(task) if options.shots is None else options.shots
    solved, rest = split_shots(examples, shots, options.limit, options.seed)
    return task if brought else with_shots(task, solved), rest


def labelled(options: Options, model: LanguageModel, task: Task, examples: list[Example]) -> dict:
    """Metrics of a task with right answers."""
    prompts = [task.prompt(example.fields, model.tokenizer, model.chat) for example in examples]
    if task.answer != "text":
        if options.temperature:
            raise UserError(f"--temperature {options.temperature}: task {task.name} writes nothing, its answers are chosen; leave it out")
        answers = [[model.answer(task, example.fields)] for example in progress(examples, label=task.name, unit="example")]
    else:
        sampling = SamplingOptions(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
        replies = model.generate([ids for ids in prompts for _ in range(options.n)], task.max_new_tokens, task.stops, sampling=sampling,
                                 label=task.name)
        texts = [_answer(model, task, reply, prompts[number // options.n]) for number, reply in enumerate(replies)]
        answers = [texts[first:first + options.n] for first in range(0, len(texts), options.n)]
    likely = [(0.0, 0)] * len(examples)
    if "perplexity" in task.metrics:
        likely = [_likelihood(model, task, *one) for one in progress(list(zip(examples, prompts)), label="right answers", unit="example")]
    solved = [Solved(found, example.answers, nll) for found, example, nll in zip(answers, examples, likely)]
    result, scores = score(task, solved)
    if options.examples:
        rows = [{"fields": example.fields, "references": list(example.answers), "answer": found[0], **({"answers": found} if options.n > 1 else {}),
                 **row} for example, found, row in zip(examples, answers, scores)]
        write(options.examples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return result


def _answer(model: LanguageModel, task: Task, reply, prompt: np.ndarray) -> str:
    """What a reply says, without a thought before it."""
    thoughts = model.chat.thoughts if task.chat and model.chat else None
    text = thoughts.split(model.tokenizer, prompt, reply.tokens, reply.text)[1] if thoughts else reply.text
    return text.strip()


def _likelihood(model: LanguageModel, task: Task, example: Example, prompt: np.ndarray) -> tuple[float, int]:
    """-ln p of the first right answer, and its tokens, as far as the context goes."""
    tail = task.tail(example.fields, example.answers[0], model.tokenizer, model.chat)[:max(1, model.context - len(prompt))]
    return -model.score_tails(prompt, [tail])[0][0], len(tail)


def report(result: dict) -> str:
    """The metrics as a table, a row a text where there are several."""
    def shown(part: dict) -> dict[str, str]:
        return {name: "{:.4f} [{:.4f}, {:.4f}]".format(value, *part[f"{name}_interval"]).replace(" [nan, nan]", "")
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
