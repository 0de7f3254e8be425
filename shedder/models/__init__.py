"""One adapter per model family: which slices each cut means, and which checkpoints it can be read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shedder.models import mamba1, mamba2
from shedder.models.family import CheckpointError, Family, Source
from shedder.models.sections import Sections

FAMILIES: dict[str, Family] = {adapter.name: adapter for adapter in (mamba1.FAMILY, mamba2.FAMILY)}


def family(name: str) -> Family:
    """The adapter of ModelConfig.family."""
    if name not in FAMILIES:
        raise ValueError(f"family is {name!r}; accepted: one of {tuple(FAMILIES)}")
    return FAMILIES[name]


def find_source(config: Mapping[str, Any]) -> tuple[Family, Source]:
    """The family and format of a foreign checkpoint, from its config.json."""
    for adapter in FAMILIES.values():
        for source in adapter.sources:
            if source.recognises(config):
                return adapter, source
    accepted = ("format \"shedder\"; model_type \"mamba\" or \"mamba2\" (transformers); "
                "d_model, n_layer and ssm_cfg with layer Mamba1 or Mamba2 (mamba_ssm)")
    if "model_type" in config:
        came = f"model_type is {config['model_type']!r}"
    elif "format" in config:
        came = f"format is {config['format']!r}"
    elif isinstance(config.get("ssm_cfg"), Mapping) and "layer" in config["ssm_cfg"]:
        came = f"ssm_cfg.layer is {config['ssm_cfg']['layer']!r}"
    else:
        came = f"the keys are {sorted(config)[:12]}"
    raise CheckpointError(f"config.json: {came}; accepted: {accepted}")


__all__ = ["FAMILIES", "CheckpointError", "Family", "Sections", "Source", "family", "find_source"]
