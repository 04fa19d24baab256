"""Code of stage train; its recipes and commands to run are in the top-level folder `train/`."""
