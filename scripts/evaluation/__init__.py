"""What comparing schedules takes: pictures and how they were made, metrics, intervals, the report."""
