"""Everything that reads or writes weights."""
