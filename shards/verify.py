#!/usr/bin/env python3
"""Read every byte of a folder of shards against its manifest: the same as `cpsp-dist shards verify`."""

import sys

from cpsp_dist.cli import main

sys.exit(main(["shards", "verify", *sys.argv[1:]]))
