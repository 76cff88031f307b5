"""Pure state and mechanism: no clock, no socket, no tensor, no global random generator."""
