"""The tables and the chart of the results, from JSON to Markdown and SVG.

    python -m extras.tables        renew the READMEs' tables and the chart
    python -m extras.tables DIR    table a folder of runs, also in DIR.json
    python -m extras.tables --compare FILE.json ROW ROW  how far they differ

A README names a table between two markers. Only what stands between is renewed:

    <!-- table: FILE.json [columns: KEY KEY ...] ROW ROW ... -->
    <!-- end -->

FILE.json is in results/. Without columns, all that are known are shown; without
rows, all rows.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev

import torch

import eval as evaluation
from extras.sweep import collect
from model import flag, parse, run_main, write, write_json

ROOT = Path(__file__).resolve().parents[1]
SCORES = (  # of benchmarks: title, key, form
    ("top-1", "top1_exact", "{:.1%}"),
    ("top-1, nearest", "top1_nearest", "{:.1%}"),
    ("ED of verbs", "ed_verb", "{:.3f}"),
    ("ED of nouns", "ed_noun", "{:.3f}"),
    ("ED of actions", "ed_action", "{:.3f}"),
    ("relaxed accuracy", "relaxed", "{:.1%}"),
)
COSTS = (
    ("FLOPs of dense", "flops_of_dense", "{:.1%}"),
    ("of a dense step", "step_flops", "{:.1%}"),
    ("steps to 95 %", "steps_to_95", "{:.0f}"),
    ("before fine-tuning", "reply_accuracy_before", "{:.1%}"),
)
SKIPPED = [key for _, key, _ in evaluation.METRICS].index("skipped")  # scores stand before it
METRICS = (  # an indented title is in no table
    *evaluation.METRICS[:SKIPPED],
    *SCORES,
    *evaluation.METRICS[SKIPPED:],
    *COSTS,
)

# --- tables ---------------------------------------------------------------------------------------

MARKED = re.compile(r"(<!-- table: (\S+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, folder: Path) -> str:
    """Renew the tables between markers. folder: of their JSON files"""

    def renewed(found: re.Match) -> str:
        marker, file, words, end = found.groups()
        rows = json.loads((folder / file).read_text())
        columns, names = re.fullmatch(r"(?: \[columns: (.*)\])?(.*)", words).groups()
        made = table(rows, names.split(), (columns or "").split())
        return f"{marker}{made}\n{end}"

    return MARKED.sub(renewed, text)


def table(rows: list[dict] | dict, names: Sequence[str] = (), keys: Sequence[str] = ()) -> str:
    """A results file as Markdown: of runs, of checks, of a profile, or of extras/real.py.

    rows: what the file holds
    names: of runs, in this order; none: all. Of a profile "stream": what a further frame takes. Of
        extras/real.py "gates", "layers" or "sets": that part; else its runs.
    keys: of the columns of a table of runs, in this order; none: all that are known
    """
    if isinstance(rows, dict) and "checks" in rows:
        found = [[name, check["found"]] for name, check in rows["checks"].items()]
        return markdown_table([["check", "found"], *found])
    if names and names[0] in PARTS:
        return flat_table(PARTS[names[0]](rows[names[0]]))
    rows = runs_of(rows)
    if isinstance(rows, dict):
        return stream_table(rows["rows"]) if "stream" in names else speed_table(rows["rows"])
    return run_table(by_run(rows), names, keys)


def runs_of(found: list[dict] | dict) -> list[dict] | dict:
    """Of extras/real.py its runs; else what it is given"""
    if isinstance(found, dict) and "runs" in found:
        return list(found["runs"].values())
    return found


def by_run(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Rows by the name of their run without its seed, and by that seed.

    Raises ValueError if two rows are of one seed, or if not all were evaluated alike.
    """
    runs: dict[str, dict[int, dict]] = {}
    for row in rows:
        name = re.sub(r"-seed\d+$", "", row["run"])
        same = runs.setdefault(name, {})
        if other := same.get(row["seed"]):
            raise ValueError(
                f"a table must have one run of a seed, got {other['run']} and {row['run']}"
            )
        same[row["seed"]] = row
    how = {str([row.get(key) for key in ("streams", "questions", "threshold")]) for row in rows}
    if len(how) > 1:
        raise ValueError(
            f"the runs of a table must be evaluated alike, got {' and '.join(sorted(how))}"
        )
    return runs


def run_table(
    runs: dict[str, dict[int, dict]], names: Sequence[str], keys: Sequence[str]
) -> str:
    """Free-running scores: the mean over the seeds of a run +- its standard error."""
    names = names or sorted(runs)
    for name in names:
        check_run(name, runs)
    columns = columns_of([row for name in names for row in runs[name].values()], keys)
    uneven = len({len(runs[name]) for name in names}) > 1
    lines = [["run", *[title for title, _, _ in columns]]]
    for name in names:
        cells = run_cells(list(runs[name].values()), columns)
        seeds = f" ({len(runs[name])} seeds)" if uneven else ""
        lines.append([f"`{name}`{seeds}", *cells])
    return markdown_table(lines)


def run_cells(rows: list[dict], columns: list[tuple[str, str, str]]) -> list[str]:
    cells, scores = [], [row["free_running"] for row in rows]
    for _, key, form in columns:
        cells.append(spread([score[key] for score in scores if key in score], form))
    return cells


def check_run(name: str, runs: dict[str, dict[int, dict]]) -> None:
    if name not in runs:
        raise ValueError(f"the rows of a table must be runs of its file, got {name}")


def columns_of(rows: list[dict], keys: Sequence[str]) -> list[tuple[str, str, str]]:
    """The metrics with these keys; without keys, all metrics of the rows but the indented ones."""
    metrics = {metric[1]: metric for metric in METRICS}
    for key in keys:
        if key not in metrics:
            raise ValueError(f"the columns of a table must be of {', '.join(metrics)}, got {key}")
    if keys:
        return [metrics[key] for key in keys]
    known = set().union(*(row["free_running"] for row in rows))
    return [m for m in METRICS if m[1] in known and not m[0].startswith(" ")]


def mean_of(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return fmean(values), error


def spread(values: list[float], form: str) -> str:
    """Mean ± standard error; one number if all values look the same."""
    if not values:
        return "-"
    if len({form.format(value) for value in values}) == 1:
        return form.format(values[0])
    mean, error = mean_of(values)
    return f"{form.format(mean)} ± {form.format(error)}"


def markdown_table(lines: list[list[str]]) -> str:
    """A Markdown table. lines: of cells; the first line is the head"""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


# --- profiles -------------------------------------------------------------------------------------

SPEED_COLUMNS = (
    "work",
    "F x P x streams",
    "dense",
    "MoD",
    "saved",  # time
    "implied",  # what the FLOPs by formula allow to save
    "realised",  # saved over implied
    "ceiling",  # share of a large matrix product's FLOP/s that MoD reaches
    "peak",  # memory saved
)


def speed_cells(row: dict) -> list[str]:
    """The cells of a profile's row under SPEED_COLUMNS."""
    dense, mod = row["dense"], row["mod"]
    shape = f"{row['frames']} x {row['tokens_per_frame']} x {row['streams']}"
    memory = f"{1 - mod['peak'] / dense['peak']:.0%}"
    if "saved" not in row:  # it was counted, not timed
        return [row["work"], shape, "-", "-", "-", f"{row['implied']:.1%}", "-", "-", memory]
    return [
        row["work"],
        shape,
        f"{1000 * dense['seconds']:.4g} ms",
        f"{1000 * mod['seconds']:.4g} ms",
        f"{row['saved']:.1%}",
        f"{row['implied']:.1%}",
        f"{row['saved'] / row['implied']:.0%}",
        f"{mod['of_ceiling']:.0%}",
        memory,
    ]


def speed_table(rows: list[dict]) -> str:
    """What a profile found of work on whole streams."""
    cells = [speed_cells(row) for row in rows if row["work"] != "stream"]
    return markdown_table([list(SPEED_COLUMNS), *cells])


def stream_table(rows: list[dict]) -> str:
    """What a profile found MoD to save on one more frame of each stream."""
    rows = [row for row in rows if row["work"] == "stream"]
    streams = sorted({row["streams"] for row in rows})
    saved: dict[tuple[int, int], dict[int, str]] = {}
    for row in rows:
        line = saved.setdefault((row["tokens_per_frame"], row["before"]), {})
        line[row["streams"]] = f"{row['saved']:.0%}"
    lines = [["tokens a frame", "tokens before", *[f"{n} streams" for n in streams]]]
    for (tokens, before), line in sorted(saved.items()):
        lines.append([str(tokens), f"{before:,}", *[line.get(n, "-") for n in streams]])
    return markdown_table(lines)


# --- the parts of extras/real.py ------------------------------------------------------------------


def gate_rows(gates: dict[str, dict]) -> list[dict]:
    """A row for each gate, and for each input of the router"""
    return list(gates.values())


def layer_rows(layers: dict[str, dict]) -> list[dict]:
    """A row for each kind of input and keep ratio: does ARank know what a layer costs?"""
    rows = []
    for kind, found in layers.items():
        for keep, (rho, low, high) in found["correlation"].items():
            cost = found["cost"][keep]
            dearest = sorted(range(len(cost)), key=lambda layer: -cost[layer])[:4]
            rows.append(
                {
                    "input": kind,
                    "keep": keep,
                    "correlation of ARank and cost": f"{rho:.2f} ({low:.2f} to {high:.2f})",
                    "layers that cost most": ", ".join(map(str, dearest)),
                }
            )
    return rows


def set_rows(sets: dict[str, list[dict]]) -> list[dict]:
    """A row for each kind of input, keep ratio and number of routed layers"""
    return [{"input": name.split(",")[0], **row} for name, rows in sets.items() for row in rows]


PARTS = {"gates": gate_rows, "layers": layer_rows, "sets": set_rows}


def flat_table(rows: list[dict]) -> str:
    """Rows with the same keys as Markdown"""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([v if isinstance(v, str) else four_digits(v) for v in row.values()])
    return markdown_table(lines)


def four_digits(value: float) -> str:
    """At least four digits of a number; a power of ten only from 10^6 on"""
    return f"{value:,.0f}" if 1000 <= value < 10**6 else f"{value:.4g}"


# --- two rows beside each other -------------------------------------------------------------------


def read_rows(file: Path) -> list[dict]:
    """The rows of a results file. Raises ValueError, naming the file, if it holds none."""
    try:
        rows = runs_of(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold the rows of a sweep, got {type(rows).__name__}")
    return rows


COMPARED = (  # what `compare` speaks of: title, key, size and name of its unit
    ("LM-Correctness", "lm_correctness", 100, "points"),
    ("LM-PPL", "lm_ppl", 100, "hundredths"),
    ("answers right", "accuracy", 100, "points"),
    ("steps to 95 %", "steps_to_95", 1, "steps"),
    ("reply tokens right before fine-tuning", "reply_accuracy_before", 100, "points"),
)


def compare(rows: list[dict], name: str, base: str) -> str:
    """How far a run is from another, seed by seed: a sentence for each thing to compare."""
    runs = by_run(rows)
    for row in (name, base):
        check_run(row, runs)
    seeds = sorted(runs[name].keys() & runs[base].keys())
    if len(seeds) < 2:
        raise ValueError(f"{name} and {base} must have two seeds in common, got {len(seeds)}")
    said = []
    for title, key, size, unit in COMPARED:
        apart = []
        for seed in seeds:
            mine, other = (runs[row][seed]["free_running"] for row in (name, base))
            if key in mine and key in other:
                apart.append(size * (mine[key] - other[key]))
        if len(apart) > 1:
            mean, error = mean_of(apart)
            p = students_p(apart)
            shown = f"{p:.3f}" if p >= 0.0005 else "< 0.001"
            said.append(
                f"{name} is {mean:+.1f} ± {error:.1f} {unit} from {base} in {title}: "
                f"mean and standard error over {len(apart)} seeds, p {shown} of a paired t-test"
            )
    return "\n".join(said)


def students_p(apart: list[float]) -> float:
    """The two-sided p of Student's t-test: how often chance alone gives a mean so far from 0.

    apart: the n differences, at least two
    t = sqrt(n - 1) * tan(angle) turns the density of t into cos(angle)^(n - 2) on a quarter turn.
    """
    n = len(apart)
    mean, error = mean_of(apart)
    angle = math.atan2(abs(mean), error * (n - 1) ** 0.5)
    return integral_of_cos(angle, n - 2) / integral_of_cos(0.0, n - 2)


def integral_of_cos(start: float, power: int) -> float:
    """The integral of cos(x)^power from start to a quarter turn."""
    x = torch.linspace(start, math.pi / 2, 10_001, dtype=torch.float64)
    return float(torch.trapezoid(x.cos() ** power, x))


# --- charts ---------------------------------------------------------------------------------------

Curve = list[tuple[float, float, float]]  # x, y, standard error of y
LEFT, RIGHT, TOP, BOTTOM = 60, 540, 50, 310  # of the frame, in units of the SVG


@dataclass(frozen=True)
class Axis:
    """Numbers from low to high, drawn from one place of the SVG to another."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: list[float], start: float, end: float) -> "Axis":
        """An axis with some room on both sides of the values."""
        room = 0.06 * (max(values) - min(values) or 1)
        return cls(min(values) - room, max(values) + room, start, end)

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, six at most."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 5))
        for factor in (1, 2, 5, 10):
            if span / (factor * step) <= 6:
                step *= factor
                break
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [n * step for n in numbers]


def chart(title: str, across: str, up: str, curves: dict[str, Curve]) -> str:
    """An SVG of curves with their standard errors, and a legend in the order of the last values."""
    xs = [x for curve in curves.values() for x, _, _ in curve]
    ends = [end for curve in curves.values() for _, y, e in curve for end in (y - e, y + e)]
    x_axis, y_axis = Axis.around(xs, LEFT, RIGHT), Axis.around(ends, BOTTOM, TOP)
    parts = [
        '<rect width="800" height="370" fill="#fff"/>',
        f'<text x="{LEFT}" y="28" font-size="15">{title}</text>',
        f'<text x="300" y="358" text-anchor="middle">{across}</text>',
        f'<text transform="translate(14 180) rotate(-90)" text-anchor="middle">{up}</text>',
        *draw_ticks(x_axis, y_axis),
    ]
    names = sorted(curves, key=lambda name: -curves[name][-1][1])
    for nth, name in enumerate(names):
        colour = f"hsl({137 * nth % 360},75%,36%)"  # neighbours in the legend are far apart in hue
        parts += draw_curve(curves[name], x_axis, y_axis, colour)
        y = TOP + 8 + 18 * nth
        last = f"{curves[name][-1][1]:.0%}"
        parts.append(f'<path d="M556 {y}h12" stroke="{colour}" stroke-width="4"/>')
        parts.append(f'<text x="600" y="{y + 4}" text-anchor="end" fill="#666">{last}</text>')
        parts.append(f'<text x="607" y="{y + 4}">{escape(name)}</text>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 370"'
    body = "\n".join(parts)
    return f'{head} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'


def draw_ticks(x_axis: Axis, y_axis: Axis) -> list[str]:
    """Lines across the frame, and the numbers at both axes."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>')
        number = f"{value:.0%}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number}</text>')
    for value in x_axis.ticks():
        number = f"{value:.0%}" if x_axis.high < 2 else f"{value:.0f}"
        x = x_axis.place(value)
        parts.append(f'<text x="{x:.1f}" y="330" text-anchor="middle">{number}</text>')
    return parts


def draw_curve(curve: Curve, x_axis: Axis, y_axis: Axis, colour: str) -> list[str]:
    """A line through the points, and at each a dot and a bar of one standard error up and down."""
    line, points = [], []
    for x, y, error in curve:
        at, high, low = x_axis.place(x), y_axis.place(y + error), y_axis.place(y - error)
        line.append(f"{at:.1f},{y_axis.place(y):.1f}")
        points.append(f'<path d="M{at:.1f} {high:.1f}V{low:.1f}"/>')
        points.append(f'<circle cx="{at:.1f}" cy="{y_axis.place(y):.1f}" r="3" fill="{colour}"/>')
    joined = f'<polyline points="{" ".join(line)}" fill="none"/>'
    return [f'<g stroke="{colour}">{joined}', *points, "</g>"]


LOOKED_AT = ("interleaved-values", "interleaved-update", "all-values")  # rows of router.svg


def looks_chart(rows: list[dict]) -> str:
    """Of the sweep `scene`: what the routed layers keep over training, as an SVG"""
    runs = {name: list(same.values()) for name, same in by_run(rows).items()}
    curves: dict[str, Curve] = {}
    for name in LOOKED_AT:
        for step, shares in runs[name][0]["on_shapes_at"].items():
            for where in shares:
                if where.startswith("layer") or name == LOOKED_AT[0]:
                    found = [row["on_shapes_at"][step][where] for row in runs[name]]
                    curve = curves.setdefault(f"{name}, {where}", [])
                    curve.append((int(step), *mean_of(found)))
    return chart(
        "Kept patches that show a shape, keep 0.2",
        "training step",
        "share of the kept patches",
        curves,
    )


# --- command line ---------------------------------------------------------------------------------


def renew(root: Path) -> None:
    """Renew the tables of both READMEs and the chart in assets/."""
    for page in (root / "README.md", root / "results" / "README.md"):
        text = render(page.read_text(encoding="utf-8"), root / "results")
        write_text(page, text)
        print(f"{page}: {len(MARKED.findall(text))} tables")
    scenes = root / "results" / "scene.json"
    if scenes.exists():
        write_text(root / "assets" / "router.svg", looks_chart(json.loads(scenes.read_text())))


def write_text(file: Path, text: str) -> None:
    write(file, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class TablesConfig:
    folder: str = flag("", "folder of runs, or with --compare a row", positional=True)
    other: str = flag("", "with --compare: the other row", positional=True)
    compare: str = flag("", "results file whose two rows to compare")

    def __post_init__(self) -> None:
        if self.compare and not self.other:
            raise ValueError(f"compare must be given two rows, got {self.folder or 'none'}")
        if self.other and not self.compare:
            raise ValueError("other must be given with compare, got no compare")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = parse(TablesConfig, argv, __doc__)
    if cfg.compare:
        rows = read_rows(Path(cfg.compare))
        print(compare(rows, cfg.folder, cfg.other))
    elif cfg.folder:
        folder = Path(cfg.folder)
        rows = collect(folder)
        print(table(rows))
        write_json(folder.with_name(f"{folder.name}.json"), rows)
    else:
        renew(ROOT)


if __name__ == "__main__":
    run_main(main)
