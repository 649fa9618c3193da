"""What every room uses and what knows nothing of networks: provenance, files, dtypes."""
