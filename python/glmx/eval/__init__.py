"""Measurements of a model on given data."""
