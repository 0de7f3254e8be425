"""Reads the pruning_config.json of Mamba-Shedder (Munoz et al., 2025).

Its removed SSM is y = x; ours keeps the gain, y = D x, or fits one (repairs=("gain",)).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shedder.prune.layer_plan import LayerPlan, PlanError, indices
from shedder.prune.plan import Plan

CUTS = {"pruned_mamba_block_idx": "block", "pruned_ssm_idx": "ssm"}


def is_mamba_shedder(data: Any) -> bool:
    """Whether parsed JSON looks like a pruning_config.json."""
    return isinstance(data, Mapping) and bool(data) and all(str(key).startswith("pruned_") for key in data)


def from_mamba_shedder(source: str | os.PathLike[str] | Mapping[str, Any], family: str) -> Plan:
    """The plan that removes the same blocks and SSMs from a model of `family`.

    The order of removal is kept in provenance, since every prefix of it is a plan too.

    Raises:
        PlanError: it is no such file, or removes what Mamba-1 and Mamba-2 models do not have.
    """
    data, where = source, "pruning_config"
    if not isinstance(source, Mapping):
        where = str(source)
        try:
            data = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{where}: cannot be read as a pruning_config.json: {error}") from error
    if not is_mamba_shedder(data):
        raise PlanError(f"{where}: is not a pruning_config.json; accepted: an object with some of {list(CUTS)}")
    assert isinstance(data, Mapping)
    layers: dict[int, LayerPlan] = {}
    for key, value in data.items():
        if key not in CUTS:
            if value:
                raise PlanError(f"{where}: {key} is {value}; accepted for a {family} model: {' and '.join(CUTS)}")
            continue
        for index in indices(key, value):
            if index in layers:
                raise PlanError(f"{where}: {key} lists layer {index}, whose {layers[index]} goes already")
            layers[index] = LayerPlan.from_json({CUTS[key]: True})
    return Plan(family, layers, provenance={"method": "Mamba-Shedder", "order": {
        CUTS[key]: list(value) for key, value in data.items() if key in CUTS and value}})
