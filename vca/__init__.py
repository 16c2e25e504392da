"""The network: Visual-Contrast Attention, its controls, and the adaLN-Zero transformer that DiT and SiT share.

Imports torch only and is usable alone: `from vca import VisualContrastAttention`.
"""

from vca.attention import AgentAttention, Differential, VisualContrastAttention, lambda_init
from vca.baseline import DifferentialAttention, LinearAttention, SelfAttention
from vca.embedding import LabelEmbedding, TimestepEmbedding, sincos_2d
from vca.maps import Maps, Streams, contrast_layers, keep_inputs, maps_of, streams_of
from vca.registry import (
    annotations_of,
    check_type,
    create,
    defaults_of,
    describe_type,
    lookup,
    members_of,
    nearest,
    options_of,
)
from vca.transformer import ATTENTIONS, SIZES, Transformer, before_joint, parse_size, resolved_attention
from vca.types import Generator, Model, Predict, Sampler

__all__ = [
    "ATTENTIONS",
    "SIZES",
    "AgentAttention",
    "Differential",
    "DifferentialAttention",
    "Generator",
    "LabelEmbedding",
    "LinearAttention",
    "Maps",
    "Model",
    "Predict",
    "Sampler",
    "SelfAttention",
    "Streams",
    "TimestepEmbedding",
    "Transformer",
    "VisualContrastAttention",
    "annotations_of",
    "before_joint",
    "check_type",
    "contrast_layers",
    "create",
    "defaults_of",
    "describe_type",
    "keep_inputs",
    "lambda_init",
    "lookup",
    "maps_of",
    "members_of",
    "nearest",
    "options_of",
    "parse_size",
    "resolved_attention",
    "sincos_2d",
    "streams_of",
]
