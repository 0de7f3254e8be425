"""The language model: embedding, blocks with a layout each, head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shedder.nn.block import Block, add_residual, build_block
from shedder.nn.config import ModelConfig
from shedder.nn.initialise import initialise
from shedder.nn.mixer import Mixer
from shedder.nn.norm import RMSNorm
from shedder.nn.precision import wide_dtype
from shedder.nn.state import ModelState
from shedder.ops import linear
from shedder.text import Tokenizer, load_tokenizer


class Backbone(nn.Module):
    """Holds the parameters under the names of checkpoints; LanguageModel runs them."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.embedding = nn.utils.skip_init(nn.Embedding, config.vocab_size, config.d_model, device=device,
                                            dtype=dtype)
        self.layers = nn.ModuleList(build_block(config, index, device, dtype) for index in range(len(config.layers)))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, config.norm_scale, device, dtype)


class LanguageModel(nn.Module):
    """A Mamba language model whose layers may all have different shapes.

    A new model has random parameters; with initialise=False they hold whatever the memory held,
    for a caller who writes them all. `tokenizer_name` ("bytes", or None when unknown or in
    tokenizer_folder), `plan` and `provenance` (JSON values) travel with checkpoints.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, *, initialise: bool = True) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.config = config
        self.backbone = Backbone(config, device, dtype)
        self.lm_head = nn.utils.skip_init(nn.Linear, config.d_model, 1 if config.tie_embeddings else config.vocab_size,
                                          bias=False, device=device, dtype=dtype)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
            self.lm_head.out_features = config.vocab_size
        if initialise:
            _initialise(self)
        self.tokenizer_name: str | None = None
        self.tokenizer_folder: Path | None = None
        self.plan: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}
        self._decode_graph: Any = None                  # generation's, see shedder.nn.generation

    @property
    def layers(self) -> nn.ModuleList:
        return self.backbone.layers

    @property
    def mixers(self) -> list[Mixer | None]:
        """One mixer per layer; None where the block is removed."""
        return [layer.mixer if isinstance(layer, Block) else None for layer in self.layers]

    @property
    def tokenizer(self) -> Tokenizer:
        """Encodes text for this model; raises ValueError when the model came without one."""
        if self.tokenizer_name is None and self.tokenizer_folder is None:
            raise ValueError("this model has no tokenizer: its folder held none; pass tokens instead of text")
        return load_tokenizer(self.tokenizer_folder, self.tokenizer_name)

    @property
    def device(self) -> torch.device:
        return self.backbone.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; A_log, D and dt_bias are never less than fp32."""
        return self.backbone.embedding.weight.dtype

    def allocate_state(self, batch: int, device: torch.device | str | None = None,
                       dtype: torch.dtype | None = None) -> ModelState:
        """A fresh state for `batch` sequences; dtype is that of the SSM states (default fp32, or fp64 as the model)."""
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch is {batch!r}; accepted: an integer >= 1")
        if device is not None and torch.device(device).type != self.device.type:
            raise ValueError(f"device is {device}; the model is on {self.device} and its state must be there too")
        accepted = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if dtype is not None and dtype not in accepted:
            raise ValueError(f"dtype is {dtype}; accepted: one of {accepted}")
        ssm_dtype = dtype or wide_dtype(self.dtype)
        return ModelState([None if mixer is None else mixer.allocate_state(batch, ssm_dtype)
                           for mixer in self.mixers], batch)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, d_model), the `hidden` of the first block (its residual is None)."""
        return F.embedding(input_ids, self.backbone.embedding.weight)

    def head(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Logits from what the last block returned."""
        residual = add_residual(hidden, residual, self.config.residual_in_fp32)
        return linear(self.backbone.norm_f(residual), self.lm_head.weight)

    def forward(self, input_ids: Tensor, state: ModelState | None = None, last_only: bool = False) -> Tensor:
        """Logits (B, L, V), or (B, 1, V) of the last token with last_only.

        Args:
            input_ids: (B, L) int64 or int32 tokens.
            state: continue after the tokens that it has seen, and update it in place; one token
                at a time takes the step kernels, and any split of a text gives the same logits.
        """
        self._check(input_ids, state)
        hidden, residual = self.embed(input_ids), None
        if state is None:
            for layer in self.backbone.layers:
                hidden, residual = layer(hidden, residual)
        else:
            for layer, layer_state in zip(self.backbone.layers, state.layers, strict=True):
                hidden, residual = layer(hidden, residual, layer_state)
        if last_only:
            hidden, residual = hidden[:, -1:], None if residual is None else residual[:, -1:]
        return self.head(hidden, residual)

    def _check(self, input_ids: Tensor, state: ModelState | None) -> None:
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; "
                             "accepted: int64 or int32, (batch, length) with length >= 1")
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"input_ids has values in [{low}, {high}]; accepted: [0, {self.config.vocab_size})")
        if state is not None and (state.batch != input_ids.shape[0] or len(state.layers) != len(self.layers)):
            raise ValueError(f"state is for batch {state.batch} and {len(state.layers)} layers; input_ids has batch "
                             f"{input_ids.shape[0]} and the model {len(self.layers)} layers")

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """See shedder.nn.generation.generate."""
        from shedder.nn.generation import generate
        return generate(self, input_ids, max_new_tokens, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write config.json and safetensors; see shedder.checkpoint.save_pretrained."""
        from shedder.checkpoint import save_pretrained  # the method is the user's way in; nn needs nothing above it
        save_pretrained(self, folder, **options)

    def _apply(self, fn, recurse=True):
        self._decode_graph = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decode_graph": None}


def _initialise(model: LanguageModel) -> None:
    # Tied weights are one tensor: the embedding's draw must be the last one.
    initialise(model, max(1, len(model.config.layers)))
    if model.config.tie_embeddings:
        with torch.no_grad():
            model.backbone.embedding.weight.normal_(std=0.02)
