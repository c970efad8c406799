"""Readers of published layouts, one module per layout; specs name a function in here."""
