"""The claims beside speed without a GPU: the float64 values they are judged by, the judgement, the file."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import cases, claims, report, results  # noqa: E402

SCAN = claims.scan_workload("fp32", B=2, D=5, L=67, N=3)
SSD = claims.ssd_workload("fp32", B=2, L=67, H=3, P=4, N=5)
RUN = {"gpu": "NVIDIA H200", "clock_mhz": 1980, "copy_tb_s": 4.25, "commit": "abc", "source_hash": "0" * 16,
       "date": "2026-11-22T00:00:00Z", "versions": {"torch": "2.11.0"}}
DATA = {
    "run": RUN,
    "accuracy": [{"op": "ssd", "inputs": "model-like", "shape": SSD.shape, "dtype": "bf16", "backend": "cuda",
                  "rms": 2.0e-3, "max": 0.01, "peer_rms": 2.0e-3, "peer_max": 0.01, "note": ""}],
    "pieces": [{"op": "ssd", "shape": SSD.shape, "dtype": "bf16", "backend": "cuda", "whole_us": 100.0,
                "pieces_us": 104.0, "apart": 1e-3}],
    "first_output": [{"family": "mamba1", "backend": "cuda", "layers": 64, "seconds": 0.4},
                     {"family": "mamba1", "backend": "triton", "layers": 64, "seconds": 4.0}],
    "workspace": [{"op": "ssd", "shape": SSD.shape, "dtype": "bf16", "bytes": 5, "peer_bytes": 5, "note": ""}],
}


@pytest.mark.parametrize("workload", [SCAN, SSD], ids=lambda w: w.op)
@pytest.mark.parametrize("piece", [1, 16, 67, 100])
@pytest.mark.parametrize("kind", ["model-like", "slow decay", "outlier channels"])
def test_a_recurrence_in_pieces_is_the_recurrence(workload, piece, kind):
    inputs = claims.change_inputs(kind, workload.op, cases.make_inputs(workload, "cpu"))
    (got,), (want,) = claims.exact(workload.op, inputs, piece), cases.OPS[workload.op].reference(inputs)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_slow_decay_is_slow():
    for op, workload in (("selective_scan", SCAN), ("ssd", SSD)):
        t = claims.change_inputs("slow decay", op, cases.make_inputs(workload, "cpu"))
        bias = t["delta_bias" if op == "selective_scan" else "dt_bias"]
        step = torch.nn.functional.softplus(bias).mean()
        assert 0.9e-2 < step < 1.1e-2
        assert t["A"].max() < -1e-2 * 0.9
        assert t["A"].min() >= -1


def test_outliers_are_channels_and_other_kinds_are_refused():
    workload = claims.scan_workload("fp32", B=1, D=64, L=8, N=2)
    plain, changed = (cases.make_inputs(workload, "cpu") for _ in range(2))
    claims.change_inputs("outlier channels", "selective_scan", changed)
    ratio = (changed["u"] / plain["u"]).round().int()
    assert ratio[:, ::61].unique().tolist() == [100]
    assert ratio[:, 1:61].unique().tolist() == [1]
    with pytest.raises(ValueError, match="kind is 'loud'"):
        claims.change_inputs("loud", "ssd", plain)


def test_errors_are_relative_to_the_rms_and_the_worst_output_counts():
    want = torch.tensor([3.0, 4.0, 3.0, 4.0]).double()
    rms = want.square().mean().sqrt().item()
    got = want + torch.tensor([0.0, 0.0, 0.0, 0.2])
    assert claims.errors([want, got], [want, want]) == pytest.approx((0.1 / rms, 0.2 / rms))


@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_pieces_hand_their_state_on(op):
    workload = {"selective_scan": SCAN, "ssd": SSD}[op]
    t = cases.make_inputs(workload, "cpu")
    whole, parts = claims.prefill(op, t, 67, 1), claims.prefill(op, t, 67, 4)
    assert len(parts) == 4
    torch.testing.assert_close(torch.cat(parts, 2 if op == "selective_scan" else 1), whole[0], rtol=1e-4, atol=1e-5)


def test_layers_of_the_first_output_are_all_different():
    for family in ("mamba1", "mamba2"):
        names = [workload.name for workload in claims.layer_workloads(family)]
        assert len(set(names)) == claims.LAYERS


def test_what_holds_is_no_failure():
    assert claims.failures(DATA) == []


@pytest.mark.parametrize(("table", "change", "message"), [
    ("accuracy", {"rms": 2.2e-3}, "rms error 2.20e-03, the peer's 2.00e-03"),
    ("accuracy", {"max": 0.02}, "max error"), ("pieces", {"pieces_us": 106.0}, "4 pieces take 106 us, one call 100"),
    ("first_output", {"seconds": 0.6}, "takes 0.6 s; 0.5 s are allowed"),
    ("workspace", {"bytes": 6}, "6 bytes of workspace, the peer 5")])
def test_what_does_not_hold_is_named(table, change, message):
    data = copy.deepcopy(DATA)
    data[table][0] |= change
    (failure,) = claims.failures(data)
    assert message in failure


def test_a_peer_without_figures_is_no_yardstick():
    data = copy.deepcopy(DATA)
    data["accuracy"][0] |= {"peer_rms": None, "peer_max": None, "note": "peer: AssertionError"}
    data["workspace"][0] |= {"peer_bytes": None}
    assert claims.failures(data) == []


def test_figures_are_merged_checked_and_reported(tmp_path, capsys):
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(DATA))
    folder = tmp_path / "results"
    assert claims.main([str(measured), "--results", str(folder)]) == 0
    assert claims.load(folder / "h200" / "claims.json") == DATA
    tables = report.claim_tables(folder / "h200" / "claims.json")
    assert "| B2 L67 H3 P4 N5 G1 bf16 | 100 | 104 | 1.040 | 0.001 |" in tables["h200/pieces"]
    assert "| 64 of mamba1 | triton | 4 | 5 |" in tables["h200/first_output"]
    assert tables["h200/claims"] == "All hold."
    slow = copy.deepcopy(DATA)
    slow["pieces"][0]["pieces_us"] = 200.0
    measured.write_text(json.dumps(slow))
    assert claims.main([str(measured), "--results", str(folder)]) == 1
    assert "4 pieces take 200 us" in capsys.readouterr().out
    del slow["pieces"][0]["whole_us"]
    measured.write_text(json.dumps(slow))
    assert claims.main([str(measured), "--results", str(folder)]) == 2
    assert "pieces[0] has" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*/claims.json")), ids=lambda p: p.parent.name)
def test_committed_claims_follow_the_schema(path):
    assert results.folder_of(claims.load(path)["run"]["gpu"]) == path.parent.name
