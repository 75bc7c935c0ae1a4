"""The ends of what is supported, proved: `make matrix`."""
