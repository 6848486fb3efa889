"""Kernels behind plain tensor signatures: attention, norms, rotary positions, activations, chunked cross-entropy."""
