"""Small charts of the vega-datasets tables, with questions the tables answer, as in DVQA and FigureQA."""

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image
from rebuild_files import draw

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True, slots=True)
class Chart:
    """One table to draw; kind is bar, line or pie."""

    kind: str
    title: str
    axis: str
    labels: tuple[str, ...]
    values: tuple[float, ...]

    def picture(self) -> Image.Image:
        """Draw the chart, long side 256 to 320 px; bars and slices carry their values, lines do not."""
        colours = [matplotlib.colormaps["tab10" if draw(self.title, 2) else "Set2"](i) for i in range(8)]
        long_px, turn = 256 + draw(self.title + "size", 65), draw(self.title + "turn", 4)
        size = (long_px, long_px * 3 // 4) if turn else (long_px * 7 // 8, long_px)
        with matplotlib.rc_context({"font.size": 6.5, "font.family": "DejaVu Sans"}):
            figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
            axes = figure.add_subplot()
            figure.suptitle(self.title, fontsize=7)
            if self.kind == "pie":
                colours = (colours * 2)[: len(self.values)]
                axes.pie(self.values, labels=self.labels, colors=colours, autopct="%.0f%%", startangle=90)
            elif self.kind == "line":
                axes.plot(self.labels, self.values, marker="o", markersize=2, color=colours[draw(self.title, 8)])
                axes.set_xticks(range(0, len(self.labels), math.ceil(len(self.labels) / 7)))
                axes.set_ylabel(self.axis)
            else:
                bars = axes.barh(self.labels, self.values, color=colours[draw(self.title, 8)])
                axes.bar_label(bars, [shown(v) for v in self.values], padding=1)
                axes.margins(x=0.18)
                axes.set_xlabel(self.axis)
            out = io.BytesIO()
            figure.savefig(out, format="png")
        return Image.open(out).convert("RGB")

    def questions(self) -> list[tuple[str, str]]:
        """Three to five questions with the answers the table gives; a tie is never asked about."""
        what = {"bar": "bar", "line": "point", "pie": "slice"}[self.kind]
        high, low = max(self.values), min(self.values)
        asked = []
        if self.values.count(high) == 1:
            asked.append((f"Which {what} has the highest value?", self.labels[self.values.index(high)]))
        if self.values.count(low) == 1:
            asked.append((f"Which {what} has the lowest value?", self.labels[self.values.index(low)]))
        one, other = (draw(self.title + salt, len(self.values)) for salt in "ab")
        if self.values[one] != self.values[other]:
            answer = "yes" if self.values[one] > self.values[other] else "no"
            asked.append((f"Is {self.labels[one]} higher than {self.labels[other]}?", answer))
        if self.kind == "bar":
            asked.append((f"What is the value of {self.labels[one]}?", shown(self.values[one])))
        elif self.kind == "line":
            rises = "yes" if self.values[-1] > self.values[0] else "no"
            asked.append(("Is the last point higher than the first?", rises))
        asked.append((f"How many {what}s does the chart have?", str(len(self.values))))
        return asked


def shown(value: float) -> str:
    """Print a chart value as it stands in the picture."""
    return str(int(value)) if value == int(value) else f"{value:.1f}"


def load_charts(package: Path) -> list[Chart]:
    """Read the tables of vega-datasets as small charts."""

    def table(name: str) -> list[dict[str, Any]]:
        text = (package / f"vega_datasets/_data/{name}").read_text()
        return json.loads(text) if name.endswith("json") else list(csv.DictReader(io.StringIO(text)))

    def mean_by(rows: list[dict[str, Any]], label: str, value: str) -> dict[str, float]:
        groups = defaultdict(list)
        for row in rows:
            groups[str(row[label])].append(float(row[value]))
        return {key: sum(group) / len(group) for key, group in groups.items()}

    charts = []

    def add(kind: str, title: str, axis: str, points: dict[str, float]) -> None:
        charts.append(Chart(kind, title, axis, tuple(points), tuple(round(v, 1) for v in points.values())))

    barley = table("barley.json")
    for harvest in (1931, 1932):
        for other, by in (("site", "variety"), ("variety", "site")):
            for name in sorted({row[other] for row in barley}):
                rows = [row for row in barley if row["year"] == harvest and row[other] == name]
                add("bar", f"Barley yield, {name}, {harvest}", "bushels per acre", mean_by(rows, by, "yield"))
    power = [{**row, "year": row["year"][:4]} for row in table("iowa-electricity.csv")]
    for year in sorted({row["year"] for row in power}):
        rows = [row for row in power if row["year"] == year]
        add("pie", f"Electricity in Iowa by source, {year}", "", mean_by(rows, "source", "net_generation"))
    for source in ("Fossil Fuels", "Nuclear Energy", "Renewables"):
        rows = [row for row in power if row["source"] == source]
        add("line", f"Iowa: {source}", "thousand MWh", mean_by(rows, "year", "net_generation"))
    jobs = [{**row, "year": row["month"][:4]} for row in table("us-employment.csv")]
    sectors = ("construction", "manufacturing", "retail_trade", "information", "government", "utilities")
    for year in sorted({row["year"] for row in jobs}):
        rows = [row for row in jobs if row["year"] == year]
        points = {s.replace("_", " "): mean_by(rows, "year", s)[year] / 1000 for s in sectors}
        add("bar", f"US jobs by sector, {year}", "million jobs", points)
    for sector in [column for column in jobs[0] if column not in ("month", "year", "nonfarm_change")][:20]:
        add("line", f"US jobs: {sector.replace('_', ' ')}", "thousand jobs", mean_by(jobs, "year", sector))
    weather = [{**row, "month": MONTHS[int(row["date"][5:7]) - 1]} for row in table("seattle-weather.csv")]
    for year in ("2012", "2013", "2014", "2015"):
        rows = [row for row in weather if row["date"].startswith(year)]
        kinds = Counter(row["weather"] for row in rows)
        days = {kind: float(n) for kind, n in sorted(kinds.items()) if n > 15}
        add("bar", f"Days of weather in Seattle, {year}", "days", days)
        add("bar", f"Mean daily rain in Seattle, {year}", "mm", mean_by(rows, "month", "precipitation"))
        add("line", f"Mean daily high in Seattle, {year}", "degrees C", mean_by(rows, "month", "temp_max"))
        add("line", f"Mean daily low in Seattle, {year}", "degrees C", mean_by(rows, "month", "temp_min"))
        add("line", f"Mean wind in Seattle, {year}", "m/s", mean_by(rows, "month", "wind"))
    for first in (1565, 1615, 1665, 1715):
        rows = [row for row in table("wheat.json") if first <= int(row["year"]) < first + 50]
        add("line", f"Price of wheat from {first}", "shillings per quarter", mean_by(rows, "year", "wheat"))
        add("line", f"Weekly wages from {first}", "shillings", mean_by(rows, "year", "wages"))
    for year in ("1854", "1855"):
        for cause in ("disease", "wounds", "other"):
            rows = [
                {**r, "month": MONTHS[int(r["date"][5:7]) - 1]}
                for r in table("crimea.json")
                if r["date"].startswith(year)
            ]
            add("bar", f"Crimean war, deaths by {cause}, {year}", "deaths", mean_by(rows, "month", cause))
    for part in ("sepalLength", "sepalWidth", "petalLength", "petalWidth"):
        spaced = re.sub("(?=[A-Z])", " ", part).lower()
        add("bar", f"Mean {spaced} of irises", "cm", mean_by(table("iris.json"), "species", part))
    return charts
