"""Pictures with matplotlib: retention, topics, domains, tasks, training."""
