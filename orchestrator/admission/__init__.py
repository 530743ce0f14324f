"""Who is let in, when it is their turn, and what those are told who are not: keys, quotas, deadlines and the queue."""
