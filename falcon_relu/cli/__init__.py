"""The `falcon-relu` command: the one place that knows every package."""

from falcon_relu.cli.main import main

__all__ = ["main"]
