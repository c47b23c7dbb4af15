"""`python -m train`: the same as `falcon-relu train`."""

import sys

from falcon_relu.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
