"""What a smaller model lost: hold it against the one it came from, by domain, by prompt, by answer and by habit.

    python -m models.what_got_worse build/smollm2-135m build/smollm2-135m-int4 --data wiki.txt speeches.txt zh.txt \\
        --prompts alpaca-en.json --labelled sst2-dev.tsv --html report.html

- Domains: for each text, KL(before || after), top-1 agreement, and both perplexities (models/judging/fidelity.py).
- Prompts: ln p of the file's own reply under each model; the prompts where the reply became least likely come first.
- Answers: classification examples that were right and are wrong now, and the other way round.
- Habits: refusals and repetition over greedy replies to the prompts, and valid JSON where JSON was asked for
  (models/judging/behaviour.py).

Prints tables; `--html` writes one self-contained page with plots.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.judging import behaviour, tasks
from models.progress import progress
from runtime.cli import Checked, arg, run, table
from runtime.errors import UserError
from runtime.files import write


@dataclass(frozen=True)
class Options(Checked):
    """Compare a model before and after: what got worse, where, and by how much."""
    before: Path = arg(positional=True, help="checkpoint or bundle to hold the other against")
    after: Path = arg(positional=True, help="checkpoint or bundle that was made from it")
    data: tuple[Path, ...] = arg((), help="UTF-8 texts, one a domain")
    prompts: Path | None = arg(None, help="instructions with replies: Alpaca JSON, or JSONL with instruction and output")
    labelled: Path | None = arg(None, help="TSV: sentence TAB label")
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


from models.judging import fidelity
from models.evaluate import write_json
from models.judging.language_model import LanguageModel, check_same_tokenizer, open_model


def compare(options: Options) -> int:
    texts = [(file.name, tasks.read_text(file)) for file in options.data]
    instructions = tasks.read_examples("generate", options.prompts) if options.prompts else []
    labelled = tasks.read_examples("classify", options.labelled) if options.labelled else []
    before, after = (open_model(m, threads=options.threads) for m in (options.before, options.after))
    shared = check_same_tokenizer(after, before)

    result = {"before": options.before.name, "after": options.after.name}
    if texts:
        result["domains"] = [domain(name, text, before, after, options.windows, shared) for name, text in texts]
    if instructions:
        _, chosen = tasks.split_shots(instructions, 0, options.limit, options.seed)
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
    return 0


def domain(name: str, text: str, before: LanguageModel, after: LanguageModel, limit: int, shared: int | None) -> dict:
    size = min(512, before.context, after.context)
    windows = fidelity.cut_windows(after.tokenizer, text, size, size // 2, limit)
    old = fidelity.measure(before.backend, windows, label=f"{name}, before").metrics()
    moved = fidelity.measure(after.backend, windows, before.backend, shared=shared, label=f"{name}, after")
    new = moved.metrics()
    worst_kl, ids = max(moved.worst, key=lambda w: w[0])
    return {"domain": name, "tokens": new["tokens"], "kl": new["kl"], "kl_interval": new["kl_interval"],
            "top1_agreement": new["top1_agreement"], "perplexity_before": old["perplexity"],
            "perplexity_after": new["perplexity"], "worst_kl": worst_kl, "worst_after": after.tokenizer.decode(ids)}


def _asked(example: tasks.Example) -> str:
    return "\n".join(part for part in (example.fields["instruction"], example.fields.get("input")) if part)


def prompts(examples: list[tasks.Example], before: LanguageModel, after: LanguageModel) -> list[dict]:
    """Mean ln p of a token of each file's own reply, before and after; largest loss first."""
    rows = []
    for example in progress(examples, label="replies", unit="prompt"):
        asked = before.chat_prompt(_asked(example))
        tail = before.tokenizer.encode(example.answers[0], special_tokens=False)[:before.context // 2]
        if not len(tail) or len(asked) + len(tail) >= min(before.context, after.context):
            continue
        old, new = (m.score_tails(asked, [tail])[0][0] / len(tail) for m in (before, after))
        rows.append({"prompt": _asked(example), "before": old, "after": new, "loss": old - new})
    return sorted(rows, key=lambda r: -r["loss"])


def habits(examples: list[tasks.Example], before: LanguageModel, after: LanguageModel, new_tokens: int) -> list[dict]:
    """Rates of refusing, repeating and valid JSON, before and after, over the same prompts."""
    def replies(model, asked, label):
        return model.generate([model.chat_prompt(a) for a in asked], new_tokens, label=label)
    asked = [_asked(e) for e in examples]
    asked = [a for a in asked if len(before.chat_prompt(a)) + new_tokens < min(before.context, after.context)]
    rows = []
    for prompts_, kinds in ((asked, {"refuses": behaviour.refuses, "repeats itself": behaviour.repeats}),
                            (list(behaviour.JSON_PROMPTS), {"valid JSON when asked": behaviour.valid_json})):
        old, new = replies(before, prompts_, "before"), replies(after, prompts_, "after")
        for name, judge in kinds.items():
            was, now = [judge(r) for r in old], [judge(r) for r in new]
            rows.append({"habit": name, "prompts": len(was), "before": float(np.mean(was)), "after": float(np.mean(now)),
                         "changed": int(np.sum(np.array(was) != np.array(now)))})
    return rows


def answers(examples: list[tasks.Example], before: LanguageModel, after: LanguageModel, options: Options) -> dict:
    """Accuracy before and after, and the examples that flipped."""
    prompt = tasks.load_prompt("classify", None)
    solved, rest = tasks.split_shots(examples, prompt.shots, options.limit, options.seed)
    labels = sorted({e.answers[0] for e in examples})
    words = [" " + tasks.answer_text(prompt, label) for label in labels]
    flips, right = [], np.zeros(2)
    for example in progress(rest, label="answers", unit="example"):
        text = tasks.render(prompt, solved, example)
        old, new = (labels[int(np.argmax(m.continuation_logprobs(text, words)))] for m in (before, after))
        right += [old == example.answers[0], new == example.answers[0]]
        if old != new:
            flips.append({"example": example.fields["sentence"], "right": example.answers[0], "before": old, "after": new})
    return {"examples": len(rest), "accuracy_before": right[0] / len(rest), "accuracy_after": right[1] / len(rest),
            "flipped": len(flips), "flips": flips}


def _sections(result: dict, worst: int) -> list[tuple[str, list[dict]]]:
    """(title, rows of a table) of everything that was measured."""
    sections = []
    if "domains" in result:
        sections.append(("Domains", [{
            "domain": d["domain"], "tokens": d["tokens"], "KL (nats)": f"{d['kl']:.4f}", "same top-1": f"{d['top1_agreement']:.1%}",
            "perplexity before": f"{d['perplexity_before']:.2f}", "after": f"{d['perplexity_after']:.2f}",
            "largest KL, after": f"{d['worst_kl']:.2f} {_short(d['worst_after'][-40:], 40)}"} for d in result["domains"]]))
    if "prompts" in result:
        sections.append((f"Prompts whose replies lost most, of {len(result['prompts'])} (mean ln p a token)", [{
            "loss": f"{p['loss']:+.3f}", "before": f"{p['before']:.3f}", "after": f"{p['after']:.3f}",
            "prompt": _short(p["prompt"], 70)} for p in result["prompts"][:worst]]))
    if "habits" in result:
        sections.append(("Habits", [{"habit": h["habit"], "prompts": h["prompts"], "before": f"{h['before']:.1%}",
                                     "after": f"{h['after']:.1%}", "changed": h["changed"]} for h in result["habits"]]))
    if "answers" in result:
        a = result["answers"]
        title = (f"Answers: {a['accuracy_before']:.1%} right before, {a['accuracy_after']:.1%} after, "
                 f"{a['flipped']} of {a['examples']} flipped")
        sections.append((title, [{"right": f["right"], "before": f["before"], "after": f["after"],
                                  "example": _short(f["example"], 80)} for f in a["flips"]]))
    return sections


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length - 1] + "…"


def report(result: dict, worst: int) -> str:
    head = f"{result['before']} -> {result['after']}"
    return "\n\n".join([head] + [table(rows, title=title) for title, rows in _sections(result, worst)])


def page(result: dict, worst: int) -> str:
    """One HTML page with nothing outside it: bars for domains, a slope for every prompt, and the tables."""
    escape = html.escape
    parts = []
    if "domains" in result:
        parts.append("<h2>KL divergence by domain</h2>" + _bars(
            [(d["domain"], d["kl"], d["kl_interval"]) for d in result["domains"]]))
    if result.get("prompts"):
        parts.append("<h2>How much less likely each reply became</h2>" + _histogram([p["loss"] for p in result["prompts"]]))
    for title, rows in _sections(result, worst):
        head = "".join(f"<th>{escape(k)}</th>" for k in (rows[0] if rows else {}))
        body = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
        parts.append(f"<h2>{escape(title)}</h2>" + (f"<table><tr>{head}</tr>{body}</table>" if rows else "<p>None.</p>"))
    title = f"{escape(result['before'])} → {escape(result['after'])}"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }}
h1 {{ font-size: 1.4em; }} h2 {{ font-size: 1.1em; margin-top: 2em; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; }}
svg text {{ font: 13px system-ui, sans-serif; }}
</style><h1>What got worse: {title}</h1>{"".join(parts)}</html>
"""


def _bars(rows: list[tuple[str, float, list[float]]]) -> str:
    """Horizontal bars with their intervals as whiskers."""
    # An interval of one window is unknown (nan): the bar then stands alone.
    ends = [interval if np.isfinite(interval).all() else (value, value) for _, value, interval in rows]
    scale = 420 / max([high for _, high in ends] + [1e-9])
    lines = []
    for i, ((name, value, _), (low, high)) in enumerate(zip(rows, ends)):
        y = 30 * i + 6
        lines.append(f'<text x="0" y="{y + 14}">{html.escape(_short(name, 26))}</text>'
                     f'<rect x="190" y="{y}" width="{value * scale:.1f}" height="18" fill="#3b7dd8"/>'
                     f'<line x1="{190 + low * scale:.1f}" x2="{190 + high * scale:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="#222"/>'
                     f'<text x="{200 + high * scale:.1f}" y="{y + 14}">{value:.4f}</text>')
    return f'<svg width="700" height="{30 * len(rows) + 6}" role="img">{"".join(lines)}</svg>'


def _histogram(values: list[float]) -> str:
    """Counts of prompts by loss; to the right of the line the reply became less likely."""
    counts, edges = np.histogram(values, bins=min(24, max(4, len(values) // 2)))
    low, span = edges[0], max(edges[-1] - edges[0], 1e-9)
    x = lambda v: 20 + (v - low) / span * 640        # noqa: E731
    height = 120 / max(counts.max(), 1)
    bars = "".join(f'<rect x="{x(a):.1f}" y="{130 - c * height:.1f}" width="{max(x(b) - x(a) - 1, 1):.1f}" '
                   f'height="{c * height:.1f}" fill="#3b7dd8"/>' for c, a, b in zip(counts, edges, edges[1:]))
    zero = f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="130" stroke="#222"/>' if low <= 0 <= edges[-1] else ""
    labels = f'<text x="20" y="148">{edges[0]:+.2f}</text><text x="620" y="148">{edges[-1]:+.2f} nats a token</text>'
    return f'<svg width="720" height="155" role="img">{bars}{zero}{labels}</svg>'
