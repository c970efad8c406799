"""bench: parts of the line measured against a reference, both in one run."""
