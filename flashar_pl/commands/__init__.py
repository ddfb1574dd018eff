"""The commands of `flashar`, one file per verb. Importing one imports neither torch nor Lightning."""
