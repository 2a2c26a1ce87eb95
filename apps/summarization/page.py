"""A self-contained HTML page: the document, the sentences that the summary rests on, and what the model looked at."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from apps.summarization.task import Outcome

STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #d9dee3; --mark: #ffe9a8; --heat: 0, 114, 178; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #3e4c59; --mark: #5c4a00; --heat: 86, 180, 233; --paper: #1f2933; }
}
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 1.5rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1.2rem }
.query { font-style: italic } .note, dt { color: var(--soft); font-size: .85rem }
.columns { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 2rem; align-items: start }
@media (max-width: 50rem) { .columns { grid-template-columns: minmax(0, 1fr) } }
.summary { position: sticky; top: 1rem; max-height: 96vh; overflow: auto }
.summary p { margin: .4rem 0 } .summary a { color: inherit; text-decoration-color: var(--line) }
.document { max-height: 80vh; overflow: auto; border: 1px solid var(--line); border-radius: 6px; padding: 1rem }
.document span { background: rgba(var(--heat), var(--a, 0)); border-radius: 3px }
.second:checked ~ .columns .document span { background: rgba(var(--heat), var(--b, 0)) }
label { font-size: .85rem; margin-right: 1.2rem }
.document mark { background: var(--mark); color: inherit; border-radius: 3px; box-shadow: 0 0 0 2px var(--mark) }
.document span:target, .document mark:target { outline: 2px solid rgb(var(--heat)) }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 1rem } dd { margin: 0; font-variant-numeric: tabular-nums }
.strip { display: flex; height: 26px; border: 1px solid var(--line); border-radius: 4px; overflow: hidden;
  margin: .3rem 0 1rem }
.strip i { flex: 1 1 0; background: rgba(var(--heat), var(--a, 0)) } .strip i.chosen { background: #e69f00 }
table { border-collapse: collapse; font-size: .85rem } td, th { padding: .15rem .7rem .15rem 0; text-align: left }
"""
STRIP = 240
"""Columns of the strip that shows a whole document."""


class Layer(NamedTuple):
    """One way to colour a document: its name, weights [N] of the sentences in 0..1 (more is cut), and what they are."""

    name: str
    heat: np.ndarray
    note: str


def write_page(path: Path, outcomes: "Sequence[Outcome]", layers: Sequence[Sequence[Layer]] | None = None) -> Path:
    """Write the page.

    Args:
        path: the HTML file; it needs no other file and no network.
        outcomes: documents with their summaries.
        layers: for each document one or two ways to colour it, shown as depth of blue, of which the reader chooses;
            None: the scores of extractive models, nothing for others.
    """
    if layers is None:
        layers = [
            [] if o.weights is None else [Layer("score", _scaled(o.weights), "the model's score of a sentence")]
            for o in outcomes
        ]
    parts = [_document(i, *each) for i, each in enumerate(zip(outcomes, layers))]
    title = "Summaries and what they rest on"
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{''.join(parts)}</body></html>\n"
    )
    return path


def _document(number: int, outcome: "Outcome", layers: Sequence[Layer]) -> str:
    source = outcome.example.source
    chosen = set(outcome.sentences or ())
    heats = [np.clip(layer.heat, 0, 1) for layer in layers]
    text = " ".join(
        f'<{"mark" if i in chosen else "span"} id="d{number}s{i}" title="sentence {source.numbers[i]}"'
        f"{_depths([0.55 * heat[i] for heat in heats])}>{html.escape(sentence)}"
        f"</{'mark' if i in chosen else 'span'}>"
        for i, sentence in enumerate(source.sentences)
    )
    strips = "".join(_strip(layer.name, heat, chosen) for layer, heat in zip(layers, heats))
    if outcome.sentences is not None and outcome.weights is not None:
        summary = "".join(
            f'<p><a href="#d{number}s{i}">{html.escape(source.sentences[i])}</a></p>' for i in outcome.sentences
        )
    else:
        summary = "".join(f"<p>{html.escape(line)}</p>" for line in outcome.summary.splitlines() or [""])
    query = f'<p class="query">{html.escape(outcome.example.query)}</p>' if outcome.example.query else ""
    scores = "".join(f"<dt>{html.escape(name)}</dt><dd>{value:.3f}</dd>" for name, value in outcome.scores.items())
    words = f"{len(outcome.summary.split())} words from {source.words:,} in {len(source.sentences):,} sentences"
    what = " Yellow: sentences that the summary rests on." if chosen else ""
    return (
        f"<h2>{html.escape(outcome.example.id)}</h2>{query}<p class=note>{words}.{what}</p>"
        f"{_switch(number, layers)}{strips}<div class=columns><div class=summary>{summary}<dl>{scores}</dl></div>"
        f'<div class=document tabindex="0">{text}</div></div>\n'
    )


def _depths(values: Sequence[float]) -> str:
    """The style that carries the depth of colour of each layer; nothing where all are near 0."""
    if max(values, default=0) < 0.01:
        return ""
    return " style=" + ";".join(f"--{letter}:{value:.2f}" for letter, value in zip("ab", values))


def _switch(number: int, layers: Sequence[Layer]) -> str:
    """What the colour is; with two layers, buttons to choose between them."""
    texts = [f"Blue: {html.escape(layer.note)}" for layer in layers]
    if len(layers) < 2:
        return "".join(f"<p class=note>{text}.</p>" for text in texts)
    return "".join(
        f'<input type="radio" name="v{number}" id="v{number}{kind}" class="{kind}"{checked}>'
        f'<label for="v{number}{kind}">{text}</label><br>'
        for kind, checked, text in zip(("first", "second"), (" checked", ""), texts)
    )


def _strip(name: str, heat: np.ndarray, chosen: set[int]) -> str:
    """The whole document from left to right: the largest heat of each stretch, and where sentences were chosen."""
    cells = []
    for places in np.array_split(np.arange(len(heat)), min(STRIP, len(heat))):
        style = ' class="chosen"' if chosen & set(places.tolist()) else f" style=--a:{0.8 * heat[places].max():.2f}"
        cells.append(f"<i{style}></i>")
    label = f"{name} from the beginning of the document to its end"
    return f'<p class=note>{label}</p><div class="strip" role="img" aria-label="{label}">{"".join(cells)}</div>'


def _scaled(values: np.ndarray) -> np.ndarray:
    """To 0..1, the lower half of the sentences at 0."""
    low, high = np.quantile(values, 0.5), values.max()
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1)
