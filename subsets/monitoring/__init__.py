"""Which domains a request used the experts of, for logs and for deciding what to exclude."""
