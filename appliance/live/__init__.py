"""The asyncio shell: node, workers, slabs, tokenising, streams. Never loads torch."""
