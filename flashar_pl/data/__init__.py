"""Code shards: format, order, loaders, the Lightning DataModule, and the embedded data set."""
