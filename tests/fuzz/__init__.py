"""Mutated files: each reader gives an error of ours or values, and never anything else."""
