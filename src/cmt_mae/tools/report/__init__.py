"""The page of a run, and tables of results, from files; trains nothing."""
