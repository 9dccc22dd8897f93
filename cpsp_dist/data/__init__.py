"""What a sample is and where it lies: manifest, batch, cache of remote files, and the reader of shards.

Shards are written by `cpsp_dist.packing`; nothing here knows of training.
"""
