"""`python -m infer`: the same as `falcon-relu decode`."""

import sys

from falcon_relu.cli import main

sys.exit(main(["decode", *sys.argv[1:]]))
