"""Repairs: new values for what stays, so that it makes up for what goes.

The first three are made in the dense shapes, where units still have their numbers; what remains is slicing. The others
are fitted on what the compacted block does behind the residual stream of the dense model.

    norm     weights of a norm that loses channels (Plan.norm_repair)
    gain     D of a removed SSM: the factor of x that comes nearest to y
    x_proj   Mamba-1: least squares from the channels that stay to what x_proj gave; a lower rank of dt is then the
             best one for these activations
    dt_bias  Mamba-1: each channel's dt gets back the mean that it had, where that helps the block
    out_proj least squares from what the compacted layer feeds it to what the dense block gave
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout
from shedder.nn import Mixer
from shedder.nn.block import Block
from shedder.nn.config import ModelConfig
from shedder.nn.mamba1 import Mamba1Mixer
from shedder.prune.kept import Kept, compacted_layout, kept_segments, rest
from shedder.prune.layer_plan import LayerPlan, PlanError
from shedder.prune.plan import Plan
from shedder.prune.statistics import DenseStatistics, LayerStatistics

_NOT_MEASURED = "repairs lists {0}, the statistics were taken without it; accepted: dense_statistics(..., repairs)"
NEWTON_STEPS = 12                   # of the bias of dt
# What pulls a refit towards the old weights, as a share of the mean square of its inputs. That of out_proj falls with
# the text, 3 columns / tokens: near the best on the shipped models from 256 to 8192 tokens, while 1e-4 fits 1024 so
# well that the model becomes worse than it was. x_proj, which feeds few rows, does not care.
RIDGE = 1e-4
OUT_RIDGE = 3.0


def put_in(tensors: Mapping[str, Tensor], config: ModelConfig, index: int, plan: Plan,
           statistics: DenseStatistics | None) -> dict[str, Tensor]:
    """The tensors of block `index`, in their shapes, with the values that the plan's slices are to have."""
    layer = None if _checked(plan, statistics) is None else statistics.layers[index]         # type: ignore[union-attr]
    cut, layout = plan.layers.get(index, LayerPlan()), config.layers[index]
    repaired = dict(tensors)
    if plan.d_model:
        _scale(repaired, "norm.weight", _stream_factor(plan, config, None if layer is None else layer.stream))
    if cut.empty:
        return repaired
    kept = Kept.of(layout, cut)
    if "mixer.norm.weight" in repaired:
        _scale(repaired, "mixer.norm.weight", _gated_factors(plan, layout, kept, layer))
    if cut.ssm and "gain" in plan.repairs:
        assert layer is not None and layer.gain is not None
        repaired["mixer.D"] = layer.gain.to(repaired["mixer.D"])
    after = compacted_layout(layout, cut, plan.norm_repair)
    assert not isinstance(layout, RemovedBlock)
    if isinstance(after, RemovedSSM) and not after.gain and "mixer.D" in repaired:
        _fold_gain(repaired, layout.d_inner)
    if isinstance(after, ScanLayout):
        _repair_scan(repaired, plan, cut, kept, layer)
    return repaired


def put_in_outside(tensors: Mapping[str, Tensor], config: ModelConfig, plan: Plan,
                   statistics: DenseStatistics | None) -> dict[str, Tensor]:
    """The same for the tensors outside the blocks: the norm before the head may lose channels."""
    repaired = dict(tensors)
    if plan.d_model:
        stream = None if _checked(plan, statistics) is None else statistics.stream            # type: ignore[union-attr]
        _scale(repaired, "backbone.norm_f.weight", _stream_factor(plan, config, stream))
    return repaired


def _checked(plan: Plan, statistics: DenseStatistics | None) -> DenseStatistics | None:
    if not plan.needs_statistics:
        return None
    if statistics is None:
        what = f"norm_repair {plan.norm_repair!r}" if plan.norm_repair == "stats" else f"repairs {list(plan.repairs)}"
        raise PlanError(f"{what} needs calibration text, none was given; accepted: calibration=..., or norm_repair "
                        "'exact' or 'none' without repairs")
    return statistics


def _scale(tensors: dict[str, Tensor], name: str, factors: Tensor | float) -> None:
    factors = factors.to(tensors[name].device) if isinstance(factors, Tensor) else factors
    tensors[name] = (tensors[name].double() * factors).to(tensors[name].dtype)


# ---- norms

def _factor(norm_repair: str, kept: Sequence[int], every: Sequence[int], squares: Tensor | None) -> float:
    """Of the weights of a norm over channels `every` that keeps the channels `kept`."""
    if norm_repair == "none" or len(kept) == len(every):
        return 1.0
    if norm_repair == "exact":
        return (len(every) / len(kept)) ** 0.5
    assert squares is not None
    whole = squares[list(every)].mean()
    return float((squares[list(kept)].mean() / whole).sqrt()) if whole > 0 else 1.0


def _stream_factor(plan: Plan, config: ModelConfig, squares: Tensor | None) -> float:
    if plan.norm_repair == "exact":                    # ModelConfig.norm_scale has it
        return 1.0
    return _factor(plan.norm_repair, rest(config.d_model, plan.d_model), range(config.d_model), squares)


def _gated_factors(plan: Plan, layout: LayerLayout, kept: Kept, layer: LayerStatistics | None) -> Tensor:
    """One factor per channel of the gated norm, 1 for those that go."""
    assert not isinstance(layout, (ScanLayout, RemovedBlock))
    factors = torch.ones(layout.d_inner, dtype=torch.float64)
    stays = {stay[0]: stay for _, stay in kept_segments(layout, kept, plan.norm_repair)}
    start = 0
    for segment in layout.norm_segments:
        every = range(start, start + segment.channels)
        start += segment.channels
        stay = next((stay for first, stay in stays.items() if first in every), ())
        if stay:
            factors[list(stay)] = _factor(plan.norm_repair, stay, every, None if layer is None else layer.gated)
    return factors


# ---- removed SSMs

def _fold_gain(tensors: dict[str, Tensor], channels: int) -> None:
    """Without a norm between them, D x silu(z) times out_proj is x silu(z) times out_proj with D in its columns."""
    weight, D = tensors["mixer.out_proj.weight"], tensors["mixer.D"].double()
    columns = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    columns[-channels:] = D.repeat_interleave(channels // D.numel())          # the MLP stands before
    _scale(tensors, "mixer.out_proj.weight", columns)


# ---- x_proj and dt of Mamba-1

def _repair_scan(tensors: dict[str, Tensor], plan: Plan, cut: LayerPlan, kept: Kept,
                 layer: LayerStatistics | None) -> None:
    old_x, old_dt = tensors["mixer.x_proj.weight"].double(), tensors["mixer.dt_proj.weight"].double()
    units = torch.tensor(kept.units, device=old_x.device)
    new_x, new_dt = old_x[:, units], old_dt
    moment = None
    if "x_proj" in plan.repairs:
        if layer is None or layer.x_moment is None:
            raise PlanError(_NOT_MEASURED.format("x_proj"))
        moment = _ridged(layer.x_moment[units][:, units])
        lost = (old_x @ layer.x_moment)[:, units] - new_x @ layer.x_moment[units][:, units]
        new_x = new_x + torch.linalg.solve(moment, lost, left=False)
    ranks = old_dt.shape[1]
    if cut.ranks:
        new_dt, new_rows = _low_rank(old_dt[units], new_x[:ranks], kept.ranks, moment)
        new_x = torch.cat([new_rows, new_x[ranks:]])
        new_dt = torch.zeros_like(old_dt).index_copy(0, units, new_dt)
    tensors["mixer.x_proj.weight"] = torch.zeros_like(old_x).index_copy(1, units, new_x).to(
        tensors["mixer.x_proj.weight"])
    tensors["mixer.dt_proj.weight"] = new_dt.to(tensors["mixer.dt_proj.weight"])


def _low_rank(left: Tensor, right: Tensor, rank: int, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of the shapes of left (D, R) and right (R, K), zero beyond `rank`, with the nearest product.

    Nearest for inputs with this second moment (K, K), or all inputs alike. SVD of the product through the
    QR factors of both, so nothing larger than (R, R) is decomposed.
    """
    lower = None if moment is None else torch.linalg.cholesky(moment)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr((right if lower is None else right @ lower).mT)
    u, s, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    new_left, new_right = torch.zeros_like(left), torch.zeros_like(right)
    new_left[:, :rank] = q_left @ u[:, :rank] * root
    rows = root[:, None] * (v[:rank] @ q_right.mT)
    new_right[:rank] = rows if lower is None else torch.linalg.solve_triangular(lower, rows, upper=False, left=False)
    return new_left, new_right


def _ridged(moment: Tensor, share: float = RIDGE) -> Tensor:
    """moment plus a share of its mean diagonal."""
    level = moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    return moment + share * level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


# ---- dt_bias and out_proj, behind the residual stream

@torch.no_grad()
def refit(dense: nn.Module, compacted: nn.Module, index: int, plan: Plan, statistics: DenseStatistics | None) -> None:
    """Where the plan asks for them, a new bias of dt and new out_proj weights of the compacted block, in place."""
    asked = [name for name in ("dt_bias", "out_proj") if name in plan.repairs]
    if not asked or not isinstance(dense, Block):
        return
    assert isinstance(compacted, Block) and statistics is not None
    layer = statistics.layers[index]
    if layer is None or not layer.inputs:
        raise PlanError(_NOT_MEASURED.format(asked[0]))
    stays = torch.tensor(rest(dense.norm.weight.numel(), plan.d_model), device=dense.norm.weight.device)
    if "dt_bias" in asked and isinstance(dense.mixer, Mamba1Mixer) and isinstance(compacted.mixer, Mamba1Mixer):
        units = Kept.of(dense.mixer.layout, plan.layers.get(index, LayerPlan())).units
        _fit_dt_bias(dense, compacted, torch.tensor(units, device=stays.device), stays, layer.inputs)
    if "out_proj" in asked:
        _refit_out_proj(dense, compacted, stays, layer.inputs)


def _fit_dt_bias(dense: Block, compacted: Block, units: Tensor, stays: Tensor, inputs: Sequence[Tensor]) -> None:
    """The bias, of four, with which the block's output comes nearest to what it was.

    They are: the old one; the one that gives each channel's dt the mean that it had before the softplus; behind it; and
    half of that. Where the softplus is an exponential, the mean behind it hangs on the spread too, which falls with
    channels; but where it fell because rare directions of dt went, all other tokens would pay for that mean.
    """
    mixer = compacted.mixer
    assert isinstance(mixer, Mamba1Mixer)
    hidden = [compacted.norm(residual[..., stays].contiguous()) for residual in inputs]
    seen = [_seen(("dt", "out"), dense.mixer, dense.norm(residual)) for residual in inputs]
    old = torch.cat([_rows(one["dt"])[:, units] for one in seen])
    before = _before_softplus(torch.cat([_rows(_seen(("dt",), mixer, each)["dt"]) for each in hidden]))
    behind = torch.zeros_like(old[0])
    for _ in range(NEWTON_STEPS):                      # on the mean's logarithm
        mean, slope = F.softplus(before + behind).mean(0), torch.sigmoid(before + behind).mean(0)
        behind = behind - mean / slope * torch.log(mean / old.mean(0))
    bias = mixer.dt_proj.bias.detach().double()

    def error(shift: Tensor) -> float:
        mixer.dt_proj.bias.data = (bias + shift).to(mixer.dt_proj.bias.dtype)
        return sum((mixer(each).double() - one["out"][..., stays].double()).square().sum().item()
                   for each, one in zip(hidden, seen, strict=True))
    shifts = [torch.zeros_like(behind), (_before_softplus(old) - before).mean(0), behind, behind / 2]
    error(min(shifts, key=error))


def _rows(dt: Tensor) -> Tensor:
    """dt of Mamba-1, (B, D, L), as (tokens, channels)."""
    return dt.double().transpose(1, 2).flatten(0, 1)


def _before_softplus(dt: Tensor) -> Tensor:
    return dt + torch.log(-torch.expm1(-dt))


def _refit_out_proj(dense: Block, compacted: Block, stays: Tensor, inputs: Sequence[Tensor]) -> None:
    """Least squares from what the compacted mixer feeds its out_proj to what the dense one put out.

    OUT_RIDGE keeps directions that the text does not show at the old weights.
    """
    weight = compacted.mixer.out_proj.weight
    squares = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    errors = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    tokens = 0
    for residual in inputs:
        target = dense.mixer(dense.norm(residual))[..., stays]
        inner, out = _inner_and_out(compacted.mixer, compacted.norm(residual[..., stays].contiguous()))
        squares += inner.mT @ inner
        tokens += len(inner)
        errors += (target.double() - out.double()).flatten(0, 1).mT @ inner
    ridged = _ridged(squares, OUT_RIDGE * weight.shape[1] / tokens)
    weight.data = (weight.double() + torch.linalg.solve(ridged, errors, left=False)).to(weight.dtype)


def _inner_and_out(mixer: Mixer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What out_proj reads, (tokens, columns), and the mixer's output."""
    seen = _seen(("inner", "out"), mixer, hidden)
    return seen["inner"].double().flatten(0, 1), seen["out"]


def _seen(names: Sequence[str], mixer: Mixer, hidden: Tensor) -> dict[str, Tensor]:
    """What passes the mixer's probe by these names."""
    seen = {}

    def probe(name: str, value: Tensor) -> Tensor:
        if name in names:
            seen[name] = value
        return value
    before, mixer.probe = mixer.probe, probe
    try:
        mixer(hidden)
    finally:
        mixer.probe = before
    return seen
