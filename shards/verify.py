#!/usr/bin/env python3
"""Read every byte of a folder of shards against its manifest: the same as `cpsp-dist shards verify`."""

import sys

from cpsp_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", "verify", *sys.argv[1:]]))
