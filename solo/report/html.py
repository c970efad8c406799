"""report.html: one file that shows a whole recipe without a server, a script or a request.

In: a summary and Markdown pages. Out: HTML with its style and its pictures inside. Invariant: raw HTML in the Markdown
is shown as text, only data-URI pictures are pictures. Cost: parsing a few hundred kB of Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
BARS = re.compile("[\u2588-\u258f]+")
STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #66717d; --line: #e3e7eb; --page: #fff; --wash: #f6f8fa;
  --good: #2f7d4f; --bad: #b3363f; --bar: #3b6ea5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e6ea; --soft: #98a3ae; --line: #30373e; --page: #15191d;
  --wash: #1d2328; --good: #6cc08b; --bad: #e77c84; --bar: #6d9fd4; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 5rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.verdict { display: inline-block; padding: .05rem .6rem; border: 1px solid; border-radius: 1rem; font-size: .85rem }
.good { color: var(--good) } .bad { color: var(--bad) }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0 }
.tiles div { flex: 1 1 9rem; padding: .7rem .9rem; background: var(--wash); border-radius: .5rem }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tiles span { color: var(--soft); font-size: .85rem }
table { display: block; margin: .5rem 0 1rem; overflow-x: auto; max-width: 100%; border-collapse: collapse;
  font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left }
th { color: var(--soft); font-weight: 500; white-space: nowrap }
.bar, td:first-child:nth-last-child(n+6), td:nth-child(2):nth-last-child(n+5) { white-space: nowrap }
.bar { color: var(--bar); letter-spacing: -.05em }
td img { max-width: 6rem; display: block }
img { max-width: 100%; background: #fff; border-radius: .4rem }
details { border-top: 1px solid var(--line) }
details:last-of-type { border-bottom: 1px solid var(--line) }
summary { cursor: pointer; padding: .6rem 0; font-weight: 600 }
details h1 { font-size: 1.2rem; margin-top: .5rem }
"""


def html(summary: Mapping[str, Any], page: str, sections: Mapping[str, str]) -> str:
    """The report: verdict and key numbers, the summary page, then one folded section per part."""
    title = escape(summary["title"] or summary["recipe"])
    body = _render(page.partition("\n\n")[2])  # its heading is the header's
    folded = "\n".join(
        f"<details{' open' if name == 'overview' else ''}><summary>{escape(name)}</summary>\n{_render(text)}</details>"
        for name, text in sections.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style></head>\n'
        f"<body><header><h1>{title}</h1>{_verdict(summary)}</header>\n{_tiles(summary)}\n"
        f"<main>{body}\n<h2>Part by part</h2>\n{folded}</main></body></html>\n"
    )


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _verdict(summary: Mapping[str, Any]) -> str:
    if summary["closes"]:
        return '<span class="verdict good">every count closes</span>'
    n = sum(not c["ok"] for c in summary["checks"])
    return f'<span class="verdict bad">{n} equations do not hold</span>'


def _tiles(summary: Mapping[str, Any]) -> str:
    """The numbers a reader looks for first."""
    acquired = [p for p in summary["parts"] if p["part"] == "acquire"]
    tiles = [
        ("records offered", f"{sum(p['in'] for p in acquired):,}"),
        ("samples in shards", f"{sum(p['kept'] for p in summary['parts'] if p['part'] == 'shard'):,}"),
        ("tokens trained", f"{sum(s['tokens'] for s in summary['stages']):,}"),
    ]
    tiles += [(f"{s['benchmark']} (chance {s['chance']:.2f})", f"{s['score']:.3f}") for s in summary["scores"]]
    return (
        '<div class="tiles">' + "".join(f"<div><b>{v}</b><span>{escape(k)}</span></div>" for k, v in tiles) + "</div>"
    )


def _render(markdown: str) -> str:
    """Markdown to HTML; `html` is off, so that tags in the text stay text."""
    from markdown_it import MarkdownIt

    page = str(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))
    return BARS.sub(r'<span class="bar">\g<0></span>', page)
