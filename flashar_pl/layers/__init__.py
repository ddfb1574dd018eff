"""Transformer blocks, rotary embeddings and the key/value cache."""
