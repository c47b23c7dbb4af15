"""Named runs: typed dataclass values, no logic."""
