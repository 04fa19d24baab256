"""Code of stage instruct_gen; its recipes, prompts and commands to run are in the top-level folder `instruct_gen/`."""
