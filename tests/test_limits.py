"""The limits give the figures worked out by hand for an H200 (4.3 TB/s, 790 TFLOP/s, 4.18e12 exps a second)."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shedder import limits
from shedder.layout import RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.limits import H200, Machine, Work
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune.size import layer_flops

SSD_DENSE = {"B": 8, "L": 2048, "H": 80, "P": 64, "N": 128, "G": 1}


def us(seconds: float) -> float:
    return seconds * 1e6


@pytest.mark.parametrize(("shape", "hbm_us", "mufu_us"), [
    ((8, 5120, 2048, 16), 156, 381), ((8, 5120, 2048, 8), 156, 221), ((8, 5120, 2048, 4), 156, 140),
    ((1, 5120, 2048, 16), 20, 48), ((1, 8192, 65536, 16), 1000, 2439)])
def test_selective_scan_has_the_known_limits(shape, hbm_us, mufu_us):
    work = limits.work("selective_scan", dict(zip("BDLN", shape, strict=True)))
    assert us(work.t_bytes(H200)) == pytest.approx(hbm_us, abs=0.6)
    assert us(work.t_exp(H200)) == pytest.approx(mufu_us, abs=0.6)
    assert work.t_mma(H200) == 0
    assert us(work.floor(H200)) == pytest.approx(max(hbm_us, mufu_us), abs=0.6)


@pytest.mark.parametrize(("batch", "length", "heads", "groups", "hbm_ms", "tensor_ms", "mufu_ms"), [
    (8, 2048, 80, 1, .081, .068, .020), (8, 2048, 128, 1, .129, .109, .032),
    (1, 131072, 128, 1, 1.03, .87, .26), (1, 4096, 128, 8, .036, .028, .008)])
def test_ssd_has_the_known_limits(batch, length, heads, groups, hbm_ms, tensor_ms, mufu_ms):
    work = limits.work("ssd", {"B": batch, "L": length, "H": heads, "P": 64, "N": 128, "G": groups})
    assert work.t_bytes(H200) * 1e3 == pytest.approx(hbm_ms, rel=0.02)
    assert work.t_mma(H200) * 1e3 == pytest.approx(tensor_ms, rel=0.02)
    assert work.t_exp(H200) * 1e3 == pytest.approx(mufu_ms, rel=0.05)      # the known figure leaves softplus out


@pytest.mark.parametrize(("op", "shape", "floor_us"), [
    ("conv1d", {"B": 8, "L": 2048, "channels": 5120}, 78),
    ("conv1d", {"B": 8, "L": 2048, "channels": 5376}, 82),
    ("gated_rmsnorm", {"rows": 16384, "width": 5120}, 117),
    ("mamba2_inner", SSD_DENSE, 120),
    ("ssd", {**SSD_DENSE, "B": 1}, 10),
    # a plain read-modify-write step of the shape whose record is published: 63.2 us
    ("state_update", {"B": 64, "H": 64, "P": 128, "N": 128, "G": 8}, 63.2)])
def test_other_ops_have_the_known_floors(op, shape, floor_us):
    assert us(limits.work(op, shape, state=2).floor(H200)) == pytest.approx(floor_us, rel=0.02)


def test_conv_update_counts_the_window_both_ways():
    assert limits.work("conv1d_update", {"B": 3, "channels": 10, "width": 4}).bytes == 3 * 10 * (2 + 2 + 2 * 2 * 3)


def test_removed_ssm_reads_two_and_writes_one_tensor():
    assert limits.work("removed_ssm", {"B": 2, "L": 5, "H": 3, "P": 4}).bytes == 3 * 2 * (2 * 5 * 3 * 4)


def test_one_fused_step_moves_less_than_two_launches():
    shape = {"B": 128, "H": 80, "P": 64, "N": 128, "G": 1}
    conv = limits.work("conv1d_update", {"B": 128, "channels": 80 * 64 + 256, "width": 4})
    fused = limits.work("step_mixer", shape)
    assert limits.work("state_update", shape).bytes < fused.bytes < (limits.work("state_update", shape) + conv).bytes


@pytest.mark.parametrize("op", sorted(limits.OPS))
def test_every_op_shrinks_with_every_axis(op):
    dense = {"B": 8, "D": 512, "L": 1024, "H": 8, "P": 64, "N": 128, "G": 1, "channels": 640, "width": 4, "rows": 64}
    if op in ("state_update", "step_mixer"):
        del dense["D"]
    assert limits.work_left(op, dense, dense, H200) == 1
    for axis in set(dense) - {"G"}:
        small = {**dense, axis: dense[axis] // 2}
        assert limits.work_left(op, small, dense, H200) <= 1
    assert limits.work_left(op, {**dense, "B": 4, "rows": 32}, dense, H200) < 0.6


def test_work_left_is_a_ratio_of_sums():
    small = {**SSD_DENSE, "P": 60, "N": 100}
    on = Machine("any", 1e12, 1e14, 1e12)
    expected = limits.work("ssd", small).total(on) / limits.work("ssd", SSD_DENSE).total(on)
    assert limits.work_left("ssd", small, SSD_DENSE, on) == expected
    assert 0.7 < expected < 0.95


def test_ragged_groups_count_as_groups():
    even = limits.work("ssd", {**SSD_DENSE, "H": 75, "G": 8})
    assert limits.work("ssd", {"B": 8, "L": 2048, "H": 75, "P": 64, "N": 128, "groups": [10] * 5 + [9, 9, 7]}) == even


def test_a_layer_is_measured_through_its_layout():
    ssd = SSDLayout(headdim=64, dstate=128, ngroups=1, head_to_group=(0,) * 80)
    assert limits.layer_work(ssd, 8, 2048) == limits.work("mamba2_inner", SSD_DENSE)
    assert limits.layer_work(RemovedBlock(), 8, 2048) == Work()
    assert limits.layer_work(RemovedSSM(nheads=80, headdim=64), 8, 2048).flops == 0
    scan = ScanLayout(d_inner=512, dstate=16, dt_rank=16)
    assert limits.layer_work(scan, 8, 2048).exps > limits.layer_work(scan, 8, 1024).exps
    assert 0 < limits.layer_work(scan, 8, 1).bytes < limits.layer_work(scan, 8, 2).bytes * 100


class Counted(TorchDispatchMode):
    """Elements that pass a SiLU, and that in_proj writes and out_proj reads, while a mixer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.silu = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.silu.default:
            self.silu += out.numel()
        elif function is torch.ops.aten.mm.default:    # in_proj's output, out_proj's input
            self.products += max(out.numel(), args[0].numel())
        return out


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("length", [1, 24])
def test_channels_beside_the_ssm_count_what_their_modules_do(removed, length):
    """A layer with 20 of them against one without: elements counted while both run, and the flops of their products."""
    work, counted, flops, sizes = [], [], [], []
    for beside in (20, 0):
        layout = (RemovedSSM(nheads=2, headdim=4, mlp_channels=beside) if removed else
                  SSDLayout(headdim=4, dstate=3, ngroups=1, head_to_group=(0, 0), mlp_channels=beside))
        config = ModelConfig("mamba2", d_model=6, vocab_size=8, layers=(layout,))
        mixer = LanguageModel(config).layers[0].mixer
        with Counted() as seen, FlopCounterMode(display=False) as counter:
            mixer(torch.randn(2, length, 6))           # with gradients: without, F.linear is no product that one sees
        work.append(limits.layer_work(layout, 2, length, element=4))
        counted.append(seen)
        flops.append(counter.get_total_flops())
        sizes.append(layer_flops(config, layout))
    assert work[0].bytes - work[1].bytes == 4 * (counted[0].products - counted[1].products) == 4 * 2 * length * 3 * 20
    assert work[0].exps - work[1].exps == counted[0].silu - counted[1].silu == 2 * length * 20
    assert work[0].flops == work[1].flops
    assert flops[0] - flops[1] == 2 * length * (sizes[0] - sizes[1]) > 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op is 'scan'; accepted"):
        limits.work("scan", {})
    with pytest.raises(ValueError, match="gpu is 'TPU'"):
        limits.machine("TPU")


def test_a_run_brings_its_own_copy_rate_and_clock():
    measured = limits.machine("NVIDIA H200", copy_tb_s=4.25, clock_mhz=1500)
    assert measured.bytes_s == 4.25e12
    assert measured.exp_s == 132 * 16 * 1500e6
