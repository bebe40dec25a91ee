"""Questions asked of many runs or objectives: audit, diagnosis, comparison."""
