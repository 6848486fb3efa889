"""What a run minimises. Each objective gives a sum and a count; only the engine rescales."""
