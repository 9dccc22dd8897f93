#!/usr/bin/env python3
"""Pack features into shards: the same as `cpsp-dist shards pack`."""

import sys

from cpsp_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", "pack", *sys.argv[1:]]))
