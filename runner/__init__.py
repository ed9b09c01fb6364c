"""Train neural network potentials on quantum-chemistry data, from one TOML file."""

__version__ = "0.8.0"
