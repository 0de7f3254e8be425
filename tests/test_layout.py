"""Layouts: what they accept, the sizes that follow, and their JSON."""

import dataclasses
import json

import pytest

from shedder.layout import (
    LayoutError,
    NormSegment,
    RemovedBlock,
    RemovedSSM,
    ScanLayout,
    SSDLayout,
    layout_from_json,
    layout_to_json,
)

SSD = SSDLayout(headdim=4, dstate=6, ngroups=2, head_to_group=(0, 1, 1), norm_segments=(NormSegment(12, 1e-5),),
                row_padding=3, mlp_channels=5)
REMOVED = RemovedSSM(nheads=3, headdim=4, norm_segments=(NormSegment(12, 1e-5),), mlp_channels=2)
FOLDED = RemovedSSM(nheads=7, headdim=1, gain=False)
SCAN = ScanLayout(d_inner=4, dstate=6, dt_rank=2, channel_to_group=(0, 1, 0, 1))


def as_stored(layout):
    return json.loads(json.dumps(layout_to_json(layout)))


def test_sizes_follow_from_the_layout():
    assert SSD.in_proj_rows == 2 * 5 + 2 * 12 + 2 * 2 * 6 + 3 + 3
    assert SSD.conv_channels == 12 + 2 * 2 * 6
    assert SSD.out_proj_columns == 5 + 12
    assert SSD.state_elements == 3 * 4 * 6
    assert REMOVED.in_proj_rows == 2 * 2 + 2 * 12
    assert REMOVED.conv_channels == 12
    assert REMOVED.out_proj_columns == 14
    assert REMOVED.state_elements == 0
    assert SCAN.x_proj_rows == 2 + 2 * 2 * 6
    assert SCAN.out_proj_columns == 4


@pytest.mark.parametrize(("layout", "change", "message"), [
    (SSD, {"mlp_channels": -1}, "mlp_channels is -1; accepted: an integer >= 0"),
    (SSD, {"headdim": 0}, "headdim is 0"),
    (SSD, {"head_to_group": (0, 2, 1)}, "head_to_group is 2; accepted: an integer in [0, 1]"),
    (SSD, {"norm_segments": (NormSegment(11, 1e-5),)}, "sum of norm_segments channels is 11"),
    (SSD, {"row_padding": True}, "row_padding is True"),
    (REMOVED, {"gain": False}, "gain is False; accepted: true where there is a gated norm"),
    (FOLDED, {"gain": 1}, "gain is 1; accepted: true or false"),
    (SCAN, {"dt_rank": 0}, "dt_rank is 0"),
    (SCAN, {"channel_to_group": (0, 1)}, "len(channel_to_group) is 2"),
])
def test_what_no_layer_can_have_is_refused(layout, change, message):
    with pytest.raises(LayoutError) as error:
        dataclasses.replace(layout, **change)
    assert message in str(error.value)


@pytest.mark.parametrize("layout", [SSD, REMOVED, FOLDED, SCAN, RemovedBlock()], ids=lambda layout: layout.kind)
def test_json_gives_the_same_layout_back(layout):
    assert layout_from_json(as_stored(layout)) == layout


def test_files_from_before_there_were_mlp_channels_and_folded_gains_mean_what_they_meant():
    for layout in (dataclasses.replace(SSD, mlp_channels=0), dataclasses.replace(REMOVED, mlp_channels=0)):
        data = as_stored(layout)
        for name in ("mlp_channels", "gain"):
            data.pop(name, None)
        assert layout_from_json(data) == layout


@pytest.mark.parametrize("name", ["headdim", "row_padding", "norm_segments"])
def test_a_missing_field_is_refused(name):
    data = as_stored(SSD)
    data.pop(name)
    with pytest.raises(LayoutError, match="fields of a ssd layout"):
        layout_from_json(data)
