"""What a person reads. Reads only."""
