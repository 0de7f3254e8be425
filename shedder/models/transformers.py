"""What checkpoints of transformers' MambaForCausalLM and Mamba2ForCausalLM share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shedder.models.family import read, require


def shared_fields(config: Mapping[str, Any], *, vocab_size: int, hidden_size: int, tied: bool) -> dict[str, Any]:
    """The fields of ModelConfig that do not depend on the mixer; the keywords are the class's defaults."""
    require(config, "hidden_act", "silu", ("silu", "swish"))
    return {"d_model": read(config, "hidden_size", int, hidden_size),
            "vocab_size": read(config, "vocab_size", int, vocab_size),
            "norm_eps": float(read(config, "layer_norm_epsilon", (int, float), 1e-5)),
            "tie_embeddings": read(config, "tie_word_embeddings", bool, tied),
            "residual_in_fp32": read(config, "residual_in_fp32", bool, True),
            "conv_bias": read(config, "use_conv_bias", bool, True),
            "proj_bias": read(config, "use_bias", bool, False)}


def rename(name: str) -> str:
    return "backbone.embedding.weight" if name == "backbone.embeddings.weight" else name
