"""What data from elsewhere may be: limits, strict JSON and YAML, kinds of values, text made safe to show, folders."""
