"""Decide what to remove from a model, and remove it."""

from shedder.prune.mamba_shedder import from_mamba_shedder, is_mamba_shedder
from shedder.prune.mask import masked
from shedder.prune.plan import LayerPlan, Plan, PlanError
from shedder.prune.scores import Scores, score
from shedder.prune.search import prefix, search, solve
from shedder.prune.size import parameter_count, state_bytes
from shedder.prune.slice import compact

__all__ = ["LayerPlan", "Plan", "PlanError", "Scores", "compact", "from_mamba_shedder", "is_mamba_shedder", "masked",
           "parameter_count", "prefix", "score", "search", "solve", "state_bytes"]
