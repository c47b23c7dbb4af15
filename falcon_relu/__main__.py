"""`python -m falcon_relu`: the same as the `falcon-relu` command."""

import sys

from falcon_relu.cli import main

sys.exit(main())
