"""One rule for each kind of operation: exact increments, power series, nested forward mode."""
