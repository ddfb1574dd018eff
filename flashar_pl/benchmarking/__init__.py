"""Measuring: time and memory of decoding and training."""
