"""A trained model at work: exported as a folder, loaded again, and what it predicts for videos, features and shards.

What only a trained model needs belongs here; how good it is on a split is `training.evaluate`'s to say.
"""
