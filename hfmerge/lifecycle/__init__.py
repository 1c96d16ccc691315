"""Changing and proving a merge that exists: plans from a ledger, records, verification, certificates, publishing."""
