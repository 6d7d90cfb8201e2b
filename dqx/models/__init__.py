"""Model families, written natively: `checkpoint.inspect` -> `checkpoint.load_weights` -> logits."""

from dqx.models.checkpoint import Checkpoint, CheckpointError, inspect, load_weights
from dqx.models.transformer import ROLES, SITES, Architecture, MaskedDiffusionTransformer

__all__ = [
    "ROLES",
    "SITES",
    "Architecture",
    "Checkpoint",
    "CheckpointError",
    "MaskedDiffusionTransformer",
    "inspect",
    "load_weights",
]
