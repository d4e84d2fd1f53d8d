"""From a YAML file to a run: everything around the method."""
