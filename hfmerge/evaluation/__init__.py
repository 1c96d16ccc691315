"""Evaluation: suites of tasks, scores with intervals, matrices of models x tasks, and reports to the Hub."""
