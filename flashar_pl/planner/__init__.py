"""Arithmetic of memory and time: what a model, a decoding job or a training run needs, before anything is allocated."""
