"""Mixers, blocks and language models with a layout per layer."""

from shedder.nn.block import Block, build_block
from shedder.nn.config import FAMILIES, ModelConfig
from shedder.nn.generation import DecodeGraph, decode_graph, generate
from shedder.nn.mixer import Mixer
from shedder.nn.model import LanguageModel
from shedder.nn.removed import PassThrough
from shedder.nn.state import LayerState, ModelState

__all__ = ["FAMILIES", "Block", "DecodeGraph", "LanguageModel", "LayerState", "Mixer", "ModelConfig", "ModelState",
           "PassThrough", "build_block", "decode_graph", "generate"]
