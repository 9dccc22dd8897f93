"""What a sample is and where it lies: manifest, batch, cache of remote files, and the reader of shards.

What reads shards belongs here; `cpsp_dist.packing` writes them, and nothing here knows of training.
"""
