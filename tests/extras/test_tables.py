"""The tables and charts say what the rows of the results say."""

import json
from pathlib import Path
from statistics import fmean, stdev
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extras import tables

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
ACCURACY = {"a-b": (0.9, 0.8, 0.7), "dense": (0.5, 0.4, 0.3), "c": (0.1, 0.3)}
ROWS = [
    {"run": f"{name}-seed{seed}", "seed": seed, "free_running": {"accuracy": x, "skipped": 0.5}}
    for name, values in ACCURACY.items()
    for seed, x in enumerate(values)
]


@pytest.mark.parametrize(
    ("n", "t", "p"),
    [
        (2, 12.706, 0.05),
        (3, 4.303, 0.05),
        (5, 2.776, 0.05),
        (5, 4.604, 0.01),
        (10, 2.262, 0.05),
        (5, 0.0, 1.0),
    ],
)
def test_p_is_that_of_the_tables_of_students_t(n, t, p):
    spread = [i - (n - 1) / 2 for i in range(n)]
    error = stdev(spread) / n**0.5
    assert tables.students_p([x + t * error for x in spread]) == pytest.approx(p, rel=0.002)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_p_is_a_share_the_same_for_both_signs_and_smaller_further_from_0(apart):
    p = tables.students_p(apart)
    assert 0 <= p <= 1 + 1e-9 and p == pytest.approx(tables.students_p([-x for x in apart]))
    mean = fmean(apart)
    assert tables.students_p([x + mean for x in apart]) <= p + 1e-6


def test_a_table_has_means_and_errors_in_the_order_asked_for():
    assert tables.table(ROWS, ["dense", "a-b", "c"]).splitlines() == [
        "| run | answers right | tokens skipped |",
        "|---|---|---|",
        "| `dense` (3 seeds) | 40.0% ± 5.8% | 50.0% |",
        "| `a-b` (3 seeds) | 80.0% ± 5.8% | 50.0% |",
        "| `c` (2 seeds) | 20.0% ± 10.0% | 50.0% |",
    ]
    with pytest.raises(ValueError, match="the rows of a table must be runs of its file, got absent"):
        tables.table(ROWS, ["absent"])
    with pytest.raises(ValueError, match="a table must have one run of a seed, got dense-seed0 and"):
        tables.table([*ROWS, ROWS[3] | {"run": "dense"}])
    other = {"run": "d", "seed": 0, "streams": 8, "free_running": {"accuracy": 0.5}}
    with pytest.raises(ValueError, match="the runs of a table must be evaluated alike"):
        tables.table([*ROWS, other])


def test_a_table_has_the_columns_that_its_marker_names():
    assert tables.table(ROWS, ["c"], ["skipped", "accuracy"]).splitlines() == [
        "| run | tokens skipped | answers right |",
        "|---|---|---|",
        "| `c` | 50.0% | 20.0% ± 10.0% |",
    ]
    assert tables.table(ROWS, ["c"], ["relaxed"]).splitlines()[2] == "| `c` | - |"
    with pytest.raises(ValueError, match=r"the columns of a table must be of lm_ppl, .*, got speed"):
        tables.table(ROWS, ["c"], ["speed"])


def test_two_rows_are_compared_in_all_that_both_have():
    rows = [{"run": f"{name}-seed{seed}", "seed": seed, "free_running": {"lm_correctness": 0.5 + at + seed / 10, **more}}
            for seed in range(3) for name, at, more in
            (("a", 0.1, {"steps_to_95": 90.0 - seed}), ("b", 0.0, {"steps_to_95": 100.0}), ("c", 0.0, {}))]
    first, second = tables.compare(rows, "a", "b").split("\n")
    assert "+10.0 ± 0.0 points from b in LM-Correctness" in first
    assert "-11.0 ± 0.6 steps from b in steps to 95 %" in second and "3 seeds, p 0.003" in second
    assert len(tables.compare(rows, "a", "c").split("\n")) == 1


def test_two_rows_are_compared_seed_by_seed_in_a_sentence(tmp_path, capsys):
    file = tmp_path / "x.json"
    for found in (ROWS, {"runs": {row["run"]: row for row in ROWS}}):  # of a sweep, of extras/real.py
        file.write_text(json.dumps(found))
        tables.main(["--compare", str(file), "a-b", "dense"])
        assert capsys.readouterr().out == (
            "a-b is +40.0 ± 0.0 points from dense in answers right: mean and standard error over 3 "
            "seeds, p < 0.001 of a paired t-test\n"
        )
    tables.main(["--compare", str(file), "c", "dense"])
    said = capsys.readouterr().out
    assert said.startswith("c is -25.0 ± 15.0 points from dense") and "p 0.344" in said
    with pytest.raises(ValueError, match="the rows of a table must be runs of its file, got absent"):
        tables.main(["--compare", str(file), "a-b", "absent"])
    with pytest.raises(ValueError, match="b and a must have two seeds in common, got 1"):
        tables.compare([ROWS[0] | {"run": "a"}, ROWS[1] | {"run": "b", "seed": 0}], "b", "a")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--compare", "x.json", "a", "b"], "x.json must hold the rows of a sweep, got dict"),
        (["--compare", "x.md", "a", "b"], "x.md must be JSON: "),
        (["--compare", "absent.json", "a", "b"], "absent.json must be JSON: .*No such file"),
        (["--compare", "x.json", "a"], "compare must be given two rows, got a"),
        (["--compare", "x.json"], "compare must be given two rows, got none"),
        (["out", "b"], "other must be given with compare, got no compare"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(argv, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text('{"checks": {}}')
    Path("x.md").write_text("# no JSON")
    with pytest.raises(ValueError, match=complaint):
        tables.main(argv)


def test_scores_of_a_benchmark_stand_before_costs():
    keys = ("accuracy", "step_flops", "relaxed", "flops_of_dense", "skipped", "top1_exact")
    row = {"run": "a", "seed": 0, "free_running": dict.fromkeys(keys, 0.5)}
    assert tables.table([row]).splitlines()[0] == (
        "| run | answers right | top-1 | relaxed accuracy | tokens skipped | FLOPs of dense "
        "| of a dense step |"
    )


def test_only_what_stands_between_markers_is_renewed(tmp_path):
    rows = [{"run": "dense", "seed": 0, "free_running": {"accuracy": 0.5, "skipped": 0.0}}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for words, keys in (("dense", ()), ("[columns: accuracy] dense", ["accuracy"]), ("", ())):
        page = f"before\n<!-- table: x.json {words} -->\n{{}}\n<!-- end -->\n| after |\n"
        made = page.format(tables.table(rows, (), keys))
        assert tables.render(page.format("old\n\nolder"), tmp_path) == made
        assert tables.render(made, tmp_path) == made
        assert tables.render(page.replace("{}\n", ""), tmp_path) == made  # nothing between them yet


def test_every_file_of_the_results_makes_a_table():
    files = sorted((ROOT / "results").glob("*.json"))
    assert len(files) >= 8
    for file in files:
        held = json.loads(file.read_text())
        for names in ([], ["stream"]) if file.name == "profile-tiny-cpu.json" else ([],):
            head, line, *body = tables.table(held, names).splitlines()
            assert set(line) == set("|-") and body
            assert {row.count(" | ") for row in body} == {head.count(" | ")}


def test_a_chart_shows_each_curve_inside_its_frame_and_no_two_names_at_one_place():
    curves = {f"row {n}": [(0.5, 0.9, 0.01)] for n in range(9)}
    curves["line"] = [(0.1, 0.2, 0.0), (0.9, 0.4, 0.1)]
    svg = ElementTree.fromstring(tables.chart("title", "across", "up", curves))
    texts = {t.text: t for t in svg.iter(f"{SVG}text")}
    assert {"title", "across", "up", *curves} <= texts.keys()
    names = [(texts[name].get("x"), texts[name].get("y")) for name in curves]
    assert len(set(names)) == len(names)
    heights = [float(y) for _, y in names]
    assert max(heights) == heights[-1]  # the legend is in the order of the last values
    for circle in svg.iter(f"{SVG}circle"):
        assert 60 <= float(circle.get("cx")) <= 540 and 50 <= float(circle.get("cy")) <= 310
    one = tables.chart("t", "a", "u", {"only <1>": [(1.0, 0.5, 0.0)]})  # no span at all
    assert "nan" not in one and "inf" not in one and ElementTree.fromstring(one) is not None


def test_the_chart_of_a_sweep_has_a_curve_a_routed_layer_of_each_row_and_what_limits_them():
    looks = {"40": {"layer 1": 0.5, "at most": 0.6, "chance": 0.3}, "80": {"layer 1": 0.6, "at most": 0.6, "chance": 0.3}}
    rows = [{"run": f"{name}-seed{seed}", "seed": seed, "free_running": {}, "on_shapes_at": looks}
            for name in ("dense", *tables.LOOKED_AT) for seed in range(2)]
    made = tables.looks_chart(rows)
    assert made.count("<circle") == 2 * (3 + 2)  # two looks; a layer of three rows, at most, chance
    assert all(f">{name}, layer 1<" in made for name in tables.LOOKED_AT) and ">interleaved-values, chance<" in made


def test_the_tables_and_the_chart_of_the_repository_are_renewed_in_place(tmp_path):
    for folder in ("results", "assets"):
        (tmp_path / folder).mkdir()
    held = (ROOT / "results" / "scene.json").read_text()
    (tmp_path / "results" / "scene.json").write_text(held)
    found = [row["free_running"]["lm_correctness"] for row in json.loads(held) if row["run"].startswith("dense-")]
    cell = f"{fmean(found):.1%} ± {stdev(found) / len(found) ** 0.5:.1%}"
    page = "<!-- table: scene.json [columns: lm_correctness] dense -->\n<!-- end -->\n"
    for file in (tmp_path / "README.md", tmp_path / "results" / "README.md"):
        file.write_text(page)
    tables.renew(tmp_path)
    for file in (tmp_path / "README.md", tmp_path / "results" / "README.md"):
        assert f"| `dense` | {cell} |" in file.read_text()
    assert (tmp_path / "assets" / "router.svg").read_text() == (ROOT / "assets" / "router.svg").read_text()


def test_each_part_of_the_experiment_on_a_real_decoder_is_a_table_before_its_runs_are_there():
    found = {
        "gates": {"unit, x": {"gate": "unit", "dense": 22.1234, "gate alone": 12345.6, "of dense": 2.71e9}},
        "layers": {"prose": {"arank": [3, 1, 2], "cost": {"0.2": [0.1, 0.4, 0.2], "0.5": [3, 2, 1]},
                             "correlation": {"0.2": [0.5, -0.25, 0.9], "0.5": [1, 1, 1]}}},
        "sets": {"streams, keep 0.5": [{"layers": 4, "keep": 0.5, "dense": 20.0}, {"layers": 8, "keep": 0.5, "dense": 999.94}]},
    }
    assert tables.table(found, ["gates"]).split("\n")[2:] == ["| unit | 22.12 | 12,346 | 2.71e+09 |"]
    assert tables.table(found, ["layers"]).split("\n")[2:] == [
        "| prose | 0.2 | 0.50 (-0.25 to 0.90) | 1, 2, 0 |", "| prose | 0.5 | 1.00 (1.00 to 1.00) | 0, 1, 2 |"]
    assert tables.table(found, ["sets"]).split("\n")[2:] == ["| streams | 4 | 0.5 | 20 |", "| streams | 8 | 0.5 | 999.9 |"]
