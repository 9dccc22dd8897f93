"""`python -m cpsp_dist`: the console command, where its script is not on the path."""

import sys

from cpsp_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
