"""Written for a contract that does not exist yet."""

raise AssertionError("never imported")
