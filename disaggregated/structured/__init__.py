"""What clients say of structured output, made into a `Grammar`, and how its text is read. Without torch."""
