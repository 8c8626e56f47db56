"""Run tasks of the lm-evaluation-harness on a checkpoint or a bundle.

    python -m models.lm_eval_adapter BUNDLE --tasks my_task --include-path tasks/ --limit 100 --json out.json

`EdgewrightLM` gives the harness its three requests (log likelihood of a continuation, of a whole text, greedy
generation) on top of `LanguageModel`, tokenizing as the harness's own Hugging Face model does, so that equal weights
give equal scores. Tasks that are not in a local folder are fetched by the harness, which needs a network.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.device import DeviceOptions
from models.progress import progress
from runtime.cli import arg, run, table
from runtime.errors import UserError


@dataclass(frozen=True)
class Options(DeviceOptions):
    """Run lm-evaluation-harness tasks on a checkpoint or a bundle."""
    model: Path = arg(positional=True, help="checkpoint or bundle folder")
    tasks: tuple[str, ...] = arg(help="names of tasks")
    include_path: Path | None = arg(None, help="folder of task files of your own (YAML), for use without a network")
    shots: int | None = arg(None, help="solved examples in each prompt (default: the task's)", least=0)
    limit: int | None = arg(None, help="examples a task, at most", least=1)
    json: Path | None = arg(None, help="write the results to this file")
    graph: str | None = arg(None, help="which graph of a bundle", choices=("portable", "fast"))
    threads: int | None = arg(None, help="CPU threads (default: those available)", least=1)


def main(argv=None) -> int:
    return run(Options, "evaluate", argv)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from models.evaluate import write_json
from models.judging.language_model import LanguageModel, judging_on

MAX_NEW_TOKENS = 256          # where a task does not say, as in the harness


class EdgewrightLM(TemplateLM):
    """A `LanguageModel` as the harness sees it."""

    def __init__(self, model: LanguageModel, *, progress: bool = True):
        super().__init__()
        self.model, self.progress = model, progress

    @property
    def eot_token_id(self) -> int:
        if (named := self.model.special_id("eos_token")) is not None:
            return named
        if not self.model.eos:
            raise UserError(f"{self.model.folder}: names no end-of-text token, which the harness needs")
        return min(self.model.eos)

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has nothing before it: BOS where the model has one."""
        bos = self.model.special_id("bos_token")
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.model.tokenizer.encode(string, special_tokens=add_special_tokens is not False).tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        results = []
        for _, context, continuation in progress(requests, label="scoring", unit="request", quiet=disable_tqdm or not self.progress):
            if len(continuation) >= self.max_length:
                raise UserError(f"a continuation has {len(continuation)} tokens; the context is {self.max_length}")
            context = np.array(context[-(self.max_length - len(continuation)):], np.int64)
            results += self.model.score_tails(context, [np.array(continuation, np.int64)])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            windows = map(make_disjoint_window, get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length - 1, context_len=1))
            totals.append(sum(score for score, _ in self._loglikelihood_tokens([(None, *w) for w in windows], True)))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy only. Requests with the same stop strings and length are decoded together."""
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") and options.get("temperature", 1):
                raise UserError("the task samples; this adapter generates greedily (set do_sample: false)")
            until = options.get("until") or ()
            until = (until,) if isinstance(until, str) else tuple(until)
            groups.setdefault((until, options.get("max_gen_toks", MAX_NEW_TOKENS)), []).append(number)
        replies = [""] * len(requests)
        for (until, limit), numbers in groups.items():
            found = self.model.generate([requests[n].args[0] for n in numbers], limit, until,
                                        progress=self.progress and not disable_tqdm)
            for number, reply in zip(numbers, found):
                replies[number] = reply.text
        return replies


def evaluate(options: Options) -> None:
    if options.include_path and not options.include_path.is_dir():
        raise UserError(f"{options.include_path}: is not a folder of task files")
    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    unknown = [t for t in options.tasks if t not in manager.all_tasks]
    if unknown:
        raise UserError(f"there is no task {unknown[0]!r} in the harness or in {options.include_path or 'a folder of yours (--include-path)'}")
    try:
        with judging_on(options.device, options.model) as opened:
            model = EdgewrightLM(opened(options.model, threads=options.threads, graph=options.graph))
            results = simple_evaluate(model, tasks=list(options.tasks), task_manager=manager, num_fewshot=options.shots,
                                      limit=options.limit)["results"]
    except ConnectionError as error:              # datasets' and huggingface_hub's, where a task's data is on the hub
        raise UserError(f"the data of {', '.join(options.tasks)} cannot be reached ({str(error).splitlines()[0]}); connect, or give a "
                        "task of your own whose data is a file (--include-path)") from None
    rows = [{"task": task, "metric": name.split(",")[0], "value": f"{value:.4f}",
             "standard error": f"{scores[stderr]:.4f}" if isinstance(scores.get(stderr := name.replace(',', '_stderr,', 1)), float) else ""}
            for task, scores in results.items() for name, value in scores.items()
            if isinstance(value, float) and "_stderr" not in name]
    print(table(rows, title=options.model.name))
    if options.json:
        write_json(options.json, {task: {k: v for k, v in scores.items() if isinstance(v, (int, float, str))}
                                  for task, scores in results.items()})
