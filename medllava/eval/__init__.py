"""Code of stage eval; its benchmark definitions and commands to run are in the top-level folder `eval/`."""
