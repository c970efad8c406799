"""Wiring: Prefect flows and tasks around the parts in `solo`."""
