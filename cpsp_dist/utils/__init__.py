"""Helpers without knowledge of the domain, each for one thing.

What several packages need belongs here; nothing here imports another package of cpsp_dist.
"""
