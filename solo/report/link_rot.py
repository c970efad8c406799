"""What the last re-crawl of each source found, for the acquire page. In: acquire artifacts. Out: blocks of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from solo.artifact import Artifact
from solo.report.markdown import BAR, bar, table

BECAME = ("same", "changed", "gone", "withdrawn", "unknown")


def blocks(artifacts: Sequence[Artifact]) -> Iterator[str]:
    """Passes, then link rot: a row per source, then the hosts that lost most; nothing where nothing was asked again."""
    passes = [
        {"source": a.manifest.name, **said, "causes": ", ".join(said["causes"])}
        for a in artifacts
        for said in a.manifest.stats.get("passes", [])
    ]
    if passes:
        yield "## Passes: URLs that were asked again"
        yield table(passes)
    rotten = {a.manifest.name: rot for a in artifacts if (rot := a.manifest.stats.get("link_rot"))}
    if not rotten:
        return
    yield "## Link rot: what the last re-crawl found"
    totals = [{"source": name} | _row(rot) for name, rot in rotten.items()]
    yield table(totals)
    yield "By host, those that lost most first:"
    yield table(
        [{"source": name, "host": host["host"]} | _row(host) for name, rot in rotten.items() for host in rot["hosts"]]
    )


def _row(counts: dict[str, int]) -> dict[str, object]:
    lost = counts["urls"] - counts["same"] - counts["unknown"]
    return (
        {"urls": counts["urls"]}
        | {name: counts[name] for name in BECAME}
        | {
            "lost": f"{lost / max(counts['urls'], 1):.1%}",
            BAR: bar(lost / max(counts["urls"], 1)),
        }
    )
