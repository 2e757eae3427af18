"""From raw text to packed batches: readers, shards, prepare, cache, pack, loader. Never imports the model."""
