"""`python -m train`: the same as `falcon-relu train`."""

import sys

from train.processes import signals

signals.catch()

from falcon_relu.cli import main  # noqa: E402  (from here on signals are noted)

sys.exit(main(["train", *sys.argv[1:]]))
