"""What `benchmarks.transfer` measures: our transports, raw sockets, and other libraries, all moving the same blocks."""
