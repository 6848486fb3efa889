"""What lets a run live through what happens to runs."""
