"""The benchmark harness without a GPU: schema, conversion, reports, and the contract that removal pays."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import cases, measure, report, results, workloads  # noqa: E402
from bench.workloads import Workload  # noqa: E402
from shedder import limits  # noqa: E402

RUN = {"gpu": "NVIDIA H200", "clock_mhz": 1980, "copy_tb_s": 4.25, "commit": "abc", "source_hash": "0" * 16,
       "date": "2026-11-22T00:00:00Z", "versions": {"torch": "2.11.0"}}
DENSE = {"B": 8, "L": 2048, "H": 80, "P": 64, "N": 128, "G": 1}


def row(shape=DENSE, ours=300.0, *, dense=None, peer=600.0, **changes):
    made = {"op": "ssd", "pass": "fwd", "shape": shape, "layout": "BLHP", "dtype": "bf16", "state_dtype": None,
            "model": None, "plan": None, "clock": "gpu", "backend": "cuda", "algorithm": "", "dispatch": "auto",
            "ours_us": ours, "dense_us": dense, "peer": "mamba_ssm", "peer_us": peer, "bytes": 1,
            "floor_us": 1e6 * limits.work("ssd", shape).floor(limits.H200), "error": 2e-3, "peer_error": 2e-3,
            "note": ""}
    return {**made, **changes}


def in_run(*rows):
    return [{"run": "r1", **one} for one in rows]


# ---- the workloads


def test_workload_names_are_unique_and_every_op_has_limits_and_a_case():
    rows = workloads.workloads()
    assert len({one.name for one in rows}) == len(rows)
    for one in rows:
        assert limits.work(one.op, one.shape).bytes > 0
        assert one.op in cases.OPS
        if one.dense is not None:
            assert results._is_smaller(one.shape, one.dense)


def test_targets_come_first_and_random_shapes_are_the_same_every_time():
    rows = workloads.workloads("ssd")
    assert rows[0].shape == DENSE
    tables = [one.table for one in rows]
    assert tables == sorted(tables, key=workloads.TABLES.index)
    assert workloads.random_workloads("ssd") == workloads.random_workloads("ssd")
    assert len(workloads.random_workloads("selective_scan")) == 60
    few = workloads.workloads("ssd", "conv1d", tables=["random"], random_shapes=7)
    assert few == [*workloads.random_workloads("ssd")[:7], *workloads.random_workloads("conv1d")[:7]]


# ---- one row, on the CPU


def small(op, **shape):
    """A workload of `op`, as in the table, shrunk until a CPU reference takes no time."""
    found = next(one for one in workloads.WORKLOADS if one.op == op)
    return replace(found, shape={**found.shape, **shape}, clock="gpu", target="", dense=None, dispatch="auto")


SMALL = [small("selective_scan", B=1, D=6, L=5, N=3), small("mamba1_inner", B=1, D=8, L=5, N=3),
         small("ssd", B=2, L=5, H=3, P=4, N=5), small("mamba2_inner", B=1, L=5, H=3, P=4, N=5),
         small("conv1d", B=1, L=6, channels=5), small("conv1d_update", B=2, channels=5),
         small("gated_rmsnorm", rows=3, width=7, segments=[4, 3]), small("state_update", B=2, D=6, N=3)]


@pytest.fixture
def timed(monkeypatch):
    """Measurement without a GPU: every side that may be timed takes 10 us, and our call is the CPU's."""
    def time(workload, sides, sets, budget_s):
        for side in sides:
            side.seconds = 1e-5 if side.call else None
        return "graph"

    monkeypatch.setattr(measure, "_time", time)
    monkeypatch.setattr(measure, "taken", lambda *_: ("cpu", "kernel"))


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.op)
def test_every_case_gives_a_row_of_the_schema_and_our_error(workload, timed):
    made = measure.measure_row(workload, limits.H200, device="cpu")
    results.check_row({"run": "", **made})
    assert made["ours_us"] == 10, made["note"]
    assert 0 < made["error"] <= cases.tolerance(workload)
    assert made["peer_us"] is None or cases.OPS[workload.op].peer_name in sys.modules
    assert made["peer_us"] is not None or made["note"].startswith("peer: ")


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.op)
def test_a_wrong_result_loses_its_speed(workload, timed, monkeypatch):
    op = cases.OPS[workload.op]

    def wrong(inputs):
        first, *rest = op.reference(inputs)
        return (first * 1.05, *rest)

    monkeypatch.setitem(cases.OPS, workload.op, replace(op, ours=lambda t, backend: wrong(t), peer=op.reference))
    made = measure.measure_row(workload, limits.H200, device="cpu")
    assert made["ours_us"] is None
    assert "ours: refused: error 5.0e-02" in made["note"]
    assert made["peer_us"] == 10
    assert made["peer_error"] == 0


def test_a_result_that_is_not_a_number_fails_the_check():
    ones = torch.ones(3)
    assert cases.error((ones * float("nan"),), (ones.double(),)) == float("inf")


def test_rotated_inputs_are_equal_and_apart():
    inputs = cases.make_inputs(small("state_update", B=2, H=2, P=3, N=4), "cpu")
    tied = Workload("state_update", {"B": 2, "H": 2, "P": 3, "N": 4, "G": 1}, "BHP", state_dtype="bf16")
    for one in (inputs, cases.make_inputs(tied, "cpu")):
        for name, tensor in cases.clone(one).items():
            if isinstance(tensor, torch.Tensor):
                assert tensor.stride() == one[name].stride()
                assert torch.equal(tensor, one[name])
                assert tensor.data_ptr() != one[name].data_ptr()


def test_the_check_keeps_the_tail_of_the_length():
    checked = cases.check_workload(Workload("ssd", {**DENSE, "L": 2000}))
    assert checked.shape == {**DENSE, "B": 2, "L": 272}                  # 2000 = 31 * 64 + 16


def test_without_a_gpu_benchmarks_are_skipped_with_the_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "pytest", "bench/bench_norm.py", "-q", "-rs"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA GPU" in done.stdout
    assert "2 skipped" in done.stdout


# ---- the files


@pytest.mark.parametrize("path", results.files(), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_committed_results_follow_the_schema(path):
    data = results.load(path)
    for one in data["rows"]:
        assert workloads.SUITES[one["op"]] == path.stem
        assert results.folder_of(data["runs"][one["run"]]["gpu"]) == path.parent.name


def test_stale_results_are_named(capsys):
    """Says which committed results are older than the kernels; that is no failure, but it should be seen."""
    current = results.source_hash()
    with capsys.disabled():
        for path in results.files():
            if old := results.stale(results.load(path), current):
                print(f"\n{path.relative_to(ROOT)}: {', '.join(old)} older than csrc/, triton_kernels/, shedder/ops")
    data = {"runs": {"r1": {**RUN, "source_hash": current}, "r2": RUN}, "rows": []}
    assert results.stale(data, current) == ["r2"]


def test_the_source_hash_sees_code_and_nothing_else(tmp_path):
    for folder in results.HASHED:
        (tmp_path / folder).mkdir(parents=True)
    kernel = tmp_path / "csrc" / "scan.cuh"
    kernel.write_text("a")
    before = results.source_hash(tmp_path)
    (tmp_path / "csrc" / "scan.o").write_text("object")
    assert results.source_hash(tmp_path) == before
    kernel.write_text("b")
    assert results.source_hash(tmp_path) != before


def test_conversion_round_trip(tmp_path):
    rows = [row(), row({**DENSE, "H": 61}, 240, dense=300.0),
            row(peer_us=None, peer_error=None, op="conv1d", note="peer: RuntimeError: no")]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(one) for one in [RUN, *rows]))
    report_file = tmp_path / "run.json"
    report_file.write_text(json.dumps({"machine_info": {"run": RUN}, "benchmarks": [
        {"extra_info": {"row": one}} for one in rows] + [{"extra_info": {}}]}))
    assert results.read_benchmark(lines) == results.read_benchmark(report_file) == (RUN, rows)

    written = results.merge(*results.read_benchmark(lines), tmp_path / "results")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in written) == [
        "results/h200/conv.json", "results/h200/ssd.json"]
    ssd = results.load(tmp_path / "results/h200/ssd.json")
    assert ssd == {"runs": {"r1": RUN}, "rows": in_run(*rows[:2])}
    before = written[0].read_bytes()
    results.merge(RUN, rows, tmp_path / "results")                       # again: nothing changes
    assert written[0].read_bytes() == before


def test_passes_are_one_run_of_medians(tmp_path):
    smaller = {**DENSE, "H": 61}
    passes = [[row(ours=300.0, peer_us=700.0), row(smaller, 240.0, dense=300.0)],
              [row(ours=330.0, peer_us=None, note="peer: was cut off"), row(smaller, 250.0, dense=330.0)],
              [row(ours=302.0, peer_us=710.0), row(smaller, 310.0, dense=302.0)]]
    paths = []
    for number, rows in enumerate(passes):
        paths.append(tmp_path / f"{number}.jsonl")
        run = {**RUN, "copy_tb_s": 4.0 + number / 10, "date": f"2026-11-22T00:0{number}:00Z"}
        paths[-1].write_text("\n".join(json.dumps(one) for one in [run, *rows]))
    assert results.main(["--results", str(tmp_path / "results"), "--passes", *map(str, paths)]) == 0
    data = results.load(tmp_path / "results/h200/ssd.json")
    assert data["runs"] == {"r1": {**RUN, "copy_tb_s": 4.1, "date": "2026-11-22T00:00:00Z", "passes": 3}}
    assert [(one["ours_us"], one["dense_us"], one["peer_us"]) for one in data["rows"]] == [
        (302.0, None, 705.0), (250.0, 302.0, data["rows"][1]["peer_us"])]
    assert data["rows"][0]["note"] == ""                    # of the pass in the middle
    other = [(RUN, passes[0]), ({**RUN, "commit": "def"}, passes[1])]
    with pytest.raises(results.ResultsError, match="passes differ in commit: 'abc' and 'def'"):
        results.median_of_passes(other)


def test_a_newer_run_replaces_its_rows_and_forgets_runs_without_rows(tmp_path):
    results.merge(RUN, [row(), row({**DENSE, "H": 61}, 240)], tmp_path)
    newer = {**RUN, "date": "2026-11-23T00:00:00Z"}
    (path,) = results.merge(newer, [row(ours=200.0)], tmp_path)
    data = results.load(path)
    assert data["runs"] == {"r1": RUN, "r2": newer}
    assert [(one["run"], one["ours_us"]) for one in data["rows"]] == [("r2", 200.0), ("r1", 240)]
    (path,) = results.merge(newer, [row({**DENSE, "H": 61}, 160.0)], tmp_path)
    assert results.load(path)["runs"] == {"r2": newer}
    assert [p.name for p in path.parent.iterdir()] == ["ssd.json"]       # no leftovers of the atomic write


@pytest.mark.parametrize(("change", "message"), [
    ({"op": "scan"}, "op is 'scan'; accepted"), ({"clock": "host"}, "clock is 'host'"),
    ({"ours_us": float("inf")}, "ours_us is inf"), ({"ours_us": "3"}, "ours_us is '3'"),
    ({"shape": {"heads": 3}}, r"shape has keys \['heads'\]"), ({"dispatch": "triton"}, "dispatch is 'triton'"),
    ({"peer_us": None}, "note must say why"), ({"speed_up": 2.0}, r"unknown fields \['speed_up'\]")])
def test_bad_rows_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(results.ResultsError, match=message):
        results.merge(RUN, [row(), {**row(), **change}], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "ssd.json"
    path.write_text('{"runs": {')
    with pytest.raises(results.ResultsError, match=r"ssd.json: not JSON"):
        results.load(path)
    data = {"runs": {"r1": RUN}, "rows": in_run(row(), row())}
    with pytest.raises(results.ResultsError, match=r"rows\[1\] measures the same thing"):
        results.check_results(data)
    data = {"runs": {"r1": RUN}, "rows": [{"run": "r9", **row()}]}
    with pytest.raises(results.ResultsError, match=r"rows\[0\].run is 'r9'"):
        results.check_results(data)


# ---- the contract


def judge(*rows):
    return results.removal_pays(in_run(*rows), {"r1": RUN})


SMALLER = {**DENSE, "P": 60, "N": 100}                                   # 0.86 of the work is left


def test_removal_pays_where_time_follows_work():
    assert judge(row(), row(SMALLER, 270, dense=300.0), row({**DENSE, "H": 40}, 160, dense=300.0)) == []


def test_time_that_does_not_follow_work_is_named():
    (failure,) = judge(row(), row(SMALLER, 297, dense=300.0))
    assert "P60 N100 G1 bf16 takes 0.990 of dense" in failure
    assert "of the work left" in failure


def test_the_floor_excuses_what_cannot_be_faster():
    floor = 1e6 * limits.work("ssd", SMALLER).floor(limits.H200)
    assert judge(row(ours=floor / 0.72), row(SMALLER, floor / 0.72, dense=floor / 0.72)) == []
    assert len(judge(row(ours=floor / 0.68), row(SMALLER, floor / 0.68, dense=floor / 0.68))) == 1


def test_no_cut_may_cost_time_whatever_the_floor():
    assert any("at most 1.03" in failure for failure in judge(row(ours=80.0), row(SMALLER, 84, dense=80.0)))


def test_along_a_sweep_smaller_is_not_slower():
    sweep = [row(), row({**DENSE, "H": 60}, 200, dense=300.0), row({**DENSE, "H": 50}, 210, dense=300.0)]
    (failure,) = judge(*sweep)
    assert "H50" in failure
    assert "H60" in failure
    assert judge(*sweep[:2], {**sweep[2], "ours_us": 205}) == []         # 2.5 % is noise
    more_batch = row({**DENSE, "B": 4}, 310)
    assert judge(row(), more_batch) == []                                # sequences are not removed


def test_the_peer_is_never_faster_and_nothing_raises_where_dense_works():
    (slow,) = judge(row(peer=200.0))
    assert "takes 300 us, mamba_ssm 200" in slow
    (raises,) = judge(row(), row(SMALLER, None, note="ours: ValueError: no"))
    assert "ours: ValueError: no" in raises


def test_only_automatic_dispatch_and_rows_of_one_run_are_compared():
    forced = row(SMALLER, 900, dispatch="forced:triton")
    wall = row(SMALLER, 900, clock="wall")
    assert judge(row(), forced, wall) == []
    rows = [{"run": "r1", **row()}, {"run": "r2", **row(SMALLER, 500)}]
    assert results.removal_pays(rows, {"r1": RUN, "r2": RUN}) == []


@pytest.mark.parametrize("path", results.files(), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_removal_pays_in_the_committed_results(path):
    data = results.load(path)
    if failures := results.removal_pays(data["rows"], data["runs"]):
        pytest.xfail(f"{len(failures)} places, listed in docs/benchmarks.md; the first: {failures[0]}")


def test_a_dense_time_without_its_row_is_a_failure():
    (failure,) = judge(row(SMALLER, 200, dense=300.0))
    assert "no such dense row" in failure


# ---- the reports


def test_tables_show_speed_ups_targets_and_why_a_peer_has_no_time():
    rows = [row(), row({**DENSE, "P": 61, "N": 101}, 250, peer=None, peer_us=None, note="peer: AssertionError")]
    text = report.markdown(rows)
    assert "| 300 | 600 | 2.00x | 2x (aim 4.5x) |" in text
    assert "| 250 | - | - | 3x (aim 6x); not slower than our dense" in text
    assert "[1] peer: AssertionError" in text


def test_tables_are_put_between_their_marks():
    text = "a\n<!-- bench:ssd -->\nold\n<!-- /bench -->\nz"
    filled = report.fill(text, {"ssd": "| new |"})
    assert filled == "a\n<!-- bench:ssd -->\n| new |\n<!-- /bench -->\nz"
    assert report.fill(filled, {"ssd": "| new |"}) == filled
    with pytest.raises(results.ResultsError, match="no results of that suite"):
        report.fill(text, {})


SWEPT = [row(), row({**DENSE, "H": 61}, 240, dense=300.0, peer=500.0), row({**DENSE, "H": 40}, 160, dense=300.0),
         row({**DENSE, "P": 48, "N": 96, "H": 60}, 150, dense=300.0)]


def test_points_of_a_sweep_are_shares_of_their_own_dense_time():
    cuts = report.cuts(in_run(*SWEPT), {"r1": RUN})
    points = report.axis_points(cuts, "ssd", "H")
    assert [size for size, _ in points] == [40, 61, 80]
    assert [round(cut.share("ours"), 2) for _, cut in points] == [0.53, 0.8, 1.0]
    assert round(points[1][1].share("peer"), 2) == 0.83
    assert 0.75 < points[1][1].left < 0.78
    assert [size for size, _ in report.axis_points(cuts, "ssd", "P")] == [64]
    assert report.cuts(in_run(*SWEPT[1:]), {"r1": RUN}) == []                # without the dense row
    table = report.sweep_table(cuts)
    assert "| ssd | B8 L2048 H61 P64 N128 G1 | 240 | 0.80 | 0.77 | 500 | 0.83 | 2.08x |" in table


def test_random_shapes_are_summed_up():
    drawn = workloads.random_workloads("ssd")[:3]
    rows = [row(one.shape, 100.0, peer=us, peer_us=us) for one, us in zip(drawn, (200.0, 50.0, None), strict=True)]
    rows[2]["note"] = "peer: not measured"
    assert "| ssd | 3 | 2 | 1.00x | 0.50x |" in report.random_table(in_run(*rows, row()))


def test_the_tables_of_the_documentation_are_those_of_the_results():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert report.fill(text, report.all_tables(results.RESULTS)) == text


def test_the_plot_is_drawn_from_a_folder_of_results(tmp_path):
    results.merge(RUN, SWEPT, tmp_path)
    assert report.main(["--results", str(tmp_path), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_where_removal_does_not_pay_is_reported(tmp_path, capsys):
    results.merge(RUN, [row(), row(SMALLER, 299, dense=300.0)], tmp_path)
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "takes 0.997 of dense with 0.8" in capsys.readouterr().out
    assert report.contract_list(in_run(row()), {"r1": RUN}) == "Nowhere."


def test_the_command_line_reports_failures(tmp_path, capsys):
    results.merge(RUN, copy.deepcopy([row(), row(SMALLER, 299, dense=300.0)]), tmp_path)
    assert results.main(["--results", str(tmp_path), "--check"]) == 1
    out = capsys.readouterr().out
    assert "of the work left" in out
    assert "r1 measured other kernels" in out
    (tmp_path / "h200" / "ssd.json").write_text("{}")
    assert results.main(["--results", str(tmp_path)]) == 2
