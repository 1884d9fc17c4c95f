"""The command line: one file a verb, and no torch until a verb needs it."""
