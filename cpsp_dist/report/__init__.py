"""Pages about runs: one self-contained HTML file each, for a browser without a network.

The base that all pages share (`page.py`, which knows no runs), and what is worked out for each page belong here.
"""
