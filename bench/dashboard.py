"""Draws docs/dashboard.svg: the queries of docs/grafana.json to a Prometheus that has scraped a real run."""

from __future__ import annotations

import json
import math
import random
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from dashboard_app import app, total, work
from matplotlib.figure import Figure
from plot import INK, STYLE
from rabbitmq_node import HOST, Leashed, Node, free_ports

import fastres

HERE = Path(__file__).parent
DASHBOARD = HERE.parent / "docs" / "grafana.json"
#: Seconds between two scrapes, and two points of a curve.
STEP = 2
COLORS = ["#e8710a", "#3d8bd4", "#8c9aab", "#5aa469"]


class Program(Leashed):
    """A program beside the run."""

    def __init__(self, name: str, line: str, **environment: str) -> None:
        self.name = name
        self._line = line
        super().__init__(envvars={"PYTHONPATH": str(HERE), "C_FORCE_ROOT": "1", **environment})

    def shell_line(self, folder: Path) -> str:
        return f"exec {self._line.format(folder=folder)}"

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return True


@click.command(help=__doc__)
@click.option("--seconds", default=360, help="how long the load runs", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=HERE.parent / "docs" / "dashboard.svg")
def main(seconds: int, output: Path) -> None:
    of_worker, of_exporter, of_prometheus = map(str, sorted(free_ports(3)))
    python = f"{sys.executable} -m celery -A dashboard_app"
    with Node() as node:
        own = {"DASHBOARD_BROKER": node.url, "DASHBOARD_PORT": of_worker}
        app.conf.broker_url = node.url
        targets = [f"{HOST}:{of_worker}", f"{HOST}:{of_exporter}"]
        job = {"job_name": "fastres", "static_configs": [{"targets": targets}]}
        # JSON is YAML.
        conf = json.dumps({"global": {"scrape_interval": f"{STEP}s"}, "scrape_configs": [job]})
        with (
            Program("worker", f"{python} worker -P threads -c 10 -l WARNING", **own),
            Program("exporter", f"{python} fastres exporter --port {of_exporter}", **own),
            Prometheus(of_prometheus, conf),
        ):
            start = time.time()
            send_for(seconds)
            panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
            curves = [curves_of(panel, of_prometheus, start, time.time()) for panel in panels]
    draw(panels, curves, output)


class Prometheus(Program):
    """A Prometheus with a configuration."""

    def __init__(self, port: str, conf: str) -> None:
        self._conf = conf
        super().__init__(
            "Prometheus",
            "prometheus --config.file={folder}/conf.yml --storage.tsdb.path={folder}/data "
            f"--web.listen-address={HOST}:{port}",
        )

    def shell_line(self, folder: Path) -> str:
        (folder / "conf.yml").write_text(self._conf)
        return super().shell_line(folder)


def send_for(seconds: float) -> None:
    """Chords of many sizes, and groups that are joined."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        size = round(math.exp(random.uniform(math.log(5), math.log(1500))))
        fastres.apply_many(work, ((n,) for n in range(size)), body=total.s())
        if random.random() < 0.2:
            fastres.apply_many(work, ((n,) for n in range(50))).get(timeout=60, propagate=False)
        time.sleep(random.expovariate(0.7))


def curves_of(panel: dict[str, Any], port: str, start: float, end: float) -> dict[str, list[tuple[float, float]]]:
    """The points of each line of a panel: seconds since the start, values."""
    curves = {}
    for target in panel["targets"]:
        query = urllib.parse.urlencode({"query": target["expr"], "start": start, "end": end, "step": STEP})
        with urllib.request.urlopen(f"http://{HOST}:{port}/api/v1/query_range?{query}", timeout=30) as response:
            answer = json.load(response)
        for series in answer["data"]["result"]:
            label = target["legendFormat"]
            for name, value in series["metric"].items():
                label = label.replace("{{" + name + "}}", value)
            points = [(at - start, float(value)) for at, value in series["values"] if value != "NaN"]
            curves[label] = points
    return curves


def draw(panels: list[dict[str, Any]], curves: list[dict[str, list[tuple[float, float]]]], output: Path) -> None:
    columns = 3
    rows = -(-len(panels) // columns)
    with mpl.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(12, 2.3 * rows), layout="constrained")
        for axes, panel, lines in zip(figure.subplots(rows, columns).flat, panels, curves):
            axes.set_title(panel["title"], size=9, loc="left", color=INK)
            if panel["type"] == "stat":
                for place, (label, points) in enumerate(lines.items()):
                    axes.text(0.05, 0.75 - 0.3 * place, f"{points[-1][1]:g}", size=18, color=COLORS[0])
                    axes.text(0.22, 0.77 - 0.3 * place, label, size=9)
                axes.axis("off")
                continue
            for color, (label, points) in zip(COLORS, lines.items()):
                axes.plot([at / 60 for at, _ in points], [value for _, value in points], color=color, label=label)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("minutes", size=7)
            axes.grid(alpha=0.25)
            for spine in ("top", "right"):
                axes.spines[spine].set_visible(False)
            if lines:
                axes.legend(fontsize=7, frameon=False, loc="best")
            else:
                axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")
            unit = {"s": "seconds", "ops": "per second"}.get(panel["fieldConfig"]["defaults"]["unit"], "")
            axes.set_ylabel(unit, size=7)
        figure.savefig(output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
