"""Text to token ids and back: one small interface over byte-level BPE, characters, SentencePiece and tiktoken."""
