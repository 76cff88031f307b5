"""What is asked of a server: specifications, arrivals, lengths, and the items made of them.

One specification serves the benchmark against a live server and the simulator. Everything follows
from (specification, rate, seconds, seed): no clock, no source of chance beside `draws`."""
