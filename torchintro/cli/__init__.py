"""The command line ``torchintro``."""
