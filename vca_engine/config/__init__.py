"""The settings that a YAML file and the command line may give."""
