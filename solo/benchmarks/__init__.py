"""Scorers of one answer format; specs name a function in here."""
