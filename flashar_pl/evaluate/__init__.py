"""Samples against real images: drawing, features, references, metrics."""
