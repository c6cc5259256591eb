"""What one experiment needs and nobody else."""
