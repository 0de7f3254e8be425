"""The shape of each compacted layer: small frozen dataclasses, checked once, then trusted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


class LayoutError(ValueError):
    """A layout that no layer can have; the message names the field, the value and what is accepted."""


def _require(ok: bool, field: str, value: object, accepted: str) -> None:
    if not ok:
        raise LayoutError(f"{field} is {value!r}; accepted: {accepted}")


def _require_int(field: str, value: object, low: int, high: int | None = None) -> None:
    accepted = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and low <= value and (high is None or value <= high), field, value, accepted)  # type: ignore[operator]


@dataclass(frozen=True)
class NormSegment:
    """A run of channels that a gated RMSNorm normalises together, with its own eps.

    eps lives here because exact repair scales it by the share of channels that was kept.
    """

    channels: int
    eps: float

    def __post_init__(self) -> None:
        _require_int("NormSegment.channels", self.channels, 1)
        _require(isinstance(self.eps, float) and self.eps >= 0, "NormSegment.eps", self.eps, "a float >= 0")


@dataclass(frozen=True)
class ScanLayout:
    """The shape of one compacted Mamba-1 layer.

    channel_to_group[c] is the B/C group that channel c reads; None means one group for all.
    """

    kind: ClassVar[str] = "scan"
    d_inner: int                                        # D
    dstate: int                                         # N
    dt_rank: int                                        # R
    conv_width: int = 4                                 # W
    channel_to_group: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require_int("d_inner", self.d_inner, 1)
        _require_int("dstate", self.dstate, 1, 256)
        _require_int("dt_rank", self.dt_rank, 1)
        _require_int("conv_width", self.conv_width, 1, 4)
        if self.channel_to_group is not None:
            _require(len(self.channel_to_group) == self.d_inner, "len(channel_to_group)",
                     len(self.channel_to_group), f"d_inner = {self.d_inner}")
            for group in self.channel_to_group:
                _require_int("channel_to_group", group, 0)

    @property
    def ngroups(self) -> int:                           # G
        return 1 if self.channel_to_group is None else max(self.channel_to_group) + 1

    @property
    def conv_channels(self) -> int:
        return self.d_inner

    @property
    def in_proj_rows(self) -> int:
        return 2 * self.d_inner

    @property
    def out_proj_columns(self) -> int:
        return self.d_inner

    @property
    def x_proj_rows(self) -> int:
        return self.dt_rank + 2 * self.ngroups * self.dstate

    @property
    def state_elements(self) -> int:
        return self.d_inner * self.dstate


@dataclass(frozen=True)
class SSDLayout:
    """The shape of one compacted Mamba-2 layer.

    head_to_group[h] is the B/C group that head h reads; groups may serve any number of
    heads. norm_segments covers the d_inner channels in order; empty means no gated norm.
    row_padding counts zero rows at the end of in_proj: they keep vector loads legal and
    are never seen by the maths. mlp_channels stand beside the SSM (d_ssm < d_inner in mamba_ssm):
    their gate and value come first in in_proj, the gated value first in out_proj.
    """

    kind: ClassVar[str] = "ssd"
    headdim: int                                        # P
    dstate: int                                         # N
    ngroups: int                                        # G
    head_to_group: tuple[int, ...]                      # length H, values in [0, G)
    norm_segments: tuple[NormSegment, ...] = ()
    conv_width: int = 4                                 # W
    row_padding: int = 0
    mlp_channels: int = 0

    def __post_init__(self) -> None:
        _require_int("headdim", self.headdim, 1, 256)
        _require_int("dstate", self.dstate, 1, 256)
        _require_int("ngroups", self.ngroups, 1)
        _require_int("conv_width", self.conv_width, 1, 4)
        _require_int("row_padding", self.row_padding, 0)
        _require_int("mlp_channels", self.mlp_channels, 0)
        _require(len(self.head_to_group) > 0, "head_to_group", self.head_to_group, "at least one head")
        for group in self.head_to_group:
            _require_int("head_to_group", group, 0, self.ngroups - 1)
        _require_cover(self.norm_segments, self.d_inner)

    @property
    def nheads(self) -> int:                            # H
        return len(self.head_to_group)

    @property
    def d_inner(self) -> int:                           # H * P
        return self.nheads * self.headdim

    @property
    def conv_channels(self) -> int:                     # x, B, C
        return self.d_inner + 2 * self.ngroups * self.dstate

    @property
    def in_proj_rows(self) -> int:                      # MLP gate and value, z, x, B, C, dt, padding
        return (2 * self.mlp_channels + 2 * self.d_inner + 2 * self.ngroups * self.dstate + self.nheads
                + self.row_padding)

    @property
    def out_proj_columns(self) -> int:                  # MLP, y
        return self.mlp_channels + self.d_inner

    @property
    def state_elements(self) -> int:
        return self.d_inner * self.dstate


@dataclass(frozen=True)
class RemovedSSM:
    """A layer whose state-space part is gone: y = D * silu(conv(x)), gated and normalised as before.

    One gain D per head of headdim channels; a Mamba-1 layer has headdim 1. No B, C, dt, no state.
    Without a gated norm between them D can live in out_proj: gain is False then.
    """

    kind: ClassVar[str] = "removed_ssm"
    nheads: int                                         # H
    headdim: int                                        # P
    norm_segments: tuple[NormSegment, ...] = ()
    conv_width: int = 4                                 # W
    mlp_channels: int = 0
    gain: bool = True

    def __post_init__(self) -> None:
        _require_int("nheads", self.nheads, 1)
        _require_int("headdim", self.headdim, 1, 256)
        _require_int("conv_width", self.conv_width, 1, 4)
        _require_int("mlp_channels", self.mlp_channels, 0)
        _require(isinstance(self.gain, bool), "gain", self.gain, "true or false")
        _require(self.gain or not self.norm_segments, "gain", self.gain, "true where there is a gated norm")
        _require_cover(self.norm_segments, self.d_inner)

    @property
    def d_inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def conv_channels(self) -> int:
        return self.d_inner

    @property
    def in_proj_rows(self) -> int:                      # MLP gate and value, z, x
        return 2 * self.mlp_channels + 2 * self.d_inner

    @property
    def out_proj_columns(self) -> int:
        return self.mlp_channels + self.d_inner

    @property
    def state_elements(self) -> int:
        return 0


@dataclass(frozen=True)
class RemovedBlock:
    """A block that is gone, its norm too: the residual passes unchanged. Its index stays taken."""

    kind: ClassVar[str] = "removed_block"

    @property
    def state_elements(self) -> int:
        return 0


LayerLayout = ScanLayout | SSDLayout | RemovedSSM | RemovedBlock
# Fields that the first files did not have, and what those files meant.
_ADDED: dict[str, dict[str, Any]] = {"ssd": {"mlp_channels": 0}, "removed_ssm": {"mlp_channels": 0, "gain": True}}
_KINDS = {cls.kind: cls for cls in (ScanLayout, SSDLayout, RemovedSSM, RemovedBlock)}


def _require_cover(segments: tuple[NormSegment, ...], channels: int) -> None:
    total = sum(segment.channels for segment in segments)
    _require(not segments or total == channels, "sum of norm_segments channels", total, f"d_inner = {channels}")


def layout_to_json(layout: LayerLayout) -> dict[str, Any]:
    """The layout as plain JSON values, with its kind."""
    return {"kind": layout.kind, **asdict(layout)}


def layout_from_json(data: dict[str, Any]) -> LayerLayout:
    """The inverse of `layout_to_json`; unknown kinds, unknown and missing fields raise LayoutError."""
    _require(isinstance(data, dict), "layout", data, "an object")
    values = dict(data)
    kind = values.pop("kind", None)
    _require(kind in _KINDS, "kind", kind, f"one of {sorted(_KINDS)}")
    cls = _KINDS[kind]
    names = [field.name for field in fields(cls)]
    values = _ADDED.get(kind, {}) | values
    _require(sorted(values) == sorted(names), f"fields of a {kind} layout", sorted(values), str(sorted(names)))
    for name in ("head_to_group", "channel_to_group"):
        if values.get(name) is not None:
            _require(isinstance(values[name], list), name, values[name], "a list of integers")
            values[name] = tuple(values[name])
    if "norm_segments" in values:
        try:
            values["norm_segments"] = tuple(NormSegment(**segment) for segment in values["norm_segments"])
        except TypeError as error:
            raise LayoutError(f"norm_segments is {values['norm_segments']!r}; "
                              "accepted: a list of {channels, eps}") from error
    return cls(**values)
