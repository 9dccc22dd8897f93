"""Helpers without knowledge of the domain, each for one thing.

Nothing here imports another package of cpsp_dist; errors aside.
"""
