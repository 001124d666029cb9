"""The command line `repa-cache`, one file a group of commands."""
