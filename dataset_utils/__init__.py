"""Commands that run once per data set: python -m dataset_utils.NAME."""
