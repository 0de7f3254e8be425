"""How many parameters, how much decode state and how many flops a model has: closed formulas of its layouts."""

from __future__ import annotations

from shedder import limits
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
    count += config.d_model * layout.out_proj_columns + (config.d_model if config.proj_bias else 0)     # out_proj
    count += layout.conv_channels * (layout.conv_width + (1 if config.conv_bias else 0))
    if isinstance(layout, ScanLayout):
        count += layout.x_proj_rows * inner
        count += inner * layout.dt_rank + inner                               # dt_proj and its bias
        return count + inner * layout.dstate + inner                          # A_log, D
    if not isinstance(layout, RemovedSSM) or layout.gain:
        count += inner if config.d_has_hdim else layout.nheads                # D
    count += inner if layout.norm_segments else 0                             # gated norm
    return count if isinstance(layout, RemovedSSM) else count + 2 * layout.nheads            # A_log, dt_bias


def parameter_count(config: ModelConfig, *, padding: bool = True) -> int:
    """Parameters of a LanguageModel of this config; tied embeddings count once."""
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    return embeddings + config.d_model + sum(layer_parameters(config, layout, padding=padding)
                                             for layout in config.layers)


def layer_state_bytes(layout: LayerLayout, *, ssm_bytes: int = 4, conv_bytes: int = 4) -> int:
    """Decode state of one layer for one sequence: SSM states, and the last W-1 inputs of each conv channel."""
    if isinstance(layout, RemovedBlock):
        return 0
    return layout.state_elements * ssm_bytes + layout.conv_channels * (layout.conv_width - 1) * conv_bytes


def state_bytes(config: ModelConfig, *, ssm_bytes: int = 4, conv_bytes: int = 4) -> int:
    """Bytes of decode state per sequence."""
    return sum(layer_state_bytes(layout, ssm_bytes=ssm_bytes, conv_bytes=conv_bytes) for layout in config.layers)


SCAN_FLOPS = 6                      # of one state of one channel: dt A, times h, plus dt x times B, times C, added up


def layer_flops(config: ModelConfig, layout: LayerLayout, *, padding: bool = True) -> int:
    """Flops of one block for one token of a prefill: its products, its convolution and its recurrence.

    SSD counts in its matrix form, at the chunk that limits.py takes. padding as in layer_parameters.
    """
    if isinstance(layout, RemovedBlock):
        return 0
    rows = layout.in_proj_rows
    if isinstance(layout, SSDLayout) and not padding:
        rows -= layout.row_padding
    count = 2 * config.d_model * (rows + layout.out_proj_columns) + 2 * layout.conv_channels * layout.conv_width
    if isinstance(layout, ScanLayout):
        count += 2 * layout.d_inner * (layout.x_proj_rows + layout.dt_rank)
        count += SCAN_FLOPS * layout.d_inner * layout.dstate
    elif isinstance(layout, SSDLayout):
        shape = {"B": 1, "L": limits.CHUNK, "H": layout.nheads, "P": layout.headdim, "N": layout.dstate,
                 "G": layout.ngroups}
        count += round(limits.ssd(shape).flops / limits.CHUNK)
    return count


def flops(config: ModelConfig) -> int:
    """Flops for one token of a prefill, the head included."""
    return (2 * config.vocab_size * config.d_model
            + sum(layer_flops(config, layout) for layout in config.layers))
