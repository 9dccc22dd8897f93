"""The demo: the small keypad corpus and the three runs over it.

Only what `cpsp-dist demo` needs belongs here.
"""
