"""curate: which samples a stage sees and how often, in DuckDB."""
