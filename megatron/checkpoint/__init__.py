"""Layout-independent checkpoints: logical tensors in safetensors files with one manifest, any layout in and out."""

from megatron.checkpoint.find import CheckpointPath, candidates, find
from megatron.checkpoint.location import Location, local_folder, location
from megatron.checkpoint.piece import Piece
from megatron.checkpoint.reader import Reader, open_checkpoint
from megatron.checkpoint.retention import Retention, Verified
from megatron.checkpoint.save import Saved, save

__all__ = [
    "CheckpointPath",
    "Location",
    "Piece",
    "Reader",
    "Retention",
    "Saved",
    "Verified",
    "candidates",
    "find",
    "local_folder",
    "location",
    "open_checkpoint",
    "save",
]
