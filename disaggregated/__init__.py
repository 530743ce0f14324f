"""What every process of a disaggregated deployment shares: configuration, errors, wire types, KV layout."""

__version__ = "0.1.0"
