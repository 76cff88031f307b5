"""One process per rank: the step loop, the engines, text, KV pool."""
