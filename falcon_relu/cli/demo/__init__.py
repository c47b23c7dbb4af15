"""`falcon-relu demo`: the command, its stages, and its report."""
