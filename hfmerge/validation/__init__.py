"""Validation of data from elsewhere: limits, strict JSON and YAML, kinds of values, quoting of text, folders."""
