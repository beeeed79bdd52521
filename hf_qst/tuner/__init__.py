"""What every PEFT method of this package shares: registration, configuration, the layer around a decoder stack."""
