"""One rule for each operation of torch: exact increments, power series, nested forward mode."""
