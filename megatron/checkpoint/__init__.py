"""Layout-independent checkpoints: logical tensors in safetensors files with one manifest, any layout in and out."""

from megatron.checkpoint.find import CheckpointPath, candidates, find
from megatron.checkpoint.piece import Piece
from megatron.checkpoint.reader import Reader, open_checkpoint
from megatron.checkpoint.save import Retention, Saved, save

__all__ = [
    "CheckpointPath",
    "Piece",
    "Reader",
    "Retention",
    "Saved",
    "candidates",
    "find",
    "open_checkpoint",
    "save",
]
