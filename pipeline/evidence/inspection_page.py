"""What `pipeline.inspect` shows, as one HTML page that needs nothing but itself."""

import html
from typing import Any

from pipeline.evidence.inspection import documents_in_words, edges_in_words, fate, row_in_words, run_in_words

_STYLE = """
:root { color-scheme: light; --line: #e2e2e2; --bad: #b3261e; --good: #1b6e3c }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 68em; margin: 1.5em auto; padding: 0 1em; color: #1c1c1c;
  background: #fff }
h1 { font-size: 1.4em; overflow-wrap: anywhere } h2 { font-size: 1.15em; margin: 2em 0 .3em }
p.note { color: #555; margin: .2em 0 1em; max-width: 70ch }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: .35em .6em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
td small { display: block; color: #444; font-size: 11px }
article { border: 1px solid var(--line); border-left: 5px solid var(--bad); border-radius: 4px; margin: .8em 0;
  padding: .6em .9em } article.helpful { border-left-color: var(--good) } article.plain { border-left-color: #4769a8 }
article header { display: flex; flex-wrap: wrap; gap: .2em 1.2em; font-size: 14px; color: #444 }
article header b { color: #111 } article header code { overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; margin: .5em 0 0;
  max-height: 14em; overflow-y: auto } article.plain pre { max-height: none }
"""


def run_page(content: dict[str, Any]) -> str:
    """Of `inspection.inspect_run`."""
    head = f"<h1>{_safe(content['run_dir'])}</h1>\n<p>{_safe(run_in_words(content))}</p>"
    return _page(
        f"Inspect {content['run_dir']}",
        [
            head,
            "<h2>Who was removed, and when?</h2>",
            _note("The share that was removed of a subset's units in these steps, and its 95 % interval (Wilson)."),
            _over_time(content["over_time"]),
            "<h2>The most harmful texts</h2>",
            _note(
                "Scores compare only within a step, so texts stand in the order of their score over the root mean "
                "square of those beside it (× below). Negative: training on it raises the loss of what it is held "
                "against."
            ),
            *(_unit(row, "harmful") for row in content["harmful"]),
            "<h2>The most helpful texts</h2>",
            *(_unit(row, "helpful") for row in content["helpful"]),
        ],
    )


def row_page(content: dict[str, Any]) -> str:
    """Of `inspection.inspect_row`."""
    parts = [f"<h1>{_safe(row_in_words(content))}</h1>", _note("As the model reads it, special tokens too.")]
    for document in content["documents"]:
        facts = [f"<b>document {document['document_id']}</b>", _safe(document["subset"]), _code(document["source"])]
        facts += [f"tokens {document['first']} to {document['stop'] - 1}", _safe(edges_in_words(document))]
        parts.append(_article("plain", facts, document["text"]))
    return _page(f"Row {content['row']}", parts)


def _unit(row: dict[str, Any], kind: str) -> str:
    loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
    facts = [
        f"<b>{row['relative']:+.2f} ×</b>",
        f"score {row['score']:.3g}",
        f"loss {loss}",
        f"step {row['step']:,}",
        _safe(row["subset"]),
        _safe(fate(row)),
        _safe(documents_in_words(row)),
        _code(row["source"]),
    ]
    return _article(kind, facts, row["text"])


def _over_time(rows: list[dict[str, Any]]) -> str:
    stretches = sorted({(row["first"], row["last"]) for row in rows})
    by_place = {(row["subset"], row["first"]): row for row in rows}
    heads = "".join(f"<th>{first:,} to {last:,}</th>" for first, last in stretches)
    lines = [f"<tr><th>steps</th>{heads}</tr>"]
    for subset in dict.fromkeys(row["subset"] for row in rows):
        cells = "".join(_rate(by_place.get((subset, first))) for first, _ in stretches)
        lines.append(f"<tr><td>{_safe(subset)}</td>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _rate(row: dict[str, Any] | None) -> str:
    """A cell, the redder the more was removed."""
    if row is None or not row["units"]:
        return "<td>-</td>"
    return (
        f'<td style="background: rgb(214 69 56 / {0.75 * row["rate"]:.2f})">{row["rate"]:.0%}'
        f"<small>{row['removed']:,} of {row['units']:,}; {row['low']:.0%} to {row['high']:.0%}</small></td>"
    )


def _article(kind: str, facts: list[str], text: str) -> str:
    header = "".join(f"<span>{fact}</span>" for fact in facts)
    return f'<article class="{kind}"><header>{header}</header><pre>{_safe(text)}</pre></article>'


def _page(title: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_safe(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _note(text: str) -> str:
    return f'<p class="note">{_safe(text)}</p>'


def _code(text: str) -> str:
    return f"<code>{_safe(text)}</code>"


def _safe(text: str) -> str:
    return html.escape(text)
