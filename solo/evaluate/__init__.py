"""evaluate: a checkpoint's answers to a benchmark, and their score."""
