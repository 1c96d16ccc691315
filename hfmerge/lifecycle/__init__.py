"""Changes and proofs of an existing merge: plans from a ledger, records, verification, certificates, publishing."""
