"""Language models with sparse activations: train, measure, decode faster."""

__version__ = "0.1.0"
