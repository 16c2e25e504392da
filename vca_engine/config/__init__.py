"""What a YAML file and the command line may say."""
