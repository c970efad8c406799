"""lineage: the way of a sample through the line, forth and back, and out of it where it may not stay."""
