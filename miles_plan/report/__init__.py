"""Terminal tables, the HTML report and the Perfetto trace, from the plan's JSON."""
