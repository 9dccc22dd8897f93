"""From videos to features: decoding, encoders, and what makes an interrupted extraction complete.

What reads frames or sound, or computes features from them, belongs here; a trained model's predictions do not.
"""
