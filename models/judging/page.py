"""What got worse, for people: the tables of the terminal, and one HTML page that holds everything it needs.

    print(report(result, worst=8))
    page(result, worst=8)            # str; result is what models.what_got_worse measured

The page says what each measure means, shortens nothing and fits a telephone: rows become blocks where there is no room.
"""

import html
import re
from dataclasses import dataclass

import numpy as np

from runtime.cli import table

LONGEST = 70                      # characters of a cell in the terminal
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #1d2430; background: #fff;
       overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem; } p { max-width: 45rem; margin: .3rem 0 .8rem; color: #4a5361; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #d8dde5;
       text-align: left; vertical-align: top; } th { font-weight: 600; vertical-align: bottom; overflow-wrap: normal; } td { min-width: 6rem; } td.n { min-width: 0; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { position: relative; height: 1.1rem; min-width: 8rem; } .bar * { position: absolute; }
.bar .value { height: 100%; background: #3b7dd8; } .bar .range { top: 45%; height: 2px; background: #1d2430; }
.columns { display: flex; align-items: flex-end; height: 9rem; gap: 1px; border-bottom: 1px solid #1d2430; }
.columns div { flex: 1; background: #9aa7b8; } .columns .worse { background: #3b7dd8; }
.ends { display: flex; justify-content: space-between; }
@media (max-width: 62rem) { tr { display: block; padding: .5rem 0; border-bottom: 1px solid #d8dde5; } tr.head { display: none; }
       td { display: block; border: 0; padding: .05rem 0; } td::before { content: attr(data-name) ": "; color: #4a5361; }
       td.bar-cell::before { content: none; } }
"""


@dataclass(frozen=True)
class Section:
    title: str
    meaning: str                  # of its measures, for the page
    rows: list[dict]
    bars: list[tuple[float, float, float]] | None = None           # of each row: (value, low, high)
    values: list[float] | None = None                              # shown as a histogram


def sections(result: dict, worst: int) -> list[Section]:
    """Everything that was measured. worst: prompts to show."""
    found = []
    if "domains" in result:
        found.append(Section(
            "Domains",
            "KL divergence says how far the smaller model's expectation of the next token is from the original's, in nats a token: 0 is "
            "the same model, 0.01 is hard to notice, above 0.1 answers change. The line across a bar is its 95% interval over windows. "
            "Same top-1 is how often both find the same token likeliest. Perplexity is how many tokens a model hesitates between: lower "
            "is better. The largest KL is that of one token; the text is what came before it.",
            [{"domain": d["domain"], "tokens": d["tokens"], "KL (nats)": f"{d['kl']:.4f}", "same top-1": f"{d['top1_agreement']:.1%}",
              "perplexity before": f"{d['perplexity_before']:.2f}", "after": f"{d['perplexity_after']:.2f}",
              "largest KL": f"{d['worst_kl']:.2f}", "after the text": d["worst_after"][-LONGEST:]} for d in result["domains"]],
            # An interval of one window is unknown (nan): the bar then stands alone.
            [(d["kl"], *(d["kl_interval"] if np.isfinite(d["kl_interval"]).all() else (d["kl"], d["kl"])))
             for d in result["domains"]]))
    if "prompts" in result:
        found.append(Section(
            f"Prompts whose replies lost most, of {len(result['prompts'])} (mean ln p a token)",
            "How likely each model finds the file's own reply: the mean natural logarithm of a token's probability. A loss of 0.7 means "
            "that every token of the reply became half as likely. In the picture are all prompts: blue columns became less likely.",
            [{"loss": f"{p['loss']:+.3f}", "before": f"{p['before']:.3f}", "after": f"{p['after']:.3f}", "prompt": p["prompt"]}
             for p in result["prompts"][:worst]], values=[p["loss"] for p in result["prompts"]]))
    if "habits" in result:
        found.append(Section(
            "Habits", "Shares of greedy replies that refuse, that go round in circles, and that are valid JSON where JSON was asked for; "
            "changed counts the prompts that gave another verdict.",
            [{"habit": h["habit"], "prompts": h["prompts"], "before": f"{h['before']:.1%}", "after": f"{h['after']:.1%}",
              "changed": h["changed"]} for h in result["habits"]]))
    if "answers" in result:
        a = result["answers"]
        found.append(Section(
            f"Answers: {a['accuracy_before']:.1%} right before, {a['accuracy_after']:.1%} after, {a['flipped']} of {a['examples']} flipped",
            "Labelled examples that the two models answer differently. Flips in both directions are noise; flips in one are damage.",
            [{"right": f["right"], "before": f["before"], "after": f["after"], "example": f["example"]} for f in a["flips"]]))
    return found


def report(result: dict, worst: int) -> str:
    """The tables of the terminal, where long texts are shortened."""
    def short(value):
        text = " ".join(value.split()) if isinstance(value, str) else value
        return text if not isinstance(text, str) or len(text) <= LONGEST else text[:LONGEST - 1] + "…"

    return "\n\n".join([f"{result['before']} -> {result['after']}"] + [
        table([{name: short(value) for name, value in row.items()} for row in section.rows], title=section.title)
        for section in sections(result, worst)])


def page(result: dict, worst: int) -> str:
    """The HTML page, with nothing outside it."""
    return document(f"What got worse: {result['before']} → {result['after']}", sections(result, worst))


def document(title: str, parts: list[Section]) -> str:
    """A page of sections, of this comparison or of another."""
    title = html.escape(title)
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>" + "".join(map(_section, parts)) + "</html>\n")


def _section(section: Section) -> str:
    head = f"<h2>{html.escape(section.title)}</h2><p>{section.meaning}</p>"
    if section.values:
        head += _histogram(section.values)
    if not section.rows:
        return head + "<p>None.</p>"
    widest = max([high for _, _, high in section.bars or ()] + [1e-9])
    names = list(section.rows[0])
    rows = []
    for number, row in enumerate(section.rows):
        cells = [f'<td data-name="{html.escape(name)}"{" class=n" if re.fullmatch(r"[-+0-9.]+%?", str(value)) else ""}>'
                 f"{html.escape(str(value))}</td>" for name, value in row.items()]
        if section.bars:
            cells.insert(1, f'<td class="bar-cell">{_bar(*(100 * x / widest for x in section.bars[number]))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [f"<th>{html.escape(name)}</th>" for name in names]
    if section.bars:
        heads.insert(1, "<th></th>")
    return head + f'<table><tr class="head">{"".join(heads)}</tr>{"".join(rows)}</table>'


def _bar(value: float, low: float, high: float) -> str:
    """A bar and its interval; all in percent of the widest."""
    return (f'<div class="bar"><div class="value" style="width:{value:.1f}%"></div>'
            f'<div class="range" style="left:{low:.1f}%;width:{high - low:.1f}%"></div></div>')


def _histogram(values: list[float]) -> str:
    """Counts of prompts by loss, at zero a border between columns; those of a loss are coloured."""
    step = max(max(values) - min(min(values), 0), -min(values), 1e-9) / 20
    first, last = np.floor(min(min(values), 0) / step), np.ceil(max(max(values), 0) / step)
    counts, edges = np.histogram(values, bins=np.arange(first, last + 1) * step if last > first else [0, step])
    columns = "".join(f'<div{" class=worse" if start > -step / 2 else ""} style="height:{100 * count / max(counts.max(), 1):.1f}%" '
                      f'title="{count} from {start:+.3f} to {start + step:+.3f}"></div>' for count, start in zip(counts, edges))
    return (f'<div class="columns">{columns}</div><div class="ends"><span>{edges[0]:+.2f} nats a token</span>'
            f"<span>{edges[-1]:+.2f}</span></div>")
