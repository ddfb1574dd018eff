"""Distances between image sets, their features, and GenEval."""
