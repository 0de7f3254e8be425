"""What checkpoints of state-spaces (mamba_ssm) share: config.json with d_model, n_layer, ssm_cfg."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shedder.models.family import CheckpointError, read, require

NORM_EPS = 1e-5                                         # not in the config: mamba_ssm has it in code

# Settings of the mixers that change how a model starts or which kernel runs, not what it computes.
NO_MATTER = frozenset({"layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_init",
                       "A_init_range", "use_fast_path", "use_mem_eff_path", "chunk_size", "layer_idx",
                       "process_group", "sequence_parallel"})


def is_state_spaces(config: Mapping[str, Any], layer: str) -> bool:
    if "model_type" in config or not {"d_model", "n_layer"} <= set(config):
        return False
    ssm = config.get("ssm_cfg") or {}
    return isinstance(ssm, Mapping) and ssm.get("layer", "Mamba1") == layer


def shared_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that do not depend on the mixer."""
    require(config, "d_intermediate", 0, (0,))
    require(config, "rms_norm", True, (True,))
    if config.get("attn_layer_idx"):
        raise CheckpointError(f"config.json: attn_layer_idx is {config['attn_layer_idx']!r}; accepted: an empty list "
                              "(attention layers are not supported)")
    vocab, multiple = read(config, "vocab_size", int, 50277), read(config, "pad_vocab_size_multiple", int, 8)
    return {"d_model": read(config, "d_model", int), "vocab_size": -(-vocab // multiple) * multiple,
            "norm_eps": NORM_EPS, "tie_embeddings": read(config, "tie_embeddings", bool, True),
            "residual_in_fp32": read(config, "residual_in_fp32", bool, True)}


def ssm_config(config: Mapping[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    """ssm_cfg, after refusing settings that mean a model other than the one built here."""
    ssm = config.get("ssm_cfg") or {}
    unknown = sorted(set(ssm) - known - NO_MATTER)
    if unknown:
        raise CheckpointError(f"config.json: ssm_cfg.{unknown[0]} is not known; accepted: {sorted(known | NO_MATTER)}")
    return ssm


def rename(name: str) -> str:
    return name                                         # ours are mamba_ssm's names
