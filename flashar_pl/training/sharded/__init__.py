"""Training on sharded parameters (FSDP2)."""
