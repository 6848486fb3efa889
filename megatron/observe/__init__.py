"""What a run tells the world: metrics to every sink, progress on the console, speed, memory, plots."""
