"""The objectives of the paper, and the pool of videos that the video-level objective compares with.

Functions of model outputs and labels belong here; nothing here knows of engines or files.
"""
