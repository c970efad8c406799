"""Measurements of one sample; specs name a function in here."""
