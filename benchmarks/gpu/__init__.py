"""The stages of the report on a GPU (`make gpu-report`): one module each, one process each."""
