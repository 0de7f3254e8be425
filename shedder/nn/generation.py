"""Generation: prefill once, then one token at a time; on a GPU the step is a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shedder.nn.state import ModelState

if TYPE_CHECKING:
    from shedder.nn.model import LanguageModel

WARMUP_STEPS = 2                                        # before capture: lazy initialisation must not be captured


class DecodeGraph:
    """One decode step as a CUDA graph, with the state that it updates."""

    def __init__(self, model: LanguageModel, batch: int, state_dtype: torch.dtype | None = None) -> None:
        self.state = model.allocate_state(batch, dtype=state_dtype)
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._graph = torch.cuda.CUDAGraph()
        self.key = _graph_key(model, batch)
        with torch.no_grad():
            side = torch.cuda.Stream(model.device)
            side.wait_stream(torch.cuda.current_stream(model.device))
            with torch.cuda.stream(side):
                for _ in range(WARMUP_STEPS):
                    model(self._ids, self.state)
            torch.cuda.current_stream(model.device).wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._logits = model(self._ids, self.state)
            # The graph reads these by address; the mixers drop them when a parameter changes.
            self._constants = [mixer.constants() for mixer in model.mixers if mixer is not None]
        self.state.zero_()

    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, 1, V) after the tokens ids (B, 1); valid until the next step."""
        self._ids.copy_(ids)
        self._graph.replay()
        return self._logits


def _graph_key(model: LanguageModel, batch: int) -> tuple:
    """A captured step holds addresses of parameters, and constants derived from their values."""
    return (batch, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()))


def decode_graph(model: LanguageModel, batch: int) -> DecodeGraph:
    """The model's step for this batch; captured once, and again only when parameters have changed."""
    if model._decode_graph is None or model._decode_graph.key != _graph_key(model, batch):
        model._decode_graph = DecodeGraph(model, batch)
    return model._decode_graph


@torch.no_grad()
def generate(model: LanguageModel, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0,
             top_k: int | None = None, seed: int | None = None, eos_token_id: int | None = None,
             on_token: Callable[[Tensor], None] | None = None, graph: bool | None = None) -> Tensor:
    """Continue each prompt.

    Args:
        input_ids: (B, L) prompts of equal length.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        top_k: draw among the k likeliest tokens only.
        seed: of the draws; None takes the global generator.
        eos_token_id: ends a sequence; the rest of its row is filled with it, and generation stops when all ended.
        on_token: called with each new column of tokens, (B,).
        graph: replay decode steps as a CUDA graph (default: on CUDA, unless a probe is set).
    Returns:
        (B, L + new) prompts and new tokens.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; accepted: an integer >= 0")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature!r}; accepted: a number >= 0")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}; accepted: None or an integer >= 1")
    is_probed = any(mixer is not None and mixer.probe is not None for mixer in model.mixers)
    if graph and (model.device.type != "cuda" or is_probed):
        raise ValueError(f"graph is True; accepted only on CUDA without probes (device {model.device}, "
                         f"probes {'set' if is_probed else 'not set'})")
    use_graph = (model.device.type == "cuda" and not is_probed) if graph is None else graph
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    input_ids = input_ids.to(model.device)
    batch = input_ids.shape[0]
    if max_new_tokens == 0:
        return input_ids

    step: Callable[[Tensor], Tensor]
    if use_graph and max_new_tokens > 1:
        captured = decode_graph(model, batch)
        state, step = captured.state.zero_(), captured.step
    else:
        state = model.allocate_state(batch)
        step = _eager_step(model, state)
    logits = model(input_ids, state, last_only=True)
    columns = [input_ids]
    ended = torch.zeros(batch, dtype=torch.bool, device=model.device)
    for index in range(max_new_tokens):
        tokens = _choose(logits[:, -1], temperature, top_k, generator).to(input_ids.dtype)
        if eos_token_id is not None:
            tokens = tokens.masked_fill(ended, eos_token_id)
            ended |= tokens == eos_token_id
        columns.append(tokens[:, None])
        if on_token is not None:
            on_token(tokens)
        if index + 1 == max_new_tokens or (eos_token_id is not None and bool(ended.all())):
            break
        logits = step(tokens[:, None])
    return torch.cat(columns, dim=1)


def _eager_step(model: LanguageModel, state: ModelState) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids, state)


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of (B, V) logits."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
