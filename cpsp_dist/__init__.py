"""CPSP-dist: distributed training for audio-visual event localization."""

__version__ = "0.1.0"
