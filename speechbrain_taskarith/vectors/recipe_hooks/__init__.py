"""What a recipe names in its YAML: checkpointers and pretrainer."""
