"""The tests, in folders that mirror the package's rooms; `support` has what they share."""
