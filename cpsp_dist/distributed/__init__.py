"""Ranks as one group: discovery, collectives, heartbeat and signals.

The failure protocol of ranks belongs here; nothing here knows of models or data.
"""
