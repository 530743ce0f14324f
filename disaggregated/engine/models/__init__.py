"""Model definitions, made of the op table."""
