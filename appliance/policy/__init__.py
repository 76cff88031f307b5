"""One file per published algorithm; pure."""
