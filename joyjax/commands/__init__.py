"""The commands of the `joyjax` program, one file each."""
