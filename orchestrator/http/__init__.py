"""HTTP between a client's socket and our handlers: who reads it, and what a handler needs of one request."""
