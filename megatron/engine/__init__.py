"""The seam to DeepSpeed: the only package, with launch, that imports it."""
