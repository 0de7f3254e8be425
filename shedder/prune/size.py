"""How many parameters and how much decode state a model has: closed formulas of its layouts."""

from __future__ import annotations

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn.config import ModelConfig


def layer_parameters(config: ModelConfig, layout: LayerLayout, *, padding: bool = True) -> int:
    """Parameters of one block of this layout, the norm before it included.

    padding=False leaves out the zero rows that only align in_proj.
    """
    if isinstance(layout, RemovedBlock):
        return 0
    inner, rows = layout.d_inner, layout.in_proj_rows
    if isinstance(layout, SSDLayout) and not padding:
        rows -= layout.row_padding
    count = config.d_model                                                    # norm before the block
    count += rows * config.d_model + (rows if config.proj_bias else 0)        # in_proj
    count += config.d_model * inner + (config.d_model if config.proj_bias else 0)            # out_proj
    count += layout.conv_channels * (layout.conv_width + (1 if config.conv_bias else 0))
    if isinstance(layout, ScanLayout):
        count += layout.x_proj_rows * inner
        count += inner * layout.dt_rank + inner                               # dt_proj and its bias
        return count + inner * layout.dstate + inner                          # A_log, D
    count += inner if config.d_has_hdim else layout.nheads                    # D
    count += inner if layout.norm_segments else 0                             # gated norm
    return count if isinstance(layout, RemovedSSM) else count + 2 * layout.nheads            # A_log, dt_bias


def parameter_count(config: ModelConfig, *, padding: bool = True) -> int:
    """Parameters of a LanguageModel of this config; tied embeddings count once."""
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    return embeddings + config.d_model + sum(layer_parameters(config, layout, padding=padding)
                                             for layout in config.layers)


def state_bytes(config: ModelConfig, *, ssm_bytes: int = 4, conv_bytes: int = 4) -> int:
    """Bytes of decode state per sequence: SSM states, and the last W-1 inputs of each conv channel."""
    total = 0
    for layout in config.layers:
        if not isinstance(layout, RemovedBlock):
            total += layout.state_elements * ssm_bytes
            total += layout.conv_channels * (layout.conv_width - 1) * conv_bytes
    return total
