"""Code of stage serve; its commands to run and deployment files are in the top-level folder `serve/`."""
