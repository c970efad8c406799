"""The work: specs, parts, model and trainer. Nothing here knows Prefect."""
