"""The whole probe: the update, the sweep, the slope, the report."""
