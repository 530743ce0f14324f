"""Who belongs to a deployment: the cluster's secret, what is derived from it, and TLS. See docs/security.md."""
